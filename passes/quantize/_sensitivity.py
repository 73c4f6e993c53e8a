"""What each layer loses by being quantized, and which to leave in floats so that the whole stays within a budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.fx import Node

from fxfreeze.errors import PlanError
from fxfreeze.plan import Quantize
from fxfreeze.program import Program
from fxfreeze.rewrite import Context
from fxfreeze.sensitivity import SiteSensitivity

from .._adapters import describe
from .._measured import Tally, same_predictions
from ._calibrate import layer_run
from ._sites import Site

Act = Callable[[Tensor], Tensor]
"""A layer's result from its input in floats."""
Beside = Callable[[Collection[Site]], Mapping[Node, Act]]
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


def measures(ctx: Context, sites: Iterable[Site]) -> bool:
    """Whether what quantizing each layer does is to be known."""
    return ctx.sensitivity or any(site.step.budget is not None for site in sites)


def choose(
    program: Program, ctx: Context, levels: Mapping[Site, Sequence[Level]], beside: Beside = lambda sites: {}
) -> dict[Site, Level]:
    """For every layer the level to run it at; layers that a budget keeps in floats are left out.

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
        trials = _Trials(program, ctx, beside)
        effects = {(site, level.scheme): trials.effect(site, level)
                   for site, options in of_step.items() for level in options}  # fmt: skip
        if step.budget is not None:
            for site in of_step:
                del chosen[site]
            chosen |= _within(ctx, trials, step, of_step, effects)
        _record(ctx, of_step, effects, chosen)
    return chosen


def layer_seconds(program: Program, ctx: Context, sites: Sequence[Site]) -> dict[Site, float]:
    """How long each layer takes in floats on the first batch: the median of some calls."""
    inputs, found = next(iter(ctx.calibration.of(program))), {site.operator.node: list[float]() for site in sites}

    def timed(node: Node, value: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        started = time.perf_counter()
        result = compute()
        found[node].append(time.perf_counter() - started)
        return result

    for _ in range(_TIMINGS):
        layer_run(program, inputs, found, timed)
    return {site: sorted(found[site.operator.node])[_TIMINGS // 2] for site in sites}


class _Trials:
    """Runs a program with some layers on integers, and compares with its results in floats."""

    def __init__(self, program: Program, ctx: Context, beside: Beside) -> None:
        self.program, self.evaluate, self.beside = program, ctx.evaluate, beside
        self.inputs = next(iter(ctx.calibration.of(program)))
        self.truth = program.run(*self.inputs)
        self.score = None if ctx.evaluate is None else ctx.evaluate(program.run)

    def effect(self, site: Site, level: Level) -> _Effect:
        own = Tally()

        def act(node: Node, value: Tensor, compute: Callable[[], Tensor]) -> Tensor:
            result = level.act(value)
            own.add(result, compute(), result.new_empty(0))
            return result

        outputs = layer_run(self.program, self.inputs, {site.operator.node}, act, self.beside([site]))
        return _Effect(own, self._compared(outputs), self.drop({site: level}))

    def noise(self, levels: Mapping[Site, Level]) -> float:
        """Of the outputs with all of `levels` at once: power of the gap over power of the signal, the worst."""
        return max(map(_ratio, self._compared(self._run(levels, self.inputs))), default=0.0)

    def drop(self, levels: Mapping[Site, Level]) -> float | None:
        """By how much the score falls."""
        if self.evaluate is None or self.score is None:
            return None
        return self.score - self.evaluate(lambda *inputs: self._run(levels, inputs))

    def _run(self, levels: Mapping[Site, Level], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        acts = {site.operator.node: level.act for site, level in levels.items()}
        return layer_run(self.program, inputs, acts, lambda node, value, compute: acts[node](value),
                         self.beside(levels))  # fmt: skip

    def _compared(self, outputs: Sequence[Tensor]) -> list[Tally]:
        tallies = []
        for now, then in zip(outputs, self.truth, strict=True):
            tallies.append(Tally())
            tallies[-1].add(now, then, same_predictions(now, then))
        return tallies


_Effects = Mapping[tuple[Site, str], _Effect]


def _within(
    ctx: Context, trials: _Trials, step: Quantize, levels: Mapping[Site, Sequence[Level]], effects: _Effects
) -> dict[Site, Level]:
    """The levels that keep the step's budget, with as few steps up as that takes; a row for every layer in floats."""
    moves = _moves(levels, effects)

    def after(count: int) -> dict[Site, Level]:
        ups = {site: moves[:count].count(site) for site in levels}
        return {site: options[ups[site]] for site, options in levels.items() if ups[site] < len(options)}

    def fits(count: int) -> bool:
        kind, limit = step.limit
        if kind == "snr":
            return _decibels(trials.noise(after(count))) >= limit
        drop = trials.drop(after(count))
        assert drop is not None  # the pass has seen that there is an evaluation
        return drop <= limit

    few, enough = -1, len(moves)
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if fits(middle) else (middle, enough)
    found = after(enough)
    for site in levels:
        if site not in found:
            ctx.ledger.add(
                site=site.path, step=step.name, requested=describe(step), outcome="skipped", executes="floats",
                detail=f"kept in floats for the budget {step.budget!r}",
            )  # fmt: skip
    return found


def _moves(levels: Mapping[Site, Sequence[Level]], effects: _Effects) -> list[Site]:
    """Sites in the order in which they go up one level each: most noise for what it costs first."""
    moves: list[tuple[float, Site]] = []
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
    ctx: Context, levels: Mapping[Site, Sequence[Level]], effects: _Effects, chosen: Mapping[Site, Level]
) -> None:
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
