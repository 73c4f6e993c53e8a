"""The Triton kernels of what is quantized on a GPU, against torch's own and against a copy of as many bytes."""

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
BLOCK = 128
"""Inputs that share a scale."""
PACKED_TILES = 8
"""Tiles of K that torch packs together: the one of 2, 4 and 8 that its own users take."""


@dataclass(frozen=True)
class Size:
    """Rows, inputs and outputs of a layer."""

    rows: int
    inputs: int
    outputs: int

    def __str__(self) -> str:
        return f"{self.inputs} to {self.outputs}, {'one row' if self.rows == 1 else f'{self.rows} rows'}"


def cases(options: Options) -> Iterator[Case]:
    for outputs in (256,) if options.quick else (4096, 14336):
        size = Size(1, 256 if options.quick else 4096, outputs)
        yield four_bits_against_torch(size)
        yield four_bits_against_a_copy(size)
    yield eight_bits_against_torch(Size(32, 64, 64) if options.quick else Size(4096, 4096, 4096))
    yield eight_bits_against_a_copy(Size(16, 64, 64) if options.quick else Size(16, 4096, 14336))
    yield float8_against_bfloat16(Size(32, 64, 64) if options.quick else Size(4096, 4096, 4096))
    yield three_sums(Size(64, 64, 128) if options.quick else Size(4096, 1024, 8192))
    yield one_object(Size(1, 64, 128) if options.quick else Size(1, 1024, 50257))
    yield minima(Size(64, 64, 128) if options.quick else Size(1024, 1024, 4096))


# ---- weights of 4 bits, bfloat16


def four_bits_against_torch(size: Size) -> Case:
    """``_weight_int4pack_mm``, which torchao calls: as fast."""
    name = "torch._weight_int4pack_mm"
    return _four_bits(size, "torch", Peer(name, lambda: _packed_by_torch(size)), 1.0)


def four_bits_against_a_copy(size: Size) -> Case:
    """Half a byte per weight and a scale per group must be read: copying as many bytes, at 0.8 of its rate."""
    read = size.outputs * size.inputs // 2 + 2 * size.outputs * size.inputs // BLOCK
    total = read + 2 * size.rows * (size.inputs + size.outputs)
    return _four_bits(size, f"a copy of {total / 1e6:.1f} MB", _copy(total), 1 / 0.8)


def _four_bits(size: Size, name: str, bound: Peer, limit: float) -> Case:
    def prepare() -> Callable[..., Any]:
        from fxfreeze.kernels.quantized_linear import KERNEL, pack

        integers, scale = _weight(size)
        packed = pack(integers)
        return lambda x: KERNEL.op(x, packed, scale)

    def exact(x: Tensor) -> Tensor:
        integers, scale = _weight(size)
        return x.double() @ (integers.double() * scale.double().repeat_interleave(BLOCK, 1)).T

    return Case(
        name=f"int4 in groups of {BLOCK}, {size}, against {name}",
        peers=(bound, Peer("fxfreeze::quantized_linear", prepare, limit=limit)), baseline=bound.name,
        reference=exact, inputs=functools.partial(_floats, size), tolerance=1e-2, device=DEVICE,
    )  # fmt: skip


def _packed_by_torch(size: Size) -> Callable[..., Any]:
    """It counts from 0 to 15, and adds a zero point to what it scaled: 8 of its steps less are ours."""
    integers, scale = _weight(size)
    steps = integers.to(torch.int32) + 8
    scale_and_zero = torch.stack((scale, torch.zeros_like(scale)), -1).transpose(0, 1).contiguous()
    if DEVICE == "cpu":
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(steps, 1)
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, BLOCK, scale_and_zero)
    pairs = (steps[:, ::2] << 4 | steps[:, 1::2]).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, PACKED_TILES)
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, BLOCK, scale_and_zero)


def _floats(size: Size, generator: torch.Generator) -> tuple[Tensor]:
    return (torch.randn(size.rows, size.inputs, generator=generator).to(DEVICE, torch.bfloat16),)


