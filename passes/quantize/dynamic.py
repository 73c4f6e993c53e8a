"""Linear layers on integers, with a scale that is computed from every input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.inline import inline
from fxfreeze.kernels.dequantize import KERNEL as DEQUANTIZE
from fxfreeze.kernels.quantize import KERNEL as QUANTIZE
from fxfreeze.plan import Quantize
from fxfreeze.program import Program
from fxfreeze.rewrite import Context, Pass

from .._measured import measured_rewrite
from ._activations import HIGH, LOW
from ._sensitivity import Level, choose, layer_seconds, measures
from ._sites import Site, has_budget, quantized_sites
from ._weights import computed, nearest, product_bits, quantize_weight


class QuantizeDynamic(Pass):
    """For linear layers of ``Quantize(scheme="int8", mode="dynamic")``: uint8 inputs, one scale per call; int8 weights.

    The scale spans the input's smallest and largest value, and 0: ONNX's DynamicQuantizeLinear in plain operators.
    """

    name, stage, exact = "quantize_dynamic", "quantize", False
    within_budget: ClassVar[bool] = False
    """Whether it is for steps with a budget."""

    def run(self, program: Program, ctx: Context) -> int:
        sites = quantized_sites(program, ctx, self._wants, _problem)
        if not sites:
            return 0
        return measured_rewrite(ctx, program, "dynamic int8", lambda: self._quantize(program, ctx, sites))

    def _quantize(self, program: Program, ctx: Context, sites: list[Site]) -> list[Site]:
        """Those of the sites that come to run on integers."""
        inputs: dict[Node, Node] = {}
        chosen = sites if not measures(ctx, sites) else list(choose(program, ctx, _levels(program, ctx, sites)))
        for site in chosen:
            _rewrite(program, ctx, site, inputs)
        return chosen

    def _wants(self, step: Quantize) -> bool:
        return step.scheme == "int8" and step.mode == "dynamic" and has_budget(step) == self.within_budget


class QuantizeDynamicWithin(QuantizeDynamic):
    """As `quantize_dynamic`, with a budget: behind what has none, so that the budget counts that, too."""

    name, within_budget = "quantize_dynamic_within", True


def requantized(x: Tensor) -> Tensor:
    """`x` as 256 integers over its own range have it."""
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    step = ((high - low) / (HIGH - LOW)).clamp(min=torch.finfo(x.dtype).tiny)
    zero = torch.round(-low / step).clamp(LOW, HIGH).to(torch.uint8)
    return DEQUANTIZE.op(QUANTIZE.op(x, step, zero, 0, 0, LOW, HIGH), step, zero, 0, 0, x.dtype)


def _levels(program: Program, ctx: Context, sites: Sequence[Site]) -> dict[Site, list[Level]]:
    def act(site: Site) -> Callable[[Tensor], Tensor]:
        bits, bias = product_bits(program, site.step), program.constant64(site.operator.bias)
        integers = nearest(program, site, bits)
        return lambda value: computed(site, requantized(value), integers, bias)

    seconds = layer_seconds(program, ctx, sites)
    return {site: [Level(site.step.scheme, act(site), seconds[site])] for site in sites}


def _problem(site: Site) -> str | None:
    if site.operator.kind == "conv":
        return "dynamic int8 convolutions run 8 to 14 times slower than float ones; use mode='static'"
    kinds = {
        "embedding": "an embedding computes nothing; 'int8-weight' is for layers that are looked up",
        "transposed": "there is no integer kernel for transposed convolutions",
    }
    return kinds.get(site.operator.kind)


def _rewrite(program: Program, ctx: Context, site: Site, inputs: dict[Node, Node]) -> None:
    value, node = site.operator.input, site.operator.node
    if value not in inputs:
        inputs[value] = inline(program, requantized, value, before=node, like=node)
    node.replace_input_with(value, inputs[value])
    quantize_weight(program, ctx, site, product_bits(program, site.step), "; uint8 input, scaled per call")
