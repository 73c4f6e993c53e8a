"""fxfreeze::tversky_integer: exact on its grid, the same bits in C++, and equal to the float operator on codes."""

from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch

from fxfreeze.kernels import _native, _tversky
from fxfreeze.kernels._op import OPS
from fxfreeze.kernels.tversky_integer import LEVELS, MAX_MINIMA, problem

KERNEL, FROZEN = OPS["tversky_integer"], OPS["tversky_frozen"]
NATIVE = KERNEL.native
NAMES = ("model", "intersection", "difference", "semantics")
KINDS = list(itertools.product(_tversky.MODELS, _tversky.INTERSECTIONS, _tversky.DIFFERENCES, _tversky.SEMANTICS))
SERVED = [kind for kind in KINDS if kind[1] not in ("gmean", "softmin") or kind[3] == "aggregate"]
SOME = [
    ("contrast", "product", "ignorematch", "aggregate"),
    ("contrast", "min", "subtractmatch", "per_feature"),
    ("ratio", "product", "subtractmatch", "inclusive"),
    ("contrast", "max", "subtractmatch", "aggregate"),
    ("ratio", "min", "subtractmatch", "inclusive"),
]
ARGUMENTS = ("a", "measures", "totals", "step", "theta", "alpha", "beta")


def named(kind, **more):
    return dict(zip(NAMES, kind)) | more


def codes(*shape):
    """About a third is absent, and some are the largest."""
    return torch.randint(-120, LEVELS + 20, shape).clamp(0, LEVELS).to(torch.uint8)


def draw(rows=5, columns=7, depth=9, dtype=torch.float32):
    torch.manual_seed(0)
    measures = codes(depth, columns)
    numbers = [torch.tensor(value, dtype=dtype) for value in (0.0137, 1.3, 0.4, 0.7)]
    return [codes(rows, depth), measures, measures.sum(0, dtype=torch.int32), *numbers]


def frozen(arguments, dtype=torch.float64):
    """What the codes stand for, as arguments of the float operator."""
    a, measures, totals, step, *weights = arguments
    whole = [value.to(dtype) * step.to(dtype) for value in (a, measures, totals)]
    return [*whole, *(weight.to(dtype) for weight in weights)]


# ---- the maths


@pytest.mark.parametrize("kind", SERVED, ids="-".join)
def test_it_is_the_float_similarity_of_what_codes_stand_for(kind):
    arguments = draw(dtype=torch.float64)
    found = KERNEL.reference(*arguments, **named(kind))
    want = FROZEN.reference(*frozen(arguments), **named(kind))
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [kind for kind in SERVED if kind[1] not in ("gmean", "softmin")], ids="-".join)
def test_sums_are_exact(kind):
    """In steps of 1 and with weights that are powers of two, every number is an integer up to the last division."""
    a, measures, totals, *_ = draw(rows=4, columns=6, depth=300)
    whole = [torch.tensor(value, dtype=torch.float64) for value in (1.0, 2.0, 0.5, 0.25)]
    found = KERNEL.reference(a, measures, totals, *whole, **named(kind))
    want = [[by_hand(x, y, kind, *whole[1:]) for y in measures.T.tolist()] for x in a.tolist()]
    assert torch.equal(found, torch.tensor(want, dtype=torch.float64))


def by_hand(x, y, kind, theta, alpha, beta):
    """The definitions, feature by feature, in Python's integers."""
    model, intersection, difference, semantics = kind
    both = [(a, b) for a, b in zip(x, y) if a and b]
    mine, theirs = sum(a for a, _ in both), sum(b for _, b in both)
    least = sum(map(min, both))
    each = {"product": lambda a, b: a * b, "min": min, "max": max, "mean": lambda a, b: (a + b) / 2}[intersection]
    aggregate = semantics == "aggregate" and intersection != "product"
    common = each(mine, theirs) if aggregate else sum(each(a, b) for a, b in both)
    only_a, only_b = sum(x) - mine, sum(y) - theirs
    if difference == "subtractmatch":
        if semantics == "aggregate":
            only_a, only_b = only_a + max(mine - theirs, 0), only_b + max(theirs - mine, 0)
        elif semantics == "per_feature":
            only_a, only_b = mine - least, theirs - least
        else:
            only_a, only_b = sum(x) - least, sum(y) - least
    theta, alpha, beta = map(float, (theta, alpha, beta))
    if model == "contrast":
        return theta * common - alpha * only_a - beta * only_b
    return common / (common + alpha * only_a + beta * only_b + 1)


