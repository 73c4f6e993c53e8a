"""The Triton kernels of a frozen Tversky head on a GPU, each against the library call that bounds it."""

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
ALU_LIMIT = 3.0
"""A minimum and an addition are two instructions where a product's multiplication and addition are one. If cuBLAS in
float32 reaches 0.9 of what the arithmetic units give, their limit is 1.8 times its time; 0.6 of that is asked for."""

KINDS = {
    "three sums": {"model": "ratio", "intersection": "product", "difference": "ignorematch", "semantics": "aggregate"},
    "minima": {"model": "contrast", "intersection": "min", "difference": "subtractmatch", "semantics": "inclusive"},
}


@dataclass(frozen=True)
class Size:
    """Rows of objects, features of the bank, prototypes."""

    rows: int
    features: int
    prototypes: int

    def __str__(self) -> str:
        return f"{self.rows} rows, K {self.features}, P {self.prototypes}"


def cases(options: Options) -> Iterator[Case]:
    yield products(Size(64, 64, 128) if options.quick else Size(4096, 1024, 8192))
    yield one_row(Size(1, 64, 128) if options.quick else Size(1, 1024, 50257))
    yield minima(Size(64, 64, 128) if options.quick else Size(1024, 1024, 4096))


def products(size: Size) -> Case:
    """Three products of bfloat16 in one kernel, against cuBLAS doing as many multiplications: 0.7 of its rate."""
    other = functools.cache(lambda: torch.randn(3 * size.features, size.prototypes).bfloat16().to(DEVICE))
    bound = Peer("cuBLAS, as many multiplications", lambda: lambda a, wide: wide @ other(),
                 reference=lambda a, wide: wide.double() @ other().double())  # fmt: skip
    return _case(f"bfloat16 products, {size}", size, "three sums", torch.bfloat16, 1 / 0.7, 2e-2, bound)


def one_row(size: Size) -> Case:
    """The measures of the features that the row has must be read: copying as many bytes, at 0.8 of its rate."""
    half = functools.cache(lambda count: torch.randn(count * size.prototypes // 2).to(DEVICE))
    target = functools.cache(lambda count: torch.empty_like(half(count)))

    def copy(a: Tensor, _: Tensor) -> Tensor:
        count = round(0.5 * a.numel())  # of normal numbers; counting them would be timed as well
        return target(count).copy_(half(count))  # which reads and writes

    bound = Peer("a copy of the bytes", lambda: copy, reference=lambda a, _: half(round(0.5 * a.numel())))
    return _case(f"one row, {size}", size, "three sums", torch.float32, 1 / 0.8, 1e-5, bound)


def minima(size: Size) -> Case:
    """Σ min(a, b), against a product of the same shape in float32, without TF32."""
    other = functools.cache(lambda: torch.randn(size.features, size.prototypes).to(DEVICE))
    bound = Peer("cuBLAS, float32", lambda: lambda a, _: a @ other(),
                 reference=lambda a, _: a.double() @ other().double())  # fmt: skip
    return _case(f"minima, {size}", size, "minima", torch.float32, ALU_LIMIT, 1e-5, bound)


def _case(name: str, size: Size, kind: str, dtype: torch.dtype, limit: float, tolerance: float, bound: Peer) -> Case:
    table = functools.cache(lambda: _prototypes(size))

    def prepare() -> Callable[..., Any]:
        from fxfreeze.kernels.tversky_frozen import KERNEL

        return lambda a, _: KERNEL.op(a, *table(), **KINDS[kind], dtype=dtype)

    def exact(a: Tensor, _: Tensor) -> Tensor:
        from fxfreeze.kernels.tversky_frozen import KERNEL

        found: Tensor = KERNEL.reference(a.double(), *(value.double() for value in table()), **KINDS[kind])
        return found

    return Case(
        name=name, peers=(bound, Peer("fxfreeze::tversky_frozen", prepare, limit=limit)), baseline=bound.name,
        reference=exact, inputs=functools.partial(_objects, size), tolerance=tolerance, device=DEVICE,
    )  # fmt: skip


def _objects(size: Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The objects' measures, and three times as wide in bfloat16, what a product of as many multiplications takes."""
    a = torch.randn(size.rows, size.features, generator=generator).to(DEVICE)
    return a, a.bfloat16().repeat(1, 3)


def _prototypes(size: Size) -> tuple[Tensor, ...]:
    measures = torch.randn(size.features, size.prototypes, generator=torch.Generator().manual_seed(1))
    values = measures, measures.relu().sum(0), *(torch.tensor(weight) for weight in (1.0, 0.5, 0.5))
    return tuple(value.to(DEVICE) for value in values)
