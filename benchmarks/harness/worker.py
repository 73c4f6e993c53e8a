"""A peer in a process of its own, `python -m` this module, which is told what to do through a pipe.

What one peer loads, sets, spoils or crashes does not touch another, and its memory is its own. The processes of a case
live side by side and wait, so that rounds are interleaved as they are in one process.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from .case import Case
from .runner import Runner
from .seat import Dropped, Local, Seat, Task, dropped

ROOT = Path(__file__).resolve().parents[2]
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Read when torch and numpy are imported."""
PATIENCE = 1800.0
"""Seconds that a peer may take for one thing."""


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
    """A worker, and what it answers. It is started by the first thing it is asked."""

    def __init__(self, source: Source, log: Path) -> None:
        self.source, self.log = source, log
        self.child: subprocess.Popen[bytes] | None = None
        self.pipe: Connection | None = None

    @property
    def pid(self) -> int | None:
        return self.child.pid if self.child else None

    def ask(self, *words: Any) -> Any:
        """What the worker answers to `words`. Raises Dropped, also where it dies or takes too long."""
        if self.pipe is None:
            self._start()
        assert self.pipe is not None
        try:
            self.pipe.send(words)
            if not self.pipe.poll(PATIENCE):
                raise Dropped("failed", f"no answer in {PATIENCE:.0f} s")
            answer = self.pipe.recv()
        except (EOFError, OSError):
            raise Dropped("failed", self._last_words()) from None
        if isinstance(answer, Dropped):
            raise answer
        return answer

    def _start(self) -> None:
        self.pipe, theirs = Pipe()
        with self.log.open("wb") as log:
            self.child = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                cwd=ROOT if __name__.startswith("benchmarks.") else None, pass_fds=[theirs.fileno()],
                env=os.environ | dict.fromkeys(THREAD_VARIABLES, str(self.source.threads)),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        theirs.close()
        self.pipe.send(self.source)

    def _last_words(self) -> str:
        assert self.child is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.wait(10)
        said = self.log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        return f"its process ended with status {self.child.poll()}: {said[0]}"

    def close(self) -> None:
        if self.pipe is not None:
            self.pipe.close()  # which ends the worker's loop
        if self.child is not None:
            try:
                self.child.wait(5)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()


class Remote:
    """A seat in a worker."""

    def __init__(self, process: Process, index: int, task: Path) -> None:
        self.process, self.index, self.task = process, index, task
        self.error: float | None = None
        self.inner = 1
        self.facts: dict[str, Any] = {}

    @property
    def pid(self) -> int | None:
        return self.process.pid

    def prepare(self) -> None:
        self._ask("prepare", self.index, self.task)

    def warm_up(self, target: float) -> None:
        self._ask("warm_up", target)

    def sample(self) -> float:
        return float(self._ask("sample"))

    def finish(self) -> None:
        self._ask("finish")

    def _ask(self, *words: Any) -> Any:
        try:
            result, self.error, self.inner, self.facts = self.process.ask(*words)
        except Dropped:
            self.process.close()  # the others need its memory
            raise
        return result


@contextlib.contextmanager
def worker_seats(case: Case, peers: Sequence[int], seed: int, source: Callable[[Case], Source]) -> Iterator[list[Seat]]:
    """Seats for those of the case's peers, each in a worker; a first one computes the references and ends."""
    with tempfile.TemporaryDirectory(prefix="fxfreeze-bench-") as name, contextlib.ExitStack() as stack:
        folder, found = Path(name), source(case)
        first = Process(found, folder / "reference.log")
        try:
            first.ask("task", folder / "task.pt")
        finally:
            first.close()
        seats: list[Seat] = []
        for index in peers:
            process = Process(found, folder / f"{index}.log")
            stack.callback(process.close)
            seats.append(Remote(process, index, folder / "task.pt"))
        yield seats


def runner(
    module: str, options: Any, *, threads: int, seed: int, rounds: int | None, quick: bool, peer: str,
    say: Callable[[str], None],
) -> Runner:  # fmt: skip
    """Runs what `cases(options)` of a module yields, a process for each peer whose name the glob `peer` takes."""

    def source(case: Case) -> Source:
        return Source(module, options, (case.name, case.metric.name), threads, seed)

    return Runner(
        rounds=rounds, quick=quick, seed=seed, say=say, builders=os.cpu_count() or 1,
        wanted=lambda name: fnmatch(name, peer), seats=functools.partial(worker_seats, source=source),
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
            case = source.find() if word in ("task", "prepare") else None
            if word == "task":
                torch.save(Task.of(case, source.seed), given[0])  # type: ignore[arg-type]
                answer: Any = None
            elif word == "prepare":
                assert case is not None
                task: Task = torch.load(given[1], weights_only=False)
                seat = Local(case, case.peers[given[0]], task.inputs, task.expected[given[0]])
                answer = None
                seat.prepare()
            else:
                answer = getattr(seat, word)(*given)
        except Dropped as out:
            pipe.send(out)
        except Exception as error:
            pipe.send(dropped(error, ""))
        else:
            pipe.send((answer, *((seat.error, seat.inner, seat.facts) if seat else ())))


def _heard(pipe: Connection) -> Iterator[Any]:
    with contextlib.suppress(EOFError):
        for _ in itertools.count():
            yield pipe.recv()


if __name__ == "__main__":
    # As a module of the package, so that what is sent has the classes of the other side.
    importlib.import_module(f"{__package__}.worker").serve(Connection(int(sys.argv[1])))
