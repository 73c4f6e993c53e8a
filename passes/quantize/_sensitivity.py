"""What each layer loses by being quantized, and which to leave in floats so that the whole stays within a budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.fx import Node

from fxfreeze.errors import PlanError
from fxfreeze.plan import Quantize
from fxfreeze.program import Program
from fxfreeze.rewrite import Context
from fxfreeze.sensitivity import SiteSensitivity

from .._measured import Tally, same_predictions
from ._calibrate import layer_run
from ._sites import Place

Act = Callable[..., Tensor]
"""A layer's result from its input in floats, or a product's from both sides."""
P = TypeVar("P", bound=Place)
Beside = Callable[[Collection[P]], Mapping[Node, Act]]
_TIMINGS = 3


@dataclass(frozen=True)
class Level:
    """A way to run a layer on integers: what the plan calls it, what it gives, and what it saves, in any unit."""

    scheme: str
    act: Act
    saves: float


@dataclass
class _Effect:
    """A layer at one level, all others in floats: noise in its result and in the outputs, as shares of signals."""

    own: Tally
    outputs: list[Tally]
    drop: float | None

    @property
    def noise(self) -> float:
        return max((_ratio(tally) for tally in self.outputs), default=0.0)

    @property
    def stays(self) -> float | None:
        return min((tally.hits / tally.count for tally in self.outputs if tally.count), default=None)


def measures(ctx: Context, sites: Iterable[Place]) -> bool:
    """Whether what quantizing each layer does is to be known."""
    return ctx.sensitivity or any(site.step.budget is not None for site in sites)


def choose(
    program: Program, ctx: Context, levels: Mapping[P, Sequence[Level]], beside: Beside[P] = lambda sites: {}
) -> dict[P, Level]:
    """For every layer (or head, or product) the level to run it at; layers that a budget keeps in floats are left out.

    Each layer's levels begin with the one that saves most. Without a budget that is the one. With a budget, layers go
    up one level at a time, first where that takes away most noise for what it costs, as often as it takes, and not
    oftener: the number is found by bisection, with all layers of the step at their levels at once.

    Args:
        beside: what else is rounded when these layers run on integers.

    Raises:
        PlanError: a budget of a score, and nothing gives one.
    """
    chosen = {site: options[0] for site, options in levels.items()}
    for step in dict.fromkeys(site.step for site in levels if measures(ctx, [site])):
        if step.limit[0] == "drop" and ctx.evaluate is None:
            raise PlanError(
                f"the budget {step.budget!r} is of a score, and there is none", where=step.name,
                hint="give evaluate= to fxfreeze.compile, or a budget such as 'snr:20'",
            )  # fmt: skip
        of_step = {site: options for site, options in levels.items() if site.step == step}
        others = {site: level for site, level in chosen.items() if site not in of_step}
        trials = _Trials(program, ctx, beside, others)
        effects = {(site, level.scheme): trials.effect(site, level)
                   for site, options in of_step.items() for level in options}  # fmt: skip
        if step.budget is not None:
            for site in of_step:
                del chosen[site]
            chosen |= _within(ctx, trials, step, of_step, effects)
        _record(ctx, of_step, effects, chosen)
    return chosen


def kept(program: Program, ctx: Context, acts: Mapping[P, Act], beside: Beside[P] = lambda sites: {}) -> Collection[P]:
    """Those that budgets leave to the one level there is, which saves their time in floats; see :func:`choose`."""
    if not measures(ctx, acts):
        return acts.keys()
    seconds = layer_seconds(program, ctx, list(acts))
    levels = {site: [Level(site.step.scheme, act, seconds[site])] for site, act in acts.items()}
    return choose(program, ctx, levels, beside).keys()


def layer_seconds(program: Program, ctx: Context, sites: Sequence[P]) -> dict[P, float]:
    """How long each layer takes in floats on the first batch: the median of some calls."""
    inputs, found = next(iter(ctx.calibration.of(program))), {site.node: list[float]() for site in sites}

    def timed(node: Node, args: tuple[Any, ...], compute: Callable[[], Tensor]) -> Tensor:
        started = time.perf_counter()
        result = compute()
        found[node].append(time.perf_counter() - started)
        return result

    for _ in range(_TIMINGS):
        layer_run(program, inputs, found, timed)
    return {site: sorted(found[site.node])[_TIMINGS // 2] for site in sites}


def _limits(ctx: Context) -> list[tuple[str, float]]:
    """The budgets of all steps: each is of the whole model, so that a step may have to make up for others."""
    return [step.limit for step in ctx.plan.steps if isinstance(step, Quantize) and step.budget is not None]


class _Trials(Generic[P]):
    """Runs a program with some layers on integers, and compares with its results in floats."""

    def __init__(self, program: Program, ctx: Context, beside: Beside[P], others: Mapping[P, Level]) -> None:
        """`others`: what is quantized besides, with no say in it here."""
        self.program, self.beside, self.others = program, beside, others
        scored = ctx.sensitivity or any(kind == "drop" for kind, _ in _limits(ctx))
        self.evaluate = ctx.evaluate if scored else None
        self.inputs = next(iter(ctx.calibration.of(program)))
        assert ctx.floats is not None  # quantized_sites has kept it
        self.now, self.truth = program.run(*self.inputs), ctx.floats.run(*self.inputs)
        self.score, self.score_now = self._scored(ctx.floats.run), self._scored(program.run)

    def effect(self, site: P, level: Level) -> _Effect:
        own = Tally()

        def act(node: Node, args: tuple[Any, ...], compute: Callable[[], Tensor]) -> Tensor:
            result = level.act(*site.values(args))
            own.add(result, compute(), result.new_empty(0))
            return result

        outputs = layer_run(self.program, self.inputs, {site.node}, act, self.beside([site]))
        return _Effect(own, self._compared(outputs, self.now), self._drop({site: level}, self.score_now))

    def noise(self, levels: Mapping[P, Level]) -> float:
        """Of the outputs with all of `levels` and all others: power of the gap over power of the signal, the worst."""
        outputs = self._run({**self.others, **levels}, self.inputs)
        return max(map(_ratio, self._compared(outputs, self.truth)), default=0.0)

    def drop(self, levels: Mapping[P, Level]) -> float | None:
        """By how much the score falls with all of `levels` and all others."""
        return self._drop({**self.others, **levels}, self.score)

    def _drop(self, levels: Mapping[P, Level], score: float | None) -> float | None:
        found = self._scored(lambda *inputs: self._run(levels, inputs))
        return None if found is None or score is None else score - found

    def _scored(self, run: Callable[..., Sequence[Tensor]]) -> float | None:
        if self.evaluate is None:
            return None
        found = self.evaluate(run)
        if math.isnan(found):
            raise PlanError("the score is NaN", where="evaluate", hint="return a number; higher is better")
        return found

    def _run(self, levels: Mapping[P, Level], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        sites = {site.node: site for site in levels}

        def act(node: Node, args: tuple[Any, ...], compute: Callable[[], Tensor]) -> Tensor:
            site = sites[node]
            return levels[site].act(*site.values(args))

        return layer_run(self.program, inputs, sites, act, self.beside(levels))

    def _compared(self, outputs: Sequence[Tensor], truth: Sequence[Tensor]) -> list[Tally]:
        tallies = []
        for now, then in zip(outputs, truth, strict=True):
            tallies.append(Tally())
            tallies[-1].add(now, then, same_predictions(now, then))
        return tallies


def _within(
    ctx: Context, trials: _Trials[P], step: Quantize, levels: Mapping[P, Sequence[Level]],
    effects: Mapping[tuple[P, str], _Effect],
) -> dict[P, Level]:  # fmt: skip
    """The levels that keep the step's budget, with as few steps up as that takes; a row for every layer in floats."""
    moves = _moves(levels, effects)

    def after(count: int) -> dict[P, Level]:
        ups = {site: moves[:count].count(site) for site in levels}
        return {site: options[ups[site]] for site, options in levels.items() if ups[site] < len(options)}

    def fits(count: int) -> bool:
        levels = after(count)
        for kind, limit in _limits(ctx):
            if kind == "snr" and _decibels(trials.noise(levels)) < limit:
                return False
            if kind == "drop" and ((drop := trials.drop(levels)) is None or drop > limit):
                return False
        return True

    few, enough = -1, len(moves)
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if fits(middle) else (middle, enough)
    found = after(enough)
    for site in levels:
        if site not in found:
            ctx.ledger.add(
                site=site.path, step=step.name, requested=site.requested, outcome="skipped", executes="floats",
                detail=f"kept in floats for the budget {step.budget!r}",
            )  # fmt: skip
    return found


