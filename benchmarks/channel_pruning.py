"""Latency of networks that lost channels, against the whole ones on the same target, and what that costs in accuracy.

Asked is a speed-up of at least 0.8 × what the multiply-accumulates say: with a share s of them left, at most s / 0.8 of
the latency. The channels that go are those that are worth least by |w|.

Accuracy is of the public ResNet-20 on CIFAR-10's test images: whole; pruned, not trained again; and pruned, with the
weights that stay trained on 2,000 other images, to say what the whole network says.
"""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import models
from .harness import Case, Metric, Options, Peer, Reading, Unavailable

EFFICIENCY = 0.8
TARGETS = ("onnx", "aoti")
WORK = Metric("multiply-accumulates", "MACs", rounds=1, quick_rounds=1, timed=False, exact=True)
ACCURACY = Metric("accuracy", "", rounds=1, quick_rounds=1, timed=False, exact=True)
EPOCHS, BATCH, RATE, CLIP, SOFTNESS = 40, 64, 0.05, 1.0, 4.0


@dataclass(frozen=True)
class Subject:
    """A network, and how it is pruned.

    Attributes:
        make: the network, frozen.
        shape: of one image.
        flops: the share of the multiply-accumulates that stays at most.
        multiple: what channels are rounded to.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    flops: float
    multiple: int

    @property
    def pruned(self) -> str:
        return f"pruned to {self.flops:.0%}, multiples of {self.multiple}"

    def plan(self, *targets: str, **prune: Any) -> Any:
        """The network as it is, or, with arguments of Prune, without channels."""
        import fxfreeze as fz

        how = {"method": "channel", "flops": self.flops, "multiple": self.multiple, **prune}
        return fz.Plan([fz.Input("x", ("batch", *self.shape))], [fz.Prune(**how)] if prune else [], targets)


def cases(options: Options) -> Iterator[Case]:
    small = functools.partial(Subject, "ResNet-20", functools.cache(models.resnet20), (3, 32, 32), 0.5)
    resnet18 = functools.cache(lambda: models.resnet("resnet18", options.seed))
    large = Subject("ResNet-18", resnet18, (3, 224, 224), flops=0.5, multiple=16)
    subjects = [small(16)] if options.quick else [small(16), small(8), large]
    for subject in subjects:
        yield work_case(subject)
        for target in TARGETS:
            yield from (latency_case(subject, batch, target) for batch in ((1,) if subject is large else (1, 64)))
    yield accuracy_case(subjects[0], options)


# ---- latency


def latency_case(subject: Subject, batch: int, target: str) -> Case:
    """The control is the base compiled again: as far as its ratio is from 1, this machine cannot resolve."""
    whole, less = subject.plan(target), subject.plan(target, method="channel")
    return Case(
        name=f"{subject.name}, {subject.pruned}, batch {batch}, {target}",
        peers=(
            Peer("base", lambda: compiled(subject.make(), whole)),
            Peer("base again (control)", lambda: compiled(subject.make(), whole)),
            Peer("pruned", lambda: compiled(subject.make(), less), reference=lambda x: adapted(subject)(x),
                 limit=subject.flops / EFFICIENCY),
        ),
        baseline="base",
        reference=lambda x: copy.deepcopy(subject.make()).double()(x.double()),
        inputs=lambda generator: (torch.randn(batch, *subject.shape, generator=generator),),
        tolerance=1e-4,
    )  # fmt: skip


def compiled(model: nn.Module, plan: Any) -> Any:
    import fxfreeze as fz

    try:
        return fz.compile(model, plan)
    except fz.MissingDependencyError as error:
        raise Unavailable(str(error)) from error


def adapted(subject: Subject, **prune: Any) -> Any:
    """The network under its masks, at its full size."""
    import fxfreeze as fz

    return fz.adapt(subject.make(), subject.plan(method="channel", **prune))


# ---- work


def work_case(subject: Subject) -> Case:
    return Case(
        name=f"{subject.name}, {subject.pruned}", peers=(
            Peer("base", lambda: lambda: Reading(float(work(subject)), 0.0)),
            Peer("pruned", lambda: lambda: Reading(work(subject) * share(subject), 0.0), limit=subject.flops),
        ), baseline="base", reference=lambda: None, metric=WORK,
    )  # fmt: skip


def work(subject: Subject) -> int:
    """Multiply-accumulates of the convolutions and linear layers, for one image."""
    model, total = subject.make(), 0

    def count(module: Any, given: Any, result: Tensor) -> None:
        nonlocal total
        total += result[0].numel() * module.weight[0].numel()

    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [module.register_forward_hook(count) for module in layers]
    model(torch.zeros(1, *subject.shape))
    for hook in hooks:
        hook.remove()
    return total


def share(subject: Subject) -> float:
    """What of them stays, as the ledger says."""
    told = [re.search(r"([\d.]+)% of the multiply-accumulates", row.detail) for row in adapted(subject).ledger]
    return float(next(found[1] for found in told if found)) / 100


# ---- accuracy


def accuracy_case(subject: Subject, options: Options) -> Case:
    def peer(make: Callable[[], Any]) -> Callable[[], Callable[[], Reading]]:
        def prepare() -> Callable[[], Reading]:
            images, labels = models.cifar10("test")
            model = make()
            return lambda: Reading(accuracy(model, images, labels), 0.0)

        return prepare

    def tuned() -> Any:
        net = adapted(subject, train=True)
        distil(net, subject.make(), *models.cifar10("calib"), epochs=1 if options.quick else EPOCHS, seed=options.seed)
        return compiled(net, net.plan.model_copy(update={"targets": TARGETS[:1]}))

    return Case(
        name=f"{subject.name}, {subject.pruned}", peers=(
            Peer("base", peer(subject.make)),
            Peer("pruned", peer(lambda: compiled(subject.make(), subject.plan(*TARGETS[:1], method="channel")))),
            Peer("pruned, then trained", peer(tuned)),
        ), baseline="base", reference=lambda: None, metric=ACCURACY,
    )  # fmt: skip


@torch.no_grad()
def accuracy(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    found = torch.cat([model(part).argmax(1) for part in images.split(500)])
    return float((found == labels).double().mean())


def distil(net: nn.Module, teacher: nn.Module, images: Tensor, labels: Tensor, epochs: int, seed: int) -> None:
    """SGD towards the labels and what `teacher` says, on images moved by up to four pixels and flipped."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=0.9, weight_decay=1e-4, nesterov=True)
    steps = epochs * math.ceil(len(images) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(BATCH):
            x = moved(images[batch], generator)
            scores, wanted = net(x), teacher(x)
            soft = F.kl_div((scores / SOFTNESS).log_softmax(1), (wanted / SOFTNESS).softmax(1), reduction="batchmean")
            optimizer.zero_grad()
            (F.cross_entropy(scores, labels[batch]) + SOFTNESS**2 * soft).backward()
            # Norms keep the statistics they had, which few channels do not fit: the first gradients are huge.
            nn.utils.clip_grad_norm_(net.parameters(), CLIP)
            optimizer.step()
            schedule.step()


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    padded, side = F.pad(images, (4, 4, 4, 4)), images.shape[-1]
    found = []
    for image, (top, left, flip) in zip(
        padded, torch.randint(0, 9, (len(images), 3), generator=generator), strict=True
    ):
        part = image[:, top : top + side, left : left + side]
        found.append(part.flip(-1) if flip % 2 else part)
    return torch.stack(found)
