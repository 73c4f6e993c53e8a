"""fxfreeze::semi_structured against a dense product in float64, and its format against torch's."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from fxfreeze.kernels import semi_structured as module
from fxfreeze.kernels._op import OPS
from fxfreeze.kernels.semi_structured import compress, dense, pick, why_not

KERNEL = OPS["semi_structured"]
FORMS = {"reference": KERNEL.reference, "op": KERNEL.op}


def draw(*shape, dtype=torch.float32, out=32, k=64, device="cpu"):
    """x, W with 0, 1 or 2 numbers in each group, bias."""
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(out, k // 4, 4, generator=generator).argsort(-1)
    kept = (places < torch.randint(0, 3, (out, k // 4, 1), generator=generator)).reshape(out, k)
    x, weight, bias = (torch.randn(*size, k if i < 2 else out, generator=generator)
                       for i, size in enumerate((shape, (out,), ())))  # fmt: skip
    return [value.to(device, dtype) for value in (x, weight * kept, bias)]


def agrees(found, x, weight, bias=None):
    def product(*given):
        return torch.nn.functional.linear(*(None if v is None else v.double().cpu() for v in given))

    want, scale = product(x, weight, bias), product(x.abs(), weight.abs(), None if bias is None else bias.abs())
    assert found.dtype == x.dtype and found.shape == want.shape and found.is_contiguous()
    assert ((found.double().cpu() - want).abs() <= 4 * torch.finfo(x.dtype).eps * scale + 1e-7).all()


# ---- the format


@pytest.mark.parametrize("size", [(32, 64), (1, 8), (5, 24), (0, 8), (3, 0)], ids=str)
def test_compressed_and_back(size):
    weight = draw(out=size[0], k=size[1])[1]
    values, index = compress(weight)
    assert values.shape == (size[0], size[1] // 2) and index.shape == (size[0], size[1] // 8)
    assert torch.equal(dense(values, index), weight) and torch.equal(pick(weight, index), values)


def test_it_takes_nine_sixteenths_of_half_precision():
    weight = draw(dtype=torch.bfloat16)[1]
    assert sum(value.nbytes for value in compress(weight)) == weight.nbytes * 9 / 16


def test_every_pattern():
    """All that a group can hold: the numbers at their places, and two places in ascending order."""
    patterns = [p for p in (torch.tensor([n >> i & 1 for i in range(4)]) for n in range(16)) if p.sum() <= 2]
    weight = torch.stack([p * torch.tensor([2.0, 3.0, 5.0, 7.0]) for p in patterns])
    weight = torch.cat([weight, weight.roll(1, 0)], 1)
    values, index = compress(weight)
    assert torch.equal(dense(values, index), weight)
    for byte in index.flatten().tolist():
        first, second, third, fourth = (byte >> shift & 3 for shift in (0, 2, 4, 6))
        assert first < second and third < fourth


def test_by_hand():
    weight = torch.tensor([[0.0, 2.0, 0.0, 3.0, 5.0, 0.0, 7.0, 0.0]])
    values, index = compress(weight)
    assert values.tolist() == [[2.0, 3.0, 5.0, 7.0]]
    assert index.tolist() == [[0b1000_1101]]  # places 1 and 3 below, 0 and 2 above


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_torch_makes_the_same_of_it(dtype):
    """CUTLASS's form of what we keep is one of the same weight; where two numbers count, with the same values."""
    weight = draw(out=64, k=128, dtype=dtype)[1]
    theirs = sparse_semi_structured_from_dense_cutlass(dense(*compress(weight)))
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(*theirs), weight)
    full = weight.reshape(64, -1, 4).ne(0).sum(-1) == 2
    assert torch.equal(compress(weight)[0].reshape(64, -1, 2)[full], theirs[0].reshape(64, -1, 2)[full])


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(2, 8), "more than two of four"),
        (torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]]), "more than two of four"),
        (torch.zeros(2, 12), r"of shape \[2, 12\], not \[out, in\], in a multiple of 8"),
        (torch.zeros(8), r"of shape \[8\]"),
    ],
)
def test_what_is_not_compressed(weight, message):
    with pytest.raises(ValueError, match=message):
        compress(weight)


