"""Libraries beside an artifact: they get the plan's own model, do what the plan does, or say why not."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fxfreeze as fz
from fxfreeze import cli
from fxfreeze.capture import dim_bounds, input_specs

ROOT = Path(__file__).resolve().parents[1]
# Only for this import: on sys.path for good, the root would offer its folder `kernels` to every package.
sys.path.insert(0, str(ROOT))
try:
    from benchmarks.harness import Unavailable, artifact, libraries, rivals, runtime
    from benchmarks.harness.model import Model, Subject
    from benchmarks.harness.runner import Measurement, Runner
finally:
    sys.path.remove(str(ROOT))

MODEL = """
import torch
from torch import nn

def build(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 16),
    )

def other():
    return build(1)

def grouped():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, groups=3), nn.Flatten(), nn.Linear(192, 8))
"""
aten = torch.ops.aten
INPUT = fz.Input("x", shape=("batch", 3, 8, 8))
LORA = {"at": ["0", "5"], "rank": 2, "alpha": 3}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's folder: a model, and a LoRA that moves the outputs."""
    place = tmp_path_factory.mktemp("user")
    (place / "small_net.py").write_text(MODEL)
    sys.path.insert(0, str(place))
    import small_net

    net = fz.adapt(small_net.build(), fz.Plan([INPUT], [fz.LoRA(**LORA)]), verify="off")
    torch.manual_seed(3)
    for parameter in net.parameters():
        parameter.data = 0.5 * torch.randn_like(parameter)
    net.save_adapters(place / "lora.safetensors")
    yield place
    sys.path.remove(str(place))


@pytest.fixture(scope="module")
def made(folder: Path) -> Callable[..., Path]:
    """Compiles a plan once."""
    known: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in known:
            import small_net

            lora = fz.LoRA(**LORA, weights=str(folder / "lora.safetensors"))
            steps = {
                "lora": [lora],
                "static": [lora, fz.Quantize(exclude="7")],
                "dynamic": [fz.Quantize(at=["5", "7"], mode="dynamic")],
                "int8-weight": [fz.Quantize(scheme="int8-weight", exclude="7")],
                "int4-weight": [fz.Quantize(scheme="int4-weight", granularity="group:32")],
            }
            plan = fz.Plan([INPUT], steps[name], ["onnx"])
            known[name] = fz.compile(small_net.build(), plan, verify="off").save(folder / name)
        return known[name]

    return make


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile takes long, and is the same function."""
    monkeypatch.setattr(libraries, "compiled", lambda module, freezing=True: module)


def subject(place: Path, **given: Any) -> Subject:
    return Subject(place, sizes=({"batch": 3},), **{"factory": "small_net:build", **given})


def measured(subject: Subject, *names: str) -> dict[str, Measurement]:
    (case,) = artifact.cases(subject)
    found = Runner(rounds=1, quick=True, wanted=lambda name: name in names).run(case)
    return {m.peer: m for m in found}


def model_of(subject: Subject) -> Model:
    return Model(subject, fz.load(subject.folder))


PEFT = tuple(rivals.PEFT)
STATIC, DYNAMIC = (tuple(rivals.QUANTIZERS["int8", mode]) for mode in ("static", "dynamic"))
BYTES, HALVES = (tuple(rivals.QUANTIZERS[scheme, "static"]) for scheme in ("int8-weight", "int4-weight"))
TOLERANCE = {"static": 0.25, "dynamic": 0.25, "int8-weight": 0.1, "int4-weight": 0.5}
ALL = [("lora", PEFT), ("static", PEFT + STATIC), ("dynamic", DYNAMIC), ("int8-weight", BYTES), ("int4-weight", HALVES)]


@pytest.mark.parametrize(("name", "peers"), ALL, ids=[name for name, _ in ALL])
def test_they_compute_what_the_artifact_does(name, peers, made, uncompiled):
    found = measured(subject(made(name)), *peers)
    assert list(found) == ["model, eager", *peers]
    assert {m.status for m in found.values()} == {"ok"}, {m.peer: m.reason for m in found.values()}
    own = found["model, eager"].tolerance
    assert own < 2e-5 and {found[peer].tolerance for peer in peers} == {TOLERANCE.get(name, own)}


@pytest.mark.parametrize(
    ("name", "peer"), [("static", STATIC[0]), ("int8-weight", BYTES[0]), ("int4-weight", HALVES[0])]
)
def test_other_weights_are_found_out(name, peer, made, uncompiled, monkeypatch):
    """By the tolerance of the scheme: the same network, drawn from another seed."""
    monkeypatch.setattr(rivals, "merged", lambda model: libraries.need("small_net").other().eval())
    found = measured(subject(made(name)), peer)
    assert found[peer].status == "wrong" and found["model, eager"].status == "ok"


def test_a_lora_that_is_not_the_plan_s_is_found_out(made, uncompiled, folder, tmp_path):
    """In one number; the file that the caller names goes before the plan's."""
    peer, trained = "peft, eager", load_file(folder / "lora.safetensors")
    trained["adapters.lora.5.lora_B"][0, 0] += 0.1
    save_file(trained, tmp_path / "other.safetensors")
    assert measured(subject(made("lora"), adapters=tmp_path / "other.safetensors"), peer)[peer].status == "wrong"


