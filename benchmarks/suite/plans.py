"""What is done to a network: as plain torch modules, as a reference in float64, and as the steps of a plan.

The plain modules are what a user has before any compiler sees them, and know nothing of fxfreeze. All numbers
(adapters, gains, thresholds, prototypes, masks) are drawn or measured here once, and every library gets the same.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import models
from ..harness import Unavailable, shelf
from ..tversky_cpu import draw_decided
from .networks import Hidden, Network

RANK = 8
MULTIPLE = 16
"""What the number of units that stay is rounded to: kernels work in blocks of as many channels."""


@dataclass(frozen=True)
class Variant:
    """Which of the steps a plan has."""

    name: str
    lora: bool = False
    gates: bool = False
    tversky: bool = False
    ticket: bool = False
    int8: bool = False

    def tolerance(self, network: Network) -> float:
        compared = network.compared if self.gates or self.tversky else 0.0
        return network.rounding if self.int8 else max(network.tolerance, compared)


BARE = Variant("bare")
LORA = Variant("LoRA", lora=True)
GATES = Variant("gates", gates=True)
TVERSKY = Variant("Tversky head", tversky=True)
TICKET = Variant("ticket", ticket=True)
QUANTIZED = Variant("int8", int8=True)
ALL = Variant("all", lora=True, gates=True, tversky=True, ticket=True, int8=True)
VARIANTS = (BARE, LORA, GATES, TVERSKY, TICKET, QUANTIZED, ALL)


# ---- numbers


def generator(text: str) -> torch.Generator:
    """One for each name, so that a number does not hang on what else is drawn."""
    return torch.Generator().manual_seed(int.from_bytes(text.encode()) % (2**63 - 1))


@functools.cache
def updates(network: Network) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of a LoRA at every adapted layer, as trained ones are: not zero. In peft's shapes."""
    found = {}
    for site in network.sites(network.adapted):
        weight = network.model.get_submodule(site).weight
        window = weight.shape[2:] if weight.ndim > 2 else ()
        outputs, inputs = rows(network.model.get_submodule(site)).shape[:2]
        a = torch.randn(RANK, inputs, *window, generator=generator(f"{site} A"))
        b = torch.randn(outputs, RANK, *(1,) * len(window), generator=generator(f"{site} B"))
        scale = weight.std() * weight[0].numel() ** 0.5 / 4  # an update with a quarter of the weight's norm, or so
        found[site] = (a / a[0].numel() ** 0.5, b * scale / RANK**0.5)
    return found


def rows(layer: Any) -> Tensor:
    """The weight with outputs in front: that of transformers' Conv1D is the other way round."""
    weight: Tensor = layer.weight
    return weight.T if type(layer).__name__ == "Conv1D" else weight


@functools.cache
@torch.no_grad()
def thresholds(network: Network) -> dict[str, tuple[Tensor, Tensor]]:
    """Gain and threshold of every gated unit; `fire` of its values on the first calibration inputs is above."""
    seen: dict[str, list[Tensor]] = {site: [] for site in network.sites(network.gated)}
    hooks = [
        network.model.get_submodule(site).register_forward_hook(
            lambda module, given, result, site=site: seen[site].append(units_last(result))  # type: ignore[misc]
        )
        for site in seen
    ]
    for inputs in network.calibration()[: network.calls]:
        network.model(*(value[:8] if isinstance(shape[0], str) else value
                        for value, shape in zip(inputs, network.shapes.values(), strict=True)))  # fmt: skip
    for hook in hooks:
        hook.remove()
    found = {}
    for site, parts in seen.items():
        values = torch.cat(parts).T.contiguous()
        gain = 0.5 + torch.rand(len(values), generator=generator(f"{site} gain"))
        found[site] = gain, values.kthvalue(round((1 - network.fire) * (values.shape[1] - 1)) + 1).values
    return found


def units_last(result: Tensor) -> Tensor:
    """[values, units]: channels of images, else the last dim."""
    return (result.movedim(1, -1) if result.ndim == 4 else result).flatten(0, -2)


