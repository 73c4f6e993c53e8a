"""Inputs to run a program on when proving, checking and measuring it: drawn from the plan, or resized from examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count

import torch

from .errors import PlanError
from .program import Program, TensorSpec

Dims = Mapping[str, tuple[int, int | None]]


def concrete_shape(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of `spec` with every symbolic dim replaced by its size."""
    return tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)


def symbolic_dims(specs: Sequence[TensorSpec]) -> list[str]:
    """Names of the symbolic dims in `specs`, in order of appearance."""
    return list(dict.fromkeys(size for spec in specs for size in spec.shape if isinstance(size, str)))


def tracing_sizes(specs: Sequence[TensorSpec], dims: Dims, examples: Sequence[torch.Tensor] | None) -> dict[str, int]:
    """Sizes to trace with: those of the examples, else small ones.

    They are at least 2 (torch.export treats 0 and 1 as special), and no two dims share a size unless their bounds
    leave no choice, so that the trace cannot mistake one dim for another.

    Raises:
        PlanError: examples disagree with the declared shapes or with each other.
    """
    sizes = example_sizes(specs, examples) if examples is not None else {}
    taken: set[int] = set()
    for name in symbolic_dims(specs):
        low, high = dims.get(name, (1, None))
        floor = max(low, 2, sizes.get(name, 2))
        size = next(candidate for candidate in count(floor) if candidate not in taken or candidate == high)
        sizes[name] = size if high is None or size <= high else high
        taken.add(sizes[name])
    return sizes


def example_sizes(specs: Sequence[TensorSpec], examples: Sequence[torch.Tensor]) -> dict[str, int]:
    """Size of every symbolic dim in `examples`.

    Raises:
        PlanError: an example's dtype, rank or size disagrees with its declaration or with another example.
    """
    if len(examples) != len(specs):
        raise PlanError(f"{len(examples)} example tensors for {len(specs)} declared inputs", where="example_inputs")
    sizes: dict[str, int] = {}
    for spec, example in zip(specs, examples, strict=True):
        where = f"example_inputs[{spec.name!r}]"
        if example.dtype != spec.dtype:
            raise PlanError(f"{example.dtype} where the plan declares {spec.dtype}", where=where)
        if example.ndim != len(spec.shape):
            raise PlanError(f"shape {tuple(example.shape)} where the plan declares {spec.shape}", where=where)
        check_range(spec, example, where)
        for declared, size in zip(spec.shape, example.shape, strict=True):
            expected = sizes.setdefault(declared, size) if isinstance(declared, str) else declared
            if size != expected:
                raise PlanError(
                    f"shape {tuple(example.shape)} where the plan declares {spec.shape}: {declared} is {expected}",
                    where=where,
                )
    return sizes


def check_range(spec: TensorSpec, value: torch.Tensor, where: str) -> None:
    """Hold values to the range that the plan declares, and that rewrites rely on.

    Raises:
        PlanError: says what was declared and what is there.
    """
    for bound, name, worst in ((spec.low, "low", torch.amin), (spec.high, "high", torch.amax)):
        if bound is None or not value.numel() or value.dtype == torch.bool or value.is_complex():
            continue
        found = worst(value).item()
        if found < bound if name == "low" else found > bound:
            raise PlanError(
                f"a value of {found:g} where the plan declares {name}={bound:g}", where=where,
                hint="declare the range that callers use: neurons that cannot fire within it are removed",
            )  # fmt: skip


def dim_choices(program: Program, n: int = 3) -> list[dict[str, int]]:
    """`n` assignments of sizes to the symbolic dims: the smallest allowed, then larger ones within the bounds.

    Without symbolic dims there is one assignment, the empty one.
    """
    names = symbolic_dims(program.inputs)
    if not names:
        return [{}]
    choices: list[dict[str, int]] = []
    for step in range(n):
        sizes = {}
        for offset, name in enumerate(names):
            low, high = program.dims.get(name, (1, None))
            size = low if step == 0 else max(low, 2) + step**2 + offset
            sizes[name] = size if high is None else min(size, high)
        if sizes not in choices:
            choices.append(sizes)
    return choices


def sample_inputs(
    specs: Program | Sequence[TensorSpec],
    sizes: Mapping[str, int],
    seed: int,
    examples: Sequence[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """One tensor per input: normal floats, uniform integers in ``[low, high]``, fair bools; or resized examples.

    An example is cropped, or repeated, along its symbolic dims, so that its values stay ones the model can meet.
    """
    specs = specs.inputs if isinstance(specs, Program) else specs
    generator = torch.Generator().manual_seed(seed)
    drawn = [_draw(spec, concrete_shape(spec, sizes), generator).to(spec.device) for spec in specs]
    if examples is None:
        return drawn
    # Whatever the examples select, all of it must work.
    return [
        value if spec.select else _resize(example, concrete_shape(spec, sizes))
        for spec, value, example in zip(specs, drawn, examples, strict=True)
    ]


def _resize(example: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    for axis, size in enumerate(shape):
        if example.shape[axis] != size:
            example = example.index_select(
                axis, torch.arange(size, device=example.device) % max(example.shape[axis], 1)
            )
    return example.detach().clone()


def _draw(spec: TensorSpec, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if spec.dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if not spec.dtype.is_floating_point and not spec.dtype.is_complex:
        low = int(spec.low or 0)
        # Without a declared range only 0 and 1 are safe: they index any table, and mean something to any mask.
        high = int(spec.high) if spec.high is not None else low + 1
        return torch.randint(low, high + 1, shape, generator=generator, dtype=spec.dtype)
    if spec.low is not None and spec.high is not None:
        value = torch.rand(shape, generator=generator, dtype=torch.float64)
        return (spec.low + (spec.high - spec.low) * value).to(spec.dtype)
    dtype = torch.complex128 if spec.dtype.is_complex else torch.float64
    return torch.randn(shape, generator=generator, dtype=dtype).to(spec.dtype)
