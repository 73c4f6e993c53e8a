"""Everything that holds a number per neuron of a gate: what has to shrink where neurons are removed.

From the gate, values are followed forwards as long as they are 0 where the gate's result is, up to the operators that
multiply them by a column per neuron; and backwards, from the gate and from what its result is multiplied by, up to the
operators whose weights have a row per neuron. Dims are counted from the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.constants import Recipe
from fxfreeze.dataflow import Passage, passage, tensors
from fxfreeze.program import Program
from fxfreeze.rewrite import NoMatch, fail

from .._gates import GATE, HardGate, hard_gate
from .._operators import FORMS, WeightOperator, arguments, constant_problem, weight_operator

aten = torch.ops.aten

SILENT = frozenset({
    aten.relu.default, aten.relu6.default, aten.gelu.default, aten.silu.default, aten.mish.default, aten.tanh.default,
    aten.hardswish.default, aten.leaky_relu.default, aten.elu.default, aten.abs.default, aten.square.default,
    aten.sqrt.default, aten.neg.default, aten.dropout.default, aten.clone.default, aten.contiguous.default,
    aten.to.dtype, aten._to_copy.default,
})  # fmt: skip
"""Functions of one element that are 0 at 0."""
POINTWISE = SILENT | {aten.sigmoid.default, aten.exp.default, aten.softplus.default, aten.hardsigmoid.default,
                      aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default}  # fmt: skip
PRODUCTS = frozenset({aten.mul.Tensor, aten.mul.Scalar})
QUOTIENTS = frozenset({aten.div.Tensor, aten.div.Scalar})
SQUEEZES = frozenset({aten.squeeze.dim, aten.squeeze.dims})
SUMS = frozenset({aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar})


@dataclass(frozen=True)
class Cut:
    """A constant that `user` reads, with `span` entries per neuron side by side along its dim `dim`."""

    constant: Node
    user: Node
    dim: int
    span: int = 1


@dataclass
class Channels:
    """What shrinks with the neurons of one gate.

    Attributes:
        values: results of operators, in no order.
        silent: those among them that are 0 where the gate's result is.
        gates: those among them that are gates.
        cuts: constants, readers and factors among them.
        readers: weights with a column per neuron.
        factors: constants that the gate's result is multiplied by.
        sizes: reshapes that name the number of neurons: the node, the position, entries per neuron.
    """

    values: set[Node] = field(default_factory=set)
    silent: set[Node] = field(default_factory=set)
    gates: list[Node] = field(default_factory=list)
    cuts: dict[Cut, None] = field(default_factory=dict)
    readers: list[Cut] = field(default_factory=list)
    factors: list[Cut] = field(default_factory=list)
    sizes: list[tuple[Node, int, int]] = field(default_factory=list)

    def unread(self, program: Program, count: int) -> Tensor:
        """Of `count` neurons, those that meet a 0 on every way from the gate to a reader: bool [count]."""
        zero = {cut.user: _is_zero(program, cut, count) for cut in (*self.factors, *self.readers)}
        never = torch.zeros(count, dtype=torch.bool)
        unread: dict[Node, Tensor] = {}
        for value in reversed(program.graph.nodes):
            if value in self.silent:
                ways = [zero.get(user, never) | unread.get(user, never) for user in value.users]
                unread[value] = torch.stack(ways).all(0) if ways else never
        return unread[self.gates[0]]

    def waking(self, program: Program, count: int) -> Tensor:
        """Of `count` neurons, those that a gate behind the first one lets fire on the 0 they are: bool [count]."""
        levels = [program.constant64(arguments(node)["threshold"]) for node in self.gates[1:] if node in self.silent]
        found = torch.zeros(count, dtype=torch.bool)
        for level in levels:
            assert level is not None
            found |= (level < 0).reshape(-1, count).any(0).cpu()
        return found

    def keep(self, program: Program, kept: Sequence[int]) -> None:
        """Remove all neurons but `kept`; ``meta["kept"]`` of the gates says which of the original ones they are."""
        own: dict[tuple[Node, Node], Node] = {}  # an operator may read one constant by rows and by columns
        for cut in self.cuts:
            key = cut.user, cut.constant
            own[key] = _shrink(program, replace(cut, constant=own.get(key, cut.constant)), kept)
        for node, at, span in self.sizes:
            shape = list(node.args[1])  # type: ignore[arg-type]
            shape[at] = len(kept) * span
            node.args = (node.args[0], shape)
        for node in self.gates:
            size = node.meta.setdefault("neurons", int(node.meta["val"].shape[arguments(node)["dim"]]))
            before = node.meta.get("kept", range(size))
            node.meta["kept"] = tuple(before[at] for at in kept)
        for node in program.graph.nodes:
            if node in self.values:
                program.infer(node)


def channels(program: Program, gate: HardGate) -> Channels | NoMatch:
    """Everything that shrinks with the neurons of `gate`, or what stands in the way."""
    return _Walk(program, gate).run()


class _Walk:
    def __init__(self, program: Program, gate: HardGate) -> None:
        self.program, self.gate, self.found = program, gate, Channels()
        self.count = int(gate.node.meta["val"].shape[gate.dim])
        # Where the neurons are, and how many entries each has, in values that are 0 where the gate is shut; where the
        # neurons are in values that these are made from.
        self.silent: dict[Node, tuple[int, int]] = {gate.node: (gate.dim, 1)}
        self.fed: dict[Node, int] = {}
        self.joins: list[tuple[Node, Node, bool]] = []

    def run(self) -> Channels | NoMatch:
        self._cut_gate(self.gate)
        for way in (self._forwards, lambda: self._backwards(self.gate.value, self.gate.dim), self._join, self._closed):
            if (miss := way()) is not None:
                return miss
        self.found.values, self.found.silent = {*self.silent, *self.fed}, {*self.silent}
        return self.found

    # ---- forwards

    def _forwards(self) -> NoMatch | None:
        stack = [self.gate.node]
        while stack:
            value = stack.pop()
            for user in value.users:
                onward = self._reads(user, value, *self.silent[value])
                if isinstance(onward, NoMatch):
                    return onward
                if onward is None:
                    continue
                if self.silent.setdefault(user, onward) != onward:
                    return fail(f"{_name(user)} meets the neurons along two dims", user)
                stack.append(user)
        return None

    def _reads(self, user: Node, value: Node, dim: int, span: int) -> tuple[int, int] | NoMatch | None:
        """Where the neurons are in `user`; None where it reads them by a column each."""
        if user.op == "output":
            return fail("it is an output of the model", user)
        if user.target in FORMS:
            return self._column(user, value, dim, span)
        if user.target in PRODUCTS or user.target in QUOTIENTS:
            return self._scaled(user, value, dim, span)
        if user.target in SUMS:
            left, right = user.args[:2]
            for other in (left, right):
                if other is not value and not isinstance(other, Node):
                    return fail(f"{_name(user)} makes it other than 0", user)
                if other is not value:
                    self.joins.append((user, other, True))  # type: ignore[arg-type]
            return dim, span
        if user.args[0] is not value or value in user.args[1:]:
            return fail(f"{_name(user)} reads it other than as its first operand", user)
        if user.target is GATE:
            gate = hard_gate(self.program, user)
            if isinstance(gate, NoMatch) or gate.dim != dim or span != 1:
                return fail(f"{_name(user)} is another kind of gate", user)
            self._cut_gate(gate)
            return dim, span
        return (dim, span) if user.target in SILENT else self._moved(user, dim, span)

    def _column(self, user: Node, value: Node, dim: int, span: int) -> NoMatch | None:
        operator = self._operator(user)
        if isinstance(operator, NoMatch):
            return operator
        if operator.kind == "embedding" or operator.input is not value or dim != -1 - len(operator.kernel):
            return fail(f"{_name(user)} does not read it by a column per neuron", user)
        cut = Cut(operator.weight, user, 1 - _row_dim(operator), span)
        self.found.readers.append(cut)
        self.found.cuts[cut] = None
        return None

    def _scaled(self, user: Node, value: Node, dim: int, span: int) -> tuple[int, int] | NoMatch:
        """A product with a number, a constant, or another value; a quotient by one of the former two."""
        left, right = user.args[:2]
        other = right if left is value else left
        if user.target in QUOTIENTS and (left is not value or user.kwargs or not self._is_divisor(other)):
            return fail(f"{_name(user)} divides by what may be 0", user)
        if str(user.meta["val"].shape[dim]) != str(value.meta["val"].shape[dim]):
            return fail(f"{_name(user)} spreads it along its dim", user)
        if not isinstance(other, Node) or other is value or not _varies(other, dim):
            return dim, span
        if not self.program.is_constant(other):
            self.joins.append((user, other, False))
            return dim, span
        cut = Cut(other, user, dim, span)
        if user.target in PRODUCTS:
            self.found.factors.append(cut)
        self.found.cuts[cut] = None
        return dim, span

    def _is_divisor(self, other: Any) -> bool:
        value = self.program.constant(other)
        return bool((value != 0).all()) if value is not None else type(other) in (int, float) and other != 0

    def _moved(self, user: Node, dim: int, span: int) -> tuple[int, int] | NoMatch:
        way = _plain_passage(user)
        if way is None:
            return fail(f"{_name(user)} may make it other than 0", user)
        onward = way.to_result(dim)
        if onward is None:
            onward, span = -1, span * _merged(user, dim)
            if span == 0:
                return fail(f"{_name(user)} mixes the neurons", user)
        miss = self._resized(user, onward, span)
        return (onward, span) if miss is None else miss

    # ---- backwards

    def _backwards(self, value: Node, dim: int) -> NoMatch | None:
        stack = [(value, dim)]
        while stack:
            value, dim = stack.pop()
            if value in self.silent:
                return fail(f"{_name(value)} is before the gate and behind it", value)
            if value in self.fed:
                if self.fed[value] != dim:
                    return fail(f"{_name(value)} has the neurons along two dims", value)
                continue
            self.fed[value] = dim
            sources = self._made_from(value, dim)
            if isinstance(sources, NoMatch):
                return sources
            stack += sources
        return None

    def _made_from(self, node: Node, dim: int) -> list[tuple[Node, int]] | NoMatch:
        """The operands of `node` that hold the neurons, and where; nothing where its weight has a row for each."""
        if node.op != "call_function":
            return fail(f"it is made from {'an input' if node.op == 'placeholder' else 'a constant'}", node)
        if node.target in FORMS:
            return self._row(node, dim)
        source = node.args[0]
        if node.target is GATE:
            gate = hard_gate(self.program, node)
            if isinstance(gate, NoMatch) or gate.dim != dim:
                return fail(f"{_name(node)} is another kind of gate", node)
            self._cut_gate(gate)
            return [(gate.value, dim)]
        if node.target in POINTWISE:
            return [(source, dim)]  # type: ignore[list-item]
        if node.target in PRODUCTS | QUOTIENTS | SUMS:
            return self._operands(node, dim)
        if node.target is aten.batch_norm.default and dim == 1 - node.meta["val"].ndim:
            return self._normalised(node, dim)
        way = _plain_passage(node)
        before = None if way is None else way.to_operand(dim)
        if before is None:
            return fail(f"it is made by {_name(node)}, which mixes the neurons or is not known", node)
        miss = self._resized(node, dim, 1)
        return [(source, before)] if miss is None else miss  # type: ignore[list-item]

    def _row(self, node: Node, dim: int) -> list[tuple[Node, int]] | NoMatch:
        operator = self._operator(node)
        if isinstance(operator, NoMatch):
            return operator
        if dim != -1 - len(operator.kernel):
            return fail(f"{_name(node)} has no row per neuron", node)
        self.found.cuts[Cut(operator.weight, node, _row_dim(operator))] = None
        if operator.bias is not None and _varies(operator.bias, -1):
            self.found.cuts[Cut(operator.bias, node, -1)] = None
        return []

    def _operands(self, node: Node, dim: int) -> list[tuple[Node, int]] | NoMatch:
        sources = []
        for operand in node.args[:2]:
            if not isinstance(operand, Node) or not _varies(operand, dim):
                continue
            if not self.program.is_constant(operand):
                sources.append((operand, dim))
            else:
                self.found.cuts[Cut(operand, node, dim)] = None
        return sources or fail(f"{_name(node)} spreads one number over the neurons", node)

    def _normalised(self, node: Node, dim: int) -> list[tuple[Node, int]] | NoMatch:
        given = arguments(node)
        for name in ("weight", "bias", "running_mean", "running_var"):
            if given[name] is None:
                continue
            if not self.program.is_constant(given[name]):
                return fail(f"the {name} of {_name(node)} is computed", node)
            self.found.cuts[Cut(given[name], node, -1)] = None
        return [(given["input"], dim)]

    # ---- both

    def _join(self) -> NoMatch | None:
        """What silent values are added to must be silent too; what they are multiplied by has the neurons as well."""
        for node, other, silent in self.joins:
            if other in self.silent:
                if self.silent[other] != self.silent[node]:
                    return fail(f"{_name(node)} meets the neurons along two dims", node)
            elif silent:
                return fail(f"{_name(node)} adds it to something else", node)
            elif self.silent[node][1] != 1:
                return fail(f"{_name(node)} multiplies it by something else after it was flattened", node)
            elif (miss := self._backwards(other, self.silent[node][0])) is not None:
                return miss
        return None

    def _closed(self) -> NoMatch | None:
        """What the gate is made from is not 0 for a silent neuron, so that nothing else may read it."""
        for value in self.fed:
            for user in value.users:
                if user not in self.fed and user not in self.silent:
                    return fail(f"{_name(value)}, from which it is made, is read elsewhere too", value)
        return None

    def _cut_gate(self, gate: HardGate) -> None:
        self.found.gates.append(gate.node)
        for constant in (gate.threshold, gate.gain):
            if constant is not None:
                self.found.cuts[Cut(constant, gate.node, -1)] = None

    def _operator(self, node: Node) -> WeightOperator | NoMatch:
        operator = weight_operator(node)
        if isinstance(operator, NoMatch):
            return operator
        problem = constant_problem(self.program, operator)
        if problem is not None:
            return problem
        return operator if operator.groups == 1 else fail(f"{_name(node)} has groups", node)

    def _resized(self, node: Node, dim: int, span: int) -> NoMatch | None:
        """A reshape names its sizes; the one that holds the neurons must be a number, or left to be found."""
        if node.target in SQUEEZES and _squeezes(node, dim):
            return fail(f"{_name(node)} would take the last neuron's dim away", node)
        if node.target is aten.unflatten.int:
            return fail(f"{_name(node)} splits the neurons", node)
        if node.target is not aten.reshape.default:
            return None
        size = node.args[1][dim]  # type: ignore[index]
        if size == self.count * span:
            self.found.sizes.append((node, dim, span))
        return None if size in (-1, self.count * span) else fail(f"{_name(node)} has a size that is computed", node)


def _plain_passage(node: Node) -> Passage | None:
    """Of an operator without a tensor beside its first operand: a PReLU has a slope per channel."""
    return passage(node) if len(tensors(node)) == 1 else None


def _squeezes(node: Node, dim: int) -> bool:
    """Whether a squeeze names the dim that its result has as `dim`: it does nothing to it until its size is 1."""
    way, named = passage(node), node.args[1]
    before = None if way is None else way.to_operand(dim)
    ndim = node.args[0].meta["val"].ndim  # type: ignore[union-attr]
    dims = named if isinstance(named, list | tuple) else [named]
    return before is not None and before in [int(item) % ndim - ndim for item in dims]  # type: ignore[arg-type]


def _merged(node: Node, dim: int) -> int:
    """Entries per neuron where a flatten puts the neurons' dim and all dims after it into one; else 0."""
    before, after = node.args[0].meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
    at = len(before) + dim
    if node.target not in (aten.reshape.default, aten.flatten.using_ints) or len(after) != at + 1:
        return 0
    inner = before[at + 1 :]
    if list(map(str, before[:at])) != list(map(str, after[:at])) or not all(isinstance(size, int) for size in inner):
        return 0
    return math.prod(map(int, inner))


