"""How long calls take: what a rewrite that exists only for speed is decided by."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)

SECONDS = 0.4


def medians(calls: Mapping[Key, Callable[[], Tensor]], device: torch.device) -> dict[Key, float]:
    """Seconds of each call: the median of at most seven, taken in turns, and of fewer where they take long."""
    found: dict[Key, list[float]] = {key: [] for key in calls}
    for call in calls.values():
        call()  # what is built, chosen or read for the first time is not counted
    started = time.perf_counter()
    for turn in range(7):
        if turn >= 2 and time.perf_counter() - started > SECONDS * turn / (turn + 1):
            break
        for key, call in calls.items():
            found[key].append(_seconds(call, device))
    return {key: statistics.median(values) for key, values in found.items()}


def _seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - started
