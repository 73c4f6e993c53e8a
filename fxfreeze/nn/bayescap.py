"""Uncertainty for a network that stays as it is: a head on its output that says how far off that may be.

>>> cap = BayesCap(channels=3, dims=2)
>>> mean, alpha, beta = cap(y := frozen(x))
>>> loss = cap_loss(mean, alpha, beta, frozen=y, truth=target)
>>> loss.backward()
>>> calibration_error(mean, variance(alpha, beta), target)

Every element of the truth is taken to be generalised Gaussian about the mean μ, with scale α and shape β:
p(t) = β / (2α Γ(1/β)) · exp(−(|t − μ| / α)^β). β = 2 is a normal distribution with σ² = α²/2, β = 1 a Laplace
distribution, and below 1 the tails are heavier still.

Source: Upadhyay, Karthik, Chen, Mancini and Akata, BayesCap (ECCV 2022), arXiv 2207.06873.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POSITIVE: dict[str, Callable[[Tensor], Tensor]] = {"softplus": F.softplus, "relu": F.relu}

STEEP = math.log(1e3)
"""Where (r/α)^β is continued as a straight line in its logarithm: the paper clips there, and clipped errors teach
nothing."""
NEAR = 1e-4
"""|r|/α below this counts as this: for β < 1 the slope of (r/α)^β at 0 has no bound."""


class BayesCap(nn.Module):
    r"""Mean, scale and shape of every element of a frozen output y.

    The mean is y itself plus what the last layer of its branch adds, which starts at zero: a new cap is the identity,
    with α = 1 and β = 2 everywhere. Batch norms (``dims`` > 0) fold into the convolutions when it is compiled.

    Args:
        channels: C of y, which is [..., C] with ``dims=0``, else [batch, C, \*sizes] with `dims` sizes.
        hidden: width of the layers in between.
        blocks: how many residual blocks the three branches share.
        dims: 0: linear layers; 1, 2 or 3: convolutions of 3 with zeros around.
        positive: what makes 1/α and β positive, "softplus", or "relu" as in the paper (a unit at 0 does not learn).
        least: the smallest 1/α, and the smallest β. With the defaults :func:`variance` is finite in float32.

    Raises:
        ValueError: a size is not positive, `blocks` is negative, or `dims` or `positive` is unknown.
    """

    def __init__(
        self, channels: int, *, hidden: int = 64, blocks: int = 2, dims: int = 2, positive: str = "softplus",
        least: tuple[float, float] = (1e-4, 0.1),
    ) -> None:  # fmt: skip
        super().__init__()
        if channels < 1 or hidden < 1 or blocks < 0:
            raise ValueError(f"channels and hidden must be positive, got {channels} and {hidden}, and blocks {blocks}")
        if dims not in (0, *CONVOLUTIONS):
            raise ValueError(f"dims must be 0, 1, 2 or 3, got {dims!r}")
        if positive not in POSITIVE:
            raise ValueError(f"positive must be one of {', '.join(map(repr, POSITIVE))}, got {positive!r}")
        if not min(least) > 0:
            raise ValueError(f"least must hold two positive numbers, got {least!r}")
        self.channels, self.dims, self.positive, self.least = channels, dims, positive, least
        self.stem = nn.Sequential(_layer(channels, hidden, dims), nn.PReLU())
        self.blocks = nn.ModuleList(_block(hidden, dims) for _ in range(blocks))
        self.mean, self.inverse_scale, self.shape = (_branch(hidden, channels, dims) for _ in range(3))
        # softplus⁻¹(1), softplus⁻¹(2): the paper's losses, too, are those of a normal distribution at first.
        for branch, start in ((self.inverse_scale, 1 - least[0]), (self.shape, 2 - least[1])):
            bias = math.log(math.expm1(start)) if positive == "softplus" else start
            nn.init.constant_(branch[-1].bias, bias)  # type: ignore[arg-type]

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """μ, α and β, each of the shape of `y`."""
        h = self.stem(y)
        for block in self.blocks:
            h = h + block(h)
        lift = POSITIVE[self.positive]
        scale = 1 / (lift(self.inverse_scale(h)) + self.least[0])
        return y + self.mean(h), scale, lift(self.shape(h)) + self.least[1]

    def extra_repr(self) -> str:
        return f"{self.channels}, dims={self.dims}, positive={self.positive!r}"


def _layer(inputs: int, outputs: int, dims: int) -> nn.Module:
    return CONVOLUTIONS[dims](inputs, outputs, 3, padding=1) if dims else nn.Linear(inputs, outputs)


def _block(hidden: int, dims: int) -> nn.Sequential:
    norms = [NORMS[dims](hidden) if dims else nn.Identity() for _ in range(2)]
    first, second = (_layer(hidden, hidden, dims) for _ in range(2))
    return nn.Sequential(first, norms[0], nn.PReLU(), second, norms[1])


def _branch(hidden: int, channels: int, dims: int) -> nn.Sequential:
    """Whose last layer gives its bias, 0, whatever comes in, until it is trained."""
    last = _layer(hidden, channels, dims)
    nn.init.zeros_(last.weight)  # type: ignore[arg-type]
    nn.init.zeros_(last.bias)  # type: ignore[arg-type]
    return nn.Sequential(_layer(hidden, hidden, dims), nn.PReLU(), last)


# ---- the distribution


def negative_log_likelihood(mean: Tensor, alpha: Tensor, beta: Tensor, truth: Tensor) -> Tensor:
    """(|t − μ|/α)^β + log α + log Γ(1 + 1/β) + log 2 of every element, in nats; in float32 at least.

    Γ(1 + 1/β) = Γ(1/β)/β, so nothing cancels where β is large. Above 1,000 the first term goes on as a straight line in
    β·log(|t − μ|/α), and below |t − μ|/α = 1e-4 it is constant: value and gradients stay finite for every finite μ and
    t, and all positive α and β whose logarithms are finite.

    Args:
        mean, alpha, beta: μ, α > 0 and β > 0, of one shape.
        truth: t, of that shape.

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape(mean=mean, alpha=alpha, beta=beta, truth=truth)
    mean, alpha, beta, truth = map(_wide, (mean, alpha, beta, truth))
    log_scale = alpha.log()
    # The maximum before the logarithm: at 0 its slope is infinite, and infinite times 0 is no number.
    exponent = beta * ((truth - mean).abs().clamp(min=torch.finfo(mean.dtype).tiny).log() - log_scale).clamp(
        min=math.log(NEAR)
    )
    steep = exponent.clamp(max=STEEP)
    power = steep.exp() + math.exp(STEEP) * (exponent - steep)
    return power + log_scale + torch.lgamma(1 + 1 / beta) + math.log(2)


