"""fxfreeze::quantize_float8 and float8_linear: the grid of float8_e4m3fn by its definition, and torch._scaled_mm."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxfreeze.kernels import float8_linear
from fxfreeze.kernels.float8_linear import KERNEL as LINEAR
from fxfreeze.kernels.quantize_float8 import KERNEL as QUANTIZE
from fxfreeze.kernels.quantize_float8 import to_jump

FLOAT8 = torch.float8_e4m3fn
NUMBERS = [
    sign * number
    for sign in (-1, 1)
    for number in [
        *(i * 2.0**-9 for i in range(8)),
        *((1 + i / 8) * 2.0**e for e in range(-6, 9) for i in range(8) if e < 8 or i < 7),
    ]
]
"""Three bits of fraction, exponents from -6 to 8, subnormal numbers below; the last code of the last is NaN."""


def nearest(value: float) -> float:
    """Half to even: of two that are as near, the one whose fraction ends in 0."""
    best = min(abs(value - number) for number in NUMBERS)
    found = {number for number in NUMBERS if abs(value - number) == best}
    return next((number for number in found if is_even(number)), next(iter(found)))


def is_even(number: float) -> bool:
    size = abs(number)
    step = 2.0 ** (max(math.floor(math.log2(size)), -6) - 3) if size else 1.0
    return size / step % 2 == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_it_is_the_nearest_number(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(200, generator=generator) * 10.0**power for power in range(-4, 3)]).to(dtype)
    x = torch.cat([x, torch.tensor([1.0625, 1.1875, 2.0**-10, 3 * 2.0**-10, 15.5, 0.0, 440.0, -455.0]).to(dtype)])
    found = QUANTIZE.op(x, torch.ones((), dtype=torch.promote_types(dtype, torch.float32)))
    assert found.dtype == FLOAT8
    assert found.double().tolist() == [nearest(value) for value in x.double().tolist()]


def test_numbers_of_the_grid_stay() -> None:
    scale = torch.tensor(0.25)
    every = torch.tensor(NUMBERS)
    assert torch.equal(QUANTIZE.op(every * scale, scale).float(), every)
    assert len(set(NUMBERS)) == 253 and set(NUMBERS) == {
        value for value in torch.arange(256, dtype=torch.uint8).view(FLOAT8).double().tolist() if value == value
    }


def test_the_error_of_a_round_trip_is_a_sixteenth_at_most() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([10.0**power * torch.randn(1000, generator=generator) for power in range(-6, 1)])
    scale = x.abs().amax() / 448
    error = (QUANTIZE.op(x, scale).float() * scale - x).abs()
    normal = x.abs() > 2.0**-6 * scale
    assert float((error / x.abs())[normal].max()) <= 1 / 16 * 1.0001 and float(error[~normal].max()) < 2.0**-9 * scale


def test_beyond_448_it_saturates_and_nan_stays() -> None:
    x = torch.tensor([448.0, 449.0, 464.0, 480.0, 1e9, math.inf, -460.0, -math.inf, math.nan])
    found = QUANTIZE.op(x, torch.ones(())).float()
    assert found[:-1].tolist() == [448.0] * 6 + [-448.0] * 2 and bool(found[-1].isnan())


def test_a_scale_per_row() -> None:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    scale = x.abs().amax(-1, keepdim=True) / 448
    found = QUANTIZE.op(x, scale)
    assert torch.equal(found.float().abs().amax(-1), torch.full((2, 3), 448.0))
    assert torch.equal(found[1, 2].float(), QUANTIZE.op(x[1, 2], scale[1, 2, 0]).float())


def test_how_far_it_is_to_a_jump() -> None:
    steps = torch.tensor([1.0, 1.0625, -1.06, 1.1, 0.0, 440.0, 1000.0, 2.0**-10])
    want = [0.03125, 0.0, 0.0025, 0.0375, 2.0**-10, 8.0, 568.0, 0.0]
    torch.testing.assert_close(to_jump(steps), torch.tensor(want), rtol=1e-4, atol=1e-9)
    # Below 2 numbers are half as far from each other as above.
    assert to_jump(torch.tensor([1.9])).item() == pytest.approx(0.0375, abs=1e-6)
    assert to_jump(torch.tensor([2.1])).item() == pytest.approx(0.025, abs=1e-6)


# ---- the layer


def draw(*shape: int, inputs: int = 32, out: int = 48, dtype: torch.dtype = torch.float32, rows: bool = False) -> Any:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, inputs, generator=generator)
    weight = torch.randn(out, inputs, generator=generator)
    x_scale = x.abs().amax(-1, keepdim=True) / 448 if rows else torch.tensor(0.01)
    scale = weight.abs().amax(1) / 448
    return {
        "x": QUANTIZE.op(x, x_scale), "x_scale": x_scale, "weight": QUANTIZE.op(weight, scale.unsqueeze(1)),
        "scale": scale, "bias": torch.randn(out, generator=generator).to(dtype), "dtype": dtype,
    }  # fmt: skip


def exact(given: dict[str, Any]) -> Tensor:
    x, weight = (given[name].double() * given[f"{part}scale"].double().reshape(shape) for name, part, shape in (
        ("x", "x_", given["x_scale"].shape), ("weight", "", (-1, 1))
    ))  # fmt: skip
    return x @ weight.T + given["bias"].double()


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("form", ["reference", "op", "launch"])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5,), (2, 3), (1,), ()], ids=str)
def test_it_is_the_product_of_what_the_numbers_stand_for(
    form: str, rows: bool, dtype: torch.dtype, shape: tuple[int, ...], scaled_rows: None
) -> None:
    """`launch` takes CPUs, too, where torch._scaled_mm is slow, and says what it is to compute on a GPU."""
    given = draw(*shape, dtype=dtype, rows=rows)
    found, want = getattr(LINEAR, form)(**given), exact(given)
    assert found.dtype == dtype and found.shape == want.shape
    # Sums of a few roundings of float32, and one of the result; with a bias of bfloat16 perhaps one before it.
    limit = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
    assert float((found.double() - want).abs().max() / want.abs().max()) <= limit


def test_without_a_bias_and_in_float64() -> None:
    given = draw(3)
    bias = given.pop("bias")
    for form in (LINEAR.op, LINEAR.launch):
        torch.testing.assert_close(form(**given) + bias, LINEAR.op(**given, bias=bias))
    wide = {name: value.double() for name, value in given.items() if name != "dtype"}
    found = LINEAR.op(**wide, dtype=torch.float64)
    torch.testing.assert_close(found, exact(given | {"bias": torch.zeros(48)}), rtol=1e-12, atol=1e-12)


def test_no_rows_and_any_dims_export() -> None:
    given = draw(0, rows=True)
    assert LINEAR.op(**given).shape == LINEAR.launch(**given).shape == (0, 48)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("x_scale", "weight", "scale", "bias"):
                self.register_buffer(name, draw(2)[name])

        def forward(self, x: Tensor) -> Tensor:
            q = QUANTIZE.op(x, self.x_scale)
            return LINEAR.op(q, self.x_scale, self.weight, self.scale, self.bias, dtype=torch.float32)

    layer, x = Layer(), torch.randn(4, 32)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    for rows in (2, 7):
        x = torch.randn(rows, 32)
        assert torch.equal(exported.module()(x), layer(x))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.ones(2, 32)}, "x is torch.float32"),
        ({"x": torch.tensor(1.0).to(FLOAT8)}, r"x is torch.float8_e4m3fn of shape \[\]"),
        ({"x_scale": torch.ones(2)}, r"x_scale is torch.float32 of shape \[2\], not torch.float32 of \[\] or \[2, 1\]"),
        ({"x_scale": torch.ones(()).double()}, "x_scale is torch.float64"),
        ({"weight": torch.ones(48).to(FLOAT8)}, r"weight is of shape \[48\], not \[out, in = 32\]"),
        ({"weight": torch.ones(48, 31).to(FLOAT8)}, r"weight is torch.float8_e4m3fn of shape \[48, 31\]"),
        ({"weight": torch.ones(48, 32)}, "weight is torch.float32"),
        ({"scale": torch.ones(1)}, r"scale is torch.float32 of shape \[1\], not torch.float32 of \[48\]"),
        ({"bias": torch.ones(48).half()}, "bias is torch.float16"),
        ({"dtype": torch.int32}, "dtype torch.int32 is not a floating one"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], says: str) -> None:
    for form in (LINEAR.reference, LINEAR.op, LINEAR.fake, LINEAR.launch):
        with pytest.raises(ValueError, match=says):
            form(**{**draw(2), **change})


@pytest.mark.parametrize(
    ("x", "scale", "says"),
    [
        (torch.ones(2, dtype=torch.int32), torch.ones(()), "x is torch.int32"),
        (torch.tensor(1.0), torch.ones(()), r"of shape \[\]"),
        (
            torch.ones(2, 3),
            torch.ones(2),
            r"scale is torch.float32 of shape \[2\], not torch.float32 of \[\] or \[2, 1\]",
        ),
        (torch.ones(2, 3).half(), torch.ones(()).half(), "scale is torch.float16 .* not torch.float32"),
    ],
)
def test_scales_that_do_not_fit_are_refused(x: Tensor, scale: Tensor, says: str) -> None:
    for form in (QUANTIZE.reference, QUANTIZE.op, QUANTIZE.fake):
        with pytest.raises(ValueError, match=says):
            form(x, scale)


def test_opcheck() -> None:
    given = draw(3)
    # Of float8 torch has too few operators for the others.
    tests = ("test_faketensor", "test_autograd_registration")
    torch.library.opcheck(LINEAR.op, tuple(given.values())[:-1], {"dtype": torch.float32}, test_utils=tests)
    torch.library.opcheck(QUANTIZE.op, (torch.randn(3, 4), torch.ones(())), test_utils=tests)


def test_what_the_launcher_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    given = draw(3)
    assert not LINEAR.supports(**given)  # a CPU
    monkeypatch.setattr(float8_linear, "has_kernel", lambda device: True)
    assert LINEAR.supports(**given)
    for change in ({"inputs": 24}, {"out": 40}, {"out": 0}):
        assert not LINEAR.supports(**draw(3, **change))
    assert not LINEAR.supports(**{**given, "dtype": torch.float64})
    assert not LINEAR.supports(**{**given, "weight": given["weight"].to("meta")})


@pytest.mark.parametrize(("capability", "hip", "has"), [
    ((8, 9), None, True), ((9, 0), None, True), ((12, 0), None, True), ((8, 6), None, False), ((9, 4), "6.3", False)
])  # fmt: skip
def test_which_gpus_have_a_kernel(
    capability: tuple[int, int], hip: str | None, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert float8_linear.has_kernel(torch.device("cuda")) is has
    assert not float8_linear.has_kernel(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 17, 256])
def test_on_a_gpu(dtype: torch.dtype, rows: bool, count: int) -> None:
    if not torch.cuda.is_available() or not float8_linear.has_kernel(torch.device("cuda")):
        pytest.skip("no GPU that multiplies float8")
    given = draw(count, inputs=256, out=128, dtype=dtype, rows=rows)
    on = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in given.items()}
    assert LINEAR.supports(**on)
    found, want = LINEAR.op(**on).cpu(), exact(given)
    # Hopper's tensor cores add up with fewer bits than float32 has.
    limit = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-3
    assert float((found.double() - want).abs().max() / want.abs().max()) <= limit
