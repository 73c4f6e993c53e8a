"""Dims of tensors as terms: which dims are the same, and of what they are made.

An :class:`Axis` is a dim of one value or of many. What a reshape and a concat say about dims are equations between
terms: a dim of 192 channels that becomes (3 heads, 64) *is* a product of two axes, the first of which varies slowest;
a dim that two values were laid end to end in *is* a sum of two. :meth:`Axes.unify` solves such equations one by one.
What is left without a form of its own is a *leaf*: an axis whose entries nothing takes apart. An entry of a leaf stands
for entries of every axis that is made of it: of the 192 channels, 64 for each head, and 3 for each of the 64.

The rules are those of arithmetic in row-major order: (a + b) · c = a · c + b · c, but c · (a + b) is what it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from networkx.utils import UnionFind
from torch import Tensor

Size = int | str
"""Of an axis; a symbolic size is its expression, of which nothing is known but whether it is the same."""


@dataclass(eq=False)
class Axis:
    """A dim, of `size` entries; what else is known of it is known to :class:`Axes`."""

    size: Size


@dataclass(frozen=True)
class Form:
    """What an axis is made of: ``sum``, one part behind the other; ``product``, the first varies slowest."""

    kind: Literal["sum", "product"]
    parts: tuple[Axis, ...]


class Axes:
    """The axes of a program, and the equations between them that hold."""

    def __init__(self) -> None:
        self._same = UnionFind()
        self._forms: dict[Axis, Form] = {}
        self._found: dict[Axis, dict[Axis, Tensor]] = {}  # what `entries` said since the last equation

    # ---- terms

    def sum(self, parts: Iterable[Axis]) -> Axis:
        """The axis in which `parts` follow each other; their sizes are numbers."""
        kept = tuple(part for part in parts if part.size != 0)
        if len(kept) == 1:
            return kept[0]
        whole = Axis(sum(_number(part) for part in kept))
        self._forms[self._same[whole]] = Form("sum", kept)
        return whole

    def product(self, factors: Iterable[Axis], size: Size | None = None) -> Axis:
        """The axis that a reshape makes of `factors`; `size` where some of theirs are symbolic."""
        kept = tuple(factor for factor in factors if factor.size != 1)
        if len(kept) < 2:
            return kept[0] if kept else Axis(1)
        whole = Axis(math.prod(_number(factor) for factor in kept) if size is None else size)
        self._forms[self._same[whole]] = Form("product", kept)
        return whole

    # ---- equations

    def unify(self, first: Axis, second: Axis) -> bool:
        """Let two axes be one and the same; False where their forms do not fit each other, and nothing is known."""
        first, second = self._same[first], self._same[second]
        if first is second or first.size == second.size == 1:
            return True
        if first.size != second.size:
            return False
        mine, other = self._forms.get(first), self._forms.get(second)
        if mine is not None and other is not None and not self._fit(first, mine, second, other):
            return False
        # Of two forms that fit each other either would do; a product says more of where entries are.
        form = max((item for item in (mine, other) if item), key=lambda item: item.kind == "product", default=None)
        self._found.clear()
        self._same.union(first, second)
        self._forms.pop(first, None)
        self._forms.pop(second, None)
        if form is not None:
            self._forms[self._same[first]] = form
        return True

    def split(self, axis: Axis, sizes: Sequence[int]) -> list[Axis] | None:
        """The parts of `axis` of these sizes, which add up to its own; None where it is not made so."""
        parts = [Axis(size) for size in sizes]
        return parts if self.unify(axis, self.sum(parts)) else None

    def factor(self, axis: Axis, sizes: Sequence[int]) -> list[Axis] | None:
        """The factors of `axis` of these sizes, whose product is its own; None where it is not made so."""
        factors = [Axis(size) for size in sizes]
        return factors if self.unify(axis, self.product(factors)) else None

    def _fit(self, first: Axis, mine: Form, second: Axis, other: Form) -> bool:
        if mine.kind == other.kind == "product":
            return self._fit_products(self._factors(first), self._factors(second))
        if mine.kind == other.kind == "sum":
            return self._fit_sums(self._parts(first), self._parts(second))
        whole, product = (first, second) if mine.kind == "sum" else (second, first)
        return self._distribute(self._parts(whole), self._factors(product))

    def _fit_products(self, left: list[Axis], right: list[Axis]) -> bool:
        """From the factor that varies fastest on; a larger one is a product that ends in the smaller one."""
        while len(left) > 1 and len(right) > 1:
            one, other = left.pop(), right.pop()
            if one.size == other.size:
                if not self.unify(one, other):
                    return False
                continue
            if not isinstance(one.size, int) or not isinstance(other.size, int):
                return False
            (large, side), small = ((one, left), other) if one.size > other.size else ((other, right), one)
            if _number(large) % _number(small):
                return False
            outer = Axis(_number(large) // _number(small))
            if not self.unify(large, self.product([outer, small])):
                return False
            side.append(outer)
        single, rest = (left[0], right) if len(left) == 1 else (right[0], left)
        return self.unify(single, self.product(rest, single.size))

    def _fit_sums(self, left: list[Axis], right: list[Axis]) -> bool:
        """From the first part on; a larger one is a sum that begins with the smaller one."""
        left, right = left[::-1], right[::-1]
        while left and right:
            one, other = left.pop(), right.pop()
            if one.size == other.size:
                if not self.unify(one, other):
                    return False
                continue
            (large, side), small = ((one, left), other) if _number(one) > _number(other) else ((other, right), one)
            rest = Axis(_number(large) - _number(small))
            if not self.unify(large, self.sum([small, rest])):
                return False
            side.append(rest)
        return not left and not right

    def _distribute(self, parts: list[Axis], factors: list[Axis]) -> bool:
        """a + b = o · i where i divides a and b: then a = p · i, b = q · i and o = p + q."""
        outer, *inner = factors
        if not all(isinstance(item.size, int) for item in (*parts, *factors)):
            return False
        step = math.prod(_number(item) for item in inner)
        if any(_number(part) % step for part in parts):
            return False
        outers = [Axis(_number(part) // step) for part in parts]
        made = [self.product([part, *inner]) for part in outers]
        return all(map(self.unify, parts, made)) and self.unify(outer, self.sum(outers))

    def _parts(self, axis: Axis) -> list[Axis]:
        form = self._forms.get(self._same[axis])
        if form is None or form.kind != "sum":
            return [self._same[axis]]
        return [item for part in form.parts for item in self._parts(part)]

    def _factors(self, axis: Axis) -> list[Axis]:
        form = self._forms.get(self._same[axis])
        if form is None or form.kind != "product":
            return [self._same[axis]]
        return [item for part in form.parts for item in self._factors(part)]

    # ---- answers

    def form(self, axis: Axis) -> Form | None:
        """What `axis` is made of; None: it is a leaf."""
        return self._forms.get(self._same[axis])

    def terms(self, axis: Axis) -> list[Axis]:
        """Every leaf that `axis` is made of, in order, as often as it is."""
        form = self.form(axis)
        return [self._same[axis]] if form is None else [leaf for part in form.parts for leaf in self.terms(part)]

    def leaves(self, axis: Axis) -> dict[Axis, None]:
        """Every leaf that `axis` is made of, in order, once."""
        return dict.fromkeys(self.terms(axis))

    def count(self, axis: Axis) -> int:
        """The size of an axis without its symbolic factors."""
        if isinstance(axis.size, int):
            return axis.size
        form = self.form(axis)
        return 1 if form is None else math.prod(map(self.count, form.parts))

    def entries(self, axis: Axis) -> dict[Axis, Tensor]:
        """For every leaf of `axis`, which of the entries of `axis` each of its own stands for.

        Of an axis of a symbolic size, which of those that are counted: of batch × heads, heads.

        Returns:
            leaf of a size that is a number → int64 [size, entries for each], ascending along the second dim.
        """
        root = self._same[axis]
        if root not in self._found:
            self._found[root] = self._entries(root)
        return self._found[root]

    def _entries(self, root: Axis) -> dict[Axis, Tensor]:
        form = self._forms.get(root)
        if form is None:
            return {root: torch.arange(root.size).unsqueeze(1)} if isinstance(root.size, int) else {}
        found: dict[Axis, list[Tensor]] = {}
        sizes = [self.count(part) for part in form.parts]
        for at, part in enumerate(form.parts):
            for leaf, own in self.entries(part).items():
                if form.kind == "sum":
                    placed = own + sum(sizes[:at])
                else:
                    inner = math.prod(sizes[at + 1 :])
                    placed = _spread(own, torch.arange(math.prod(sizes[:at])) * sizes[at] * inner, inner)
                found.setdefault(leaf, []).append(placed)
        return {leaf: torch.cat(own, 1).sort(1).values for leaf, own in found.items()}


def _spread(own: Tensor, outer: Tensor, inner: int) -> Tensor:
    """Entries [n, k] of a factor → those of the product, [n, outer · k · inner]."""
    placed = own[:, None, :, None] * inner + outer[None, :, None, None] + torch.arange(inner)
    return placed.flatten(1)


def _number(axis: Axis) -> int:
    if not isinstance(axis.size, int):
        raise ValueError(f"an axis of the symbolic size {axis.size} has no entries that could be counted")
    return axis.size
