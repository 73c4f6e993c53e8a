"""Bounds on every value: no input within its range leaves them, and they are tight where interval arithmetic can be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Node

import fxfreeze as fz
from fxfreeze.capture import capture
from fxfreeze.constants import lift
from fxfreeze.kernels.gate import KERNEL
from fxfreeze.passes import _intervals as module
from fxfreeze.passes._intervals import Bounds, Interval, intervals
from fxfreeze.passes.clean.noops import StripNoOps
from fxfreeze.program import Program, lifted_call
from fxfreeze.rewrite import Context

F = nn.functional


class Fn(nn.Module):
    def __init__(self, function: Callable[..., Any], *layers: nn.Module, **constants: Tensor) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)
        for name, value in constants.items():
            self.register_buffer(name, value)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs, *self.layers)


def program_of(model: nn.Module, *inputs: fz.Input) -> Program:
    plan = fz.Plan(inputs=list(inputs))
    program, _ = capture(model.eval(), plan)
    StripNoOps().run(program, Context(plan))
    program.sweep()
    return program


def image(
    *shape: int | str, low: float | None = -1.0, high: float | None = 2.0, name: str = "x", **more: Any
) -> fz.Input:
    return fz.Input(name, shape=shape, low=low, high=high, **more)


def values(program: Program, inputs: list[Tensor]) -> dict[Node, Tensor]:
    """What every operator returns, in float64."""
    found: dict[Node, Any] = {}

    def call(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found[node] = lifted_call(node, args, kwargs)
        return found[node]

    program.execute([lift(value) for value in inputs], lambda node: lift(program.state[str(node.target)]), call)
    return {node: value for node, value in found.items() if isinstance(value, Tensor)}


def draw(program: Program, rows: int, generator: torch.Generator) -> list[Tensor]:
    """Inputs within their ranges, of which many are at an end."""
    drawn = []
    for spec in program.inputs:
        shape = [rows if isinstance(size, str) else size for size in spec.shape]
        low, high = -4.0 if spec.low is None else spec.low, 4.0 if spec.high is None else spec.high
        value = torch.rand(shape, generator=generator, dtype=torch.float64)
        value = (value * 1.6 - 0.3).clamp(0, 1) * (high - low) + low
        drawn.append(value if spec.dtype.is_floating_point else value.round().to(spec.dtype))
    return drawn


def assert_sound(program: Program, draws: int = 6, seed: int = 0) -> dict[Node, Interval]:
    bounds, generator = intervals(program), torch.Generator().manual_seed(seed)
    for interval in bounds.values():
        assert not bool(interval.low.isnan().any() or interval.high.isnan().any())
        assert bool((interval.low <= interval.high).all())
    for at in range(draws):
        for node, value in values(program, draw(program, rows := 1 + at % 3, generator)).items():
            if node not in bounds:
                continue
            low, high = (repeated(end, value, rows) for end in (bounds[node].low, bounds[node].high))
            assert bool(((low <= value.double()) & (value.double() <= high)).all()), (str(node.target), node.name)
    return bounds


def repeated(end: Tensor, value: Tensor, rows: int) -> Tensor:
    """Bounds of one row for all rows: each dim that grew holds rows of the same kind, one after the other."""
    return end.repeat([size // one for size, one in zip(value.shape, end.shape, strict=True)])


def bounded(program: Program, bounds: dict[Node, Interval]) -> list[bool]:
    """Of each output, whether both its bounds are finite."""
    return [bool(bounds[node].low.isfinite().all() and bounds[node].high.isfinite().all())
            for node in program.output_nodes]  # fmt: skip


# ---- every operator


T = torch.tensor
UNARY: dict[str, Callable[[Fn, Tensor], Tensor]] = {
    "relu": lambda m, x: F.relu(x),
    "relu6": lambda m, x: F.relu6(x * 5),
    "hardtanh": lambda m, x: F.hardtanh(x, -0.5, 0.5),
    "clamp": lambda m, x: x.clamp(-0.2, 0.7) + x.clamp(min=0) - x.clamp(max=0.3),
    "leaky": lambda m, x: F.leaky_relu(x, 0.1),
    "prelu": lambda m, x: F.prelu(x, m.four[:3]),
    "gelu": lambda m, x: F.gelu(x * 3),
    "gelu_tanh": lambda m, x: F.gelu(x * 3, approximate="tanh"),
    "silu": lambda m, x: F.silu(x * 3),
    "mish": lambda m, x: F.mish(x * 3),
    "hardswish": lambda m, x: F.hardswish(x * 4),
    "sigmoid": lambda m, x: torch.sigmoid(x) + x.tanh() + F.softplus(x) + F.hardsigmoid(x),
    "softmax": lambda m, x: x.softmax(-1),
    "abs": lambda m, x: x.abs() - x.square() + x**2 + x * x,
    "exp": lambda m, x: x.exp(),
    "sqrt": lambda m, x: x.abs().sqrt(),
    "numbers": lambda m, x: 1 - (x * 2 + 3) / -7,
    "constants": lambda m, x: torch.sub(m.four - x * m.four, m.four, alpha=-2),
    "quotient": lambda m, x: x / (2 + x.abs()) + m.four / (x - 5),
    "products": lambda m, x: x * (x - 1) * (x + m.four),
    "extrema": lambda m, x: torch.maximum(x, m.four * x) + torch.minimum(x, m.four),
    "mean": lambda m, x: x.mean(-1) + x.mean((1, 2)).unsqueeze(1) + x.sum(-1) + x.amax(-1) - x.amin(-1),
    "max": lambda m, x: x.max(-1).values + x.min(-1).values,
    "cat": lambda m, x: torch.cat([x, x * 2], -1).sum(-1),
    "stack": lambda m, x: torch.stack([x, x * 2], 1),
    "moves": lambda m, x: x.reshape(-1, 12).unflatten(1, (3, 4)).permute(0, 2, 1).transpose(1, 2)[:, 1, 1:, None],
    "rows": lambda m, x: (x.reshape(-1, 4) * m.four).reshape(-1, 3, 4),
    "expand": lambda m, x: x[:, :1].expand(-1, 5, 4) + m.four.expand(x.shape[0], 5, 4),
    "chunk": lambda m, x: x.chunk(2, -1)[0] * x.split([1, 3], -1)[0] + x.unbind(1)[1][:, None, :1],
    "where": lambda m, x: torch.where(x > 0.3, x, x * -2) + torch.where(x > 0, 1.0, x).masked_fill(x < 0.1, 7.0),
    "norms": lambda m, x: F.layer_norm(x, (4,), m.four, m.four) + F.rms_norm(x, (4,), m.four),
    "matmul": lambda m, x: x @ m.square + m.left @ x,
    "bmm": lambda m, x: torch.addmm(m.four, x[:, 0], m.square) + torch.mm(x[:, 1], m.square),
    "gate": lambda m, x: KERNEL.op(x, m.four),
    "gate_gain": lambda m, x: KERNEL.op(x, m.four, m.gain) + KERNEL.op(x, m.gain, m.four, score="abs"),
    "gate_dim": lambda m, x: KERNEL.op(x, m.four[:3], m.gain[:3], dim=1),
    "gate_soft": lambda m, x: KERNEL.op(x, m.four, m.gain, m.gain[0] ** 2),
    "casts": lambda m, x: x.double().float() + (x > 0).float(),
    "transposed_rows": lambda m, x: x.transpose(0, 1).reshape(-1, 4),
    "row_cat": lambda m, x: torch.cat([x, x * 3]).reshape(-1, 2, 3, 4),
    "last_row": lambda m, x: torch.cat([x, x * 3])[-1] + x[0],
}  # fmt: skip
CONSTANTS = {
    "four": T([0.5, -0.3, 1.2, 0.0]), "gain": T([2.0, -1.0, 0.4, 0.7]),
    "square": torch.linspace(-1, 2, 16).reshape(4, 4), "left": torch.linspace(-1, 1, 9).reshape(3, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.parametrize(("low", "high"), [(-1.0, 2.0), (0.25, 0.75), (-3.0, -1.0)])
def test_nothing_leaves_the_bounds_and_there_are_bounds(name: str, low: float, high: float) -> None:
    program = program_of(Fn(UNARY[name], **CONSTANTS), image("batch", 3, 4, low=low, high=high))
    assert all(bounded(program, assert_sound(program)))


@pytest.mark.parametrize("name", UNARY)
def test_without_a_range_there_are_infinities_and_no_nan(name: str) -> None:
    program = program_of(Fn(UNARY[name], **CONSTANTS), image("batch", 3, 4, low=None, high=None))
    assert_sound(program)
    assert intervals(program)[program.placeholders[0]].low.isinf().all()


def test_half_a_range_is_none() -> None:
    program = program_of(Fn(lambda m, x: x.sin()), image("batch", 4, low=0.0, high=None))
    assert intervals(program)[program.placeholders[0]].low.isinf().all()


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (6,)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), (4, 7)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding="valid"), (3, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 3, 3, 3)),
    "same": (lambda: nn.Conv2d(3, 4, 3, padding="same", dilation=2), (3, 7, 7)),
    "up": (lambda: nn.ConvTranspose2d(3, 4, 2, stride=2), (3, 4, 4)),
    "norm": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)), (3, 5, 5)),
    "pools": (lambda: nn.Sequential(nn.MaxPool2d(2, 1, 1), nn.AvgPool2d(2, 1, 1), nn.AdaptiveAvgPool2d(2)), (3, 5, 5)),
    "maxima": (lambda: nn.AdaptiveMaxPool2d(2), (3, 5, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    model = make()
    for item in model.modules():
        if isinstance(item, nn.BatchNorm2d):
            item.running_mean.normal_()
            item.running_var.uniform_(0.5, 2)
    program = program_of(model, image("batch", *shape))
    assert all(bounded(program, assert_sound(program)))
    assert_sound(program_of(model, image("batch", *shape, low=None, high=None)))


def test_an_embedding_is_within_the_rows_it_may_read() -> None:
    torch.manual_seed(0)
    tokens = fz.Input("x", shape=("batch", 5), dtype="int64", low=2, high=4)
    model = nn.Embedding(9, 3)
    program = program_of(model, tokens)
    (bound,) = (assert_sound(program)[node] for node in program.output_nodes)
    rows = model.weight[2:5].double()
    assert torch.equal(bound.low[0, 0], rows.amin(0)) and torch.equal(bound.high[0, 4], rows.amax(0))


def test_a_gate_with_modes_is_bounded_over_all_of_them() -> None:
    model = Fn(
        lambda m, x, mode: KERNEL.op(x, m.t, m.g, None, mode), t=T([[0.5, 9.0], [1.5, 9.0]]), g=T([[1.0, 1], [-3, 1]])
    )
    mode = fz.Input("mode", shape=("batch",), dtype="int64", low=0, high=1)
    program = program_of(model, image("batch", 2), mode)
    bound = assert_sound(program)[program.output_nodes[0]]
    assert bound.low[0].tolist() == pytest.approx([-6, 0]) and bound.high[0].tolist() == pytest.approx([2, 0], abs=1e-6)


# ---- how tight


def test_a_linear_layer_reaches_its_bounds_at_a_corner() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    program = program_of(layer, image("batch", 6))
    bound = intervals(program)[program.output_nodes[0]]
    weight = layer.weight.double()
    for end, corner in (
        (bound.high[0], torch.where(weight > 0, 2.0, -1.0)),
        (bound.low[0], torch.where(weight > 0, -1.0, 2.0)),
    ):
        reached = (weight * corner).sum(1) + layer.bias.double()
        assert torch.allclose(end, reached, rtol=1e-7, atol=1e-9)


def test_a_padded_convolution_reaches_its_bounds_at_a_corner() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 1, 3, padding=1)
    program = program_of(conv, image("batch", 2, 4, 4))
    bound = intervals(program)[program.output_nodes[0]].high[0, 0, 0, 0]
    inside = conv.weight.detach().double()[0, :, 1:, 1:]
    assert float(bound) == pytest.approx(float(torch.maximum(inside * 2, -inside).sum() + conv.bias.detach()), rel=1e-6)


@pytest.mark.parametrize(
    ("function", "low", "high"),
    [(F.relu, 0, 2), (torch.abs, 0, 2), (torch.square, 0, 4), (lambda x: x * x, 0, 4), (torch.sigmoid, 0.26894, 0.8808),
     (F.gelu, -0.16997, 1.95450), (lambda x: F.silu(x * 2), -0.27846, 3.92806), (lambda x: x - 1, -2, 1),
     (lambda x: KERNEL.op(x, T([0.5] * 4)), 0, 2), (lambda x: KERNEL.op(x, T([2.5] * 4)), 0, 0),
     (lambda x: KERNEL.op(x, T([-1.5] * 4)), -1, 2), (lambda x: KERNEL.op(x, T([0.5] * 4), T([-1.0] * 4)), -2, 0)],
)  # fmt: skip
def test_elementwise_bounds_are_tight(function: Callable[[Tensor], Tensor], low: float, high: float) -> None:
    program = program_of(Fn(lambda m, x: function(x)), image("batch", 4))
    bound = assert_sound(program)[program.output_nodes[0]]
    assert bound.low.unique().tolist() == pytest.approx([low], abs=1e-5)
    assert bound.high.unique().tolist() == pytest.approx([high], abs=1e-5)


WRAPS: dict[str, tuple[Callable[[Fn, Tensor], Tensor], str, float, float]] = {
    "sum": (lambda m, x: (x + 100).float(), "int8", -100, 127),
    "difference": (lambda m, x: (x - 128).float(), "uint8", 0, 255),
    "negative": (lambda m, x: (-x).float(), "uint8", 0, 5),
    "lowest": (lambda m, x: (-x).float() + x.abs(), "int8", -128, -120),
    "product": (lambda m, x: (x * 3 + x * x).float(), "int8", -20, 20),
    "long": (lambda m, x: (x * 3).double(), "int64", 0, 2**62),
}


@pytest.mark.parametrize("name", WRAPS)
def test_integers_that_wrap_around_may_be_anything(name: str) -> None:
    function, dtype, low, high = WRAPS[name]
    program = program_of(Fn(function), image("batch", 40, low=low, high=high, dtype=dtype))
    assert all(bounded(program, assert_sound(program)))


def test_integers_that_stay_within_their_dtype_keep_their_bounds() -> None:
    program = program_of(Fn(lambda m, x: (x - 128).float()), image("batch", 4, low=128, high=255, dtype="uint8"))
    bound = assert_sound(program)[program.output_nodes[0]]
    assert float(bound.low.min()) == 0 and float(bound.high.max()) == 127


UNBATCHED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(2, 4, 1), (2, 4)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 1), (2, 4, 4)),
    "up": (lambda: nn.ConvTranspose1d(2, 4, 1), (2, 4)),
}


@pytest.mark.parametrize("name", UNBATCHED)
def test_a_bias_lies_along_the_channels_without_a_batch_too(name: str) -> None:
    torch.manual_seed(0)
    make, shape = UNBATCHED[name]
    model = make()
    with torch.no_grad():
        model.bias.copy_(T([0.0, 10.0, 20.0, 30.0]))
    program = program_of(model, image(*shape))
    assert all(bounded(program, assert_sound(program)))


@pytest.mark.parametrize(("beta", "threshold", "high"), [(1.0, 1.0, 1.05), (1.0, 1.0, 0.99), (2.0, -1.0, 1.0)])
def test_a_softplus_falls_at_its_threshold(beta: float, threshold: float, high: float) -> None:
    at = threshold / beta
    program = program_of(
        Fn(lambda m, x: F.softplus(x, beta, threshold)), image("batch", 500, low=at - 0.05, high=max(high, at))
    )
    assert all(bounded(program, assert_sound(program)))


def test_operators_turned_upside_down_are_not_bounded() -> None:
    for function in (lambda m, x: F.softplus(x, -1.0), lambda m, x: F.avg_pool2d(x, 2, divisor_override=-3)):
        program = program_of(Fn(function), image("batch", 3, 4, 4))
        assert bounded(program, assert_sound(program)) == [False]


def test_half_an_infinite_range_keeps_its_finite_end() -> None:
    program = program_of(
        Fn(lambda m, x, layer: layer(F.relu(x)), nn.Linear(3, 2)), image("batch", 3, low=None, high=None)
    )
    with torch.no_grad():
        program.state["layers.0.weight"] = T([[1.0, 2.0, 0.5], [1.0, 0.0, -1.0]])
    bound = intervals(program)[program.output_nodes[0]]
    bias = float(program.state["layers.0.bias"][0])
    assert (
        float(bound.low[0, 0]) == pytest.approx(bias) and math.isinf(bound.high[0, 0]) and math.isinf(bound.low[0, 1])
    )


def test_bounds_with_rounding_hold_in_float32() -> None:
    """Terms of a hundred that cancel: float32 leaves the bounds of real arithmetic, not those with room for it."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 50)
    with torch.no_grad():
        layer.weight[:, 32:] = -layer.weight[:, :32]
        layer.bias.zero_()
    program = program_of(layer, image("batch", 64, low=100.0, high=100.0))
    (node,) = program.output_nodes
    found = program.run(torch.full((1, 64), 100.0))[0].double()
    narrow, wide = intervals(program)[node], intervals(program, rounding=True)[node]
    assert not bool(((narrow.low <= found) & (found <= narrow.high)).all())
    assert bool(((wide.low <= found) & (found <= wide.high)).all())
    assert float((wide.high - wide.low).max()) < 1e-2
    silent = program_of(Fn(lambda m, x: F.relu(x - 5)), image("batch", 4))
    assert bool((intervals(silent, rounding=True)[silent.output_nodes[0]].high == 0).all())


