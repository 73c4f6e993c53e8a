"""Portable ONNX files: standard operators of opset 21 alone, which ONNX Runtime still runs on integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import onnx
import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz

IDS = fz.Input("ids", ("batch", 5), dtype="int64", low=0, high=199)


def portable(model: nn.Module, *steps: Any, inputs: Sequence[fz.Input] = (), **given: Any) -> Any:
    plan = fz.Plan(inputs or [fz.Input("x", ("batch", 4, 64))], steps, ["onnx"], portable=True)
    artifact = fz.compile(model.eval(), plan, **given)
    file = onnx.load(artifact.folder / "onnx" / "model.onnx")
    assert {node.domain for node in file.graph.node} == {""}
    assert [(item.domain, item.version) for item in file.opset_import] == [("", 21)]
    return artifact


def ran(artifact: Any) -> dict[str, str]:
    rows = artifact.manifest["ledger"]
    return {row["site"]: row["executes"].partition(" by ")[2] for row in rows if "in onnx" in row["executes"]}


def kinds(artifact: Any) -> list[str]:
    return [node.op_type for node in onnx.load(artifact.folder / "onnx" / "model.onnx").graph.node]


def drawn(*shape: int) -> list[Tensor]:
    return [torch.randn(32, *shape, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


def away(artifact: Any, model: nn.Module, x: Tensor) -> float:
    want = model(x).detach()
    return float((artifact(x) - want).norm() / want.norm())


@pytest.fixture
def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32))


@pytest.mark.parametrize(
    ("shape", "layer", "kernel"), [((64,), "Gemm", "QGemm"), ((4, 64), "MatMul", "MatMulIntegerToFloat")]
)
def test_layers_that_give_floats_are_plain_ones_between_conversions(
    mlp: nn.Module, shape: tuple[int, ...], layer: str, kernel: str
) -> None:
    data = drawn(*shape)
    artifact = portable(mlp, fz.Quantize(), inputs=[fz.Input("x", ("batch", *shape))], calibration=data)
    assert ran(artifact) == dict.fromkeys("02", f"{kernel} in onnx")
    assert [kind for kind in kinds(artifact) if kind not in ("DequantizeLinear", "Add")] == [
        "QuantizeLinear", layer, "Gelu", "QuantizeLinear", layer,
    ]  # fmt: skip
    assert away(artifact, mlp, data[0]) < 0.03


@pytest.mark.parametrize("last", [True, False])
def test_a_layer_whose_relu_stays_in_floats_runs_on_integers(last: bool) -> None:
    """ONNX Runtime would make one operator of the two, in floats."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), *[nn.Linear(16, 5)] * (not last))
    step = fz.Quantize(exclude=None if last else "2")
    artifact = portable(model, step, inputs=[fz.Input("x", ("batch", 8))], calibration=drawn(8))
    assert ran(artifact) == {"0": "QGemm in onnx"}
    assert away(artifact, model, drawn(8)[1]) < 0.03


def test_a_layer_whose_relu_is_quantized_keeps_it() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
    artifact = portable(model, fz.Quantize(), inputs=[fz.Input("x", ("batch", 8))], calibration=drawn(8))
    assert "Relu" in kinds(artifact) and "Max" not in kinds(artifact)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, activation="gelu")

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def test_attention_is_written_out() -> None:
    """As one operator it is of opset 23."""
    torch.manual_seed(0)
    model = Attention().eval()
    artifact = portable(model)
    assert "Softmax" in kinds(artifact) and away(artifact, model, drawn(4, 64)[0]) < 1e-5


def test_products_of_attention_run_on_integers() -> None:
    torch.manual_seed(0)
    artifact = portable(Attention(), fz.Quantize(products=True), calibration=drawn(4, 64))
    assert ran(artifact)["block.self_attn"] == "QLinearMatMul in onnx"
    assert len(ran(artifact)) == 4 and "None" not in ran(artifact).values()


class Tied(nn.Module):
    """A table that is an embedding and a head, and a layer between."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(200, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 200, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.fc(self.table(ids)))


@pytest.mark.parametrize("tied", [True, False])
def test_tables_of_four_bits_are_looked_up_in_bytes(tied: bool) -> None:
    """A tied one is stored once, in bytes; layers that nothing is looked up in keep their 4 bits."""
    torch.manual_seed(0)
    model = Tied()
    if not tied:
        model.head.weight = nn.Parameter(torch.randn(200, 64))
    artifact = portable(model, fz.Quantize(scheme="int4-weight", granularity="group:32"), inputs=[IDS])
    assert ran(artifact) == {"table": "Gather in onnx"} | dict.fromkeys(("fc", "head"), "MatMulNBits in onnx")
    stored = onnx.load(artifact.folder / "onnx" / "model.onnx").graph.initializer
    large = {tuple(item.dims): item.data_type for item in stored if numpy.prod(item.dims) >= 64 * 64}
    four, eight = onnx.TensorProto.INT4, onnx.TensorProto.INT8
    assert large == {(64, 64): four, (200, 64): eight} | ({} if tied else {(64, 200): four})
    assert away(artifact, model, torch.randint(0, 200, (3, 5))) < 0.2


def test_without_it_files_are_what_onnx_runtime_likes_best(mlp: nn.Module) -> None:
    plan = fz.Plan([fz.Input("x", ("batch", 4, 64))], [fz.Quantize()], ["onnx"])
    assert "MatMulIntegerToFloat" in kinds(fz.compile(mlp.eval(), plan, calibration=drawn(4, 64)))