@pytest.mark.parametrize("seed", range(5))
def test_a_minimum_is_a_count_of_ones_in_thermometer_code(seed):
    """Σ min(a, b) = Σ over levels of popcount(A ∧ B), where bit k of A at level n says a_k ≥ n; and Σ max likewise."""
    torch.manual_seed(seed)
    a, b = codes(50), codes(50)
    level = torch.arange(1, LEVELS + 1).unsqueeze(1)
    packed = [[sum(1 << k for k, bit in enumerate(row) if bit) for row in (v >= level).tolist()] for v in (a, b)]
    meet, join = (
        sum(merge(x, y).bit_count() for x, y in zip(*packed)) for merge in (int.__and__, int.__or__)
    )  # fmt: skip
    one = [torch.tensor(value) for value in (1.0, 1.0, 0.0, 0.0)]
    kind = named(("contrast", "min", "ignorematch", "inclusive"))
    found = KERNEL.op(a, b.unsqueeze(1), b.sum(0, keepdim=True, dtype=torch.int32), *one, **kind)
    assert found.item() == meet == torch.minimum(a, b).sum()
    assert join == torch.maximum(a, b).sum() == int(a.sum()) + int(b.sum()) - meet


def test_what_has_no_form_in_integers():
    for kind in KINDS:
        reason = problem(_tversky.combination(*kind), 9)
        assert (reason is None) == (kind in SERVED)
        assert reason is None or reason == f"{kind[1]} of every feature is no integer"
    product, minimum = (
        _tversky.combination("contrast", name, "ignorematch", "inclusive") for name in ("product", "min")
    )
    assert problem(product, 33025) is None and "33026 features do not fit into 32 bits" in str(problem(product, 33026))
    assert problem(minimum, 33026) is None and "do not fit" in str(problem(minimum, 4210753))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_result_is_rounded_once(dtype):
    arguments = draw()
    found = KERNEL.op(*arguments, **named(SOME[1]), dtype=dtype)
    assert found.dtype == dtype
    assert torch.equal(found, KERNEL.op(*arguments, **named(SOME[1])).to(dtype))


@pytest.mark.parametrize("shape", [(9,), (0, 9), (2, 3, 9), (1, 9)], ids=str)
def test_any_dims(shape):
    arguments = draw()
    arguments[0] = codes(*shape)
    found = KERNEL.op(*arguments, **named(SOME[1]))
    assert found.shape == (*shape[:-1], 7) and found.is_contiguous()
    assert torch.equal(found, KERNEL.reference(*arguments, **named(SOME[1])))


