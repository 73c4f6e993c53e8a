"""What inserting and folding an adapter must agree on: names, words for the ledger, and what an adapter means.

The parameter `lora_A` of the step `lora` at `layer1.0.conv1` is the constant ``adapters.lora.layer1.0.conv1.lora_A``.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fxfreeze.plan import IA3, DoRA, Gate, Head, LoRA, Prefix, Prompt, Splice, Step, Tap, Tversky
from fxfreeze.program import ADAPTERS

from ._operators import WeightOperator

# What `Origin.primitive` says of a node: …
BASE = "BASE"
"""… the operator whose weight a site's steps change,"""
DELTA = "DELTA"
"""… everything they put around it,"""
HEAD = "HEAD"
"""… what takes the operator's place,"""
GATE = "GATE"
"""… a gate,"""
SPLICE = "SPLICE"
"""… part of a module that was grafted,"""
TOKENS = "TOKENS"
"""… the parameters of trained tokens: what is computed of them hangs on constants alone, and folds as others do."""

DeltaStep = LoRA | DoRA | IA3
"""Steps that change the weight of one operator."""

NORM_FLOOR = 1e-30
"""DoRA divides by a norm no smaller than this: a row of zeros (a pruned output, say) stays a row of zeros."""


def parameter_name(step: Step, site: str, leaf: str) -> str:
    """Name of an adapter parameter in the program's state."""
    return f"{ADAPTERS}{step.name}.{site}.{leaf}"


def split_name(name: str) -> tuple[str, str]:
    """The step and the leaf of a parameter name."""
    return name.removeprefix(ADAPTERS).partition(".")[0], name.rpartition(".")[2]


def describe(step: Step) -> str:
    """The step in a few words."""
    if isinstance(step, LoRA | DoRA):
        return f"{type(step).__name__} rank {step.rank}, scale {step.scale:g}"
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
    if isinstance(step, Prompt | Prefix):
        words = (
            f"a prompt of {step.tokens} vectors" if isinstance(step, Prompt) else f"a prefix of {step.tokens} tokens"
        )
        return words + (f", hidden {step.hidden}" if isinstance(step, Prefix) and step.hidden else "")
    return f"IA3 on the {step.side}put" if isinstance(step, IA3) else type(step).__name__


def changed(
    step: DeltaStep, operator: WeightOperator, weight: Tensor, bias: Tensor | None, values: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """What `step` makes of a layer: the canonical weight ``[out, in / groups, *kernel]`` and the bias after it.

    Args:
        values: the step's parameters by leaf name, in the dtype of `weight`.
    """
    rows = operator.per_row()
    if isinstance(step, IA3):
        gain = values["ia3"]
        if step.side == "out":
            return weight * gain.reshape(rows), None if bias is None else bias * gain
        out, inner, *kernel = operator.shape
        columns = gain.reshape(operator.groups, 1, inner).expand(-1, out // operator.groups, -1)
        return weight * columns.reshape(out, inner, *[1] * len(kernel)), bias
    delta = values["lora_B"].flatten(1) @ values["lora_A"].flatten(1)
    weight = weight + step.scale * delta.reshape(operator.shape)
    if isinstance(step, DoRA):
        norm = weight.flatten(1).norm(dim=1).clamp_min(NORM_FLOOR)
        weight = weight * (values["lora_magnitude"] / norm).reshape(rows)
    return weight, bias
