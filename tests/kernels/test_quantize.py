"""``fxfreeze::quantize`` and ``dequantize`` against ONNX's own reference of QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from fxfreeze.kernels.dequantize import KERNEL as DEQUANTIZE
from fxfreeze.kernels.quantize import KERNEL as QUANTIZE

RANGES = {"int8": (-128, 127), "uint8": (0, 255)}
LAYOUTS = {"tensor": (0, 0), "channel": (1, 0), "block": (1, 4)}


def operands(layout: str, kind: str) -> tuple[Tensor, Tensor, int, int]:
    """Scale, zero point, axis and block for x [3, 8, 5]."""
    axis, block = LAYOUTS[layout]
    shape = {"tensor": (), "channel": (8,), "block": (3, 2, 5)}[layout]
    scale = torch.rand(shape) * 0.1 + 0.01
    low, high = RANGES[kind]
    return scale, torch.randint(low, high + 1, shape, dtype=getattr(torch, kind)), axis, block


def onnx_says(operator: str, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, block: int) -> Tensor:
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    names = {torch.float32: TensorProto.FLOAT, torch.int8: TensorProto.INT8, torch.uint8: TensorProto.UINT8}
    inputs = {"x": x, "scale": scale, "zero_point": zero_point}
    shaped = [helper.make_tensor_value_info(name, names[value.dtype], value.shape) for name, value in inputs.items()]
    result = names[zero_point.dtype if operator == "QuantizeLinear" else scale.dtype]
    node = helper.make_node(operator, list(inputs), ["y"], axis=axis, block_size=block)
    graph = helper.make_graph([node], "one", shaped, [helper.make_tensor_value_info("y", result, x.shape)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    (found,) = ReferenceEvaluator(model).run(None, {name: value.numpy() for name, value in inputs.items()})
    return torch.from_numpy(numpy.asarray(found))


@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_what_onnx_says(layout: str, kind: str) -> None:
    scale, zero_point, axis, block = operands(layout, kind)
    x = torch.randn(3, 8, 5) * 4  # some of it saturates
    found = QUANTIZE.op(x, scale, zero_point, axis, block, *RANGES[kind])
    want = onnx_says("QuantizeLinear", x, scale, zero_point, axis, block)
    assert found.dtype == want.dtype == getattr(torch, kind) and torch.equal(found, want)
    back = DEQUANTIZE.op(found, scale, zero_point, axis, block, torch.float32)
    assert torch.equal(back, onnx_says("DequantizeLinear", found, scale, zero_point, axis, block))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_less_memory_the_bits_are_the_same(layout: str, kind: str, dtype: torch.dtype) -> None:
    scale, zero_point, axis, block = operands(layout, kind)
    x, scale = (torch.randn(3, 8, 5) * 4).to(dtype), scale.to(dtype)
    whole = QUANTIZE.op(x, scale, zero_point, axis, block, *RANGES[kind])
    assert torch.equal(whole, QUANTIZE.reference(x, scale, zero_point, axis, block, *RANGES[kind]))
    found = DEQUANTIZE.op(whole, scale, zero_point, axis, block, dtype)
    want = DEQUANTIZE.reference(whole, scale, zero_point, axis, block, dtype)
    assert torch.equal(found.view(torch.uint8), want.view(torch.uint8))  # with the sign of zeros


def test_a_gradient_reaches_the_scale() -> None:
    q, zero_point = torch.tensor([3, 5], dtype=torch.uint8), torch.tensor(1, dtype=torch.uint8)
    scale = torch.tensor(0.5, requires_grad=True)
    DEQUANTIZE.op(q, scale, zero_point, 0, 0, torch.float32).sum().backward()
    assert scale.grad is not None and float(scale.grad) == 6.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_halves_go_to_even_before_the_zero_point_is_added(dtype: torch.dtype) -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], dtype=dtype)
    found = QUANTIZE.op(x, torch.ones((), dtype=dtype), torch.tensor(1, dtype=torch.int8), 0, 0, -128, 127)
    assert found.tolist() == [-1, -1, 1, 1, 3, 3]


def test_what_lies_beyond_saturates() -> None:
    x = torch.tensor([-torch.inf, -1e30, 1e30, torch.inf])
    for low, high in (*RANGES.values(), (-8, 7), (-127, 127)):
        zero_point = torch.tensor(3, dtype=torch.uint8 if high == 255 else torch.int8)
        assert QUANTIZE.op(x, torch.tensor(0.5), zero_point, 0, 0, low, high).tolist() == [low, low, high, high]


@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_comes_back_is_within_half_a_step(layout: str, kind: str) -> None:
    scale, zero_point, axis, block = operands(layout, kind)
    low, high = RANGES[kind]
    zero_point = zero_point.clamp(low + 100, high - 100)
    x = (torch.rand(3, 8, 5, dtype=torch.float64) - 0.5) * 2  # within 100 steps of 0.01
    back = DEQUANTIZE.op(
        QUANTIZE.op(x, scale.double(), zero_point, axis, block, low, high), scale.double(), zero_point, axis, block,
        torch.float64,
    )  # fmt: skip
    assert back.dtype == torch.float64 and float((back - x).abs().max()) <= float(scale.max()) / 2 + 1e-12


def test_the_operators_are_good_citizens() -> None:
    for layout in LAYOUTS:
        scale, zero_point, axis, block = operands(layout, "uint8")
        torch.library.opcheck(QUANTIZE.op, (torch.randn(3, 8, 5), scale, zero_point, axis, block, 0, 255))
        q = torch.randint(0, 256, (3, 8, 5), dtype=torch.uint8)
        torch.library.opcheck(DEQUANTIZE.op, (q, scale, zero_point, axis, block, torch.float32))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.ones(4, 6, dtype=torch.int64)}, "x is torch.int64"),
        ({"scale": torch.ones(6, dtype=torch.int8)}, "scale is torch.int8"),
        ({"scale": torch.ones(4)}, r"zero_point has shape \[6\], scale \[4\]"),
        ({"zero_point": torch.zeros(6, dtype=torch.uint8)}, "zero_point is torch.uint8, not torch.int8"),
        ({"low": 0, "high": 255}, "zero_point is torch.int8, not torch.uint8"),
        ({"low": -129}, "-129 … 127"),
        ({"axis": 0}, r"scale has shape \[6\], not \[4\]"),
        ({"axis": 2}, "axis is 2"),
        ({"block": 4}, "no multiple of block = 4"),
        ({"block": 3}, r"scale has shape \[6\], not \[4, 2\]"),
        ({"block": -1}, "block is -1"),
    ],
)
def test_bad_operands_are_refused(change: dict[str, Any], says: str) -> None:
    given = {
        "x": torch.ones(4, 6), "scale": torch.ones(6), "zero_point": torch.zeros(6, dtype=torch.int8), "axis": 1,
        "block": 0, "low": -128, "high": 127, **change,
    }  # fmt: skip
    for function in (QUANTIZE.op, QUANTIZE.fake):
        with pytest.raises(ValueError, match=says):
            function(**given)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"q": torch.ones(4, 6, dtype=torch.int32)}, "q is torch.int32"),
        ({"zero_point": torch.zeros((), dtype=torch.uint8)}, "zero_point is torch.uint8, q torch.int8"),
        ({"dtype": torch.int32}, "dtype is torch.int32"),
        ({"block": 2}, r"scale has shape \[\], not \[4, 3\]"),
    ],
)
def test_bad_integers_are_refused(change: dict[str, Any], says: str) -> None:
    given = {
        "q": torch.ones(4, 6, dtype=torch.int8), "scale": torch.ones(()), "axis": 1, "block": 0,
        "zero_point": torch.zeros((), dtype=torch.int8), "dtype": torch.float32, **change,
    }  # fmt: skip
    for function in (DEQUANTIZE.op, DEQUANTIZE.fake):
        with pytest.raises(ValueError, match=says):
            function(**given)
