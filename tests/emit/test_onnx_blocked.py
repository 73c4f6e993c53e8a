"""What keeps blocks of channels between convolutions: gates, shortcuts and means, changed and left as they are."""

from __future__ import annotations

from pathlib import Path

import numpy
import onnx
import pytest
import torch
from onnx_text import Array, changed, kinds, optimised, parsed, result
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.emit.onnx_blocked import stay_blocked

C = 16


def model(*lines: str, given: dict[str, Array] | None = None, channels: int = C) -> onnx.ModelProto:
    """x [N, 3, 8, 8] → convolution h [N, channels, 8, 8] → the lines → y."""
    rng = numpy.random.default_rng(0)
    stored = {"w": rng.standard_normal((channels, 3, 1, 1)), "b": rng.standard_normal(channels), **(given or {})}
    return parsed(
        f"net (float[N, 3, 8, 8] x) => (float[] y) {{ h = Conv(x, w, b) {' '.join(lines)} }}",
        {name: value.astype("float32") if value.dtype == numpy.float64 else value for name, value in stored.items()},
    )


def after(before: onnx.ModelProto) -> onnx.ModelProto:
    return changed(before, stay_blocked)


def run(found: onnx.ModelProto, x: Array | None = None) -> Array:
    drawn = numpy.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype("float32")
    return result(found, x=drawn if x is None else x)


GATE = ("open = Greater(h, t)", "y = Where(open, h, zero)")
ZERO = numpy.zeros((), "float32")


def thresholds(channels: int = C) -> Array:
    return numpy.random.default_rng(2).standard_normal((1, channels, 1, 1)).astype("float32")


@pytest.mark.parametrize("channels", [16, 20])
def test_a_gate_gives_the_same_bits(channels: int) -> None:
    before = model(*GATE, given={"t": thresholds(channels), "zero": ZERO}, channels=channels)
    found = after(before)
    assert kinds(found) == ["Conv", "Conv", "HardSigmoid", "Mul"]
    assert numpy.array_equal(run(found), run(before))
    assert 0.2 < (run(found) == 0).mean() < 0.8


def test_a_gate_is_shut_at_its_threshold_and_open_right_above() -> None:
    """h is x's first channel; thresholds are values of it, and the next numbers below and above."""
    weight = numpy.zeros((C, 3, 1, 1), "float32")
    weight[:, 0] = 1
    levels = numpy.array([1.0, -1.0, 1e-3, -1e-3, 1e3, -1e3, 1e-30, 0.0] * 2, "float32")
    for towards in (0, -numpy.inf, numpy.inf):
        t = levels if towards == 0 else numpy.nextafter(levels, numpy.float32(towards))
        before = model(*GATE, given={"t": t.reshape(1, C, 1, 1), "zero": ZERO, "w": weight, "b": numpy.zeros(C)})
        x = numpy.zeros((1, 3, 8, 8), "float32")
        x[0, 0].flat[: len(levels)] = levels
        assert numpy.array_equal(run(after(before), x), run(before, x))


@pytest.mark.parametrize("level", [numpy.inf, -numpy.inf, 0.0, 1e-37, -1e-37])
def test_gates_that_are_always_open_or_shut(level: float) -> None:
    before = model(*GATE, given={"t": numpy.full((C, 1, 1), level, "float32"), "zero": ZERO})
    found = after(before)
    assert "Where" not in kinds(found) and numpy.array_equal(run(found), run(before))


def test_one_threshold_for_all_channels() -> None:
    before = model(*GATE, given={"t": numpy.array(0.25, "float32"), "zero": ZERO})
    assert "Where" not in kinds(after(before)) and numpy.array_equal(run(after(before)), run(before))


def test_a_relu_behind_a_gate_goes_into_the_thresholds() -> None:
    before = model(GATE[0], "g = Where(open, h, zero)", "y = Relu(g)", given={"t": thresholds(), "zero": ZERO})
    found = after(before)
    assert kinds(found) == ["Conv", "Conv", "HardSigmoid", "Mul"] and numpy.array_equal(run(found), run(before))


