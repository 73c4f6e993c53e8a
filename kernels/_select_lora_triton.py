"""x[i]·A[k]ᵀ·B[k] with k = ids[i] on a GPU: two kernels, no wait for the host, no atomics.

:func:`shrink_kernel` makes x·Aᵀ: a program has some tokens of one row, and adds up over the inputs in one order.
:func:`expand_kernel` makes y of that: a program has some tokens of one row, and some outputs; it adds up the slices.

Rows are taken by ascending id, so that programs that run together read the same adapter, from the L2 cache all but the
first of them. With few tokens per row (decoding) the products are sums in registers; with many they are tensor cores'.

Roofline, to reach on an H100 and not measured yet: it is bound by memory. The bytes are x once, y once, the A and B of
every adapter that the batch names once, and x·Aᵀ (r / in of x) twice in float32. Decoding, 64 rows of 64 different
adapters of rank 16 at in = out = 4096 in bfloat16: 16 MiB of adapters and 1 MiB of x and y, 9 µs at 60 % of 3.35 TB/s,
which the frozen layer (32 MiB of weight) has to take 17 µs for. With 128 tokens per row x and y are 128 MiB: 67 µs.

Compiled for cuda:90 nothing spills in half precision. float32 with a rank of 64 spills 400 bytes per thread.

This module imports triton: import it inside a launcher.
"""

# mypy: disable-error-code="no-untyped-def"
# (What a kernel takes has no Python types.)

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import interpreted, tuned


