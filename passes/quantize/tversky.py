"""Tversky heads on integers: the measures of objects and of prototypes on one grid, and exact sums of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.inline import inline
from fxfreeze.kernels._tversky import Combination
from fxfreeze.kernels.quantize import KERNEL as QUANTIZE
from fxfreeze.kernels.tversky_frozen import KERNEL as FROZEN
from fxfreeze.kernels.tversky_integer import KERNEL as INTEGER
from fxfreeze.kernels.tversky_integer import LEVELS, MAX_MINIMA, problem
from fxfreeze.program import INTEGERS, IntegerSite, Program
from fxfreeze.rewrite import Context, Pass

from .._adapters import describe
from .._heads import combination_of
from .._measured import Tally, measured_rewrite
from .._operators import arguments
from ._calibrate import Seen, observe, watched_run
from ._sensitivity import kept
from ._sites import Head, has_budget, integer_heads

_KINDS = ("model", "intersection", "difference", "semantics")
_WEIGHTS = ("theta", "alpha", "beta")


class QuantizeTversky(Pass):
    """``fxfreeze::tversky_frozen`` becomes ``fxfreeze::tversky_integer`` for ``Quantize(scheme="int8")``.

    A measure is a code from 0 to 255 in steps of one grid. An absent feature is 0, and a present one at least 1, small
    as it may be: presence is decided by the floats, as before, for one more or one less moves a similarity by a whole
    measure of the other side. Objects and prototypes share the grid, since minima and differences between them are no
    integers otherwise. What it spans is tried out on the calibration data: the measures of the objects, those of the
    prototypes, or the geometric mean of both; larger measures saturate.

    The product x·Ωᵀ stays in floats: in 8 bits, measures near the threshold would be on the wrong side of it.
    """

    name, stage, exact = "quantize_tversky", "quantize", False
    within_budget: ClassVar[bool] = False
    """Whether it is for steps with a budget."""

    def run(self, program: Program, ctx: Context) -> int:
        heads = integer_heads(program, ctx, lambda step: has_budget(step) == self.within_budget,
                              lambda head: _problem(program, head, ctx.plan.targets))  # fmt: skip
        if not heads:
            return 0
        return measured_rewrite(ctx, program, "Tversky heads on integers", lambda: self._quantize(program, ctx, heads))

    def _quantize(self, program: Program, ctx: Context, heads: Sequence[Head]) -> Collection[Head]:
        """Those of the heads that come to run on integers."""
        seen = observe(program, ctx, {_read(head.node, "a"): head.step.calibrate for head in heads})
        tried = dict(zip(heads, _tried(program, ctx, heads, seen), strict=True))
        grids = {head: min(found, key=lambda grid: found[grid].gap) for head, found in tried.items()}
        chosen = kept(program, ctx, {
            head: partial(_computed, program, head.node, grid) for head, grid in grids.items()
        })  # fmt: skip
        for head in chosen:
            grid = grids[head]
            _report(program, ctx, head, grid, tried[head][grid], seen)
            _rewrite(program, head, grid)
        return chosen


class QuantizeTverskyWithin(QuantizeTversky):
    """As `quantize_tversky`, with a budget: behind what has none, so that the budget counts that, too."""

    name, within_budget = "quantize_tversky_within", True


@dataclass(frozen=True)
class Grid:
    """Codes stand for multiples of `step`, a number of `dtype`."""

    step: float
    spans: str
    dtype: torch.dtype

    @property
    def largest(self) -> float:
        """What is larger saturates."""
        return (LEVELS + 0.5) * self.step

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The step, and the code of an absent feature."""
        step = torch.tensor(self.step, dtype=self.dtype, device=device)
        return step, torch.tensor(0, dtype=torch.uint8, device=device)


def codes(measures: Tensor, step: Tensor, zero: Tensor, threshold: float) -> Tensor:
    """Measures [...] as uint8: 0 for absent features, and the nearest of 1 … 255 steps for present ones."""
    present = torch.maximum(measures, step) * (measures > threshold)
    return QUANTIZE.op(present, step, zero, 0, 0, 0, LEVELS)


def _problem(program: Program, head: Head, targets: Sequence[str]) -> str | None:
    if head.node.target is not FROZEN.op:
        return "its bank and prototypes were not folded into constant measures"
    how, measures = combination_of(head.node), _read(head.node, "measures").meta["val"]
    if measures.device.type != "cpu" and (reason := _gpu_problem(how, measures, targets)):
        return reason
    if how.threshold < 0:
        return f"features with negative measures are present above {how.threshold:g}, and the grid begins at 0"
    if any(not program.is_constant(_read(head.node, name)) for name in ("measures", "totals", *_WEIGHTS)):
        return "its prototypes or its weights are computed in the graph, not constant"
    return problem(how, measures.shape[0])


def _gpu_problem(how: Combination, measures: Tensor, targets: Sequence[str]) -> str | None:
    """Why the Triton kernel does not run the similarity, or None."""
    if measures.device.type != "cuda" or tuple(targets) != ("torch",):
        return f"on {measures.device.type}, integer similarities have a kernel for the torch target alone"
    if measures.dtype == torch.float64:
        return "the kernel for GPUs takes no float64"
    if "min" in how.terms and measures.shape[0] > MAX_MINIMA:
        return f"the kernel for GPUs sums minima of up to {MAX_MINIMA} features"
    return None


