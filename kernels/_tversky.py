"""The maths of Tversky similarity from the two projections on, in plain torch; shared by the kernels that need it.

a = x·Ωᵀ are the measures of an object's features, b = Π·Ωᵀ those of a prototype; a feature is present where its measure
is above the threshold. Everything below is made of at most eight sums over the features, called terms. Writing a⁺, b⁺
for the measures with absent features set to 0, and 1ᵃ, 1ᵇ for presence:

==============  ======================  ==========================
`total_a`       Σ a⁺                    what the object has
`total_b`       Σ b⁺                    what the prototype has
`common_a`      Σ a⁺·1ᵇ                 what both have, as in a
`common_b`      Σ 1ᵃ·b⁺                 what both have, as in b
`product`       Σ a⁺·b⁺
`gmean`         Σ √a⁺·√b⁺
`min`           Σ min(a, b)·1ᵃ·1ᵇ
`softmin`       Σ −log(e⁻ᵃ + e⁻ᵇ)·1ᵃ·1ᵇ
==============  ======================  ==========================

All but the last two are matrix products. Source: Doumbouya, Jurafsky and Manning, "Tversky Neural Networks", arXiv
2506.11035, equations 3 to 5 for the reductions; the package `tversky` on PyPI, where they act on sums (`aggregate`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.nn.functional import normalize as unit

MODELS = ("contrast", "ratio")
INTERSECTIONS = ("product", "min", "max", "mean", "gmean", "softmin")
DIFFERENCES = ("ignorematch", "subtractmatch")
SEMANTICS = ("aggregate", "per_feature", "inclusive")

_SPELLINGS = {"substractmatch": "subtractmatch"}
"""The package's own spelling."""


@dataclass(frozen=True)
class Combination:
    """Which of the Tversky similarities; the fields hold members of the tuples above, spelled as there."""

    model: str
    intersection: str
    difference: str
    semantics: str
    threshold: float

    @property
    def terms(self) -> frozenset[str]:
        """The sums between two objects that this combination is made of."""
        return _intersection_terms(self) | _difference_terms(self)


def combination(model: str, intersection: str, difference: str, semantics: str, threshold: float = 0.0) -> Combination:
    """The checked combination.

    Raises:
        ValueError: an unknown name; a threshold that is not finite; `gmean` with a negative threshold, since a feature
            with a negative measure would then count and has no square root.
    """
    difference = _SPELLINGS.get(difference, difference)
    for what, value, known in (
        ("model", model, MODELS),
        ("intersection", intersection, INTERSECTIONS),
        ("difference", difference, DIFFERENCES),
        ("semantics", semantics, SEMANTICS),
    ):
        if value not in known:
            raise ValueError(f"tversky: {what} {value!r} is not one of {', '.join(known)}")
    if not math.isfinite(threshold):
        raise ValueError(f"tversky: threshold {threshold} is not finite")
    if intersection == "gmean" and threshold < 0:
        raise ValueError(f"tversky: gmean needs a threshold of 0 or more, not {threshold}")
    return Combination(model, intersection, difference, semantics, threshold)


def _intersection_terms(how: Combination) -> frozenset[str]:
    if how.intersection == "product":
        return frozenset({"product"})
    if how.semantics == "aggregate" or how.intersection == "mean":
        return frozenset({"common_a", "common_b"})
    if how.intersection == "max":
        return frozenset({"common_a", "common_b", "min"})
    return frozenset({how.intersection})


def _difference_terms(how: Combination) -> frozenset[str]:
    if how.difference == "ignorematch" or how.semantics == "aggregate":
        return frozenset({"common_a", "common_b"})
    return frozenset({"min"} if how.semantics == "inclusive" else {"common_a", "common_b", "min"})


