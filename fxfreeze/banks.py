"""Adapters that rows select from, apart from the compiled program: stored once, given to every target as inputs.

A compiler that froze them into its code would have to run again for one adapter more. So the program that is emitted
is :func:`opened`: each constant that holds one matrix of all adapters (``lora_A`` of a site, or ``lora_B``) is an input
of it, behind the user's, with a symbolic first dim of 2 or more. Its first row is zeros, for rows of id 0. In an ONNX
file such an input has a default, so that the file runs by itself; whoever runs it feeds what came later.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .errors import ArtifactError
from .plan import LoRA, Plan
from .program import BANK, BANK_NOTE, Origin, Program, TensorSpec
from .serialize import Interface

FOLDER = "adapters"
LEFTOVER = re.compile(rf"{FOLDER}/\d+(\.[0-9a-f]+)?\.safetensors")
"""Files that an interrupted :meth:`fxfreeze.Artifact.add_adapter` may leave behind; they are never read."""


@dataclass(frozen=True)
class Bank:
    """One matrix of all adapters of a site.

    Attributes:
        name: of the constant, of the input in its place, and of the tensor in the file.
        select: the input by which rows choose.
        step, site, leaf: whose parameter it is.
        spec: the input; its first dim is symbolic.
        note: why an adapter that peft trained would be none of this layer, in a sentence without a subject, or "".
    """

    name: str
    select: str
    step: str
    site: str
    leaf: str
    spec: TensorSpec
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        spec = self.spec
        return {
            "name": self.name, "select": self.select, "step": self.step, "site": self.site, "leaf": self.leaf,
            "shape": list(spec.shape), "dtype": str(spec.dtype).removeprefix("torch."), "device": str(spec.device),
            **({"note": self.note} if self.note else {}),
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Bank:
        spec = TensorSpec(
            data["name"], getattr(torch, data["dtype"]), tuple(data["shape"]), device=torch.device(data["device"])
        )
        return cls(
            data["name"], data["select"], data["step"], data["site"], data["leaf"], spec, data.get("note", "")
        )  # fmt: skip


def banks(program: Program, plan: Plan) -> dict[Bank, Tensor]:
    """What of `program` is to be given as inputs, and what it holds now, in the order of the graph."""
    selects = {step.name: step.select for step in plan.steps if isinstance(step, LoRA)}
    found: dict[Bank, Tensor] = {}
    for node in program.graph.nodes:
        origin = node.meta.get("fxfreeze")
        if node.op != "get_attr" or not isinstance(origin, Origin) or origin.primitive != BANK:
            continue
        name, select, value = str(node.target), selects[origin.step], node.meta["val"]
        shape: tuple[int | str, ...] = (_dim(select, program.dims), *map(int, value.shape[1:]))
        spec = TensorSpec(name, value.dtype, shape, device=value.device)
        note = node.meta.get(BANK_NOTE, "")
        bank = Bank(name, select, origin.step, origin.site, name.rpartition(".")[2], spec, note)
        found[bank] = program.state[name].to(value.dtype)
    return found


def _dim(select: str, taken: Mapping[str, Any]) -> str:
    """Name of the first dim of what `select` chooses from; none of the user's."""
    name = f"{select}_choices"
    while name in taken:
        name += "_"
    return name


def with_inputs(interface: Interface, found: Sequence[Bank]) -> Interface:
    """`interface` with the banks as inputs behind its own.

    Drawn ids are 0 and 1, for a bank may be drawn with two rows only.
    """
    dims = {str(bank.spec.shape[0]): (2, None) for bank in found}
    chosen = {bank.select for bank in found}
    own = (replace(spec, high=1) if spec.select and spec.name in chosen else spec for spec in interface.inputs)
    return replace(interface, inputs=(*own, *(bank.spec for bank in found)), dims={**interface.dims, **dims})


def opened(program: Program, found: Sequence[Bank]) -> Program:
    """A copy of `program` with inputs in place of the banks; `program` itself where there are none."""
    if not found:
        return program
    copy = program.clone()
    interface, own = with_inputs(Interface.of(program), found), copy.placeholders
    added = []
    for bank in found:
        nodes = copy.graph.find_nodes(op="get_attr", target=bank.name)
        with copy.graph.inserting_before(nodes[0]):
            node = copy.graph.placeholder(re.sub(r"\W", "_", bank.name))
        node.meta["val"] = nodes[0].meta["val"]
        for old in nodes:
            old.replace_all_uses_with(node)
            copy.graph.erase_node(old)
        added.append(node)
    first = next(node for node in copy.graph.nodes if node not in own and node not in added)
    for node in (*own, *added):
        first.prepend(node)
    copy.inputs, copy.dims = interface.inputs, dict(interface.dims)
    copy.sweep()
    return copy


def closed(program: Program, interface: Interface, values: Mapping[str, Tensor]) -> Program:
    """The inverse of :func:`opened`: a stored program with `values` as constants, to be called as `interface` says."""
    with program.fake_mode as mode:
        for spec, node in list(zip(program.inputs, program.placeholders, strict=True))[len(interface.inputs) :]:
            program.state[spec.name] = values[spec.name]
            with program.graph.inserting_after(node):
                constant = program.graph.create_node("get_attr", spec.name)
            constant.meta = {**node.meta, "val": mode.from_tensor(values[spec.name], static_shapes=True)}
            node.replace_all_uses_with(constant)
            program.graph.erase_node(node)
    program.inputs, program.dims = tuple(interface.inputs), dict(interface.dims)
    return program


class Shelf:
    """The banks of an artifact and what is in them, read from their file at the first use.

    Attributes:
        banks: in the order of the inputs.
    """

    def __init__(self, found: Sequence[Bank], file: Path, values: Mapping[str, Tensor] | None = None) -> None:
        self.banks, self.file = tuple(found), file
        # Without banks there is no file.
        self._values = dict(values or {}) if values is not None or not self.banks else None

    @property
    def values(self) -> dict[str, Tensor]:
        """By name, on the device of the program.

        Raises:
            ArtifactError: the file is missing or does not hold them.
        """
        if self._values is None:
            try:
                stored = safetensors.torch.load_file(str(self.file))
                self._values = {bank.name: stored[bank.name].to(bank.spec.device) for bank in self.banks}
            except (OSError, KeyError, safetensors.SafetensorError) as error:
                raise ArtifactError(
                    f"the adapters cannot be read: {error}", where=f"{FOLDER}/{self.file.name}",
                    hint="another process may have added an adapter since: load the artifact anew",
                ) from error  # fmt: skip
        return self._values

    def extended(self, rows: Mapping[str, Tensor], file: Path) -> Shelf:
        """Another shelf with one row more in the banks that `rows` names (float64, without the first dim).

        Raises:
            ArtifactError: a value overflows the bank's dtype.
        """
        values = dict(self.values)
        for name, row in rows.items():
            own = row.to(values[name].device, values[name].dtype)
            if not bool(torch.isfinite(own).all()):
                raise ArtifactError(f"the adapter overflows {own.dtype}", where=name)
            values[name] = torch.cat([values[name], own[None]])
        return Shelf(self.banks, file, values)

    def write(self) -> None:
        """Into its file, through to the disk."""
        self.file.parent.mkdir(exist_ok=True)
        safetensors.torch.save_file({name: value.cpu().contiguous() for name, value in self.values.items()}, self.file)


class Fed:
    """A runner whose last inputs are an artifact's banks, as they are at the time of a call."""

    def __init__(self, runner: Any, shelf: Any) -> None:
        self.runner, self.shelf = runner, shelf

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = self.runner(*inputs, *self.shelf().values.values())
        return result
