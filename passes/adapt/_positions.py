"""Where a program counts positions: the tables it looks them up in, and the casts that make angles of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node, map_arg

from fxfreeze.program import Program

from .._operators import aten

_LENGTH = 7
"""Length of the sequences that positions are recognised on; no other number of a small model is likely to be it."""
_CASTS = frozenset({aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.to.device, aten.to.other})


@dataclass(frozen=True)
class Positions:
    """A reader of positions.

    Attributes:
        node: ``aten.embedding`` of them, or a cast of them to floats (rotary and sinusoidal positions).
        index: what it reads: first + 0, 1, 2, … along the last dim.
        first: the position of the first token.
        rows: of the table; None for a cast, which has no end.
    """

    node: Node
    index: Node
    first: int
    rows: int | None


def positions(program: Program, fills: Mapping[str, float]) -> list[Positions]:
    """Every reader of positions, in graph order, found by what it is given rather than by how that is computed.

    Args:
        fills: what every input is filled with for that, by name: ids that are no padding, masks of ones; 0 by default.
    """
    env = _inputs(program, fills)
    found = []
    for node in program.graph.nodes:
        if node.op != "call_function" or not _may_read(node):
            continue
        index = node.args[1] if node.target is aten.embedding.default else node.args[0]
        value = _value(program, index, env)
        if isinstance(value, Tensor) and (first := _first(value)) is not None:
            rows = int(node.args[0].meta["val"].shape[0]) if node.target is aten.embedding.default else None
            found.append(Positions(node, index, first, rows))
    return found


def _may_read(node: Node) -> bool:
    if node.target is aten.embedding.default:
        return isinstance(node.args[1], Node) and node.args[1].op == "call_function"
    if node.target not in _CASTS or not isinstance(node.args[0], Node):
        return False
    before, after = node.args[0].meta["val"], node.meta["val"]
    return after.is_floating_point() and before.dtype in (torch.int64, torch.int32)


def _inputs(program: Program, fills: Mapping[str, float]) -> dict[Node, Any]:
    sizes: dict[str, int] = {}
    for size in [size for spec in program.inputs for size in spec.shape if isinstance(size, str)]:
        low, high = program.dims.get(size, (1, None))
        wanted = max(low, _LENGTH + len(sizes)) if size not in sizes else sizes[size]
        sizes[size] = wanted if high is None else min(wanted, high)
    env: dict[Node, Any] = {}
    for node, spec in zip(program.placeholders, program.inputs, strict=True):
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
        env[node] = torch.full(shape, fills.get(spec.name, 0), dtype=spec.dtype, device=spec.device)
    return env


@torch.no_grad()
def _value(program: Program, node: Node, env: dict[Node, Any]) -> Any:
    """The value of `node` with the inputs in `env`; None where it does not run, or hangs on floats of the model."""
    cone: dict[Node, None] = {}
    stack = [(node, False)]
    while stack:
        item, done = stack.pop()
        if done:
            cone[item] = None
        elif item not in env and item not in cone:
            stack.append((item, True))
            stack += [(operand, False) for operand in item.all_input_nodes]
    for item in cone:
        if item.op == "get_attr":
            env[item] = program.stored(item)
            continue
        args, kwargs = map_arg((item.args, dict(item.kwargs)), lambda old: env[old])
        if any(env[operand] is None for operand in item.all_input_nodes) or _is_heavy(item):
            env[item] = None
            continue
        try:
            env[item] = item.target(*args, **kwargs)  # type: ignore[operator]
        except Exception:  # a size that the model does not take; then there are no positions to be seen either
            env[item] = None
    return env[node]


def _is_heavy(node: Node) -> bool:
    """Whether it computes floats of several dims: no way to a position."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 2


def _first(value: Tensor) -> int | None:
    """The first of consecutive whole numbers along the last dim, the same in all rows; None for anything else."""
    if not value.ndim or value.shape[-1] < 2 or value.is_floating_point():
        return None
    rows = value.reshape(-1, value.shape[-1])
    first = int(rows[0, 0])
    counted = torch.arange(first, first + rows.shape[1], device=value.device)
    return first if bool((rows == counted).all()) else None