class Terms:
    """The sums of the table above, each computed when it is first asked for.

    Args:
        a: [..., K], float32 or float64.
        b: [P, K], same dtype.
        threshold: a feature is present strictly above it.
        min_sum: function of (a⁺, b⁺) ≥ 0 to Σ_k min(a⁺, b⁺) [..., P]; default: the definition, by :func:`pairwise`.
        total_b: Σ b⁺ [P], where it is known.
    """

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        threshold: float,
        min_sum: Callable[[Tensor, Tensor], Tensor] | None = None,
        total_b: Tensor | None = None,
    ) -> None:
        self.threshold = threshold
        self.has_a, self.has_b = (a > threshold).to(a.dtype), (b > threshold).to(b.dtype)
        # A product, not a selection: NaN and infinite measures must not vanish.
        self.a, self.b = a * self.has_a, b * self.has_b
        self._total_b = total_b
        self._min_sum = min_sum or (lambda a, b: pairwise(torch.minimum, (a,), (b,)))

    @cached_property
    def total_a(self) -> Tensor:
        return self.a.sum(-1, keepdim=True)

    @cached_property
    def total_b(self) -> Tensor:
        return self.b.sum(-1) if self._total_b is None else self._total_b

    @cached_property
    def common_a(self) -> Tensor:
        return self.a @ self.has_b.T

    @cached_property
    def common_b(self) -> Tensor:
        return self.has_a @ self.b.T

    @cached_property
    def product(self) -> Tensor:
        return self.a @ self.b.T

    @cached_property
    def gmean(self) -> Tensor:
        return root(self.a) @ root(self.b).T

    @cached_property
    def min(self) -> Tensor:
        if self.threshold >= 0:
            return self._min_sum(self.a, self.b)
        # Present features may be negative here, and min(a⁺, b⁺) would count a negative a⁺ against an absent b⁺ = 0.
        # Measured from the threshold they are positive: Σ min(a − t, b − t)·1ᵃ·1ᵇ = Σ min(a, b)·1ᵃ·1ᵇ − t·Σ 1ᵃ·1ᵇ.
        above_a, above_b = self.a - self.threshold * self.has_a, self.b - self.threshold * self.has_b
        return self._min_sum(above_a, above_b) + self.threshold * (self.has_a @ self.has_b.T)

    @cached_property
    def softmin(self) -> Tensor:
        def pair(a: Tensor, has_a: Tensor, b: Tensor, has_b: Tensor) -> Tensor:
            return softmin(a, b) * (has_a * has_b)

        return pairwise(pair, (self.a, self.has_a), (self.b, self.has_b))


_ELEMENTS, _CHUNKS = 1 << 14, 64


def pairwise(
    pair: Callable[..., Tensor], a: Sequence[Tensor], b: Sequence[Tensor], dtype: torch.dtype | None = None
) -> Tensor:
    """Σ_k pair(a…, b…) for every row of `a` with every row of `b`, some rows of `b` at a time.

    Per row of `a` about 2¹⁴ elements are held at once; more where `b` is so large that there would be more than 64
    chunks, each of which becomes nodes of an exported graph.

    Args:
        pair: elementwise function of [..., 1, K] and [p, K].
        a: tensors [..., K], P ≥ 1.
        b: tensors [P, K].
        dtype: of the sums; default: torch's for what `pair` gives.
    """
    count, width = b[0].shape
    step = max(1, _ELEMENTS // max(width, 1), -(-count // _CHUNKS))
    rows = [value.unsqueeze(-2) for value in a]
    chunks = (pair(*rows, *(v[start : start + step] for v in b)) for start in range(0, count, step))
    return torch.cat([chunk.sum(-1, dtype=dtype) for chunk in chunks], -1)


def min_sum_by_distance(a: Tensor, b: Tensor) -> Tensor:
    """Σ_k min(a, b) = (Σa + Σb − ‖a − b‖₁)/2 in one pass; :class:`Terms` takes it where nothing is exported to ONNX."""
    width = a.shape[-1]
    distance = torch.cdist(a.reshape(-1, width), b, p=1.0).reshape(*a.shape[:-1], b.shape[0])
    return (a.sum(-1, keepdim=True) + b.sum(-1) - distance) / 2


def root(value: Tensor) -> Tensor:
    """√value, with gradient 0 where value is 0 (torch's is infinite there, and NaN after a product with 0)."""
    absent = value == 0
    return torch.where(absent, 0.0, torch.where(absent, 1.0, value).sqrt())


def softmin(a: Tensor, b: Tensor) -> Tensor:
    """−log(e⁻ᵃ + e⁻ᵇ) without overflow."""
    return torch.minimum(a, b) - torch.log1p(torch.exp(-(a - b).abs()))


_AGGREGATE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "min": torch.minimum,
    "max": torch.maximum,
    "mean": lambda a, b: (a + b) / 2,
    "gmean": lambda a, b: root(a) * root(b),
    "softmin": softmin,
}


