"""Equivalence of programs: algebra apart from rounding.

An exact pass must leave the function unchanged in real arithmetic. The proof runs the program before and after it with
every float lifted to float64 (complex to complex128), where rounding is near 1e-16, and demands a relative error of at
most 1e-10: far above what rounding explains, far below what a wrong rewrite causes. It is a test on drawn inputs, not
a derivation, but it is a test of the whole function at the model's own weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from .constants import lift
from .errors import FxfreezeError, ProofError
from .memory import return_free_memory
from .program import Program, first_line, lifted_call

TOLERANCE = 1e-10
MASK = 1e8
"""Numbers of this size and more stand for ∞."""

Verify = Literal["full", "sampled", "off"]


@dataclass(frozen=True)
class ProofRow:
    """One verdict: which pass, exact or lossy, the largest relative error over outputs and draws, and the bound."""

    pass_name: str
    exact: bool
    error: float
    tolerance: float | None
    draws: int
    outputs: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def lifted_run(program: Program, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Run `program` with every floating tensor and dtype argument in float64; random operators draw from seed 0.

    Args:
        inputs: flat tensors in the program's own dtypes.

    Returns:
        The flat outputs, floating ones in float64, complex ones in complex128.
    """
    devices = sorted({value.device.index or 0 for value in inputs if value.is_cuda})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        return program.execute(
            [lift(value) for value in inputs], lambda node: lift(program.state[str(node.target)]), lifted_call
        )


def checked_run(program: Program, inputs: Sequence[torch.Tensor], when: str) -> tuple[torch.Tensor, ...]:
    """As :func:`lifted_run`, and what memory it used is given back.

    Raises:
        ProofError: the program does not run in float64; says that it is the one after the pass `when`.
    """
    try:
        return lifted_run(program, inputs)
    except FxfreezeError:
        raise
    except Exception as error:
        raise ProofError(
            f"the program does not run in float64 after {when!r}: {first_line(error)}",
            where=when, hint="pass example_inputs the model accepts; verify='off' compiles without proofs",
        ) from error  # fmt: skip
    finally:
        return_free_memory()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max|actual − expected| / max|expected|; 0 for equal tensors, inf where NaN, Inf, shape or dtype kind disagree.

    Integers and bools: the share of elements that differ. Numbers that stand for −∞ (a mask of −1e9, say) are compared
    among themselves: beside them no other difference would count.
    """
    if actual.shape != expected.shape or actual.is_floating_point() != expected.is_floating_point():
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    if not (expected.is_floating_point() or expected.is_complex()):
        return float((actual != expected).double().mean())
    actual, expected = lift(actual), lift(expected)
    finite = torch.isfinite(expected)
    if not bool(finite.all()):
        odd_equal = (actual == expected) | (actual.isnan() & expected.isnan())
        if not bool((odd_equal | finite).all()) or not bool((torch.isfinite(actual) | ~finite).all()):
            return float("inf")
        actual, expected = actual[finite], expected[finite]
        if expected.numel() == 0:
            return 0.0
    size = expected.abs()
    masked = size >= MASK
    if bool(masked.any()) and not bool(masked.all()) and float(size[~masked].max()) < 1e-5 * float(size[masked].min()):
        return max(_gap(actual[part], expected[part]) for part in (masked, ~masked))
    return _gap(actual, expected)


def _gap(actual: torch.Tensor, expected: torch.Tensor) -> float:
    gap, scale = float((actual - expected).abs().max()), float(expected.abs().max())
    if gap != gap:
        return float("inf")
    return 0.0 if gap == 0 else gap / scale if scale > 0 else float("inf")


class Prover:
    """Compares a program with itself as passes rewrite it, on the same drawn inputs throughout.

    The outputs of the last accepted state are kept, so every pass costs one lifted run per draw.

    Args:
        program: the program before the first pass.
        draws: lists of flat inputs; an empty sequence turns the prover off.
    """

    def __init__(self, program: Program, draws: Sequence[Sequence[torch.Tensor]]) -> None:
        self.draws = [list(draw) for draw in draws]
        self.names = program.outputs
        self.rows: list[ProofRow] = []
        self.truth = [checked_run(program, draw, "capture") for draw in self.draws]
        self._refuse_vacuous()

    def accept(self, pass_name: str, program: Program, *, exact: bool) -> ProofRow | None:
        """Compare `program` with its last accepted state and make it the new one.

        Raises:
            ProofError: an exact pass moved an output by more than the tolerance; names pass, output and error.
        """
        if not self.draws:
            return None
        after = [checked_run(program, draw, pass_name) for draw in self.draws]
        worst, worst_name = 0.0, ""
        for now, before in zip(after, self.truth, strict=True):
            for name, actual, expected in zip(self.names, now, before, strict=exact):
                if not exact and actual.shape != expected.shape:
                    continue  # a head of another size: nothing to compare
                error = relative_error(actual, expected)
                if error > worst:
                    worst, worst_name = error, name
        if exact and worst > TOLERANCE:
            raise ProofError(
                f"pass {pass_name!r} is not exact: output {worst_name!r} moved by {worst:.3g} (bound {TOLERANCE:.0e})",
                where=pass_name, hint="this is a defect of the pass; the program it would have made was thrown away",
            )  # fmt: skip
        row = ProofRow(pass_name, exact, worst, TOLERANCE if exact else None, len(self.draws), len(self.names))
        self.rows.append(row)
        self.truth, self.names = after, program.outputs
        return row

    def _refuse_vacuous(self) -> None:
        """A NaN output equals any other NaN output: on such inputs a proof would say nothing."""
        for outputs in self.truth:
            for name, value in zip(self.names, outputs, strict=True):
                if value.is_floating_point() and value.numel() and bool(value.isnan().all()):
                    raise ProofError(
                        f"output {name!r} is NaN on the drawn inputs, so nothing could be proven", where=name,
                        hint="pass example_inputs, or give the input a range with low= and high=",
                    )  # fmt: skip
