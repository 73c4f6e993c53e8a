"""What every call of torch.export needs, at capture and again at lowering."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch.export import Dim

from .program import TensorSpec


def dynamic_shapes(
    specs: Sequence[TensorSpec], dims: Mapping[str, tuple[int, int | None]]
) -> tuple[dict[int, Any], ...]:
    """Per input: axis → the Dim of its name, one Dim per name. A dim whose bounds leave one size is no dim."""
    # A minimum of 1 is left unsaid: torch.export would read it as a promise that the graph was guarded for 1. The
    # prefix keeps names apart from sympy's own (S, N, I, E …).
    known = {
        name: Dim(f"dim_{name}", min=low if low > 1 else None, max=high)
        for name, (low, high) in dims.items()
        if low != high
    }
    return tuple({axis: known[size] for axis, size in enumerate(spec.shape) if size in known} for spec in specs)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the compilers' advice out of the user's terminal; what matters comes back in an error."""
    loggers = [logging.getLogger(name) for name in ("torch", "onnxscript", "onnx_ir", "onnx_diagnostic")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def summary(error: BaseException) -> str:
    """The class of a compiler's error, and the first three lines in which it says something, on one line."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:400]}" if lines else type(error).__name__
