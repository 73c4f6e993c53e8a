"""Memory that was freed goes back to the system; memory that stays moves to huge pages."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_COLLAPSE = 25
"""MADV_COLLAPSE of linux/mman.h; Linux has it since 6.1."""
_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_MAPS = Path("/proc/self/maps")
PATIENCE = 2.0
"""Seconds that moving may take."""


def return_free_memory() -> None:
    """Hand what was freed back to the system, where the C library can; it costs milliseconds.

    glibc keeps freed blocks of up to 32 MiB for itself, and what is allocated after them comes on top: the float64
    activations of a ResNet-152 left 106 MiB there, those of a ResNet-18's calibration 60 to 200.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


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
