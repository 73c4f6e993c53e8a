"""Compact: which units go, what is left of constants and sizes, and what keeps units where they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxfreeze as fz
from fxfreeze.api import rewrite
from fxfreeze.capture import capture
from fxfreeze.constants import Recipe
from fxfreeze.errors import ProofError
from fxfreeze.kernels.gate import KERNEL
from fxfreeze.passes import PIPELINE
from fxfreeze.passes.prune import _constancy, _reading, _removal, compact
from fxfreeze.passes.prune.compact import Compact
from fxfreeze.pipeline import proof_draws, run_passes
from fxfreeze.program import Fold, Program
from fxfreeze.rewrite import Context, LedgerRow

DEAD = [1, 4]


class Fn(nn.Module):
    """A function of the layers and constants it is given, by name."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def layer(width: int = 4, count: int = 6, kind: Any = nn.Linear, level: float = 0.0, **options: Any) -> nn.Module:
    """`count` units on `width` inputs, of which those that are DEAD have no weights, and this bias."""
    made = kind(width, count, **options)
    with torch.no_grad():
        made.bias.uniform_(0.5, 1.5)
        rows = made.weight.transpose(0, 1) if isinstance(made, nn.ConvTranspose2d) else made.weight
        rows[DEAD] = 0
        made.bias[DEAD] = level
    return made


def compacted(model: nn.Module, *shape: int | str, **spec: Any) -> tuple[Program, Context]:
    """Compact and prove; the model itself stays as it is."""
    plan = fz.Plan([fz.Input("x", shape, **spec)], dims={"seq": fz.Dim(max=20)} if "seq" in shape else {}, targets=[])
    program, flat = capture(model.eval(), plan)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ctx, draws = Context(plan), proof_draws(program, "full")
    run_passes(program, [Compact()], ctx, draws=draws)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for inputs in draws:
        for found, wanted in zip(program.run(*inputs), flat(*inputs), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    return program, ctx


def shapes(program: Program) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in program.state.items()}


def rows(ctx: Context) -> list[LedgerRow]:
    return [row for row in ctx.ledger if row.requested == "compaction"]


def said(ctx: Context) -> list[tuple[str, str, str]]:
    return [(row.site, row.outcome, row.detail) for row in rows(ctx)]


# ---- what goes


def test_what_is_zero_leaves_its_row_its_bias_and_its_column() -> None:
    model = Fn(lambda m, x: m.b(F.gelu(m.a(x))), a=layer(), b=nn.Linear(6, 3))
    program, ctx = compacted(model, "batch", 4)
    kept = [0, 2, 3, 5]
    assert torch.equal(program.state["a.weight"], model.a.weight[kept])
    assert torch.equal(program.state["a.bias"], model.a.bias[kept])
    assert torch.equal(program.state["b.weight"], model.b.weight[:, kept])
    assert torch.equal(program.state["b.bias"], model.b.bias)
    assert said(ctx) == [("a", "rewritten", "2 of 6 neurons, all zero")]
    assert rows(ctx)[0].executes == "4 neurons"
    assert [node.meta["val"].dtype for node in program.graph.nodes if node.op == "get_attr"] == [torch.float32] * 4


def test_what_nothing_reads_goes_and_frees_what_only_it_reads() -> None:
    model = Fn(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))), a=nn.Linear(4, 5), b=nn.Linear(5, 6), c=nn.Linear(6, 3))
    with torch.no_grad():
        model.c.weight[:, [0, 3]] = 0  # of b, 0 and 3 are not read
        model.b.weight[:, 2] = torch.tensor([1.0, 0, 0, 1, 0, 0])  # of a, 2 is read by these alone
    program, ctx = compacted(model, "batch", 4)
    assert shapes(program) == {"a.weight": (4, 4), "a.bias": (4,), "b.weight": (4, 4), "b.bias": (4,),
                               "c.weight": (3, 4), "c.bias": (3,)}  # fmt: skip
    assert said(ctx) == [("a", "rewritten", "1 of 5 neurons, read by nothing"),
                         ("b", "rewritten", "2 of 6 neurons, read by nothing")]  # fmt: skip


