"""Energy that the machine itself counts: the packages' RAPL counters on Linux, or the GPU's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

RAPL = Path("/sys/class/powercap")


def meter(device: str) -> Callable[[], float] | None:
    """Joules since some moment, of the whole machine; None where it does not tell, as most virtual machines."""
    return _gpu() if device == "cuda" else _packages()


def _packages() -> Callable[[], float] | None:
    counters = sorted(RAPL.glob("intel-rapl:[0-9]/energy_uj"))

    def read() -> float:
        return sum(int(path.read_text()) for path in counters) / 1e6

    try:
        return read if counters and read() >= 0 else None
    except OSError:  # since CVE-2020-8694 it is for the administrator only
        return None


def _gpu() -> Callable[[], float] | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # no library, no device, or one that does not count
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
