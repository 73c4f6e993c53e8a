"""Where memory lies: seen from outside, in what the kernel tells of this process."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fxfreeze import Input, Plan, artifact, memory
from fxfreeze.capture import capture
from fxfreeze.emit import PROGRAM, Target, on_huge_pages
from fxfreeze.lower import Lowering
from fxfreeze.serialize import Interface, load_program, save_program

SMAPS = Path("/proc/self/smaps")
NEIGHBOURS = 2**23
"""Bytes that others may put into the same mapping and have moved meanwhile; a tensor here has 64 MiB."""


def huge_bytes(value: Tensor) -> int:
    """Of the mapping that the tensor's middle lies in.

    Read line by line: as one text it is megabytes in a process that has run many tests, which would be new memory, too.
    """
    middle, inside = value.data_ptr() + value.nbytes // 2, False
    with SMAPS.open() as lines:
        for line in lines:
            if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                inside = int(bounds[1], 16) <= middle < int(bounds[2], 16)
            elif inside and line.startswith("AnonHugePages:"):
                return int(line.split()[1]) * 1024
    raise AssertionError("the tensor lies nowhere")


def moved(value: Tensor, act: Callable[[], object]) -> int:
    """Bytes of huge pages that are new behind `act`: the kernel counts a neighbour's in the same mapping, too."""
    before = huge_bytes(value)
    act()
    return huge_bytes(value) - before


@pytest.fixture(scope="module", autouse=True)
def kernel_can() -> None:
    move = memory.huge_pages_from_here()
    value = torch.ones(2**24)
    if not SMAPS.exists() or not moved(value, move):
        pytest.skip("this kernel has no huge pages, or they are switched off")


def test_what_came_since_moves_and_keeps_its_values() -> None:
    move = memory.huge_pages_from_here()
    value = torch.arange(2**24, dtype=torch.float32)  # 64 MiB: a mapping of its own
    assert moved(value, move) >= value.nbytes - 2 * 2**21
    assert torch.equal(value, torch.arange(2**24, dtype=torch.float32))


def test_what_was_there_before_stays() -> None:
    value = torch.ones(2**24)
    assert moved(value, lambda: memory.huge_pages_from_here()()) <= NEIGHBOURS