def log_variance(alpha: Tensor, beta: Tensor) -> Tensor:
    """log σ² = 2 log α + log Γ(3/β) − log Γ(1/β), in float32 at least; where σ² overflows this does not."""
    alpha, beta = _wide(alpha), _wide(beta)
    # Γ(3/β) / Γ(1/β) = Γ(1 + 3/β) / (3 Γ(1 + 1/β))
    return 2 * alpha.log() + torch.lgamma(1 + 3 / beta) - torch.lgamma(1 + 1 / beta) - math.log(3)


def variance(alpha: Tensor, beta: Tensor) -> Tensor:
    """σ² = α² Γ(3/β) / Γ(1/β), in float32 at least, in squared units of μ; what would overflow is the largest number.

    Args:
        alpha, beta: positive, of shapes that broadcast.
    """
    found = log_variance(alpha, beta)
    largest = torch.finfo(found.dtype).max
    # exp(log(max)) rounds to infinity.
    return found.clamp(max=math.log(largest) * (1 - torch.finfo(found.dtype).eps)).exp()


def cap_loss(
    mean: Tensor, alpha: Tensor, beta: Tensor, *, frozen: Tensor, truth: Tensor, weights: tuple[float, float] = (1, 1)
) -> Tensor:
    """T₁·mean|μ − y| + T₂·the mean of :func:`negative_log_likelihood` of the truth; 0-d.

    Args:
        frozen: y, the frozen network's output, no gradient goes there.
        truth: what y should have been; where there is none, y itself.
        weights: T₁ and T₂.
    """
    _same_shape(mean=mean, alpha=alpha, beta=beta, frozen=frozen, truth=truth)
    identity = (mean - frozen.detach()).abs().mean()
    return weights[0] * identity + weights[1] * negative_log_likelihood(mean, alpha, beta, truth).mean()


