"""Weights as integers with symmetric scales, and the operators that make floats of them again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxfreeze import cpu
from fxfreeze.kernels.dequantize import KERNEL as DEQUANTIZE
from fxfreeze.plan import Quantize
from fxfreeze.program import INTEGERS, IntegerSite, Program, on_cpu
from fxfreeze.rewrite import Context

from .._adapters import describe
from .._measured import Tally
from .._operators import WeightOperator
from ._sites import Site

LIMITS = {8: 127, 7: cpu.SAFE_WEIGHT, 4: 7}
"""Bits → the largest integer of a weight. The smallest is its negative, so that 0 lies in the middle."""


@dataclass(frozen=True)
class Layout:
    """Where scales lie along a stored weight; see :mod:`fxfreeze.kernels.quantize`."""

    axis: int
    block: int
    each: bool

    @classmethod
    def of(cls, operator: WeightOperator, granularity: str) -> Layout:
        """One scale for all, per output feature, or per group of inputs of one, along the weight as stored."""
        out = 1 if operator.kind == "matmul" else 0
        if granularity.startswith("group:"):
            return cls(1 - out, int(granularity.partition(":")[2]), True)
        return cls(out, 0, granularity == "channel")

    def grouped(self, weight: Tensor) -> tuple[Tensor, list[int]]:
        """`weight` in a shape, and the dims of it that share a scale."""
        if self.block:
            count = weight.shape[self.axis] // self.block
            return weight.unflatten(self.axis, (count, self.block)), [self.axis + 1]
        return weight, [dim for dim in range(weight.dim()) if not self.each or dim != self.axis]


@dataclass(frozen=True)
class Integers:
    """A weight [as stored] as int8, scales in the dtype that the layer computes in, and where these lie."""

    values: Tensor
    scale: Tensor
    layout: Layout

    def floats(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """What they stand for; rounded once, for the product of an integer and a scale is exact in float64."""
        zero = torch.zeros_like(self.scale, dtype=torch.int8)
        return DEQUANTIZE.op(self.values, self.scale.to(dtype), zero, self.layout.axis, self.layout.block, dtype)


def to_integers(weight: Tensor, layout: Layout, bits: int, dtype: torch.dtype, least: Tensor | None = None) -> Integers:
    """The nearest integers; scales such that the largest weight of each is the largest integer.

    Args:
        weight: float64, as stored.
        dtype: of the scales, which are rounded before weights are divided by them.
        least: scales at least, in their shape.
    """
    limit = LIMITS[bits]
    grouped, dims = layout.grouped(weight)
    scale = grouped.abs().amax(dims, keepdim=True) / limit
    scale = torch.where(scale > 0, scale, 1.0)
    if least is not None:
        scale = torch.maximum(scale, least.reshape(scale.shape))
    scale = scale.to(dtype)
    values = torch.round(grouped / scale.double()).clamp(-limit, limit).to(torch.int8).reshape(weight.shape)
    return Integers(values, scale.squeeze(dims), layout)


def product_bits(program: Program, step: Quantize) -> int:
    """The bits of a weight that is multiplied with integers; a step that leaves it open asks this machine."""
    reduced = on_cpu(program.inputs) and cpu.adds_in_16_bits() if step.reduce_range is None else step.reduce_range
    return 7 if reduced else 8


def range_notes(bits: int) -> list[str]:
    """For the ledger, where integers of 8 bits are not used whole."""
    return [f"weights within ±{LIMITS[bits]}, for sums in 16 bits"] if bits == 7 else []


def nearest(program: Program, site: Site, bits: int) -> Integers:
    """The layer's weight as the nearest integers, in the layout that its step asks for."""
    layout = Layout.of(site.operator, site.step.granularity)
    return to_integers(stored_weight(program, site.operator), layout, bits, site.operator.weight.meta["val"].dtype)


def computed(site: Site, value: Tensor, integers: Integers, bias: Tensor | None) -> Tensor:
    """What the layer makes of `value`, its input, with that weight; `bias`: of a layer that has one."""
    operator, dtype = site.operator, site.operator.weight.meta["val"].dtype
    given = {} if bias is None else {"bias": bias.to(dtype)}
    args, kwargs = operator.call_arguments(input=value, weight=integers.floats(dtype), **given)
    return operator.node.target(*args, **kwargs)  # type: ignore[operator, no-any-return]


def stored_weight(program: Program, operator: WeightOperator) -> Tensor:
    """The weight as stored, in float64; capturing has seen that it is finite."""
    weight = program.constant64(operator.weight)
    assert weight is not None
    return weight


def read_integers(program: Program, site: Site, integers: Integers) -> None:
    """Let the layer read `integers`, through constants and an operator in front of it, and note that it does."""
    operator = site.operator
    node, name, dtype = operator.node, str(operator.weight.target), operator.weight.meta["val"].dtype
    zero = torch.zeros_like(integers.scale, dtype=torch.int8)
    values, scale, zero_point = (
        program.add_constant(f"{name}{suffix}", value.contiguous(), before=node, like=node)
        for suffix, value in ((".int", integers.values), (".scale", integers.scale), (".zero", zero))
    )
    layout = integers.layout
    floats = program.call(
        DEQUANTIZE.op, values, scale, zero_point, layout.axis, layout.block, dtype, before=node, like=node
    )  # fmt: skip
    node.replace_input_with(operator.weight, floats)
    node.meta[INTEGERS] = IntegerSite(site.path, site.step.name)


def quantize_weight(program: Program, ctx: Context, site: Site, bits: int, inputs: str = "", why: str = "") -> None:
    """Let the layer read its weight as the nearest integers, and say in the ledger what that changes in it.

    Args:
        inputs: words for what became of the layer's input.
        why: words for why the nearest ones.
    """
    weight, integers, tally = stored_weight(program, site.operator), nearest(program, site, bits), Tally()
    tally.add(integers.floats(), weight, weight.new_empty(0))
    detail = "; ".join([f"{tally.words} of its weight{why}", *range_notes(bits)])
    put_integers(program, ctx, site, integers, bits, detail, inputs)


def put_integers(
    program: Program, ctx: Context, site: Site, integers: Integers, bits: int, detail: str, inputs: str = ""
) -> None:
    """Let the layer read `integers`, and say so in the ledger; `inputs` as for :func:`quantize_weight`."""
    read_integers(program, site, integers)
    ctx.ledger.add(
        site=site.path, step=site.step.name, requested=describe(site.step), outcome="rewritten",
        executes=f"int{4 if bits == 4 else 8} weights, one scale per {site.step.granularity}{inputs}", detail=detail,
    )  # fmt: skip
