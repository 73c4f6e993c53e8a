"""A frozen Tversky head on a CPU, against the package tversky and against nn.Linear."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import models
from .harness import Case, Options, Peer, Unavailable, libraries

TOLERANCE = 1e-5
ROUNDINGS = 32
"""Prototypes and inputs are drawn again while a feature is within so many eps of its threshold 0: float32 may find it
on either side, and the package and fxfreeze on different ones."""


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
PLAIN = ("contrast", "product", "ignorematch")
OTHERS = (PLAIN, ("contrast", "product", "substractmatch"), ("ratio", "min", "substractmatch"),
          ("contrast", "gmean", "ignorematch"))  # fmt: skip
"""These are run by all peers, of the other combinations one target shows the time."""
COMBINATIONS = tuple(itertools.product(("contrast", "ratio"), ("product", "min", "max", "mean", "gmean", "softmin"),
                                       ("ignorematch", "substractmatch")))  # fmt: skip


def cases(options: Options) -> Iterator[Case]:
    if options.quick:
        yield from head_cases(SMALL, PLAIN, options.seed, every=True)
        return
    for size in SIZES:
        for kind in COMBINATIONS if size is TOKEN else (PLAIN,):
            yield from head_cases(size, kind, options.seed, every=kind in OTHERS)


def head_cases(size: Size, kind: tuple[str, str, str], seed: int, *, every: bool) -> Iterator[Case]:
    """Against what a user of the package has; and for one row against a linear layer of the same shape, which computes
    something else."""
    build = functools.cache(functools.partial(package_head, size, kind, seed))
    linear = functools.cache(lambda: models.frozen(nn.Linear(size.width, size.prototypes)))
    frozen = functools.cache(lambda target: frozen_head(build(), size, target))
    line = Peer("nn.Linear", lambda: linear(), reference=lambda x: linear()(x))
    packaged = (
        Peer("tversky", build),
        Peer("tversky, torch.compile", lambda: torch.compile(copy.deepcopy(build()))),
        Peer("tversky, torch.compile, freezing", lambda: libraries.compiled(copy.deepcopy(build()))),
    )  # fmt: skip

    def ours(limit: float) -> tuple[Peer, ...]:
        targets = ("torch", "aoti", "onnx") if every else ("torch",)
        return tuple(Peer(f"fxfreeze, {target}", functools.partial(frozen, target), limit=limit) for target in targets)

    def case(name: str, *peers: Peer) -> Case:
        return Case(
            name=f"{', '.join(kind)}, {size}, {name}", peers=peers, baseline=peers[0].name,
            reference=lambda x: double(build())(x.double()), inputs=lambda generator: (rows(build(), size, generator),),
            tolerance=TOLERANCE,
        )  # fmt: skip

    yield case("against the package", *(packaged if every else packaged[:1]), *ours(1 / size.speed_up))
    if size.batch == 1:
        yield case("against a linear layer", line, *ours(1.0))


def package_head(size: Size, kind: tuple[str, str, str], seed: int) -> nn.Module:
    """With a bank and prototypes about zero, as after training: the package's start has every feature in everything."""
    tversky = models.need("tversky.nn")
    model, intersection, difference = kind
    torch.manual_seed(seed)
    head = tversky.TverskyProjection(size.width, size.prototypes, size.bank, model, False, intersection, difference)
    nn.init.normal_(head.feature_bank.weight, std=size.width**-0.5)
    draw_decided(head.prototypes.weight.data, head.feature_bank.weight, torch.Generator().manual_seed(seed),
                 std=size.width**-0.5)  # fmt: skip
    return models.frozen(head)


def rows(head: Any, size: Size, generator: torch.Generator) -> Tensor:
    return draw_decided(torch.empty(size.batch, size.width), head.feature_bank.weight, generator)


@torch.no_grad()
def draw_decided(vectors: Tensor, bank: Tensor, generator: torch.Generator, std: float = 1.0) -> Tensor:
    """Fill `vectors` [N, d] with normal numbers such that rounding decides no feature of the bank [K, d]; in place."""
    left = torch.arange(len(vectors))
    while len(left):
        vectors[left] = torch.randn(len(left), vectors.shape[1], generator=generator) * std
        measures = (vectors[left] @ bank.T).abs()
        margin = ROUNDINGS * torch.finfo(vectors.dtype).eps * measures.amax(-1, keepdim=True)
        left = left[(measures <= margin).any(-1)]
    return vectors


def double(head: nn.Module) -> nn.Module:
    """The same similarity in float64, which the package cannot compute: it casts indicators to float32."""
    from fxfreeze.nn import TverskyProjection

    return TverskyProjection.from_package(head).double()


def frozen_head(head: nn.Module, size: Size, target: str) -> Callable[..., Any]:
    """Compiled for its batch, which the plan states: what serves one row is not what serves hundreds."""
    import fxfreeze as fz

    inputs = [fz.Input("x", shape=(size.batch, size.width))]
    try:
        return fz.compile(head, fz.Plan(inputs=inputs, targets=(target,)), verify="off")
    except fz.MissingDependencyError as error:
        raise Unavailable(str(error)) from error
