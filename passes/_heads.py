"""Tversky heads whose prototypes do not change: which are to run on integers, and the form that reads their measures.

Folding leaves heads for integers in this one form, which integers take the place of.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.inline import inline
from fxfreeze.kernels._tversky import Combination, combination, project, root
from fxfreeze.kernels.tversky import KERNEL
from fxfreeze.kernels.tversky_frozen import KERNEL as FROZEN
from fxfreeze.plan import Quantize, Step
from fxfreeze.program import Program

from ._adapters import addresses
from ._operators import arguments

_CONSTANT = ("features", "prototypes")
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


class Prototypes:
    """Frozen prototypes Π [P, d] of a bank Ω [K, d] as measures b = Π·Ωᵀ [P, K], and tables made of these."""

    def __init__(self, how: Combination, features: Tensor, prototypes: Tensor, *, normalize: bool) -> None:
        self.how, self.measures = how, project(prototypes, features, normalize)

    @cached_property
    def has_b(self) -> Tensor:
        return (self.measures > self.how.threshold).to(self.measures.dtype)

    @cached_property
    def b(self) -> Tensor:
        return self.measures * self.has_b

    @cached_property
    def total_b(self) -> Tensor:
        return self.b.sum(-1)

    @cached_property
    def root_b(self) -> Tensor:
        return root(self.b)

    def undecided(self, dtype: torch.dtype) -> int:
        """How many have a feature that `dtype` may find on the other side of the threshold."""
        margin = ROUNDINGS * torch.finfo(dtype).eps * self.measures.abs().amax(-1, keepdim=True)
        return int(((self.measures - self.how.threshold).abs() <= margin).any(-1).sum())


ROUNDINGS = 4
"""A measure is taken to be off by this many eps of its prototype's largest one."""


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
    if not _constant_heads(program):
        return program
    program = program.clone()
    for head in _constant_heads(program):
        constants = [program.add_constant(f"{head.name}.measured", value, dtype=value.dtype, before=head, like=head)
                     for value in _measures(program, head, known)]  # fmt: skip
        program.replace(head, read_measures(program, head, *constants))
    program.sweep()
    return program


def _constant_heads(program: Program) -> list[Node]:
    """Heads of which neither the bank nor the prototypes are computed in the graph."""
    heads = program.graph.find_nodes(op="call_function", target=KERNEL.op)
    return [head for head in heads if all(program.is_constant(arguments(head)[name]) for name in _CONSTANT)]


def _measures(program: Program, head: Node, known: dict[object, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    given, how = arguments(head), combination_of(head)
    constants = [given[name] for name in _CONSTANT]
    key = *(program.state.identity(str(node.target)) for node in constants), how, given["normalize"]
    if key not in known:
        frozen = Prototypes(how, *map(program.stored, constants), normalize=given["normalize"])
        known[key] = frozen.measures.T.contiguous(), frozen.total_b
    return known[key]
