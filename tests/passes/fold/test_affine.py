"""FoldAffine: which scales and shifts go into which weights, which must not, and that the function stays the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze import dataflow
from fxfreeze.capture import capture
from fxfreeze.constants import Recipe
from fxfreeze.errors import ProofError
from fxfreeze.kernels.gate import KERNEL as GATE
from fxfreeze.passes import _absorb as absorb
from fxfreeze.passes.clean.noops import StripNoOps
from fxfreeze.passes.fold import affine as module
from fxfreeze.passes.fold.affine import FoldAffine
from fxfreeze.pipeline import run_passes
from fxfreeze.program import Fold, Origin, Program
from fxfreeze.proof import lifted_run, relative_error
from fxfreeze.rewrite import Context, LedgerRow
from fxfreeze.sampling import dim_choices, sample_inputs

F = nn.functional
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every batch-norm statistics and parameters that a wrong fold cannot hide behind."""
    generator = torch.Generator().manual_seed(seed)
    for item in model.modules():
        if isinstance(item, NORMS):
            item.running_mean.normal_(generator=generator)
            item.running_var.uniform_(0.3, 3, generator=generator)
            if item.affine:
                item.weight.data.normal_(generator=generator).abs_().add_(0.1).mul_(
                    torch.randint(0, 2, item.weight.shape, generator=generator) * 2 - 1
                )
                item.bias.data.normal_(generator=generator)
    return model.eval()


class Branches(nn.Module):
    """Independent branches over named inputs, each with its own output."""

    def __init__(self, **branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleDict(branches)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: branch(x) for name, branch in self.branches.items()}


class Fn(nn.Module):
    """A function of the layers it is given."""

    def __init__(self, function: Callable[..., Any], *layers: nn.Module, **constants: Tensor) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)
        for name, value in constants.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x, *self.layers)


def fold(model: nn.Module, *shape: int | str, **dims: fz.Dim) -> tuple[Program, Context]:
    """Fold and prove `model`; its float64 function must be that of the eager model in double."""
    randomised(model)
    plan = fz.Plan(inputs=[fz.Input("x", shape=shape)], dims=dims)
    program, flat = capture(model, plan)
    ctx = Context(plan)
    run_passes(program, [StripNoOps(), FoldAffine()], ctx)
    truth = copy.deepcopy(flat).double()
    for sizes in dim_choices(program, 2):
        inputs = sample_inputs(program, sizes, seed=3)
        with torch.no_grad():
            expected = truth(*(value.double() for value in inputs))
        for actual, wanted in zip(lifted_run(program, inputs), expected, strict=True):
            assert relative_error(actual, wanted) < 1e-12
    return program, ctx


def fold_as_is(model: nn.Module, *shape: int | str, **options: Any) -> tuple[Program, Context]:
    """Fold and prove `model` with the numbers it has."""
    plan = fz.Plan(inputs=[fz.Input("x", shape=shape, **options)])
    program, _ = capture(model, plan)
    ctx = Context(plan)
    run_passes(program, [StripNoOps(), FoldAffine()], ctx)
    return program, ctx


def operators(program: Program) -> list[str]:
    return [str(getattr(node.target, "_opname", node.target)) for node in program.graph.nodes
            if node.op == "call_function"]  # fmt: skip


def at(program: Program, branch: str) -> list[str]:
    """Operators of one branch."""
    nodes = [node for path, nodes in program.sites().items() for node in nodes
             if path.startswith(f"branches.{branch}")]  # fmt: skip
    order = list(program.graph.nodes)
    return [str(node.target._opname) for node in sorted(set(nodes), key=order.index)]


def rows(ctx: Context, branch: str = "") -> list[LedgerRow]:
    return [row for row in ctx.ledger if row.site.startswith(f"branches.{branch}" if branch else "")]