def test_a_gate_that_something_else_reads_keeps_its_relu() -> None:
    lines = (GATE[0], "g = Where(open, h, zero)", "r = Relu(g)", "y = Add(g, r)")
    before = model(*lines, given={"t": thresholds(), "zero": ZERO})
    found = after(before)
    assert kinds(found)[-2:] == ["Relu", "Add"] and numpy.array_equal(run(found), run(before))


def test_a_gate_of_another_value_keeps_its_relu() -> None:
    """A ReLU of v is no threshold of u."""
    lines = ("v = Sigmoid(h)", GATE[0], "g = Where(open, v, zero)", "y = Relu(g)")
    before = model(*lines, given={"t": thresholds(), "zero": ZERO})
    found = after(before)
    assert kinds(found)[-2:] == ["Mul", "Relu"] and numpy.array_equal(run(found), run(before))


def test_a_mask_that_something_else_reads_stays() -> None:
    lines = (*GATE[:1], "g = Where(open, h, zero)", "m = Cast<to = 1>(open)", "y = Add(g, m)")
    before = model(*lines, given={"t": thresholds(), "zero": ZERO})
    found = after(before)
    assert "Greater" in kinds(found) and "Where" not in kinds(found) and numpy.array_equal(run(found), run(before))


@pytest.mark.parametrize(
    ("lines", "given", "channels"),
    [
        (GATE, {"t": thresholds(), "zero": numpy.ones((), "float32")}, C),  # not 0 where it is shut
        (GATE, {"t": numpy.zeros((8, 8)), "zero": ZERO}, C),  # a threshold per pixel
        (GATE, {"t": thresholds(18), "zero": ZERO}, 18),  # no multiple of 4
        (GATE, {"t": thresholds(12), "zero": ZERO}, 12),  # less than a block
        (("open = Less(h, t)", GATE[1]), {"t": thresholds(), "zero": ZERO}, C),
        (("e = Exp(h)", "open = Greater(e, t)", "y = Where(open, e, zero)"), {"t": thresholds(), "zero": ZERO}, C),
    ],
)  # fmt: skip
def test_other_gates_stay(lines: tuple[str, ...], given: dict[str, Array], channels: int) -> None:
    before = model(*lines, given=given, channels=channels)
    assert kinds(after(before)) == kinds(before)


