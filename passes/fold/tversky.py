"""Fold a Tversky similarity to frozen prototypes into matrix products with constant tables."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.functional import linear

from fxfreeze.inline import inline
from fxfreeze.kernels._tversky import Combination, cast, combination, project, similarity, working_dtype
from fxfreeze.kernels.tversky import KERNEL
from fxfreeze.program import Origin, Program
from fxfreeze.rewrite import Context, NodeRewrite, NoMatch, Outcome, fail

from .._operators import arguments
from ._tversky import FrozenTerms, Prototypes, single_product

GROWTH = 4
"""The tables may take this many times the bytes of the bank and the prototypes they are made from, and 16 MiB more."""
_FREE = 16 << 20


class FoldTversky(NodeRewrite):
    """With the bank and the prototypes constant, b = Π·Ωᵀ and all that follows from it is computed once, in float64.

    What is left are a = x·Ωᵀ, its indicator, and

    * one product with a table [P, 2K] (gmean: [P, 3K]) for the contrast model where it is linear in the sums: product
      and mean with ignorematch, and gmean feature by feature;
    * otherwise one product per sum (at most three) and a pointwise epilogue; minima per feature stay a reduction.

    Half precision is computed in float32, as the operator does: an indicator rounds to the wrong side too easily.
    """

    name, stage, targets = "fold-tversky", "fold", (KERNEL.op,)

    def missed(self, program: Program, miss: NoMatch, ctx: Context) -> None:
        _report(program, ctx, miss.node, "skipped", executes=str(KERNEL.op), detail=miss.reason)

    def rewrite(self, program: Program, node: Node, ctx: Context) -> bool | NoMatch:
        given = arguments(node)
        names = ("features", "prototypes", "theta", "alpha", "beta")
        values = [program.constant64(given[name]) for name in names]
        computed = [name for name, value in zip(names, values, strict=True) if value is None]
        if computed:
            return fail(f"{' and '.join(computed)} computed in the graph, not constant", node)
        how = _combination(node)
        frozen = Prototypes.of(how, *values[:2], normalize=given["normalize"])  # type: ignore[arg-type]
        single = single_product(how, frozen, *values[2:])  # type: ignore[arg-type]
        tables = frozen.tables if single is None else {"table": single[0], "bias": single[1]}
        dtype = working_dtype(given["x"].meta["val"])
        size = sum(value.numel() for value in tables.values()) * dtype.itemsize
        limit = _FREE + GROWTH * sum(program.state.tensor(str(given[name].target)).nbytes for name in names[:2])
        if size > limit:
            return fail(f"its tables would take {size / 2**20:.1f} MiB, the limit is {limit / 2**20:.1f}", node)
        _report(
            program, ctx, node, "rewritten",
            executes=f"{'one matrix product' if single else 'matrix products'} with "
                     + ", ".join(f"{name} {list(value.shape)}" for name, value in tables.items() if value.dim() == 2),
            detail=f"{size / 2**20:.1f} MiB of tables, made once instead of in every call",
        )  # fmt: skip
        node.meta.pop("fxfreeze", None)  # what takes its place is no step's any more
        constants = {name: program.add_constant(f"{_path(program, node)}.{name}", value, dtype=dtype, before=node,
                                                like=node) for name, value in tables.items()}  # fmt: skip
        build = _products if single is None else _product
        program.replace(node, build(program, node, how, constants))
        return True


def _product(program: Program, node: Node, how: Combination, constants: dict[str, Node]) -> Node:
    given = arguments(node)

    def function(x: Tensor, features: Tensor, table: Tensor, bias: Tensor) -> Tensor:
        a = project(x, features, given["normalize"])
        has = (a > how.threshold).to(a.dtype)
        present = a * has
        parts = [present, has]
        if table.shape[1] > 2 * a.shape[-1]:
            parts.append(present.sqrt())
        return cast(linear(torch.cat(parts, -1), table, bias), x.dtype)

    operands = given["x"], given["features"], constants["table"], constants["bias"]
    return inline(program, function, *operands, before=node, like=node)


def _products(program: Program, node: Node, how: Combination, constants: dict[str, Node]) -> Node:
    given, names = arguments(node), list(constants)

    def function(x: Tensor, features: Tensor, theta: Tensor, alpha: Tensor, beta: Tensor, *tables: Tensor) -> Tensor:
        a = project(x, features, given["normalize"])
        terms = FrozenTerms(a, how.threshold, dict(zip(names, tables, strict=True)))
        scores = similarity(how, terms, *(cast(weight, a.dtype) for weight in (theta, alpha, beta)))
        return cast(scores, x.dtype)

    weights = (given[name] for name in ("x", "features", "theta", "alpha", "beta"))
    return inline(program, function, *weights, *constants.values(), before=node, like=node)


def _combination(node: Node) -> Combination:
    given = arguments(node)
    return combination(*(given[key] for key in ("model", "intersection", "difference", "semantics", "threshold")))


def _report(program: Program, ctx: Context, node: Node, outcome: Outcome, *, executes: str, detail: str) -> None:
    how, origin = _combination(node), node.meta.get("fxfreeze")
    step, site = (origin.step, origin.site) if isinstance(origin, Origin) else ("", program.module_path(node))
    ctx.ledger.add(
        site=site, step=step, requested=f"Tversky {how.model}, {how.intersection}, {how.difference}, {how.semantics}",
        outcome=outcome, executes=executes, detail=detail,
    )  # fmt: skip


def _path(program: Program, node: Node) -> str:
    return program.module_path(node) or node.name