def seq(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


# ---- what is folded


def test_batch_norm_2d_into_the_convolution_before_it() -> None:
    bn = nn.BatchNorm2d
    model = Branches(
        plain=seq(nn.Conv2d(4, 6, 3, padding=1), bn(6)),
        no_bias=seq(nn.Conv2d(4, 6, 3, stride=2, bias=False), bn(6)),
        no_affine=seq(nn.Conv2d(4, 6, 1), bn(6, affine=False)),
        groups=seq(nn.Conv2d(4, 6, 3, groups=2, dilation=2), bn(6)),
        depthwise=seq(nn.Conv2d(4, 4, 3, groups=4, padding="same", bias=False), bn(4)),
        valid=seq(nn.Conv2d(4, 6, (1, 3), padding="valid"), bn(6)),
        reflect=seq(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), bn(6)),
        up=seq(nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), bn(6)),
        up_groups=seq(nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), bn(6)),
        twice=seq(nn.Conv2d(4, 6, 3), bn(6), bn(6)),
        pooled=seq(nn.Conv2d(4, 6, 3), nn.AvgPool2d(2), Fn(lambda m, x: x * m.c, c=-torch.rand(6, 1, 1))),
        eps=seq(nn.Conv2d(4, 6, 3), bn(6, eps=0.5)),
    )
    program, ctx = fold(model, "batch", 4, 8, 8)
    assert "batch_norm" not in operators(program)
    for name in ("plain", "no_bias", "no_affine", "groups", "depthwise", "valid", "twice", "eps"):
        assert at(program, name) == ["conv2d"], name
    assert at(program, "pooled") == ["conv2d", "avg_pool2d"] and at(program, "up_groups") == ["conv_transpose2d"]
    first = rows(ctx, "plain")[0]
    assert (first.site, first.step) == ("branches.plain.1", "")
    assert (first.requested, first.outcome) == ("batch-norm", "rewritten")
    assert first.executes == "folded into conv2d branches.plain.0"
    # The names stay those of the user's model, and the storage dtype is float32.
    assert {"branches.plain.0.weight", "branches.no_bias.0.bias"} <= set(program.state)
    assert program.state["branches.plain.0.weight"].dtype == torch.float64
    assert all(value.dtype == torch.float32 for value in program.graph_module().state_dict().values())


def test_batch_norm_1d_and_3d() -> None:
    model = Branches(
        conv=seq(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)),
        up=seq(nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6)),
        same=seq(nn.Conv1d(4, 6, 4, padding="same"), nn.BatchNorm1d(6)),
    )
    assert set(operators(fold(model, "batch", 4, "time", time=fz.Dim(min=8))[0])) == {"conv1d", "conv_transpose1d"}
    model = Branches(
        conv=seq(nn.Conv3d(2, 4, 2, groups=2, bias=False), nn.BatchNorm3d(4)),
        up=seq(nn.ConvTranspose3d(2, 4, 2), nn.BatchNorm3d(4)),
    )
    assert set(operators(fold(model, "batch", 2, 3, 3, 3)[0])) == {"conv3d", "conv_transpose3d"}
    model = Branches(
        after=seq(nn.Linear(4, 6), nn.BatchNorm1d(6)),
        before=seq(nn.BatchNorm1d(4), nn.Linear(4, 6, bias=False)),
        addmm=seq(Fn(lambda m, x: torch.addmm(m.b, x, m.w), b=torch.rand(1, 6), w=torch.rand(4, 6)), nn.BatchNorm1d(6)),
        scalar=seq(Fn(lambda m, x: torch.addmm(m.b, x, m.w), b=torch.rand(()), w=torch.rand(4, 6)), nn.BatchNorm1d(6)),
    )
    assert set(operators(fold(model, "batch", 4)[0])) == {"linear", "addmm"}


def test_scales_and_shifts_of_every_spelling() -> None:
    c = torch.rand(6) + 0.5
    spellings: dict[str, Callable[[Fn, Tensor], Tensor]] = {
        "mul": lambda m, x: x * m.c,
        "swapped": lambda m, x: m.c * x,
        "div": lambda m, x: x / m.c,
        "add": lambda m, x: x + m.c,
        "alpha": lambda m, x: torch.add(x, m.c, alpha=3),
        "alpha_swapped": lambda m, x: torch.add(m.c, x, alpha=-3),
        "sub": lambda m, x: x - m.c,
        "sub_alpha": lambda m, x: torch.sub(x, m.c, alpha=2),
        "sub_swapped": lambda m, x: m.c - x,
        "rsub": lambda m, x: torch.rsub(x, m.c, alpha=2),
        "rsub_swapped": lambda m, x: torch.rsub(m.c, x, alpha=2),
        "numbers": lambda m, x: 1 - (x * 2 + 3) / 7,
        "integers": lambda m, x: x * m.i,
        "chain": lambda m, x: (x * m.c + 1) * m.c - m.c,
    }
    layer = nn.Linear(4, 6)
    model = Branches(**{
        name: seq(copy.deepcopy(layer), Fn(spelling, c=c, i=torch.arange(6))) for name, spelling in spellings.items()
    })  # fmt: skip
    program, _ = fold(model, "batch", "time", 4)
    assert operators(program) == ["linear"] * len(spellings)


