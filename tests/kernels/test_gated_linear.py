"""``fxfreeze::gated_linear``: the reference against loops, its Triton kernel against the reference in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fxfreeze.kernels import gated_linear as module
from fxfreeze.kernels.gated_linear import ACTIVATIONS, KERNEL, NORMS, SCORES, launch, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
TENSORS = ("x", "weight", "bias", "threshold", "gain", "up_weight", "up_bias")
PARTS = [(), ("bias",), ("threshold",), ("gain",), ("bias", "threshold", "gain"), ("up_weight",),
         ("bias", "threshold", "gain", "up_weight", "up_bias")]  # fmt: skip
"""Which of the optional tensors there are."""


def draw(
    rows: Any = 5,
    out: int = 17,
    depth: int = 19,
    *,
    parts: tuple[str, ...] = PARTS[-1],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Arguments whose products are about 1, with a third of the neurons gated off."""
    wide, shape = torch.promote_types(dtype, torch.float32), (rows,) if isinstance(rows, int) else rows
    given = {
        "x": torch.randn(*shape, depth).to(dtype), "weight": (torch.randn(out, depth) / depth**0.5).to(dtype),
        "bias": torch.randn(out).to(dtype), "threshold": torch.rand(out, dtype=wide) - 0.5,
        "gain": torch.randn(out, dtype=wide),
        "up_weight": (torch.randn(out, depth) / depth**0.5).to(dtype), "up_bias": torch.randn(out).to(dtype),
    }  # fmt: skip
    return {name: given[name].to(device) for name in given if name in ("x", "weight", *parts)}


def moved(given: dict[str, Tensor], *args: Any) -> dict[str, Tensor]:
    return {name: value.to(*args) for name, value in given.items()}


# ---- the reference

FORMULAS = {
    "none": lambda h: h,
    "relu": lambda h: max(h, 0.0),
    "gelu": lambda h: h * (1 + math.erf(h / math.sqrt(2))) / 2,
    "gelu_tanh": lambda h: h / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))),
    "silu": lambda h: h / (1 + math.exp(-h)),
}


def by_loop(given: dict[str, Tensor], activation: str, score: str, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    """The result and s(h) − τ (infinite without a gate), neuron by neuron in Python's floats."""
    out = given["weight"].shape[0]
    rows = given["x"].double().reshape(-1, given["x"].shape[-1]).tolist()
    values = {name: value.double().tolist() for name, value in given.items() if name != "x"}
    zeros, results, distances = [0.0] * out, [], []
    for row in rows:
        mean = sum(row) / len(row) if norm == "layer" else 0.0
        size = sum((value - mean) ** 2 for value in row) / len(row)
        unit = [(value - mean) / (math.sqrt(size + eps) if norm != "none" else 1.0) for value in row]
        for n in range(out):
            h = sum(a * b for a, b in zip(unit, values["weight"][n])) + values.get("bias", zeros)[n]
            h = FORMULAS[activation](h)
            distance = math.inf
            if "threshold" in values:
                distance = (abs(h) if score == "abs" else h) - values["threshold"][n]
            y = h * values.get("gain", [1.0] * out)[n] * (distance > 0)
            if "up_weight" in values:
                y *= sum(a * b for a, b in zip(unit, values["up_weight"][n])) + values.get("up_bias", zeros)[n]
            results.append(y)
            distances.append(distance)
    shape = (*given["x"].shape[:-1], out)
    return tuple(torch.tensor(found, dtype=torch.float64).reshape(shape) for found in (results, distances))  # type: ignore[return-value]


def check(found: Tensor, want: Tensor, distance: Tensor, *, tolerance: float, few: float = 0.02) -> None:
    """`found` is `want` to a `tolerance` of its largest, but where a gate that close to its threshold may turn."""
    assert found.shape == want.shape
    clear = distance.abs() > tolerance
    assert float((~clear).double().mean()) <= few
    found, want = found.double().cpu()[clear], want[clear]
    assert float((found - want).abs().max()) <= tolerance * float(want.abs().max())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_what_a_loop_says(activation: str, score: str, norm: str) -> None:
    for parts in PARTS:
        given = draw((2, 3), 7, 9, parts=parts, dtype=torch.float64)
        how = {"activation": activation, "score": score, "norm": norm, "eps": 0.1}
        want, distance = by_loop(given, **how)  # type: ignore[arg-type]
        check(KERNEL.op(**given, **how), want, distance, tolerance=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_rounded_once(dtype: torch.dtype) -> None:
    """Of numbers this short the products are exact in float32, though not in half precision."""
    given = draw(parts=("bias", "threshold", "gain"), dtype=dtype)
    given = {name: value.mul(64).round() / 64 for name, value in given.items()}
    found, want = KERNEL.op(**given, activation="relu"), reference(**moved(given, torch.float64), activation="relu")
    assert found.dtype == dtype and torch.equal(found, want.to(dtype))
    assert 0 < int((found != 0).sum()) < found.numel()


def test_the_default_is_a_linear_layer() -> None:
    given = draw(parts=("bias",))
    assert torch.equal(KERNEL.op(**given), torch.nn.functional.linear(*given.values()))


def test_it_fires_strictly_above_and_a_shut_gate_is_0_whatever_is_there() -> None:
    x = torch.tensor([[1.0], [math.nextafter(1.0, 2.0)], [-math.inf], [math.nan]], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    assert KERNEL.op(x, one[None], None, one).tolist() == [[0.0], [x[1].item()], [0.0], [0.0]]


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1,)], ids=str)
def test_any_number_of_rows(shape: tuple[int, ...]) -> None:
    given = draw(shape)
    found = KERNEL.op(**given, activation="silu", norm="rms")
    assert found.shape == (*shape, 17) and found.shape == KERNEL.fake(**given).shape


