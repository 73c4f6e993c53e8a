"""Linear layers that compute several things at once, as attention's queries, keys and values, taken apart."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.constants import Recipe
from fxfreeze.program import Program

from .._operators import WeightOperator, aten, constant_problem, weight_operator

_SPLITS = frozenset({aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default})
_MOVES = frozenset({aten.reshape.default, aten.permute.default, aten.transpose.int})


@dataclass(frozen=True)
class Bundle:
    """A linear layer whose result is reshaped, permuted and split into parts.

    Attributes:
        layer: the linear layer; its weight and bias are constants.
        moves: what lies between it and the split, in order, each read only by the next.
        split: ``unbind``, ``split`` or ``chunk``.
        features: of every part, where its output features are.
    """

    layer: WeightOperator
    moves: tuple[Node, ...]
    split: Node
    features: tuple[Tensor, ...]

    def keeps_rows(self, dim: int) -> bool:
        """Whether the rows along `dim` of a part are rows of the layer's input too."""
        at = dim + (self.split.target is aten.unbind.int and dim >= _split_dim(self.split))
        for move in reversed(self.moves):
            before, after = move.args[0].meta["val"].shape, move.meta["val"].shape  # type: ignore[union-attr]
            if move.target is not aten.reshape.default:
                at = _order(move)[at]
            elif _leading(before, at) != _leading(after, at):
                flat = self.layer.input  # transformers' Conv1D works on flat rows
                whole = flat.args[0].meta["val"].shape if flat.target is aten.reshape.default else ()  # type: ignore[union-attr]
                return move is self.moves[0] and _leading(whole, at) == _leading(after, at)
        return at < self.layer.node.meta["val"].ndim - 1

    def separate(self, program: Program, part: int) -> None:
        """Let the part `part` come out of a layer of its own, and all others out of what is left."""
        rest = torch.cat([own for at, own in enumerate(self.features) if at != part])
        own = self._parts(program, self.features[part], [part])
        others = self._parts(program, rest, [at for at in range(len(self.features)) if at != part])
        for user in list(self.split.users):
            program.replace(user, (own | others)[user.args[1]])  # type: ignore[index]

    def _parts(self, program: Program, index: Tensor, parts: list[int]) -> dict[int, Node]:
        """Nodes of `parts`, whose features are `index` in the order in which they are computed."""
        layer, before = self.layer, self.split
        index = index.sort().values  # heads may hold parts of theirs side by side: what is left keeps its order
        rows = 0 if layer.kind == "linear" else 1
        changes = {"weight": _entries(program, layer.weight, index, rows, before)}
        if layer.bias is not None:
            changes["bias"] = _entries(program, layer.bias, index, 0, before)
        args, kwargs = layer.call_arguments(**changes)
        current = program.call(layer.node.target, *args, before=before, like=layer.node, **kwargs)  # type: ignore[arg-type]
        traced, sizes = _traced(self), len(self.features)
        for move, dim in zip(self.moves, traced, strict=True):
            current = _moved(program, move, current, dim, len(parts), sizes, before)
        dim = _split_dim(self.split)
        if self.split.target is aten.unbind.int:
            return {
                part: program.call(aten.select.int, current, dim, at, before=before, like=self.split)
                for at, part in enumerate(parts)
            }
        if len(parts) == 1:
            return {parts[0]: current}
        each = int(current.meta["val"].shape[dim]) // len(parts)
        return {
            part: program.call(
                aten.slice.Tensor, current, dim, at * each, (at + 1) * each, before=before, like=self.split
            )
            for at, part in enumerate(parts)
        }


def bundle(program: Program, part: Node) -> Bundle | None:
    """The bundle that `part`, an item of a split, comes out of; None where there is none that can be taken apart."""
    split = part.args[0] if part.target is operator.getitem else None
    if not isinstance(split, Node) or split.target not in _SPLITS:
        return None
    moves: list[Node] = []
    current: Node = split.args[0]  # type: ignore[assignment]
    reader = split
    while current.target in _MOVES and set(current.users) == {reader}:
        moves.insert(0, current)
        current, reader = current.args[0], current  # type: ignore[assignment]
    layer = weight_operator(current)
    if (
        set(current.users) != {reader}
        or not isinstance(layer, WeightOperator)
        or layer.kind not in ("linear", "matmul")
    ):
        return None
    if constant_problem(program, layer) is not None:
        return None
    if layer.bias is not None and layer.bias.meta["val"].ndim != 1:
        return None
    features = _features(layer, moves, split)
    return None if features is None else Bundle(layer, tuple(moves), split, features)


