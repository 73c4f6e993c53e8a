"""FoldGate: which gates are the identity, what becomes of their gains, and what stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

import fxfreeze as fz
from fxfreeze.capture import capture
from fxfreeze.errors import ProofError
from fxfreeze.kernels.gate import KERNEL
from fxfreeze.passes.clean.noops import StripNoOps
from fxfreeze.passes.fold import gate as module
from fxfreeze.passes.fold.affine import FoldAffine
from fxfreeze.passes.fold.gate import FoldGate
from fxfreeze.pipeline import run_passes
from fxfreeze.program import Origin, Program
from fxfreeze.rewrite import Context

F = nn.functional
GAIN = [2.0, -1.0, 0.5, 3.0]


class Gated(nn.Module):
    """A function of x, a gate with the thresholds and gains given, and a linear layer."""

    def __init__(self, function: Callable[..., Tensor], threshold: Any, gain: Any = None, **options: Any) -> None:
        super().__init__()
        self.function, self.options = function, options
        self.threshold = nn.Parameter(torch.as_tensor(threshold))
        self.gain = None if gain is None else nn.Parameter(torch.as_tensor(gain))
        self.linear, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def gate(self, h: Tensor, mode: Tensor | None = None) -> Tensor:
        return KERNEL.op(h, self.threshold, self.gain, None, mode, **self.options)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def fold(model: nn.Module, *passes: Any, shape: tuple[Any, ...] = ("batch", 4), dtype: str = "float32") -> Any:
    torch.manual_seed(0)
    plan = fz.Plan(inputs=[fz.Input("x", shape=shape, dtype=dtype)])
    program, _ = capture(model.eval(), plan)
    ctx = Context(plan)
    run_passes(program, [StripNoOps(), *(passes or (FoldGate(),))], ctx)
    return program, ctx


def operators(program: Program) -> list[str]:
    return [node.target._schema.name.split("::")[1] for node in program.graph.nodes if node.op == "call_function"]


SHUT = [0.0, -1.0, -0.2, 0.0]


@pytest.mark.parametrize(
    "producer",
    [
        F.relu, F.relu6, torch.sigmoid, torch.abs, torch.square, torch.exp, lambda x: x.softmax(-1),
        lambda x: F.hardtanh(x, 0.0, 1.0), lambda x: x.clamp(min=0), lambda x: x.relu().reshape(-1, 2, 2).flatten(1),
        lambda x: F.leaky_relu(x.square()), lambda x: F.avg_pool1d(F.max_pool1d(x.abs(), 3, 1, 1), 3, 1, 1),
        lambda x: KERNEL.op(x, torch.tensor([0.1, 0.5, 0.0, 2.0])),
        lambda x: KERNEL.op(x.abs(), torch.tensor([-1.0] * 4)),
    ],
)  # fmt: skip
def test_a_gate_that_shuts_only_what_is_0_goes(producer: Callable[[Tensor], Tensor]) -> None:
    program, ctx = fold(Gated(lambda m, x: m.last(m.gate(producer(m.linear(x)))), SHUT))
    assert "threshold" not in program.state
    assert ctx.ledger.rows[-1].executes == "nothing" and "no threshold is above 0" in ctx.ledger.rows[-1].detail


@pytest.mark.parametrize(("options", "goes"), [((), True), ((2.0, 3.0), True), ((-1.0,), False), ((1.0, -2.0), False)])
def test_a_softplus_may_be_negative(options: tuple[float, ...], goes: bool) -> None:
    program, _ = fold(Gated(lambda m, x: m.last(m.gate(F.softplus(m.linear(x), *options))), SHUT))
    assert ("threshold" not in program.state) is goes


def test_of_any_value_where_the_score_is_its_magnitude() -> None:
    program, ctx = fold(Gated(lambda m, x: m.gate(m.linear(x)), SHUT, score="abs"))
    assert operators(program) == ["linear"]
    assert "magnitude" in ctx.ledger.rows[-1].detail


@pytest.mark.parametrize(
    "producer", [lambda x: x, F.gelu, F.silu, torch.tanh, lambda x: x.relu() - 1, lambda x: F.hardtanh(x, -0.1, 1.0),
                 lambda x: F.leaky_relu(x), lambda x: x.clamp(0, -1), lambda x: KERNEL.op(x, torch.tensor([-1.0] * 4))],
)  # fmt: skip
def test_a_gate_on_what_may_be_negative_stays(producer: Callable[[Tensor], Tensor]) -> None:
    program, _ = fold(Gated(lambda m, x: m.gate(producer(m.linear(x))), SHUT))
    assert "threshold" in program.state


def test_one_threshold_above_0_keeps_the_gate() -> None:
    program, _ = fold(Gated(lambda m, x: m.gate(m.linear(x).relu()), [0.0, -1.0, 1e-6, 0.0]))
    assert operators(program) == ["linear", "relu", "gate"]


def test_the_gain_of_a_gate_that_goes_is_left_over() -> None:
    program, _ = fold(Gated(lambda m, x: m.gate(m.linear(x).relu()), SHUT, GAIN))
    assert operators(program) == ["linear", "relu", "mul"]
    program, _ = fold(Gated(lambda m, x: m.last(m.gate(m.linear(x).relu())), SHUT, GAIN), FoldGate(), FoldAffine())
    assert operators(program) == ["linear", "relu", "linear"]


def test_a_gain_becomes_a_product_behind_the_gate() -> None:
    program, _ = fold(Gated(lambda m, x: m.gate(m.linear(x)), [0.1, -1.0, 0.4, 0.0], GAIN))
    assert operators(program) == ["linear", "gate", "mul"]
    program, _ = fold(Gated(lambda m, x: m.gate(m.linear(x)), [0.1, -1.0, 0.4, 0.0], [1.0] * 4))
    assert operators(program) == ["linear", "gate"] and "gain" not in program.state


def test_a_gain_along_another_dim_than_the_last() -> None:
    model = Gated(lambda m, x: m.gate(x.sin()), [0.1, -1.0, 0.4], GAIN[:3], dim=1)
    program, _ = fold(model, shape=("batch", 3, 4))
    assert operators(program) == ["sin", "gate", "mul"]
    assert [tuple(value.shape) for value in program.state.values()] == [(3,), (3, 1)]


def test_the_gate_keeps_its_origin_and_the_product_has_none() -> None:
    model = Gated(lambda m, x: m.gate(m.linear(x)), [0.1, -1.0, 0.4, 0.0], GAIN)
    plan = fz.Plan(inputs=[fz.Input("x", shape=("batch", 4))])
    program, _ = capture(model, plan)
    gate = program.graph.find_nodes(op="call_function", target=KERNEL.op)[0]
    gate.meta["fxfreeze"] = origin = Origin("gates", "gate", "linear")
    run_passes(program, [FoldGate()], Context(plan))
    assert [node.meta["fxfreeze"] for node in program.graph.nodes if "fxfreeze" in node.meta] == [origin]
    assert gate.meta["fxfreeze"] is origin and not gate._erased


class Modes(nn.Module):
    def __init__(self, threshold: float, gain: bool) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.full((2, 4), threshold))
        self.gain = nn.Parameter(torch.randn(2, 4)) if gain else None

    def forward(self, x: Tensor, mode: Tensor) -> Tensor:
        return KERNEL.op(x.sin().relu(), self.threshold, self.gain, None, mode)


@pytest.mark.parametrize(
    ("threshold", "gain", "left"),
    [(0.0, False, ["sin", "relu"]), (0.0, True, ["sin", "relu", "gate"]), (0.5, True, ["sin", "relu", "gate"]),
     (0.5, False, ["sin", "relu", "gate"])],
)  # fmt: skip
def test_with_modes_an_idle_gate_goes_but_a_gain_stays_in_it(threshold: float, gain: bool, left: list[str]) -> None:
    inputs = [fz.Input("x", shape=("batch", 4)), fz.Input("mode", shape=("batch",), dtype="int64", low=0, high=1)]
    plan = fz.Plan(inputs=inputs)
    program, _ = capture(Modes(threshold, gain), plan)
    run_passes(program, [FoldGate()], Context(plan))
    assert operators(program) == left


def test_soft_gates_computed_thresholds_and_wider_gains_stay() -> None:
    soft = Gated(lambda m, x: KERNEL.op(x.sin().relu(), m.threshold, m.gain, torch.tensor(1.0)), SHUT, GAIN)
    assert operators(fold(soft)[0])[-1] == "gate"
    computed = Gated(lambda m, x: KERNEL.op(x.sin().relu(), x[0] * 0, m.gain), SHUT, GAIN)
    assert operators(fold(computed)[0])[-1] == "gate"
    half = Gated(lambda m, x: m.gate(x.sin()), SHUT, GAIN)
    assert operators(fold(half, dtype="bfloat16")[0]) == ["sin", "gate"]


def test_the_proof_rejects_a_wrong_idea_of_what_is_not_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NONNEGATIVE", module.NONNEGATIVE | {torch.ops.aten.gelu.default})
    with pytest.raises(ProofError):
        fold(Gated(lambda m, x: m.gate(F.gelu(m.linear(x))), SHUT))


def test_the_proof_rejects_a_gain_along_the_wrong_dim(monkeypatch: pytest.MonkeyPatch) -> None:
    original = module.hard_gate

    def lying(program: Program, node: Node) -> Any:
        return replace(original(program, node), dim=-1)

    monkeypatch.setattr(module, "hard_gate", lying)
    with pytest.raises(ProofError):
        fold(Gated(lambda m, x: m.gate(x.sin()), [0.1, -1.0, 0.4], GAIN[:3], dim=1), shape=("batch", 3, 3))