def _varies(node: Node, dim: int) -> bool:
    shape = getattr(node.meta["val"], "shape", ())  # a number of rows has none
    return len(shape) >= -dim and str(shape[dim]) != "1"


def _row_dim(operator: WeightOperator) -> int:
    """The dim of the stored weight that has a row per output feature; of a weight without groups."""
    return 0 if operator.kind in ("linear", "conv") else 1


def _is_zero(program: Program, cut: Cut, count: int) -> Tensor:
    """Of each neuron, whether all its entries are 0."""
    value = program.constant(cut.constant)
    assert value is not None
    entries = (value == 0).movedim(cut.dim, 0).reshape(count, -1)  # span entries of a neuron are side by side
    return entries.all(1).cpu()


def entries(kept: Sequence[int], span: int) -> list[int]:
    """Where the entries of the neurons `kept` are."""
    return [at * span + inner for at in kept for inner in range(span)]


def _shrink(program: Program, cut: Cut, kept: Sequence[int]) -> Node:
    """Let the reader of a constant read what is left of it; others keep the old one. The node it reads now."""

    def shrunk(value: Tensor) -> Tensor:
        return value.index_select(cut.dim, torch.tensor(entries(kept, cut.span), device=value.device))

    name, dtype = str(cut.constant.target), cut.constant.meta["val"].dtype
    value = shrunk(program.state[name].detach())
    fold, new = program.folds.get(name), cut.constant
    if program.readers(cut.constant) <= {cut.user}:
        program.state[name] = value
        for node in program.graph.find_nodes(op="get_attr", target=cut.constant.target):
            node.meta["val"] = _fake(program, value, dtype)
    else:
        new = program.add_constant(name, value, dtype=dtype, before=cut.user, like=cut.constant)
        cut.user.replace_input_with(cut.constant, new)
    if fold is not None:
        program.folds[str(new.target)] = replace(fold, base=Recipe(shrunk(fold.base.value())))
    return new


def _fake(program: Program, value: Tensor, dtype: torch.dtype) -> Any:
    with program.fake_mode as mode:
        return mode.from_tensor(value, static_shapes=True).to(dtype)


def _name(node: Node) -> str:
    """The operator without its namespace and overload, and where it is the user's."""
    return node.target._schema.name.partition("::")[2] if hasattr(node.target, "_schema") else node.name
