"""Summaries of samples. Medians throughout: a noisy machine errs in one direction, and far."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Ratio:
    """The median of the per-round ratios and its 95 % bootstrap interval (None below three rounds of what varies)."""

    value: float
    low: float | None
    high: float | None

    def verdict(self, limit: float | None) -> str | None:
        """Met or missed only where the whole interval says so."""
        if limit is None:
            return None
        if self.low is None or self.high is None:
            return "unclear"
        return "met" if self.high <= limit else "missed" if self.low > limit else "unclear"


def median(samples: list[float]) -> float:
    return float(np.median(samples))


def spread(samples: list[float]) -> dict[str, float]:
    """Interquartile range and median absolute deviation, in the unit of the samples."""
    values = np.asarray(samples, dtype=np.float64)
    low, high = np.percentile(values, [25, 75])
    return {"iqr": float(high - low), "mad": float(np.median(np.abs(values - np.median(values))))}


def ratio(samples: list[float], baseline: list[float], seed: int = 0, exact: bool = False) -> Ratio:
    """`samples[i]` and `baseline[i]` come from the same round, so a slow spell of the machine cancels out."""
    ratios = np.asarray(samples, dtype=np.float64) / np.asarray(baseline, dtype=np.float64)
    if exact:
        return Ratio(float(np.median(ratios)), float(ratios.min()), float(ratios.max()))
    if len(ratios) < 3:
        return Ratio(float(np.median(ratios)), None, None)
    picks = np.random.default_rng(seed).integers(0, len(ratios), size=(RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
    return Ratio(float(np.median(ratios)), float(low), float(high))
