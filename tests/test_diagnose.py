"""``fxfreeze.diagnose_prunability``: networks whose connectivity and similarity are known on paper."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxfreeze as fz
from fxfreeze.diagnose import Pair, cka, judge, mode_connectivity
from fxfreeze.errors import PlanError

# ---- connectivity


@pytest.mark.parametrize(
    ("errors", "connectivity"),
    [
        ((0.0, 0.3, 0.5, 0.3, 0.0), -0.5),  # a barrier
        ((0.1, 0.1, 0.1), 0.0),
        ((0.5, 0.2, 0.4), 0.25),  # a valley: ends at 0.45, the farthest is 0.2
        ((0.2, 0.1, 0.9, 0.2), -0.7),  # both: the farther counts
        ((0.2, -0.9, 0.3, 0.2), 1.1),
        ((0.0, 0.3, 0.2), -0.2),  # ends that differ: their mean is 0.1
    ],
)
def test_connectivity_is_the_mean_of_the_ends_less_what_is_farthest_from_it(errors: Any, connectivity: float):
    assert mode_connectivity(errors) == pytest.approx(connectivity, abs=1e-12)


# ---- similarity

X = torch.randn(50, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_similarity_is_one_under_rotation_scale_and_shift():
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    assert cka(X, 3 * X @ rotation + 5) == pytest.approx(1, abs=1e-12)
    assert cka(X, X.reshape(50, 2, 2)) == pytest.approx(1, abs=1e-12)


def test_similarity_of_columns_known_on_paper():
    """Orthogonal columns without mean: of [a, b] and [a], |a|⁴ / (√(|a|⁴ + |b|⁴) · |a|²), and so on."""
    a, b, c = torch.tensor([[1.0, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])  # each of norm² 4
    assert cka(a[:, None], b[:, None]) == 0
    assert cka(torch.stack([a, b], 1), a[:, None]) == pytest.approx(1 / math.sqrt(2))
    assert cka(torch.stack([a, b], 1), torch.stack([a, c], 1)) == pytest.approx(0.5)
    assert cka(torch.stack([2 * a, b], 1), a[:, None]) == pytest.approx(16 / math.sqrt(16**2 + 4**2))
    assert cka(a[:, None], (a + 3 * b)[:, None]) == pytest.approx(0.1)  # the squared correlation


def test_both_ways_to_compute_it_are_the_same():
    wide, other = torch.randn(9, 40), torch.randn(9, 30)
    x, y = (value.double() - value.double().mean(0) for value in (wide, other))
    wanted = (y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())
    assert cka(wide, other) == pytest.approx(float(wanted), abs=1e-12)
    tall = torch.randn(30, 3), torch.randn(30, 2)
    x, y = (value.double() - value.double().mean(0) for value in tall)
    kernels = x @ x.T, y @ y.T
    assert cka(*tall) == pytest.approx(float((kernels[0] * kernels[1]).sum() / (kernels[0].norm() * kernels[1].norm())))


def test_what_is_constant_is_similar_to_nothing():
    assert math.isnan(cka(torch.ones(5, 2), torch.randn(5, 2)))


# ---- the answer


def pair(connectivity: float, similarity: float = 1.0) -> Pair:
    return Pair((0, 1), connectivity, similarity, ())


@pytest.mark.parametrize(
    ("pairs", "answer"),
    [
        ([pair(-0.021)], "train hotter"),
        ([pair(-0.021, 0.1)], "train hotter"),
        ([pair(-0.019, 0.89)], "train cooler"),
        ([pair(0.019, 0.89)], "train cooler"),
        ([pair(-0.019, 0.91)], "keep"),
        ([pair(0.019, 0.91)], "keep"),
        ([pair(0.021)], "train cooler"),
        ([pair(0.0, math.nan)], "unknown"),
        ([pair(-0.5), pair(-0.1), pair(-0.9)], "train hotter"),  # far apart, and all of one mind
        ([pair(0.05), pair(0.0, 0.5)], "train cooler"),  # for two reasons
        ([pair(-0.03), pair(-0.01)], "unknown"),
        ([pair(0.0, 0.89), pair(0.0, 0.91)], "unknown"),
    ],
)
def test_thresholds(pairs: list[Pair], answer: str):
    assert judge(pairs)[0] == answer


def test_thresholds_may_be_others():
    assert judge([pair(-0.05, 0.5)], margin=0.1, similar=0.4)[0] == "keep"
    assert judge([pair(0.0, 0.95)], similar=0.96)[0] == "train cooler"


def test_pairs_that_disagree_are_counted():
    answer, reason = judge([pair(-0.5), pair(0.0, 0.5), pair(-0.4)])
    assert answer == "unknown" and reason.startswith("pairs disagree: 2 × a barrier of error lies")
    assert ", 1 × no barrier lies between networks, but their outputs differ" in reason


# ---- networks made by hand: one that is written into the model for each call of train

GIVEN: dict[str, Any] = {"steps": 5, "density": 1.0, "seeds": (0, 1)}


def scripted(*weights: list[float]) -> Callable[..., None]:
    """The dense network's weights, then those of each retraining."""
    rest = iter(weights)

    def train(model: nn.Module, *, start: int, stop: int, seed: int) -> None:
        with torch.no_grad():
            model.weight.copy_(torch.tensor(next(rest)).reshape(model.weight.shape))

    return train


