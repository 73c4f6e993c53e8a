"""How quiet the machine was during a measurement: load, stolen time, processors busy with other work."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_STEAL = 0.01  # share of all processor time taken by the hypervisor
MAX_OTHERS = 0.10  # processors kept busy by other processes
MAX_LOAD = 0.5  # load average per processor before the start


@dataclass(frozen=True)
class Snapshot:
    """Seconds of /proc/stat, over all processors; `own`: those of this process, its ended children and its workers."""

    when: float
    busy: float
    steal: float
    total: float
    own: float


def load_average() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def snapshot(workers: Sequence[int] = ()) -> Snapshot | None:
    """`workers`: process ids of children that live. None where there is no /proc/stat."""
    try:
        line = Path("/proc/stat").read_text().splitlines()[0]
    except OSError:
        return None
    user, nice, system, idle, iowait, irq, softirq, steal = (
        int(ticks) / os.sysconf("SC_CLK_TCK") for ticks in line.split()[1:9]
    )
    busy = user + nice + system + irq + softirq
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    own = sum(u.ru_utime + u.ru_stime for u in usage) + sum(map(_seconds, workers))
    return Snapshot(time.monotonic(), busy, steal, busy + idle + iowait + steal, own)


def _seconds(pid: int) -> float:
    """Of a process and its ended children; 0 for one that has ended, which its parent's children count."""
    try:
        told = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(int(ticks) for ticks in told[11:15]) / os.sysconf("SC_CLK_TCK")


class NoiseMeter:
    """Listens while rounds are measured; between them memory is filled, for which a hypervisor may take its time."""

    def __init__(self, workers: Sequence[int] = ()) -> None:
        self.workers = workers
        self.load = load_average()
        self._spans: list[tuple[Snapshot, Snapshot]] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """For one round."""
        start = snapshot(self.workers)
        yield
        end = snapshot(self.workers)
        if start is not None and end is not None:
            self._spans.append((start, end))

    def read(self) -> dict[str, Any]:
        """Load before and after, steal (share), others (processors), `noisy`: reasons for doubt."""
        steal, others = compare(self._spans) if self._spans else (None, None)
        # What was prepared just now is in the load average, too: it counts where nothing else is known.
        noisy = reasons(self.load if others is None else None, steal, others)
        return {
            "load_before": self.load,
            "load_after": load_average(),
            "steal": steal,
            "others": others,
            "noisy": noisy,
        }


def compare(spans: Sequence[tuple[Snapshot, Snapshot]]) -> tuple[float, float]:
    """(share of processor time stolen, processors busy with other processes) between the snapshots of each pair."""

    def passed(name: str) -> float:
        return sum(getattr(end, name) - getattr(start, name) for start, end in spans)

    steal = passed("steal") / max(passed("total"), 1e-9)
    others = (passed("busy") - passed("own")) / max(passed("when"), 1e-9)
    return round(max(steal, 0.0), 4), round(max(others, 0.0), 3)


def reasons(load: float | None, steal: float | None, others: float | None) -> list[str]:
    found = []
    if load is not None and load > MAX_LOAD * (os.cpu_count() or 1):
        found.append(f"load {load} at the start")
    if steal is not None and steal > MAX_STEAL:
        found.append(f"steal {steal:.1%}")
    if others is not None and others > MAX_OTHERS:
        found.append(f"{others:.2f} processors busy with other work")
    return found