def test_rows_that_go_free_others_in_the_next_round() -> None:
    """Neurons of b are constant once those of a, which are zero, are looked through; then a third layer's too."""
    model = Fn(lambda m, x: m.d(F.relu(m.c(F.relu(m.b(F.relu(m.a(x))))))), a=layer(), b=nn.Linear(6, 5),
               c=nn.Linear(5, 4), d=nn.Linear(4, 3))  # fmt: skip
    with torch.no_grad():
        model.b.weight[2] = torch.tensor([0, 1.0, 0, 0, 1.0, 0])
        model.b.bias[2] = 0.75
        model.c.weight[1] = torch.tensor([0, 0, 1.0, 0, 0])
        model.c.bias[1] = 0.25
    program, ctx = compacted(model, "batch", 4)
    assert shapes(program)["a.weight"] == (4, 4) and shapes(program)["b.weight"] == (4, 4)
    assert shapes(program)["c.weight"] == (3, 4) and shapes(program)["d.weight"] == (3, 3)
    wanted = model.d.bias.double() + model.d.weight[:, 1].double()
    torch.testing.assert_close(program.state["d.bias"], wanted, rtol=1e-7, atol=1e-7)
    assert ("b", "rewritten", "1 of 5 neurons, constant, now in the bias of c") in said(ctx)
    assert ("c", "rewritten", "1 of 4 neurons, constant, now in the bias of d") in said(ctx)


def test_the_columns_of_a_simplex_head_that_are_zero_free_features() -> None:
    """K vectors of one length with equal angles lie in K − 1 dims; a fixed head has K columns, and zeros beyond."""
    simplex = (torch.eye(4) - 0.25) * math.sqrt(4 / 3)
    model = Fn(lambda m, x: F.linear(F.relu(m.a(x)), m.simplex), a=nn.Linear(8, 16), simplex=F.pad(simplex, (0, 12)))
    program, ctx = compacted(model, "batch", 8)
    assert shapes(program) == {"a.weight": (4, 8), "a.bias": (4,), "simplex": (4, 4)}
    assert said(ctx) == [("a", "rewritten", "12 of 16 neurons, read by nothing")]


def test_of_a_group_without_use_one_unit_stays() -> None:
    """A layer without neurons is no layer to most targets."""
    model = Fn(lambda m, x: x + m.b(F.relu(m.a(x))), a=nn.Linear(4, 6), b=nn.Linear(6, 4))
    with torch.no_grad():
        model.b.weight.zero_()
    program, ctx = compacted(model, "batch", 4)
    assert shapes(program) == {"a.weight": (1, 4), "a.bias": (1,), "b.weight": (4, 1), "b.bias": (4,)}
    assert said(ctx) == [("a", "rewritten", "5 of 6 neurons, read by nothing; one has to stay")]


def test_both_reasons_are_told_apart() -> None:
    model = Fn(lambda m, x: m.b(m.a(x)), a=layer(), b=nn.Linear(6, 3))
    with torch.no_grad():
        model.b.weight[:, [0, 4]] = 0
    _, ctx = compacted(model, "batch", 4)
    assert said(ctx) == [("a", "rewritten", "3 of 6 neurons, 1 all zero and 2 read by nothing")]


# ---- on the way


def keep(x: Tensor) -> Tensor:
    return x


