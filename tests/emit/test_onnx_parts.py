"""Integer products that are cut into parts in ONNX: a product per part, and what stays one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import onnx
import torch
from torch import Tensor, nn

import fxfreeze as fz

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
