"""Which channels stay: groups of them that can only go together, what each is worth, and how many of each group fit.

The groups are those of :mod:`fxfreeze.coupling`, in the graph with all adapters and grafts in it. Groups of one layer
may overlap (the heads of an attention, and the entries of all heads): channels are then the more numerous ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.coupling import Group, Member, coupling_groups, is_part
from fxfreeze.errors import PlanError
from fxfreeze.plan import Prune
from fxfreeze.program import Program

from .._adapters import BASE, DELTA, MASK
from .._operators import FORMS, WeightOperator, apply, arguments, aten, weight_operator
from ._masked import Place, Places

_NORMS = frozenset({aten.batch_norm.default, aten.instance_norm.default, aten.group_norm.default})
_MEETS = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor})
"""Operators that leave a channel of zeros zero where what it meets is zero too."""


@dataclass(eq=False)
class Channels:
    """A group of channels, and what is theirs.

    Attributes:
        group: as coupled.
        rows: weight of a layer that makes them → which of its output features are whose, int64 [channels, k].
        others: other parameter, a bias or one of a norm → the dim and which entries along it are whose.
    """

    group: Group
    rows: dict[Place, Tensor]
    others: dict[Place, tuple[int, Tensor]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return self.group.size

    @property
    def paths(self) -> list[str]:
        return [place.path for place in self.rows]


# ---- which go together


def find_channels(
    program: Program, places: Places, layers: Mapping[str, Sequence[Place]]
) -> tuple[list[Channels], dict[str, str]]:
    """The groups that may lose channels, and all of whose layers are among `layers`.

    Returns:
        They in graph order, and for every path of `layers` that is in none the reason, in a sentence without a subject.
    """
    makers = {reader: place for place in places if place.operator for reader, _ in place.readers}
    named = {place for held in layers.values() for place in held}
    found: list[Channels] = []
    taken: dict[Place, Tensor] = {}
    reasons: dict[str, str] = {}
    groups = coupling_groups(program)
    for group in sorted(groups, key=lambda group: -group.size):
        channels = Channels(group, _rows(group, makers))
        reason = f"their axis {group.reason}" if group.reason else _misfit(channels, named)
        if reason is None and channels.rows and not _overlap(channels, taken):
            channels.others = _others(group, places)
            found.append(channels)
        elif reason is not None:
            reasons |= {path: f"makes {group.size} channels that stay, as {reason}" for path in channels.paths
                        if path not in reasons}  # fmt: skip
    found.sort(key=lambda channels: groups.index(channels.group))
    ready = {path for channels in found for path in channels.paths}
    return found, {path: reasons.get(path, "makes one channel only") for path in layers if path not in ready}


def _rows(group: Group, makers: Mapping[Node, Place]) -> dict[Place, Tensor]:
    found: dict[Place, Tensor] = {}
    for value in group.values:
        place = makers.get(value.node)
        if place is not None and value.dim == _channel_dim(value.node, len(place.shape)):
            found.setdefault(place, value.entries)
    return found


def _channel_dim(node: Node, ndim: int) -> int:
    """Where the channels are in what a layer with a weight of `ndim` dims reads and returns."""
    return int(node.meta["val"].ndim) - 1 - max(ndim - 2, 0)


def _misfit(channels: Channels, named: set[Place]) -> str | None:
    """Why the step may not take these channels."""
    if outside := [place.path for place in channels.rows if place not in named]:
        return f"they are made by {outside[0]} too, which the step does not name"
    for member in channels.group.members:
        origin = member.node.meta.get("fxfreeze")
        if member.role == "row" and origin is not None and origin.primitive not in (BASE, DELTA, MASK):
            return f"they are made by what {origin.step!r} adds, too"
    return None


def _overlap(channels: Channels, taken: dict[Place, Tensor]) -> bool:
    """Whether rows are another group's already; else they are noted as this one's."""
    for place, entries in channels.rows.items():
        assert place.operator is not None
        held = taken.setdefault(place, torch.zeros(place.operator.out_features, dtype=torch.bool))
        if bool(held[entries.flatten()].any()):
            return True
    for place, entries in channels.rows.items():
        taken[place][entries.flatten()] = True
    return False


def _others(group: Group, places: Places) -> dict[Place, tuple[int, Tensor]]:
    members: dict[str, Member] = {}
    for member in group.members:
        if "fxfreeze" not in member.node.meta and member.role != "column":
            members.setdefault(str(member.node.target), member)
    return {place: (members[name].dim, members[name].entries) for place in places
            if (name := str(place.constant.target)) in members and place.operator is None
            and all(_is_zeroed(*reader) for reader in place.readers)}  # fmt: skip


def _is_zeroed(reader: Node, operand: Node) -> bool:
    """Whether zeros of a parameter make, or leave, zeros of a value that is zero before."""
    given, form = arguments(reader), FORMS.get(reader.target)
    if reader.target in _NORMS:
        return operand in (given["weight"], given["bias"])
    return reader.target in _MEETS or (form is not None and form.bias is not None and given[form.bias] is operand)


# ---- what they are worth


def scores(
    program: Program, step: Prune, found: Sequence[Channels], batches: Callable[[], Iterable[Sequence[Tensor]]]
) -> list[Tensor]:
    """What every channel of every group is worth, float64 [channels].

    Args:
        batches: flat inputs to differentiate on, for the criterion taylor.
    """
    if step.criterion == "batchnorm":
        return [_relative(sum(_gains(program, channels))) for channels in found]
    weights = list(dict.fromkeys(place for channels in found for place in channels.rows))
    if step.criterion == "taylor":
        sizes = _sensitivities(program, weights, batches())
    else:
        sizes = {place: cast(Tensor, place.value(program)).abs() for place in weights}
    rows = {place: apply(cast(WeightOperator, place.operator).to_canonical(), size).double().flatten(1).sum(1)
            for place, size in sizes.items()}  # fmt: skip
    totals = [sum(rows[place][entries.to(rows[place].device)].sum(1).cpu() for place, entries in channels.rows.items())
              for channels in found]  # fmt: skip
    # What a layer sums over grows with its width; a change of the loss is one, whoever makes it.
    return [cast(Tensor, total) if step.criterion == "taylor" else _relative(total) for total in totals]


def has_gains(channels: Channels) -> bool:
    """Whether a batch norm scales the channels."""
    return any(map(_is_gain, channels.others))


def _gains(program: Program, channels: Channels) -> Iterable[Tensor]:
    for place, (_, entries) in channels.others.items():
        if _is_gain(place):
            gain = cast(Tensor, place.value(program)).double().abs().cpu()
            yield gain[entries].sum(1)


def _is_gain(place: Place) -> bool:
    reader, operand = place.readers[0]
    return reader.target is aten.batch_norm.default and arguments(reader)["weight"] is operand


def _relative(total: Any) -> Tensor:
    """Divided by the mean of the group; zeros stay."""
    value = cast(Tensor, total)
    return value / value.mean().clamp_min(torch.finfo(value.dtype).tiny)


def _sensitivities(
    program: Program, weights: Sequence[Place], batches: Iterable[Sequence[Tensor]]
) -> dict[Place, Tensor]:
    """|w · ∂L/∂w| summed over the batches, L half the sum of the squares of all floating outputs."""
    found = {place: torch.zeros(place.shape, dtype=torch.float64) for place in weights}
    wanted = {reader: (place, operand) for place in weights for reader, operand in place.readers}
    for inputs in batches:
        leaves: dict[Node, Tensor] = {}

        def call(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: dict[Node, Tensor] = leaves) -> Any:
            if node in wanted:
                spot = node.args.index(wanted[node][1])
                leaves[node] = args[spot].detach().requires_grad_()
                args = (*args[:spot], leaves[node], *args[spot + 1 :])
            return node.target(*args, **kwargs)  # type: ignore[operator]

        with torch.enable_grad():
            outputs = program.execute(
                inputs, lambda node: program.state[str(node.target)].detach().to(node.meta["val"].dtype), call
            )
            loss = sum(value.double().square().sum() / 2 for value in outputs if value.requires_grad)
        if not isinstance(loss, Tensor):
            continue
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        totals: dict[Place, Tensor] = {}
        for node, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                place = wanted[node][0]
                totals[place] = totals.get(place, torch.zeros(())) + gradient.double().cpu()
        for place, total in totals.items():
            found[place] += (cast(Tensor, place.value(program)).double().cpu() * total).abs()
    return found


# ---- how many stay


def choose(
    program: Program, step: Prune, places: Places, found: Sequence[Channels], worth: Sequence[Tensor]
) -> tuple[float, list[Tensor]]:
    """Which channels of every group stay: those worth most, as many as `density` or `flops` allow; and the share of the
    multiply-accumulates that is left.

    Raises:
        PlanError: even with the fewest channels more multiply-accumulates stay.
    """
    counts = _counts_by_share if step.scope == "layer" else _counts_by_rank(worth)
    sizes = [channels.size for channels in found]
    work, bundles = Work(program, places, found), _bundles(found)

    def masks(removed: int) -> list[Tensor]:
        return _kept(counts(sizes, removed), worth, bundles, step.multiple)

    def fits(removed: int) -> bool:
        chosen = masks(removed)
        if step.flops is not None:
            return work.share(chosen) <= step.flops
        return sum(int(mask.sum()) for mask in chosen) <= float(step.density or 0) * sum(sizes) + 0.5

    low, high = 0, sum(sizes)
    if step.flops is not None and not fits(high):
        raise PlanError(
            f"flops={step.flops}: with the fewest channels {work.share(masks(high)):.1%} of multiply-accumulates stay",
            where=step.name, hint="name more layers, or ask for a smaller multiple",
        )  # fmt: skip
    while low < high:  # what stays shrinks with what is removed
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    kept = masks(low)
    return work.share(kept), kept


def channel_masks(found: Sequence[Channels], kept: Sequence[Tensor]) -> dict[Place, Tensor]:
    """Masks of all parameters that channels have entries in, in the layouts they are stored in."""
    masks: dict[Place, Tensor] = {}
    for channels, stays in zip(found, kept, strict=True):
        for place, entries in channels.rows.items():
            operator = cast(WeightOperator, place.operator)
            rows = _alive(operator.out_features, entries, stays).reshape(operator.per_row()).expand(operator.shape)
            _join(masks, place, apply(operator.from_canonical(), rows))
        for place, (dim, entries) in channels.others.items():
            shape = [1] * len(place.shape)
            shape[dim] = -1
            _join(masks, place, _alive(place.shape[dim], entries, stays).reshape(shape).expand(place.shape))
    return masks


def _join(masks: dict[Place, Tensor], place: Place, mask: Tensor) -> None:
    masks[place] = (masks[place] & mask if place in masks else mask).contiguous()


def _alive(count: int, entries: Tensor, stays: Tensor) -> Tensor:
    """Which of `count` features stay when channels go that own `entries`."""
    return torch.ones(count, dtype=torch.bool).index_fill_(0, entries[~stays].flatten(), False)


@dataclass(frozen=True)
class _Bundle:
    """Groups that the same layers make, between channels of others: so many of them stay that those layers' widths are
    round.

    Attributes:
        groups: their indices.
        layers: of every layer that makes them, how many of its features no group has, and the other groups that have
            some, with how many each of their channels has.
    """

    groups: tuple[int, ...]
    layers: tuple[tuple[int, tuple[tuple[int, int], ...]], ...] = ()

    def base(self, done: Mapping[int, int]) -> int:
        """How many features the layers have already, from what other groups keep: the fewest that one has."""
        return min(
            (rest + sum(done.get(at, 0) * each for at, each in others) for rest, others in self.layers), default=0
        )


def _bundles(found: Sequence[Channels]) -> list[_Bundle]:
    """All groups, those that many layers make first."""
    makers: dict[Place, list[tuple[int, int]]] = {}
    together: dict[Any, list[int]] = {}
    for at, channels in enumerate(found):
        for place, entries in channels.rows.items():
            makers.setdefault(place, []).append((at, entries.shape[1]))
        together.setdefault(frozenset(channels.rows) if is_part(channels.group) else at, []).append(at)

    def bundle(groups: Sequence[int]) -> _Bundle:
        first, layers = found[groups[0]], []
        for place in first.rows if is_part(first.group) else ():
            held = sum(found[at].size * each for at, each in makers[place])
            others = tuple((at, each) for at, each in makers[place] if at not in groups)
            layers.append((cast(WeightOperator, place.operator).out_features - held, others))
        return _Bundle(tuple(groups), tuple(layers))

    return [bundle(groups) for groups in sorted(together.values(), key=lambda groups: -len(found[groups[0]].rows))]


def _kept(counts: Sequence[int], worth: Sequence[Tensor], bundles: Sequence[_Bundle], multiple: int) -> list[Tensor]:
    """Which channels of every group stay, when about `counts` of them shall."""
    kept = [torch.zeros(len(score), dtype=torch.bool) for score in worth]
    done: dict[int, int] = {}
    for bundle in bundles:
        values = torch.cat([worth[at] for at in bundle.groups])
        count = _rounded(sum(counts[at] for at in bundle.groups), len(values), multiple, bundle.base(done))
        stays = torch.zeros(len(values), dtype=torch.bool)
        stays[values.sort(descending=True, stable=True).indices[:count]] = True
        for at, mask in zip(bundle.groups, stays.split([len(worth[at]) for at in bundle.groups]), strict=True):
            kept[at], done[at] = mask, int(mask.sum())
    return kept


def _rounded(count: int, size: int, multiple: int, base: int = 0) -> int:
    """As many that `base` and they are the nearest multiple; at least one multiple, and at most all there are."""
    if count >= size:
        return size
    return min(size, max(0, max(multiple, multiple * int((base + count) / multiple + 0.5)) - base))


Counts = Callable[[Sequence[int], int], list[int]]
"""Sizes of all groups, and how many channels are removed in all → how many of each group stay, before rounding."""


def _counts_by_share(sizes: Sequence[int], removed: int) -> list[int]:
    """The same share of every group."""
    left = 1 - removed / max(sum(sizes), 1)
    return [math.ceil(size * left - 1e-9) for size in sizes]


def _counts_by_rank(worth: Sequence[Tensor]) -> Counts:
    """Those that are worth least go first, of whichever group; of equals, those of the group with most left."""
    owners = torch.cat([torch.full((len(score),), at) for at, score in enumerate(worth)])
    gone = torch.cat([(score.argsort(stable=True).argsort() + 1) / len(score) for score in worth])
    first = gone.argsort(stable=True)
    order = first[torch.cat(list(worth))[first].argsort(stable=True)]

    def counts(sizes: Sequence[int], removed: int) -> list[int]:
        gone = owners[order[:removed]].bincount(minlength=len(sizes)).tolist()
        return [size - lost for size, lost in zip(sizes, gone, strict=True)]

    return counts


@dataclass(frozen=True)
class _Layer:
    """One call of a layer: how many places it multiplies at, its groups, and whose its features are.

    Attributes:
        makes, reads: (group of channels, which features are whose), of what comes out and of what goes in.
    """

    places: int
    groups: int
    outs: int
    ins: int
    makes: tuple[tuple[int, Tensor], ...]
    reads: tuple[tuple[int, Tensor], ...]

    def work(self, kept: Sequence[Tensor] | None) -> float:
        made, read = (
            self._alive(count, owners, kept) for count, owners in ((self.outs, self.makes), (self.ins, self.reads))
        )
        return self.places * float((made * read).sum())

    def _alive(self, count: int, owners: tuple[tuple[int, Tensor], ...], kept: Sequence[Tensor] | None) -> Tensor:
        """How many features of every group of the convolution there are."""
        alive = torch.ones(count, dtype=torch.bool)
        for at, entries in owners if kept is not None else ():
            alive &= _alive(count, entries, cast(Sequence[Tensor], kept)[at])
        return alive.reshape(self.groups, -1).sum(1).double()


class Work:
    """Multiply-accumulates of all layers with weights, by how many channels stay, at the sizes the model was traced at.

    Attention's products of two values, and grafted modules, are not counted.
    """

    def __init__(self, program: Program, places: Places, found: Sequence[Channels]) -> None:
        owners: dict[tuple[Node, int], list[tuple[int, Tensor]]] = {}
        for at, channels in enumerate(found):
            for value in channels.group.values:
                owners.setdefault((value.node, value.dim), []).append((at, value.entries))
        weights = [place for place in places if place.operator and place.operator.kind != "embedding"]
        self.layers = [_layer(reader, owners) for place in weights for reader, _ in place.readers]
        self.all = sum(layer.work(None) for layer in self.layers)

    def share(self, kept: Sequence[Tensor]) -> float:
        """What of them stays when each group keeps the channels of its mask."""
        return sum(layer.work(kept) for layer in self.layers) / max(self.all, 1.0)


def _layer(node: Node, owners: Mapping[tuple[Node, int], Sequence[tuple[int, Tensor]]]) -> _Layer:
    operator = cast(WeightOperator, weight_operator(node))
    source, result = operator.input, node
    makes, reads = (
        tuple(owners.get((value, _channel_dim(value, len(operator.shape))), ())) for value in (result, source)
    )
    # A transposed convolution multiplies where its input is, any other layer where its result is.
    at = source if operator.kind == "transposed" else result
    features = operator.in_features if operator.kind == "transposed" else operator.out_features
    places = math.prod(_hint(size) for size in at.meta["val"].shape) // features * math.prod(operator.kernel)
    return _Layer(places, operator.groups, operator.out_features, operator.in_features, makes, reads)


def _hint(size: int | torch.SymInt) -> int:
    """A size as it is, or as it was when the model was traced."""
    return size if isinstance(size, int) else int(cast(int, size.node.hint))
