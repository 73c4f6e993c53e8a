"""``fxfreeze::tversky_frozen``: ``fxfreeze::tversky`` from measures on, with prototypes that no longer change.

The measures Ω·Πᵀ of the prototypes, computed once, are an argument. They are stored with the prototypes of one feature
next to each other, so that few objects need to read only the features that are present in them.

Source: see ``tversky.py``.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._native import call
from ._op import Kernel, Native, at_most, register
from ._tversky import (
    Combination,
    Terms,
    cast,
    check_matrix,
    check_weights,
    combination,
    min_sum_by_distance,
    similarity,
)

SCHEMA = (
    "(Tensor a, Tensor measures, Tensor totals, Tensor theta, Tensor alpha, Tensor beta, *, str model, "
    "str intersection, str difference, str semantics, float threshold=0.0, ScalarType? dtype=None) -> Tensor"
)


def reference(
    a: Tensor,
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
    dtype: torch.dtype | None = None,
    min_sum: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Tversky similarity of objects to prototypes, both given by their measures.

    Args:
        a: measures x·Ωᵀ of the objects [..., K], float32 or float64, K ≥ 1: ``_tversky.project``.
        measures: those of the prototypes, Ω·Πᵀ [K, P], dtype of `a`, P ≥ 1.
        totals: Σ_k of the measures above the threshold [P], dtype of `a`.
        theta: as in ``tversky.py``, like all up to `threshold`.
        alpha: see there.
        beta: see there.
        model: see there.
        intersection: see there.
        difference: see there.
        semantics: see there.
        threshold: see there.
        dtype: of the result; default: that of `a`. On a GPU measures are multiplied in it, too.
        min_sum: how to sum minima, see ``_tversky.Terms``; not an argument of the operator.

    Returns:
        [..., P], `dtype`, rounded to it once.

    Raises:
        ValueError: an unknown name, or shapes or dtypes other than the above.
    """
    how = combination(model, intersection, difference, semantics, threshold)
    _check(a, measures, totals, theta, alpha, beta, dtype=dtype)
    terms = Terms(a, measures.T, threshold, min_sum, totals)
    score = similarity(how, terms, *(weight.to(a.dtype) for weight in (theta, alpha, beta)))
    return score.to(dtype or a.dtype)


eager = partial(reference, min_sum=min_sum_by_distance)
"""As the reference, with Σ min as an L1 distance: no [..., p, K] tensor, but no ONNX operator either."""


def fake(
    a: Tensor, measures: Tensor, totals: Tensor, *weights: Tensor, dtype: torch.dtype | None = None, **how: Any
) -> Tensor:
    combination(**how)
    _check(a, measures, totals, *weights, dtype=dtype)
    return a.new_empty((*a.shape[:-1], measures.shape[1]), dtype=dtype or a.dtype)


def _check(
    a: Tensor,
    measures: Tensor,
    totals: Tensor,
    theta: Tensor,
    alpha: Tensor,
    beta: Tensor,
    *,
    dtype: torch.dtype | None,
) -> None:
    if a.dtype not in (torch.float32, torch.float64) or a.dim() == 0 or a.shape[-1] < 1:
        raise ValueError(
            f"tversky: a is {a.dtype} of shape {list(a.shape)}, not torch.float32 or torch.float64 of [..., K ≥ 1]"
        )
    check_matrix("measures, transposed,", measures.T, "K", a.shape[-1], a.dtype)
    if totals.shape != measures.shape[1:] or totals.dtype != measures.dtype:
        raise ValueError(
            f"tversky: totals is {totals.dtype} of shape {list(totals.shape)}, "
            f"not {measures.dtype} of [P = {measures.shape[1]}]"
        )
    check_weights(theta, alpha, beta)
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"tversky: the result's dtype {dtype} is not a floating one")


# ---- GPU


def supports(a: Tensor, *others: Tensor, dtype: torch.dtype | None = None, **how: Any) -> bool:
    """The kernels count absent features as 0, and have no float64."""
    one_device = len({value.device for value in (a, *others)}) == 1
    return combination(**how).threshold >= 0 and torch.float64 not in (a.dtype, dtype) and one_device