def test_bounds_with_rounding_have_room_for_that_of_a_bias() -> None:
    layer = nn.Linear(1, 1)
    with torch.no_grad():
        layer.weight.fill_(1e-3)
        layer.bias.fill_(1000.0)
    program = program_of(layer, image("batch", 1, low=0.0, high=0.59))
    bound = intervals(program, rounding=True)[program.output_nodes[0]]
    found = program.run(torch.linspace(0, 0.59, 100)[:, None])[0].double()
    assert bool(((bound.low <= found) & (found <= bound.high)).all())


def test_bounds_with_rounding_are_infinite_where_a_dtype_ends() -> None:
    program = program_of(Fn(lambda m, x: (x * 100).exp() * -1), image("batch", 4, low=0.0, high=1.0, dtype="float16"))
    bound = intervals(program, rounding=True)[program.output_nodes[0]]
    assert bool(program.run(torch.ones(1, 4, dtype=torch.float16))[0].isneginf().all())
    assert bool(bound.low.isneginf().all()) and float(bound.high.max()) == pytest.approx(-1, abs=0.5)
    assert bool(intervals(program)[program.output_nodes[0]].low.isfinite().all())


# ---- rows


ROWS: dict[str, Callable[[Fn, Tensor], Tensor]] = {
    "sum": lambda m, x: x.sum(0),
    "count": lambda m, x: x * x.shape[0],
    "gram": lambda m, x: x[:, 0].t() @ x[:, 0],
    "slice": lambda m, x: x[x.shape[0] - 1 :],
}


