"""Matrix products over other operations than (×, +), on a GPU: C[n, p] = reduce_k combine(A[k, n], B[k, p]).

Tensor cores know only (×, +), so this is a tile kernel of the ALUs: a tile of C stays in registers, and one k after the
other a row of A and one of B are read. (min, +) sums minima, as Tversky similarity needs; (+, min) and (+, max) are the
tropical products of shortest and longest paths.

Roofline: two ALU operations per (n, p, k), so 60 % of the float32 ALU limit at N, P ≥ 1024.

This module imports triton: import it inside a launcher.
"""

# mypy: disable-error-code="no-untyped-def"
# (What a kernel takes has no Python types.)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._triton import tuned

COMBINES = ("min", "max", "softmin", "add")
"""softmin counts −log(e⁻ᵃ + e⁻ᵇ) where both are above 0, else 0."""

START = {"sum": 0.0, "min": float("inf"), "max": float("-inf")}
"""What a reduction of nothing gives."""


@triton.jit
def combine(a, b, COMBINE: tl.constexpr):
    if COMBINE == "min":
        return tl.minimum(a, b)
    elif COMBINE == "max":
        return tl.maximum(a, b)
    elif COMBINE == "add":
        return a + b
    else:
        low = tl.minimum(a, b) - tl.log(1.0 + tl.exp(-tl.abs(a - b)))
        return tl.where((a > 0) & (b > 0), low, 0.0)


@triton.jit
def reduce(c, value, REDUCE: tl.constexpr):
    if REDUCE == "sum":
        return c + value
    elif REDUCE == "min":
        return tl.minimum(c, value)
    else:
        return tl.maximum(c, value)


@triton.jit
def present(value, threshold):
    """`value` where it exceeds the threshold, else 0; a product, so that NaN stays."""
    return value * (value > threshold).to(tl.float32)


@triton.jit
def semiring_kernel(
    a_ptr, b_ptr, c_ptr, threshold, N, P, K, stride_ak, stride_an, stride_bk, stride_bp, stride_cn,
    COMBINE: tl.constexpr, REDUCE: tl.constexpr, START: tl.constexpr, MASK: tl.constexpr,
    BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    p = (tl.program_id(1) * BP + tl.arange(0, BP)).to(tl.int64)
    a_ptrs, b_ptrs = a_ptr + n * stride_an, b_ptr + p * stride_bp
    c = tl.full((BN, BP), START, tl.float32)
    # One at a time: unrolled by four, this takes all 255 registers of a thread, and softmin spills a thousand bytes.
    for _ in range(K):
        a, b = tl.load(a_ptrs, mask=n < N, other=0.0), tl.load(b_ptrs, mask=p < P, other=0.0)
        if MASK:
            a, b = present(a, threshold), present(b, threshold)
        c = reduce(c, combine(a[:, None], b[None, :], COMBINE), REDUCE)
        a_ptrs += stride_ak
        b_ptrs += stride_bk
    tl.store(c_ptr + n[:, None] * stride_cn + p[None, :], c, mask=(n[:, None] < N) & (p[None, :] < P))


CONFIGS = (
    {"BN": 64, "BP": 64, "num_warps": 4},
    {"BN": 64, "BP": 128, "num_warps": 8},
    {"BN": 32, "BP": 64, "num_warps": 4},
)
_tuned = tuned(semiring_kernel, CONFIGS, key=("P", "K", "COMBINE", "REDUCE", "MASK"))


def semiring(
    a: torch.Tensor, b: torch.Tensor, combine: str, reduce: str, threshold: float | None = None
) -> torch.Tensor:
    """reduce_k combine(a[k, n], b[k, p]).

    Args:
        a: [K, N], float32, any strides; columns next to each other are read fastest.
        b: [K, P], float32, likewise.
        combine: one of :data:`COMBINES`.
        reduce: "sum", "min" or "max".
        threshold: values at or below it count as 0; None: all values count.

    Returns:
        [N, P], float32.
    """
    (depth, rows), columns = a.shape, b.shape[1]
    c = torch.empty(rows, columns, device=a.device, dtype=torch.float32)
    if c.numel():
        _tuned(
            lambda meta: (triton.cdiv(rows, meta["BN"]), triton.cdiv(columns, meta["BP"])),
            size=rows,
            a_ptr=a, b_ptr=b, c_ptr=c, threshold=threshold or 0.0, N=rows, P=columns, K=depth,
            stride_ak=a.stride(0), stride_an=a.stride(1), stride_bk=b.stride(0), stride_bp=b.stride(1),
            stride_cn=c.stride(0),
            COMBINE=combine, REDUCE=reduce, START=START[reduce], MASK=threshold is not None,
        )  # fmt: skip
    return c