def test_on_the_way_back() -> None:
    gain = (torch.rand(6) + 0.1).reshape(6, 1, 1)
    scale = lambda: Fn(lambda m, x: x * m.c, c=gain)  # noqa: E731
    shift = lambda: Fn(lambda m, x: x * m.c + 1, c=gain)  # noqa: E731
    conv = lambda: nn.Conv2d(4, 6, 3, padding=1)  # noqa: E731
    model = Branches(
        relu=seq(conv(), nn.ReLU(), scale()),
        leaky=seq(conv(), nn.LeakyReLU(-0.3), scale()),
        prelu=seq(conv(), nn.PReLU(6), scale()),
        pools=seq(conv(), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2, padding=1), scale()),
        shifted=seq(conv(), nn.MaxPool2d(3, padding=1), nn.AdaptiveAvgPool2d(2), shift()),
        mean=seq(conv(), Fn(lambda m, x: x.mean((2, 3)) * m.c + 1, c=gain.flatten())),
        moved=seq(conv(), Fn(lambda m, x: x.flatten(2).transpose(1, 2) * m.c - 2, c=gain.flatten())),
    )
    program, _ = fold(model, "batch", 4, 8, 8)
    assert not {"mul", "add", "sub"} & set(operators(program))


def test_the_levit_idiom() -> None:
    linear, bn = nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6)
    model = Fn(lambda m, x, linear, bn: bn(linear(x).flatten(0, 1)).reshape(x.shape[0], -1, 6), linear, bn)
    program, _ = fold(model, "batch", 5, 4)
    assert "batch_norm" not in operators(program) and "mul" not in operators(program)
    transposed = Fn(lambda m, x, linear, bn: bn(linear(x).transpose(1, 2)).transpose(1, 2),
                    nn.Linear(4, 6), nn.BatchNorm1d(6))  # fmt: skip
    assert operators(fold(transposed, "batch", "time", 4)[0]) == ["linear", "transpose", "transpose"]


def test_an_embedding_takes_scale_and_shift() -> None:
    model = Fn(lambda m, x, table: table((x > 0).long()) * 3 + m.c, nn.Embedding(5, 4), c=torch.rand(4))
    assert operators(fold(model, "batch", 2)[0])[-1] == "embedding"


def test_forwards_into_every_reader() -> None:
    def fan_out(m: Fn, x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module) -> tuple[Tensor, ...]:
        y = (x.sin() - m.mean) / m.std
        return a(y), b(y), c(F.adaptive_avg_pool2d(y, 1).flatten(1))

    model = Fn(fan_out, nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(4, 2, 1, bias=False), nn.Linear(4, 3),
               mean=torch.rand(4, 1, 1), std=torch.rand(4, 1, 1) + 0.5)  # fmt: skip
    program, ctx = fold(model, "batch", 4, 6, 6)
    assert operators(program) == ["sin", "conv2d", "conv2d", "adaptive_avg_pool2d", "flatten", "linear"]
    assert rows(ctx)[0].executes == "folded into conv2d layers.0, conv2d layers.1, linear layers.2"


def test_a_scale_goes_forwards_where_a_shift_may_not() -> None:
    c = torch.rand(4, 1, 1) + 0.5
    model = Branches(
        padded=seq(Fn(lambda m, x: x.sin() * m.c, c=c), nn.Conv2d(4, 6, 3, padding=1, groups=2)),
        up=seq(Fn(lambda m, x: x.sin() * m.c, c=-c), nn.ConvTranspose2d(4, 6, 3, groups=2)),
        relu=seq(Fn(lambda m, x: x.sin() * m.c, c=c), nn.ReLU(), nn.Conv2d(4, 6, 3, padding="same")),
        point=seq(Fn(lambda m, x: x.sin() + m.c, c=c), nn.Conv2d(4, 6, 1, padding="same")),
        rms=seq(Fn(lambda m, x: x.sin().transpose(1, 3) * m.c, c=c.flatten()), nn.Linear(4, 2)),
    )
    program, _ = fold(model, "batch", 4, 6, 6)
    assert not {"mul", "add"} & set(operators(program))