def test_what_goes_while_one_looks_leaves_its_neighbours_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mapping of which a part is gone when it is asked about: of the whole the kernel says nothing."""
    size, libc = memory._huge(), ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    access, kind = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = libc.mmap(None, 16 * size, access, kind, -1, 0)
    ctypes.memset(start, 1, 16 * size)
    end, hole = start + 16 * size, -(-start // size) * size + 8 * size
    monkeypatch.setattr(memory, "_anonymous", lambda: iter([(start, end)]))
    assert libc.munmap(hole, size) == 0
    try:
        found = memory._pieces()
    finally:
        libc.munmap(start, hole - start)
        libc.munmap(hole + size, end - hole - size)
    found.pop(hole, None)  # another thread may have taken its place
    assert len(found) >= 14 and set(found.values()) == {size // mmap.PAGESIZE}


def test_only_once() -> None:
    move = memory.huge_pages_from_here()
    move()
    value = torch.ones(2**24)
    assert moved(value, move) == 0


def test_memory_that_is_hardly_used_stays_as_small() -> None:
    move = memory.huge_pages_from_here()
    value = torch.empty(2**24)
    value[:: 2**18] = 1.0  # a page in each MiB
    assert moved(value, move) <= NEIGHBOURS


def test_room_that_was_freed_and_is_used_again_counts_as_new() -> None:
    """glibc keeps what a compiler frees, and gives it to who comes next."""
    old = [torch.ones(2**14) for _ in range(1024)]  # 64 KiB each: no mappings of their own
    pin = old.pop()
    old.clear()
    move = memory.huge_pages_from_here()
    new = [torch.ones(2**14) for _ in range(1023)]
    assert moved(new[512], move) >= 2**25
    assert pin.sum() == 2**14


def test_it_takes_no_longer_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0] + [2 * memory.PATIENCE] * 100_000)
    move = memory.huge_pages_from_here()
    value = torch.ones(2**24)
    monkeypatch.setattr(memory.time, "monotonic", lambda: next(now))
    assert moved(value, move) == 0


def test_a_target_moves_behind_its_first_call_and_says_the_same() -> None:
    weights: list[Tensor] = []

    def load() -> Callable[..., tuple[Tensor, ...]]:
        weights.append(torch.ones(2**24))
        return lambda x: (x * weights[0][5] + 1.0,)

    runner = on_huge_pages(load)

    def call() -> None:
        assert torch.equal(runner(torch.ones(3))[0], torch.full((3,), 2.0))

    assert moved(weights[0], call) >= 2**25
    assert moved(weights[0], call) == 0


def test_a_first_call_that_fails_is_not_the_first() -> None:
    weight = []

    def run(x: Tensor) -> tuple[Tensor, ...]:
        if x.numel() == 0:
            raise ValueError("nothing to run on")
        return (x,)

    def load() -> Callable[..., tuple[Tensor, ...]]:
        weight.append(torch.ones(2**24))
        return run

    runner = on_huge_pages(load)

    def fail() -> None:
        with pytest.raises(ValueError, match="nothing to run on"):
            runner(torch.ones(0))

    assert moved(weight[0], fail) == 0
    assert moved(weight[0], lambda: runner(torch.ones(1))) >= 2**25


@pytest.mark.parametrize(("target", "made_ready"), [("onnx", 0), ("torch", 1)])
def test_an_artifact_moves_its_weights(target: str, made_ready: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of torch by its check, after which it stays."""
    weights: list[Tensor] = []
    ready: list[Callable[..., Any]] = []

    def emit(lowering: Lowering, folder: Path) -> dict[str, Any]:
        (folder / PROGRAM).mkdir(exist_ok=True)
        save_program(lowering.program, folder / PROGRAM)
        return {}

    def load(folder: Path, interface: Interface) -> Callable[..., tuple[Tensor, ...]]:
        weights.append(torch.ones(2**24))
        return load_program(folder / PROGRAM, shapes=False).run

    def counted(loading: Callable[[], Any]) -> Any:
        ready.append(loading)
        return on_huge_pages(loading)

    monkeypatch.setattr(artifact, "on_huge_pages", counted)
    monkeypatch.setattr(artifact, "EMITTERS", {target: Target(target, emit, load)})
    plan = Plan(inputs=[Input("x", shape=(2, 4))], targets=[target])
    made = artifact.Artifact.create(capture(torch.nn.Linear(4, 4).eval(), plan)[0], plan)
    assert len(ready) == made_ready
    made.runner()
    assert len(ready) == 1 and len(weights) == 2 - made_ready  # loaded for the check, and again where it did not stay
    assert (moved(weights[-1], lambda: made(torch.ones(2, 4))) >= 2**25) is not bool(made_ready)


def test_nothing_where_nobody_wants_huge_pages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    (tmp_path / "hpage_pmd_size").write_text(f"{2**21}\n")
    monkeypatch.setattr(memory, "_SETTINGS", tmp_path)
    move = memory.huge_pages_from_here()
    value = torch.ones(2**24)
    assert moved(value, move) == 0


def test_nothing_on_another_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_SETTINGS", tmp_path / "absent")
    memory.huge_pages_from_here()()


FAULTS = """
    import resource, torch
    from fxfreeze.memory import keep_free_memory

    def call():
        values = [torch.empty(2**20).fill_(1.0) for _ in range(8)]  # 4 MiB each: 8192 pages in all

    def faults():
        call()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            call()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10

    left_alone = faults()
    keep_free_memory()
    print(left_alone, faults())
"""


def test_what_is_freed_is_there_for_the_next_call() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", textwrap.dedent(FAULTS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    alone, kept = map(int, done.stdout.split())
    if alone < 500:
        pytest.skip("this C library keeps freed memory anyway")
    assert kept < 100


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "1048576", False),
        ("MALLOC_MMAP_THRESHOLD_", "1048576", False),
        ("GLIBC_TUNABLES", "glibc.malloc.tcache_count=7", False),
        ("GLIBC_TUNABLES", "glibc.rtld.nns=4", True),
    ],
)
def test_what_the_environment_says_of_freed_memory_stands(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, told: bool
) -> None:
    """Asked of the calls: how much glibc keeps when it is left alone hangs on how things lie."""

    class Library:
        def mallopt(self, option: int, amount: int) -> None:
            calls.append((option, amount))

    calls: list[tuple[int, int]] = []
    for other in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: Library())
    memory.keep_free_memory.__wrapped__()
    assert calls == ([(-3, 32 << 20), (-1, 256 << 20)] if told else [])