@functools.cache
def similarity(network: Network) -> tuple[Tensor, Tensor]:
    """Feature bank [K, d] and prototypes [P, d] of the head, about zero as after training."""
    classes, width = network.model.get_submodule(network.head).weight.shape
    draws, std = generator(f"{network.name} head"), width**-0.5
    bank = torch.randn(network.features, width, generator=draws) * std
    return bank, draw_decided(torch.empty(classes, width), bank, draws, std)


@functools.cache
def removed(network: Network) -> dict[str, tuple[Hidden, Tensor]]:
    """For every layer that makes hidden units, those that go: the least by |w|, about half."""
    found = {}
    for hidden in network.hidden:
        for maker in network.sites(hidden.at):
            worth = rows(network.model.get_submodule(maker)).abs().flatten(1).sum(1)
            kept = max(MULTIPLE, len(worth) // 2 // MULTIPLE * MULTIPLE)
            if kept < len(worth):
                found[maker] = hidden, worth.argsort()[: len(worth) - kept].sort().values
    return found


@functools.cache
def masks(network: Network) -> dict[str, Tensor]:
    """By parameter, True where a weight stays."""
    found: dict[str, Tensor] = {}
    for maker, (hidden, gone) in removed(network).items():
        for path in [maker, *hidden.paths(maker, hidden.beside)]:
            layer = network.model.get_submodule(path)
            for name, parameter in layer.named_parameters(recurse=False):
                mask = torch.ones(parameter.shape, dtype=torch.bool)
                (mask.T if mask.ndim == 2 and rows(layer) is not layer.weight else mask)[gone] = False
                found[f"{path}.{name}"] = mask
    return found


# ---- plain torch


class Adapted(nn.Module):
    """A layer with a LoRA beside it, not merged."""

    def __init__(self, layer: Any, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.a, self.b = nn.Parameter(a, requires_grad=False), nn.Parameter(b, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        if isinstance(layer, nn.Conv2d):
            update = F.conv2d(F.conv2d(x, self.a, None, layer.stride, layer.padding, layer.dilation), self.b)
        else:
            update = F.linear(F.linear(x, self.a), self.b)
        return layer(x) + update


class Gated(nn.Module):
    """y = g ⊙ h ⊙ 1[h > τ] of what a module returns."""

    def __init__(self, module: nn.Module, gain: Tensor, threshold: Tensor) -> None:
        super().__init__()
        self.module = module
        self.gain, self.threshold = (nn.Parameter(value, requires_grad=False) for value in (gain, threshold))

    def forward(self, x: Tensor) -> Tensor:
        h = self.module(x)
        gain, threshold = (v.view(-1, 1, 1) if h.ndim == 4 else v for v in (self.gain, self.threshold))
        return torch.where(h > threshold, gain * h, 0.0)


class Similarity(nn.Module):
    """The package's contrast model (product, ignorematch) in any precision: the package casts to float32."""

    def __init__(self, bank: Tensor, prototypes: Tensor) -> None:
        super().__init__()
        self.bank, self.prototypes = (nn.Parameter(value, requires_grad=False) for value in (bank, prototypes))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x @ self.bank.T, self.prototypes @ self.bank.T
        both = a.relu() @ b.relu().T
        only_a, only_b = (a.relu() @ (b <= 0).to(a).T, (a <= 0).to(a) @ b.relu().T)
        return both - 0.5 * only_a - 0.5 * only_b


def packaged(bank: Tensor, prototypes: Tensor) -> nn.Module:
    """The layer of the package tversky, with these weights."""
    (classes, width), features = prototypes.shape, len(bank)
    layer = models.need("tversky.nn").TverskyProjection(width, classes, features, "contrast", False)
    layer.feature_bank.weight.data, layer.prototypes.weight.data = bank.clone(), prototypes.clone()
    return models.frozen(layer)


def plain(network: Network, variant: Variant, *, merged: bool = False, exact: bool = False) -> nn.Module:
    """What a user has in plain torch: floats, whatever the variant says of integers.

    Args:
        merged: LoRAs are in the weights.
        exact: for float64, which the package's Tversky layer cannot do.
    """
    model = copy.deepcopy(network.model)
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for site, (a, b) in updates(network).items() if variant.lora and merged else ():
            target = rows(model.get_submodule(site))
            target += (b.flatten(1) @ a.flatten(1)).view_as(target)
        for name, mask in masks(network).items() if variant.ticket else ():
            parameters[name].mul_(mask)
    for site, (a, b) in updates(network).items() if variant.lora and not merged else ():
        b = b.clone()
        if variant.ticket and site in removed(network):  # the mask is of what the layer and its update are together
            b[removed(network)[site][1]] = 0.0
        model.set_submodule(site, Adapted(model.get_submodule(site), a, b))
    for site, (gain, threshold) in thresholds(network).items() if variant.gates else ():
        model.set_submodule(site, Gated(model.get_submodule(site), gain, threshold))
    if variant.tversky:
        model.set_submodule(network.head, (Similarity if exact else packaged)(*similarity(network)))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def reference(network: Network, variant: Variant, *inputs: Tensor) -> Any:
    """What the plain modules say in float64."""
    model = plain(network, variant, exact=True).double()
    return model(*(value.double() if value.is_floating_point() else value for value in inputs))


# ---- plans


def plan(network: Network, variant: Variant, folder: Path, *targets: str) -> Any:
    """The same as one plan; what its steps read is written into the folder."""
    import fxfreeze as fz

    return fz.Plan(network.plan_inputs(), list(steps(network, variant, folder)), targets)


def steps(network: Network, variant: Variant, folder: Path) -> Iterator[Any]:
    import fxfreeze as fz

    if variant.lora:
        pairs = {f"adapters.lora.{site}.lora_{leaf}": value for site, pair in updates(network).items()
                 for leaf, value in zip("AB", pair, strict=True)}  # fmt: skip
        yield fz.LoRA(at=network.adapted, rank=RANK, weights=write(folder / "lora.safetensors", pairs))
    if variant.gates:
        pairs = {f"adapters.gate.{site}.{leaf}": value for site, pair in thresholds(network).items()
                 for leaf, value in zip(("gain", "threshold"), pair, strict=True)}  # fmt: skip
        yield fz.Gate(at=network.gated, on="output", weights=write(folder / "gates.safetensors", pairs))
    if variant.tversky:
        file = write(folder / "head.safetensors", head(network))
        yield fz.Tversky(at=network.head, features=network.features, weights=file)
    if variant.ticket:
        masked = sorted({name.rpartition(".")[0] for name in masks(network)})  # all others count as addressed by "*"
        yield fz.Prune(at=masked, mask=write(folder / "masks.safetensors", masks(network)))
    if variant.int8:
        yield fz.Quantize()


def head(network: Network) -> dict[str, Tensor]:
    """The weights of the Tversky head by fxfreeze's names; it has a bias where the linear layer had one."""
    bank, prototypes = similarity(network)
    values = {"features": bank, "prototypes": prototypes, "theta": torch.tensor(1.0),
              "alpha": torch.tensor(0.5), "beta": torch.tensor(0.5)}  # fmt: skip
    if network.model.get_submodule(network.head).bias is not None:
        values["bias"] = torch.zeros(len(prototypes))
    return {f"adapters.tversky.{network.head}.{leaf}": value for leaf, value in values.items()}


def write(path: Path, tensors: dict[str, Tensor]) -> str:
    models.need("safetensors.torch").save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return str(path)


def artifact(network: Network, variant: Variant, target: str, *others: str) -> Any:
    """The plan's artifact, with this target at least: what another process left, or else compiled for `others`, too.

    It is left where somebody will ask for it: peers of the other targets, or the same network with another batch.
    """
    import fxfreeze as fz

    if network.folder is None or not (others or network.batch or (network.folder / variant.name).exists()):
        return frozen(network, variant, target)
    made = []

    def make(path: Path) -> None:
        made.append(frozen(network, variant, target, *others))
        made[0].save(path)

    path = shelf.shared(network.folder, variant.name, make)
    found = made[0] if made else fz.load(path)
    return found if target in found.targets else frozen(network, variant, target)


def frozen(network: Network, variant: Variant, *targets: str) -> Any:
    """The plan, compiled. Proofs are off: tests have them, and every output is compared before it is timed."""
    import fxfreeze as fz

    calibration = network.calibration() if variant.int8 or variant.gates else None
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = plan(network, variant, Path(folder), *targets)
            return fz.compile(network.model, made, calibration=calibration, verify="off")
        except fz.MissingDependencyError as error:
            raise Unavailable(str(error)) from error