WAYS: dict[str, tuple[Callable[[Tensor], Tensor], int, int]] = {
    "functions": (lambda x: F.silu(F.hardswish(x)).tanh().mul(3).square().sum((2, 3)), 6, 4),
    "scaled by others": (lambda x: (x * x.mean((2, 3), keepdim=True).sigmoid()).amax((2, 3)), 6, 4),
    "sums": (lambda x: (x + F.relu(x) - x / 3).sum((2, 3)), 6, 4),
    "products": (lambda x: (x * (1 + x.exp())).mean((2, 3)), 6, 4),
    "pools": (lambda x: F.adaptive_avg_pool2d(F.avg_pool2d(F.max_pool2d(x, 2, 1, 1), 2, 1, 1), 1).flatten(1), 6, 4),
    "resampled": (lambda x: F.interpolate(F.interpolate(x, scale_factor=2), 5, mode="bilinear").sum((2, 3)), 6, 4),
    "padded": (lambda x: F.pad(F.pad(x, (1, 2, 3, 0)), (1, 1, 1, 1), mode="replicate").amax((2, 3)), 6, 4),
    "flattened": (lambda x: x.flatten(1), 6 * 16, 4 * 16),
    "named sizes": (lambda x: x.reshape(-1, 6, 16).reshape(-1, 96), 6 * 16, 4 * 16),
    "moved": (lambda x: x.permute(0, 2, 3, 1).reshape(-1, 4, 24).transpose(1, 2).flatten(1), 6 * 16, 4 * 16),
    "shifted": (lambda x: F.pad(x.mean((2, 3)), (2, 1)), 9, 5),  # a single entry is not looked at
    "sliced": (lambda x: torch.cat([x[:, 3:], x[:, :-1]], 1).sum((2, 3)), 8, 5),
    "split": (lambda x: torch.cat(x.split([1, 2, 3], 1)[::-1], 1).sum((2, 3)), 6, 4),
    "chunked": (lambda x: torch.cat([y.relu() for y in x.chunk(2, 1)], 1).sum((2, 3)), 6, 4),
    "narrowed": (lambda x: x.narrow(1, 1, 4).sum((2, 3)), 4, 2),
    "concatenated": (lambda x: torch.cat([x, x.new_ones(x.shape[0], 2, 4, 4), x.relu()], 1).sum((2, 3)), 14, 9),
    "repeated": (lambda x: x.sum((2, 3)).repeat(1, 3), 18, 12),
    "interleaved": (lambda x: x.sum((2, 3)).repeat_interleave(3, 1), 18, 12),
    "expanded": (lambda x: x.sum((2, 3))[:, :, None].expand(-1, 6, 2).flatten(1), 12, 8),
    "stacked": (lambda x: torch.stack([x, x.sin()], 2).flatten(1), 6 * 32, 4 * 32),
    "unfolded": (lambda x: F.unfold(x, 2).flatten(1), 6 * 36, 4 * 36),
    "shuffled": (lambda x: F.channel_shuffle(x, 2).sum((2, 3)), 6, 4),
    "unshuffled": (lambda x: F.pixel_unshuffle(x, 2).flatten(1), 6 * 16, 4 * 16),
    "masked": (lambda x: (x * (x.sum(1, keepdim=True) > 0)).sum((2, 3)), 6, 4),
    "contracted": (lambda x: torch.einsum("bchw,bdhw->bcd", x, x).sum(2), 6, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", WAYS)
def test_zeros_are_followed_and_sizes_rewritten(name: str) -> None:
    function, width, left = WAYS[name]
    model = Fn(lambda m, x: m.b(function(m.a(x))), a=layer(3, kind=nn.Conv2d, kernel_size=1), b=nn.Linear(width, 3))
    program, ctx = compacted(model, "batch", 3, 4, 4)
    assert shapes(program)["b.weight"] == (3, left), program
    gone = 2 if left < width else 0
    if name not in ("narrowed", "sliced"):
        assert shapes(program)["a.weight"][0] == 6 - gone
    assert all(row.outcome == "rewritten" for row in rows(ctx)), said(ctx)


def test_all_of_a_group_may_go_where_there_are_others() -> None:
    """A shortcut that pads with channels of zeros, and a layer that adds nothing to them."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(F.relu(F.pad(m.a(x), (3, 2)) + m.c(x)))

    wide = nn.Linear(4, 11)
    with torch.no_grad():
        for value in wide.parameters():
            value[:3] = value[9:] = 0
    model = Fn(forward, a=nn.Linear(4, 6), c=wide, b=nn.Linear(11, 3))
    program, ctx = compacted(model, "batch", 4)
    found = shapes(program)
    assert (found["a.weight"], found["c.weight"], found["b.weight"]) == ((6, 4), (6, 4), (3, 6))
    assert not [node for node in program.graph.nodes if "pad" in str(node.target)]
    assert said(ctx) == [("c", "rewritten", "3 of 3 neurons, all zero"), ("c", "rewritten", "2 of 2 neurons, all zero")]


def test_convolutions_of_all_kinds() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.depth(F.relu(m.up(F.relu(m.a(x))))))
        return m.one(m.single(x).flatten(2)).mean(2)

    depth = nn.Conv2d(6, 12, 3, groups=6, padding=1)
    with torch.no_grad():
        depth.weight[[2, 3]] = 0
        depth.bias.uniform_(0.5, 1.5)[[2, 3]] = 0  # both outputs of group 1
    model = Fn(forward, a=layer(3, kind=nn.Conv2d, kernel_size=3), up=layer(6, kind=nn.ConvTranspose2d, kernel_size=2),
               depth=depth, single=nn.Conv2d(12, 4, 1, groups=1), one=nn.Conv1d(4, 3, 1))  # fmt: skip
    program, _ = compacted(model, "batch", 3, 6, 6)
    found = shapes(program)
    assert found["a.weight"] == (4, 3, 3, 3) and found["up.weight"] == (4, 4, 2, 2)
    # Of what unit 4 of up feeds the biases are left, which go on into that of single; unit 1 goes with its group.
    assert found["depth.weight"] == (8, 1, 3, 3) and found["single.weight"] == (4, 8, 1, 1)
    (node,) = [
        node for node in program.graph.nodes if node.op == "call_function" and "depth" in program.module_path(node)
    ]
    assert node.args[-1] == 4


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_groups_go_whole_or_the_same_of_each(kind: Any) -> None:
    first, grouped = nn.Conv2d(3, 8, 1), kind(8, 8, 3, groups=2)
    with torch.no_grad():
        for zero in (first, grouped):
            zero.bias.uniform_(0.5, 1.5)
        for at in (1, 5):  # the second of both groups
            first.weight[at], first.bias[at] = 0, 0
    model = Fn(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))), a=first, b=grouped, c=nn.Conv2d(8, 2, 1))
    found = shapes(compacted(model, "batch", 3, 5, 5)[0])
    assert found["a.weight"] == (6, 3, 1, 1) and found["c.weight"] == (2, 8, 1, 1)
    assert found["b.weight"] == ((6, 4, 3, 3) if kind is nn.ConvTranspose2d else (8, 3, 3, 3))
    with torch.no_grad():
        model.c.weight[:, 4:] = 0  # and the second group is not read
    program, _ = compacted(model, "batch", 3, 5, 5)
    found = shapes(program)
    assert found["a.weight"] == (3, 3, 1, 1) and found["c.weight"] == (2, 4, 1, 1)
    assert found["b.weight"] == ((3, 4, 3, 3) if kind is nn.ConvTranspose2d else (4, 3, 3, 3))
    with torch.no_grad():
        first.weight[2], first.bias[2] = 0, 0  # of the first group alone, it could not go
        model.c.weight[:, 4:] = 1
    assert shapes(compacted(model, "batch", 3, 5, 5)[0])["a.weight"] == (6, 3, 1, 1)


def test_norms_lose_channels_and_whole_groups() -> None:
    norm, batch = nn.GroupNorm(3, 6), nn.BatchNorm2d(6)
    model = Fn(lambda m, x: m.c(m.batch(m.b(m.norm(m.a(x))))), a=layer(3, kind=nn.Conv2d, kernel_size=1), norm=norm,
               b=layer(6, kind=nn.Conv2d, kernel_size=1), batch=batch, c=nn.Conv2d(6, 2, 1))  # fmt: skip
    with torch.no_grad():
        for value in (norm.weight, norm.bias, batch.weight, batch.bias, batch.running_mean, batch.running_var):
            value.uniform_(0.5, 1.5)
        model.a.weight[:2], model.a.bias[:2], norm.bias[:2] = 0, 0, 0  # the first group is 0 before, and behind
        batch.weight[4], batch.bias[4] = 0, 0
        batch.bias[1] = batch.running_mean[1] / (batch.running_var[1] + batch.eps).sqrt() * batch.weight[1]
    program, _ = compacted(model, "batch", 3, 4, 4)
    found = shapes(program)
    assert found["norm.weight"] == (4,) and found["a.weight"] == (4, 3, 1, 1)
    assert found["b.weight"][:2] == (4, 4) and found["batch.running_mean"] == (4,)
    (node,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.group_norm.default)
    assert node.args[1] == 2


def test_an_embedding_loses_columns() -> None:
    table = nn.Embedding(9, 6)
    with torch.no_grad():
        table.weight[:, DEAD] = 0
    program, ctx = compacted(nn.Sequential(table, nn.ReLU(), nn.Linear(6, 3)), "batch", 5, dtype="int64", low=0, high=8)
    assert shapes(program)["0.weight"] == (9, 4) and shapes(program)["2.weight"] == (3, 4)
    assert said(ctx) == [("0", "rewritten", "2 of 6 neurons, all zero")]


def test_a_residual_stage_shrinks_where_all_that_add_to_it_are_zero() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        for block in (m.one, m.two):
            x = x + block(F.relu(x))
        return m.head(x)

    parts = {name: layer(width) for name, width in (("stem", 4), ("one", 6), ("two", 6))}
    model = Fn(forward, **parts, head=nn.Linear(6, 3))
    found = shapes(compacted(model, "batch", 4)[0])
    assert found["stem.weight"] == (4, 4) and found["one.weight"] == found["two.weight"] == (4, 4)
    with torch.no_grad():
        parts["one"].weight[1] = 1  # the head reads it
    assert shapes(compacted(model, "batch", 4)[0])["stem.weight"][0] == 5


def test_a_unit_that_is_zero_here_and_not_read_there() -> None:
    """The stem's unit 1 is 0 where one reads it; then one adds to it, and two has no column for it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.two(x + m.one(x))

    model = Fn(forward, stem=layer(), one=nn.Linear(6, 6), two=nn.Linear(6, 3))
    with torch.no_grad():
        model.two.weight[:, 1] = 0
    program, ctx = compacted(model, "batch", 4)
    assert shapes(program)["stem.weight"] == (5, 4) and shapes(program)["two.weight"] == (3, 5)
    assert said(ctx) == [("stem", "rewritten", "1 of 6 neurons, all zero")]


def test_sequences_and_batches_stay_dynamic() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).reshape(x.shape[0] * x.shape[1], 6)
        return m.b(y.reshape(x.shape[0], x.shape[1], 2, 3).transpose(1, 2).reshape(x.shape[0] * 2, -1, 3)).sum(1)

    model = Fn(forward, a=nn.Linear(4, 6), b=nn.Linear(3, 2))
    with torch.no_grad():
        model.b.weight[:, 1] = 0
    program, _ = compacted(model, "batch", "seq", 4)
    assert shapes(program)["a.weight"] == (4, 4)
    for sizes in ((1, 1), (3, 7), (2, 19)):
        x = torch.randn(*sizes, 4)
        torch.testing.assert_close(program.run(x)[0], model(x), rtol=1e-5, atol=1e-5)


# ---- constants


def run_constant(function: Callable[..., Any], level: float = 0.5, **parts: Any) -> tuple[Program, Context, Any]:
    model = Fn(function, **{"a": layer(level=level), "b": nn.Linear(6, 3), **parts})
    return *compacted(model, "batch", 4), model


def test_a_constant_goes_into_the_bias() -> None:
    program, ctx, model = run_constant(lambda m, x: m.b(F.gelu(m.a(x)) * 2 - 1))
    assert shapes(program)["a.weight"] == (4, 4) and shapes(program)["b.weight"] == (3, 4)
    level = F.gelu(torch.tensor(0.5, dtype=torch.float64)) * 2 - 1
    wanted = model.b.bias.double() + level * model.b.weight[:, DEAD].double().sum(1)
    torch.testing.assert_close(program.state["b.bias"], wanted, rtol=1e-12, atol=1e-12)
    assert said(ctx) == [("a", "rewritten", "2 of 6 neurons, constant, now in the bias of b")]
    assert program.graph.find_nodes(op="get_attr", target="b.bias")[0].meta["val"].dtype == torch.float32


def test_a_slope_per_feature_makes_a_constant_of_each() -> None:
    slopes = torch.linspace(-1, 1, 6)
    program, _, model = run_constant(lambda m, x: m.b(F.prelu(m.a(x), slopes)), level=-0.5)
    assert shapes(program)["b.weight"] == (3, 4)
    levels = -0.5 * slopes[DEAD].double()
    wanted = model.b.bias.double() + model.b.weight[:, DEAD].double() @ levels
    torch.testing.assert_close(program.state["b.bias"], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "matmul", "conv"])
