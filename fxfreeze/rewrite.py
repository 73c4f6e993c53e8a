"""What a pass is.

A :class:`Pass` rewrites a :class:`~fxfreeze.program.Program` in place and returns how many rewrites it made. The
pipeline holds it to that number, verifies the result and proves it; see :mod:`fxfreeze.pipeline`.

:class:`NodeRewrite` is the usual kind: it names the operators it starts from and says, node by node, what it did or why
it did not. A non-match is a value (:class:`NoMatch`) with its reason and the node that was in the way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.fx import Node

from .calibration import Calibration
from .errors import PassError, PlanError
from .plan import Plan, Prune, Quantize, Step
from .program import Program
from .sensitivity import SiteSensitivity

Outcome = Literal["rewritten", "refused", "skipped", "measured"]

STAGES = ("clean", "adapt", "freeze", "fold", "prune", "quantize", "fuse", "lower")
"""The order of stages; the tuple in ``passes/__init__.py`` is the order of passes within and across them."""

REPRODUCED = ("clean", "adapt", "lower")
"""Stages whose passes are not exact and yet leave the function that the adapted model's own eager run computes: two
make it, one rounds it. An inexact pass of another stage is lossy."""


@dataclass(frozen=True)
class LedgerRow:
    """What became of one request at one site: requested → rewritten → what executes, or refused, and why."""

    site: str
    step: str
    requested: str
    outcome: Outcome
    pass_name: str = ""
    executes: str = ""
    detail: str = ""


class Ledger:
    """Every row written during one compilation, in order and once."""

    def __init__(self, rows: Iterable[LedgerRow] = ()) -> None:
        self._rows = dict.fromkeys(rows)  # a plan with 10,000 sites has as many rows, and more, to look a new one up in
        self.current_pass = ""

    @property
    def rows(self) -> list[LedgerRow]:
        return list(self._rows)

    def add(
        self, *, site: str, step: str, requested: str, outcome: Outcome, executes: str = "", detail: str = ""
    ) -> None:
        """Append a row under the name of the pass that is running; a row that says the same again is dropped."""
        row = LedgerRow(site, step, requested, outcome, self.current_pass, executes, detail)
        self._rows.setdefault(row)

    def __iter__(self) -> Iterator[LedgerRow]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def to_json(self) -> list[dict[str, str]]:
        return [asdict(row) for row in self._rows]


@dataclass
class Context:
    """What a pass may consult beside the program: the plan, the ledger, and inputs to measure on.

    Attributes:
        given: inputs of the caller's to measure on, if any.
        source: the program after the last lossy pass, which is the function that all later passes keep; None: there was
            no lossy pass.
        evaluate: scores a program, called with flat tensors, by the caller's measure; higher is better.
        sensitivity: measure what quantizing each layer alone does, even where no budget asks for it.
        measured: what that gave.
        floats: the program before its first layer became integers; None: no pass had to know.
    """

    plan: Plan
    ledger: Ledger = field(default_factory=Ledger)
    near_misses: list[NoMatch] = field(default_factory=list)
    given: Calibration | None = None
    source: Program | None = None
    evaluate: Callable[[Callable[..., Sequence[Tensor]]], float] | None = None
    sensitivity: bool = False
    measured: list[SiteSensitivity] = field(default_factory=list)
    floats: Program | None = None

    @property
    def calibration(self) -> Calibration:
        """Inputs to measure on: the caller's, else drawn from the plan."""
        return self.given or Calibration(self.plan, None)


@dataclass(frozen=True)
class NoMatch:
    """A rewrite that did not apply, and why."""

    reason: str
    node: Node

    def __bool__(self) -> bool:
        return False


def fail(reason: str, node: Node) -> NoMatch:
    """`node` stands in the way of a rewrite, because of `reason`."""
    return NoMatch(reason, node)


