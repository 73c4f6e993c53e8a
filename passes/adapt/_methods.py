"""From a plan step to the module that is grafted for it: one entry per method."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxfreeze import nn as layers
from fxfreeze.errors import PlanError
from fxfreeze.plan import BayesCap, Bottleneck, Codebook, DiReFT, Head, LoReFT, Splice, Step

Maker = Callable[[Any, Tensor], nn.Module]
"""(step, the value it is given) → the module."""


def _given(step: Splice | Head, value: Tensor) -> nn.Module:
    if isinstance(step.module, nn.Module):
        return step.module
    if not isinstance(step.module, str):
        raise PlanError(f"module: a {type(step.module).__name__} is no nn.Module", where=step.name)
    package, _, name = step.module.partition(":")
    try:
        found: Any = importlib.import_module(package)
        for part in name.split("."):
            found = getattr(found, part)
        made = found(**step.arguments)
    except Exception as error:
        raise PlanError(
            f"module: cannot make {step.module!r} with {step.arguments}: {type(error).__name__}: {error}",
            where=step.name, hint="name it as 'package.module:Name', with what it takes in `arguments`",
        ) from error  # fmt: skip
    if not isinstance(made, nn.Module):
        raise PlanError(f"module: {step.module!r} makes a {type(made).__name__}, not an nn.Module", where=step.name)
    return made


def _dims(step: Bottleneck | BayesCap, value: Tensor) -> int:
    return (value.ndim - 2 if value.ndim > 3 else 0) if step.dims is None else step.dims


def _features(value: Tensor, dims: int = 0) -> int:
    """Size of the dim that has `dims` behind it.

    Raises:
        ValueError: there is none, or it has no fixed size.
    """
    size = value.shape[-1 - dims] if value.ndim > dims else None
    if not isinstance(size, int):
        raise ValueError(f"it is given {list(value.shape)}, where the dim of the features has no fixed size")
    return size


def _bottleneck(step: Bottleneck, value: Tensor) -> nn.Module:
    dims = _dims(step, value)
    return layers.Bottleneck(
        _features(value, dims), step.width, activation=step.activation, norm=step.norm, residual=False, dims=dims
    )


def _bayescap(step: BayesCap, value: Tensor) -> nn.Module:
    dims = _dims(step, value)
    return layers.BayesCap(
        _features(value, dims), hidden=step.hidden, blocks=step.blocks, positive=step.positive, dims=dims
    )


def _codebook(step: Codebook, value: Tensor) -> nn.Module:
    return layers.Codebook(
        _features(value), step.codes, k=step.k, groups=step.groups, similarity=step.similarity, norm=step.norm
    )


MAKERS: dict[type[Step], Maker] = {
    Splice: _given,
    Head: _given,
    Bottleneck: _bottleneck,
    LoReFT: lambda step, value: layers.LoReFT(_features(value), step.rank, positions=step.positions),
    DiReFT: lambda step, value: layers.DiReFT(_features(value), step.rank, positions=step.positions),
    Codebook: _codebook,
    BayesCap: _bayescap,
}


def make(step: Step, value: Tensor, site: str) -> nn.Module:
    """The module that `step` puts at `site`, given `value`: the same for the same plan.

    Raises:
        PlanError: it cannot be made for such a value.
    """
    seed = int.from_bytes(hashlib.sha256(f"{step.name}.{site}".encode()).digest()[:7])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return MAKERS[type(step)](step, value)
        except (TypeError, ValueError) as error:
            raise PlanError(f"{type(step).__name__} does not fit {site}: {error}", where=site) from error