@pytest.mark.parametrize("name", ROWS)
def test_what_grows_with_the_number_of_rows_is_not_taken_for_one_row(name: str) -> None:
    program = program_of(Fn(ROWS[name]), image("batch", 3, 4, low=1.0, high=2.0))
    bounds = intervals(program)
    found = [bounds[node] for node in program.output_nodes if node in bounds]
    assert all(bool(item.high.isinf().all()) for item in found)


def test_another_symbolic_dim_is_not_bounded() -> None:
    program = program_of(Fn(lambda m, x: (x.sin(), x.mean(1))), image("batch", "time", 4))
    bounds = intervals(program)
    assert program.placeholders[0] not in bounds and program.output_nodes[0] not in bounds
    assert bool(bounds[program.output_nodes[1]].high.isinf().all())


# ---- networks


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(width, width), nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.second(F.gelu(self.first(x))) * F.silu(self.first(x)))


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    """Convolutions, pools and activations, then layers with residuals and gated branches."""
    layers: list[nn.Module] = []
    channels = 2
    for _ in range(draw(st.integers(0, 3))):
        match draw(st.sampled_from(["conv", "pool", "norm", "mean"])):
            case "conv":
                layers.append(nn.Conv2d(channels, 4, 3, padding=draw(st.sampled_from([1, "same"]))))
                channels = 4
            case "pool":
                layers.append(nn.MaxPool2d(2, 1, 1))
            case "norm":
                layers.append(nn.BatchNorm2d(channels))
            case "mean":
                layers.append(nn.AvgPool2d(2, 1, 1))
        layers.append(draw(st.sampled_from([nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Tanh(), nn.LeakyReLU(0.1)])))
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(channels * 4, 6)]
    layers += [draw(st.sampled_from([Residual(6), nn.Linear(6, 6), nn.Sigmoid(), nn.LayerNorm(6)])) for _ in range(2)]
    return nn.Sequential(*layers)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(networks(), st.integers(0, 2**16), st.sampled_from([(-1.0, 1.0), (0.0, 255.0), (5.0, 5.5)]))
