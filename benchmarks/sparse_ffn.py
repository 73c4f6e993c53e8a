"""A feed-forward layer of which few neurons fire, on a CPU, against torch.compile with freezing and nn.Linear."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import models
from .harness import Case, Options, Peer, Unavailable, libraries

TOLERANCE = 1e-5
TARGETS = ("torch", "aoti")
ROUNDINGS = 32
"""Inputs are drawn again while a neuron is within so many eps of its threshold: float32 may find it on either side."""


@dataclass(frozen=True)
class Size:
    """Width of input and output, neurons, rows per call, and the part of the neurons that fires in each."""

    width: int
    neurons: int
    batch: int
    fires: float

    def __str__(self) -> str:
        return f"{self.width} to {self.neurons} to {self.width}, batch {self.batch}, {self.fires:.0%} fire"


@dataclass(frozen=True)
class Limits:
    """Of the whole layer against torch.compile with freezing, and of its second product against nn.Linear."""

    whole: float
    second: float | None = None


SMALL = Size(256, 1024, 1, 0.1)
FULL = {
    Size(4096, 16384, 1, 0.1): Limits(whole=1 / 1.7, second=1 / 12),
    Size(4096, 16384, 1, 0.05): Limits(whole=1 / 1.7, second=1 / 12),
    Size(4096, 16384, 1, 0.5): Limits(whole=1.0, second=1.0),
    Size(4096, 16384, 64, 0.1): Limits(whole=1.0),
}


def cases(options: Options) -> Iterator[Case]:
    for size, limits in {SMALL: Limits(1.0, 1.0)}.items() if options.quick else FULL.items():
        yield from layer_cases(size, limits, options.seed)


class Gated(nn.Module):
    """W₂·gate(W₁·x), where a neuron is silent up to a threshold of its own."""

    threshold: Tensor

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(size.width, size.neurons), nn.Linear(size.neurons, size.width)
        # Of normal inputs W₁·x is normal, with the norm of a row of W₁ as its deviation.
        quantile = torch.special.ndtri(torch.tensor(1 - size.fires))
        level = self.up.bias + quantile * self.up.weight.norm(dim=1)
        self.register_buffer("threshold", level.detach())

    def fired(self, x: Tensor) -> Tensor:
        h: Tensor = torch.ops.fxfreeze.gate(self.up(x), self.threshold)
        return h

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.fired(x))
        return y


def layer_cases(size: Size, limits: Limits, seed: int) -> Iterator[Case]:
    """The whole layer; and for one row its second product alone, of what the gate lets through.

    Alone and called again and again, the weights of the neurons that fire may stay in a large cache. In the whole layer
    they do not: the first product drives them out.
    """
    build = functools.cache(functools.partial(layer, size, seed))

    def down() -> nn.Module:
        return build().down

    def rows(generator: torch.Generator) -> tuple[Tensor]:
        return (draw_decided(build(), torch.empty(size.batch, size.width), generator),)

    ours = (
        Peer(f"fxfreeze, {target}", functools.partial(frozen_layer, build, size, target), limit=limits.whole)
        for target in TARGETS
    )
    compiled, frozen = peers(build)
    yield Case(
        name=f"{size}, whole layer", peers=(frozen, compiled, Peer("eager", build), *ours), baseline=frozen.name,
        reference=lambda x: double(build, x), inputs=rows, tolerance=TOLERANCE,
    )  # fmt: skip
    if limits.second is not None:
        line = Peer("nn.Linear", down)
        op = Peer("fxfreeze::sparse_down", lambda: second_product(down()), limit=limits.second)
        yield Case(
            name=f"{size}, second product", peers=(line, *peers(down), op), baseline=line.name,
            reference=lambda h: double(down, h), inputs=lambda generator: (build().fired(*rows(generator)),),
            tolerance=TOLERANCE,
        )  # fmt: skip


def peers(build: Callable[[], nn.Module]) -> tuple[Peer, Peer]:
    """torch.compile, without freezing and with; neither may change the model of the others."""
    return (
        Peer("torch.compile", lambda: torch.compile(copy.copy(build()))),
        Peer("torch.compile, freezing", lambda: libraries.compiled(copy.copy(build()))),
    )


def layer(size: Size, seed: int) -> Any:
    import fxfreeze.kernels.gate  # noqa: F401  (registers the operator)

    torch.manual_seed(seed)
    return models.frozen(Gated(size))


@torch.no_grad()
def draw_decided(model: Any, x: Tensor, generator: torch.Generator) -> Tensor:
    """Fill `x` [N, d] with normal numbers such that rounding decides for no neuron whether it fires; in place."""
    left = torch.arange(len(x))
    while len(left):
        x[left] = torch.randn(len(left), x.shape[1], generator=generator)
        h = model.up(x[left])
        margin = ROUNDINGS * torch.finfo(x.dtype).eps * h.abs().amax(-1, keepdim=True)
        left = left[((h - model.threshold).abs() <= margin).any(-1)]
    return x


def double(build: Callable[[], nn.Module], x: Tensor) -> Tensor:
    y: Tensor = copy.deepcopy(build()).double()(x.double())
    return y


def frozen_layer(build: Callable[[], nn.Module], size: Size, target: str) -> Callable[..., Any]:
    """Compiled for one row where there is one, else for any number up to that of the case: what is sparse for one row
    is decided again in every call."""
    import fxfreeze as fz

    rows: Any = 1 if size.batch == 1 else "batch"
    dims = {} if size.batch == 1 else {"batch": fz.Dim(max=size.batch)}
    plan = fz.Plan(inputs=[fz.Input("x", shape=(rows, size.width))], dims=dims, targets=(target,))
    try:
        return fz.compile(build(), plan, verify="off")
    except fz.MissingDependencyError as error:
        raise Unavailable(str(error)) from error


def second_product(down: Any) -> Callable[..., Any]:
    from fxfreeze.kernels.sparse_down import KERNEL

    weight, bias = down.weight.T.contiguous(), down.bias
    return lambda h: KERNEL.op(h, weight, bias, crossover=1.0)
