"""Activations as uint8: one scale and one zero point per value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.kernels.dequantize import KERNEL as DEQUANTIZE
from fxfreeze.kernels.quantize import KERNEL as QUANTIZE
from fxfreeze.program import Program

from ._observers import LEVELS, Range

LOW, HIGH = 0, LEVELS - 1


@dataclass(frozen=True)
class Scale:
    """x ≈ (q - zero) · step, for q from LOW to HIGH; `step` is a number of `dtype`."""

    step: float
    zero: int
    dtype: torch.dtype

    def tensors(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.step, dtype=self.dtype), torch.tensor(self.zero, dtype=torch.uint8)


def scale_of(found: Range, dtype: torch.dtype) -> Scale:
    """The scale that spans a range, and 0.0 in any case, which becomes an integer exactly.

    What is never negative has the zero point LOW: with another one, ONNX Runtime would not make one integer kernel of a
    convolution and the ReLU behind it.
    """
    low, high = min(found.low, 0.0), max(found.high, 0.0)
    step = (high - low) / (HIGH - LOW) or 1.0
    # A step that the dtype rounds to 0 would divide by it.
    step = max(float(torch.tensor(step, dtype=dtype)), torch.finfo(dtype).tiny)
    return Scale(step, min(max(LOW + round(-low / step), LOW), HIGH), dtype)


def quantized(value: Tensor, scale: Scale) -> Tensor:
    """`value` as the integers have it."""
    step, zero = (item.to(value.device) for item in scale.tensors())
    return DEQUANTIZE.op(QUANTIZE.op(value, step, zero, 0, 0, LOW, HIGH), step, zero, 0, 0, value.dtype)


def add_scale(program: Program, node: Node, scale: Scale, readers: Iterable[Node]) -> None:
    """Let `readers` read the integers of `node` instead of its floats."""
    before = node.next
    while before.op == "placeholder":
        before = before.next
    device = node.meta["val"].device
    step, zero = (
        program.add_constant(f"{node.name}.{name}", value.to(device), before=before, like=node)
        for name, value in zip(("scale", "zero"), scale.tensors(), strict=True)
    )
    readers = list(readers)
    whole = program.call(QUANTIZE.op, node, step, zero, 0, 0, LOW, HIGH, before=before, like=node)
    floats = program.call(DEQUANTIZE.op, whole, step, zero, 0, 0, scale.dtype, before=before, like=node)
    for reader in readers:
        reader.replace_input_with(node, floats)