# ---- the operator


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_shapes_and_types(form, shape, dtype):
    x, weight, bias = draw(*shape, dtype=dtype)
    for given in (bias, None):
        agrees(FORMS[form](x, *compress(weight), given), x, weight, given)


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    x, weight, bias = draw(5)
    values, index = compress(weight)
    x, values, bias = (value.requires_grad_(grad) for value in (x, values, bias))
    torch.library.opcheck(KERNEL.op, (x, values, index, bias))
    torch.library.opcheck(KERNEL.op, (x, values, index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(())}, r"x is torch.float32 of shape \[\], not floating of \[\.\.\., in\]"),
        ({"x": torch.zeros(5, 60)}, r"x is torch.float32 of shape \[5, 60\], .* in a multiple of 8"),
        (
            {"values": torch.zeros(32, 31)},
            r"values is torch.float32 of shape \[32, 31\], not torch.float32 of \[32, 32",
        ),
        ({"values": torch.zeros(32, 32).half()}, "values is torch.float16"),
        ({"values": torch.zeros(())}, r"values is torch.float32 of shape \[\]"),
        ({"index": torch.zeros(32, 8)}, r"index is torch.float32 of shape \[32, 8\], not torch.uint8 of \[32, 8\]"),
        ({"index": torch.zeros(32, 16, dtype=torch.uint8)}, r"index is torch.uint8 of shape \[32, 16\]"),
        ({"bias": torch.zeros(31)}, r"bias is torch.float32 of shape \[31\], not torch.float32 of \[32\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals(change, message):
    x, weight, bias = draw(5)
    given = {**dict(zip(("x", "values", "index", "bias"), (x, *compress(weight), bias))), **change}
    for form in FORMS.values():
        with pytest.raises(ValueError, match=message):
            form(**given)
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(ValueError, match=message):
        KERNEL.op(**{k: mode.from_tensor(v) for k, v in given.items()})


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        _, weight, bias = draw()
        for name, value in zip(("values", "index", "bias"), (*compress(weight), bias)):
            self.register_buffer(name, value)
        self.weight = weight

    def forward(self, x):
        return torch.ops.fxfreeze.semi_structured(x, self.values, self.index, self.bias)


def test_export_and_onnx(tmp_path):
    import onnxruntime

    with torch.no_grad():
        exported = torch.export.export(Layer(), (torch.randn(3, 64),), dynamic_shapes=({0: torch.export.Dim("batch")},))
        plain = exported.run_decompositions({KERNEL.op: KERNEL.reference})
        torch.onnx.export(plain, dynamo=True, verbose=False).save(tmp_path / "m.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
        for n in (1, 5):
            x = torch.randn(n, 64)
            (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            agrees(torch.from_numpy(y), x, Layer().weight, Layer().bias)


def test_gradients():
    x, weight, bias = draw(3, dtype=torch.float64, out=4, k=16)
    values, index = compress(weight)
    arguments = [value.requires_grad_() for value in (x, values, bias)]
    assert torch.autograd.gradcheck(lambda x, values, bias: KERNEL.op(x, values, index, bias), arguments)


# ---- GPU


@pytest.mark.parametrize(
    ("found", "cusparselt", "says"),
    [
        (None, True, "2:4 needs a CUDA device of compute capability ≥ 8.0"),
        ((7, 5), True, "2:4 needs a CUDA device of compute capability ≥ 8.0"),
        ((8, 0), True, None),
        ((8, 9), False, None),
        ((9, 0), True, None),
        ((9, 0), False, "needs a torch that is built with cuSPARSELt"),
        ((10, 0), True, None),
    ],
)
def test_which_devices_can(found, cusparselt, says):
    reason = why_not(found, cusparselt=cusparselt)
    assert reason is None if says is None else says in reason


def test_a_cpu_has_no_capability():
    assert module.capability(torch.device("cpu")) is None


def test_what_the_launcher_leaves_to_the_reference(monkeypatch):
    def supports(*shape, **how):
        x, weight, bias = draw(*shape, **how)
        return KERNEL.supports(x, *compress(weight), bias)

    assert not supports(3, dtype=torch.float16)
    monkeypatch.setattr(module, "capability", lambda device: (8, 0))
    assert supports(3, dtype=torch.float16) and supports(2, 3, dtype=torch.bfloat16, out=96, k=192)
    assert not supports(3, dtype=torch.float32)
    assert not supports(3, dtype=torch.float16, out=48)
    assert not supports(3, dtype=torch.float16, k=32)
    assert not supports(3, dtype=torch.float16, out=0) and not supports(3, dtype=torch.float16, k=0)
    x, weight, bias = draw(3, dtype=torch.float16)
    assert not KERNEL.supports(x.to("meta"), *compress(weight), bias)


def test_the_weight_is_prepared_once_and_goes_with_its_values(monkeypatch):
    """What the libraries are given, with a dense weight in place of theirs."""
    made = []
    monkeypatch.setattr(module, "on_gpu", lambda weight: made.append(weight) or weight)
    x, weight, bias = draw(2, 3)
    values, index = compress(weight)
    for given in (bias, None, bias):
        agrees(KERNEL.launch(x, values, index, given), x, weight, given)
    assert len(made) == 1 and torch.equal(made[0], weight)
    other = index.flip(0)  # of a weight with the same values at other places
    agrees(KERNEL.launch(x, values, other, bias), x, dense(values, other), bias)
    assert len(made) == 2
    before = len(module._by_values())
    del values, index, other
    gc.collect()
    assert len(module._by_values()) == before - 1


def test_no_rows(monkeypatch):
    monkeypatch.setattr(module, "on_gpu", lambda weight: pytest.fail("prepared for nothing"))
    x, weight, bias = draw(0)
    assert KERNEL.launch(x, *compress(weight), bias).shape == (0, 32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 20), (0,)], ids=str)
def test_launch(shape, dtype):
    """For real, where there is such a GPU; nothing stands in for it."""
    device = torch.device("cuda")
    if why_not(module.capability(device), cusparselt=module.has_cusparselt()):
        pytest.skip("no GPU with tensor cores for 2:4")
    for out, k in ((32, 64), (128, 256), (96, 192)):
        x, weight, bias = draw(*shape, dtype=dtype, out=out, k=k, device=device)
        stored = compress(weight)
        for given in (bias, None):
            assert KERNEL.supports(x, *stored, given)
            agrees(KERNEL.launch(x, *stored, given), x, weight, given)
            agrees(KERNEL.op(x, *stored, given), x, weight, given)
    compiled = torch.compile(lambda x: KERNEL.op(x, *stored, bias), fullgraph=True)
    with torch.no_grad():
        agrees(compiled(x), x, weight, bias)
