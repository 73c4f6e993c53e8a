"""Sums and biases in ONNX: what ONNX Runtime makes of them, and what is left as it was."""

from __future__ import annotations

from pathlib import Path

import numpy
import onnx
import pytest
from onnx_text import Array, changed, kinds, optimised, parsed, result

from fxfreeze.emit.onnx_sums import stay_fast

WIDTH, HIDDEN, ROWS = 16, 24, 3
SIZES = {"w": (WIDTH, HIDDEN), "w2": (WIDTH, HIDDEN), "b": HIDDEN, "g": WIDTH, "t": (1, ROWS, WIDTH), "one": 1,
         "ws": HIDDEN, "step": ()}  # fmt: skip

BIASED = ("p = MatMul(x, w)", "y = Add(p, b)")


def model(*lines: str, shape: str = "N, 3, 16") -> onnx.ModelProto:
    """x of `shape` → the lines → y; w, b, g and t are constants."""
    rng = numpy.random.default_rng(0)
    stored = {name: numpy.array(rng.standard_normal(size), "float32") for name, size in SIZES.items()}
    stored["wi"] = rng.integers(-9, 9, (WIDTH, HIDDEN)).astype("int8")
    return parsed(f"net (float[{shape}] x) => (float[] y) {{ {' '.join(lines)} }}", stored)


def after(before: onnx.ModelProto) -> onnx.ModelProto:
    return changed(before, stay_fast)


def run(found: onnx.ModelProto, rows: int = 5) -> Array:
    dims = found.graph.input[0].type.tensor_type.shape.dim
    sizes = [dim.dim_value if dim.HasField("dim_value") else rows for dim in dims]
    return result(found, x=numpy.random.default_rng(1).standard_normal(sizes).astype("float32"))


def differing(found: onnx.ModelProto, before: onnx.ModelProto, rows: int = 5) -> float:
    """The largest difference; at most 1e-6 where it was measured, as bounds below leave for another order of sums."""
    return float(numpy.abs(run(found, rows) - run(before, rows)).max())


@pytest.mark.parametrize("shape", ["N, 3, 16", "2, N, 16", "2, 3, 16", "2, N, 4, 16"])
def test_a_bias_goes_into_the_product(shape: str) -> None:
    before = model(*BIASED, shape=shape)
    found = after(before)
    assert kinds(found) == ["Reshape", "Gemm", "Reshape"]
    for rows in (1, 5):
        assert differing(found, before, rows) <= 1e-5  # of 15 at most


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
    assert differing(found, before) <= 5e-6  # of 5


def test_a_sum_that_more_than_a_norm_reads(tmp_path: Path) -> None:
    before = model("u = Exp(x)", "s = Add(x, u)", "n = LayerNormalization(s, g, g)", "y = Mul(n, s)")
    found = after(before)
    assert kinds(found) == ["Exp", "Sum", "LayerNormalization", "Mul"] == optimised(found, tmp_path)
    assert differing(found, before) <= 2e-5  # of 50


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
    assert differing(found, before) <= 1e-5  # of 16


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
    assert differing(found, before) <= 5e-5  # of 105


def test_new_nodes_belong_to_the_module_of_the_old_and_give_its_value() -> None:
    before = model(*BIASED)
    assert [output.name for output in after(before).graph.output] == ["y"]
    for node in before.graph.node:
        node.metadata_props.add(key="module", value=f"of {node.op_type}")
    found = [(node.op_type, item.value) for node in after(before).graph.node for item in node.metadata_props]
    assert found == [("Reshape", "of MatMul"), ("Gemm", "of MatMul"), ("Reshape", "of Add")]
