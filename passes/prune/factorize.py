"""Two thin linear layers in the place of one whose weight is of low rank, where the predictions stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.errors import PlanError
from fxfreeze.plan import Factorize
from fxfreeze.program import Program
from fxfreeze.rewrite import Context, NoMatch, Pass, fail, match_sites

from .._adapters import describe
from .._measured import OutputTallies
from .._operators import WeightOperator, apply, aten, constant_problem, weight_operator


@dataclass(frozen=True)
class _Kept:
    """How many predictions stay, and on what that was measured."""

    share: float
    basis: str


class FactorizeLayers(Pass):
    """W ≈ U·V, the best approximation of its rank, by singular values in float64.

    Lossy. The rank is the step's, or the smallest with which as many predictions stay as the step asks, by bisection
    below the rank at which U and V together would be as large as W.
    """

    name, stage, exact = "factorize", "prune", False

    def run(self, program: Program, ctx: Context) -> int:
        steps = [(index, step) for index, step in enumerate(ctx.plan.steps) if isinstance(step, Factorize)]
        return sum(self._layer(program, ctx, step, layer) for index, step in steps
                   for layer in _layers(program, ctx, step, index))  # fmt: skip

    def _layer(self, program: Program, ctx: Context, step: Factorize, operator: WeightOperator) -> int:
        path, (out, inner) = program.module_path(operator.node), operator.shape
        most = (out * inner - 1) // (out + inner)
        found = _Search(program, ctx, operator).run(step, most)
        if isinstance(found, NoMatch):
            ctx.near_misses.append(found)
            ctx.ledger.add(site=path, step=step.name, requested=describe(step), outcome="refused", detail=found.reason)
            return 0
        rank, kept = found
        _split(program, operator, rank)
        ctx.ledger.add(
            site=path, step=step.name, requested=describe(step), outcome="rewritten",
            executes=f"two products of rank {rank}, {rank * (out + inner):,} weights for {out * inner:,}",
            detail=f"{kept.share:.2%} of predictions stay; {kept.basis}",
        )  # fmt: skip
        return 1


def _layers(program: Program, ctx: Context, step: Factorize, index: int) -> list[WeightOperator]:
    """The linear layers that `step` names; others get a row.

    Raises:
        PlanError: there is none.
    """
    sites, found = program.sites(), []
    reasons: dict[str, str] = {}
    for path in match_sites(program, step, index):
        calls = [item for node in sites.get(path, ()) if isinstance(item := weight_operator(node), WeightOperator)]
        linear = [item for item in calls if len(item.shape) == 2 and item.kind != "embedding"]
        if len(linear) == 1 and (problem := constant_problem(program, linear[0])) is None:
            found.append(linear[0])
        elif linear:
            reasons[path] = f"runs {len(linear)} times" if len(linear) > 1 else problem.reason  # type: ignore[union-attr]
        elif calls or not any(other.startswith(f"{path}.") for other in sites):
            reasons[path] = "is no linear layer"
    for path, reason in reasons.items():
        ctx.ledger.add(
            site=path, step=step.name, requested=describe(step), outcome="refused", detail=f"{path} {reason}"
        )
    if not found:
        told = "".join(f"\n  {path} {reason}" for path, reason in reasons.items())
        raise PlanError(f"steps[{index}].at: {step.at!r} names no linear layer{told}", where=step.name)
    return found


class _Search:
    """For a rank that keeps the predictions."""

    def __init__(self, program: Program, ctx: Context, operator: WeightOperator) -> None:
        self.program, self.ctx, self.operator = program, ctx, operator

    def run(self, step: Factorize, most: int) -> tuple[int, _Kept] | NoMatch:
        node = self.operator.node
        if (step.rank or 1) > most:
            return fail(f"U and V are smaller than W up to rank {most} only", node)
        high = step.rank or most
        kept = self.kept(high)
        if kept is None:
            return fail("no output looks like scores of classes, so it cannot be said whether predictions stay", node)
        if kept.share < step.agreement:
            return fail(
                f"with rank {high}, {kept.share:.2%} of predictions stay where {step.agreement:.2%} are asked; "
                f"{kept.basis}", node,
            )  # fmt: skip
        return (high, kept) if step.rank else self.smallest(high, kept, step.agreement)

    def smallest(self, high: int, kept: _Kept, agreement: float) -> tuple[int, _Kept]:
        """By bisection: more rank is taken to keep no fewer predictions."""
        low = 1
        while low < high:
            middle = (low + high) // 2
            found = self.kept(middle)
            assert found is not None
            if found.share >= agreement:
                high, kept = middle, found
            else:
                low = middle + 1
        return high, kept

    @torch.no_grad()
    def kept(self, rank: int) -> _Kept | None:
        """Which predictions stay with that rank; None where no output is one."""
        program, weight = self.program, self.operator.weight
        thin = program.clone()
        node = next(item for item in thin.graph.nodes if item.name == self.operator.node.name)
        own = next(item for item in node.all_input_nodes if item.name == weight.name)
        thin.rebind(own, self._product(rank).to(program.state[str(weight.target)].dtype), user=node)
        tallies = OutputTallies(program.outputs)
        with thin.computed_once(program):
            for inputs in self.ctx.calibration.of(program):
                tallies.add(inputs, thin.run(*inputs), program.run(*inputs))
        counts = [(tally.hits, tally.count) for tally in tallies.tallies.values() if tally.count]
        return _Kept(min(hits / count for hits, count in counts), tallies.basis(self.ctx)) if counts else None

    def _product(self, rank: int) -> Tensor:
        left, right = factors(self.program, self.operator, rank)
        return apply(self.operator.from_canonical(), left @ right)


def factors(program: Program, operator: WeightOperator, rank: int) -> tuple[Tensor, Tensor]:
    """U [out, rank] and V [rank, in] of the operator's weight in float64, each with the root of the singular values."""
    weight = program.constant64(operator.weight)
    assert weight is not None
    u, values, v = torch.linalg.svd(apply(operator.to_canonical(), weight), full_matrices=False)
    roots = values[:rank].sqrt()
    return u[:, :rank] * roots, roots.unsqueeze(1) * v[:rank]


def _split(program: Program, operator: WeightOperator, rank: int) -> None:
    node, name, dtype = operator.node, str(operator.weight.target), operator.weight.meta["val"].dtype
    moves = operator.from_canonical()
    left, right = (apply(moves, value).contiguous() for value in factors(program, operator, rank))
    thin = program.add_constant(f"{name}.V", right, dtype=dtype, before=node, like=node)
    wide = program.add_constant(f"{name}.U", left, dtype=dtype, before=node, like=node)
    first: Callable[..., Tensor] = aten.linear.default if operator.kind == "linear" else aten.matmul.default
    low: Node = program.call(first, operator.input, thin, before=node, like=node)
    args, kwargs = operator.call_arguments(input=low, weight=wide)
    program.replace(node, program.call(node.target, *args, before=node, like=node, **kwargs))  # type: ignore[arg-type]
