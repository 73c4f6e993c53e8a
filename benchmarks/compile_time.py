"""Time of fz.compile without target emission: against torch.export alone, and how it grows with depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import nn

from . import models
from .harness import DURATION, Case, Options, Peer

Verify = Literal["full", "sampled", "off"]
Shape = tuple[int, ...]
LIMIT_OFF, LIMIT_FULL, LIMIT_DEPTH = 3.0, 8.0, 4.5
TOKENS: Shape = (16, 64)
IMAGE: Shape = (3, 224, 224)


def cases(options: Options) -> Iterator[Case]:
    if options.quick:
        yield against_export("encoder of 4 blocks", models.encoder(4, options.seed), TOKENS)
        yield depth_growth(2, 8, options.seed)
    else:
        yield against_export("ViT-tiny", models.vit_tiny(options.seed), IMAGE)
        yield depth_growth(12, 48, options.seed)


def against_export(name: str, model: nn.Module, shape: Shape) -> Case:
    def run_exported(exported: Any) -> Any:
        return exported.module()(example(shape))

    def compiled(verify: Verify, limit: float) -> Peer:
        name = f"fxfreeze, verify={verify}"
        return Peer(name, compiler(model, shape, verify), observer(model, shape, verify), limit=limit)

    return Case(
        name=f"{name}: compile against export",
        peers=(
            Peer("torch.export", lambda: lambda: export(model, shape), run_exported),
            compiled("off", LIMIT_OFF),
            compiled("full", LIMIT_FULL),
        ),
        baseline="torch.export",
        reference=eager(model, shape),
        metric=DURATION,
    )


def depth_growth(shallow: int, deep: int, seed: int) -> Case:
    """Each depth is checked against its own eager model."""

    def compiled(depth: int, limit: float | None) -> Peer:
        model = models.encoder(depth, seed)
        prepare, observe = compiler(model, TOKENS, "full"), observer(model, TOKENS, "full")
        return Peer(f"{depth} blocks", prepare, observe, reference=eager(model, TOKENS), limit=limit)

    peers = (compiled(shallow, None), compiled(deep, LIMIT_DEPTH))
    return Case(
        name=f"encoder: {deep} blocks against {shallow}, verify=full",
        peers=peers,
        baseline=peers[0].name,
        reference=lambda: None,  # every peer has its own
        metric=DURATION,
    )


def example(shape: Shape) -> torch.Tensor:
    """The same draw at every call; batch 2, because torch.export specialises a batch of 1."""
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))


def eager(model: nn.Module, shape: Shape) -> Callable[[], Any]:
    return lambda: model(example(shape))


def export(model: nn.Module, shape: Shape) -> Any:
    return torch.export.export(model, (example(shape),), dynamic_shapes=({0: torch.export.Dim("batch")},))


def compiler(model: nn.Module, shape: Shape, verify: Verify, *targets: str) -> Callable[[], Callable[[], Any]]:
    def prepare() -> Callable[[], Any]:
        import fxfreeze as fz

        plan = fz.Plan(inputs=[fz.Input("x", shape=("batch", *shape))], targets=targets)
        return lambda: fz.compile(model, plan, verify=verify)

    return prepare


def observer(model: nn.Module, shape: Shape, verify: Verify) -> Callable[[Any], Any]:
    def observe(artifact: Any) -> Any:
        emitted = compiler(model, shape, verify, "onnx")()()
        return models.outputs_without_target(artifact, emitted, example(shape))

    return observe
