"""From a plan step to the module that is grafted for it: one entry per method."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxfreeze.errors import PlanError
from fxfreeze.plan import Head, Splice, Step

Maker = Callable[[Any, Tensor], nn.Module]
"""(step, the value it is given) → the module."""


def _given(step: Splice | Head, value: Tensor) -> nn.Module:
    if not isinstance(step.module, str):
        return step.module
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


MAKERS: dict[type[Step], Maker] = {Splice: _given, Head: _given}


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
