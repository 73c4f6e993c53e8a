"""What passes share that fuse a hard gate into the layer in front of it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from fxfreeze.kernels._op import at_most
from fxfreeze.program import Origin, Program
from fxfreeze.rewrite import Context, Outcome

ROWS = 2048
"""More rows take more time in the same proportion."""


def gate_problem(gate: Node, given: dict[str, Any]) -> str | None:
    """Why a kernel cannot take the gate with these arguments, or None."""
    value, threshold = gate.meta["val"], given["threshold"].meta["val"].dtype
    if given["temperature"] is not None:
        return "it is soft"
    if given["mode"] is not None:
        return "its thresholds differ from row to row"
    if given["dim"] not in (-1, value.dim() - 1):
        return f"its neurons lie along dim {given['dim']}, not along the last"
    if value.dtype == torch.float64 or threshold != torch.float32:
        return f"the kernel takes no {threshold} threshold beside {value.dtype}"
    return None


def most_rows(x: torch.Tensor) -> int:
    """The most rows that `x` [..., in] may have, rounded up to a power of two, up to :data:`ROWS`."""
    count = math.prod(x.shape[:-1])
    return next((size for size in (2**power for power in range(ROWS.bit_length())) if at_most(count, size)), ROWS)


def report_gate(
    program: Program, ctx: Context, gate: Node, requested: str, outcome: Outcome, *, executes: str, detail: str
) -> None:
    """A row in the ledger at the gate's site."""
    origin = gate.meta.get("fxfreeze")
    step, site = (origin.step, origin.site) if isinstance(origin, Origin) else ("", program.module_path(gate))
    ctx.ledger.add(site=site, step=step, requested=requested, outcome=outcome, executes=executes, detail=detail)
