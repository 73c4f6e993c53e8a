"""``fxfreeze::float8_linear``: a linear layer of 8-bit floats, inputs and weight, both float8_e4m3fn.

y_n = s · t_n · Σ_k x_k·W_nk + b_n, with one scale s for all inputs or one per row. Products of two such numbers are
exact in float32, which sums them up.

On a GPU this is ``torch._scaled_mm``, which takes sizes that are multiples of 16. There is one for CPUs, too, which
makes floats of the whole weight in every call: in torch 2.14, one thread with AVX512 takes 157 ms for one row of
4096 x 4096, where the product of floats takes 3.5, and 170 against 12 for 16 rows. So a CPU has the reference alone,
and no layer counts as run in float8 there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._op import Kernel, register
from ._quantized import FLOAT8

SCHEMA = "(Tensor x, Tensor x_scale, Tensor weight, Tensor scale, Tensor? bias=None, *, ScalarType dtype) -> Tensor"
MULTIPLE = 16
"""Of which ``torch._scaled_mm`` wants inputs and outputs to be."""
CAPABILITY = (8, 9)
"""Of NVIDIA's GPUs, the first with products of float8."""


def reference(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype
) -> Tensor:
    """Multiply float8 by float8, and scale the sums.

    Args:
        x: float8_e4m3fn [..., in], or, where a proof computes in float64, float64 with such numbers.
        x_scale: s, float32, or float64 for results in float64; 0-d, or [..., 1].
        weight: W [out, in], dtype of `x`.
        scale: t [out], dtype of `x_scale`.
        bias: b [out], `dtype`; None: 0.
        dtype: of the result, floating.

    Returns:
        [..., out], `dtype`. Half precision is computed in float32, and rounded once.

    Raises:
        ValueError: shapes or dtypes other than the above.
    """
    _check(x, x_scale, weight, scale, bias, dtype)
    wide = x_scale.dtype
    y = torch.matmul(x.to(wide), weight.to(wide).T) * (x_scale * scale)
    return (y if bias is None else y + bias.to(wide)).to(dtype)


def fake(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype
) -> Tensor:
    _check(x, x_scale, weight, scale, bias, dtype)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def _check(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> None:  # fmt: skip
    if x.dtype not in (FLOAT8, torch.float64) or x.dim() == 0:
        raise ValueError(f"float8_linear: x is {x.dtype} of shape {list(x.shape)}, not {FLOAT8} of [..., in]")
    if weight.dim() != 2:
        raise ValueError(f"float8_linear: weight is of shape {list(weight.shape)}, not [out, in = {x.shape[-1]}]")
    if not dtype.is_floating_point:
        raise ValueError(f"float8_linear: the result's dtype {dtype} is not a floating one")
    wide, out = torch.promote_types(dtype, torch.float32), (weight.shape[0],)
    for what, value, shapes, wanted in (
        ("x_scale", x_scale, [(), (*x.shape[:-1], 1)], wide), ("weight", weight, [(*out, x.shape[-1])], x.dtype),
        ("scale", scale, [out], wide), ("bias", bias, [out], dtype),
    ):  # fmt: skip
        if value is not None and (tuple(value.shape) not in shapes or value.dtype != wanted):
            shape = " or ".join(str(list(item)) for item in shapes)
            raise ValueError(
                f"float8_linear: {what} is {value.dtype} of shape {list(value.shape)}, not {wanted} of {shape}"
            )


# ---- GPU


def has_kernel(device: torch.device) -> bool:
    """Whether the device multiplies float8_e4m3fn; AMD's take another float8, or other sizes."""
    on_nvidia = device.type == "cuda" and torch.version.hip is None
    return on_nvidia and torch.cuda.get_device_capability(device) >= CAPABILITY


def fits(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``torch._scaled_mm`` takes a weight of this shape, for results of this dtype."""
    return not any(size % MULTIPLE or not size for size in weight.shape) and dtype != torch.float64


def supports(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype
) -> bool:
    """One device that has such products, and sizes that they take."""
    tensors = [value for value in (x, x_scale, weight, scale, bias) if value is not None]
    one_device = len({value.device for value in tensors}) == 1
    return one_device and x.dtype == FLOAT8 and fits(weight, dtype) and has_kernel(x.device)


def launch(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype
) -> Tensor:
    """As :func:`reference`, by ``torch._scaled_mm``: plain torch, which a compiler may inline.

    For results in bfloat16 that scales rows and columns, and adds the bias. In other dtypes not every GPU does, so the
    sums come out in float32, and are scaled behind it.
    """
    _check(x, x_scale, weight, scale, bias, dtype)
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    rows = x_scale.reshape(-1, 1).expand(flat.shape[0], 1).contiguous()
    # Column by column, as it wants the right side to be.
    right = weight.contiguous().T
    if dtype == torch.bfloat16:
        y = torch._scaled_mm(flat, right, rows, scale.unsqueeze(0).contiguous(), bias, out_dtype=dtype)
    else:
        one = torch.ones((), dtype=torch.float32, device=x.device)
        y = torch._scaled_mm(flat, right, one, one, out_dtype=torch.float32) * (rows * scale)
        y = (y if bias is None else y + bias.to(y.dtype)).to(dtype)
    return y.reshape(*x.shape[:-1], weight.shape[0])


KERNEL = register(Kernel("float8_linear", SCHEMA, reference, fake, supports, launch))
