"""``fxfreeze::quantize``: floats to the nearest of 256, or fewer, integers.

q = saturate(round(x / scale) + zero_point), half to even: QuantizeLinear of ONNX, opset 21. One scale for all of x, one
per index along `axis`, or one per `block` consecutive elements of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._op import Kernel, register
from ._quantized import check, spread

SCHEMA = "(Tensor x, Tensor scale, Tensor zero_point, int axis, int block, int low, int high) -> Tensor"


def reference(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, block: int, low: int, high: int) -> Tensor:
    """Round to integers.

    Args:
        x: floating, any shape. What NaN becomes is not defined.
        scale: > 0, floating; a scalar, [n] where dim `axis` of x is n, or, with `block`, x's shape with dim `axis`
            divided by it. Of a scalar, `axis` is ignored.
        zero_point: the integer that 0.0 becomes; shape of `scale`, dtype of the result.
        axis: along which the scale changes.
        block: how many consecutive elements along `axis` share a scale; 0: there are no blocks.
        low, high: the smallest and the largest integer.

    Returns:
        uint8 for 0 … 255, else int8, in x's shape.

    Raises:
        ValueError: shapes, dtypes or bounds other than the above.
    """
    _check(x, scale, zero_point, axis, block, low, high)
    steps = torch.round(x / spread(scale, x, axis, block).to(x.dtype))
    return (steps + spread(zero_point, x, axis, block)).clamp(low, high).to(stored(low, high))


def eager(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, block: int, low: int, high: int) -> Tensor:
    """As `reference`, in the memory of one float value."""
    _check(x, scale, zero_point, axis, block, low, high)
    steps = (x / spread(scale, x, axis, block).to(x.dtype)).round_()
    return steps.add_(spread(zero_point, x, axis, block)).clamp_(low, high).to(stored(low, high))


def fake(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, block: int, low: int, high: int) -> Tensor:
    _check(x, scale, zero_point, axis, block, low, high)
    return torch.empty_like(x, dtype=stored(low, high))


def stored(low: int, high: int) -> torch.dtype:
    """The dtype of integers between these."""
    return torch.uint8 if (low, high) == (0, 255) else torch.int8


def _check(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, block: int, low: int, high: int) -> None:
    if not x.is_floating_point():
        raise ValueError(f"quantize: x is {x.dtype}, not floating")
    if (low, high) != (0, 255) and not -128 <= low < high <= 127:
        raise ValueError(f"quantize: {low} … {high} is neither 0 … 255 nor within -128 … 127")
    if zero_point.dtype != stored(low, high):
        raise ValueError(f"quantize: zero_point is {zero_point.dtype}, not {stored(low, high)}")
    check("quantize", x, scale, zero_point, axis, block)


KERNEL = register(Kernel("quantize", SCHEMA, reference, fake, eager=eager))
