"""Recognise gates that a model writes by hand, as h·1[h > τ], where(h > τ, h, 0) or a JumpReLU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.dataflow import passage
from fxfreeze.kernels.gate import KERNEL
from fxfreeze.program import Program
from fxfreeze.rewrite import Context, NodeRewrite, NoMatch, fail

from .._operators import FORMS, arguments

aten = torch.ops.aten

WHERES = frozenset({aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf})
FILLS = frozenset({aten.masked_fill.Scalar, aten.masked_fill.Tensor})
RELATIONS = {
    aten.gt.Tensor: "gt", aten.gt.Scalar: "gt", aten.ge.Tensor: "ge", aten.ge.Scalar: "ge",
    aten.lt.Tensor: "lt", aten.lt.Scalar: "lt", aten.le.Tensor: "le", aten.le.Scalar: "le",
}  # fmt: skip
SWAPPED = {"gt": "lt", "lt": "gt", "ge": "le", "le": "ge"}
NEGATED = {"gt": "le", "le": "gt", "ge": "lt", "lt": "ge"}
NOTS = frozenset({aten.logical_not.default, aten.bitwise_not.default})
CASTS = frozenset({aten.to.dtype, aten.to.dtype_layout, aten.to.other, aten._to_copy.default, aten.type_as.default})
ZEROS = frozenset({aten.zeros_like.default, aten.new_zeros.default, aten.zeros.default})
FULLS = {aten.full.default: 1, aten.full_like.default: 1, aten.new_full.default: 2, aten.scalar_tensor.default: 0}
"""Operators that fill a tensor with a number, and which of their arguments it is."""
HALVES = frozenset({torch.float16, torch.bfloat16})
MOVES = frozenset({aten.reshape.default, aten.expand.default, aten.unsqueeze.default, aten.lift_fresh_copy.default,
                   aten.detach.default, aten.clone.default, aten.alias.default})  # fmt: skip


@dataclass(frozen=True)
class _Mask:
    """A comparison with a constant, true where the relation "gt", "ge", "lt" or "le" holds: ``score > level``.

    With `magnitude` it is the score's magnitude that is compared, without an operator that computes it. `dtype` is what
    both are brought to before.
    """

    score: Node
    relation: str
    level: Any
    magnitude: bool = False
    dtype: torch.dtype | None = None


class RecogniseGates(NodeRewrite):
    """A value that is silent up to a constant threshold becomes one ``fxfreeze::gate``, hard and strict.

    ==========================================  ===================================
    h · 1[h > τ], in any order and cast         gate(h, τ)
    g · h · 1[h > τ]                            gate(h, τ) · g
    where(h > τ, h, 0), where(h ≤ τ, 0, h)      gate(h, τ)
    masked_fill(h, h ≤ τ, 0), threshold(h, τ)   gate(h, τ)
    any of them with \\|h\\| > τ, hardshrink      gate(h, τ, score="abs")
    relu(z) · 1[z > θ] (JumpReLU)               gate(relu(z), max(θ, 0))
    ==========================================  ===================================

    τ is a number, or constant and varies along one dim. ``h ≥ τ`` is another function, and stays; so does a comparison
    that rounds τ to half precision, as h > 0.3 does to 0.30078125 where h is bfloat16. What
    becomes a gate is the same for finite h; where h is infinite and it is shut, the product with 0 is NaN, the gate's
    result 0.

    Source: JumpReLU: arXiv 1907.09381, equation 1; hardshrink: Donoho and Johnstone, "Ideal spatial adaptation by
    wavelet shrinkage" (1994).
    """

    name, stage = "recognise-gates", "clean"
    targets = (aten.mul.Tensor, *WHERES, *FILLS, aten.threshold.default, aten.hardshrink.default)

    def rewrite(self, program: Program, node: Node, ctx: Context) -> bool | NoMatch:
        found = _gated(program, node)
        if found is None:
            return False
        if isinstance(found, NoMatch):
            return found
        value, mask, factor = found
        if mask.relation != "gt":
            below = "fires below its threshold, a gate above it"
            return fail("fires at its threshold too, a gate above it only" if mask.relation == "ge" else below, node)
        level = _constant(program, mask.level)
        assert level is not None
        if mask.dtype in HALVES and not torch.equal(level.to(mask.dtype).double(), level):
            return fail(f"its threshold is rounded to {mask.dtype} when it is compared, of a gate it is not", node)
        score = "abs" if mask.magnitude else "h"
        if mask.score is not value:
            if _operand(mask.score, aten.abs.default) is value:
                score = "abs"
            elif _rectified(value) is mask.score:
                level = level.clamp(min=0)
            else:
                return False  # what is compared is not what is kept
        placed = _placed(program, node, value, level)
        if isinstance(placed, NoMatch):
            return placed
        threshold = _replace(program, node, value, factor, mask.level, *placed, score)
        ctx.ledger.add(site=program.module_path(node), step="", requested="thresholded activation",
                       outcome="rewritten", executes=str(KERNEL.op), detail=f"above {threshold}")  # fmt: skip
        return True


Gated = tuple[Node, _Mask, Any]


def _gated(program: Program, node: Node) -> Gated | NoMatch | None:
    """What `node` keeps, where it keeps it, and a constant factor beside it (None: 1); None where it is no such."""
    given = arguments(node)
    if node.target is aten.mul.Tensor:
        return _product(program, node)
    if node.target is aten.hardshrink.default:
        return given["self"], _Mask(given["self"], "gt", given["lambd"], True, _dtype(given["self"], 0.0)), None
    if node.target is aten.threshold.default:
        if given["value"] != 0:
            return fail(f"below its threshold it is {given['value']}, a gate 0", node)
        return given["self"], _Mask(given["self"], "gt", given["threshold"]), None
    if node.target in FILLS:
        return _chosen(program, node, given["mask"], kept=given["self"], other=given["value"], negated=True)
    kept, other = given["self"], given["other"]
    if negated := _is_zero(program, kept):
        kept, other = other, kept
    return _chosen(program, node, given["condition"], kept=kept, other=other, negated=negated)


def _product(program: Program, node: Node) -> Gated | None:
    """h · 1[h > τ], or (g · h) · 1[h > τ]."""
    for kept, other in (node.args[:2], node.args[1::-1]):
        mask = _mask(program, other)
        if mask is None or not isinstance(kept, Node):
            continue
        if kept.target is aten.mul.Tensor and not _matches(kept, mask.score):
            for inner, factor in (kept.args[:2], kept.args[1::-1]):
                if isinstance(inner, Node) and _matches(inner, mask.score) and _constant(program, factor) is not None:
                    return inner, mask, factor
        return kept, mask, None
    return None


def _matches(value: Node, score: Node) -> bool:
    return value is score or _operand(score, aten.abs.default) is value or _rectified(value) is score


def _chosen(program: Program, node: Node, condition: Any, *, kept: Any, other: Any, negated: bool) -> Any:
    """`kept` where the condition holds (where it does not, if `negated`), and 0 elsewhere."""
    mask = _mask(program, condition)
    if mask is None or not isinstance(kept, Node) or not _matches(kept, mask.score):
        return None
    if not _is_zero(program, other):
        return fail("what stands in for a silent value is not 0", node)
    return kept, replace(mask, relation=NEGATED[mask.relation] if negated else mask.relation), None


def _mask(program: Program, value: Any) -> _Mask | None:
    """`value` as a comparison with a constant, through casts and negations; the constant is on the right."""
    negated = False
    while isinstance(value, Node) and (value.target in CASTS or value.target in NOTS):
        # ~ is a negation of bools only: after a cast to integers it is not.
        if value.target in NOTS and value.args[0].meta["val"].dtype != torch.bool:  # type: ignore[union-attr]
            return None
        negated ^= value.target in NOTS
        value = value.args[0]
    if not isinstance(value, Node) or value.target not in RELATIONS:
        return None
    relation, (left, right) = RELATIONS[value.target], value.args[:2]
    if _constant(program, left) is not None:
        left, right, relation = right, left, SWAPPED[relation]
    if not isinstance(left, Node) or _constant(program, right) is None or _constant(program, left) is not None:
        return None
    return _Mask(left, NEGATED[relation] if negated else relation, right, dtype=_dtype(left, right))


def _dtype(score: Node, level: Any) -> torch.dtype:
    """What a comparison of the two is made in."""
    return torch.result_type(score.meta["val"], level.meta["val"] if isinstance(level, Node) else level)


def _placed(program: Program, node: Node, value: Node, level: Tensor) -> tuple[Tensor, int] | NoMatch:
    """The thresholds [C] in float64 and the dim of `value` they lie along, counted from the end."""
    result, operand = node.meta["val"], value.meta["val"]
    if not operand.is_floating_point() or result.dtype != operand.dtype:
        return fail(f"its result is {result.dtype}, what it gates {operand.dtype}", node)
    if list(map(str, result.shape)) != list(map(str, operand.shape)):
        return fail("what it gates is broadcast", node)
    if bool(level.isnan().any()):
        return fail("its threshold is NaN", node)
    varying = [at - level.ndim for at, size in enumerate(level.shape) if size != 1]
    if len(varying) > 1:
        return fail("its threshold varies along more than one dim", node)
    dim = varying[0] if varying else _neurons(value)
    if dim is None or not isinstance(operand.shape[dim], int):
        return fail("no dim has a size that is known", node)
    return level.reshape(-1).expand(operand.shape[dim]).contiguous(), dim


def _neurons(value: Node) -> int | None:
    """The channels of the operator behind `value`, for one threshold that holds for all; else its last dim."""
    way, cursor = [], value
    while isinstance(cursor, Node) and cursor.op == "call_function" and cursor.target not in FORMS and cursor.args:
        way.append(cursor)
        cursor = cursor.args[0]  # type: ignore[assignment]
    shape = value.meta["val"].shape
    last = next((dim for dim in range(-1, -len(shape) - 1, -1) if isinstance(shape[dim], int)), None)
    form = FORMS.get(cursor.target) if isinstance(cursor, Node) else None
    if form is None or form.kind not in ("conv", "transposed"):
        return last
    # Before the dims of the window, of which a weight has two less than dims: without a batch no dim 1 of the result.
    dim: int | None = 1 - arguments(cursor)[form.weight].meta["val"].ndim
    for item in reversed(way):
        step = passage(item)
        alike = str(item.meta["val"].shape) == str(item.args[0].meta["val"].shape)  # type: ignore[union-attr]
        dim = step.to_result(dim) if step is not None and dim is not None else dim if alike else None
    return dim if dim is not None and isinstance(shape[dim], int) else last


def _replace(
    program: Program, node: Node, value: Node, factor: Any, given: Any, level: Tensor, dim: int, score: str
) -> str:
    """Put the gate in the place of `node`; the name of its thresholds."""
    operand, old = value.meta["val"], program.constant(given)
    dtype = torch.promote_types(operand.dtype, torch.float32)
    if old is not None and old.ndim and old.is_floating_point():
        dtype = torch.promote_types(dtype, given.meta["val"].dtype)
    if old is not None and given.meta["val"].dtype == dtype and torch.equal(old.double(), level):
        threshold = given  # the user's own, under its name
    else:
        name = str(given.target) if old is not None else f"{program.module_path(node)}.threshold".lstrip(".")
        level = level.to(operand.device)
        threshold = program.add_constant(name, level, dtype=dtype, before=node, like=node)
    new = program.call(KERNEL.op, value, threshold, before=node, like=node, score=score, dim=dim)
    if factor is not None:
        new = program.call(aten.mul.Tensor, new, factor, before=node, like=node)
    program.replace(node, new)
    return str(threshold.target)


def _operand(node: Any, target: Any) -> Any:
    """The first operand of a call of `target`, else None."""
    return node.args[0] if isinstance(node, Node) and node.target is target else None


def _rectified(node: Node) -> Any:
    """z where `node` is max(z, 0)."""
    if node.target is aten.clamp_min.default and node.args[1] == 0 and type(node.args[1]) in (int, float):
        return node.args[0]
    if node.target is aten.clamp.default:
        given = arguments(node)
        return (
            given["self"] if type(given["min"]) in (int, float) and given["min"] == 0 and given["max"] is None else None
        )
    return _operand(node, aten.relu.default)


def _constant(program: Program, value: Any) -> Tensor | None:
    """A number, a constant, or a view of one, as a real float64 tensor."""
    if type(value) in (int, float):
        return torch.tensor(value, dtype=torch.float64)
    if isinstance(value, Node) and value.target in MOVES:
        inner = _constant(program, value.args[0])
        rest = value.args[1:]
        plain = isinstance(value.meta["val"], Tensor) and all(isinstance(size, int) for size in value.meta["val"].shape)
        return value.target(inner, *rest) if inner is not None and plain else None  # type: ignore[operator]
    constant = program.constant(value)
    return None if constant is None or constant.is_complex() else constant.detach().double()


def _is_zero(program: Program, value: Any) -> bool:
    """Whether `value` is 0 everywhere, by construction."""
    while isinstance(value, Node) and (value.target in MOVES or value.target in CASTS):
        value = value.args[0]
    if isinstance(value, Node) and value.target in ZEROS:
        return True
    if isinstance(value, Node) and value.target in FULLS:
        value = value.args[FULLS[value.target]]
    constant = _constant(program, value)
    return constant is not None and bool((constant == 0).all())