def test_gradients() -> None:
    given = moved(draw(2, 3, 4), torch.float64)
    values = [value.requires_grad_() for value in given.values()]
    assert torch.autograd.gradcheck(lambda *args: KERNEL.op(*args, activation="silu", norm="layer"), values)


def test_the_operator_is_a_good_citizen() -> None:
    given = draw((2, 3))
    torch.library.opcheck(KERNEL.op, tuple(given.values()), {"activation": "gelu", "norm": "layer", "score": "abs"})
    torch.library.opcheck(KERNEL.op, (given["x"].requires_grad_(), given["weight"]), {"norm": "rms"})
    strided = torch.randn(19, 4, 3).permute(1, 2, 0).to(torch.bfloat16)
    torch.library.opcheck(KERNEL.op, (strided, given["weight"].bfloat16(), None, given["threshold"]))


def test_sizes_may_be_symbols() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in draw().items():
                if name != "x":
                    self.register_buffer(name, value)

        def forward(self, x: Tensor) -> Tensor:
            return reference(x, **dict(self.named_buffers()), activation="gelu", norm="layer")

    layer, x = Layer(), torch.randn(4, 2, 19)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    for rows in (1, 7):
        x = torch.randn(rows, 2, 19)
        torch.testing.assert_close(exported.module()(x), layer(x))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"activation": "tanh"}, "activation 'tanh' is none of 'none', 'relu'"),
        ({"score": "H"}, "score 'H' is none of 'h', 'abs'"),
        ({"norm": "batch"}, "norm 'batch' is none of"),
        ({"eps": -1.0}, "eps -1.0 is not 0 or more"),
        ({"x": torch.ones(2, 3, dtype=torch.int64)}, "x is torch.int64"),
        ({"x": torch.tensor(1.0)}, r"shape \[\]"),
        ({"weight": torch.ones(3)}, r"not \[out, in = 3\]"),
        ({"weight": torch.ones(4, 2)}, r"not torch.float32 of \[4, 3\]"),
        ({"weight": torch.ones(4, 3).half()}, "weight is torch.float16"),
        ({"bias": torch.ones(4).double()}, "bias is torch.float64"),
        ({"threshold": torch.ones(3)}, r"threshold is torch.float32 of shape \[3\], not torch.float32 of \[4\]"),
        ({"threshold": torch.ones(4).half()}, "threshold is torch.float16"),
        ({"gain": torch.ones(4).double()}, "gain is torch.float64"),
        ({"up_weight": torch.ones(3, 3)}, "up_weight is"),
        ({"up_bias": torch.ones(4)}, "up_bias without up_weight"),
        ({"up_weight": torch.ones(4, 3), "up_bias": torch.ones(1)}, "up_bias is"),
    ],
)
def test_bad_operands_are_refused(change: dict[str, Any], says: str) -> None:
    given = {"x": torch.randn(2, 3), "weight": torch.randn(4, 3), **change}
    for function in (KERNEL.op, KERNEL.fake, launch):
        with pytest.raises(ValueError, match=says):
            function(**given)


