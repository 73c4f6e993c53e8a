"""Tversky similarity of codes on a GPU: a [N, K] of objects, b [K, P] of prototypes; see ``tversky_integer.py``.

:func:`tiled_kernel` reads a tile of both once and makes up to three products of it on tensor cores. These take int8: a
    code is its distance from 128 there, and what that leaves out is made good at the end by sums of codes and counts of
    present features. A code past the end is 0, an absent feature. All sums are int32, which ``problem`` has seen is
    enough; what wraps on the way wraps back. Roofline: of many rows 70 % of the rate of ``torch._int_mm`` at as many
    multiplications; for 16 rows or less 70 % of the copy bandwidth over b. On cuda:80 a tile of three sums spills up to
    104 bytes per thread.
:func:`minima_kernel` sums minima, which are no products, for as many features at a time as a tile has slots: few rows
    wait for memory, and need many loads at once. Its sums are float32, exact up to ``MAX_MINIMA`` features, where
    adding is twice as fast as with integers. Roofline: 60 % of the float32 ALU limit at N, P ≥ 1024.

Not measured yet.

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
from ._tversky import Combination
from ._tversky_triton import softmin

MAX_ROWS = 8
"""Up to here minima are summed for many features at a time."""


@triton.jit
def intersection(
    product, common_a, common_b, minimum, step, INTERSECTION: tl.constexpr, SEMANTICS: tl.constexpr
):  # fmt: skip
    """f(A∩B), from sums in steps."""
    if INTERSECTION == "product":
        return product.to(tl.float32) * (step * step)
    elif INTERSECTION == "mean":
        return (common_a + common_b).to(tl.float32) * (step * 0.5)
    elif INTERSECTION == "gmean":
        return tl.sqrt(common_a.to(tl.float32) * step) * tl.sqrt(common_b.to(tl.float32) * step)
    elif INTERSECTION == "softmin":
        return softmin(common_a.to(tl.float32) * step, common_b.to(tl.float32) * step)
    elif SEMANTICS == "aggregate":
        found = tl.minimum(common_a, common_b) if INTERSECTION == "min" else tl.maximum(common_a, common_b)
        return found.to(tl.float32) * step
    elif INTERSECTION == "min":
        return minimum.to(tl.float32) * step
    else:
        return (common_a + common_b - minimum).to(tl.float32) * step


@triton.jit
def differences(
    common_a, common_b, minimum, total_a, total_b, DIFFERENCE: tl.constexpr, SEMANTICS: tl.constexpr
):  # fmt: skip
    """f(A−B) and f(B−A), in steps."""
    if DIFFERENCE == "ignorematch":
        only_a, only_b = total_a - common_a, total_b - common_b
    elif SEMANTICS == "aggregate":
        only_a = total_a - common_a + tl.maximum(common_a - common_b, 0)
        only_b = total_b - common_b + tl.maximum(common_b - common_a, 0)
    elif SEMANTICS == "per_feature":
        only_a, only_b = common_a - minimum, common_b - minimum
    else:
        only_a, only_b = total_a - minimum, total_b - minimum
    return only_a, only_b


@triton.jit
def tiled_kernel(
    a_ptr, b_ptr, total_ptr, minimum_ptr, step_ptr, theta_ptr, alpha_ptr, beta_ptr, s_ptr, N, P, K,
    MODEL: tl.constexpr, INTERSECTION: tl.constexpr, DIFFERENCE: tl.constexpr, SEMANTICS: tl.constexpr,
    PRODUCT: tl.constexpr, COMMON: tl.constexpr, MINIMUM: tl.constexpr, EVEN: tl.constexpr,
    BN: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, column = place(N, P, BN, BP, GROUP)
    n, p, k = row * BN + tl.arange(0, BN), column * BP + tl.arange(0, BP), tl.arange(0, BK)
    # Rows and columns past the end are read from the start again: nothing of them is stored.
    a_ptrs = a_ptr + (n % N).to(tl.int64)[:, None] * K + k[None, :]
    b_ptrs = b_ptr + k.to(tl.int64)[:, None] * P + (p % P)[None, :]
    zeros = tl.zeros((BN, BP), tl.int32)
    product, common_a, common_b, minimum = zeros, zeros, zeros, zeros
    total_a, count_a, count_b = tl.zeros((BN,), tl.int32), tl.zeros((BN,), tl.int32), tl.zeros((BP,), tl.int32)
    for start in range(0, K, BK):
        if EVEN:
            a = tl.load(a_ptrs)
        else:
            a = tl.load(a_ptrs, mask=k[None, :] < K - start, other=0)
        total_a += tl.sum(a.to(tl.int32), 1)
        if PRODUCT or COMMON:
            if EVEN:
                b = tl.load(b_ptrs)
            else:
                b = tl.load(b_ptrs, mask=k[:, None] < K - start, other=0)
            less_a, less_b = (a ^ 128).to(tl.int8, bitcast=True), (b ^ 128).to(tl.int8, bitcast=True)
            if PRODUCT:
                product = tl.dot(less_a, less_b, product, out_dtype=tl.int32)
            if COMMON:
                has_a, has_b = (a != 0).to(tl.int8), (b != 0).to(tl.int8)
                common_a = tl.dot(less_a, has_b, common_a, out_dtype=tl.int32)
                common_b = tl.dot(has_a, less_b, common_b, out_dtype=tl.int32)
                count_a += tl.sum(has_a.to(tl.int32), 1)
                count_b += tl.sum(has_b.to(tl.int32), 0)
        a_ptrs += BK
        b_ptrs += BK * P
    at, mask = n[:, None].to(tl.int64) * P + p[None, :], (n[:, None] < N) & (p[None, :] < P)
    total_a, total_b = total_a[:, None], tl.load(total_ptr + p, mask=p < P, other=0)[None, :]
    if MINIMUM:
        minimum = tl.load(minimum_ptr + at, mask=mask, other=0.0).to(tl.int32)
    if PRODUCT:
        # What was multiplied were BK features at a time, those past the end among them.
        product += 128 * (total_a + total_b) - 128 * 128 * BK * tl.cdiv(K, BK)
    if COMMON:
        common_a += 128 * count_b[None, :]
        common_b += 128 * count_a[:, None]
    step, theta, alpha, beta = tl.load(step_ptr), tl.load(theta_ptr), tl.load(alpha_ptr), tl.load(beta_ptr)
    common = intersection(product, common_a, common_b, minimum, step, INTERSECTION, SEMANTICS)
    only_a, only_b = differences(common_a, common_b, minimum, total_a, total_b, DIFFERENCE, SEMANTICS)
    only_a, only_b = only_a.to(tl.float32) * step, only_b.to(tl.float32) * step
    if MODEL == "contrast":
        s = theta * common - alpha * only_a - beta * only_b
    else:
        s = common / (common + alpha * only_a + beta * only_b + 1.0)
    tl.store(s_ptr + at, s.to(s_ptr.dtype.element_ty), mask=mask)


@triton.jit
def minima_kernel(a_ptr, b_ptr, c_ptr, N, P, K, BN: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr):
    n, p, k = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BP + tl.arange(0, BP), tl.arange(0, BK)
    a_ptrs = a_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
    b_ptrs = b_ptr + k.to(tl.int64)[:, None] * P + p[None, :]
    # One sum per slot, added up at the end: nothing crosses threads inside the loop.
    sums = tl.zeros((BN, BK, BP), tl.float32)
    for start in range(0, K, BK):
        on = k < K - start
        a = tl.load(a_ptrs, mask=(n[:, None] < N) & on[None, :], other=0).to(tl.float32)
        b = tl.load(b_ptrs, mask=on[:, None] & (p[None, :] < P), other=0).to(tl.float32)
        sums += tl.minimum(a[:, :, None], b[None, :, :])
        a_ptrs += BK
        b_ptrs += BK * P
    at = n[:, None].to(tl.int64) * P + p[None, :]
    tl.store(c_ptr + at, tl.sum(sums, 1), mask=(n[:, None] < N) & (p[None, :] < P))


def _config(rows: int, columns: int, depth: int, warps: int, stages: int) -> dict[str, int]:
    return {"BN": rows, "BP": columns, "BK": depth, "GROUP": 8, "num_warps": warps, "num_stages": stages}


CONFIGS = (
    _config(64, 64, 64, 4, 3),
    _config(128, 64, 64, 8, 3),
    _config(64, 128, 64, 8, 3),
    _config(16, 64, 128, 4, 4),
    _config(16, 128, 64, 4, 4),
)
DEPTH = 128
"""A multiple of every BK above: what it divides needs no mask along K."""
MINIMA_CONFIGS = (
    {"BN": 64, "BP": 64, "BK": 1, "num_warps": 4},
    {"BN": 64, "BP": 128, "BK": 1, "num_warps": 8},
    {"BN": 32, "BP": 64, "BK": 1, "num_warps": 4},
)
ROWS_CONFIGS = {
    1: ({"BP": 256, "BK": 16, "num_warps": 4}, {"BP": 128, "BK": 32, "num_warps": 4}),
    2: ({"BP": 256, "BK": 8, "num_warps": 4}, {"BP": 128, "BK": 16, "num_warps": 4}),
    4: ({"BP": 256, "BK": 4, "num_warps": 4}, {"BP": 128, "BK": 8, "num_warps": 4}),
    8: ({"BP": 256, "BK": 2, "num_warps": 4}, {"BP": 128, "BK": 4, "num_warps": 4}),
}
"""By rows, rounded up to a power of two: sums of 4096 elements."""

_HOW = ("MODEL", "INTERSECTION", "DIFFERENCE", "SEMANTICS")
_tiled = tuned(tiled_kernel, CONFIGS, key=("P", "K", *_HOW))
_minima = tuned(minima_kernel, MINIMA_CONFIGS, key=("P", "K"))
_rows = {
    count: tuned(minima_kernel, [{"BN": count, **config} for config in configs], key=("P", "K"))
    for count, configs in ROWS_CONFIGS.items()
}


def flags(how: Combination) -> dict[str, object]:
    """The constants of :func:`tiled_kernel`: what the combination is, and which sums it has."""
    return {
        "MODEL": how.model, "INTERSECTION": how.intersection, "DIFFERENCE": how.difference,
        "SEMANTICS": how.semantics,
        "PRODUCT": "product" in how.terms, "COMMON": "common_a" in how.terms, "MINIMUM": "min" in how.terms,
    }  # fmt: skip


def minima(a: Tensor, b: Tensor) -> Tensor:
    """Σ_k min(a, b), float32 [N, P]; arguments as of :func:`tiled`."""
    (rows, depth), columns = a.shape, b.shape[1]
    c = torch.empty(rows, columns, device=a.device, dtype=torch.float32)
    launch = _rows[triton.next_power_of_2(rows)] if rows <= MAX_ROWS else _minima
    launch(
        lambda meta: (triton.cdiv(rows, meta["BN"]), triton.cdiv(columns, meta["BP"])),
        size=rows, a_ptr=a, b_ptr=b, c_ptr=c, N=rows, P=columns, K=depth,
    )  # fmt: skip
    return c


def tiled(
    a: Tensor, b: Tensor, totals: Tensor, step: Tensor, theta: Tensor, alpha: Tensor, beta: Tensor,
    how: Combination, *, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Similarities. Two runs on the same input agree in every bit.

    Args:
        a: codes of the objects [N, K], uint8, contiguous.
        b: codes of the prototypes [K, P], uint8, contiguous.
        totals: Σ_k of these, int32 [P], contiguous.
        step: 0-d float32, like `theta`, `alpha` and `beta`.
        theta: see `step`.
        alpha: see `step`.
        beta: see `step`.
        how: the combination.
        dtype: of the result.

    Returns:
        [N, P], `dtype`.
    """
    (rows, depth), columns = a.shape, b.shape[1]
    s, constants = torch.empty(rows, columns, device=a.device, dtype=dtype), flags(how)
    if s.numel():
        _tiled(
            lambda meta: (triton.cdiv(rows, meta["BN"]) * triton.cdiv(columns, meta["BP"]),),
            size=rows, a_ptr=a, b_ptr=b, total_ptr=totals, minimum_ptr=minima(a, b) if constants["MINIMUM"] else s,
            step_ptr=step, theta_ptr=theta, alpha_ptr=alpha, beta_ptr=beta, s_ptr=s, N=rows, P=columns, K=depth,
            EVEN=depth % DEPTH == 0, **constants,
        )  # fmt: skip
    return s
