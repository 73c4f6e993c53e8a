"""x·Wᵀ on a GPU with W of 8 or 4 bits and a scale per group, and a bias, a hard gate and a gain as its epilogue.

Integers become floats in registers. All of them are exact in half precision, so a group's sum is as exact as float32
adds up, and its scale multiplies it once: no weight is ever rounded. Two kernels, chosen by the number of rows:

:func:`row_kernel` (M = 1) is bound by memory. A program has a few outputs and all of their inputs, and a thread's sums
    stay its own until the end. It loads 16 bytes of 8 bits at a time, and 8 of 4: beside more it would have x in two
    pieces. Inputs are not split among programs: 1024 outputs already make 256 programs of 4, and so every sum is added
    up in one order. Roofline: 80 % of the copy bandwidth over the bytes of W and its scales.
:func:`tiled_kernel` computes yᵀ = W·xᵀ. The left factor of a product of tensor cores may come from registers on
    Hopper, where the right one has to lie in shared memory; and few rows of x make a narrow right factor, where a left
    one has at least 64. Of 4 bits a tile is two products, with the low and the high halves of its bytes. Roofline: 60 %
    of cuBLAS in half precision for many rows, and 80 % of the copy bandwidth over W for 16 or less.

Not measured yet.

This module imports triton: import it inside a launcher.
"""

# mypy: disable-error-code="no-untyped-def"
# (What a kernel takes has no Python types.)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._gated_linear_triton import factor, place
from ._triton import tuned

CHUNK = tl.constexpr(32)
HALF = tl.constexpr(16)
"""Bytes of 4 bits that hold a chunk: the low half of byte j is input j of it, the high half input 16 + j."""


@triton.jit
def low(bytes):
    """The low halves of int32, with their sign."""
    return (bytes << 28) >> 28


@triton.jit
def high(bytes):
    return bytes >> 4


@triton.jit
def finish(h, bias_ptr, threshold_ptr, gain_ptr, y_ptr, m, n, M, N, SCORE: tl.constexpr):
    """From sums [n, m] to results, and their one rounding."""
    on = n < N
    if bias_ptr is not None:
        h += tl.load(bias_ptr + n, mask=on, other=0.0).to(tl.float32)[:, None]
    y = h
    if gain_ptr is not None:
        y *= tl.load(gain_ptr + n, mask=on, other=0.0)[:, None]
    if threshold_ptr is not None:
        threshold = tl.load(threshold_ptr + n, mask=on, other=0.0)
        y = tl.where((tl.abs(h) if SCORE == "abs" else h) > threshold[:, None], y, 0.0)
    at = m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(m[None, :] < M) & on[:, None])


