"""fxfreeze::tversky_frozen against fxfreeze::tversky, which has its own oracles."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from fxfreeze.kernels import _native, _tversky
from fxfreeze.kernels._op import OPS

FROZEN, WHOLE = OPS["tversky_frozen"], OPS["tversky"]
KINDS = list(itertools.product(_tversky.MODELS, _tversky.INTERSECTIONS, _tversky.DIFFERENCES, _tversky.SEMANTICS))
SOME = [
    ("contrast", "product", "ignorematch", "aggregate"),
    ("contrast", "softmin", "subtractmatch", "per_feature"),
    ("ratio", "gmean", "subtractmatch", "aggregate"),
    ("contrast", "max", "subtractmatch", "inclusive"),
]
ARGUMENTS = ("a", "measures", "totals", "theta", "alpha", "beta")


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
    a, b = (_tversky.project(v, features, normalize) for v in (x, prototypes))
    weights = [weight.to(a.dtype) for weight in weights]
    return [a, b.T.contiguous(), (b * (b > threshold)).sum(1), *weights]


def error(found, want):
    assert found.shape == want.shape
    return float((found.double().cpu() - want.double().cpu()).abs().max() / want.double().abs().max())


@pytest.mark.parametrize("form", [FROZEN.reference, FROZEN.plain, FROZEN.op], ids=["reference", "eager", "op"])
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_it_is_the_whole_operator(kind, form):
    for threshold, normalize in ((0.0, False), (0.2, True)):
        inputs, options = draw(5), named(kind, threshold=threshold)
        found = form(*freeze(inputs, threshold, normalize), **options)
        assert error(found, WHOLE.reference(*inputs, **options, normalize=normalize)) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)], ids=str)
def test_shapes_and_types(shape, dtype):
    """With a logarithm per feature in C++ there is no form: both are the same plain torch, apart from the layout."""
    inputs, options = draw(*shape, dtype=dtype), named(SOME[1])
    found, want = FROZEN.op(*freeze(inputs), **options, dtype=dtype), WHOLE.op(*inputs, **options)
    assert found.dtype == dtype and found.shape == want.shape and found.is_contiguous()
    if want.numel():
        assert error(found, want) < torch.finfo(dtype).eps * 4


def test_totals_are_taken_as_given():
    """They are constant, and summing them up again would read all measures."""
    arguments, options = freeze(draw(5)), named(SOME[0])
    arguments[2] = arguments[2] + 1
    for form in (FROZEN.reference, FROZEN.op):
        moved = form(*arguments, **options) - WHOLE.op(*draw(5), **options)
        torch.testing.assert_close(moved, torch.full_like(moved, -0.7), rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", SOME, ids="-".join)
def test_opcheck(kind):
    for grad in (False, True):
        arguments = [value.requires_grad_(grad) for value in freeze(draw(5, dtype=torch.float32))]
        torch.library.opcheck(FROZEN.op, tuple(arguments), named(kind))


class Head(nn.Module):
    def __init__(self, kind):
        super().__init__()
        inputs = draw(1, dtype=torch.float32)
        self.register_buffer("features", inputs[1])
        for name, value in zip(ARGUMENTS[1:], freeze(inputs)[1:]):
            self.register_buffer(name, value)
        self.kind = named(kind)

    def forward(self, x):
        constants = (getattr(self, name) for name in ARGUMENTS[1:])
        return torch.ops.fxfreeze.tversky_frozen(x @ self.features.T, *constants, **self.kind)


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
        ("a", torch.zeros(5, 7), r"measures, transposed, has shape \[4, 9\], not \[1 or more, K = 7\]"),
        ("a", torch.zeros(5, 9).half(), r"a is torch.float16 of shape \[5, 9\], not torch.float32 or torch.float64 of"),
        ("a", torch.tensor(1.0), r"a is torch.float32 of shape \[\]"),
        ("a", torch.zeros(5, 0), r"a is torch.float32 of shape \[5, 0\], .* \[..., K ≥ 1\]"),
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


def test_the_dtype_of_a_result_is_a_floating_one():
    with pytest.raises(ValueError, match=r"the result's dtype torch\.int32 is not a floating one"):
        FROZEN.op(*freeze(draw(5)), **named(SOME[0]), dtype=torch.int32)


# ---- C++

NATIVE = FROZEN.native
SERVED = [kind for kind in KINDS if kind[1] != "softmin" or kind[3] == "aggregate"]


def measured(rows, columns, threshold=0.0, *, depth=37, dtype=torch.float64):
    torch.manual_seed(0)
    a, b = torch.randn(rows, depth, dtype=dtype), torch.randn(depth, columns, dtype=dtype)
    return [a, b, (b * (b > threshold)).sum(0), *(torch.tensor(value, dtype=dtype) for value in (1.3, 0.4, 0.7))]


def agrees(arguments, **options):
    """The C++ form: at most twice as far from float64 as the reference, or some roundings of the largest value."""
    assert NATIVE.supports(*arguments, **options)
    found, plain = (form(*arguments, **options) for form in (NATIVE.apply, FROZEN.reference))
    want = FROZEN.reference(*(value.double() for value in arguments), **options)
    assert found.dtype == arguments[0].dtype and found.is_contiguous() and found.shape == want.shape
    if want.numel():
        # A float64 reference is its own oracle, and as far from the truth as this.
        roundings = 8 if found.dtype == torch.float32 else 64
        allowed = max(2 * (plain - want).abs().max(), roundings * torch.finfo(found.dtype).eps * want.abs().max())
        assert (found - want).abs().max() <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", SERVED, ids="-".join)
def test_native(kind, dtype):
    thresholds = (0.0, 0.3) if kind[1] == "gmean" else (0.0, 0.3, -0.3)
    for threshold, rows, columns in itertools.product(thresholds, (0, 1, 3, 8), (5, 1000)):
        agrees(measured(rows, columns, threshold, dtype=dtype), **named(kind, threshold=threshold))


@pytest.mark.parametrize("kind", SOME[2:], ids="-".join)
def test_native_in_chunks_and_threads(kind):
    """Three chunks of columns for one thread, and 17 blocks of features; eight objects, and then three."""
    threads = torch.get_num_threads()
    for count, rows in itertools.product((1, 2, 7), (1, 11)):
        torch.set_num_threads(count)
        try:
            agrees(measured(rows, 9001, depth=260), **named(kind))
            agrees(measured(rows, 3), **named(kind))  # fewer columns than threads
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", SERVED, ids="-".join)
def test_native_where_nothing_or_everything_is_present(kind):
    a, *others = measured(3, 50)
    for rows in (-a.abs(), a.abs(), torch.stack([-a[0].abs(), a[1].abs(), a[2]]), torch.zeros_like(a)):
        agrees([rows, *others], **named(kind))


@pytest.mark.parametrize("kind", SERVED, ids="-".join)
def test_native_at_the_threshold_a_feature_is_absent(kind):
    arguments = [value.mul(2).round() / 2 for value in measured(3, 50)[:2]]
    arguments += [(arguments[1] * (arguments[1] > 0.5)).sum(0), *measured(3, 50)[3:]]
    assert all((value == 0.5).any() for value in arguments[:2])
    agrees(arguments, **named(kind, threshold=0.5))


@pytest.mark.parametrize("kind", SERVED, ids="-".join)
def test_native_bad_values_show(kind):
    nan, inf = float("nan"), float("inf")
    for value in (nan, inf, -inf):
        arguments = measured(3, 50)
        arguments[0][1, 4] = value
        found, want = (form(*arguments, **named(kind)) for form in (NATIVE.apply, FROZEN.reference))
        assert want[1].isnan().all() or value == inf
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12, equal_nan=True)
    a, b, *others = measured(3, 50)
    a[:, 4], b[4, 7] = -1.0, nan  # which no object has
    arguments = [a, b, (b * (b > 0)).sum(0), *others[1:]]
    found, want = (form(*arguments, **named(kind)) for form in (NATIVE.apply, FROZEN.reference))
    assert found[:, 7].isnan().all()
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_native_reads_only_features_that_are_present():
    a, b, totals, *weights = measured(3, 50)
    a[:, 4] = -1.0
    b[4] = float("nan")
    assert NATIVE.apply(a, b, totals, *weights, **named(SOME[0])).isfinite().all()


@pytest.mark.parametrize("kind", SOME[2:], ids="-".join)
def test_native_of_any_strides_and_dims(kind):
    a, *others = measured(6, 50)
    want = FROZEN.reference(a, *others, **named(kind))
    totals = torch.stack([others[1]] * 2, 1)[:, 0]
    for strided in (a.T.contiguous().T, torch.stack([a, a], 2)[:, :, 0], a.reshape(2, 3, 37), a[:1].reshape(37)):
        found = FROZEN.op(strided, others[0], totals, *others[2:], **named(kind))
        assert found.shape == (*strided.shape[:-1], 50) and found.is_contiguous()
        assert error(found.reshape(-1, 50), want[: found.numel() // 50]) < 1e-14
    measures = others[0].T.contiguous().T
    assert not NATIVE.supports(a, measures, *others[1:], **named(kind))
    assert error(FROZEN.op(a, measures, *others[1:], **named(kind)), want) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_native_rounds_once(dtype):
    arguments = measured(3, 50, dtype=torch.float32)
    arguments[3:] = [weight.to(dtype) for weight in arguments[3:]]
    single = [*arguments[:3], *(weight.float() for weight in arguments[3:])]
    want = FROZEN.op(*single, **named(SOME[0]))
    assert torch.equal(FROZEN.op(*arguments, **named(SOME[0]), dtype=dtype), want.to(dtype))


def test_what_the_native_form_leaves_to_plain_torch():
    arguments, kind = measured(16, 50), named(SOME[0])
    assert NATIVE.supports(*arguments, **kind)
    assert not NATIVE.supports(*measured(17, 50), **kind)
    assert not NATIVE.supports(*arguments, **named(SOME[1]))
    assert not NATIVE.supports(*(value.to("meta") for value in arguments), **kind)
    assert torch.equal(FROZEN.op(*measured(17, 50), **kind), FROZEN.plain(*measured(17, 50), **kind))


def test_the_operator_is_native_where_it_can_be(monkeypatch):
    arguments, kind = measured(2, 50), named(SOME[0])
    calls = []
    real = FROZEN.native_op
    monkeypatch.setattr(torch.ops.fxfreeze, "tversky_frozen_native", lambda *a: calls.append(a) or real(*a))
    FROZEN.op(*arguments, **kind)
    assert len(calls) == 1
    monkeypatch.setattr(_native, "library", lambda name: None)
    assert torch.equal(FROZEN.op(*arguments, **kind), FROZEN.plain(*arguments, **kind))
    assert len(calls) == 1


def test_native_refuses_what_it_would_read_beyond():
    a, measures, *others = measured(3, 50)
    names = SOME[0]
    for wrong in ((a[:, :5], measures), (a, measures[:5]), (a[0], measures), (a.float(), measures)):
        with pytest.raises(ValueError, match="tversky"):
            FROZEN.native_op(*wrong, *others, *names, 0.0)
    with pytest.raises(ValueError, match="contiguous"):
        FROZEN.native_op(a, measures.T.contiguous().T, *others, *names, 0.0)


def test_native_opcheck():
    arguments = measured(3, 50, dtype=torch.float32)
    torch.library.opcheck(FROZEN.native_op, (*arguments, *SOME[0], 0.0))


@pytest.mark.parametrize("kind", SOME, ids="-".join)
def test_a_compiled_network_calls_it_whole(kind):
    torch._dynamo.reset()
    head, x = Head(kind), torch.randn(5, 6)
    with torch.no_grad():
        assert torch.equal(torch.compile(head, backend="aot_eager", fullgraph=True)(x), head(x))


# ---- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (8,), (3, 3)], ids=str)
@pytest.mark.parametrize("kind", SOME, ids="-".join)
def test_launch(device, kind, shape, dtype):
    inputs, options = draw(*shape, dtype=dtype), named(kind, threshold=0.1, dtype=dtype)
    arguments = [value.to(device) for value in freeze(inputs, 0.1, True)]
    assert FROZEN.supports(*arguments, **options)
    found = FROZEN.launch(*arguments, **options)
    # From the measures that are given, which are float32 whatever x was.
    want = FROZEN.reference(*(value.double().cpu() for value in arguments), **{**options, "dtype": None})
    assert found.dtype == dtype and found.shape == want.shape and found.is_contiguous()
    if want.numel():
        assert error(found, want) < (2e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)


def test_what_the_launcher_leaves_to_the_reference():
    single = freeze(draw(5, dtype=torch.float32))
    assert FROZEN.supports(*single, **named(SOME[0]))
    assert not FROZEN.supports(*single, **named(SOME[0]), threshold=-0.1)
    assert not FROZEN.supports(*freeze(draw(5)), **named(SOME[0]))
    assert not FROZEN.supports(*single, **named(SOME[0]), dtype=torch.float64)
    assert not FROZEN.supports(*single[:-1], single[-1].to("meta"), **named(SOME[0]))


@pytest.mark.slow
def test_in_the_interpreter(interpreter):
    interpreter(__file__)
