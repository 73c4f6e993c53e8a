"""Trainable layers to put into a model. ``import fxfreeze`` does not import them; ``import fxfreeze.nn`` does."""

from __future__ import annotations

from .tversky import TverskyProjection, TverskySimilarity, class_means

__all__ = ["TverskyProjection", "TverskySimilarity", "class_means"]
