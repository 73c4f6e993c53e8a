"""Hard gates in ONNX as products: which are changed, that they give the same, and what is left as it was."""

from __future__ import annotations

import numpy
import onnx
import pytest
import torch
from onnx_text import Array, changed, kinds, parsed, result

import fxfreeze as fz
from fxfreeze.emit.onnx_gates import multiply
from fxfreeze.emit.onnx_quantized import shape_for_runtime

C = 8

GAINED = ("open = Greater(x, t)", "v = Mul(x, g)", "y = Where(open, v, zero)")


def model(*lines: str, kind: str = "float") -> onnx.ModelProto:
    """x [N, C] → the lines → y; t and g are constants per neuron, zero and one numbers."""
    rng = numpy.random.default_rng(0)
    dtype = "float32" if kind == "float" else kind
    stored = {"t": rng.standard_normal((1, C)), "g": rng.standard_normal((1, C)), "zero": 0.0, "one": 1.0}
    given = {name: numpy.array(value, dtype) for name, value in stored.items()}
    given |= {"step": numpy.array(0.01, "float32"), "offset": numpy.array(3, "uint8")}
    return parsed(
        f"net ({kind}[N, {C}] x, {kind}[N, {C}] z) => ({kind}[] y) {{ {' '.join(lines)} }}",
        given,
    )


def after(before: onnx.ModelProto) -> onnx.ModelProto:
    return changed(before, multiply)


def run(found: onnx.ModelProto, x: Array) -> Array:
    return result(found, x=x, z=x[::-1].copy())


@pytest.mark.parametrize(
    "lines",
    [
        GAINED,
        ("open = Greater(x, t)", "y = Where(open, x, zero)"),
        ("a = Abs(x)", "open = Greater(a, t)", "v = Mul(g, x)", "y = Where(open, v, zero)"),
        ("h = Relu(x)", "open = Greater(h, z)", "v = Mul(h, z)", "y = Where(open, v, zero)"),
    ],
)
def test_a_gate_is_a_product_that_gives_the_same(lines: tuple[str, ...]) -> None:
    """At the threshold it is shut, and right above and below it what it is there."""
    before = model(*lines)
    found = after(before)
    assert kinds(found) == [*kinds(before)[:-1], "Cast", "Mul"]
    x = numpy.random.default_rng(1).standard_normal((6, C)).astype("float32")
    t = numpy.random.default_rng(0).standard_normal((1, C)).astype("float32")
    x[3], x[4], x[5] = t, numpy.nextafter(t, numpy.float32(9)), numpy.nextafter(t, numpy.float32(-9))
    want = run(before, x)
    assert numpy.array_equal(run(found, x), want) and 0.1 < (want == 0).mean() < 0.9


@pytest.mark.parametrize(
    "lines",
    [
        ("open = Greater(x, t)", "y = Where(open, x, one)"),
        ("open = Greater(x, t)", "y = Where(open, zero, x)"),
        ("open = Less(x, t)", "y = Where(open, x, zero)"),
        ("open = Greater(z, t)", "y = Where(open, x, zero)"),  # perhaps a mask, and x infinite where it is shut
        ("open = Greater(x, t)", "v = Log(x)", "y = Where(open, v, zero)"),
    ],
)
def test_what_is_no_gate_stays(lines: tuple[str, ...]) -> None:
    before = model(*lines)
    assert kinds(after(before)) == kinds(before)


@pytest.mark.parametrize(
    "lines",
    [
        ("open = Greater(d, t)", "y = Where(open, d, zero)"),
        ("open = Greater(d, t)", "v = Mul(d, g)", "y = Where(open, v, zero)"),
    ],
)
def test_a_gate_of_what_was_read_from_integers_is_a_product(lines: tuple[str, ...]) -> None:
    """Its conversions say nothing of their shapes and types by then."""
    read = "h = Relu(x)", "q = QuantizeLinear(h, step, offset)", "d = DequantizeLinear(q, step, offset)"
    before = model(*read, *lines)
    found = changed(before, lambda graph: (shape_for_runtime(graph), multiply(graph)))
    assert kinds(found) == [*kinds(before)[:-1], "Cast", "Mul"]
    x = numpy.random.default_rng(1).standard_normal((6, C)).astype("float32")
    want = run(before, x)
    assert numpy.array_equal(run(found, x), want) and 0.1 < (want == 0).mean() < 0.9


def test_a_gate_in_float64_stays() -> None:
    assert kinds(after(model(*GAINED, kind="double"))) == ["Greater", "Mul", "Where"]


def test_rows_with_gates_of_their_own_compile_to_products() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(C, C), torch.nn.ReLU(), torch.nn.Linear(C, C)).eval()
    plan = fz.Plan([fz.Input("x", ("batch", C), low=-1, high=1)], [fz.Gate(at="1", modes=3)], ["onnx"])
    adapted = fz.adapt(net, plan)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in adapted.adapter_state().values():
            value.copy_(torch.rand(value.shape, generator=generator))
    artifact = fz.compile(adapted, plan)
    found = kinds(onnx.load(artifact.folder / "onnx" / "model.onnx"))
    assert "Where" not in found and {"Greater", "Cast", "Mul"} <= set(found)