def test_a_batch_norm_that_shifts_by_zero_is_a_scale() -> None:
    norm = nn.BatchNorm2d(4)
    norm.running_var.uniform_(0.5, 2)
    model = seq(Fn(lambda m, x: x.sin()), norm, nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1)).eval()
    assert operators(fold_as_is(model, "batch", 4, 6, 6)[0]) == ["sin", "relu", "conv2d"]


# ---- what must not be folded


def test_refusals_of_batch_norms_say_why() -> None:
    conv, bn = lambda **k: nn.Conv2d(4, 4, 3, **k), nn.BatchNorm2d
    model = Branches(
        padded=seq(Fn(lambda m, x: x.sin()), bn(4), conv(padding=1)),
        same=seq(Fn(lambda m, x: x.sin()), bn(4), conv(padding="same")),
        up=seq(Fn(lambda m, x: x.sin()), bn(4), nn.ConvTranspose2d(4, 4, 2)),
        relu=seq(Fn(lambda m, x: x.sin()), bn(4), nn.ReLU(), conv()),
        between=seq(conv(), nn.ReLU(), bn(4)),
        silu=seq(conv(), nn.SiLU(), bn(4)),
        twice=Fn(lambda m, x, conv, bn: (y := conv(x)) + bn(y), conv(padding=1), bn(4)),
        once_padded=Fn(lambda m, x, bn, a, b: a(y := bn(x.sin())) + b(y)[..., 1:-1, 1:-1],
                       bn(4), conv(), conv(padding=1)),
    )  # fmt: skip
    program, ctx = fold(model, "batch", 4, 6, 6)
    assert operators(program).count("batch_norm") == len(model.branches)
    reasons = {row.site.split(".")[1]: row for row in ctx.ledger}
    assert set(reasons) == set(model.branches) and {row.outcome for row in ctx.ledger} == {"skipped"}
    for branch in ("padded", "same", "up", "once_padded"):
        assert "pads with zeros" in reasons[branch].detail
    assert "relu does not let a shift pass" in reasons["relu"].detail
    assert "relu does not let a shift pass" in reasons["between"].detail
    assert "silu" in reasons["silu"].detail and reasons["silu"].executes == "batch_norm"
    assert "read elsewhere" in reasons["twice"].detail


def test_gains_that_are_not_positive_do_not_pass_a_relu() -> None:
    for bad in (-0.5, 0.0):
        c = torch.tensor([1.0, 2.0, bad, 1.0]).reshape(4, 1, 1)
        model = Branches(
            back=seq(nn.Conv2d(4, 4, 1), nn.ReLU(), Fn(lambda m, x: x * m.c, c=c)),
            forth=seq(Fn(lambda m, x: x.sin() * m.c, c=c), nn.ReLU(), nn.Conv2d(4, 4, 1)),
            pool=seq(nn.Conv2d(4, 4, 1), nn.MaxPool2d(2), Fn(lambda m, x: x * m.c, c=c)),
            relu6=seq(nn.Conv2d(4, 4, 1), nn.ReLU6(), Fn(lambda m, x: x * m.c, c=c.abs() + 1)),
            gelu=seq(nn.Conv2d(4, 4, 1), nn.GELU(), Fn(lambda m, x: x * m.c, c=c.abs() + 1)),
        )
        assert operators(fold(model, "batch", 4, 6, 6)[0]).count("mul") == 5