class Pass(ABC):
    """One rewrite of a whole program.

    Attributes:
        name: what the ledger, the dumps and ``fxfreeze passes`` call it.
        stage: one of :data:`STAGES`.
        exact: True when the function computed stays the same in real arithmetic; the pipeline then proves it. A pass
            that is not exact has its error measured and reported instead.
    """

    name: ClassVar[str]
    stage: ClassVar[str]
    exact: ClassVar[bool] = True

    @abstractmethod
    def run(self, program: Program, ctx: Context) -> int:
        """Rewrite `program` in place; return the number of rewrites, 0 only if nothing changed."""


class NodeRewrite(Pass):
    """A pass that looks at one node at a time, over and over until no node matches.

    Attributes:
        targets: the operators :meth:`rewrite` is called for.
        max_sweeps: more sweeps than this over the graph is a defect of the pass and raises.
    """

    targets: ClassVar[tuple[Any, ...]]
    max_sweeps: ClassVar[int] = 64

    @abstractmethod
    def rewrite(self, program: Program, node: Node, ctx: Context) -> bool | NoMatch:
        """Try the rewrite at `node`: True when done, else False or ``fail(reason, node)``."""

    def missed(self, program: Program, miss: NoMatch, ctx: Context) -> None:
        """Called in the end for every node that stayed, with the reason: the place for a row in the ledger."""

    def run(self, program: Program, ctx: Context) -> int:
        total = 0
        for _ in range(self.max_sweeps):
            count, misses = self._sweep(program, ctx)
            total += count
            if not count:
                ctx.near_misses.extend(misses)
                for miss in misses:
                    self.missed(program, miss, ctx)
                return total
            program.sweep()
        raise PassError(
            f"{self.name} still finds something to rewrite after {self.max_sweeps} sweeps", where=self.name,
            hint="two of its rewrites undo each other; this is a defect of the pass, not of the model",
        )  # fmt: skip

    def _sweep(self, program: Program, ctx: Context) -> tuple[int, list[NoMatch]]:
        count = 0
        misses: list[NoMatch] = []
        for node in list(program.graph.nodes):
            # An earlier rewrite of this sweep may have left the node without users, or erased it.
            if node.op != "call_function" or node.target not in self.targets or node._erased or not node.users:
                continue
            outcome = self.rewrite(program, node, ctx)
            count += outcome is True
            if isinstance(outcome, NoMatch):
                misses.append(outcome)
        return count, misses


def match_sites(program: Program, step: Step, index: int) -> list[str]:
    """Module paths that the step's `at` patterns name, in graph order.

    Raises:
        PlanError: a pattern names no module; lists the nearest paths.
    """
    paths = program.module_paths()
    chosen: dict[str, None] = {}
    for pattern in step.patterns:
        hits = [path for path in paths if fnmatchcase(path, pattern)]
        if not hits:
            raise PlanError(
                f"steps[{index}].at: no module matches {pattern!r}",
                where=step.name, hint="nearest paths: " + ", ".join(nearest(pattern, list(paths))),
            )  # fmt: skip
        chosen.update(dict.fromkeys(hits))
    return [path for path in paths if path in chosen]


def check_excluded(program: Program, step: Prune | Quantize, index: int) -> None:
    """Refuse an `exclude` pattern that names no module.

    Raises:
        PlanError: lists the nearest paths.
    """
    paths = list(program.module_paths())
    for glob in step.excluded:
        if not any(fnmatchcase(path, glob) for path in paths):
            raise PlanError(
                f"steps[{index}].exclude: no module matches {glob!r}",
                where=step.name, hint="nearest paths: " + ", ".join(nearest(glob, paths)),
            )  # fmt: skip


def nearest(pattern: str, paths: Sequence[str], count: int = 5) -> list[str]:
    """The `count` paths most like `pattern`."""

    def likeness(path: str) -> float:
        return SequenceMatcher(None, pattern.replace("*", ""), path).ratio()

    return sorted(paths, key=likeness, reverse=True)[:count]
