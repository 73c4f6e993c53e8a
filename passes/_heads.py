"""Which Tversky heads are to run on integers: folding leaves these in the one form that integers take the place of."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from fxfreeze.plan import Quantize, Step
from fxfreeze.program import Program

from ._adapters import addresses


def is_static(step: Quantize) -> bool:
    """Whether `step` wants integers on grids that the calibration data give."""
    return step.scheme == "int8" and step.mode == "static"


def integer_step(program: Program, head: Node, steps: Iterable[Step]) -> Quantize | None:
    """The step that wants `head`, a Tversky similarity, on integers: the last that names it, if that is static."""
    path = program.module_path(head)
    named = [step for step in steps if isinstance(step, Quantize) and addresses(step, path)]
    return named[-1] if named and is_static(named[-1]) else None
