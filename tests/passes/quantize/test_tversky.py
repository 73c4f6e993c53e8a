"""fz.Quantize on Tversky heads: codes on one grid, what is refused, and integers in every target."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import fxfreeze as fz
from fxfreeze import demo
from fxfreeze.api import Compilation, rewrite
from fxfreeze.capture import capture
from fxfreeze.errors import EmitError, PlanError
from fxfreeze.integers import executed
from fxfreeze.kernels._tversky import combination, project
from fxfreeze.kernels.quantize import KERNEL as QUANTIZE
from fxfreeze.kernels.tversky import KERNEL as WHOLE
from fxfreeze.kernels.tversky_frozen import KERNEL as FROZEN
from fxfreeze.kernels.tversky_integer import KERNEL as INTEGER
from fxfreeze.nn import TverskyProjection
from fxfreeze.passes import PIPELINE
from fxfreeze.passes.quantize import tversky as module
from fxfreeze.passes.quantize._sites import Head
from fxfreeze.passes.quantize.tversky import codes
from fxfreeze.pipeline import run_passes
from fxfreeze.rewrite import Context

SIZE, BANK, CLASSES = 12, 24, 6
MINIMA = {"intersection": "min", "difference": "subtractmatch", "semantics": "per_feature"}


class Net(nn.Module):
    def __init__(self, **how: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(SIZE, SIZE)
        self.head = TverskyProjection(SIZE, CLASSES, BANK, **how)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu())


def batches(count: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, SIZE, generator=generator).to(dtype) for _ in range(count)]


def plan(*steps: Any, targets: Any = (), dtype: str = "float32") -> fz.Plan:
    return fz.Plan([fz.Input("x", ("batch", SIZE), dtype)], steps, targets=targets)


def compiled(model: nn.Module, *steps: Any, **options: Any) -> Compilation:
    data = batches(dtype=getattr(torch, options.get("dtype", "float32")))
    return rewrite(model.eval(), plan(*steps, **options), calibration=data)


def called(done: Compilation, kernel: Any) -> list[Any]:
    return [node for node in done.program.graph.nodes if node.target is kernel.op]


def told(done: Compilation, outcome: str = "rewritten") -> list[Any]:
    return [row for row in done.ledger if row.pass_name == "quantize_tversky" and row.outcome == outcome and row.step]


def stored(done: Compilation, leaf: str) -> Tensor:
    names = {str(node.target) for node in done.program.graph.nodes if node.op == "get_attr"}
    (name,) = [name for name in names if name.endswith(leaf)]
    return done.program.state[name]


# ---- codes


def test_a_code_is_the_nearest_step_and_0_is_absent() -> None:
    step, zero = torch.tensor(0.1), torch.tensor(0, dtype=torch.uint8)
    measures = torch.tensor([-3.0, 0.0, 1e-6, 0.04, 0.1, 0.24, 0.26, 1.0, 25.5, 99.0])
    assert codes(measures, step, zero, 0.0).tolist() == [0, 0, 1, 1, 1, 2, 3, 10, 255, 255]
    assert codes(measures, step, zero, 0.24).tolist() == [0, 0, 0, 0, 0, 0, 3, 10, 255, 255]


def test_what_is_present_stays_so() -> None:
    """Prototypes by their table, and objects by the graph: a step of rounding must not make a feature absent."""
    net = Net(**MINIMA)
    done = compiled(net, fz.Quantize("head"))
    measures = project(net.head.prototypes.detach().double(), net.head.features.detach().double(), False).T
    table = stored(done, "codes")
    assert torch.equal(table > 0, measures > 0) and table.dtype == torch.uint8
    assert torch.equal(stored(done, "totals"), table.sum(0, dtype=torch.int32))
    step = float(stored(done, "step"))
    inside = (measures > step) & (measures < 255 * step)
    assert float((table * step - measures).abs()[inside].max()) <= 0.5001 * step


# ---- the pass


@pytest.mark.parametrize(
    "how",
    [{}, MINIMA, {"model": "ratio", "intersection": "max", "semantics": "inclusive"},
     {**MINIMA, "threshold": 0.3, "normalize": True}],
)  # fmt: skip
def test_a_head_becomes_integers_and_hardly_moves(how: dict[str, Any]) -> None:
    net, x = Net(**how), batches(3)[-1]
    done = compiled(net, fz.Quantize("head"))
    (node,) = called(done, INTEGER)
    assert not called(done, FROZEN) and not called(done, WHOLE)
    assert node.args[0].target is QUANTIZE.op and node.args[0].meta["val"].dtype == torch.uint8
    (row,) = told(done)
    assert row.site == "head" and row.executes.startswith("fxfreeze.tversky_integer.default: uint8 measures")
    assert "of its result; 0 … 255 span the " in row.detail and "64 rows of calibration data" in row.detail
    assert "x·Ωᵀ, what is present, and what similarities make of sums in floats" in row.detail
    want, (found,) = net(x).detach(), done.program.run(x)
    assert 0 < float((found - want).norm() / want.norm()) < 0.02


def test_no_measures_stay_in_floats() -> None:
    done = compiled(Net(**MINIMA), fz.Quantize("head"))
    held = [done.program.state[str(node.target)] for node in done.program.graph.nodes if node.op == "get_attr"]
    assert not [value for value in held if tuple(value.shape) == (BANK, CLASSES) and value.is_floating_point()]


def test_the_grid_is_the_one_of_least_error(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(**MINIMA)
    with torch.no_grad():
        net.head.prototypes.mul_(20.0)  # so that it matters what is spanned
    tried: dict[module.Grid, float] = {}
    real = module._tried

    def watched(*args: Any) -> Any:
        found = real(*args)
        tried.update({grid: tally.gap for grid, tally in found[0].items()})
        return found

    monkeypatch.setattr(module, "_tried", watched)
    done = compiled(net, fz.Quantize("head"))
    best = min(tried, key=lambda grid: tried[grid])
    assert len(tried) == 3 and tried[best] < 0.5 * max(tried.values())
    assert float(stored(done, "step")) == best.step and f"span {best.spans};" in told(done)[0].detail
    assert len({grid.spans for grid in tried}) == 3


def test_what_saturates_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def narrow(program: Any, head: Any, seen: Any) -> list[module.Grid]:
        return [module.Grid(0.001, "little", torch.float32)]

    assert "0.00% of objects' and 0.00% of prototypes'" in told(compiled(Net(), fz.Quantize("head")))[0].detail
    monkeypatch.setattr(module, "_grids", narrow)
    net = Net()
    measures = project(net.head.prototypes.detach(), net.head.features.detach(), False)
    objects = project(net.body(batches()[0]).relu().detach(), net.head.features.detach(), False)
    shares = [float((value > 0.2555).double().mean()) for value in (objects, measures)]
    detail = told(compiled(net, fz.Quantize("head", exclude="body")))[0].detail
    assert f"and {shares[1]:.2%} of prototypes' measures saturate" in detail and shares[1] > 0.1
    said = float(detail.partition("% of objects'")[0].rpartition(" ")[2])
    assert said == pytest.approx(100 * shares[0], abs=1.0) and shares[0] > 0.1


def test_objects_without_any_feature_are_no_trouble() -> None:
    net = Net()
    with torch.no_grad():
        net.body.weight.zero_()
        net.body.bias.fill_(1.0)
        net.head.features.abs_().neg_()
    done = compiled(net, fz.Quantize("head"))
    assert called(done, INTEGER)
    x = batches()[0]
    torch.testing.assert_close(done.program.run(x)[0], net(x), rtol=2e-3, atol=2e-3)


def test_half_precision_is_computed_in_float32_and_rounded_once() -> None:
    net = Net(**MINIMA).to(torch.bfloat16)
    done = compiled(net, fz.Quantize("head"), dtype="bfloat16")
    (node,) = called(done, INTEGER)
    assert node.kwargs["dtype"] == torch.bfloat16 and stored(done, "step").dtype == torch.float32
    x = batches(1, torch.bfloat16)[0]
    want = net(x).detach().float()
    assert float((done.program.run(x)[0].float() - want).norm() / want.norm()) < 0.02


def test_a_head_that_runs_twice() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) - self.head(self.body(x))

    net, x = Twice(**MINIMA), batches()[0]
    done = compiled(net, fz.Quantize("head"))
    assert len(called(done, INTEGER)) == 2
    want = net(x).detach()
    assert float((done.program.run(x)[0] - want).norm() / want.norm()) < 0.02


# ---- what is refused, and what is left alone


@pytest.mark.parametrize(
    ("targets", "device", "dtype", "features", "reason"),
    [
        (("torch",), "cuda", torch.float32, 24, None),
        (("torch",), "cuda", torch.float64, 24, "the kernel for GPUs takes no float64"),
        (("torch",), "cuda", torch.float32, 65794, "the kernel for GPUs sums minima of up to 65793 features"),
        (("torch", "aoti"), "cuda", torch.float32, 24, "on cuda, .* a kernel for the torch target alone"),
        ((), "cuda", torch.float32, 24, "on cuda, .* a kernel for the torch target alone"),
        (("torch",), "meta", torch.float32, 24, "on meta, .* a kernel for the torch target alone"),
    ],
)
def test_on_a_gpu_a_head_is_for_the_torch_target(
    targets: Any, device: str, dtype: torch.dtype, features: int, reason: str | None
) -> None:
    with FakeTensorMode():
        measures = torch.empty(features, CLASSES, dtype=dtype, device=device)
    found = module._gpu_problem(combination("contrast", *MINIMA.values()), measures, targets)
    assert found is None if reason is None else re.fullmatch(reason, str(found))


@pytest.mark.parametrize(("targets", "runs"), [(["torch"], True), (["torch", "onnx"], False)])
def test_the_pass_asks_where_the_head_lies(targets: Any, runs: bool) -> None:
    given = plan(fz.Quantize("head"), targets=targets)
    program, ctx = capture(Net(**MINIMA).eval(), given)[0], Context(given)
    ahead = [item for item in PIPELINE if item.stage in ("clean", "freeze", "fold")]
    run_passes(program, ahead, ctx)
    (node,) = program.graph.find_nodes(op="call_function", target=FROZEN.op)
    measures = node.args[1]
    with program.fake_mode:
        measures.meta["val"] = torch.empty(measures.meta["val"].shape, device="cuda")
    assert module._problem(program, Head("head", given.steps[0], node), given.targets) == (
        None if runs else "on cuda, integer similarities have a kernel for the torch target alone"
    )


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"intersection": "gmean", "semantics": "inclusive"}, "gmean of every feature is no integer"),
        ({"intersection": "softmin", "semantics": "per_feature"}, "softmin of every feature is no integer"),
        ({"intersection": "min", "threshold": -0.1}, "negative measures are present above -0.1, and the grid begins"),
    ],
)
def test_what_is_no_integer_on_the_grid_is_refused(how: dict[str, Any], reason: str) -> None:
    net, x = Net(**how), batches()[0]
    done = compiled(net, fz.Quantize("head"))
    (row,) = told(done, "refused")
    assert row.site == "head" and row.step == "quantize" and reason in row.detail
    assert called(done, FROZEN) and not called(done, INTEGER) and not told(done)
    torch.testing.assert_close(done.program.run(x)[0], net(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", [{"intersection": "gmean"}, {"intersection": "softmin"}])
def test_roots_and_logarithms_of_sums_are_served(how: dict[str, Any]) -> None:
    net, x = Net(**how), batches()[0]
    done = compiled(net, fz.Quantize("head"))
    want = net(x).detach()
    assert called(done, INTEGER) and float((done.program.run(x)[0] - want).norm() / want.norm()) < 0.02


def test_a_head_whose_prototypes_are_computed_is_refused() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.inner = nn.Linear(SIZE, SIZE), Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.body(x))

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = TverskyProjection(SIZE, CLASSES, BANK)

        def forward(self, x: Tensor) -> Tensor:
            head = self.head
            moved = head.prototypes + x.mean(0)
            return WHOLE.op(x, head.features, moved, head.theta, head.alpha, head.beta, model="contrast",
                            intersection="product", difference="ignorematch", semantics="aggregate")  # fmt: skip

    done = compiled(Computed(), fz.Quantize())
    (row,) = told(done, "refused")
    assert {row.site for row in done.ledger if row.pass_name == "quantize_static" and row.step} == {"body"}
    assert row.site == "inner" and "were not folded into constant measures" in row.detail
    (row,) = told(compiled(Computed(), fz.Quantize("inner")), "refused")
    assert row.site == "inner"


def test_a_budget_puts_a_head_back() -> None:
    net, x = Net(**MINIMA), batches()[0]

    def snr(done: Compilation) -> float:
        want = net(x)
        return float(20 * (want.norm() / (done.program.run(x)[0] - want).norm()).log10().detach())

    whole = compiled(net, fz.Quantize("head"))
    kept = compiled(net, fz.Quantize("head", budget=f"snr:{snr(whole) - 1:.2f}"))
    assert called(kept, INTEGER) and snr(kept) == snr(whole)
    back = compiled(net, fz.Quantize("head", budget=f"snr:{snr(whole) + 1:.2f}"))
    assert called(back, FROZEN) and not called(back, INTEGER)
    (row,) = [row for row in back.ledger if row.detail.startswith("kept in floats for the budget")]
    assert (row.site, row.executes) == ("head", "floats")


def test_a_head_has_a_sensitivity() -> None:
    net, x = Net(**MINIMA), batches()[0]
    rows = fz.sensitivity(net.eval(), plan(fz.Quantize("head")), calibration=batches())
    (row,) = rows
    want, (found,) = net(x), compiled(net, fz.Quantize("head")).program.run(x)
    assert row.output_snr == pytest.approx(float(20 * (want.norm() / (found - want).norm()).log10().detach()), abs=0.01)


@pytest.mark.parametrize(
    "steps",
    [
        [fz.Quantize("body")],
        [fz.Quantize(exclude="head")],
        [fz.Quantize("head", mode="dynamic")],
        [fz.Quantize("head", scheme="int8-weight")],
        [fz.Quantize("head"), fz.Quantize("head", scheme="int8-weight")],
    ],
    ids=["another", "excluded", "dynamic", "weights", "last"],
)
def test_heads_that_no_static_step_names_stay(steps: list[fz.Quantize]) -> None:
    done = compiled(Net(), *steps)
    assert not called(done, INTEGER) and not called(done, FROZEN) and not told(done) and not told(done, "refused")


def test_of_two_steps_the_last_says() -> None:
    done = compiled(Net(), fz.Quantize("*", mode="dynamic"), fz.Quantize("head", name="mine"))
    assert [row.step for row in told(done)] == ["mine"]


def test_a_step_that_names_neither_a_layer_nor_a_head_is_an_error() -> None:
    class Named(Net):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.act(self.body(x)))

    with pytest.raises(PlanError, match="names no layer with a weight"):
        compiled(Named(), fz.Quantize("act"))


def test_a_step_that_makes_the_head_and_one_that_quantizes_it_are_one_plan() -> None:
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.ReLU(), nn.Linear(SIZE, CLASSES)).eval()
    done = compiled(model, fz.Tversky("2"), fz.Quantize("2"))
    assert called(done, INTEGER) and [row.site for row in told(done)] == ["2"]


# ---- targets


def ran(artifact: fz.Artifact, target: str) -> dict[str, set[str]]:
    """Site → what the ledger says that `target` runs."""
    found: dict[str, set[str]] = {}
    for row in artifact.manifest["ledger"]:
        if row["executes"].endswith(f"in {target}"):
            found.setdefault(row["site"], set()).add(row["executes"].removesuffix(f" in {target}"))
    return found


def artifact_of(*steps: Any, targets: Any, **how: Any) -> fz.Artifact:
    return fz.compile(Net(**how).eval(), plan(*steps, targets=targets), calibration=batches())


@pytest.mark.parametrize(
    ("how", "kernels"),
    [({}, "MatMulInteger"), (MINIMA, "MatMulInteger and ReduceSum"),
     ({"intersection": "min", "difference": "subtractmatch", "semantics": "inclusive"}, "ReduceSum")],
)  # fmt: skip
def test_onnx_runtime_sums_integers(how: dict[str, Any], kernels: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    net = nn.Sequential(TverskyProjection(SIZE, 96, 100, **how)).eval()  # less the exporter may widen
    artifact = fz.compile(net, plan(fz.Quantize(), targets=["onnx"]), calibration=batches())
    assert ran(artifact, "onnx") == {"0": {f"integer-executed by {kernels}"}}
    artifact.save(tmp_path / "out")
    graph = onnx.load(tmp_path / "out" / "onnx" / "model.onnx").graph
    kinds = [item.data_type for item in graph.initializer if list(item.dims) == [100, 96]]
    assert kinds == [onnx.TensorProto.UINT8]
    assert not [node for node in graph.node if node.op_type == "MatMul"]


def test_bytes_that_two_products_read_are_stored_once(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    artifact_of(fz.Quantize("head"), targets=["onnx"]).save(tmp_path / "out")
    graph = onnx.load(tmp_path / "out" / "onnx" / "model.onnx").graph
    tables = [onnx.numpy_helper.to_array(item) for item in graph.initializer if list(item.dims) == [BANK, CLASSES]]
    assert [str(table.dtype) for table in tables] == ["uint8", "uint8"]
    assert sorted(int(table.max()) > 1 for table in tables) == [False, True]  # what is present, and the codes


def test_a_product_in_wide_integers_is_no_integer_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The label is read from the graph that runs: without MatMulInteger there is none."""
    pytest.importorskip("onnxruntime")
    from fxfreeze.emit import onnx_heads

    monkeypatch.setattr(onnx_heads, "_multiply_bytes", lambda *args: None)
    with pytest.raises(EmitError, match=r"(?s)1 quantized layers would be computed in floats.*head: int8"):
        artifact_of(fz.Quantize("head"), targets=["onnx"])
    allowed = artifact_of(fz.Quantize("head", allow_simulated=True), targets=["onnx"])
    assert "simulated" in ran(allowed, "onnx")["head"]


