"""Fusing a layer whose weight is integers and a hard gate: proven, only where it pays, and refused where it must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

import fxfreeze as fz
from fxfreeze.capture import capture
from fxfreeze.firing import fired, gate_rows
from fxfreeze.kernels.gate import KERNEL as GATE
from fxfreeze.kernels.quantized_linear import KERNEL as FUSED
from fxfreeze.launched import executed, has_launched, with_launched
from fxfreeze.passes import PIPELINE
from fxfreeze.passes.fuse import quantized_gate as module
from fxfreeze.passes.fuse.quantized_gate import FuseQuantizedGate
from fxfreeze.pipeline import run_passes
from fxfreeze.program import INTEGERS, Program
from fxfreeze.rewrite import Context, LedgerRow

INNER, WIDTH = 64, 96


class Anywhere(FuseQuantizedGate):
    """The pass where there is no GPU, and with no clock."""

    devices = ("cpu", "cuda")

    def __init__(self) -> None:
        super().__init__(lambda layer: (1e-3, 2e-3))


class Block(nn.Module):
    """`function` of the block itself and x [batch, 3, in]; a gate with thresholds and gains."""

    def __init__(self, function: Callable[[Block, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function, self.proj = function, nn.Linear(INNER, WIDTH)
        self.register_buffer("threshold", torch.randn(WIDTH) / 4)
        self.register_buffer("gain", torch.randn(WIDTH))

    def gate(self, h: Tensor, *more: Tensor, **how: Any) -> Tensor:
        return GATE.op(h, self.threshold, self.gain, *more, **how)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


INPUTS = [fz.Input("x", ("batch", 3, INNER))]
INT4 = fz.Quantize("proj", scheme="int4-weight", granularity="group:32")


def fused(
    function: Callable[[Block, Tensor], Any], step: fz.Quantize = INT4, item: FuseQuantizedGate | None = None
) -> tuple[Program, list[LedgerRow]]:
    """The program after quantizing and the pass, which proved it, and the ledger rows of the pass."""
    plan = fz.Plan(INPUTS, [step], ["torch"])
    program, _ = capture(Block(function).eval(), plan)
    ctx = Context(plan)
    quantizing = [item for item in PIPELINE if item.stage == "quantize"]
    run_passes(program, quantizing, ctx)
    before = program.clone()
    run_passes(program, [item or Anywhere()], ctx)
    x = torch.randn(5, 3, INNER)
    for found, want in zip(program.run(x), before.run(x), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=2e-5)
    return program, [row for row in ctx.ledger if row.pass_name == "fuse-quantized-gate"]


def calls(program: Program) -> list[Node]:
    return program.graph.find_nodes(op="call_function", target=FUSED.op)


@pytest.mark.parametrize("score", ["h", "abs"])
@pytest.mark.parametrize("step", [INT4, fz.Quantize("proj", scheme="int8-weight")], ids=lambda step: step.scheme)
def test_one_call_with_the_gate_in_it_counts_as_the_layer(step: fz.Quantize, score: str) -> None:
    program, (row,) = fused(lambda m, x: m.gate(m.proj(x), score=score), step)
    (node,) = calls(program)
    assert not program.graph.find_nodes(op="call_function", target=GATE.op)
    assert [getattr(item, "target", None) for item in node.args[4:]] == ["threshold", "gain"]
    assert node.kwargs.get("score", "h") == score
    weight = program.constant(node.args[1])
    assert weight is not None and weight.shape == (WIDTH, INNER // 2 if step is INT4 else INNER)
    assert executed(program) == {node: "quantized_linear"} and node.meta[INTEGERS].path == "proj"
    assert row.outcome == "rewritten" and row.executes == str(FUSED.op) and row.detail.endswith("1 ms against 2")
    assert calls(with_launched(program)) and not has_launched(program)


def test_which_neurons_fire_is_still_known() -> None:
    program, _ = fused(lambda m, x: m.gate(m.proj(x)))
    x, (node,) = torch.randn(4, 3, INNER), calls(program)
    (found,) = fired(program, [row.to_json() for row in gate_rows(program)], [x]).values()
    given = [program.constant(item) for item in node.args[1:6]]
    h = FUSED.reference(x, *given[:3])
    near = (h - given[3]).abs() < 1e-5
    assert torch.equal(found | near, (h > given[3]) | near) and 0 < int(found.sum()) < found.numel()


SHARED: dict[str, tuple[Callable[[Block, Tensor], Any], str]] = {
    "soft": (lambda m, x: m.gate(m.proj(x), torch.tensor(0.1)), "it is soft"),
    "read twice": (lambda m, x: (h := m.proj(x), m.gate(h)), "the layer's result is read elsewhere, too"),
    "another dim": (lambda m, x: GATE.op(m.proj(x), m.gain[:3], m.gain[:3], dim=1), "its neurons lie along dim 1"),
}


@pytest.mark.parametrize("what", SHARED)
def test_what_is_refused_says_why(what: str) -> None:
    function, reason = SHARED[what]
    program, (row,) = fused(function)
    assert not calls(program) and row.outcome == "skipped" and reason in row.detail


@pytest.mark.parametrize(
    "function", [lambda m, x: m.gate(m.proj(x).relu()), lambda m, x: m.proj(m.gate(x.repeat(1, 1, 2)[..., :WIDTH])
                                                                          [..., :INNER])],
)  # fmt: skip
def test_what_is_no_gate_behind_such_a_layer_is_left_without_a_word(function: Callable[[Block, Tensor], Any]) -> None:
    program, rows = fused(function)
    assert not calls(program) and not rows


def test_a_layer_with_integers_on_both_sides_is_left() -> None:
    program, rows = fused(lambda m, x: m.gate(m.proj(x)), fz.Quantize("proj"))
    assert not calls(program) and not rows


def test_one_kernel_only_where_it_is_faster() -> None:
    asked: list[Any] = []

    def measure(layer: Any) -> tuple[float, float]:
        asked.append(layer)
        return 2e-3, 2e-3

    slow = Anywhere()
    slow.measure = measure
    program, rows = fused(lambda m, x: m.gate(m.proj(x)), item=slow)
    assert not calls(program) and "one kernel is no faster: 2 ms against 2" in rows[-1].detail
    assert asked == [module.Layer(2048, INNER, WIDTH, 2, True, torch.float32, torch.device("cpu"))]


@pytest.mark.parametrize("halves", [False, True])
def test_both_ways_are_timed(halves: bool) -> None:
    one, apart = module.measured(module.Layer(4, 64, 9, 2, halves, torch.float32, torch.device("cpu")))
    assert one > 0 and apart > 0


@pytest.mark.parametrize(("targets", "device", "pays"), [
    (("torch",), "cuda", True), (("torch", "onnx"), "cuda", False), (("aoti",), "cuda", False),
    (("torch",), "cpu", False),
])  # fmt: skip
def test_only_on_a_gpu_where_only_torch_is_asked_for(targets: Any, device: str, pays: bool) -> None:
    plan = fz.Plan(INPUTS, [INT4], targets)
    program, _ = capture(Block(lambda m, x: m.gate(m.proj(x))).eval(), plan)
    ctx = Context(plan)
    run_passes(program, [item for item in PIPELINE if item.stage == "quantize"], ctx)
    with program.fake_mode:
        for node in program.graph.find_nodes(op="call_function", target=GATE.op):
            node.meta["val"] = node.meta["val"].to(device)
    FuseQuantizedGate(lambda layer: (1e-3, 2e-3)).run(program, ctx)
    assert len(calls(program)) == pays


def test_it_comes_before_the_pass_that_takes_gates_behind_floats() -> None:
    names = [item.name for item in PIPELINE]
    assert names.index("fuse-quantized-gate") < names.index("fuse-gated-linear")


@pytest.mark.parametrize("mutant", ["bias", "threshold", "gain", "score", "scale"])
def test_a_wrong_rewrite_is_not_exact(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = module.build

    def wrong(program: Program, *given: Any) -> Node:
        node = right(program, *given)
        x, weight, scale, bias, threshold, gain = node.args
        if mutant == "scale":
            program.state[str(scale.target)] = 1.000001 * program.state[str(scale.target)]  # type: ignore[union-attr]
        elif mutant == "score":
            node.kwargs = {}
        elif mutant == "gain":
            threshold, gain = gain, threshold
        node.args = (x, weight, scale, None if mutant == "bias" else bias,
                     None if mutant == "threshold" else threshold, gain)  # fmt: skip
        return node

    monkeypatch.setattr(module, "build", wrong)
    with pytest.raises(fz.ProofError, match="fuse-quantized-gate"):
        fused(lambda m, x: m.gate(m.proj(x), score="abs"))
