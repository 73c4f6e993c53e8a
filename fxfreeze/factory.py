"""A model as a command line names it: a function that builds it, and files with its weights and its inputs."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .errors import ArtifactError, CaptureError, PlanError

if TYPE_CHECKING:
    from .plan import Plan

_ROWS = 64
"""Of calibration data, at a time."""


def build_model(factory: str, weights: Path | None) -> nn.Module:
    """Import ``pkg.module:function``, call it, and load `weights` into the result.

    Raises:
        CaptureError: there is no such function, or it does not return an nn.Module.
        ArtifactError: the weights file is unreadable or does not fit the model.
    """
    module_name, _, function_name = factory.partition(":")
    if not function_name:
        raise PlanError(f"{factory!r} does not name a function", hint="write it as pkg.module:function")
    sys.path.insert(0, os.getcwd())
    try:
        function: Callable[[], Any] = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise CaptureError(f"cannot import {factory}: {error}", hint="run from the folder that holds it") from error
    finally:
        sys.path.remove(os.getcwd())
    model = function()
    if not isinstance(model, nn.Module):
        raise CaptureError(f"{factory} returned {type(model).__name__}, not an nn.Module", where=factory)
    if weights is not None:
        _load_weights(model, weights)
    return model


def _load_weights(model: nn.Module, weights: Path) -> None:
    tensors = load_tensors(weights)
    known = dict(model.state_dict())
    # A file keeps one name of tied tensors; the others are filled by the tie.
    given = {known[name].data_ptr() for name in tensors if name in known}
    tied = {name for name, value in known.items() if name not in tensors and value.data_ptr() in given}
    missing, unknown = sorted(known.keys() - tensors.keys() - tied), sorted(tensors.keys() - known.keys())
    wrong = [f"{name} {tuple(tensors[name].shape)} (model: {tuple(known[name].shape)})"
             for name in known.keys() & tensors.keys() if tensors[name].shape != known[name].shape]  # fmt: skip
    kinds = (("missing", missing), ("unknown", unknown), ("wrong shape", wrong))
    problems = [f"{what}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}" for what, names in kinds if names]
    if problems:
        raise ArtifactError(f"the weights do not fit the model; {'; '.join(problems)}", where=str(weights))
    model.load_state_dict(tensors, strict=False)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file. Raises ArtifactError where it cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot read tensors: {error}", where=str(path)) from error


def load_batches(path: Path, plan: Plan) -> list[dict[str, Any]]:
    """What a file of samples holds, as many rows at a time as the plan's inputs take; a rest that is too few is left.

    Raises:
        ArtifactError: tensors with different numbers of rows, or fewer than one call takes.
    """
    tensors = load_tensors(path)
    rows = {name: len(value) if value.ndim else 0 for name, value in tensors.items()}
    if not rows or min(rows.values()) != max(rows.values()) or not min(rows.values()):
        raise ArtifactError(f"its tensors hold different numbers of samples, or none: {rows}", where=str(path))
    count, (least, most) = min(rows.values()), _rows_per_call(plan)
    if count < least:
        raise ArtifactError(
            f"{count} samples, and the plan's inputs take {least} at a time", where=str(path),
            hint="add samples, or let the first size of the inputs be symbolic",
        )  # fmt: skip
    size = max(least, min(most, _ROWS))
    return [{name: value[start : start + size] for name, value in tensors.items()}
            for start in range(0, count - least + 1, size)]  # fmt: skip


def _rows_per_call(plan: Plan) -> tuple[int, int]:
    """The fewest and the most rows that all inputs of a plan take; where they contradict each other, the fewest."""
    least, most = 1, _ROWS
    for size in (spec.shape[0] for spec in plan.inputs if spec.shape):
        bounds = plan.dims.get(size) if isinstance(size, str) else None
        fixed = size if isinstance(size, int) else None
        least = max(least, fixed or (bounds.min if bounds else 1))
        most = min(most, fixed or (bounds.max if bounds else None) or most)
    return least, most