@pytest.mark.parametrize("kind", SOME, ids="-".join)
def test_opcheck(kind):
    torch.library.opcheck(KERNEL.op, tuple(draw()), named(kind))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("a", torch.zeros(5, 9), r"a is torch.float32 of shape \[5, 9\], not uint8"),
        ("a", torch.zeros(5, 0, dtype=torch.uint8), r"a is torch.uint8 of shape \[5, 0\], .* \[..., K ≥ 1\]"),
        ("a", torch.tensor(1, dtype=torch.uint8), r"a is torch.uint8 of shape \[\]"),
        ("measures", torch.zeros(8, 7, dtype=torch.uint8), r"measures is torch.uint8 of shape \[8, 7\], .*\[K = 9"),
        ("measures", torch.zeros(9, 7, dtype=torch.int8), r"measures is torch.int8 .*, not uint8"),
        ("totals", torch.zeros(7), r"totals is torch.float32 of shape \[7\], not int32 of \[P = 7\]"),
        ("totals", torch.zeros(6, dtype=torch.int32), r"totals is torch.int32 of shape \[6\]"),
        ("step", torch.zeros(1), r"step is torch.float32 of shape \[1\], not a 0-d float32 or float64"),
        ("step", torch.tensor(1.0).half(), "step is torch.float16"),
        ("beta", torch.zeros(1), r"beta is torch.float32 of shape \[1\], not a 0-d float"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isalpha() else "",
)
def test_refusals(name, value, message):
    arguments = {**dict(zip(ARGUMENTS, draw())), name: value}
    with pytest.raises(ValueError, match=message):
        KERNEL.op(*arguments.values(), **named(SOME[0]))
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(ValueError, match=message):
        KERNEL.op(*(mode.from_tensor(argument) for argument in arguments.values()), **named(SOME[0]))


def test_combinations_and_results_that_are_refused():
    with pytest.raises(ValueError, match="gmean of every feature is no integer"):
        KERNEL.op(*draw(), **named(("ratio", "gmean", "ignorematch", "inclusive")))
    with pytest.raises(ValueError, match=r"the result's dtype torch\.int32 is not a floating one"):
        KERNEL.op(*draw(), **named(SOME[0]), dtype=torch.int32)


# ---- C++


