"""A product of matrices of 8-bit integers on a GPU, with a zero point, scales and a bias as its epilogue.

Tensor cores add up in int32, which ``integer_linear.MAX_INPUTS`` inputs do not overflow, so the sums are exact in any
order. They take int8 only: x in uint8 becomes x − 128, and its zero point moves along. What that one adds is taken off
at the end by the sums of the weight's rows, which the caller has; made of the tiles they would be as many additions as
tensor cores leave time for.

Roofline: of many rows arithmetic, 80 % of the rate of ``torch._int_mm``; for 16 rows or less 80 % of the copy bandwidth
over W. Not measured yet. The largest tile spills up to 700 bytes per thread on cuda:80 and cuda:100; the
others spill nothing.

This module imports triton: import it inside a launcher.
"""

# mypy: disable-error-code="no-untyped-def"
# (What a kernel takes has no Python types.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._gated_linear_triton import place
from ._triton import tuned


@triton.jit
def integer_linear_kernel(
    x_ptr, x_scale_ptr, zero_ptr, w_ptr, scale_ptr, bias_ptr, total_ptr, y_ptr, M, N, K,
    SHIFT: tl.constexpr, ONE_SCALE: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, column = place(M, N, BM, BN, GROUP)
    m, n, k = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN), tl.arange(0, BK)
    # Rows and columns past the end are read from the start again: no mask, and nothing of them is stored.
    x_ptrs = x_ptr + (m % M).to(tl.int64)[:, None] * K + k[None, :]
    w_ptrs = w_ptr + (n % N).to(tl.int64)[None, :] * K + k[:, None]
    sums = tl.zeros((BM, BN), tl.int32)
    for start in range(0, K, BK):
        if EVEN:
            x, w = tl.load(x_ptrs), tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=k[None, :] < K - start, other=0)
            # Whatever x is past the end, it counts for nothing.
            w = tl.load(w_ptrs, mask=k[:, None] < K - start, other=0)
        if SHIFT:
            x = (x ^ 128).to(tl.int8, bitcast=True)
        sums = tl.dot(x, w, sums, out_dtype=tl.int32)
        x_ptrs += BK
        w_ptrs += BK
    on = n < N
    zero = tl.load(zero_ptr).to(tl.int32)
    if SHIFT:
        zero -= 128
    sums -= zero * tl.load(total_ptr + n, mask=on, other=0)[None, :]
    x_scale = tl.load(x_scale_ptr).to(tl.float32)
    if ONE_SCALE:
        y = sums.to(tl.float32) * (x_scale * tl.load(scale_ptr).to(tl.float32))
    else:
        y = sums.to(tl.float32) * (x_scale * tl.load(scale_ptr + n, mask=on, other=0.0).to(tl.float32))[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=on, other=0.0).to(tl.float32)[None, :]
    at = m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(m[:, None] < M) & on[None, :])


def _config(rows: int, columns: int, depth: int, warps: int, stages: int) -> dict[str, int]:
    return {"BM": rows, "BN": columns, "BK": depth, "GROUP": 8, "num_warps": warps, "num_stages": stages}


CONFIGS = (
    _config(128, 128, 128, 8, 3),
    _config(128, 256, 128, 8, 3),
    _config(128, 128, 64, 8, 4),
    _config(64, 128, 128, 4, 3),
    _config(64, 64, 128, 4, 4),
    _config(16, 64, 256, 4, 4),
    _config(16, 32, 256, 4, 4),
)
DEPTH = 256
"""A multiple of every BK above: what it divides needs no mask along K."""

_tiles = tuned(integer_linear_kernel, CONFIGS, key=("N", "K", "SHIFT", "EVEN"))


def integer_linear(
    x: Tensor,
    x_scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    weight_sum: Tensor,
) -> Tensor:
    """As ``integer_linear.reference``.

    Args:
        x: [M, K], uint8 or int8, contiguous, K ≥ 1.
        x_scale: 0-d, float32, float16 or bfloat16.
        zero_point: 0-d, dtype of `x`.
        weight: int8 [N, K], contiguous.
        scale: [N] or [1], dtype of `x_scale`, contiguous.
        bias: [N], dtype of `x_scale`, contiguous, or None.
        weight_sum: int32 [N], contiguous.

    Returns:
        [M, N], dtype of `x_scale`.
    """
    (rows, depth), columns = x.shape, weight.shape[0]
    y = torch.empty(rows, columns, device=x.device, dtype=x_scale.dtype)
    if y.numel():
        _tiles(
            lambda meta: (triton.cdiv(rows, meta["BM"]) * triton.cdiv(columns, meta["BN"]),),
            size=rows, x_ptr=x, x_scale_ptr=x_scale, zero_ptr=zero_point, w_ptr=weight, scale_ptr=scale,
            bias_ptr=bias, total_ptr=weight_sum, y_ptr=y, M=rows, N=columns, K=depth,
            SHIFT=x.dtype == torch.uint8, ONE_SCALE=scale.shape[0] == 1, EVEN=depth % DEPTH == 0,
        )  # fmt: skip
    return y
