"""``fxfreeze::quantize_float8``: floats to the nearest of the 253 finite numbers of float8_e4m3fn.

q = saturate(x / scale), half to even. Beyond the largest of them, 448, some versions of torch and some devices cast to
NaN, others to 448: hence a clamp, in front of the cast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._op import Kernel, register
from ._quantized import FLOAT8, FLOAT8_LIMIT

SCHEMA = "(Tensor x, Tensor scale) -> Tensor"


def reference(x: Tensor, scale: Tensor) -> Tensor:
    """Round to float8.

    Args:
        x: floating [..., n]; NaN stays NaN.
        scale: > 0, what 1.0 stands for; float32, or float64 beside a float64 `x`; 0-d, or [..., 1].

    Returns:
        float8_e4m3fn, in x's shape.

    Raises:
        ValueError: shapes or dtypes other than the above.
    """
    _check(x, scale)
    return (x.to(scale.dtype) / scale).clamp(-FLOAT8_LIMIT, FLOAT8_LIMIT).to(FLOAT8)


def to_jump(steps: Tensor) -> Tensor:
    """How far x / scale, floating, is from the nearest number halfway between two of float8, where rounding jumps."""
    numbers = torch.arange(127, dtype=torch.uint8, device=steps.device).view(FLOAT8).to(steps.dtype)
    halfway = (numbers[1:] + numbers[:-1]) / 2
    size = steps.abs().contiguous()
    above = torch.bucketize(size, halfway).clamp(1, len(halfway) - 1)
    return torch.minimum((size - halfway[above]).abs(), (size - halfway[above - 1]).abs())


def fake(x: Tensor, scale: Tensor) -> Tensor:
    _check(x, scale)
    return torch.empty_like(x, dtype=FLOAT8)


def _check(x: Tensor, scale: Tensor) -> None:
    if not x.is_floating_point() or x.dim() == 0:
        raise ValueError(f"quantize_float8: x is {x.dtype} of shape {list(x.shape)}, not floating [..., n]")
    wide, rows = torch.promote_types(x.dtype, torch.float32), (*x.shape[:-1], 1)
    if scale.dtype != wide or tuple(scale.shape) not in ((), rows):
        raise ValueError(
            f"quantize_float8: scale is {scale.dtype} of shape {list(scale.shape)}, not {wide} of [] or {list(rows)}"
        )


KERNEL = register(Kernel("quantize_float8", SCHEMA, reference, fake))
