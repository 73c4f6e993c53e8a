"""The constants of a program by name, and the recipes by which folded ones are computed.

A constant that has been folded into is wanted in float64 until it is rounded. Kept so, the folded weights of a float32
model would take twice its size, of a bfloat16 model four times. What is kept is a :class:`Recipe`: the tensor it was,
shared with the user's model, and what was done to it since: functions that hold a gain per channel, or a low-rank pair.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Edit = Callable[[Tensor], Tensor]
"""float64 in, float64 of the same shape out; must not write to its argument nor read what may still change."""

_serial = itertools.count()


def lift_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for a floating dtype, complex128 for a complex one, else `dtype` itself."""
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


def lift(value: Tensor) -> Tensor:
    """`value` in float64 (complex128) when it holds floating (complex) numbers, else `value`."""
    return value.detach().to(lift_dtype(value.dtype))


def version(value: Tensor) -> int:
    """Grows when something writes to `value` in place (0 for inference tensors, which do not count)."""
    return 0 if value.is_inference() else value._version


@dataclass(frozen=True, eq=False)
class Recipe:
    """A constant as a tensor and what to do to it in float64; `base` is never written to."""

    base: Tensor
    edits: tuple[Edit, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        return lift_dtype(self.base.dtype) if self.edits else self.base.dtype

    def then(self, edit: Edit) -> Recipe:
        return replace(self, edits=(*self.edits, edit))

    @torch.no_grad()
    def value(self) -> Tensor:
        """`base` itself where there is no edit, else a new tensor in float64 (complex128)."""
        if not self.edits:
            return self.base
        value = lift(self.base)
        for edit in self.edits:
            value = edit(value)
        if value.shape != self.base.shape:
            raise ValueError(f"a fold turned a constant of shape {list(self.base.shape)} into {list(value.shape)}")
        return value


class Constants(MutableMapping[str, Tensor]):
    """Name → tensor. A tensor that was put in comes out as the same object; a recipe comes out computed, every time."""

    def __init__(self, values: Mapping[str, Tensor] | None = None) -> None:
        self._held: dict[str, Tensor | Recipe] = {}
        self._serials: dict[str, int] = {}
        self.update(values or {})

    def __getitem__(self, name: str) -> Tensor:
        held = self._held[name]
        return held.value() if isinstance(held, Recipe) else held

    def __setitem__(self, name: str, value: Tensor | Recipe) -> None:
        if isinstance(value, Recipe) and not value.edits:
            value = value.base
        if self._held.get(name) is not value:
            self._serials[name] = next(_serial)
        self._held[name] = value

    def __delitem__(self, name: str) -> None:
        del self._held[name], self._serials[name]

    def __contains__(self, name: object) -> bool:  # Mapping's own would compute the value
        return name in self._held

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def copy(self) -> Constants:
        """Another mapping with the same tensors and recipes."""
        other = Constants()
        other._held, other._serials = dict(self._held), dict(self._serials)
        return other

    def recipe(self, name: str) -> Recipe:
        """How the constant is computed; no edits for a plain tensor."""
        held = self._held[name]
        return held if isinstance(held, Recipe) else Recipe(held)

    def tensor(self, name: str) -> Tensor:
        """The tensor in memory: the constant, or what it is computed from; of its shape, perhaps not of its dtype."""
        return self.recipe(name).base

    def dtype(self, name: str) -> torch.dtype:
        return self.recipe(name).dtype

    def identity(self, name: str) -> tuple[int, torch.dtype, int]:
        """Changes when another value is put under the name, or something writes to the tensor in memory."""
        return self._serials[name], self.dtype(name), version(self.tensor(name))

    def held(self, name: str) -> Tensor | Recipe:
        """The object put under `name`; two names may hold the same one."""
        return self._held[name]