def launch(
    a: Tensor,
    measures: Tensor,
    totals: Tensor,
    theta: Tensor,
    alpha: Tensor,
    beta: Tensor,
    *,
    dtype: torch.dtype | None = None,
    **how: Any,
) -> Tensor:
    """As :func:`reference`; for more than 8 objects, measures are rounded to half a `dtype` before they multiply."""
    from ._tversky_triton import MAX_ROWS, rows, tiled

    _check(a, measures, totals, theta, alpha, beta, dtype=dtype)
    kind, dtype = combination(**how), dtype or a.dtype
    flat, b = a.reshape(-1, a.shape[-1]), measures.contiguous()
    weights = (theta.float(), alpha.float(), beta.float())
    if flat.shape[0] <= MAX_ROWS:
        score = rows(flat.contiguous(), b, totals.contiguous(), *weights, kind, dtype=dtype)
    else:
        score = tiled(flat, b, *weights, kind, dtype=dtype)
    return score.reshape(*a.shape[:-1], measures.shape[1])


# ---- CPU

NATIVE_SCHEMA = (
    "(Tensor a, Tensor measures, Tensor totals, Tensor theta, Tensor alpha, Tensor beta, str model, "
    "str intersection, str difference, str semantics, float threshold) -> Tensor"
)
MAX_ROWS = 16
"""Measured on two cores at K x P of 256 x 1000, 1024 x 5000 and 1024 x 50257: `eager` is slower up to twice as many or
more. From here on the two products of tables that AOTInductor folds from `reference` are as fast."""


def native_supports(a: Tensor, measures: Tensor, *others: Tensor, dtype: torch.dtype | None = None, **how: Any) -> bool:
    """A copy of strided measures would cost more than is saved."""
    on_cpu = all(value.device.type == "cpu" for value in (a, measures, *others))
    return on_cpu and measures.is_contiguous() and suits_cpu(combination(**how), math.prod(a.shape[:-1]))


def suits_cpu(how: Combination, objects: int | torch.SymInt) -> bool:
    """Is the C++ the fastest form? For few objects, and for minima per feature, which no matrix product makes.

    There is none for a logarithm per feature.
    """
    return "softmin" not in how.terms and ("min" in how.terms or at_most(objects, MAX_ROWS))


def native_apply(
    a: Tensor,
    measures: Tensor,
    totals: Tensor,
    theta: Tensor,
    alpha: Tensor,
    beta: Tensor,
    *,
    dtype: torch.dtype | None = None,
    **how: Any,
) -> Tensor:
    """As :func:`reference`; an infinite measure of a prototype shows only where the object has the feature."""
    _check(a, measures, totals, theta, alpha, beta, dtype=dtype)
    kind = combination(**how)
    score = torch.ops.fxfreeze.tversky_frozen_native(
        a.reshape(-1, a.shape[-1]).contiguous(), measures, totals.contiguous(),
        *(cast(weight, a.dtype) for weight in (theta, alpha, beta)),
        kind.model, kind.intersection, kind.difference, kind.semantics, float(kind.threshold),
    )  # fmt: skip
    return cast(score.reshape(*a.shape[:-1], measures.shape[1]), dtype or a.dtype)


def native_fake(a: Tensor, measures: Tensor, *others: Any) -> Tensor:
    _check(a, measures, *others[:4], dtype=None)
    if a.dim() != 2 or any(value.dtype != a.dtype for value in others[:4]):
        raise ValueError(f"tversky_frozen_native: a is {list(a.shape)}, not [rows, K], or weights are not {a.dtype}")
    return a.new_empty(a.shape[0], measures.shape[1])


def native_run(library: ctypes.CDLL, a: Tensor, measures: Tensor, *others: Any) -> Tensor:
    if not all(value.is_contiguous() for value in (a, measures, *others[:4])):
        raise ValueError("tversky_frozen_native: takes contiguous tensors only")
    score, (tensors, how) = native_fake(a, measures, *others), (others[:4], others[4:])
    sizes = (a.element_size(), *a.shape, measures.shape[1])
    call(library.tversky_frozen, score, a, measures, *tensors, *sizes, *how, torch.get_num_threads())
    return score


NATIVE = Native("tversky_frozen.cpp", NATIVE_SCHEMA, native_fake, native_run, native_supports, native_apply)
KERNEL = register(Kernel("tversky_frozen", SCHEMA, reference, fake, supports, launch, eager, NATIVE))
