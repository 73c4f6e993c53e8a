"""The one runner: prepare, check, then measure in interleaved rounds, check again, summarise."""

from __future__ import annotations

import contextlib
import gc
import math
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch

from . import energy, stats
from .case import Case, Metric, Peer
from .clock import Clock
from .noise import NoiseMeter
from .seat import Dropped, Seat, local_seats

T = TypeVar("T")
LASTS = 3
"""Rounds of a peer that can be loaded again, until it is."""
Seats = Callable[[Case, Sequence[int], int], contextlib.AbstractContextManager[list[Seat]]]


@dataclass
class Measurement:
    """One peer in one case. `status` is ok, wrong, failed or unavailable; only ok has a value.

    `inputs` counts the sets that were rotated, and their bytes beside the cache's; `peak_memory` is that of the peer's
    process while it ran, in bytes; `energy` the machine's in joules per call; `work` what a call must do at least.
    """

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
    inputs: dict[str, int] | None
    peak_memory: int | None
    energy: float | None
    work: dict[str, Any] | None
    noise: dict[str, Any]


@dataclass
class Entry:
    """A peer on its way through the runner."""

    peer: Peer
    seat: Seat | None = None
    status: str = "ok"
    reason: str = ""
    samples: list[float] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)

    def drop(self, status: str, reason: str) -> None:
        self.status, self.reason, self.samples, self.joules = status, reason, [], []

    def go(self, act: Callable[[Seat], Any]) -> Any:
        """What `act` gives; None where the peer is out, or goes out now."""
        if self.status != "ok" or self.seat is None:
            return None
        try:
            return act(self.seat)
        except Dropped as out:
            self.drop(out.status, out.reason)
            return None


def round_orders(peers: int, rounds: int, seed: int) -> list[list[int]]:
    """A random order of all peers for each round, so that none always follows the same neighbour."""
    rng = random.Random(seed)
    return [rng.sample(range(peers), peers) for _ in range(rounds)]


def chains(entries: list[Entry]) -> list[list[Entry]]:
    """The entries, each in the list of the one that it stands behind, where that is measured, too."""
    found = {entry.peer.name: [entry] for entry in entries}
    for entry in entries:
        if first := found.get(entry.peer.behind):
            first.extend(found.pop(entry.peer.name))
    return list(found.values())


