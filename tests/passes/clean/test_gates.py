"""RecogniseGates: every spelling of a hard gate becomes the operator, what is another function stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.capture import capture
from fxfreeze.errors import ProofError
from fxfreeze.passes.clean import gates as module
from fxfreeze.passes.clean.common import CommonSubexpressions
from fxfreeze.passes.clean.constants import FoldConstants
from fxfreeze.passes.clean.gates import RecogniseGates
from fxfreeze.passes.clean.noops import StripNoOps
from fxfreeze.pipeline import run_passes
from fxfreeze.program import Program
from fxfreeze.rewrite import Context

F = nn.functional
X = fz.Input("x", shape=("batch", 3, 4))
LEVELS = [0.5, -0.3, 0.0, 1.2]
CLEAN = (StripNoOps, CommonSubexpressions, FoldConstants, RecogniseGates)


class JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor) -> Tensor:
        ctx.save_for_backward(z, theta)
        return torch.relu(z) * (z > theta).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class Fn(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.t = nn.Parameter(torch.tensor(LEVELS))
        self.one = nn.Parameter(torch.tensor(0.4))
        self.register_buffer("g", torch.tensor([2.0, -1.0, 0.5, 3.0]))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def recognise(
    function: Callable[..., Any], spec: fz.Input = X, dtype: torch.dtype = torch.float32
) -> tuple[Program, Context, Fn]:
    plan = fz.Plan(inputs=[spec])
    model = Fn(function).to(dtype)
    program, _ = capture(model, plan)
    ctx = Context(plan)
    run_passes(program, [item() for item in CLEAN[:-1]], ctx)
    # Not run_passes, which forgets the near misses; the proof is run at the end of each test's rewrite.
    clone = program.clone()
    run_passes(clone, [RecogniseGates()], Context(plan))
    RecogniseGates().run(program, ctx)
    program.sweep()
    return program, ctx, model


def gates(program: Program) -> list[Any]:
    return [node for node in program.graph.nodes if node.target is torch.ops.fxfreeze.gate.default]


def operators(program: Program) -> list[str]:
    return [node.target._schema.name.split("::")[1] for node in program.graph.nodes if node.op == "call_function"]


PLAIN: dict[str, Callable[[Fn, Tensor], Tensor]] = {
    "cast": lambda m, x: x * (x > m.t).to(x.dtype),
    "float": lambda m, x: (x > m.t).float() * x,
    "bool": lambda m, x: x * (x > m.t),
    "swapped": lambda m, x: (m.t < x) * x,
    "not": lambda m, x: x * ~(x <= m.t),
    "where": lambda m, x: torch.where(x > m.t, x, 0),
    "where_tensor": lambda m, x: torch.where(x > m.t, x, torch.zeros_like(x)),
    "where_new": lambda m, x: torch.where(x > m.t, x, x.new_zeros(())),
    "where_silent": lambda m, x: torch.where(x <= m.t, 0.0, x),
    "where_full": lambda m, x: torch.where(m.t >= x, torch.full_like(x, 0), x),
    "fill": lambda m, x: x.masked_fill(x <= m.t, 0.0),
    "shape": lambda m, x: x * (x > m.t.reshape(1, 1, 4)),
    "type_as": lambda m, x: x * (x > m.t).type_as(x),
}


@pytest.mark.parametrize("spelling", PLAIN)
def test_every_spelling_of_a_gate(spelling: str) -> None:
    program, ctx, model = recognise(lambda m, x: PLAIN[spelling](m, x.sin()))
    assert operators(program) == ["sin", "gate"]
    (gate,) = gates(program)
    assert gate.kwargs.get("score", "h") == "h" and program.state[str(gate.args[1].target)].tolist() == model.t.tolist()
    (row,) = [row for row in ctx.ledger if row.requested == "thresholded activation"]
    assert (
        row.outcome == "rewritten"
        and row.executes == "fxfreeze.gate.default"
        and row.detail == f"above {gate.args[1].target}"
    )
    x = torch.randn(50, 3, 4)
    assert torch.equal(program.run(x)[0], PLAIN[spelling](model, x.sin()))


def test_the_threshold_keeps_its_name_in_the_model() -> None:
    program, _, _ = recognise(PLAIN["bool"])
    assert set(program.state) == {"t"} and program.state["t"].dtype == torch.float32


ABS: dict[str, Callable[[Fn, Tensor], Tensor]] = {
    "mul": lambda m, x: x * (x.abs() > m.t),
    "where": lambda m, x: torch.where(x.abs() > m.t, x, 0),
    "fill": lambda m, x: x.masked_fill(x.abs() <= m.t, 0.0),
    "hardshrink": lambda m, x: F.hardshrink(x, 0.6),
    "open": lambda m, x: F.hardshrink(x, -0.6),
}


@pytest.mark.parametrize("spelling", ABS)
def test_a_gate_on_the_magnitude(spelling: str) -> None:
    program, _, model = recognise(lambda m, x: ABS[spelling](m, x.sin()))
    assert operators(program) == ["sin", "gate"] and gates(program)[0].kwargs["score"] == "abs"
    x = torch.randn(50, 3, 4)
    assert torch.equal(program.run(x)[0], ABS[spelling](model, x.sin()))


JUMPS: dict[str, Callable[[Fn, Tensor], Tensor]] = {
    "mul": lambda m, z: torch.relu(z) * (z > m.t),
    "order": lambda m, z: (m.t < z).to(z.dtype) * F.relu(z),
    "where": lambda m, z: torch.where(z > m.t, torch.relu(z), 0),
    "clamp": lambda m, z: z.clamp(min=0) * (z > m.t),
    "function": lambda m, z: JumpReLU.apply(z, m.t),
    "on_relu": lambda m, z: torch.relu(z) * (torch.relu(z) > m.t.clamp(min=0)),
}


@pytest.mark.parametrize("spelling", JUMPS)
def test_jumprelu_is_a_gate_on_the_relu_with_no_threshold_below_0(spelling: str) -> None:
    program, _, model = recognise(lambda m, x: JUMPS[spelling](m, x.sin()))
    assert operators(program)[0] == "sin" and operators(program)[2:] == ["gate"]
    threshold = program.state[str(gates(program)[0].args[1].target)]
    assert threshold.tolist() == model.t.clamp(min=0).tolist()
    x = torch.randn(50, 3, 4)
    assert torch.equal(program.run(x)[0], JUMPS[spelling](model, x.sin()))


def test_numbers_and_scalars_hold_for_every_neuron() -> None:
    for spelling in (lambda m, x: x * (x > 0.3), lambda m, x: x * (x > m.one), lambda m, x: F.threshold(x, 0.3, 0.0),
                     lambda m, x: nn.Threshold(0.3, 0)(x)):  # fmt: skip
        program, _, model = recognise(lambda m, x, s=spelling: s(m, x.sin()))
        (gate,) = gates(program)
        assert gate.args[1].meta["val"].shape == (4,) and gate.kwargs.get("dim", -1) == -1
        x = torch.randn(50, 3, 4)
        assert torch.allclose(program.run(x)[0], spelling(model, x.sin()))


def test_neurons_lie_where_the_threshold_varies() -> None:
    program, _, model = recognise(lambda m, x: x.sin() * (x.sin() > m.t[:3, None]))
    (gate,) = gates(program)
    assert gate.kwargs["dim"] in (1, -2) and gate.args[1].meta["val"].shape == (3,)
    x = torch.randn(50, 3, 4)
    assert torch.equal(program.run(x)[0], x.sin() * (x.sin() > model.t[:3, None]))


def test_one_threshold_after_a_convolution_lies_along_its_channels() -> None:
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.MaxPool2d(2), nn.Threshold(0.1, 0.0)).eval()
    plan = fz.Plan(inputs=[fz.Input("x", shape=("batch", 2, 8, 8))])
    program, _ = capture(model, plan)
    run_passes(program, [item() for item in CLEAN], Context(plan))
    (gate,) = gates(program)
    assert gate.args[1].meta["val"].shape == (5,) and gate.kwargs["dim"] == -3


@pytest.mark.parametrize("conv", [nn.Conv2d(2, 5, 3), nn.ConvTranspose2d(2, 5, 3)])
def test_and_without_a_batch_too(conv: nn.Module) -> None:
    plan = fz.Plan(inputs=[fz.Input("x", shape=(2, 8, 8))])
    program, _ = capture(nn.Sequential(conv, nn.Threshold(0.1, 0.0)).eval(), plan)
    run_passes(program, [item() for item in CLEAN], Context(plan))
    (gate,) = gates(program)
    assert gate.args[1].meta["val"].shape == (5,) and gate.kwargs["dim"] == -3


def test_a_gain_beside_the_gate_stays_a_product() -> None:
    for spelling in (lambda m, x: m.g * x * (x > m.t), lambda m, x: x * (x > m.t) * m.g):
        program, _, model = recognise(lambda m, x, s=spelling: s(m, x.sin()))
        assert operators(program) == ["sin", "gate", "mul"]
        x = torch.randn(50, 3, 4)
        assert torch.equal(program.run(x)[0], spelling(model, x.sin()))


def test_half_precision_has_thresholds_in_float32() -> None:
    spec = fz.Input("x", shape=("batch", 3, 4), dtype="bfloat16")
    program, _, model = recognise(lambda m, x: x * (x > m.t), spec, torch.bfloat16)
    (gate,) = gates(program)
    assert gate.args[1].meta["val"].dtype == torch.float32 and gate.meta["val"].dtype == torch.bfloat16
    x = torch.randn(200, 3, 4).bfloat16()
    assert torch.equal(program.run(x)[0], x * (x > model.t))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_threshold_that_half_precision_rounds_stays_and_says_why(dtype: str) -> None:
    """The model compares with 0.30078125 or 0.30004883, float64 with 0.3: a gate could be only one of them."""
    spec, kind = fz.Input("x", shape=("batch", 3, 4), dtype=dtype), getattr(torch, dtype)
    for spelling in (lambda m, x: torch.where(x > 0.3, x, 0), lambda m, x: x * ~(x <= 0.3),
                     lambda m, x: x * (x.abs() > torch.tensor(0.3)), lambda m, x: F.hardshrink(x, 0.3)):  # fmt: skip
        program, ctx, _ = recognise(spelling, spec, kind)
        assert not gates(program) and [miss.reason for miss in ctx.near_misses if "rounded to" in miss.reason]
    # A threshold operator compares in float32, as a comparison with a tensor of thresholds in float32 does.
    levels = torch.full((4,), 0.3)
    x = torch.tensor([0.2988, 0.3, 0.302, 0.4], dtype=kind).expand(2, 3, 4)
    for spelling in (lambda m, x: F.threshold(x, 0.3, 0.0), lambda m, x: x * (x > levels),
                     lambda m, x: x * (x > 0.5), lambda m, x: F.hardshrink(x, 0.375)):  # fmt: skip
        program, _, model = recognise(spelling, spec, kind)
        assert len(gates(program)) == 1 and torch.equal(program.run(x)[0], spelling(model, x))


def test_a_mask_that_something_else_reads_stays_for_it() -> None:
    program, _, _ = recognise(lambda m, x: (x * (x > m.t), (x > m.t).sum(-1)))
    assert sorted(operators(program)) == ["gate", "gt", "sum"]


REFUSED: dict[str, tuple[Callable[[Fn, Tensor], Tensor], str]] = {
    "ge": (lambda m, x: x * (x >= m.t), "at its threshold too"),
    "where_lt": (lambda m, x: torch.where(x < m.t, 0, x), "at its threshold too"),
    "below": (lambda m, x: x * (x < m.t), "below its threshold"),
    "fill": (lambda m, x: torch.where(x > m.t, x, 1e-3), "not 0"),
    "threshold": (lambda m, x: F.threshold(x, 0.3, 0.1), "is 0.1"),
    "broadcast": (lambda m, x: x[:, :1, :1] * (x[:, :1, :1] > m.t), "broadcast"),
    "dtype": (lambda m, x: x * (x > m.t).double(), "float64"),
    "table": (lambda m, x: x * (x > m.t * m.t[:3, None]), "more than one dim"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_function_stays_and_says_why(case: str) -> None:
    function, reason = REFUSED[case]
    program, ctx, _ = recognise(function)
    assert not gates(program) and [reason in miss.reason for miss in ctx.near_misses] == [True]


UNRELATED: dict[str, Callable[[Fn, Tensor], Tensor]] = {
    "other_value": lambda m, x: x.cos() * (x > m.t),
    "computed_level": lambda m, x: x * (x > x.mean(-1, keepdim=True)),
    "relu_of_other": lambda m, x: torch.relu(x.cos()) * (x > m.t),
    "abs_of_value": lambda m, x: x.abs() * (x > m.t),
    "product": lambda m, x: x * m.t,
    "inverted": lambda m, x: x * ~(x > m.t).to(torch.int32),
}


@pytest.mark.parametrize("case", UNRELATED)
def test_what_is_no_gate_is_left_alone(case: str) -> None:
    program, ctx, _ = recognise(UNRELATED[case])
    assert not gates(program) and not ctx.near_misses


def test_where_the_gate_is_shut_an_infinity_is_0_not_nan() -> None:
    program, _, _ = recognise(lambda m, x: x * (x > m.t))
    assert program.run(torch.full((2, 3, 4), -torch.inf))[0].abs().sum() == 0


def test_the_proof_rejects_a_gate_on_something_other_than_what_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_rectified", lambda node: node.args[0])
    with pytest.raises(ProofError):
        recognise(lambda m, x: torch.sigmoid(x) * (x > m.t))


def test_the_proof_rejects_a_mask_read_the_wrong_way_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SWAPPED", {name: name for name in module.SWAPPED})
    with pytest.raises(ProofError):
        recognise(lambda m, x: x * (m.t > x))
