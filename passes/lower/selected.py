"""Write selected adapters that no kernel takes as plain operators, which a compiler fuses with what is around them."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node

from fxfreeze.inline import inline
from fxfreeze.kernels.select_lora import KERNEL, reference
from fxfreeze.program import Program
from fxfreeze.rewrite import Context, NodeRewrite, NoMatch

from .._operators import arguments


class InlineSelected(NodeRewrite):
    """On a CPU ``fxfreeze::select_lora`` becomes its plain-torch form; on a GPU its kernel is launched."""

    name, stage, targets = "inline-selected", "lower", (KERNEL.op,)

    def rewrite(self, program: Program, node: Node, ctx: Context) -> bool | NoMatch:
        if node.meta["val"].device.type != "cpu":
            return False
        given = arguments(node)

        def function(x: Tensor, a: Tensor, b: Tensor, ids: Tensor) -> Tensor:
            return reference(x, a, b, ids, form=given["form"])

        ahead = set(program.graph.nodes)
        result = inline(program, function, *(given[key] for key in ("x", "a", "b", "ids")), before=node, like=node)
        for new in set(program.graph.nodes) - ahead:
            new.meta.pop("fxfreeze", None)
        program.replace(node, result)
        return True