def test_what_the_kernel_takes() -> None:
    given = draw()
    assert module.supports(**given) and module.supports(*given.values(), activation="gelu")
    assert module.supports(**draw(dtype=torch.bfloat16)) and not module.supports(**draw(dtype=torch.float64))
    assert not module.supports(**draw(depth=0)) and not module.supports(**draw(out=0))
    assert not module.supports(**{**given, "gain": given["gain"].to("meta")})


# ---- the Triton kernel

EACH = list(itertools.product(ACTIVATIONS, SCORES, NORMS))


def run(given: dict[str, Tensor], device: str, **how: Any) -> Tensor:
    pytest.importorskip("triton")
    return launch(**moved(given, device), **how)


def against_reference(found: Tensor, given: dict[str, Tensor], *, tolerance: float, **how: Any) -> None:
    given = moved(given, torch.float64)
    distance = torch.full(found.shape, math.inf, dtype=torch.float64)
    if "threshold" in given:
        plain = {name: given[name] for name in given if name in ("x", "weight", "bias")}
        h = reference(**plain, **how)
        distance = (h.abs() if how.get("score") == "abs" else h) - given["threshold"]
    check(found, reference(**given, **how), distance, tolerance=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("parts", PARTS, ids="-".join)
@pytest.mark.parametrize(("activation", "score", "norm"), EACH)
def test_every_combination(device: str, activation: str, score: str, norm: str, parts: tuple[str, ...]) -> None:
    given, how = draw(parts=parts), {"activation": activation, "score": score, "norm": norm, "eps": 0.1}
    against_reference(run(given, device, **how), given, tolerance=2e-6, **how)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 130, 33), (131, 70, 37), (5, 257, 128), (70, 3, 200)], ids=str)
def test_odd_sizes(device: str, sizes: tuple[int, int, int], norm: str) -> None:
    given, how = draw(*sizes), {"activation": "silu", "norm": norm, "eps": 0.1}
    against_reference(run(given, device, **how), given, tolerance=4e-6, **how)


@pytest.mark.gpu
def test_more_tiles_than_a_group_has(device: str) -> None:
    given = draw(300, 130, 16)
    against_reference(run(given, device, activation="gelu"), given, tolerance=4e-6, activation="gelu")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3)], ids=str)
def test_rows_of_any_shape(device: str, shape: tuple[int, ...]) -> None:
    given = draw(shape)
    found = run(given, device, norm="rms")
    assert found.shape == (*shape, 17)
    if found.numel():
        against_reference(found, given, tolerance=2e-6, norm="rms")


@pytest.mark.gpu
@pytest.mark.parametrize("norm", NORMS)
def test_any_strides(device: str, norm: str) -> None:
    given = moved(draw(6), device)
    want = launch(**given, norm=norm)
    for name in given:
        whole = given[name]
        forms = [torch.stack([whole, whole.flip(0)], -1)[..., 0]]
        forms += [whole.T.contiguous().T, torch.stack([whole, whole], 1)[:, 0]] if whole.dim() == 2 else []
        for strided in forms:
            assert not strided.is_contiguous()
            assert torch.equal(launch(**{**given, name: strided}, norm=norm), want)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_half_precision(device: str, norm: str, dtype: torch.dtype) -> None:
    given, how = draw(7, 33, 65, dtype=dtype), {"activation": "gelu_tanh", "norm": norm, "eps": 0.1}
    found = run(given, device, **how)
    assert found.dtype == dtype
    # The interpreter rounds to bfloat16 by cutting off, which is up to 1 where rounding to nearest is up to 0.5. The
    # gate is decided in float32: what turns it is not half a unit of bfloat16.
    wide, want = moved(given, torch.float64), found.double().cpu()
    h = reference(wide["x"], wide["weight"], wide["bias"], **how)
    distance = h - wide["threshold"]
    assert bool(((want != 0) == (distance > 0))[distance.abs() > 1e-5].all())
    exact = reference(**wide, **how)
    assert float((want - exact).abs().max()) <= 1.01 * torch.finfo(dtype).eps * float(exact.abs().max())


