"""Tversky similarity to constant prototypes on a GPU, from the measures on: a = x·Ωᵀ [N, K] and b = Ω·Πᵀ [K, P].

Both are float32, so that presence 1[a > t] is decided in float32 whatever the products below run in. b is stored with
the prototypes of one feature next to each other. Two kernels, chosen by the number of rows:

:func:`rows` (N ≤ 8) is bound by memory. A feature that is absent in all rows of a adds nothing to any term, so only the
    rows of b for the others are read. Roofline: 80 % of the copy bandwidth over those bytes.
:func:`tiled` is bound by arithmetic. It reads a tile of b once and makes b⁺ and 1ᵇ from it in registers, for up to
    three products at a time. Roofline: with bfloat16 products 70 % of the rate of cuBLAS at as many multiplications.

Terms with a minimum inside are no products of matrices: :func:`tiled` takes them from ``_semiring.py``; :func:`rows`,
which has arithmetic to spare, computes them itself. What the terms are, and what becomes of them: ``_tversky.py``.

This module imports triton: import it inside a launcher.
"""

# mypy: disable-error-code="no-untyped-def"
# (What a kernel takes has no Python types.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._semiring import combine, present, semiring
from ._triton import interpreted, tuned
from ._tversky import Combination

MAX_ROWS = 8
"""From here on the features that are present in any row are so many that nothing is saved by leaving out the others."""

PRODUCTS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
"""What measures are rounded to before they are multiplied; the interpreter then widens them again, since it multiplies
the bit patterns of bfloat16."""


@triton.jit
def softmin(a, b):
    return tl.minimum(a, b) - tl.log(1.0 + tl.exp(-tl.abs(a - b)))


@triton.jit
def score(
    product, common_a, common_b, minimum, soft, total_a, total_b, theta, alpha, beta,
    MODEL: tl.constexpr, INTERSECTION: tl.constexpr, DIFFERENCE: tl.constexpr, SEMANTICS: tl.constexpr,
):  # fmt: skip
    """From the terms to the similarity; terms that the combination does not have may hold anything."""
    if INTERSECTION == "product" or (INTERSECTION == "gmean" and SEMANTICS != "aggregate"):
        common = product
    elif INTERSECTION == "mean":
        common = (common_a + common_b) * 0.5
    elif SEMANTICS == "aggregate":
        if INTERSECTION == "min":
            common = tl.minimum(common_a, common_b)
        elif INTERSECTION == "max":
            common = tl.maximum(common_a, common_b)
        elif INTERSECTION == "gmean":
            common = tl.sqrt(common_a) * tl.sqrt(common_b)
        else:
            common = softmin(common_a, common_b)
    elif INTERSECTION == "min":
        common = minimum
    elif INTERSECTION == "max":
        common = common_a + common_b - minimum
    else:
        common = soft
    if DIFFERENCE == "ignorematch":
        only_a, only_b = total_a - common_a, total_b - common_b
    elif SEMANTICS == "aggregate":
        only_a = total_a - common_a + tl.maximum(common_a - common_b, 0.0)
        only_b = total_b - common_b + tl.maximum(common_b - common_a, 0.0)
    elif SEMANTICS == "per_feature":
        only_a, only_b = common_a - minimum, common_b - minimum
    else:
        only_a, only_b = total_a - minimum, total_b - minimum
    if MODEL == "contrast":
        return theta * common - alpha * only_a - beta * only_b
    return common / (common + alpha * only_a + beta * only_b + 1.0)


