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
from .bottleneck import Bottleneck
from .codebook import Codebook
from .dendrites import Dendrites
from .gate import Firing, Gate, TemperatureSchedule, firing
from .grafts import CrossAttentionFusion, FrozenBlock, InnerAdaptor
from .hub import HubBottleneck
from .hypergraph import HypergraphContext
from .hypernetwork import Hypernetwork, LinearBank
from .reft import DiReFT, LoReFT
from .stitched import Edit, StitchedMLP, edit
from .tversky import TverskyProjection, TverskySimilarity, class_means

__all__ = [
    "BayesCap",
    "Bottleneck",
    "Codebook",
    "CrossAttentionFusion",
    "Dendrites",
    "DiReFT",
    "Edit",
    "Firing",
    "FrozenBlock",
    "Gate",
    "HubBottleneck",
    "HypergraphContext",
    "Hypernetwork",
    "InnerAdaptor",
    "LinearBank",
    "LoReFT",
    "StitchedMLP",
    "TemperatureSchedule",
    "TverskyProjection",
    "TverskySimilarity",
    "calibration_error",
    "cap_loss",
    "class_means",
    "coverage_error",
    "edit",
    "firing",
    "log_variance",
    "negative_log_likelihood",
    "variance",
]