# ---- how good it is


@torch.no_grad()
def calibration_error(mean: Tensor, variance: Tensor, truth: Tensor, *, bins: int = 20) -> float:
    """The uncertainty calibration error: Σ_b (n_b / n) · |mean squared error in b − mean predicted variance in b|.

    Elements are binned by their predicted variance, in `bins` bins of one width from the smallest to the largest; in
    squared units of μ, 0 when every variance is what the errors come to.

    Args:
        mean, variance, truth: of one shape, finite.

    Raises:
        ValueError: the shapes differ, there are no elements, or something is not finite.

    Source: Laves, Ihler, Fast, Kahrs and Ortmaier, Well-calibrated regression uncertainty (MIDL 2020), equation 7.
    """
    _same_shape(mean=mean, variance=variance, truth=truth)
    if bins < 1:
        raise ValueError(f"bins must be positive, got {bins}")
    error, predicted = ((mean - truth).double() ** 2).flatten(), variance.double().flatten()
    if not predicted.numel() or not bool((error.isfinite() & predicted.isfinite()).all()):
        raise ValueError("calibration_error: takes finite numbers, and at least one")
    low, high = predicted.min(), predicted.max()
    if low == high:
        return float((error.mean() - predicted.mean()).abs())
    where = ((predicted - low) / (high - low) * bins).long().clamp(max=bins - 1)
    sums = torch.zeros(2, bins, dtype=torch.float64, device=error.device)
    sums[0].scatter_add_(0, where, error)
    sums[1].scatter_add_(0, where, predicted)
    return float((sums[0] - sums[1]).abs().sum() / error.numel())


@torch.no_grad()
def coverage_error(mean: Tensor, alpha: Tensor, beta: Tensor, truth: Tensor, *, levels: int = 19) -> float:
    """Mean over p of |p − the share of truths in the central interval that should hold a share p|; 0 … 0.5.

    With probability P(1/β, (r/α)^β), the regularised lower gamma function, a generalised Gaussian is within r of its
    mean. p are `levels` numbers, evenly in (0, 1).

    Args:
        mean, alpha, beta, truth: of one shape.

    Raises:
        ValueError: the shapes differ, or there are no elements.

    Source: Kuleshov, Fenner and Ermon, Accurate uncertainties for deep learning using calibrated regression (ICML
    2018), equation 9, with absolute differences and equal weights.
    """
    _same_shape(mean=mean, alpha=alpha, beta=beta, truth=truth)
    if not mean.numel() or levels < 1:
        raise ValueError("coverage_error: takes at least one element and one level")
    mean, alpha, beta, truth = (item.double().flatten() for item in (mean, alpha, beta, truth))
    inside = torch.special.gammainc(1 / beta, ((truth - mean).abs() / alpha) ** beta)
    wanted = torch.linspace(0, 1, levels + 2, dtype=torch.float64, device=mean.device)[1:-1]
    found = torch.stack([(inside <= level).double().mean() for level in wanted])
    return float((found - wanted).abs().mean())


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _same_shape(**values: Tensor) -> None:
    shapes = {name: list(value.shape) for name, value in values.items()}
    if len({tuple(shape) for shape in shapes.values()}) > 1:
        raise ValueError(f"shapes differ: {', '.join(f'{name} {shape}' for name, shape in shapes.items())}")
