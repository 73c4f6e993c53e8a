"""Memory that was freed goes back to the system, or stays for the next call; memory in use moves to huge pages."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_COLLAPSE = 25
"""MADV_COLLAPSE of linux/mman.h; Linux has it since 6.1."""
_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_MAPS = Path("/proc/self/maps")
_THRESHOLDS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of malloc.h."""
_LARGEST = 32 << 20
"""glibc takes no larger threshold; blocks above it are mapped, and go back when they are freed."""
KEPT = 256 << 20
"""Bytes of free memory that a process may hold."""
PATIENCE = 2.0
"""Seconds that moving may take."""


def return_free_memory() -> None:
    """Hand what was freed back to the system, where the C library can; it costs milliseconds.

    glibc keeps freed blocks of up to 32 MiB for itself, and what is allocated after them comes on top: the float64
    activations of a ResNet-152 left 106 MiB there, those of a ResNet-18's calibration 60 to 200.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


@functools.cache
def keep_free_memory() -> None:
    """Let the C library keep what is freed, up to :data:`KEPT`, for what is allocated next; for this process, for good.

    For targets that allocate their activations in every call. Left to itself, glibc hands the end of its heap back to
    the system after a call, or not, as things happen to lie, and the next call gets it page by page, zeroed: of a
    ResNet-20 at 64 images 3,400 pages per call, 43 ms in the place of 33. ONNX Runtime keeps its memory, too.
    :func:`return_free_memory` still returns it. Where the environment says what glibc shall do, that stands.
    """
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(name in os.environ for name in _THRESHOLDS):
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        libc.mallopt(_M_TRIM_THRESHOLD, KEPT)


def huge_pages_from_here() -> Callable[[], None]:
    """Remember what memory is in use now. The call that is returned moves what has come since to huge pages, once.

    For what stays and is read in every call, as weights are: a processor knows the addresses of few small pages, and
    has to look up all others. Nobody sees a difference but in time and, since only pieces of which half is in use move,
    in a little memory. What other threads allocate meanwhile moves, too. Measured: 0.2 to 0.7 ms per 2 MiB, ten times
    that where the system has to make room first; so it ends after two seconds, whatever is left.

    Nothing happens where the kernel cannot do it, or where whoever runs the machine wants no huge pages ("never" in
    /sys/kernel/mm/transparent_hugepage/enabled). See madvise(2), and the kernel's admin-guide/mm/transhuge.
    """
    return_free_memory()  # or what takes its place would seem to have been there
    known = _pieces()

    def move() -> None:
        nonlocal known
        if not known:
            return
        before, known = known, {}
        size, libc, end = _huge(), _libc(), time.monotonic() + PATIENCE
        half = size // mmap.PAGESIZE // 2
        for start, used in _pieces().items():
            if used >= half and used > before.get(start, 0) and time.monotonic() < end:
                libc.madvise(start, size, _COLLAPSE)

    return move


def _pieces() -> dict[int, int]:
    """How many pages are in use of every piece of anonymous memory that could be one huge page, by its address.

    Empty where there are no huge pages.
    """
    found: dict[int, int] = {}
    with contextlib.suppress(OSError, AttributeError):  # another system
        if "[never]" in (_SETTINGS / "enabled").read_text():
            return found
        size, libc = _huge(), _libc()
        answer = ctypes.create_string_buffer(size // mmap.PAGESIZE)  # a byte for each page
        for start, end in _anonymous():
            # One by one: what is unmapped meanwhile, such as the text of the maps, has neighbours that stay.
            for piece in range(-(-start // size) * size, end // size * size, size):
                if libc.mincore(piece, size, answer) == 0:
                    found[piece] = answer.raw.count(1)
    return found


def _anonymous() -> Iterator[tuple[int, int]]:
    """Start and end of what belongs to no file and may be written."""
    for line in _MAPS.read_text().splitlines():
        span, access, _, _, inode, *name = line.split(maxsplit=5)
        if access == "rw-p" and inode == "0" and name in ([], ["[heap]"]):
            start, end = span.split("-")
            yield int(start, 16), int(end, 16)


def _huge() -> int:
    """Bytes of a huge page."""
    return int((_SETTINGS / "hpage_pmd_size").read_text())


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    return libc
