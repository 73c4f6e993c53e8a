"""fxfreeze::tversky against the `tversky` package, against the definitions spelled out, and through torch's doors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from fxfreeze.kernels import _tversky
from fxfreeze.kernels._op import OPS

KERNEL = OPS["tversky"]
MODELS, INTERSECTIONS, DIFFERENCES = _tversky.MODELS, _tversky.INTERSECTIONS, _tversky.DIFFERENCES
FORMS = [KERNEL.reference, KERNEL.plain, KERNEL.op]
FORM_NAMES = ["reference", "eager", "op"]


def kinds(*semantics):
    return list(itertools.product(MODELS, INTERSECTIONS, DIFFERENCES, semantics))


def at_thresholds(kinds, *thresholds):
    """gmean below 0 is refused."""
    return [(kind, value) for kind in kinds for value in thresholds if not (kind[1] == "gmean" and value < 0)]


def case_name(value):
    return "-".join(value) if isinstance(value, tuple) else str(value)


def named(kind):
    return dict(zip(("model", "intersection", "difference", "semantics"), kind))


def draw(n=5, d=6, k=9, p=4, *, dtype=torch.float64, seed=0):
    """x, features, prototypes, theta, alpha, beta; about half of all features present."""
    torch.manual_seed(seed)
    weights = [torch.tensor(value, dtype=dtype) for value in (1.3, 0.4, 0.7)]
    return [torch.randn(rows, d, dtype=torch.float64).to(dtype) for rows in (n, k, p)] + weights


def error(actual, expected):
    """Largest deviation, relative to the largest expected value."""
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


# ---- against the package


def package(inputs, kind, *, threshold=0.0, normalize=False):
    from tversky import differentiable_tversky_v2 as oracle

    x, features, prototypes, theta, alpha, beta = inputs
    model, intersection, difference, _ = kind
    function = {"contrast": oracle.similarity_contrast_model, "ratio": oracle.similarity_ratio_model}[model]
    difference = "substractmatch" if difference == "subtractmatch" else difference
    return function(x, prototypes, features, threshold, alpha, beta, theta, normalize, intersection, difference)


@pytest.fixture
def package_in_float64(monkeypatch):
    # It casts its indicators with `.float()`, and so cannot multiply them with float64 measures.
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.parametrize("form", FORMS, ids=FORM_NAMES)
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalized"])
@pytest.mark.parametrize("kind", kinds("aggregate"), ids="-".join)
def test_the_package_agrees_in_float64(package_in_float64, kind, normalize, form):
    inputs = draw(33, 12, 40, 17)
    expected = package(inputs, kind, normalize=normalize)
    assert error(form(*inputs, **named(kind), normalize=normalize), expected) < 1e-12


def ambiguous(v, features):
    """Rows of `v` with a feature whose presence float32 cannot decide: |v·ω| below the rounding of such a product."""
    v, features = v.double(), features.double()
    rounding = v.shape[-1] * torch.finfo(torch.float32).eps * (v.abs() @ features.abs().T)
    return ((v @ features.T).abs() < rounding).any(-1)


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalized"])
@pytest.mark.parametrize("kind", kinds("aggregate"), ids="-".join)
def test_the_package_agrees_in_float32(package_in_float64, kind, normalize):
    inputs = draw(65, 12, 40, 33, dtype=torch.float32)
    rows, columns = (~ambiguous(inputs[index], inputs[1]) for index in (0, 2))
    assert rows.double().mean() > 0.95 and columns.double().mean() > 0.95
    expected = package([value.double() for value in inputs], kind, normalize=normalize)[rows][:, columns]
    for form in FORMS:
        actual = form(*inputs, **named(kind), normalize=normalize)
        assert actual.dtype == torch.float32
        assert error(actual[rows][:, columns], expected) < 1e-5


def test_the_margin_finds_an_ambiguous_row():
    x = torch.tensor([[1.0, -1.0 + 1e-7], [1.0, 1.0]])
    assert ambiguous(x, torch.ones(1, 2)).tolist() == [True, False]


@pytest.mark.parametrize(("kind", "threshold"), at_thresholds(kinds("aggregate"), 0.7, -0.4), ids=case_name)
def test_the_package_agrees_at_another_threshold(package_in_float64, kind, threshold):
    inputs = draw(9, 12, 40, 17)
    expected = package(inputs, kind, threshold=threshold)
    assert error(KERNEL.op(*inputs, **named(kind), threshold=threshold), expected) < 1e-12


@pytest.mark.parametrize("kind", [kind for kind in kinds("aggregate") if kind[1] != "gmean"], ids="-".join)
def test_the_package_has_the_same_gradients(package_in_float64, kind):
    inputs = [value.requires_grad_() for value in draw(9, 6, 20, 7)]
    torch.manual_seed(1)
    weights = torch.randn(9, 7, dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad((y * weights).sum(), inputs, allow_unused=True)
        for y in (KERNEL.op(*inputs, **named(kind)), package(inputs, kind))
    )
    for one, other in zip(ours, theirs):
        assert (one is None) == (other is None)
        if one is not None:
            assert error(one, other) < 1e-11


# ---- against the definitions


def by_definition(inputs, kind, threshold):
    """One number at a time, from the definitions of `per_feature` and `inclusive`."""
    x, features, prototypes, *weights = inputs
    return torch.tensor(
        [[_pair(u, v, features, [w.item() for w in weights], kind, threshold) for v in prototypes] for u in x],
        dtype=torch.float64,
    )


REDUCE = {
    "product": lambda a, b: a * b,
    "min": min,
    "max": max,
    "mean": lambda a, b: (a + b) / 2,
    "gmean": lambda a, b: math.sqrt(a * b),
    "softmin": lambda a, b: -math.log(math.exp(-a) + math.exp(-b)),
}


def _pair(u, v, features, weights, kind, threshold):
    model, intersection, difference, semantics = kind
    common = only_u = only_v = 0.0
    for feature in features:
        a, b = float(u @ feature), float(v @ feature)
        if a > threshold and b > threshold:
            common += REDUCE[intersection](a, b)
            if difference == "subtractmatch":
                only_u, only_v = only_u + max(a - b, 0.0), only_v + max(b - a, 0.0)
        elif difference == "ignorematch" or semantics == "inclusive":
            only_u += a if a > threshold else 0.0
            only_v += b if b > threshold else 0.0
    theta, alpha, beta = weights
    if model == "contrast":
        return theta * common - alpha * only_u - beta * only_v
    return common / (common + alpha * only_u + beta * only_v + 1)


@pytest.mark.parametrize(
    ("kind", "threshold"), at_thresholds(kinds("per_feature", "inclusive"), 0.0, 0.7, -0.4), ids=case_name
)
def test_the_definition_agrees(kind, threshold):
    inputs = draw()
    expected = by_definition(inputs, kind, threshold)
    for form in FORMS:
        assert error(form(*inputs, **named(kind), threshold=threshold), expected) < 1e-12


def test_a_feature_at_the_threshold_is_absent():
    """0.5 is exact in binary, so that the measures of the first feature equal the threshold in every arithmetic."""
    _, features, _, *weights = draw()
    features = torch.cat([torch.eye(6, dtype=torch.float64), features])
    ones = torch.ones(1, 6, dtype=torch.float64)
    for kind, n, threshold in itertools.product(kinds(*_tversky.SEMANTICS), (0, 1), (0.0, 0.5)):
        at = torch.full_like(ones, -0.25)
        at[0, n] = threshold
        below = at - 1e-12 * torch.eye(6, dtype=torch.float64)[n]
        for order in (1, -1):  # as the object, and as the prototype
            one, other = (
                KERNEL.op(x, features, prototypes, *weights, **named(kind), threshold=threshold)
                for x, prototypes in ((v, ones)[::order] for v in (at, below))
            )
            torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_the_three_semantics_differ():
    inputs = draw()
    for intersection in INTERSECTIONS:
        results = [
            KERNEL.op(*inputs, **named(("contrast", intersection, "subtractmatch", semantics)))
            for semantics in _tversky.SEMANTICS
        ]
        assert all(error(one, other) > 0.01 for one, other in itertools.combinations(results, 2))


def test_the_packages_spelling():
    inputs, kind = draw(), named(("ratio", "min", "subtractmatch", "aggregate"))
    assert torch.equal(KERNEL.op(*inputs, **kind), KERNEL.op(*inputs, **{**kind, "difference": "substractmatch"}))


@pytest.mark.parametrize("intersection", ["min", "softmin"])
def test_chunks_of_prototypes_are_one_sum(monkeypatch, intersection):
    inputs, kind = draw(), named(("contrast", intersection, "ignorematch", "per_feature"))
    whole = KERNEL.reference(*inputs, **kind)
    monkeypatch.setattr(_tversky, "_ELEMENTS", 9 * 3)  # three prototypes, then one
    assert error(KERNEL.reference(*inputs, **kind), whole) < 1e-14


# ---- shapes and types

SOME = [
    ("contrast", "product", "ignorematch", "aggregate"),
    ("ratio", "gmean", "subtractmatch", "aggregate"),
    ("contrast", "min", "subtractmatch", "inclusive"),
    ("ratio", "softmin", "ignorematch", "per_feature"),
    ("contrast", "max", "subtractmatch", "per_feature"),
]


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("kind", SOME, ids="-".join)
def test_leading_dims(kind, shape):
    _, *others = draw()
    x = torch.randn(*shape, 6, dtype=torch.float64)
    y = KERNEL.op(x, *others, **named(kind))
    assert y.shape == (*shape, 4) and y.is_contiguous()
    rows = [KERNEL.op(row[None], *others, **named(kind)) for row in x.reshape(-1, 6)]
    torch.testing.assert_close(y.reshape(-1, 4), torch.cat([y.new_empty(0, 4), *rows]), rtol=0, atol=2e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", SOME, ids="-".join)
def test_half_precision_is_rounded_once(kind, dtype):
    inputs = draw(33, 12, 40, 17, dtype=dtype)
    wide = KERNEL.op(*(value.float() for value in inputs), **named(kind))
    assert torch.equal(KERNEL.op(*inputs, **named(kind)), wide.to(dtype))


def test_strided_inputs():
    inputs = draw()
    strided = [value.T.contiguous().T if value.dim() else value for value in inputs]
    strided[0] = torch.stack([inputs[0], inputs[0]], 1)[:, 0]
    assert not any(value.is_contiguous() for value in strided[:3])
    for kind in SOME:
        assert error(KERNEL.op(*strided, **named(kind)), KERNEL.op(*inputs, **named(kind))) < 1e-14


def test_bad_values_are_not_hidden():
    inputs = draw()
    inputs[0][1, 2] = float("nan")
    for kind in SOME:
        y = KERNEL.op(*inputs, **named(kind))
        assert y[1].isnan().all() and y[[0, 2, 3, 4]].isfinite().all()


# ---- gradients


@pytest.mark.parametrize("form", FORMS[:2], ids=FORM_NAMES[:2])
@pytest.mark.parametrize("kind", kinds(*_tversky.SEMANTICS), ids="-".join)
def test_gradcheck(kind, form):
    inputs = draw(3, 3, 5, 2, seed=2)
    a, b = (inputs[index] @ inputs[1].T for index in (0, 2))
    kinks = [a.abs().min(), b.abs().min(), (a[:, None] - b).abs().min()]
    assert min(kinks) > 1e-3
    used = [value.requires_grad_() for value in inputs]
    # A difference quotient has an error of 1e-16 / eps for rounding, and one of eps² for curvature.
    torch.autograd.gradcheck(lambda *values: form(*values, **named(kind)), used, eps=1e-6, atol=2e-8, rtol=0)


@pytest.mark.parametrize("form", FORMS, ids=FORM_NAMES)
@pytest.mark.parametrize("kind", kinds(*_tversky.SEMANTICS), ids="-".join)
def test_gradients_are_finite_without_a_common_feature(kind, form):
    _, *others = draw(dtype=torch.float32)
    others[0], others[1] = torch.eye(6), torch.eye(6)[:4] - 0.5
    x = torch.stack([torch.zeros(6), -torch.ones(6), torch.eye(6)[5], torch.eye(6)[0]])
    used = [value.requires_grad_() for value in (x, *others)]
    y = form(*used, **named(kind), normalize=True)
    found = torch.autograd.grad(y.sum(), used, allow_unused=True)
    assert y.isfinite().all() and all(gradient is None or gradient.isfinite().all() for gradient in found)


def test_the_package_has_no_such_gradient():
    """Else the test above shows nothing."""
    inputs = [torch.tensor([[1.0, 0.0]]).requires_grad_(), torch.eye(2), torch.tensor([[0.0, 1.0]]), *draw()[3:]]
    y = package(inputs, ("contrast", "gmean", "ignorematch", "aggregate"))
    assert torch.autograd.grad(y.sum(), inputs[0])[0].isnan().any()


# ---- torch's doors


class Head(nn.Module):
    def __init__(self, kind, dtype=torch.float32):
        super().__init__()
        _, *others = draw(dtype=dtype)
        for name, value in zip(("features", "prototypes", "theta", "alpha", "beta"), others):
            setattr(self, name, nn.Parameter(value))
        self.kind = named(kind)

    def forward(self, x):
        weights = (self.features, self.prototypes, self.theta, self.alpha, self.beta)
        return torch.ops.fxfreeze.tversky(x, *weights, **self.kind, threshold=0.1, normalize=True)


@pytest.mark.parametrize("grad", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("kind", SOME, ids="-".join)
def test_opcheck(kind, grad):
    inputs = [value.requires_grad_(grad) for value in draw(dtype=torch.float32)]
    torch.library.opcheck(KERNEL.op, tuple(inputs), named(kind))


@pytest.mark.parametrize("kind", SOME, ids="-".join)
def test_export_keeps_the_operator_and_decomposes_it(kind):
    head, batch = Head(kind), torch.export.Dim("batch")
    with torch.no_grad():
        exported = torch.export.export(head, (torch.randn(3, 2, 6),), dynamic_shapes=({0: batch},))
        assert KERNEL.op in {node.target for node in exported.graph.nodes}
        plain = exported.run_decompositions({KERNEL.op: KERNEL.reference})
        assert not any(str(node.target).startswith("fxfreeze") for node in plain.graph.nodes)
        for n in (1, 2, 7):
            x = torch.randn(n, 2, 6)
            torch.testing.assert_close(exported.module()(x), head(x), rtol=0, atol=0)
            assert error(plain.module()(x), head(x)) < 1e-6


@pytest.mark.parametrize("kind", SOME, ids="-".join)
def test_onnx(kind, tmp_path):
    import onnxruntime

    head = Head(kind)
    with torch.no_grad():
        exported = torch.export.export(head, (torch.randn(3, 6),), dynamic_shapes=({0: torch.export.Dim("batch")},))
        plain = exported.run_decompositions({KERNEL.op: KERNEL.reference})
        torch.onnx.export(plain, dynamo=True, verbose=False).save(tmp_path / "m.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
        for n in (1, 5):
            x = torch.randn(n, 6)
            (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            assert error(torch.from_numpy(y), head(x)) < 1e-5


@pytest.mark.parametrize("kind", SOME, ids="-".join)
def test_a_compiled_network_trains(kind):
    torch._dynamo.reset()  # the cases share one forward, and dynamo compiles a function only so often
    head, x = Head(kind), torch.randn(5, 6)
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    used = [value for name, value in head.named_parameters() if (kind[0], name) != ("ratio", "theta")]
    found, expected = (torch.autograd.grad(form(x).sum(), used) for form in (compiled, head))
    assert max(error(one, other) for one, other in zip(found, expected)) < 1e-5
    with torch.no_grad():
        assert error(compiled(x), head(x)) < 1e-6


# ---- refusals

GOOD = named(("contrast", "product", "ignorematch", "aggregate"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "contrst"}, "model 'contrst' is not one of contrast, ratio"),
        ({"intersection": "prod"}, "intersection 'prod' is not one of product, min, "),
        ({"difference": "ignore"}, "difference 'ignore' is not one of ignorematch, subtractmatch"),
        ({"semantics": "paper"}, "semantics 'paper' is not one of aggregate, per_feature, inclusive"),
        ({"threshold": float("nan")}, "threshold nan is not finite"),
        ({"intersection": "gmean", "threshold": -0.1}, "gmean needs a threshold of 0 or more, not -0.1"),
        ({"x": torch.zeros(5, 6, dtype=torch.int64)}, "x has dtype torch.int64"),
        ({"x": torch.tensor(1.0)}, "x has no dimension"),
        ({"x": torch.zeros(5, 7)}, r"features has shape \[9, 6\], not \[1 or more, d = 7\]"),
        ({"features": torch.zeros(0, 6)}, r"features has shape \[0, 6\]"),
        ({"features": torch.zeros(9, 6).double()}, "features has dtype torch.float64, not torch.float32"),
        ({"prototypes": torch.zeros(4, 5)}, r"prototypes has shape \[4, 5\]"),
        ({"prototypes": torch.zeros(6)}, r"prototypes has shape \[6\]"),
        ({"theta": torch.zeros(1)}, r"theta is torch.float32 of shape \[1\], not a 0-d float"),
        ({"alpha": torch.tensor(1)}, "alpha is torch.int64"),
        ({"beta": torch.zeros(2, 2)}, "beta is torch.float32"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
def test_refusals(change, message, fake):
    names = ("x", "features", "prototypes", "theta", "alpha", "beta")
    arguments = {**dict(zip(names, draw(dtype=torch.float32))), **GOOD, **change}
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.no_grad():
        tensors = [torch.empty_like(arguments.pop(name)) for name in names]
        with pytest.raises(ValueError, match=message):
            KERNEL.op(*tensors, **arguments)


# ---- the launcher


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("kind", SOME, ids="-".join)
def test_launch(device, kind, shape, dtype):
    _, *others = (value.to(device) for value in draw(dtype=dtype))
    x = torch.randn(*shape, 6).to(device, dtype)
    options = {**named(kind), "threshold": 0.1, "normalize": True}
    assert KERNEL.supports(x, *others, **options)
    found = KERNEL.launch(x, *others, **options)
    want = KERNEL.reference(x.double(), *(value.double() for value in others), **options)
    assert found.dtype == dtype and found.shape == want.shape and found.is_contiguous()
    if want.numel():
        assert error(found, want) < (2e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)


def test_what_the_launcher_leaves_to_the_reference():
    inputs = draw(dtype=torch.float32)
    assert KERNEL.supports(*inputs, **GOOD)
    assert not KERNEL.supports(*inputs, **GOOD, threshold=-0.1)
    assert not KERNEL.supports(*draw(), **GOOD)
    assert not KERNEL.supports(*inputs[:-1], inputs[-1].to("meta"), **GOOD)


@pytest.mark.gpu
def test_the_operator_launches(device):
    inputs = [value.to(device) for value in draw(dtype=torch.float32)]
    for kind in SOME:
        assert error(KERNEL.op(*inputs, **named(kind)), KERNEL.reference(*inputs, **named(kind))) < 2e-6


@pytest.mark.slow
def test_in_the_interpreter(interpreter):
    interpreter(__file__)
