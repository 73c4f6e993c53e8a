"""Put masks on the weights that a plan prunes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.errors import PlanError
from fxfreeze.masks import check_masks, density, read_mask
from fxfreeze.plan import Prune
from fxfreeze.program import Origin, Program
from fxfreeze.rewrite import Context, Pass, check_excluded, match_sites

from .._adapters import BASE, DELTA, MASK, addresses, describe, mask_name, parameter_name
from .._measured import measure_outputs, pruned_words
from .._operators import apply, aten
from ._masked import Place, Places, find_places
from ._parameters import Parameter, Source, parameter_dtype
from ._scores import largest, n_of_m, tiles
from ._scores_channel import Channels, channel_masks, choose, find_channels, has_gains, scores
from ._sites import resolve

Masks = dict[Place, Tensor]
"""Place → bools in the layout that its parameter is stored in."""


class InsertMasks(Pass):
    """W becomes mask ⊙ W wherever the plan's Prune steps say so: 0 where the mask is, whatever W holds there.

    It comes behind all steps that change a weight: what is zero is zero of the sum of a weight and its adapters, while
    they train and once they are folded. Weights that a method compares are those, as they are then. Steps act in plan
    order, each on what the one before it left.

    A mask is a constant, ``frozen.<step>.<module path>.<parameter>_mask``, that files of adapters hold. With `train`
    the parameter itself is ``adapters.<step>.<module path>.<parameter>``: as no gradient passes the mask, and nothing
    behind it sees what an optimizer does to the entries there, they are zero in what is compiled.

    Raises:
        PlanError: a pattern or a name in a file matches nothing, masks do not fit, or there is nothing to choose from.
    """

    name, stage, exact = "insert-masks", "adapt", False

    def run(self, program: Program, ctx: Context) -> int:
        steps = [(index, step) for index, step in enumerate(ctx.plan.steps) if isinstance(step, Prune)]
        if not steps:
            return 0
        before, places = program.clone(), find_places(program)
        count = sum(_Pruning(program, ctx, places, step, index).run() for index, step in steps)
        if any(step.train for _, step in steps):
            # What is compiled has trained, and is compared with nothing.
            measure_outputs(ctx, program, before, "masks, before weights train")
        return count


@dataclass
class _Pruning:
    """One step: which places it takes, their masks, and the operators that apply them."""

    program: Program
    ctx: Context
    places: Places
    step: Prune
    index: int
    source: Source = field(init=False)

    def __post_init__(self) -> None:
        self.source = Source(self.step, self.ctx.plan.steps)

    def run(self) -> int:
        """How many operators were put in."""
        check_excluded(self.program, self.step, self.index)
        masks = self._held() or self._chosen()
        count = sum(self._insert(place, mask) for place, mask in masks.items())
        self.source.finish()
        return count

    # ------------------------------------------------------------------ which

    def _held(self) -> Masks:
        """The masks of the step's file of weights, if it has any."""
        found = {}
        for place in self.places:
            name = mask_name(self.step, place.path, place.leaf)
            if name in self.source.stored:
                like = torch.ones(place.shape, dtype=torch.bool, device=self._device(place))
                found[place] = self.source.held(name, like)
        return found

    def _chosen(self) -> Masks:
        if self.step.method == "mask":
            return self._from_file()
        if self.step.method == "channel":
            return self._of_channels()
        taken = self._taken(_layers(self.program, self.places, self.step))
        weights = []
        for place in taken:
            value = place.value(self.program)
            assert place.operator is not None and value is not None
            weights.append(apply(place.operator.to_canonical(), value))
        found = {}
        for place, mask in zip(taken, self._scored(weights), strict=True):
            assert place.operator is not None
            found[place] = apply(place.operator.from_canonical(), mask).contiguous()
        return found

    def _scored(self, weights: Sequence[Tensor]) -> list[Tensor]:
        step = self.step
        if step.method == "nm":
            return [n_of_m(weight, step.n, step.m) for weight in weights]
        assert step.density is not None
        share = float(step.density)
        together = [weights] if step.scope == "global" else [[weight] for weight in weights]
        if step.method == "magnitude":
            return [mask for some in together for mask in largest(some, share)]
        return [mask for some in together for mask in tiles(some, step.block, share)]

    def _of_channels(self) -> Masks:
        step, program, offers = self.step, self.program, _layers(self.program, self.places, self.step)
        layers = {path: held for path, held in offers.operators.items() if addresses(step, path)}
        found, misfits = find_channels(program, self.places, layers)
        if step.criterion == "batchnorm":
            bare = {path: "makes channels that no batch norm scales, which the criterion looks at"
                    for channels in found if not has_gains(channels) for path in channels.paths}  # fmt: skip
            found, misfits = [channels for channels in found if has_gains(channels)], misfits | bare
        ready = {path for channels in found for path in channels.paths}
        offers.refused |= misfits
        offers.operators = {
            path: held for path, held in offers.operators.items() if path in ready or path not in layers
        }
        self._taken(offers)
        given = self.ctx.given
        if step.criterion == "taylor" and (given is None or given.batches is None):
            raise PlanError(
                f"steps[{self.index}].criterion: 'taylor' differentiates on data, and there is none", where=step.name,
                hint="pass calibration=batches of inputs, to adapt or to compile",
            )  # fmt: skip
        worth = scores(program, step, found, lambda: self.ctx.calibration.of(program))
        work, kept = choose(program, step, self.places, found, worth)
        stay, total = sum(int(mask.sum()) for mask in kept), sum(map(len, kept))
        self._tell("", "measured", f"{stay:,} of {total:,} channels stay, and {work:.1%} of the multiply-accumulates")
        masks = channel_masks(found, kept)
        for place in dict.fromkeys(place for channels in found for place in channels.rows):
            self._tell_rows(place, masks[place], found)
        return {place: mask.to(self._device(place)) for place, mask in masks.items()}

    def _tell_rows(self, place: Place, mask: Tensor, found: Sequence[Channels]) -> None:
        """How many channels of a layer stay, and whose go with them."""
        assert place.operator is not None
        rows = apply(place.operator.to_canonical(), mask).flatten(1).any(1)
        shared = [path for channels in found if place in channels.rows for path in channels.paths if path != place.path]
        others = list(dict.fromkeys(shared))
        named = ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
        detail = f"{int(rows.sum())} of {len(rows)} channels stay" + (
            f"; they go together with {named}'s" if others else ""
        )
        self._tell(place.path, "rewritten", detail, "mask ⊙ weight", requested=f"channels of {place.path}")

    def _taken(self, offers: Places) -> list[Place]:
        """The places that the step takes; rows in the ledger for what it matches and cannot take."""
        taken, refused = resolve(offers, self.step, self.index)
        named = [path for path in taken if addresses(self.step, path)]
        if not named:
            raise PlanError(f"steps[{self.index}].exclude: leaves nothing of {', '.join(taken[:6])}",
                            where=self.step.name)  # fmt: skip
        for path, reason in refused.items():
            # A lone * is whatever can be pruned: what has no parameters was not asked for.
            if addresses(self.step, path) and (self.step.patterns != ("*",) or path in offers.refused):
                self._tell(path, "refused", f"{path} {reason}")
        return [place for path in named for place in offers.operators[path]]

    def _from_file(self) -> Masks:
        assert self.step.mask is not None
        file = str(self.step.mask)
        stored, names = read_mask(file), self.places.names()
        check_masks(stored, {name: place.shape for place in self.places for name in names[place]}, file)
        match_sites(self.program, self.step, self.index)  # a pattern that names no module
        found: Masks = {}
        for place in self.places:
            name = next((name for name in names[place] if name in stored), None)
            if name is not None and addresses(self.step, place.path):
                found[place] = stored[name].to(self._device(place))
            elif name is not None:
                self._tell(place.path, "skipped", f"{file} has a mask for {name}, whose module the step does not name")
            elif addresses(self.step, place.path) and place.operator is not None:
                self._tell(place.path, "skipped", f"{place.key} stays dense: {file} has no mask for it")
        if not found:
            raise PlanError(
                f"steps[{self.index}].at: the file has no mask for what {self.step.at!r} matches", where=file,
                hint=f"it has {', '.join(list(stored)[:6])}",
            )  # fmt: skip
        return found

    # ------------------------------------------------------------------ what

    def _insert(self, place: Place, mask: Tensor) -> int:
        program, step = self.program, self.step
        weight = place.value(program) if step.train else None
        if step.train:
            self._train(place)
        first = place.readers[0][0]
        name = self._free(mask_name(step, place.path, place.leaf), place)
        node = program.add_constant(name, mask, before=first, like=first)
        node.meta["fxfreeze"] = Origin(step.name, MASK, place.path)
        for number, (reader, operand) in enumerate(place.readers):
            new = program.call(aten.where.ScalarOther, node, operand, 0.0, before=reader, like=reader)
            new.meta["fxfreeze"] = self._origin(place, reader)
            reader.replace_input_with(operand, new)
            place.readers[number] = reader, new
        share = density({name: mask})
        self._tell(place.path, "rewritten", f"density {share:.2%} of {place.key}", "mask ⊙ weight")
        if step.train:
            words = f"{pruned_words(weight, mask)} before it trains"
            self._tell(place.path, "measured", words, requested=f"mask of {place.key}")
        return len(place.readers)

    def _origin(self, place: Place, reader: Node) -> Origin:
        """A mask on what adapters made of a weight is folded with them."""
        base = reader.meta.get("fxfreeze")
        if isinstance(base, Origin) and base.primitive == BASE:
            return Origin(self.step.name, DELTA, base.site, base.call)
        return Origin(self.step.name, MASK, place.path)

    def _train(self, place: Place) -> None:
        """Let the place read a parameter that trains, where it reads the model's constant.

        Raises:
            PlanError: another step already makes something of that.
        """
        step, constant = self.step, place.constant
        users = []
        for reader, operand in place.readers:
            user, value = reader, operand
            while _is_mask(value):
                user, value = value, value.args[1]  # type: ignore[assignment]
            if value.op != "get_attr" or value.target != constant.target:
                raise PlanError(
                    f"{place.key} is changed by another step too, and so cannot train itself", where=step.name,
                    hint="leave out train, and the adapters train under the mask; or leave out the adapters",
                )  # fmt: skip
            users.append((user, value))
        node = self._parameter(place, users[0][0])
        for number, (user, value) in enumerate(users):
            user.replace_input_with(value, node)
            reader, operand = place.readers[number]
            place.readers[number] = reader, node if user is reader else operand

    def _parameter(self, place: Place, before: Node) -> Node:
        """A parameter with the values of the place's constant, in its dtype."""
        program, step, kind = self.program, self.step, place.constant.meta["val"].dtype
        stored, origin = program.state[str(place.constant.target)], Origin(step.name, MASK, place.path)
        value = self.source.value(place.path, Parameter(place.leaf, place.shape, lambda generator: stored))
        value = value.detach().to(stored.device, parameter_dtype(kind))
        name = self._free(parameter_name(step, place.path, place.leaf), place)
        node = program.add_constant(name, value, before=before, like=before)
        node.meta["fxfreeze"] = origin
        if value.dtype != kind:
            node = program.call(aten.to.dtype, node, kind, before=before, like=before)
            node.meta["fxfreeze"] = origin
        return node

    def _free(self, name: str, place: Place) -> str:
        if name in self.program.state:
            raise PlanError(f"the model already has a constant named {name}", where=place.path, hint="rename the step")
        return name

    def _device(self, place: Place) -> torch.device:
        return self.program.state.tensor(str(place.constant.target)).device

    def _tell(self, path: str, outcome: str, detail: str, executes: str = "", requested: str = "") -> None:
        self.ctx.ledger.add(
            site=path, step=self.step.name, requested=requested or describe(self.step), outcome=outcome,  # type: ignore[arg-type]
            executes=executes, detail=detail,
        )  # fmt: skip


def _is_mask(node: Node) -> bool:
    origin = node.meta.get("fxfreeze")
    return node.target is aten.where.ScalarOther and isinstance(origin, Origin) and origin.primitive == MASK


def _layers(program: Program, places: Places, step: Prune) -> Places:
    """The weights of layers that a method can choose from; the others are refused, with why."""
    found = Places(program, {}, dict(places.refused))
    for path, held in places.operators.items():
        weights = [place for place in held if place.operator is not None]
        if reason := next((said for place in weights if (said := _misfit(program, place, step))), None):
            found.refused.setdefault(path, reason)
        elif weights and path not in found.refused:
            found.operators[path] = weights
    return found


def _misfit(program: Program, place: Place, step: Prune) -> str | None:
    """Why no method can choose among the weights, in a sentence without a subject."""
    operator = place.operator
    assert operator is not None
    if operator.kind == "embedding":
        return "is an embedding, whose rows are looked up and not multiplied; give it a mask"
    if place.value(program) is None:
        return "has a weight that hangs on the model's inputs; give it a mask"
    if step.method == "nm" and operator.shape[1] <= step.n:
        return f"has {operator.shape[1]} inputs per row, of which {step.n} of {step.m} would all stay"
    return None