@triton.jit
def tiled_kernel(
    a_ptr, b_ptr, minimum_ptr, soft_ptr, theta_ptr, alpha_ptr, beta_ptr, s_ptr, threshold, N, P, K,
    stride_an, stride_ak, stride_bk,
    MODEL: tl.constexpr, INTERSECTION: tl.constexpr, DIFFERENCE: tl.constexpr, SEMANTICS: tl.constexpr,
    PRODUCT: tl.constexpr, ROOTS: tl.constexpr, COMMON: tl.constexpr, MINIMUM: tl.constexpr, SOFT: tl.constexpr,
    DTYPE: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    p = (tl.program_id(1) * BP + tl.arange(0, BP)).to(tl.int64)
    k = tl.arange(0, BK)
    zeros = tl.zeros((BN, BP), tl.float32)
    product, common_a, common_b, minimum, soft = zeros, zeros, zeros, zeros, zeros
    total_a, total_b = tl.zeros((BN,), tl.float32), tl.zeros((BP,), tl.float32)
    for start in range(0, K, BK):
        row, column = (start + k)[:, None].to(tl.int64), (start + k)[None, :].to(tl.int64)
        a = tl.load(
            a_ptr + n[:, None] * stride_an + column * stride_ak, mask=(n[:, None] < N) & (column < K), other=0.0
        )
        b = tl.load(b_ptr + row * stride_bk + p[None, :], mask=(row < K) & (p[None, :] < P), other=0.0)
        has_a, has_b = (a > threshold).to(tl.float32).to(FACTOR), (b > threshold).to(tl.float32).to(FACTOR)
        a, b = present(a, threshold), present(b, threshold)
        if ROOTS:
            root_a, root_b = tl.sqrt(a).to(DTYPE).to(FACTOR), tl.sqrt(b).to(DTYPE).to(FACTOR)
            product = tl.dot(root_a, root_b, product, input_precision=PRECISION)
        a, b = a.to(DTYPE).to(FACTOR), b.to(DTYPE).to(FACTOR)
        if PRODUCT:
            product = tl.dot(a, b, product, input_precision=PRECISION)
        if COMMON:
            common_a = tl.dot(a, has_b, common_a, input_precision=PRECISION)
            common_b = tl.dot(has_a, b, common_b, input_precision=PRECISION)
        # Of the rounded measures: what both have is subtracted from these, and must not exceed them.
        total_a += tl.sum(a.to(tl.float32), 1)
        total_b += tl.sum(b.to(tl.float32), 0)
    at, mask = n[:, None] * P + p[None, :], (n[:, None] < N) & (p[None, :] < P)
    if MINIMUM:
        minimum = tl.load(minimum_ptr + at, mask=mask, other=0.0)
    if SOFT:
        soft = tl.load(soft_ptr + at, mask=mask, other=0.0)
    theta, alpha, beta = tl.load(theta_ptr), tl.load(alpha_ptr), tl.load(beta_ptr)
    s = score(
        product, common_a, common_b, minimum, soft, total_a[:, None], total_b[None, :], theta, alpha, beta,
        MODEL, INTERSECTION, DIFFERENCE, SEMANTICS,
    )  # fmt: skip
    tl.store(s_ptr + at, s.to(s_ptr.dtype.element_ty), mask=mask)


@triton.jit
def active_kernel(a_ptr, list_ptr, count_ptr, threshold, N, K, stride_an, NB: tl.constexpr, BLOCK: tl.constexpr):
    """The features that are present in any row, in ascending order, and how many they are; one program."""
    n, block = tl.arange(0, NB), tl.arange(0, BLOCK)
    count = 0
    for start in range(0, K, BLOCK):
        k = start + block
        a = tl.load(a_ptr + n[:, None] * stride_an + k[None, :], mask=(n[:, None] < N) & (k[None, :] < K), other=0.0)
        # Not "above": a NaN is to be read, and to show.
        active = tl.max(((a > threshold) | (a != a)).to(tl.int32), 0) * (k < K).to(tl.int32)
        tl.store(list_ptr + count + tl.cumsum(active, 0) - active, k, mask=active != 0)
        count += tl.sum(active, 0)
    tl.store(count_ptr, count)


@triton.jit
def rows_kernel(
    a_ptr, b_ptr, total_ptr, list_ptr, count_ptr, theta_ptr, alpha_ptr, beta_ptr, s_ptr, threshold, N, P,
    stride_an, stride_bk,
    MODEL: tl.constexpr, INTERSECTION: tl.constexpr, DIFFERENCE: tl.constexpr, SEMANTICS: tl.constexpr,
    PRODUCT: tl.constexpr, ROOTS: tl.constexpr, COMMON: tl.constexpr, MINIMUM: tl.constexpr, SOFT: tl.constexpr,
    NB: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    n, slot = tl.arange(0, NB), tl.arange(0, BK)
    p = (tl.program_id(0) * BP + tl.arange(0, BP)).to(tl.int64)
    # One sum per slot of the block, added up at the end: nothing crosses threads inside the loop.
    zeros = tl.zeros((NB, BK, BP), tl.float32)
    product, common_a, common_b, minimum, soft = zeros, zeros, zeros, zeros, zeros
    total_a = tl.zeros((NB, BK), tl.float32)
    count = tl.load(count_ptr)
    for start in range(0, count, BK):
        on = start + slot < count
        k = tl.load(list_ptr + start + slot, mask=on, other=0)
        a = tl.load(a_ptr + n[:, None] * stride_an + k[None, :], mask=(n[:, None] < N) & on[None, :], other=0.0)
        b = tl.load(
            b_ptr + k[:, None].to(tl.int64) * stride_bk + p[None, :], mask=on[:, None] & (p[None, :] < P), other=0.0
        )
        has_a, has_b = (a > threshold).to(tl.float32)[:, :, None], (b > threshold).to(tl.float32)[None, :, :]
        a, b = present(a, threshold), present(b, threshold)
        total_a += a
        if ROOTS:
            product += tl.sqrt(a)[:, :, None] * tl.sqrt(b)[None, :, :]
        a, b = a[:, :, None], b[None, :, :]
        if PRODUCT:
            product += a * b
        if COMMON:
            common_a += a * has_b
            common_b += has_a * b
        if MINIMUM:
            minimum += combine(a, b, "min")
        if SOFT:
            soft += combine(a, b, "softmin")
    total_b = tl.load(total_ptr + p, mask=p < P, other=0.0)
    theta, alpha, beta = tl.load(theta_ptr), tl.load(alpha_ptr), tl.load(beta_ptr)
    s = score(
        tl.sum(product, 1), tl.sum(common_a, 1), tl.sum(common_b, 1), tl.sum(minimum, 1), tl.sum(soft, 1),
        tl.sum(total_a, 1)[:, None], total_b[None, :], theta, alpha, beta,
        MODEL, INTERSECTION, DIFFERENCE, SEMANTICS,
    )  # fmt: skip
    mask = (n[:, None] < N) & (p[None, :] < P)
    tl.store(s_ptr + n[:, None] * P + p[None, :], s.to(s_ptr.dtype.element_ty), mask=mask)


HALF_CONFIGS = (
    {"BN": 64, "BP": 64, "BK": 32, "num_warps": 4, "num_stages": 3},
    {"BN": 128, "BP": 64, "BK": 32, "num_warps": 8, "num_stages": 3},
    {"BN": 16, "BP": 64, "BK": 64, "num_warps": 4, "num_stages": 3},
)
# Without tensor cores the factors of a product stay in registers, too: a tile of 64 x 64 x 32 spills 6 KB per thread.
SINGLE_CONFIGS = (
    {"BN": 32, "BP": 64, "BK": 16, "num_warps": 4, "num_stages": 3},
    {"BN": 32, "BP": 32, "BK": 16, "num_warps": 4, "num_stages": 3},
)
ROWS_CONFIGS = {
    1: ({"BP": 128, "BK": 16, "num_warps": 4}, {"BP": 256, "BK": 8, "num_warps": 4}),
    2: ({"BP": 128, "BK": 8, "num_warps": 4}, {"BP": 256, "BK": 4, "num_warps": 4}),
    4: ({"BP": 128, "BK": 4, "num_warps": 4}, {"BP": 256, "BK": 2, "num_warps": 4}),
    8: ({"BP": 128, "BK": 2, "num_warps": 4}, {"BP": 64, "BK": 4, "num_warps": 4}),
}
"""By rows, rounded up to a power of two: sums of about 2048 elements per term."""

_HOW = ("MODEL", "INTERSECTION", "DIFFERENCE", "SEMANTICS")
_tiled_half = tuned(tiled_kernel, HALF_CONFIGS, key=("P", "K", "DTYPE", *_HOW))
_tiled_single = tuned(tiled_kernel, SINGLE_CONFIGS, key=("P", "K", "PRECISION", *_HOW))
_rows = {count: tuned(rows_kernel, configs, key=("P", *_HOW)) for count, configs in ROWS_CONFIGS.items()}


def flags(how: Combination) -> dict[str, object]:
    """The constants of both kernels: what the combination is, and which terms it has.

    Raises:
        ValueError: a negative threshold, above which the zeros that stand for absent features would be present.
    """
    if how.threshold < 0:
        raise ValueError(f"tversky: threshold {how.threshold} is below 0, which the Triton kernels do not serve")
    return {
        "MODEL": how.model, "INTERSECTION": how.intersection, "DIFFERENCE": how.difference,
        "SEMANTICS": how.semantics,
        "PRODUCT": "product" in how.terms, "ROOTS": "gmean" in how.terms, "COMMON": "common_a" in how.terms,
        "MINIMUM": "min" in how.terms, "SOFT": "softmin" in how.terms,
    }  # fmt: skip


def tiled(
    a: Tensor,
    b: Tensor,
    theta: Tensor,
    alpha: Tensor,
    beta: Tensor,
    how: Combination,
    *,
    dtype: torch.dtype,
    precision: str = "ieee",
) -> Tensor:
    """Similarities of many objects.

    Args:
        a: measures of the objects [N, K], float32, any strides.
        b: measures of the prototypes [K, P], float32, contiguous.
        theta: 0-d float32, like `alpha` and `beta`.
        alpha: see `theta`.
        beta: see `theta`.
        how: the combination; its threshold is 0 or more.
        dtype: of the result; half types multiply measures rounded to them on tensor cores, and add up in float32.
        precision: of float32 products: "ieee", or "tf32" or "tf32x3" for tensor cores.

    Returns:
        [N, P], `dtype`.

    Raises:
        ValueError: a negative threshold.
    """
    (rows, depth), columns = a.shape, b.shape[1]
    s = torch.empty(rows, columns, device=a.device, dtype=dtype)
    constants = flags(how)
    if s.numel():
        minimum = semiring(a.T.contiguous(), b, "min", "sum", how.threshold) if constants["MINIMUM"] else s
        soft = semiring(a.T.contiguous(), b, "softmin", "sum", how.threshold) if constants["SOFT"] else s
        launch = _tiled_single if dtype == torch.float32 else _tiled_half
        launch(
            lambda meta: (triton.cdiv(rows, meta["BN"]), triton.cdiv(columns, meta["BP"])),
            size=rows,
            a_ptr=a, b_ptr=b, minimum_ptr=minimum, soft_ptr=soft, theta_ptr=theta, alpha_ptr=alpha, beta_ptr=beta,
            s_ptr=s, threshold=how.threshold, N=rows, P=columns, K=depth,
            stride_an=a.stride(0), stride_ak=a.stride(1), stride_bk=b.stride(0),
            DTYPE=PRODUCTS[dtype], FACTOR=tl.float32 if interpreted(tiled_kernel) else PRODUCTS[dtype],
            PRECISION=precision, **constants,
        )  # fmt: skip
    return s


def rows(
    a: Tensor,
    b: Tensor,
    total_b: Tensor,
    theta: Tensor,
    alpha: Tensor,
    beta: Tensor,
    how: Combination,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Similarities of at most 8 objects. Two runs on the same input agree in every bit.

    Args:
        a: measures of the objects [N, K], float32, contiguous, N ≤ 8.
        b: measures of the prototypes [K, P], float32, contiguous.
        total_b: the sum of each prototype's measures above the threshold [P], float32.
        theta: 0-d float32, like `alpha` and `beta`.
        alpha: see `theta`.
        beta: see `theta`.
        how: the combination; its threshold is 0 or more.
        dtype: of the result.

    Returns:
        [N, P], `dtype`.

    Raises:
        ValueError: a negative threshold.
    """
    (count, depth), columns = a.shape, b.shape[1]
    s, constants = torch.empty(count, columns, device=a.device, dtype=dtype), flags(how)
    if s.numel():
        padded = triton.next_power_of_2(count)
        active = torch.empty(depth, device=a.device, dtype=torch.int32)
        size = torch.empty((), device=a.device, dtype=torch.int32)
        active_kernel[(1,)](
            a, active, size, how.threshold, count, depth, a.stride(0), NB=padded, BLOCK=1024, num_warps=4
        )
        _rows[padded](
            lambda meta: (triton.cdiv(columns, meta["BP"]),),
            a_ptr=a, b_ptr=b, total_ptr=total_b, list_ptr=active, count_ptr=size,
            theta_ptr=theta, alpha_ptr=alpha, beta_ptr=beta, s_ptr=s, threshold=how.threshold, N=count, P=columns,
            stride_an=a.stride(0), stride_bk=b.stride(0), NB=padded, **constants,
        )  # fmt: skip
    return s
