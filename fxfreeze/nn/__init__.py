"""Trainable layers to put into a model. ``import fxfreeze`` does not import them; ``import fxfreeze.nn`` does."""

from __future__ import annotations

from .gate import Firing, Gate, TemperatureSchedule, firing
from .tversky import TverskyProjection, TverskySimilarity, class_means

__all__ = [
    "Firing",
    "Gate",
    "TemperatureSchedule",
    "TverskyProjection",
    "TverskySimilarity",
    "class_means",
    "firing",
]