def same_bits(arguments, kind):
    """But for roots and logarithms, which libraries may round differently."""
    assert NATIVE.supports(*arguments, **named(kind))
    found, want = (form(*arguments, **named(kind)) for form in (NATIVE.apply, KERNEL.reference))
    if kind[1] in ("gmean", "softmin"):
        eps = torch.finfo(want.dtype).eps
        torch.testing.assert_close(found, want, rtol=4 * eps, atol=4 * eps * float(want.abs().amax()))
    else:
        assert torch.equal(found, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", SERVED, ids="-".join)
def test_native_is_the_reference_bit_for_bit(kind, dtype):
    for rows, columns, depth in ((1, 1, 1), (3, 65, 17), (11, 130, 300)):
        same_bits(draw(rows, columns, depth, dtype), kind)


@pytest.mark.parametrize("kind", SOME, ids="-".join)
def test_native_in_chunks_and_threads(kind):
    """Three chunks of columns for one thread; eight objects, and then three; fewer tiles than threads."""
    threads = torch.get_num_threads()
    for count in (1, 2, 7):
        torch.set_num_threads(count)
        try:
            same_bits(draw(11, 4500, 40), kind)
            same_bits(draw(2, 3, 40), kind)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("depth", [255, 256, 257, 512, 600])
@pytest.mark.parametrize("kind", SOME, ids="-".join)
def test_native_sums_of_the_largest_codes_do_not_overflow(kind, depth):
    arguments = draw(2, 70, depth)
    for value in arguments[:2]:
        value.fill_(LEVELS)
    arguments[2].fill_(LEVELS * depth)
    same_bits(arguments, kind)


@pytest.mark.parametrize("columns", [1, 2, 31, 63, 64, 65])
def test_native_reads_nothing_beyond_the_prototypes(columns):
    """What lies behind them in memory is not theirs."""
    arguments = draw(2, columns, 40)
    around = torch.full((columns * 40 + 200,), LEVELS, dtype=torch.uint8)
    around[100 : 100 + columns * 40] = arguments[1].flatten()
    want = KERNEL.reference(*arguments, **named(SOME[1]))
    arguments[1] = around[100 : 100 + columns * 40].view(40, columns)
    assert torch.equal(NATIVE.apply(*arguments, **named(SOME[1])), want)


@pytest.mark.parametrize("kind", SERVED, ids="-".join)
def test_native_where_nothing_or_everything_is_present(kind):
    arguments = draw(3, 50, 20)
    for rows in (torch.zeros_like(arguments[0]), torch.ones_like(arguments[0])):
        same_bits([rows, *arguments[1:]], kind)


def test_native_of_any_strides():
    arguments = draw(6, 50)
    want = KERNEL.reference(*arguments, **named(SOME[1]))
    a, measures, totals, *others = arguments
    strided = torch.stack([totals] * 2, 1)[:, 0]
    assert torch.equal(KERNEL.op(a.T.contiguous().T, measures, strided, *others, **named(SOME[1])), want)
    measures = measures.T.contiguous().T
    assert not NATIVE.supports(a, measures, totals, *others, **named(SOME[1]))
    assert torch.equal(KERNEL.op(a, measures, totals, *others, **named(SOME[1])), want)


def test_totals_are_taken_as_given():
    """They are constant, and summing them up again would read all codes."""
    arguments = draw(3, 50, dtype=torch.float64)
    more = [*arguments[:2], arguments[2] + 100, *arguments[3:]]
    for form in (KERNEL.reference, NATIVE.apply):
        moved = form(*more, **named(SOME[0])) - form(*arguments, **named(SOME[0]))
        torch.testing.assert_close(moved, torch.full_like(moved, -0.7 * 1.37), rtol=0, atol=1e-12)


def test_the_operator_is_native_where_it_can_be(monkeypatch):
    arguments, calls, real = draw(), [], KERNEL.native_op
    monkeypatch.setattr(torch.ops.fxfreeze, "tversky_integer_native", lambda *a: calls.append(a) or real(*a))
    KERNEL.op(*arguments, **named(SOME[0]))
    assert len(calls) == 1
    monkeypatch.setattr(_native, "library", lambda name: None)
    assert torch.equal(KERNEL.op(*arguments, **named(SOME[0])), KERNEL.reference(*arguments, **named(SOME[0])))
    assert len(calls) == 1


def test_native_refuses_what_it_would_read_beyond():
    a, measures, *others = draw(3, 50)
    for wrong in ((a[:, :5], measures), (a, measures[:5]), (a[0], measures)):
        with pytest.raises(ValueError, match="tversky_integer"):
            KERNEL.native_op(*wrong, *others, *SOME[0])
    with pytest.raises(ValueError, match="contiguous"):
        KERNEL.native_op(a, measures.T.contiguous().T, *others, *SOME[0])
    with pytest.raises(ValueError, match=r"weights are not torch\.float32"):
        KERNEL.native_op(a, measures, *others[:2], others[2].double(), *others[3:], *SOME[0])


def test_native_opcheck():
    torch.library.opcheck(KERNEL.native_op, (*draw(), *SOME[1]))


# ---- GPU

triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def launched(device, arguments, kind, **more):
    on = [value.to(device) for value in arguments]
    assert KERNEL.supports(*on, **named(kind))
    return KERNEL.launch(*on, **named(kind, **more)).cpu()


def powers(*args, **kwargs):
    """Numbers behind the sums that float32 holds, up to a division."""
    values = [torch.tensor(value) for value in (0.5, 2.0, 0.5, 0.25)]
    return [*draw(*args, **kwargs)[:3], *values]


def close(found, want, kind):
    """The same bits, but for quotients, roots and logarithms, which round differently."""
    exact = kind[0] == "contrast" and kind[1] not in ("gmean", "softmin")
    assert found.shape == want.shape and found.dtype == want.dtype
    assert torch.equal(found, want) if exact else torch.allclose(found, want, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", SERVED, ids="-".join)
def test_launch_of_every_combination(device, kind):
    for rows in (3, 20):
        arguments = powers(rows, 17, 19)
        close(launched(device, arguments, kind), KERNEL.reference(*arguments, **named(kind)), kind)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 130, 33), (2, 5, 300), (5, 257, 128), (9, 300, 40)], ids=str)
@pytest.mark.parametrize("kind", SOME, ids="-".join)
def test_launch_of_odd_sizes(device, kind, sizes):
    arguments = powers(*sizes)
    close(launched(device, arguments, kind), KERNEL.reference(*arguments, **named(kind)), kind)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", SOME, ids="-".join)
