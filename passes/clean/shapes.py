"""Write borrowed shapes as numbers, so that no value is read for its shape alone."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.fx import Node

from fxfreeze.program import Program
from fxfreeze.rewrite import Context, NodeRewrite, NoMatch, fail

aten = torch.ops.aten


class ExplicitShapes(NodeRewrite):
    """``reshape_as(x, y)`` becomes ``reshape(x, [-1, …])``, and ``expand_as`` ``expand``, where numbers can say it."""

    name, stage = "explicit-shapes", "clean"
    targets: ClassVar = (aten.reshape_as.default, aten.view_as.default, aten.expand_as.default)

    def rewrite(self, program: Program, node: Node, ctx: Context) -> bool | NoMatch:
        value: Node = node.args[0]  # type: ignore[assignment]
        before, after = value.meta["val"].shape, node.meta["val"].shape
        expands = node.target is aten.expand_as.default
        sizes = [size if isinstance(size, int) else -1 for size in after]
        if expands:
            # In expand, −1 means: as it is.
            kept = [None] * (len(after) - len(before)) + list(before)
            if any(size == -1 and str(old) != str(new) for size, old, new in zip(sizes, kept, after, strict=True)):
                return fail("a dim grows to a symbolic size", node)
        elif sizes.count(-1) > 1 or 0 in sizes:
            return fail("more than one size is symbolic", node)
        target = aten.expand.default if expands else aten.reshape.default
        new = program.call(target, value, sizes, before=node, like=node)
        new.meta["val"] = node.meta["val"]
        program.replace(node, new)
        return True