def _moves(levels: Mapping[P, Sequence[Level]], effects: Mapping[tuple[P, str], _Effect]) -> list[P]:
    """Sites in the order in which they go up one level each: most noise for what it costs first."""
    moves: list[tuple[float, P]] = []
    for site, options in levels.items():
        noises = [*(effects[site, level.scheme].noise for level in options), 0.0]
        saved = [*(level.saves for level in options), 0.0]
        worth = math.inf
        for i in range(len(options)):
            gone, cost = noises[i] - noises[i + 1], saved[i] - saved[i + 1]
            # A site's own moves stay in order.
            worth = min(worth, gone / cost if cost > 0 else math.inf)
            moves.append((worth, site))
    return [site for _, site in sorted(moves, key=lambda move: -move[0])]


def _record(
    ctx: Context, levels: Mapping[P, Sequence[Level]], effects: Mapping[tuple[P, str], _Effect],
    chosen: Mapping[P, Level],
) -> None:  # fmt: skip
    total = sum(options[0].saves for options in levels.values()) or 1.0
    for (site, scheme), effect in effects.items():
        level = next(level for level in levels[site] if level.scheme == scheme)
        ctx.measured.append(SiteSensitivity(
            site=site.path, step=site.step.name, scheme=scheme, snr=_finite(_ratio(effect.own)),
            output_snr=_finite(effect.noise), stays=effect.stays, drop=effect.drop, gain=level.saves / total,
            chosen=chosen[site].scheme if site in chosen else "float",
        ))  # fmt: skip


def _ratio(tally: Tally) -> float:
    return tally.gap / tally.size if tally.size else math.inf if tally.gap else 0.0


def _decibels(noise: float) -> float:
    return -10 * math.log10(noise) if 0 < noise < math.inf else math.inf if not noise else -math.inf


def _finite(noise: float) -> float | None:
    return _decibels(noise) if noise else None
