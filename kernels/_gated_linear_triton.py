"""A matrix product with an activation, a hard gate and an up projection as its epilogue, in one kernel on a GPU.

The product is tiled and grouped so that programs which run together share rows of x and W in the L2 cache; it adds up
in float32, and what follows stays in float32 registers until the one rounding at the end.

A normalization in front is linear but for its statistics, and so moves behind the product:

    act(rstd·(x·Wᵀ − μ·Σ_k W) + b)

μ, rstd and Σ_k W are made of the tiles that the product reads anyway. σ² is summed about the row's first element: as
E[x²] − μ² it would cancel where a row is far from 0. x·Wᵀ − μ·Σ_k W cancels still, by |μ|/σ of float32's rounding. The
sums need tiles in registers that else stay in shared memory, so fewer of them are in flight.

Roofline: arithmetic, but for few rows. To reach on an H100 in bfloat16 at M, N, K ≥ 4096 without a normalization:
within 5 % of the same kernel without an epilogue, and that one within 10 % of cuBLAS; for 16 rows or less 80 % of the
copy bandwidth over W and U. Not measured yet. Compiled for cuda:90 the largest tiles spill nothing without an
epilogue, and up to 400 bytes per thread with one: the loop itself does not spill.

This module imports triton: import it inside a launcher.
"""

# mypy: disable-error-code="no-untyped-def"
# (What a kernel takes has no Python types.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import interpreted, tuned


@triton.jit
def activate(h, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.where(h < 0.0, 0.0, h)  # a maximum would drop NaN
    elif ACTIVATION == "gelu":
        return 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh u) / 2 = σ(2u)
        return h * tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    elif ACTIVATION == "silu":
        return h * tl.sigmoid(h)
    else:
        return h


