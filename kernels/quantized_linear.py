"""``fxfreeze::quantized_linear``: a linear layer whose weight is read as integers of 8 or 4 bits; sums are in floats.

y = x·Wᵀ + b with W = integers · scale, one scale per group of inputs of an output. A layer that is waiting for its
weight, as one is at a batch of 1, waits for a quarter or an eighth of the bytes. A hard gate may follow, that of
``gate.py``: y ← g ⊙ y ⊙ 1[s(y) > τ].

Two integers of 4 bits share a byte: of 32 consecutive inputs, byte j holds the j-th in its low half, and the
(16 + j)-th in its high half. So both halves are vectors of neighbours.

On a CPU this is C++. Of many rows it makes a tile of the weight floats, once for all of them. Milliseconds of
4096 x 4096 at 1, 4, 16, 64 and 256 rows, one thread with AVX512, torch 2.14: 2.5, 2.6, 7.2, 18 and 60 with 8 bits, 1.5,
2.2, 5.7, 15 and 58 with 4 in groups of 32; the dense product takes 2.6, 5.1, 9.6, 17 and 50. torch's own
``_weight_int8pack_mm`` and ``_weight_int4pack_mm_for_cpu`` take 12 and 26 for one row in float32, and AOTInductor has
no C form of the second.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import _op
from ._native import call
from ._op import Kernel, Native, register

SCORES = ("h", "abs")
SCHEMA = (
    "(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None, Tensor? threshold=None, Tensor? gain=None, *, "
    "str score='h') -> Tensor"
)
CHUNK = 32
"""Inputs whose integers of 4 bits lie in one piece."""


def pack(integers: Tensor) -> Tensor:
    """Integers from -8 to 7, int8 [out, in], in 4 bits each: int8 [out, in / 2]. `in` is a multiple of 32."""
    low, high = integers.unflatten(1, (-1, 2, CHUNK // 2)).to(torch.int32).unbind(2)
    return ((low & 15) | (high << 4)).to(torch.int8).flatten(1)


def unpack(packed: Tensor) -> Tensor:
    """What :func:`pack` was given: int8 [..., in / 2] to int8 [..., in]."""
    both = packed.unflatten(-1, (-1, CHUNK // 2)).to(torch.int32)
    high = torch.div(both, 16, rounding_mode="floor")
    low = both - 16 * high
    return torch.stack((torch.where(low < 8, low, low - 16), high), -2).flatten(-3).to(torch.int8)


def reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    threshold: Tensor | None = None,
    gain: Tensor | None = None,
    *,
    score: str = "h",
) -> Tensor:
    """Multiply by integers and their scales, and gate what comes out.

    Args:
        x: [..., in], floating.
        weight: int8 [out, in], or [out, in / 2] from :func:`pack`.
        scale: [out, groups], dtype of `x`; as many consecutive inputs share each of an output's.
        bias: [out], dtype of `x`; None: 0.
        threshold: τ [out], float32, or float64 beside a float64 `x`. A neuron fires strictly above it; None: always.
        gain: g [out], dtype as for `threshold`; None: 1.
        score: s(y): "h", or "abs" for \\|y\\|.

    Returns:
        [..., out], dtype of `x`. Half precision is computed in float32, and rounded once. Where the gate is shut the
        result is 0, whatever y is there.

    Raises:
        ValueError: an unknown score, or shapes or dtypes other than the above.
    """
    _check(x, weight, scale, bias, threshold, gain, score)
    wide = torch.promote_types(x.dtype, torch.float32)
    integers = weight if weight.shape[1] == x.shape[-1] else unpack(weight)
    dense = integers.unflatten(1, (scale.shape[1], -1)).to(wide) * scale.to(wide).unsqueeze(2)
    h = linear(x.to(wide), dense.flatten(1), None if bias is None else bias.to(wide))
    return _gated(h, threshold, gain, score).to(x.dtype)


def _gated(h: Tensor, threshold: Tensor | None, gain: Tensor | None, score: str) -> Tensor:
    if threshold is not None:
        # By its name: kernel files do not import each other.
        gated: Tensor = _op.OPS["gate"].reference(h, threshold, gain, score=score)
        return gated
    return h if gain is None else h * gain


def fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    threshold: Tensor | None = None,
    gain: Tensor | None = None,
    *,
    score: str = "h",
) -> Tensor:
    _check(x, weight, scale, bias, threshold, gain, score)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _check(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    threshold: Tensor | None = None,
    gain: Tensor | None = None,
    score: str = "h",
) -> None:
    if score not in SCORES:
        raise ValueError(f"quantized_linear: score {score!r} is none of {', '.join(map(repr, SCORES))}")
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"quantized_linear: x is {x.dtype} of shape {list(x.shape)}, not floating of [..., in ≥ 1]")
    inputs = x.shape[-1]
    halves = weight.dim() == 2 and inputs % CHUNK == 0 and weight.shape[1] == inputs // 2
    if weight.dtype != torch.int8 or weight.dim() != 2 or not (weight.shape[1] == inputs or halves):
        raise ValueError(
            f"quantized_linear: weight is {weight.dtype} of shape {list(weight.shape)}, not int8 of [out, {inputs}] "
            f"or, where in is a multiple of {CHUNK}, [out, in / 2]"
        )
    out = weight.shape[0]
    fits = scale.dim() == 2 and scale.shape[0] == out and scale.shape[1] > 0 and inputs % scale.shape[1] == 0
    if not fits or scale.dtype != x.dtype:
        raise ValueError(
            f"quantized_linear: scale is {scale.dtype} of shape {list(scale.shape)}, not {x.dtype} of "
            f"[{out}, a divisor of {inputs}]"
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    for what, value, dtype in (("bias", bias, x.dtype), ("threshold", threshold, wide), ("gain", gain, wide)):
        if value is not None and (tuple(value.shape) != (out,) or value.dtype != dtype):
            raise ValueError(
                f"quantized_linear: {what} is {value.dtype} of shape {list(value.shape)}, not {dtype} of [{out}]"
            )


# ---- CPU

NATIVE_SCHEMA = "(Tensor x, Tensor weight, Tensor scale, Tensor bias) -> Tensor"


def native_supports(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    threshold: Tensor | None = None,
    gain: Tensor | None = None,
    *,
    score: str = "h",
) -> bool:
    """float32, and groups of whole chunks."""
    tensors = [value for value in (x, weight, scale, bias, threshold, gain) if value is not None]
    on_cpu = all(value.device.type == "cpu" for value in tensors)
    return on_cpu and x.dtype == torch.float32 and scale.dim() == 2 and x.shape[-1] % (CHUNK * scale.shape[1]) == 0


def native_apply(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    threshold: Tensor | None = None,
    gain: Tensor | None = None,
    *,
    score: str = "h",
) -> Tensor:
    """As :func:`reference`; of a few rows each group's sum is scaled once, of many the weights are.

    The gate stays plain torch, which compilers fuse.
    """
    _check(x, weight, scale, bias, threshold, gain, score)
    bias = scale.new_zeros(weight.shape[0]) if bias is None else bias.contiguous()
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()
    y = torch.ops.fxfreeze.quantized_linear_native(flat, weight.contiguous(), scale.contiguous(), bias)
    return _gated(y.reshape(*x.shape[:-1], weight.shape[0]), threshold, gain, score)


def native_fake(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    _check(x, weight, scale, bias)
    if x.dim() != 2 or not native_supports(x, weight, scale, bias):
        raise ValueError(
            f"quantized_linear_native: x is {x.dtype} of shape {list(x.shape)}, not float32 of [rows, in], or groups "
            f"are not whole chunks of {CHUNK}"
        )
    return x.new_empty(x.shape[0], weight.shape[0])


def native_run(library: ctypes.CDLL, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    if not all(value.is_contiguous() for value in (x, weight, scale, bias)):
        raise ValueError("quantized_linear_native: takes contiguous tensors only")
    y = native_fake(x, weight, scale, bias)
    bits = 8 if weight.shape[1] == x.shape[1] else 4
    sizes = (bits, *x.shape, weight.shape[0], scale.shape[1], torch.get_num_threads())
    call(library.quantized_linear, y, x, weight, scale, bias, *sizes)
    return y


NATIVE = Native("quantized_linear.cpp", NATIVE_SCHEMA, native_fake, native_run, native_supports, native_apply)


# ---- GPU


def supports(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    threshold: Tensor | None = None,
    gain: Tensor | None = None,
    *,
    score: str = "h",
) -> bool:
    """One device, no float64, at least one output, and one group or groups of whole chunks."""
    tensors = [value for value in (x, weight, scale, bias, threshold, gain) if value is not None]
    one_device = len({value.device for value in tensors}) == 1
    dtype = x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    groups = scale.dim() == 2 and (scale.shape[1] == 1 or x.shape[-1] % (CHUNK * scale.shape[1]) == 0)
    return one_device and dtype and groups and weight.shape[0] > 0


def launch(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    threshold: Tensor | None = None,
    gain: Tensor | None = None,
    *,
    score: str = "h",
) -> Tensor:
    """As :func:`reference`, with each group's sum scaled once; float32 of more than one row is multiplied in TF32 where
    torch may do so and there is no gate, which it could turn."""
    from ._quantized_linear_triton import quantized_linear

    _check(x, weight, scale, bias, threshold, gain, score)
    vectors = (None if value is None else value.contiguous() for value in (bias, threshold, gain))
    tf32 = threshold is None and torch.backends.cuda.matmul.fp32_precision == "tf32"
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()
    y = quantized_linear(
        flat, weight.contiguous(), scale.contiguous(), *vectors, score=score, precision="tf32" if tf32 else "ieee"
    )
    return y.reshape(*x.shape[:-1], weight.shape[0])


KERNEL = register(Kernel("quantized_linear", SCHEMA, reference, fake, supports, launch, native=NATIVE))
