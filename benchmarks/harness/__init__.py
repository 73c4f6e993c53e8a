"""What a benchmark file needs: cases, peers, metrics, readings."""

from .case import DURATION, LATENCY, PEAK_MEMORY, Case, Metric, Options, Peer, Reading, Unavailable, Work
from .loaded import Loaded

__all__ = [
    "DURATION",
    "LATENCY",
    "PEAK_MEMORY",
    "Case",
    "Loaded",
    "Metric",
    "Options",
    "Peer",
    "Reading",
    "Unavailable",
    "Work",
]
