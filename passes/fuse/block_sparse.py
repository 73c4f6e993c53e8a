"""Leave out the tiles of a weight that are zero, where that is the faster way."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxfreeze.inline import inline
from fxfreeze.kernels.block_sparse import KERNEL, compress, filled, pick
from fxfreeze.program import Program
from fxfreeze.rewrite import Context, Pass

from .._operators import WeightOperator, arguments
from ._timing import medians
from ._zeros import (
    Sparse,
    is_faster,
    is_two_of_four,
    problem,
    report,
    report_size_only,
    said,
    sizes,
    sparse_weights,
    store,
)

aten = torch.ops.aten

TILES = (128, 64, 32)
"""Inputs and outputs of a tile."""
ALIKE = 1.1
"""Larger tiles are taken where they keep up to so many times as much."""
WORTH = 0.75
"""Of the weight that may be left in tiles; with more, what is skipped is less than a good dense product gains."""
SMALL = 1 << 20
"""Bytes of a weight that is read as fast as an operator is called."""
SHARED = 64 << 20
"""Tiles are stored beside a weight that something else reads, too: up to this many bytes."""
STEP = 0.05
"""Layers that keep as much up to this are timed once."""


@dataclass(frozen=True)
class Layer:
    """What the time of a layer with tiles hangs on.

    Attributes:
        sizes: of the input, for each number of rows that is timed.
        tile: inputs and outputs of a tile.
        kept: share of the tiles that are there, rounded up to :data:`STEP`.
        convolution: the features lie along dim 1 of the input, not along the last.
    """

    sizes: tuple[tuple[int, ...], ...]
    inputs: int
    outputs: int
    tile: int
    kept: float
    convolution: bool
    dtype: torch.dtype
    device: torch.device


Measure = Callable[[Layer], list[tuple[float, float]]]
"""Seconds of the layer with tiles, and of the dense one, for each of ``layer.sizes``."""


class BlockSparse(Pass):
    """A linear layer, or a 1×1 convolution, whose weight has tiles of zeros becomes ``fxfreeze::block_sparse``.

    Both forms compute the same function, so this is about time only: at the layer's own size, for the fewest rows and
    for the most that there may be, it is timed against the dense product, and made where it is faster in one case, and
    slower in none. Of tiles of 128, 64 and 32 those are taken that leave least, larger ones where they leave about as
    little. What is stored is the tiles that are left, in any target: ONNX Runtime makes a dense weight of them when it
    opens the file.

    On a CPU it is for the targets torch and aoti, in float32 and float64; on a GPU where nothing but the torch target,
    which launches its kernel, is asked for. A weight of many zeros that stays as it is gets a row that says why; where
    it is 2:4, that row is :class:`~fxfreeze.passes.fuse.semi_structured.SemiStructured`'s.
    """

    name, stage = "block-sparse", "fuse"

    def __init__(self, measure: Measure | None = None) -> None:
        self.measure = measure or measured

    def run(self, program: Program, ctx: Context) -> int:
        count = 0
        for found in sparse_weights(program):
            reason = self._rewrite(program, found, ctx)
            count += reason is None
            if reason is not None and not is_two_of_four(found.weight):
                report_size_only(program, ctx, found, reason)
        return count

    def _rewrite(self, program: Program, found: Sparse, ctx: Context) -> str | None:
        """None when done, else why not."""
        operator = found.operator
        if reason := _form_problem(operator) or problem(found, ctx.plan.targets, ("torch", "aoti")):
            return reason
        if (reason := _dtype_problem(operator)) or found.nbytes < SMALL:
            return reason or f"a weight of {found.nbytes / 2**20:.2g} MiB is read as fast as an operator is called"
        kept = kept_tiles(found.weight.flatten(1))
        tile = best_tile(kept)
        total = math.prod(-(-size // tile) for size in operator.shape[:2])
        bytes_kept = kept[tile] * tile**2 * operator.weight.meta["val"].element_size()
        if bytes_kept > WORTH * found.nbytes:
            tile = TILES[-1]
            total = math.prod(-(-size // tile) for size in operator.shape[:2])
            return f"they make no blocks: {kept[tile]} of {total} tiles of {tile}x{tile} hold something else"
        if program.readers(operator.weight) != {operator.node} and bytes_kept > SHARED:
            return f"its weight is read by something else, too, and the tiles would take {bytes_kept / 2**20:.0f} MiB"
        layer = _layer(operator, tile, kept[tile] / total)
        times = self.measure(layer)
        if not is_faster(times):
            return f"with {kept[tile] / total:.0%} of the tiles of {tile}x{tile} the dense product is as fast: " + said(
                layer.sizes, times
            )
        build(program, found, tile)
        onnx = "; ONNX Runtime runs the dense product" if "onnx" in ctx.plan.targets else ""
        report(
            program, ctx, found, "rewritten", str(KERNEL.op),
            f"{kept[tile]} of {total} tiles of {tile}x{tile} are left, {bytes_kept / 2**20:.2g} of "
            f"{found.nbytes / 2**20:.2g} MiB. {said(layer.sizes, times)}{onnx}",
        )  # fmt: skip
        return None


def _form_problem(operator: WeightOperator) -> str | None:
    if operator.kind in ("linear", "matmul"):
        return None
    if operator.kind == "embedding":
        return "rows of it are looked up, not multiplied"
    if operator.kind == "transposed" or operator.groups > 1 or any(size != 1 for size in operator.kernel):
        return "a convolution with a window, or with groups, has no form for them"
    given = arguments(operator.node)
    # Paddings by name are none for a window of 1.
    plain = all(size == 1 for size in given["stride"]) and (
        isinstance(given["padding"], str) or not any(given["padding"])
    )
    if not plain or operator.input.meta["val"].ndim != len(operator.kernel) + 2:
        return "a convolution with a stride or padding, or without a batch, has no form for them"
    return None


def _dtype_problem(operator: WeightOperator) -> str | None:
    x = operator.input.meta["val"]
    known = (torch.float32, torch.float64) if x.device.type == "cpu" else (torch.float32, torch.float16, torch.bfloat16)
    return None if x.dtype in known else f"there is no form for {x.dtype} on {x.device.type}"


def kept_tiles(weight: Tensor) -> dict[int, int]:
    """Size of a tile → how many of a weight [out, in] hold anything else than zeros."""
    return {tile: int(filled(weight, tile, tile).sum()) for tile in TILES}


def best_tile(kept: Mapping[int, int]) -> int:
    """The size that leaves the least in tiles, or a larger one that leaves about as little."""
    least = min(count * tile**2 for tile, count in kept.items())
    return next(tile for tile, count in kept.items() if count * tile**2 <= ALIKE * least)


# ---- the rewrite


def build(program: Program, found: Sparse, tile: int) -> None:
    """Let the users of ``found.node`` read what ``fxfreeze::block_sparse`` makes of its input."""
    operator, node = found.operator, found.node
    _, crow, col = compress(found.weight.flatten(1), tile, tile)
    tiles = store(program, found, "tiles", lambda weight: pick(weight.flatten(1), crow, col, tile, tile))
    where = [
        program.add_constant(f"{operator.weight.target}_{name}", value, before=node, like=operator.weight)
        for name, value in (("crow", crow), ("col", col))
    ]
    operands = [operator.input, tiles, *where, *([] if operator.bias is None else [operator.bias])]
    out = operator.out_features
    if operator.kernel:
        new = inline(program, lambda *given: convolution(*given, out_features=out), *operands, before=node, like=node)
    else:
        new = program.call(KERNEL.op, *operands, before=node, like=node, out_features=out)
    program.replace(node, new)


def convolution(x: Tensor, *stored: Tensor, out_features: int) -> Tensor:
    """A 1×1 convolution of x [batch, in, ...] as a product along the last dim."""
    y: Tensor = KERNEL.op(x.movedim(1, -1), *stored, out_features=out_features)
    return y.movedim(-1, 1)


# ---- the time


def _layer(operator: WeightOperator, tile: int, kept: float) -> Layer:
    x = operator.input.meta["val"]
    rounded = round(math.ceil(kept / STEP - 1e-9) * STEP, 2)
    convolution = bool(operator.kernel)
    return Layer(
        sizes(operator), operator.in_features, operator.out_features, tile, rounded, convolution, x.dtype, x.device
    )


def measured(layer: Layer) -> list[tuple[float, float]]:
    """On this machine, with as many threads as torch has now; identical layers once per process."""
    return list(_measured(layer, torch.get_num_threads()))


@functools.cache
@torch.no_grad()
def _measured(layer: Layer, threads: int) -> tuple[tuple[float, float], ...]:
    weight, found = drawn(layer), []
    stored, bias = compress(weight, layer.tile, layer.tile), weight.new_zeros(layer.outputs)
    how: dict[str, Any] = {"out_features": layer.outputs}
    for size in layer.sizes:
        x = torch.full(size, 0.5, dtype=layer.dtype, device=layer.device)
        if layer.convolution:
            window = [1] * (len(size) - 2)
            operator = (aten.conv1d, aten.conv2d, aten.conv3d)[len(window) - 1].default
            calls: dict[str, Callable[[], Tensor]] = {
                "ours": partial(convolution, x, *stored, bias, **how),
                "dense": partial(operator, x, weight.reshape(*weight.shape, *window), bias),
            }
        else:
            calls = {
                "ours": partial(KERNEL.op, x, *stored, bias, **how),
                "dense": partial(aten.linear.default, x, weight, bias),
            }
        times = medians(calls, layer.device)
        found.append((times["ours"], times["dense"]))
    return tuple(found)


def drawn(layer: Layer) -> Tensor:
    """A weight [out, in] of which as many tiles, anywhere, are not zero as `layer` says."""
    rows, columns = -(-layer.outputs // layer.tile), -(-layer.inputs // layer.tile)
    order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(0))
    kept = (order < round(layer.kept * rows * columns)).reshape(rows, columns)
    weight = kept.repeat_interleave(layer.tile, 0)[: layer.outputs].repeat_interleave(layer.tile, 1)[:, : layer.inputs]
    return (0.5 * weight).to(layer.device, layer.dtype)
