"""h·W + b on a GPU for at most 8 rows of h [N, K] with many zeros, and W [K, P]: three kernels, no wait for the host.

:func:`active_kernel` lists the neurons that fire in any row, slice of K by slice of K.
:func:`rows_kernel` reads their rows of W: a program has a slice of K and some columns, and writes its own sums.
:func:`total_kernel` adds up the slices' sums in one order, so that two runs on the same input agree in every bit.

It is bound by memory. Roofline: 60 % of the copy bandwidth over the rows of W that must be read, and so 5 times as fast
as cuBLAS at 10 % firing, K = 16384, P = 4096. The sums in between are K / 512 · N · P numbers, written and read once.

This module imports triton: import it inside a launcher.
"""

# mypy: disable-error-code="no-untyped-def"
# (What a kernel takes has no Python types.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import tuned

SLICE = 512
"""Neurons of one program. At 10 % firing it reads some 50 rows of W; K = 16384 and P = 4096 make 512 programs."""


@triton.jit
def active_kernel(h_ptr, list_ptr, count_ptr, N, K, NB: tl.constexpr, SLICE: tl.constexpr):
    slice = tl.program_id(0)
    n, k = tl.arange(0, NB).to(tl.int64), slice * SLICE + tl.arange(0, SLICE)
    h = tl.load(h_ptr + n[:, None] * K + k[None, :], mask=(n[:, None] < N) & (k[None, :] < K), other=0.0)
    # A NaN is not 0.
    active = tl.max((h.to(tl.float32) != 0.0).to(tl.int32), 0)
    tl.store(list_ptr + slice * SLICE + tl.cumsum(active, 0) - active, k, mask=active != 0)
    tl.store(count_ptr + slice, tl.sum(active, 0))


@triton.jit
def rows_kernel(
    h_ptr, w_ptr, list_ptr, count_ptr, sum_ptr, N, P, K,
    NB: tl.constexpr, SLICE: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    slice = tl.program_id(1)
    n, slot = tl.arange(0, NB).to(tl.int64), tl.arange(0, BK)
    p = (tl.program_id(0) * BP + tl.arange(0, BP)).to(tl.int64)
    # One sum per slot of the block, added up at the end: nothing crosses threads inside the loop.
    sums = tl.zeros((NB, BK, BP), tl.float32)
    count = tl.load(count_ptr + slice)
    for start in range(0, count, BK):
        on = start + slot < count
        k = tl.load(list_ptr + slice * SLICE + start + slot, mask=on, other=0).to(tl.int64)
        h = tl.load(h_ptr + n[:, None] * K + k[None, :], mask=(n[:, None] < N) & on[None, :], other=0.0)
        w = tl.load(w_ptr + k[:, None] * P + p[None, :], mask=on[:, None] & (p[None, :] < P), other=0.0)
        sums += h.to(tl.float32)[:, :, None] * w.to(tl.float32)[None, :, :]
    at, mask = (slice * N + n)[:, None] * P + p[None, :], (n[:, None] < N) & (p[None, :] < P)
    tl.store(sum_ptr + at, tl.sum(sums, 1), mask=mask)


@triton.jit
def total_kernel(
    sum_ptr, bias_ptr, y_ptr, N, P, slices, BIAS: tl.constexpr, BP: tl.constexpr, BS: tl.constexpr
):  # fmt: skip
    n, slot = tl.program_id(1).to(tl.int64), tl.arange(0, BS)
    p = (tl.program_id(0) * BP + tl.arange(0, BP)).to(tl.int64)
    sums = tl.zeros((BS, BP), tl.float32)
    for start in range(0, slices, BS):
        slice = (start + slot).to(tl.int64)
        at, mask = (slice * N + n)[:, None] * P + p[None, :], (slice[:, None] < slices) & (p[None, :] < P)
        sums += tl.load(sum_ptr + at, mask=mask, other=0.0)
    y = tl.sum(sums, 0)
    if BIAS:
        y += tl.load(bias_ptr + p, mask=p < P, other=0.0).to(tl.float32)
    tl.store(y_ptr + n * P + p, y.to(y_ptr.dtype.element_ty), mask=p < P)


ROWS_CONFIGS = {
    1: ({"BP": 256, "BK": 16, "num_warps": 4}, {"BP": 512, "BK": 8, "num_warps": 4}),
    2: ({"BP": 256, "BK": 8, "num_warps": 4}, {"BP": 128, "BK": 16, "num_warps": 4}),
    4: ({"BP": 128, "BK": 8, "num_warps": 4}, {"BP": 256, "BK": 4, "num_warps": 4}),
    8: ({"BP": 128, "BK": 4, "num_warps": 4}, {"BP": 128, "BK": 8, "num_warps": 8}),
}
"""By rows, rounded up to a power of two: sums of about 4096 elements."""
TOTAL = {"BP": 64, "BS": 32}

_rows = {count: tuned(rows_kernel, configs, key=("P", "K")) for count, configs in ROWS_CONFIGS.items()}


def rows(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """h·W + b, summed up in float32. Two runs on the same input agree in every bit.

    Args:
        h: [N, K], float32, float16 or bfloat16, contiguous, N ≤ 8.
        weight: [K, P], dtype of `h`, contiguous.
        bias: [P], dtype of `h`, contiguous; None: 0.

    Returns:
        [N, P], dtype of `h`.
    """
    (count, depth), columns, device = h.shape, weight.shape[1], h.device
    y = torch.empty(count, columns, device=device, dtype=h.dtype)
    if y.numel():
        slices, padded = triton.cdiv(depth, SLICE), triton.next_power_of_2(count)
        active = torch.empty(slices * SLICE, device=device, dtype=torch.int32)
        sizes = torch.empty(slices, device=device, dtype=torch.int32)
        sums = torch.empty(slices, count, columns, device=device, dtype=torch.float32)
        if slices:
            active_kernel[(slices,)](h, active, sizes, count, depth, NB=padded, SLICE=SLICE, num_warps=4)
            _rows[padded](
                lambda meta: (triton.cdiv(columns, meta["BP"]), slices),
                h_ptr=h, w_ptr=weight, list_ptr=active, count_ptr=sizes, sum_ptr=sums, N=count, P=columns, K=depth,
                NB=padded, SLICE=SLICE,
            )  # fmt: skip
        total_kernel[(triton.cdiv(columns, TOTAL["BP"]), count)](
            sums, y if bias is None else bias, y, count, columns, slices, BIAS=bias is not None, **TOTAL, num_warps=4
        )
    return y
