"""What a variant of a network has to compute and to move, whoever runs it: the roofline's side of a case."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..harness.case import Work, flatten
from . import plans
from .networks import Network
from .plans import Similarity, Variant


def of(network: Network, variant: Variant) -> Work:
    """Operations are those of convolutions and products.

    LoRAs are merged, the units that a ticket takes are gone, and what a Tversky head knows beforehand is a table.
    """
    left = shares(network) if variant.ticket else {}
    plain = replace(variant, gates=False)  # which wrap modules, and cost next to nothing
    # Shapes are all that counts.
    model = plans.plain(network, plain, merged=True, exact=True).to("meta")
    inputs = tuple(value.to("meta") for value in network.draw(torch.Generator().manual_seed(0)))
    # As products, since the counter does not know the fused attention of CPUs.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        outputs = flatten(model(*inputs))
    counts = {path: sum(found.values()) for path, found in counter.get_flop_counts().items()}
    root = type(model).__name__
    operations = counts["Global"] - sum(counts.get(f"{root}.{path}", 0) * (1 - share) for path, share in left.items())
    if variant.tversky:
        bank, prototypes = plans.similarity(network)
        calls = next(value.numel() // len(prototypes) for value in outputs if value.shape[-1] == len(prototypes))
        # A product with the features; of what they say, one of values and one of indicators with the table.
        operations += 2 * calls * (bank.numel() + 2 * len(bank) * len(prototypes))
        operations -= counts[f"{root}.{network.head}"]
    moved = weight_bytes(model, left, 1 if variant.int8 else 4) + sum(v.nbytes for v in [*inputs, *outputs])
    return Work(round(operations), round(moved), "int8" if variant.int8 else "float32")


def shares(network: Network) -> Mapping[str, float]:
    """What of each layer stays when the units of a ticket are gone, by path."""
    found: dict[str, float] = defaultdict(lambda: 1.0)
    for maker, (hidden, gone) in plans.removed(network).items():
        units = len(plans.rows(network.model.get_submodule(maker)))
        for path in [maker, *hidden.paths(maker, [*hidden.beside, *hidden.into])]:
            found[path] *= 1 - len(gone) / units
    return found


def weight_bytes(model: nn.Module, left: Mapping[str, float], size: int) -> float:
    """Matrices and kernels at `size` bytes a number, vectors in float32. Batch norms fold, and of a table of embeddings
    a call reads next to nothing, unless it is the head, too."""
    total, seen = 0.0, set()
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.BatchNorm2d):
            continue
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            numbers = parameter.numel()
            if isinstance(module, Similarity) and parameter is module.prototypes:
                numbers = len(module.bank) * len(module.prototypes)
            total += numbers * left.get(path, 1.0) * (size if parameter.ndim > 1 else 4)
    return total