def test_random_networks(model: nn.Module, seed: int, ends: tuple[float, float]) -> None:
    torch.manual_seed(seed)
    program = program_of(model, image("batch", 2, 5, 5, low=ends[0], high=ends[1]))
    assert all(bounded(program, assert_sound(program, seed=seed)))


# ---- wrong versions


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("weighted", lambda product, value, w: module._made(product(value.low, w), product(value.high, w))),
        ("_valley", module._rising),
        ("_total", module._rising),
    ],
)  # fmt: skip
def test_wrong_rules_are_caught(monkeypatch: pytest.MonkeyPatch, name: str, broken: Any) -> None:
    original = getattr(module, name)
    monkeypatch.setattr(module, name, broken)
    monkeypatch.setattr(
        module, "RULES", {key: broken if rule is original else rule for key, rule in module.RULES.items()}
    )
    model = Fn(lambda m, x, layer: F.gelu(layer(x)) + x.sum(0), nn.Linear(4, 4))
    with pytest.raises(AssertionError):
        assert_sound(program_of(model, image("batch", 4, low=-3.0, high=1.0)), draws=50)


def test_behind_a_rewrite_bounds_are_computed_again_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)]
    plan = fz.Plan(inputs=[fz.Input("x", shape=(2, 4), low=-1.0, high=1.0)])
    program = capture(nn.Sequential(*layers).eval(), plan)[0]
    looked: list[Node] = []
    original = module._result
    monkeypatch.setattr(module, "_result", lambda node, *rest: looked.append(node) or original(node, *rest))
    first, relu, second, last, third = [node for node in program.graph.nodes if node.op == "call_function"]
    bounds = Bounds(program)
    assert bounds.of(last) is not None and looked == [first, relu, second, last]
    weight = second.args[1]
    assert isinstance(weight, Node)
    program.rebind(weight, program.state[str(weight.target)] * 2, user=second)
    looked.clear()
    found, fresh = bounds.of(third), intervals(program)[third]
    assert found is not None and torch.equal(found.low, fresh.low) and torch.equal(found.high, fresh.high)
    assert looked[:3] == [second, last, third]


