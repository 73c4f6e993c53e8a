"""The command line: what it prints, what it leaves behind, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fxfreeze as fz
from fxfreeze import cli
from fxfreeze.factory import _load_weights, load_batches

MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

def tied():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    model[1].weight = model[0].weight
    return model

def branch():
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x
    return Branch()

def number():
    return 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a model, a plan for the ONNX target, weights."""
    place = tmp_path_factory.mktemp("user")
    (place / "my_model.py").write_text(MODEL)
    plan = fz.Plan(inputs=[fz.Input("x", shape=("batch", 4))], targets=["onnx"])
    plan.save(place / "plan.toml")
    plan.model_copy(update={"targets": ()}).save(place / "bare.toml")
    torch.manual_seed(1)
    shapes = {"0.weight": (8, 4), "0.bias": (8,), "3.weight": (2, 8), "3.bias": (2,), "1.weight": (8,), "1.bias": (8,)}
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    weights |= {"1.running_mean": torch.randn(8), "1.running_var": torch.rand(8) + 0.5}
    weights |= {"1.num_batches_tracked": torch.tensor(3)}
    save_file(weights, place / "weights.safetensors")
    return place


def run(folder: Path, *arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Exit code, stdout and stderr of one command, run in `folder`."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["fxfreeze", *arguments])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def command(folder, monkeypatch, capsys):
    return lambda *arguments: run(folder, *arguments, monkeypatch=monkeypatch, capsys=capsys)


@pytest.fixture(scope="module")
def compiled(folder: Path) -> Path:
    """The artifact that ``fxfreeze compile`` writes, made in a process of its own as a user would."""
    done = subprocess.run(
        [sys.executable, "-m", "fxfreeze.cli", "compile", "my_model:build", "--weights", "weights.safetensors",
         "--plan", "plan.toml", "--out", "out", "--json"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["default"] == "onnx"
    return folder / "out"


def test_compile_writes_an_artifact_that_computes_the_loaded_weights(folder: Path, compiled: Path):
    artifact = fz.load(compiled)
    sys.path.insert(0, str(folder))
    try:
        import my_model
    finally:
        sys.path.remove(str(folder))
    from safetensors.torch import load_file

    model = my_model.build().eval()
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    x = torch.randn(5, 4)
    with torch.no_grad():
        torch.testing.assert_close(artifact(x), model(x), rtol=1e-5, atol=1e-6)


def test_bench_times_the_targets_beside_the_model(compiled: Path, command, tmp_path: Path):
    given = ["--model", "my_model:build", "--weights", "weights.safetensors", "--threads", "1", "--quick"]
    given += ["--peer", "*eager", "--size", "batch=1", "--size", "batch=3", "--rounds", "3", "--json"]
    code, out, err = command("bench", str(compiled), *given, "--out", str(tmp_path / "rows.jsonl"))
    rows = json.loads(out)["bench"]
    assert code == 0, (out, err)
    assert [(row["case"], row["peer"]) for row in rows] == [
        (case, peer) for case in ("batch 1", "batch 3") for peer in ("model, eager", "program, eager")
    ]
    assert all(row["status"] == "ok" and row["value"] > 0 and row["error"] < 1e-6 for row in rows)
    assert rows[0]["baseline"] == "model, eager" and rows[0]["threads"] == 1
    assert (tmp_path / "rows.jsonl").read_text().count("\n") == 4


def test_bench_without_the_model_compares_with_the_stored_program(compiled: Path, command):
    code, out, _ = command("bench", str(compiled), "--quick", "--rounds", "3")
    assert code == 0 and all(word in out for word in ("batch 1", "program,", "fxfreeze,", "1.000"))


def test_bench_says_what_is_wrong_with_the_model(compiled: Path, command):
    code, out, _ = command("bench", str(compiled), "--model", "my_model:number", "--peer", "*eager", "--json")
    assert code == 6 and "returned int, not an nn.Module" in out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--size", "batch"], "'batch' is no list of sizes"),
        (["--size", "rows=1"], "sizes of ['rows'] where the inputs have ['batch']"),
        (["--examples", "weights.safetensors"], "no tensor is named x"),
    ],
)
def test_bench_refuses_what_does_not_fit(compiled: Path, command, given, message):
    code, out, err = command("bench", str(compiled), "--quick", "--json", *given)
    assert code in (2, 6) and message in out + err


def test_check_reloads_and_compares(compiled: Path, command):
    code, out, _ = command("check", str(compiled), "--json")
    rows = json.loads(out)["parity"]
    assert code == 0 and {row["target"] for row in rows} == {"onnx"} and all(row["ok"] for row in rows)


def test_inspect_shows_tables_and_writes_html(compiled: Path, command, tmp_path: Path):
    code, out, _ = command("inspect", str(compiled), "--html", str(tmp_path / "report.html"))
    assert code == 0
    assert "round" in out and "parity" in out and "model.onnx" in out
    assert "<html" in (tmp_path / "report.html").read_text().lower()


def test_an_altered_artifact_is_refused_with_code_6(compiled: Path, command, tmp_path: Path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(compiled, copy)
    file = copy / "onnx" / "model.onnx"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    code, _, err = command("check", str(copy))
    assert code == 6 and "model.onnx" in err


def test_passes_lists_the_pipeline_in_order(command):
    from fxfreeze.passes import PIPELINE

    code, out, _ = command("passes", "--json")
    rows = json.loads(out)
    assert code == 0 and [row["name"] for row in rows] == [item.name for item in PIPELINE]
    assert all(row["what"] for row in rows), "every pass says in its docstring what it does"


def test_schema_is_the_json_schema_of_plans(command):
    code, out, _ = command("schema")
    assert code == 0 and json.loads(out) == fz.Plan.json_schema()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["my_model:build", "--plan", "missing.toml"], 2, "missing.toml"),
        (["my_model", "--plan", "bare.toml"], 2, "pkg.module:function"),
        (["no_such_module:build", "--plan", "bare.toml"], 3, "no_such_module"),
        (["my_model:nothing", "--plan", "bare.toml"], 3, "nothing"),
        (["my_model:number", "--plan", "bare.toml"], 3, "int"),
        (["my_model:branch", "--plan", "bare.toml"], 3, "my_model.py:"),
        (["my_model:tied", "--weights", "weights.safetensors", "--plan", "bare.toml"], 6, "unknown"),
        (["my_model:build", "--weights", "plan.toml", "--plan", "bare.toml"], 6, "plan.toml"),
    ],
)
def test_errors_have_codes_and_leave_nothing_behind(folder: Path, command, arguments, code, words):
    before = sorted(folder.iterdir())
    got, out, err = command("compile", *arguments, "--out", "never")
    assert got == code, err
    assert words in err and "Traceback" not in err and not out
    assert [path for path in sorted(folder.iterdir()) if path.name != "__pycache__"] == [
        path for path in before if path.name != "__pycache__"
    ]


