"""Linear layers on integers, with a scale that is computed from every input."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.inline import inline
from fxfreeze.kernels.dequantize import KERNEL as DEQUANTIZE
from fxfreeze.kernels.quantize import KERNEL as QUANTIZE
from fxfreeze.program import Program
from fxfreeze.rewrite import Context, Pass

from .._adapters import describe
from .._measured import Tally, measure_outputs
from ._activations import HIGH, LOW
from ._sites import Site, quantized_sites
from ._weights import Layout, read_integers, stored_weight, to_integers


class QuantizeDynamic(Pass):
    """For linear layers of ``Quantize(scheme="int8", mode="dynamic")``: uint8 inputs, one scale per call; int8 weights.

    The scale spans the input's smallest and largest value, and 0: ONNX's DynamicQuantizeLinear in plain operators.
    """

    name, stage, exact = "quantize_dynamic", "quantize", False

    def run(self, program: Program, ctx: Context) -> int:
        sites = quantized_sites(program, ctx, lambda step: step.scheme == "int8" and step.mode == "dynamic", _problem)
        if not sites:
            return 0
        before, inputs = program.clone(), dict[Node, Node]()
        for site in sites:
            _rewrite(program, ctx, site, inputs)
        measure_outputs(ctx, program, before, "dynamic int8")
        return len(sites)


def requantized(x: Tensor) -> Tensor:
    """`x` as 256 integers over its own range have it."""
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    step = ((high - low) / (HIGH - LOW)).clamp(min=torch.finfo(x.dtype).tiny)
    zero = torch.round(-low / step).clamp(LOW, HIGH).to(torch.uint8)
    return DEQUANTIZE.op(QUANTIZE.op(x, step, zero, 0, 0, LOW, HIGH), step, zero, 0, 0, x.dtype)


def _problem(site: Site) -> str | None:
    if site.operator.kind == "conv":
        return "dynamic int8 convolutions run 8 to 14 times slower than float ones; use mode='static'"
    return None if site.operator.kind in ("linear", "matmul") else f"{site.operator.kind} has no integer kernel"


def _rewrite(program: Program, ctx: Context, site: Site, inputs: dict[Node, Node]) -> None:
    step, operator, node = site.step, site.operator, site.operator.node
    weight, layout = stored_weight(program, operator), Layout.of(operator, step.granularity)
    integers = to_integers(weight, layout, 8, operator.weight.meta["val"].dtype)
    tally = Tally()
    tally.add(integers.floats(), weight, weight.new_empty(0))
    if operator.input not in inputs:
        inputs[operator.input] = inline(program, requantized, operator.input, before=node, like=node)
    node.replace_input_with(operator.input, inputs[operator.input])
    read_integers(program, site, integers)
    ctx.ledger.add(
        site=site.path, step=step.name, requested=describe(step), outcome="rewritten",
        executes=f"int8 weights, one scale per {step.granularity}; uint8 input, scaled per call",
        detail=f"{tally.words} of its weight",
    )  # fmt: skip
