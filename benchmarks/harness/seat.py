"""One peer on its way through a case: prepared, checked, warmed up, sampled, checked again, when the runner says so."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from . import memory
from .case import Case, Reading, Unavailable, Work, WrongOutput, flatten, relative_error
from .child import peak_rss
from .clock import Clock, calibrate, clock_for, loop
from .loaded import Loaded
from .rotation import rotated

WARM_UP = 3
LONG = 0.1
"""Seconds of a call that needs no other before it: what caches hold is read again in a few milliseconds."""
CHECKED = 2
"""Input sets of a looped metric that are drawn and checked; a peer that keeps its first result is found out."""


class Dropped(Exception):
    """A peer is out: what it is reported as, and why."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(status, reason)
        self.status, self.reason = status, reason


class Seat(Protocol):
    """Where a peer is measured: in this process or in another. Every method may raise :class:`Dropped`.

    Attributes:
        error: the largest error of an output so far.
        inner: calls in a sample.
        spare: calls before them that are not timed.
        facts: the input sets, the memory, and what a call must do, as far as they are known.
        pid: of the process it runs in, None for this one.
    """

    error: float | None
    inner: int
    spare: int
    facts: dict[str, Any]

    @property
    def pid(self) -> int | None: ...

    def prepare(self) -> None:
        """Build the peer and compare what it computes."""

    def warm_up(self, target: float) -> None:
        """Find the number of calls that take `target` seconds."""

    def load_again(self) -> None:
        """Where the peer can be."""

    def sample(self) -> float: ...

    def finish(self) -> None:
        """Compare again, and read the memory."""


@dataclass(frozen=True)
class Task:
    """What is asked of the peers of a case: input sets, and per peer the outputs for each, or why there are none; and
    what a call must do at least."""

    inputs: list[tuple[Any, ...]]
    expected: list[list[Any] | Dropped]
    work: Work | None = None

    @classmethod
    def of(cls, case: Case, seed: int) -> Task:
        """References are computed once, each on a copy of the inputs."""
        generator = torch.Generator().manual_seed(seed)
        sets = [case.inputs(generator) for _ in range(CHECKED if case.metric.looped else 1)]
        known: dict[Callable[..., Any], list[Any] | Dropped] = {}
        for reference in [peer.reference or case.reference for peer in case.peers]:
            if reference not in known:
                known[reference] = _outputs(reference, sets)
        expected = [known[peer.reference or case.reference] for peer in case.peers]
        return cls(sets, expected, case.work() if case.work else None)


@torch.no_grad()
def _outputs(reference: Callable[..., Any], sets: Sequence[tuple[Any, ...]]) -> list[Any] | Dropped:
    try:
        return [copy.deepcopy(reference(*copy.deepcopy(inputs))) for inputs in sets]
    except Exception as error:
        return dropped(error, "its reference: ")


class Local:
    """A seat in this process, of the peer with that index; `task` is asked for when the peer is built."""

    def __init__(self, case: Case, index: int, task: Callable[[], Task], clock: Clock | None = None) -> None:
        self.case, self.index, self.task = case, index, task
        self.peer = case.peers[index]
        self.clock = clock or clock_for(case.device)
        self.sets: list[tuple[Any, ...]] = []
        self.expected: list[Any] = []
        self.turn: Iterator[tuple[Any, ...]] = iter(())
        self.call: Callable[..., Any] | None = None
        self.error: float | None = None
        self.inner, self.spare = 1, 1
        self.facts: dict[str, Any] = {}

    pid = None

    def prepare(self) -> None:
        self.build()
        self.check()

    def build(self) -> None:
        with _reported(""):
            self.call = self.peer.prepare()

    def check(self) -> None:
        task = self.task()
        self.facts["work"] = asdict(task.work) if task.work else None
        expected = task.expected[self.index]
        if isinstance(expected, Dropped):
            raise expected
        self.sets, self.expected = copy.deepcopy(task.inputs), expected
        self.turn = itertools.cycle(self.sets)
        with _reported(""):
            self._check()
            if self.case.metric.looped:
                sets, self.facts["inputs"] = rotated(self.sets)
                self.turn = itertools.cycle(sets)

    def warm_up(self, target: float) -> None:
        """The checks were the first calls; the calibration follows the warm-up, so both see compiled code."""
        if not self.case.metric.looped:
            return
        with _reported("while warming up: "), torch.no_grad():
            if self.clock(self._run) >= max(LONG, target):
                self.spare = 0
            else:
                loop(self._run, WARM_UP - 1)()
                self.inner = calibrate(self.clock, self._run, target)
            memory.forget_peak()

    def load_again(self) -> None:
        if isinstance(self.call, Loaded) and self.spare:  # long calls differ by half a percent from load to load
            with _reported("when it was loaded again: "), torch.no_grad():
                self.call.again()
                self._run()  # the first call is never timed

    def sample(self) -> float:
        with _reported("while it was measured: "):
            if not self.case.metric.timed:
                reading = self._run()
                self._judge(reading.error)
                return float(reading.value)
            with torch.no_grad() if self.case.metric.looped else contextlib.nullcontext():
                if self.case.metric.looped:
                    loop(self._run, self.spare)()  # the peer before has filled the caches with its own weights
                return self.clock(loop(self._run, self.inner)) / self.inner

    def finish(self) -> None:
        if self.case.metric.looped:
            self.facts["peak_memory"] = peak_rss()
            with _reported("after it was timed: "):
                self._check()

    def _run(self) -> Any:
        assert self.call is not None, f"{self.peer.name} is not prepared"
        return self.call(*next(self.turn))

    def _check(self) -> None:
        """Run once for each drawn set; an output that is wrong and an input that has changed drop the peer."""
        assert self.call is not None
        for inputs, expected in zip(self.sets, self.expected, strict=True):
            before = copy.deepcopy(inputs)
            with torch.no_grad() if self.case.metric.looped else contextlib.nullcontext():
                result = self.call(*inputs)
                if not all(map(torch.equal, flatten(before), flatten(inputs))):
                    raise WrongOutput("the peer changed its input")
                if isinstance(result, Reading):
                    self._judge(result.error)
                else:
                    self._judge(relative_error(self.peer.observe(result) if self.peer.observe else result, expected))

    def _judge(self, error: float) -> None:
        """Keep the largest error seen. Raises WrongOutput above the tolerance, and for NaN."""
        self.error = error if self.error is None or math.isnan(error) else max(error, self.error)
        if not error <= (tolerance := self.case.tolerance_of(self.peer)):
            raise WrongOutput(f"relative error {error:.3g} above the tolerance {tolerance:g}")


@contextlib.contextmanager
def local_seats(case: Case, peers: Sequence[int], seed: int, clock: Clock | None = None) -> Iterator[list[Seat]]:
    """Seats for those of the case's peers, all in this process."""
    task = Task.of(case, seed)
    yield [Local(case, index, lambda: task, clock) for index in peers]


@contextlib.contextmanager
def _reported(when: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise dropped(error, when) from error


def dropped(error: Exception, when: str) -> Dropped:
    """A peer that breaks is a result too: it is reported, and the others go on."""
    if isinstance(error, WrongOutput):
        return Dropped("wrong", when + str(error))
    missing = isinstance(error, Unavailable | ImportError)
    return Dropped("unavailable" if missing else "failed", when + describe(error))


def describe(error: BaseException) -> str:
    """The type of an error and the first line of its message: a reason that fits in a table."""
    lines = str(error).strip().splitlines()
    message = lines[0] if lines else ""
    return message if isinstance(error, Unavailable) else f"{type(error).__name__}: {message}"
