"""Fold a Tversky similarity to frozen prototypes into products with constant tables, or into one reading of a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.functional import linear

from fxfreeze.inline import inline
from fxfreeze.kernels._tversky import Combination, cast, project, similarity, working_dtype
from fxfreeze.kernels.tversky import KERNEL
from fxfreeze.kernels.tversky_frozen import KERNEL as FROZEN
from fxfreeze.kernels.tversky_frozen import suits_cpu
from fxfreeze.program import Origin, Program
from fxfreeze.rewrite import Context, NodeRewrite, NoMatch, Outcome, fail

from .._heads import Prototypes, combination_of, integer_step, read_measures
from .._operators import arguments
from ._tversky import FrozenTerms, is_single, single_product, table_names

GROWTH = 4
"""The tables may take this many times the bytes of the bank and the prototypes they are made from, and 16 MiB more."""
_FREE = 16 << 20
SMALL = 1 << 19
"""Of fewer measures, one product in a compiled graph is done before an operator is called. Measured on two cores with 1
and 16 rows: 21 µs against 52 at K = 128, P = 10, 282 against 336 at 256 x 1000, 11 ms against 9.5 at 1024 x 5000."""


class FoldTversky(NodeRewrite):
    """With the bank and the prototypes constant, b = Π·Ωᵀ and all that follows from it is computed once, in float64.

    What is left are a = x·Ωᵀ and one of three :class:`Form`:

    * one product of [a⁺, 1ᵃ] with a table [P, 2K] (gmean: [P, 3K]) for the contrast model where it is linear in the
      sums: product and mean with ignorematch, and gmean feature by feature;
    * else one product per sum (at most three) and a pointwise epilogue; minima per feature stay a reduction;
    * ``fxfreeze::tversky_frozen``, which makes all sums of one reading of b for up to eight rows at a time, and leaves
      out what a row has not: on a CPU for few rows, as far as the declared sizes tell, and for minima per feature; on a
      GPU where nothing but the torch target, which launches its kernels, is asked for; and wherever a step wants the
      head on integers, which are made of b.

    Half precision is computed in float32, as the operator does: an indicator rounds to the wrong side too easily.
    """

    name, stage, targets = "fold-tversky", "fold", (KERNEL.op,)

    def missed(self, program: Program, miss: NoMatch, ctx: Context) -> None:
        _report(program, ctx, miss.node, "skipped", executes=str(KERNEL.op), detail=miss.reason)

    def rewrite(self, program: Program, node: Node, ctx: Context) -> bool | NoMatch:
        given = arguments(node)
        names = ("features", "prototypes", "theta", "alpha", "beta")
        computed = [name for name in names if given[name].op != "get_attr"]
        if computed:
            return fail(f"{' and '.join(computed)} computed in the graph, not constant", node)
        how, dtype = combination_of(node), working_dtype(given["x"].meta["val"])
        form = choose(program, node, how, ctx.plan.targets)
        if integer_step(program, node, ctx.plan.steps):
            form = _once(*_sizes(node))
        size = sum(map(math.prod, form.shapes.values())) * dtype.itemsize
        limit = _FREE + GROWTH * sum(program.state.tensor(str(given[name].target)).nbytes for name in names[:2])
        if size > limit:
            return fail(f"its tables would take {_mib(size)}, the limit is {_mib(limit)}", node)
        features, prototypes, *weights = (program.constant64(given[name]) for name in names)
        frozen = Prototypes(how, features, prototypes, normalize=given["normalize"])  # type: ignore[arg-type]
        details = [f"{_mib(size)} of tables, made once and not in every call", *_remarks(program, node, frozen, dtype)]
        _report(program, ctx, node, "rewritten", executes=form.says, detail="; ".join(details))
        node.meta.pop("fxfreeze", None)  # what takes its place is no step's any more
        path = program.module_path(node) or node.name
        constants = {name: program.add_constant(f"{path}.{name}", value, dtype=dtype, before=node, like=node)
                     for name, value in form.tables(frozen, *weights).items()}  # fmt: skip
        program.replace(node, form.build(program, node, how, constants))
        return True


@dataclass(frozen=True)
class Form:
    """One way to compute a similarity to frozen prototypes.

    Attributes:
        says: what executes, for the ledger.
        shapes: of the tables, by name.
        tables: the frozen prototypes and θ, α, β to the tables, float64.
        build: puts the operators into the graph, given nodes of the tables; returns the result's node.
    """

    says: str
    shapes: Mapping[str, tuple[int, ...]]
    tables: Callable[..., dict[str, Tensor]]
    build: Callable[[Program, Node, Combination, dict[str, Node]], Node]


def choose(program: Program, node: Node, how: Combination, targets: Sequence[str]) -> Form:
    """By device, number of rows and targets; see :class:`FoldTversky`."""
    x, (features, prototypes) = arguments(node)["x"].meta["val"], _sizes(node)
    if x.device.type == "cpu":
        small = is_single(how) and features * prototypes < SMALL
        once = suits_cpu(how, math.prod(x.shape[:-1])) and not small
    else:
        once = tuple(targets) == ("torch",)
    if once:
        return _once(features, prototypes)
    return _single(how, features, prototypes) if is_single(how) else _sums(how, features, prototypes)


def _sizes(node: Node) -> tuple[int, int]:
    """How many features and prototypes."""
    given = arguments(node)
    return given["features"].meta["val"].shape[0], given["prototypes"].meta["val"].shape[0]


def _once(features: int, prototypes: int) -> Form:
    def tables(frozen: Prototypes, *weights: Tensor) -> dict[str, Tensor]:
        return {"measures": frozen.measures.T.contiguous(), "totals": frozen.total_b}

    def build(program: Program, node: Node, how: Combination, constants: dict[str, Node]) -> Node:
        return read_measures(program, node, constants["measures"], constants["totals"])

    shapes = {"measures": (features, prototypes), "totals": (prototypes,)}
    return Form(f"{FROZEN.op}, which reads measures {[features, prototypes]}", shapes, tables, build)


def _single(how: Combination, features: int, prototypes: int) -> Form:
    def tables(frozen: Prototypes, *weights: Tensor) -> dict[str, Tensor]:
        return dict(zip(("table", "bias"), single_product(frozen, *weights), strict=True))

    def build(program: Program, node: Node, how: Combination, constants: dict[str, Node]) -> Node:
        given = arguments(node)

        def function(x: Tensor, bank: Tensor, table: Tensor, bias: Tensor) -> Tensor:
            a = project(x, bank, given["normalize"])
            has = (a > how.threshold).to(a.dtype)
            present = a * has
            parts = [present, has] if how.intersection != "gmean" else [present, has, present.sqrt()]
            return cast(linear(torch.cat(parts, -1), table, bias), x.dtype)

        operands = given["x"], given["features"], constants["table"], constants["bias"]
        return inline(program, function, *operands, before=node, like=node)

    shape = (prototypes, (3 if how.intersection == "gmean" else 2) * features)
    return Form(f"one matrix product with table {list(shape)}", {"table": shape, "bias": (prototypes,)}, tables, build)


def _sums(how: Combination, features: int, prototypes: int) -> Form:
    names = table_names(how)

    def tables(frozen: Prototypes, *weights: Tensor) -> dict[str, Tensor]:
        return {name: getattr(frozen, name) for name in names}

    def build(program: Program, node: Node, how: Combination, constants: dict[str, Node]) -> Node:
        given = arguments(node)

        def function(x: Tensor, bank: Tensor, theta: Tensor, alpha: Tensor, beta: Tensor, *rest: Tensor) -> Tensor:
            a = project(x, bank, given["normalize"])
            terms = FrozenTerms(a, how.threshold, dict(zip(names, rest, strict=True)))
            scores = similarity(how, terms, *(cast(weight, a.dtype) for weight in (theta, alpha, beta)))
            return cast(scores, x.dtype)

        operands = (given[name] for name in ("x", "features", "theta", "alpha", "beta"))
        return inline(program, function, *operands, *constants.values(), before=node, like=node)

    shapes = {name: (prototypes, features) if name != "total_b" else (prototypes,) for name in names}
    says = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items() if len(shape) == 2)
    return Form(f"a matrix product per sum, with {says}", shapes, tables, build)


def _remarks(program: Program, node: Node, frozen: Prototypes, dtype: torch.dtype) -> Iterator[str]:
    given = arguments(node)["prototypes"]
    if not program.readers(given) <= {node}:
        yield "the prototypes stay as well, for something else reads them"
    if count := frozen.undecided(dtype):
        yield f"{count} of {len(frozen.measures)} prototypes have a feature within rounding of the threshold"


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def _report(program: Program, ctx: Context, node: Node, outcome: Outcome, *, executes: str, detail: str) -> None:
    how, origin = combination_of(node), node.meta.get("fxfreeze")
    step, site = (origin.step, origin.site) if isinstance(origin, Origin) else ("", program.module_path(node))
    ctx.ledger.add(
        site=site, step=step, requested=f"Tversky {how.model}, {how.intersection}, {how.difference}, {how.semantics}",
        outcome=outcome, executes=executes, detail=detail,
    )  # fmt: skip