def test_a_gate_behind_a_convolution_in_groups_stays() -> None:
    lines = ("k = Conv<group = 2>(h, w2)", "open = Greater(k, t)", "y = Where(open, k, zero)")
    before = model(*lines, given={"t": thresholds(), "zero": ZERO, "w2": numpy.ones((C, C // 2, 1, 1))})
    assert kinds(after(before)) == kinds(before)


def test_gates_between_convolutions_leave_no_copies(tmp_path: Path) -> None:
    lines = (GATE[0], "g = Where(open, h, zero)", "r = Relu(g)", "y = Conv(r, w2)")
    before = model(*lines, given={"t": thresholds(), "zero": ZERO, "w2": numpy.ones((C, C, 3, 3))})
    assert optimised(before, tmp_path).count("ReorderInput") == 1
    assert optimised(after(before), tmp_path) == ["Conv", "Conv", "Mul", "Conv", "ReorderOutput"]


# ---- shortcuts

ROUNDINGS = 2e-5
"""Two or three of float32 at the largest results, 84; a wrong pixel or channel makes a difference of about 1."""

SLICES = ("s = Slice(h, zero1, end, two, step)", "u = Slice(s, zero1, end, three, step)")
PADDED = ("p = Pad(u, pads)", "c = Conv<strides = [2, 2], pads = [1, 1, 1, 1]>(h, w2)", "y = Add(c, p)")


def sliced(**given: Array) -> dict[str, Array]:
    numbers = {"zero1": [0], "end": [7], "two": [2], "three": [3], "step": [2], "pads": [0, 8, 0, 0, 0, 8, 0, 0]}
    arrays = {name: numpy.array(value, "int64") for name, value in numbers.items()}
    return arrays | {"w2": numpy.random.default_rng(3).standard_normal((2 * C, C, 3, 3))} | given


@pytest.mark.parametrize("end", [7, 8, 2**63 - 1])
def test_a_strided_shortcut_is_a_convolution(end: int, tmp_path: Path) -> None:
    before = model(*SLICES, *PADDED, given=sliced(end=numpy.array([end])))
    found = after(before)
    assert kinds(found) == ["Conv", "Conv", "Conv", "Add"]
    assert numpy.allclose(run(found), run(before), rtol=0, atol=ROUNDINGS)
    assert optimised(found, tmp_path) == ["Conv", "Conv", "Conv", "ReorderOutput"]


def test_channels_in_front_and_behind_need_not_be_as_many() -> None:
    before = model(*SLICES, *PADDED, given=sliced(pads=numpy.array([0, 4, 0, 0, 0, 12, 0, 0])))
    found = after(before)
    assert "Pad" not in kinds(found) and numpy.allclose(run(found), run(before), rtol=0, atol=ROUNDINGS)


@pytest.mark.parametrize(
    "given",
    [
        {"zero1": numpy.array([1]), "end": numpy.array([8])},  # not from the first pixel
        {"end": numpy.array([6]), "w2": numpy.ones((2 * C, C, 5, 5))},  # not up to the last
        {"pads": numpy.array([0, 8, 1, 1, 0, 8, 0, 0]), "w2": numpy.ones((2 * C, C, 2, 2))},  # pixels, too
        {"w2": numpy.ones((2 * C, C, 1, 1))},  # as dear as the layer that it is added to
    ],
)
def test_other_shortcuts_stay(given: dict[str, Array]) -> None:
    shape = given["w2"].shape[-1] if "w2" in given else 3
    around = {5: "[1, 1, 1, 1]", 2: "[1, 1, 1, 1]", 1: "[0, 0, 0, 0]", 3: "[1, 1, 1, 1]"}[shape]
    lines = (*SLICES, PADDED[0], PADDED[1].replace("[1, 1, 1, 1]", around), PADDED[2])
    before = model(*lines, given=sliced(**given))
    assert run(before).shape[1] == 2 * C
    assert kinds(after(before)) == kinds(before)


def test_a_shortcut_padded_with_something_else_stays() -> None:
    lines = (*SLICES, "p = Pad(u, pads, one)", *PADDED[1:])
    before = model(*lines, given=sliced(one=numpy.ones((), "float32")))
    assert "Pad" in kinds(after(before))


# ---- means


@pytest.mark.parametrize(("keeps", "kept"), [(0, ["GlobalAveragePool", "Flatten"]), (1, ["GlobalAveragePool"])])
@pytest.mark.parametrize("axes", [[2, 3], [-1, -2]])
def test_a_mean_over_pixels_is_a_pool(keeps: int, kept: list[str], axes: list[int]) -> None:
    """Results are up to 1.8, and 64 values may be added up in another order."""
    before = model(f"y = ReduceMean<keepdims = {keeps}>(h, axes)", given={"axes": numpy.array(axes, "int64")})
    found = after(before)
    assert kinds(found) == ["Conv", *kept]
    assert run(found).shape == run(before).shape and numpy.allclose(run(found), run(before), rtol=0, atol=1e-6)


def test_a_mean_over_channels_stays() -> None:
    before = model("y = ReduceMean<keepdims = 0>(h, axes)", given={"axes": numpy.array([1, 2], "int64")})
    assert kinds(after(before)) == kinds(before)


# ---- in a plan


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, C, 3), nn.Conv2d(C, C, 3), nn.Linear(C, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("portable", [False, True])
def test_portable_files_have_the_plain_form(portable: bool) -> None:
    torch.manual_seed(0)
    net, plan = Gated().eval(), [fz.Gate(at="one", on="output", threshold=0.1)]
    inputs = [fz.Input("x", ("batch", 3, 12, 12))]
    artifact = fz.compile(net, fz.Plan(inputs, plan, ["onnx"], portable=portable))
    found = kinds(onnx.load(artifact.folder / "onnx" / "model.onnx"))
    assert ("Where" in found) == ("ReduceMean" in found) == portable
    assert ("HardSigmoid" in found) == ("GlobalAveragePool" in found) != portable