def line(seed: int) -> nn.Module:
    return nn.Linear(2, 1, bias=False)


def double_well(model: Any) -> float:
    """Minima at (±1, anything), a barrier of 1 between them."""
    return float((model.weight[0, 0].detach() ** 2 - 1) ** 2)


INPUTS = torch.tensor([[1.0, 1.0], [1, -1], [-1, 1], [-1, -1]])


def features(model: Any) -> Tensor:
    """Two orthogonal columns, scaled by the weights: CKA of (1, v) and (1, w) is (1 + v²w²) / √((1 + v⁴)(1 + w⁴))."""
    return INPUTS * model.weight


def test_a_barrier_means_hotter():
    found = fz.diagnose_prunability(line, scripted([3, 3], [-1, 1], [1, 1]), double_well, features, **GIVEN)
    (pair,) = found.pairs
    assert found.answer == "train hotter" and pair.connectivity == pytest.approx(-1, abs=1e-6)
    assert pair.similarity == pytest.approx(1) and pair.seeds == (0, 1)  # of absolute weights it sees nothing
    wanted = [((2 * t / 10 - 1) ** 2 - 1) ** 2 for t in range(11)]
    assert pair.errors == pytest.approx(wanted, abs=1e-6)
    assert str(found).startswith("train hotter: a barrier")


@pytest.mark.parametrize(("other", "answer"), [(3.0, "train cooler"), (1.1, "keep")])
def test_without_a_barrier_similarity_decides(other: float, answer: str):
    found = fz.diagnose_prunability(line, scripted([3, 3], [1, 1], [1, other]), double_well, features, **GIVEN)
    wanted = (1 + other**2) / math.sqrt(2 * (1 + other**4))
    assert found.connectivity == pytest.approx(0, abs=1e-6) and found.similarity == pytest.approx(wanted)
    assert found.answer == answer


def test_every_pair_is_measured_and_must_agree():
    train = scripted([3, 3], [-1, 1], [1, 1], [1, 1.05])
    found = fz.diagnose_prunability(line, train, double_well, features, **{**GIVEN, "seeds": (4, 5, 6)})
    assert [pair.seeds for pair in found.pairs] == [(4, 5), (4, 6), (5, 6)]
    assert [round(pair.connectivity, 5) for pair in found.pairs] == [-1, -1, 0]
    assert found.answer == "unknown" and found.connectivity == pytest.approx(-2 / 3)


def test_ends_with_a_minimum_between_them_mean_cooler():
    def bowl(model: Any) -> float:
        return float(model.weight[0, 0].detach() ** 2)

    found = fz.diagnose_prunability(line, scripted([3, 3], [-1, 1], [1, 1]), bowl, features, **GIVEN)
    assert found.answer == "train cooler" and found.connectivity == pytest.approx(1) and "no minima" in found.reason


def test_what_cannot_be_said_is_unknown():
    def never(*args: Any, **named: Any) -> Any:
        raise AssertionError

    alone = fz.diagnose_prunability(never, never, never, never, **{**GIVEN, "seeds": (0,)})
    frozen = fz.diagnose_prunability(never, None, never, never, **GIVEN)
    assert (alone.answer, frozen.answer) == ("unknown", "unknown")
    assert "two or more seeds" in alone.reason and "no training function" in frozen.reason
    assert math.isnan(alone.connectivity) and math.isnan(frozen.similarity)
    dull = fz.diagnose_prunability(
        line, scripted([3, 3], [1, 1], [1, 2]), double_well, lambda model: torch.ones(3, 2), **GIVEN
    )
    assert dull.answer == "unknown" and "the same for all inputs" in dull.reason


# ---- what is trained


