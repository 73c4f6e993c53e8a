"""How far a result may move because rounding turns a decision.

A comparison of floats (the indicator 1[a > t] of Tversky similarity, a hard gate) jumps. Where its sides are closer to
each other than the rounding of what led to them, float32 and float64 may decide differently, and so may two programs in
float32; both are right. Of the 51 million indicators of a frozen head with 50,257 prototypes a few are always of this
kind.

What hangs on them is found by running the program in float64 with every >, ≥, < and ≤ of floats shifted by its margin,
all up, all down, and in a few more runs half of them up and half down, and looking where the outputs move: two gates
that rounding opens together may cancel, and one alone does not. A margin is several times the rounding that was
measured at the comparison.

A top-k jumps, too: as comparisons of every value that it picks, and of the first that it does not, with the next
smaller one. Shifting all values alike would turn none of them, so neighbours are shifted against each other.

So does fxfreeze::quantize, halfway between two integers, and fxfreeze::quantize_float8 between two of its numbers. One
integer that turns moves what the next layers quantize by a good part of a step, and so turns more of them: rounding is
therefore measured with the integers of the first run in the place of those of the second. Other jumps (==, sign, round
elsewhere, argmax, sort) are not looked at.

Decisions behind decisions are alike: a hard gate that turns moves what the gates of later layers compare by far more
than rounding, and other ones of those turn, which ones hangs on which turned before. No few runs meet them all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .constants import lift
from .kernels._quantized import spread
from .kernels.dequantize import KERNEL as DEQUANTIZE
from .kernels.quantize import KERNEL as QUANTIZE
from .kernels.quantize_float8 import KERNEL as QUANTIZE_FLOAT8
from .kernels.quantize_float8 import to_jump
from .lower import references
from .program import Program
from .proof import MASK, checked_run, relative_error

COMPARISONS = frozenset({"gt", "ge", "lt", "le", "greater", "greater_equal", "less", "less_equal"})
TOP = torch.ops.aten.topk.default

_ROUNDINGS = 16.0
"""Margin in mean roundings of a row. The largest of 50 million errors with a normal distribution is 7 mean ones."""
_MIXED = 3
"""Pairs of runs in which half of the decisions are shifted up and half down, and the other way round."""
_EPS = 16.0
"""Margin in eps of the row's mean operand, the least there is: in float64 there is no rounding to measure."""


@dataclass(frozen=True)
class Slack:
    """How far an output's elements may be from their float64 values, float64 tensors of its shape: `low` ≤ 0 ≤ `high`.

    Both are 0 where nothing moves by more than rounding. Elsewhere they are what the shifted runs span, and for floats
    as much again on either side, since of several decisions some may turn. Where decisions follow on decisions, the
    span is that of the row.
    """

    low: Tensor
    high: Tensor

    @property
    def share(self) -> float:
        """Of all elements, those that may be anywhere but where they are."""
        moves = self.high > self.low
        return float(moves.double().mean()) if moves.numel() else 0.0

    def excess(self, gap: Tensor) -> Tensor:
        """By how much `gap`, an element's distance from its float64 value, leaves the span; ≥ 0, or NaN for NaN."""
        return torch.maximum(gap - self.high, self.low - gap).clamp(min=0)

    def relative_error(self, one: Tensor, other: Tensor) -> float:
        """As :func:`fxfreeze.proof.relative_error`, of two runs that may have decided differently."""
        if one.shape != self.low.shape or other.shape != self.low.shape:
            return relative_error(one, other)
        between = Slack(self.low - self.high, self.high - self.low)
        one, other = one.double(), other.double()
        return relative_error(other + between.excess(one - other), other)


def floor(dtype: torch.dtype) -> float:
    """The error that counts as rounding whatever eager torch does: 100 eps, in half precisions 4 eps.

    100 eps of bfloat16 would be 0.78, a bound that nothing could break.
    """
    if not (dtype.is_floating_point or dtype.is_complex):
        return 0.0
    eps = torch.finfo(dtype).eps
    return 100 * eps if eps < 1e-5 else 4 * eps


