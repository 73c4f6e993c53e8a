"""Weights as integers, everything else in floats: dequantize(integers) where a layer reads its weight."""

from __future__ import annotations

from fxfreeze.program import Program
from fxfreeze.rewrite import Context, Pass

from .._measured import measure_outputs
from ._sites import Site, quantized_sites
from ._weights import quantize_weight

_BITS = {"int8-weight": 8, "int4-weight": 4}


class QuantizeWeights(Pass):
    """W ≈ scale · integers for the schemes "int8-weight" and "int4-weight": less to store and to read."""

    name, stage, exact = "quantize_weights", "quantize", False

    def run(self, program: Program, ctx: Context) -> int:
        sites = quantized_sites(program, ctx, lambda step: step.scheme in _BITS, _problem)
        if not sites:
            return 0
        before = program.clone()
        for site in sites:
            quantize_weight(program, ctx, site, _BITS[site.step.scheme])
        measure_outputs(ctx, program, before, "integer weights")
        return len(sites)


def _problem(site: Site) -> str | None:
    operator, block = site.operator, site.step.block
    if operator.kind in ("embedding", "transposed"):
        return f"weights of kind {operator.kind} are not quantized yet"
    if block and operator.kind == "conv":
        return "groups of inputs are for linear layers"
    if block and operator.in_features % block:
        return f"its {operator.in_features} inputs are no multiple of {block}"
    return None
