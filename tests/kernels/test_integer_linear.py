"""fxfreeze::integer_linear: the reference against Python's integers, its Triton kernel against the reference."""

from __future__ import annotations

import importlib.util
import itertools
import random
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxfreeze.kernels.integer_linear import KERNEL, MAX_INPUTS, reference

FORMS = {"reference": reference, "op": KERNEL.op}
INPUTS = {"uint8": torch.uint8, "int8": torch.int8}
ZEROS = [("uint8", 0), ("uint8", 255), ("uint8", 128), ("uint8", 3), ("int8", -128), ("int8", 127), ("int8", 0)]


def draw(
    *shape: int, inputs: int = 19, out: int = 7, kind: str = "uint8", zero: int = 3, scales: int | None = None
) -> dict[str, Tensor]:
    """Integers of all values, and scales such that nothing but the sums can round."""
    generator = torch.Generator().manual_seed(0)
    bounds = torch.iinfo(INPUTS[kind])
    x = torch.randint(bounds.min, bounds.max + 1, (*shape, inputs), generator=generator).to(INPUTS[kind])
    weight = torch.randint(-128, 128, (out, inputs), generator=generator).to(torch.int8)
    powers = torch.tensor([0.25, 0.5, 1.0, 2.0])
    return {
        "x": x, "x_scale": torch.tensor(0.5), "zero_point": torch.tensor(zero, dtype=x.dtype), "weight": weight,
        "scale": powers[torch.randint(4, (scales or out,), generator=generator)],
    }  # fmt: skip


def by_hand(given: dict[str, Tensor]) -> Tensor:
    """In Python's integers and fractions, rounded once."""
    zero, scale = int(given["zero_point"]), given["scale"].tolist()
    x, weight = given["x"].reshape(-1, given["x"].shape[-1]).tolist(), given["weight"].tolist()
    scale = scale * len(weight) if len(scale) == 1 else scale
    bias = given["bias"].tolist() if "bias" in given else [0.0] * len(weight)
    found = [
        float(
            Fraction(given["x_scale"].item()) * Fraction(scale[n]) * sum((a - zero) * w for a, w in zip(row, weight[n]))
            + Fraction(bias[n])
        )
        for row in x
        for n in range(len(weight))
    ]
    want = torch.tensor(found, dtype=torch.float64).to(given["x_scale"].dtype)
    return want.reshape(*given["x"].shape[:-1], len(weight))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("kind", "zero"), ZEROS)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (0,)], ids=str)
def test_sums_are_exact(form: str, kind: str, zero: int, shape: tuple[int, ...]) -> None:
    given = draw(*shape, kind=kind, zero=zero)
    assert torch.equal(FORMS[form](**given), by_hand(given))
    given = draw(*shape, kind=kind, zero=zero, scales=1)
    given |= {"bias": torch.arange(7.0), "weight_sum": given["weight"].sum(1, dtype=torch.int32)}
    assert torch.equal(FORMS[form](**given), by_hand(given))


def test_scales_of_any_value_round_once() -> None:
    given = draw(9, inputs=300, out=11)
    random.seed(0)
    for name, count in (("x_scale", None), ("scale", 11), ("bias", 11)):
        drawn = torch.tensor([random.uniform(0.01, 1) for _ in range(count or 1)])
        given[name] = drawn if count else drawn[0]
    found, want = KERNEL.op(**given), by_hand(given)
    assert float(((found - want) / want).abs().max()) <= torch.finfo(torch.float32).eps
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in given.items()}
    assert torch.equal(KERNEL.op(**half), by_hand(half))


def extremes(inputs: int, x: int, zero: int, weight: int, kind: str = "uint8") -> dict[str, Tensor]:
    """One sum, of the same term over and over."""
    return {
        "x": torch.full((1, inputs), x, dtype=INPUTS[kind]), "x_scale": torch.tensor(1.0, dtype=torch.float64),
        "zero_point": torch.tensor(zero, dtype=INPUTS[kind]), "weight": torch.full((1, inputs), weight).to(torch.int8),
        "scale": torch.ones(1, dtype=torch.float64),
    }  # fmt: skip


@pytest.mark.parametrize(("x", "zero"), [(255, 0), (0, 255), (255, 255)])
@pytest.mark.parametrize("weight", [-128, 127])
def test_the_largest_sums(x: int, zero: int, weight: int) -> None:
    found = KERNEL.op(**extremes(MAX_INPUTS, x, zero, weight))
    assert found.item() == (x - zero) * weight * MAX_INPUTS
    assert abs(255 * 128 * MAX_INPUTS) < 2**31 <= 255 * 128 * (MAX_INPUTS + 1)


