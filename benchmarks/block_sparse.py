"""A linear layer of whose weight most blocks are zeros, on a CPU, against torch.compile with freezing and nn.Linear."""

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
BLOCK = 64
LIMIT = 1 / 2.5
"""Of the time of the dense product, for what is asked to be that fast: see `is_limited`."""


@dataclass(frozen=True)
class Size:
    """Inputs and outputs, rows per call, and the part of the blocks that are zeros."""

    width: int
    batch: int
    empty: float

    def __str__(self) -> str:
        return f"{self.width} to {self.width}, batch {self.batch}, {self.empty:.0%} empty"

    @property
    def is_limited(self) -> bool:
        return self.empty == 0.75 and self.batch == 64


SMALL = (Size(1024, 64, 0.75),)
FULL = tuple(
    Size(width, batch, empty) for width in (1024, 2048, 4096) for batch in (1, 64) for empty in (0.5, 0.75, 0.9)
)


def cases(options: Options) -> Iterator[Case]:
    for size in SMALL if options.quick else FULL:
        yield layer_case(size, options.seed)


def layer(size: Size, seed: int) -> Any:
    """A linear layer of which that part of the blocks, anywhere, is zeros."""
    torch.manual_seed(seed)
    model = nn.Linear(size.width, size.width)
    blocks = size.width // BLOCK
    kept = torch.randperm(blocks**2).reshape(blocks, blocks) >= round(size.empty * blocks**2)
    model.weight.data *= kept.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return models.frozen(model)


def layer_case(size: Size, seed: int) -> Case:
    """The layer, compiled and not, as torch runs it and as fxfreeze does."""
    build = functools.cache(functools.partial(layer, size, seed))
    limit = LIMIT if size.is_limited else None
    frozen = Peer(
        "torch.compile, freezing", lambda: libraries.compiled(copy.copy(build()))
    )  # neither may change the model of the others
    ours = (
        Peer(f"fxfreeze, {target}", functools.partial(frozen_layer, build, size, target), limit=limit)
        for target in TARGETS
    )
    op = Peer("fxfreeze::block_sparse", functools.partial(operator, build), limit=limit)
    return Case(
        name=str(size), peers=(frozen, Peer("nn.Linear", build), op, *ours), baseline=frozen.name,
        reference=lambda x: copy.deepcopy(build()).double()(x.double()),
        inputs=lambda generator: (torch.randn(size.batch, size.width, generator=generator),), tolerance=TOLERANCE,
    )  # fmt: skip


def operator(build: Callable[[], Any]) -> Callable[[Tensor], Tensor]:
    from fxfreeze.kernels.block_sparse import KERNEL, compress

    model = build()
    stored = compress(model.weight, BLOCK, BLOCK)
    return lambda x: KERNEL.op(x, *stored, model.bias, out_features=len(model.weight))


def frozen_layer(build: Callable[[], Any], size: Size, target: str) -> Callable[..., Any]:
    """Compiled for as many rows as there are. Whether blocks are left out is measured on the way.

    Raises:
        Unavailable: they are not.
    """
    import fxfreeze as fz

    plan = fz.Plan(inputs=[fz.Input("x", shape=(size.batch, size.width))], targets=(target,))
    try:
        artifact = fz.compile(build(), plan, verify="off")
    except fz.MissingDependencyError as error:
        raise Unavailable(str(error)) from error
    rows = [row for row in artifact.manifest["ledger"] if row["pass_name"] == "block-sparse"]
    if [row["outcome"] for row in rows] != ["rewritten"]:
        raise Unavailable(f"the layer stays dense: {rows[0]['detail'] if rows else 'it has no zeros'}")
    return artifact