def test_a_bias_is_made_where_there_is_none(name: str) -> None:
    if name == "conv":
        model = Fn(lambda m, x: m.b(F.relu(m.a(x))), a=layer(2, kind=nn.Conv2d, kernel_size=3, level=0.5),
                   b=nn.Conv2d(6, 3, 3, bias=False))  # fmt: skip
        program, _ = compacted(model, "batch", 2, 7, 7)
        wanted = 0.5 * model.b.weight[:, DEAD].sum((1, 2, 3))
    else:
        ways: dict[str, Callable[..., Any]] = {"linear": lambda m, x: m.b(m.a(x)), "matmul": lambda m, x: m.a(x) @ m.w}
        program, _, model = run_constant(ways[name], b=nn.Linear(6, 3, bias=False), w=torch.randn(6, 3))
        wanted = 0.5 * (model.w[DEAD].sum(0) if name == "matmul" else model.b.weight[:, DEAD].sum(1))
    (bias,) = [value for found, value in program.state.items() if value.shape == (3,)]
    torch.testing.assert_close(bias.float(), wanted, rtol=1e-5, atol=1e-6)
    assert 4 in next(value.shape for found, value in program.state.items() if found in ("w", "b.weight"))


def test_constants_of_grouped_and_flattened_features() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.c(F.relu(m.b(F.relu(m.a(x)))).flatten(1))

    grouped = nn.Conv2d(6, 4, 1, groups=2)
    model = Fn(forward, a=layer(3, kind=nn.Conv2d, kernel_size=1, level=0.5), b=grouped, c=nn.Linear(16, 2))
    with torch.no_grad():
        grouped.bias.uniform_(0.5, 1.5)
        grouped.weight[[0, 2]] = 0  # the first of both groups
        grouped.bias[[0, 2]] = 0.75
    program, _ = compacted(model, "batch", 3, 2, 2)
    found = shapes(program)
    assert found["a.weight"] == (4, 3, 1, 1) and found["b.weight"] == (2, 2, 1, 1) and found["c.weight"] == (2, 8)
    wanted = model.c.bias + 0.75 * (model.c.weight[:, :4].sum(1) + model.c.weight[:, 8:12].sum(1))
    torch.testing.assert_close(program.state["c.bias"].float(), wanted, rtol=1e-5, atol=1e-6)


