"""BayesCap: starts as the identity, its likelihood integrates to 1, its variance is SciPy's, calibration tells."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.nn import (
    BayesCap,
    calibration_error,
    cap_loss,
    coverage_error,
    log_variance,
    negative_log_likelihood,
    variance,
)
from fxfreeze.pipeline import run_passes

gennorm: Any = pytest.importorskip("scipy.stats").gennorm


def trained_a_little(cap: BayesCap) -> BayesCap:
    """With weights and statistics that a pass could get wrong."""
    for parameter in cap.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    for module in cap.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean, module.running_var = torch.randn(module.num_features), torch.rand(module.num_features)
    return cap


@pytest.mark.parametrize("positive", ["softplus", "relu"])
@pytest.mark.parametrize(("dims", "shape"), [(0, (4, 3)), (0, (2, 5, 3)), (1, (2, 3, 8)), (2, (2, 3, 8, 7)),
                                             (3, (1, 3, 4, 4, 4))])  # fmt: skip
def test_it_starts_as_the_identity(dims: int, shape: tuple[int, ...], positive: str) -> None:
    y = torch.randn(shape)
    mean, alpha, beta = BayesCap(3, hidden=6, dims=dims, positive=positive)(y)
    assert torch.equal(mean, y)
    torch.testing.assert_close(alpha, torch.ones(shape))
    torch.testing.assert_close(beta, torch.full(shape, 2.0))


def test_the_likelihood_and_the_variance_are_scipys() -> None:
    alpha, beta = torch.rand(200, dtype=torch.float64) * 3 + 0.1, torch.rand(200, dtype=torch.float64) * 5 + 0.3
    mean, truth = torch.randn(200, dtype=torch.float64), torch.randn(200, dtype=torch.float64)
    truth = mean + (truth - mean).clamp(-3, 3) * alpha.clamp(max=1) / 3  # within what is not continued
    want = -torch.tensor(gennorm.logpdf(truth.numpy(), beta.numpy(), mean.numpy(), alpha.numpy()))
    torch.testing.assert_close(negative_log_likelihood(mean, alpha, beta, truth), want)
    want = torch.tensor(gennorm.var(beta.numpy(), 0, alpha.numpy()))
    torch.testing.assert_close(variance(alpha, beta), want)
    torch.testing.assert_close(variance(alpha.float(), beta.float()).double(), want, rtol=1e-4, atol=0)


def test_variance_has_no_overflow_in_between_and_none_at_the_end() -> None:
    # Γ(3/β) alone overflows float32 below β = 0.086, and 1e15² does.
    small, tiny = torch.tensor([1e-15]), torch.tensor([0.085])
    want = float(gennorm.var(0.085, 0, 1e-15))
    assert variance(small, tiny).item() == pytest.approx(want, rel=1e-4)
    assert variance(torch.tensor([1e15]), torch.tensor([0.1])).item() == pytest.approx(torch.finfo().max, rel=1e-3)
    assert variance(torch.tensor([1e15]), torch.tensor([0.1])).isfinite().all()
    assert log_variance(torch.tensor([1e15]), torch.tensor([0.1])).item() > math.log(torch.finfo().max)
    assert variance(torch.ones(1).half(), torch.ones(1).half()).dtype == torch.float32


@pytest.mark.parametrize("alpha", [1e-6, 1e-4, 1.0, 1e4])
@pytest.mark.parametrize("beta", [1e-3, 0.1, 1.0, 2.0, 50.0])
def test_gradients_are_finite(alpha: float, beta: float) -> None:
    gaps = torch.tensor([0.0, 1e-30, 1e-5, 1.0, 1e3, -1e6])
    mean, a, b = (torch.full_like(gaps, value, requires_grad=True) for value in (0.0, alpha, beta))
    loss = negative_log_likelihood(mean, a, b, gaps)
    assert loss.isfinite().all()
    for gradient in torch.autograd.grad(loss.sum() + log_variance(a, b).sum(), (mean, a, b)):
        assert gradient.isfinite().all()


def test_what_is_far_off_still_teaches() -> None:
    mean = torch.zeros(1, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        negative_log_likelihood(mean, torch.full((1,), 1e-4), torch.full((1,), 2.0), torch.ones(1)), mean
    )
    assert gradient.item() < -1


def test_the_loss_is_what_it_says() -> None:
    mean, alpha, beta, y, truth = torch.randn(4), torch.rand(4) + 1, torch.rand(4) + 1, torch.randn(4), torch.randn(4)
    parts = (mean - y).abs().mean(), negative_log_likelihood(mean, alpha, beta, truth).mean()
    found = cap_loss(mean, alpha, beta, frozen=y, truth=truth, weights=(3.0, 0.5))
    torch.testing.assert_close(found, 3 * parts[0] + 0.5 * parts[1])
    y.requires_grad_()
    mean.requires_grad_()
    cap_loss(mean, alpha, beta, frozen=y, truth=truth).backward()
    assert y.grad is None and mean.grad is not None


def test_it_learns_the_size_of_errors() -> None:
    """Errors are Laplacian about y, and grow with |y|."""
    y = torch.rand(4096, 1) * 2 - 1
    size = 0.1 + y.abs()
    truth = y + size * torch.distributions.Laplace(0.0, 1.0).sample(y.shape)
    cap = BayesCap(1, hidden=16, blocks=1, dims=0)
    optimizer = torch.optim.Adam(cap.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        mean, alpha, beta = cap(y)
        cap_loss(mean, alpha, beta, frozen=y, truth=truth).backward()
        optimizer.step()
    with torch.no_grad():
        mean, alpha, beta = cap(y)
    wanted = 2 * size**2  # the variance of a Laplace distribution
    assert torch.corrcoef(torch.stack([variance(alpha, beta).flatten(), wanted.flatten()]))[0, 1] > 0.9
    assert coverage_error(mean, alpha, beta, truth) < 0.03
    fresh = BayesCap(1, dims=0)(y)
    assert calibration_error(mean, variance(alpha, beta), truth) < calibration_error(
        fresh[0], variance(*fresh[1:]), truth
    )


def test_calibration_by_hand() -> None:
    spread = torch.tensor([1.0, 1.0, 3.0, 3.0])
    truth = torch.tensor([0.0, 2.0, 1.0, 1.0])
    # Squared errors 0, 4 | 1, 1: (2/4)·|2 − 1| + (2/4)·|1 − 3|
    assert calibration_error(torch.zeros(4), spread, truth, bins=2) == pytest.approx(1.5)
    assert calibration_error(torch.zeros(4), spread, truth, bins=1) == pytest.approx(0.5)
    assert calibration_error(torch.zeros(4), torch.full((4,), 2.0), truth) == pytest.approx(0.5)


def test_coverage_of_the_distribution_itself_is_right_and_of_another_is_not() -> None:
    alpha, beta = torch.full((20000,), 0.7), torch.full((20000,), 1.4)
    truth = torch.tensor(gennorm.rvs(1.4, 2.0, 0.7, size=20000, random_state=0)).float()
    mean = torch.full((20000,), 2.0)
    assert coverage_error(mean, alpha, beta, truth) < 0.01
    assert coverage_error(mean, 2 * alpha, beta, truth) > 0.1
    assert coverage_error(mean, alpha, beta / 2, truth) > 0.05


def test_it_compiles_exactly_and_its_norms_fold() -> None:
    from fxfreeze.capture import capture
    from fxfreeze.passes import PIPELINE
    from fxfreeze.rewrite import Context

    cap = trained_a_little(BayesCap(2, hidden=4, blocks=1)).eval()
    plan = fz.Plan(inputs=[fz.Input("y", shape=("batch", 2, 6, 6))])
    program, _ = capture(cap, plan)
    run_passes(program, PIPELINE, Context(plan))
    assert not program.graph.find_nodes(op="call_function", target=torch.ops.aten.batch_norm.default)
    y = torch.randn(5, 2, 6, 6)
    for found, want in zip(program.run(y), cap(y), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"channels": 0}, "positive"), ({"dims": 4}, "dims must be"), ({"positive": "abs"}, "'softplus', 'relu'"),
     ({"least": (0.0, 1.0)}, "two positive numbers"), ({"blocks": -1}, "blocks -1")],
)  # fmt: skip
def test_bad_arguments_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        BayesCap(**{"channels": 2, **change})


def test_shapes_that_would_broadcast_are_refused() -> None:
    def four() -> list[Tensor]:
        return [torch.ones(3, 4) for _ in range(4)]

    with pytest.raises(ValueError, match=r"truth \[4\]"):
        negative_log_likelihood(*four()[:3], torch.ones(4))
    with pytest.raises(ValueError, match=r"variance \[4\]"):
        calibration_error(torch.ones(3, 4), torch.ones(4), torch.ones(3, 4))
    with pytest.raises(ValueError, match="finite"):
        calibration_error(torch.ones(1), torch.full((1,), math.inf), torch.ones(1))
    with pytest.raises(ValueError, match=r"alpha \[4\]"):
        coverage_error(torch.ones(3, 4), torch.ones(4), torch.ones(3, 4), torch.ones(3, 4))
