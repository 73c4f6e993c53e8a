"""Which units of a group a program can do without: those that are 0 wherever they are read, or read nowhere.

A unit counts where an axis that it has entries in is summed over (:class:`~fxfreeze.coupling.Contraction`); everything
else carries it along. It counts for nothing there if all its entries are 0, or meet zeros of what they are multiplied
by: of a weight, zeros in all rows that are read themselves, which is found from the outputs back to the inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.axes import Axis
from fxfreeze.coupling import Contraction, Coupling, Dims, Group, op_name
from fxfreeze.program import FIRES, Origin, Program

from .._gates import GATE
from .._operators import WeightOperator
from ._constancy import PRODUCTS, Known, unpadded

_PARTS = frozenset({"slice", "narrow", "select", "split", "split_with_sizes", "chunk", "tensor_split", "unbind", "pad",
                    "constant_pad_nd"})  # fmt: skip
"""Operators whose results may leave units out."""
_SHAPES = frozenset({"sym_size", "sym_stride", "sym_numel", "_assert_tensor_metadata"})
"""Operators that read no numbers."""


@dataclass(frozen=True)
class Site:
    """One place where units are summed over.

    Attributes:
        node: the operator.
        zero: of every unit, whether its entries are 0 there.
        unread: whether they are multiplied by 0.
        silent: whether each of them is one or the other.
        fixed: whether each of them is a number, whatever the inputs are, or multiplied by 0.
        stuck: why the sum of these numbers cannot go into a bias; None: it can.
    """

    node: Node
    zero: Tensor
    unread: Tensor
    silent: Tensor
    fixed: Tensor
    stuck: str | None


class Reading:
    """What every group's units count for in a program."""

    def __init__(self, program: Program, found: Coupling) -> None:
        self.program, self.found = program, found
        self.known = Known(program, found)
        # What an operator mixes is read wherever one entry of it is; a gate tells which of its neurons fire.
        self.leaves = {group.axis for group in found.groups if group.reason is None and not is_gated(group)}
        self.made = self.known.made
        self.sums: dict[Node, list[Contraction]] = {}
        self.over: dict[Axis, list[Contraction]] = {}
        for item in found.contractions:
            self.sums.setdefault(item.node, []).append(item)
            for leaf in found.axes.leaves(item.axis):
                self.over.setdefault(leaf, []).append(item)
        self.needed: dict[Node, Tensor] = {}
        self.unread: dict[Node, dict[Axis, Tensor]] = {}
        for node in reversed(program.graph.nodes):
            if node.op == "call_function":
                self._visit(node)

    def sites(self, leaf: Axis) -> list[Site]:
        """Every place where the units of `leaf` are summed over."""
        return [self._site(item, leaf) for item in self.over.get(leaf, ())]

    def numbers(self, made: WeightOperator) -> Tensor:
        """What the input features of an operator with a weight are, whatever the inputs are; NaN: not known."""
        return self.known.along(made.input, _features(made))

    def features(self, made: WeightOperator, leaf: Axis) -> Tensor:
        """Which input features of an operator with a weight are entries of each unit: int64 [units, k]."""
        axis = self.found.of(made.input, made.node)[_features(made)]
        return self.found.axes.entries(axis)[leaf]

    # ---- backwards

    def _visit(self, node: Node) -> None:
        if isinstance(node.meta["val"], list | tuple):
            return  # its items are looked at
        self.unread[node] = {
            leaf: self._everywhere(leaf, (self._by(user, node, leaf) for user in node.users))
            for axis in self.found.dims.get(node, []) for leaf in self.found.axes.leaves(axis) if leaf in self.leaves
        }  # fmt: skip
        if (made := self.made.get(node)) is not None:
            self.needed[node] = self._columns(node, made)

    def _everywhere(self, leaf: Axis, found: Iterable[Tensor]) -> Tensor:
        result = torch.ones(int(leaf.size), dtype=torch.bool)
        for item in found:
            result = result & item
        return result

    def _by(self, user: Node, operand: Node, leaf: Axis) -> Tensor:
        """Which units of `operand` the operator `user` does not read."""
        never = torch.zeros(int(leaf.size), dtype=torch.bool)
        if user.op == "output":
            return never
        if op_name(user) in _SHAPES:
            return ~never
        ways: list[Tensor] = []
        carried = [
            term for axis in self.found.of(operand, user) for term in self.found.axes.terms(axis) if term is leaf
        ]
        for item in self.sums.get(user, ()):
            own = self.found.axes.terms(item.axis).count(leaf)
            if own and (times := sum(term is operand for term, _ in item.terms)):
                ways.append(self._unmultiplied(item, operand, leaf))
                del carried[: own * times]
        if carried:
            ways.append(self._carried(user, operand, leaf))
        return self._everywhere(leaf, ways)

    def _carried(self, user: Node, operand: Node, leaf: Axis) -> Tensor:
        """Which units are not read of the results."""
        results = [user] if not isinstance(user.meta["val"], list | tuple) else list(user.users)
        name = op_name(user)
        if not any(leaf in self.unread.get(result, {}) for result in results):
            return torch.full((int(leaf.size),), name in _PARTS)
        left_out = torch.full((int(leaf.size),), name in _PARTS or len(results) > 1)
        unread = self._everywhere(leaf, (self.unread.get(result, {}).get(leaf, left_out) for result in results))
        for other in user.all_input_nodes if name in PRODUCTS else ():
            if other is not operand:
                unread = unread | self._zeros(other, user, leaf)
        return unread

    def _unmultiplied(self, item: Contraction, operand: Node, leaf: Axis) -> Tensor:
        """Which units of an operand of a sum meet zeros."""
        made = self.made.get(item.node)
        if made is not None and operand is made.input:
            return self._all_entries(made, ~self.needed[item.node].flatten(), leaf)
        result = torch.zeros(int(leaf.size), dtype=torch.bool)
        for term, _ in item.terms:
            if term is not operand:
                result = result | self._zeros(term, item.node, leaf)
        return result

    def _columns(self, node: Node, made: WeightOperator) -> Tensor:
        """Which input features any row that is read multiplies by something: bool [groups, in / groups]."""
        dims: Dims = self.found.dims[node]
        axis = dims[len(dims) - 1 - len(made.kernel)]
        read = torch.ones(made.out_features, dtype=torch.bool)
        for leaf, entries in self.found.axes.entries(axis).items():
            if leaf in self.unread[node]:
                read[entries[self.unread[node][leaf]].flatten()] = False
        return self.known.multiplied(node, read.reshape(made.groups, -1, 1), over=1)

    # ---- sites

    def _site(self, item: Contraction, leaf: Axis) -> Site:
        made = self.made.get(item.node)
        if made is None:
            zero = torch.zeros(int(leaf.size), dtype=torch.bool)
            for term, _ in item.terms:
                zero = zero | self._zeros(term, item.node, leaf)
            fixed = self._fixed(item, leaf)
            return Site(item.node, zero, torch.zeros_like(zero), zero, fixed, f"{op_name(item.node)} has no bias")
        idle, numbers = ~self.needed[item.node].flatten(), self.numbers(made)
        zero, unread, silent, fixed = (
            self._all_entries(made, holds, leaf)
            for holds in (numbers == 0, idle, idle | (numbers == 0), idle | ~numbers.isnan())
        )
        return Site(item.node, zero, unread, silent, fixed, self._stuck(made))

    def _fixed(self, item: Contraction, leaf: Axis) -> Tensor:
        operand, dim = item.terms[0]
        numbers = self.known.along(operand, dim)
        axis = self.found.of(operand, item.node)[dim]
        return (~numbers.isnan())[self.found.axes.entries(axis)[leaf]].all(1)

    def _all_entries(self, made: WeightOperator, holds: Tensor, leaf: Axis) -> Tensor:
        """Of every unit, whether something holds for all its entries among the input features."""
        return holds[self.features(made, leaf)].all(1)

    def _zeros(self, operand: Node, reader: Node, leaf: Axis) -> Tensor:
        """Of every unit, whether all its entries in a value are 0."""
        dims = self.found.of(operand, reader)
        result = torch.zeros(int(leaf.size), dtype=torch.bool)
        if self.known.of(operand) is None:
            return result
        places = [at for at, axis in enumerate(dims) if leaf in self.found.axes.leaves(axis)]
        for at in places:
            zero = self.known.along(operand, at) == 0
            own = zero[self.found.axes.entries(dims[at])[leaf]].all(1)
            result = own if at == places[0] else result & own
        return result

    def _stuck(self, made: WeightOperator) -> str | None:
        """Why a bias cannot take what constant inputs add up to."""
        name, place = op_name(made.node), self.program.module_path(made.node)
        at = f"{name}{f' at {place}' if place else ''}"
        if made.kernel and not unpadded(made.node, made):
            return f"{at} makes something else of them at the edges"
        if made.weight.op != "get_attr" or self.program.readers(made.weight) != {made.node}:
            return f"the weight of {at} is computed, or read elsewhere too"
        if made.bias is not None and (
            made.bias.op != "get_attr" or made.bias.meta["val"].shape != (made.out_features,)
        ):
            return f"the bias of {at} is computed, or not one number for each output"
        return None


def is_gated(group: Group) -> bool:
    """Whether a gate decides which units fire."""

    def is_gate(node: Node) -> bool:
        origin = node.meta.get("fxfreeze")
        return node.target is GATE or (isinstance(origin, Origin) and origin.primitive == FIRES)

    readers = (reader for member in group.members for reader in member.readers)
    return any(map(is_gate, readers)) or any(is_gate(member.node) for member in group.values)


def _features(made: WeightOperator) -> int:
    """The dim of the input that holds its features."""
    return int(made.input.meta["val"].ndim) - 1 - len(made.kernel)
