"""x·Wᵀ + b on a GPU for a W of which only some tiles are there: a tiled product that walks along the tiles of its row.

A program has some rows of x and some columns of one row of W's tiles. It goes through the tiles of that row, which say
themselves which columns of x they want, and adds up in float32 registers. Nothing is read of tiles that are not there,
and no two programs add to one number, so two runs on the same input agree in every bit.

Roofline. With few rows, memory: the tiles that are there, once, as kept · depth · width numbers, at 70 % of the copy
bandwidth for 16 rows or less. With many, arithmetic: 2 · rows · kept · depth · width operations at 70 % of the rate of
cuBLAS over the same number, and so at 75 % empty tiles 2.8 times as fast as the dense product. To reach on an H100 in
bfloat16 with tiles of 64 x 64 at in = out = 4096. Not measured yet.

This module imports triton: import it inside a launcher.
"""

# mypy: disable-error-code="no-untyped-def"
# (What a kernel takes has no Python types.)

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import Config, interpreted, tuned


@triton.jit
def block_sparse_kernel(
    x_ptr, tile_ptr, crow_ptr, col_ptr, bias_ptr, y_ptr, M, N, K,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # Programs that run together have the same rows of x.
    parts: tl.constexpr = WIDTH // BN
    column = tl.program_id(0)
    row, part = column // parts, column % parts
    m, n, k = tl.program_id(1) * BM + tl.arange(0, BM), part * BN + tl.arange(0, BN), tl.arange(0, BK)
    # Rows past the end are read from the start again: no mask, and nothing of them is stored.
    x_ptrs = x_ptr + (m % M).to(tl.int64)[:, None] * K + k[None, :]
    # Tiles that follow each other lie behind each other, so steps of BK go on from one into the next.
    steps: tl.constexpr = DEPTH // BK
    first, last = tl.load(crow_ptr + row) * steps, tl.load(crow_ptr + row + 1) * steps
    tile_ptrs = tile_ptr + first.to(tl.int64) * (BK * WIDTH) + k[:, None] * WIDTH + n[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    # Where x is wanted is read one step ahead: loads that wait for no other load are kept in flight.
    start = tl.load(col_ptr + first // steps, mask=first < last, other=0) * DEPTH
    for step in range(first, last):
        if EVEN:
            x = tl.load(x_ptrs + start)
        else:
            x = tl.load(x_ptrs + start, mask=k[None, :] < K - start, other=0.0)
        acc = tl.dot(x.to(FACTOR), tl.load(tile_ptrs).to(FACTOR), acc, input_precision=PRECISION)
        tile_ptrs += BK * WIDTH
        start = tl.load(col_ptr + (step + 1) // steps, mask=step + 1 < last, other=0) * DEPTH + (step + 1) % steps * BK
    at = row * WIDTH + n
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + at, mask=at < N, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + m[:, None].to(tl.int64) * N + at[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(m[:, None] < M) & (at[None, :] < N))


def _config(rows: int, columns: int, depth: int, warps: int, stages: int) -> dict[str, int]:
    return {"BM": rows, "BN": columns, "BK": depth, "num_warps": warps, "num_stages": stages}


HALF_CONFIGS = (
    _config(16, 16, 128, 2, 4),
    _config(16, 32, 64, 2, 4),
    _config(16, 64, 64, 4, 4),
    _config(64, 32, 64, 4, 4),
    _config(64, 64, 64, 4, 4),
    _config(128, 64, 64, 4, 3),
    _config(128, 128, 64, 8, 3),
)
# Without tensor cores the factors of a product stay in registers, too.
SINGLE_CONFIGS = (
    _config(16, 16, 32, 2, 3),
    _config(16, 32, 32, 4, 3),
    _config(32, 32, 16, 4, 3),
    _config(32, 64, 16, 4, 3),
    _config(64, 64, 16, 8, 3),
)
TF32_CONFIGS = (
    _config(16, 32, 64, 4, 4),
    _config(64, 32, 32, 4, 4),
    _config(64, 64, 32, 4, 4),
    _config(128, 64, 32, 4, 3),
)


def configs(kind: str, depth: int, width: int) -> list[Config]:
    """What is tried for "half", "single" or "tf32": steps no deeper and no wider than a tile, each once."""
    table = {"half": HALF_CONFIGS, "single": SINGLE_CONFIGS, "tf32": TF32_CONFIGS}[kind]
    cut = [{**config, "BN": min(config["BN"], width), "BK": min(config["BK"], depth)} for config in table]
    return list({tuple(config.values()): config for config in cut}.values())


@cache
def _launcher(kind: str, depth: int, width: int) -> Any:
    return tuned(block_sparse_kernel, configs(kind, depth, width), key=("N", "K", "EVEN"))


def block_sparse(
    x: Tensor, tiles: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None, *, out_features: int, precision: str
) -> Tensor:
    """As ``block_sparse.reference``, summed up in float32.

    Args:
        x: [M, K], float32, float16 or bfloat16, contiguous.
        tiles: [kept, depth, width], dtype of `x`, contiguous; both sizes 16, 32, 64 or 128.
        crow: [⌈N / width⌉ + 1], int32, contiguous.
        col: [kept], int32, contiguous.
        bias: [N], dtype of `x`, contiguous; None: 0.
        out_features: N.
        precision: of float32 products: "ieee", or "tf32" for tensor cores.

    Returns:
        [M, N], dtype of `x`.
    """
    (rows, inner), (_, depth, width) = x.shape, tiles.shape
    y = torch.empty(rows, out_features, device=x.device, dtype=x.dtype)
    if y.numel():
        kind = "half" if x.dtype != torch.float32 else "single" if precision == "ieee" else "tf32"
        _launcher(kind, depth, width)(
            lambda meta: ((len(crow) - 1) * (width // meta["BN"]), triton.cdiv(rows, meta["BM"])),
            size=rows,
            x_ptr=x, tile_ptr=tiles, crow_ptr=crow, col_ptr=col, bias_ptr=bias, y_ptr=y, M=rows, N=out_features,
            K=inner, DEPTH=depth, WIDTH=width, EVEN=inner % depth == 0, FACTOR=factor(x.dtype), PRECISION=precision,
        )  # fmt: skip
    return y


def factor(dtype: torch.dtype) -> tl.dtype:
    """What is multiplied; the interpreter would multiply the bit patterns of bfloat16."""
    if interpreted(block_sparse_kernel):
        return tl.float32
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]
