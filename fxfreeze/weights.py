"""Adapter weights on disk: safetensors files, read strictly and written in one step.

A file that fxfreeze wrote says in its metadata what its steps were trained as, since the same numbers mean something
else under another scale. Files of other origin have no such metadata and are taken at their word.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .errors import PlanError
from .plan import Plan, Step, write_file

KIND, FORMAT = "fxfreeze.adapters", 1
"""What the metadata of an adapter file says it is, and the version of its layout; a newer one is refused."""


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        PlanError: there is no such file, or it is not one.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}, dict(stored.metadata() or {})
    except FileNotFoundError:
        raise PlanError("no such weights file", where=str(path)) from None
    except OSError as error:
        raise PlanError(f"cannot read the weights file: {error.strerror or error}", where=str(path)) from None
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise PlanError(
            f"not a safetensors file: {error}", where=str(path),
            hint="nothing is unpickled: convert a .pt or .bin file with safetensors.torch.save_file",
        ) from None  # fmt: skip


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file in one step: a killed write leaves the old file, or none.

    Raises:
        PlanError: the folder is missing or cannot be written to.
    """
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_file(Path(path), safetensors.torch.save(plain, dict(metadata)), "weights file")


def check(name: str, value: Tensor, shape: Sequence[int], where: str) -> Tensor:
    """`value` if it can be the parameter `name`.

    Raises:
        PlanError: names the key, what was expected and what is there.
    """
    if tuple(value.shape) != tuple(shape):
        raise PlanError(f"{name} has shape {tuple(value.shape)}, but {tuple(shape)} is needed", where=where)
    if not value.is_floating_point():
        raise PlanError(f"{name} is {value.dtype}, but a floating dtype is needed", where=where)
    if not bool(torch.isfinite(value).all()):
        raise PlanError(f"{name} holds NaN or Inf", where=where, hint="the training diverged, or the file is damaged")
    return value


def check_setting(name: str, value: Tensor, where: str, shape: Sequence[int] = ()) -> Tensor:
    """`value` if it can be the setting `name`: a positive number, or a matrix of `shape`.

    Raises:
        PlanError: names the key, and what is there.
    """
    check(name, value, shape, where)
    if not shape and not float(value) > 0:
        raise PlanError(f"{name} must be > 0, got {float(value):g}", where=where)
    return value


def check_keys(expected: Sequence[str], found: Sequence[str], where: str) -> None:
    """Refuse a file that lacks a parameter, or holds a key that is none.

    Raises:
        PlanError: lists what is missing and what is unexpected.
    """
    lines = []
    for what, names in (
        ("missing", [name for name in expected if name not in found]),
        ("unexpected", [name for name in found if name not in expected]),
    ):
        if names:
            lines.append(f"{what}: {', '.join(names[:8])}" + (f" and {len(names) - 8} more" if len(names) > 8 else ""))
    if lines:
        raise PlanError("the file does not fit the adapters:\n  " + "\n  ".join(lines), where=where)


def metadata(plan: Plan) -> dict[str, str]:
    """What to write beside the adapters of `plan`."""
    steps = {step.name: _meaning(step) for step in plan.steps}
    inputs = plan.to_dict()["inputs"]
    digest = hashlib.sha256(json.dumps([inputs, steps], sort_keys=True).encode()).hexdigest()
    return {"format": KIND, "version": str(FORMAT), "plan": digest, "steps": json.dumps(steps, sort_keys=True)}


def check_metadata(metadata: Mapping[str, str], steps: Iterable[Step], where: str) -> None:
    """Refuse a file of a newer layout, or in which one of `steps` meant something else.

    Raises:
        PlanError: says which.
    """
    if metadata.get("format") != KIND:
        return
    try:
        version, trained = int(metadata["version"]), json.loads(metadata["steps"])
        known = {step.name: trained.get(step.name) for step in steps}
    except (KeyError, ValueError, AttributeError) as error:
        raise PlanError(f"the metadata of the adapter file is damaged: {error!r}", where=where) from None
    if version > FORMAT:
        raise PlanError(f"adapter file of version {version}; this fxfreeze reads up to {FORMAT}", where=where)
    for step in steps:
        then, now = known[step.name], _meaning(step)
        # A key that came to mean something after the file was written says nothing about it.
        if then is not None and any(now.get(key) != value for key, value in then.items()):
            raise PlanError(
                f"step {step.name!r} was trained as {_words(then)}, but the plan says {_words(now)}",
                where=where,
                hint=f"trained numbers mean the same only with the same {', '.join(['kind', *step.meaning])}",
            )


def _meaning(step: Step) -> dict[str, Any]:
    """What changes the function that a step's parameters stand for."""
    data = step.to_dict()
    return {"kind": step.kind, **{key: data[key] if key in data else getattr(step, key) for key in step.meaning}}


def _words(meaning: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in meaning.items())