STUCK: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "padding": (lambda m, x: m.p(m.a(x)[:, :, None, None].expand(-1, -1, 3, 3)), {"p": nn.Conv2d(6, 2, 3, padding=1)},
                "conv2d at p makes something else of them at the edges"),
    "twice": (lambda m, x: m.b(m.a(x)) + m.b(m.a(x).relu() * 3), {}, "the weight of linear at b is computed, or read"),
    "product": (lambda m, x: m.a(x) @ m.c(x).unflatten(1, (6, 2)), {"c": nn.Linear(4, 12)}, "matmul has no bias"),
    "summed": (lambda m, x: m.a(x).sum(-1), {}, "sum has no bias"),
}  # fmt: skip


@pytest.mark.parametrize("name", STUCK)
def test_constants_that_stay_say_why(name: str) -> None:
    function, parts, reason = STUCK[name]
    if name == "product":
        function = lambda m, x: (m.a(x)[:, None] @ m.c(x).unflatten(1, (6, 2)))[:, 0]  # noqa: E731
    program, ctx, _ = run_constant(function, **parts)
    assert shapes(program)["a.weight"] == (6, 4)
    stays = [row.detail for row in rows(ctx) if row.outcome == "skipped" and row.site == "a"]
    assert stays and all(f"but stay: {reason}" in text for text in stays), said(ctx)
    assert not [row for row in rows(ctx) if row.outcome == "rewritten"]


