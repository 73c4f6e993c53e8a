"""Peers that run in environments of their own (``environments.toml``): a file each, which its interpreter runs.

A file here imports neither fxfreeze nor the harness, and has one function::

    quantized(onnx_file: Path, calibration: list[dict[str, numpy.ndarray]], out: Path) -> Path

of an ONNX file in floats, batches of its inputs by name, and the file to write: quantized, for a bare session of ONNX
Runtime. Outside of the environment :func:`quantized` here does the same, with the name of the peer in front.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy import ndarray

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1800.0


def quantized(peer: str, onnx_file: Path, calibration: Sequence[Mapping[str, ndarray]], out: Path) -> Path:
    """Run the file `peer` in its environment.

    Raises:
        Unavailable: there is no such environment here.
        RuntimeError: the peer failed; with the last line of its error.
    """
    import numpy

    from ..environments import interpreter

    python = interpreter(peer)
    with tempfile.TemporaryDirectory() as folder:
        batches = Path(folder) / "calibration.npz"
        numpy.savez(batches, **{f"{at} {name}": value for at, batch in enumerate(calibration)
                                for name, value in batch.items()})  # fmt: skip
        command = [str(python), "-m", f"{__name__}.{peer}", str(onnx_file), str(batches), str(out)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    if done.returncode:
        raise RuntimeError(f"{peer}: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    return out


def read(batches: Path) -> list[dict[str, ndarray]]:
    """What :func:`quantized` wrote for the other interpreter."""
    import numpy

    found: dict[int, dict[str, ndarray]] = {}
    with numpy.load(batches) as stored:
        for key in stored.files:
            at, _, name = key.partition(" ")
            found.setdefault(int(at), {})[name] = stored[key]
    return [found[at] for at in sorted(found)]


def arguments() -> tuple[Path, list[dict[str, ndarray]], Path]:
    """Of the command that a peer's file is run by."""
    onnx_file, batches, out = map(Path, sys.argv[1:])
    return onnx_file, read(batches), out