def _split_dim(split: Node) -> int:
    """Counted from the front."""
    at = 1 if split.target is aten.unbind.int else 2
    dim = split.args[at] if len(split.args) > at else split.kwargs.get("dim", 0)
    return int(dim) % split.args[0].meta["val"].ndim  # type: ignore[arg-type, union-attr, operator]


def _features(layer: WeightOperator, moves: list[Node], split: Node) -> tuple[Tensor, ...] | None:
    """Which output features every part holds: equal parts, of features alone, found by sending numbers the same way."""
    shape = layer.node.meta["val"].shape
    numbers: Tensor = torch.arange(layer.out_features).reshape([1] * (len(shape) - 1) + [-1])
    for move in moves:
        moved = _numbered(move, numbers, layer.out_features)
        if moved is None:
            return None
        numbers = moved
    dim, parts = _split_dim(split), split.meta["val"]
    if len({str(part.shape) for part in parts}) > 1 or numbers.shape[dim] % len(parts):
        return None
    return tuple(part.flatten() for part in numbers.chunk(len(parts), dim))


def _numbered(move: Node, numbers: Tensor, features: int) -> Tensor | None:
    """`numbers`, with size 1 where there are rows, after `move`; None where it mixes rows and features."""
    if move.target is not aten.reshape.default:
        return move.target(numbers, *move.args[1:])  # type: ignore[operator, no-any-return]
    before, after = move.args[0].meta["val"].shape, move.meta["val"].shape  # type: ignore[union-attr]
    sizes: list[int] = []
    left = features
    for size in reversed(after):
        if left > 1 and isinstance(size, int) and left % size == 0:
            sizes.insert(0, size)
            left //= size
        elif left > 1:
            return None
        else:
            sizes.insert(0, 1)
    plain = numbers.shape[-1] == features and numbers.numel() == features
    return numbers.reshape(sizes) if plain and before[-1] == features and left == 1 else None


def _traced(found: Bundle) -> list[int]:
    """After every move, the dim in which the parts lie next to each other."""
    dim = _split_dim(found.split)
    dims: list[int] = []
    for move in reversed(found.moves):
        dims.insert(0, dim)
        if move.target is not aten.reshape.default:
            dim = _order(move)[dim]
        else:
            dim = move.args[0].meta["val"].ndim - 1  # type: ignore[union-attr]
    return dims


def _order(move: Node) -> list[int]:
    """Which dim of its operand every dim of a permuted value is."""
    order: list[Any] = list(range(move.meta["val"].ndim))
    if move.target is aten.transpose.int:
        first, second = move.args[1:3]
        order[first], order[second] = order[second], order[first]  # type: ignore[index]
        return order
    named: Any = move.args[1]
    return [at % len(order) for at in named]


def _leading(shape: Sequence[Any], at: int) -> list[str]:
    return [str(size) for size in shape[: at + 1]]


def _moved(program: Program, move: Node, current: Node, dim: int, parts: int, all_parts: int, before: Node) -> Node:
    args = list(move.args[1:])
    if move.target is aten.reshape.default:
        sizes = list(args[0])  # type: ignore[arg-type]
        sizes[dim] = int(move.meta["val"].shape[dim]) // all_parts * parts
        args = [sizes]
    return program.call(move.target, current, *args, before=before, like=move)  # type: ignore[arg-type]


def _entries(program: Program, constant: Node, index: Tensor, dim: int, before: Node) -> Node:
    """A constant with some entries of another; what was folded into that is folded into this."""

    def some(value: Tensor) -> Tensor:
        return value.detach().index_select(dim, index.to(value.device))

    name, dtype = str(constant.target), constant.meta["val"].dtype
    new = program.add_constant(name, some(program.state[name]), dtype=dtype, before=before, like=constant)
    if (fold := program.folds.get(name)) is not None:
        program.folds[str(new.target)] = replace(fold, base=Recipe(some(fold.base.value())))
    return new
