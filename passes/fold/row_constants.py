"""Drop from logits what a softmax or an argmax takes away again: whatever is constant along the dim it reduces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node, map_arg

from fxfreeze.program import Program
from fxfreeze.rewrite import Context, NodeRewrite, NoMatch, fail

from .._operators import FORMS, arguments

aten = torch.ops.aten

SOFTMAXES = (aten.softmax.int, aten.special_softmax.default, aten._softmax.default, aten.log_softmax.int,
             aten.special_log_softmax.default, aten._log_softmax.default)  # fmt: skip
EXTREMA = (aten.argmax.default, aten.argmin.default)

SUMS: dict[Any, int] = {aten.add.Tensor: 1, aten.add.Scalar: 1, aten.sub.Tensor: -1, aten.sub.Scalar: -1}
SWAPPED = frozenset({aten.rsub.Tensor, aten.rsub.Scalar})
PRODUCTS = frozenset({aten.mul.Tensor, aten.mul.Scalar})
QUOTIENTS = frozenset({aten.div.Tensor, aten.div.Scalar})
CASTS = frozenset({aten.to.dtype, aten._to_copy.default})

# What models feed with activations, not with masks: their results are taken to be finite.
SETTLED = frozenset(FORMS) - {aten.embedding.default} | {
    aten.bmm.default, aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default, aten.batch_norm.default,
    aten.softmax.int, aten._softmax.default, aten.sigmoid.default, aten.tanh.default,
    aten.scaled_dot_product_attention.default,
}  # fmt: skip
# Finite where their operands are. Not division by what is computed, nor logarithms.
FINITE = frozenset(SUMS) | SWAPPED | PRODUCTS | QUOTIENTS | CASTS | {
    aten.neg.default, aten.abs.default, aten.relu.default, aten.gelu.default, aten.silu.default, aten.exp.default,
    aten.sqrt.default, aten.square.default, aten.clamp.default, aten.clamp_min.default, aten.maximum.default,
    aten.minimum.default, aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.amax.default,
    aten.amin.default, aten.linalg_vector_norm.default, aten.reshape.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.permute.default, aten.transpose.int, aten.t.default, aten.slice.Tensor, aten.select.int, aten.expand.default,
    aten.clone.default, aten.contiguous.default, aten.cat.default, aten.embedding.default,
}  # fmt: skip
INFINITE = 1e4
"""A number of at least this size may stand for ∞: masks write −1e4 or −1e9 where the dtype has no −∞, or fears it."""


class DropRowConstants(NodeRewrite):
    """softmax(z + c) = softmax(z) and argmax(z + c) = argmax(z) where c has size 1 along the dim that is reduced.

    The same goes for log_softmax(z) = z − logsumexp(z). Between the reduction and c may lie sums, differences,
    negations, casts, and products and quotients with factors that are themselves constant along the dim; every value on
    the way is read only there. The terms go, what is left is put together again, and signs are carried into the sums on
    the way: θ·m − α·(Σa − s) becomes θ·m + α·s. That is how a Tversky head loses Σa, which is the same for every
    prototype (``kernels/_tversky.py``), when its scores meet a softmax only.

    A term stays that something of the result hangs on: its shape or dtype, or a NaN. An infinite c makes the whole row
    NaN, and without c the row would be finite. Hence c must be finite by construction: made of constants smaller than
    :data:`INFINITE` and of what operators with weights, norms and the like return, by operators that make no infinity
    out of finite numbers; not an input, which may be a mask, nor the result of ``where``, ``masked_fill`` or ``log``.
    Arithmetic is taken to be real: that c overflows, or that a computed divisor is 0, is not considered.

    Source: Goodfellow, Bengio and Courville, Deep Learning (2016), equation 6.32.
    """

    name, stage, targets = "drop-row-constants", "fold", (*SOFTMAXES, *EXTREMA)

    def rewrite(self, program: Program, node: Node, ctx: Context) -> bool | NoMatch:
        value, dim = node.args[0], arguments(node)["dim"]
        ndim = value.meta["val"].ndim  # type: ignore[union-attr]
        if dim is None or not ndim or not _varies(value, dim := dim % ndim - ndim):
            return False
        assert isinstance(value, Node)
        left, misses = _without_rows(program, _way(program, value, node, dim), dim)
        if value not in left:
            return misses[0] if misses else False
        rest = left[value]
        new = rest.node if rest.sign > 0 else program.call(aten.neg.default, rest.node, before=node, like=value)
        program.replace(value, new)
        return True


@dataclass(frozen=True)
class _Sum:
    """``node = left + sign · alpha · right``."""

    node: Node
    left: Any
    right: Any
    sign: int
    alpha: float

    @property
    def operands(self) -> tuple[Any, ...]:
        return (self.left, self.right)


@dataclass(frozen=True)
class _Multiple:
    """``node`` is `operand` times something that is constant along the dim."""

    node: Node
    operand: Node

    @property
    def operands(self) -> tuple[Node, ...]:
        return (self.operand,)


@dataclass(frozen=True)
class _Rest:
    """``sign · node`` is what is left of a value without its terms that are constant along the dim."""

    node: Any
    sign: int = 1


def _way(program: Program, value: Node, reader: Node, dim: int) -> list[_Sum | _Multiple]:
    """Every operator between `reader` and the terms of `value` that is read once, readers first."""
    found: list[_Sum | _Multiple] = []
    stack = [(value, reader)]
    while stack:
        value, reader = stack.pop()
        if set(value.users) != {reader} or (item := _read(program, value, dim)) is None:
            continue
        found.append(item)
        # In x + x, x stands twice.
        stack += [(part, value) for part in dict.fromkeys(item.operands) if _varies(part, dim)]
    return found


def _read(program: Program, node: Node, dim: int) -> _Sum | _Multiple | None:
    if node.op != "call_function" or not node.meta["val"].is_floating_point():
        return None
    if node.target in SUMS or node.target in SWAPPED:
        return _read_sum(node, dim)
    if node.target in CASTS or node.target is aten.neg.default:
        return _Multiple(node, node.args[0])  # type: ignore[arg-type]
    if node.target not in PRODUCTS and node.target not in QUOTIENTS:
        return None
    operand, factor = node.args[:2]
    if node.target in PRODUCTS and _is_row(operand, dim):
        operand, factor = factor, operand
    if not _varies(operand, dim) or not _is_row(factor, dim) or not _is_sound(program, node.target, factor):
        return None
    return _Multiple(node, operand)  # type: ignore[arg-type]


def _read_sum(node: Node, dim: int) -> _Sum | None:
    given = arguments(node)
    left, right, alpha = given["self"], given["other"], given["alpha"]
    if node.target in SWAPPED:
        left, right = right, left
    if not all(_is_small(part) or _varies(part, dim) or _is_row(part, dim) for part in (left, right)):
        return None
    return _Sum(node, left, right, SUMS.get(node.target, -1), alpha) if _is_small(alpha) else None


def _without_rows(program: Program, way: list[_Sum | _Multiple], dim: int) -> tuple[dict[Node, _Rest], list[NoMatch]]:
    """What is left of every value on the way that loses a term; why the terms that stay do."""
    left: dict[Node, _Rest] = {}
    misses: list[NoMatch] = []
    for item in reversed(way):  # operands first
        known = [left.get(part, _Rest(part)) for part in item.operands]
        if isinstance(item, _Sum) and (kept := _kept(program, item, dim, misses)) is not None:
            left[item.node] = _signed(program, item, known[kept], kept)
        elif any(part in left for part in item.operands):
            left[item.node] = _joined(program, item, *known)
    return left, misses


def _kept(program: Program, item: _Sum, dim: int, misses: list[NoMatch]) -> int | None:
    """Which operand of a sum stays when the other goes, which is constant along the dim; None when both stay."""
    for kept, row in enumerate(reversed(item.operands)):
        if not _is_row(row, dim):
            continue
        if not _same_kind(item.operands[kept], item.node):
            misses.append(fail("the result has its shape or dtype from a term constant along the dim", item.node))
        elif reason := _may_be_infinite(program, row):
            misses.append(fail(f"a term constant along the dim may be infinite: {reason}", item.node))
        else:
            return kept
    return None


def _signed(program: Program, item: _Sum, rest: _Rest, kept: int) -> _Rest:
    """`rest` with the sign and the factor it has in the sum."""
    if kept == 0:
        return rest
    if item.alpha == 1:
        return _Rest(rest.node, item.sign * rest.sign)
    scaled = program.call(aten.mul.Tensor, rest.node, item.alpha, before=item.node, like=item.node)
    return _Rest(scaled, item.sign * rest.sign)


def _joined(program: Program, item: _Sum | _Multiple, left: _Rest, right: _Rest | None = None) -> _Rest:
    """``item.node`` of what is left of its operands, with the left one's sign in front."""
    node = item.node
    if isinstance(item, _Sum):
        assert right is not None
        target = aten.add.Tensor if left.sign * item.sign * right.sign > 0 else aten.sub.Tensor
        factor = {} if item.alpha == 1 else {"alpha": item.alpha}
        return _Rest(program.call(target, left.node, right.node, before=node, like=node, **factor), left.sign)
    if node.target is aten.neg.default:
        return _Rest(left.node, -left.sign)
    args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda part: left.node if part is item.operand else part)
    return _Rest(program.call(node.target, *args, before=node, like=node, **kwargs), left.sign)  # type: ignore[arg-type]


