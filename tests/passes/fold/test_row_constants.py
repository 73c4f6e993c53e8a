"""Terms that a softmax or an argmax takes away again: dropped, proven, and kept where something hangs on them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.api import rewrite
from fxfreeze.capture import capture
from fxfreeze.kernels import _tversky as maths
from fxfreeze.kernels.tversky import KERNEL
from fxfreeze.passes.clean.noops import StripNoOps
from fxfreeze.passes.fold import row_constants as module
from fxfreeze.passes.fold.row_constants import DropRowConstants
from fxfreeze.passes.fold.tversky import FoldTversky
from fxfreeze.pipeline import run_passes
from fxfreeze.program import Program
from fxfreeze.rewrite import Context

aten = torch.ops.aten
DOUBLE = {"dtype": torch.float64}


class Recorded(DropRowConstants):
    """Keeps the reasons, which the pipeline clears."""

    reasons: list[str]

    def run(self, program: Program, ctx: Context) -> int:
        count = super().run(program, ctx)
        self.reasons = [miss.reason for miss in ctx.near_misses]
        return count


class Rows(nn.Module):
    """`function` of the layers' values: z [batch, 3, 5], and a number per row [batch, 3, 1]."""

    def __init__(self, function: Callable[..., Any], **constants: Tensor) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.function = function
        self.wide, self.one = (nn.Parameter(torch.randn(n, 4, generator=generator, **DOUBLE)) for n in (5, 1))
        for name, value in constants.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        self.mask = mask
        z, row = (nn.functional.linear(x, weight) for weight in (self.wide, self.one))
        return self.function(self, z, row)


def dropped(function: Callable[..., Any], **constants: Tensor) -> tuple[Program, int, list[str]]:
    """The program after the pass, how many rewrites it made, and why it made no other; checked against the model."""
    inputs = [fz.Input("x", ("batch", 3, 4), "float64"), fz.Input("mask", ("batch", 3, 1), "float64")]
    model = Rows(function, **constants).eval()
    program, _ = capture(model, fz.Plan(inputs=inputs))
    item = Recorded()
    rows, _ = run_passes(program, [StripNoOps(), item], Context(fz.Plan(inputs=inputs)))
    assert rows[1].operators_after <= rows[1].operators_before
    given = torch.randn(7, 3, 4, **DOUBLE), torch.randn(7, 3, 1, **DOUBLE)
    expected = model(*given)
    for actual, wanted in zip(
        program.run(*given), expected if isinstance(expected, tuple) else (expected,), strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12, equal_nan=True)
    return program, rows[1].rewrites, item.reasons


def operators(program: Program) -> list[str]:
    """Of what stands between the layers and the output."""
    names = [node.target._opname for node in program.graph.nodes if node.op == "call_function"]
    return [name for name in names if name != "linear"]


# ---- what is dropped


ROOTS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: z.softmax(-1),
    "softmax in another dtype": lambda z: z.softmax(2, dtype=torch.float64),
    "special_softmax": lambda z: torch.special.softmax(z, -1),
    "_softmax": lambda z: aten._softmax(z, -1, False),
    "log_softmax": lambda z: z.log_softmax(-1),
    "special_log_softmax": lambda z: torch.special.log_softmax(z, 2),
    "_log_softmax": lambda z: aten._log_softmax(z, 2, False),
    "argmax": lambda z: z.argmax(-1),
    "argmax that keeps the dim": lambda z: z.argmax(2, keepdim=True),
    "argmin": lambda z: z.argmin(dim=-1),
}


@pytest.mark.parametrize("root", ROOTS)
def test_every_reduction_that_takes_no_notice(root: str) -> None:
    program, count, _ = dropped(lambda _, z, row: ROOTS[root](z + row))
    assert count == 1 and operators(program) == [root.split()[0]]
    assert len(program.state) == 1  # the layer that made the row is gone, too