def test_what_has_no_bounds_costs_no_product() -> None:
    calls = []

    def product(x: Tensor, weight: Tensor) -> Tensor:
        if not x.is_meta:
            calls.append(1)
        return torch.matmul(x, weight)

    ends = torch.zeros(2, 3, dtype=torch.float64), torch.full((2, 3), math.inf, dtype=torch.float64)
    found = module.weighted(product, Interval(*ends), torch.tensor([[1.0], [-1.0], [0.0]], dtype=torch.float64))
    assert len(calls) == 2 and bool(found.low.isinf().all() and found.high.isinf().all())
    bad = module.weighted(product, Interval(*ends), torch.tensor([[math.inf], [1.0], [1.0]], dtype=torch.float64))
    assert bool(bad.low.isinf().all() and bad.high.isinf().all())


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.RMSNorm(4)], ids=["layer norm", "RMS norm"])
def test_what_is_in_front_of_a_norm_is_not_computed(monkeypatch: pytest.MonkeyPatch, norm: nn.Module) -> None:
    torch.manual_seed(0)
    nn.init.normal_(norm.weight)  # type: ignore[arg-type]
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), norm, nn.Linear(4, 4), nn.Linear(4, 4))
    program = program_of(model, image("batch", 4, low=-1.0, high=1.0))
    looked: list[Node] = []
    original = module._result
    monkeypatch.setattr(module, "_result", lambda node, *rest: looked.append(node) or original(node, *rest))
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    whole = intervals(program)
    looked.clear()
    found = Bounds(program).of(calls[3])
    assert looked == calls[2:4]
    assert found is not None and bool(found.high.isfinite().all())
    assert torch.equal(found.low, whole[calls[3]].low) and torch.equal(found.high, whole[calls[3]].high)