def _is_row(value: Any, dim: int) -> bool:
    """Whether `value`, broadcast, is constant along the dim, which is counted from the end."""
    if not isinstance(value, Node):
        return _is_small(value)
    shape = _shape(value)
    return shape is not None and (len(shape) < -dim or (isinstance(shape[dim], int) and shape[dim] == 1))


def _varies(value: Any, dim: int) -> bool:
    return isinstance(value, Node) and _shape(value) is not None and not _is_row(value, dim)


def _shape(node: Node) -> torch.Size | None:
    value = node.meta.get("val")
    return value.shape if isinstance(value, torch.Tensor) else None


def _is_small(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < INFINITE


def _same_kind(value: Any, source: Node) -> bool:
    first, second = value.meta["val"], source.meta["val"]
    # Sizes must be the same expression: comparing symbols by value would add a guard to the shape environment.
    return first.dtype == second.dtype and list(map(str, first.shape)) == list(map(str, second.shape))


def _may_be_infinite(program: Program, value: Any) -> str | None:
    """Why `value` may be infinite, or None; see :class:`DropRowConstants`."""
    seen, stack = set(), [value]
    while stack:
        item = stack.pop()
        if item in seen or not isinstance(item, Node):
            continue
        seen.add(item)
        if not item.meta["val"].is_floating_point() or item.target in SETTLED:
            continue
        if item.op == "get_attr":
            if not bool((program.constant64(item).abs() < INFINITE).all()):  # type: ignore[union-attr]
                return f"the constant {item.target}"
        elif item.target not in FINITE or not _keeps_finite(program, item):
            return "an input" if item.op == "placeholder" else str(item.target)
        stack += item.all_input_nodes
    return None


def _keeps_finite(program: Program, node: Node) -> bool:
    """Whether the numbers written into the call of an operator in :data:`FINITE` leave its result finite."""
    if node.target in QUOTIENTS and not program.is_constant(node.args[1]) and isinstance(node.args[1], Node):
        return False
    if node.target not in PRODUCTS | QUOTIENTS | SWAPPED | frozenset(SUMS):
        return True
    numbers = [part for part in arguments(node).values() if not isinstance(part, Node)]
    return all(map(_is_small, numbers)) and _is_sound(program, node.target, node.args[1])


def _is_sound(program: Program, target: Any, factor: Any) -> bool:
    """Whether a known factor is finite and a known divisor not 0; a computed one is taken to be."""
    value = program.constant64(factor) if isinstance(factor, Node) else torch.tensor(factor, dtype=torch.float64)
    if value is None:
        return True
    return bool(value.isfinite().all()) and (target not in QUOTIENTS or bool((value != 0).all()))
