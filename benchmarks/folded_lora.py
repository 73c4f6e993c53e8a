"""Latency of folded adapters (LoRA, DoRA, IA3, OFT) against the bare base model, on each target."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import models
from .harness import Case, Options, Peer, Unavailable, libraries

LIMIT = 1.02
TARGETS = ("torch", "aoti", "onnx")


@dataclass(frozen=True)
class Subject:
    """A base model and where its adapters go: a glob for fxfreeze, a regular expression for peft.

    Attributes:
        methods: the adapters that fold into its layers; OFT does not into a convolution with a window.
    """

    name: str
    model: nn.Module
    at: str
    modules: str
    batch: int
    methods: tuple[str, ...] = ("LoRA", "DoRA", "IA3")
    rank: int = 8
    block: int = 32


def cases(options: Options) -> Iterator[Case]:
    vit = Subject("ViT-tiny", models.vit_tiny(options.seed), "blocks.*.attn.qkv", r"blocks\.\d+\.attn\.qkv", batch=1,
                  methods=("LoRA", "DoRA", "IA3", "OFT"))  # fmt: skip
    resnet = Subject("ResNet-18", models.resnet("resnet18", options.seed), "layer*.*.conv*", r"layer.*conv\d", batch=1)
    for subject in [vit] if options.quick else [vit, resnet]:
        for target in TARGETS:
            yield folded_case(subject, target, options.seed)


def folded_case(subject: Subject, target: str, seed: int) -> Case:
    """The control is the base compiled again: as far as its ratio is from 1, this machine cannot resolve."""
    adapted = [Adapted(subject, method, seed) for method in subject.methods]
    peers = [
        Peer("base", lambda: compiled(subject.model, target)),
        Peer("base again (control)", lambda: compiled(subject.model, target)),
    ]
    peers += [
        Peer(f"{net.method} folded", functools.partial(net.compiled, target), reference=net.reference, limit=LIMIT)
        for net in adapted
    ]
    if target == "torch":
        peft = Peft(subject, seed)
        peers.append(Peer("peft, merged, torch.compile", peft.compiled, reference=peft.reference))
    return Case(
        name=f"{subject.name}, {target}",
        peers=tuple(peers),
        baseline="base",
        reference=double(subject.model),
        inputs=lambda generator: (torch.randn(subject.batch, 3, 224, 224, generator=generator),),
        tolerance=1e-4,
    )


def compiled(model: nn.Module, target: str, *steps: Any) -> Callable[..., Any]:
    import fxfreeze as fz

    try:
        return fz.compile(model, fz.Plan(inputs=[image()], steps=steps, targets=(target,)))
    except fz.MissingDependencyError as error:
        raise Unavailable(str(error)) from error


def image() -> Any:
    import fxfreeze as fz

    return fz.Input("x", shape=("batch", 3, 224, 224))


def double(model: nn.Module) -> Callable[[torch.Tensor], Any]:
    return lambda x: copy.deepcopy(model).double()(x.double())


def disturb(module: nn.Module, seed: int) -> None:
    """Trained-looking adapters: a fresh LoRA is zero, and folding zero proves nothing."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.3 * noise / math.sqrt(parameter[0].numel()))


class Adapted:
    """The base with a random adapter, through fxfreeze; the reference is the adapted module, before any fold."""

    def __init__(self, subject: Subject, method: str, seed: int) -> None:
        self.subject, self.method, self.seed = subject, method, seed

    def step(self) -> Any:
        import fxfreeze as fz

        sizes: dict[str, Any] = {"LoRA": {"rank": self.subject.rank}, "DoRA": {"rank": self.subject.rank}, "IA3": {},
                                 "OFT": {"block_size": self.subject.block}}  # fmt: skip
        return getattr(fz, self.method)(at=self.subject.at, **sizes[self.method])

    @functools.cached_property
    def net(self) -> nn.Module:
        import fxfreeze as fz

        net = fz.adapt(self.subject.model, fz.Plan(inputs=[image()], steps=[self.step()]))
        disturb(net, self.seed)
        return net

    def reference(self, x: torch.Tensor) -> Any:
        return self.net(x)

    def compiled(self, target: str) -> Callable[..., Any]:
        return compiled(self.net, target, self.step())


class Peft:
    """What a user does today: peft's LoRA of the same rank on the same layers, merged, torch.compile."""

    def __init__(self, subject: Subject, seed: int) -> None:
        self.subject, self.seed = subject, seed

    def net(self) -> Any:
        peft = models.need("peft")
        config = peft.LoraConfig(r=self.subject.rank, lora_alpha=self.subject.rank, target_modules=self.subject.modules)
        net = peft.get_peft_model(copy.deepcopy(self.subject.model), config)
        disturb(net, self.seed)
        return net.eval()

    def reference(self, x: torch.Tensor) -> Any:
        return double(self.net())(x)

    def compiled(self) -> Callable[..., Any]:
        merged = self.net().merge_and_unload().requires_grad_(False)
        fast: Callable[..., Any] = libraries.compiled(merged)
        return fast
