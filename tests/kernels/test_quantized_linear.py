"""fxfreeze::quantized_linear against a dense product in float64."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import fxfreeze as fz
from fxfreeze.capture import capture
from fxfreeze.emit import aoti
from fxfreeze.kernels._op import OPS
from fxfreeze.kernels.quantized_linear import pack, unpack
from fxfreeze.lower import Lowering
from fxfreeze.serialize import Interface

KERNEL = OPS["quantized_linear"]
FORMS = {"reference": KERNEL.reference, "op": KERNEL.op}


def draw(*shape: int, inputs: int, out: int, groups: int, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, integers up to the very ends of their range, scales and bias."""
    generator = torch.Generator().manual_seed(0)
    limit = 2 ** (bits - 1)
    integers = torch.randint(-limit, limit, (out, inputs), generator=generator).to(torch.int8)
    scale = torch.rand(out, groups, generator=generator) + 0.1
    return torch.randn(*shape, inputs, generator=generator), integers, scale, torch.randn(out, generator=generator)


def agrees(found: Tensor, x: Tensor, integers: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    """Every sum within some roundings of its terms' absolute values."""
    weight = integers.double() * scale.double().repeat_interleave(integers.shape[1] // scale.shape[1], 1)
    offset = None if bias is None else bias.double()
    want = linear(x.double(), weight, offset)
    size = linear(x.double().abs(), weight.abs(), None if offset is None else offset.abs())
    assert found.dtype == x.dtype and found.shape == want.shape
    assert ((found.double() - want).abs() <= 4 * torch.finfo(x.dtype).eps * size).all()


def test_packing_keeps_every_integer() -> None:
    integers = torch.arange(-8, 8, dtype=torch.int8).repeat(2, 8)[:, torch.randperm(128)]
    packed = pack(integers)
    assert packed.shape == (2, 64) and packed.dtype == torch.int8
    assert torch.equal(unpack(packed), integers)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("inputs", "groups"), [(32, 1), (128, 4), (192, 3), (96, 1)])
@pytest.mark.parametrize("shape", [(), (1,), (4,), (7,), (2, 5), (0,)], ids=str)
def test_products(form: str, bits: int, inputs: int, groups: int, shape: tuple[int, ...]) -> None:
    x, integers, scale, bias = draw(*shape, inputs=inputs, out=11, groups=groups, bits=bits)
    weight = integers if bits == 8 else pack(integers)
    agrees(FORMS[form](x, weight, scale, bias), x, integers, scale, bias)
    agrees(FORMS[form](x, weight, scale), x, integers, scale, None)


def test_inputs_that_are_no_whole_chunks_and_float64_run_as_well() -> None:
    x, integers, scale, bias = draw(3, inputs=20, out=5, groups=2, bits=8)
    agrees(KERNEL.op(x, integers, scale, bias), x, integers, scale, bias)
    x, integers, scale, bias = draw(3, inputs=64, out=5, groups=2, bits=8)
    found = KERNEL.op(x.double(), integers, scale.double(), bias.double())
    agrees(found, x.double(), integers, scale, bias)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("inputs", "groups"), [(32, 1), (320, 10), (544, 1), (768, 3)])
@pytest.mark.parametrize("out", [3, 32, 75])
@pytest.mark.parametrize("rows", [9, 12, 15, 29])
def test_many_rows(bits: int, inputs: int, groups: int, out: int, rows: int) -> None:
    """More inputs than a tile is deep, outputs that are no whole tile, and rows that are left over."""
    x, integers, scale, bias = draw(rows, inputs=inputs, out=out, groups=groups, bits=bits)
    weight = integers if bits == 8 else pack(integers)
    agrees(KERNEL.op(x, weight, scale, bias), x, integers, scale, bias)
    agrees(KERNEL.op(x, weight, scale), x, integers, scale, None)


@pytest.mark.parametrize("rows", [(8, 1), (33, 11)], ids=["few", "many"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_does_not_depend_on_its_neighbours(rows: tuple[int, int], bits: int) -> None:
    x, integers, scale, bias = draw(rows[0], inputs=320, out=70, groups=2, bits=bits)
    weight = integers if bits == 8 else pack(integers)
    together = KERNEL.op(x, weight, scale, bias)
    assert torch.equal(together, torch.cat([KERNEL.op(part, weight, scale, bias) for part in x.split(rows[1])]))


@pytest.mark.parametrize("rows", [8, 40])
def test_threads_change_nothing(rows: int) -> None:
    x, integers, scale, bias = draw(rows, inputs=512, out=300, groups=4, bits=4)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(KERNEL.op(x, pack(integers), scale, bias))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 64, dtype=torch.int8)}, "x is torch.int8"),
        ({"weight": torch.ones(3, 64)}, "weight is torch.float32"),
        ({"weight": torch.ones(3, 16, dtype=torch.int8)}, r"weight is torch.int8 of shape \[3, 16\]"),
        ({"scale": torch.ones(3, 5)}, r"scale is torch.float32 of shape \[3, 5\]"),
        ({"scale": torch.ones(3, 2, dtype=torch.float64)}, "scale is torch.float64"),
        ({"bias": torch.ones(4)}, r"bias is torch.float32 of shape \[4\]"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Tensor], message: str) -> None:
    given = {"x": torch.ones(2, 64), "weight": torch.ones(3, 64, dtype=torch.int8), "scale": torch.ones(3, 2)} | change
    for form in (KERNEL.reference, KERNEL.op, KERNEL.fake):
        with pytest.raises(ValueError, match=message):
            form(*given.values())


@pytest.mark.slow
def test_aoti_packages_hold_the_cpp_and_the_integers(tmp_path: Path) -> None:
    eight, four = (draw(3, inputs=64 * 4, out=64 * 4, groups=4, bits=bits)[1:] for bits in (8, 4))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in zip(("w8", "s8", "b8", "w4", "s4"), (*eight, pack(four[0]), four[1]), strict=True):
                self.register_buffer(name, value)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return KERNEL.op(x, self.w8, self.s8, self.b8), KERNEL.op(x, self.w4, self.s4)

    lowering = Lowering(capture(Net(), fz.Plan([fz.Input("x", ("batch", 256))], targets=[]))[0])
    aoti.emit(lowering, tmp_path)
    run = aoti.load(tmp_path, Interface.of(lowering.program))
    for batch in (1, 6, 30):
        x = torch.randn(batch, 256, generator=torch.Generator().manual_seed(batch))
        first, second = run(x)
        agrees(first, x, *eight)
        agrees(second, x, four[0], four[1], None)
    with zipfile.ZipFile(tmp_path / aoti.FILE) as archive:
        sources = "".join(archive.read(name).decode() for name in archive.namelist() if name.endswith(".cpp"))
    assert sources.count("AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_quantized_linear_native(") == 2
