"""Folding a Tversky similarity to frozen prototypes: every combination proven, wrong tables refused."""

from __future__ import annotations

import ast
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.api import rewrite
from fxfreeze.capture import capture
from fxfreeze.kernels import _tversky as maths
from fxfreeze.kernels.tversky import KERNEL
from fxfreeze.kernels.tversky_frozen import KERNEL as FROZEN
from fxfreeze.passes.fold import tversky as module
from fxfreeze.passes.fold.tversky import FoldTversky
from fxfreeze.pipeline import run_passes
from fxfreeze.program import Program
from fxfreeze.rewrite import Context, LedgerRow

CHOICES = list(itertools.product(maths.MODELS, maths.INTERSECTIONS, maths.DIFFERENCES, maths.SEMANTICS))


class Head(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32, size: int = 6, bank: int = 9, count: int = 5, **how: Any):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.bank = nn.Parameter(torch.randn(bank, size, generator=generator).to(dtype))
        self.prototypes = nn.Parameter(torch.randn(count, size, generator=generator).to(dtype))
        self.weights = nn.ParameterList([torch.tensor(value) for value in (1.3, 0.4, 0.7)])
        self.how = {"model": "contrast", "intersection": "product", "difference": "ignorematch",
                    "semantics": "aggregate", **how}  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return KERNEL.op(x, self.bank, self.prototypes, *self.weights, **self.how)


def folded(
    model: nn.Module, *shape: int | str, dtype: str = "float32", **dims: Any
) -> tuple[Program, list[LedgerRow], nn.Module]:
    plan = fz.Plan(inputs=[fz.Input("x", shape=shape or ("batch", 6), dtype=dtype)], dims=dims)
    program, _ = capture(model.eval(), plan)
    assert operators(program) == [str(KERNEL.op)]
    ctx = Context(plan)
    rows, _ = run_passes(program, [FoldTversky()], ctx)
    assert rows[0].rewrites == (str(KERNEL.op) not in operators(program))
    return program, list(ctx.ledger), model


