"""Which channels, neurons and heads of a program can only be removed together, and what of every constant is theirs.

Every dim of every value is an axis (:mod:`fxfreeze.axes`). An operator says which of its operands' and results' axes
are the same: those that a residual addition adds, the input features of a layer and the columns of its weight. Reshapes
say which are products of others, concats and splits which are sums. What is left when all operators were heard are
leaves, each the index of one group of units: the channels of a stage of residual blocks, the heads of an attention, the
entries of a head that queries and keys share. Heads and entries of heads overlap: either may be removed, each for all
of the others.

An axis that an operator does more with than carry or contract (it normalises over it, returns it, looks rows up in it)
cannot lose units, and neither can what is made of the same leaves. An operator that no rule knows does so with
all axes of its operands.

Works on the ATen graph as captured, or after any pass before the stage "lower".

Source: the dependency graphs of DepGraph (arXiv 2301.12900) ask the same question layer by layer; here dims are
terms, so that flattened maps, heads and groups need no rule of their own.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from .axes import Axes, Axis, Size
from .dataflow import arguments, passage, reshape_blocks, tensors
from .program import Program, is_random

Role = Literal["row", "column", "channel"]
Dims = list[Axis]
"""One axis per dim of a tensor."""

INPUT, OUTPUT = "comes from an input", "reaches an output"
NORMALISED, LOOKED_UP = "is normalised over", "is looked up in"

COPIES = frozenset({
    "to", "_to_copy", "type_as", "clone", "contiguous", "detach", "alias", "lift_fresh", "lift_fresh_copy", "dropout",
    "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "zeros_like", "ones_like", "full_like", "empty_like",
    "masked_fill", "where", "rsub", "hardswish", "log_sigmoid", "subtract", "multiply", "divide", "true_divide",
    "absolute", "special_expit",
})  # fmt: skip
"""Operators of one element at a time, of which not all are tagged so."""


@dataclass(frozen=True, eq=False)
class Member:
    """What the units of a group own of one constant, or of one value, along one of its dims.

    Attributes:
        node: the ``get_attr`` node of the constant (the first, where several name it), or the operator of the value.
        dim: counted from the front.
        entries: int64 [units, k]: where along `dim` the entries of every unit are; ascending.
        role: "row": the operator that reads the constant makes units with it, as a layer with the rows of its weight
            and with its bias; "column": it reads units with it, as a layer with the columns; else "channel": one number
            or slice per unit, as the parameters of a batch norm, and all values.
        readers: of a constant, the nodes that read it so.
    """

    node: Node
    dim: int
    entries: Tensor
    role: Role
    readers: tuple[Node, ...] = ()


@dataclass(frozen=True, eq=False)
class Group:
    """Units that all have entries in the same constants; see the module docstring.

    Attributes:
        size: how many units there are, 2 or more.
        members: constants that units own entries of, in graph order.
        values: results of operators that they have entries in, in graph order. Dims of a symbolic size are left out.
        reason: why none may be removed, in a sentence without a subject; None: they may, down to one.
        axis: their index, a leaf of :attr:`Coupling.axes`.
    """

    size: int
    members: tuple[Member, ...]
    values: tuple[Member, ...]
    reason: str | None
    axis: Axis = field(repr=False)

    @property
    def name(self) -> str:
        """Where the units are made: the path of the layer with the first rows, or the first constant there is."""
        rows = [str(member.node.target) for member in self.members if member.role == "row"]
        return rows[0].removesuffix(".weight").removesuffix(".bias") if rows else str(self.members[0].node.target)


@dataclass(frozen=True, eq=False)
class Contraction:
    """Where an operator sums over an axis, so that it is an axis of its operands and not of its result.

    Attributes:
        node: the operator.
        axis: what is summed over. Of a convolution with groups, the channels of one of them.
        terms: operands with a dim that `axis` is, or is a factor of; an entry counts where none of them is 0.
    """

    node: Node
    axis: Axis
    terms: tuple[tuple[Node, int], ...]


@dataclass(frozen=True, eq=False)
class Coupling:
    """The axes of all values of a program, and the groups that follow.

    Attributes:
        axes: every equation between them that holds.
        dims: node → one axis per dim of its value; of several values, one list for each. Constants are left out.
        constants: (name of the constant, the node that reads it) → one axis per dim.
        contractions: every sum over an axis. What is neither summed over here nor a reason why a group stays is carried
            from operands to results, unit by unit.
        groups: in graph order.
    """

    axes: Axes
    dims: dict[Node, Any]
    constants: dict[tuple[str, Node], Dims]
    contractions: tuple[Contraction, ...]
    groups: tuple[Group, ...]

    def of(self, operand: Node, reader: Node) -> Dims:
        """The axes of a tensor that `reader` reads."""
        return self.constants[str(operand.target), reader] if operand.op == "get_attr" else self.dims[operand]


def coupling_groups(program: Program, *, tied: bool = True) -> list[Group]:
    """The groups of all dims of the constants of `program`, removable or not, in graph order.

    Args:
        tied: a constant that several operators read stays one constant, so that what they do with it is coupled too;
            otherwise each could be given a copy of its own, and :attr:`Member.readers` says who reads which.
    """
    return list(coupling(program, tied=tied).groups)


def is_part(group: Group) -> bool:
    """Whether all that its units have entries in has others, too: then none of them has to stay."""
    return all(value.entries.numel() < value.node.meta["val"].shape[value.dim] for value in group.values)


def coupling(program: Program, *, tied: bool = True) -> Coupling:
    """As :func:`coupling_groups`, with the axes of all values."""
    walk = _Walk(program, tied)
    walk.run()
    return Coupling(walk.axes, walk.dims, walk.read, tuple(walk.contractions), walk.groups())


class _Walk:
    """Once through the graph: every operator's rule is asked for the axes of its result."""

    def __init__(self, program: Program, tied: bool) -> None:
        self.program, self.tied = program, tied
        self.axes = Axes()
        self.dims: dict[Node, Any] = {}
        self.held: dict[Any, Dims] = {}
        self.first: dict[Any, Node] = {}
        self.readers: dict[Any, dict[Node, None]] = {}
        self.read: dict[tuple[str, Node], Dims] = {}
        self.roles: dict[tuple[Any, int], Role] = {}
        self.blocks: list[tuple[Axis, str]] = []
        self.windows: list[Axis] = []
        self.contractions: list[Contraction] = []
        self.node: Node = next(iter(program.graph.nodes))

    def run(self) -> None:
        for node in self.program.graph.nodes:
            self.node = node
            if node.op == "placeholder":
                self.dims[node] = self.fresh(node.meta["val"].shape, INPUT)
            elif node.op == "call_function":
                self._visit(node)
            elif node.op == "output":
                for value in node.args[0]:
                    self.block(self.of(value), OUTPUT)

    def _visit(self, node: Node) -> None:
        value = node.meta["val"]
        if node.target is operator.getitem:
            if node.args[0] in self.dims:
                self.dims[node] = self.dims[node.args[0]][node.args[1]]  # type: ignore[index]
            return
        name = op_name(node)
        if name == "sym_size":  # arithmetic on what may change
            self.block([self.of(node.args[0])[node.args[1]]], "has a size that is computed with")  # type: ignore[index, arg-type]
        if not any(isinstance(item, Tensor) for item in (value if isinstance(value, list | tuple) else [value])):
            return
        rule = _RULES.get(name) or (_pointwise if _is_pointwise(node, name) else None)
        dims = None if rule is None or _draws(node) else rule(self, node, arguments(node))
        self.dims[node] = self._unknown(node, name) if dims is None else dims

    def _unknown(self, node: Node, name: str) -> Any:
        for operand in node.all_input_nodes:
            for dims in self._each(operand):
                self.block(dims, f"is read by {name}{self._place(node)}, which is not known")
        value, reason = node.meta["val"], f"is made by {name}{self._place(node)}, which is not known"
        if isinstance(value, list | tuple):
            return [self.fresh(item.shape, reason) if isinstance(item, Tensor) else [] for item in value]
        return self.fresh(value.shape, reason)

    def _each(self, operand: Node) -> list[Dims]:
        value = operand.meta.get("val")
        if isinstance(value, list | tuple):
            return list(self.dims[operand])
        return [self.of(operand)] if isinstance(value, Tensor) else []

    # ---- what rules say

    def of(self, operand: Node) -> Dims:
        """The axes of an operand of the node that is looked at."""
        if operand.op != "get_attr":
            return self.dims[operand]
        key = self._key(operand, self.node)
        if key not in self.held:
            self.held[key] = [Axis(_size(size)) for size in operand.meta["val"].shape]
            self.first[key] = operand
        self.readers.setdefault(key, {})[self.node] = None
        self.read[str(operand.target), self.node] = self.held[key]
        return self.held[key]

    def same(self, first: Axis, second: Axis) -> Axis:
        """Two axes are one; where their forms do not fit each other, neither can lose units."""
        if not self.axes.unify(first, second):
            reason = f"is laid out in two ways that do not fit each other{self._place(self.node)}"
            self.block([first, second], reason)
        return first

    def broadcast(self, operands: Iterable[Dims], shape: Sequence[Any]) -> Dims:
        """Axes of a value of `shape` in which operands meet, dims of one entry spread."""
        result = [Axis(_size(size)) for size in shape]
        found: dict[int, Axis] = {}
        for dims in operands:
            for at in range(-len(dims), 0):
                if dims[at].size != 1 or result[at].size == 1:
                    found[at] = self.same(found[at], dims[at]) if at in found else dims[at]
        return [found.get(at, result[at]) for at in range(-len(result), 0)]

    def split(self, axis: Axis, sizes: Sequence[Any]) -> Dims:
        """Parts of `axis`, one behind the other."""
        if isinstance(axis.size, int) and all(isinstance(size, int) for size in sizes) and sum(sizes) == axis.size:
            if (parts := self.axes.split(axis, sizes)) is not None:
                return parts
        self.block([axis], f"is split by {op_name(self.node)} where that does not fit{self._place(self.node)}")
        return self.fresh(sizes, f"is a part that {op_name(self.node)} makes{self._place(self.node)}")

    def factor(self, axis: Axis, count: int) -> Dims:
        """`axis` as `count` times the rest, which varies faster."""
        if not isinstance(axis.size, int):
            self.over([axis])
            return self.fresh([count, f"{axis.size} / {count}"], "has a dynamic size")
        factors = [Axis(count), Axis(axis.size // count)]
        self.same(axis, self.axes.product(factors))
        return factors

    def fresh(self, shape: Sequence[Any], reason: str) -> Dims:
        """New axes that cannot lose units."""
        dims = [Axis(_size(size)) for size in shape]
        self.block(dims, reason)
        return dims

    def block(self, dims: Iterable[Axis], reason: str) -> None:
        """Axes that cannot lose units: looked at in the end, when it is known what they are made of."""
        self.blocks += [(axis, reason) for axis in dims]

    def over(self, dims: Iterable[Axis], how: str = "is mixed") -> None:
        """Axes that the node needs whole."""
        self.block(dims, f"{how} by {op_name(self.node)}{self._place(self.node)}")

    def contract(self, axis: Axis, *terms: tuple[Node, int]) -> None:
        """The node sums over `axis`, which is, or is a factor of, these dims of its operands."""
        placed = tuple((operand, dim % operand.meta["val"].ndim) for operand, dim in terms)
        self.contractions.append(Contraction(self.node, axis, placed))

    def role(self, operand: Any, dim: int, role: Role) -> None:
        """What a constant is to the node that is looked at, which reads it as it is or moved about."""
        reader, ndim = self.node, operand.meta["val"].ndim
        dim = dim % ndim - ndim
        while operand.op == "call_function" and operand.args and isinstance(operand.args[0], Node):
            way = passage(operand)
            before = dim if op_name(operand) in COPIES else way.to_operand(dim) if way is not None else None
            if before is None:
                return
            reader, operand, dim = operand, operand.args[0], before
        if operand.op == "get_attr":
            self.roles.setdefault((self._key(operand, reader), dim % operand.meta["val"].ndim), role)

    def _key(self, constant: Node, reader: Node) -> Any:
        return str(constant.target) if self.tied else (str(constant.target), reader)

    def _place(self, node: Node) -> str:
        path = self.program.module_path(node)
        return f" at {path}" if path else ""

    # ---- what follows

    def groups(self) -> tuple[Group, ...]:
        reasons: dict[Axis, str] = {}
        # What can be read, or given, from outside comes first.
        for axis, reason in sorted(self.blocks, key=lambda block: (block[1] != OUTPUT, block[1] != INPUT)):
            for leaf in self.axes.leaves(axis):
                reasons.setdefault(leaf, reason)
        inner = {leaf for axis in self.windows for leaf in self.axes.leaves(axis)}  # no units of anything
        members: dict[Axis, list[Member]] = {}
        for key, dims in self.held.items():
            for dim, axis in enumerate(dims):
                for leaf, entries in self._entries(axis).items():
                    readers = tuple(self.readers[key])
                    role = self.roles.get((key, dim), "channel")
                    members.setdefault(leaf, []).append(Member(self.first[key], dim, entries, role, readers))
        values: dict[Axis, list[Member]] = {}
        for node, dims in self.dims.items():
            if node.op == "call_function" and isinstance(node.meta["val"], Tensor):
                for dim, axis in enumerate(dims):
                    for leaf, entries in self._entries(axis).items():
                        values.setdefault(leaf, []).append(Member(node, dim, entries, "channel"))
        return tuple(
            Group(int(leaf.size), tuple(found), tuple(values.get(leaf, ())), reasons.get(leaf), leaf)
            for leaf, found in members.items() if isinstance(leaf.size, int) and leaf.size > 1 and leaf not in inner
        )  # fmt: skip

    def _entries(self, axis: Axis) -> dict[Axis, Tensor]:
        return self.axes.entries(axis) if isinstance(axis.size, int) else {}


def op_name(node: Node) -> str:
    """The operator without its overload, and without its namespace where that is aten."""
    schema = getattr(node.target, "_schema", None)
    return node.name if schema is None else str(schema.name).removeprefix("aten::")


def spatial_dims(name: str) -> int:
    """How many dims the windows of an operator have, by its name: of adaptive_avg_pool2d 2."""
    return int(re.findall(r"(\d)d", name)[0])


def _size(size: Any) -> Size:
    return size if isinstance(size, int) else str(size)


def _is_pointwise(node: Node, name: str) -> bool:
    return name in COPIES or torch.Tag.pointwise in getattr(node.target, "tags", ())


def _draws(node: Node) -> bool:
    """Whether it draws random numbers: with fewer units all others would get other ones."""
    if not is_random(node):
        return False
    given = arguments(node)
    return bool(given.get("train", given.get("training", given.get("dropout_p", True))))


def _at(dims: Dims, dim: int, extra: int = 0) -> int:
    return dim % (len(dims) + extra)


# ---------------------------------------------------------------------- rules

Rule = Callable[[_Walk, Node, dict[str, Any]], Any]
"""Axes of the result of a call with these arguments, by name; None: not a form that is known."""


def _pointwise(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims | None:
    if not isinstance(node.meta["val"], Tensor):
        return None
    return walk.broadcast(map(walk.of, tensors(node)), node.meta["val"].shape)


# ---- layers


def _linear(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims | None:
    weight = walk.of(given["weight"])
    if len(weight) != 2:
        return None
    rows, columns = weight
    *leading, features = walk.of(given["input"])
    walk.contract(walk.same(features, columns), (given["input"], -1), (given["weight"], 1))
    _weighted(walk, given["weight"], 0, 1)
    return [*leading, _biased(walk, given["bias"], rows)]


def _weighted(walk: _Walk, weight: Node, rows: int, columns: int) -> None:
    walk.role(weight, rows, "row")
    walk.role(weight, columns, "column")


def _biased(walk: _Walk, bias: Node | None, rows: Axis) -> Axis:
    if bias is not None:
        walk.same(rows, walk.of(bias)[-1])
        walk.role(bias, -1, "row")
    return rows


def _product(left: str, right: str, added: str | None = None) -> Rule:
    """A matrix product, with or without leading dims, of operands with these names."""

    def rule(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims:
        one, other = walk.of(given[left]), walk.of(given[right])
        inner = (given[left], -1), (given[right], -2 if len(other) > 1 else -1)
        walk.contract(walk.same(one[-1], other[-2:][0]), *inner)
        walk.role(given[left], -1, "column")
        walk.role(*inner[1], "column")
        ends = [*one[-2:-1], *(other[-1:] if len(other) > 1 else [])]
        if len(one) > 1:
            walk.role(given[left], -2, "row")
        if len(other) > 1:
            walk.role(given[right], -1, "row")
        shape = node.meta["val"].shape
        leading = walk.broadcast([one[:-2], other[:-2]], shape[: len(shape) - len(ends)])
        result = [*leading, *ends]
        if added is None:
            return result
        walk.role(given[added], -1, "row")
        return walk.broadcast([result, walk.of(given[added])], shape)

    return rule


def _conv(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims | None:
    """A group has its own part of the inputs and of the outputs: both are products of the groups and the rest."""
    value, weight, groups = walk.of(given["input"]), walk.of(given["weight"]), given["groups"]
    if not isinstance(groups, int) or (groups > 1 and not isinstance(weight[0].size, int)):
        return None  # a weight per sample
    spatial, transposed = len(weight) - 2, "transpose" in op_name(node)
    at = len(value) - 1 - spatial
    walk.over(value[at + 1 :])
    walk.windows += weight[2:]
    whole, part = weight[:2]
    if groups > 1:
        group, own = walk.factor(whole, groups)
        other = walk.axes.product([group, part])
    else:
        other, own = part, whole
    rows, columns = (other, whole) if transposed else (whole, other)
    walk.same(value[at], columns)
    walk.contract(own if transposed else part, (given["input"], at), (given["weight"], 0 if transposed else 1))
    _weighted(walk, given["weight"], *((1, 0) if transposed else (0, 1)))
    made = walk.fresh(node.meta["val"].shape[at + 1 :], f"is made by the window of {op_name(node)}{walk._place(node)}")
    return [*value[:at], _biased(walk, given["bias"], rows), *made]


def _embedding(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims:
    rows, features = walk.of(given["weight"])
    walk.over([rows], LOOKED_UP)
    walk.role(given["weight"], 1, "row")
    return [*walk.of(given["indices"]), features]


# ---- norms


def _channel_norm(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims:
    """A number per channel, which are the second dim."""
    value = walk.of(given["input"])
    for name in ("weight", "bias", "running_mean", "running_var"):
        if given.get(name) is not None:
            walk.same(value[1], walk.of(given[name])[0])
    if op_name(node) == "instance_norm":
        walk.over(value[2:], NORMALISED)
    return value


def _group_norm(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims:
    value = walk.of(given["input"])
    channels = value[1]
    _, inner = walk.factor(channels, given["num_groups"])
    for name in ("weight", "bias"):
        if given[name] is not None:
            walk.same(channels, walk.of(given[name])[0])
    walk.over([inner, *value[2:]], NORMALISED)
    return value


def _last_norm(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims:
    """LayerNorm and RMSNorm: over the last dims, with a number for each of their entries."""
    value = walk.of(given["input"])
    last = value[len(value) - len(given["normalized_shape"]) :]
    for name in ("weight", "bias"):
        if given.get(name) is not None:
            for one, other in zip(last, walk.of(given[name]), strict=True):
                walk.same(one, other)
    walk.over(last, NORMALISED)
    return value


def _prelu(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims:
    value, slopes = walk.of(given["self"]), walk.of(given["weight"])
    if slopes and slopes[0].size != 1:
        walk.same(value[min(1, len(value) - 1)], slopes[0])
    return value


def _gate(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims:
    """``fxfreeze::gate``: thresholds and gains per neuron, [C] or [modes, C]."""
    value = walk.of(given["h"])
    for name in ("threshold", "gain", "temperature"):
        if given.get(name) is not None and (own := walk.of(given[name])) and own[-1].size != 1:
            walk.same(value[given["dim"]], own[-1])
            walk.over(own[:-1])
    return value


# ---- windows


def _window(walk: _Walk, node: Node, given: dict[str, Any]) -> Any:
    """Pools, paddings and resamplings of the last dims; how many is in the name."""
    name = op_name(node)
    value, spatial = walk.of(given["self"] if "self" in given else given["input"]), spatial_dims(name)
    kept = value[: len(value) - spatial]
    walk.over(value[len(kept) :])
    results = node.meta["val"]

    def dims(result: Tensor) -> Dims:
        return [*kept, *walk.fresh(result.shape[len(kept) :], f"is made by {name}{walk._place(node)}")]

    return dims(results) if isinstance(results, Tensor) else [dims(result) for result in results]


def _grid_sampler(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims:
    value, grid = walk.of(given["input"]), walk.of(given["grid"])
    walk.over([*value[2:], grid[-1]])
    return [walk.same(value[0], grid[0]), value[1], *grid[1:-1]]


def _pad(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims:
    """Behind and before the entries of a dim are others; negative numbers crop."""
    dims, pad = list(walk.of(given["self"])), list(given["pad"])
    constant = given.get("mode", "constant") == "constant"
    for at, (low, high) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        dim = len(dims) - 1 - at
        size, axis = node.meta["val"].shape[dim], dims[dim]
        if (low, high) == (0, 0):
            continue
        if not constant or not all(isinstance(item, int) for item in (low, high, size, axis.size)):
            walk.over([axis])
            (dims[dim],) = walk.fresh([size], f"is padded by {op_name(node)}{walk._place(node)}")
            continue
        cropped = [max(0, -low), int(axis.size) + min(0, low) + min(0, high), max(0, -high)]
        inner = walk.split(axis, cropped)[1] if cropped[1] != axis.size else axis
        dims[dim] = walk.axes.sum([Axis(max(0, low)), inner, Axis(max(0, high))])
    return dims


def _pixel_shuffle(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims:
    *leading, channels, height, width = walk.of(given["self"])
    after = node.meta["val"].shape
    kept, inner = walk.factor(channels, after[-3])
    walk.over([inner, height, width])
    return [*leading, kept, *walk.fresh(after[-2:], "is made by pixel_shuffle")]


def _pixel_unshuffle(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims:
    *leading, channels, height, width = walk.of(given["self"])
    walk.over([height, width])
    inner, *spatial = walk.fresh([given["downscale_factor"] ** 2, *node.meta["val"].shape[-2:]],
                                 "is made by pixel_unshuffle")  # fmt: skip
    return [*leading, walk.axes.product([channels, inner]), *spatial]


def _channel_shuffle(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims:
    first, channels, *spatial = walk.of(given["self"])
    outer, inner = walk.factor(channels, given["groups"])
    return [first, walk.axes.product([inner, outer]), *spatial]


def _im2col(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims:
    *leading, channels, height, width = walk.of(given["self"])
    walk.over([height, width])
    inner, places = walk.fresh([math.prod(given["kernel_size"]), node.meta["val"].shape[-1]], "is made by im2col")
    return [*leading, walk.axes.product([channels, inner]), places]


def _col2im(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims:
    *leading, patches, places = walk.of(given["self"])
    channels, inner = walk.factor(patches, node.meta["val"].shape[-3])
    walk.over([inner, places])
    return [*leading, channels, *walk.fresh(node.meta["val"].shape[-2:], "is made by col2im")]


# ---- moves


def _reshaped(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims:
    operand = node.all_input_nodes[0]
    before, after = operand.meta["val"].shape, node.meta["val"].shape
    value, blocks = walk.of(operand), reshape_blocks(before, after)
    if blocks is None:
        walk.over(value)
        return walk.fresh(after, f"is made by {op_name(node)}{walk._place(node)}")
    result: Dims = []
    for old, new in blocks:
        size = _size(math.prod(after[at] for at in new))
        whole = walk.axes.product([value[at] for at in old], size)
        if len(new) == 1:
            result.append(whole)
            continue
        made = [Axis(_size(after[at])) for at in new]
        walk.same(whole, walk.axes.product(made, size))
        result += made
    return result


def _squeezed(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims:
    """A dim that it leaves must keep two units."""
    value, named = walk.of(given["self"]), given.get("dim")
    dims = range(len(value)) if named is None else named if isinstance(named, list | tuple) else [named]
    walk.over((value[dim] for dim in dims), "would be taken away")
    return _reshaped(walk, node, given)


def _permuted(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims:
    value = walk.of(given["self"])
    return [value[dim] for dim in given["dims"]]


def _transposed(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims:
    """Of two dims, named or the last ones, or of all."""
    value = list(walk.of(given["self"]))
    if op_name(node) in ("t", "numpy_T"):
        return value[::-1]
    first, second = [item for key, item in given.items() if key != "self"] or (-2, -1)
    value[first], value[second] = value[second], value[first]
    return value


def _movedim(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims:
    value = walk.of(given["self"])
    named = [[item] if isinstance(item, int) else list(item) for item in (given["source"], given["destination"])]
    source, destination = ([dim % len(value) for dim in dims] for dims in named)
    rest = iter(dim for dim in range(len(value)) if dim not in source)
    return [value[source[destination.index(at)] if at in destination else next(rest)] for at in range(len(value))]


def _expanded(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims:
    """A dim of one entry becomes one of as many as are named: all the same."""
    dims = walk.broadcast(map(walk.of, tensors(node)), node.meta["val"].shape)
    walk.block((axis for axis in dims if isinstance(axis.size, str)), "has a dynamic size")
    return dims


def _repeated(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims:
    value, after = walk.of(given["self"]), node.meta["val"].shape
    times = list(given["repeats"] if "repeats" in given else given["dims"])
    if len(times) != len(after):
        times = [1] * (len(after) - len(times)) + times
    padded = [Axis(1)] * (len(after) - len(value)) + value
    return [_times(walk, axis, count, size, slow=True) for axis, count, size in zip(padded, times, after, strict=True)]


def _interleaved(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims | None:
    if given.get("dim") is None or not isinstance(given["repeats"], int):
        return None
    value = list(walk.of(given["self"]))
    at = _at(value, given["dim"])
    value[at] = _times(walk, value[at], given["repeats"], node.meta["val"].shape[at], slow=False)
    return value


def _times(walk: _Walk, axis: Axis, count: Any, size: Any, slow: bool) -> Axis:
    if isinstance(count, int) and count == 1:
        return axis
    if not isinstance(count, int):
        walk.over([axis])
        return walk.fresh([size], "has a dynamic size")[0]
    return walk.axes.product([Axis(count), axis] if slow else [axis, Axis(count)], _size(size))


# ---- parts


def _cat(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims:
    tensors = [item for item in given["tensors"] if list(item.meta["val"].shape) != [0]]  # empty ones of any shape fit
    parts = [walk.of(item) for item in tensors]
    if not parts:
        return walk.fresh(node.meta["val"].shape, "is empty")
    at = given["dim"] % len(parts[0])
    rest = walk.broadcast([[*dims[:at], *dims[at + 1 :]] for dims in parts],
                          [size for dim, size in enumerate(node.meta["val"].shape) if dim != at])  # fmt: skip
    own = [dims[at] for dims in parts]
    if all(isinstance(axis.size, int) for axis in own):
        return [*rest[:at], walk.axes.sum(own), *rest[at:]]
    walk.over(own)
    return [*rest[:at], *walk.fresh([node.meta["val"].shape[at]], "has a dynamic size"), *rest[at:]]


def _stack(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims:
    ndim, shape = node.meta["val"].ndim, node.meta["val"].shape
    at = given["dim"] % ndim
    rest = walk.broadcast([walk.of(item) for item in given["tensors"]], [*shape[:at], *shape[at + 1 :]])
    return [*rest[:at], *walk.fresh([shape[at]], "is made by stack"), *rest[at:]]


def _splits(walk: _Walk, node: Node, given: dict[str, Any]) -> list[Dims]:
    value, results = walk.of(given["self"]), node.meta["val"]
    at = _at(value, given["dim"])
    parts = walk.split(value[at], [result.shape[at] for result in results])
    return [[*value[:at], part, *value[at + 1 :]] for part in parts]


def _unbind(walk: _Walk, node: Node, given: dict[str, Any]) -> list[Dims]:
    value = walk.of(given["self"])
    at = _at(value, given["dim"])
    walk.over([value[at]])
    walk.split(value[at], [1] * len(node.meta["val"]))
    return [[*value[:at], *value[at + 1 :]] for _ in node.meta["val"]]


def _select(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims:
    value, index = walk.of(given["self"]), given["index"]
    at = _at(value, given["dim"])
    size = value[at].size
    if isinstance(size, int) and isinstance(index, int):
        walk.split(value[at], [index % size, 1, size - index % size - 1])
    else:
        walk.over([value[at]])
    return [*value[:at], *value[at + 1 :]]


def _slice(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims:
    value = list(walk.of(given["self"]))
    at = _at(value, given["dim"])
    axis, after, step = value[at], node.meta["val"].shape[at], given.get("step", 1)
    if step == 1 and _size(after) == axis.size:
        return value
    start = given["start"] if given["start"] is not None else 0
    if isinstance(axis.size, int) and isinstance(start, int) and isinstance(after, int) and step == 1:
        start = max(0, start + axis.size) if start < 0 else min(start, axis.size)
        value[at] = walk.split(axis, [start, after, axis.size - start - after])[1]
        return value
    walk.over([axis])
    (value[at],) = walk.fresh([after], f"is sliced{walk._place(node)}")
    return value


def _narrowed(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims:
    end = given["start"] + given["length"] if isinstance(given["start"], int) else None
    return _slice(walk, node, {**given, "end": end})


def _indexed(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims | None:
    """Along one dim, by an index of any shape."""
    value = walk.of(given["self"])
    if "indices" in given:
        named = [(at, item) for at, item in enumerate(given["indices"]) if item is not None]
        if len(named) != 1 or named[0][1].meta["val"].dtype == torch.bool:
            return None
        at, index = named[0]
    else:
        at, index = _at(value, given["dim"]), given["index"]
    walk.over([value[at]], LOOKED_UP)
    own = walk.of(index)
    walk.over(own)
    made = walk.fresh(index.meta["val"].shape, f"is looked up{walk._place(node)}")
    return [*value[:at], *made, *value[at + 1 :]]


# ---- over dims


def _over(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims:
    """Softmaxes, sums up to each entry, shifts: the dims stay, and are needed whole."""
    value = walk.of(given["self"])
    named = given["dim"] if "dim" in given else given["dims"]
    dims = named if isinstance(named, list | tuple) else [named]
    how = NORMALISED if "softmax" in op_name(node) else "is mixed"
    walk.over((value[dim] for dim in (dims or range(len(value)))), how)
    return value


def _reduced(free: bool = False) -> Rule:
    """A reduction; `free`: entries that are 0 do not count, so that they may go."""

    def rule(walk: _Walk, node: Node, given: dict[str, Any]) -> Any:
        if "other" in given:  # the larger of two values
            return _pointwise(walk, node, given)
        value, named = walk.of(given["self"]), given.get("dim")
        dims = (
            range(len(value)) if named is None or named == [] else named if isinstance(named, list | tuple) else [named]
        )
        gone = {dim % len(value) for dim in dims} if value else set()
        for dim in gone:
            if free and _ignores_zeros(given):
                walk.contract(value[dim], (given["self"], dim))
            else:
                walk.over([value[dim]])
        kept = [
            Axis(1) if dim in gone else axis
            for dim, axis in enumerate(value)
            if dim not in gone or given.get("keepdim")
        ]
        results = node.meta["val"]
        return kept if isinstance(results, Tensor) else [kept for _ in results]

    return rule


def _ignores_zeros(given: dict[str, Any]) -> bool:
    power = given.get("ord", given.get("p", 2))
    return power is None or (isinstance(power, int | float) and power > 0)


def _triangle(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims:
    value = walk.of(given["self"])
    walk.over(value[-2:])
    return value


def _glu(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims:
    value = list(walk.of(given["self"]))
    at = _at(value, given["dim"])
    half = node.meta["val"].shape[at]
    first, second = walk.split(value[at], [half, half])
    value[at] = walk.same(first, second)
    return value


def _attention(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims:
    """q [.., H, L, D], k [.., H, S, D], v [.., H, S, E] → [.., H, L, E]."""
    query, key, value = (walk.of(given[name]) for name in ("query", "key", "value"))
    shape = node.meta["val"].shape
    walk.contract(walk.same(query[-1], key[-1]), (given["query"], -1), (given["key"], -1))
    walk.over([walk.same(key[-2], value[-2])], NORMALISED)
    keys = walk.broadcast([key[:-2], value[:-2]], key_shape := given["key"].meta["val"].shape[:-2])
    if given.get("enable_gqa") and _size(key_shape[-1]) != _size(shape[-3]):
        each = int(shape[-3]) // int(key_shape[-1])
        keys = [*keys[:-1], walk.axes.product([keys[-1], Axis(each)], _size(shape[-3]))]
    leading = walk.broadcast([query[:-2], keys], shape[:-2])
    if given["is_causal"]:
        walk.over([query[-2], key[-2]])
    if given["attn_mask"] is not None:
        scores = [*shape[:-1], given["key"].meta["val"].shape[-2]]
        walk.broadcast([[*leading, query[-2], key[-2]], walk.of(given["attn_mask"])], scores)
    return [*leading, query[-2], value[-1]]


def _einsum(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims | None:
    if "equation" not in given:
        return None
    left, arrow, right = given["equation"].replace(" ", "").partition("->")
    if "." in left or not arrow or given.get("path"):
        return None
    letters: dict[str, Axis] = {}
    for term, tensor in zip(left.split(","), given["tensors"], strict=True):
        for letter, axis in zip(term, walk.of(tensor), strict=True):
            if axis.size != 1 or letter not in letters:
                known = letters.get(letter)
                letters[letter] = axis if known is None or known.size == 1 else walk.same(known, axis)
    for letter in sorted(letters.keys() - set(right)):
        terms = zip(left.split(","), given["tensors"], strict=True)
        walk.contract(letters[letter], *((tensor, at) for term, tensor in terms for at, own in enumerate(term)
                                         if own == letter))  # fmt: skip
    return [letters[letter] for letter in right]


# ---- from nothing


def _created(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims:
    """A size that is a number may be another one; operands are read for their dtype alone."""
    dims = [Axis(_size(size)) for size in node.meta["val"].shape]
    walk.block((axis for axis in dims if isinstance(axis.size, str)), "has a dynamic size")
    return dims


def _one_hot(walk: _Walk, node: Node, given: dict[str, Any]) -> Dims:
    return [*walk.of(given["self"]), *walk.fresh(node.meta["val"].shape[-1:], "is made by one_hot")]


_RULES: dict[str, Rule] = {
    "linear": _linear, "embedding": _embedding,
    "matmul": _product("self", "other"), "mm": _product("self", "mat2"), "bmm": _product("self", "mat2"),
    "addmm": _product("mat1", "mat2", "self"), "baddbmm": _product("batch1", "batch2", "self"),
    **dict.fromkeys((f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)), _conv),
    "batch_norm": _channel_norm, "instance_norm": _channel_norm, "group_norm": _group_norm,
    "layer_norm": _last_norm, "rms_norm": _last_norm, "prelu": _prelu, "fxfreeze::gate": _gate,
    **dict.fromkeys(
        (f"{kind}{n}d" for n in (1, 2, 3) for kind in (
            "max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample_nearest",
            "_upsample_nearest_exact", "upsample_linear", "upsample_bilinear", "upsample_bicubic", "upsample_trilinear",
            "_upsample_bilinear", "reflection_pad", "replication_pad")),
        _window,
    ),
    **dict.fromkeys(("max_pool2d_with_indices", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"), _window),
    "grid_sampler": _grid_sampler, "pad": _pad, "constant_pad_nd": _pad,
    "pixel_shuffle": _pixel_shuffle, "pixel_unshuffle": _pixel_unshuffle, "channel_shuffle": _channel_shuffle,
    "im2col": _im2col, "col2im": _col2im,
    **dict.fromkeys(("reshape", "view", "flatten", "unflatten", "unsqueeze"), _reshaped),
    "squeeze": _squeezed,
    "permute": _permuted, "movedim": _movedim,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "t", "numpy_T", "mT", "adjoint"), _transposed),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expanded),
    "repeat": _repeated, "tile": _repeated, "repeat_interleave": _interleaved,
    "cat": _cat, "concat": _cat, "stack": _stack,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), _splits),
    "unbind": _unbind, "select": _select, "slice": _slice,
    "narrow": _narrowed, "index_select": _indexed, "index": _indexed,
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "flip", "roll"), _over),
    **dict.fromkeys(("mean", "amax", "amin", "max", "min", "var", "std", "prod", "any", "all", "argmax", "argmin",
                     "logsumexp"), _reduced()),
    **dict.fromkeys(("sum", "linalg_vector_norm", "norm"), _reduced(free=True)),
    "tril": _triangle, "triu": _triangle, "glu": _glu, "scaled_dot_product_attention": _attention, "einsum": _einsum,
    **dict.fromkeys((f"{new}{kind}" for new in ("", "new_") for kind in ("zeros", "ones", "full", "empty")), _created),
    "one_hot": _one_hot,
}  # fmt: skip
