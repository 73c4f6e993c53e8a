"""fz.Quantize(scheme="fp8"): what becomes float8, what is refused, what is stored, and what each target says of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze import artifact
from fxfreeze.api import Compilation, rewrite
from fxfreeze.emit import torch_compile
from fxfreeze.errors import EmitError, PassError, PlanError
from fxfreeze.kernels import float8_linear
from fxfreeze.kernels.float8_linear import KERNEL as LINEAR
from fxfreeze.kernels.quantize_float8 import KERNEL as QUANTIZE
from fxfreeze.launched import executed, has_scaled, with_launched, with_scaled
from fxfreeze.lower import Lowering, export
from fxfreeze.passes.quantize import float8 as module
from fxfreeze.passes.quantize.float8 import row_scales
from fxfreeze.program import Program
from fxfreeze.serialize import load_program, save_program

FLOAT8 = torch.float8_e4m3fn
SIZE, INNER = 32, 48


class Product(nn.Module):
    """A weight stored [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(INNER, SIZE) / 8), nn.Parameter(torch.randn(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, 1), self.weight).unflatten(0, x.shape[:2])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(SIZE, INNER), Product()
        self.head = nn.Linear(SIZE, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()))


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)))


def batches(count: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 5, SIZE, generator=generator).to(dtype) for _ in range(count)]


def plan(*steps: Any, targets: Any = (), dtype: str = "float32") -> fz.Plan:
    return fz.Plan([fz.Input("x", ("batch", 5, SIZE), dtype)], steps, targets)


def fp8(at: str = "*", **given: Any) -> fz.Quantize:
    return fz.Quantize(at, scheme="fp8", **given)


def done(*steps: Any, model: nn.Module | None = None, dtype: str = "float32", data: Any = None) -> Compilation:
    kind = getattr(torch, dtype)
    given = batches(dtype=kind) if data is None else data
    return rewrite((model or Net()).eval().to(kind), plan(*steps, dtype=dtype), calibration=given)


def calls(program: Program, target: Any) -> list[Any]:
    return program.graph.find_nodes(op="call_function", target=target)


def relative(found: Tensor, want: Tensor) -> float:
    return float((found.double() - want.double()).norm() / want.double().norm())


# ---- what it becomes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_every_linear_layer_is_float8_by_its_definition(mode: str, dtype: str) -> None:
    found = done(fp8(mode=mode), dtype=dtype)
    layers = calls(found.program, LINEAR.op)
    assert len(layers) == 3 and not calls(found.program, torch.ops.aten.linear.default)
    net, x = Net().to(getattr(torch, dtype)), batches(3, getattr(torch, dtype))[-1]
    with torch.no_grad():
        by_hand, names = x, ("first", "second", "head")
        for node, name in zip(layers, names, strict=True):
            layer = getattr(net, name)
            weight = layer.weight.double().T if name == "second" else layer.weight.double()
            wide = torch.promote_types(x.dtype, torch.float32)
            scale = (weight.abs().amax(1) / 448).to(wide)
            grid = (weight / scale.double().unsqueeze(1)).clamp(-448, 448).to(FLOAT8)
            stored = found.program.constant(node.args[2])
            assert stored is not None and stored.dtype == FLOAT8 and torch.equal(stored.double(), grid.double())
            x_scale = row_scales(by_hand) if mode == "dynamic" else found.program.constant(node.args[1])
            assert x_scale is not None
            given = (by_hand.to(wide) / x_scale).clamp(-448, 448).to(FLOAT8).to(wide)
            y = given @ grid.to(wide).T * (x_scale * scale)
            y = (y if layer.bias is None else y + layer.bias.to(wide)).to(x.dtype)
            by_hand = y.relu() if name == "first" else y
        want = net(x)
    torch.testing.assert_close(found.program.run(x)[0], by_hand, rtol=1e-5, atol=1e-5)
    assert 1e-3 < relative(by_hand, want) < 0.08


