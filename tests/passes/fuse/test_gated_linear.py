"""Fusing a linear layer, its activation and a hard gate: proven, only where it pays, and refused where it must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, silu

import fxfreeze as fz
from fxfreeze.capture import capture
from fxfreeze.kernels.gate import KERNEL as GATE
from fxfreeze.kernels.gated_linear import KERNEL as FUSED
from fxfreeze.passes import PIPELINE
from fxfreeze.passes.fuse import gated_linear as module
from fxfreeze.passes.fuse.gated_linear import FuseGatedLinear
from fxfreeze.pipeline import run_passes
from fxfreeze.program import FIRES, Origin, Program
from fxfreeze.rewrite import STAGES, Context, LedgerRow

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda h: h,
    "relu": relu,
    "gelu": gelu,
    "gelu_tanh": lambda h: gelu(h, approximate="tanh"),
    "silu": silu,
}
ORIGIN = Origin("sdt", "GATE", "mlp.act", 1)
TIMES = ": 1 ms against 2"


class Anywhere(FuseGatedLinear):
    """The pass where there is no GPU, and with no clock; TIMES is what it says of its measurement."""

    devices = ("cpu", "cuda")

    def __init__(self) -> None:
        super().__init__(lambda layer: (1e-3, 2e-3))


class MLP(nn.Module):
    """`function` of the block itself and x [batch, 3, 6]."""

    def __init__(self, function: Callable[[MLP, Tensor], Any], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.proj, self.up_proj = nn.Linear(6, 9, dtype=dtype), nn.Linear(6, 9, bias=False, dtype=dtype)
        self.one = nn.Linear(6, 1, dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        for name in ("threshold", "gain"):
            self.register_buffer(name, torch.randn(9, dtype=wide) / 3)

    def gate(self, h: Tensor, *more: Tensor, **how: Any) -> Tensor:
        return GATE.op(h, self.threshold, self.gain, *more, **how)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def fused(
    function: Callable[[MLP, Tensor], Any],
    *,
    dtype: torch.dtype = torch.float32,
    targets: Any = ("torch",),
    step: FuseGatedLinear | None = None,
    **sizes: Any,
) -> tuple[Program, list[LedgerRow]]:
    """The program after the pass, which proved it, and the ledger."""
    name = str(dtype).removeprefix("torch.")
    plan = fz.Plan(inputs=[fz.Input("x", shape=("batch", 3, 6), dtype=name)], targets=targets, **sizes)
    model = MLP(function, dtype).eval()
    program, _ = capture(model, plan)
    for node in program.graph.find_nodes(op="call_function", target=GATE.op):
        node.meta["fxfreeze"] = ORIGIN
    ctx = Context(plan)
    rows, _ = run_passes(program, [step or Anywhere()], ctx)
    assert rows[0].rewrites == operators(program).count(str(FUSED.op))
    x = torch.randn(5, 3, 6, dtype=dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype.itemsize > 2 else {"rtol": 0.03, "atol": 0.03}
    torch.testing.assert_close(program.run(x), _flat(model(x)), **tolerance)
    return program, list(ctx.ledger)


def _flat(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def operators(program: Program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


# ---- what is fused


@pytest.mark.parametrize("score", ["h", "abs"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_activation_gate(activation: str, score: str) -> None:
    act = ACTIVATIONS[activation]
    program, (row,) = fused(lambda m, x: m.gate(act(m.proj(x)), score=score))
    assert operators(program) == [str(FUSED.op)]
    (node,) = program.graph.find_nodes(op="call_function", target=FUSED.op)
    assert node.kwargs.get("activation", "none") == activation and node.kwargs.get("score", "h") == score
    assert [arg.target for arg in node.args[1:]] == ["proj.weight", "proj.bias", "threshold", "gain"]
    assert node.meta["fxfreeze"] == replace(ORIGIN, primitive=FIRES)
    between = f", {activation}" * (activation != "none")
    assert row == LedgerRow(
        "mlp.act", "sdt", "a gate behind a linear layer", "rewritten", "fuse-gated-linear", str(FUSED.op),
        f"the linear layer{between} and the gate in one kernel{TIMES}",
    )  # fmt: skip


@pytest.mark.parametrize("swapped", [False, True])
def test_the_up_projection_comes_along(swapped: bool) -> None:
    def mlp(m: MLP, x: Tensor) -> Tensor:
        y, up = m.gate(silu(m.proj(x))), m.up_proj(x)
        return up * y if swapped else y * up

    program, (row,) = fused(mlp)
    assert operators(program) == [str(FUSED.op)]
    assert row.detail == f"the linear layer, silu, the gate and the up projection in one kernel{TIMES}"


def test_both_layers_of_an_up_projection_may_have_a_bias_or_none() -> None:
    program, _ = fused(lambda m, x: m.gate(silu(m.up_proj(x))) * m.proj(x))
    assert operators(program) == [str(FUSED.op)]


def test_gain_may_be_missing_and_the_last_dim_may_have_its_number() -> None:
    for dim in (-1, 2):
        program, _ = fused(lambda m, x, d=dim: GATE.op(m.proj(x), m.threshold, dim=d))
        (node,) = program.graph.find_nodes(op="call_function", target=FUSED.op)
        assert operators(program) == [str(FUSED.op)] and len(node.args) == 4 and not node.kwargs


def test_every_layer_by_itself() -> None:
    program, rows = fused(lambda m, x: m.gate(relu(m.proj(x))) + m.gate(m.up_proj(x)))
    assert operators(program).count(str(FUSED.op)) == 2 and len(operators(program)) == 3
    assert [row.outcome for row in rows] == ["rewritten", "rewritten"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    program, _ = fused(lambda m, x: m.gate(gelu(m.proj(x))) * m.up_proj(x), dtype=dtype)
    assert operators(program) == [str(FUSED.op)] and program.output_nodes[0].meta["val"].dtype == dtype


@pytest.mark.parametrize(
    "other",
    [
        lambda m, x: m.up_proj(x.flip(0)),  # of another input
        lambda m, x: m.one(x),  # broadcast
        lambda m, x: relu(m.up_proj(x)),
        lambda m, x: x.sum(-1, keepdim=True),
        lambda m, x: 2.0,
    ],
)
def test_a_product_with_something_else_stays(other: Callable[[MLP, Tensor], Any]) -> None:
    program, (row,) = fused(lambda m, x: m.gate(silu(m.proj(x))) * other(m, x))
    assert str(FUSED.op) in operators(program) and operators(program)[-1] == "aten.mul.Tensor"
    assert row.detail == f"the linear layer, silu and the gate in one kernel{TIMES}"


def test_a_product_stays_where_its_factors_are_read_elsewhere() -> None:
    def gate_twice(m: MLP, x: Tensor) -> Any:
        y = m.gate(m.proj(x))
        return y * m.up_proj(x), y

    def up_twice(m: MLP, x: Tensor) -> Any:
        up = m.up_proj(x)
        return m.gate(m.proj(x)) * up, up

    for function in (gate_twice, up_twice, lambda m, x: m.gate(m.proj(x)).square() * m.up_proj(x)):
        program, _ = fused(function)
        assert {str(FUSED.op), "aten.mul.Tensor", "aten.linear.default"} <= set(operators(program))
    program, _ = fused(lambda m, x: (y := m.gate(m.proj(x))) * y)
    assert operators(program) == [str(FUSED.op), "aten.mul.Tensor"]


# ---- what is not


def twice(m: MLP, x: Tensor) -> Any:
    h = m.proj(x)
    return m.gate(relu(h)), h


def twice_activated(m: MLP, x: Tensor) -> Any:
    h = relu(m.proj(x))
    return m.gate(h), h


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: m.gate(m.proj(x), m.gain.square().mean()), "it is soft"),
        (lambda m, x: GATE.op(m.proj(x), m.threshold.expand(2, 9), None, None, (x[:, 0, 0] > 0).long()),
         "its thresholds differ from row to row"),
        (lambda m, x: m.gate(m.proj(x).transpose(1, 2), dim=1), "its neurons lie along dim 1, not along the last"),
        (lambda m, x: m.gate(torch.tanh(m.proj(x))), "aten.tanh.default is no linear layer"),
        (lambda m, x: m.gate(relu(x).repeat(1, 1, 2)[..., :9]), "aten.slice.Tensor is no linear layer"),
        (lambda m, x: m.gate(nn.functional.linear(x, m.proj.weight * x.mean())),
         "its weight is not a parameter but computed by aten.mul.Tensor"),
        (twice, "the linear layer's result is read elsewhere, too"),
        (twice_activated, "what aten.relu.default makes is read elsewhere, too"),
        (lambda m, x: GATE.op(m.proj(x), m.threshold.double()), "no torch.float64 threshold beside torch.float32"),
        (lambda m, x: GATE.op(m.proj(x), m.threshold.half()), "no torch.float16 threshold beside torch.float32"),
    ],
)  # fmt: skip
def test_what_is_refused(function: Callable[[MLP, Tensor], Any], reason: str) -> None:
    program, (row,) = fused(function)
    assert str(GATE.op) in operators(program) and str(FUSED.op) not in operators(program)
    assert (row.outcome, row.executes, row.site) == ("skipped", str(GATE.op), "mlp.act")
    assert row.detail.endswith(reason)


def test_float64_is_refused() -> None:
    _, (row,) = fused(lambda m, x: m.gate(m.proj(x)), dtype=torch.float64)
    assert row.detail.endswith("beside torch.float64")


# ---- where


def on_cuda(targets: Any, step: FuseGatedLinear) -> tuple[list[str], Context]:
    """What the pass makes of a program whose values are said to be on a GPU; without a proof, for there is none."""
    plan = fz.Plan(inputs=[fz.Input("x", shape=("batch", 3, 6))], targets=targets)
    program, _ = capture(MLP(lambda m, x: m.gate(relu(m.proj(x)))).eval(), plan)
    for node in program.graph.nodes:
        if isinstance(value := node.meta.get("val"), Tensor):
            with program.fake_mode:
                node.meta["val"] = torch.empty(value.shape, dtype=value.dtype, device="cuda")
    ctx = Context(plan)
    step.run(program, ctx)
    return operators(program), ctx


@pytest.mark.parametrize(
    ("targets", "pays"), [(("torch",), True), (("torch", "onnx"), False), (("aoti",), False), ((), False)]
)
def test_on_a_gpu_where_only_torch_is_asked_for(targets: Any, pays: bool) -> None:
    found, ctx = on_cuda(targets, FuseGatedLinear(lambda layer: (1e-3, 2e-3)))
    assert (str(FUSED.op) in found) == pays and len(ctx.ledger) == pays and not ctx.near_misses


def test_not_on_a_cpu_and_without_a_word() -> None:
    program, rows = fused(lambda m, x: m.gate(m.proj(x)), step=FuseGatedLinear())
    assert str(FUSED.op) not in operators(program) and rows == []


def test_it_is_in_the_pipeline_after_the_folds() -> None:
    stages = [STAGES.index(item.stage) for item in PIPELINE]
    assert stages == sorted(stages) and "fuse-gated-linear" in [item.name for item in PIPELINE]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_artifact_holds_it(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through all passes, measured against the model, saved and loaded."""
    monkeypatch.setattr(FuseGatedLinear, "devices", ("cpu",))
    (instance,) = (item for item in PIPELINE if isinstance(item, FuseGatedLinear))
    monkeypatch.setattr(instance, "measure", lambda layer: (1e-3, 2e-3))
    model = MLP(lambda m, x: m.gate(silu(m.proj(x))) * m.up_proj(x), getattr(torch, dtype)).eval()
    plan = fz.Plan(inputs=[fz.Input("x", shape=("batch", 3, 6), dtype=dtype)], targets=["torch"])
    artifact = fz.compile(model, plan)
    artifact.save(tmp_path / "a")
    assert [row["executes"] for row in artifact.manifest["ledger"] if row["pass_name"] == "fuse-gated-linear"] == [
        str(FUSED.op)
    ]
    x = torch.randn(7, 3, 6, dtype=getattr(torch, dtype))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 0.03, "atol": 0.03}
    loaded = fz.load(tmp_path / "a")
    torch.testing.assert_close(loaded(x), model(x), **tolerance)
    h = silu(model.proj(x))
    near = (h.float() - model.threshold).abs() < tolerance["atol"]
    assert list(loaded.firing(x)) == [""] and torch.equal(loaded.firing(x)[""] | near, (h > model.threshold) | near)