def test_what_is_not_per_channel_stays() -> None:
    linear = lambda: nn.Linear(4, 4)  # noqa: E731
    model = Branches(
        per_token=seq(linear(), Fn(lambda m, x: x * m.c, c=torch.rand(4, 1))),
        per_element=seq(linear(), Fn(lambda m, x: x * m.c, c=torch.rand(4, 4))),
        over_time=seq(linear(), nn.BatchNorm1d(4)),
        larger=seq(linear(), Fn(lambda m, x: x * m.c, c=torch.rand(3, 1, 1, 4))),
        promoted=seq(linear(), Fn(lambda m, x: x * m.c, c=torch.rand(4).double())),
        by_input=Fn(lambda m, x, a, b: a(x) * b(x), linear(), linear()),
        squared=Fn(lambda m, x, a: (y := a(x)) * y, linear()),
        divisor=Fn(lambda m, x, a: m.c / (a(x).exp() + 1), linear(), c=torch.rand(4)),
        infinite=Fn(lambda m, x, a: a(x) * 0.0 + a(x).relu() * float("inf"), linear()),
        floored=Fn(lambda m, x, a: torch.div(a(x), 0.3, rounding_mode="floor"), linear()),
    )
    before = operators(fold_as_is(randomised(model), "batch", 4, 4)[0])
    assert before.count("batch_norm") == 1
    assert {"mul", "div"} <= set(before)
    program, _ = fold_as_is(model, "batch", 4, 4)
    for name in ("per_token", "per_element", "larger", "by_input", "squared"):
        assert "mul" in at(program, name), name
    assert "mul" in at(program, "promoted") and at(program, "divisor").count("div") == 1
    image = Branches(
        rows=seq(nn.Conv2d(4, 4, 1), Fn(lambda m, x: x * m.c, c=torch.rand(4))),
        columns=seq(nn.Conv2d(4, 4, 1), Fn(lambda m, x: x * m.c, c=torch.rand(4, 1))),
        unbatched=Fn(lambda m, x, conv: conv(x[0]) * m.c, nn.Conv2d(4, 4, 1), c=torch.rand(4, 1, 1)),
        wrong_dim=Fn(lambda m, x, conv: conv(x[0]) * m.c, nn.Conv2d(4, 4, 1), c=torch.rand(4, 1)),
        into_linear=seq(Fn(lambda m, x: x.sin() * m.c, c=torch.rand(4, 1, 1)), nn.Linear(4, 4)),
    )
    program, _ = fold(image, "batch", 4, 4, 4)
    for name in ("rows", "columns", "wrong_dim", "into_linear"):
        assert "mul" in at(program, name), name
    assert "mul" not in at(program, "unbatched")


def test_integers_are_left_alone() -> None:
    model = Fn(lambda m, x: (x.long() @ m.w) * m.c, w=torch.arange(16).reshape(4, 4), c=torch.arange(4))
    assert "mul" in operators(fold(model, "batch", 4)[0])