def test_the_scale_of_inputs_spans_what_was_seen() -> None:
    data = batches()
    found = done(fp8("first"), data=data)
    (node,) = calls(found.program, LINEAR.op)
    scale = found.program.constant(node.args[1])
    assert scale is not None
    assert float(scale) == pytest.approx(max(float(batch.abs().max()) for batch in data) / 448, rel=1e-6)
    cut = done(fp8("first", calibrate="percentile", percentile=99.0), data=data)
    less = cut.program.constant(calls(cut.program, LINEAR.op)[0].args[1])
    assert less is not None and float(less) < 0.9 * float(scale)
    (row,) = [row for row in cut.ledger if row.site == "first"]
    assert "% of its input saturates" in row.detail and "0.00% of" not in row.detail


def test_beyond_that_inputs_saturate_and_are_finite() -> None:
    found, x = done(fp8()), batches()[0]
    assert bool(found.program.run(1e6 * x)[0].isfinite().all())
    wild = x.clone()
    wild[0, 0, 0] = float("nan")
    result = found.program.run(wild)[0]
    assert bool(result[0, 0].isnan().all()) and bool(result[1:].isfinite().all())


def test_data_that_is_not_finite_is_an_error() -> None:
    data = batches()
    data[0][3, 2, 1] = float("inf")
    with pytest.raises(PassError, match="NaN or Inf on the calibration data"):
        done(fp8(), data=data)


def test_of_nothing_but_zeros_a_step_is_one() -> None:
    found = done(fp8("first"), data=[torch.zeros(4, 5, SIZE)])
    (node,) = calls(found.program, LINEAR.op)
    assert torch.equal(found.program.constant(node.args[1]), torch.tensor(1.0))


def test_rows_of_zeros_are_zeros() -> None:
    found = done(fp8("head", mode="dynamic"))
    (node,) = calls(found.program, QUANTIZE.op)
    x = torch.zeros(2, 3, SIZE)
    assert torch.equal(node.target(x, row_scales(x)).float(), x) and bool((row_scales(x) > 0).all())


def test_an_input_that_several_layers_read_is_quantized_once() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(SIZE, SIZE) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) * self.k(x) + self.v(x)

    for mode in ("static", "dynamic"):
        program = done(fp8(mode=mode), model=Three()).program
        assert len(calls(program, QUANTIZE.op)) == 1 and len(calls(program, LINEAR.op)) == 3


def adapted(*steps: Any) -> Program:
    """With an adapter folded into the first layer, and a gate behind it that silences some of its neurons."""
    given = plan(fz.LoRA(at="first", rank=2), fz.Gate(at="first", on="output"), *steps)
    net, generator = fz.adapt(Net().eval(), given), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in net.parameters():
            value.copy_(torch.rand(value.shape, generator=generator))
    return rewrite(net.eval(), given, calibration=batches()).program


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_with_lora_and_gates(mode: str) -> None:
    program, x = adapted(fp8(mode=mode)), batches(3)[-1]
    assert len(calls(program, LINEAR.op)) == 3 and calls(program, torch.ops.aten.gt.Tensor)
    assert relative(program.run(x)[0], adapted().run(x)[0]) < 0.1
    assert relative(adapted().run(x)[0], Net().eval()(x).detach()) > 0.5, "adapters that do nothing would do"


def test_a_budget_keeps_layers_in_floats() -> None:
    found = done(fp8(budget="snr:60"))
    assert not calls(found.program, LINEAR.op)
    assert {row.detail for row in found.ledger if row.outcome == "skipped"} >= {
        "kept in floats for the budget 'snr:60'"
    }
    assert len(calls(done(fp8(budget="snr:5")).program, LINEAR.op)) == 3


# ---- what is refused


def image(*steps: Any, **given: Any) -> Compilation:
    made = fz.Plan([fz.Input("x", ("batch", 3, 8, 8))], steps, ())
    return rewrite(Image().eval(), made, **given)


