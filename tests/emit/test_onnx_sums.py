"""Sums and biases in ONNX: what ONNX Runtime makes of them, and what is left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import onnx
import onnx_ir
import onnxruntime
import pytest

from fxfreeze.emit.onnx_sums import stay_fast

WIDTH, HIDDEN, ROWS = 16, 24, 3
SIZES = {"w": (WIDTH, HIDDEN), "w2": (WIDTH, HIDDEN), "b": HIDDEN, "g": WIDTH, "t": (1, ROWS, WIDTH), "one": 1,
         "ws": HIDDEN, "step": ()}  # fmt: skip
Array = numpy.ndarray[Any, Any]

BIASED = ("p = MatMul(x, w)", "y = Add(p, b)")


def model(*lines: str, shape: str = "N, 3, 16") -> onnx.ModelProto:
    """x of `shape` → the lines → y; w, b, g and t are constants."""
    parsed = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        net (float[{shape}] x) => (float[] y) {{ {" ".join(lines)} }}"""
    )
    for position, node in enumerate(parsed.graph.node):
        node.name = f"{node.op_type}_{position}"
    parsed.graph.output[0].type.tensor_type.ClearField("shape")
    rng = numpy.random.default_rng(0)
    read = {name for node in parsed.graph.node for name in node.input}
    stored = {name: numpy.array(rng.standard_normal(size), "float32") for name, size in SIZES.items()}
    stored["wi"] = rng.integers(-9, 9, (WIDTH, HIDDEN)).astype("int8")
    parsed.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name) for name, array in stored.items() if name in read
    )
    return onnx.shape_inference.infer_shapes(parsed)


def after(before: onnx.ModelProto) -> onnx.ModelProto:
    changed = onnx_ir.serde.deserialize_model(before)
    stay_fast(changed.graph)
    proto = onnx_ir.serde.serialize_model(changed)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def kinds(found: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in found.graph.node]


def run(found: onnx.ModelProto, rows: int = 5) -> Array:
    session = onnxruntime.InferenceSession(found.SerializeToString(), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    sizes = [size if isinstance(size, int) else rows for size in given.shape]
    x = numpy.random.default_rng(1).standard_normal(sizes).astype("float32")
    result: Array = session.run(None, {"x": x})[0]
    return result


def optimised(found: onnx.ModelProto, folder: Path) -> list[str]:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(found.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return kinds(onnx.load(folder / "optimised.onnx"))


@pytest.mark.parametrize("shape", ["N, 3, 16", "2, N, 16", "2, 3, 16", "2, N, 4, 16"])
def test_a_bias_goes_into_the_product(shape: str) -> None:
    before = model(*BIASED, shape=shape)
    found = after(before)
    assert kinds(found) == ["Reshape", "Gemm", "Reshape"]
    for rows in (1, 5):
        numpy.testing.assert_allclose(run(found, rows), run(before, rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", ["N, M, 16", "N, 16", "0, 3, 16"])
def test_a_product_stays_where_sizes_are_open_or_few(shape: str) -> None:
    """Two open sizes would have to be computed; two dims are a Gemm to ONNX Runtime; and −1 is no size of nothing."""
    assert kinds(after(model(*BIASED, shape=shape))) == ["MatMul", "Add"]


@pytest.mark.parametrize(
    "lines",
    [
        ("p = MatMul(x, w)", "y = Add(p, one)"),
        ("p = MatMul(x, w)", "q = Add(p, b)", "y = Mul(p, q)"),
        ("v = Transpose<perm = [0, 2, 1]>(x)", "p = MatMul(x, v)", "y = Add(p, p)"),
    ],
)
def test_what_is_no_bias_stays(lines: tuple[str, ...]) -> None:
    before = model(*lines)
    assert kinds(after(before)) == kinds(before)


def test_floats_between_integers_stay() -> None:
    """Of a Gemm that reads integers, ONNX Runtime would quantize the weight, past Reshapes as well."""
    quantized = ("q = QuantizeLinear(x, step)", "d = DequantizeLinear(q, step)")
    lines = (*quantized, "v = Transpose<perm = [1, 0, 2]>(d)", "p = MatMul(v, w)", "y = Add(p, b)")
    assert kinds(after(model(*lines)))[-2:] == ["MatMul", "Add"]


def test_a_sum_in_front_of_a_norm_is_not_merged(tmp_path: Path) -> None:
    before = model("n = Neg(x)", "u = Exp(n)", "s = Add(x, u)", "y = LayerNormalization(s, g, g)")
    found = after(before)
    assert kinds(found) == ["Neg", "Exp", "Sum", "LayerNormalization"]
    assert "SkipLayerNormalization" in optimised(before, tmp_path)  # else there is nothing to prevent any more
    assert optimised(found, tmp_path) == kinds(found)
    numpy.testing.assert_allclose(run(found), run(before), rtol=1e-4, atol=1e-5)


def test_a_sum_that_more_than_a_norm_reads(tmp_path: Path) -> None:
    before = model("u = Exp(x)", "s = Add(x, u)", "n = LayerNormalization(s, g, g)", "y = Mul(n, s)")
    found = after(before)
    assert kinds(found) == ["Exp", "Sum", "LayerNormalization", "Mul"] == optimised(found, tmp_path)
    numpy.testing.assert_allclose(run(found), run(before), rtol=1e-4, atol=1e-5)


def test_a_sum_with_a_constant_is_merged_with_no_norm_and_stays() -> None:
    before = model("s = Add(x, t)", "y = LayerNormalization(s, g, g)")
    assert kinds(after(before)) == kinds(before)


@pytest.mark.parametrize(("shape", "kind"), [("N, 3, 16", "Reshape"), ("N, M, 16", "Sum")])
def test_a_bias_in_front_of_a_gelu_is_not_merged_with_it(shape: str, kind: str, tmp_path: Path) -> None:
    lines = ("p = MatMul(x, w)", "h = Add(p, b)", "y = Gelu(h)")
    before = model(*lines, shape=shape)
    found = after(before)
    assert kinds(found)[-2:] == [kind, "Gelu"]
    assert "BiasGelu" in optimised(before, tmp_path) and "Gelu" in optimised(found, tmp_path)
    numpy.testing.assert_allclose(run(found), run(before), rtol=1e-4, atol=1e-5)


def test_a_bias_behind_a_product_of_integers_stays_with_that(tmp_path: Path) -> None:
    lines = ("q, s, z = DynamicQuantizeLinear(x)", "i = MatMulInteger(q, wi, z)", "c = Cast<to = 1>(i)",
             "m = Mul(s, ws)", "p = Mul(c, m)", "h = Add(p, b)", "y = Gelu(h)")  # fmt: skip
    before = model(*lines)
    assert kinds(after(before)) == kinds(before) and "DynamicQuantizeMatMul" in optimised(before, tmp_path)


def test_products_of_one_value_share_its_rows() -> None:
    lines = ("p = MatMul(x, w)", "u = Add(p, b)", "q = MatMul(x, w2)", "o = Add(q, b)", "y = Mul(u, o)")
    before = model(*lines)
    found = after(before)
    assert kinds(found) == ["Reshape", "Gemm", "Reshape", "Gemm", "Reshape", "Mul"]
    assert sorted(item.name for item in found.graph.initializer if item.data_type == onnx.TensorProto.INT64) == [
        f"sizes_-1_{WIDTH}", f"sizes_-1_{ROWS}_{HIDDEN}",
    ]  # fmt: skip
    numpy.testing.assert_allclose(run(found), run(before), rtol=1e-4, atol=1e-5)