@functools.cache
def _weight(size: Size) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    integers = torch.randint(-8, 8, (size.outputs, size.inputs), generator=generator).to(torch.int8)
    scale = 0.01 + 0.01 * torch.rand(size.outputs, size.inputs // BLOCK, generator=generator)
    return integers.to(DEVICE), scale.to(DEVICE, torch.bfloat16)


# ---- inputs and weights of 8 bits, float32 results


def eight_bits_against_torch(size: Size) -> Case:
    """``_int_mm``, whose result is the sums and nothing else: 0.8 of its rate."""
    bound = Peer("torch._int_mm", lambda: lambda x: torch._int_mm(x, _transposed(size)),
                 reference=lambda x: x.double() @ _transposed(size).double())  # fmt: skip
    return _eight_bits(size, "torch", bound)


def eight_bits_against_a_copy(size: Size) -> Case:
    """A byte per weight must be read: copying as many bytes, at 0.8 of its rate."""
    total = size.outputs * size.inputs + size.rows * (size.inputs + 4 * size.outputs)
    return _eight_bits(size, f"a copy of {total / 1e6:.1f} MB", _copy(total))


def _eight_bits(size: Size, name: str, bound: Peer) -> Case:
    def prepare() -> Callable[..., Any]:
        from fxfreeze.kernels.integer_linear import KERNEL

        arguments = _integers(size)
        total = arguments[2].sum(1, dtype=torch.int32)
        return lambda x: KERNEL.op(x, *arguments, None, total)

    def exact(x: Tensor) -> Tensor:
        x_scale, zero, weight, scale = (value.double() for value in _integers(size))
        return (x.double() - zero) @ weight.T * (x_scale * scale)

    return Case(
        name=f"int8 times int8, {size}, against {name}",
        peers=(bound, Peer("fxfreeze::integer_linear", prepare, limit=1 / 0.8)), baseline=bound.name,
        reference=exact, inputs=functools.partial(_bytes, size), tolerance=1e-6, device=DEVICE,
    )  # fmt: skip


def _bytes(size: Size, generator: torch.Generator) -> tuple[Tensor]:
    return (torch.randint(-128, 128, (size.rows, size.inputs), generator=generator).to(DEVICE, torch.int8),)


@functools.cache
def _integers(size: Size) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The scale and zero point of x, the weight and its scales."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randint(-128, 128, (size.outputs, size.inputs), generator=generator).to(torch.int8)
    scale = 0.01 + 0.01 * torch.rand(size.outputs, generator=generator)
    values = torch.tensor(0.02), torch.tensor(-5, dtype=torch.int8), weight, scale
    x_scale, zero, weight, scale = (value.to(DEVICE) for value in values)
    return x_scale, zero, weight, scale


def _transposed(size: Size) -> Tensor:
    return _integers(size)[2].T


# ---- inputs and weights of float8, bfloat16 results


def float8_against_bfloat16(size: Size) -> Case:
    """The layer as a graph runs it, rounding of the inputs included, against cuBLAS: 1.3 times as fast."""
    bound = Peer(
        "torch's product in bfloat16", lambda: lambda x: x @ _dense(size), reference=lambda x: _product(size, x)
    )

    def prepare() -> Callable[..., Any]:
        from fxfreeze.kernels.float8_linear import KERNEL
        from fxfreeze.kernels.quantize_float8 import KERNEL as QUANTIZE

        scale = torch.full((size.outputs,), 4 / 448, device=DEVICE)
        weight = QUANTIZE.op(_dense(size).T.float().contiguous(), scale.unsqueeze(1))
        x_scale = torch.full((), 6 / 448, device=DEVICE)
        rounded = torch.compile(QUANTIZE.reference)
        return lambda x: KERNEL.op(rounded(x, x_scale), x_scale, weight, scale, dtype=torch.bfloat16)

    return Case(
        name=f"float8 times float8, {size}, against bfloat16",
        peers=(bound, Peer("fxfreeze::float8_linear", prepare, limit=1 / 1.3)), baseline=bound.name,
        reference=functools.partial(_product, size), inputs=functools.partial(_floats, size), tolerance=0.1,
        device=DEVICE,
    )  # fmt: skip


def _product(size: Size, x: Tensor) -> Tensor:
    return x.double() @ _dense(size).double()


@functools.cache
def _dense(size: Size) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size.inputs, size.outputs, generator=generator).to(DEVICE, torch.bfloat16)


