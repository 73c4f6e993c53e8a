"""A frozen Tversky head on a CPU, against the package tversky and against nn.Linear."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .harness import Case, Options, Peer, Unavailable, models

TOLERANCE = 1e-3
"""One indicator of a prototype on the other side of its threshold moves a score by about this share of the largest."""


@dataclass(frozen=True)
class Size:
    """One use: rows per call, width of the input, features of the bank, prototypes; speed-up asked of fxfreeze."""

    batch: int
    width: int
    bank: int
    prototypes: int
    speed_up: float

    def __str__(self) -> str:
        return f"batch {self.batch}, d {self.width}, K {self.bank}, P {self.prototypes}"


TOKEN = Size(1, 768, 1024, 50257, 60)
SIZES = (TOKEN, Size(64, 512, 1024, 1000, 5), Size(256, 768, 1024, 5000, 3))
SMALL = Size(2, 16, 32, 50, 1)
REDUCTIONS = (("product", "ignorematch"), ("product", "substractmatch"), ("min", "substractmatch"),
              ("gmean", "ignorematch"))  # fmt: skip


def cases(options: Options) -> Iterator[Case]:
    for size in (SMALL,) if options.quick else SIZES:
        for reductions in REDUCTIONS if size is TOKEN else REDUCTIONS[:1]:
            yield head_case(size, *reductions, options.seed)


def head_case(size: Size, intersection: str, difference: str, seed: int) -> Case:
    """The baseline is what a user of the package has; the linear layer computes something else, at the same shape."""
    build = functools.cache(functools.partial(package_head, size, intersection, difference, seed))
    linear = functools.cache(lambda: models.frozen(nn.Linear(size.width, size.prototypes)))
    compiled_linear = Peer("nn.Linear", lambda: linear(), reference=lambda x: linear()(x))
    return Case(
        name=f"{intersection}, {difference}, {size}",
        peers=(
            Peer("tversky", build),
            Peer("tversky, torch.compile", lambda: torch.compile(copy.deepcopy(build()))),
            Peer("tversky, torch.compile, freezing", lambda: torch.compile(copy.deepcopy(build()),
                                                                         options={"freezing": True})),
            compiled_linear,
            *(Peer(f"fxfreeze, {target}", functools.partial(frozen_head, build, size, target), limit=1 / size.speed_up)
              for target in ("torch", "aoti", "onnx")),
        ),
        baseline="tversky",
        reference=lambda x: double(build())(x.double()),
        inputs=lambda generator: (torch.randn(size.batch, size.width, generator=generator),),
        tolerance=TOLERANCE,
    )  # fmt: skip


def package_head(size: Size, intersection: str, difference: str, seed: int) -> nn.Module:
    """With a bank and prototypes about zero, as after training: the package's start has every feature in everything."""
    tversky = models.need("tversky.nn")
    torch.manual_seed(seed)
    head = tversky.TverskyProjection(
        size.width, size.prototypes, size.bank, "contrast", False, intersection, difference
    )
    for weight in (head.feature_bank.weight, head.prototypes.weight):
        nn.init.normal_(weight, std=size.width**-0.5)
    return models.frozen(head)


def double(head: nn.Module) -> nn.Module:
    """The same similarity in float64, which the package cannot compute: it casts indicators to float32."""
    from fxfreeze.nn import TverskyProjection

    return TverskyProjection.from_package(head).double()


def frozen_head(build: Callable[[], nn.Module], size: Size, target: str) -> Callable[..., Any]:
    """Compiled for its batch, which the plan states: what serves one row is not what serves hundreds."""
    import fxfreeze as fz

    inputs = [fz.Input("x", shape=(size.batch, size.width))]
    try:
        return fz.compile(build(), fz.Plan(inputs=inputs, targets=(target,)), verify="sampled")
    except fz.MissingDependencyError as error:
        raise Unavailable(str(error)) from error
