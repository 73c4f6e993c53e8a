"""Fuse a linear layer whose weight is integers, and the hard gate behind it, into one kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch.fx import Node

from fxfreeze.kernels.gate import KERNEL as GATE
from fxfreeze.kernels.quantized_linear import KERNEL as FUSED
from fxfreeze.kernels.quantized_linear import pack
from fxfreeze.packed import Weight, constant_weight, has_form, operands
from fxfreeze.program import INTEGERS, Program
from fxfreeze.rewrite import Context, NodeRewrite, NoMatch, fail

from .._gates import tell_firing
from .._operators import arguments
from ._gated import gate_problem, most_rows, report_gate
from ._timing import medians

REQUESTED = "a gate behind a layer on integers"


@dataclass(frozen=True)
class Layer:
    """What the time of a gated layer hangs on; `rows`: see ``_gated.most_rows``."""

    rows: int
    inputs: int
    outputs: int
    groups: int
    halves: bool
    dtype: torch.dtype
    device: torch.device


Measure = Callable[[Layer], tuple[float, float]]
"""Seconds of the kernel with the gate in it, and of the kernel and one pass over its result."""


class FuseQuantizedGate(NodeRewrite):
    """gate(x·Wᵀ + b) becomes one ``fxfreeze::quantized_linear``, where W is dequantized from constants.

    As ``fuse-gated-linear``: on a GPU with nothing but the torch target asked for, which launches the kernel, and where
    that is faster. Nothing but the gate may read what the layer gives. One whose input is on integers, too, is left.
    """

    name, stage, targets = "fuse-quantized-gate", "fuse", (GATE.op,)
    devices: ClassVar[tuple[str, ...]] = ("cuda",)

    def __init__(self, measure: Measure | None = None) -> None:
        self.measure = measure or measured

    def missed(self, program: Program, miss: NoMatch, ctx: Context) -> None:
        report_gate(program, ctx, miss.node, REQUESTED, "skipped", executes=str(GATE.op), detail=miss.reason)

    def rewrite(self, program: Program, node: Node, ctx: Context) -> bool | NoMatch:
        if node.meta["val"].device.type not in self.devices or tuple(ctx.plan.targets) != ("torch",):
            return False
        given = arguments(node)
        layer = given["h"]
        weight = constant_weight(program, layer)
        if weight is None or not has_form(program, layer, weight, launches=True):
            return False
        if (reason := gate_problem(node, given)) is not None:
            return fail(reason, node)
        if set(layer.users) != {node}:
            return fail("the layer's result is read elsewhere, too", node)
        fused, apart = self.measure(_layer(layer, weight))
        said = f"{fused * 1e3:.3g} ms against {apart * 1e3:.3g}"
        if fused >= apart:
            return fail(f"one kernel is no faster: {said}", node)
        report_gate(program, ctx, node, REQUESTED, "rewritten", executes=str(FUSED.op),
                    detail=f"the layer on integers and the gate in one kernel: {said}")  # fmt: skip
        program.replace(node, build(program, node, given, weight))
        return True


def build(program: Program, gate: Node, given: dict[str, Any], weight: Weight) -> Node:
    """The operator with the gate in it, in front of `gate`; it counts as the quantized layer."""
    layer = given["h"]
    x, _, bias = operands(layer)
    constants = [
        program.add_constant(f"{weight.name}.{suffix}", value, before=layer, like=layer)
        for suffix, value in (("packed", weight.stored()), ("scale", weight.scale.contiguous()))
    ]
    how = {"score": given["score"]} if given["score"] != "h" else {}
    fused = program.call(
        FUSED.op, x, *constants, bias, given["threshold"], given["gain"], before=gate, like=layer, **how
    )
    if INTEGERS in layer.meta:
        fused.meta[INTEGERS] = layer.meta[INTEGERS]
    tell_firing(program, fused, gate, -1)
    return fused


def _layer(node: Node, weight: Weight) -> Layer:
    x, (outputs, inputs) = operands(node)[0].meta["val"], weight.values.shape
    return Layer(most_rows(x), inputs, outputs, weight.scale.shape[1], weight.halves, x.dtype, x.device)


@functools.cache
@torch.no_grad()
def measured(layer: Layer) -> tuple[float, float]:
    """On this machine; identical layers once per process."""
    how: dict[str, Any] = {"dtype": layer.dtype, "device": layer.device}
    x, scale = torch.randn(layer.rows, layer.inputs, **how), torch.rand(layer.outputs, layer.groups, **how)
    integers = torch.randint(-7, 8, (layer.outputs, layer.inputs), device=layer.device).to(torch.int8)
    weight = pack(integers) if layer.halves else integers
    threshold = torch.zeros(layer.outputs, device=layer.device)
    # A copy reads and writes the result once, as the kernel that a compiler makes of the gate does.
    times = medians({
        "fused": partial(FUSED.op, x, weight, scale, None, threshold, threshold),
        "apart": lambda: FUSED.op(x, weight, scale).clone(),
    }, layer.device)  # fmt: skip
    return times["fused"], times["apart"]