@triton.jit
def place(M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """The tile of this program: column by column within GROUP rows of tiles, for the L2 cache's sake."""
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    program = tl.program_id(0)
    first = program // (GROUP * columns) * GROUP
    height = tl.minimum(rows - first, GROUP)
    inside = program % (GROUP * columns)
    return first + inside % height, inside // height


@triton.jit
def finish(acc, mean, rstd, total, bias_ptr, n, N, NORM: tl.constexpr):
    """From the product with x to that with x̂, plus the bias."""
    if NORM == "layer":
        acc -= mean[:, None] * total[None, :]
    if NORM != "none":
        acc *= rstd[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def gated_linear_kernel(
    x_ptr, w_ptr, u_ptr, bias_ptr, threshold_ptr, gain_ptr, up_bias_ptr, y_ptr, eps, M, N, K,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_un, stride_uk,
    ACTIVATION: tl.constexpr, SCORE: tl.constexpr, NORM: tl.constexpr,
    EVEN: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, column = place(M, N, BM, BN, GROUP)
    m, n, k = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN), tl.arange(0, BK)
    # Rows and columns past the end are read from the start again: no mask, and nothing of them is stored.
    from_m, from_n = (m % M).to(tl.int64), (n % N).to(tl.int64)
    x_ptrs = x_ptr + from_m[:, None] * stride_xm + k[None, :] * stride_xk
    w_ptrs = w_ptr + k[:, None] * stride_wk + from_n[None, :] * stride_wn
    acc, mean, rstd = tl.zeros((BM, BN), tl.float32), tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    total, up, up_total = tl.zeros((BN,), tl.float32), acc, tl.zeros((BN,), tl.float32)
    if u_ptr is not None:
        u_ptrs = u_ptr + k[:, None] * stride_uk + from_n[None, :] * stride_un
    if NORM == "layer":
        shift = tl.load(x_ptr + from_m * stride_xm).to(tl.float32)
    for start in range(0, K, BK):
        if EVEN:
            x, w = tl.load(x_ptrs), tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=k[None, :] < K - start, other=0.0)
            w = tl.load(w_ptrs, mask=k[:, None] < K - start, other=0.0)
        acc = tl.dot(x.to(FACTOR), w.to(FACTOR), acc, input_precision=PRECISION)
        if u_ptr is not None:
            if EVEN:
                u = tl.load(u_ptrs)
            else:
                u = tl.load(u_ptrs, mask=k[:, None] < K - start, other=0.0)
            up = tl.dot(x.to(FACTOR), u.to(FACTOR), up, input_precision=PRECISION)
            u_ptrs += BK * stride_uk
            if NORM == "layer":
                up_total += tl.sum(u.to(tl.float32), 0)
        if NORM == "layer":
            total += tl.sum(w.to(tl.float32), 0)
            away = x.to(tl.float32) - shift[:, None]
            if not EVEN:
                away = tl.where(k[None, :] < K - start, away, 0.0)
            mean += tl.sum(away, 1)
            rstd += tl.sum(away * away, 1)
        elif NORM == "rms":
            rstd += tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
        x_ptrs += BK * stride_xk
        w_ptrs += BK * stride_wk
    if NORM == "layer":
        mean /= K
        rstd = tl.rsqrt(tl.maximum(rstd / K - mean * mean, 0.0) + eps)
        mean += shift
    elif NORM == "rms":
        rstd = tl.rsqrt(rstd / K + eps)
    h = activate(finish(acc, mean, rstd, total, bias_ptr, n, N, NORM), ACTIVATION)
    y = h
    if gain_ptr is not None:
        y *= tl.load(gain_ptr + n, mask=n < N, other=0.0)[None, :]
    if threshold_ptr is not None:
        threshold = tl.load(threshold_ptr + n, mask=n < N, other=0.0)
        y = tl.where((tl.abs(h) if SCORE == "abs" else h) > threshold[None, :], y, 0.0)
    if u_ptr is not None:
        y *= finish(up, mean, rstd, up_total, up_bias_ptr, n, N, NORM)
    at = m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


def _config(rows: int, columns: int, depth: int, warps: int, stages: int) -> dict[str, int]:
    return {"BM": rows, "BN": columns, "BK": depth, "GROUP": 8, "num_warps": warps, "num_stages": stages}


HALF_CONFIGS = (
    _config(128, 128, 64, 4, 3),
    _config(128, 128, 64, 8, 3),
    _config(128, 128, 64, 4, 4),
    _config(128, 256, 64, 8, 3),
    _config(128, 256, 64, 8, 4),
    _config(256, 128, 64, 8, 3),
    _config(64, 128, 64, 4, 4),
    _config(64, 64, 64, 4, 4),
    _config(16, 64, 128, 4, 4),
    _config(16, 32, 128, 4, 4),
)
# Two accumulators: tiles of half the size.
HALF_UP_CONFIGS = (
    _config(128, 64, 64, 4, 3),
    _config(128, 64, 64, 4, 4),
    _config(128, 128, 64, 8, 3),
    _config(128, 128, 64, 8, 4),
    _config(64, 64, 64, 4, 4),
    _config(16, 32, 128, 4, 4),
    _config(16, 16, 128, 4, 4),
)
# Without tensor cores the factors of a product stay in registers, too.
SINGLE_CONFIGS = (
    _config(32, 64, 16, 4, 3),
    _config(64, 64, 16, 8, 3),
    _config(32, 32, 16, 4, 3),
    _config(16, 32, 32, 4, 3),
)
TF32_CONFIGS = (
    _config(128, 64, 32, 4, 3),
    _config(128, 128, 32, 8, 3),
    _config(64, 64, 32, 4, 4),
    _config(16, 32, 64, 4, 4),
)
DEPTH = 128
"""A multiple of every BK above: what it divides needs no mask along K."""

_KEY = ("N", "K", "NORM", "EVEN")
_half, _half_up, _single, _tf32, _single_up, _tf32_up = (
    tuned(gated_linear_kernel, configs, key=_KEY)
    for configs in (HALF_CONFIGS, HALF_UP_CONFIGS, SINGLE_CONFIGS, TF32_CONFIGS, SINGLE_CONFIGS, TF32_CONFIGS)
)


def gated_linear(
    x: Tensor,
    weight: Tensor,
    up_weight: Tensor | None,
    bias: Tensor | None,
    threshold: Tensor | None,
    gain: Tensor | None,
    up_bias: Tensor | None,
    *,
    activation: str,
    score: str,
    norm: str,
    eps: float,
    precision: str = "ieee",
) -> Tensor:
    """As ``gated_linear.reference``.

    Args:
        x: [M, K], float32, float16 or bfloat16, any strides, K ≥ 1.
        weight: [N, K], dtype of `x`, any strides; next to each other along K is read fastest.
        up_weight: as `weight`, or None.
        bias: [N], dtype of `x`, contiguous, or None; `up_bias` likewise.
        threshold: [N], float32, contiguous, or None; `gain` likewise.
        gain: see `threshold`.
        up_bias: see `bias`.
        activation: see ``gated_linear.reference``, as for `score`, `norm` and `eps`.
        score: see `activation`.
        norm: see `activation`.
        eps: see `activation`.
        precision: of float32 products: "ieee", or "tf32" for tensor cores.

    Returns:
        [M, N], dtype of `x`.
    """
    (rows, depth), columns = x.shape, weight.shape[0]
    y = torch.empty(rows, columns, device=x.device, dtype=x.dtype)
    if not y.numel():
        return y
    if x.dtype == torch.float32:
        plain, with_up = (_tf32, _tf32_up) if precision == "tf32" else (_single, _single_up)
    else:
        plain, with_up = _half, _half_up
    (plain if up_weight is None else with_up)(
        lambda meta: (triton.cdiv(rows, meta["BM"]) * triton.cdiv(columns, meta["BN"]),),
        size=rows,
        x_ptr=x, w_ptr=weight, u_ptr=up_weight, bias_ptr=bias, threshold_ptr=threshold, gain_ptr=gain,
        up_bias_ptr=up_bias, y_ptr=y, eps=eps, M=rows, N=columns, K=depth,
        stride_xm=x.stride(0), stride_xk=x.stride(1), stride_wn=weight.stride(0), stride_wk=weight.stride(1),
        stride_un=0 if up_weight is None else up_weight.stride(0),
        stride_uk=0 if up_weight is None else up_weight.stride(1),
        ACTIVATION=activation, SCORE=score, NORM=norm, EVEN=depth % DEPTH == 0,
        FACTOR=factor(x.dtype), PRECISION=precision,
    )  # fmt: skip
    return y


def factor(dtype: torch.dtype) -> tl.dtype:
    """What is multiplied; the interpreter would multiply the bit patterns of bfloat16."""
    if interpreted(gated_linear_kernel):
        return tl.float32
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]
