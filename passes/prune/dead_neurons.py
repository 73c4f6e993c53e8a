"""Remove neurons that never fire: the gate before them shuts them out for every input in its declared range."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxfreeze.program import Origin, Program
from fxfreeze.rewrite import Context, NoMatch, Outcome, Pass

from .._gates import GATE, HardGate, hard_gate
from .._intervals import Bounds, Interval
from ._channels import Channels, channels


class DeadNeurons(Pass):
    """A neuron of a hard gate is dead where its score cannot exceed its threshold, or its gain is 0: it is always 0.

    Upper bounds of the scores come from interval arithmetic over the ranges that the plan declares for the inputs, for
    all positions and, with modes, for all modes; they have room for the rounding of the storage dtypes. What a neuron
    costs is its row in the operators that make its score and its column in those that read it; both go, and with them
    its entries in all that lies between. A neuron that nothing reads, because its columns are 0, goes too.

    Where something else reads what the gate is made from, or the gate's result is not only read by columns, the gate
    stays as it is, and the ledger says how many neurons are dead and why they stay. Of a gate whose neurons are all
    dead one stays, for a layer without neurons is no layer to most targets. The gate's ``meta["kept"]`` holds which of
    the first neurons are left.

    Source: interval bound propagation, arXiv 1810.12715; removal by bounds: Serra et al., "Lossless compression of
    deep neural networks" (arXiv 2001.00218).
    """

    name, stage = "dead-neurons", "prune"

    def run(self, program: Program, ctx: Context) -> int:
        count, bounds = 0, Bounds(program, rounding=True)
        for node in program.graph.find_nodes(op="call_function", target=GATE):
            gate = hard_gate(program, node)
            if isinstance(gate, NoMatch):
                ctx.near_misses.append(gate)
                continue
            count += self._prune(program, gate, bounds.of(gate.value), ctx)
        return count

    def _prune(self, program: Program, gate: HardGate, bound: Interval | None, ctx: Context) -> bool:
        found = channels(program, gate)
        dead = _dead(program, gate, bound, None if isinstance(found, NoMatch) else found)
        if not bool(dead.either.any()):
            return False
        total = dead.either.numel()
        if isinstance(found, NoMatch):
            ctx.near_misses.append(found)
            _report(program, ctx, gate, dead, "skipped", f", but stay: {found.reason}", total)
            return False
        if bool((dead.either & found.waking(program, total)).any()):
            # They would be counted as silent, and are not.
            end = ", but stay: a gate behind it has a threshold below 0, and fires where they are silent"
            _report(program, ctx, gate, dead, "skipped", end, total)
            return False
        kept = (~dead.either).nonzero().flatten().tolist() or [0]
        if len(kept) == total:
            _report(program, ctx, gate, dead, "skipped", ", but it is the only one", total)
            return False
        end = ": removed" + (", apart from one, since they are all" if bool(dead.either.all()) else "")
        _report(program, ctx, gate, dead, "rewritten", end, len(kept))
        found.keep(program, kept)
        return True


@dataclass(frozen=True)
class _Dead:
    """Which neurons never fire, and which of the others are multiplied by 0: bool [C]."""

    silent: Tensor
    unread: Tensor

    @property
    def either(self) -> Tensor:
        return self.silent | self.unread


def _dead(program: Program, gate: HardGate, bound: Interval | None, found: Channels | None) -> _Dead:
    size = int(gate.node.meta["val"].shape[gate.dim])
    silent = torch.zeros(size, dtype=torch.bool) if bound is None else never_fires(program, gate, bound)
    unread = torch.zeros(size, dtype=torch.bool) if found is None else found.unread(program, size)
    if gate.gain is not None and (gain := program.constant64(gate.gain)) is not None:
        unread |= (gain == 0).reshape(-1, size).all(0).cpu()
    return _Dead(silent, unread & ~silent)


def never_fires(program: Program, gate: HardGate, bound: Interval) -> Tensor:
    """Which neurons' scores are at most their thresholds within `bound`, whatever the mode: bool [C]."""
    score = bound.magnitude if gate.score == "abs" else bound.high
    highest = score.movedim(gate.dim, 0).flatten(1).amax(1) if score.ndim > 1 else score
    levels = program.constant64(gate.threshold)
    assert levels is not None
    lowest = levels.reshape(-1, highest.numel()).amin(0).cpu()
    # The threshold is rounded when it is stored, and when it is brought to the dtype of the score.
    room = 4 * torch.finfo(gate.value.meta["val"].dtype).eps * lowest.abs()
    return highest <= lowest - torch.where(lowest.isfinite(), room, 0.0)  # nothing is above a threshold of infinity


def _report(program: Program, ctx: Context, gate: HardGate, dead: _Dead, outcome: Outcome, end: str, left: int) -> None:
    node, total = gate.node, dead.either.numel()
    origin = node.meta.get("fxfreeze")
    step, site = (origin.step, origin.site) if isinstance(origin, Origin) else ("", program.module_path(node))
    never, unread = int(dead.silent.sum()), int(dead.unread.sum())
    said = [f"{never} of {total} neurons never fire{_ranges(program)}"] if never else []
    said += [f"{unread} {'more ' if never else f'of {total} neurons '}are multiplied by 0"] if unread else []
    ctx.ledger.add(
        site=site, step=step, requested="dead neurons", outcome=outcome,
        executes=f"{left} neurons above {gate.threshold.target}", detail=" and ".join(said) + end,
    )  # fmt: skip


def _ranges(program: Program) -> str:
    """The ranges they were bounded over, as " for image in [0, 1]"."""
    declared = [f"{spec.name} in [{spec.low:g}, {spec.high:g}]" for spec in program.inputs
                if spec.low is not None and spec.high is not None]  # fmt: skip
    return f" for {', '.join(declared)}" if declared else ""