@pytest.mark.parametrize(
    ("terms", "left"),
    [
        (lambda s, z, r: r + z, []),
        (lambda s, z, r: z - r, []),
        (lambda s, z, r: r - z, ["neg"]),
        (lambda s, z, r: torch.add(z, r, alpha=3), []),
        (lambda s, z, r: torch.add(r, z, alpha=3), ["mul"]),
        (lambda s, z, r: torch.sub(z, r, alpha=3), []),
        (lambda s, z, r: torch.sub(r, z, alpha=3), ["mul", "neg"]),
        (lambda s, z, r: torch.rsub(z, r, alpha=3), ["mul", "neg"]),
        (lambda s, z, r: torch.rsub(r, z, alpha=3), []),
        (lambda s, z, r: 1 - z, ["neg"]),
        (lambda s, z, r: z + 2.5, []),
        (lambda s, z, r: z + s.c, []),
        (lambda s, z, r: s.rows - z, ["neg"]),
        (lambda s, z, r: z + r[0, :1] - r[:, :1], []),
        (lambda s, z, r: -(r - z), []),
        (lambda s, z, r: (z - r) * 2, ["mul"]),
        (lambda s, z, r: s.c * (r - z), ["mul", "neg"]),
        (lambda s, z, r: r * (r + z), ["mul"]),
        (lambda s, z, r: (z + r) / 3, ["div"]),
        (lambda s, z, r: (z + r) / s.rows, ["div"]),
        (lambda s, z, r: (z + r) / r.exp(), ["exp", "div"]),
        (lambda s, z, r: (z + r) + (z * 2 - r) + r, ["mul", "add"]),
        (lambda s, z, r: (r - z) + z.abs(), ["abs", "sub", "neg"]),
        (lambda s, z, r: z.abs() - s.c * (r - z), ["abs", "mul", "add"]),
        (lambda s, z, r: z.abs() + s.c * (r - z), ["abs", "mul", "sub"]),
        (lambda s, z, r: torch.sub(z.abs(), r - z, alpha=3), ["abs", "add"]),
        (lambda s, z, r: torch.sub(r - z, r - z.abs(), alpha=3), ["abs", "sub", "neg"]),
        (lambda s, z, r: (lambda total: total + total)(z * 2 - r), ["mul", "add"]),
        (lambda s, z, r: z - z.mean(-1, keepdim=True), []),
        (lambda s, z, r: z - z.amax(-1, keepdim=True), []),
        (lambda s, z, r: torch.relu(z + r) + r, ["add", "relu"]),
    ],
)  # fmt: skip
def test_terms_go_and_the_rest_stays(terms: Callable[..., Tensor], left: list[str]) -> None:
    constants = {"c": torch.tensor(-0.7, **DOUBLE), "rows": torch.randn(3, 1, **DOUBLE)}
    program, count, _ = dropped(lambda s, z, r: terms(s, z, r).softmax(-1), **constants)
    assert count == 1 and operators(program) == [*left, "softmax"]


@pytest.mark.parametrize(
    ("terms", "dim"),
    [
        (lambda s, z, r: z + r.sum(1, keepdim=True), 1),
        (lambda s, z, r: z + s.per_last, 1),
        (lambda s, z, r: z - s.per_last, -2),
        (lambda s, z, r: z + r, -1),
        (lambda s, z, r: z + s.per_row, 0),
        (lambda s, z, r: s.per_row - z, -3),
    ],
)
def test_every_dim_counted_from_either_end(terms: Callable[..., Tensor], dim: int) -> None:
    constants = {"per_last": torch.randn(5, **DOUBLE), "per_row": torch.randn(3, 1, **DOUBLE)}
    program, count, _ = dropped(lambda s, z, r: terms(s, z, r).softmax(dim), **constants)
    assert count == 1 and {"add", "sub"}.isdisjoint(operators(program))


@pytest.mark.parametrize("dim", [0, 1, -2, -3])
def test_what_varies_along_the_dim_stays(dim: int) -> None:
    program, count, reasons = dropped(lambda s, z, r: (z + r).softmax(dim))
    assert (count, reasons) == (0, []) and operators(program) == ["add", "softmax"]