# ---- Tversky similarity of codes

KINDS = {
    "three sums": {"model": "ratio", "intersection": "product", "difference": "ignorematch", "semantics": "aggregate"},
    "minima": {"model": "contrast", "intersection": "min", "difference": "subtractmatch", "semantics": "inclusive"},
}
ALU_LIMIT = 3.0
"""Of a minimum and an addition; see ``tversky_gpu.py``."""


def three_sums(size: Size) -> Case:
    """Three products of codes in one kernel, against ``_int_mm`` doing as many multiplications: 0.7 of its rate."""
    other = functools.cache(lambda: _table(size.outputs, 3 * size.inputs).view(torch.int8).T)
    bound = Peer("torch._int_mm", lambda: lambda a, wide: torch._int_mm(wide, other()),
                 reference=lambda a, wide: wide.double() @ other().double())  # fmt: skip
    return _similarity("three sums", size, "torch", bound, 1 / 0.7)


def one_object(size: Size) -> Case:
    """A byte per measure must be read: copying as many, at 0.7 of its rate."""
    total = size.inputs * size.outputs + 4 * size.outputs
    return _similarity("three sums", size, f"a copy of {total / 1e6:.1f} MB", _copy(total), 1 / 0.7)


def minima(size: Size) -> Case:
    """Σ min(a, b), against a product of the same shape in float32, without TF32."""
    other = functools.cache(lambda: torch.randn(size.inputs, size.outputs).to(DEVICE))
    bound = Peer("cuBLAS, float32", lambda: lambda a, wide: a.float() @ other(),
                 reference=lambda a, wide: a.double() @ other().double())  # fmt: skip
    return _similarity("minima", size, "cuBLAS in float32", bound, ALU_LIMIT)


def _similarity(kind: str, size: Size, name: str, bound: Peer, limit: float) -> Case:
    table = functools.cache(lambda: _prototypes(size))

    def prepare() -> Callable[..., Any]:
        from fxfreeze.kernels.tversky_integer import KERNEL

        return lambda a, wide: KERNEL.op(a, *table(), **KINDS[kind])

    def exact(a: Tensor, wide: Tensor) -> Tensor:
        from fxfreeze.kernels.tversky_integer import KERNEL

        measures, totals, *numbers = table()
        found: Tensor = KERNEL.reference(a, measures, totals, *(value.double() for value in numbers), **KINDS[kind])
        return found

    return Case(
        name=f"codes, {kind}, {size}, against {name}",
        peers=(bound, Peer("fxfreeze::tversky_integer", prepare, limit=limit)), baseline=bound.name,
        reference=exact, inputs=functools.partial(_objects, size), tolerance=1e-5, device=DEVICE,
    )  # fmt: skip


def _objects(size: Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The objects' codes, and three times as wide as int8, what a product of as many multiplications takes."""
    a = _codes(size, generator)
    return a, a.view(torch.int8).repeat(1, 3)


def _codes(size: Size, generator: torch.Generator) -> Tensor:
    """[rows, inputs], a third of them absent."""
    drawn = torch.randint(-128, 256, (size.rows, size.inputs), generator=generator)
    return drawn.clamp(min=0).to(torch.uint8).to(DEVICE)


def _table(rows: int, columns: int) -> Tensor:
    return _codes(Size(rows, columns, 0), torch.Generator().manual_seed(1))


def _prototypes(size: Size) -> tuple[Tensor, ...]:
    measures = _table(size.inputs, size.outputs)
    numbers = (torch.tensor(value, device=DEVICE) for value in (0.01, 1.0, 0.5, 0.5))
    return measures, measures.sum(0, dtype=torch.int32), *numbers


# ---- bytes


def _copy(count: int) -> Peer:
    """Half of `count` bytes are read and as many written."""
    half = functools.cache(lambda: torch.arange(count // 2).to(DEVICE, torch.uint8))
    target = functools.cache(lambda: torch.empty_like(half()))
    return Peer("a copy of the bytes", lambda: lambda *given: target().copy_(half()),
                reference=lambda *given: half())  # fmt: skip