class Decisions:
    """How far decisions within rounding may move what `program` gives for `inputs`, found as far as it is asked for.

    Args:
        program: before any pass that takes decisions for good (prototypes that are folded have theirs taken).
        inputs: flat tensors in the program's own dtypes.
    """

    def __init__(self, program: Program, inputs: Sequence[Tensor]) -> None:
        self._program, self._inputs = program, inputs
        self._moved: list[tuple[Tensor, ...]] = []

    def slacks(self, output: int) -> Iterator[Slack | None]:
        """The slack of one output as more and more runs give it: each holds the ones before, the last is what counts.

        The first is None, as where nothing hangs on a decision within its margin, and costs nothing: who is content
        with less need not wait for the runs.

        Raises:
            ProofError: the program does not run in float64.
        """
        yield None
        if self._close is None:
            return
        for count, seed in enumerate((None, *range(_MIXED)), 1):
            if len(self._moved) < 2 * count:
                self._moved += (self._shifted(sign, seed) for sign in (1.0, -1.0))
            yield self._close.slack(output, self._moved[: 2 * count])

    @cached_property
    def _close(self) -> _Close | None:
        return _measured(self._program, self._inputs) if decides(self._program) else None

    def _shifted(self, sign: float, seed: int | None) -> tuple[Tensor, ...]:
        assert self._close is not None
        with _Comparisons(_shift(self._close.margins, sign, seed), _shift_neighbours):
            return checked_run(self._program, self._inputs, "capture")


@dataclass(frozen=True)
class _Close:
    """A program of which decisions lie within their margins: float64 outputs, their own dtypes, one margin per
    comparison, and how many results are rounded to integers."""

    truth: tuple[Tensor, ...]
    dtypes: Sequence[torch.dtype]
    margins: Sequence[_Margin]
    quantized: int

    def slack(self, output: int, moved: Sequence[tuple[Tensor, ...]]) -> Slack | None:
        """What `moved`, the outputs of shifted runs, span."""
        spreads = self.quantized > 1 or any(margin.reached for margin in self.margins)
        values = [outputs[output] for outputs in moved]
        return _slack(self.truth[output], values, self.dtypes[output], spreads=spreads)


@torch.no_grad()
def _measured(program: Program, inputs: Sequence[Tensor]) -> _Close | None:
    """None: no decision lies within its margin."""
    rounded: deque[Tensor] = deque()
    integers: deque[Tensor] = deque()
    with _Comparisons(partial(_note, rounded), integers=lambda found: _keep(integers, found)):
        dtypes = [value.dtype for value in program.run(*inputs)]
    margins: list[_Margin] = []
    close: list[bool] = []
    quantized = len(integers)
    with _Comparisons(partial(_measure, rounded, margins, close), integers=lambda _: integers.popleft()):
        truth = checked_run(program, inputs, "capture")
    if not any(close):
        return None
    if quantized:
        truth = checked_run(program, inputs, "capture")
    return _Close(truth, dtypes, margins, quantized)


def decides(program: Program) -> bool:
    """Whether the program compares floats, itself or inside of an operator of ours; yes, where dtypes are not known."""
    operators = references()
    return any(
        node.op == "call_function"
        and (node.target in operators or (_decides(node.target) and any(map(_may_float, node.all_input_nodes))))
        for node in program.graph.nodes
    )


Distance = Callable[[], Tensor] | None
Change = Callable[..., Tensor]
"""Left and right side of a comparison, and a function that says how far left is from where it jumps, if that is not its
distance to right; returns another left side."""
Neighbours = Callable[[Change, Tensor, Tensor, int], Tensor]


def _compare_neighbours(change: Change, values: Tensor, order: Tensor, count: int) -> Tensor:
    """Each of the first `count` values in this order with the next one."""
    ranked = values.gather(-1, order)[..., : count + 1]
    change(ranked[..., :-1], ranked[..., 1:])
    return values


