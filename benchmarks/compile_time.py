"""Time of fz.compile without target emission: against torch.export alone, how it grows with depth and width, and with
the sites of a plan."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from . import models
from .harness import DURATION, Case, Options, Peer

SUITE = "compile"
Verify = Literal["full", "sampled", "off"]
Shape = tuple[int, ...]
LIMIT_OFF, LIMIT_FULL, LIMIT_DEPTH = 3.0, 8.0, 4.5
SITES = (100, 1_000, 10_000)
FEW_ROUNDS = replace(DURATION, rounds=3, quick_rounds=1)
"""Of what takes minutes."""
TOKENS: Shape = (16, 64)
IMAGE: Shape = (3, 224, 224)


def cases(options: Options) -> Iterator[Case]:
    if options.quick:
        yield against_export("encoder of 4 blocks", models.encoder(4, options.seed), TOKENS)
        yield depth_growth(2, 8, options.seed)
        yield sites_case(10, options.seed)
    else:
        yield against_export("ViT-tiny", models.vit_tiny(options.seed), IMAGE)
        yield depth_growth(12, 48, options.seed)
        for depth, width in ((4, 256), (4, 1024), (16, 256), (16, 1024)):
            yield against_export(
                f"encoder of {depth} blocks, {width} wide", wide(depth, width, options.seed), (16, width)
            )
        for sites in SITES:
            yield sites_case(sites, options.seed)


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


def wide(depth: int, width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return models.frozen(nn.Sequential(*(models.Block(width, width // 64) for _ in range(depth))))


def sites_case(sites: int, seed: int) -> Case:
    """A chain of as many small layers, with a LoRA on every one that folds into it."""

    @functools.cache
    def chain() -> nn.Module:
        torch.manual_seed(seed)
        return models.frozen(nn.Sequential(*(nn.Linear(8, 8) for _ in range(sites))))

    def prepare() -> Callable[[], Any]:
        import fxfreeze as fz

        plan = fz.Plan([fz.Input("x", ("batch", 8))], [fz.LoRA(at="*", rank=1)], [])
        return lambda: fz.compile(chain(), plan, verify="off")

    def observe(artifact: Any) -> torch.Tensor:
        """How many of the sites were folded."""
        rows = [row for row in artifact.manifest["ledger"] if row["pass_name"] == "fold-delta"]
        return torch.tensor(sum(row["outcome"] == "rewritten" for row in rows))

    return Case(
        name=f"{sites:,} sites with a LoRA",
        peers=(
            Peer("torch.export", lambda: lambda: export(chain(), (8,)), lambda exported: torch.tensor(sites)),
            Peer("fxfreeze, verify=off", prepare, observe),
        ),
        baseline="torch.export",
        reference=lambda: torch.tensor(sites),
        metric=FEW_ROUNDS,
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