def test_an_error_can_be_read_by_a_program(command):
    code, out, _ = command("compile", "my_model:branch", "--plan", "bare.toml", "--out", "never", "--json")
    answer = json.loads(out)
    assert code == 3 and answer["error"] == "CaptureError" and answer["hint"]


def test_an_existing_output_folder_is_refused_before_any_work(folder: Path, command):
    (folder / "taken").mkdir(exist_ok=True)
    code, _, err = command("compile", "no_such_module:build", "--plan", "bare.toml", "--out", "taken")
    assert code == 6 and "exists" in err


def test_sensitivity_shows_what_each_layer_costs(folder: Path, command, tmp_path: Path):
    fz.Plan([fz.Input("x", ("batch", 4))], [fz.Quantize()], ()).save(tmp_path / "int8.toml")
    data = tmp_path / "data.safetensors"
    save_file({"x": torch.randn(100, 4)}, data)
    given = ["my_model:build", "--plan", str(tmp_path / "int8.toml"), "--calibration", str(data)]
    code, out, _ = command("sensitivity", *given, "--json")
    rows = json.loads(out)["sensitivity"]
    assert code == 0 and {row["site"] for row in rows} == {"0", "3"} and all(row["output_snr"] > 20 for row in rows)
    assert "outputs dB" in command("sensitivity", *given)[1]
    save_file({"x": torch.randn(100, 4), "y": torch.randn(99, 4)}, data)
    code, _, err = command("sensitivity", *given)
    assert code == 6 and "different numbers of samples" in err


@pytest.mark.parametrize(
    ("size", "bounds", "sizes"),
    [
        ("batch", None, [64, 36]), (8, None, [8] * 12), ("batch", fz.Dim(max=48), [48, 48, 4]),
        ("batch", fz.Dim(min=30, max=48), [48, 48]), ("batch", fz.Dim(min=80), [80]),
    ],
)  # fmt: skip
def test_batches_of_samples_fit_the_plan(tmp_path: Path, size: Any, bounds: fz.Dim | None, sizes: list[int]):
    plan = fz.Plan([fz.Input("x", (size, 4))], [], (), dims={"batch": bounds} if bounds else {})
    data = tmp_path / "data.safetensors"
    save_file({"x": torch.randn(100, 4)}, data)
    assert [len(batch["x"]) for batch in load_batches(data, plan)] == sizes


def test_a_plan_of_a_fixed_batch_is_measured_on_a_file(folder: Path, command, tmp_path: Path):
    fz.Plan([fz.Input("x", (8, 4))], [fz.Quantize()], ()).save(tmp_path / "fixed.toml")
    data = tmp_path / "data.safetensors"
    given = ["my_model:build", "--plan", str(tmp_path / "fixed.toml"), "--calibration", str(data)]
    save_file({"x": torch.randn(100, 4)}, data)
    code, out, err = command("sensitivity", *given, "--json")
    assert code == 0 and len(json.loads(out)["sensitivity"]) == 2, err
    save_file({"x": torch.randn(7, 4)}, data)
    code, _, err = command("sensitivity", *given)
    assert code == 6 and "7 samples, and the plan's inputs take 8 at a time" in err


def test_tied_weights_may_be_stored_once(folder: Path):
    sys.path.insert(0, str(folder))
    try:
        import my_model
    finally:
        sys.path.remove(str(folder))
    file = folder / "tied.safetensors"
    save_file({"0.weight": torch.full((7, 4), 2.0)}, file)
    model = my_model.tied()
    _load_weights(model, file)
    assert model[1].weight is model[0].weight and bool((model[1].weight == 2).all())


def test_usage_errors_have_code_2(command):
    code, _, err = command("compile", "my_model:build")
    assert code == 2 and "--plan" in err
