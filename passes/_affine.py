"""Values scaled and shifted per channel, and the weights that can take the scale and the shift over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxfreeze.program import Program

from ._operators import WeightOperator, apply, arguments

aten = torch.ops.aten

SCALES = frozenset({aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar})
SHIFTS = frozenset({aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Tensor,
                    aten.rsub.Scalar})  # fmt: skip
BATCH_NORM = aten.batch_norm.default
TARGETS = (BATCH_NORM, *SCALES, *SHIFTS)


@dataclass(frozen=True)
class Affine:
    """``node = gain · value + shift``, a number per channel or one for all.

    Attributes:
        gain: float64, 0-d or [channels].
        shift: like `gain`, or None when it is zero everywhere.
        dim: the channels' dim, counted from the end; None when gain and shift are 0-d.
    """

    node: Node
    value: Node
    gain: torch.Tensor
    shift: torch.Tensor | None
    dim: int | None


def affine_of(program: Program, node: Node) -> Affine | None:
    """Read `node` as a per-channel affine function of one operand with constants for the rest, or None."""
    parts = _batch_norm(program, node) if node.target is BATCH_NORM else _elementwise(program, node)
    if parts is None:
        return None
    value, gain, shift = parts
    result, operand = node.meta["val"], value.meta["val"]
    same_shape = [str(size) for size in result.shape] == [str(size) for size in operand.shape]
    if not same_shape or result.dtype != operand.dtype or not result.is_floating_point():
        return None  # it broadcasts or promotes its operand
    gain, shift = (item.reshape([1] * (operand.ndim - item.ndim) + list(item.shape)) for item in (gain, shift))
    varying = {at - operand.ndim for item in (gain, shift) for at, size in enumerate(item.shape) if size != 1}
    if len(varying) > 1 or not bool(torch.isfinite(gain).all() and torch.isfinite(shift).all()):
        return None
    dim = varying.pop() if varying else None
    size = [] if dim is None else [int(operand.shape[dim])]
    gain, shift = (item.flatten().expand(size) if size else item.reshape(()) for item in (gain, shift))
    return Affine(node, value, gain, shift if bool((shift != 0).any()) else None, dim)


def _batch_norm(program: Program, node: Node) -> tuple[Node, torch.Tensor, torch.Tensor] | None:
    """(x − mean) / √(var + ε) · weight + bias, along dim 1."""
    given = arguments(node)
    constants = {name: program.constant64(given[name]) for name in ("weight", "bias", "running_mean", "running_var")}
    if any(constants[name] is None and given[name] is not None for name in constants) or given["training"]:
        return None
    mean, variance = constants["running_mean"], constants["running_var"]
    if mean is None or variance is None:
        return None
    gain = torch.rsqrt(variance + given["eps"])
    if (weight := constants["weight"]) is not None:
        gain = gain * weight
    shift = -mean * gain
    if (bias := constants["bias"]) is not None:
        shift = shift + bias
    along = [-1] + [1] * (given["input"].meta["val"].ndim - 2)
    return given["input"], gain.reshape(along), shift.reshape(along)


def _elementwise(program: Program, node: Node) -> tuple[Node, torch.Tensor, torch.Tensor] | None:
    """x·c, x/c, x+αc, c+αx, x−αc, c−αx with a constant c, as (x, gain, shift)."""
    left, right, *rest = node.args
    alpha: Any = rest[0] if rest else node.kwargs.get("alpha", 1)
    if node.target in (aten.rsub.Tensor, aten.rsub.Scalar):
        left, right = right, left  # and alpha scales what is now the left
    first, second = _number(program, left), _number(program, right)
    if (first is None) == (second is None) or isinstance(alpha, Node | complex):
        return None
    value, constant = (left, second) if first is None else (right, first)
    if not isinstance(value, Node) or constant is None or not isinstance(value.meta.get("val"), torch.Tensor):
        return None
    one, zero = torch.ones_like(constant), torch.zeros_like(constant)
    if node.target in SCALES:
        if node.target in (aten.mul.Tensor, aten.mul.Scalar):
            return value, constant, zero
        return (value, one / constant, zero) if value is left else None
    if node.target in (aten.rsub.Tensor, aten.rsub.Scalar):  # left − α·right, since they were swapped
        return (value, one, -alpha * constant) if value is left else (value, -alpha * one, constant)
    sign = 1 if node.target in (aten.add.Tensor, aten.add.Scalar) else -1
    return (value, one, sign * alpha * constant) if value is left else (value, sign * alpha * one, constant)


def _number(program: Program, operand: Any) -> torch.Tensor | None:
    """A Python number or a constant as a real float64 tensor."""
    if type(operand) in (int, float):
        return torch.tensor(operand, dtype=torch.float64)
    constant = program.constant(operand)
    return None if constant is None or constant.is_complex() else constant.detach().double()


# ---- what a weight does with them; gain and shift are float64, 0-d or per channel


def scaled_outputs(operator: WeightOperator, weight: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """The weight (in its stored layout) whose results are `gain` times those of `weight`."""
    if gain.ndim == 0:
        return weight * gain
    canonical = apply(operator.to_canonical(), weight)
    return _stored(operator, canonical * gain.reshape(operator.per_row()))


def scaled_inputs(operator: WeightOperator, weight: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """The weight (in its stored layout) that does to x what `weight` does to gain · x."""
    if gain.ndim == 0:
        return weight * gain
    canonical = apply(operator.to_canonical(), weight)
    return _stored(operator, canonical * _per_input(operator, gain))


def response(operator: WeightOperator, weight: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """What `weight` answers to an operand that is `shift` everywhere, without padding: [out]."""
    canonical = apply(operator.to_canonical(), weight)
    return (canonical * _per_input(operator, shift.expand(operator.in_features))).flatten(1).sum(1)


def _stored(operator: WeightOperator, canonical: torch.Tensor) -> torch.Tensor:
    """Back to the stored layout; a weight that needed no move keeps its memory format (channels last, say)."""
    moves = operator.from_canonical()
    return apply(moves, canonical).contiguous() if moves else canonical


def _per_input(operator: WeightOperator, values: torch.Tensor) -> torch.Tensor:
    """`values` [in], shaped to multiply a canonical weight [out, in / groups, *kernel]: each group meets its own."""
    rows = operator.out_features // operator.groups
    each = values.reshape(operator.groups, -1).repeat_interleave(rows, 0)
    return each.reshape([*each.shape, *[1] * len(operator.kernel)])


def pads(operator: WeightOperator) -> bool:
    """Whether a border sees other values than the inside: zeros around the operand, or a transposed convolution."""
    if operator.kind != "conv":
        return operator.kind == "transposed"
    padding = arguments(operator.node)["padding"]
    if isinstance(padding, str):
        return padding != "valid" and any(size != 1 for size in operator.kernel)
    return any(size != 0 for size in (padding if isinstance(padding, list | tuple) else [padding]))
