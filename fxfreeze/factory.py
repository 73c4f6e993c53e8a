"""A model as a command line names it: a function that builds it, and a file with its weights."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .errors import ArtifactError, CaptureError, PlanError


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
