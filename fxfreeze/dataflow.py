"""How values flow through a program: where the channels of a value are after an operator that keeps them apart.

Dims are counted from the end (−1 is the last): that is what stays put whether or not a value has a batch dim.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten

HOMOGENEOUS = frozenset({aten.relu.default, aten.leaky_relu.default, aten.prelu.default})
MAX_POOLS = {aten.max_pool1d.default: 1, aten.max_pool2d.default: 2, aten.max_pool3d.default: 3}
# An average pool may count the zeros it pads, so a shift does not pass it; an adaptive one never pads.
AVERAGE_POOLS = {aten.avg_pool1d.default: 1, aten.avg_pool2d.default: 2, aten.avg_pool3d.default: 3}
ADAPTIVE_POOLS = {aten.adaptive_avg_pool1d.default: 1, aten.adaptive_avg_pool2d.default: 2,
                  aten.adaptive_avg_pool3d.default: 3}  # fmt: skip
RESHAPES = frozenset({aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default,
                      aten.squeeze.dim, aten.squeeze.dims})  # fmt: skip


def tensors(node: Node) -> list[Node]:
    """The tensors that `node` reads, each once; sizes are none."""
    return [item for item in node.all_input_nodes if isinstance(item.meta.get("val"), torch.Tensor)]


@dataclass(frozen=True)
class Passage:
    """How an operator f treats the channels of its first operand: f(γ·x + β) = γ·f(x) + β, within limits.

    Attributes:
        dims: dim of the result → dim of the operand that holds the same channels in the same order.
        positive: it holds for γ > 0 only.
        shift: it holds with a β; otherwise for β = 0 only.
    """

    dims: dict[int, int]
    positive: bool = False
    shift: bool = True

    def to_operand(self, dim: int) -> int | None:
        """The operand's dim for dim `dim` of the result, or None when its channels are mixed."""
        return self.dims.get(dim)

    def to_result(self, dim: int) -> int | None:
        """The result's dim for dim `dim` of the operand, or None when its channels are mixed."""
        return next((result for result, operand in self.dims.items() if operand == dim), None)


def passage(node: Node) -> Passage | None:
    """How channels go through `node` from its first operand, or None when they do not."""
    source = node.args[0] if node.op == "call_function" and node.args else None
    operand = source.meta.get("val") if isinstance(source, Node) else None
    result = node.meta.get("val")
    if not isinstance(operand, torch.Tensor) or not isinstance(result, torch.Tensor):
        return None
    target, ndim = node.target, operand.ndim
    if target in HOMOGENEOUS:
        return Passage(_same(ndim), positive=True, shift=False)
    if target in MAX_POOLS:
        return Passage(_same(ndim, MAX_POOLS[target]), positive=True)
    if target in AVERAGE_POOLS:
        return Passage(_same(ndim, AVERAGE_POOLS[target]), shift=False)
    if target in ADAPTIVE_POOLS:
        return Passage(_same(ndim, ADAPTIVE_POOLS[target]))
    if target is aten.mean.dim:
        return Passage(_kept(node, ndim)) if "dtype" not in node.kwargs else None
    if target is aten.permute.default:
        order: list[int] = list(node.args[1])  # type: ignore[arg-type]
        return Passage({at - ndim: dim % ndim - ndim for at, dim in enumerate(order)})
    if target is aten.transpose.int:
        first, second = (int(dim) % ndim - ndim for dim in node.args[1:3])  # type: ignore[arg-type]
        return Passage(_same(ndim) | {first: second, second: first})
    return Passage(_reshaped(operand.shape, result.shape)) if target in RESHAPES else None


def _same(ndim: int, spatial: int = 0) -> dict[int, int]:
    """Every dim but the last `spatial` ones stays what it is."""
    return {dim: dim for dim in range(-ndim, -spatial)}


def _kept(mean: Node, ndim: int) -> dict[int, int]:
    dims = mean.args[1] if len(mean.args) > 1 else None
    reduced = {dim % ndim - ndim for dim in dims} if dims else set(range(-ndim, 0))  # type: ignore[union-attr, operator]
    kept = [dim for dim in range(-ndim, 0) if dim not in reduced]
    keepdim = mean.args[2] if len(mean.args) > 2 else mean.kwargs.get("keepdim", False)
    return {dim if keepdim else at - len(kept): dim for at, dim in enumerate(kept)}


def _reshaped(before: Sequence[Any], after: Sequence[Any]) -> dict[int, int]:
    """A dim survives a reshape when it keeps its size, and as many values as before follow each of its steps.

    Sizes may be symbolic; they are compared as expressions, which adds no guard.
    """
    found = {}
    for i, size in enumerate(after):
        for j, old in enumerate(before):
            if isinstance(size, int) and isinstance(old, int) and size == old != 1:
                if str(math.prod(after[i + 1 :])) == str(math.prod(before[j + 1 :])):
                    found[i - len(after)] = j - len(before)
    return found


def reshape_blocks(before: Sequence[Any], after: Sequence[Any]) -> list[tuple[range, range]] | None:
    """The dims of a value and of what a reshape makes of it, in the smallest blocks that hold as many entries.

    Returns:
        Pairs of dims of the operand and dims of the result, counted from the front, both in order; None where sizes are
        0, or symbolic and cannot be compared. Blocks are found from the last dims on; dims of one entry join any.
    """
    if 0 in before or 0 in after:
        return None
    blocks: list[tuple[range, range]] = []
    i, j = len(before), len(after)
    while i or j:
        ends, i, j = (i, j), max(i - 1, 0), max(j - 1, 0)
        while str(old := math.prod(before[i : ends[0]])) != str(new := math.prod(after[j : ends[1]])):
            # What can be told to be smaller goes on; a number is smaller than its product with a symbolic size.
            smaller = old < new if isinstance(old, int) and isinstance(new, int) else isinstance(old, int)
            if smaller and i:
                i -= 1
            elif j:
                j -= 1
            elif i:
                i -= 1
            else:
                return None
        blocks.append((range(i, ends[0]), range(j, ends[1])))
    return blocks[::-1]


def arguments(node: Node) -> dict[str, Any]:
    """Every argument of an operator call by its schema name, defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    values = {item.name: item.default_value for item in schema}
    values.update(zip((item.name for item in schema), node.args, strict=False))
    return {**values, **node.kwargs}


def sort(graph: Graph) -> bool:
    """Move every node that stands before one of its operands behind that, and leave the others in their order.

    Returns:
        False: nodes depend on each other in a ring; the graph is as it was.
    """
    placed: set[Node] = set()
    order: list[Node] = []
    waiting = list(graph.nodes)
    while waiting:
        late = []
        for node in waiting:
            if placed.issuperset(node.all_input_nodes):
                placed.add(node)
                order.append(node)
            else:
                late.append(node)
        if len(late) == len(waiting):
            return False
        waiting = late
    for before, node in itertools.pairwise(order):
        if before.next is not node:
            before.append(node)
    return True