@pytest.mark.gpu
@pytest.mark.parametrize("score", SCORES)
def test_what_equals_the_threshold_is_shut(device: str, score: str) -> None:
    """Multiples of a quarter: many products equal their threshold."""
    given = draw(9, 33, 3, parts=("threshold", "gain"))
    given = {name: value.mul(2).round() / 2 for name, value in given.items()}
    want = reference(**given, score=score)
    h = reference(given["x"], given["weight"])
    equal = (h.abs() if score == "abs" else h) == given["threshold"]
    assert 0.05 < float(equal.double().mean())
    found = run(given, device, score=score).cpu()
    assert torch.equal(found, want) and not bool(found[equal].any())


@pytest.mark.gpu
def test_statistics_of_rows_far_from_0(device: str) -> None:
    """As E[x²] − μ², σ² would be off by a third of it."""
    given = draw(parts=("bias",))
    given["x"] = given["x"] + 1000.0
    against_reference(run(given, device, norm="layer"), given, tolerance=1e-3, norm="layer")


@pytest.mark.gpu
def test_a_row_of_one_value_has_no_spread(device: str) -> None:
    given = draw(parts=("bias",))
    given["x"] = torch.full_like(given["x"], 3.0)
    found = run(given, device, norm="layer").cpu()
    assert float((found - given["bias"]).abs().max()) < 1e-2  # the rounding of 3·W − 3·W, times 1/√eps


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_bad_values_are_not_hidden(device: str, norm: str, activation: str) -> None:
    given = draw(parts=("bias",))
    given["x"][1, 4] = math.nan
    found = run(given, device, activation=activation, norm=norm)
    assert found[1].isnan().all() and found[[0, 2, 3, 4]].isfinite().all()
    given = draw(parts=("threshold",))
    given["x"][1, 4] = math.nan
    assert not run(given, device, activation=activation, norm=norm)[1].any()


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_values(device: str, activation: str) -> None:
    given = {"x": torch.tensor([[-200.0], [-30.0], [30.0], [200.0]]), "weight": torch.ones(1, 1)}
    against_reference(run(given, device, activation=activation), given, tolerance=1e-6, activation=activation)


@pytest.mark.slow
def test_in_the_interpreter(interpreter: Any) -> None:
    assert interpreter(__file__) > 250


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_only_where_torch_may_and_nothing_can_flip(
    gate: bool, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("fxfreeze.kernels._gated_linear_triton")
    used = []

    def spy(x: Tensor, weight: Tensor, *others: Any, precision: str, **how: Any) -> Tensor:
        used.append(precision)
        return x.new_empty(x.shape[0], weight.shape[0])

    monkeypatch.setattr(triton, "gated_linear", spy)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = allowed
        launch(**draw(parts=("threshold",) if gate else ("gain",)))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert used == ["tf32" if allowed and not gate else "ieee"]


# ---- compiling

BUILDS = {
    "plain": {"activation": "none", "norm": "none", "parts": ()},
    "gelu": {"activation": "gelu", "norm": "none", "parts": ("bias", "threshold", "gain")},
    "layer": {"activation": "gelu", "norm": "layer", "parts": ("bias", "threshold", "gain")},
    "up": {"activation": "silu", "norm": "none", "parts": ("threshold", "gain", "up_weight")},
}
POINTERS = {"bias": "bias_ptr", "threshold": "threshold_ptr", "gain": "gain_ptr", "up_weight": "u_ptr",
            "up_bias": "up_bias_ptr"}  # fmt: skip
NUMBERS = ("M", "N", "K", "stride_xm", "stride_wn", "stride_un")


def build(
    name: str, dtype: str, config: dict[str, int], *, precision: str = "ieee", even: bool = True
) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]:
    """Kernel, types, constants, options."""
    from fxfreeze.kernels import _gated_linear_triton as triton

    how, pointer = BUILDS[name], {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}[dtype]
    types = {"x_ptr": pointer, "w_ptr": pointer, "y_ptr": pointer, "eps": "fp32", **dict.fromkeys(NUMBERS, "i32")}
    types |= {POINTERS[part]: "*fp32" if part in ("threshold", "gain") else pointer for part in how["parts"]}
    constants = {key: value for key, value in config.items() if not key.startswith("num_")}
    constants |= {pointer: None for pointer in POINTERS.values() if pointer not in types}
    constants |= {
        "stride_xk": 1, "stride_wk": 1, "stride_uk": 1, "ACTIVATION": how["activation"], "SCORE": "h",
        "NORM": how["norm"], "EVEN": even, "FACTOR": triton.factor(getattr(torch, dtype)), "PRECISION": precision,
    }  # fmt: skip
    options = {key: value for key, value in config.items() if key.startswith("num_")}
    return triton.gated_linear_kernel, types, constants, options


