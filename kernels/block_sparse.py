"""``fxfreeze::block_sparse``: a linear layer whose weight has tiles of zeros, which are neither stored nor read.

y = x·Wᵀ + b. Of W [out, in], cut into tiles of one size, those are kept that hold anything else than zeros, row by row,
as in ``torch.sparse_bsr``. A kept tile lies turned: input by input, the outputs of one input next to each other, since
vectors run along the outputs. At the right and the lower edge of W tiles are filled up with zeros.

On a CPU this is C++. To gather, for each row of tiles, the inputs it wants, and leave the product to MKL, was measured
as well: at 75 % empty tiles of 64 x 64, 64 rows and 1024 to 4096 inputs and outputs it was 1.4 to 2.2 times as fast as
the dense product, and the C++, which copies nothing, 4.5 to 6.

Source: block sparsity as in Gray, Radford, Kingma, *GPU Kernels for Block-Sparse Weights* (2017).
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from ._native import call
from ._op import Kernel, Native, register

SCHEMA = "(Tensor x, Tensor tiles, Tensor crow, Tensor col, Tensor? bias=None, *, int out_features) -> Tensor"


def compress(weight: Tensor, depth: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tiles of a weight that hold anything else than zeros (−0 is one), and where they were.

    Args:
        weight: W [out, in].
        depth: inputs of a tile.
        width: outputs of a tile.

    Returns:
        tiles [kept, depth, width], dtype of `weight`; crow [⌈out / width⌉ + 1] and col [kept], int32.
    """
    kept = _kept(weight, depth, width)
    crow = pad(kept.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    col = kept.nonzero()[:, 1].to(torch.int32).contiguous()
    return pick(weight, crow, col, depth, width), crow, col


def filled(weight: Tensor, depth: int, width: int) -> Tensor:
    """How many tiles in each row of tiles hold anything else than zeros [⌈out / width⌉], int64."""
    return _kept(weight, depth, width).sum(1)


def pick(weight: Tensor, crow: Tensor, col: Tensor, depth: int, width: int) -> Tensor:
    """Those tiles of a weight [out, in]: [kept, depth, width], contiguous."""
    return _grid(weight, depth, width)[_row(crow, len(col)), col.long()].contiguous()


def _kept(weight: Tensor, depth: int, width: int) -> Tensor:
    return _grid(weight, depth, width).ne(0).flatten(2).any(2)


def _row(crow: Tensor, count: int) -> Tensor:
    """The row of each tile; in operators that ONNX has, too."""
    return (torch.arange(count, device=crow.device).unsqueeze(1) >= crow[1:]).sum(1)


def _grid(weight: Tensor, depth: int, width: int) -> Tensor:
    """W [out, in] as tiles [⌈out / width⌉, ⌈in / depth⌉, depth, width]."""
    out, inner = weight.shape
    rows, columns = -(-out // width), -(-inner // depth)
    padded = pad(weight, (0, columns * depth - inner, 0, rows * width - out))
    return padded.reshape(rows, width, columns, depth).permute(0, 2, 3, 1)


def dense(tiles: Tensor, crow: Tensor, col: Tensor, out_features: int, in_features: int) -> Tensor:
    """W [out, in] again."""
    count, depth, width = tiles.shape
    rows, columns = len(crow) - 1, -(-in_features // depth)
    grid = tiles.new_zeros(rows, columns, depth, width).index_put((_row(crow, count), col.long()), tiles)
    return grid.permute(0, 3, 1, 2).reshape(rows * width, columns * depth)[:out_features, :in_features]


def reference(
    x: Tensor, tiles: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None = None, *, out_features: int
) -> Tensor:
    """Multiply by a weight of which only some tiles are there.

    Args:
        x: [..., in], floating.
        tiles: [kept, depth, width], dtype of `x`, each a tile of Wᵀ; finite: what an input of 0 is multiplied with may
            not be read, nor an input of a tile that is not there.
        crow: [⌈out / width⌉ + 1], int32, ascending from 0 to kept: the tiles of W's r-th row of tiles are
            crow[r], …, crow[r + 1] − 1.
        col: [kept], int32, from 0 to ⌈in / depth⌉ − 1: the column of each tile; no two of a row are equal.
        bias: [out], dtype of `x`; None: 0.
        out_features: out.

    Returns:
        [..., out], dtype of `x`.

    Raises:
        ValueError: shapes or dtypes other than the above; on a CPU, indices other than the above.
    """
    _check(x, tiles, crow, col, bias, out_features=out_features)
    return linear(x, dense(tiles, crow, col, out_features, x.shape[-1]), bias)


def fake(
    x: Tensor, tiles: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None = None, *, out_features: int
) -> Tensor:
    _check(x, tiles, crow, col, bias, out_features=out_features)
    return x.new_empty((*x.shape[:-1], out_features))


def _check(x: Tensor, tiles: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None, *, out_features: int) -> None:
    if not x.is_floating_point() or x.dim() == 0:
        raise ValueError(f"block_sparse: x is {x.dtype} of shape {list(x.shape)}, not floating of [..., in]")
    if tiles.dim() != 3 or 0 in tiles.shape[1:] or tiles.dtype != x.dtype:
        raise ValueError(
            f"block_sparse: tiles is {tiles.dtype} of shape {list(tiles.shape)}, "
            f"not {x.dtype} of [kept, depth ≥ 1, width ≥ 1]"
        )
    kept, _, width = tiles.shape
    for what, value, size, dtype in (
        ("crow", crow, -(-out_features // width) + 1, torch.int32),
        ("col", col, kept, torch.int32),
        ("bias", bias, out_features, x.dtype),
    ):
        if value is not None and (tuple(value.shape) != (size,) or value.dtype != dtype):
            raise ValueError(
                f"block_sparse: {what} is {value.dtype} of shape {list(value.shape)}, not {dtype} of [{size}]"
            )


def _flat(x: Tensor) -> Tensor:
    # Not −1, which is ambiguous where in is 0.
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()


# ---- GPU

TILE_SIZES = (16, 32, 64, 128)
"""Depths and widths of tiles that the kernel takes."""


def supports(
    x: Tensor, tiles: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None = None, *, out_features: int
) -> bool:
    """Tiles of powers of two that lie in one piece, and no float64."""
    tensors = [value for value in (x, tiles, crow, col, bias) if value is not None]
    one_device = len({value.device for value in tensors}) == 1
    sizes = all(size in TILE_SIZES for size in tiles.shape[1:])
    return one_device and sizes and tiles.is_contiguous() and x.dtype != torch.float64


def launch(
    x: Tensor, tiles: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None = None, *, out_features: int
) -> Tensor:
    """As :func:`reference`, summed up in float32 and rounded once; float32 is multiplied in TF32 where torch may."""
    from ._block_sparse_triton import block_sparse

    _check(x, tiles, crow, col, bias, out_features=out_features)
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    y = block_sparse(
        _flat(x), tiles, crow.contiguous(), col.contiguous(), None if bias is None else bias.contiguous(),
        out_features=out_features, precision="tf32" if tf32 else "ieee",
    )  # fmt: skip
    return y.reshape(*x.shape[:-1], out_features)


# ---- CPU

NATIVE_SCHEMA = "(Tensor x, Tensor tiles, Tensor crow, Tensor col, Tensor bias) -> Tensor"
WHOLE = 16
"""The widest vector there is has as many float32."""


def native_supports(
    x: Tensor, tiles: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None = None, *, out_features: int
) -> bool:
    """Tiles of whole vectors that lie in one piece. Half precision stays with plain torch."""
    on_cpu = all(value.device.type == "cpu" for value in (x, tiles, crow, col, bias) if value is not None)
    whole = tiles.dim() == 3 and tiles.shape[2] % WHOLE == 0 and tiles.is_contiguous()
    return on_cpu and whole and x.dtype in (torch.float32, torch.float64)


def native_apply(
    x: Tensor, tiles: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None = None, *, out_features: int
) -> Tensor:
    """As :func:`reference`. A NaN or infinity of `x` shows only where there is a tile for it."""
    _check(x, tiles, crow, col, bias, out_features=out_features)
    bias = tiles.new_zeros(out_features) if bias is None else bias.contiguous()
    y = torch.ops.fxfreeze.block_sparse_native(_flat(x), tiles, crow.contiguous(), col.contiguous(), bias)
    return y.reshape(*x.shape[:-1], out_features)


def native_fake(x: Tensor, tiles: Tensor, crow: Tensor, col: Tensor, bias: Tensor) -> Tensor:
    _check(x, tiles, crow, col, bias, out_features=bias.numel())
    if x.dim() != 2 or x.dtype not in (torch.float32, torch.float64) or tiles.shape[2] % WHOLE:
        raise ValueError(
            f"block_sparse_native: x is {x.dtype} of shape {list(x.shape)}, not float32 or float64 of "
            f"[rows, in], or tiles of {tiles.shape[2]} are not whole vectors of {WHOLE}"
        )
    return x.new_empty(x.shape[0], bias.shape[0])


def native_run(library: ctypes.CDLL, x: Tensor, tiles: Tensor, crow: Tensor, col: Tensor, bias: Tensor) -> Tensor:
    if not all(value.is_contiguous() for value in (x, tiles, crow, col, bias)):
        raise ValueError("block_sparse_native: takes contiguous tensors only")
    y = native_fake(x, tiles, crow, col, bias)
    sizes = (x.element_size(), *x.shape, bias.shape[0], *tiles.shape)
    if not call(library.block_sparse, y, x, tiles, crow, col, bias, *sizes, torch.get_num_threads()):
        raise ValueError("block_sparse: crow does not ascend from 0 to the number of tiles, or col is outside")
    return y


NATIVE = Native("block_sparse.cpp", NATIVE_SCHEMA, native_fake, native_run, native_supports, native_apply)
KERNEL = register(Kernel("block_sparse", SCHEMA, reference, fake, supports, launch, native=NATIVE))
