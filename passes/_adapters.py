"""What inserting and folding an adapter must agree on: names, words for the ledger, and what an adapter means.

The parameter `lora_A` of the step `lora` at `layer1.0.conv1` is the constant ``adapters.lora.layer1.0.conv1.lora_A``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from fxfreeze.plan import (
    IA3,
    OFT,
    DoRA,
    Factorize,
    Gate,
    Head,
    LoRA,
    Prefix,
    Prompt,
    Prune,
    Quantize,
    Splice,
    Step,
    Tap,
    Tversky,
    VeRA,
)
from fxfreeze.program import ADAPTERS, FROZEN, SETTINGS
from fxfreeze.rotations import FLOOR, rotated, rotations

from ._operators import WeightOperator, apply

# What `Origin.primitive` says of a node: …
BASE = "BASE"
"""… the operator whose weight a site's steps change,"""
DELTA = "DELTA"
"""… everything they put around it,"""
HEAD = "HEAD"
"""… what takes the operator's place,"""
GATE = "GATE"
"""… a gate,"""
SELECTED = "SELECTED"
"""… what rows select, and add to the rest of their site,"""
SPLICE = "SPLICE"
"""… part of a module that was grafted,"""
TOKENS = "TOKENS"
"""… the parameters of trained tokens: what is computed of them hangs on constants alone, and folds as others do."""
MASK = "MASK"
"""… a mask of a parameter that no other step changes."""

DeltaStep = LoRA | DoRA | IA3 | VeRA | OFT
"""Steps that change the weight of one operator."""

WeightStep = DeltaStep | Prune
"""Those, and the one that says which entries of what they made are zero; it comes last at its site."""

MASKED = "_mask"
"""What the name of a mask ends with, behind the name of the parameter."""

NORM_FLOOR = FLOOR
"""DoRA divides by a norm no smaller than this: a row of zeros (a pruned output, say) stays a row of zeros."""


def parameter_name(step: Step, site: str, leaf: str) -> str:
    """Name of an adapter parameter in the program's state."""
    return ADAPTERS + ".".join(filter(None, (step.name, site, leaf)))


def mask_name(step: Prune, site: str, leaf: str) -> str:
    """Name of the mask of a parameter in the program's state."""
    return FROZEN + ".".join(filter(None, (step.name, site, leaf + MASKED)))


def split_name(name: str) -> tuple[str, str]:
    """The step and the leaf of the name of a parameter, or of what all sites of a step share."""
    for prefix in (ADAPTERS, SETTINGS, FROZEN):
        name = name.removeprefix(prefix)
    return name.partition(".")[0], name.rpartition(".")[2]


def addresses(step: Prune | Quantize, path: str) -> bool:
    """Whether `step` names the module at `path`, and excludes neither it nor one around it."""
    parts = path.split(".")
    around = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
    excluded = any(fnmatchcase(outer, glob) for outer in around for glob in step.excluded)
    return not excluded and any(fnmatchcase(path, glob) for glob in step.patterns)


def is_pruned(steps: Iterable[Step], path: str) -> bool:
    """Whether the weight at `path` may get a mask, so that it must be one tensor in the graph."""
    return any(isinstance(step, Prune) and addresses(step, path) for step in steps)


def describe(step: Step) -> str:
    """The step in a few words."""
    if isinstance(step, LoRA | DoRA):
        adapters = f", {step.adapters} adapters by {step.select!r}" if isinstance(step, LoRA) and step.adapters else ""
        return f"{type(step).__name__} rank {step.rank}, scale {step.scale:g}{adapters}"
    if isinstance(step, VeRA):
        return f"VeRA rank {step.rank}"
    if isinstance(step, OFT):
        return f"OFT in blocks of {step.block_size}{', one for all' if step.share else ''}"
    if isinstance(step, Tversky):
        return f"Tversky {step.model}, {step.intersection}, {step.difference}, {step.semantics}"
    if isinstance(step, Gate):
        modes = "" if step.modes is None else f", {step.modes} modes by {step.select!r}"
        return f"gate on {'|h|' if step.s == 'abs' else 'h'} of the {step.on}{modes}"
    if isinstance(step, Splice | Head):
        name = step.module if isinstance(step.module, str) else type(step.module).__name__
        return f"{name} as a head" if isinstance(step, Head) else f"{name}: {step.how} {step.on}"
    if isinstance(step, Tap):
        return "tap while it trains"
    if isinstance(step, Factorize):
        return f"factors of {f'rank {step.rank}' if step.rank else 'the smallest rank'}, {step.agreement:.2%} agreement"
    if isinstance(step, Quantize):
        mode = f", {step.mode}" if step.scheme == "int8" else ""
        return f"{step.scheme}{mode}, one scale per {step.granularity}"
    if isinstance(step, Prompt | Prefix):
        words = (
            f"a prompt of {step.tokens} vectors" if isinstance(step, Prompt) else f"a prefix of {step.tokens} tokens"
        )
        return words + (f", hidden {step.hidden}" if isinstance(step, Prefix) and step.hidden else "")
    if isinstance(step, Prune):
        return _pruning(step) + (", the others train" if step.train else "")
    return f"IA3 on the {step.side}put" if isinstance(step, IA3) else type(step).__name__


