"""What takes long to build is built once in a run: the first process that needs it leaves it for the others."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path


def shared(folder: Path, name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name` in `folder`, and in it what `make` writes: it makes the folder that it is given.

    Nobody waits: where two make the same at once, the one that is done first leaves it, and the other's goes away.
    """
    done = folder / name
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as rough:
            make(made := Path(rough) / "made")
            with contextlib.suppress(OSError):  # there by now
                made.rename(done)
    return done
