"""Fold batch-norms and other per-channel scales and shifts into the weights next to them."""

from __future__ import annotations

from torch.fx import Node

from fxfreeze.program import Origin, Program
from fxfreeze.rewrite import Context, NodeRewrite, NoMatch, Outcome, fail

from .._absorb import fold_back, fold_forward, operator_name
from .._affine import BATCH_NORM, TARGETS, affine_of
from .._change import Change

COPY_LIMIT = {"batch-norm": 16 << 20, "affine": 1 << 20}
"""A weight that something else reads too is copied for a fold, unless it has more bytes than the fold is worth."""


class FoldAffine(NodeRewrite):
    """y = γ⊙x + β goes into the operator that makes x, else into everything that reads y.

    Between the two may lie operators that keep channels apart (:mod:`fxfreeze.dataflow`), a ReLU only with γ > 0 and
    without β. Forwards, β never goes into a convolution that pads with zeros: it would not reach the padding.
    Backwards, γ > 0 also passes a hard gate, which takes it into its thresholds: γ·gate(h, τ) = gate(γ·h, γ·τ). That is
    for powers of 2, and thresholds of 0: other products are rounded, and where h is often τ itself, as quantized values
    are, the gate would then decide otherwise.
    """

    name, stage, targets = "fold-affine", "fold", TARGETS

    def missed(self, program: Program, miss: NoMatch, ctx: Context) -> None:
        _report(program, ctx, miss.node, "skipped", executes=operator_name(miss.node), detail=miss.reason)

    def rewrite(self, program: Program, node: Node, ctx: Context) -> bool | NoMatch:
        affine = affine_of(program, node)
        if affine is None:
            matters = node.target is BATCH_NORM or "fxfreeze" in node.meta
            return fail("it is no per-channel affine function of one value", node) if matters else False
        back = fold_back(program, affine)
        changes = fold_forward(program, affine) if isinstance(back, NoMatch) else back
        if isinstance(changes, NoMatch):
            assert isinstance(back, NoMatch)
            return fail(f"backwards: {back.reason}; forwards: {changes.reason}", node)
        values = [(change, *change.values(program)) for change in changes]
        for change, weight, bias in values:
            if reason := change.misfit(program, weight, bias, COPY_LIMIT[_kind(node)]):
                return fail(reason, node)
        weights = [item.operator.node for item in changes if isinstance(item, Change)]
        into = ", ".join(f"{operator_name(item)} {program.module_path(item)}" for item in weights)
        _report(program, ctx, node, "rewritten", executes=f"folded into {into.strip()}")
        for change in changes:
            change.apply(program)
        program.replace(node, affine.value)
        return True


def _report(program: Program, ctx: Context, node: Node, outcome: Outcome, *, executes: str, detail: str = "") -> None:
    origin = node.meta.get("fxfreeze")
    step, what = (origin.step, origin.primitive) if isinstance(origin, Origin) else ("", "")
    if not what:
        what = _kind(node)
        if outcome == "skipped" and what == "affine":
            return  # every scalar that meets no weight would be noise
    ctx.ledger.add(
        site=program.module_path(node), step=step, requested=what, outcome=outcome, executes=executes, detail=detail
    )


def _kind(node: Node) -> str:
    return "batch-norm" if node.target is BATCH_NORM else "affine"
