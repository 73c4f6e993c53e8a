"""2:4 weights on a GPU that need not be there: which of them are taken, and what the ledger says of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.capture import capture
from fxfreeze.kernels import semi_structured as kernel
from fxfreeze.kernels.semi_structured import KERNEL, compress, dense
from fxfreeze.passes import PIPELINE
from fxfreeze.passes.fuse import semi_structured as module
from fxfreeze.passes.fuse.semi_structured import Layer, SemiStructured
from fxfreeze.pipeline import run_passes
from fxfreeze.program import Fold, Program
from fxfreeze.rewrite import Context, LedgerRow

aten = torch.ops.aten
IN, OUT = 128, 96
NEEDS = "50% zeros; size only: no speed-up, since 2:4 needs a CUDA device of compute capability ≥ 8.0"
FASTER, SLOWER = (1e-3, 2e-3), (2e-3, 1e-3)


class Net(nn.Module):
    def __init__(self, how: str = "linear", out: int = OUT, inner: int = IN) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.fc: Any = nn.Embedding(out, inner) if how == "embedding" else nn.Linear(inner, out)
        kept = torch.rand(out, inner // 4, 4).argsort(-1).lt(2).reshape(out, inner)
        if how == "embedding":  # whose inputs are its rows
            kept = torch.rand(inner, out // 4, 4).argsort(-1).lt(2).reshape(inner, out).T
        self.fc.weight.data *= kept

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "matmul":
                return x @ self.fc.weight.T.contiguous()
            case "embedding":
                return self.fc(x.argmax(-1) % OUT)
        return self.fc(x)


def fused(
    model: nn.Module,
    *times: tuple[float, float],
    capability: tuple[int, int] | None = (8, 0),
    dtype: str = "float16",
    targets: Any = ("torch",),
    inner: int = IN,
    gpu: bool = True,
) -> tuple[Program, list[LedgerRow], list[Layer]]:
    """The program after the pass on a pretended GPU, its rows, and what was timed; not proven: that runs on the CPU."""
    program, ctx = captured(model, dtype, targets, inner)
    asked: list[Layer] = []

    def clock(layer: Layer) -> list[tuple[float, float]]:
        asked.append(layer)
        return [*(times or (FASTER,)) * len(layer.sizes)][: len(layer.sizes)]

    (fold,) = (item for item in PIPELINE if item.name == "fold-constants")
    run_passes(program, [fold], ctx, verify="off")
    for node in program.graph.nodes if gpu else ():
        if isinstance(value := node.meta.get("val"), Tensor):
            with program.fake_mode:
                node.meta["val"] = value.to("cuda")
    count = SemiStructured(clock, lambda device: capability if device.type == "cuda" else None).run(program, ctx)
    assert count == operators(program).count(str(KERNEL.op))
    return program, list(ctx.ledger), asked


def captured(model: nn.Module, dtype: str, targets: Any = ("torch",), inner: int = IN) -> tuple[Program, Context]:
    plan = fz.Plan(inputs=[fz.Input("x", shape=("batch", inner), dtype=dtype)], targets=targets)
    return capture(model.to(getattr(torch, dtype)).eval(), plan)[0], Context(plan)


def operators(program: Program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("how", ["linear", "matmul"])
def test_a_two_of_four_weight_is_packed(how: str, dtype: str) -> None:
    model = Net(how)
    program, (row,), asked = fused(model, dtype=dtype)
    (node,) = program.graph.find_nodes(op="call_function", target=KERNEL.op)
    values, index = (program.constant(item) for item in node.args[1:3])
    assert values is not None and index is not None
    assert torch.equal(dense(values, index), model.fc.weight) and values.dtype == model.fc.weight.dtype
    assert len(node.args) == (4 if how == "linear" else 3)
    assert (row.outcome, row.executes) == ("rewritten", str(KERNEL.op))
    assert row.detail == "50% zeros; two of four are left. 1×128: 1 ms against 2; 512×128: 1 ms against 2"
    assert asked == [Layer(((1, IN), (512, IN)), OUT, getattr(torch, dtype), torch.device("cuda:0"))]


@pytest.mark.parametrize(
    ("capability", "gpu"),
    [((7, 5), True), (None, True), ((8, 0), False)],
    ids=["an old GPU", "none of CUDA's", "a CPU"],
)
def test_other_devices_save_room_only(capability: Any, gpu: bool) -> None:
    program, (row,), asked = fused(Net(), capability=capability, gpu=gpu)
    assert str(KERNEL.op) not in operators(program) and not asked
    assert (row.outcome, row.executes, row.detail) == ("skipped", "aten.linear.default", NEEDS)


@pytest.mark.parametrize("cusparselt", [True, False])
def test_a_newer_gpu_needs_cusparselt(cusparselt: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "has_cusparselt", lambda: cusparselt)
    program, (row,), _ = fused(Net(), capability=(9, 0))
    assert (str(KERNEL.op) in operators(program)) == cusparselt
    assert cusparselt or row.detail.endswith("≥ 9.0 needs a torch that is built with cuSPARSELt")


@pytest.mark.parametrize(
    ("model", "how", "reason"),
    [
        (Net(), {"dtype": "float32"}, "2:4 is for half precision, and this is torch.float32"),
        (Net(out=80), {}, "2:4 takes multiples of 32 outputs and of 64 inputs"),
        (Net(inner=96), {"inner": 96}, "2:4 takes multiples of 32 outputs and of 64 inputs"),
        (Net("embedding"), {}, "rows of it are looked up, not multiplied"),
        (
            Net(),
            {"targets": ("torch", "aoti")},
            "there is no form for targets torch, aoti on cuda; files for aoti hold them",
        ),
    ],
    ids=["float32", "outputs", "inputs", "embedding", "targets"],
)
def test_what_is_refused(model: nn.Module, how: dict[str, Any], reason: str) -> None:
    program, (row,), asked = fused(model, **how)
    assert str(KERNEL.op) not in operators(program) and not asked
    assert row.detail == f"50% zeros; size only: no speed-up, since {reason}"


def test_three_of_four_are_no_business_of_this_pass() -> None:
    model = Net()
    model.fc.weight.data[5, :4] = torch.tensor([1.0, 2.0, 0.0, 3.0])
    program, rows, asked = fused(model)
    assert str(KERNEL.op) not in operators(program) and not rows and not asked


@pytest.mark.parametrize(("times", "fuses"), [((FASTER,), True), ((SLOWER,), False), ((FASTER, SLOWER), False)])
def test_it_is_made_where_it_is_faster(times: Any, fuses: bool) -> None:
    program, (row,), _ = fused(Net(), *times)
    assert (str(KERNEL.op) in operators(program)) == fuses == (row.outcome == "rewritten")
    assert fuses or "since the dense product is as fast as the 2:4 one: 1×128: " in row.detail


def test_the_rewrite_is_exact() -> None:
    """Proven in float64, on the CPU, where the operator is its reference; and a wrong one is not."""
    program, ctx = captured(Net(), "float32")

    class Forced(SemiStructured):
        def run(self, program: Program, ctx: Context) -> int:
            for found in module.sparse_weights(program):
                module.build(program, found)
                if self.wrong:
                    (name,) = (name for name in program.state if name.endswith("_index"))
                    program.state[name] = program.state[name].flip(0)
            return 1

    Forced.wrong = False
    run_passes(program, [Forced()], ctx)
    assert operators(program) == [str(KERNEL.op)]
    Forced.wrong = True
    with pytest.raises(fz.ProofError, match="semi-structured"):
        run_passes(captured(Net(), "float32")[0], [Forced()], ctx)


def test_what_was_folded_into_the_weight_is_kept_and_still_measured() -> None:
    program, _ = captured(Net(), "float32")
    name = "fc.weight"
    kept = program.state[name] != 0
    program.folds[name] = Fold("LoRA", "fc", program.state.recipe(name), 0.1)
    program.state[name] = program.state.recipe(name).then(lambda value: value + kept / 3)
    (found,) = module.sparse_weights(program)
    module.build(program, found)
    program.sweep()
    values = program.state["fc.weight_values"]
    assert values.dtype == torch.float64 and torch.equal(values, compress(found.weight)[0])
    fold = program.folds["fc.weight_values"]
    torch.testing.assert_close(values - fold.base.value(), torch.full_like(values, 1 / 3))
    assert program.folds.keys() == {"fc.weight_values"}


def test_the_pipeline_says_it_once() -> None:
    """Where there are blocks as well, that pass comes first; a weight gets one row."""
    program, ctx = captured(Net(), "float16")
    passes = [item for item in PIPELINE if item.name in ("block-sparse", "semi-structured")]
    assert [item.name for item in passes] == ["block-sparse", "semi-structured"]
    run_passes(program, passes, ctx, verify="off")
    assert [(row.pass_name, row.detail) for row in ctx.ledger] == [("semi-structured", NEEDS)]


def test_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[dict[str, Tensor]] = []

    def once(calls: Any, device: Any) -> dict[str, float]:
        results.append({name: call() for name, call in calls.items()})
        return {"ours": 1.0, "dense": 2.0}

    monkeypatch.setattr(module, "medians", once)
    sizes = ((1, IN), (8, IN))
    layer = Layer(sizes, OUT, torch.float32, torch.device("cpu"))
    assert module.measured.__wrapped__(layer) == [(1.0, 2.0)] * 2
    assert [found["ours"].shape for found in results] == [(1, OUT), (8, OUT)]
    for found in results:
        assert (found["ours"] != 0).all()
        torch.testing.assert_close(found["ours"], found["dense"])
