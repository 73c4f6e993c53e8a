"""Remove what means nothing to a frozen graph: dropout, assertions, detaches, copies and moves that change nothing."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from fxfreeze.program import Program, is_effectful
from fxfreeze.rewrite import Context, Pass

aten = torch.ops.aten

DROPOUTS = frozenset(
    {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default,
     aten.feature_alpha_dropout.default}
)  # fmt: skip
ALIASES = frozenset({aten.detach.default, aten.alias.default, aten.lift.default})
COPIES = frozenset(
    {aten.clone.default, aten.lift_fresh_copy.default, aten.contiguous.default, aten.to.dtype, aten.to.dtype_layout,
     aten.to.device, aten.to.other, aten._to_copy.default, aten.type_as.default}
)  # fmt: skip
# The identity whenever the result has the operand's shape. (aten.view never occurs: capture makes it a reshape.)
# Not squeeze: a symbolic dim that the trace saw as 2 may be 1.
RESHAPES = frozenset({aten.reshape.default, aten.expand.default, aten.flatten.using_ints, aten.slice.Tensor})
# Views that fail, or mean something else, on other strides.
STRIDE_READERS = frozenset({aten.view_as_complex.default, aten.view_as_real.default, aten.view.dtype,
                            aten.as_strided.default})  # fmt: skip


class StripNoOps(Pass):
    """Forward the operand of every operator that returns it bit for bit, and drop run-time assertions.

    A functional graph has no aliasing to protect, so copies and detaches are identities too; only a copy that keeps a
    caller's hands off an input or a constant stays. What the assertions said about input sizes is checked by the
    artifact when it binds its inputs.
    """

    name, stage = "strip-noops", "clean"

    def run(self, program: Program, ctx: Context) -> int:
        count = 0
        for node in list(program.graph.nodes):
            if node.op != "call_function":
                continue
            if is_effectful(node):
                # The condition it looked at dies with it in the sweep.
                program.graph.erase_node(node)
                count += 1
            elif node.users and (operand := unchanged_operand(node)) is not None:
                program.replace(node, operand)
                count += 1
        return count


class StripLateNoOps(StripNoOps):
    """The same in what the plan's steps put in, once it does not train any more; and x − x.detach(), which is 0 and has
    a gradient: what an operator without a gradient is given one by."""

    name, stage = "strip-late-noops", "freeze"

    def run(self, program: Program, ctx: Context) -> int:
        count = 0
        for node in program.graph.find_nodes(op="call_function", target=aten.add.Tensor):
            first, second = node.args[:2]
            if len(node.args) == 2 and not node.kwargs and _is_zero(second) and _same_kind(
                node.meta.get("val"), first.meta.get("val")
            ):  # fmt: skip
                program.replace(node, first)
                count += 1
        return count + super().run(program, ctx)


def _is_zero(node: Any) -> bool:
    if not isinstance(node, Node) or node.target is not aten.sub.Tensor or node.kwargs or len(node.args) != 2:
        return False
    kept, cut = node.args
    return isinstance(cut, Node) and cut.target is aten.detach.default and cut.args[0] is kept


def unchanged_operand(node: Node) -> Node | None:
    """The operand that `node` returns as it is (values, shape, dtype, device), or None."""
    operand = _first_operand(node)
    if operand is None or not _same_kind(node.meta.get("val"), operand.meta.get("val")):
        return None
    if node.target in DROPOUTS:
        return operand if not node.args[2] or node.args[1] == 0 else None
    if node.target in COPIES:
        return None if _asks_for_layout(node) or _feeds_stride_reader(node) or _guards(node, operand) else operand
    if node.target in ALIASES or node.target in RESHAPES or _moves_nothing(node) or _neutral(node):
        return operand
    return None


def _first_operand(node: Node) -> Node | None:
    first = node.args[0] if node.args else None
    if node.target is aten.cat.default and isinstance(first, list | tuple) and len(first) == 1:
        first = first[0]
    return first if isinstance(first, Node) else None


def _same_kind(value: Any, source: Any) -> bool:
    if not (isinstance(value, torch.Tensor) and isinstance(source, torch.Tensor)):
        return False
    same = value.dtype == source.dtype and value.device == source.device and value.ndim == source.ndim
    # Sizes must be the same expression: comparing symbols by value would add a guard to the shape environment.
    return same and all(str(a) == str(b) for a, b in zip(value.shape, source.shape, strict=True))


def _asks_for_layout(node: Node) -> bool:
    given = [*node.args, *node.kwargs.values()]
    plain = (torch.preserve_format, torch.contiguous_format)
    return any(isinstance(item, torch.memory_format) and item not in plain for item in given)


def _feeds_stride_reader(node: Node) -> bool:
    """Whether a view that depends on strides reads `node`, directly or through other views."""
    seen, frontier = {node}, [node]
    while frontier:
        for user in frontier.pop().users:
            if user.target in STRIDE_READERS:
                return True
            if user not in seen and _may_view(user):
                seen.add(user)
                frontier.append(user)
    return False


def _may_view(node: Node) -> bool:
    """Whether the result of `node` may share memory with its first operand."""
    if node.target in RESHAPES or node.target in COPIES:
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(item.alias_info is not None for item in schema.arguments)


def _guards(node: Node, operand: Node) -> bool:
    """Whether a copy is returned to the caller, who would otherwise hold an input or a constant itself."""
    if all(user.op != "output" for user in node.users):
        return False
    while operand.op == "call_function" and _may_view(operand) and isinstance(operand.args[0], Node):
        operand = operand.args[0]
    return operand.op in ("placeholder", "get_attr")


def _moves_nothing(node: Node) -> bool:
    ndim = node.meta["val"].ndim
    if node.target is aten.permute.default:
        return [dim % ndim for dim in node.args[1]] == list(range(ndim))  # type: ignore[union-attr, operator]
    if node.target is aten.transpose.int:
        return ndim == 0 or node.args[1] % ndim == node.args[2] % ndim  # type: ignore[operator]
    if node.target in (aten.pad.default, aten.constant_pad_nd.default):
        return all(size == 0 for size in node.args[1])  # type: ignore[union-attr]
    return node.target is aten.cat.default and len(node.args[0]) == 1  # type: ignore[arg-type]


def _neutral(node: Node) -> bool:
    """x·1, x/1, x−0 and integer x+0, by a Python number. Not floating x+0: it turns −0 into +0."""
    number: Any = node.args[1] if len(node.args) == 2 and not node.kwargs else None
    if type(number) not in (int, float):
        return False
    if node.target in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar):
        return bool(number == 1)
    if node.target in (aten.sub.Tensor, aten.sub.Scalar):
        return bool(number == 0) and math.copysign(1, number) > 0
    return node.target in (aten.add.Tensor, aten.add.Scalar) and bool(number == 0) and not _is_inexact(node)


def _is_inexact(node: Node) -> bool:
    value = node.meta["val"]
    return bool(value.is_floating_point() or value.is_complex())
