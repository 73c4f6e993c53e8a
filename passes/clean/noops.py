"""Remove what means nothing to a frozen graph: dropout, assertions, detaches, and copies to the same dtype."""

from __future__ import annotations

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
COPIES = frozenset(
    {aten.detach.default, aten.alias.default, aten.clone.default, aten.lift_fresh_copy.default, aten.contiguous.default,
     aten.lift.default}
)  # fmt: skip
CASTS = frozenset({aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default,
                   aten.type_as.default})  # fmt: skip
RESHAPES = frozenset({aten.reshape.default, aten.expand.default, aten.flatten.using_ints})
# Views that fail, or mean something else, on other strides. (aten.view never occurs: capture makes it a reshape.)
STRIDE_READERS = frozenset({aten.view_as_complex.default, aten.view_as_real.default, aten.view.dtype,
                            aten.as_strided.default})  # fmt: skip


class StripNoOps(Pass):
    """Forward the operand of every operator that returns it unchanged, and drop run-time assertions.

    A functional graph has no aliasing to protect, so copies and detaches are identities too. Contracts on input sizes
    that the assertions stated are checked by the artifact when it binds its inputs.
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
            elif node.users and is_noop(node):
                program.replace(node, node.args[0])  # type: ignore[arg-type]
                count += 1
        return count


def is_noop(node: Node) -> bool:
    """Whether `node` returns its first operand, values, shape, dtype and all."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return False
    if node.target in DROPOUTS:
        return not node.args[2]
    if node.target in COPIES:
        return not _fixes_strides(node)
    if node.target in CASTS or node.target in RESHAPES:
        return _same_value_type(node.meta["val"], source.meta["val"])
    return False


def _fixes_strides(node: Node) -> bool:
    """Whether a copy is there for its memory layout: a format is asked for, or a reader depends on strides."""
    asks = "memory_format" in node.kwargs or any(isinstance(arg, torch.memory_format) for arg in node.args)
    return asks or any(user.target in STRIDE_READERS for user in node.users)


def _same_value_type(value: Any, source: Any) -> bool:
    if not (isinstance(value, torch.Tensor) and isinstance(source, torch.Tensor)):
        return False
    same = value.dtype == source.dtype and value.device == source.device and value.ndim == source.ndim
    # Sizes must be the same expression: comparing symbols by value would add a guard to the shape environment.
    return same and all(str(a) == str(b) for a, b in zip(value.shape, source.shape, strict=True))
