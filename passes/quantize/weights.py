"""Weights as integers, everything else in floats: dequantize(integers) where a layer reads its weight."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import ClassVar

from torch.fx import Node

from fxfreeze.plan import Quantize
from fxfreeze.program import Program
from fxfreeze.rewrite import Context, Pass

from .._measured import measured_rewrite
from ._gptq import Hessian, compensated, hessians, is_compensated
from ._sensitivity import Level, choose, measures
from ._sites import Site, has_budget, quantized_sites
from ._weights import Integers, Layout, computed, nearest, put_integers, quantize_weight, stored_weight

_BITS = {"int8-weight": 8, "int4-weight": 4}
_FLOATS = 16
"""More bits than integers have."""
Compensated = dict[Node, tuple[Integers, str]]
"""Layer → its integers, and words for what they change in its results."""


class QuantizeWeights(Pass):
    """W ≈ scale · integers for the schemes "int8-weight" and "int4-weight": less to store and to read.

    Integers are the nearest ones, or, with ``compensate``, those that keep the results of a linear layer on the
    calibration data. A weight that something else reads, too, such as a table that is both embedding and head, is
    rounded to the nearest, so that it stays one.
    """

    name, stage, exact = "quantize_weights", "quantize", False
    within_budget: ClassVar[bool] = False
    """Whether it is for steps with a budget."""

    def run(self, program: Program, ctx: Context) -> int:
        sites = quantized_sites(program, ctx, self._wants, _problem)
        if not sites:
            return 0
        return measured_rewrite(ctx, program, "integer weights", lambda: self._quantize(program, ctx, sites))

    def _quantize(self, program: Program, ctx: Context, sites: Sequence[Site]) -> Collection[Site]:
        """Those of the sites whose weights come to be integers."""
        reasons = {site.operator.node: _why_nearest(program, site) for site in sites}
        found = _compensated(program, ctx, [site for site in sites if reasons[site.operator.node] is None])
        bits = _chosen(program, ctx, sites, found)
        for site in bits:
            node = site.operator.node
            if node in found and bits[site] == _BITS[site.step.scheme]:
                put_integers(program, ctx, site, found[node][0], bits[site], found[node][1])
            else:
                quantize_weight(program, ctx, site, bits[site], why=reasons[node] or "")
        return bits

    def _wants(self, step: Quantize) -> bool:
        return step.scheme in _BITS and has_budget(step) == self.within_budget


class QuantizeWeightsWithin(QuantizeWeights):
    """As `quantize_weights`, with a budget: behind what has none, so that the budget counts that, too."""

    name, within_budget = "quantize_weights_within", True


def _chosen(program: Program, ctx: Context, sites: Sequence[Site], found: Compensated) -> dict[Site, int]:
    """How many bits the weight of each layer gets; layers that a budget keeps in floats are left out.

    Of 4 bits a layer goes up to 8 first. What is saved is bytes.
    """
    if not measures(ctx, sites):
        return {site: _BITS[site.step.scheme] for site in sites}

    def level(site: Site, scheme: str) -> Level:
        asked = scheme == site.step.scheme and site.operator.node in found
        integers = found[site.operator.node][0] if asked else nearest(program, site, _BITS[scheme])
        bias, stored = program.constant64(site.operator.bias), site.operator.weight.meta["val"]
        saved = stored.numel() * (8 * stored.element_size() - _BITS[scheme]) / 8
        return Level(scheme, lambda value: computed(site, value, integers, bias), saved)

    schemes = {"int4-weight": ("int4-weight", "int8-weight"), "int8-weight": ("int8-weight",)}
    levels = {site: [level(site, scheme) for scheme in schemes[site.step.scheme]] for site in sites}
    bits = {site: _BITS[chosen.scheme] for site, chosen in choose(program, ctx, levels).items()}
    # A weight that several layers read stays one: with the most bits that any of them needs.
    most: dict[str, int] = {}
    for site in sites:
        name = str(site.operator.weight.target)
        most[name] = max(most.get(name, 0), bits.get(site, _FLOATS))
    shared = {site: most[str(site.operator.weight.target)] for site in sites}
    return {site: count for site, count in shared.items() if count < _FLOATS}


def _why_nearest(program: Program, site: Site) -> str | None:
    """Words for why errors are not compensated; None: they are."""
    if not site.step.compensate:
        return ""
    if not is_compensated(site.operator):
        return "; to the nearest, for errors of linear layers alone are compensated"
    if program.readers(site.operator.weight) != {site.operator.node}:
        return "; to the nearest, for something else reads it, too"
    return None


def _compensated(program: Program, ctx: Context, sites: Iterable[Site]) -> Compensated:
    chosen: Compensated = {}
    waiting = list(sites)
    for found, rows in hessians(program, ctx, (site.operator.input for site in waiting)):
        for site in (site for site in waiting if site.operator.input in found):
            integers, words = _closest(program, site, found)
            chosen[site.operator.node] = integers, f"{words}; on {rows} rows of {ctx.calibration.source}"
    return chosen


def _closest(program: Program, site: Site, found: Mapping[Node, Hessian]) -> tuple[Integers, str]:
    operator, bits, hessian = site.operator, _BITS[site.step.scheme], found[site.operator.input]
    weight, layout = stored_weight(program, operator), Layout.of(operator, site.step.granularity)
    dtype = operator.weight.meta["val"].dtype
    plain_integers = nearest(program, site, bits)
    moved = compensated(weight, layout, bits, dtype, hessian.total)
    turned = operator.kind == "matmul"
    then, *now = (value.T if turned else value for value in (weight, plain_integers.floats(), moved.floats()))
    plain, better = (hessian.error(value, then) for value in now)
    if better.gap > plain.gap:
        return plain_integers, f"{plain.words} of its result; with compensation {better.words}, which is not used"
    return moved, f"{better.words} of its result, {plain.words} without compensation"


def _problem(site: Site) -> str | None:
    operator, block = site.operator, site.step.block
    if operator.kind == "transposed":
        return "no target reads weights of transposed convolutions as integers"
    if block and operator.kind == "conv":
        return "groups are for linear layers and embeddings"
    if operator.kind == "conv" and not site.step.allow_simulated:
        return (
            "no target reads weights of convolutions alone as integers; use scheme='int8', or allow_simulated=True for "
            "a smaller file"
        )
    # A scale of an embedding is of a row, or of a part of one: the row that is looked up is all that is read.
    size, what = (
        (operator.out_features, "columns") if operator.kind == "embedding" else (operator.in_features, "inputs")
    )
    return f"its {size} {what} are no multiple of {block}" if block and size % block else None
