"""The onnx target: names, dims, opset, and clear refusals."""

from __future__ import annotations

import importlib
import sys

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from fxfreeze import Input, Plan
from fxfreeze.capture import capture
from fxfreeze.emit import onnx as target
from fxfreeze.errors import ArtifactError, EmitError, MissingDependencyError
from fxfreeze.lower import Lowering
from fxfreeze.sampling import sample_inputs
from fxfreeze.serialize import Interface


def lowering_of(model: nn.Module, *inputs: Input, **plan) -> Lowering:
    return Lowering(capture(model.eval(), Plan(inputs=list(inputs), **plan))[0])


@pytest.fixture(scope="module")
def model(built):
    return onnx.load(built.folder / "onnx" / target.FILE)


def shapes(values):
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values
    }


def test_inputs_outputs_and_dims_have_the_plans_names(model, built):
    assert shapes(model.graph.input) == {"relu.image": ["batch", 3, 8, 8], "steps": ["batch", "time"]}
    # "steps" is an input and an output of the plan, and ONNX names every value once.
    assert shapes(model.graph.output) == {
        "linear": ["batch", 5],
        "again": ["batch", 5],
        "steps_out": ["batch", "time"],
        "top": ["batch"],
        "constant": [5],
    }
    assert built.facts["onnx"]["outputs"] == list(shapes(model.graph.output))