def intersection(how: Combination, terms: Terms) -> Tensor:
    """f(A∩B) [..., P]."""
    if how.intersection == "product":
        return terms.product
    if how.semantics == "aggregate" or how.intersection == "mean":
        return _AGGREGATE[how.intersection](terms.common_a, terms.common_b)
    if how.intersection == "max":
        return terms.common_a + terms.common_b - terms.min
    return getattr(terms, how.intersection)


def differences(how: Combination, terms: Terms) -> tuple[Tensor, Tensor]:
    """f(A−B) and f(B−A), both [..., P]."""
    if how.difference == "subtractmatch" and how.semantics == "per_feature":
        return terms.common_a - terms.min, terms.common_b - terms.min
    if how.difference == "subtractmatch" and how.semantics == "inclusive":
        return terms.total_a - terms.min, terms.total_b - terms.min
    only_a, only_b = terms.total_a - terms.common_a, terms.total_b - terms.common_b
    if how.difference == "ignorematch":
        return only_a, only_b
    surplus = terms.common_a - terms.common_b
    return only_a + surplus.relu(), only_b + (-surplus).relu()


def similarity(how: Combination, terms: Terms, theta: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Contrast: θ·f(A∩B) − α·f(A−B) − β·f(B−A). Ratio: f(A∩B) / (f(A∩B) + α·f(A−B) + β·f(B−A) + 1)."""
    if (how.model, how.intersection, how.difference) == ("contrast", "product", "ignorematch"):
        # Linear in b⁺ and in 1ᵇ: two products of matrices do for three.
        weighed = (theta * terms.a + beta * terms.has_a) @ terms.b.T
        return weighed + alpha * terms.common_a - alpha * terms.total_a - beta * terms.total_b
    common, (only_a, only_b) = intersection(how, terms), differences(how, terms)
    if how.model == "contrast":
        return theta * common - alpha * only_a - beta * only_b
    return common / (common + alpha * only_a + beta * only_b + 1)


def working_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32: an indicator 1[a > t] flips where a product's rounding exceeds |a − t|."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def project(v: Tensor, features: Tensor, normalize: bool) -> Tensor:
    """The measures v·Ωᵀ [..., K] of vectors [..., d], in the working dtype; `normalize`: of v scaled to length 1."""
    dtype = working_dtype(v)
    v = cast(v, dtype)
    return linear(unit(v, dim=-1) if normalize else v, cast(features, dtype))


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Traced, a cast to the dtype it has would be an operator between those that passes look at."""
    return value if value.dtype == dtype else value.to(dtype)


def check_objects(x: Tensor, features: Tensor) -> None:
    """Raises ValueError unless `x` is [..., d] and `features` [K, d], K ≥ 1, of one floating dtype."""
    if not x.dtype.is_floating_point:
        raise ValueError(f"tversky: x has dtype {x.dtype}, not a floating one")
    if x.dim() == 0:
        raise ValueError("tversky: x has no dimension; the last one is d")
    check_matrix("features", features, "d", x.shape[-1], x.dtype)


def check_matrix(name: str, value: Tensor, letter: str, width: int, dtype: torch.dtype) -> None:
    """Raises ValueError unless `value` is [1 or more, width] of `dtype`."""
    if value.dim() != 2 or value.shape[1] != width or value.shape[0] < 1:
        raise ValueError(f"tversky: {name} has shape {list(value.shape)}, not [1 or more, {letter} = {width}]")
    if value.dtype != dtype:
        raise ValueError(f"tversky: {name} has dtype {value.dtype}, not {dtype}")


def check_weights(theta: Tensor, alpha: Tensor, beta: Tensor) -> None:
    """Raises ValueError unless all are 0-d and floating."""
    for name, value in (("theta", theta), ("alpha", alpha), ("beta", beta)):
        if value.dim() != 0 or not value.dtype.is_floating_point:
            raise ValueError(f"tversky: {name} is {value.dtype} of shape {list(value.shape)}, not a 0-d float")
