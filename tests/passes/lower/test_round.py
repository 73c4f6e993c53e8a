"""Round: every folded constant is rounded once, what it costs is measured, and a fold that vanishes is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.capture import capture
from fxfreeze.constants import Recipe
from fxfreeze.errors import PassError
from fxfreeze.passes.lower.round import Round
from fxfreeze.pipeline import run_passes
from fxfreeze.program import Fold, Program
from fxfreeze.rewrite import Context


def folded(dtype: torch.dtype, delta: float, *, max_loss: float = 0.5) -> tuple[Program, Context, Tensor, Tensor]:
    """A linear layer whose weight has something of size `delta` folded in."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8)).to(dtype)
    plan = fz.Plan(inputs=[fz.Input("x", shape=("batch", 8), dtype=str(dtype).removeprefix("torch."))])
    program, _ = capture(model, plan)
    base = program.state["0.weight"]
    exact = base.double() + delta * torch.randn(8, 8, dtype=torch.float64)
    program.state["0.weight"] = exact
    program.folds["0.weight"] = Fold("lora", "0", Recipe(base), max_loss)
    return program, Context(plan), base, exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_constant_is_rounded_once_and_measured(dtype: torch.dtype) -> None:
    program, ctx, base, exact = folded(dtype, 0.1)
    before = base.clone()
    rows, _ = run_passes(program, [Round()], ctx)
    assert rows[0].rewrites == 1 and not rows[0].exact and rows[0].error is not None
    eps = torch.finfo(dtype).eps
    assert 0 < rows[0].error < 4 * eps
    assert program.state["0.weight"].dtype == dtype and torch.equal(program.state["0.weight"], exact.to(dtype))
    assert program.folds == {} and torch.equal(base, before)
    (row,) = ctx.ledger
    assert (row.outcome, row.step, row.site) == ("measured", "lora", "0")
    loss = float((exact.to(dtype).double() - exact).norm() / (exact - base.double()).norm())
    assert row.detail == f"{loss:.2%} of the change is lost in {str(dtype).removeprefix('torch.')}"


def test_a_fold_that_vanishes_is_refused() -> None:
    program, ctx, _, _ = folded(torch.bfloat16, 1e-5)
    with pytest.raises(PassError, match=r"lora cannot be folded into bfloat16: \d+\.\d% .*limit 50%") as caught:
        run_passes(program, [Round()], ctx)
    assert caught.value.where == "0" and "wider dtype" in (caught.value.hint or "")
    assert [row.outcome for row in ctx.ledger] == ["refused"]
    program, ctx, _, _ = folded(torch.bfloat16, 1e-5, max_loss=2.0)
    run_passes(program, [Round()], ctx)


def test_a_fold_of_nothing_loses_nothing() -> None:
    program, ctx, base, _ = folded(torch.bfloat16, 0.0)
    rows, _ = run_passes(program, [Round()], ctx)
    assert torch.equal(program.state["0.weight"], base) and rows[0].error == 0.0
    assert next(iter(ctx.ledger)).detail == "the change is zero"


def test_an_overflow_names_the_constant() -> None:
    program, ctx, _, exact = folded(torch.float16, 0.1)
    program.folds.clear()
    program.state["0.weight"] = exact * 1e6
    with pytest.raises(PassError, match=r"'0.weight' overflows torch.float16") as caught:
        run_passes(program, [Round()], ctx)
    assert "linear" in (caught.value.where or "")


def test_infinities_that_were_there_stay_and_nothing_else_is_touched() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
            self.register_buffer("index", torch.tensor([1, 0]))

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.mask).softmax(-1)[:, self.index]

    plan = fz.Plan(inputs=[fz.Input("x", shape=("batch", 2))])
    program, _ = capture(Masked(), plan)
    index = program.state["index"]
    program.state["mask"] = program.state["mask"].double()
    rows, _ = run_passes(program, [Round()], Context(plan))
    assert rows[0].rewrites == 1 and program.state["mask"].dtype == torch.float32 and program.state["index"] is index


def test_a_float64_model_is_left_alone() -> None:
    plan = fz.Plan(inputs=[fz.Input("x", shape=("batch", 8), dtype="float64")])
    program, _ = capture(nn.Linear(8, 8).double(), plan)
    rows, _ = run_passes(program, [Round()], Context(plan))
    assert rows[0].rewrites == 0
