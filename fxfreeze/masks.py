"""Pruning masks on disk: which weights stay, by the name of the parameter they belong to.

A file of ours is safetensors with one bool tensor per parameter, True where a weight stays, and metadata that says so.
A safetensors file of other origin may hold 0 and 1 in any dtype. What open_lth saves (a ``.pt`` or ``.pth`` file with a
dict from parameter names to tensors of 0 and 1) is read too, without unpickling anything but tensors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import weights
from .errors import PlanError
from .record import suggest

KIND, FORMAT = "fxfreeze.masks", 1
"""What the metadata of a mask file says it is, and the version of its layout; a newer one is refused."""

_PICKLES = (".pt", ".pth")


def read_mask(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The masks of a file: parameter name → bool tensor in the parameter's shape, on the CPU.

    Args:
        path: a ``.pt`` or ``.pth`` file as open_lth writes it, else a safetensors file.

    Raises:
        PlanError: there is no such file, it holds no masks, a value is neither 0 nor 1, or the layout is a newer one.
    """
    where = os.fspath(path)
    stored = _unpickled(where) if Path(path).suffix in _PICKLES else _safe(where)
    if not stored:
        raise PlanError("the mask file is empty", where=where)
    return {name: as_mask(name, value, where) for name, value in stored.items()}


def write_mask(
    path: str | os.PathLike[str], masks: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write masks to a safetensors file in one step: a killed write leaves the old file, or none.

    Args:
        masks: parameter name → tensor of 0 and 1, or of bools, in the parameter's shape.
        metadata: more to write beside them, texts by name; ``format`` and ``version`` are taken.

    Raises:
        PlanError: there is no mask, a value is neither 0 nor 1, the metadata cannot be written, or the folder is
            missing or cannot be written to.
    """
    where, more = os.fspath(path), dict(metadata or {})
    if Path(path).suffix in _PICKLES:
        raise PlanError("masks are written as safetensors", where=where, hint="let the name end in .safetensors")
    if taken := sorted({"format", "version"} & more.keys()):
        raise PlanError(f"the metadata of a mask file has a {' and a '.join(taken)} of its own", where=where)
    if wrong := [key for key, value in more.items() if not isinstance(key, str) or not isinstance(value, str)]:
        raise PlanError(f"metadata are texts by name, but {wrong[0]!r} is {more[wrong[0]]!r}", where=where)
    if not masks:
        raise PlanError("there are no masks to write", where=where)
    plain = {name: as_mask(name, value, where) for name, value in masks.items()}
    weights.write(path, plain, {"format": KIND, "version": str(FORMAT), **more})


def density(masks: Mapping[str, Tensor]) -> float:
    """The share of weights that stay, over all masks together.

    Raises:
        PlanError: there are none, or a value is neither 0 nor 1.
    """
    count = sum(value.numel() for value in masks.values())
    if not count:
        raise PlanError("there are no masks to take the density of")
    return sum(int(as_mask(name, value, "").sum()) for name, value in masks.items()) / count


def as_mask(name: str, value: object, where: str) -> Tensor:
    """`value` as a bool tensor of its own, on its device.

    Raises:
        PlanError: it is no tensor, or holds something other than 0 and 1; names the key and the first such value.
    """
    if not isinstance(value, Tensor):
        raise PlanError(f"{name} is {type(value).__name__}, but a mask is a tensor of 0 and 1", where=where or None)
    value = value.detach()
    wrong = (value != 0) & (value != 1)
    if bool(wrong.any()):
        first = value[wrong][0].item()
        raise PlanError(
            f"{name} holds {first}, but a mask holds 0 and 1 only ({int(wrong.sum()):,} of {value.numel():,} values "
            "are neither)",
            where=where or None, hint="a mask says which weights stay; the weights themselves belong elsewhere",
        )  # fmt: skip
    return value != 0


def check_masks(masks: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], where: str) -> None:
    """Refuse masks that do not fit a model.

    Args:
        shapes: parameter name → shape, of every parameter that can have a mask. Those without one stay dense.

    Raises:
        PlanError: lists names that the model lacks, with the nearest that it has, and shapes that differ.
    """
    lines = []
    for name, mask in masks.items():
        if name not in shapes:
            lines.append(f"{name}: the model has no such parameter{suggest(name, shapes)}")
        elif tuple(mask.shape) != tuple(shapes[name]):
            lines.append(f"{name}: the mask has shape {tuple(mask.shape)}, the parameter {tuple(shapes[name])}")
    if lines:
        more = f"\n  and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        raise PlanError("the masks do not fit the model:\n  " + "\n  ".join(lines[:_SHOWN]) + more, where=where)


_SHOWN = 8


def _safe(where: str) -> dict[str, Tensor]:
    stored, metadata = weights.read(where)
    kind = metadata.get("format", KIND)
    if kind.startswith("fxfreeze.") and kind != KIND:
        raise PlanError(f"not a file of masks, but of kind {kind!r}", where=where)
    version = metadata.get("version", "1") if metadata.get("format") == KIND else "1"
    if not version.isdecimal():
        raise PlanError(f"the metadata of the mask file is damaged: version {version!r}", where=where)
    if int(version) > FORMAT:
        raise PlanError(f"mask file of version {version}; this fxfreeze reads up to {FORMAT}", where=where)
    return stored


def _unpickled(where: str) -> dict[str, Tensor]:
    try:
        stored = torch.load(where, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise PlanError("no such mask file", where=where) from None
    except OSError as error:
        raise PlanError(f"cannot read the mask file: {error.strerror or error}", where=where) from None
    except Exception as error:  # torch raises what the unpickler or the zip reader did
        raise PlanError(
            f"not a file of tensors that torch.save wrote: {type(error).__name__}", where=where,
            hint="nothing but tensors is unpickled: save {parameter name: tensor of 0 and 1}, or write_mask()",
        ) from None  # fmt: skip
    if not isinstance(stored, dict) or not all(isinstance(key, str) for key in stored):
        raise PlanError(f"holds a {type(stored).__name__}, not masks by the names of parameters", where=where)
    return stored
