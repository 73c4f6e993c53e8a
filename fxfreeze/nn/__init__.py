"""Trainable layers to put into a model. ``import fxfreeze`` does not import them; ``import fxfreeze.nn`` does."""

from __future__ import annotations

from .bayescap import (
    BayesCap,
    calibration_error,
    cap_loss,
    coverage_error,
    log_variance,
    negative_log_likelihood,
    variance,
)
from .codebook import Codebook
from .dendrites import Dendrites
from .gate import Firing, Gate, TemperatureSchedule, firing
from .tversky import TverskyProjection, TverskySimilarity, class_means

__all__ = [
    "BayesCap",
    "Codebook",
    "Dendrites",
    "Firing",
    "Gate",
    "TemperatureSchedule",
    "TverskyProjection",
    "TverskySimilarity",
    "calibration_error",
    "cap_loss",
    "class_means",
    "coverage_error",
    "firing",
    "log_variance",
    "negative_log_likelihood",
    "variance",
]
