"""Make soft gates hard, and measure what that changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.kernels.gate import KERNEL, fires
from fxfreeze.plan import Gate
from fxfreeze.program import Origin, Program
from fxfreeze.rewrite import Context, Pass

from .._heads import measured_heads
from .._measured import OutputTallies, Tally
from .._operators import arguments

_OPERANDS = ("h", "threshold", "gain", "temperature", "mode")


class Harden(Pass):
    """σ((s(h) − τ) / T) becomes 1[s(h) > τ], its limit for T → 0.

    Lossy. The ledger has, per site, the relative gap ‖hard − soft‖ / ‖soft‖ of the gated values at equal h, the same as
    a signal-to-noise ratio, and the share of neurons that fire; per output, the gap and, where it looks like scores
    of classes, the share of predictions that stay. All are measured on the calibration data, in the model's own dtypes.

    Gates of a step with ``harden=False`` stay soft; :class:`fxfreeze.nn.Gate` layers of the model are hardened.
    """

    name, stage, exact = "harden", "freeze", False

    def run(self, program: Program, ctx: Context) -> int:
        soft = {step.name for step in ctx.plan.steps if isinstance(step, Gate) and not step.harden}
        gates = [node for node in program.graph.find_nodes(op="call_function", target=KERNEL.op)
                 if arguments(node)["temperature"] is not None and _step(node) not in soft]  # fmt: skip
        if not gates:
            return 0
        before = program.clone()
        for gate in gates:
            _harden(gate)
        before, after = measured_heads(before, program)
        twins = [node for node in before.graph.nodes if node.name in {gate.name for gate in gates}]
        _Measurement(before, after, twins, gates).report(ctx)
        return len(gates)


def _step(node: Node) -> str:
    origin = node.meta.get("fxfreeze")
    return origin.step if isinstance(origin, Origin) else ""


def _harden(gate: Node) -> None:
    given = arguments(gate)
    gate.args = (given["h"], given["threshold"], given["gain"], None, given["mode"])
    gate.kwargs = {"score": given["score"], "dim": given["dim"]}


@dataclass
class _Measurement:
    soft: Program
    hard: Program
    twins: Sequence[Node]
    gates: Sequence[Node]
    sites: list[Tally] = field(default_factory=list)

    def report(self, ctx: Context) -> None:
        self.sites = [Tally() for _ in self.gates]
        outputs = OutputTallies(self.soft.outputs)
        with torch.no_grad(), self.soft.computed_once(self.hard):
            for inputs in ctx.calibration.of(self.hard):
                before, after = self._watched(inputs), self.hard.run(*inputs)
                outputs.add(inputs, after, before)
        for gate, tally in zip(self.gates, self.sites, strict=True):
            self._site(ctx, gate, tally, outputs.basis(ctx))
        outputs.report(ctx, "hard gates")

    def _site(self, ctx: Context, gate: Node, tally: Tally, basis: str) -> None:
        origin = gate.meta.get("fxfreeze")
        step, site = (origin.step, origin.site) if isinstance(origin, Origin) else ("", self.hard.module_path(gate))
        share = tally.hits / max(tally.count, 1)
        gate.meta["share"] = share
        ctx.ledger.add(
            site=site, step=step, requested="hard gate", outcome="measured", executes=str(KERNEL.op),
            detail=f"{tally.words}; {share:.1%} of neurons fire; {basis}",
        )  # fmt: skip

    def _watched(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the soft program; at every gate, compare with the hard one on the same h."""
        index = {node: at for at, node in enumerate(self.twins)}

        def call(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            result = node.target(*args, **kwargs)  # type: ignore[operator]
            if node in index:
                given = {**dict(zip(_OPERANDS, args, strict=False)), **kwargs, "temperature": None}
                asked = {key: value for key, value in given.items() if key not in ("gain", "temperature")}
                self.sites[index[node]].add(KERNEL.op(**given), result, fires(**asked))
            return result

        return self.soft.execute(inputs, self.soft.stored, call)