def test_it_exports_with_a_dynamic_batch() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in draw(2).items():
                if name != "x":
                    self.register_buffer(name, value)

        def forward(self, x: Tensor) -> Tensor:
            return KERNEL.op(x, **dict(self.named_buffers()))

    layer, x = Layer(), draw(4)["x"]
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    for rows in (2, 7):
        x = draw(rows)["x"]
        assert torch.equal(exported.module()(x), layer(x))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.ones(2, 19)}, "x is torch.float32"),
        ({"x": torch.tensor(1, dtype=torch.uint8)}, r"x is torch.uint8 of shape \[\]"),
        ({"x": torch.ones(2, 0, dtype=torch.uint8)}, r"not uint8 or int8 of \[..., 1 to 65793\]"),
        ({"x": torch.ones(1, 65794, dtype=torch.uint8)}, r"shape \[1, 65794\]"),
        ({"x_scale": torch.ones(1)}, r"x_scale is torch.float32 of shape \[1\], not floating 0-d"),
        ({"x_scale": torch.tensor(1)}, "x_scale is torch.int64"),
        ({"zero_point": torch.tensor(3, dtype=torch.int8)}, r"zero_point is torch.int8 of shape \[\], not torch.uint8"),
        ({"zero_point": torch.ones(1, dtype=torch.uint8)}, r"zero_point is torch.uint8 of shape \[1\]"),
        ({"weight": torch.ones(7, dtype=torch.int8)}, r"weight is of shape \[7\], not \[out, in = 19\]"),
        ({"weight": torch.ones(7, 19, dtype=torch.uint8)}, "weight is torch.uint8"),
        ({"weight": torch.ones(7, 18, dtype=torch.int8)}, r"weight is torch.int8 of shape \[7, 18\]"),
        ({"scale": torch.ones(6)}, r"scale is torch.float32 of shape \[6\], not torch.float32 of \[7\] or \[1\]"),
        ({"scale": torch.ones(7).half()}, "scale is torch.float16"),
        ({"bias": torch.ones(1)}, r"bias is torch.float32 of shape \[1\]"),
        ({"bias": torch.ones(7).double()}, "bias is torch.float64"),
        ({"weight_sum": torch.ones(7)}, "weight_sum is torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Tensor], says: str) -> None:
    for form in (KERNEL.reference, KERNEL.op, KERNEL.fake, KERNEL.launch):
        with pytest.raises(ValueError, match=says):
            form(**{**draw(2), **change})


def test_what_the_launcher_leaves_to_the_reference() -> None:
    given = draw(2)
    assert KERNEL.supports(**given)
    assert not KERNEL.supports(**{**given, "weight": given["weight"][:0], "scale": given["scale"][:0]})
    assert not KERNEL.supports(**{**given, "weight": given["weight"].to("meta")})
    assert not KERNEL.supports(**{**given, "x_scale": given["x_scale"].double(), "scale": given["scale"].double()})


# ---- GPU

triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def launched(device: str, given: dict[str, Tensor]) -> Tensor:
    on = {name: value.to(device) for name, value in given.items()}
    assert KERNEL.supports(**on)
    return KERNEL.launch(**on).cpu()


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "zero"), ZEROS)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 70), (0,)], ids=str)
def test_launch(device: str, kind: str, zero: int, shape: tuple[int, ...]) -> None:
    """In every bit: powers of two scale sums that float32 holds."""
    given = draw(*shape, inputs=100, kind=kind, zero=zero)
    assert torch.equal(launched(device, given), reference(**given))
    given = draw(*shape, inputs=256, kind=kind, zero=zero, scales=1)
    given |= {"bias": torch.arange(7.0), "weight_sum": given["weight"].sum(1, dtype=torch.int32)}
    assert torch.equal(launched(device, given), reference(**given))


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "inputs", "out"), list(itertools.product([1, 17, 131], [1, 16, 129, 300], [1, 130])))
def test_launch_of_odd_sizes(device: str, rows: int, inputs: int, out: int) -> None:
    given = draw(rows, inputs=inputs, out=out, zero=200)
    assert torch.equal(launched(device, given), reference(**given))


@pytest.mark.gpu
def test_launch_of_more_tiles_than_a_group_has(device: str) -> None:
    given = draw(1100, inputs=20, out=260)
    assert torch.equal(launched(device, given), reference(**given))


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "x", "zero"), [("uint8", 255, 0), ("uint8", 0, 255), ("int8", -128, 127),
                                                 ("int8", 127, -128)])  # fmt: skip
