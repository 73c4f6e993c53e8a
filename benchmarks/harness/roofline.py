"""What this machine can do at most, as it was measured, and how near a time comes to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .case import Work
from .clock import clock_for

BYTES = 2**28
SIDE = {"cpu": 2048, "cuda": 8192}
SAMPLES = 3


def rates(device: str = "cpu") -> dict[str, float]:
    """Bytes per second of a copy (read and written), and operations per second of square products, per dtype.

    The best of a few, with the threads that are set. A network that fits into the cache is not bound by the first.
    """
    source = torch.zeros(BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = {"copy": 2 * BYTES / _seconds(lambda: target.copy_(source), device)}
    side = SIDE[device]
    operations = 2 * side**3
    for dtype in (torch.float32, *((torch.float16, torch.bfloat16) if device == "cuda" else ())):
        a = torch.randn(side, side, device=device).to(dtype)
        found[str(dtype).removeprefix("torch.")] = operations / _seconds(lambda a=a: a @ a, device)  # type: ignore[misc]
    found["int8"] = operations / _seconds(_byte_product(side, device), device)
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def _byte_product(side: int, device: str) -> Callable[[], Tensor]:
    """On CPUs oneDNN's: torch._int_mm is a plain loop where there is no VNNI, a hundred times slower."""
    weight = torch.randint(-64, 64, (side, side), dtype=torch.int8, device=device)
    if device != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return lambda: torch._int_mm(weight, weight)  # type: ignore[no-untyped-call, no-any-return]
    given = torch.randint(0, 128, (side, side), dtype=torch.uint8)
    packed = torch.ops.onednn.qlinear_prepack(weight, [side, side])
    scales, zeros = torch.ones(side), torch.zeros(side, dtype=torch.int64)
    return lambda: torch.ops.onednn.qlinear_pointwise(  # type: ignore[no-any-return]
        given, 1.0, 0, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def _seconds(call: Callable[[], Any], device: str) -> float:
    call()
    clock = clock_for(device)
    return min(clock(call) for _ in range(SAMPLES))


def measured() -> dict[str, dict[str, float]]:
    """The rates of every device that there is."""
    return {device: rates(device) for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else []))}


def highest(*found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Of rates that were measured one after the other: a virtual machine is faster at times than at others."""
    merged: dict[str, dict[str, float]] = {}
    for devices in found:
        for device, known in devices.items():
            best = merged.setdefault(device, {})
            best.update({name: max(rate, best.get(name, rate)) for name, rate in known.items()})
    return merged


def bound(work: Work, known: dict[str, float]) -> float | None:
    """Seconds that the work takes at least; None where the rate of its dtype was not measured."""
    if work.dtype not in known:
        return None
    return max(work.bytes / known["copy"], work.operations / known[work.dtype])
