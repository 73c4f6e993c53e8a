"""Slices, pads and means between conversions in ONNX: on integers where both sides have one scale, or by a pool."""

from __future__ import annotations

from pathlib import Path

import numpy
import onnx
import pytest
import torch
from onnx_text import Array, changed, kinds, optimised, parsed, result
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.emit.onnx_between import stay_whole

NUMBERS: dict[str, Array] = {
    "s": numpy.array(0.05, "float32"), "z": numpy.array(20, "uint8"), "s2": numpy.array(0.04, "float32"),
    "zero": numpy.array([0]), "end": numpy.array([7]), "two": numpy.array([2]), "three": numpy.array([3]),
    "step": numpy.array([2]), "pads": numpy.array([0, 1, 0, 0, 0, 1, 0, 0]), "axes": numpy.array([2, 3]),
    "value": numpy.array(0.5, "float32"),
}  # fmt: skip
ROWS, COLUMNS = "a = Slice(d, zero, end, two, step)", "b = Slice(a, zero, end, three, step)"


def model(*lines: str, **given: Array) -> onnx.ModelProto:
    """x [2, 4, 8, 8] → integers → d, floats → the lines → m → integers → y, floats."""
    return parsed(
        f"""net (float[2, 4, 8, 8] x) => (float[] y) {{
            q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
            {" ".join(lines)}
            w = QuantizeLinear(m, s, z) y = DequantizeLinear(w, s, z)
        }}""",
        NUMBERS | given,
    )


def after(before: onnx.ModelProto) -> onnx.ModelProto:
    return changed(before, stay_whole)


def short(found: onnx.ModelProto) -> list[str]:
    names = {"QuantizeLinear": "Q", "DequantizeLinear": "D"}
    return [names.get(kind, kind) for kind in kinds(found)]


def run(found: onnx.ModelProto) -> Array:
    return result(found, x=3 * numpy.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype("float32"))


@pytest.mark.parametrize(
    ("lines", "left"),
    [
        ((ROWS, "m = Identity(a)"), None),
        (("m = Slice(d, zero, end, two, step)",), ["Slice"]),
        (("m = Pad(d, pads)",), ["Pad"]),
        ((ROWS, COLUMNS, "m = Pad(b, pads)"), ["Slice", "Pad"]),
        (("a = Pad(d, pads)", "m = Slice(a, zero, end, two, step)"), ["Pad", "Slice"]),
    ],
)
def test_integers_are_moved_as_such(lines: tuple[str, ...], left: list[str] | None) -> None:
    before = model(*lines)
    found = after(before)
    assert short(found) == (short(before) if left is None else ["Q", *left, "D"])
    assert numpy.array_equal(run(found), run(before))


def test_padding_is_the_zero_point() -> None:
    assert (run(after(model("m = Pad(d, pads)")))[:, [0, -1]] == 0).all()


def test_slices_along_one_axis_stay_two() -> None:
    again = "m = Slice(a, zero, end, two, step)"
    before = model(ROWS, again)
    assert short(after(before)) == ["Q", "Slice", "Slice", "D"] and numpy.array_equal(run(after(before)), run(before))


@pytest.mark.parametrize(
    "lines",
    [
        ("m = Pad(d, pads, value)",),
        ("m = Pad<mode = 'edge'>(d, pads)".replace("'", '"'),),
        (ROWS, "e = Pad(a, pads)", "g = Pad(a, pads)", "m = Add(e, g)"),
    ],
)
def test_other_moves_stay(lines: tuple[str, ...]) -> None:
    before = model(*lines)
    assert short(after(before)) == short(before)


def test_another_scale_needs_the_conversion() -> None:
    before = model("m = Pad(d, pads)")
    before.graph.node[1].input[1] = before.graph.node[0].input[1] = "s2"
    assert short(after(before)) == short(before)


def test_a_move_that_something_else_reads_stays() -> None:
    before = model("m = Pad(d, pads)")
    before.graph.output.append(onnx.helper.make_tensor_value_info("m", onnx.TensorProto.FLOAT, [2, 6, 8, 8]))
    found = after(before)
    assert short(found) == short(before)
    assert numpy.array_equal(run(found), run(before))


@pytest.mark.parametrize("keeps", [0, 1])
def test_a_mean_between_conversions_is_a_pool_of_integers(keeps: int, tmp_path: Path) -> None:
    before = model(f"m = ReduceMean<keepdims = {keeps}>(d, axes)")
    found = after(before)
    assert short(found) == ["Q", "D", "GlobalAveragePool", "Q", *["Flatten"] * (not keeps), "D"]
    assert run(found).shape == run(before).shape
    assert numpy.abs(run(found) - run(before)).max() <= 0.0501  # a step, where the mean lies in the middle of two
    assert "QLinearGlobalAveragePool" in optimised(found, tmp_path)


@pytest.mark.parametrize("line", ["m = ReduceMean(d, two)", "m = ReduceMean(d, three)"])
def test_other_means_stay(line: str) -> None:
    before = model(line)
    assert short(after(before)) == short(before)


class Shortcut(nn.Module):
    """A block with a strided shortcut, padded with channels of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (self.one(x) + nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))).relu()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("portable", [False, True])
def test_a_padded_shortcut_has_the_scale_of_what_it_is_made_of(portable: bool) -> None:
    torch.manual_seed(0)
    net, data = Shortcut().eval(), [torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))]
    plan = fz.Plan([fz.Input("x", ("batch", 3, 8, 8))], [fz.Quantize()], ["onnx"], portable=portable)
    artifact = fz.compile(net, plan, calibration=data)
    found = onnx.load(artifact.folder / "onnx" / "model.onnx")
    (pad,) = [node for node in found.graph.node if node.op_type == "Pad"]
    reads = [node.op_type for node in found.graph.node if pad.output[0] in node.input]
    assert reads == (["QuantizeLinear"] if portable else ["DequantizeLinear"])
    assert ("ReduceMean" in short(found)) == portable
    want = net(data[0]).detach()
    assert float((artifact(data[0]) - want).norm() / want.norm()) < 0.03
