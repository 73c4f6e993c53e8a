"""Fuse a linear layer, its activation and a hard gate into one kernel, with the up projection that they multiply."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.functional import linear

from fxfreeze.kernels.gate import KERNEL as GATE
from fxfreeze.kernels.gated_linear import KERNEL as FUSED
from fxfreeze.program import Program
from fxfreeze.rewrite import Context, NodeRewrite, NoMatch, fail

from .._gates import tell_firing
from .._operators import WeightOperator, arguments, constant_problem, weight_operator
from ._gated import gate_problem, most_rows, report_gate
from ._timing import medians

aten = torch.ops.aten

ACTIVATIONS = {
    (aten.relu.default, None): "relu",
    (aten.silu.default, None): "silu",
    (aten.gelu.default, "none"): "gelu",
    (aten.gelu.default, "tanh"): "gelu_tanh",
}
"""Operator and its approximation → what ``fxfreeze::gated_linear`` calls it."""


@dataclass(frozen=True)
class Layer:
    """What the time of a gated layer hangs on; `rows`: see ``_gated.most_rows``."""

    rows: int
    inputs: int
    outputs: int
    activation: str
    up: bool
    dtype: torch.dtype
    device: torch.device


REQUESTED = "a gate behind a linear layer"

Measure = Callable[[Layer], tuple[float, float]]
"""Seconds of the one kernel, and of what it takes the place of."""


class FuseGatedLinear(NodeRewrite):
    """gate(act(x·Wᵀ + b)), and gate(act(x·Wᵀ + b)) ⊙ (x·Uᵀ + c), become one ``fxfreeze::gated_linear``.

    W, b, U and c are constants, and nothing else reads what is in between. In half precision that is no longer rounded.

    Only where the kernel runs: on a GPU, with nothing but the torch target asked for, which launches it. In the graph
    of another target the operator would become its reference, and on a CPU Inductor's epilogue of MKL's product is as
    good. There it is timed, at the layer's size, against cuBLAS and one pass over the result, which is what a compiler
    makes of the rest; where that is as fast, it stays. A normalization in front stays in any case: beside other readers
    nothing would be saved, and the kernel's own statistics are not known to be faster.
    """

    name, stage, targets = "fuse-gated-linear", "fuse", (GATE.op,)
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    """Types of device where it pays; HIP's is "cuda", too."""

    def __init__(self, measure: Measure | None = None) -> None:
        self.measure = measure or measured

    def missed(self, program: Program, miss: NoMatch, ctx: Context) -> None:
        report_gate(program, ctx, miss.node, REQUESTED, "skipped", executes=str(GATE.op), detail=miss.reason)

    def rewrite(self, program: Program, node: Node, ctx: Context) -> bool | NoMatch:
        if node.meta["val"].device.type not in self.devices or tuple(ctx.plan.targets) != ("torch",):
            return False
        found = match(program, node)
        if isinstance(found, NoMatch):
            return found
        fused, apart = self.measure(_layer(found))
        said = f"{fused * 1e3:.3g} ms against {apart * 1e3:.3g}"
        if fused >= apart:
            return fail(f"one kernel is no faster: {said}", node)
        report_gate(program, ctx, node, REQUESTED, "rewritten", executes=str(FUSED.op), detail=f"{found.says}: {said}")
        program.replace(found.last, build(program, found))
        return True


def _layer(found: GatedLinear) -> Layer:
    x, shape = found.linear.input.meta["val"], found.linear.shape
    return Layer(most_rows(x), shape[1], shape[0], found.activation, found.up is not None, x.dtype, x.device)


