"""DeadNeurons: which neurons go, from which weights, and what keeps the others where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

import fxfreeze as fz
from fxfreeze.capture import capture
from fxfreeze.constants import Recipe
from fxfreeze.errors import ProofError
from fxfreeze.kernels.gate import KERNEL
from fxfreeze.passes import PIPELINE, _intervals
from fxfreeze.passes.clean.constants import FoldConstants
from fxfreeze.passes.clean.noops import StripNoOps
from fxfreeze.passes.prune import _channels
from fxfreeze.passes.prune.dead_neurons import DeadNeurons
from fxfreeze.pipeline import run_passes
from fxfreeze.program import Fold, Origin, Program
from fxfreeze.rewrite import Context, LedgerRow

F = nn.functional
DEAD = [1, 4]


class Fn(nn.Module):
    """A function of the layers it is given, with thresholds `t` and gains `g` for six neurons."""

    def __init__(self, function: Callable[..., Any], *layers: nn.Module, **constants: Tensor) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)
        for name, value in {"t": torch.full((6,), 0.1), **constants}.items():
            self.register_buffer(name, value)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs, *self.layers)


def layer(width: int = 4, *, dead: list[int] = DEAD, kind: Any = nn.Linear, **options: Any) -> nn.Module:
    """Six neurons on `width` inputs, of which `dead` are below −10 for inputs in [0, 1]."""
    made = kind(width, 6, **options)
    with torch.no_grad():
        made.bias.fill_(1.0)[dead] = -30.0
    return made


def gate(m: Any, h: Tensor, **options: Any) -> Tensor:
    return KERNEL.op(h, m.t, **options)


def prune(model: nn.Module, *shape: int | str, dtype: str = "float32", **ends: Any) -> tuple[Program, Context]:
    """Prune and prove; every output stays what the model itself says."""
    ends = ends or {"low": 0.0, "high": 1.0}
    plan = fz.Plan(inputs=[fz.Input("x", shape=shape, dtype=dtype, **ends)])
    program, _ = capture(model.eval(), plan)
    ctx = Context(plan)
    run_passes(program, [StripNoOps(), FoldConstants(), DeadNeurons()], ctx)
    return program, ctx


def rows(ctx: Context) -> list[LedgerRow]:
    return [row for row in ctx.ledger if row.requested == "dead neurons"]


def shapes(program: Program) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in program.state.items()}


def gates(program: Program) -> list[Any]:
    return program.graph.find_nodes(op="call_function", target=KERNEL.op)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# ---- what goes


def test_a_neuron_that_never_fires_leaves_its_row_and_its_column() -> None:
    model = Fn(lambda m, x, a, b: b(gate(m, a(x))), layer(), nn.Linear(6, 3))
    program, ctx = prune(model, "batch", 4)
    kept = [0, 2, 3, 5]
    assert torch.equal(program.state["layers.0.weight"], model.layers[0].weight[kept])
    assert torch.equal(program.state["layers.0.bias"], model.layers[0].bias[kept])
    assert torch.equal(program.state["layers.1.weight"], model.layers[1].weight[:, kept])
    assert shapes(program)["t"] == (4,) and shapes(program)["layers.1.bias"] == (3,)
    (row,) = rows(ctx)
    assert row.outcome == "rewritten" and row.detail == "2 of 6 neurons never fire for x in [0, 1]: removed"
    assert row.executes == "4 neurons above t"
    assert gates(program)[0].meta["kept"] == (0, 2, 3, 5)
    x = torch.rand(50, 4)
    assert torch.allclose(program.run(x)[0], model(x), atol=1e-6)
    assert program.run(x)[0].shape == (50, 3)


def test_the_model_itself_keeps_its_weights() -> None:
    model = Fn(lambda m, x, a, b: b(gate(m, a(x))), layer(), nn.Linear(6, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prune(model, "batch", 4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


CHAINS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "activations": (lambda m, x, a, b: b(F.gelu(gate(m, F.silu(a(x)))) * 2), (4,)),
    "constants": (lambda m, x, a, b: b(gate(m, a(x) * m.g + m.c) * m.g / m.d), (4,)),
    "order": (lambda m, x, a, b: b(m.g * gate(m, (m.c - a(x) * -1) / m.d)), (4,)),
    "tokens": (lambda m, x, a, b: b(gate(m, a(x)).relu()), (5, 4)),
    "moved": (lambda m, x, a, b: b(gate(m, a(x).transpose(1, 2), dim=1).permute(0, 2, 1)), (5, 4)),
    "reshaped": (lambda m, x, a, b: b(gate(m, a(x).reshape(-1, 6)).reshape(-1, 5, 6)), (5, 4)),
    "readers": (lambda m, x, a, b: b(y := gate(m, a(x))) + y @ m.w, (4,)),
    "branch": (lambda m, x, a, b: b(gate(m, a(x)) * F.silu(F.linear(x, m.u, m.g))), (4,)),
    "gated": (lambda m, x, a, b: b(F.linear(x, m.u) * gate(m, a(x)) * x.mean(-1, keepdim=True)), (4,)),
    "same": (lambda m, x, a, b: b((y := gate(m, a(x))) * y.tanh() + y), (4,)),
    "twice": (lambda m, x, a, b: b(gate(m, gate(m, a(x)), score="abs")), (4,)),
    "feeders": (lambda m, x, a, b: b(gate(m, a(x) * (1 + F.linear(x, m.u).sigmoid()))), (4,)),
    "matmul": (lambda m, x, a, b: b(gate(m, torch.addmm(a.bias, x, m.u.t()))) + (gate(m, a(x)) @ m.w), (4,)),
    "mean": (lambda m, x, a, b: b(gate(m, a(x)).mean(1)), (5, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_ways_from_and_to_the_weights(name: str) -> None:
    function, shape = CHAINS[name]
    constants = {"g": torch.rand(6) + 0.2, "c": torch.rand(6), "d": torch.rand(6) + 0.5, "w": torch.randn(6, 3),
                 "u": torch.randn(6, 4)}  # fmt: skip
    model = Fn(function, layer(), nn.Linear(6, 3), **constants)
    with torch.no_grad():
        model.layers[0].bias[DEAD] = -500.0
    program, ctx = prune(model, "batch", *shape)
    assert [row.outcome for row in rows(ctx)] == ["rewritten"] * len(rows(ctx)) and rows(ctx)
    assert all(6 not in shape for shape in shapes(program).values()), shapes(program)
    assert all(node.meta["kept"] == (0, 2, 3, 5) for node in gates(program))
    x = torch.rand(7, *shape)
    assert torch.allclose(program.run(x)[0], model(x), atol=1e-5)


CONVS: dict[str, tuple[Callable[..., Tensor], nn.Module]] = {
    "plain": (lambda m, x, a, b: b(gate(m, a(x), dim=1)), nn.Conv2d(6, 3, 3, padding=1)),
    "pools": (lambda m, x, a, b: b(F.avg_pool2d(F.max_pool2d(gate(m, a(x), dim=1), 2, 1, 1), 2)), nn.Conv2d(6, 3, 2)),
    "flat": (lambda m, x, a, b: b(gate(m, a(x), dim=1).flatten(1)), nn.Linear(6 * 16, 3)),
    "view": (lambda m, x, a, b: b(gate(m, a(x), dim=1).reshape(-1, 96).relu()), nn.Linear(6 * 16, 3)),
    "pooled": (lambda m, x, a, b: b(F.adaptive_avg_pool2d(gate(m, a(x), dim=-3), 2).flatten(1)), nn.Linear(24, 3)),
    "up": (lambda m, x, a, b: b(gate(m, a(x), dim=1)), nn.ConvTranspose2d(6, 3, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVS)
def test_convolutions_and_what_a_flatten_makes_of_their_channels(name: str) -> None:
    function, last = CONVS[name]
    model = Fn(function, layer(2, kind=nn.Conv2d, kernel_size=3), last)
    program, ctx = prune(model, "batch", 2, 6, 6)
    assert rows(ctx)[0].outcome == "rewritten" and shapes(program)["layers.0.weight"] == (4, 2, 3, 3)
    x = torch.rand(3, 2, 6, 6)
    assert torch.allclose(program.run(x)[0], model(x), atol=1e-6)
    if name == "flat":
        kept = [at * 16 + inner for at in (0, 2, 3, 5) for inner in range(16)]
        assert torch.equal(program.state["layers.1.weight"], last.weight[:, kept])


def test_all_modes_must_shut_a_neuron_out() -> None:
    levels = torch.full((2, 6), 0.1)
    levels[1, 1] = -1e3  # neuron 1 fires in mode 1
    model = Fn(lambda m, x, mode, a, b: b(KERNEL.op(a(x), m.t, m.g, None, mode)), layer(), nn.Linear(6, 3),
               t=levels, g=torch.ones(2, 6))  # fmt: skip
    inputs = [fz.Input("x", shape=("batch", 4), low=0.0, high=1.0),
              fz.Input("mode", shape=("batch",), dtype="int64", low=0, high=1)]  # fmt: skip
    plan = fz.Plan(inputs=inputs)
    program, _ = capture(model, plan)
    ctx = Context(plan)
    run_passes(program, [DeadNeurons()], ctx)
    assert shapes(program)["t"] == shapes(program)["g"] == (2, 5)
    assert rows(ctx)[0].detail == "1 of 6 neurons never fire for x in [0, 1], mode in [0, 1]: removed"
    assert gates(program)[0].meta["kept"] == (0, 1, 2, 3, 5)


def test_the_score_may_be_the_magnitude() -> None:
    model = Fn(lambda m, x, a, b: b(gate(m, a(x), score="abs")), layer(), nn.Linear(6, 3))
    assert not rows(prune(model, "batch", 4)[1])  # far below 0 is far from 0
    model.t[2] = 50.0
    program, _ = prune(model, "batch", 4)
    assert gates(program)[0].meta["kept"] == (0, 1, 3, 4, 5)


def test_a_gain_of_0_or_columns_of_0_are_dead_too() -> None:
    gain = torch.tensor([1.0, 1, 0, 1, 1, 2])
    model = Fn(lambda m, x, a, b: b(KERNEL.op(a(x), m.t, m.g)), layer(), nn.Linear(6, 3), g=gain)
    with torch.no_grad():
        model.layers[1].weight[:, 5] = 0
    program, ctx = prune(model, "batch", 4)
    assert gates(program)[0].meta["kept"] == (0, 3)
    detail = "2 of 6 neurons never fire for x in [0, 1] and 2 more are multiplied by 0: removed"
    assert rows(ctx)[0].detail == detail
    model = Fn(lambda m, x, a, b: b(gate(m, a(x)) * m.g), layer(dead=[]), nn.Linear(6, 3), g=gain)
    program, ctx = prune(model, "batch", 4, low=None, high=None)
    assert rows(ctx)[0].detail == "1 of 6 neurons are multiplied by 0: removed"
    # A column of 0 in one reader does not silence what another reads.
    model = Fn(lambda m, x, a, b, c: b(y := gate(m, a(x))) + c(y), layer(dead=[]), nn.Linear(6, 3), nn.Linear(6, 3))
    with torch.no_grad():
        model.layers[1].weight[:, 5] = 0
    assert not rows(prune(model, "batch", 4)[1])


def test_a_factor_of_0_silences_only_its_own_way() -> None:
    gain, column = torch.tensor([1.0, 1, 0, 0, 1, 1]), torch.tensor([1.0, 0, 1, 0, 1, 1])
    ways = lambda m, x, a, b, c: b(F.gelu((y := gate(m, a(x))) * m.g)) + c(y)  # noqa: E731
    model = Fn(ways, layer(dead=[]), nn.Linear(6, 3), nn.Linear(6, 3), g=gain)
    assert not rows(prune(model, "batch", 4)[1])
    with torch.no_grad():
        model.layers[2].weight *= column
    program, _ = prune(model, "batch", 4)  # of neuron 1 the first way reads something, of 2 the second
    assert gates(program)[0].meta["kept"] == (0, 1, 2, 4, 5)
    summed = lambda m, x, a, b: b((y := gate(m, a(x))) * m.g + y)  # noqa: E731
    assert not rows(prune(Fn(summed, layer(dead=[]), nn.Linear(6, 3), g=gain), "batch", 4)[1])


def test_a_threshold_of_infinity_is_never_exceeded() -> None:
    levels = torch.tensor([0.1, 0.1, torch.inf, 0.1, 0.1, -torch.inf])
    model = Fn(lambda m, x, a, b: b(gate(m, a(x))), layer(dead=[]), nn.Linear(6, 3), t=levels)
    for ends in ({"low": 0.0, "high": 1.0}, {"low": None, "high": None}):
        assert gates(prune(model, "batch", 4, **ends)[0])[0].meta["kept"] == (0, 1, 3, 4, 5)


NUMBERS: dict[str, Callable[..., Any]] = {
    "behind": lambda m, x, a, b: b(gate(m, a(x)) * x.shape[0]),
    "before": lambda m, x, a, b: b(gate(m, a(x) * x.shape[0])),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_of_rows_has_no_neurons(name: str) -> None:
    levels = torch.tensor([0.1, torch.inf, 0.1, 0.1, 0.1, 0.1])
    program, _ = prune(Fn(NUMBERS[name], layer(dead=[]), nn.Linear(6, 3), t=levels), "batch", 4)
    assert gates(program)[0].meta["kept"] == (0, 2, 3, 4, 5)


def test_of_a_gate_whose_neurons_are_all_dead_one_stays() -> None:
    model = Fn(lambda m, x, a, b: b(gate(m, a(x))), layer(dead=list(range(6))), nn.Linear(6, 3))
    program, ctx = prune(model, "batch", 4)
    assert shapes(program)["layers.0.weight"] == (1, 4) and gates(program)[0].meta["kept"] == (0,)
    assert rows(ctx)[0].detail.endswith(
        "6 of 6 neurons never fire for x in [0, 1]: removed, apart from one, since they are all"
    )


def test_what_was_removed_before_counts_in_what_is_kept() -> None:
    model = Fn(lambda m, x, a, b: b(gate(m, a(x))), layer(), nn.Linear(6, 3))
    plan = fz.Plan(inputs=[fz.Input("x", shape=("batch", 4), low=0.0, high=1.0)])
    program, _ = capture(model, plan)
    gates(program)[0].meta["kept"] = (3, 5, 8, 13, 21, 34)
    gates(program)[0].meta["fxfreeze"] = origin = Origin("gates", "gate", "layers.0")
    ctx = Context(plan)
    run_passes(program, [DeadNeurons()], ctx)
    assert gates(program)[0].meta["kept"] == (3, 8, 13, 34) and gates(program)[0].meta["fxfreeze"] is origin
    assert (rows(ctx)[0].step, rows(ctx)[0].site) == ("gates", "layers.0")


def test_removal_makes_the_next_gate_shrink_too() -> None:
    """Bounds are looked at again, with the new shapes."""
    model = Fn(lambda m, x, a, b, c: c(gate(m, b(gate(m, a(x))))), layer(), layer(6, dead=[0]), nn.Linear(6, 3))
    program, ctx = prune(model, "batch", 4)
    assert [node.meta["kept"] for node in gates(program)] == [(0, 2, 3, 5), (1, 2, 3, 4, 5)]
    assert shapes(program)["layers.1.weight"] == (5, 4) and len(rows(ctx)) == 2


def test_a_weight_that_something_else_reads_is_kept_for_it() -> None:
    shared = layer()
    model = Fn(lambda m, x, a, b: (b(gate(m, a(x))), a(x.square())), shared, nn.Linear(6, 3))
    program, _ = prune(model, "batch", 4)
    found = shapes(program)
    assert found["layers.0.weight"] == (6, 4) and found["layers.0.weight_1"] == (4, 4)
    x = torch.rand(5, 4)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(program.run(x), model(x), strict=True))


def test_what_was_folded_into_a_weight_shrinks_with_it() -> None:
    model = Fn(lambda m, x, a, b: b(gate(m, a(x))), layer(), nn.Linear(6, 3))
    plan = fz.Plan(inputs=[fz.Input("x", shape=("batch", 4), low=0.0, high=1.0)])
    program, _ = capture(model, plan)
    base = program.state["layers.0.weight"]
    program.state["layers.0.weight"] = Recipe(base, (lambda w: w + 0.01,))
    program.folds["layers.0.weight"] = Fold("lora", "layers.0", Recipe(base), 0.5)
    run_passes(program, [DeadNeurons()], Context(plan))
    weight, fold = program.state["layers.0.weight"], program.folds["layers.0.weight"]
    assert weight.dtype == torch.float64 and torch.allclose(
        weight - fold.base.value(), torch.full((4, 4), 0.01).double()
    )


def test_it_is_part_of_the_pipeline_after_the_folds() -> None:
    names = [item.name for item in PIPELINE]
    order = ["recognise-gates", "fold-gate", "fold-affine", "dead-neurons", "merge-constants"]
    assert sorted(order, key=names.index) == order
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Threshold(0.5, 0.0), nn.Flatten(), nn.Linear(96, 3))
    with torch.no_grad():
        model[1].bias[DEAD] = -100.0
    plan = fz.Plan(inputs=[fz.Input("x", shape=("batch", 2, 6, 6), low=0.0, high=1.0)])
    program, _ = capture(model.eval(), plan)
    ctx = Context(plan)
    run_passes(program, PIPELINE, ctx)
    assert [str(node.target) for node in program.graph.nodes if node.op == "call_function"] == [
        "aten.conv2d.default", "aten.reshape.default", "aten.gt.Tensor", "aten.where.ScalarOther",
        "aten.flatten.using_ints", "aten.linear.default",
    ]  # fmt: skip
    assert shapes(program)["0.weight"] == (4, 2, 3, 3) and shapes(program)["4.weight"] == (3, 64)
    x = torch.rand(4, 2, 6, 6)
    assert torch.allclose(program.run(x)[0], model(x), atol=1e-5)


# ---- what stays


STAYS: dict[str, tuple[Callable[..., Any], str]] = {
    "output": (lambda m, x, a, b: gate(m, a(x)), "an output of the model"),
    "residual": (lambda m, x, a, b: b(gate(m, a(x)) + F.pad(x, (0, 2))), "adds it to something else"),
    "shift": (lambda m, x, a, b: b(gate(m, a(x)) + 1), "other than 0"),
    "constant": (lambda m, x, a, b: b(m.t + gate(m, a(x))), "adds it to something else"),
    "sigmoid": (lambda m, x, a, b: b(gate(m, a(x)).sigmoid()), "other than 0"),
    "softmax": (lambda m, x, a, b: b(gate(m, a(x)).softmax(-1)), "other than 0"),
    "score": (lambda m, x, a, b: b(gate(m, h := a(x))) + h[:, :3], "read elsewhere too"),
    "normed": (lambda m, x, a, b: b(gate(m, F.layer_norm(a(x), (6,)) - 9)), "layer_norm"),
    "input": (lambda m, x, a, b: b(gate(m, torch.cat([x, x[:, :2]], 1) - 9)), "cat"),
    "computed": (lambda m, x, a, b: gate(m, a(x)) @ x.new_ones(6, 2).cumsum(0), "computed"),
    "quotient": (lambda m, x, a, b: b(1 / (1 + gate(m, a(x)))), "other than 0"),
    "branch": (lambda m, x, a, b: b(gate(m, a(x)) * (u := F.linear(x, m.u))) + u[:, :3], "read elsewhere too"),
    "split": (lambda m, x, a, b: b(gate(m, a(x)).unflatten(-1, (2, 3)).flatten(1)), "mixes"),
    "squeeze": (lambda m, x, a, b: b(gate(m, a(x)).squeeze(1)), "squeeze"),
    "squeezes": (lambda m, x, a, b: b(gate(m, a(x)[:, None].squeeze((1, 2)))), "squeeze"),
    "mixed": (lambda m, x, a, b: b(gate(m, a(x)).reshape(-1, 3, 2).transpose(1, 2).reshape(-1, 6)), "mixes"),
}


@pytest.mark.parametrize("name", STAYS)
def test_the_gate_stays_and_the_ledger_says_why(name: str) -> None:
    function, reason = STAYS[name]
    program, ctx = prune(Fn(function, layer(), nn.Linear(6, 3), u=torch.randn(6, 4)), "batch", 4)
    (row,) = rows(ctx)
    assert row.outcome == "skipped" and " of 6 neurons never fire for x in [0, 1], but stay: " in row.detail
    assert reason in row.detail, row.detail
    assert gates(program)[0].meta["val"].shape[-1] == 6 and "kept" not in gates(program)[0].meta


def test_neurons_that_a_gate_behind_lets_fire_at_0_stay() -> None:
    for level, outcome in ((-0.5, "skipped"), (0.0, "rewritten")):
        levels = torch.tensor([0.1, level, 0.1, 0.1, 0.1, 0.1])
        chain = lambda m, x, a, b: b(KERNEL.op(gate(m, a(x)).tanh(), m.u))  # noqa: E731
        program, ctx = prune(Fn(chain, layer(dead=[1]), nn.Linear(6, 3), u=levels), "batch", 4)
        assert rows(ctx)[0].outcome == outcome
        assert ("fires where they are silent" in rows(ctx)[0].detail) is (level < 0)
    levels = torch.tensor([-0.5, 0.1, -0.5, -0.5, -0.5, -0.5])  # the others may be below 0
    program, _ = prune(Fn(chain, layer(dead=[1]), nn.Linear(6, 3), u=levels), "batch", 4)
    assert gates(program)[0].meta["kept"] == (0, 2, 3, 4, 5)


def test_grouped_convolutions_stay() -> None:
    model = Fn(
        lambda m, x, a, b: b(gate(m, a(x), dim=1)),
        layer(2, kind=nn.Conv2d, kernel_size=3),
        nn.Conv2d(6, 6, 3, groups=6),
    )
    (row,) = rows(prune(model, "batch", 2, 6, 6)[1])
    assert row.outcome == "skipped" and "conv2d has groups" in row.detail


def test_without_a_range_nothing_is_dead() -> None:
    model = Fn(lambda m, x, a, b: b(gate(m, a(x))), layer(), nn.Linear(6, 3))
    assert not rows(prune(model, "batch", 4, low=None, high=None)[1])
    assert not rows(prune(model, "batch", 4, low=0.0, high=1e3)[1])  # and over a wide one other neurons fire


def test_soft_gates_and_computed_thresholds_stay() -> None:
    soft = Fn(lambda m, x, a, b: b(KERNEL.op(a(x), m.t, None, m.t[0])), layer(), nn.Linear(6, 3))
    computed = Fn(lambda m, x, a, b: b(KERNEL.op(a(x), x[0, :1].expand(6))), layer(), nn.Linear(6, 3))
    assert not rows(prune(soft, "batch", 4)[1]) and not rows(prune(computed, "batch", 4)[1])


@pytest.mark.parametrize(("above", "dead"), [(2e-5, True), (3e-6, False), (1e-7, False), (-1e-7, False)])
def test_what_rounding_may_let_fire_stays(above: float, dead: bool) -> None:
    """Neuron 0 reaches 2, to the last bit of float32 or not: its threshold must be above that by some roundings."""
    first = nn.Linear(2, 2)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[0.5, 1.5], [1.0, -1.0]]))
        first.bias.zero_()
    level = torch.tensor([2.0 + above, 0.0], dtype=torch.float64)
    model = Fn(lambda m, x, a, b: b(KERNEL.op(a(x), m.t)), first, nn.Linear(2, 2), t=level)
    _, ctx = prune(model, "batch", 2)
    assert bool(rows(ctx)) is dead, rows(ctx)


@pytest.mark.parametrize(("level", "dead"), [(1 + 1e-5, True), (1 - 1e-8, False)])
def test_a_threshold_may_be_rounded_too(level: float, dead: bool) -> None:
    levels = torch.full((4,), level, dtype=torch.float64)
    _, ctx = prune(Fn(lambda m, x, a: a(KERNEL.op(x, m.t)), nn.Linear(4, 3), t=levels), "batch", 4)
    assert bool(rows(ctx)) is dead and all("made from an input" in row.detail for row in rows(ctx))


def test_a_relu_does_not_hide_a_neuron_within_rounding_of_firing() -> None:
    """Its largest value is −1e-6 where terms of 1 cancel: in float32 it may be above 0."""
    first = nn.Linear(2, 2, bias=True)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
        first.bias.copy_(torch.tensor([-0.1, -2.0 - 1e-6]))
    model = Fn(lambda m, x, a, b: b(KERNEL.op(a(x).relu(), m.t)), first, nn.Linear(2, 2), t=torch.zeros(2))
    program, _ = prune(model, "batch", 2)
    assert gates(program)[0].meta["kept"] == (1,)  # −0.1 is not within rounding


# ---- wrong versions


PLAIN = (lambda m, x, a, b: b(gate(m, a(x))), "batch", 4)


def refuted(function: Callable[..., Any] = PLAIN[0]) -> None:
    with pytest.raises(ProofError):
        prune(Fn(function, layer(), nn.Linear(6, 3), c=torch.rand(6) + 1), "batch", 4)


def test_the_proof_rejects_the_wrong_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_channels, "entries", lambda kept, span: [(at + 1) % 6 for at in kept])
    with pytest.raises(ProofError):
        # Of the rows, the columns and the thresholds all the wrong ones: consistent, and other neurons are gone.
        prune(Fn(PLAIN[0], layer(), nn.Linear(6, 3)), "batch", 4)


def test_the_proof_rejects_the_wrong_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    original = _channels._shrink

    def shrink(program: Program, cut: Any, kept: Any) -> Any:
        return original(program, cut, [0, 1, 2, 3] if cut.dim == 1 else kept)

    monkeypatch.setattr(_channels, "_shrink", shrink)
    refuted()


def test_the_proof_rejects_lower_bounds_for_upper_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    original = _intervals.Bounds.of

    def flipped(bounds: _intervals.Bounds, node: Node) -> _intervals.Interval | None:
        found = original(bounds, node)
        return None if found is None else _intervals.Interval(found.high, found.low)

    monkeypatch.setattr(_intervals.Bounds, "of", flipped)
    refuted()


def test_the_proof_rejects_a_sigmoid_taken_for_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_channels, "SILENT", _channels.SILENT | {torch.ops.aten.sigmoid.default})
    refuted(lambda m, x, a, b: b(gate(m, a(x)).sigmoid()))


def test_the_proof_rejects_a_shift_that_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_channels._Walk, "_reads", _loosely(_channels._Walk._reads))
    refuted(lambda m, x, a, b: b(gate(m, a(x)) + 1.5))


def _loosely(original: Any) -> Any:
    def reads(self: Any, user: Any, value: Any, dim: int, span: int) -> Any:
        return (dim, span) if user.target in _channels.SUMS else original(self, user, value, dim, span)

    return reads
