"""Clocks and the calibrated inner loop. A clock runs `body` and returns the seconds that took."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

Clock = Callable[[Callable[[], object]], float]
MAX_INNER = 100_000


def wall_clock(body: Callable[[], object]) -> float:
    start = time.perf_counter()
    body()
    return time.perf_counter() - start


def cuda_clock(body: Callable[[], object]) -> float:
    """Between two events on the current stream, so that the time of the last kernel is not missed."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    body()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def clock_for(device: str) -> Clock:
    return cuda_clock if device == "cuda" else wall_clock


def loop(call: Callable[[], object], inner: int) -> Callable[[], None]:
    def body() -> None:
        for _ in range(inner):
            call()

    return body


def calibrate(clock: Clock, call: Callable[[], object], target: float) -> int:
    """The number of calls that takes at least `target` seconds; grown at most tenfold at a time."""
    inner = 1
    while inner < MAX_INNER:
        seconds = clock(loop(call, inner))
        if seconds >= target:
            break
        wanted = math.ceil(1.2 * inner * target / seconds) if seconds > 0 else 10 * inner
        inner = min(max(inner + 1, wanted), 10 * inner, MAX_INNER)
    return inner
