"""The proof: it runs what the eager model in double runs, and it rejects seeded mutants of real passes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

import fxfreeze as fz
from fxfreeze import dataflow
from fxfreeze.capture import capture
from fxfreeze.errors import PassError, ProofError
from fxfreeze.passes import _absorb as absorb
from fxfreeze.passes import _affine
from fxfreeze.passes.clean import noops
from fxfreeze.passes.clean.common import CommonSubexpressions
from fxfreeze.passes.clean.noops import StripNoOps
from fxfreeze.passes.fold import affine as fold_affine
from fxfreeze.passes.fold.affine import FoldAffine
from fxfreeze.pipeline import run_passes
from fxfreeze.program import Program
from fxfreeze.proof import TOLERANCE, Prover, Verify, lifted_run, relative_error
from fxfreeze.rewrite import Context, Pass
from fxfreeze.sampling import dim_choices, sample_inputs

F = nn.functional
aten = torch.ops.aten


def program_of(model: nn.Module, *inputs: fz.Input, **plan: Any) -> tuple[Program, Any, Context]:
    plan = fz.Plan(inputs=inputs, **plan)
    program, flat = capture(model.eval(), plan)
    return program, flat, Context(plan)


IMAGE = fz.Input("x", shape=("batch", 3, 8, 8))


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for item in model.modules():
        if isinstance(item, nn.BatchNorm2d):
            item.running_mean.normal_(generator=generator)
            item.running_var.uniform_(0.5, 2, generator=generator)
            item.weight.data.uniform_(0.5, 2, generator=generator)
            item.bias.data.normal_(generator=generator)
    return model.eval()


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return randomised(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU6(), nn.Dropout(0.5), nn.MaxPool2d(2),
            nn.Conv2d(6, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), nn.SiLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
        )
    )  # fmt: skip


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, activation="gelu")

    def forward(self, ids: Tensor) -> Tensor:
        return self.layer(self.table(ids))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, 2, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, (hidden, _) = self.lstm(x)
        return values, hidden


MODELS: dict[str, tuple[Callable[[], nn.Module], fz.Input]] = {
    "cnn": (cnn, IMAGE),
    "encoder": (Encoder, fz.Input("ids", shape=("batch", "seq"), dtype="int64")),
    "lstm": (Recurrent, fz.Input("x", shape=("batch", 6, 4))),
    "bf16": (lambda: cnn().bfloat16(), fz.Input("x", shape=("batch", 3, 8, 8), dtype="bfloat16")),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_lifted_run_is_the_model_in_double(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch's fused encoder layer rounds elsewhere; the export sees the plain one.
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    make, spec = MODELS[name]
    torch.manual_seed(0)
    program, flat, _ = program_of(make(), spec)
    truth = copy.deepcopy(flat).double()
    for sizes in dim_choices(program, 2):
        inputs = sample_inputs(program, sizes, seed=1)
        with torch.no_grad():
            expected = truth(*(value.double() if value.is_floating_point() else value for value in inputs))
        for actual, wanted in zip(lifted_run(program, inputs), expected, strict=True):
            # Bit for bit, but for matrix products, whose order of summation depends on where in memory operands lie.
            assert actual.dtype == torch.float64 and relative_error(actual, wanted) < 2e-15
            assert name not in ("cnn", "bf16") or torch.equal(actual, wanted)


def test_dtype_arguments_are_lifted_too() -> None:
    class Casts(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return x.half() / 3, torch.ones(2, dtype=torch.float16) * x.sum(-1, dtype=torch.float32), x.long(), x > 0

    program, _, _ = program_of(Casts(), fz.Input("x", shape=("batch", 2, 2)))
    x = torch.randn(3, 2, 2)
    half, ones, integers, bools = lifted_run(program, [x])
    assert torch.equal(half, x.double() / 3) and torch.equal(ones, x.double().sum(-1))
    assert integers.dtype == torch.int64 and bools.dtype == torch.bool


def test_random_operators_draw_the_same_numbers_every_time() -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x) + F.dropout(x, 0.5, True)

    program, _, _ = program_of(Noise(), fz.Input("x", shape=("batch", 4)))
    state = torch.get_rng_state()
    first, second = (lifted_run(program, [torch.ones(2, 4)])[0] for _ in range(2))
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), state)


class TestRelativeError:
    def test_is_the_gap_over_the_largest_value(self) -> None:
        assert relative_error(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 4.0])) == 0.25
        assert relative_error(torch.zeros(3), torch.zeros(3)) == 0.0 == relative_error(torch.ones(0), torch.ones(0))
        assert relative_error(torch.ones(3), torch.zeros(3)) == math.inf

    def test_is_infinite_where_kinds_or_specials_disagree(self) -> None:
        one, inf, nan = torch.tensor([1.0, 1.0]), torch.tensor([1.0, math.inf]), torch.tensor([1.0, math.nan])
        for first, second in ((one, inf), (inf, one), (one, nan), (nan, one), (inf, nan), (inf, -inf)):
            assert relative_error(first, second) == math.inf
        assert relative_error(one, one.long()) == math.inf == relative_error(one, one[:1])
        assert relative_error(inf, inf) == 0.0 == relative_error(nan, nan)

    def test_of_integers_is_the_share_that_differs(self) -> None:
        assert relative_error(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])) == 0.25

    @pytest.mark.parametrize("mask", [-1e9, torch.finfo(torch.float32).min])
    def test_a_mask_does_not_hide_the_rest(self, mask: float) -> None:
        truth = torch.tensor([1.0, 2.0, mask, mask], dtype=torch.float64)
        wrong = truth.clone()
        wrong[0] += 1e-6
        assert relative_error(wrong, truth) == pytest.approx(5e-7)
        wrong = truth.clone()
        wrong[3] *= 1 + 1e-6
        assert relative_error(wrong, truth) == pytest.approx(1e-6)

    def test_large_values_among_small_ones_are_no_mask(self) -> None:
        truth = torch.logspace(-6, 12, 50, dtype=torch.float64)
        assert relative_error(truth + 1e-3, truth) < 1e-14


def test_outputs_that_are_nan_prove_nothing_and_are_refused() -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.log(-x.abs() - 1)

    program, _, ctx = program_of(Log(), fz.Input("x", shape=("batch", 4)))
    with pytest.raises(ProofError, match="NaN"):
        run_passes(program, [], ctx)


# ---- seeded mutants: every one is a wrong version of a real pass, and must be caught


def folds(program: Program) -> list[Node]:
    return [node for node in program.graph.nodes if node.target in (aten.conv2d.default, aten.linear.default)]


class Dropped(FoldAffine):
    """Forgets the bias it made."""

    def run(self, program: Program, ctx: Context) -> int:
        count = super().run(program, ctx)
        for node in folds(program):
            node.args = (node.args[0], node.args[1], None, *node.args[3:])
        return count


class Scaled(FoldAffine):
    """Is off by a millionth."""

    def run(self, program: Program, ctx: Context) -> int:
        count = super().run(program, ctx)
        name = str(folds(program)[0].args[1].target)  # type: ignore[union-attr]
        program.state[name] = program.state[name] * (1 + 1e-6)
        return count


class OneWeight(FoldAffine):
    """Is off in one weight of one channel, by a thousandth of it."""

    def run(self, program: Program, ctx: Context) -> int:
        count = super().run(program, ctx)
        name = str(folds(program)[0].args[1].target)  # type: ignore[union-attr]
        value = program.state[name].clone()
        value[2, 1, 0, 0] *= 1.001
        program.state[name] = value
        return count


class SwappedOperands(Pass):
    name, stage = "swap", "clean"

    def run(self, program: Program, ctx: Context) -> int:
        count = 0
        for node in program.graph.nodes:
            if node.target is aten.sub.Tensor:
                node.args = (node.args[1], node.args[0])
                count += 1
        return count


class MergesLookalikes(CommonSubexpressions):
    """Takes two constants of one shape for the same."""

    def _key(self, program: Program, node: Node, globs: list[str]) -> Any:
        return (node.op, tuple(node.meta["val"].shape)) if node.op == "get_attr" else super()._key(program, node, globs)


class StripsActiveDropout(StripNoOps):
    def run(self, program: Program, ctx: Context) -> int:
        count = 0
        for node in list(program.graph.nodes):
            if node.target in noops.DROPOUTS:
                program.replace(node, node.args[0])  # type: ignore[arg-type]
                count += 1
        return count


class BakesTheBatch(Pass):
    """Is right for the size it was tried at."""

    name, stage = "bake", "clean"

    def run(self, program: Program, ctx: Context) -> int:
        for node in program.graph.nodes:
            if node.target is aten.mean.dim:
                total = program.call(aten.sum.dim_IntList, *node.args, before=node, like=node)
                half = program.call(aten.div.Tensor, total, 2, before=node, like=node)
                program.replace(node, half)
                return 1
        return 0


@pytest.mark.parametrize("mutant", [Dropped, Scaled, OneWeight])
def test_mutants_of_the_fold(mutant: type[Pass]) -> None:
    program, _, ctx = program_of(cnn(), IMAGE)
    with pytest.raises(ProofError, match="not exact"):
        run_passes(program, [StripNoOps(), mutant()], ctx)


def broken(monkeypatch: pytest.MonkeyPatch, model: nn.Module, *inputs: fz.Input, verify: Verify = "full") -> ProofError:
    """The error that a monkeypatched fold of `model` raises; unpatched, the same fold is proven."""
    program, _, ctx = program_of(model, *inputs)
    with pytest.raises(ProofError, match="not exact") as caught:
        run_passes(program, [FoldAffine()], ctx, verify=verify)
    monkeypatch.undo()
    program, _, ctx = program_of(model, *inputs)
    run_passes(program, [FoldAffine()], ctx)
    return caught.value


def without(name: str) -> Callable[..., Any]:
    """What reads a batch-norm, with one of its arguments wrong."""
    original = _affine.arguments

    def read(node: Node) -> dict[str, Any]:
        given = original(node)
        return {**given, "eps": 2 * given["eps"]} if name == "eps" else {**given, name: given["running_var"]}

    return read


@pytest.mark.parametrize("part", ["eps", "running_mean", "weight", "bias"])
def test_a_batch_norm_read_wrong(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_affine, "arguments", without(part))
    error = broken(monkeypatch, cnn(), IMAGE)
    assert "fold-affine" in str(error) and "output" in str(error)


def test_a_shift_folded_across_zero_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomised(nn.Sequential(nn.SiLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4),
                                     nn.Tanh(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1)))  # fmt: skip
    monkeypatch.setattr(absorb, "pads", lambda operator: False)
    broken(monkeypatch, model, IMAGE)


def test_a_negative_gain_through_a_relu(monkeypatch: pytest.MonkeyPatch) -> None:
    original = absorb.passage
    loose = lambda node: (way := original(node)) and dataflow.Passage(way.dims, positive=False)  # noqa: E731

    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gain = nn.Conv2d(3, 4, 1), nn.Parameter(torch.tensor([1.0, -1, 2, 1]).reshape(4, 1, 1))
            self.last = nn.Conv2d(4, 4, 1)
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.last(self.conv(x).relu() * self.gain))

    monkeypatch.setattr(absorb, "passage", loose)
    monkeypatch.setattr(fold_affine, "fold_forward", lambda program, affine: fold_affine.fail("not now", affine.node))
    broken(monkeypatch, Gain(), IMAGE)


def test_a_rarely_active_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """ReLU6 is a ReLU for normalised activations; only the wider draw reaches 6."""
    monkeypatch.setattr(dataflow, "HOMOGENEOUS", dataflow.HOMOGENEOUS | {aten.relu6.default, aten.hardtanh.default})

    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu6(self.bn(self.conv(x)) * 0.7) * 1.5

    torch.manual_seed(0)
    program, _, ctx = program_of(Clamped(), IMAGE)
    run_passes(program, [FoldAffine()], ctx, verify="sampled")
    broken(monkeypatch, Clamped(), IMAGE)


class Differences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout((x * self.a) - (x * self.b), 0.5, True) - x.mean(0)


@pytest.mark.parametrize("mutant", [SwappedOperands, MergesLookalikes, StripsActiveDropout, BakesTheBatch])
def test_mutants_of_the_cleaning(mutant: type[Pass]) -> None:
    program, _, ctx = program_of(Differences(), fz.Input("x", shape=("batch", 4)))
    with pytest.raises(ProofError, match="not exact"):
        run_passes(program, [mutant()], ctx)


def test_only_the_second_size_catches_a_baked_batch() -> None:
    program, _, ctx = program_of(Differences(), fz.Input("x", shape=("batch", 4)))
    run_passes(program, [BakesTheBatch()], ctx, verify="sampled")


def test_a_lossy_pass_is_measured_not_refused() -> None:
    class Lossy(Scaled):
        exact: ClassVar[bool] = False

    program, _, ctx = program_of(cnn(), IMAGE)
    rows, prover = run_passes(program, [StripNoOps(), Lossy()], ctx)
    assert rows[-1].error is not None and 1e-8 < rows[-1].error < 1e-5
    assert [(row.exact, row.tolerance) for row in prover.rows] == [(True, TOLERANCE), (False, None)]
    # What comes after a lossy pass is compared with what it left.
    assert prover.accept("nothing", program, exact=True).error == 0.0  # type: ignore[union-attr]


def test_a_program_that_does_not_run_is_named() -> None:
    class Breaks(Pass):
        name, stage = "breaks", "clean"

        def run(self, program: Program, ctx: Context) -> int:
            node = next(node for node in program.graph.nodes if node.target is aten.flatten.using_ints)
            new = program.call(aten.reshape.default, node.args[0], [-1, 6], before=node, like=node)
            new.args = (node.args[0], [7, 6])
            program.replace(node, new)
            return 1

    program, _, ctx = program_of(cnn(), IMAGE)
    with pytest.raises((ProofError, PassError), match="breaks"):
        run_passes(program, [Breaks()], ctx)


def test_without_draws_nothing_is_proven() -> None:
    program, _, _ = program_of(cnn(), IMAGE)
    prover = Prover(program, [])
    assert prover.accept("anything", program, exact=True) is None and prover.rows == []
