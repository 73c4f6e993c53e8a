"""Tversky heads whose prototypes do not change: which are to run on integers, and the form that reads their measures.

Folding leaves heads for integers in this one form, which integers take the place of.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.inline import inline
from fxfreeze.kernels._tversky import Combination, combination, project
from fxfreeze.kernels.tversky import KERNEL
from fxfreeze.kernels.tversky_frozen import KERNEL as FROZEN
from fxfreeze.plan import Quantize, Step
from fxfreeze.program import Program

from ._adapters import addresses
from ._operators import arguments

_HOW = ("model", "intersection", "difference", "semantics", "threshold")


def is_static(step: Quantize) -> bool:
    """Whether `step` wants integers on grids that the calibration data give."""
    return step.scheme == "int8" and step.mode == "static"


def integer_step(program: Program, head: Node, steps: Iterable[Step]) -> Quantize | None:
    """The step that wants `head`, a Tversky similarity, on integers: the last that names it, if that is static."""
    path = program.module_path(head)
    named = [step for step in steps if isinstance(step, Quantize) and addresses(step, path)]
    return named[-1] if named and is_static(named[-1]) else None


def combination_of(head: Node) -> Combination:
    """Which of the Tversky similarities a node computes, whatever form it has."""
    given = arguments(head)
    return combination(*(given[key] for key in _HOW))


def read_measures(program: Program, head: Node, measures: Node, totals: Node) -> Node:
    """Operators in front of `head`, ``fxfreeze::tversky``, that give the same; the node of the result.

    Args:
        measures: Ω·Πᵀ of the prototypes [K, P], in the dtype that the head computes in.
        totals: sums over those that are present [P].
    """
    given = arguments(head)
    kinds = {key: given[key] for key in _HOW}

    def function(x: Tensor, bank: Tensor, *rest: Tensor) -> Tensor:
        return FROZEN.op(project(x, bank, given["normalize"]), *rest, **kinds, dtype=x.dtype)

    weights = (given[name] for name in ("theta", "alpha", "beta"))
    return inline(program, function, given["x"], given["features"], measures, totals, *weights, before=head, like=head)


@torch.no_grad()
def measured_heads(*programs: Program) -> list[Program]:
    """Copies in which heads read measures of constant prototypes, computed now, once for all, and not in every run.

    For runs over calibration data before heads are folded; in the programs' own dtypes. Where there is no such head, it
    is the program itself.
    """
    known: dict[object, tuple[Tensor, Tensor]] = {}
    return [_measured(program, known) for program in programs]


def _measured(program: Program, known: dict[object, tuple[Tensor, Tensor]]) -> Program:
    if not any(_is_constant(program, head) for head in program.graph.find_nodes(op="call_function", target=KERNEL.op)):
        return program
    program = program.clone()
    for head in program.graph.find_nodes(op="call_function", target=KERNEL.op):
        if _is_constant(program, head):
            constants = [program.add_constant(f"{head.name}.measured", value, dtype=value.dtype, before=head, like=head)
                         for value in _measures(program, head, known)]  # fmt: skip
            program.replace(head, read_measures(program, head, *constants))
    program.sweep()
    return program


def _is_constant(program: Program, head: Node) -> bool:
    given = arguments(head)
    return program.is_constant(given["features"]) and program.is_constant(given["prototypes"])


def _measures(program: Program, head: Node, known: dict[object, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    given = arguments(head)
    bank, prototypes, normalize, threshold = (
        given[name] for name in ("features", "prototypes", "normalize", "threshold")
    )
    key = *(program.state.identity(str(node.target)) for node in (bank, prototypes)), normalize, threshold
    if key not in known:
        measures = project(program.stored(prototypes), program.stored(bank), normalize).T.contiguous()
        known[key] = measures, (measures * (measures > threshold)).sum(0)
    return known[key]