def _shift_neighbours(change: Change, values: Tensor, order: Tensor, count: int) -> Tensor:
    """The last value that is picked goes down and the first that is not up, or the other way, and so on by turns."""
    pairs = min(count, values.shape[-1] - 1)
    offset = change(torch.zeros_like(values[..., :pairs]), None)
    if pairs < 1:
        return values
    rank = torch.arange(values.shape[-1], device=values.device)
    against = 1.0 - 2.0 * ((rank - pairs) % 2)
    return values.scatter_add(-1, order, offset[..., rank.clamp(max=pairs - 1)] * against)


class _Comparisons(TorchDispatchMode):
    """Gives the left side of every comparison of floats to `change`, and compares what that returns.

    Of a top-k, `neighbours` is given `change`, what it picks from along the last dim, the best first order of that, and
    how many it picks; it returns what to pick from instead. What is picked keeps its own value.

    Of a quantize, `change` is given x / scale, 0, and what tells its distance to where that jumps, k + 1/2 for
    integers; `integers` is given the result, and returns another one.

    Other operators of ours run as their reference, so that the comparisons inside are seen as well.
    """

    def __init__(
        self, change: Change, neighbours: Neighbours = _compare_neighbours,
        integers: Callable[[Tensor], Tensor] = lambda found: found,
    ) -> None:  # fmt: skip
        super().__init__()
        self._change, self._neighbours, self._references = change, neighbours, references()
        self._integers = integers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is QUANTIZE.op:
            return self._quantize(*args, **kwargs)
        if func is QUANTIZE_FLOAT8.op:
            return self._quantize_float8(*args, **kwargs)
        if func is DEQUANTIZE.op:
            return DEQUANTIZE.plain(*args, **kwargs)  # which compares nothing, and is most of a run on integers
        if (reference := self._references.get(func)) is not None:
            with self:
                return reference(*args, **kwargs)
        if _compares(func) and torch.result_type(*args[:2]).is_floating_point:
            dtype = torch.result_type(*args[:2])
            left, right = (side.to(dtype) if isinstance(side, Tensor) else side for side in args[:2])
            return func(self._change(left, right), right, *args[2:], **kwargs)
        if func is TOP and args[0].is_floating_point() and args[0].dim():
            return self._pick(*args, **kwargs)
        return func(*args, **kwargs)

    def _quantize(
        self, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, block: int, low: int, high: int
    ) -> Tensor:
        steps = x / spread(scale, x, axis, block)
        moved = self._change(steps, 0.0, lambda: steps - (steps.floor() + 0.5))
        return self._integers(QUANTIZE.plain(moved, torch.ones_like(scale), zero_point, axis, block, low, high))

    def _quantize_float8(self, x: Tensor, scale: Tensor) -> Tensor:
        steps = x.to(scale.dtype) / scale
        moved = self._change(steps, 0.0, lambda: to_jump(steps))
        return self._integers(QUANTIZE_FLOAT8.reference(moved, torch.ones_like(scale)))

    def _pick(self, values: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
        moved = values.movedim(dim, -1)
        order = torch.argsort(moved, dim=-1, descending=largest, stable=True)
        instead = self._neighbours(self._change, moved, order, k)
        if instead is moved:
            return TOP(values, k, dim, largest, sorted)
        indices = TOP(instead, k, -1, largest, sorted)[1]
        return moved.gather(-1, indices).movedim(-1, dim), indices.movedim(-1, dim)


def _compares(target: Any) -> bool:
    return (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace == "aten"
        and target._schema.name.partition("::")[2] in COMPARISONS
    )


def _decides(target: Any) -> bool:
    return target is TOP or _compares(target)


def _may_float(node: Any) -> bool:
    value = node.meta.get("val")
    return value is None or (isinstance(value, Tensor) and value.is_floating_point())


def _note(rounded: deque[Tensor], left: Tensor, right: Any, distance: Distance = None) -> Tensor:
    rounded.append(left - right)
    return left


def _keep(integers: deque[Tensor], found: Tensor) -> Tensor:
    integers.append(found)
    return found


@dataclass
class _Margin:
    """Of one comparison: by how much it is shifted; and per row what rounding may do, and the sum of the left side.

    `reached`: earlier decisions, when they were shifted, changed the left side by more than rounding could.
    """

    value: Tensor
    rounding: Tensor
    total: Tensor
    reached: bool = False

    def see(self, left: Tensor) -> None:
        """The left side in a run whose decisions are shifted."""
        self.reached = self.reached or bool(((_total(left) - self.total).abs() > self.rounding).any())


def _measure(
    rounded: deque[Tensor], margins: list[_Margin], close: list[bool], left: Tensor, right: Any,
    distance: Distance = None,
) -> Tensor:  # fmt: skip
    """Append the margin of this comparison, one number per row, 0 where both dtypes found the sides equal, and whether
    any of its decisions lies within it.

    What is equal in both, an absent feature or a masked position that is 0, is so by construction. (Numbers that happen
    to cancel, and would not in another order, are taken for such.)
    """
    noted, exact = rounded.popleft(), left - right
    size = _mean(left) + (_mean(right) if isinstance(right, Tensor) else abs(right) * (abs(right) < MASK))
    rounding = torch.where(exact.abs() < MASK, exact - lift(noted), 0.0)
    margin = _ROUNDINGS * _mean(rounding) + _EPS * torch.finfo(noted.dtype).eps * size
    tied = (exact == 0) & (noted == 0)
    margins.append(_Margin(margin * ~tied if bool(tied.any()) else margin, margin, _total(left)))
    jump = exact if distance is None else distance()
    close.append(bool(((jump.abs() <= margin) & ~tied).any()))
    return left


def _mean(value: Tensor) -> Tensor:
    """Mean size over the last dim, without what stands for ∞: beside a mask's −1e9 no rounding would count."""
    size = _unmasked(value.abs())
    return size.mean(-1, keepdim=True) if size.dim() and size.shape[-1] else size


def _total(value: Tensor) -> Tensor:
    """Sum over the last dim, as :func:`_mean` takes it."""
    value = _unmasked(value)
    return value.sum(-1, keepdim=True) if value.dim() and value.shape[-1] else value


def _unmasked(value: Tensor) -> Tensor:
    return torch.where(value.abs() < MASK, value, 0.0)


def _shift(margins: Sequence[_Margin], sign: float, seed: int | None) -> Change:
    """Shifts by `sign` times the margin; with a seed half of the decisions the other way."""
    following = iter(margins)
    generator = None if seed is None else torch.Generator().manual_seed(seed)

    def shift(left: Tensor, right: Any, distance: Distance = None) -> Tensor:
        known = next(following)
        if right is not None:  # without a right side, left is no value of the program
            known.see(left)
        margin = sign * known.value
        if generator is None:
            return left + margin
        flipped = torch.rand(left.shape, generator=generator) < 0.5
        return left + torch.where(flipped.to(left.device), -margin, margin)

    return shift


def _slack(truth: Tensor, shifted: Iterable[Tensor], dtype: torch.dtype, spreads: bool) -> Slack | None:
    if truth.is_complex() or not truth.numel():
        return None
    low = high = torch.zeros_like(truth, dtype=torch.float64)
    for value in shifted:
        move = _difference(value, truth)
        low, high = torch.minimum(low, move), torch.maximum(high, move)
    if spreads and truth.dim() > 1:
        # One decision turns others, other ones in every run: of a row, any element may move as far as the one that did.
        others = tuple(range(1, truth.dim()))
        low = low.amin(others, keepdim=True).expand_as(low)
        high = high.amax(others, keepdim=True).expand_as(high)
    if truth.is_floating_point():
        size = truth[truth.isfinite()].abs()
        moved = torch.maximum(-low, high) > floor(dtype) / 2 * (size.amax() if size.numel() else 0.0)
        span = (high - low) * moved
        low, high = low * moved - span, high * moved + span
    return Slack(low, high) if bool((high > low).any()) else None


def _difference(value: Tensor, truth: Tensor) -> Tensor:
    """value − truth; 0 where both are the same NaN or Inf or one is not a number, which no span could contain."""
    gap = value.double() - truth.double()
    return torch.where(gap.isfinite(), gap, 0.0)
