"""Take units out of a program: their entries of every constant, and the sizes that operators name.

What belongs to a unit is what :mod:`fxfreeze.coupling` found; whether it may go is for the caller to know.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.axes import Axes, Axis
from fxfreeze.constants import Edit, Recipe
from fxfreeze.coupling import Coupling, op_name
from fxfreeze.errors import PassError
from fxfreeze.program import Program

from .._operators import arguments

aten = torch.ops.aten


def remove(program: Program, found: Coupling, kept: Mapping[Axis, Tensor]) -> None:
    """Keep only some units of some groups.

    Args:
        found: the coupling of `program` as it is, constants that several operators read tied.
        kept: leaf → bool [units]. The others of a group without a reason to stay go; all of them may only where every
            value has other entries.

    Raises:
        PassError: an operator has a shape other than its axes say; the program is then unusable.
    """
    removal = _Removal(program, found, kept)
    calls = [node for node in program.graph.nodes if node.op == "call_function" and removal.touches(node)]
    # Sizes first: what they were is read from the graph.
    changes = {node: removal.rewritten(node) for node in calls}
    removal.shrink_constants()
    for node, (target, given) in changes.items():
        node.target = target
        _set_arguments(node, given)
    for node in calls:
        program.infer(node)
        removal.check(node)
        if _SIZES.get(op_name(node)) is _pad and not any(arguments(node)["pad"]):
            program.replace(node, arguments(node)["self"])


def pick(program: Program, constant: Node, edit: Edit) -> Tensor:
    """What `edit`, which picks entries, makes of a constant; tensors in memory of their own."""
    return edit(program.state[str(constant.target)].detach()).contiguous()


class _Removal:
    def __init__(self, program: Program, found: Coupling, kept: Mapping[Axis, Tensor]) -> None:
        self.program, self.found, self.kept = program, found, kept
        self.axes: Axes = found.axes
        self.masks: dict[Axis, Tensor | None] = {}

    # ---- axes

    def mask(self, axis: Axis) -> Tensor | None:
        """Which entries of an axis stay, of those that are counted: bool; None: all."""
        if axis not in self.masks:
            self.masks[axis] = self._mask(axis)
        return self.masks[axis]

    def _mask(self, axis: Axis) -> Tensor | None:
        if not any(leaf in self.kept for leaf in self.axes.leaves(axis)):
            return None
        form = self.axes.form(axis)
        if form is None:
            leaf = next(iter(self.axes.leaves(axis)))
            return self.kept[leaf]
        parts = [self._whole(part) for part in form.parts]
        if form.kind == "sum":
            return torch.cat(parts)
        result = parts[0]
        for part in parts[1:]:
            result = (result[:, None] & part).flatten()
        return result

    def _whole(self, axis: Axis) -> Tensor:
        mask = self.mask(axis)
        return torch.ones(self.axes.count(axis), dtype=torch.bool) if mask is None else mask

    def size(self, axis: Axis) -> int:
        """How many entries stay, of those that are counted."""
        mask = self.mask(axis)
        return self.axes.count(axis) if mask is None else int(mask.sum())

    def changes(self, axis: Axis) -> bool:
        return (mask := self.mask(axis)) is not None and not bool(mask.all())

    def before(self, axis: Axis, end: int) -> int:
        """How many of the first `end` entries stay."""
        mask = self.mask(axis)
        return end if mask is None else int(mask[:end].sum())

    # ---- nodes

    def touches(self, node: Node) -> bool:
        """Whether an axis of the node's operands or results loses entries."""
        dims = [dims for operand in node.all_input_nodes for dims in self._dims(operand, node)]
        return any(map(self.changes, [axis for item in (*dims, *self._dims(node, node)) for axis in item]))

    def _dims(self, node: Node, reader: Node) -> list[list[Axis]]:
        if node.op == "get_attr":
            return [self.found.constants.get((str(node.target), reader), [])]
        dims = self.found.dims.get(node, [])
        return dims if isinstance(node.meta.get("val"), list | tuple) else [dims]

    def rewritten(self, node: Node) -> tuple[Any, dict[str, Any]]:
        """The operator to call instead, and those of its arguments that name sizes, for the sizes that stay."""
        rule = _SIZES.get(op_name(node))
        if rule is None:
            return node.target, {}
        result = rule(self, node, arguments(node))
        return result if isinstance(result, tuple) else (node.target, result)

    def check(self, node: Node) -> None:
        """The shape of the result is what its axes say."""
        values = node.meta["val"] if isinstance(node.meta["val"], list | tuple) else [node.meta["val"]]
        for value, dims in zip(values, self._dims(node, node), strict=True):
            wanted = [self.size(axis) if isinstance(axis.size, int) else None for axis in dims]
            if isinstance(value, Tensor) and any(
                size is not None and str(size) != str(own) for size, own in zip(wanted, value.shape, strict=True)
            ):
                raise PassError(
                    f"{node.format_node()} gives {list(value.shape)} where units were removed, not {wanted}",
                    where=self.program.where(node), hint="this is a defect of the pass",
                )  # fmt: skip

    # ---- constants

    def shrink_constants(self) -> None:
        picks: dict[str, dict[int, Tensor]] = {}
        for (name, _), dims in self.found.constants.items():
            masks = {dim: self.mask(axis) for dim, axis in enumerate(dims) if self.changes(axis)}
            if masks:
                picks[name] = {dim: mask.nonzero().flatten() for dim, mask in masks.items() if mask is not None}
        for name, indices in picks.items():
            self._shrink(name, indices)

    def _shrink(self, name: str, indices: Mapping[int, Tensor]) -> None:
        def shrunk(value: Tensor) -> Tensor:
            for dim, index in indices.items():
                value = value.index_select(dim, index.to(value.device))
            return value

        program, nodes = self.program, self.program.graph.find_nodes(op="get_attr", target=name)
        fold = program.folds.get(name)
        program.state[name] = pick(program, nodes[0], shrunk)
        if fold is not None:
            program.folds[name] = replace(fold, base=Recipe(shrunk(fold.base.value())))
        for node in nodes:
            node.meta["val"] = fake(program, program.state[name], node.meta["val"].dtype)


