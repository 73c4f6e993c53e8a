"""Does a target compute what the frozen model computes? Measured on the target as it is loaded, not on what it was made
from.

For three assignments of sizes (the smallest allowed among them) a target is called three times on the same tensors.
Every output is compared with the truth: the program in float64. The bound is tied to the model's own rounding: a target
may err ten times as much as eager torch does, or as much as :func:`floor` says is nothing. Inputs must come back as
they went in, and what a call returned must survive the next call.

Eager torch is measured as well: a model that is far from its own program in float64, much farther than the program in
eager torch, has been captured wrongly, and no bound tied to it would mean anything.

An element that hangs on a decision within rounding (:mod:`fxfreeze.margin`) may be anywhere in what such decisions
span; its error is counted from there. How many there are is in the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .constants import lift
from .errors import EmitError
from .margin import Decisions, Slack, floor
from .memory import return_free_memory
from .program import Program
from .proof import lifted_run
from .sampling import dim_choices, sample_inputs

Flat = Callable[..., Sequence[Tensor]]
REPEATS = 3
MODEL = "model"
"""The name under which eager torch stands in the table."""

_SLACK = 10.0
_SEED = 100  # apart from the seeds of the proofs, so that the inputs are new ones


@dataclass(frozen=True)
class ParityRow:
    """One output of one target at one assignment of sizes.

    Attributes:
        error: max|target − truth| / max|truth|, the worst of the repeats; of integers and bools the share that differs.
            Infinite when shape, dtype, or the places of NaN and Inf are wrong.
        eager_error: the same of eager torch.
        tolerance: what `error` may be.
        repeats_equal: whether all calls gave the same bits.
        inputs_unchanged: whether all inputs were the same bits after the calls.
        undecided: the share of elements that rounding may move by a decision, as far as that had to be looked into: 0
            where the error is that of rounding alone.
        detail: what is wrong beside the numbers; "" when nothing is.
    """

    target: str
    sizes: dict[str, int]
    output: str
    error: float
    eager_error: float
    tolerance: float
    repeats_equal: bool
    inputs_unchanged: bool
    ok: bool
    undecided: float = 0.0
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Draw:
    """Inputs of one assignment of sizes, and what must come out: `truth` in float64, `eager` in the model's dtypes.

    `decisions` say of each output how far from the truth those within rounding may move it.
    """

    sizes: dict[str, int]
    inputs: tuple[Tensor, ...]
    truth: tuple[Tensor, ...]
    eager: tuple[Tensor, ...]
    decisions: Decisions


def draw(
    program: Program,
    reference: Flat | None = None,
    *,
    source: Program | None = None,
    examples: Sequence[Tensor] | None = None,
    count: int = 3,
) -> list[Draw]:
    """Run the program in float64, and eager torch, on `count` assignments of sizes.

    Args:
        program: what was emitted; its float64 run is the truth.
        reference: the user's model, flat tensors to flat tensors. None: the program in eager torch, which is right
            when the model is not at hand (a reloaded artifact) or not the same function (a lossy step).
        source: the program before its passes, where all decisions of the model can still be seen. None: `program`.
        examples: flat tensors to resize, instead of random ones.
        count: how many assignments; fewer when the dims leave fewer.

    Raises:
        EmitError: the model does not run at sizes the plan allows.
    """
    return_free_memory()  # of the passes: constants in float64 come on top
    draws = []
    for position, sizes in enumerate(dim_choices(program, count)):
        inputs = tuple(sample_inputs(program, sizes, seed=_SEED + position, examples=examples))
        try:
            with torch.no_grad():
                # On copies: the model may write to its inputs, which a program never does.
                eager = tuple((reference or program.run)(*(value.clone() for value in inputs)))
                truth = lifted_run(program, inputs)
        except Exception as error:
            raise EmitError(
                f"the model itself does not run at sizes {sizes}: {error}",
                hint="give the dims bounds with Plan(dims=...), the inputs a range with low= and high=, or examples",
            ) from error
        for output, value in zip(program.outputs, truth, strict=True):
            if value.is_floating_point() and value.numel() and bool(value.isnan().all()):
                raise EmitError(
                    f"output {output!r} is NaN at sizes {sizes}, so there is nothing to compare with",
                    hint="give the inputs a range with low= and high=, or pass examples",
                )
        draws.append(Draw(sizes, inputs, truth, eager, Decisions(source or program, inputs)))
    return draws


class Draws:
    """The draws of a program, and of whatever its targets compute of it instead.

    Args:
        program, reference, source, examples: see :func:`draw`, for the program itself. The eager torch of anything else
            is of what that makes of `source`, or of `program`.
    """

    def __init__(
        self,
        program: Program,
        reference: Flat | None = None,
        *,
        source: Program | None = None,
        examples: Sequence[Tensor] | None = None,
    ) -> None:
        self._program, self._source, self._examples = program, source, examples
        self._reference = reference
        self._found: dict[Callable[[Program], Program] | None, list[Draw]] = {}

    def of(self, computes: Callable[[Program], Program] | None = None) -> list[Draw]:
        """The draws of `computes(program)`; None: of the program itself.

        Raises:
            EmitError: as :func:`draw`.
        """
        if computes not in self._found:
            self._found[computes] = self._draw(computes)
        return self._found[computes]

    def _draw(self, computes: Callable[[Program], Program] | None) -> list[Draw]:
        if computes is None:
            return draw(self._program, self._reference, source=self._source, examples=self._examples)
        program = computes(self._program)
        if program is self._program:
            return self.of()
        source = computes(self._source or self._program)
        return draw(program, source.run, source=source, examples=self._examples)


def check_target(name: str, runner: Flat, program: Program, draws: Sequence[Draw]) -> list[ParityRow]:
    """Call `runner` on every draw and compare; the rows say everything, and are all ok when this returns.

    Raises:
        EmitError: a row is not ok, with the table of all rows; or the target does not run.
    """
    rows = [row for item in draws for row in _rows(name, program.outputs, item, _call(name, runner, program, item))]
    return _accept(f"target {name!r} does not agree with the frozen model", rows)


def check_model(program: Program, draws: Sequence[Draw]) -> list[ParityRow]:
    """Hold the model in eager torch (`eager` of the draws) to the truth, bounded by the program's error in eager torch.

    Only for programs that are exactly the model: a lossy step moves the truth.

    Raises:
        EmitError: the model and its program are not the same function.
    """
    rows = []
    for item in draws:
        own = replace(item, eager=program.run(*item.inputs))
        rows += _rows(MODEL, program.outputs, own, _Calls([item.eager], [list(map(_bits, item.eager))], True))
    return _accept("the captured program does not agree with the model in eager torch", rows)


@dataclass(frozen=True)
class _Calls:
    """Results of repeated calls, their bits right after each call, and whether the inputs are what they were."""

    results: list[tuple[Tensor, ...]]
    bits: list[list[Tensor]]
    unchanged: bool


def _call(name: str, runner: Flat, program: Program, item: Draw) -> _Calls:
    inputs = [value.clone() for value in item.inputs]
    before = [_bits(value).clone() for value in inputs]
    results, bits = [], []
    for _ in range(REPEATS):
        try:
            result = tuple(runner(*inputs))
        except Exception as error:
            raise EmitError(f"target {name!r} does not run at sizes {item.sizes}: {error}", where=name) from error
        if len(result) != len(program.outputs):
            raise EmitError(f"target {name!r} returns {len(result)} outputs of {len(program.outputs)}", where=name)
        results.append(result)
        bits.append([_bits(value).clone() for value in result])
    return _Calls(results, bits, all(map(torch.equal, before, map(_bits, inputs))))


def _rows(name: str, outputs: Sequence[str], item: Draw, calls: _Calls) -> list[ParityRow]:
    return [_row(name, output, position, item, calls) for position, output in enumerate(outputs)]


def _row(name: str, output: str, position: int, item: Draw, calls: _Calls) -> ParityRow:
    truth, eager = item.truth[position], item.eager[position]
    for slack in item.decisions.slacks(position):
        compared = [compare(result[position], truth, eager, slack) for result in calls.results]
        gap = max(value for value, _ in compared)
        if gap <= floor(eager.dtype):
            break  # right whatever eager torch does, and whatever else rounding may decide
    eager_gap = compare(eager, truth, eager, slack)[0]
    counted = not (eager.dtype.is_floating_point or eager.dtype.is_complex)
    bound = eager_gap if counted else max(_SLACK * eager_gap, floor(eager.dtype))
    first = calls.bits[0][position]
    kept = all(
        torch.equal(bits[position], _bits(res[position])) for bits, res in zip(calls.bits, calls.results, strict=True)
    )
    complaints = [text for _, text in compared if text]
    complaints += [] if calls.unchanged else ["it writes to its inputs"]
    complaints += [] if kept else ["a call overwrites what an earlier one returned"]
    return ParityRow(
        target=name,
        sizes=item.sizes,
        output=output,
        error=gap,
        eager_error=eager_gap,
        tolerance=bound,
        repeats_equal=all(torch.equal(bits[position], first) for bits in calls.bits),
        inputs_unchanged=calls.unchanged,
        ok=gap <= bound and calls.unchanged and kept,
        undecided=slack.share if slack else 0.0,
        detail="; ".join(dict.fromkeys(complaints)),
    )


def _accept(what: str, rows: list[ParityRow]) -> list[ParityRow]:
    if all(row.ok for row in rows):
        return rows
    from .report import as_text, parity_table

    details = dict.fromkeys(f"{row.output}: {row.detail}" for row in rows if row.detail and not row.ok)
    table = as_text(parity_table([row.to_json() for row in rows])).rstrip()
    raise EmitError("\n".join([what, *details, table]))


def compare(actual: Tensor, truth: Tensor, eager: Tensor, slack: Slack | None = None) -> tuple[float, str]:
    """(error of `actual` against `truth`, what is wrong with its form or "").

    Shape and dtype must be those of `eager`. Where `eager` is not finite (an overflow, a log of 0), `actual` must hold
    the same NaN or Inf; the error is taken over the rest. What is within an element's `slack` is no error.
    """
    if actual.shape != eager.shape or actual.dtype != eager.dtype:
        got = f"{actual.dtype} {tuple(actual.shape)}"
        return float("inf"), f"{got} instead of {eager.dtype} {tuple(eager.shape)}"
    if actual.device != truth.device:
        actual, eager = actual.to(truth.device), eager.to(truth.device)
    if actual.numel() == 0:
        return 0.0, ""
    if not (actual.is_floating_point() or actual.is_complex()):
        wrong = actual != truth if slack is None else slack.excess(actual.double() - truth.double()) > 0
        return float(wrong.double().mean()), ""
    odd = ~torch.isfinite(eager)
    if not bool(((actual == eager) | (actual.isnan() & eager.isnan()) | ~odd).all()):
        return float("inf"), _ODD
    counts = ~odd & torch.isfinite(truth)
    gaps = lift(actual) - truth
    gaps = (gaps.abs() if slack is None else slack.excess(gaps))[counts]
    if gaps.numel() == 0:
        return 0.0, ""
    gap, scale = float(gaps.max()), float(truth[counts].abs().max())
    if not math.isfinite(gap):
        return float("inf"), _ODD
    return (0.0 if gap == 0 else gap / scale if scale > 0 else float("inf")), ""


_ODD = "NaN or Inf in other places than in eager torch"


def _bits(value: Tensor) -> Tensor:
    """The bytes of `value`: equal exactly when the tensors are, NaN and −0 included."""
    dense = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    # Up to one element may have any stride; a view of other element size wants 1.
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)


def worst(rows: Sequence[ParityRow]) -> Mapping[str, float]:
    """Target → its largest error."""
    result: dict[str, float] = {}
    for row in rows:
        result[row.target] = max(result.get(row.target, 0.0), row.error)
    return result
