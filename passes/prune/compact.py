"""Remove channels, neurons and heads that count for nothing: constants and values get smaller, the function stays."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.constants import Edit
from fxfreeze.coupling import INPUT, OUTPUT, Coupling, Group, coupling, is_part
from fxfreeze.errors import PassError
from fxfreeze.program import Program
from fxfreeze.rewrite import Context, Outcome, Pass

from .._operators import FORMS, WeightOperator, apply, aten
from ._constancy import summed
from ._reading import Reading, Site, is_gated
from ._removal import remove

_ROUNDS = 64


class Compact(Pass):
    """Units that are removed together (:mod:`fxfreeze.coupling`) go where they count for nothing anywhere.

    A unit counts where values with entries of it are multiplied by a weight, or summed otherwise. It does not if its
    entries are 0 there, for every input: their rows and biases are, and everything behind them keeps 0; or if the
    weight has columns of 0 for them, in all rows that are read themselves. If they are another number each, the same
    for every input and position, what they add up to goes into the bias, which is made where there is none; not into a
    convolution that pads, where the edges would be others. Of a group of which no unit counts one stays, unless
    everything that they have entries in has others, too.

    What goes with the units: rows, columns, biases, parameters of norms, per-channel constants; and the sizes that
    reshapes, splits, expansions and groups name. Neurons of a gate are the business of ``dead-neurons``.

    Removing is repeated until nothing is left to remove: a row that goes frees what only it read.
    """

    name, stage = "compact", "prune"

    def run(self, program: Program, ctx: Context) -> int:
        count, folded = 0, _Folded({})
        for _ in range(_ROUNDS):
            found = coupling(program)
            reading = Reading(program, found)
            judged = [verdict for group in found.groups if (verdict := _judge(program, reading, group)) is not None]
            if any(bool(verdict.folds.any()) for verdict in judged):
                folded = _fold(program, found, reading, judged)
                count += 1
                continue
            kept = {verdict.group.axis: ~verdict.gone for verdict in judged if bool(verdict.gone.any())}
            if not kept:
                _report_rest(ctx, judged)
                return count
            _report(ctx, judged, folded)
            remove(program, found, kept)
            program.sweep()
            count, folded = count + len(kept), _Folded({})
        raise PassError(
            f"{self.name} still finds something to remove after {_ROUNDS} rounds", where=self.name,
            hint="this is a defect of the pass, not of the model",
        )  # fmt: skip


@dataclass(frozen=True)
class _Verdict:
    """What becomes of the units of one group: bool [units].

    Attributes:
        gone: those that are removed.
        folds: those that could be, once what they add up to is in a bias.
        zero, unread, fixed: those that are 0 at least in one place where they count, and read nowhere else; read
            nowhere; a number each.
        reason: of units that go, why one stays that might as well; of others, why they stay.
    """

    group: Group
    sites: list[Site]
    gone: Tensor
    folds: Tensor
    zero: Tensor
    unread: Tensor
    fixed: Tensor
    reason: str


def _judge(program: Program, reading: Reading, group: Group) -> _Verdict | None:
    """None where nothing is to be said."""
    sites = reading.sites(group.axis)
    if not sites or is_gated(group) or group.reason == INPUT:
        return None
    if group.reason == OUTPUT:  # a caller reads what no operator does
        sites = [replace(site, unread=torch.zeros_like(site.zero), silent=site.zero) for site in sites]
    unread, silent = (torch.stack([getattr(site, name) for site in sites]).all(0) for name in ("unread", "silent"))
    fixed = silent if group.reason else torch.stack([site.silent | site.fixed for site in sites]).all(0)
    free = torch.stack([site.silent | (site.fixed & (site.stuck is None)) for site in sites]).all(0)
    if not bool(fixed.any()):
        return None
    gone, reason = free.clone(), ""
    if group.reason is not None:
        gone, reason = torch.zeros_like(free), group.reason
    elif not bool(free.any()):
        reason = next(str(site.stuck) for site in sites if site.stuck and bool((fixed & ~site.silent).any()))
    elif bool(gone.all()) and not is_part(group):
        gone[int(silent.to(torch.int8).argmax())] = False  # one that needs no fold, if there is one
        reason = "; one has to stay"
    return _Verdict(group, sites, gone, gone & ~silent, silent & ~unread, unread, fixed & ~silent, reason)


# ---------------------------------------------------------------------- folding


@dataclass(frozen=True)
class _Folded:
    """Of groups, known by what their first unit has of their first constant, units that went into a bias, and where."""

    into: dict[tuple[str, int, tuple[int, ...]], tuple[Tensor, str]]

    def of(self, group: Group) -> tuple[Tensor, str]:
        return self.into.get(_key(group), (torch.zeros(group.size, dtype=torch.bool), ""))


def _key(group: Group) -> tuple[str, int, tuple[int, ...]]:
    first = group.members[0]
    return str(first.node.target), first.dim, tuple(first.entries[0].tolist())


def _fold(program: Program, found: Coupling, reading: Reading, judged: list[_Verdict]) -> _Folded:
    """Put what units add up to into biases, and zeros in their columns: then nothing reads them."""
    columns: dict[Node, Tensor] = {}
    into: dict[tuple[str, int, tuple[int, ...]], tuple[Tensor, str]] = {}
    for verdict in judged:
        if not bool(verdict.folds.any()):
            continue
        places = []
        for site in verdict.sites:
            units = verdict.folds & ~site.silent
            if bool(units.any()):
                made = reading.made[site.node]
                own = columns.setdefault(site.node, torch.zeros(made.in_features, dtype=torch.bool))
                own[reading.features(made, verdict.group.axis)[units].flatten()] = True
                places.append(program.module_path(site.node) or str(made.weight.target))
        into[_key(verdict.group)] = verdict.folds, ", ".join(dict.fromkeys(places))
    for node, own in columns.items():
        made = reading.made[node]
        _into_bias(program, made, own, torch.where(own, reading.numbers(made), 0.0).nan_to_num())
    return _Folded(into)


def _into_bias(program: Program, made: WeightOperator, columns: Tensor, numbers: Tensor) -> None:
    """Add what a weight makes of input features that are these numbers to the bias, and clear their columns."""
    weight = program.constant64(made.weight)
    assert weight is not None
    device, groups = weight.device, made.groups
    totals = summed(apply(made.to_canonical(), weight)).reshape(groups, -1, made.shape[1])
    shift = (totals * numbers.to(device).reshape(groups, 1, -1)).sum(2).flatten()
    stays = (~columns).reshape(groups, 1, -1).expand(-1, made.out_features // groups, -1).reshape(made.shape[:2])

    def cleared(value: Tensor) -> Tensor:
        canonical = apply(made.to_canonical(), value)
        mask = stays.reshape(*stays.shape, *[1] * len(made.kernel)).to(value.device)
        return apply(made.from_canonical(), torch.where(mask, canonical, 0.0))

    _refine(program, made.weight, cleared, made.node)
    if made.bias is not None:
        _refine(program, made.bias, lambda bias: bias + shift, made.node)
        return
    name = f"{str(made.weight.target).rpartition('.')[0]}.bias".lstrip(".")
    dtype = made.weight.meta["val"].dtype
    if FORMS[made.node.target].bias is not None:
        bias = program.add_constant(name, shift, dtype=dtype, before=made.node, like=made.node)
        made.node.args, made.node.kwargs = made.call_arguments(bias=bias)
        return
    after = made.node.next
    bias = program.add_constant(name, shift, dtype=dtype, before=after, like=made.node)
    program.replace(made.node, program.call(aten.add.Tensor, made.node, bias, before=after, like=made.node))


def _refine(program: Program, constant: Node, edit: Edit, user: Node) -> None:
    fold = program.folds.get(str(constant.target))
    new = program.refine(constant, edit, user=user)
    if fold is not None:
        program.folds[str(new.target)] = replace(fold, base=fold.base.then(edit))


# ---------------------------------------------------------------------- the ledger


def _report(ctx: Context, judged: list[_Verdict], folded: _Folded) -> None:
    """What goes now."""
    for verdict in judged:
        units, places = folded.of(verdict.group)
        gone, was = verdict.gone, units & verdict.gone
        said = {"all zero": verdict.zero & gone & ~was, "read by nothing": verdict.unread & gone & ~was,
                f"constant, now in the bias of {places}": was}  # fmt: skip
        if bool(gone.any()):
            _row(ctx, verdict.group, "rewritten", gone, said, verdict.reason)


def _report_rest(ctx: Context, judged: list[_Verdict]) -> None:
    """What stays in the end, though it counts for nothing."""
    for verdict in judged:
        said = {"all zero": verdict.zero, "read by nothing": verdict.unread, "constant": verdict.fixed}
        units = verdict.zero | verdict.unread | verdict.fixed
        stay = "stays" if int(units.sum()) == 1 else "stay"
        _row(ctx, verdict.group, "skipped", units, said, f", but {stay}: {verdict.reason}")


def _row(ctx: Context, group: Group, outcome: Outcome, units: Tensor, said: dict[str, Tensor], end: str) -> None:
    parts = [f"{int(own.sum())} {what}" if int(own.sum()) < int(units.sum()) else what
             for what, own in said.items() if bool(own.any())]  # fmt: skip
    ctx.ledger.add(
        site=group.name.removesuffix(".weight"), step="", requested="compaction", outcome=outcome,
        executes=f"{group.size - int(units.sum()) * (outcome == 'rewritten')} {noun(group)}",
        detail=f"{int(units.sum())} of {group.size} {noun(group)}, {' and '.join(parts)}{end}",
    )  # fmt: skip


def noun(group: Group) -> str:
    """What the units of a group are called: after what makes them."""
    member = next((item for item in group.members if item.role == "row"), group.members[0])
    each = int(member.entries.shape[1])
    kind = "channels" if any("conv" in str(reader.target) for reader in member.readers) else "neurons"
    return kind if each == 1 else f"units of {each} rows"
