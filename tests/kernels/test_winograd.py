"""fxfreeze::winograd against a convolution in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from fxfreeze.kernels import _native
from fxfreeze.kernels._op import OPS
from fxfreeze.kernels.winograd import TILES, dense, pack, transform

KERNEL = OPS["winograd"]
FORMS = {"reference": KERNEL.reference, "op": KERNEL.op}
CHANNELS = [(16, 16), (64, 64), (3, 5), (1, 1), (17, 33), (70, 130), (8, 200)]
IMAGES = [(8, 8), (7, 9), (1, 1), (3, 14), (13, 4)]


def draw(batch=2, channels=(20, 24), image=(9, 11), dtype=torch.float32):
    """x, W, bias."""
    generator = torch.Generator().manual_seed(0)
    inputs, outputs = channels
    shapes = ((batch, inputs, *image), (outputs, inputs, 3, 3), (outputs,))
    return tuple(torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)


def apply(form, x, weight, bias=None, residual=None, *, tile=4, padding=(1, 1), relu=False):
    return form(x, pack(weight, tile), bias, residual, tile=tile, out_channels=len(weight), padding=padding, relu=relu)


def direct(x, weight, bias=None, residual=None, *, padding=(1, 1), relu=False):
    x, weight, bias, residual = (None if v is None else v.double() for v in (x, weight, bias, residual))
    y = F.conv2d(x, weight, bias, padding=padding)
    y = y if residual is None else y + residual
    return y.relu() if relu else y


def agrees(found, want, dtype=torch.float32):
    assert found.dtype == dtype and found.shape == want.shape
    error = (found.double() - want).abs().amax() / want.abs().amax() if want.numel() else 0.0
    assert error <= 20 * torch.finfo(dtype).eps, error


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---- the filters


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_packed_and_back(channels, tile):
    weight = draw(channels=channels, dtype=torch.float64)[1]
    filters = pack(weight, tile)
    assert filters.shape == ((tile + 2) ** 2 * channels[0] * -(-channels[1] // 16) * 16,)
    # Some roundings of float64: weights are about 1, and one in another's place would be as far off.
    torch.testing.assert_close(dense(filters, tile, *channels), weight, rtol=0, atol=1e-14)


@pytest.mark.parametrize("tile", TILES)
def test_filters_lie_in_blocks_of_64_outputs_and_strips_of_16(tile):
    weight = draw(channels=(5, 100), dtype=torch.float64)[1]
    matrix, area = transform(tile), (tile + 2) ** 2
    first, second = pack(weight, tile).split([area * 5 * 64, area * 5 * 48])
    for block, outputs in ((first, range(64)), (second, range(64, 100))):
        shaped = block.reshape(area, -1, 5, 16).transpose(1, 2).flatten(2)
        for output in outputs:
            for channel in range(5):
                found = shaped[:, channel, output - outputs[0]].reshape(tile + 2, tile + 2)
                torch.testing.assert_close(found, matrix @ weight[output, channel] @ matrix.T)
    assert not second.reshape(area, 3, 5, 16)[:, 2, :, 4:].any()


# ---- the function


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_channels(form, tile, channels):
    given = draw(channels=channels)
    agrees(apply(FORMS[form], *given, tile=tile), direct(*given))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("image", IMAGES, ids=str)
@pytest.mark.parametrize("padding", [(1, 1), (0, 0), (2, 0), (0, 3)], ids=str)
def test_images(tile, image, padding):
    if min(extent + 2 * zeros for extent, zeros in zip(image, padding, strict=True)) < 3:
        pytest.skip("an image smaller than the window")
    for batch in (1, 3):
        given = draw(batch=batch, image=image)
        agrees(apply(KERNEL.op, *given, tile=tile, padding=padding), direct(*given, padding=padding))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("bias", "residual", "relu"), list(itertools.product((False, True), repeat=3)), ids=str)
@pytest.mark.parametrize("outputs", [24, 64])
def test_what_is_done_at_last(form, bias, residual, relu, outputs):
    x, weight, constant = draw(channels=(20, outputs))
    other = torch.randn(2, outputs, 9, 11, generator=torch.Generator().manual_seed(1))
    given = (x, weight, constant if bias else None, other if residual else None)
    agrees(apply(FORMS[form], *given, relu=relu), direct(*given, relu=relu))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("channels", "image"), [((40, 200), (4, 4)), ((16, 16), (40, 40)), ((200, 70), (20, 20))])
def test_threads_change_no_bit(threads, tile, channels, image):
    given, found = draw(batch=3, channels=channels, image=image), []
    for count in (1, 2, 7):
        threads(count)
        found.append(apply(KERNEL.op, *given, tile=tile))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    agrees(found[0], direct(*given))


@pytest.mark.parametrize("tile", TILES)
def test_an_image_computes_the_same_in_every_batch(tile):
    given = draw(batch=5)
    whole = apply(KERNEL.op, *given, tile=tile)
    assert all(torch.equal(apply(KERNEL.op, x[None], *given[1:], tile=tile)[0], y) for x, y in zip(*(given[0], whole)))


def test_any_strides_are_taken():
    x, weight, bias = draw()
    other = torch.randn(2, 24, 9, 11)
    want = apply(KERNEL.op, x, weight, bias, other)
    last = torch.channels_last
    for given in (x.to(memory_format=last), x.flip(3).flip(3), torch.stack([x, x], -1)[..., 0]):
        assert torch.equal(apply(KERNEL.op, given, weight, bias, other.to(memory_format=last)), want)
    assert want.is_contiguous(memory_format=last)


@pytest.mark.parametrize("tile", TILES)
def test_a_nan_stays_within_its_tiles_and_is_not_lost_in_a_relu(tile):
    x, weight, bias = draw(image=(20, 20))
    x[0, 3, 5, 6] = float("nan")
    found, want = (
        function(x, weight, bias, relu=True)
        for function in (lambda *a, **k: apply(KERNEL.op, *a, tile=tile, **k), direct)
    )
    assert found.isnan()[want.isnan()].all()
    hit = found.isnan().any(1)[0].nonzero()
    assert not found[1].isnan().any() and hit.amax() < 6 + 1 + tile and hit.amin() > 5 - 1 - tile


def test_nothing_is_nothing():
    given = draw(batch=0)
    assert torch.equal(apply(KERNEL.op, *given).double(), direct(*given))


def test_float64_is_plain_torch():
    given = draw(dtype=torch.float64)
    agrees(apply(KERNEL.op, *given), direct(*given), torch.float64)


def test_the_form_in_cpp_is_what_runs(monkeypatch):
    given, called = draw(), []
    monkeypatch.setattr(_native, "library", lambda name: called.append(name))
    apply(KERNEL.op, *given)
    assert called == ["winograd.cpp"]


def test_gradients_go_through_plain_torch():
    x, weight, bias = draw()
    x.requires_grad_()
    filters = pack(weight, 4)
    (ours,) = torch.autograd.grad(
        KERNEL.op(x, filters, bias, tile=4, out_channels=24, padding=[1, 1]).square().sum(), x
    )
    (theirs,) = torch.autograd.grad(F.conv2d(x, weight, bias, padding=1).square().sum(), x)
    agrees(ours, theirs.double())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(20, 9, 11)}, r"x is torch.float32 of shape \[20, 9, 11\]"),
        ({"x": torch.zeros(2, 20, 9, 11, dtype=torch.int8)}, "x is torch.int8"),
        ({"x": torch.zeros(2, 21, 9, 11)}, "filters is .* not torch.float32 of"),
        ({"bias": torch.zeros(23)}, "bias is .* not torch.float32 of .24"),
        ({"bias": torch.zeros(24, dtype=torch.float64)}, "bias is torch.float64"),
        ({"residual": torch.zeros(2, 24, 1, 1)}, r"residual is .* not torch.float32 of \[2, 24, 9, 11\]"),
        ({"tile": 3}, "tile is 3, not 2 or 4"),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", [*FORMS, "meta"])
def test_bad_arguments(form, change, message):
    x, weight, bias = draw()
    given = {"x": x, "filters": pack(weight, 4), "bias": bias, "residual": None, "tile": 4, **change}
    if form == "meta":
        given = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    with pytest.raises(ValueError, match=message):
        FORMS.get(form, KERNEL.op)(**given, out_channels=24, padding=[1, 1])


def test_torch_finds_the_operator_sound():
    x, weight, bias = draw(channels=(4, 8), image=(5, 6))
    for residual in (None, torch.randn(2, 8, 5, 6)):
        torch.library.opcheck(
            KERNEL.op, (x, pack(weight, 4), bias, residual), {"tile": 4, "out_channels": 8, "padding": [1, 1]}
        )