CASES = [
    ("plain", "bfloat16", "HALF_CONFIGS", (128, 256, 64), True),
    ("gelu", "bfloat16", "HALF_CONFIGS", (128, 256, 64), True),
    ("gelu", "bfloat16", "HALF_CONFIGS", (128, 128, 64), True),
    ("gelu", "bfloat16", "HALF_CONFIGS", (128, 128, 64), False),
    ("gelu", "float16", "HALF_CONFIGS", (64, 128, 64), True),
    ("gelu", "bfloat16", "HALF_CONFIGS", (16, 32, 128), True),
    ("layer", "bfloat16", "HALF_CONFIGS", (64, 128, 64), True),
    ("up", "bfloat16", "HALF_UP_CONFIGS", (128, 128, 64), True),
    ("up", "bfloat16", "HALF_UP_CONFIGS", (16, 16, 128), True),
    ("gelu", "float32", "SINGLE_CONFIGS", (32, 64, 16), True),
    ("up", "float32", "SINGLE_CONFIGS", (64, 64, 16), True),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype", "configs", "tile", "even"), CASES, ids=lambda value: str(value))
def test_within_budget(within_budget: Any, name: str, dtype: str, configs: str, tile: Any, even: bool) -> None:
    triton = pytest.importorskip("fxfreeze.kernels._gated_linear_triton")
    config = next(c for c in getattr(triton, configs) if (c["BM"], c["BN"], c["BK"]) == tile)
    row = f"gated_linear {name} {dtype} {'x'.join(map(str, tile))}{'' if even else ' odd'}"
    kernel, types, constants, options = build(name, dtype, config, even=even)
    within_budget(row, kernel, types, constants, **options)


@pytest.mark.parametrize(
    ("dtype", "precision", "on"),
    [("bfloat16", "ieee", True), ("float16", "ieee", True), ("float32", "tf32", True), ("float32", "ieee", False)],
)
def test_tensor_cores(cost: Any, dtype: str, precision: str, on: bool) -> None:
    triton = pytest.importorskip("fxfreeze.kernels._gated_linear_triton")
    config = triton.TF32_CONFIGS[-1] if dtype == "float32" else triton.HALF_CONFIGS[-1]
    if not on:
        config = triton.SINGLE_CONFIGS[-1]
    kernel, types, constants, options = build("gelu", dtype, config, precision=precision)
    found = cost(kernel, types, constants, **options)
    assert (found.tensor_cores > 0) == on and found.spills == 0


def test_sizes_of_one(cost: Any) -> None:
    """Triton makes constants of integers that are 1."""
    triton = pytest.importorskip("fxfreeze.kernels._gated_linear_triton")
    kernel, types, constants, options = build("layer", "float32", triton.SINGLE_CONFIGS[-1], even=False)
    types = {name: kind for name, kind in types.items() if name not in NUMBERS}
    assert cost(kernel, types, {**constants, **dict.fromkeys(NUMBERS, 1)}, **options).spills == 0


def test_every_depth_of_a_tile_divides_what_counts_as_even() -> None:
    triton = pytest.importorskip("fxfreeze.kernels._gated_linear_triton")
    configs = (triton.HALF_CONFIGS, triton.HALF_UP_CONFIGS, triton.SINGLE_CONFIGS, triton.TF32_CONFIGS)
    assert all(triton.DEPTH % config["BK"] == 0 for config in itertools.chain(*configs))
