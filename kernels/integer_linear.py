"""``fxfreeze::integer_linear``: a linear layer of integers of 8 bits, inputs and weight, with an exact sum in 32 bits.

y_n = s · t_n · Σ_k (x_k − z)·W_nk + b_n, and Σ_k (x_k − z)·W_nk = Σ_k x_k·W_nk − z·Σ_k W_nk: the product is one of
integers, as MatMulInteger of ONNX, and the second sum a constant of the weight.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._op import Kernel, register

SCHEMA = (
    "(Tensor x, Tensor x_scale, Tensor zero_point, Tensor weight, Tensor scale, Tensor? bias=None, "
    "Tensor? weight_sum=None) -> Tensor"
)
MAX_INPUTS = (2**31 - 1) // (255 * 128)
"""More of the largest could exceed 32 bits."""


def reference(
    x: Tensor,
    x_scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    weight_sum: Tensor | None = None,
) -> Tensor:
    """Multiply integers by integers, and scale the sums.

    Args:
        x: uint8 or int8 [..., in], 1 ≤ in ≤ 65793.
        x_scale: s, floating, 0-d.
        zero_point: z, the integer that stands for 0.0; dtype of `x`, 0-d.
        weight: W, int8 [out, in].
        scale: t [out], or [1] for all; dtype of `x_scale`.
        bias: b [out], dtype of `x_scale`; None: 0.
        weight_sum: Σ_k W_nk, int32 [out], and nothing else; None: it is added up in every call.

    Returns:
        [..., out], dtype of `x_scale`. The sums are exact. They are scaled in float64, and rounded once; on a GPU they
        are scaled in float32.

    Raises:
        ValueError: shapes or dtypes other than the above.
    """
    _check(x, x_scale, zero_point, weight, scale, bias, weight_sum)
    # Exact in float64, which has a product of matrices everywhere, as integers have not.
    wide = torch.float64
    total = weight.sum(1, dtype=torch.int32) if weight_sum is None else weight_sum
    sums = torch.matmul(x.to(wide), weight.to(wide).T) - zero_point.to(wide) * total.to(wide)
    y = sums * (x_scale.to(wide) * scale.to(wide))
    return (y if bias is None else y + bias.to(wide)).to(x_scale.dtype)


def fake(
    x: Tensor,
    x_scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    weight_sum: Tensor | None = None,
) -> Tensor:
    _check(x, x_scale, zero_point, weight, scale, bias, weight_sum)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=x_scale.dtype)


def _check(
    x: Tensor,
    x_scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    weight_sum: Tensor | None,
) -> None:
    if x.dtype not in (torch.uint8, torch.int8) or x.dim() == 0 or not 1 <= x.shape[-1] <= MAX_INPUTS:
        raise ValueError(
            f"integer_linear: x is {x.dtype} of shape {list(x.shape)}, not uint8 or int8 of [..., 1 to {MAX_INPUTS}]"
        )
    if not x_scale.is_floating_point() or x_scale.dim() != 0:
        raise ValueError(f"integer_linear: x_scale is {x_scale.dtype} of shape {list(x_scale.shape)}, not floating 0-d")
    if weight.dim() != 2:
        raise ValueError(f"integer_linear: weight is of shape {list(weight.shape)}, not [out, in = {x.shape[-1]}]")
    out = (weight.shape[0],)
    for what, value, shapes, dtype in (
        ("zero_point", zero_point, [()], x.dtype), ("weight", weight, [(*out, x.shape[-1])], torch.int8),
        ("scale", scale, [out, (1,)], x_scale.dtype), ("bias", bias, [out], x_scale.dtype),
        ("weight_sum", weight_sum, [out], torch.int32),
    ):  # fmt: skip
        if value is not None and (tuple(value.shape) not in shapes or value.dtype != dtype):
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(
                f"integer_linear: {what} is {value.dtype} of shape {list(value.shape)}, not {dtype} of {wanted}"
            )


# ---- GPU


def supports(
    x: Tensor,
    x_scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    weight_sum: Tensor | None = None,
) -> bool:
    """One device, at least one output, and no float64."""
    tensors = [value for value in (x, x_scale, zero_point, weight, scale, bias, weight_sum) if value is not None]
    one_device = len({value.device for value in tensors}) == 1
    return one_device and x_scale.dtype in (torch.float32, torch.float16, torch.bfloat16) and weight.shape[0] > 0


def launch(
    x: Tensor,
    x_scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    weight_sum: Tensor | None = None,
) -> Tensor:
    """As :func:`reference`, with the sums scaled in float32."""
    from ._integer_linear_triton import integer_linear

    _check(x, x_scale, zero_point, weight, scale, bias, weight_sum)
    total = weight.sum(1, dtype=torch.int32) if weight_sum is None else weight_sum.contiguous()
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()
    bias = None if bias is None else bias.contiguous()
    y = integer_linear(flat, x_scale, zero_point, weight.contiguous(), scale.contiguous(), bias, total)
    return y.reshape(*x.shape[:-1], weight.shape[0])


KERNEL = register(Kernel("integer_linear", SCHEMA, reference, fake, supports, launch))