def test_convolutions_stay_in_floats_and_the_ledger_says_so() -> None:
    found = image(fp8())
    (row,) = [row for row in found.ledger if row.outcome == "refused"]
    assert row.site == "conv" and "there are no convolutions of float8" in row.detail
    assert len(calls(found.program, LINEAR.op)) == len(calls(found.program, torch.ops.aten.conv2d.default)) == 1


def test_a_model_without_linear_layers_is_left_where_none_was_named() -> None:
    made = fz.Plan([fz.Input("x", ("batch", 3, 8, 8))], [fp8()], ())
    found = rewrite(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()).eval(), made)
    assert [row.site for row in found.ledger if row.outcome == "refused"] == ["0"]


def test_a_step_that_names_nothing_else_is_an_error() -> None:
    with pytest.raises(PlanError) as caught:
        image(fp8("conv"))
    assert caught.value.where == "conv" and "there are no convolutions of float8" in str(caught.value)
    assert "use scheme='int8'" in str(caught.value)


def test_an_embedding_is_refused() -> None:
    with pytest.raises(PlanError, match="an embedding computes nothing"):
        made = fz.Plan([fz.Input("x", ("batch", 5), "int64", low=0, high=9)], [fp8("0")], ())
        rewrite(nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8)).eval(), made)


def test_sizes_without_a_kernel_are_said() -> None:
    found = done(fp8(), model=nn.Sequential(nn.Linear(SIZE, 24)))
    (row,) = [row for row in found.ledger if row.site == "0"]
    assert "kernels take inputs and outputs in multiples of 16" in row.detail


# ---- storing


def test_a_weight_takes_a_byte_and_comes_back_in_every_bit(tmp_path: Path) -> None:
    program = done(fp8()).program
    save_program(program, tmp_path)
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        sizes = {name: file.get_tensor(name).nbytes for name in file.keys()}
    assert sizes["first.weight.float8"] == SIZE * INNER and sizes["head.weight.float8"] == SIZE * 16
    assert (
        sum(sizes.values())
        < 1.5 * (2 * SIZE * INNER + SIZE * 16)
        < sum(value.numel() * 4 for value in Net().parameters())
    )
    loaded, x = load_program(tmp_path), batches()[0]
    assert torch.equal(loaded.run(x)[0], program.run(x)[0])
    assert loaded.structural_hash() == program.structural_hash()


# ---- targets


def ran(made: fz.Artifact) -> dict[str, str]:
    return {
        row["site"]: row["executes"] for row in made.manifest["ledger"] if " in " in row["executes"] and row["step"]
    }


def test_on_a_cpu_it_is_refused_unless_it_may_be_simulated() -> None:
    with pytest.raises(EmitError, match=r"(?s)3 quantized layers would be computed in floats.*first: fp8 by"):
        fz.compile(Net().eval(), plan(fp8(), targets=["torch"]), calibration=batches())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("target", ["torch", "aoti", "onnx"])
def test_simulated_it_computes_the_same_after_a_reload(target: str, mode: str, tmp_path: Path) -> None:
    if target == "onnx":
        pytest.importorskip("onnxruntime")
    step = fp8(mode=mode, allow_simulated=True)
    made = fz.compile(Net().eval(), plan(step, targets=[target]), calibration=batches())
    assert ran(made) == dict.fromkeys(("first", "second", "head"), f"simulated in {target}")
    made.save(tmp_path / "a")
    x = batches(3)[-1]
    # An input that rounds to the next number moves a result by a sixteenth of a term.
    assert relative(fz.load(tmp_path / "a")(x), done(step).program.run(x)[0]) < 2e-3


def on_gpu(*steps: Any, **given: Any) -> Program:
    program = done(*steps, **given).program
    program.inputs = tuple(replace(spec, device=torch.device("cuda")) for spec in program.inputs)
    return program


