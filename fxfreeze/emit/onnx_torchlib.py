"""torchlib, onnxscript's translations of torch's operators, read once in a process and not with every export."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def read_once() -> Iterator[None]:
    """Until this ends, onnxscript remembers what it reads out of a translation's source.

    ``torch.onnx.export`` asks about 500 translations for their domain each time, and onnxscript parses the source of
    each anew to answer: 0.43 of the 1.39 CPU seconds of compiling two layers for ONNX (torch 2.14, onnxscript 0.7).
    An onnxscript that has no such property is left as it is.
    """
    from onnxscript import TracedOnnxFunction

    traced: Any = TracedOnnxFunction
    found = vars(traced).get("function_ir")
    if not isinstance(found, property) or found.fget is None:
        yield
        return
    traced.function_ir = property(_remembering(found.fget))
    try:
        yield
    finally:
        traced.function_ir = found


@functools.cache
def _remembering(read: Any) -> Any:
    return functools.cache(read)