def fake(program: Program, value: Tensor, dtype: torch.dtype) -> Any:
    """What the ``meta["val"]`` of a constant says of `value`."""
    with program.fake_mode as mode:
        return mode.from_tensor(value, static_shapes=True).to(dtype)


def _set_arguments(node: Node, given: Mapping[str, Any]) -> None:
    """Change arguments of a call by their schema names."""
    if not given:
        return
    names = [item.name for item in node.target._schema.arguments if not item.kwarg_only]  # type: ignore[union-attr]
    args, kwargs = list(node.args), dict(node.kwargs)
    for name, value in given.items():
        if name in names and names.index(name) < len(args):
            args[names.index(name)] = value
        else:
            kwargs[name] = value
    node.args, node.kwargs = tuple(args), kwargs


# ---------------------------------------------------------------------- sizes

SizeRule = Callable[[_Removal, Node, dict[str, Any]], Any]
"""The arguments of a call that change, by schema name; or another operator with those."""


def _named(removal: _Removal, node: Node, sizes: Sequence[Any], dims: Sequence[Axis]) -> list[Any]:
    """Sizes of results: numbers become what stays of them; −1 is as it was."""

    def resized(size: Any, axis: Axis) -> Any:
        if isinstance(axis.size, int) and removal.changes(axis):
            return size if size == -1 else removal.size(axis)
        return _symbolic(removal, node, size, axis, sizes)

    return [resized(size, axis) for size, axis in zip(sizes, dims, strict=True)]


def _symbolic(removal: _Removal, node: Node, size: Any, axis: Axis, sizes: Sequence[Any]) -> Any:
    """A symbolic size with units in it, as batch × heads."""
    if not isinstance(size, Node) or not removal.changes(axis):
        return size
    if op_name(node) == "reshape" and -1 not in sizes and sum(isinstance(other, Node) for other in sizes) == 1:
        return -1
    program, old, new = removal.program, removal.axes.count(axis), removal.size(axis)
    each = program.call(operator.floordiv, size, old, before=node, like=node)
    return program.call(operator.mul, each, new, before=node, like=node)


def _sizes(name: str) -> SizeRule:
    def rule(removal: _Removal, node: Node, given: dict[str, Any]) -> dict[str, Any]:
        dims = removal.found.dims[node]
        if op_name(node) == "unflatten":
            first = given["dim"] % (len(dims) - len(given[name]) + 1)
            dims = dims[first : first + len(given[name])]
        return {name: _named(removal, node, given[name], dims)}

    return rule


