"""Tables of frozen prototypes that a Tversky similarity reads, and what it is made of with them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import linear

from fxfreeze.kernels._tversky import Combination, Terms, pairwise, root

from .._heads import Prototypes

_NEEDS = {
    "common_a": {"has_b"},
    "common_b": {"b"},
    "product": {"b"},
    "gmean": {"root_b"},
    "min": {"b"},
    "softmin": {"b", "has_b"},
}
"""Term → tables of the prototypes it is made from."""


def table_names(how: Combination) -> list[str]:
    """Which attributes of :class:`Prototypes` the terms of a combination are made of."""
    needed = {name for term in how.terms for name in _NEEDS[term]} | {"total_b"}
    if "min" in how.terms and how.threshold < 0:
        needed.add("has_b")
    return [name for name in ("b", "has_b", "root_b", "total_b") if name in needed]


class FrozenTerms(Terms):
    """Terms between objects' measures `a` and tables of frozen prototypes (:func:`table_names`)."""

    root_b: Tensor

    def __init__(self, a: Tensor, threshold: float, tables: Mapping[str, Tensor]) -> None:
        self.threshold, self._min_sum = threshold, lambda a, b: pairwise(torch.minimum, (a,), (b,))
        self.has_a = (a > threshold).to(a.dtype)
        self.a = a * self.has_a
        self.__dict__.update(tables)

    @cached_property
    def common_a(self) -> Tensor:
        return linear(self.a, self.has_b)

    @cached_property
    def common_b(self) -> Tensor:
        return linear(self.has_a, self.b)

    @cached_property
    def product(self) -> Tensor:
        return linear(self.a, self.b)

    @cached_property
    def gmean(self) -> Tensor:
        return linear(root(self.a), self.root_b)


def is_single(how: Combination) -> bool:
    """Whether the similarity is linear in a⁺, 1ᵃ and √a⁺, and so one matrix product."""
    linear_in = ("product", "mean") if how.semantics == "aggregate" else ("product", "mean", "gmean")
    return how.model == "contrast" and how.difference == "ignorematch" and how.intersection in linear_in


def single_product(frozen: Prototypes, theta: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """The similarity as ``[a⁺, 1ᵃ] · tableᵀ + bias``, or with √a⁺ as a third part; see :func:`is_single`.

    θ·f(A∩B) − α·(Σa⁺ − a⁺·1ᵇ) − β·(Σb⁺ − 1ᵃ·b⁺), with f(A∩B) = a⁺·b⁺, (a⁺·1ᵇ + 1ᵃ·b⁺)/2 or √a⁺·√b⁺.

    Returns:
        table [P, 2K], with √ [P, 3K], and bias [P], float64.
    """
    b, has_b, kind = frozen.b, frozen.has_b, frozen.how.intersection
    of_a, of_has = -alpha * (1 - has_b), beta * b
    if kind == "product":
        of_a = of_a + theta * b
    elif kind == "mean":
        of_a, of_has = of_a + theta / 2 * has_b, of_has + theta / 2 * b
    parts = [of_a, of_has] + ([theta * frozen.root_b] if kind == "gmean" else [])
    return torch.cat(parts, -1), -beta * frozen.total_b
