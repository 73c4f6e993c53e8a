"""Peak memory: of a child process for each sample, and of this process while a peer runs."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .case import Reading, Unavailable

ROOT = Path(__file__).resolve().parents[2]
CHILD = Path(__file__).with_name("child.py")
TIMEOUT = 1800.0


HELD = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
"""An environment in which what is larger than 128 KiB goes back to the system when it is freed: where the question is
what a job holds. Else glibc raises this threshold while a process runs, and what counts of the freed is chance."""


def child(function: str, *, held: bool = False, **arguments: Any) -> dict[str, Any]:
    """Run `module:function` in a fresh process (see child.py): its {"peak": bytes, "error": float}.

    `held`: of what it holds, without what the allocator keeps beside it (see :data:`HELD`).

    Raises Unavailable where the child could not import something, RuntimeError where it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        # By path, not with -m: importing the package would import torch, also for work that does not need it.
        command = [sys.executable, str(CHILD), function, json.dumps(arguments), str(answer)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT,
                              env=os.environ | (HELD if held else {}))  # fmt: skip
        if done.returncode == 0:
            return dict(json.loads(answer.read_text()))
    last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
    if last[0].startswith(("ImportError", "ModuleNotFoundError")):
        raise Unavailable(last[0])
    raise RuntimeError(f"{function} in a child process: {last[0]}")


@functools.cache
def import_baseline(function: str, held: bool = False, samples: int = 3) -> float:
    """Peak bytes of a process that only imports what `function`'s process imports (median of a few)."""
    return float(statistics.median(child(function, held=held)["peak"] for _ in range(samples)))


def peak_above(
    baseline: str, function: str, *, held: bool = False, **arguments: Any
) -> Callable[[], Callable[[], Reading]]:
    """A `Peer.prepare` that measures child processes of `function`, less the peak of one of `baseline`.

    `held` is asked of both.
    """

    def prepare() -> Callable[[], Reading]:
        floor = import_baseline(baseline, held)

        def read() -> Reading:
            report = child(function, held=held, **arguments)
            return Reading(report["peak"] - floor, report["error"])

        return read

    return prepare


def forget_peak() -> None:
    """From here on :func:`.child.peak_rss` is that of what follows, on Linux (see proc(5), clear_refs)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