# ---- the time


def test_one_kernel_only_where_it_is_faster() -> None:
    asked: list[Any] = []

    def measure(layer: Any) -> tuple[float, float]:
        asked.append(layer)
        return 2e-3, 2e-3

    slow = Anywhere()
    slow.measure = measure
    program, rows = fused(lambda m, x: m.gate(silu(m.proj(x))) * m.up_proj(x), step=slow, dims={"batch": fz.Dim(max=5)})
    assert not program.graph.find_nodes(op="call_function", target=FUSED.op)
    assert rows[-1].outcome == "skipped" and "one kernel is no faster: 2 ms against 2" in rows[-1].detail
    assert asked == [module.Layer(16, 6, 9, "silu", True, torch.float32, torch.device("cpu"))]


@pytest.mark.parametrize("up", [False, True])
def test_both_ways_are_timed(up: bool) -> None:
    one, apart = module.measured(module.Layer(4, 6, 9, "gelu", up, torch.float32, torch.device("cpu")))
    assert one > 0 and apart > 0


# ---- wrong rewrites


@pytest.mark.parametrize("mutant", ["bias", "threshold", "gain", "score", "activation", "up"])
def test_a_wrong_rewrite_is_not_exact(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = module.build

    def wrong(program: Program, found: Any) -> torch.fx.Node:
        node = right(program, found)
        x, weight, bias, threshold, gain, up, up_bias = [*node.args, None][:7]
        how = dict(node.kwargs)
        if mutant == "bias":
            bias = None
        elif mutant == "threshold":
            threshold = None
        elif mutant == "gain":
            threshold, gain = gain, threshold
        elif mutant == "up":
            up = weight
        else:
            how.pop(mutant)
        node.args, node.kwargs = (x, weight, bias, threshold, gain, up, up_bias), how
        return node

    monkeypatch.setattr(module, "build", wrong)
    with pytest.raises(fz.ProofError, match="fuse-gated-linear"):
        fused(lambda m, x: m.gate(silu(m.proj(x)), score="abs") * m.up_proj(x))
