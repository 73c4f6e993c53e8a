"""Error compensation: every rounded weight moves those that are not rounded yet, so that the layer's results stay.

GPTQ of Frantar, Ashkboos, Hoefler and Alistarh (2022, arXiv 2210.17323): the squared error of a layer's results is
tr(E·H·Eᵀ) / 2 for an error E of its weight and H = 2·XᵀX of its inputs X. Columns are rounded in their order; what is
left of the error after the best move of the others is that of a Cholesky factor of H⁻¹, which is computed once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node
from torch.linalg import LinAlgError

from fxfreeze.errors import PassError
from fxfreeze.program import Program
from fxfreeze.rewrite import Context

from .._measured import Tally
from .._operators import WeightOperator
from ._calibrate import watched_run
from ._weights import LIMITS, Integers, Layout, to_integers

DAMPING = 0.01
"""Of the mean of H's diagonal, added to the diagonal."""
LAZY = 128
"""Columns after which what they move in all later ones is moved at once."""
MEMORY = 512 << 20
"""Bytes of matrices H that are summed up in one run over the calibration data; a larger one takes a run of its own."""


@dataclass
class Hessian:
    """H = 2·XᵀX over the rows X that a layer has read, float64 [in, in]: as large for a thousand batches as for one."""

    total: Tensor
    rows: int = 0

    def add(self, value: Tensor) -> None:
        """`value`: [..., in]."""
        flat = value.reshape(-1, value.shape[-1]).double()
        self.total.addmm_(flat.T, flat, alpha=2.0)
        self.rows += len(flat)

    def error(self, now: Tensor, then: Tensor) -> Tally:
        """What weights `now` instead of `then`, float64 [out, in], change in the layer's results."""
        # Rounding may take a sum that is 0 below it.
        squares = [max(float((part @ self.total * part).sum()) / 2, 0.0) for part in (now - then, then)]
        return Tally(gap=squares[0], size=squares[1])


def is_compensated(operator: WeightOperator) -> bool:
    """Whether a layer multiplies rows by its weight; others are rounded to the nearest."""
    return operator.kind in ("linear", "matmul")


@torch.no_grad()
def hessians(program: Program, ctx: Context, inputs: Iterable[Node]) -> Iterator[tuple[Mapping[Node, Hessian], int]]:
    """H of every value of `inputs`, some at a time, and how many rows of the calibration data they were summed over.

    Raises:
        PassError: a value is NaN or Inf; names its module.
    """
    for batch in _batches(list(dict.fromkeys(inputs))):
        found = {
            node: Hessian(torch.zeros(size, size, dtype=torch.float64, device=node.meta["val"].device))
            for node, size in batch.items()
        }
        rows = 0

        def look(node: Node, value: Tensor, found: Mapping[Node, Hessian] = found) -> None:
            if node in found:
                found[node].add(value)

        for given in ctx.calibration.of(program):
            watched_run(program, given, look)
            rows += len(given[0]) if given[0].dim() else 1
        for node, hessian in found.items():
            if not bool(hessian.total.isfinite().all()):
                raise PassError(
                    f"{node.name!r} is NaN or Inf on the calibration data, so no error can be compensated",
                    where=program.where(node), hint="repair the data or the model, or exclude the layers that read it",
                )  # fmt: skip
        yield found, rows


def _batches(inputs: Sequence[Node]) -> Iterator[dict[Node, int]]:
    """Values whose matrices together take at most :data:`MEMORY`, and their sizes."""
    batch: dict[Node, int] = {}
    for node in inputs:
        size = int(node.meta["val"].shape[-1])
        if batch and 8 * (size**2 + sum(other**2 for other in batch.values())) > MEMORY:
            yield batch
            batch = {}
        batch[node] = size
    if batch:
        yield batch


def compensated(weight: Tensor, layout: Layout, bits: int, dtype: torch.dtype, hessian: Tensor) -> Integers:
    """Integers of a weight that compensate for each other's errors.

    Args:
        weight: float64, as stored: [out, in], or [in, out] where `layout` says so.
        layout: scales of a group are computed as its first column is reached, from what the weights are by then; others
            beforehand.
        dtype: of the scales.
        hessian: float64 [in, in].
    """
    turned = layout.axis == (0 if layout.block else 1)
    rows = (weight.T if turned else weight).clone()
    straight = Layout(1 if layout.block else 0, layout.block, layout.each)
    scale = to_integers(rows, straight, bits, dtype).scale
    factor = _factor(hessian)
    values = torch.empty_like(rows, dtype=torch.int8)
    # A group does not go over the end of a lazy batch: its scales need all that was moved.
    width = max(LAZY // layout.block, 1) * layout.block if layout.block else LAZY
    for start in range(0, rows.shape[1], width):
        end = min(start + width, rows.shape[1])
        part = rows[:, start:end]
        errors = _round(part, values[:, start:end], factor[start:end, start:end], scale, straight, bits, start)
        rows[:, end:] -= errors @ factor[start:end, end:]
    return Integers(values.T if turned else values, scale.T if turned and layout.block else scale, layout)


def _round(
    part: Tensor, values: Tensor, factor: Tensor, scale: Tensor, layout: Layout, bits: int, start: int
) -> Tensor:
    """Round the columns of `part` into `values`, and move those behind each; returns the errors in units of the factor.

    `scale` is written to, where it is of groups.
    """
    errors, limit = torch.zeros_like(part), LIMITS[bits]
    for column in range(part.shape[1]):
        if layout.block and column % layout.block == 0:
            group = to_integers(part[:, column : column + layout.block], layout, bits, scale.dtype)
            scale[:, (start + column) // layout.block] = group.scale[:, 0]
        step = (scale[:, (start + column) // layout.block] if layout.block else scale).double()
        values[:, column] = torch.round(part[:, column] / step).clamp(-limit, limit).to(torch.int8)
        errors[:, column] = (part[:, column] - values[:, column] * step) / factor[column, column]
        part[:, column + 1 :] -= errors[:, column, None] * factor[column, column + 1 :]
    return errors


def _factor(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """U, upper triangular, with UᵀU = H⁻¹, of a damped H."""
    damped = hessian.clone()
    diagonal = damped.diagonal()
    # An input that was always 0 says nothing of its weights: they are rounded to the nearest, and move no others.
    diagonal[diagonal == 0] = 1.0
    diagonal += damping * float(hessian.diagonal().mean())
    try:
        return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    except LinAlgError:  # sums of very different sizes can round to what is not positive
        if damping > 1:
            raise
        return _factor(hessian, 10 * damping)
