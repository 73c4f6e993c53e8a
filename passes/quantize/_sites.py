"""Which layers a step quantizes, and words for those it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from fxfreeze.errors import PlanError
from fxfreeze.kernels.tversky import KERNEL as TVERSKY
from fxfreeze.kernels.tversky_frozen import KERNEL as FROZEN
from fxfreeze.plan import Quantize
from fxfreeze.program import Program
from fxfreeze.rewrite import Context, check_excluded, match_sites

from .._adapters import addresses, describe
from .._heads import integer_step, is_static
from .._operators import WeightOperator, arguments, constant_problem, weight_operator


@dataclass(frozen=True)
class Place:
    """What a step quantizes: the module, and the call."""

    path: str
    step: Quantize

    @property
    def requested(self) -> str:
        return describe(self.step)

    @property
    def node(self) -> Node:
        raise NotImplementedError

    @property
    def read(self) -> tuple[Node, ...]:
        """The values that become integers for it; positional arguments of the call."""
        raise NotImplementedError

    def values(self, args: Sequence[Any]) -> list[Any]:
        """Of the call's positional arguments those that become integers."""
        return [args[self.node.args.index(value)] for value in self.read]


@dataclass(frozen=True)
class Site(Place):
    """A layer, and the step that quantizes it."""

    operator: WeightOperator

    @property
    def node(self) -> Node:
        return self.operator.node

    @property
    def read(self) -> tuple[Node, ...]:
        return (self.operator.input,)


@dataclass(frozen=True)
class _Called(Place):
    call: Node

    @property
    def node(self) -> Node:
        return self.call


@dataclass(frozen=True)
class Head(_Called):
    """A Tversky similarity, and the step that wants it on integers."""

    @property
    def read(self) -> tuple[Node, ...]:
        return (arguments(self.call)["a"],)


@dataclass(frozen=True)
class Product(_Called):
    """A product of two computed values, and the step that wants it on integers."""

    @property
    def requested(self) -> str:
        """With the call, for a module may have several."""
        return f"{describe(self.step)}, product {self.call.name}"

    @property
    def read(self) -> tuple[Node, ...]:
        return self.call.args[:2]  # type: ignore[return-value]


def has_budget(step: Quantize) -> bool:
    return step.budget is not None


def integer_heads(
    program: Program, ctx: Context, wanted: Callable[[Quantize], bool], problem: Callable[[Head], str | None]
) -> list[Head]:
    """The Tversky heads that steps want on integers; of what `problem` refuses, a row in the ledger says why."""
    steps = {node: integer_step(program, node, ctx.plan.steps) for node in _similarities(program)}
    heads = [Head(program.module_path(node), step, node) for node, step in steps.items() if step and wanted(step)]
    return [head for head in heads if not _refused(ctx, head, problem(head))]


def quantized_sites(
    program: Program, ctx: Context, wanted: Callable[[Quantize], bool], problem: Callable[[Site], str | None]
) -> list[Site]:
    """The layers of every step that `wanted` takes; of what a step names and `problem` refuses, a row says why.

    Of several steps that name one layer, the last quantizes it. The product x·Ωᵀ that a Tversky head on integers reads
    is a part of the head, and no layer.

    Raises:
        PlanError: a step names no layer, or excludes a module that is not there.
    """
    if ctx.floats is None and (ctx.sensitivity or any(getattr(step, "budget", None) for step in ctx.plan.steps)):
        ctx.floats = program.clone()
    heads = list(_similarities(program))
    frozen = [head for head in heads if head.target is FROZEN.op and integer_step(program, head, ctx.plan.steps)]
    projections = {arguments(head)["a"] for head in frozen}
    offered = {node: path for node, path in _layers(program) if node not in projections}
    chosen: dict[Node, Site] = {}
    for index, step in enumerate(ctx.plan.steps):
        if not isinstance(step, Quantize):
            continue
        check_excluded(program, step, index)
        paths = {path for path in match_sites(program, step, index) if addresses(step, path)}
        found = step.products  # of which the ledger says whether there are any
        for node, path in offered.items():
            operator = weight_operator(node)
            if path not in paths or not isinstance(operator, WeightOperator):
                continue
            found = True
            chosen[node] = Site(path, step, operator)
        found = found or (is_static(step) and any(map(paths.__contains__, map(program.module_path, heads))))
        if not found and wanted(step):
            raise PlanError(f"steps[{index}].at: {step.at!r} names no layer with a weight", where=step.name)
    return [site for site in chosen.values() if wanted(site.step) and _accepted(program, ctx, site, problem)]


def _accepted(program: Program, ctx: Context, site: Site, problem: Callable[[Site], str | None]) -> bool:
    computed = constant_problem(program, site.operator)
    return not _refused(ctx, site, computed.reason if computed else problem(site))


def _refused(ctx: Context, site: Site | Head, reason: str | None) -> bool:
    if reason is not None:
        ctx.ledger.add(
            site=site.path, step=site.step.name, requested=describe(site.step), outcome="refused", detail=reason
        )
    return reason is not None


def _similarities(program: Program) -> Iterator[Node]:
    """Every Tversky similarity, to frozen prototypes or not."""
    return (node for node in program.graph.nodes if node.target in (TVERSKY.op, FROZEN.op))


def _layers(program: Program) -> Iterator[tuple[Node, str]]:
    """Every operator with a weight of the model's, and the module that its user would name."""
    for node in program.graph.nodes:
        operator = weight_operator(node)
        if not isinstance(operator, WeightOperator) or not program.is_constant(operator.weight):
            continue
        path, owner = program.module_path(node), str(operator.weight.target).rpartition(".")[0]
        yield node, owner if owner.startswith(f"{path}.") else path