@pytest.fixture
def ada(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8_linear, "has_kernel", lambda device: device.type == "cuda")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_on_a_gpu_layers_are_scaled_mm(mode: str, dtype: str, ada: None, scaled_rows: None) -> None:
    program, x = on_gpu(fp8(mode=mode), dtype=dtype), batches(3, getattr(torch, dtype))[-1]
    for changed in (with_launched(program), with_scaled(program)):
        assert len(calls(changed, torch.ops.aten._scaled_mm.default)) == 3 and not calls(changed, LINEAR.op)
        assert relative(changed.run(x)[0], program.run(x)[0]) < 4 * torch.finfo(x.dtype).eps + 1e-6
    assert not calls(with_launched(program), QUANTIZE.op)
    assert list(executed(program).values()) == ["torch._scaled_mm"] * 3


def test_the_ledger_counts_what_the_graph_calls(tmp_path: Path, ada: None) -> None:
    program = on_gpu(fp8(), model=nn.Sequential(nn.Linear(SIZE, 32), nn.ReLU(), nn.Linear(32, 24)))
    facts = {"torch": torch_compile.emit(Lowering(program), tmp_path)}
    rows = artifact._executed(program, plan(fp8(allow_simulated=True)), facts)
    assert {row["site"]: row["executes"] for row in rows} == {
        "0": "float8-executed by torch._scaled_mm in torch", "2": "simulated in torch"
    }  # fmt: skip


def test_aoti_gets_them_whole_and_counts_them(ada: None) -> None:
    from fxfreeze.launched import CALL, scaled

    program = on_gpu(fp8())
    assert has_scaled(program) and len(scaled(program, 3)) == 3 and not scaled(program, 2)
    assert len(CALL.findall("AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda__scaled_mm_out(a));")) == 1
    assert not CALL.findall("AOTITorchError aoti_torch_cuda__scaled_mm_out(a);")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_with_scaled_mm_the_batch_stays_dynamic(mode: str, dtype: str, ada: None, scaled_rows: None) -> None:
    """What AOTInductor gets, traced on a CPU, where the operator is the same."""
    program = on_gpu(fp8(mode=mode), dtype=dtype)
    changed = with_scaled(program)
    changed.inputs = tuple(replace(spec, device=torch.device("cpu")) for spec in changed.inputs)
    exported = export(changed)
    assert [str(node.target) for node in exported.graph.nodes].count("aten._scaled_mm.default") == 3
    for rows in (1, 4):
        x = batches(dtype=getattr(torch, dtype))[0][:rows]
        assert relative(exported.module()(x)[0], program.run(x)[0]) < 4 * torch.finfo(x.dtype).eps + 1e-6


def test_an_older_gpu_simulates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8_linear, "has_kernel", lambda device: False)
    program, x = on_gpu(fp8()), batches()[0]
    assert not executed(program)
    changed = with_launched(program)
    assert len(calls(changed, LINEAR.op)) == 3 and torch.equal(changed.run(x)[0], program.run(x)[0])


@pytest.mark.parametrize("part", ["weight", "scale", "x_scale"])
def test_a_wrong_layer_is_seen_in_the_noise(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger measures what the layer will compute."""
    right = module.Layer.of

    def wrong(*given: Any) -> Any:
        layer = right(*given)
        return replace(layer, **{part: getattr(layer, part).flip(0) if part == "weight" else 2 * getattr(layer, part)})

    monkeypatch.setattr(module.Layer, "of", wrong)
    (row,) = [row for row in done(fp8("first")).ledger if row.site == "first"]
    gap = float(row.detail.partition("relative gap ")[2].split()[0])
    assert gap > (0.5 if part != "x_scale" else 0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("target", ["torch", "aoti"])
def test_a_gpu_runs_them(target: str, mode: str) -> None:
    if not torch.cuda.is_available() or not float8_linear.has_kernel(torch.device("cuda")):
        pytest.skip("no GPU that multiplies float8")
    data = [batch.cuda() for batch in batches()]
    made = fz.compile(Net().eval().cuda(), plan(fp8(mode=mode), targets=[target]), calibration=data)
    sites = ("first", "second", "head")
    assert ran(made) == dict.fromkeys(sites, f"float8-executed by torch._scaled_mm in {target}")
    assert relative(made(data[0]), Net().eval().cuda()(data[0])) < 0.08