def test_fewer_calls_than_heads_are_no_proof() -> None:
    program = compiled(Net(), fz.Quantize("head")).program
    kernels = {heads: [row[2] for row in executed(program, 0, heads=heads)["integer"]] for heads in (None, 0, 1)}
    assert kernels == {None: ["tversky_integer"], 0: [None], 1: ["tversky_integer"]}


def test_without_layers_torchao_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxfreeze import integers

    monkeypatch.setattr(integers, "_register_patterns", lambda: pytest.fail("it asked for torchao"))
    program = compiled(Net(), fz.Quantize("head")).program
    assert integers.has_integers(program)
    changed = integers.with_integers(program)
    assert not any(node.target is QUANTIZE.op for node in changed.graph.nodes)
    x = batches()[0]
    torch.testing.assert_close(changed.run(x)[0], program.run(x)[0], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("how", [{}, MINIMA], ids=["product", "minima"])
def test_a_package_and_torch_call_the_kernel(how: dict[str, Any], tmp_path: Path) -> None:
    """With the layer in front on integers, too; and the package in a process that cannot import fxfreeze."""
    pytest.importorskip("torchao", reason="needs fxfreeze[int8]")
    artifact = artifact_of(fz.Quantize(), targets=["torch", "aoti"], **how)
    for target in ("torch", "aoti"):
        assert ran(artifact, target) == {
            "body": {"integer-executed by oneDNN"},
            "head": {"integer-executed by tversky_integer"},
        }
    artifact.save(tmp_path / "out")
    x = batches()[0]
    torch.save((x, artifact.target("aoti")(x)), tmp_path / "case.pt")
    code = (
        "import sys, torch; sys.modules['fxfreeze'] = None; x, want = torch.load('case.pt');"
        "(found,) = torch._inductor.aoti_load_package('out/aoti/model.pt2')(x);"
        "assert torch.equal(found, want) and not hasattr(torch.ops.fxfreeze, 'tversky_integer_native')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_gates_and_integers_around_a_head_are_one_plan() -> None:
    pytest.importorskip("onnxruntime")
    model = nn.Sequential(nn.Linear(SIZE, 16), nn.ReLU(), nn.Linear(16, CLASSES)).eval()
    steps = [fz.Gate("1"), fz.Tversky("2", features=BANK, start="random", **MINIMA), fz.Quantize()]
    net = fz.adapt(model, plan(*steps, targets=["onnx"]))
    with torch.no_grad():
        for name, value in net.named_parameters():
            if ".gate." in name:
                value.copy_(0.2 + 0.6 * torch.rand(value.shape))
    artifact = fz.compile(net, plan(*steps, targets=["onnx"]), calibration=batches())
    assert ran(artifact, "onnx") == {
        "0": {"integer-executed by MatMulIntegerToFloat"},
        "2": {"integer-executed by MatMulInteger and ReduceSum"},
    }


# ---- accuracy


@pytest.mark.parametrize("how", [{}, MINIMA], ids=["product", "minima"])
def test_digits_are_told_apart_as_before(how: dict[str, Any]) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    data = demo.load_digits()
    x, y = data.train.flatten(1), data.train_labels
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), TverskyProjection(32, 10, 64, **how))
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(15):
        for rows in torch.randperm(len(x)).split(128):
            optimiser.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimiser.step()
    spec = fz.Plan([fz.Input("x", ("batch", 64))], [fz.Quantize()], targets=())
    done = rewrite(net.eval(), spec, calibration=list(x[:512].split(128)))
    test = data.test.flatten(1)
    want, found = net(test).detach(), done.program.run(test)[0]
    right = [float((scores.argmax(1) == data.test_labels).double().mean()) for scores in (want, found)]
    assert right[0] > 0.9 and right[1] >= right[0] - 0.01
    assert float((found - want).norm() / want.norm()) < 0.03 and not torch.equal(found, want)
