"""Time to find which layers' channels can only go together, against Torch-Pruning, which has to name the same layers.

Torch-Pruning runs the model and follows autograd's graph; here the graph is there already, since everything needs it.
What capturing it takes is a peer of its own.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import models
from .harness import DURATION, Case, Options, Peer

IMAGE = (3, 224, 224)
LIMIT = 1.0
BASELINE = "Torch-Pruning"


def cases(options: Options) -> Iterator[Case]:
    for name in ("resnet18",) if options.quick else ("resnet50", "mobilenet_v3_large", "densenet121"):
        yield analysis(name, models.resnet(name, options.seed))


def analysis(name: str, model: nn.Module) -> Case:
    layers = [path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)]

    def peer(name: str, prepare: Callable[[nn.Module], Callable[[], Any]], limit: float | None = None) -> Peer:
        return Peer(name, functools.partial(prepare, model), lambda groups: partners(layers, groups), limit=limit)

    return Case(
        name=f"{name}, {len(layers)} convolutions",
        peers=(
            peer(BASELINE, torch_pruning),
            peer("fxfreeze", analyser, LIMIT),
            peer("fxfreeze, with capture", lambda model: lambda: analyser(model)()),
        ),
        baseline=BASELINE,
        reference=lambda: partners(layers, torch_pruning(model)()),
        tolerance=0.0,
        metric=DURATION,
    )


def partners(layers: list[str], groups: Iterable[Iterable[str]]) -> Tensor:
    """For every layer the first one that its channels go together with."""
    first = {path: layers.index(path) for path in layers}
    for group in groups:
        held = [path for path in group if path in first]
        first |= dict.fromkeys(held, min((first[path] for path in held), default=0))
    return torch.tensor([first[path] for path in layers])


def torch_pruning(model: nn.Module) -> Callable[[], list[set[str]]]:
    library = models.need("torch_pruning")
    model = copy.deepcopy(model).requires_grad_()  # it sees what autograd does
    paths = {module: path for path, module in model.named_modules()}

    def run() -> list[set[str]]:
        with torch.enable_grad():
            found = library.DependencyGraph().build_dependency(model, example_inputs=torch.zeros(2, *IMAGE))
        return [
            {paths[item.target.module] for item, _ in group
             if isinstance(item.target.module, nn.Conv2d) and found.is_out_channel_pruning_fn(item.handler)}
            for group in found.get_all_groups(root_module_types=[nn.Conv2d])
        ]  # fmt: skip

    return run


def analyser(model: nn.Module) -> Callable[[], list[set[str]]]:
    import fxfreeze as fz
    from fxfreeze.capture import capture
    from fxfreeze.coupling import coupling_groups

    program, _ = capture(model, fz.Plan([fz.Input("x", ("batch", *IMAGE))], targets=[]))

    def run() -> list[set[str]]:
        return [
            {str(member.node.target).removesuffix(".weight") for member in group.members if member.role == "row"}
            for group in coupling_groups(program)
        ]

    return run
