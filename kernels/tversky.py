"""``fxfreeze::tversky``: how similar each object is to each prototype, by the features they share and do not share.

Source: Doumbouya, Jurafsky and Manning, "Tversky Neural Networks", arXiv 2506.11035; `aggregate` is what the package
`tversky` 0.2.1 computes. The maths from the projections on is in ``_tversky.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._op import Kernel, register
from ._tversky import (
    Terms,
    check_matrix,
    check_objects,
    check_weights,
    combination,
    min_sum_by_distance,
    project,
    similarity,
)

SCHEMA = (
    "(Tensor x, Tensor features, Tensor prototypes, Tensor theta, Tensor alpha, Tensor beta, *, str model, "
    "str intersection, str difference, str semantics, float threshold=0.0, bool normalize=False) -> Tensor"
)


def reference(
    x: Tensor,
    features: Tensor,
    prototypes: Tensor,
    theta: Tensor,
    alpha: Tensor,
    beta: Tensor,
    *,
    model: str,
    intersection: str,
    difference: str,
    semantics: str,
    threshold: float = 0.0,
    normalize: bool = False,
    min_sum: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Tversky similarity of `x` to each of `prototypes`.

    A feature ω of the bank is present in a vector v where v·ω exceeds `threshold`. Presence is decided in float32 or
    better; on a GPU that takes matrix products without TF32 (torch's default).

    The operator is trained through this function: where a gradient is wanted, autograd records these plain operators,
    and nothing is computed again in the backward. gmean's root has gradient 0 at 0, so that no gradient is NaN.

    Args:
        x: objects [..., d] in float16, bfloat16, float32 or float64.
        features: the bank Ω [K, d], dtype of `x`, K ≥ 1.
        prototypes: Π [P, d], dtype of `x`, P ≥ 1.
        theta: weight of what both have, 0-d, any float dtype; the ratio model has no use for it.
        alpha: weight of what only the object has, 0-d, any float dtype.
        beta: weight of what only the prototype has, 0-d, any float dtype.
        model: "contrast" or "ratio", the latter as in the package with 1 added to the denominator.
        intersection: "product", "min", "max", "mean", "gmean" or "softmin".
        difference: "ignorematch" or "subtractmatch" (or, as the package spells it, "substractmatch").
        semantics: "aggregate": reductions other than product act on the sums over all features, as in the package;
            "per_feature": they act feature by feature, as the paper writes them; "inclusive": so, and subtractmatch
            counts the features that only one side has, too.
        threshold: a feature is present strictly above it. With gmean it is 0 or more.
        normalize: scale `x` and `prototypes`, not the bank, to length 1 first.
        min_sum: how to sum minima, see ``_tversky.Terms``; not an argument of the operator.

    Returns:
        [..., P], dtype of `x`. Half precision is computed in float32 and rounded once.

    Raises:
        ValueError: an unknown name, or shapes or dtypes other than the above.
    """
    how = combination(model, intersection, difference, semantics, threshold)
    _check(x, features, prototypes, theta, alpha, beta)
    terms = Terms(project(x, features, normalize), project(prototypes, features, normalize), threshold, min_sum)
    return similarity(how, terms, *(weight.to(terms.a.dtype) for weight in (theta, alpha, beta))).to(x.dtype)


eager = partial(reference, min_sum=min_sum_by_distance)
"""As the reference, with Σ min as an L1 distance: no [..., p, K] tensor, but no ONNX operator either."""


def fake(
    x: Tensor, features: Tensor, prototypes: Tensor, *weights: Tensor, normalize: bool = False, **how: Any
) -> Tensor:
    combination(**how)
    _check(x, features, prototypes, *weights)
    return x.new_empty((*x.shape[:-1], prototypes.shape[0]))


def _check(x: Tensor, features: Tensor, prototypes: Tensor, *weights: Tensor) -> None:
    check_objects(x, features)
    check_matrix("prototypes", prototypes, "d", x.shape[-1], x.dtype)
    check_weights(*weights)


def supports(x: Tensor, *others: Tensor, normalize: bool = False, **how: Any) -> bool:
    """The tile kernel counts absent features as 0, and has no float64."""
    one_device = len({value.device for value in (x, *others)}) == 1
    return combination(**how).threshold >= 0 and x.dtype != torch.float64 and one_device


def launch(
    x: Tensor,
    features: Tensor,
    prototypes: Tensor,
    theta: Tensor,
    alpha: Tensor,
    beta: Tensor,
    *,
    normalize: bool = False,
    **how: Any,
) -> Tensor:
    """As :func:`reference`; in half precision, measures are rounded to it before they are multiplied."""
    from ._tversky_triton import tiled

    _check(x, features, prototypes, theta, alpha, beta)
    a = project(x.reshape(-1, x.shape[-1]), features, normalize)
    b = project(prototypes, features, normalize).T.contiguous()
    score = tiled(a, b, theta.float(), alpha.float(), beta.float(), combination(**how), dtype=x.dtype)
    return score.reshape(*x.shape[:-1], prototypes.shape[0])


KERNEL = register(Kernel("tversky", SCHEMA, reference, fake, supports, launch, eager))
