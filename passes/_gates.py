"""Calls of ``fxfreeze::gate`` that are hard and whose numbers are known."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from fxfreeze.kernels.gate import KERNEL
from fxfreeze.program import FIRES, GATE_FACTS, Origin, Program
from fxfreeze.rewrite import NoMatch, fail

from ._operators import arguments

GATE = KERNEL.op


@dataclass(frozen=True)
class HardGate:
    """One call of the operator, without a temperature.

    Attributes:
        node: the call.
        value: h, what is gated.
        threshold, gain: ``get_attr`` nodes, [C], or [modes, C] with `mode`.
        mode: which of their rows is read, or None.
        score: "h" or "abs".
        dim: the neurons' dim, counted from the end.
    """

    node: Node
    value: Node
    threshold: Node
    gain: Node | None
    mode: Node | None
    score: str
    dim: int


def tell_firing(program: Program, node: Node, gate: Node, dim: int) -> None:
    """Let `node`, which knows which neurons of `gate` fire, be where :mod:`fxfreeze.firing` looks for them."""
    origin = gate.meta.get("fxfreeze") or Origin("", "", program.module_path(gate))
    node.meta["fxfreeze"] = Origin(origin.step, FIRES, origin.site, origin.call)
    node.meta.update({key: gate.meta[key] for key in GATE_FACTS if key in gate.meta}, dim=dim)


def hard_gate(program: Program, node: Node) -> HardGate | NoMatch:
    """Read `node` as a hard gate with constant thresholds and gains; the reason where it is none."""
    if node.target is not GATE:
        return fail(f"{node.target} is no gate", node)
    given = arguments(node)
    if given["temperature"] is not None:
        return fail("the gate is soft", node)
    for name in ("threshold", "gain"):
        if given[name] is not None and not program.is_constant(given[name]):
            return fail(f"its {name} is not a parameter but computed by {given[name].target}", node)
    ndim = node.meta["val"].ndim
    dim = given["dim"] % ndim - ndim
    return HardGate(node, given["h"], given["threshold"], given["gain"], given["mode"], given["score"], dim)
