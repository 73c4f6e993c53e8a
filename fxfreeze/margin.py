"""Where a result hangs on a decision that rounding can turn.

A comparison of floats (the indicator 1[a > t] of Tversky similarity, a hard gate) jumps. Where its sides are closer to
each other than the rounding of what led to them, float32 and float64 may decide differently, and so may two programs in
float32; both are right, and what depends on it says nothing about either. Of the 51 million indicators of a frozen
head with 50,257 prototypes a few are always of this kind.

Such places are found by running the program in float64 with every comparison shifted by its margin, once up and once
down, and looking where the outputs move. A margin is several times the rounding that was measured at the comparison.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .constants import lift
from .lower import references
from .program import Program
from .proof import lifted_run

_aten = torch.ops.aten
COMPARISONS = frozenset(
    getattr(getattr(_aten, name), overload) for name in ("gt", "ge", "lt", "le") for overload in ("Scalar", "Tensor")
)

_ROUNDINGS = 16.0
"""Margin in mean roundings of a row. The largest of 50 million errors with a normal distribution is 7 mean ones."""
_EPS = 4.0
"""Margin in eps of the row's largest operand, should the measured rounding be 0 by chance."""


_MOST = 0.5
"""The largest share of an output that may be left out of a comparison."""


def floor(dtype: torch.dtype) -> float:
    """The error that counts as rounding whatever eager torch does: 100 eps, in half precisions 4 eps.

    100 eps of bfloat16 would be 0.78, a bound that nothing could break.
    """
    if not (dtype.is_floating_point or dtype.is_complex):
        return 0.0
    eps = torch.finfo(dtype).eps
    return 100 * eps if eps < 1e-5 else 4 * eps


@torch.no_grad()
def undecided(program: Program, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Per output a mask of the elements that move by more than rounding when decisions within their margin turn.

    Args:
        program: before any pass that takes decisions for good (prototypes that are folded have theirs taken).
        inputs: flat tensors in the program's own dtypes.

    Returns:
        Masks of the outputs' shapes; 0-d ones, False, when the program takes no decisions.
    """
    if not decides(program):
        return tuple(torch.zeros((), dtype=torch.bool) for _ in program.outputs)
    rounded: deque[Tensor] = deque()
    with _Comparisons(lambda left, right: _note(rounded, left, right)):
        dtypes = [value.dtype for value in program.run(*inputs)]
    margins: list[Tensor] = []
    with _Comparisons(lambda left, right: _measure(rounded, margins, left, right)):
        truth = lifted_run(program, inputs)
    masks = [torch.zeros(value.shape, dtype=torch.bool, device=value.device) for value in truth]
    for sign in (1.0, -1.0):
        with _Comparisons(_shift(margins, sign)):
            shifted = lifted_run(program, inputs)
        for mask, now, then, dtype in zip(masks, shifted, truth, dtypes, strict=True):
            mask |= _moved(now, then, floor(dtype) / 2)
    return tuple(masks)


def left_out(masks: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The masks, emptied where they cover more than half of an output: what remained would be no evidence."""
    return tuple(mask & (share(mask) <= _MOST) for mask in masks)


def decided(mask: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """The values without what is masked, flat; as they are where nothing is, or the mask is not of their shape."""
    if not bool(mask.any()) or any(value.shape != mask.shape for value in values):
        return values
    return tuple(value[~mask] for value in values)


def share(mask: Tensor) -> float:
    """Of all elements, those that are True."""
    return float(mask.double().mean()) if mask.numel() else 0.0


def decides(program: Program) -> bool:
    """Whether the program compares floats, itself or inside of an operator of ours; yes, where dtypes are not known."""
    operators = references()
    return any(
        node.op == "call_function"
        and (node.target in operators or (node.target in COMPARISONS and _may_float(node.args[0])))
        for node in program.graph.nodes
    )


class _Comparisons(TorchDispatchMode):
    """Gives the left side of every comparison of floats to `change`, and compares what that returns.

    Operators of ours run as their reference, so that the comparisons inside are seen as well.
    """

    def __init__(self, change: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self._change, self._references = change, references()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (reference := self._references.get(func)) is not None:
            with self:
                return reference(*args, **kwargs)
        if func in COMPARISONS and _floating(args[0]):
            return func(self._change(args[0], args[1]), *args[1:], **kwargs)
        return func(*args, **kwargs)


def _may_float(node: Any) -> bool:
    return "val" not in node.meta or _floating(node.meta["val"])


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _note(rounded: deque[Tensor], left: Tensor, right: Any) -> Tensor:
    rounded.append(left - right)
    return left


def _measure(rounded: deque[Tensor], margins: list[Tensor], left: Tensor, right: Any) -> Tensor:
    """Append the margin of this comparison, one number per row, 0 where both dtypes found the sides equal.

    What is equal in both, an absent feature or a masked position that is 0, is so by construction, not by rounding.
    """
    noted = rounded.popleft()
    exact = left - right
    sides = torch.maximum(left.abs(), right.abs() if isinstance(right, Tensor) else torch.full_like(left, abs(right)))
    rounding = _row((exact - lift(noted)).abs().nan_to_num(0.0, 0.0, 0.0), torch.mean)
    size = _row(sides.nan_to_num(0.0, 0.0, 0.0), torch.amax)
    margin = torch.maximum(_ROUNDINGS * rounding, _EPS * torch.finfo(noted.dtype).eps * size)
    tied = (exact == 0) & (noted == 0)
    margins.append(margin * ~tied if bool(tied.any()) else margin)
    return left


def _shift(margins: Sequence[Tensor], sign: float) -> Callable[[Tensor, Any], Tensor]:
    following = iter(margins)
    return lambda left, right: left + sign * next(following)


def _row(value: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    return reduce(value, dim=-1, keepdim=True) if value.dim() and value.shape[-1] else value


def _moved(now: Tensor, then: Tensor, bound: float) -> Tensor:
    """Where `now` is farther from `then` than the share `bound` of the largest, or one is NaN or Inf and one is not."""
    if not (then.is_floating_point() or then.is_complex()) or not then.numel():
        return now != then
    size = then.abs().nan_to_num(0.0, 0.0, 0.0).amax()
    same = (now == then) | (now.isnan() & then.isnan())
    return ~same & ~((now - then).abs() <= bound * size)
