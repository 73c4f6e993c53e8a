"""What quantize and dequantize share: the numbers of float8; how scales lie along a tensor, and which are refused."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
FLOAT8_LIMIT = 448.0
"""The largest number of it."""


def spread(values: Tensor, like: Tensor, axis: int, block: int) -> Tensor:
    """`values`, one per tensor, per index along `axis` or per block of it, in a shape that broadcasts with `like`."""
    if values.dim() == 0:
        return values
    if block:
        return values.repeat_interleave(block, dim=axis)
    shape = [1] * like.dim()
    shape[axis] = -1
    return values.reshape(shape)


def check(name: str, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, block: int) -> None:
    """Refuse a scale or a zero point that does not fit `x`.

    Raises:
        ValueError: says which operand has which shape or dtype, and which one it needs.
    """
    if not scale.is_floating_point():
        raise ValueError(f"{name}: scale is {scale.dtype}, not floating")
    if zero_point.shape != scale.shape:
        raise ValueError(f"{name}: zero_point has shape {list(zero_point.shape)}, scale {list(scale.shape)}")
    if scale.dim() == 0 and not block:
        return
    if not -x.dim() <= axis < x.dim():
        raise ValueError(f"{name}: axis is {axis}, and x has {x.dim()} dims")
    if block < 0:
        raise ValueError(f"{name}: block is {block}, not ≥ 0")
    want = [x.shape[axis]]
    if block:
        want = list(x.shape)
        if want[axis] % block:
            raise ValueError(f"{name}: dim {axis} of x is {want[axis]}, no multiple of block = {block}")
        want[axis] = want[axis] // block
    if list(scale.shape) != want:
        raise ValueError(f"{name}: scale has shape {list(scale.shape)}, not {want} (axis = {axis}, block = {block})")