# ---- what stays


def test_zeros_that_are_normalised_over_or_returned_stay() -> None:
    for function, reason in (
        (lambda m, x: m.b(F.layer_norm(y := m.a(x), (6,)) + m.b(y).sum()), "is normalised over by layer_norm"),
        (lambda m, x: (m.b(y := m.a(x)), y), "reaches an output"),
        (lambda m, x: m.b(m.a(x)) + m.b(m.a(x).sort(-1)[0]), "is read by sort, which is not known"),
    ):
        program, ctx = compacted(Fn(function, a=layer(), b=nn.Linear(6, 3)), "batch", 4)
        assert shapes(program)["a.weight"] == (6, 4)
        assert all(row.outcome == "skipped" and reason in row.detail for row in rows(ctx)), said(ctx)


LIVE: dict[str, Callable[..., Any]] = {
    "sigmoid": lambda m, x: m.b(m.a(x).sigmoid() * x[:, :1]),
    "shift": lambda m, x: m.p(F.pad(m.a(x)[:, :, None], (1, 1), value=1.0)).mean(2),
    "added": lambda m, x: m.b(m.a(x) + m.c(x)),
    "read elsewhere": lambda m, x: m.b(F.relu(m.a(x) + m.c(x))) + m.d(m.a(x) + m.c(x)),
    "a jump": lambda m, x: m.b((m.a(x) >= 0).float() * m.c(x)),
    "divided": lambda m, x: m.b(m.c(x) / (1 + m.a(x))),
    "chosen": lambda m, x: m.b(torch.where(x[:, :1] > 0, m.a(x), m.c(x)).masked_fill(x[:, :1] > 1, 0.5)),
}


@pytest.mark.parametrize("name", LIVE)
def test_what_is_not_zero_where_it_is_read_stays(name: str) -> None:
    parts = {"c": nn.Linear(4, 6), "d": nn.Linear(6, 3), "p": nn.Conv1d(6, 3, 3)}
    program, ctx = compacted(Fn(LIVE[name], a=layer(), b=nn.Linear(6, 3), **parts), "batch", 4)
    assert shapes(program)["a.weight"] == (6, 4), said(ctx)


def test_a_weight_that_is_returned_keeps_its_rows() -> None:
    model = Fn(lambda m, x: (m.b(F.relu(m.a(x))), m.a.weight * 2), a=layer(), b=nn.Linear(6, 3))
    program, ctx = compacted(model, "batch", 4)
    assert shapes(program)["a.weight"] == (6, 4)
    assert said(ctx) == [("a", "skipped", "2 of 6 neurons, all zero, but stay: reaches an output")]