class Attention(nn.Module):
    """Queries with a bias each, as where q·(k + u) is multiplied out, and keys with one each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.of_query, self.of_key = (nn.Linear(8, n) for n in (8, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).mT / 8**0.5
        return (scores + self.of_query(x) + self.of_key(x).mT).softmax(-1) @ x


def test_attention_loses_the_bias_of_its_queries() -> None:
    """Also where the number of keys is open, and may be 1."""
    model = Attention().eval().double()
    plan = fz.Plan(inputs=[fz.Input("x", ("batch", "length", 8), "float64")], targets=())
    compilation = rewrite(model, plan)
    program = compilation.program
    # Of all layers together, for they may be stacked: 8 queries, 8 keys and the bias of the keys.
    linears = [node for node in program.graph.nodes if "linear" in str(node.target)]
    assert sum(node.args[1].meta["val"].shape[0] for node in linears) == 17
    assert not [name for name in program.state if "of_query" in name]
    for length in (1, 6):
        x = torch.randn(2, length, 8, **DOUBLE)
        torch.testing.assert_close(program.run(x)[0], model(x), rtol=0, atol=1e-12)


# ---- what is kept


@pytest.mark.parametrize(
    "function",
    [
        lambda s, z, r: (z + r).argmax(),
        lambda s, z, r: (z + r).relu().softmax(-1),
        lambda s, z, r: (z + r).sigmoid(),
        lambda s, z, r: ((z + r) * z).softmax(-1),
        lambda s, z, r: (r / (z + r)).softmax(-1),
        lambda s, z, r: torch.div(z + r, 3, rounding_mode="floor").softmax(-1),
        lambda s, z, r: ((z + r) / s.zero).softmax(-1),
        lambda s, z, r: ((z + r) * s.infinite).softmax(-1),
        lambda s, z, r: (z + 1e9).softmax(-1),
        lambda s, z, r: (r + r[..., :1]).softmax(-1),
        lambda s, z, r: (z.round().long() + s.whole).argmax(-1),
        lambda s, z, r: (z + r).amax(-1),
        lambda s, z, r: (z + z.shape[0]).softmax(-1),
        lambda s, z, r: (z + True).softmax(-1),
    ],
)  # fmt: skip
def test_what_no_reduction_takes_away(function: Callable[..., Any]) -> None:
    constants = {"zero": torch.tensor([[1.0], [0.0], [1.0]]), "infinite": torch.tensor([[1.0], [float("inf")], [1.0]])}
    _, count, _ = dropped(function, whole=torch.tensor([[1], [2], [3]]), **constants)
    assert count == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda s, z, r: (lambda total: (total, total.softmax(-1)))(z + r),
        lambda s, z, r: (lambda total: (total * 2, total.softmax(-1)))(z + r),
        lambda s, z, r: (lambda total: total.softmax(-1) * total)((z + r) * 2),
        lambda s, z, r: (lambda total: total.softmax(-1) + total.softmax(1))(z + r),
        lambda s, z, r: (lambda total: (total * 2).softmax(-1) + total)(z + r),
    ],
)
def test_a_sum_that_is_read_elsewhere_stays(function: Callable[..., Any]) -> None:
    before, count, reasons = dropped(function)
    assert (count, reasons) == (0, []) and "add" in operators(before)


@pytest.mark.parametrize(
    ("term", "reason"),
    [
        (lambda s, r: s.mask, "an input"),
        (lambda s, r: s.mask[:1] * 2 - 1, "an input"),
        (lambda s, r: r.masked_fill(r > 9, -torch.inf), "aten.masked_fill.Scalar"),
        (lambda s, r: torch.where(r > 9, -torch.inf, r), "aten.where.ScalarSelf"),
        (lambda s, r: torch.where(r > 9, -torch.inf, r).transpose(0, 1)[:1].amax(1, keepdim=True), "aten.where"),
        (lambda s, r: r.exp().log(), "aten.log.default"),
        (lambda s, r: r.sigmoid().logit(), "aten.logit.default"),
        (lambda s, r: 1 / r, "aten.reciprocal.default"),
        (lambda s, r: s.unit / r, "aten.div.Tensor"),
        (lambda s, r: r / s.zero, "aten.div.Tensor"),
        (lambda s, r: (r > 9) * -1e4, "aten.mul.Tensor"),
        (lambda s, r: 1e9 - r, "aten.rsub.Scalar"),
        (lambda s, r: torch.add(s.unit, r, alpha=1e5), "aten.add.Tensor"),
        (lambda s, r: s.infinite * r, "the constant infinite"),
        (lambda s, r: s.large, "the constant large"),
        (lambda s, r: nn.functional.embedding(s.index, s.table), "the constant table"),
    ],
)
def test_a_term_that_may_be_infinite_stays(term: Callable[..., Tensor], reason: str) -> None:
    """An infinite term makes its row NaN."""
    inf = float("inf")
    constants = {"infinite": [[1.0], [-inf], [2.0]], "unit": [[1.0]],
                 "large": [[1.0], [-1e4], [1.0]], "zero": [[1.0], [0.0], [1.0]], "table": [[0.0], [-inf]]}  # fmt: skip
    buffers = {name: torch.tensor(value, **DOUBLE) for name, value in constants.items()}
    program, count, (why,) = dropped(
        lambda s, z, r: (z + term(s, r)).softmax(-1), index=torch.tensor([0, 1, 0]), **buffers
    )
    assert count == 0 and why.startswith(f"a term constant along the dim may be infinite: {reason}")
    assert operators(program)[-1] == "softmax"


@pytest.mark.parametrize(
    "term",
    [
        lambda s, r: (r > 0) * 0.5,
        lambda s, r: s.mask @ s.unit + r,
        lambda s, r: torch.where(r > 9, -torch.inf, r.expand(-1, -1, 5)).softmax(1)[..., :1],
        lambda s, r: nn.functional.embedding(s.index, s.table),
        lambda s, r: r / s.unit + 2 * r - s.unit,
        lambda s, r: torch.cat([r, -r.abs()], -1).amax(-1, keepdim=True).exp().clamp(max=3.0),
    ],
)
def test_a_term_that_is_finite_goes(term: Callable[..., Tensor]) -> None:
    buffers = {"unit": torch.ones(1, 1, **DOUBLE), "table": torch.ones(2, 1, **DOUBLE)}
    program, count, _ = dropped(lambda s, z, r: (z + term(s, r)).softmax(-1), index=torch.tensor([0, 1, 0]), **buffers)
    assert count == 1 and operators(program) == ["softmax"]


@pytest.mark.parametrize(
    "terms",
    [
        lambda s, z, r: z[:1, :1] + r,
        lambda s, z, r: s.wide[:, 0] - r,
        lambda s, z, r: r + z.float(),
        lambda s, z, r: s.wide[:, 0] + s.rows,
    ],
)
def test_a_term_that_gives_the_result_its_shape_or_dtype_stays(terms: Callable[..., Tensor]) -> None:
    _, count, reasons = dropped(lambda s, z, r: terms(s, z, r).softmax(-1), rows=torch.ones(3, 1, **DOUBLE))
    assert count == 0 and reasons == ["the result has its shape or dtype from a term constant along the dim"]


def test_beside_a_term_that_stays_the_others_go() -> None:
    program, count, (reason,) = dropped(lambda s, z, r: (r - (z + r + s.mask)).log_softmax(-1))
    assert count == 1 and "an input" in reason
    assert operators(program) == ["add", "neg", "log_softmax"]


def test_a_long_sum_is_one_rewrite() -> None:
    program, count, _ = dropped(lambda s, z, r: sum((r * (-1) ** k for k in range(200)), z).softmax(-1))
    assert count == 1 and operators(program) == ["softmax"]


# ---- Tversky heads


CHOICES = list(itertools.product(maths.MODELS, maths.INTERSECTIONS, maths.DIFFERENCES, maths.SEMANTICS))
ROOTS_SUMMED = (("gmean", "per_feature"), ("gmean", "inclusive"))


class Head(nn.Module):
    """`ends` of as many heads that share their weights."""

    def __init__(self, *ends: Callable[[Tensor], Any], dtype: torch.dtype = torch.float64, **how: Any):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.ends = ends
        self.how = {"model": "contrast", "intersection": "min", "difference": "ignorematch",
                    "semantics": "aggregate", **how}  # fmt: skip
        self.bank, self.prototypes = (
            nn.Parameter(torch.randn(n, 6, generator=generator, **DOUBLE).to(dtype)) for n in (9, 5)
        )
        self.weights = nn.ParameterList([torch.tensor(value) for value in (1.3, 0.4, 0.7)])

    def forward(self, x: Tensor) -> Any:
        return tuple(end(KERNEL.op(x, self.bank, self.prototypes, *self.weights, **self.how)) for end in self.ends)


def folded(model: nn.Module, dtype: str = "float64") -> tuple[Program, list[int], int]:
    """The program with heads folded and rows dropped, how often it computes Σa⁺ before and after that, and how many
    operators went."""
    plan = fz.Plan(inputs=[fz.Input("x", ("batch", 6), dtype)])
    program, _ = capture(model.eval(), plan)
    run_passes(program, [FoldTversky()], Context(plan))
    before = sums_of_features(program)
    (row,), _ = run_passes(program, [DropRowConstants()], Context(plan))
    return program, [before, sums_of_features(program)], row.operators_before - row.operators_after


def sums_of_features(program: Program) -> int:
    """How often Σa⁺ [batch, 1] is computed."""
    sums = program.graph.find_nodes(op="call_function", target=aten.sum.dim_IntList)
    return sum(node.meta["val"].shape[-1] == 1 for node in sums)


def objects(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(50, 6, generator=torch.Generator().manual_seed(1), **DOUBLE).to(dtype)


@pytest.mark.parametrize("kind", CHOICES, ids="-".join)
def test_a_contrast_head_before_a_softmax_sums_no_features(kind: tuple[str, ...]) -> None:
    """Of three heads one meets a softmax, one an argmax, and the third one's scores are returned."""
    how = dict(zip(("model", "intersection", "difference", "semantics"), kind, strict=True))
    model = Head(lambda scores: scores.softmax(-1), lambda scores: scores.argmax(-1), lambda scores: scores, **how)
    program, counts, saved = folded(model)
    contrast, pair = how["model"] == "contrast", (how["intersection"], how["semantics"])
    linear = how["intersection"] in ("product", "mean") or pair in ROOTS_SUMMED
    # Folded into one table, or one operator for minima, there is no sum of its own; surpluses feature by feature need
    # none.
    without = (how["difference"], how["semantics"]) == ("subtractmatch", "per_feature")
    without |= contrast and linear and how["difference"] == "ignorematch"
    without |= maths.combination(**how).terms & {"min", "softmin"} == {"min"}
    assert counts == ([0, 0] if without else [3, 1] if contrast else [3, 3])
    assert saved == (4 if counts == [3, 1] else 0)  # the sum, and the subtraction from it
    for actual, wanted in zip(program.run(objects()), model(objects()), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "end", [lambda scores: (scores, scores.softmax(-1)), lambda scores: scores * scores.softmax(-1)]
)
def test_scores_that_are_read_too_keep_their_sum(end: Callable[[Tensor], Any]) -> None:
    _, counts, saved = folded(Head(end))
    assert (counts, saved) == ([1, 1], 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_cast_of_the_scores_is_no_obstacle(dtype: torch.dtype) -> None:
    program, counts, saved = folded(Head(lambda scores: scores.softmax(-1), dtype=dtype), str(dtype)[6:])
    assert (counts, saved) == ([1, 0], 2)
    exact = Head(lambda scores: scores.softmax(-1), dtype=dtype).double()(objects(dtype).double())[0]
    # The softmax reads scores that were rounded: measured 9.5e-3, 1.6e-3 and 3.6e-7.
    bound = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-6}[dtype]
    torch.testing.assert_close(program.run(objects(dtype))[0].double(), exact, rtol=0, atol=bound)