@functools.cache
@torch.no_grad()
def measured(layer: Layer) -> tuple[float, float]:
    """On this machine; identical layers once per process."""
    how: dict[str, Any] = {"dtype": layer.dtype, "device": layer.device}
    x, weight = torch.randn(layer.rows, layer.inputs, **how), torch.randn(layer.outputs, layer.inputs, **how)
    bias, threshold = torch.randn(layer.outputs, **how), torch.zeros(layer.outputs, device=layer.device)
    up = (weight.flip(0).contiguous(), bias) if layer.up else (None, None)

    def apart() -> Tensor:
        # A copy reads and writes the result once, as the kernel that a compiler makes of the rest does.
        return (linear(x, weight, bias) * linear(x, *up)) if layer.up else linear(x, weight, bias).clone()

    fused = partial(FUSED.op, x, weight, bias, threshold, None, *up, activation=layer.activation)
    times = medians({"fused": fused, "apart": apart}, layer.device)
    return times["fused"], times["apart"]


@dataclass(frozen=True)
class GatedLinear:
    """What is fused.

    Attributes:
        gate: the gate.
        linear: the layer before it.
        activation: between the two; a name of ``kernels/gated_linear.py``.
        up: the layer that the gate's result is multiplied by.
        last: the node whose value the fused operator has: the product with `up`, else the gate.
    """

    gate: Node
    linear: WeightOperator
    activation: str
    up: WeightOperator | None
    last: Node

    @property
    def says(self) -> str:
        parts = ["the linear layer", *[self.activation] * (self.activation != "none"), "the gate"]
        parts += ["the up projection"] * (self.up is not None)
        return f"{', '.join(parts[:-1])} and {parts[-1]} in one kernel"


def match(program: Program, gate: Node) -> GatedLinear | NoMatch:
    """What is to be fused with `gate`, or why nothing is."""
    given = arguments(gate)
    if (reason := gate_problem(gate, given)) is not None:
        return fail(reason, gate)
    behind, activation = given["h"], _activation(given["h"])
    if activation != "none":
        if set(behind.users) != {gate}:
            return fail(f"what {behind.target} makes is read elsewhere, too", gate)
        behind = behind.args[0]
    linear = _linear(program, behind)
    if isinstance(linear, NoMatch):
        return fail(linear.reason, gate)
    product, up = _up(program, gate, linear)
    return GatedLinear(gate, linear, activation, up, product)


def _activation(node: Node) -> str:
    if node.op != "call_function" or node.target not in {target for target, _ in ACTIVATIONS}:
        return "none"
    return ACTIVATIONS[node.target, arguments(node).get("approximate")]


def _linear(program: Program, node: Node) -> WeightOperator | NoMatch:
    """`node` as a linear layer of constants that one node reads."""
    if node.target is not aten.linear.default:
        return fail(f"{node.target} is no linear layer", node)
    operator = weight_operator(node)
    if isinstance(operator, NoMatch):
        return operator
    if (problem := constant_problem(program, operator)) is not None:
        return problem
    return operator if len(node.users) == 1 else fail("the linear layer's result is read elsewhere, too", node)


def _up(program: Program, gate: Node, linear: WeightOperator) -> tuple[Node, WeightOperator | None]:
    """The product of `gate` with another layer of the same input, and that layer; else `gate` itself, and None."""
    product = next(iter(gate.users))
    if len(gate.users) > 1 or product.target is not aten.mul.Tensor:
        return gate, None
    other = product.args[1] if product.args[0] is gate else product.args[0]
    if not isinstance(other, Node):
        return gate, None
    up = _linear(program, other)
    # An up projection to one feature would be broadcast.
    if isinstance(up, NoMatch) or up.input is not linear.input or up.shape != linear.shape:
        return gate, None
    return product, up


def build(program: Program, found: GatedLinear) -> Node:
    """The fused operator in front of ``found.last``."""
    given, linear, up = arguments(found.gate), found.linear, found.up
    operands = [linear.input, linear.weight, linear.bias, given["threshold"], given["gain"]]
    operands += [] if up is None else [up.weight, up.bias]
    while operands[-1] is None:
        operands.pop()
    # As export writes calls: without defaults.
    how = {"activation": found.activation} if found.activation != "none" else {}
    how |= {"score": given["score"]} if given["score"] != "h" else {}
    fused = program.call(FUSED.op, *operands, before=found.last, like=found.gate, **how)
    tell_firing(program, fused, found.gate, -1)
    return fused
