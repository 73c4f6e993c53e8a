"""fxfreeze::tversky_frozen against fxfreeze::tversky, which has its own oracles."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from fxfreeze.kernels import _tversky
from fxfreeze.kernels._op import OPS

FROZEN, WHOLE = OPS["tversky_frozen"], OPS["tversky"]
KINDS = list(itertools.product(_tversky.MODELS, _tversky.INTERSECTIONS, _tversky.DIFFERENCES, _tversky.SEMANTICS))
SOME = [
    ("contrast", "product", "ignorematch", "aggregate"),
    ("contrast", "softmin", "subtractmatch", "per_feature"),
    ("ratio", "gmean", "subtractmatch", "aggregate"),
    ("contrast", "max", "subtractmatch", "inclusive"),
]
ARGUMENTS = ("x", "features", "measures", "totals", "theta", "alpha", "beta")


def named(kind, **more):
    return dict(zip(("model", "intersection", "difference", "semantics"), kind)) | more


def draw(*shape, dtype=torch.float64, d=6, k=9, p=4):
    """Arguments of the whole operator."""
    torch.manual_seed(0)
    weights = [torch.tensor(value, dtype=dtype) for value in (1.3, 0.4, 0.7)]
    return [torch.randn(*size, d).to(dtype) for size in (shape, (k,), (p,))] + weights


def freeze(inputs, threshold=0.0, normalize=False):
    """Arguments of the frozen operator."""
    x, features, prototypes, *weights = inputs
    measures = _tversky.project(prototypes, features, normalize).T.contiguous()
    return [x, features, measures, (measures * (measures > threshold)).sum(0), *weights]


def error(found, want):
    assert found.shape == want.shape
    return float((found.double().cpu() - want.double().cpu()).abs().max() / want.double().abs().max())


@pytest.mark.parametrize("form", [FROZEN.reference, FROZEN.plain, FROZEN.op], ids=["reference", "eager", "op"])
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_it_is_the_whole_operator(kind, form):
    for threshold, normalize in ((0.0, False), (0.2, True)):
        inputs, options = draw(5), named(kind, threshold=threshold, normalize=normalize)
        found = form(*freeze(inputs, threshold, normalize), **options)
        assert error(found, WHOLE.reference(*inputs, **options)) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)], ids=str)
def test_shapes_and_types(shape, dtype):
    inputs, options = draw(*shape, dtype=dtype), named(SOME[1])
    found, want = FROZEN.op(*freeze(inputs), **options), WHOLE.op(*inputs, **options)
    assert found.dtype == dtype and found.shape == want.shape
    torch.testing.assert_close(found, want)


def test_totals_are_taken_as_given():
    """They are constant, and summing them up again would read all measures."""
    arguments, options = freeze(draw(5)), named(SOME[0])
    arguments[3] = arguments[3] + 1
    moved = FROZEN.op(*arguments, **options) - WHOLE.op(*draw(5), **options)
    torch.testing.assert_close(moved, torch.full_like(moved, -0.7))


@pytest.mark.parametrize("kind", SOME, ids="-".join)
def test_opcheck(kind):
    for grad in (False, True):
        arguments = [value.requires_grad_(grad) for value in freeze(draw(5, dtype=torch.float32))]
        torch.library.opcheck(FROZEN.op, tuple(arguments), named(kind))


class Head(nn.Module):
    def __init__(self, kind):
        super().__init__()
        for name, value in zip(ARGUMENTS[1:], freeze(draw(1, dtype=torch.float32))[1:]):
            self.register_buffer(name, value)
        self.kind = named(kind)

    def forward(self, x):
        constants = (getattr(self, name) for name in ARGUMENTS[1:])
        return torch.ops.fxfreeze.tversky_frozen(x, *constants, **self.kind)


@pytest.mark.parametrize("kind", SOME, ids="-".join)
def test_export_and_onnx(kind, tmp_path):
    import onnxruntime

    head = Head(kind)
    with torch.no_grad():
        exported = torch.export.export(head, (torch.randn(3, 6),), dynamic_shapes=({0: torch.export.Dim("batch")},))
        plain = exported.run_decompositions({FROZEN.op: FROZEN.reference})
        torch.onnx.export(plain, dynamo=True, verbose=False).save(tmp_path / "m.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
        for n in (1, 5):
            x = torch.randn(n, 6)
            torch.testing.assert_close(exported.module()(x), head(x), rtol=0, atol=0)
            (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            assert max(error(plain.module()(x), head(x)), error(torch.from_numpy(y), head(x))) < 1e-5


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(5, 7), r"features has shape \[9, 6\], not \[1 or more, d = 7\]"),
        ("measures", torch.zeros(8, 4), r"measures, transposed, has shape \[4, 8\], not \[1 or more, K = 9\]"),
        ("measures", torch.zeros(9, 4).half(), "measures, transposed, has dtype torch.float16, not torch.float32"),
        ("totals", torch.zeros(3), r"totals is torch.float32 of shape \[3\], not torch.float32 of \[P = 4\]"),
        ("totals", torch.zeros(4).double(), r"totals is torch.float64 of shape \[4\], not torch.float32"),
        ("beta", torch.zeros(1), r"beta is torch.float32 of shape \[1\], not a 0-d float"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isalpha() else "",
)
def test_refusals(name, value, message):
    arguments = {**dict(zip(ARGUMENTS, freeze(draw(5, dtype=torch.float32)))), name: value}
    with pytest.raises(ValueError, match=message):
        FROZEN.op(*arguments.values(), **named(SOME[0]))
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(ValueError, match=message):
        FROZEN.op(*(mode.from_tensor(argument) for argument in arguments.values()), **named(SOME[0]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (8,), (3, 3)], ids=str)
@pytest.mark.parametrize("kind", SOME, ids="-".join)
def test_launch(device, kind, shape, dtype):
    inputs, options = draw(*shape, dtype=dtype), named(kind, threshold=0.1, normalize=True)
    arguments = [value.to(device) for value in freeze(inputs, 0.1, True)]
    assert FROZEN.supports(*arguments, **options)
    found = FROZEN.launch(*arguments, **options)
    want = WHOLE.reference(*(value.double() for value in inputs), **options)
    assert found.dtype == dtype and found.shape == want.shape and found.is_contiguous()
    if want.numel():
        assert error(found, want) < (2e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)


def test_what_the_launcher_leaves_to_the_reference():
    single = freeze(draw(5, dtype=torch.float32))
    assert FROZEN.supports(*single, **named(SOME[0]))
    assert not FROZEN.supports(*single, **named(SOME[0]), threshold=-0.1)
    assert not FROZEN.supports(*freeze(draw(5)), **named(SOME[0]))
    assert not FROZEN.supports(*single[:-1], single[-1].to("meta"), **named(SOME[0]))


@pytest.mark.slow
def test_in_the_interpreter(interpreter):
    interpreter(__file__)
