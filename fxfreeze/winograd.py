"""Convolutions that Winograd's filtering makes faster; for torch and AOTInductor, in float32 on a CPU.

A Program holds a convolution; these targets call ``fxfreeze::winograd`` for those with windows of 3×3 and stride 1 that
are large enough, with the sum and the ReLU behind them. Filters are transformed here, since no file of a Program should
hold them: they are two or four times as large as the weights.

Which ones is a rule, not a measurement, as it is asked whenever a target is loaded. What the rule rests on: oneDNN's
time over that of the operator, one thread of an AMD EPYC, torch 2.14.

==================  =======  =====  =================================================
channels, images    AVX-512   AVX2
==================  =======  =====  =================================================
64, 1 of 56×56          2.8    2.6
128, 1 of 28×28         3.0    2.6
256, 1 of 14×14         2.2    1.8
512, 1 of 7×7           1.3    1.0  tiles of 2×2; 1.05 and 0.9 to 1.1 with 4×4
512, 8 of 7×7           1.9    1.7
64, 64 of 8×8           2.5    2.2  tiles of 2×2: 1.6
16, 1 of 32×32          1.6    1.5
16, 64 of 32×32         1.5    1.0
8, 64 of 32×32          0.8    0.8
==================  =======  =====  =================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .dataflow import arguments
from .inline import inline
from .kernels import _native
from .kernels._op import at_most
from .kernels.winograd import KERNEL, WINDOW, pack
from .program import Program, on_cpu

aten = torch.ops.aten
_CONVOLUTIONS = frozenset({aten.conv2d.default, aten.conv2d.padding})
_PADDINGS = {"valid": [0, 0], "same": [1, 1]}

FEWEST_CHANNELS = 16
"""With fewer inputs or outputs the transforms take longer than the products that they save."""
FEWEST_TILES = 12
"""Of 4×4 outputs; see :data:`LARGE`."""
LARGE = 4 << 20
"""Bytes of filters. Where there are more, and few tiles, those for tiles of 2×2 are taken, which are less than half as
large: reading them is what takes time."""


@dataclass(frozen=True)
class Layer:
    """A convolution, what is added behind it, whether a ReLU comes last, and the node that has the result."""

    node: Node
    residual: Node | None
    relu: bool
    last: Node


def has_windows(program: Program) -> bool:
    """Whether :func:`with_winograd` may change `program`; shapes need not be known."""
    return on_cpu(program.inputs) and any(_fits(program, node) for node in program.graph.nodes)


def is_built() -> bool:
    """Whether the operator's form in C++ is there, for torch.compile; it is built when this is first asked."""
    assert KERNEL.native is not None
    return _native.library(KERNEL.native.source) is not None


def with_winograd(program: Program) -> Program:
    """A copy in which those convolutions are calls of the operator's form in C++."""
    program = program.clone()
    filters: dict[tuple[str, int], Node] = {}
    for node in list(program.graph.nodes):
        if _fits(program, node) and node.args[0].meta["val"].ndim == 4:
            _rewrite(program, _with_what_follows(node), filters)
    program.sweep()
    return program


def _fits(program: Program, node: Node) -> bool:
    if node.target not in _CONVOLUTIONS:
        return False
    given = arguments(node)
    weight = program.constant(given["weight"])
    plain = all(size == 1 for key in ("stride", "dilation") for size in given[key]) and given["groups"] == 1
    return (
        weight is not None and plain and weight.dtype == torch.float32 and tuple(weight.shape[2:]) == (WINDOW, WINDOW)
        and min(weight.shape[:2]) >= FEWEST_CHANNELS
    )  # fmt: skip


def _with_what_follows(node: Node) -> Layer:
    """The sum and the ReLU behind a convolution are part of it where nothing else reads what is between."""
    residual, last = None, node
    total = _only_reader(node, aten.add.Tensor)
    others: list[Any] = [operand for operand in total.args if operand is not node] if total is not None else []
    if total is not None and not total.kwargs and len(others) == 1 and _is_alike(others[0], node):
        residual, last = others[0], total
    activation = _only_reader(last, aten.relu.default)
    return Layer(node, residual, activation is not None, activation or last)


def _only_reader(node: Node, target: Any) -> Node | None:
    readers = list(node.users)
    return readers[0] if len(readers) == 1 and readers[0].target is target else None


def _is_alike(value: Any, node: Node) -> bool:
    """Whether `value` is a tensor of the shape and dtype of the result of `node`."""
    ours, theirs = value.meta["val"] if isinstance(value, Node) else None, node.meta["val"]
    return isinstance(ours, Tensor) and ours.shape == theirs.shape and ours.dtype == theirs.dtype


def _rewrite(program: Program, layer: Layer, filters: dict[tuple[str, int], Node]) -> None:
    given = arguments(layer.node)
    weight = given["weight"]
    tile = _tile(layer.node, weight)
    key = (weight.target, tile)
    if key not in filters:
        packed = pack(program.state.tensor(weight.target), tile)
        filters[key] = program.add_constant(f"{weight.target}.winograd", packed, before=layer.node, like=weight)
    padding = given["padding"]
    how = {
        "tile": tile, "out_channels": weight.meta["val"].shape[0], "relu": layer.relu,
        "padding": _PADDINGS[padding] if isinstance(padding, str) else [*padding, *padding][:2],
    }  # fmt: skip
    optional = {"bias": given["bias"], "residual": layer.residual}
    names = [name for name, value in optional.items() if value is not None]

    def convolution(x: Tensor, packed: Tensor, *others: Tensor) -> Tensor:
        return KERNEL.lowered(x, packed, **dict(zip(names, others, strict=True)), **how)

    operands = [given["input"], filters[key], *(optional[name] for name in names)]
    program.replace(layer.last, inline(program, convolution, *operands, before=layer.last, like=layer.node))


def _tile(node: Node, weight: Node) -> int:
    batch, _, *extents = node.meta["val"].shape
    tiles = math.prod(-(-extent // 4) for extent in extents) * (batch if isinstance(batch, int) else 1)
    filters = 36 * math.prod(weight.meta["val"].shape[:2]) * weight.meta["val"].itemsize
    return 2 if filters > LARGE and at_most(tiles, FEWEST_TILES - 1) else 4
