"""A peer in a process of its own, forked from a nursery, which is told what to do through a pipe.

What one peer loads, sets, spoils or crashes does not touch another, and its memory is its own. The processes of a case
live side by side and wait, so that rounds are interleaved as they are in one process.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .case import Case
from .nursery import ALIVE, Nursery
from .runner import Runner
from .seat import Dropped, Local, Seat, Task, dropped

SERVE = f"{__name__}:serve"
PATIENCE = 1800.0
"""Seconds that a peer may take for one thing."""
GRACE = 5.0
"""Seconds that it may take to end."""


@dataclass(frozen=True)
class Source:
    """Where a worker finds a case: in what `cases(options)` of a module yields, by its name and its metric's."""

    module: str
    options: Any
    case: tuple[str, str]
    threads: int
    seed: int

    def find(self) -> Case:
        for case in importlib.import_module(self.module).cases(self.options):
            if (case.name, case.metric.name) == self.case:
                return case
        raise LookupError(f"{self.module} has no case {self.case}")


class Process:
    """A worker, and what it answers. It is forked by the first thing it is asked."""

    def __init__(self, source: Source, nursery: Nursery, log: Path) -> None:
        self.source, self.nursery, self.log = source, nursery, log
        self.pid: int | None = None
        self.pipe: Connection | None = None
        self.ended = False

    def ask(self, *words: Any) -> Any:
        """What the worker answers to `words`. Raises Dropped, also where it dies or takes too long."""
        try:
            if self.pipe is None:
                self.pid, self.pipe = self.nursery.fork(self.log)
                self.pipe.send(self.source)
            self.pipe.send(words)
            if not self.pipe.poll(PATIENCE):
                raise Dropped("failed", f"no answer in {PATIENCE:.0f} s")
            answer = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise Dropped("failed", self._last_words() if self.pid else str(error)) from None
        if isinstance(answer, Dropped):
            raise answer
        return answer

    def _last_words(self) -> str:
        assert self.pid is not None
        status = self.nursery.wait(self.pid, GRACE)
        said = self.log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        return f"its process ended with status {status}: {said[0]}"

    def hang_up(self) -> None:
        """It ends, soon."""
        if self.pipe is not None:
            self.pipe.close()

    def close(self) -> None:
        """End it. One that does not hear that its pipe is closed is killed."""
        self.hang_up()
        if self.pid is None or self.ended:
            return
        self.ended = True
        if self.nursery.wait(self.pid, GRACE) == ALIVE:
            os.kill(self.pid, signal.SIGKILL)
            self.nursery.wait(self.pid, PATIENCE)


class Remote:
    """A seat in a worker. `task` is the file that there is when `known` has come."""

    def __init__(self, process: Process, index: int, task: Path, known: Future[None]) -> None:
        self.process, self.index, self.task, self.known = process, index, task, known
        self.error: float | None = None
        self.inner = self.spare = 1
        self.facts: dict[str, Any] = {}

    @property
    def pid(self) -> int | None:
        return self.process.pid

    def prepare(self) -> None:
        self._ask("build", self.index, self.task)
        with self._out():
            self.known.result()
        self._ask("check")

    def warm_up(self, target: float) -> None:
        self._ask("warm_up", target)

    def load_again(self) -> None:
        self._ask("load_again")

    def sample(self) -> float:
        return float(self._ask("sample"))

    def finish(self) -> None:
        self._ask("finish")

    def _ask(self, *words: Any) -> Any:
        with self._out():
            result, self.error, self.inner, self.spare, self.facts = self.process.ask(*words)
        return result

    @contextlib.contextmanager
    def _out(self) -> Iterator[None]:
        """The process of a peer that is out ends: the others need its memory."""
        try:
            yield
        except Dropped:
            self.process.close()
            raise


@contextlib.contextmanager
def worker_seats(
    case: Case, peers: Sequence[int], seed: int, source: Callable[[Case], Source], nursery: Nursery
) -> Iterator[list[Seat]]:
    """Seats for those of the case's peers, each in a worker; beside them one more computes the references, and ends."""
    with (
        tempfile.TemporaryDirectory(prefix="fxfreeze-bench-") as name,
        ThreadPoolExecutor(1) as pool,
        contextlib.ExitStack() as stack,
    ):
        folder, found = Path(name), source(case)
        task = folder / "task.pt"
        known = pool.submit(_write_task, Process(found, nursery, folder / "reference.log"), task)
        processes = [Process(found, nursery, folder / f"{index}.log") for index in peers]
        for end in (Process.close, Process.hang_up):  # all hang up before one is waited for
            for process in processes:
                stack.callback(end, process)
        yield [Remote(process, index, task, known) for process, index in zip(processes, peers, strict=True)]


def _write_task(process: Process, task: Path) -> None:
    with contextlib.closing(process):
        process.ask("task", task)


def nursery(preload: str, threads: int) -> contextlib.closing[Nursery]:
    """Where workers come from, until the context ends; with the module `preload` they have imported what they share."""
    return contextlib.closing(Nursery(preload, SERVE, threads))


def runner(
    module: str, options: Any, workers: Nursery, *, seed: int, rounds: int | None, quick: bool, peer: str,
    say: Callable[[str], None],
) -> Runner:  # fmt: skip
    """Runs what `cases(options)` of a module yields, a process for each peer whose name the glob `peer` takes."""

    def source(case: Case) -> Source:
        return Source(module, options, (case.name, case.metric.name), workers.threads, seed)

    return Runner(  # a builder more than there are cores: one or another waits for a file, or for the references
        rounds=rounds, quick=quick, seed=seed, say=say, builders=(os.cpu_count() or 1) + 1,
        wanted=lambda name: fnmatch(name, peer), kin=lambda: workers.pids,
        seats=functools.partial(worker_seats, source=source, nursery=workers),
    )  # fmt: skip


# ---- in the worker


def serve(pipe: Connection) -> None:
    """Answer until the other side hangs up."""
    import torch

    source: Source = pipe.recv()
    torch.set_num_threads(source.threads)
    seat: Local | None = None
    for word, *given in _heard(pipe):
        try:
            answer: Any = None
            if word == "task":
                torch.save(Task.of(source.find(), source.seed), given[0])
            elif word == "build":
                index, task = given
                seat = Local(source.find(), index, functools.partial(torch.load, task, weights_only=False))
                seat.build()
            else:
                answer = getattr(seat, word)(*given)
        except Dropped as out:
            pipe.send(out)
        except Exception as error:
            pipe.send(dropped(error, ""))
        else:
            pipe.send((answer, *((seat.error, seat.inner, seat.spare, seat.facts) if seat else ())))


def _heard(pipe: Connection) -> Iterator[Any]:
    with contextlib.suppress(EOFError):
        for _ in itertools.count():
            yield pipe.recv()
