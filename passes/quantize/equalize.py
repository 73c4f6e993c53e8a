"""Channels of what quantized layers read, brought to like ranges."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.dataflow import arguments
from fxfreeze.program import Program
from fxfreeze.rewrite import Context, NoMatch, Outcome, Pass, fail

from .._absorb import Levels, fold_back, fold_forward
from .._adapters import describe
from .._affine import Affine
from .._change import Change
from .._operators import WeightOperator, apply, aten, weight_operator
from ._calibrate import observe
from ._sites import Site, quantized_sites

NORMS = (aten.layer_norm.default, aten.rms_norm.default)
_REACH = 6
"""A channel is scaled by 2^-6 to 2^6."""
COPY_LIMIT = 1 << 20
"""Bytes of a weight that something else reads too, and that is copied for this."""


class Equalize(Pass):
    """x ⊘ s ⊙ s = x with a number s per channel: 1/s goes into what makes x, s into the layers that read it.

    s = √(largest |x| of the channel / largest |weight| that reads it), so that both get the range of their geometric
    mean, and one scale for all channels fits each of them. Powers of 2 are taken: no product is rounded. 1/s passes
    ReLUs, pools, reshapes and hard gates. That is cross-layer equalisation (Nagel et al., 2019, arXiv 1906.04721,
    section 4.1) with ranges that were measured, and the smoothing of SmoothQuant (Xiao et al., 2022, arXiv 2211.10438)
    where a layer norm makes x.
    """

    name, stage = "equalize", "quantize"

    def run(self, program: Program, ctx: Context) -> int:
        values: dict[Node, Site] = {}
        for site in quantized_sites(program, ctx, lambda step: step.equalize, lambda site: None):
            values.setdefault(site.operator.input, site)
        if not values:
            return 0
        seen = observe(program, ctx, dict.fromkeys(values, "minmax"))
        return sum(_equalize(program, ctx, value, site, seen.observers[value].channels)
                   for value, site in values.items())  # fmt: skip


@dataclass(frozen=True)
class NormGain:
    """Let a layer norm, or an RMS norm, give `gain` (float64, [channels]) times what it gives."""

    node: Node
    gain: Tensor

    def values(self, program: Program) -> tuple[Tensor | None, Tensor | None]:
        """The new weight and bias, as :meth:`Change.values` gives them."""
        weight, bias = (program.constant64(arguments(self.node).get(name)) for name in ("weight", "bias"))
        return self.gain if weight is None else weight * self.gain, None if bias is None else bias * self.gain

    def misfit(self, program: Program, weight: Tensor | None, bias: Tensor | None, limit: int) -> str | None:
        """Powers of 2 within :data:`_REACH` overflow nothing that a norm is learnt with."""
        return None

    def apply(self, program: Program) -> None:
        """Let the norm read them; one without a weight gets one."""
        node, given = self.node, arguments(self.node)
        for name, value in zip(("weight", "bias"), self.values(program), strict=True):
            if value is not None and given.get(name) is not None:
                program.rebind(given[name], value, user=node)
            elif value is not None:
                dtype = node.meta["val"].dtype
                own = program.add_constant(f"{node.name}.weight", value, dtype=dtype, before=node, like=node)
                node.args = (*node.args[:2], own, *node.args[3:])


Move = Change | Levels | NormGain


def _equalize(program: Program, ctx: Context, value: Node, site: Site, ranges: Tensor | None) -> bool:
    found = _moves(program, value, -1 - len(site.operator.kernel), ranges)
    if isinstance(found, str):
        outcome: Outcome = "skipped"
        detail = found
    else:
        changes, gain, ranges = found
        for change in changes:
            change.apply(program)
        before, after = (float(item.max() / item.median().clamp(min=1e-300)) for item in (ranges, ranges / gain))
        outcome, detail = "rewritten", f"largest channel of its input: {before:.1f} → {after:.1f} × the median one"
    ctx.ledger.add(
        site=site.path, step=site.step.name, requested=f"{describe(site.step)}, equalized", outcome=outcome,
        detail=detail,
    )  # fmt: skip
    return outcome == "rewritten"


def _moves(program: Program, value: Node, dim: int, ranges: Tensor | None) -> tuple[list[Move], Tensor, Tensor] | str:
    """The changes to weights, s, and the ranges of channels in float64; a reason why there are none."""
    readers = [operator for user in value.users if isinstance(operator := weight_operator(user), WeightOperator)]
    if ranges is None or ranges.shape != (readers[0].in_features,):
        return "its channels are not known"
    gain, ranges = _gain(program, readers, ranges.double()), ranges.double()
    if bool((gain == 1).all()):
        return "the channels of its input have like ranges"
    # An operator between the two sides, for the functions that ask who could take a scale over.
    between = program.call(aten.mul.Scalar, value, 1.0, before=value.next, like=value)
    value.replace_all_uses_with(between, delete_user_cb=lambda user: user is not between)
    try:
        back = _back(program, Affine(between, value, 1 / gain, None, dim))
        forward = fold_forward(program, Affine(between, value, gain, None, dim))
    finally:
        program.replace(between, value)
        program.graph.erase_node(between)
    changes: list[Move] = []
    for found in (back, forward):
        if isinstance(found, NoMatch):
            return found.reason
        changes += found
    reasons = (change.misfit(program, *change.values(program), COPY_LIMIT) for change in changes)
    return next(filter(None, reasons), None) or (changes, gain, ranges)


def _back(program: Program, affine: Affine) -> list[Move] | NoMatch:
    """The changes on the side that makes the value."""
    node = affine.value
    if node.target not in NORMS:
        found = fold_back(program, affine)
        return found if isinstance(found, NoMatch) else [*found]
    if affine.dim != -1:
        return fail(f"the channels of {node.name} lie along another dim than the one it norms", node)
    given = arguments(node)
    learnt = [given.get(name) for name in ("weight", "bias")]
    constant = all(item is None or program.is_constant(item) for item in learnt)
    if not constant or len(given["normalized_shape"]) != 1 or set(node.users) != {affine.node}:
        return fail(f"{node.name} is read elsewhere too, or is no norm of one dim with constants", node)
    return [NormGain(node, affine.gain)]


def _gain(program: Program, readers: list[WeightOperator], ranges: Tensor) -> Tensor:
    """s as powers of 2, about 1 in the geometric mean, and 1 for channels that are 0 everywhere."""
    weights = torch.zeros_like(ranges)
    for operator in readers:
        weight = program.constant64(operator.weight)
        if weight is None:
            continue  # computed: fold_forward refuses it
        each = (operator.groups, -1, operator.shape[1], math.prod(operator.kernel))
        canonical = apply(operator.to_canonical(), weight).abs().reshape(each)
        weights = torch.maximum(weights, canonical.amax((1, 3)).flatten().to(ranges.device))
    live = (ranges > 0) & (weights > 0)
    if not bool(live.any()):
        return torch.ones_like(ranges)
    logs = 0.5 * (torch.where(live, ranges, 1.0).log2() - torch.where(live, weights, 1.0).log2())
    logs = torch.round(logs - logs[live].mean()).clamp(-_REACH, _REACH)
    return torch.where(live, 2.0**logs, 1.0)
