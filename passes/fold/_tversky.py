"""What a Tversky similarity needs of frozen prototypes, computed once in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import linear

from fxfreeze.kernels._tversky import Combination, Terms, pairwise, project, root

_NEEDS = {
    "common_a": ("has_b",),
    "common_b": ("b",),
    "product": ("b",),
    "gmean": ("root_b",),
    "min": ("b",),
    "softmin": ("b", "has_b"),
}
"""Term → tables of the prototypes it is made from."""


@dataclass(frozen=True)
class Prototypes:
    """b⁺ and 1ᵇ of frozen prototypes, float64 [P, K], and the tables that a combination makes of them."""

    how: Combination
    b: Tensor
    has_b: Tensor

    @classmethod
    def of(cls, how: Combination, features: Tensor, prototypes: Tensor, *, normalize: bool) -> Prototypes:
        """From the bank [K, d] and the prototypes [P, d], both float64."""
        measures = project(prototypes, features, normalize)
        has_b = (measures > how.threshold).to(measures.dtype)
        return cls(how, measures * has_b, has_b)

    @cached_property
    def total_b(self) -> Tensor:
        return self.b.sum(-1)

    @cached_property
    def root_b(self) -> Tensor:
        return root(self.b)

    @property
    def tables(self) -> dict[str, Tensor]:
        """By the names of :class:`FrozenTerms`' attributes."""
        names = {name for term in self.how.terms for name in _NEEDS[term]}
        if "min" in self.how.terms and self.how.threshold < 0:
            names.add("has_b")
        return {
            name: getattr(self, name) for name in ("b", "has_b", "root_b", "total_b") if name in {*names, "total_b"}
        }


class FrozenTerms(Terms):
    """Terms between objects' measures `a` and tables of frozen prototypes (:attr:`Prototypes.tables`)."""

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


def single_product(
    how: Combination, frozen: Prototypes, theta: Tensor, alpha: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The similarity as ``[a⁺, 1ᵃ] · tableᵀ + bias``, where it is linear in a⁺, 1ᵃ and √a⁺; else None.

    θ·f(A∩B) − α·(Σa⁺ − a⁺·1ᵇ) − β·(Σb⁺ − 1ᵃ·b⁺), with f(A∩B) = a⁺·b⁺, (a⁺·1ᵇ + 1ᵃ·b⁺)/2 or √a⁺·√b⁺.

    Returns:
        table [P, 2K], with √ [P, 3K], and bias [P], float64.
    """
    per_feature = how.semantics != "aggregate"
    linear_in = ("product", "mean", "gmean") if per_feature else ("product", "mean")
    if how.model != "contrast" or how.difference != "ignorematch" or how.intersection not in linear_in:
        return None
    b, has_b = frozen.b, frozen.has_b
    of_a, of_has = -alpha * (1 - has_b), beta * b
    if how.intersection == "product":
        of_a = of_a + theta * b
    elif how.intersection == "mean":
        of_a, of_has = of_a + theta / 2 * has_b, of_has + theta / 2 * b
    parts = [of_a, of_has] + ([theta * frozen.root_b] if how.intersection == "gmean" else [])
    return torch.cat(parts, -1), -beta * frozen.total_b