def _split(removal: _Removal, node: Node, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Parts of equal sizes may be of different ones now."""
    dim = given["dim"]
    if not removal.changes(removal.found.of(given["self"], node)[dim]):
        return node.target, {}
    sizes = [removal.size(part[dim]) for part in removal.found.dims[node]]
    node.args, node.kwargs = (given["self"], sizes, dim), {}
    return aten.split_with_sizes.default, {}


def _slice(removal: _Removal, node: Node, given: dict[str, Any]) -> dict[str, Any]:
    """Also a ``narrow``, which names how many it takes."""
    axis = removal.found.of(given["self"], node)[given["dim"]]
    if not removal.changes(axis) or axis is removal.found.dims[node][given["dim"]]:
        return {}
    size, count = int(axis.size), int(node.meta["val"].shape[given["dim"]])
    start = given["start"] or 0
    start = max(0, start + size) if start < 0 else min(start, size)
    first, last = removal.before(axis, start), removal.before(axis, start + count)
    return {"start": first, "length": last - first} if "length" in given else {"start": first, "end": last}


def _select(removal: _Removal, node: Node, given: dict[str, Any]) -> dict[str, Any]:
    axis = removal.found.of(given["self"], node)[given["dim"]]
    return {"index": removal.before(axis, given["index"] % int(axis.size))} if removal.changes(axis) else {}


def _pad(removal: _Removal, node: Node, given: dict[str, Any]) -> dict[str, Any]:
    """What is added shrinks with the units it meets; what is cropped with those that are gone."""
    source, result, pad = removal.found.of(given["self"], node), removal.found.dims[node], list(given["pad"])
    for at in range(len(pad) // 2):
        old, new = source[-1 - at], result[-1 - at]
        if not (removal.changes(old) or removal.changes(new)):
            continue
        low, high = pad[2 * at], pad[2 * at + 1]
        ends = removal.before(new, max(0, low)), removal.size(new) - removal.before(new, int(new.size) - max(0, high))
        cropped = (removal.before(old, max(0, -low)),
                   removal.size(old) - removal.before(old, int(old.size) - max(0, -high)))  # fmt: skip
        pad[2 * at : 2 * at + 2] = [ends[0] - cropped[0], ends[1] - cropped[1]]
    return {"pad": pad}


def _repeat(name: str) -> SizeRule:
    def rule(removal: _Removal, node: Node, given: dict[str, Any]) -> dict[str, Any]:
        source, result, times = removal.found.of(given["self"], node), removal.found.dims[node], given[name]
        if name == "repeats" and isinstance(times, int):
            dim = given["dim"]
            return {name: removal.size(result[dim]) // removal.size(source[dim])}
        padded = [Axis(1)] * (len(result) - len(source)) + source
        shifted = list(times)
        for at in range(-1, -len(times) - 1, -1):
            if removal.changes(result[at]):
                shifted[at] = removal.size(result[at]) // removal.size(padded[at])
        return {name: shifted}

    return rule


def _groups(removal: _Removal, node: Node, given: dict[str, Any]) -> dict[str, Any]:
    """A group has as many channels as the weight's second dim: of inputs, or of outputs if it is transposed."""
    if given["groups"] == 1:
        return {}
    weight = removal.found.of(given["weight"], node)
    source, result = removal.found.of(given["input"], node), removal.found.dims[node]
    whole = (result if "transpose" in op_name(node) else source)[1 - len(weight)]
    return {"groups": removal.size(whole) // removal.size(weight[1])}


def _norm_groups(removal: _Removal, node: Node, given: dict[str, Any]) -> dict[str, Any]:
    channels = removal.found.of(given["input"], node)[1]
    return {"num_groups": removal.size(channels) * given["num_groups"] // int(channels.size)}


def _shuffle(removal: _Removal, node: Node, given: dict[str, Any]) -> dict[str, Any]:
    mask = removal.mask(removal.found.of(given["self"], node)[1])
    return {} if mask is None else {"groups": int(mask.reshape(given["groups"], -1).any(1).sum())}


def _attention(removal: _Removal, node: Node, given: dict[str, Any]) -> dict[str, Any]:
    """The scale that is not named is that of the width it had."""
    width = removal.found.of(given["query"], node)[-1]
    if given["scale"] is not None or not removal.changes(width):
        return {}
    return {"scale": 1 / math.sqrt(int(width.size))}


_SIZES: dict[str, SizeRule] = {
    "reshape": _sizes("shape"), "view": _sizes("size"), "unflatten": _sizes("sizes"),
    "expand": _sizes("size"), "broadcast_to": _sizes("size"),
    **dict.fromkeys((f"{new}{kind}" for new in ("", "new_") for kind in ("zeros", "ones", "full", "empty")),
                    _sizes("size")),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), _split),
    "slice": _slice, "narrow": _slice, "select": _select, "pad": _pad, "constant_pad_nd": _pad,
    "repeat": _repeat("repeats"), "tile": _repeat("dims"), "repeat_interleave": _repeat("repeats"),
    **dict.fromkeys((f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)), _groups),
    "group_norm": _norm_groups, "channel_shuffle": _shuffle, "scaled_dot_product_attention": _attention,
}  # fmt: skip