def test_launch_of_more_tiles_than_a_group_has(device, kind):
    arguments = powers(600, 70, 20)
    close(launched(device, arguments, kind), KERNEL.reference(*arguments, **named(kind)), kind)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(9,), (0, 9), (2, 3, 9)], ids=str)
def test_launch_of_any_dims(device, shape):
    arguments = powers()
    arguments[0] = codes(*shape)
    close(launched(device, arguments, SOME[1]), KERNEL.reference(*arguments, **named(SOME[1])), SOME[1])


@pytest.mark.gpu
def test_launch_of_any_strides(device):
    a, measures, totals, *others = powers(6, 50)
    want = KERNEL.reference(a, measures, totals, *others, **named(SOME[1]))
    strided = [a.T.contiguous().T, measures.T.contiguous().T, torch.stack([totals] * 2, 1)[:, 0]]
    close(launched(device, [*strided, *others], SOME[1]), want, SOME[1])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", SOME, ids="-".join)
@pytest.mark.parametrize("level", [0, 1, 127, 128, LEVELS])
def test_launch_where_all_codes_are_one(device, kind, level):
    arguments = powers(3, 20, 130)
    for value in arguments[:2]:
        value.fill_(level)
    arguments[2].fill_(level * 130)
    close(launched(device, arguments, kind), KERNEL.reference(*arguments, **named(kind)), kind)


@pytest.mark.gpu
def test_launch_of_the_largest_sums(device):
    """As many as 32 bits hold; what is made good on the way there wraps around."""
    kind, depth = ("contrast", "product", "ignorematch", "inclusive"), 33025
    a, measures = torch.full((1, depth), LEVELS).to(torch.uint8), torch.full((depth, 1), LEVELS).to(torch.uint8)
    totals = torch.tensor([LEVELS * depth], dtype=torch.int32)
    found = launched(device, [a, measures, totals, *map(torch.tensor, (1.0, 1.0, 1.0, 1.0))], kind)
    assert found.item() == torch.tensor(LEVELS**2 * depth, dtype=torch.float64).float().item()


@pytest.mark.gpu
def test_launch_of_the_largest_minima(device):
    kind = ("contrast", "min", "subtractmatch", "inclusive")
    a, measures = (torch.full(shape, LEVELS).to(torch.uint8) for shape in ((1, MAX_MINIMA), (MAX_MINIMA, 1)))
    measures[-1] -= 1
    totals = measures.sum(0, dtype=torch.int32)
    found = launched(device, [a, measures, totals, *map(torch.tensor, (1.0, 1.0, 1.0, 1.0))], kind)
    assert found.item() == LEVELS * MAX_MINIMA - 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_launch_rounds_once(device, dtype):
    arguments = draw(5, 17, 35)
    found = launched(device, arguments, SOME[1], dtype=dtype)
    want = KERNEL.reference(*(value.double() if value.is_floating_point() else value for value in arguments),
                            **named(SOME[1]))  # fmt: skip
    # The interpreter cuts bfloat16 off, which is up to 1 unit.
    assert found.dtype == dtype
    assert float((found.double() - want).abs().max() / want.abs().max()) <= torch.finfo(dtype).eps


@pytest.mark.gpu
def test_launch_takes_totals_as_given(device):
    arguments = powers(3, 50)
    more = [*arguments[:2], arguments[2] + 100, *arguments[3:]]
    kind = ("contrast", "min", "ignorematch", "inclusive")
    moved = launched(device, more, kind) - launched(device, arguments, kind)
    assert torch.equal(moved, torch.full_like(moved, -0.25 * 50))


@pytest.mark.gpu
def test_the_reference_on_a_gpu(device):
    arguments = draw(dtype=torch.float64)
    on = [value.to(device) for value in arguments]
    for kind in SOME:
        assert torch.allclose(KERNEL.op(*on, **named(kind)).cpu(), KERNEL.reference(*arguments, **named(kind)))