class Ends(nn.Module):
    """Every output is a value that is written anew for ONNX Runtime: parts of a product, a mean over pixels."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv = nn.Linear(64, 128), nn.Conv2d(16, 16, 3)

    def forward(self, rows, image):
        query, key = self.linear(rows).chunk(2, -1)
        return {"query": query, "key": key, "mean": self.conv(image).mean((2, 3))}


def test_outputs_that_are_written_anew_have_the_plans_names(tmp_path):
    inputs = Input("rows", ("batch", 64)), Input("image", ("batch", 16, 8, 8))
    facts = target.emit(lowering_of(Ends(), *inputs), tmp_path)
    found = onnx.load(tmp_path / target.FILE).graph
    assert [output.name for output in found.output] == ["query", "key", "mean"] == facts["outputs"]
    kinds = {node.op_type for node in found.node}
    assert "GlobalAveragePool" in kinds and not kinds & {"Split", "ReduceMean"}  # they are written anew


def test_the_file_is_standard(model, built):
    assert [(item.domain, item.version) for item in model.opset_import] == [("", target.OPSETS[0])]
    assert target.OPSETS[-1] >= 21
    assert (built.facts["onnx"]["opset"], built.facts["onnx"]["external_data"]) == (target.OPSETS[0], False)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} <= {""}


def test_the_file_keeps_module_paths_but_no_source(built):
    content = (built.folder / "onnx" / target.FILE).read_bytes()
    assert b"stem.0" in content
    for leak in (b"stack_trace", b"fx_node", b".py", b"/site-packages/", str(built.folder).encode()):
        assert leak not in content


def test_it_runs_in_onnx_runtime_by_name(built):
    session = onnxruntime.InferenceSession(built.folder / "onnx" / target.FILE, providers=["CPUExecutionProvider"])
    image, steps = sample_inputs(built.program, {"batch": 5, "time": 2}, seed=0)
    (linear,) = session.run(["linear"], {"steps": steps.numpy(), "relu.image": image.numpy()})
    torch.testing.assert_close(torch.from_numpy(linear), built.program.run(image, steps)[0])


def test_large_weights_go_beside_the_model(tmp_path, monkeypatch):
    lowering = lowering_of(nn.Linear(64, 64), Input("x", shape=("n", 64)))
    monkeypatch.setattr(target, "EXTERNAL_BYTES", 1000)
    assert target.emit(lowering, tmp_path)["external_data"] is True
    assert sorted(path.name for path in tmp_path.iterdir()) == [target.FILE, f"{target.FILE}.data"]
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    x = torch.randn(1, 64)
    runner = target.load(moved, Interface.of(lowering.program))
    torch.testing.assert_close(runner(x), lowering.program.run(x))


class Dtypes(nn.Module):
    def forward(self, x, flag, count):
        wide = x.double() * count
        return wide, wide.float(), wide.sum(), flag & (count > 1), count.to(torch.int32), x.half()


def test_every_dtype_keeps_its_dtype(tmp_path):
    lowering = lowering_of(
        Dtypes(),
        Input("x", shape=("n", 3)),
        Input("flag", shape=("n", 3), dtype="bool"),
        Input("count", shape=("n", 3), dtype="int64", low=0, high=5),
    )
    target.emit(lowering, tmp_path)
    inputs = sample_inputs(lowering.program, {"n": 4}, seed=0)
    result = target.load(tmp_path, Interface.of(lowering.program))(*inputs)
    torch.testing.assert_close(result, lowering.program.run(*inputs))


def test_bfloat16_goes_in_and_out(tmp_path):
    class Model(nn.Module):
        def forward(self, x):
            return (x.float() * 2).bfloat16(), x.float().sum(1)

    lowering = lowering_of(Model(), Input("x", shape=("n", 3), dtype="bfloat16"))
    target.emit(lowering, tmp_path)
    x = torch.randn(4, 3).bfloat16()
    torch.testing.assert_close(target.load(tmp_path, Interface.of(lowering.program))(x), lowering.program.run(x))


def test_attention_is_one_operator(tmp_path):
    class Model(nn.Module):
        def forward(self, q, k, v):
            return nn.functional.scaled_dot_product_attention(q, k, v)

    lowering = lowering_of(Model(), *(Input(name, shape=("batch", 2, "seq", 4)) for name in "qkv"))
    target.emit(lowering, tmp_path)
    assert "Attention" in {node.op_type for node in onnx.load(tmp_path / target.FILE).graph.node}


class Unconvertible(nn.Module):
    def forward(self, x):
        return torch.linalg.eigvalsh(x @ x.mT)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Unconvertible()

    def forward(self, x):
        return self.inner(x + 1)


def test_an_operator_without_translation_is_named_with_its_module(tmp_path):
    lowering = lowering_of(Outer(), Input("x", shape=("n", 3, 3)))
    with pytest.raises(EmitError, match="eigh") as caught:
        target.emit(lowering, tmp_path)
    assert caught.value.where.startswith("inner, aten.")
    assert f"opset {target.OPSETS[0]}" in caught.value.what
    assert not list(tmp_path.iterdir())


def test_a_complex_input_or_output_is_refused_by_name(tmp_path):
    class Model(nn.Module):
        def forward(self, x):
            return {"spectrum": torch.fft.rfft(x)}

    with pytest.raises(EmitError, match="'spectrum' is"):
        target.emit(lowering_of(Model(), Input("x", shape=("n", 8))), tmp_path)
    with pytest.raises(EmitError, match="'z' is"):
        target.emit(lowering_of(nn.Identity(), Input("z", shape=("n", 8), dtype="complex64")), tmp_path)


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_its_extra(name, built, tmp_path, monkeypatch):
    real = importlib.import_module

    def import_module(wanted, *args):
        if wanted == name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(wanted, *args)

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(MissingDependencyError, match=name) as caught:
        target.emit(Lowering(built.program), tmp_path)
    assert "fxfreeze[onnx]" in str(caught.value)


def test_onnx_is_imported_only_when_it_is_asked_for():
    import subprocess

    script = (
        "import sys, fxfreeze, fxfreeze.artifact; assert not {'onnx', 'onnxruntime', 'onnxscript'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_a_file_that_is_no_model_is_refused(built, tmp_path):
    (tmp_path / target.FILE).write_bytes(b"no model")
    with pytest.raises(ArtifactError, match="refuses the model"):
        target.load(tmp_path, built.interface)