@pytest.mark.parametrize("weight", [-128, 127])
def test_launch_of_the_largest_sums(device: str, kind: str, x: int, zero: int, weight: int) -> None:
    """Of as many as 32 bits hold; then one rounding to float32."""
    given = extremes(MAX_INPUTS, x, zero, weight, kind)
    given |= {name: given[name].float() for name in ("x_scale", "scale")}
    want = torch.tensor((x - zero) * weight * MAX_INPUTS, dtype=torch.float64).float()
    assert torch.equal(launched(device, given)[0, 0], want)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_launch_of_scales_of_any_value(device: str, dtype: torch.dtype) -> None:
    given = draw(9, inputs=300, out=33) | {"x_scale": torch.tensor(0.0123)}
    generator = torch.Generator().manual_seed(1)
    given |= {"scale": torch.rand(33, generator=generator) / 10, "bias": torch.randn(33, generator=generator)}
    given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in given.items()}
    found = launched(device, given)
    wide = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    want = reference(**wide)
    # Three roundings of float32, and the one of the result; the interpreter cuts bfloat16 off, which is up to 1 unit.
    size = reference(**{**wide, "bias": torch.zeros(33).double()}).abs() + given["bias"].double().abs()
    limit = 2 * torch.finfo(torch.float32).eps * size
    limit = limit + (torch.finfo(dtype).eps * want.abs() if dtype != torch.float32 else 0)
    assert found.dtype == dtype and ((found.double() - want).abs() <= limit).all()


@pytest.mark.gpu
def test_launch_of_any_strides(device: str) -> None:
    given = draw(5, inputs=40) | {"bias": torch.arange(7.0)}
    given["weight_sum"] = given["weight"].sum(1, dtype=torch.int32)
    strided = {name: torch.stack([value, value], -1)[..., 0] if value.dim() else value for name, value in given.items()}
    assert torch.equal(launched(device, strided), reference(**given))


@pytest.mark.gpu
def test_launch_takes_the_sums_of_the_weight_that_are_given(device: str) -> None:
    given = draw(3, kind="int8", zero=1, scales=1)
    total = given["weight"].sum(1, dtype=torch.int32)
    moved = launched(device, given | {"weight_sum": total - 8})
    assert torch.equal(moved, reference(**given) + 8 * given["x_scale"] * given["scale"])


@pytest.mark.slow
@triton
def test_in_the_interpreter(interpreter: Any) -> None:
    assert interpreter(__file__) > 70


# ---- compiling


TYPES = {
    **dict.fromkeys(("x_scale_ptr", "scale_ptr", "bias_ptr", "y_ptr"), "*bf16"), "w_ptr": "*i8", "total_ptr": "*i32",
}  # fmt: skip


@triton
def test_sizes_of_one(cost: Any) -> None:
    """Triton makes constants of integers that are 1."""
    from fxfreeze.kernels import _integer_linear_triton as file

    types = {**TYPES, "x_ptr": "*u8", "zero_ptr": "*u8"}
    constants = {**dict.fromkeys("MNK", 1), "SHIFT": True, "ONE_SCALE": True, "EVEN": False}
    constants |= {"BM": 16, "BN": 32, "BK": 256, "GROUP": 8}
    assert cost(file.integer_linear_kernel, types, constants).spills == 0


@pytest.mark.slow
@triton
@pytest.mark.parametrize(
    ("tile", "kind", "even"),
    [((128, 128, 128), "u8", True), ((128, 128, 64), "u8", True), ((128, 256, 128), "i8", True),
     ((64, 128, 128), "u8", False), ((16, 64, 256), "u8", True), ((16, 32, 256), "i8", True)],
    ids=str,
)  # fmt: skip
def test_within_budget(within_budget: Any, tile: tuple[int, ...], kind: str, even: bool) -> None:
    from fxfreeze.kernels import _integer_linear_triton as file

    config = next(c for c in file.CONFIGS if (c["BM"], c["BN"], c["BK"]) == tile)
    types = {**TYPES, **dict.fromkeys(("x_ptr", "zero_ptr"), f"*{kind}"), **dict.fromkeys("MNK", "i32")}
    constants = {"SHIFT": kind == "u8", "ONE_SCALE": False, "EVEN": even, **dict(list(config.items())[:4])}
    options = {name: value for name, value in config.items() if name not in constants}
    name = f"integer_linear {kind} {'x'.join(map(str, tile))}{'' if even else ' odd'}"
    within_budget(name, file.integer_linear_kernel, types, constants, **options)
