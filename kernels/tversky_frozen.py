"""``fxfreeze::tversky_frozen``: ``fxfreeze::tversky`` with prototypes that no longer change.

Their measures Ω·Πᵀ, computed once, are an argument in their place. They are stored with the prototypes of one feature
next to each other, so that few objects need to read only the features that are present in them.

Source: see ``tversky.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
    working_dtype,
)

SCHEMA = (
    "(Tensor x, Tensor features, Tensor measures, Tensor totals, Tensor theta, Tensor alpha, Tensor beta, *, "
    "str model, str intersection, str difference, str semantics, float threshold=0.0, bool normalize=False) -> Tensor"
)


def reference(
    x: Tensor,
    features: Tensor,
    measures: Tensor,
    totals: Tensor,
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
    """Tversky similarity of `x` to prototypes given by their measures.

    Args:
        x: objects [..., d] in float16, bfloat16, float32 or float64.
        features: the bank Ω [K, d], dtype of `x`, K ≥ 1.
        measures: Ω·Πᵀ [K, P], of normalised prototypes where `normalize` is set; float64 if `x` is, else float32.
        totals: Σ_k of the measures above the threshold [P], dtype of `measures`.
        theta: as in ``tversky.py``, like all that follow.
        alpha: see there.
        beta: see there.
        model: see there.
        intersection: see there.
        difference: see there.
        semantics: see there.
        threshold: see there.
        normalize: scale `x` to length 1 first.
        min_sum: how to sum minima, see ``_tversky.Terms``; not an argument of the operator.

    Returns:
        [..., P], dtype of `x`. Half precision is computed in float32 and rounded once.

    Raises:
        ValueError: an unknown name, or shapes or dtypes other than the above.
    """
    how = combination(model, intersection, difference, semantics, threshold)
    _check(x, features, measures, totals, theta, alpha, beta)
    terms = Terms(project(x, features, normalize), measures.T, threshold, min_sum, totals)
    return similarity(how, terms, *(weight.to(terms.a.dtype) for weight in (theta, alpha, beta))).to(x.dtype)


eager = partial(reference, min_sum=min_sum_by_distance)
"""As the reference, with Σ min as an L1 distance: no [..., p, K] tensor, but no ONNX operator either."""


def fake(
    x: Tensor,
    features: Tensor,
    measures: Tensor,
    totals: Tensor,
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
) -> Tensor:
    combination(model, intersection, difference, semantics, threshold)
    _check(x, features, measures, totals, theta, alpha, beta)
    return x.new_empty((*x.shape[:-1], measures.shape[1]))


def _check(x: Tensor, features: Tensor, measures: Tensor, totals: Tensor, *weights: Tensor) -> None:
    check_objects(x, features)
    check_matrix("measures, transposed,", measures.T, "K", features.shape[0], working_dtype(x))
    if totals.shape != measures.shape[1:] or totals.dtype != measures.dtype:
        raise ValueError(
            f"tversky: totals is {totals.dtype} of shape {list(totals.shape)}, "
            f"not {measures.dtype} of [P = {measures.shape[1]}]"
        )
    check_weights(*weights)


def supports(
    x: Tensor,
    features: Tensor,
    measures: Tensor,
    totals: Tensor,
    theta: Tensor,
    alpha: Tensor,
    beta: Tensor,
    *,
    threshold: float = 0.0,
    **_: object,
) -> bool:
    """The kernels count absent features as 0, and have no float64."""
    tensors = (x, features, measures, totals, theta, alpha, beta)
    return threshold >= 0 and x.dtype != torch.float64 and len({value.device for value in tensors}) == 1


def launch(
    x: Tensor,
    features: Tensor,
    measures: Tensor,
    totals: Tensor,
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
) -> Tensor:
    """As :func:`reference`; more than 8 objects in half precision have their measures rounded to it."""
    from ._tversky_triton import MAX_ROWS, rows, tiled

    how = combination(model, intersection, difference, semantics, threshold)
    _check(x, features, measures, totals, theta, alpha, beta)
    a = project(x.reshape(-1, x.shape[-1]), features, normalize)
    b, weights = measures.contiguous(), (theta.float(), alpha.float(), beta.float())
    if a.shape[0] <= MAX_ROWS:
        score = rows(a, b, totals.contiguous(), *weights, how, dtype=x.dtype)
    else:
        score = tiled(a, b, *weights, how, dtype=x.dtype)
    return score.reshape(*x.shape[:-1], measures.shape[1])


KERNEL = register(Kernel("tversky_frozen", SCHEMA, reference, fake, supports, launch, eager))
