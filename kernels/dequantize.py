"""``fxfreeze::dequantize``: integers back to floats, x = (q - zero_point) · scale: ONNX DequantizeLinear, opset 21."""

from __future__ import annotations

import torch
from torch import Tensor

from ._op import Kernel, register
from ._quantized import check, spread

SCHEMA = "(Tensor q, Tensor scale, Tensor zero_point, int axis, int block, ScalarType dtype) -> Tensor"


def reference(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int, block: int, dtype: torch.dtype) -> Tensor:
    """What the integers of :mod:`fxfreeze.kernels.quantize` stand for.

    Args:
        q: int8 or uint8, any shape.
        scale: floating; a scalar, [n] where dim `axis` of q is n, or, with `block`, q's shape with dim `axis` divided
            by it. Of a scalar, `axis` is ignored.
        zero_point: what stands for 0.0; shape of `scale`, dtype of `q`.
        axis: along which the scale changes.
        block: how many consecutive elements along `axis` share a scale; 0: there are no blocks.
        dtype: of the result, floating.

    Returns:
        `dtype`, in q's shape.

    Raises:
        ValueError: shapes or dtypes other than the above.
    """
    _check(q, scale, zero_point, axis, block, dtype)
    # uint8 less its zero point would wrap around.
    steps = q.to(torch.int32) - spread(zero_point, q, axis, block).to(torch.int32)
    return steps.to(dtype) * spread(scale, q, axis, block).to(dtype)


def eager(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int, block: int, dtype: torch.dtype) -> Tensor:
    """As `reference`, in half as much memory: every floating dtype holds integers up to 256 exactly."""
    _check(q, scale, zero_point, axis, block, dtype)
    steps = q.to(dtype).sub_(spread(zero_point, q, axis, block).to(dtype))
    factors = spread(scale, q, axis, block).to(dtype)
    return steps * factors if factors.requires_grad else steps.mul_(factors)


def fake(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int, block: int, dtype: torch.dtype) -> Tensor:
    _check(q, scale, zero_point, axis, block, dtype)
    return torch.empty_like(q, dtype=dtype)


def _check(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int, block: int, dtype: torch.dtype) -> None:
    if q.dtype not in (torch.int8, torch.uint8):
        raise ValueError(f"dequantize: q is {q.dtype}, neither int8 nor uint8")
    if zero_point.dtype != q.dtype:
        raise ValueError(f"dequantize: zero_point is {zero_point.dtype}, q {q.dtype}")
    if not dtype.is_floating_point:
        raise ValueError(f"dequantize: dtype is {dtype}, not floating")
    check("dequantize", q, scale, zero_point, axis, block)


KERNEL = register(Kernel("dequantize", SCHEMA, reference, fake, eager=eager))
