"""Adapter weights on disk: safetensors files, read strictly and written in one step.

A file that fxfreeze wrote says in its metadata what its steps were trained as, since the same numbers mean something
else under another scale. Files of other origin have no such metadata and are taken at their word.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.nn.functional import pad

from .checkpoints import adapter_key
from .errors import PlanError
from .plan import LoRA, Plan, Step, from_peft, write_file
from .program import ADAPTERS

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


def check_constant(name: str, value: Tensor, like: Tensor, where: str) -> Tensor:
    """`value` in the dtype of `like`, if it can be that constant of a spliced module: a mask may hold infinities.

    Raises:
        PlanError: it has another shape, is of another kind (floating, complex, integer or bool), or does not fit; names
            the key.
    """
    if value.shape != like.shape:
        raise PlanError(f"{name} has shape {tuple(value.shape)}, but {tuple(like.shape)} is needed", where=where)
    if _kind(value) != _kind(like):
        raise PlanError(f"{name} is {value.dtype}, but a dtype like {like.dtype} is needed", where=where)
    cast = value.to(like.dtype)
    if _kind(like) == "integer" and not torch.equal(cast.to(value.dtype), value):
        raise PlanError(f"{name} holds numbers that {like.dtype} does not", where=where)
    return cast


def _kind(value: Tensor) -> str:
    if value.is_floating_point():
        return "floating"
    return "complex" if value.is_complex() else "bool" if value.dtype == torch.bool else "integer"


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


class Lone:
    """One adapter out of many: the LoRA of one module, from a file of its own or a dict, for a place in a bank.

    A key is ``<module path>.<leaf>``, with or without ``adapters.<any step>.``: the adapter may have been trained under
    another name than the bank has. A file of ours says with which scale, and so does a folder that peft wrote; other
    numbers have the bank's.

    Raises:
        PlanError: the file cannot be read, or does not hold a LoRA.
    """

    def __init__(self, state: str | os.PathLike[str] | Mapping[str, Tensor], where: str = "") -> None:
        metadata: dict[str, str] = {}
        self._steps: list[LoRA] = []
        self.from_peft = False
        if isinstance(state, Mapping):
            self.stored, self.where = dict(state), where
        elif os.path.isdir(state):
            self.where, self.from_peft = os.fspath(state), True
            self.stored = self._read_peft()
        else:
            (self.stored, metadata), self.where = read(state), os.fspath(state)
        self.trained: dict[str, dict[str, Any]] = {}
        if metadata.get("format") == KIND:
            check_metadata(metadata, [], self.where)
            self.trained = json.loads(metadata["steps"])
            self._refuse_others()
        self._asked: dict[str, None] = {}

    def _read_peft(self) -> dict[str, Tensor]:
        """The tensors of a peft checkpoint under our names; what it does beside them is refused."""
        steps = from_peft(self.where)
        self._steps = [step for step in steps if type(step) is LoRA]
        if wrong := [step.kind for step in steps if type(step) is not LoRA]:
            raise PlanError(f"holds more than a LoRA: {', '.join(wrong)}", where=self.where)
        stored, _ = read(str(self._steps[0].weights))
        return {".".join(found): value for key, value in stored.items() if (found := adapter_key(key))}

    def _refuse_others(self) -> None:
        kinds = {name: step.get("kind") for name, step in self.trained.items()}
        if wrong := [f"{name} ({kind})" for name, kind in kinds.items() if kind != "lora"]:
            raise PlanError(f"holds more than a LoRA: {', '.join(wrong)}", where=self.where)

    def pair(
        self, step: LoRA, site: str, a_shape: Sequence[int] | None = None, b_shape: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """A [rank, in] and scale · B [out, rank] of `step` at `site` in float64, zeros where its rank is smaller.

        Of a convolution, A has the dims of the window, too; in the file B may have them, each of size 1.

        Args:
            a_shape, b_shape: what they must have at the rank of `step`; None: whatever is there.

        Raises:
            PlanError: a key is missing or another shape, not floating, NaN or Inf, or the rank is larger.
        """
        (a_key, a), (b_key, b) = (self._find(step, site, leaf) for leaf in ("lora_A", "lora_B"))
        rank = int(a.shape[0]) if a.ndim else 0
        if rank > step.rank:
            raise PlanError(
                f"{a_key} has rank {rank}, but the adapters have rank {step.rank} at most", where=self.where,
                hint="compile with the largest rank there is: smaller ones are filled up with zeros",
            )  # fmt: skip
        inner = a.shape[1:] if a_shape is None else a_shape[1:]
        outer = b.shape[:1] if b_shape is None else b_shape[:1]
        b = b.flatten(1) if b.shape[2:] == (1,) * (len(inner) - 1) and b.ndim > 2 else b
        check(a_key, a, (rank, *inner), self.where)
        check(b_key, b, (*outer, rank), self.where)
        scale = self._scale(a_key, site, step)
        missing = step.rank - rank
        filled = [0, 0] * (a.ndim - 1) + [0, missing]
        return pad(a.detach().double(), filled), scale * pad(b.detach().double(), (0, missing))

    def finish(self) -> None:
        """Check that every key was asked for.

        Raises:
            PlanError: lists the others.
        """
        check_keys(list(self._asked), list(self.stored), self.where)

    def _find(self, step: LoRA, site: str, leaf: str) -> tuple[str, Tensor]:
        full, short = f"{ADAPTERS}{step.name}.{site}.{leaf}", f"{site}.{leaf}"
        keys = [full] if full in self.stored else [key for key in self.stored if key in _spellings(key, short)]
        if len(keys) > 1:
            raise PlanError(f"both {' and '.join(keys)} may be {full}", where=self.where, hint="use the full name")
        if not keys:
            others = [key for key in self.stored if key not in self._asked]
            raise PlanError(
                f"the file does not fit the adapters: missing {short}", where=self.where,
                hint=f"it holds {', '.join(others[:4]) or 'nothing else'}; keys are named like {full}, or {short}",
            )  # fmt: skip
        self._asked[keys[0]] = None
        return keys[0], self.stored[keys[0]]

    def _scale(self, key: str, site: str, step: LoRA) -> float:
        for own in self._steps:
            if any(fnmatchcase(site, glob) for glob in own.patterns):
                return own.scale
        name = key.removeprefix(ADAPTERS).partition(".")[0] if key.startswith(ADAPTERS) else ""
        known = self.trained.get(name) or (next(iter(self.trained.values())) if len(self.trained) == 1 else {})
        return float(known.get("scale", step.scale))


def _spellings(key: str, short: str) -> tuple[str, str]:
    """`short` as such, and under the step that `key` names."""
    step = key.removeprefix(ADAPTERS).partition(".")[0]
    return short, f"{ADAPTERS}{step}.{short}"


def _meaning(step: Step) -> dict[str, Any]:
    """What changes the function that a step's parameters stand for."""
    data = step.to_dict()
    return {"kind": step.kind, **{key: data[key] if key in data else getattr(step, key) for key in step.meaning}}


def _words(meaning: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in meaning.items())