def _pruning(step: Prune) -> str:
    if step.method == "mask":
        return f"prune by {step.mask}"
    if step.method == "nm":
        return f"prune to {step.n}:{step.m}"
    share = f"{100 * float((step.density if step.flops is None else step.flops) or 0):.4g}% of "
    each = " of every layer" if step.scope == "layer" else ""
    if step.method == "channel":
        rounded = f", in multiples of {step.multiple}" if step.multiple > 1 else ""
        kept = "the multiply-accumulates" if step.density is None else "the channels"
        return f"prune to {share}{kept}{each}, by {step.criterion}{rounded}"
    tile = f"tiles of {step.block[0]}×{step.block[1]}" if step.method == "block" else "weights"
    return f"prune to {share}the {tile}{each}"


def masked(value: Tensor, mask: Tensor) -> Tensor:
    """Zero where `mask` is False, whatever `value` holds there."""
    return torch.where(mask, value, 0.0)


def changed(
    step: WeightStep, operator: WeightOperator, weight: Tensor, bias: Tensor | None, values: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """What `step` makes of a layer: the canonical weight ``[out, in / groups, *kernel]`` and the bias after it.

    Args:
        values: the step's parameters by leaf name, in the dtype of `weight`; masks are bools, in the stored layout.
    """
    rows, bias = operator.per_row(), None if bias is None else changed_bias(step, bias, values)
    if isinstance(step, Prune):
        mask = values.get(f"weight{MASKED}")
        return weight if mask is None else masked(weight, apply(operator.to_canonical(), mask)), bias
    if isinstance(step, IA3):
        gain = values["ia3"]
        if step.side == "out":
            return weight * gain.reshape(rows), bias
        out, inner, *kernel = operator.shape
        columns = gain.reshape(operator.groups, 1, inner).expand(-1, out // operator.groups, -1)
        return weight * columns.reshape(out, inner, *[1] * len(kernel)), bias
    if isinstance(step, OFT):
        return turned(step, operator, weight, values["oft_R"]), bias
    if isinstance(step, VeRA):
        a, b = projections(operator, values["vera_A"], values["vera_B"])
        delta = (values["lambda_b"].unsqueeze(1) * b) @ (values["lambda_d"].unsqueeze(1) * a)
        return weight + delta.reshape(operator.shape), bias
    delta = values["lora_B"].flatten(1) @ values["lora_A"].flatten(1)
    weight = weight + step.scale * delta.reshape(operator.shape)
    if isinstance(step, DoRA):
        norm = weight.flatten(1).norm(dim=1).clamp_min(NORM_FLOOR)
        weight = weight * (values["lora_magnitude"] / norm).reshape(rows)
    return weight, bias


def changed_bias(step: WeightStep, bias: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """What `step` makes of a layer's bias."""
    if isinstance(step, Prune):
        return masked(bias, values[f"bias{MASKED}"]) if f"bias{MASKED}" in values else bias
    if isinstance(step, IA3) and step.side == "out":
        return bias * values["ia3"]
    return bias + step.scale * values["lora_bias"] if isinstance(step, LoRA) and step.bias else bias


def projections(operator: WeightOperator, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer takes of VeRA's shared matrices: ``[r, in · kernel]`` and ``[out, r]``."""
    return a[:, : math.prod(operator.shape[1:])], b[: operator.out_features]


def blocks(step: OFT, vectors: Tensor) -> Tensor:
    """The blocks of the step's R, from its parameter."""
    return rotations(vectors, step.block_size, eps=step.eps if step.coft else None, terms=step.terms)


def turned(step: OFT, operator: WeightOperator, weight: Tensor, vectors: Tensor) -> Tensor:
    """The canonical weight of a layer whose inputs, or outputs if it is an embedding, are rotated by R first."""
    if operator.kind == "embedding":
        return rotated(weight.T, blocks(step, vectors)).T
    turns = blocks(step, vectors).transpose(1, 2)
    out, groups = operator.out_features, operator.groups
    if not step.share and groups > 1:  # a row sees the features of its group only, and so their blocks
        turns = turns.unflatten(0, (groups, 1, -1)).expand(-1, out // groups, -1, -1, -1).flatten(0, 1)
    parts = weight.reshape(out, -1, 1, step.block_size)
    return (parts @ turns).reshape(operator.shape)


def misfit(step: DeltaStep, operator: WeightOperator) -> str | None:
    """Why `step` cannot act on a layer that other steps can, in a sentence without a subject."""
    if isinstance(step, LoRA) and step.bias and operator.bias is None:
        return "has no bias that B's could be added to"
    if not isinstance(step, OFT):
        return None
    if math.prod(operator.kernel) > 1:
        window = "×".join(map(str, operator.kernel))
        return f"has a window of {window}, and what OFT does to the patches under it is no convolution"
    features = operator.out_features if operator.kind == "embedding" else operator.in_features
    share = operator.groups if operator.kernel else 1
    if features // share % step.block_size:
        of = f"{features // share} features" + (" in a group" if share > 1 else "")
        return f"has {of}, which blocks of {step.block_size} do not divide"
    return None
