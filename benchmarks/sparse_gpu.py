"""The Triton kernels behind a gate on a GPU, against cuBLAS and against a copy of as many bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .harness import Case, Options, Peer

SUITE = "gpu"
DEVICE = "cuda"
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3}


@dataclass(frozen=True)
class Size:
    """Neurons, columns of the result, and the part of the neurons that fires; one row."""

    neurons: int
    columns: int
    fires: float

    def __str__(self) -> str:
        return f"{self.neurons} to {self.columns}, one row, {self.fires:.0%} fire"

    @property
    def active(self) -> int:
        return round(self.fires * self.neurons)


def cases(options: Options) -> Iterator[Case]:
    size = Size(600, 64, 0.1) if options.quick else Size(16384, 4096, 0.1)
    for dtype in TOLERANCES:
        yield against_cublas(size, dtype)
        yield against_a_copy(size, dtype)


def against_cublas(size: Size, dtype: torch.dtype) -> Case:
    """The product of all neurons: at 10 % firing 5 times as fast."""
    bound = Peer("cuBLAS", lambda: lambda h: torch.nn.functional.linear(h, _by_column(size, dtype)))
    return _case("cuBLAS", size, dtype, bound, 1 / 5)


def against_a_copy(size: Size, dtype: torch.dtype) -> Case:
    """The rows of the neurons that fire must be read: copying as many bytes, at 0.6 of its rate."""
    half = functools.cache(lambda: torch.randn(size.active * size.columns // 2).to(DEVICE, dtype))
    target = functools.cache(lambda: torch.empty_like(half()))
    # Which reads and writes.
    bound = Peer("a copy of the bytes", lambda: lambda h: target().copy_(half()), reference=lambda h: half())
    return _case("a copy", size, dtype, bound, 1 / 0.6)


def _case(name: str, size: Size, dtype: torch.dtype, bound: Peer, limit: float) -> Case:
    def prepare() -> Callable[..., Any]:
        from fxfreeze.kernels.sparse_down import KERNEL

        return lambda h: KERNEL.op(h, _weight(size, dtype))

    def exact(h: Tensor) -> Tensor:
        return h.double() @ _weight(size, dtype).double()

    return Case(
        name=f"{str(dtype).removeprefix('torch.')}, {size}, against {name}",
        peers=(bound, Peer("fxfreeze::sparse_down", prepare, limit=limit)), baseline=bound.name,
        reference=exact, inputs=functools.partial(_row, size, dtype), tolerance=TOLERANCES[dtype], device=DEVICE,
    )  # fmt: skip


def _row(size: Size, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor]:
    """As many neurons as said fire, wherever they are."""
    h = torch.zeros(1, size.neurons)
    fires = torch.randperm(size.neurons, generator=generator)[: size.active]
    h[0, fires] = 1 + torch.rand(size.active, generator=generator)
    return (h.to(DEVICE, dtype),)


@functools.cache
def _weight(size: Size, dtype: torch.dtype) -> Tensor:
    weight = torch.randn(size.neurons, size.columns, generator=torch.Generator().manual_seed(1))
    return weight.to(DEVICE, dtype)


@functools.cache
def _by_column(size: Size, dtype: torch.dtype) -> Tensor:
    """As nn.Linear stores it."""
    return _weight(size, dtype).T.contiguous()