def test_a_weight_that_two_layers_share_shrinks_for_both_or_for_none() -> None:
    function = lambda m, x: m.b(F.relu(m.a(x))) + m.c(F.relu(m.a(x.flip(0))))  # noqa: E731
    model = Fn(function, a=layer(), b=nn.Linear(6, 3), c=nn.Linear(6, 3))
    found = shapes(compacted(model, "batch", 4)[0])
    assert found == {"a.weight": (4, 4), "a.bias": (4,), "b.weight": (3, 4), "b.bias": (3,), "c.weight": (3, 4),
                     "c.bias": (3,)}  # fmt: skip
    model = Fn(function, a=nn.Linear(4, 6), b=nn.Linear(6, 3), c=nn.Linear(6, 3))
    with torch.no_grad():
        model.b.weight[:, 1] = 0
    assert shapes(compacted(model, "batch", 4)[0])["a.weight"] == (6, 4)  # the other reads it
    with torch.no_grad():
        model.c.weight[:, 1] = 0
    assert shapes(compacted(model, "batch", 4)[0])["a.weight"] == (5, 4)


def test_neurons_of_gates_are_left_to_their_own_pass() -> None:
    model = Fn(lambda m, x: m.b(KERNEL.op(m.a(x), m.level)), a=layer(), b=nn.Linear(6, 3), level=torch.full((6,), 0.1))
    program, ctx = compacted(model, "batch", 4)
    assert shapes(program)["a.weight"] == (6, 4) and not rows(ctx)


# ---- with the rest of the pipeline


def test_it_runs_after_the_folds_and_before_rows_are_looked_at() -> None:
    names = [item.name for item in PIPELINE]
    order = ["fold-masks", "fold-delta", "fold-affine", "dead-neurons", "compact", "unread-rows", "merge-constants"]
    assert sorted(order, key=names.index) == order


def test_batch_norms_are_folded_before() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten()
    )
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 1.5)[DEAD] = 0
        model[1].bias.uniform_(0.5, 1.5)[4] = -1  # what is left of 1 is its bias; the ReLU shuts 4 out
    done = rewrite(model.eval(), fz.Plan([fz.Input("x", ("batch", 3, 6, 6))], targets=[]))
    assert shapes(done.program)["0.weight"] == (4, 3, 3, 3) and shapes(done.program)["3.weight"] == (4, 4, 3, 3)
    (row,) = [row for row in done.ledger if row.requested == "compaction"]
    assert row.detail == "2 of 6 channels, 1 all zero and 1 constant, now in the bias of 3"
    x = torch.randn(3, 3, 6, 6)
    torch.testing.assert_close(done.program.run(x)[0], model(x), rtol=1e-5, atol=1e-5)
    assert all(value.dtype == torch.float32 for value in done.program.state.values())


def test_a_lora_that_is_folded_in_shrinks_with_its_layer() -> None:
    model = Fn(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Linear(4, 6), b=nn.Linear(6, 3))
    plan = fz.Plan([fz.Input("x", ("batch", 4))], [fz.LoRA(at="b", rank=2)], targets=[])
    net = fz.adapt(model, plan)
    with torch.no_grad():
        model.b.weight[:, 2] = 0
        for value in net.parameters():
            value.normal_()
            if value.shape == (2, 6):
                value[:, 2] = 0
    done = rewrite(net, plan)
    assert shapes(done.program) == {"a.weight": (5, 4), "a.bias": (5,), "b.weight": (3, 5), "b.bias": (3,)}
    assert any(row.requested.startswith("LoRA") and row.outcome == "rewritten" for row in done.ledger)


def test_what_a_fold_began_with_shrinks_too() -> None:
    model = Fn(lambda m, x: m.b(F.relu(m.a(x))), a=layer(level=0.5), b=nn.Linear(6, 3))
    plan = fz.Plan([fz.Input("x", ("batch", 4))], targets=[])
    program, _ = capture(model, plan)
    for name in ("a.weight", "b.weight", "b.bias"):
        base = program.state[name]
        program.state[name] = Recipe(base, (lambda w: w * 1.25,))
        program.folds[name] = Fold("lora", name, Recipe(base), 0.5)
    run_passes(program, [Compact()], Context(plan))
    for name, fold in program.folds.items():
        value, base = program.state[name], fold.base.value()
        assert value.shape == base.shape and value.dtype == torch.float64
        if name == "b.bias":
            # What was folded into the bias before is told apart from what is added now.
            torch.testing.assert_close(value - base, 0.25 * model.b.bias.double(), rtol=1e-9, atol=1e-9)
            added = 0.5 * 1.25 * model.b.weight[:, DEAD].double().sum(1)
            torch.testing.assert_close(value, 1.25 * model.b.bias.double() + added, rtol=1e-9, atol=1e-9)
        else:
            torch.testing.assert_close(value, 1.25 * base.double(), rtol=1e-12, atol=1e-12)


