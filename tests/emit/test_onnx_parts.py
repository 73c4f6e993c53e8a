"""Products that are cut into parts in ONNX: a product per part, and what stays one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy
import onnx
import pytest
import torch
from onnx_text import changed, parsed
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.emit.onnx_parts import cut

SIZE, HEADS = 64, 4
Parts = tuple[Tensor, ...]


def index(y: Tensor) -> Parts:
    y = y.reshape(*y.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    return y[0], y[1], y[2]


def unbind(y: Tensor) -> Parts:
    return y.reshape(*y.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)


def packed(y: Tensor) -> Parts:
    """As torch.nn.MultiheadAttention cuts."""
    y = y.unflatten(-1, (3, SIZE)).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
    return tuple(y[i].unflatten(-1, (HEADS, -1)).transpose(1, 2) for i in range(3))


def chunk(y: Tensor) -> Parts:
    return tuple(part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in y.chunk(3, -1))


def inner(y: Tensor) -> Parts:
    """Along the last axis: every third column."""
    y = y.reshape(*y.shape[:2], HEADS, -1, 3).transpose(1, 2)
    return y[..., 0], y[..., 1], y[..., 2]


def rows(y: Tensor) -> Parts:
    """Along the tokens, where a part has as many columns as before."""
    return tuple(part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in y.chunk(3, 1))


def mixed(y: Tensor) -> Parts:
    """Where rows were made of others first."""
    y = y.reshape(12, y.shape[0], 3, SIZE)
    return tuple(y[:, :, i].reshape(y.shape[1], 12, HEADS, SIZE // HEADS).transpose(1, 2) for i in range(3))


def small(y: Tensor) -> Parts:
    """Into more parts than are worth a product each."""
    parts = y.split(16, -1)
    return tuple(torch.stack(parts[i::3], 1) for i in range(3))


def read(y: Tensor) -> Parts:
    """With something else that reads it whole."""
    q, k, v = chunk(y)
    return q, k, v + y.mean(-1)[:, None, :, None]


class Cut(nn.Module):
    def __init__(self, *how: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.qkv = nn.ModuleList(nn.Linear(SIZE, 3 * SIZE, bias=i % 2 == 0) for i in range(len(how)))

    def forward(self, x: Tensor) -> Parts:
        """Sums of heads, so that a part in another's place, or a column in another's, is a different result."""
        found = [how(layer(x)) for how, layer in zip(self.how, self.qkv, strict=True)]
        return tuple((q - 2 * k).tanh() + v for q, k, v in found)


def kinds(net: nn.Module, shape: tuple[Any, ...] = ("batch", "tokens", SIZE)) -> Counter[str]:
    """Operators in the file; that its results are those of the program is a condition of compiling."""
    data = torch.randn(8, 12, SIZE, generator=torch.Generator().manual_seed(1))
    artifact = fz.compile(net.eval(), fz.Plan([fz.Input("x", shape)], [fz.Quantize()], ["onnx"]), calibration=[data])
    told = [row["executes"] for row in artifact.manifest["ledger"] if row["executes"].endswith("in onnx")]
    assert set(told) == {"integer-executed by MatMulIntegerToFloat in onnx"}
    return Counter(node.op_type for node in onnx.load(artifact.folder / "onnx" / "model.onnx").graph.node)


def test_parts_are_products_of_their_own() -> None:
    how = (index, unbind, packed, chunk)
    found = kinds(Cut(*how))
    assert found["MatMulIntegerToFloat"] == 3 * len(how) and found["QuantizeLinear"] == 1
    assert not {"Split", "Slice", "Gather", "Squeeze"} & found.keys() and found["Transpose"] == 3 * len(how)


def test_what_is_cut_otherwise_stays_one_product() -> None:
    how = (inner, rows, mixed, small, read)
    assert kinds(Cut(*how), (8, 12, SIZE))["MatMulIntegerToFloat"] == len(how)


# ---- in floats


def floats(net: nn.Module, *shapes: tuple[Any, ...]) -> Counter[str]:
    inputs = [fz.Input(f"x{i}", shape) for i, shape in enumerate(shapes)]
    artifact = fz.compile(net.eval(), fz.Plan(inputs, targets=["onnx"]))
    return Counter(node.op_type for node in onnx.load(artifact.folder / "onnx" / "model.onnx").graph.node)


def test_parts_are_products_of_their_own_in_floats() -> None:
    """With biases, every second, and without; with one open size a bias is in the product, with two it is an Add."""
    how = (index, unbind, packed, chunk)
    found = floats(Cut(*how), ("batch", "tokens", SIZE))
    assert (found["MatMul"], found["Add"] - len(how)) == (3 * len(how), 3 * len(how) // 2)
    assert not {"Split", "Slice", "Gather", "Squeeze"} & found.keys() and found["Transpose"] == 3 * len(how)
    found = floats(Cut(*how), ("batch", 12, SIZE))
    assert (found["Gemm"], found["MatMul"]) == (3 * len(how) // 2, 3 * len(how) // 2)


def test_what_is_cut_otherwise_stays_one_product_in_floats() -> None:
    how = (inner, rows, mixed, small, read)
    found = floats(Cut(*how), (8, 12, SIZE))
    assert found["MatMul"] + found["Gemm"] == len(how)


class Rows(nn.Module):
    """Of two dims, where the product is a Gemm with a weight [out, in]; twice what the second has, so order shows."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(SIZE, 3 * SIZE, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.layer(x).split([SIZE, SIZE // 2, SIZE + SIZE // 2], -1)
        return torch.cat([a.relu(), 2 * b.tanh(), c.sigmoid()], -1)


@pytest.mark.parametrize("bias", [True, False])
def test_rows_of_features(bias: bool) -> None:
    found = floats(Rows(bias), ("batch", SIZE))
    assert found["Gemm"] + found["MatMul"] == 3 and "Split" not in found


class Shared(Rows):
    """The weight is read twice: cut, it would be stored twice."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.layer(x + 1)


def test_a_weight_that_is_read_twice_stays_whole() -> None:
    assert floats(Shared(), ("batch", SIZE))["Gemm"] == 2


def test_cut_layers_keep_one_copy_of_the_weight() -> None:
    plan = fz.Plan([fz.Input("x", ("batch", SIZE))], targets=["onnx"])
    artifact = fz.compile(Rows().eval(), plan)
    stored = onnx.load(artifact.folder / "onnx" / "model.onnx").graph.initializer
    assert sum(onnx.numpy_helper.to_array(item).nbytes for item in stored) < 1.1 * 4 * 3 * SIZE * (SIZE + 1)


@pytest.mark.parametrize(("size", "products"), [(64, 2), (1, 1)])
def test_a_bias_that_is_one_number_for_all_columns_is_not_cut(size: int, products: int) -> None:
    text = """net (float[N, 8] x) => (float[N, 32] a, float[N, 32] b) {
        y = Gemm(x, w, c)
        a, b = Split<axis = 1, num_outputs = 2>(y)
    }"""
    before = parsed(text, {"w": numpy.ones((8, 64), "float32"), "c": numpy.ones(size, "float32")})
    assert [node.op_type for node in changed(before, cut).graph.node].count("Gemm") == products