@triton.jit
def shrink_kernel(
    x_ptr, a_ptr, ids_ptr, order_ptr, h_ptr, n, L, R, K,
    DOT: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr, SLICE: tl.constexpr,
    BL: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row = tl.load(order_ptr + tl.program_id(0)).to(tl.int64)
    id, slice = tl.load(ids_ptr + row).to(tl.int64), tl.program_id(2)
    t, r, k = tl.program_id(1) * BL + tl.arange(0, BL), tl.arange(0, BR), slice * SLICE + tl.arange(0, BK)
    x_ptrs = x_ptr + (row * L + t)[:, None] * K + k[None, :]
    a_ptrs = a_ptr + (id * R + r)[:, None] * K + k[None, :]
    acc = tl.zeros((BL, BR), tl.float32)
    # One sum per place in the block, added up at the end: nothing crosses threads inside the loop.
    sums = tl.zeros((BR, BK), tl.float32)
    for start in range(0, SLICE, BK):
        inside = k[None, :] < K - start
        a = tl.load(a_ptrs, mask=inside & (r[:, None] < R), other=0.0)
        x = tl.load(x_ptrs, mask=inside & (t[:, None] < L), other=0.0)
        if DOT:
            acc = tl.dot(x.to(FACTOR), tl.trans(a.to(FACTOR)), acc, input_precision=PRECISION)
        else:
            sums += a.to(tl.float32) * x.to(tl.float32)
        x_ptrs += BK
        a_ptrs += BK
    if not DOT:
        acc = tl.sum(sums, 1)[None, :]
    at = ((slice * n + row) * L + t)[:, None] * R + r[None, :]
    tl.store(h_ptr + at, acc, mask=(t[:, None] < L) & (r[None, :] < R))


@triton.jit
def expand_kernel(
    h_ptr, b_ptr, ids_ptr, order_ptr, y_ptr, n, L, R, P, slices,
    DOT: tl.constexpr, PRECISION: tl.constexpr, BL: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    row = tl.load(order_ptr + tl.program_id(0)).to(tl.int64)
    id = tl.load(ids_ptr + row).to(tl.int64)
    t, r, p = tl.program_id(1) * BL + tl.arange(0, BL), tl.arange(0, BR), tl.program_id(2) * BP + tl.arange(0, BP)
    h = tl.zeros((BL, BR), tl.float32)
    for slice in range(slices):  # in one order, whichever program was done first
        at = ((slice * n + row) * L + t)[:, None] * R + r[None, :]
        h += tl.load(h_ptr + at, mask=(t[:, None] < L) & (r[None, :] < R), other=0.0)
    inside = (r[:, None] < R) & (p[None, :] < P)
    b = tl.load(b_ptr + (id * R + r)[:, None] * P + p[None, :], mask=inside, other=0.0).to(tl.float32)
    if DOT:
        y = tl.dot(h, b, input_precision=PRECISION)
    else:
        y = tl.sum(tl.trans(h) * b, 0)[None, :]
    at = (row * L + t)[:, None] * P + p[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(t[:, None] < L) & (p[None, :] < P))


SLICE = 1024
"""Inputs of one program without tensor cores: 64 rows of 4096 inputs make 256 programs."""
TOKENS = 64
"""Of one program with tensor cores."""
BLOCK = 4096
"""Elements of A, or of B, in the registers of a program without tensor cores."""
SHRINK = {"BK": 64, "num_warps": 4, "num_stages": 4}
EXPAND = {"BP": 64, "num_warps": 4}
"""With tensor cores. One config each until there is a GPU to choose on."""


@functools.cache
def _launchers(dot: bool, padded: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """Of both kernels, for a rank that was rounded up to `padded`."""
    wide = BLOCK // padded
    shrink = SHRINK if dot else {"BK": min(wide, SLICE), "num_warps": 4}
    expand = EXPAND if dot else {"BP": min(wide, 512), "num_warps": 4}
    return tuned(shrink_kernel, [shrink], key=("R", "K")), tuned(expand_kernel, [expand], key=("R", "P"))


def _factor(dtype: torch.dtype) -> tl.dtype:
    # The interpreter's products of bfloat16 are wrong.
    known = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return tl.float32 if interpreted(shrink_kernel) else known[dtype]


FEW_TOKENS = 4
"""Up to so many per row a tensor core's 16 would be mostly empty."""


def grouped(x: Tensor, a: Tensor, b: Tensor, ids: Tensor) -> Tensor:
    """x[i]·A[k]ᵀ·B[k], k = ids[i], summed up in float32. Two runs on the same input agree in every bit.

    Args:
        x: [n, L, in], float32, float16 or bfloat16, contiguous.
        a: [K, r, in], dtype of `x`, contiguous.
        b: [K, r, out], dtype of `x`, contiguous.
        ids: integers [n] from 0 to K − 1; they are not checked.

    Returns:
        [n, L, out], dtype of `x`.
    """
    (count, length, depth), (_, rank, columns) = x.shape, b.shape
    y = torch.empty(count, length, columns, device=x.device, dtype=x.dtype)
    if not y.numel():
        return y
    order, dot = torch.argsort(ids, stable=True), length > FEW_TOKENS
    padded = max(triton.next_power_of_2(rank), 16 if dot else 1)
    part = triton.next_power_of_2(depth) if dot else SLICE
    slices, tokens = triton.cdiv(depth, part), TOKENS if dot else 1
    h = torch.empty(slices, count, length, rank, device=x.device, dtype=torch.float32)
    how = {"DOT": dot, "BL": tokens, "BR": padded, "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32"}
    how |= {"ids_ptr": ids, "order_ptr": order, "n": count, "L": length, "R": rank}
    blocks, (shrink, expand) = triton.cdiv(length, tokens), _launchers(dot, padded)
    shrink(
        lambda meta: (count, blocks, slices),
        size=count * length, x_ptr=x, a_ptr=a, h_ptr=h, K=depth, SLICE=part, FACTOR=_factor(x.dtype), **how,
    )  # fmt: skip
    expand(
        lambda meta: (count, blocks, triton.cdiv(columns, meta["BP"])),
        size=count * length, h_ptr=h, b_ptr=b, y_ptr=y, P=columns, slices=slices, **how,
    )  # fmt: skip
    return y