def test_what_the_launcher_leaves_to_the_reference():
    arguments = draw()
    assert KERNEL.supports(*arguments, **named(SOME[1]))
    assert not KERNEL.supports(*arguments, **named(SOME[1]), dtype=torch.float64)
    assert not KERNEL.supports(*draw(dtype=torch.float64), **named(SOME[1]))
    assert not KERNEL.supports(arguments[0].to("meta"), *arguments[1:], **named(SOME[1]))
    many = torch.empty(1, MAX_MINIMA + 1, dtype=torch.uint8)
    assert not KERNEL.supports(many, *arguments[1:], **named(SOME[1]))
    assert KERNEL.supports(many, *arguments[1:], **named(SOME[0]))
    assert LEVELS * MAX_MINIMA <= 2**24 < LEVELS * (MAX_MINIMA + 1)


@pytest.mark.slow
@triton
def test_in_the_interpreter(interpreter):
    assert interpreter(__file__) > 70


# ---- compiling

TYPES = {
    **dict.fromkeys(("a_ptr", "b_ptr"), "*u8"), "total_ptr": "*i32", "minimum_ptr": "*fp32",
    **dict.fromkeys(("step_ptr", "theta_ptr", "alpha_ptr", "beta_ptr", "s_ptr"), "*fp32"),
}  # fmt: skip
BUILDS = {"three": ("ratio", "product", "ignorematch", "aggregate"), "minimum": SOME[3][:1] + SOME[1][1:]}


def split(config):
    """Constants, options."""
    return ({name: value for name, value in config.items() if name.startswith("num_") is wanted}
            for wanted in (False, True))  # fmt: skip


@triton
def test_sizes_of_one(cost):
    """Triton makes constants of integers that are 1."""
    from fxfreeze.kernels import _tversky_integer_triton as file

    sizes, options = split(file.CONFIGS[3])
    constants = {**file.flags(_tversky.combination(*SOME[0])), **sizes, **dict.fromkeys("NPK", 1), "EVEN": False}
    assert cost(file.tiled_kernel, TYPES, constants, **options).spills == 0
    types = {"a_ptr": "*u8", "b_ptr": "*u8", "c_ptr": "*fp32"}
    constants = {**dict.fromkeys("NPK", 1), "BN": 1, "BP": 128, "BK": 16}
    assert cost(file.minima_kernel, types, constants).spills == 0


@pytest.mark.slow
@triton
@pytest.mark.parametrize(
    ("build", "number", "even"),
    [*itertools.product(BUILDS, range(5), [True]), ("three", 0, False), ("three", 3, False)],
)
def test_tiled_within_budget(within_budget, build, number, even):
    from fxfreeze.kernels import _tversky_integer_triton as file

    sizes, options = split(file.CONFIGS[number])
    constants = {**file.flags(_tversky.combination(*BUILDS[build])), **sizes, "EVEN": even}
    tile = "x".join(str(sizes[key]) for key in ("BN", "BP", "BK"))
    name = f"tversky_integer {build} {tile}{'' if even else ' odd'}"
    within_budget(name, file.tiled_kernel, {**TYPES, **dict.fromkeys("NPK", "i32")}, constants, **options)


@pytest.mark.slow
@triton
@pytest.mark.parametrize("rows", [1, 8, 64])
def test_minima_within_budget(within_budget, rows):
    from fxfreeze.kernels import _tversky_integer_triton as file

    types = {"a_ptr": "*u8", "b_ptr": "*u8", "c_ptr": "*fp32", **dict.fromkeys("NPK", "i32")}
    for config in file.MINIMA_CONFIGS if rows == 64 else file.ROWS_CONFIGS[rows]:
        sizes, options = split({"BN": rows, **config})
        name = f"tversky_integer minima {'x'.join(map(str, sizes.values()))}"
        within_budget(name, file.minima_kernel, types, sizes, **options)