# ---- wrong versions


def deep() -> nn.Module:
    """A concat, a residual, heads and constants: something of everything."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.cat([F.relu(m.a(x)), m.b(x)], -1)
        heads = m.v(y).unflatten(-1, (3, 2)).transpose(1, 2)
        q = m.q(y).unflatten(-1, (3, 2)).transpose(1, 2)
        return m.out(F.scaled_dot_product_attention(q, heads, heads).transpose(1, 2).flatten(2))

    v, b = nn.Linear(12, 6), nn.Linear(4, 6)
    with torch.no_grad():
        v.weight[2:4], v.bias[2:4] = 0, 0
    return Fn(forward, a=layer(level=0.5), b=b, v=v, q=nn.Linear(12, 6), out=nn.Linear(6, 3))


def refuted(model: nn.Module, *shape: int | str) -> None:
    with pytest.raises(ProofError, match="compact"):
        compacted(model, *shape)


def test_the_right_version_is_proven() -> None:
    program, _ = compacted(deep(), "batch", 5, 4)
    assert shapes(program)["v.weight"] == (4, 10) and shapes(program)["out.weight"] == (3, 4)


@pytest.mark.parametrize("dim", [0, 1])
def test_the_proof_rejects_a_wrong_row_or_column(monkeypatch: pytest.MonkeyPatch, dim: int) -> None:
    original = _removal._Removal._shrink

    def shrink(self: Any, name: str, indices: Any) -> None:
        if name == ("a.weight", "out.weight")[dim]:
            indices = {**indices, dim: (indices[dim] + 1) % self.program.state[name].shape[dim]}
        original(self, name, indices)

    monkeypatch.setattr(_removal._Removal, "_shrink", shrink)
    refuted(deep(), "batch", 5, 4)


def test_the_proof_rejects_a_forgotten_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    original = compact._refine
    monkeypatch.setattr(compact, "_refine", lambda program, constant, edit, user: None if "bias" in str(constant.target)
                        else original(program, constant, edit, user))  # fmt: skip
    refuted(deep(), "batch", 5, 4)


def test_the_proof_rejects_an_offset_that_is_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a concat, where the second part's columns are one further on."""
    original = _removal._Removal._mask

    def mask(self: Any, axis: Any) -> Any:
        found, form = original(self, axis), self.axes.form(axis)
        return found.roll(1) if found is not None and form is not None and form.kind == "sum" else found

    monkeypatch.setattr(_removal._Removal, "_mask", mask)
    refuted(deep(), "batch", 5, 4)


def test_the_proof_rejects_padding_that_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    for room in (_constancy, _reading):
        monkeypatch.setattr(room, "unpadded", lambda node, made: True)
    refuted(Fn(lambda m, x: m.b(m.a(x)), a=layer(2, kind=nn.Conv2d, kernel_size=1, level=0.5),
               b=nn.Conv2d(6, 2, 3, padding=1)), "batch", 2, 4, 4)  # fmt: skip


def test_the_proof_rejects_a_scale_that_follows_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(_removal._SIZES, "scaled_dot_product_attention")
    model = deep()
    with torch.no_grad():
        model.q.weight[::2], model.q.bias[::2] = 0, 0
        model.v.weight[::2], model.v.bias[::2] = 0, 0
    refuted(model, "batch", 5, 4)


def test_the_proof_rejects_a_sigmoid_that_is_taken_for_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_constancy._RULES, "sigmoid", lambda known, node, given: known.of(node.args[0]))
    refuted(Fn(lambda m, x: m.b(m.a(x).sigmoid()), a=layer(), b=nn.Linear(6, 3)), "batch", 4)


def test_the_proof_rejects_rows_of_other_readers_that_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_reading.Reading, "sites", lambda self, leaf: [self._site(self.over[leaf][0], leaf)]
                        if leaf in self.over else [])  # fmt: skip
    model = Fn(lambda m, x: m.b(y := m.a(x)) + m.c(y), a=nn.Linear(4, 6), b=nn.Linear(6, 3), c=nn.Linear(6, 3))
    with torch.no_grad():
        model.b.weight[:, 2] = 0
    refuted(model, "batch", 4)
