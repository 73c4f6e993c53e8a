"""What is remembered of a value over the calibration data: as much for a thousand batches as for one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Method = Literal["minmax", "percentile", "mse", "entropy"]

BINS = 4096
LEVELS = 256
_FRACTIONS = torch.linspace(1.0, 0.2, 81, dtype=torch.float64)
"""Of the range that was seen, what is tried as a narrower one."""


@dataclass(frozen=True)
class Range:
    """A closed interval of floats, and the share of what was seen that lies outside."""

    low: float
    high: float
    outside: float = 0.0

    @property
    def width(self) -> float:
        return self.high - self.low


class Observer:
    """Extremes of a value, of each of its channels, and, where the method looks at more, a histogram.

    The histogram has :data:`BINS` bins over [-reach, reach] with a power of two for `reach`, so that where a larger
    value comes, two bins become one exactly.
    """

    def __init__(self, method: Method, channel: int = -1) -> None:
        self.method, self.channel = method, channel
        self.low, self.high = math.inf, -math.inf
        self.channels: Tensor | None = None
        self.reach = 0.0
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def add(self, value: Tensor) -> bool:
        """Look at a batch; False, and nothing is remembered, if it holds NaN or Inf."""
        if not value.numel():
            return True
        low, high = (float(extreme) for extreme in value.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            return False
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._add_channels(value)
        if self.method != "minmax":
            self._widen(max(-low, high))
            self.counts += torch.histc(value.float(), BINS, -self.reach, self.reach).double().cpu()
        return True

    def _add_channels(self, value: Tensor) -> None:
        channel = self.channel % max(value.dim(), 1)
        others = [dim for dim in range(value.dim()) if dim != channel]
        largest = value.abs().amax(others).cpu() if others else value.abs().cpu()
        # A last dim that is a length may differ from batch to batch: it is no channel.
        if self.channels is None or self.channels.shape == largest.shape:
            self.channels = largest if self.channels is None else torch.maximum(self.channels, largest)

    def _widen(self, size: float) -> None:
        wanted = 2.0 ** math.ceil(math.log2(size)) if size else 2.0**-20
        if not self.reach:
            self.reach = wanted
        while self.reach < wanted:
            inner = self.counts.reshape(-1, 2).sum(1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[BINS // 4 : 3 * BINS // 4] = inner
            self.reach *= 2

    @property
    def outlier(self) -> float:
        """The largest channel in medians of channels; 1 for a value without channels."""
        if self.channels is None or not self.channels.numel():
            return 1.0
        median = float(self.channels.median())
        return float(self.channels.max()) / median if median else math.inf

    def range(self, percentile: float) -> Range:
        """What integers should span, by the observer's method."""
        seen = Range(self.low, self.high)
        if self.method == "minmax" or seen.width == 0:
            return seen
        if self.method == "percentile":
            return self._measured(*self._percentiles(percentile / 100))
        candidates = [Range(float(part * self.low), float(part * self.high)) for part in _FRACTIONS]
        cost = self._squares if self.method == "mse" else self._divergence
        best = min(candidates, key=cost)
        return self._measured(best.low, best.high)

    @property
    def _centres(self) -> Tensor:
        width = 2 * self.reach / BINS
        return (torch.arange(BINS, dtype=torch.float64) + 0.5) * width - self.reach

    def _measured(self, low: float, high: float) -> Range:
        low, high = max(low, self.low), min(high, self.high)
        # A bin that a bound lies in counts as inside.
        half = self.reach / BINS
        outside = (self._centres + half < low) | (self._centres - half > high)
        return Range(low, high, float(self.counts[outside].sum() / self.counts.sum()))

    def _percentiles(self, share: float) -> tuple[float, float]:
        """Outer edges of the bins in which the quantiles lie."""
        passed = self.counts.cumsum(0) / self.counts.sum()
        width = 2 * self.reach / BINS
        first = int(torch.searchsorted(passed, 1 - share, right=True))
        last = int(torch.searchsorted(passed, torch.tensor(share, dtype=torch.float64)))
        return first * width - self.reach, (min(last, BINS - 1) + 1) * width - self.reach

    def _squares(self, tried: Range) -> float:
        """Σ count · (x - what integers make of x)²."""
        step = _spanned(tried) / (LEVELS - 1)
        clipped = self._centres.clamp(tried.low, tried.high)
        return float((self.counts * (self._centres - torch.round(clipped / step) * step).square()).sum())

    def _divergence(self, tried: Range) -> float:
        """Kullback and Leibler's, of the clipped distribution from what 256 levels keep of it.

        Within a level the mass is spread evenly over the bins that hold any, as Migacz (8-bit inference with TensorRT,
        2017) does it. Both are smoothed by a ten-thousandth, so that an empty bin costs something, not everything.
        """
        inside = (self._centres >= tried.low) & (self._centres <= tried.high)
        if not bool(inside.any()):
            return math.inf
        kept, levels = self.counts[inside], self._levels(tried)[inside]
        clipped = kept.clone()
        clipped[0] += self.counts[self._centres < tried.low].sum()
        clipped[-1] += self.counts[self._centres > tried.high].sum()
        held = (kept > 0).double()
        mass = torch.zeros(LEVELS, dtype=torch.float64).index_add_(0, levels, kept)
        spots = torch.zeros(LEVELS, dtype=torch.float64).index_add_(0, levels, held)
        spread = held * (mass / spots.clamp(min=1))[levels]
        p, q = (_smoothed(part) for part in (clipped, spread))
        return float((p * (p / q).log()).sum())

    def _levels(self, tried: Range) -> Tensor:
        """The level of each bin, counted from the lowest."""
        step = _spanned(tried) / (LEVELS - 1)
        return torch.round((self._centres - min(tried.low, 0.0)) / step).long().clamp(0, LEVELS - 1)


def _spanned(tried: Range) -> float:
    """Width of the range with 0 in it, as integers need it."""
    return max(tried.high, 0.0) - min(tried.low, 0.0)


def _smoothed(part: Tensor) -> Tensor:
    total = part.sum().clamp(min=1e-300)
    return (part / total + 1e-4 / part.numel()) / (1 + 1e-4)
