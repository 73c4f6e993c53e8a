"""Return what a loss is to see."""

from __future__ import annotations

from torch.fx import Node

from fxfreeze.plan import Tap
from fxfreeze.program import Program
from fxfreeze.rewrite import Context, Pass

from .._adapters import describe
from ._sites import find_results, numbered, resolve


class InsertTaps(Pass):
    """Return what the modules that the plan taps return, with all that its other steps put there.

    An adapted module keeps it beside its outputs; a program that is compiled has lost it.
    """

    name, stage, exact = "insert-taps", "adapt", False

    def run(self, program: Program, ctx: Context) -> int:
        if not any(isinstance(step, Tap) for step in ctx.plan.steps):
            return 0
        found: dict[str, Node] = {}
        offers = find_results(program)
        for index, step in enumerate(ctx.plan.steps):
            if not isinstance(step, Tap):
                continue
            paths, refused = resolve(offers, step, index)
            rows = [(path, "rewritten", "returned while it trains") for path in paths]
            rows += [(path, "refused", f"{path} {reason}") for path, reason in refused.items()]
            for path, outcome, detail in rows:
                ctx.ledger.add(site=path, step=step.name, requested=describe(step), outcome=outcome, detail=detail)  # type: ignore[arg-type]
            values = numbered({path: offers.operators[path] for path in paths})
            found |= {f"{step.name}.{site}": value.node for site, value in values.items()}
        if found:
            program.tap(found)
        return len(found)