def test_what_is_returned_is_read_elsewhere() -> None:
    model = Fn(lambda m, x, conv, bn: (y := conv(x), bn(y)), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    assert "batch_norm" in operators(fold(model, "batch", 4, 3, 3)[0])
    model = Fn(lambda m, x, bn, conv: (y := bn(x.sin()), conv(y)), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    assert "batch_norm" in operators(fold(model, "batch", 4, 3, 3)[0])


def test_a_matrix_product_takes_a_scale_but_no_shift() -> None:
    model = Branches(
        scale=Fn(lambda m, x: (x @ m.w) * m.c, w=torch.rand(4, 6), c=torch.rand(6)),
        shift=Fn(lambda m, x: (x @ m.w) + m.c, w=torch.rand(4, 6), c=torch.rand(6)),
        computed=Fn(lambda m, x: F.linear(x, m.w * x.sum()) * m.c, w=torch.rand(6, 4), c=torch.rand(6)),
        product=Fn(lambda m, x: (x @ x.transpose(-1, -2)) * m.c, c=torch.rand(5)),
        computed_bias=Fn(lambda m, x: F.linear(x, m.w, x.sum() * m.c) * m.c, w=torch.rand(6, 4), c=torch.rand(6)),
        into_computed=Fn(lambda m, x: F.linear(x.sin() * m.c, m.w * x.sum()), w=torch.rand(6, 4), c=torch.rand(4)),
        alpha=Fn(lambda m, x: torch.addmm(m.c, x[0], m.w, alpha=2) * m.c, w=torch.rand(4, 6), c=torch.rand(6)),
    )
    program, _ = fold(model, "batch", 5, 4)
    assert at(program, "scale") == ["matmul"] and "add" in at(program, "shift")
    for name in ("computed", "product", "computed_bias", "into_computed", "alpha"):
        assert "mul" in at(program, name), name


# ---- shared weights


def test_a_shared_weight_is_copied_for_the_fold_only() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    weight = conv.weight.detach().clone()
    model = Fn(lambda m, x, conv, bn: conv(x).sin() + bn(conv(x.cos())), conv, nn.BatchNorm2d(4))
    program, _ = fold(model, "batch", 4, 5, 5)
    assert "batch_norm" not in operators(program)
    assert torch.equal(program.state["layers.0.weight"], weight) and torch.equal(conv.weight, weight)
    assert {"layers.0.weight", "layers.0.weight_1", "layers.0.bias", "layers.0.bias_1"} <= set(program.state)


def test_a_large_shared_weight_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.COPY_LIMIT, "affine", 100)
    table = nn.Embedding(9, 4)
    model = Fn(lambda m, x, table: F.linear(table((x > 0).long()).sum(1), table.weight) * m.c, table, c=torch.rand(9))
    program, _ = fold(model, "batch", 3)
    assert "mul" in operators(program)
    shifted = Fn(lambda m, x, table: F.linear(table((x > 0).long()).sum(1), table.weight) + m.c, table, c=torch.rand(9))
    program, _ = fold(shifted, "batch", 3)  # needs no copy
    assert operators(program)[-1] == "linear" and len(program.state) == 2


# ---- dtypes


def test_a_fold_that_would_overflow_half_precision_is_refused() -> None:
    conv, bn = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
    bn.running_var.fill_(1e-12)
    bn.weight.data.fill_(1e4)
    model = seq(conv, bn).half().eval()
    program, ctx = fold_as_is(model, "batch", 2, 3, 3, dtype="float16", low=-1e-3, high=1e-3)
    assert "batch_norm" in operators(program) and "overflow torch.float16" in next(iter(ctx.ledger)).detail


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_weights_are_folded_in_float64(dtype: str) -> None:
    model = randomised(seq(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).to(getattr(torch, dtype))
    program, _ = fold_as_is(model, "batch", 3, 5, 5, dtype=dtype)
    assert operators(program) == ["conv2d"]
    assert {value.dtype for value in program.state.values()} == {torch.float64}
    assert all(node.meta["val"].dtype == getattr(torch, dtype) for node in program.graph.nodes if node.op != "output")


def test_a_folded_weight_takes_no_memory_of_its_own_until_it_is_rounded() -> None:
    model = randomised(seq(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).bfloat16()
    program, _ = fold_as_is(model, "batch", 3, 5, 5, dtype="bfloat16")
    assert program.state.tensor("0.weight").data_ptr() == model[0].weight.data_ptr()


# ---- hard gates


def gate(dim: int = -1, **options: Any) -> nn.Module:
    """Six neurons, of which some fire at everything, some at little, and some at what is negative too."""
    threshold = torch.tensor([0.1, -0.2, 0.0, 0.4, -5.0, 0.3])
    return Fn(lambda m, x: GATE.op(x, m.t, dim=dim, **options), t=threshold)


def test_a_positive_gain_passes_a_hard_gate_into_its_thresholds() -> None:
    gain = 2.0 ** torch.arange(-3.0, 3.0)
    scale = lambda: Fn(lambda m, x: x * m.c, c=gain)  # noqa: E731
    channels = lambda: Fn(lambda m, x: x * m.c, c=gain[:, None, None])  # noqa: E731
    model = Branches(
        plain=seq(nn.Linear(4, 6), gate(), scale()),
        relu=seq(nn.Linear(4, 6), nn.ReLU(), gate(), scale()),
        magnitude=seq(nn.Linear(4, 6), gate(score="abs"), scale()),
        number=seq(nn.Linear(4, 6), gate(), Fn(lambda m, x: x * 4)),
        twice=seq(nn.Linear(4, 6), gate(), gate(score="abs"), scale()),
    )
    program, ctx = fold(model, "batch", 4)
    assert not {"mul", "add"} & set(operators(program))
    assert rows(ctx, "relu")[0].executes == "folded into linear branches.relu.0"
    threshold = program.state["branches.plain.1.t"]
    assert relative_error(threshold, model.branches["plain"][1].t.double() * gain.double()) < 1e-12
    model = Branches(conv=seq(nn.Conv2d(4, 6, 3), nn.ReLU(), gate(dim=1), nn.MaxPool2d(2), channels()))
    assert operators(fold(model, "batch", 4, 8, 8)[0]) == ["conv2d", "relu", "gate", "max_pool2d"]


def test_what_does_not_pass_a_hard_gate() -> None:
    gain = 2.0 ** torch.arange(-3.0, 3.0)
    mixed = gain * torch.tensor([1, -1, 1, 1, 1, 1])
    model = Branches(
        negative=seq(nn.Linear(4, 6), gate(), Fn(lambda m, x: x * m.c, c=mixed)),
        rounded=seq(nn.Linear(4, 6), gate(), Fn(lambda m, x: x * m.c, c=gain * 1.1)),
        shift=seq(nn.Linear(4, 6), gate(), Fn(lambda m, x: x + m.c, c=gain)),
        soft=seq(nn.Linear(4, 6), Fn(lambda m, x: GATE.op(x, m.c, None, m.h), c=gain, h=torch.tensor(0.5)),
                 Fn(lambda m, x: x * m.c, c=gain)),
        fan_out=Fn(lambda m, x, a, b: (y := a(x)) + b(y) * m.c, nn.Linear(4, 6), gate(), c=gain),
    )  # fmt: skip
    program, _ = fold(model, "batch", 4)
    assert at(program, "negative")[-1] == at(program, "soft")[-1] == at(program, "rounded")[-1] == "mul"
    assert at(program, "shift")[-1] == "add"
    assert "mul" in at(program, "fan_out")
    across = seq(nn.Conv2d(4, 6, 3), gate(dim=1), Fn(lambda m, x: x * m.c, c=gain))
    assert operators(fold(across, "batch", 4, 8, 8)[0]) == ["conv2d", "gate", "mul"]


def test_a_gate_that_reads_the_same_thresholds_keeps_them() -> None:
    def two(m: Fn, x: Tensor, first: nn.Module, second: nn.Module) -> tuple[Tensor, ...]:
        return GATE.op(first(x), m.t) * 4, GATE.op(second(x), m.t).sin()

    program, _ = fold(Fn(two, nn.Linear(4, 6), nn.Linear(4, 6), t=torch.rand(6)), "batch", 4)
    assert operators(program).count("mul") == 0
    gates = program.graph.find_nodes(op="call_function", target=GATE.op)
    first, second = (program.state[str(node.args[1].target)] for node in gates)
    assert relative_error(first, second.double() * 4) < 1e-12


def test_thresholds_stay_where_the_fold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.COPY_LIMIT, "affine", 0)
    layer = nn.Linear(4, 6)
    model = Fn(lambda m, x, layer, gate: (gate(layer(x)) * 4, layer(x.sin()).cos()), layer, gate())
    plan = fz.Plan(inputs=[fz.Input("x", shape=("batch", 4))])
    program, _ = capture(model, plan)
    threshold = program.state["layers.1.t"]
    run_passes(program, [FoldAffine()], Context(plan))
    assert "mul" in operators(program) and program.state["layers.1.t"] is threshold


def test_a_threshold_that_would_overflow_stays() -> None:
    level = torch.full((6,), 3e38)
    model = seq(nn.Linear(4, 6), Fn(lambda m, x: GATE.op(x, m.t), t=level), Fn(lambda m, x: x * 2))
    assert operators(fold(model, "batch", 4)[0]) == ["linear", "gate", "mul"]


def test_a_relu_above_a_threshold_is_a_relu_with_another_bias() -> None:
    """ReLU(x − τ) needs no gate: the threshold goes into the bias of what makes x."""
    tau = torch.rand(6)
    model = Branches(
        linear=seq(nn.Linear(4, 6, bias=False), Fn(lambda m, x: F.relu(x - m.t), t=tau)),
        number=seq(nn.Linear(4, 6), Fn(lambda m, x: F.relu(x - 0.25))),
    )
    assert operators(fold(model, "batch", 4)[0]) == ["linear", "relu"] * 2
    model = seq(nn.Conv2d(4, 6, 3, padding=1), Fn(lambda m, x: F.relu(x - m.t), t=tau[:, None, None]))
    assert operators(fold(model, "batch", 4, 5, 5)[0]) == ["conv2d", "relu"]


@pytest.mark.parametrize(
    ("name", "broken"),
    [("Levels.edit", None), ("_through", lambda gate: dataflow.Passage({-1: -1, -3: -3}, positive=False)),
     ("shift", lambda gate: dataflow.Passage({-1: -1}, positive=True))],
)  # fmt: skip
def test_the_proof_rejects_wrong_ways_through_a_gate(monkeypatch: pytest.MonkeyPatch, name: str, broken: Any) -> None:
    c = torch.tensor([1.0, -1.0, 2.0, 0.5, 4.0, 8.0])
    if name == "Levels.edit":  # the thresholds are forgotten
        monkeypatch.setattr(absorb.Levels, "apply", lambda self, program: None)
        c = c.abs() * 4
    else:
        monkeypatch.setattr(absorb, "_through", broken)
    last = Fn(lambda m, x: x + m.c, c=c) if name == "shift" else Fn(lambda m, x: x * m.c, c=c)
    with pytest.raises(ProofError):
        fold(seq(nn.Linear(4, 6), gate(), last), "batch", 4)


# ---- identity


def test_nodes_of_a_plan_are_reported_under_their_step_and_scalars_are_not_noise() -> None:
    model = Fn(lambda m, x, conv: (conv(x).sin() * 2).cos() * m.c, nn.Conv2d(2, 2, 1), c=torch.rand(2, 1, 1))
    plan = fz.Plan(inputs=[fz.Input("x", shape=("batch", 2, 3, 3))])
    program, _ = capture(model, plan)
    last = [node for node in program.graph.nodes if node.op == "call_function"][-1]
    last.meta["fxfreeze"] = Origin("gain", "AFFINE", "head")
    ctx = Context(plan)
    run_passes(program, [FoldAffine()], ctx)
    (row,) = ctx.ledger
    assert (row.step, row.requested, row.outcome) == ("gain", "AFFINE", "skipped")


def test_what_was_folded_into_a_weight_before_is_scaled_along() -> None:
    model = randomised(seq(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    plan = fz.Plan(inputs=[fz.Input("x", shape=("batch", 3, 5, 5))])
    program, _ = capture(model, plan)
    base = program.state["0.weight"]
    program.state["0.weight"] = base.double() + 0.01
    program.folds["0.weight"] = Fold("lora", "0", Recipe(base), 0.5)
    run_passes(program, [FoldAffine()], Context(plan))
    fold_row = program.folds["0.weight"]
    norm = model[1]
    gain = (norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()).reshape(-1, 1, 1, 1)
    assert fold_row.step == "lora"
    assert relative_error(program.state["0.weight"] - fold_row.base.value(), gain.expand(4, 3, 3, 3) * 0.01) < 1e-12


# ---- random chains


@st.composite
def chains(draw: st.DrawFn) -> nn.Module:
    """A chain of convolutions, batch-norms, activations, pools, scales and shifts, then a linear head."""
    channels, layers = 4, []
    for _ in range(draw(st.integers(2, 6))):
        match draw(st.sampled_from(["conv", "up", "bn", "relu", "leaky", "scale", "shift", "pool"])):
            case "conv":
                groups, out = draw(st.sampled_from([(1, 3), (1, 4), (2, 6), (2, 4)]))
                groups = groups if channels % groups == 0 else 1
                padding = draw(st.sampled_from([0, 1, "same"]))
                layers.append(nn.Conv2d(channels, out, 3 if padding else 1, padding=padding, groups=groups,
                                        bias=draw(st.booleans())))  # fmt: skip
                channels = out
            case "up":
                groups = draw(st.sampled_from([g for g in (1, 2) if channels % g == 0]))
                layers.append(nn.ConvTranspose2d(channels, channels, 2, groups=groups))
            case "bn":
                layers.append(nn.BatchNorm2d(channels, affine=draw(st.booleans())))
            case "relu":
                layers.append(nn.ReLU())
            case "leaky":
                layers.append(nn.LeakyReLU(0.2))
            case "pool":
                layers.append(draw(st.sampled_from([nn.MaxPool2d(2, 1), nn.AvgPool2d(3, 1, 1)])))
            case "scale":
                sign = draw(st.sampled_from([1.0, -1.0]))
                layers.append(Fn(lambda m, x: x * m.c, c=sign * (torch.rand(channels, 1, 1) + 0.2)))
            case "shift":
                layers.append(Fn(lambda m, x: m.c - x, c=torch.randn(channels, 1, 1)))
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3), nn.BatchNorm1d(3)]
    return seq(*layers, *head)


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(st.data(), st.integers(0, 2**16))
def test_random_chains_stay_the_same_function(data: st.DataObject, seed: int) -> None:
    torch.manual_seed(seed)
    fold(randomised(data.draw(chains()), seed), "batch", 4, 8, 8)