def operators(program: Program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(("model", "intersection", "difference", "semantics"), CHOICES)
def test_every_combination_is_folded_and_proven(model: str, intersection: str, difference: str, semantics: str) -> None:
    head = Head(model=model, intersection=intersection, difference=difference, semantics=semantics)
    program, (row,), _ = folded(head)
    assert row.outcome == "rewritten" and row.site == ""
    assert str(KERNEL.op) not in operators(program)
    linear = intersection in ("product", "mean") or (intersection == "gmean" and semantics != "aggregate")
    single = model == "contrast" and difference == "ignorematch" and linear
    assert row.executes.startswith("one matrix product") == single
    terms = maths.combination(**head.how, threshold=0).terms
    once = terms & {"min", "softmin"} == {"min"}
    assert (str(FROZEN.op) in operators(program)) == once
    if not once:
        products = operators(program).count("aten.linear.default") - 1  # the first is x·Ωᵀ
        assert products == (1 if single else len(terms - {"min", "softmin"}))


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """No head is small."""
    monkeypatch.setattr(module, "SMALL", 0)


def test_a_small_head_is_one_product_where_it_can_be() -> None:
    assert str(FROZEN.op) not in operators(folded(Head(), 2, 6)[0])
    assert str(FROZEN.op) in operators(folded(Head(model="ratio"), 2, 6)[0])


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(("model", "intersection", "difference", "semantics"), CHOICES)
def test_few_rows_read_their_measures_once(model: str, intersection: str, difference: str, semantics: str) -> None:
    head = Head(torch.float64, model=model, intersection=intersection, difference=difference, semantics=semantics)
    program, (row,), _ = folded(head, 2, 6, dtype="float64")
    once = "softmin" not in maths.combination(**head.how, threshold=0).terms
    assert (str(FROZEN.op) in operators(program)) == once == row.executes.endswith("measures [9, 5]")
    if once:
        assert operators(program) == ["aten.linear.default", str(FROZEN.op)]
        x = torch.randn(2, 6, dtype=torch.float64)
        torch.testing.assert_close(program.run(x)[0], head(x), rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(
    ("shape", "dims", "few"),
    [
        ((6,), {}, True),
        ((16, 6), {}, True),
        ((17, 6), {}, False),
        ((4, 4, 6), {}, True),
        (("batch", 4, 6), {"batch": fz.Dim(max=4)}, True),
        (("batch", 4, 6), {"batch": fz.Dim(max=5)}, False),
        (("batch", 6), {}, False),
    ],
)
def test_how_many_rows_there_may_be_is_read_off_the_declared_sizes(shape: Any, dims: Any, few: bool) -> None:
    program, *_ = folded(Head(), *shape, **dims)
    assert (str(FROZEN.op) in operators(program)) == few


@pytest.mark.parametrize(("targets", "once"), [(("torch",), True), (("torch", "onnx"), False), (("aoti",), False)])
def test_a_gpu_launches_kernels_where_only_torch_is_asked_for(targets: Any, once: bool) -> None:
    program, _ = capture(Head().eval(), fz.Plan(inputs=[fz.Input("x", shape=("batch", 6))]))
    (node,) = program.graph.find_nodes(op="call_function", target=KERNEL.op)
    x = node.args[0]
    with program.fake_mode:
        x.meta["val"] = torch.empty(x.meta["val"].shape, device="cuda")
    how = maths.combination(**Head().how, threshold=0.0)
    assert (str(FROZEN.op) in module.choose(program, node, how, targets).says) == once


def test_prototypes_that_something_else_reads_stay() -> None:
    class Tied(Head):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + nn.functional.embedding((x[:, 0] > 0).long(), self.prototypes))

    plan = fz.Plan(inputs=[fz.Input("x", shape=("batch", 6))], targets=())
    (row,) = rewrite(Tied().eval(), plan).ledger
    assert row.detail.endswith("the prototypes stay as well, for something else reads them")


def test_prototypes_at_the_threshold_are_counted() -> None:
    head = Head()
    with torch.no_grad():
        head.bank[0], head.prototypes[3] = 1.0, torch.tensor([1, -1, 1, -1, 1, -1 + 2**-23])
    _, (row,), _ = folded(head)
    assert row.detail.endswith("1 of 5 prototypes have a feature within rounding of the threshold")


@pytest.mark.parametrize("how", [{"normalize": True}, {"threshold": 0.8}, {"normalize": True, "threshold": -0.2}])
@pytest.mark.parametrize(("intersection", "semantics"), [("product", "aggregate"), ("max", "per_feature")])
def test_thresholds_and_unit_length_are_kept(how: dict[str, Any], intersection: str, semantics: str) -> None:
    program, *_ = folded(Head(intersection=intersection, semantics=semantics, **how), "batch", "length", 6)
    assert str(KERNEL.op) not in operators(program)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_half_precision_is_computed_in_float32(dtype: str) -> None:
    program, *_ = folded(Head(getattr(torch, dtype)), "batch", 6, dtype=dtype)
    kinds = {node.meta["val"].dtype for node in program.graph.nodes if str(node.target) == "aten.linear.default"}
    assert kinds == {torch.float64 if dtype == "float64" else torch.float32}
    assert program.output_nodes[0].meta["val"].dtype == getattr(torch, dtype)


def test_tables_that_would_not_fit_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FREE", 0)
    program, (row,), _ = folded(Head(size=6, bank=99, count=40))
    assert row.outcome == "skipped" and "limit is" in row.detail and row.executes == str(KERNEL.op)
    assert operators(program) == [str(KERNEL.op)]


class Pair(Head):
    """Compares the rows of a batch with each other."""

    def forward(self, x: Tensor) -> Tensor:
        return KERNEL.op(x, self.bank, x.flip(0), *self.weights, **self.how)


def test_prototypes_that_are_computed_stay_an_operator() -> None:
    plan = fz.Plan(inputs=[fz.Input("x", shape=("batch", 6))])
    program, _ = capture(Pair().eval(), plan)
    ctx = Context(plan)
    run_passes(program, [FoldTversky()], ctx)
    (row,) = ctx.ledger
    assert row.outcome == "skipped" and row.detail == "prototypes computed in the graph, not constant"


def test_an_operator_that_stays_is_known_to_a_process_that_only_loads_the_artifact(tmp_path: Path) -> None:
    model = Pair().eval()
    fz.compile(model, fz.Plan(inputs=[fz.Input("x", shape=("batch", 6))], targets=["torch", "onnx"])).save(
        tmp_path / "a"
    )
    code = "import sys, torch, fxfreeze; print(fxfreeze.load(sys.argv[1])(torch.ones(3, 6)).tolist())"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.tensor(ast.literal_eval(done.stdout)), model(torch.ones(3, 6)))


def test_the_tables_are_all_that_is_left_of_the_prototypes() -> None:
    model = Head()
    program = rewrite(model, fz.Plan(inputs=[fz.Input("x", shape=("batch", 6))], targets=())).program
    shapes = sorted(tuple(program.state.tensor(name).shape) for name in program.state)
    assert shapes == [(5,), (5, 18), (9, 6)]
    x = torch.randn(4, 6)
    torch.testing.assert_close(program.run(x)[0], model(x), rtol=1e-5, atol=1e-5)


# ---- wrong folds


@pytest.mark.parametrize("mutant", ["bias", "alpha and beta", "indicator", "sign"])
def test_a_wrong_table_is_not_exact(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = module.single_product

    def wrong(frozen: Any, theta: Tensor, alpha: Tensor, beta: Tensor) -> Any:
        if mutant == "alpha and beta":
            return right(frozen, theta, beta, alpha)
        table, bias = right(frozen, theta, alpha, beta)
        if mutant == "bias":
            return table, 0 * bias
        half = table.shape[1] // 2
        return (torch.cat([table[:, :half], -table[:, half:]], 1) if mutant == "sign" else table.flip(1)), bias

    monkeypatch.setattr(module, "single_product", wrong)
    with pytest.raises(fz.ProofError, match="fold-tversky"):
        folded(Head())
