"""Quantized layers in the onnx target: which kernels ONNX Runtime runs, how integers are stored, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.emit import onnx_quantized
from fxfreeze.errors import EmitError

SIZE = 8


class Net(nn.Module):
    """A convolution, a block with a sum, and two linear layers, the second on three dims."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), *(nn.Conv2d(8, 8, 3, padding=1) for _ in "ab")
        self.head, self.last = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (self.two(self.one(x).relu()) + x).relu()
        return self.last(self.head(x.mean((2, 3))).relu().unsqueeze(1))


def batches() -> list[Tensor]:
    return [torch.randn(32, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def compiled(step: Any, model: nn.Module | None = None, shape: tuple[Any, ...] = (3, SIZE, SIZE), **given: Any) -> Any:
    torch.manual_seed(0)
    plan = fz.Plan([fz.Input("x", ("batch", *shape))], [step] if step else [], targets=["onnx"])
    return fz.compile((model or Net()).eval(), plan, **given)


@pytest.fixture(scope="module")
def static() -> Any:
    return compiled(fz.Quantize(), calibration=batches())


def model_of(artifact: Any) -> Any:
    return onnx.load(artifact.folder / "onnx" / "model.onnx")


def executes(artifact: Any) -> dict[str, str]:
    return {row["site"]: row["executes"] for row in artifact.manifest["ledger"] if "in onnx" in row["executes"]}


def test_every_layer_runs_on_integers(static: Any) -> None:
    told = executes(static)
    assert told == {
        **dict.fromkeys(("stem", "one", "two"), "integer-executed by QLinearConv in onnx"),
        "head": "integer-executed by MatMulIntegerToFloat in onnx",
        "last": "integer-executed by MatMulIntegerToFloat in onnx",
    }  # fmt: skip


def test_weights_are_stored_as_integers(static: Any) -> None:
    stored = {item.name: item.data_type for item in model_of(static).graph.initializer if len(item.dims) >= 2}
    assert set(stored.values()) == {onnx.TensorProto.INT8} and len(stored) == 5


def test_the_outputs_are_those_of_the_program(static: Any) -> None:
    x = batches()[0]
    torch.manual_seed(0)
    want = Net().eval()(x)
    assert float(((static(x) - want).norm() / want.norm()).detach()) < 0.03


@pytest.mark.parametrize("exclude", [("one",), ("stem",), ("two", "head")])
def test_an_excluded_layer_stays_in_floats_in_onnx_runtime(exclude: tuple[str, ...], tmp_path: Path) -> None:
    """Between integers it would be quantized by ONNX Runtime itself, with one scale for the whole weight."""
    artifact = compiled(fz.Quantize(exclude=list(exclude), allow_simulated=True), calibration=batches())
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(str(artifact.folder / "onnx" / "model.onnx"), options)
    weights = [item for item in onnx.load(tmp_path / "optimised.onnx").graph.initializer if len(item.dims) >= 2]
    floats = [item for item in weights if item.data_type == onnx.TensorProto.FLOAT]
    assert len(floats) == len(exclude) and not any("weight_q" in item.name for item in weights)


def test_a_zero_point_that_is_not_the_smallest_integer_leaves_floats(static: Any, tmp_path: Path) -> None:
    """Behind a ReLU: what the label reads is ONNX Runtime's graph, not ours."""
    model = model_of(static)
    zeros = {item.name: item for item in model.graph.initializer}
    (relu,) = [node.output[0] for node in model.graph.node if node.op_type == "Relu"][:1]
    readers = [node for node in model.graph.node if node.input[0] == relu and node.op_type == "QuantizeLinear"]
    quantized = readers[0].output[0]
    model.graph.initializer.append(onnx.numpy_helper.from_array(numpy.array(3, "uint8"), "three"))
    assert int(onnx.numpy_helper.to_array(zeros[readers[0].input[2]])) == 0
    for node in model.graph.node:
        if node is readers[0] or node.input[0] == quantized:
            node.input[2] = "three"
    onnx.save(model, tmp_path / "model.onnx")
    convolutions = [node.name for node in model.graph.node if node.op_type == "Conv"]
    found = onnx_quantized.kernels(tmp_path / "model.onnx", convolutions)
    assert found.count("QLinearConv") == 2 and None in found


def test_a_layer_that_would_run_in_floats_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    step = fz.Quantize(scheme="int8-weight", allow_simulated=True)
    assert executes(compiled(step))["stem"] == "simulated in onnx"
    monkeypatch.setattr(onnx_quantized, "kernels", lambda path, names: [None] * len(names))
    with pytest.raises(EmitError, match=r"(?s)quantized layers would be computed in floats.*head: int8-weight"):
        compiled(fz.Quantize(scheme="int8-weight"))


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_four_bits_are_packed_and_run_block_by_block() -> None:
    artifact = compiled(fz.Quantize(scheme="int4-weight", granularity="group:32"), Wide(), (4, 64))
    assert set(executes(artifact).values()) == {"integer-executed by MatMulNBits in onnx"}
    stored = [item for item in model_of(artifact).graph.initializer if item.data_type == onnx.TensorProto.INT4]
    assert (
        sum(len(item.raw_data) for item in stored if len(item.dims) == 2 and item.dims[0] > 4) == (64 + 32) * 128 // 2
    )


def test_scales_of_the_call_run_on_integers() -> None:
    artifact = compiled(fz.Quantize(mode="dynamic"), Wide(), (4, 64))
    assert all("integer-executed" in text for text in executes(artifact).values()) and len(executes(artifact)) == 2


def optimised(artifact: Any, folder: Path) -> Any:
    """What ONNX Runtime makes of the file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnx_quantized.configure(options)
    onnxruntime.InferenceSession(str(artifact.folder / "onnx" / "model.onnx"), options)
    return onnx.load(folder / "optimised.onnx")


@pytest.mark.parametrize("shape", [(64,), (4, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_that_gives_floats_adds_its_bias_itself(shape: tuple[int, ...], bias: bool, tmp_path: Path) -> None:
    """As an Add it would be one operator with the Gelu, which takes longer than Gelu and kernel."""
    model = nn.Sequential(nn.Linear(64, 128, bias=bias), nn.GELU(), nn.Linear(128, 32, bias=bias))
    data = [torch.randn(32, *shape, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    artifact = compiled(fz.Quantize(), model, shape, calibration=data)
    assert set(executes(artifact).values()) == {"integer-executed by MatMulIntegerToFloat in onnx"}
    kinds = [node.op_type for node in optimised(artifact, tmp_path).graph.node]
    assert kinds == ["QuantizeLinear", "MatMulIntegerToFloat", "Gelu", "QuantizeLinear", "MatMulIntegerToFloat"]
    want = model(data[0]).detach()
    assert float((artifact(data[0]) - want).norm() / want.norm()) < 0.03


def test_a_product_that_is_quantized_next_gives_integers(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    artifact = compiled(fz.Quantize(), model, (64,), calibration=[torch.randn(32, 64)])
    kinds = [node.op_type for node in optimised(artifact, tmp_path).graph.node]
    assert kinds == ["QuantizeLinear", "QGemm", "MatMulIntegerToFloat"]


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_scales_of_the_call_are_computed_by_the_runtime(granularity: str) -> None:
    """Of two linear layers on two dims and on three, with a bias, without one, and with a ReLU between."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 5, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).relu().unsqueeze(1))

    model = Two()
    artifact = compiled(fz.Quantize(mode="dynamic", granularity=granularity), model, (8,))
    assert executes(artifact) == dict.fromkeys(("first", "last"), "integer-executed by DynamicQuantizeMatMul in onnx")
    kinds = [node.op_type for node in model_of(artifact).graph.node]
    assert kinds.count("DynamicQuantizeLinear") == kinds.count("MatMulInteger") == 2
    assert not {"QuantizeLinear", "DequantizeLinear", "ReduceMin", "ReduceMax"} & set(kinds)
    for size in (0.0, 1e-3, 1.0, 1e3):
        x = size * torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
        found, want = artifact(x), model(x).detach()
        assert bool(found.isfinite().all()) and float((found - want).norm()) <= 0.03 * float(want.norm()) + 1e-6


def test_a_relu_whose_result_stays_in_floats_does_not_take_its_layer_along() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
    artifact = compiled(fz.Quantize(exclude="2"), model, (8,), calibration=[torch.randn(32, 8)])
    assert executes(artifact) == {"0": "integer-executed by MatMulIntegerToFloat in onnx"}
    last = compiled(fz.Quantize(), nn.Sequential(*model[:2]), (8,), calibration=[torch.randn(32, 8)])
    assert executes(last) == executes(artifact) and bool((last(torch.randn(9, 8)) >= 0).all())


class Tied(nn.Module):
    """A table that is an embedding and a head, another one, and a layer between."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc, self.norm = nn.Embedding(200, 64), nn.Linear(64, 64), nn.LayerNorm(64)
        self.place = nn.Embedding(5, 64)
        self.head = nn.Linear(64, 200, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.fc(self.table(ids)) + self.place(ids % 5)))


def tied(scheme: str, granularity: str, **given: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    net = Tied().eval()
    ids = fz.Input("ids", ("batch", 5), dtype="int64", low=0, high=199)
    step = fz.Quantize(scheme=scheme, granularity=granularity, **given)
    return net, fz.compile(net, fz.Plan([ids], [step], ["onnx"]))


@pytest.mark.parametrize(
    ("scheme", "granularity", "lookup"),
    [
        ("int8-weight", "tensor", "Gather"), ("int8-weight", "channel", "Gather"),
        ("int8-weight", "group:16", "Gather"),
        ("int4-weight", "group:16", "GatherBlockQuantized"), ("int4-weight", "group:32", "GatherBlockQuantized"),
    ],
)  # fmt: skip
def test_a_tied_table_is_stored_once_and_read_as_integers_twice(scheme: str, granularity: str, lookup: str) -> None:
    net, artifact = tied(scheme, granularity)
    assert executes(artifact) == {
        **dict.fromkeys(("table", "place"), f"integer-executed by {lookup} in onnx"),
        **dict.fromkeys(("fc", "head"), "integer-executed by MatMulNBits in onnx"),
    }
    kind = onnx.TensorProto.INT4 if scheme == "int4-weight" else onnx.TensorProto.INT8
    large = [item for item in model_of(artifact).graph.initializer if numpy.prod(item.dims) >= 64 * 64]
    assert sorted((tuple(item.dims), item.data_type) for item in large) == [((64, 64), kind), ((200, 64), kind)]
    ids = torch.randint(0, 200, (3, 5), generator=torch.Generator().manual_seed(0))
    limit = 0.2 if scheme == "int4-weight" else 0.02
    want = net(ids).detach()
    assert float((artifact(ids) - want).norm() / want.norm()) < limit


def test_a_group_that_no_lookup_of_four_bits_takes_is_looked_up_in_eight() -> None:
    assert executes(tied("int4-weight", "group:8", exclude=["fc", "head", "place"])[1]) == {
        "table": "integer-executed by Gather in onnx"
    }


def test_zero_points_of_blocks_that_are_0_are_not_stored() -> None:
    stored = model_of(tied("int4-weight", "group:32")[1]).graph.initializer
    assert not [item.name for item in stored if "zero" in item.name]


def test_a_lookup_of_floats_is_none_of_integers(tmp_path: Path) -> None:
    table = onnx.numpy_helper.from_array(numpy.ones((4, 8), "float32"), "table")
    ids = onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, [3])
    rows = onnx.helper.make_tensor_value_info("rows", onnx.TensorProto.FLOAT, [3, 8])
    node = onnx.helper.make_node("Gather", ["table", "ids"], ["rows"], name="lookup")
    graph = onnx.helper.make_graph([node], "graph", [ids], [rows], [table])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    assert onnx_quantized.kernels(tmp_path / "model.onnx", ["lookup"]) == [None]


@pytest.mark.parametrize("between", [nn.ReLU(), nn.Identity(), nn.GELU()])
@pytest.mark.parametrize("shape", [(32,), (3, 32)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_weight_alone_in_front_of_a_layer_on_integers(between: nn.Module, shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64, bias=bias), between, nn.Linear(64, 8)).eval()
    steps = [fz.Quantize("0", scheme="int8-weight"), fz.Quantize("2")]
    data = [torch.randn(16, *shape, generator=torch.Generator().manual_seed(1))]
    artifact = fz.compile(model, fz.Plan([fz.Input("x", ("batch", *shape))], steps, ["onnx"]), calibration=data)
    assert executes(artifact)["0"] == "integer-executed by MatMulNBits in onnx"
    want = model(data[0]).detach()
    assert float((artifact(data[0]) - want).norm() / want.norm()) < 0.03


@pytest.mark.parametrize("shape", [(32,), (3, 32)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_relu_behind_a_weight_alone_stays_beside_the_kernel(shape: tuple[int, ...], bias: bool) -> None:
    model = nn.Sequential(nn.Linear(32, 64, bias=bias), nn.ReLU(), nn.Linear(64, 8, bias=bias))
    artifact = compiled(fz.Quantize(scheme="int8-weight"), model, shape)
    assert executes(artifact) == dict.fromkeys("02", "integer-executed by MatMulNBits in onnx")


@pytest.mark.parametrize(("scheme", "granularity"), [("int8-weight", "channel"), ("int4-weight", "group:32")])
def test_a_layer_that_is_called_twice(scheme: str, granularity: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).tanh())

    for shape in ((32,), (3, 32)):
        artifact = compiled(fz.Quantize(scheme=scheme, granularity=granularity), Twice(), shape)
        ran = [row["executes"] for row in artifact.manifest["ledger"] if row["executes"].endswith("in onnx")]
        assert ran == ["integer-executed by MatMulNBits in onnx"] * 2