def test_all_are_trained_from_one_pruned_network_with_seeds_of_their_own():
    calls: list[tuple[Tensor, int, int, int]] = []
    trained: list[Tensor] = []

    def train(model: Any, *, start: int, stop: int, seed: int) -> None:
        calls.append((model.weight.detach().clone(), start, stop, seed))
        with torch.no_grad():
            model.weight.add_(torch.where(model.weight == 0, 0.0, torch.rand(1, 10)))
        trained.append(model.weight.detach().clone())

    found = fz.diagnose_prunability(
        lambda seed: nn.Linear(10, 1), train, lambda model: 0.0, lambda model: torch.eye(3), steps=7, retrain_steps=3,
        density=0.3, seeds=(0, 1, 2),
    )  # fmt: skip
    assert [(start, stop) for _, start, stop, _ in calls] == [(0, 7), (0, 3), (0, 3), (0, 3)]
    assert len({seed for *_, seed in calls}) == 4
    starts = [weight for weight, *_ in calls[1:]]
    assert all(torch.equal(starts[0], start) for start in starts) and int(starts[0].count_nonzero()) == 3
    kept = starts[0] != 0
    assert torch.equal(starts[0][kept], trained[0][kept])
    assert trained[0][kept].abs().min() >= trained[0][~kept].abs().max()
    assert found.density == 0.3 and len(found.pairs) == 3


def test_a_small_classifier_gives_the_same_each_time():
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] * x[:, 1] > 0).long()

    def build(seed: int) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 2))

    def train(model: nn.Module, *, start: int, stop: int, seed: int) -> None:
        for _ in range(start, stop):
            for batch in torch.randperm(len(x)).split(10):
                parameters = list(model.parameters())
                grads = torch.autograd.grad(F.cross_entropy(model(x[batch]), y[batch]), parameters)
                with torch.no_grad():
                    for value, grad in zip(parameters, grads):
                        value.sub_(0.3 * grad)

    def run() -> fz.Diagnosis:
        return fz.diagnose_prunability(
            build, train, lambda model: float((model(x).argmax(-1) != y).double().mean()),
            lambda model: model(x).softmax(-1), steps=10, density=0.5, exclude="2", seeds=(0, 1),
        )  # fmt: skip

    one, other = run(), run()
    assert one == other
    assert len(one.pairs[0].errors) == 11 and all(0 <= error <= 0.5 for error in one.pairs[0].errors)
    assert 0 < one.similarity <= 1


def with_norm(seed: int) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def test_statistics_of_batch_norms_are_estimated_for_every_network_on_a_line():
    x, seen = torch.randn(40, 2), []

    def train(model: Any, *, start: int, stop: int, seed: int) -> None:
        with torch.no_grad():
            model[0].weight.add_(torch.randn(3, 2))

    def refresh(model: Any) -> None:
        torch.optim.swa_utils.update_bn([x], model)

    def error(model: Any) -> float:
        assert not model.training
        mean = (x @ model[0].weight.T + model[0].bias).mean(0)
        seen.append(float((model[1].running_mean - mean).detach().abs().max()))
        return 0.0

    given: dict[str, Any] = {**GIVEN, "points": 5}
    fz.diagnose_prunability(with_norm, train, error, lambda model: model(x), refresh=refresh, **given)
    assert len(seen) == 5 and max(seen) < 1e-5
    with pytest.raises(PlanError, match=r"a batch norm's statistics mean nothing(.|\n)*at 1\n(.|\n)*update_bn"):
        fz.diagnose_prunability(with_norm, train, error, lambda model: model(x), **given)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"density": 0}, "above 0 and at most 1, got 0\n  at density"),
        ({"density": 1.5}, "at density"),
        ({"steps": 0}, "at least 1, got 0\n  at steps"),
        ({"retrain_steps": 0}, "at retrain_steps"),
        ({"points": 2}, "at least 3, got 2\n  at points"),
        ({"margin": -1}, "at least 0, got -1\n  at margin"),
        ({"similar": "high"}, "got 'high'\n  at similar"),
        ({"seeds": (1, 1)}, r"different whole numbers, got \(1, 1\)"),
        ({"exclude": "fc"}, "'fc' matches no linear layer"),
        ({"train": lambda model: None}, r"cannot be called as train\(model, start=…"),
        ({"error": lambda: 0}, r"error cannot be called as error\(model\)"),
        ({"error": lambda model: math.inf}, "error returned inf"),
        ({"outputs": lambda: 0}, r"outputs cannot be called as outputs\(model\)"),
        ({"outputs": lambda model: 3}, "outputs returned int, not a tensor"),
        ({"outputs": lambda model: torch.ones(3)}, r"outputs returned \(3,\), not a tensor"),
        ({"outputs": lambda model: torch.ones(1, 3)}, r"outputs returned \(1, 3\), not a tensor"),
        ({"refresh": lambda: 0}, r"refresh cannot be called as refresh\(model\)"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], text: str):
    functions = {"build": line, "train": scripted([3, 3], [1, 1], [1, 1]), "error": double_well, "outputs": features}
    with pytest.raises(PlanError, match=text):
        fz.diagnose_prunability(**{**functions, **GIVEN, "exclude": (), **given})
