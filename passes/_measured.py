"""What a lossy rewrite changes in values and outputs, summed over the calibration data and put into words."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node, map_arg

from fxfreeze.masks import density
from fxfreeze.program import Program
from fxfreeze.rewrite import Context


@dataclass
class Tally:
    """Sums over the calibration data."""

    gap: float = 0.0
    size: float = 0.0
    hits: int = 0
    count: int = 0

    def add(self, now: Tensor, then: Tensor, hits: Tensor) -> None:
        """`now` in the place of `then`; `hits`: bools to count, of any shape."""
        self.gap += float((now.double() - then.double()).square().sum())
        self.size += float(then.double().square().sum())
        self.hits += int(hits.sum())
        self.count += hits.numel()

    @property
    def words(self) -> str:
        """‖now − then‖ / ‖then‖, and the same as a signal-to-noise ratio."""
        if self.gap == 0:
            return "no gap"
        ratio = math.sqrt(self.gap / self.size) if self.size else math.inf
        return f"relative gap {ratio:.2g} ({-20 * math.log10(ratio):.0f} dB)" if self.size else "relative gap ∞"


def pruned_words(weight: Tensor | None, mask: Tensor) -> str:
    """How much a mask leaves, and what that does to a weight, where there is one to look at."""
    if weight is None:
        return f"density {density({'': mask}):.2%}"
    tally = Tally()
    tally.add(torch.where(mask, weight, 0.0), weight, mask)
    return f"density {tally.hits / max(tally.count, 1):.2%}, {tally.words}"


def constant_cone(node: Node) -> set[Node] | None:
    """`node` and all that it is computed from; None: an input is among that."""
    cone, stack = set[Node](), [node]
    while stack:
        item = stack.pop()
        if item.op == "placeholder":
            return None
        if item not in cone:
            cone.add(item)
            stack.extend(item.all_input_nodes)
    return cone


@torch.no_grad()
def constant_value(program: Program, node: Node) -> Tensor | None:
    """The value of `node` in the dtypes that it is computed in; None: it hangs on inputs."""
    cone = constant_cone(node)
    if cone is None:
        return None
    known: dict[Node, Tensor] = {}
    for item in [item for item in program.graph.nodes if item in cone]:
        if item.op == "get_attr":
            known[item] = program.stored(item)
        else:
            args, kwargs = map_arg((item.args, dict(item.kwargs)), known.__getitem__)
            known[item] = item.target(*args, **kwargs)
    return known[node]


def same_predictions(now: Tensor, then: Tensor) -> Tensor:
    """Which predictions stay, of what looks like scores of classes, or is a prediction itself; else nothing."""
    if not then.is_floating_point():
        return now == then
    return now.argmax(-1) == then.argmax(-1) if then.ndim > 1 and then.shape[-1] > 1 else then.new_empty(0)


class OutputTallies:
    """The outputs of two programs with the same inputs, batch by batch."""

    def __init__(self, names: Sequence[str]) -> None:
        self.tallies = {name: Tally() for name in names}
        self.rows = 0

    def add(self, inputs: Sequence[Tensor], now: Sequence[Tensor], then: Sequence[Tensor]) -> None:
        self.rows += len(inputs[0]) if inputs[0].ndim else 1
        for tally, after, before in zip(self.tallies.values(), now, then, strict=True):
            tally.add(after, before, same_predictions(after, before))

    def basis(self, ctx: Context) -> str:
        """What the numbers were measured on."""
        return f"on {self.rows} rows of {ctx.calibration.source}"

    def report(self, ctx: Context, what: str) -> None:
        """A row in the ledger for every output; `what`: what changed it."""
        for name, tally in self.tallies.items():
            stay = f"; {tally.hits / tally.count:.2%} of predictions stay" if tally.count else ""
            ctx.ledger.add(
                site="", step="", requested=f"{what}, seen in {name!r}", outcome="measured",
                detail=f"{tally.words}{stay}; {self.basis(ctx)}",
            )  # fmt: skip


def measured_rewrite(ctx: Context, program: Program, what: str, rewrite: Callable[[], Collection[object]]) -> int:
    """Call `rewrite`, report what that changed, and return how much it rewrote; constants are computed once for all."""
    before = program.clone()
    with program.computed_once(before):
        rewritten = rewrite()
        if rewritten:
            measure_outputs(ctx, program, before, what)
    return len(rewritten)


@torch.no_grad()
def measure_outputs(ctx: Context, now: Program, then: Program, what: str) -> None:
    """Run both programs on the calibration data, in their own dtypes, and report what changed."""
    found = OutputTallies(then.outputs)
    with now.computed_once(then):
        for inputs in ctx.calibration.of(now):
            found.add(inputs, now.run(*inputs), then.run(*inputs))
    found.report(ctx, what)
