"""Inputs to measure on: what the caller of ``fxfreeze.compile`` gives as `calibration`, else drawn from the plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from .binding import check_inputs
from .capture import flat_examples
from .errors import PlanError
from .plan import Plan
from .program import Program
from .sampling import check_range, dim_choices, sample_inputs

_ROWS = 64


class Calibration:
    """Flat inputs, batch by batch; iterated anew by everything that measures.

    Args:
        plan: how the inputs of the caller are named.
        batches: what the model is called with, batch by batch: tensors, tuples or dicts, as `example_inputs`. A
            DataLoader is read again each time; a generator is read once and kept. None: draw from the plan.
        examples: flat tensors to measure on when there are no batches.

    Raises:
        PlanError: `batches` is empty.
        CaptureError: they do not fit the plan's inputs.
    """

    def __init__(self, plan: Plan, batches: Iterable[Any] | None, examples: Sequence[Tensor] | None = None) -> None:
        if isinstance(batches, Tensor):
            raise PlanError(
                "calibration is one tensor, not batches of inputs", where="calibration", hint="put it in a list"
            )
        self.plan, self.examples = plan, examples
        self.batches = list(batches) if isinstance(batches, Iterator) else batches

    @property
    def source(self) -> str:
        """What the numbers are, for the ledger."""
        if self.batches is not None:
            return "calibration data"
        return "inputs drawn from the plan" if self.examples is None else "example inputs"

    def of(self, program: Program) -> Iterator[list[Tensor]]:
        """Flat inputs of `program`, on its device."""
        if self.batches is None:
            yield self.examples if self.examples is not None else _drawn(program)  # type: ignore[misc]
            return
        empty = True
        for batch in self.batches:
            flat = flat_examples(self.plan, batch)
            assert flat is not None
            flat = [value.to(spec.device) for value, spec in zip(flat, program.inputs, strict=True)]
            check_inputs(program.inputs, program.dims, flat, error=PlanError)
            for spec, value in zip(program.inputs, flat, strict=True):
                check_range(spec, value, f"calibration[{spec.name!r}]")
            empty = False
            yield flat
        if empty:
            raise PlanError("there are no batches", where="calibration")


def _drawn(program: Program) -> list[Tensor]:
    """Some rows more than a proof takes: shares are counted on them."""
    sizes = dim_choices(program, 3)[-1]
    for name in [size for size in program.inputs[0].shape[:1] if isinstance(size, str)]:
        high = program.dims.get(name, (1, None))[1]
        sizes[name] = _ROWS if high is None else min(_ROWS, high)
    return sample_inputs(program, sizes, seed=7)