@triton.jit
def row_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, threshold_ptr, gain_ptr, y_ptr, N, K, block,
    BITS: tl.constexpr, SCORE: tl.constexpr, GROUPED: tl.constexpr, EVEN: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    # What is past the end is read from the start again, and not stored.
    from_n = (n % N).to(tl.int64)
    chunk, lane = tl.arange(0, BC)[None, :, None], tl.arange(0, HALF)[None, None, :]
    k, byte = chunk * CHUNK + lane, chunk * (CHUNK * BITS // 8) + lane
    x_ptrs, w_ptrs = x_ptr + k, w_ptr + from_n[:, None, None] * (K * BITS // 8) + byte
    # A thread has its own sums until the end.
    sums = tl.zeros((BN, BC, HALF), tl.float32)
    for start in range(0, K, BC * CHUNK):
        first, second = k < K - start, k + HALF < K - start
        x = tl.load(x_ptrs, mask=first, other=0.0).to(tl.float32)
        x_next = tl.load(x_ptrs + HALF, mask=second, other=0.0).to(tl.float32)
        if EVEN:
            w = tl.load(w_ptrs).to(tl.int32)
        else:
            w = tl.load(w_ptrs, mask=first, other=0).to(tl.int32)
        if BITS == 4:
            w, w_next = low(w), high(w)
        elif EVEN:
            w_next = tl.load(w_ptrs + HALF).to(tl.int32)
        else:
            w_next = tl.load(w_ptrs + HALF, mask=second, other=0).to(tl.int32)
        part = w.to(tl.float32) * x + w_next.to(tl.float32) * x_next
        if GROUPED:
            at = (start + tl.arange(0, BC) * CHUNK)[None, :]
            scale = tl.load(scale_ptr + from_n[:, None] * (K // block) + at // block, mask=at < K, other=0.0)
            part *= scale.to(tl.float32)[:, :, None]
        sums += part
        x_ptrs += BC * CHUNK
        w_ptrs += BC * (CHUNK * BITS // 8)
    total = tl.sum(tl.sum(sums, 2), 1)
    if not GROUPED:
        total *= tl.load(scale_ptr + from_n).to(tl.float32)
    finish(total[:, None], bias_ptr, threshold_ptr, gain_ptr, y_ptr, tl.arange(0, 1), n, 1, N, SCORE)


@triton.jit
def tiled_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, threshold_ptr, gain_ptr, y_ptr, M, N, K, block,
    BITS: tl.constexpr, SCORE: tl.constexpr, GROUPED: tl.constexpr, EVEN: tl.constexpr,
    FACTOR: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, column = place(M, N, BM, BN, GROUP)
    m, n = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN)
    from_m, from_n = (m % M).to(tl.int64), (n % N).to(tl.int64)
    byte = tl.arange(0, BK * BITS // 8)
    k = byte // HALF * CHUNK + byte % HALF if BITS == 4 else byte
    x_ptrs = x_ptr + from_m[None, :] * K + k[:, None]
    w_ptrs = w_ptr + from_n[:, None] * (K * BITS // 8) + byte[None, :]
    sums = tl.zeros((BN, BM), tl.float32)
    for start in range(0, K, BK):
        left = K - start
        if EVEN:
            x, w = tl.load(x_ptrs), tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=k[:, None] < left, other=0.0)
            w = tl.load(w_ptrs, mask=k[None, :] < left, other=0)
        part = tl.zeros((BN, BM), tl.float32) if GROUPED else sums
        if BITS == 4:
            # Inputs are whole chunks, and the smallest BK is one: it is never odd.
            x_next = tl.load(x_ptrs + HALF)
            w = w.to(tl.int32)
            part = tl.dot(high(w).to(FACTOR), x_next.to(FACTOR), part, input_precision=PRECISION)
            w = low(w)
        part = tl.dot(w.to(FACTOR), x.to(FACTOR), part, input_precision=PRECISION)
        if GROUPED:
            # BK divides a group.
            scale = tl.load(scale_ptr + from_n * (K // block) + start // block)
            sums += part * scale.to(tl.float32)[:, None]
        else:
            sums = part
        x_ptrs += BK
        w_ptrs += BK * BITS // 8
    if not GROUPED:
        sums *= tl.load(scale_ptr + from_n).to(tl.float32)[:, None]
    finish(sums, bias_ptr, threshold_ptr, gain_ptr, y_ptr, m, n, M, N, SCORE)


def _config(rows: int, columns: int, depth: int, warps: int, stages: int) -> dict[str, int]:
    return {"BM": rows, "BN": columns, "BK": depth, "GROUP": 8, "num_warps": warps, "num_stages": stages}


ROW_CONFIGS = (
    {"BN": 4, "BC": 64, "num_warps": 4, "num_stages": 1},
    {"BN": 8, "BC": 64, "num_warps": 4, "num_stages": 1},
    {"BN": 4, "BC": 128, "num_warps": 4, "num_stages": 1},
    {"BN": 4, "BC": 32, "num_warps": 2, "num_stages": 1},
)
"""BC chunks of 32 inputs at a time."""
HALF_CONFIGS = {
    128: (
        _config(128, 128, 128, 8, 3),
        _config(64, 128, 128, 8, 3),
        _config(32, 64, 128, 4, 4),
        _config(16, 64, 128, 4, 4),
    ),
    64: (
        _config(128, 128, 64, 8, 3),
        _config(64, 128, 64, 4, 4),
        _config(32, 64, 64, 4, 4),
        _config(16, 64, 64, 4, 5),
    ),
    32: (_config(64, 128, 32, 4, 4), _config(32, 64, 32, 4, 5), _config(16, 64, 32, 4, 5)),
}
"""By BK, the largest that divides a group. Groups of 32 add a scaled sum per 32 inputs, which tensor cores wait for."""
SINGLE_CONFIGS = {32: (_config(32, 64, 32, 8, 3), _config(32, 32, 32, 4, 3), _config(16, 32, 32, 4, 3))}
TF32_CONFIGS = {
    64: (_config(64, 64, 64, 4, 3), _config(16, 64, 64, 4, 3)),
    32: (_config(64, 64, 32, 4, 4), _config(16, 64, 32, 4, 4)),
}

_KEY = ("N", "K", "block", "BITS")
_row = tuned(row_kernel, ROW_CONFIGS, key=_KEY)
_half, _single, _tf32 = (
    {depth: tuned(tiled_kernel, chosen, key=_KEY) for depth, chosen in configs.items()}
    for configs in (HALF_CONFIGS, SINGLE_CONFIGS, TF32_CONFIGS)
)


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    threshold: Tensor | None,
    gain: Tensor | None,
    *,
    score: str,
    precision: str = "ieee",
) -> Tensor:
    """As ``quantized_linear.reference``. Two runs on the same input with the same config agree in every bit.

    Args:
        x: [M, K], float32, float16 or bfloat16, contiguous, K ≥ 1.
        weight: int8 [N, K], or [N, K / 2] from ``quantized_linear.pack``, contiguous.
        scale: [N, groups], dtype of `x`, contiguous; 1 group, or groups of multiples of 32.
        bias: [N], dtype of `x`, contiguous, or None.
        threshold: [N], float32, contiguous, or None; `gain` likewise.
        gain: see `threshold`.
        score: see ``quantized_linear.reference``.
        precision: of float32 products: "ieee", or "tf32" for tensor cores. One row is always "ieee".

    Returns:
        [M, N], dtype of `x`.
    """
    (rows, depth), columns = x.shape, weight.shape[0]
    y = torch.empty(rows, columns, device=x.device, dtype=x.dtype)
    if not y.numel():
        return y
    block = depth // scale.shape[1]
    arguments: dict[str, Any] = {
        "x_ptr": x, "w_ptr": weight, "scale_ptr": scale, "bias_ptr": bias, "threshold_ptr": threshold,
        "gain_ptr": gain, "y_ptr": y, "N": columns, "K": depth, "block": block,
        "BITS": 8 if weight.shape[1] == depth else 4, "SCORE": score, "GROUPED": block != depth,
    }  # fmt: skip
    if rows == 1:
        even = all(depth % (config["BC"] * CHUNK.value) == 0 for config in ROW_CONFIGS)
        _row(lambda meta: (triton.cdiv(columns, meta["BN"]),), **arguments, EVEN=even)
        return y
    tiles = _half if x.dtype != torch.float32 else _tf32 if precision == "tf32" else _single
    fitting = [step for step in tiles if block % step == 0]
    step = max(fitting, default=min(tiles))
    tiles[step](
        lambda meta: (triton.cdiv(rows, meta["BM"]) * triton.cdiv(columns, meta["BN"]),),
        size=rows, **arguments, M=rows, EVEN=bool(fitting), FACTOR=factor(x.dtype), PRECISION=precision,
    )  # fmt: skip
    return y