def _read(head: Node, name: str) -> Node:
    found = arguments(head)[name]
    assert isinstance(found, Node)
    return found


def _grids(program: Program, head: Head, seen: Seen) -> list[Grid]:
    """What may be spanned; one grid where objects and prototypes reach equally far, or only one of them anywhere."""
    a, measures = _read(head.node, "a"), program.constant(_read(head.node, "measures"))
    assert measures is not None
    dtype = a.meta["val"].dtype
    objects, prototypes = seen.observers[a].range(head.step.percentile).high, float(measures.max())
    reaches = {"the objects' measures": objects, "the prototypes' measures": prototypes}
    if min(objects, prototypes) > 0:
        reaches["the geometric mean of objects' and prototypes' measures"] = math.sqrt(objects * prototypes)
    least = torch.finfo(dtype).tiny
    steps = {float(torch.tensor(high / LEVELS, dtype=dtype)): spans for spans, high in reaches.items()}
    return [Grid(step, spans, dtype) for step, spans in steps.items() if step > least] or [Grid(1.0, "nothing", dtype)]


@torch.no_grad()
def _tried(program: Program, ctx: Context, heads: Sequence[Head], seen: Seen) -> list[dict[Grid, Tally]]:
    """What each grid changes in each head's result, from the same float measures, on one batch; hits saturate."""
    found = {head.node: {grid: Tally() for grid in _grids(program, head, seen)} for head in heads}
    held: dict[Node, Tensor] = {}
    read = {_read(node, "a") for node in found}

    def look(node: Node, value: Tensor) -> None:
        if node in read:
            held[node] = value
        for grid, tally in found.get(node, {}).items():
            a = held[_read(node, "a")]
            tally.add(_computed(program, node, grid, a), value, a > grid.largest)

    watched_run(program, next(iter(ctx.calibration.of(program))), look)
    return [found[head.node] for head in heads]


def _computed(program: Program, head: Node, grid: Grid, a: Tensor) -> Tensor:
    given, (table, totals) = arguments(head), _tables(program, head, grid)
    (step, zero), threshold = grid.tensors(a.device), given["threshold"]
    weights = (program.constant(given[name]) for name in _WEIGHTS)
    kinds = {key: given[key] for key in _KINDS}
    return INTEGER.op(codes(a, step, zero, threshold), table, totals, step, *weights, **kinds, dtype=given["dtype"])


def _tables(program: Program, head: Node, grid: Grid) -> tuple[Tensor, Tensor]:
    """Codes of the prototypes, made of what folding computed in float64, and their sums."""
    measures = program.constant64(_read(head, "measures"))
    assert measures is not None
    step, zero = grid.tensors(measures.device)
    table = codes(measures, step.double(), zero, arguments(head)["threshold"])
    return table, table.sum(0, dtype=torch.int32)


def _report(program: Program, ctx: Context, head: Head, grid: Grid, noise: Tally, seen: Seen) -> None:
    measures = program.constant(_read(head.node, "measures"))
    assert measures is not None
    saturated = float((measures > grid.largest).double().mean())
    notes = [
        f"{noise.words} of its result", f"0 … {LEVELS} span {grid.spans}", seen.basis(ctx),
        f"{noise.hits / max(noise.count, 1):.2%} of objects' and {saturated:.2%} of prototypes' measures saturate",
        "sums over features run in integers; x·Ωᵀ, what is present, and what similarities make of sums in floats",
    ]  # fmt: skip
    ctx.ledger.add(
        site=head.path, step=head.step.name, requested=describe(head.step), outcome="rewritten",
        executes=f"{INTEGER.op}: uint8 measures of objects and prototypes on one grid", detail="; ".join(notes),
    )  # fmt: skip


def _rewrite(program: Program, head: Head, grid: Grid) -> None:
    node, given = head.node, arguments(head.node)
    name, kinds = str(_read(node, "measures").target), {key: given[key] for key in _KINDS}
    table, totals = _tables(program, node, grid)
    constants = dict(
        zip(("codes", "totals", "step", "zero"), (table, totals, *grid.tensors(table.device)), strict=True)
    )
    nodes = [program.add_constant(f"{name}.{leaf}", value.contiguous(), before=node, like=node)
             for leaf, value in constants.items()]  # fmt: skip

    def similarity(a: Tensor, table: Tensor, totals: Tensor, step: Tensor, zero: Tensor, *weights: Tensor) -> Tensor:
        objects = codes(a, step, zero, given["threshold"])
        return INTEGER.op(objects, table, totals, step, *weights, **kinds, dtype=given["dtype"])

    weights = (given[weight] for weight in _WEIGHTS)
    result = inline(program, similarity, given["a"], *nodes, *weights, before=node, like=node)
    result.meta[INTEGERS] = IntegerSite(head.path, head.step.name)
    program.replace(node, result)
