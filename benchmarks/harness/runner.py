"""The one runner: prepare, check, then measure in interleaved rounds, check again, summarise."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from . import stats
from .case import Case, Metric, Peer, Reading, Unavailable, WrongOutput, flatten, relative_error
from .clock import Clock, calibrate, clock_for, loop
from .noise import NoiseMeter

WARM_UP = 3


@dataclass
class Measurement:
    """One peer in one case. `status` is ok, wrong, failed or unavailable; only ok has a value."""

    case: str
    peer: str
    metric: str
    unit: str
    device: str
    status: str
    reason: str
    value: float | None
    spread: dict[str, float] | None
    rounds: int
    inner: int
    samples: list[float]
    ratio: dict[str, float | None] | None
    baseline: str
    limit: float | None
    verdict: str | None
    tolerance: float
    error: float | None
    noise: dict[str, Any]


@dataclass
class Entry:
    """A peer on its way through the runner."""

    peer: Peer
    inputs: tuple[Any, ...]
    expected: Any = None
    call: Callable[..., Any] | None = None
    status: str = "ok"
    reason: str = ""
    error: float | None = None
    inner: int = 1
    samples: list[float] = field(default_factory=list)

    def run(self) -> Any:
        assert self.call is not None, f"{self.peer.name} is not prepared"
        return self.call(*self.inputs)

    def judge(self, error: float, tolerance: float) -> None:
        """Keep the largest error seen. Raises WrongOutput above the tolerance, and for NaN."""
        self.error = error if self.error is None or error != error else max(error, self.error)
        if not error <= tolerance:
            raise WrongOutput(f"relative error {error:.3g} above the tolerance {tolerance:g}")

    def drop(self, status: str, reason: str) -> None:
        self.status, self.reason, self.samples, self.call = status, reason, [], None

    def drop_for(self, error: Exception, when: str = "") -> None:
        """A peer that breaks is a result too: it is reported, and the others go on."""
        if isinstance(error, WrongOutput):
            self.drop("wrong", when + str(error))
        else:
            missing = isinstance(error, Unavailable | ImportError)
            self.drop("unavailable" if missing else "failed", when + describe(error))


def round_orders(peers: int, rounds: int, seed: int) -> list[list[int]]:
    """A random order of all peers for each round, so that none always follows the same neighbour."""
    rng = random.Random(seed)
    return [rng.sample(range(peers), peers) for _ in range(rounds)]


class Runner:
    """Measures cases. `clock` replaces the device's own (tests); `say` hears what is going on."""

    def __init__(
        self,
        *,
        rounds: int | None = None,
        quick: bool = False,
        seed: int = 0,
        clock: Clock | None = None,
        say: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.rounds, self.quick, self.seed, self.clock, self.say = rounds, quick, seed, clock, say
        self.target = 0.01 if quick else 0.05  # seconds of one sample of a looped metric

    def run(self, case: Case) -> list[Measurement]:
        """One measurement per peer, in the case's order, whatever became of the peer."""
        if case.device == "cuda" and not torch.cuda.is_available():
            entries = [Entry(peer, ()) for peer in case.peers]
            for entry in entries:
                entry.drop("unavailable", "no CUDA device")
            return self._summarise(case, entries, NoiseMeter().read())
        entries = self._entries(case)
        for entry in entries:
            if entry.status == "ok":
                self._prepare(case, entry)
        live = [entry for entry in entries if entry.status == "ok"]
        gradients = torch.no_grad() if case.metric.looped else contextlib.nullcontext()
        with gradients:
            self._warm_up(case, live)
            meter = NoiseMeter()
            self._measure(case, live)
            noise = meter.read()
        for entry in live:
            if case.metric.looped and entry.status == "ok":
                self._check(case, entry, "after it was timed: ")
        return self._summarise(case, entries, noise)

    def _entries(self, case: Case) -> list[Entry]:
        """Every peer gets its own copy of the inputs; references are computed once, before any peer runs."""
        inputs = case.inputs(torch.Generator().manual_seed(self.seed))
        expected: dict[Callable[..., Any], Any] = {}
        entries = []
        for peer in case.peers:
            entry = Entry(peer, copy.deepcopy(inputs))
            entries.append(entry)
            reference = peer.reference or case.reference
            try:
                if reference not in expected:
                    with torch.no_grad():
                        expected[reference] = copy.deepcopy(reference(*copy.deepcopy(inputs)))
                entry.expected = expected[reference]
            except Exception as error:
                entry.drop_for(error, "its reference: ")
        return entries

    def _prepare(self, case: Case, entry: Entry) -> None:
        self.say(f"{case.name}: preparing {entry.peer.name}")
        try:
            entry.call = entry.peer.prepare()
        except Exception as error:
            entry.drop_for(error)
        else:
            self._check(case, entry)

    def _check(self, case: Case, entry: Entry, when: str = "") -> None:
        """Run once and compare; the peer is dropped if its output is wrong or an input of it has changed."""
        before = copy.deepcopy(entry.inputs)
        try:
            with torch.no_grad() if case.metric.looped else contextlib.nullcontext():
                result = entry.run()
                if not all(map(torch.equal, flatten(before), flatten(entry.inputs))):
                    raise WrongOutput("the peer changed its input")
                if isinstance(result, Reading):
                    entry.judge(result.error, case.tolerance)
                else:
                    observed = entry.peer.observe(result) if entry.peer.observe else result
                    entry.judge(relative_error(observed, entry.expected), case.tolerance)
        except Exception as error:
            entry.drop_for(error, when)

    def _warm_up(self, case: Case, live: list[Entry]) -> None:
        """The check was the first call; the calibration follows the warm-up, so both see compiled code."""
        if not case.metric.looped:
            return
        for entry in live:
            self.say(f"{case.name}: warming up {entry.peer.name}")
            try:
                loop(entry.run, WARM_UP)()
                entry.inner = calibrate(self._clock(case), entry.run, self.target)
            except Exception as error:
                entry.drop_for(error, "while warming up: ")

    def _measure(self, case: Case, live: list[Entry]) -> None:
        rounds = self.rounds or (case.metric.quick_rounds if self.quick else case.metric.rounds)
        for number, order in enumerate(round_orders(len(live), rounds, self.seed), 1):
            self.say(f"{case.name}: round {number} of {rounds}")
            gc.collect()
            for entry in [live[index] for index in order]:
                if entry.status == "ok":
                    self._sample(case, entry)

    def _sample(self, case: Case, entry: Entry) -> None:
        try:
            if case.metric.looped:
                entry.run()  # untimed: the peer before has filled the caches with its own weights
            if case.metric.timed:
                entry.samples.append(self._clock(case)(loop(entry.run, entry.inner)) / entry.inner)
            else:
                reading = entry.run()
                entry.judge(reading.error, case.tolerance)
                entry.samples.append(reading.value)
        except Exception as error:
            entry.drop_for(error, "while it was measured: ")

    def _clock(self, case: Case) -> Clock:
        return self.clock or clock_for(case.device)

    def _summarise(self, case: Case, entries: list[Entry], noise: dict[str, Any]) -> list[Measurement]:
        base = next(entry.samples for entry in entries if entry.peer.name == case.baseline)
        return [self._measurement(case, entry, base, noise) for entry in entries]

    def _measurement(self, case: Case, entry: Entry, base: list[float], noise: dict[str, Any]) -> Measurement:
        metric: Metric = case.metric
        limit = None if self.quick else entry.peer.limit  # limits are about the full sizes
        samples = entry.samples
        ratio = stats.ratio(samples, base, self.seed, metric.exact) if samples and base else None
        return Measurement(
            case=case.name,
            peer=entry.peer.name,
            metric=metric.name,
            unit=metric.unit,
            device=case.device,
            status=entry.status,
            reason=entry.reason,
            value=stats.median(samples) if samples else None,
            spread=stats.spread(samples) if samples else None,
            rounds=len(samples),
            inner=entry.inner,
            samples=samples,
            ratio={"value": ratio.value, "low": ratio.low, "high": ratio.high} if ratio else None,
            baseline=case.baseline,
            limit=limit,
            verdict=ratio.verdict(limit) if ratio else None if limit is None else "not measured",
            tolerance=case.tolerance,
            error=entry.error if entry.error is not None and math.isfinite(entry.error) else None,
            noise=noise,
        )


def describe(error: BaseException) -> str:
    """The type of an error and the first line of its message: a reason that fits in a table."""
    lines = str(error).strip().splitlines()
    message = lines[0] if lines else ""
    return message if isinstance(error, Unavailable) else f"{type(error).__name__}: {message}"