def test_what_the_plan_quantizes_is_quantized_and_nothing_else(made, uncompiled, monkeypatch):
    """In the first plan layers 0 and 5, in the second 5 and 7, in the third 5."""
    import onnx

    def stored(path: Path) -> list[Any]:
        return list(map(onnx.numpy_helper.to_array, onnx.load(path).graph.initializer))

    monkeypatch.setattr(runtime, "session", stored)
    shapes = {"static": [(8, 3, 3, 3), (32, 128)], "dynamic": [(32, 16), (128, 32)]}
    for name, make in (("static", rivals.quantize_static), ("dynamic", rivals.quantize_dynamic)):
        found = make(model_of(subject(made(name))))
        assert sorted(value.shape for value in found if value.dtype == "int8" and value.ndim > 1) == shapes[name]
    graph = rivals.torchao_static(model_of(subject(made("static")))).graph
    read = [str(node.args[1]) for node in graph.nodes if node.target in (aten.conv2d.default, aten.linear.default)]
    assert [name.partition("_per")[0] for name in read] == ["dequantize", "dequantize", "model_7_weight"]
    net = rivals.torchao_weights(model_of(subject(made("int8-weight")))).model
    assert type(net[5].weight).__name__ == "Int8Tensor" and type(net[7].weight) is nn.Parameter


def test_ranges_are_measured_on_the_caller_s_data_or_on_what_compiling_would_take(made, tmp_path):
    x = torch.randn(70, 3, 8, 8)
    save_file({"x": x}, tmp_path / "data.safetensors")
    given = list(model_of(subject(made("static"), calibration=tmp_path / "data.safetensors")).calibration())
    assert torch.equal(torch.cat([batch[0] for batch in given]), x)
    ((drawn,),) = model_of(subject(made("static"))).calibration()
    assert drawn.shape == (64, 3, 8, 8)


# ---- reasons


def planned(*steps: fz.Step, factory: str | None = "small_net:build") -> Model:
    """A model with a plan that was not compiled."""
    plan = fz.Plan([INPUT], steps, ["onnx"])
    interface = SimpleNamespace(inputs=input_specs(plan), outputs=("output",), dims=dim_bounds(plan))
    stub = SimpleNamespace(manifest={"plan": plan.to_dict(), "ledger": []}, interface=interface)
    return Model(subject(ROOT, factory=factory), stub)


def reasons(model: Model) -> dict[str, str]:
    found = {}
    for peer in rivals.rivals(model):
        with pytest.raises(Unavailable) as refused:
            peer.prepare()
        found[peer.name] = str(refused.value)
    return found


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ({}, "the artifact holds merged weights: name a file of the adapters by --adapters"),
        ({"weights": "absent.safetensors"}, "no such weights file"),
        ({"adapters": 4}, "rows select among the plan's LoRAs"),
        ({"bias": True}, "a LoRA of the plan has a bias"),
    ],
)
def test_a_lora_that_peft_cannot_have_is_a_reason(step, reason):
    found = reasons(planned(fz.LoRA(**LORA, **step)))
    assert tuple(found) == PEFT and all(told.startswith(reason) for told in found.values())


def test_a_layer_that_peft_computes_otherwise_is_named(folder):
    net = fz.adapt(libraries.need("small_net").grouped(), fz.Plan([INPUT], [fz.LoRA(at="0", rank=2)]), verify="off")
    net.save_adapters(folder / "grouped.safetensors")
    step = fz.LoRA(at="0", rank=2, weights=str(folder / "grouped.safetensors"))
    found = reasons(planned(step, factory="small_net:grouped"))
    assert all(told.startswith("peft's LoRA is another function at 0: Conv2d(3, 3") for told in found.values())


@pytest.mark.parametrize(
    ("steps", "given", "reason"),
    [
        ([fz.Quantize()], {"factory": None}, "needs the model that the artifact was compiled from"),
        ([fz.Gate(at="2"), fz.Quantize()], {}, "the plan has steps that it does not do: gate"),
        ([fz.Quantize(at="5"), fz.Quantize(at="7", mode="dynamic")], {},
         "the plan quantizes in several ways: quantize, quantize_2"),
    ],
)  # fmt: skip
def test_a_plan_that_a_quantizer_cannot_do_is_a_reason(steps, given, reason):
    found = reasons(planned(*steps, **given))
    assert set(found) >= set(STATIC) and all(told.startswith(reason) for told in found.values())


def test_a_library_that_is_missing_is_a_reason(made, monkeypatch):
    for package in ("peft", "onnxruntime", "torchao"):
        monkeypatch.setitem(sys.modules, package, None)
    for name in ("lora", "dynamic", "int8-weight", "int4-weight"):
        assert all("is not installed" in told for told in reasons(model_of(subject(made(name)))).values())


def test_only_the_artifact_and_its_model_are_at_fault():
    rows = [{"peer": peer, "status": "wrong"} for peer in ("fxfreeze, onnx", "model, eager", "program, eager")]
    assert all(map(artifact.is_at_fault, rows))
    assert not any(artifact.is_at_fault({"peer": peer, "status": "failed"}) for peer in PEFT + STATIC + DYNAMIC)


# ---- the command line


@pytest.mark.slow
def test_bench_has_a_row_for_each_in_processes_of_their_own(made, folder, monkeypatch, capsys, tmp_path):
    save_file({"x": torch.randn(8, 3, 8, 8)}, tmp_path / "data.safetensors")
    monkeypatch.chdir(folder)
    words = ["bench", str(made("static")), "--model", "small_net:build", "--quick", "--rounds", "3", "--threads", "1"]
    words += ["--peer", "*quantize_static", "--calibration", str(tmp_path / "data.safetensors"), "--json"]
    monkeypatch.setattr(sys, "argv", ["fxfreeze", *words])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    rows = json.loads(capsys.readouterr().out)["bench"]
    assert [(row["peer"], row["status"], row["tolerance"]) for row in rows[1:]] == [(STATIC[0], "ok", 0.25)]
    assert rows[1]["value"] > 0 and 1e-5 < rows[1]["error"] < 0.25
