"""The Triton kernels of Tversky similarity against plain torch in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")

from fxfreeze.kernels import _tversky, _tversky_triton
from fxfreeze.kernels._tversky import Terms, combination, similarity
from fxfreeze.kernels._tversky_triton import rows, tiled

KINDS = list(itertools.product(_tversky.MODELS, _tversky.INTERSECTIONS, _tversky.DIFFERENCES, _tversky.SEMANTICS))
SOME = [
    ("contrast", "product", "ignorematch", "aggregate"),
    ("ratio", "gmean", "subtractmatch", "per_feature"),
    ("contrast", "max", "subtractmatch", "inclusive"),
    ("ratio", "softmin", "ignorematch", "aggregate"),
]
WEIGHTS = (1.3, 0.4, 0.7)


def draw(n, p, k, device, seed=0):
    """Measures of objects [n, k] and prototypes [k, p], and the weights."""
    torch.manual_seed(seed)
    return torch.randn(n, k).to(device), torch.randn(k, p).to(device), *(torch.tensor(w).to(device) for w in WEIGHTS)


def run_tiled(a, b, *weights, how, **more):
    return tiled(a, b, *weights, how, **{"dtype": torch.float32, **more})


def run_rows(a, b, *weights, how, **more):
    total = torch.where(b > how.threshold, b, 0).sum(0)
    return rows(a, b, total, *weights, how, **{"dtype": torch.float32, **more})


def expected(a, b, *weights, how):
    a, b, *weights = (value.double().cpu() for value in (a, b, *weights))
    return similarity(how, Terms(a, b.T, how.threshold), *weights)


def error(found, want):
    assert found.shape == want.shape
    return float((found.double().cpu() - want).abs().max() / want.abs().max())


@pytest.mark.gpu
@pytest.mark.parametrize("run", [run_tiled, run_rows])
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_every_combination(device, kind, run):
    inputs, how = draw(3, 17, 19, device), combination(*kind, 0.0)
    assert error(run(*inputs, how=how), expected(*inputs, how=how)) < 2e-6


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 130, 33), (8, 5, 70), (5, 257, 40)], ids=str)
@pytest.mark.parametrize("run", [run_tiled, run_rows])
@pytest.mark.parametrize("kind", SOME, ids="-".join)
def test_odd_sizes_and_a_threshold(device, kind, run, sizes):
    inputs, how = draw(*sizes, device, seed=1), combination(*kind, 0.3)
    inputs[0][:, 0], inputs[1][0] = 1.5, 0.75  # at least one common feature
    assert error(run(*inputs, how=how), expected(*inputs, how=how)) < 2e-6


@pytest.mark.gpu
@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize("run", [run_tiled, run_rows])
@pytest.mark.parametrize("kind", SOME, ids="-".join)
def test_a_measure_at_the_threshold_is_absent(device, kind, run, threshold):
    """Multiples of a half: many measures equal the threshold."""
    inputs, how = draw(3, 17, 19, device), combination(*kind, threshold)
    inputs = [value.mul(2).round() / 2 for value in inputs[:2]] + list(inputs[2:])
    assert all(0.1 < (value == threshold).double().mean() < 0.3 for value in inputs[:2])
    assert error(run(*inputs, how=how), expected(*inputs, how=how)) < 2e-6


@pytest.mark.gpu
@pytest.mark.parametrize("kind", SOME, ids="-".join)
def test_more_tiles_than_one(device, kind):
    inputs, how = draw(131, 70, 37, device), combination(*kind, 0.0)
    assert error(run_tiled(*inputs, how=how), expected(*inputs, how=how)) < 2e-6


@pytest.mark.gpu
@pytest.mark.parametrize("run", [run_tiled, run_rows])
@pytest.mark.parametrize("shape", [(0, 5, 7), (3, 0, 7), (0, 0, 7)], ids=str)
def test_nothing_to_do(device, run, shape):
    inputs, how = draw(*shape, device), combination(*SOME[0], 0.0)
    assert run(*inputs, how=how).shape == shape[:2]


@pytest.mark.gpu
def test_objects_of_any_strides(device):
    (a, *others), how = draw(6, 17, 19, device), combination(*SOME[2], 0.0)
    want = expected(a, *others, how=how)
    for strided in (a.T.contiguous().T, torch.stack([a, a], 1)[:, 0], torch.stack([a, a], 2)[:, :, 0]):
        assert error(run_tiled(strided, *others, how=how), want) < 2e-6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", SOME, ids="-".join)
def test_half_precision(device, kind, dtype):
    inputs, how = draw(5, 17, 35, device), combination(*kind, 0.1)
    exact = expected(*inputs, how=how)
    # Rows read single precision and round the result; tiles multiply measures that are rounded, too. The interpreter
    # rounds to bfloat16 by cutting off, which is up to 1 where rounding to nearest is up to 0.5.
    for run, roundings in ((run_rows, 1.01), (run_tiled, 4)):
        found = run(*inputs, how=how, dtype=dtype)
        assert found.dtype == dtype
        assert error(found, exact) < roundings * torch.finfo(dtype).eps


@pytest.mark.gpu
@pytest.mark.parametrize("run", [run_tiled, run_rows])
def test_presence_is_decided_before_rounding(device, run):
    """The nearest bfloat16 to 1.001 is 1."""
    a, b = torch.tensor([[1.001, 2.0]]).to(device), torch.tensor([[1.001], [2.0]]).to(device)
    weights = (torch.tensor(w).to(device) for w in (1.0, 0.0, 0.0))
    how = combination("contrast", "product", "ignorematch", "aggregate", 1.0)
    assert run(a, b, *weights, how=how, dtype=torch.bfloat16).item() == 5.0


@pytest.mark.gpu
@pytest.mark.parametrize("run", [run_tiled, run_rows])
@pytest.mark.parametrize("kind", KINDS[:18], ids="-".join)
def test_bad_values_are_not_hidden(device, kind, run):
    inputs, how = draw(3, 5, 9, device), combination(*kind, 0.0)
    inputs[0][:, 4] = -1.0  # no other object has the feature, for whose sake it would be read
    inputs[0][1, 4] = float("nan")
    found = run(*inputs, how=how)
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("run", [run_tiled, run_rows])
def test_a_negative_threshold_is_refused(run):
    with pytest.raises(ValueError, match=r"threshold -0\.5 is below 0"):
        run(*draw(3, 5, 9, "cpu"), how=combination(*SOME[0], -0.5))


@pytest.mark.gpu
def test_nothing_is_present(device):
    """rows reads no feature at all."""
    a, b, *weights = draw(2, 5, 9, device)
    how = combination(*SOME[0], 0.0)
    found = run_rows(-a.abs(), b, *weights, how=how)
    want = -WEIGHTS[2] * b.clamp_min(0).sum(0).cpu().double()
    assert error(found, want.expand(2, 5)) < 1e-6


@pytest.mark.gpu
def test_rows_reads_only_features_that_are_present(device):
    a, b, *weights = draw(2, 5, 9, device)
    a[:, 3] = -1.0
    how = combination(*SOME[0], 0.0)
    total = b.clamp_min(0).sum(0)
    b[3] = float("nan")
    assert rows(a, b, total, *weights, how, dtype=torch.float32).isfinite().all()


@pytest.mark.gpu
def test_rows_is_deterministic(device):
    inputs, how = draw(8, 130, 333, device), combination(*SOME[2], 0.0)
    first = run_rows(*inputs, how=how)
    assert all(torch.equal(run_rows(*inputs, how=how), first) for _ in range(2))


@pytest.mark.slow
def test_in_the_interpreter(interpreter):
    interpreter(__file__)


# ---- compiling

POINTERS = dict.fromkeys(("a_ptr", "b_ptr", "minimum_ptr", "soft_ptr", "theta_ptr", "alpha_ptr", "beta_ptr"), "*fp32")
NUMBERS = {"threshold": "fp32", **dict.fromkeys(("N", "P", "K", "stride_an", "stride_bk"), "i32")}
BUILDS = {"product": SOME[0], "common": ("ratio", "min", "subtractmatch", "aggregate"),
          "minimum": SOME[2]}  # fmt: skip


def split(config):
    """Constants, options."""
    return (
        {name: value for name, value in config.items() if name.startswith("num_") is wanted} for wanted in (False, True)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "dtype", "config"),
    [
        *(("product", "bfloat16", config) for config in _tversky_triton.HALF_CONFIGS),
        *((build, "bfloat16", _tversky_triton.HALF_CONFIGS[0]) for build in ("common", "minimum")),
        *(("product", "float32", config) for config in _tversky_triton.SINGLE_CONFIGS),
    ],
    ids=lambda value: value if isinstance(value, str) else "x".join(str(value[name]) for name in ("BN", "BP", "BK")),
)
def test_tiled_within_budget(within_budget, build, dtype, config):
    dtype, name = getattr(torch, dtype), dtype
    sizes, options = split(config)
    how = combination(*BUILDS[build], 0.0)
    product = _tversky_triton.PRODUCTS[dtype]
    within_budget(
        f"tiled {build} {name} {'x'.join(str(value) for value in sizes.values())}",
        _tversky_triton.tiled_kernel,
        {**POINTERS, "s_ptr": f"*{product.name}", **NUMBERS},
        {
            **_tversky_triton.flags(how),
            **sizes,
            "DTYPE": product,
            "FACTOR": product,
            "PRECISION": "ieee",
            "stride_ak": 1,
        },
        **options,
    )


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("build", ["product", "minimum"])
def test_rows_within_budget(within_budget, build, count):
    how = combination(*BUILDS[build], 0.0)
    types = {name: POINTERS[name] for name in POINTERS if name not in ("minimum_ptr", "soft_ptr")}
    types |= {"total_ptr": "*fp32", "s_ptr": "*fp32", "list_ptr": "*i32", "count_ptr": "*i32"}
    types |= {name: kind for name, kind in NUMBERS.items() if name != "K"}
    for config in _tversky_triton.ROWS_CONFIGS[count]:
        sizes, options = split(config)
        name = f"rows {build} {count}x{config['BP']}x{config['BK']}"
        constants = {**_tversky_triton.flags(how), **sizes, "NB": count}
        within_budget(name, _tversky_triton.rows_kernel, types, constants, **options)


def test_tf32_is_on_tensor_cores(cost):
    sizes, options = split(_tversky_triton.HALF_CONFIGS[0])
    single = _tversky_triton.PRODUCTS[torch.float32]
    found = cost(
        _tversky_triton.tiled_kernel,
        {**POINTERS, "s_ptr": "*fp32", **NUMBERS},
        {**_tversky_triton.flags(combination(*SOME[0], 0.0)), **sizes, "DTYPE": single, "FACTOR": single,
         "PRECISION": "tf32", "stride_ak": 1},
        **options,
    )  # fmt: skip
    assert found.tensor_cores > 0 and found.spills == 0


def test_sizes_of_one(cost):
    """Triton makes constants of integers that are 1."""
    how = _tversky_triton.flags(combination(*SOME[2], 0.0))
    ones = {name: 1 for name, kind in NUMBERS.items() if kind == "i32"}
    sizes, options = split(_tversky_triton.SINGLE_CONFIGS[1])
    single = _tversky_triton.PRODUCTS[torch.float32]
    constants = {**how, **ones, **sizes, "DTYPE": single, "FACTOR": single, "PRECISION": "ieee", "stride_ak": 1}
    types = {**POINTERS, "s_ptr": "*fp32", "threshold": "fp32"}
    assert cost(_tversky_triton.tiled_kernel, types, constants, **options).spills == 0
    types = {name: kind for name, kind in types.items() if name not in ("minimum_ptr", "soft_ptr")}
    types |= {"total_ptr": "*fp32", "list_ptr": "*i32", "count_ptr": "*i32"}
    constants = {**how, **{name: 1 for name in ones if name != "K"}, "NB": 1, "BP": 128, "BK": 16}
    assert cost(_tversky_triton.rows_kernel, types, constants).spills == 0
    types = {"a_ptr": "*fp32", "list_ptr": "*i32", "count_ptr": "*i32", "threshold": "fp32"}
    constants = {"N": 1, "K": 1, "stride_an": 1, "NB": 1, "BLOCK": 1024}
    assert cost(_tversky_triton.active_kernel, types, constants).spills == 0


@pytest.mark.slow
def test_active_within_budget(within_budget):
    types = {"a_ptr": "*fp32", "list_ptr": "*i32", "count_ptr": "*i32", "threshold": "fp32", "N": "i32", "K": "i32",
             "stride_an": "i32"}  # fmt: skip
    within_budget("active 8", _tversky_triton.active_kernel, types, {"NB": 8, "BLOCK": 1024}, num_warps=4)