class Runner:
    """Measures cases.

    Args:
        seats: where peers run; in this process, unless given.
        builders: peers that are prepared at a time.
        wanted: whether a peer is measured; the baseline is, in any case.
        kin: tells process ids of more that is our own work, beside those of the seats.
        clock: replaces the device's own (tests).
        say: hears what is going on.
    """

    def __init__(
        self,
        *,
        rounds: int | None = None,
        quick: bool = False,
        seed: int = 0,
        seats: Seats | None = None,
        builders: int = 1,
        wanted: Callable[[str], bool] = lambda name: True,
        kin: Callable[[], Sequence[int]] = list,
        clock: Clock | None = None,
        say: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.rounds, self.quick, self.seed, self.say = rounds, quick, seed, say
        self.seats: Seats = seats or partial(local_seats, clock=clock)
        self.builders, self.wanted, self.kin = builders, wanted, kin
        self.target = 0.01 if quick else 0.05  # seconds of one sample of a looped metric

    def run(self, case: Case) -> list[Measurement]:
        """One measurement per peer, in the case's order, whatever became of the peer."""
        (found,) = self.run_together([case])
        return found

    def run_together(self, cases: Sequence[Case]) -> Iterator[list[Measurement]]:
        """The measurements of each case. All are prepared first, since builders of one case wait for the slowest of
        them; what has been measured ends before the next is."""
        with contextlib.ExitStack() as stack:
            seats = [stack.enter_context(contextlib.ExitStack()) for _ in cases]
            contests = [(case, self._entries(case, own), own) for case, own in zip(cases, seats, strict=True)]
            # Compilers to machine code stand last and take longest: they begin, so that none is alone at the end.
            jobs = [(case, chain) for case, entries, _ in contests for chain in reversed(chains(entries))]
            self._at_a_time(lambda job: self._prepare(*job), jobs)
            for case, entries, own in contests:
                with own:
                    yield self._summarise(case, entries, self._contest(case, entries))

    def _entries(self, case: Case, stack: contextlib.ExitStack) -> list[Entry]:
        """Those that are wanted, on seats that the stack holds."""
        chosen = [
            index for index, peer in enumerate(case.peers) if self.wanted(peer.name) or peer.name == case.baseline
        ]
        entries = [Entry(case.peers[index]) for index in chosen]
        if case.device == "cuda" and not torch.cuda.is_available():
            for entry in entries:
                entry.drop("unavailable", "no CUDA device")
            return entries
        for entry, seat in zip(entries, stack.enter_context(self.seats(case, chosen, self.seed)), strict=True):
            entry.seat = seat
        return entries

    def _contest(self, case: Case, entries: list[Entry]) -> dict[str, Any]:
        """Measure the peers that are prepared; how quiet the machine was."""
        for entry in entries:
            self.say(f"{case.name}: warming up {entry.peer.name}")
            entry.go(lambda seat: seat.warm_up(self.target))
        pids = [entry.seat.pid for entry in entries if entry.seat is not None and entry.status == "ok"]
        meter = NoiseMeter([*self.kin(), *(pid for pid in pids if pid is not None)])
        self._measure(case, [entry for entry in entries if entry.status == "ok"], meter)
        noise = meter.read()
        self._at_a_time(lambda entry: entry.go(lambda seat: seat.finish()), entries)
        return noise

    def _at_a_time(self, act: Callable[[T], object], items: Sequence[T]) -> None:
        """What is not timed, by as many builders as there are."""
        with ThreadPoolExecutor(max(self.builders, 1)) as pool:
            list(pool.map(act, items))

    def _prepare(self, case: Case, chain: list[Entry]) -> None:
        for entry in chain:
            self.say(f"{case.name}: preparing {entry.peer.name}")
            entry.go(lambda seat: seat.prepare())

    def _measure(self, case: Case, live: list[Entry], meter: NoiseMeter) -> None:
        rounds = self.rounds or (case.metric.quick_rounds if self.quick else case.metric.rounds)
        joules = energy.meter(case.device) if case.metric.looped else None
        for number, order in enumerate(round_orders(len(live), rounds, self.seed), 1):
            self.say(f"{case.name}: round {number} of {rounds}")
            gc.collect()
            if case.metric.looped and number > 1 and number % LASTS == 1:
                self._at_a_time(lambda entry: entry.go(lambda seat: seat.load_again()), live)
            with meter.listening():
                self._round([live[index] for index in order], joules)

    def _round(self, entries: Sequence[Entry], joules: Callable[[], float] | None) -> None:
        """One sample of each."""
        for entry in entries:
            before = joules() if joules else 0.0
            sample = entry.go(lambda seat: seat.sample())
            if sample is None:
                continue
            entry.samples.append(sample)
            if joules and entry.seat:
                entry.joules.append((joules() - before) / (entry.seat.inner + entry.seat.spare))

    def _summarise(self, case: Case, entries: list[Entry], noise: dict[str, Any]) -> list[Measurement]:
        base = next(entry.samples for entry in entries if entry.peer.name == case.baseline)
        known = [entry.seat.facts.get("work") for entry in entries if entry.seat]
        work = next(filter(None, known), None)
        return [self._measurement(case, entry, base, work, noise) for entry in entries]

    def _measurement(
        self, case: Case, entry: Entry, base: list[float], work: dict[str, Any] | None, noise: dict[str, Any]
    ) -> Measurement:
        metric: Metric = case.metric
        limit = None if self.quick else entry.peer.limit  # limits are about the full sizes
        samples, seat = entry.samples, entry.seat
        ratio = stats.ratio(samples, base, self.seed, metric.exact) if samples and base else None
        error = seat.error if seat else None
        facts = seat.facts if seat else {}
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
            inner=seat.inner if seat else 1,
            samples=samples,
            ratio={"value": ratio.value, "low": ratio.low, "high": ratio.high} if ratio else None,
            baseline=case.baseline,
            limit=limit,
            verdict=ratio.verdict(limit) if ratio else None if limit is None else "not measured",
            tolerance=case.tolerance_of(entry.peer),
            error=error if error is not None and math.isfinite(error) else None,
            inputs=facts.get("inputs"),
            peak_memory=facts.get("peak_memory"),
            energy=stats.median(entry.joules) if entry.joules else None,
            work=work,
            noise=noise,
        )