def test_a_compiled_head_is_smaller() -> None:
    plan = fz.Plan(inputs=[fz.Input("x", ("batch", 6), "float64")], targets=())
    model = Head(lambda scores: scores.softmax(-1))
    program = rewrite(model.eval(), plan).program
    assert sums_of_features(program) == 0
    torch.testing.assert_close(program.run(objects())[0], model(objects())[0], rtol=0, atol=1e-12)


# ---- wrong versions


def wrong_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    right = module._signed
    monkeypatch.setattr(module, "_signed", lambda *given: module._Rest(right(*given).node))


def wrong_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    right = module._signed
    monkeypatch.setattr(module, "_signed", lambda p, item, *rest: right(p, replace(item, alpha=1), *rest))


def wrong_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also drops what is constant along another dim."""
    right = module._is_row
    monkeypatch.setattr(module, "_is_row", lambda value, dim: right(value, dim) or right(value, dim - 1))


@pytest.mark.parametrize("mutant", [wrong_sign, wrong_factor, wrong_row])
def test_a_wrong_version_is_not_exact(mutant: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    def function(s: Rows, z: Tensor, r: Tensor) -> Tensor:
        return (torch.sub(r, z, alpha=3) + s.keys).softmax(-1)

    mutant(monkeypatch)
    with pytest.raises(fz.ProofError, match="drop-row-constants"):
        dropped(function, keys=torch.randn(5, **DOUBLE))
