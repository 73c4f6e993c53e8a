"""One writer at a time: a lock on a folder, which ends with the process that holds it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import ArtifactError

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def alone(folder: Path, busy: str, hint: str) -> Iterator[None]:
    """Keep other processes out of `folder`, where the system can; the lock ends with the process.

    Raises:
        ArtifactError: another process holds it; `busy` says what that one does, `hint` what to do.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArtifactError(busy, where=str(folder), hint=hint) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)
