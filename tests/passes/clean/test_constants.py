"""FoldConstants: what is computed once, what stays, and why."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.capture import capture
from fxfreeze.passes.clean.constants import FoldConstants, FoldLateConstants
from fxfreeze.passes.clean.noops import StripNoOps
from fxfreeze.pipeline import run_passes
from fxfreeze.program import Program
from fxfreeze.rewrite import Context

F = nn.functional


class Fn(nn.Module):
    def __init__(self, function: Any, **constants: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in constants.items():
            self.register_buffer(name, value)
        self.emb = nn.Embedding(6, 4)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def fold(function: Any, *, steps: Any = (), late: bool = False, **constants: Tensor) -> tuple[Program, int, Context]:
    plan = fz.Plan(inputs=[fz.Input("x", shape=("batch", 4))], steps=steps, dims={"batch": fz.Dim(max=9)})
    program, _ = capture(Fn(function, **constants), plan)
    ctx = Context(plan)
    item = FoldLateConstants() if late else FoldConstants()
    reasons: list[str] = []
    original = item.run

    def run(program: Program, ctx: Context) -> int:
        count = original(program, ctx)
        reasons.extend(miss.reason for miss in ctx.near_misses)
        return count

    item.run = run  # type: ignore[method-assign]
    rows, _ = run_passes(program, [StripNoOps(), item], ctx)
    ctx.reasons = reasons  # type: ignore[attr-defined]
    return program, rows[1].rewrites, ctx


def operators(program: Program) -> list[str]:
    return [
        str(getattr(node.target, "_opname", node.target)) for node in program.graph.nodes if node.op == "call_function"
    ]


def only_constant(program: Program) -> Tensor:
    (value,) = program.state.values()
    return value


def test_floats_are_computed_in_float64_and_stored_as_declared() -> None:
    w = torch.rand(4) + 0.5
    program, count, _ = fold(lambda m, x: x + (m.w * 3).exp() / 7, w=w)
    assert operators(program) == ["add"] and count == 1
    value = only_constant(program)
    assert value.dtype == torch.float64
    assert torch.equal(value, (w.double() * 3).exp() / 7)
    (node,) = (node for node in program.graph.nodes if node.op == "get_attr")
    assert node.meta["val"].dtype == torch.float32 and program.state[str(node.target)] is value


def test_what_is_exact_is_kept_in_the_storage_dtype() -> None:
    w = torch.randn(4, 5)
    program, _, _ = fold(lambda m, x: x @ (m.w * 2).t()[:4], w=w.t().contiguous())
    assert only_constant(program).dtype == torch.float32 and operators(program) == ["matmul"]


def test_integers_stay_integers() -> None:
    program, _, _ = fold(lambda m, x: x + m.emb(torch.arange(4) % 3).sum(0)[(m.i + 1) % 4], i=torch.arange(4))
    assert operators(program) == ["add"]
    program, _, _ = fold(lambda m, x: x[:, (m.i + 1) % 4], i=torch.arange(4))
    assert only_constant(program).dtype == torch.int64 and operators(program)[-1] == "index"


def test_several_results_of_one_operator() -> None:
    program, count, _ = fold(lambda m, x: x + (m.w.exp().chunk(2)[0] * m.w.topk(4).values), w=torch.rand(8))
    assert operators(program) == ["add"] and count == 1


def test_random_symbolic_uninitialised_and_lone_creators_stay() -> None:
    several = lambda m, x: (x + torch.rand(4), x + torch.zeros(4), x + torch.arange(4), m.w[: x.shape[0]])  # noqa: E731
    program, count, _ = fold(several, w=torch.rand(9))
    assert {"rand", "zeros", "arange", "slice"} <= set(operators(program)) and count == 0
    program, count, _ = fold(lambda m, x: x + F.dropout(m.w, 0.5, True), w=torch.rand(4))
    assert "dropout" in operators(program) and count == 0


def test_creators_go_when_something_is_computed_from_them() -> None:
    program, count, _ = fold(lambda m, x: x + torch.arange(4).float().sin().unsqueeze(0))
    assert operators(program) == ["add"] and count == 1


def test_a_view_of_a_weight_that_is_read_elsewhere_stays_a_view() -> None:
    program, count, _ = fold(lambda m, x: F.linear(x, m.w) @ m.w.t(), w=torch.rand(4, 4))
    assert sorted(operators(program)) == ["linear", "matmul", "t"] and count == 0
    program, count, _ = fold(lambda m, x: x @ m.w.t(), w=torch.rand(5, 4))
    assert operators(program) == ["matmul"] and count == 1


def test_large_results_stay_unfolded_but_what_they_come_from_is_folded() -> None:
    program, _, ctx = fold(lambda m, x: x.sum() * (m.w.exp().expand(4096, 512) + m.w.cos()), w=torch.rand(512))
    # The sum of two would be 8 MiB; its operands are 2 KiB each.
    assert sorted(operators(program)) == ["add", "expand", "mul", "sum"]
    assert any("MiB" in reason for reason in ctx.reasons)  # type: ignore[attr-defined]


def test_the_budget_is_for_all_folds_together() -> None:
    program, _, _ = fold(lambda m, x: tuple(x.sum() * torch.arange(400_000).add(i + 1) for i in range(3)))
    assert operators(program).count("add") == 2  # 3.2 MB each, 4 MiB allowed
    program, _, _ = fold(lambda m, x: x.sum() * torch.arange(400_000).add(1)[:4])  # only the result is stored
    assert "add" not in operators(program)


def test_an_8_bit_weight_is_not_stored_as_float() -> None:
    _, count, ctx = fold(lambda m, x: F.linear(x, m.q.float() * m.s),
                         q=torch.randint(-9, 9, (4, 4), dtype=torch.int8), s=torch.rand(4, 1))  # fmt: skip
    assert count == 0 and any("8-bit" in reason for reason in ctx.reasons)  # type: ignore[attr-defined]


def test_a_cast_on_which_float64_disagrees_stays() -> None:
    # 0.7·10 rounds to 7 in float32; the float32 number 0.7, times 10 in float64, is just below.
    w = torch.tensor([0.7, 0.1, 0.3, 0.2])
    assert int((w * 10)[0]) == 7 and int((w.double() * 10)[0]) == 6
    for step in (lambda w: (w * 10).long(), lambda w: (w * 10).floor()):
        program, _, ctx = fold(lambda m, x, step=step: x * step(m.w), w=w)
        assert len(operators(program)) > 1
        assert any("disagree" in reason for reason in ctx.reasons)  # type: ignore[attr-defined]
        assert torch.equal(program.run(torch.ones(1, 4))[0], step(w).float()[None])
    program, _, _ = fold(lambda m, x: x * (m.w * 10 + 0.5).long(), w=w)
    assert operators(program) == ["mul"]


def test_an_overflow_of_the_storage_dtype_stays() -> None:
    mask = torch.tensor([0.0, torch.finfo(torch.float32).min, 1.0, 0.0])
    _, count, ctx = fold(lambda m, x: x.half() + (m.w * 1.5).half(), w=mask)
    assert count == 0 and any("disagree" in reason for reason in ctx.reasons)  # type: ignore[attr-defined]


def test_infinite_masks_are_folded() -> None:
    program, count, _ = fold(lambda m, x: (x + torch.full((4, 4), -math.inf).triu(1)[0]).softmax(-1))
    assert operators(program) == ["add", "softmax"] and count == 1


def test_complex_constants() -> None:
    program, _, _ = fold(lambda m, x: x * torch.polar(m.w * 2, m.w).abs(), w=torch.rand(4))
    assert operators(program) == ["mul"]
    program, _, _ = fold(lambda m, x: (x.to(torch.complex64) * torch.polar(m.w, m.w)).real, w=torch.rand(4))
    assert "polar" not in operators(program) and only_constant(program).dtype == torch.complex128


def test_what_is_returned_is_a_copy() -> None:
    program, _, _ = fold(lambda m, x: (x.sin(), m.w * 2), w=torch.ones(4))
    program.run(torch.ones(1, 4))[1].zero_()
    assert torch.equal(program.run(torch.ones(1, 4))[1], torch.full((4,), 2.0))


def test_a_layer_that_a_step_addresses_waits_for_it() -> None:
    position = lambda m, x: x + m.emb(torch.arange(4) + 1).sum(0)  # noqa: E731
    assert "embedding" not in operators(fold(position)[0])
    step = fz.LoRA(at="emb", rank=1)
    assert "embedding" in operators(fold(position, steps=[step])[0])
    assert "embedding" not in operators(fold(position, steps=[step], late=True)[0])


def test_parameters_are_shared_not_copied_and_never_written() -> None:
    w = torch.rand(4, 4)
    before = w.clone()
    program, _, _ = fold(lambda m, x: x @ m.w.reshape(2, 2, 4).flatten(0, 1), w=w)
    assert only_constant(program).data_ptr() == w.data_ptr() and torch.equal(w, before)


def test_weight_norm_becomes_a_weight() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
            self.sn = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.sn(self.fc(x))

    plan = fz.Plan(inputs=[fz.Input("x", shape=("batch", 4))], steps=[fz.LoRA(at="fc", rank=1)])
    program, _ = capture(Normed(), plan)
    run_passes(program, [FoldConstants()], Context(plan))
    assert operators(program) == ["linear", "linear"]
    assert str(next(n for n in program.graph.nodes if n.op == "get_attr").target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_constants_are_rounded_once(dtype: torch.dtype) -> None:
    w = torch.rand(64).to(dtype)
    program, _, _ = fold(lambda m, x: x.sum() * (m.w.exp() * m.w).sin(), w=w)
    value = only_constant(program)
    assert value.dtype == torch.float64 and torch.equal(value, (w.double().exp() * w.double()).sin())
