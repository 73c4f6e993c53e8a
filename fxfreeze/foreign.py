"""Layers of other libraries that compute one of our operators: export sees the operator, not what they make of it.

A layer is known by its class. For the length of a trace its ``forward`` calls the operator on the layer's own
parameters; the layer itself stays as it is, and is what the compiled model is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import wrapped

Forward = Callable[..., Any]


def _tversky_options(module: Any) -> dict[str, Any] | None:
    """The operator's options for a layer of the package `tversky`; None where they are none of its own."""
    options = {
        "model": module.similarity_model,
        "intersection": module.intersection_reduction,
        "difference": module.difference_reduction,
        "semantics": "aggregate",
        "threshold": float(module.threshold),
        "normalize": bool(module.normalize),
    }
    from .kernels._tversky import combination

    try:
        combination(*(options[key] for key in ("model", "intersection", "difference", "semantics", "threshold")))
    except (TypeError, ValueError):
        return None
    return options


def _tversky_projection(module: Any) -> Forward | None:
    """``tversky.nn.TverskyProjection(x [n, d] or [n, m, d]) → [..., P]``."""
    options = _tversky_options(module)
    if options is None:
        return None

    def forward(x: Tensor, prototypes: Tensor | None = None, fbank: Tensor | None = None) -> Tensor:
        features = module.feature_bank.weight if fbank is None else fbank
        prototypes = module.prototypes.weight if prototypes is None else prototypes
        weights = module.theta, module.alpha, module.beta
        return torch.ops.fxfreeze.tversky(x, features, prototypes, *weights, **options)

    return forward


def _tversky_similarity(module: Any) -> Forward | None:
    """``tversky.nn.TverskySimilarity(x [n, d], y [m, d]) → [n, m]``; stacked inputs stay the package's own."""
    options, original = _tversky_options(module), module.forward
    if options is None:
        return None

    def forward(x: Tensor, y: Tensor, alpha: Any = None, beta: Any = None, theta: Any = None) -> Tensor:
        given = {"theta": theta, "alpha": alpha, "beta": beta}
        if x.dim() != 2 or y.dim() != 2 or any(value is not None for value in given.values()):
            return original(x, y, alpha=alpha, beta=beta, theta=theta)
        weights = module.theta, module.alpha, module.beta
        return torch.ops.fxfreeze.tversky(x, module.feature_bank.weight, y, *weights, **options)

    return forward


KNOWN: dict[str, Callable[[Any], Forward | None]] = {
    "tversky.nn.TverskyProjection": _tversky_projection,
    "tversky.nn.TverskySimilarity": _tversky_similarity,
}
"""Qualified class name → function of a layer that gives its forward in our operators, or None where there is none."""


@dataclass
class Recognised:
    """What was found in a model.

    Attributes:
        paths: of the layers that run as one of our operators, or as one layer with one weight.
        left: path → why a layer of peft runs as it is.
        names: paths that peft's wrappers made → what the user calls them.
    """

    paths: list[str]
    left: dict[str, str]
    names: dict[str, str]


@contextmanager
def recognised(model: nn.Module) -> Iterator[Recognised]:
    """Within it, every layer of `model` that is :data:`KNOWN` runs as one of our operators, and every layer of peft
    that can as one layer with one weight.

    Raises:
        CaptureError: running a layer of peft would change the model.
    """
    names, left = wrapped.wrappers(model), {}
    found: list[tuple[str, nn.Module, Forward]] = []
    for path, module in model.named_modules():
        make = KNOWN.get(f"{type(module).__module__}.{type(module).__qualname__}")
        # A forward of its own (a wrapper's, say) is somebody's intention.
        if make is not None and "forward" not in vars(module) and (forward := make(module)) is not None:
            found.append((path, module, forward))
    if found:
        from .kernels import _op

        _ = _op.OPS  # registers the operators
    for path, module, how in wrapped.layers(model):
        if isinstance(how, str):
            left[path] = how
        else:
            found.append((path, module, how))
    try:
        for _, module, forward in found:
            vars(module)["forward"] = forward
        yield Recognised([path for path, _, _ in found], left, names)
    finally:
        for _, module, _ in found:
            vars(module).pop("forward", None)
