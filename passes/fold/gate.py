"""Take hard gates apart: what cannot shut goes, and a gain becomes a product that the weights can take over."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fxfreeze.dataflow import passage
from fxfreeze.program import Origin, Program
from fxfreeze.rewrite import Context, NodeRewrite, NoMatch, fail

from .._gates import GATE, HardGate, hard_gate
from .._operators import arguments

aten = torch.ops.aten

NONNEGATIVE = frozenset({
    aten.relu.default, aten.relu6.default, aten.sigmoid.default, aten.hardsigmoid.default,
    aten.abs.default, aten.square.default, aten.exp.default, aten.softmax.int, aten._softmax.default,
})  # fmt: skip
"""Operators whose result is never below 0, whatever goes in."""
FLOORS: dict[Any, str] = {aten.hardtanh.default: "min_val", aten.clamp.default: "min", aten.clamp_min.default: "min"}
"""Operators that do not go below a number, and the name of the argument that holds it."""


class FoldGate(NodeRewrite):
    """A hard gate whose thresholds are all at or below 0 is the identity where its score cannot be negative.

    The score is \\|h\\|, or h itself where its producer makes it ≥ 0 (ReLU, sigmoid, softmax, …): what the gate still
    shuts is 0 anyhow. Its gain is left over as a product.

    Of a gate that can shut, the gain becomes a product behind it: g ⊙ h ⊙ 1[s(h) > τ] = g ⊙ (h ⊙ 1[s(h) > τ]), so that
    a fold can take it into the weights around it. A gain per mode stays, for no weight has a row per mode.
    """

    name, stage, targets = "fold-gate", "fold", (GATE,)

    def rewrite(self, program: Program, node: Node, ctx: Context) -> bool | NoMatch:
        gate = hard_gate(program, node)
        if isinstance(gate, NoMatch):
            return gate
        idle = cannot_matter(program, gate)
        if gate.gain is not None and gate.mode is not None:
            return fail("its gain differs between modes", node) if idle else False
        if gate.gain is not None and gate.gain.meta["val"].dtype != node.meta["val"].dtype:
            kinds = f"{gate.gain.meta['val'].dtype} and h {node.meta['val'].dtype}"
            return fail(f"its gain is {kinds}: a product would be rounded before it is folded", node)
        if not idle and gate.gain is None:
            return False
        if gate.gain is not None:
            _split(program, gate)
        if idle:
            _report(program, ctx, gate)
            program.replace(node, gate.value)
        return True


def cannot_matter(program: Program, gate: HardGate) -> bool:
    """Whether the gate is the identity (apart from its gain) for every finite h that can reach it."""
    levels = program.constant64(gate.threshold)
    assert levels is not None
    return bool((levels <= 0).all()) and (gate.score == "abs" or is_nonnegative(program, gate.value))


def is_nonnegative(program: Program, value: Node) -> bool:
    """Whether `value` is ≥ 0 by its producer, seen through operators that make nothing negative of what is not."""
    while value.op == "call_function":
        if value.target in NONNEGATIVE or _floor(value) >= 0 or _is_softplus(value):
            return True
        if value.target is GATE:
            gate = hard_gate(program, value)
            if isinstance(gate, NoMatch) or gate.gain is not None:
                return False
            levels = program.constant64(gate.threshold)
            if gate.score == "h" and levels is not None and bool((levels >= 0).all()):
                return True
            value = gate.value
        elif passage(value) is not None:  # a leaky ReLU, too, is the identity on what is ≥ 0
            value = value.args[0]  # type: ignore[assignment]
        else:
            return False
    return False


def _floor(node: Node) -> float:
    """What the result of an operator in :data:`FLOORS` is never below; −∞ for others."""
    if node.target not in FLOORS:
        return float("-inf")
    given = arguments(node)
    low, high = given[FLOORS[node.target]], given.get("max")
    # clamp(min=0, max=-1) is −1 everywhere.
    bounds = [low, float("inf") if high is None else high]
    return min(bounds) if all(type(item) in (int, float) for item in bounds) else float("-inf")


def _is_softplus(node: Node) -> bool:
    """Whether it is one that is never negative: with β < 0 it is never positive, and above its threshold it is x."""
    if node.target is not aten.softplus.default:
        return False
    given = arguments(node)
    return bool(given["beta"] > 0 and given["threshold"] >= 0)


def _split(program: Program, gate: HardGate) -> None:
    """The gain as a product behind the gate, which keeps its node: it is what a report calls by its site."""
    node, gain = gate.node, gate.gain
    assert gain is not None
    value = program.constant64(gain)
    assert value is not None
    node.args = (gate.value, gate.threshold)
    node.kwargs = {"score": gate.score, "dim": gate.dim}
    if bool((value == 1).all()):
        return
    along = value.reshape([-1] + [1] * (-gate.dim - 1))
    constant = program.add_constant(str(gain.target), along, dtype=gain.meta["val"].dtype, before=node, like=node)
    product = program.call(aten.mul.Tensor, node, constant, before=node.next, like=node)
    for item in (constant, product):
        item.meta.pop("fxfreeze", None)  # the gate is the step's, and there is one of it
    program.replace(node, product)


def _report(program: Program, ctx: Context, gate: HardGate) -> None:
    origin = gate.node.meta.get("fxfreeze")
    step, site = (origin.step, origin.site) if isinstance(origin, Origin) else ("", program.module_path(gate.node))
    score = "the magnitude of a value" if gate.score == "abs" else "a value that is never negative"
    ctx.ledger.add(
        site=site, step=step, requested="gate", outcome="rewritten", executes="nothing",
        detail=f"no threshold is above 0, and its score is {score}: it is the identity",
    )  # fmt: skip
