"""Where the runs of a ticket search are made: here, one after another, or as tasks on a Ray cluster."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from .errors import FxfreezeError, MissingDependencyError
from .tickets_run import Build, Evaluate, Key, Outcome, Task, Train, perform

RETRIES = 3
"""How often a run is made again whose worker was lost."""


class Runner(Protocol):
    """Takes tasks, and gives back what is done in any order."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: Any) -> None: ...

    def room(self) -> bool:
        """Whether to submit another task now."""
        ...

    def submit(self, task: Task) -> None: ...

    def wait(self) -> tuple[Key, Outcome]:
        """The next run that is done."""
        ...


class Here:
    """In this process, one run at a time."""

    def __init__(self, build: Build, train: Train, evaluate: Evaluate) -> None:
        self.functions = build, train, evaluate
        self.waiting: list[Task] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def room(self) -> bool:
        return not self.waiting

    def submit(self, task: Task) -> None:
        self.waiting.append(task)

    def wait(self) -> tuple[Key, Outcome]:
        task = self.waiting.pop(0)
        return task.key, perform(task, *self.functions)


class Cluster:
    """On a Ray cluster: as many runs at a time as it has room for.

    A run whose worker, or whose machine, is lost is made again by Ray, up to RETRIES times; as a run depends on its
    task only, its result is the same. Files are written by the process that searches, never by a worker.

    Args:
        address: "local" starts a cluster on this machine and stops it at the end, unless Ray runs in this process
            already; else as for ``ray.init``.
        cpus, gpus: what each run takes. It computes with `cpus` threads.

    Raises:
        MissingDependencyError: ray is not installed.
        FxfreezeError: there is no such cluster.
    """

    def __init__(
        self, build: Build, train: Train, evaluate: Evaluate, *, address: str, cpus: float, gpus: float
    ) -> None:
        try:
            import ray
        except ImportError as error:
            raise MissingDependencyError(
                "a search on a cluster needs the package 'ray'", hint="pip install 'fxfreeze[search]'"
            ) from error
        self.ray, self.address = ray, address
        self.needs = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": RETRIES}
        self.functions: Sequence[Any] = (build, train, evaluate, max(1, int(cpus)))
        self.running: dict[Any, Key] = {}
        self.owned = False

    def __enter__(self) -> Self:
        ray = self.ray
        if not ray.is_initialized():
            quiet = {"include_dashboard": False} if self.address == "local" else {}
            try:
                ray.init(self.address, log_to_driver=False, **quiet)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise FxfreezeError(
                    f"no Ray cluster answers: {error}", where=f"cluster={self.address!r}",
                    hint='cluster="local" starts one on this machine',
                ) from error  # fmt: skip
            self.owned = True
        self.remote = ray.remote(_perform).options(**self.needs)
        self.shared = ray.put(self.functions)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for reference in self.running:
            self.ray.cancel(reference, force=True)
        if self.owned:
            self.ray.shutdown()

    def room(self) -> bool:
        return True  # what has no room yet waits in Ray

    def submit(self, task: Task) -> None:
        self.running[self.remote.remote(task, self.shared)] = task.key

    def wait(self) -> tuple[Key, Outcome]:
        (reference,), _ = self.ray.wait(list(self.running), num_returns=1)
        key = self.running[reference]
        try:
            outcome = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:  # the caller's own error, as it would be here
            raise error.as_instanceof_cause() from None
        except self.ray.exceptions.RayError as error:
            run = f"{key.kind}, seed {key.seed}, level {key.level}"
            raise FxfreezeError(
                f"{run} lost its worker in all of {RETRIES + 1} attempts: {error}",
                hint="search again with the same folder: what is done lies there",
            ) from error  # fmt: skip
        del self.running[reference]
        return key, outcome


def _perform(task: Task, functions: Sequence[Any]) -> Outcome:
    """In a worker."""
    build, train, evaluate, threads = functions
    torch.set_num_threads(threads)
    return perform(task, build, train, evaluate)
