"""Write selected adapters that no kernel takes as plain operators, which a compiler fuses with what is around them."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node

from fxfreeze.inline import inline
from fxfreeze.kernels import select_conv, select_lora
from fxfreeze.program import Program
from fxfreeze.rewrite import Context, NodeRewrite, NoMatch

from .._operators import arguments


class InlineSelected(NodeRewrite):
    """On a CPU they become their plain-torch form; on a GPU the kernel of ``fxfreeze::select_lora`` is launched.

    That kernel multiplies. What is looked up, and what is convolved, is plain torch everywhere.
    """

    name, stage, targets = "inline-selected", "lower", (select_lora.KERNEL.op, select_conv.KERNEL.op)

    def rewrite(self, program: Program, node: Node, ctx: Context) -> bool | NoMatch:
        given, kernel = arguments(node), select_conv.KERNEL
        if node.target is select_lora.KERNEL.op:
            kernel = select_lora.KERNEL
            if node.meta["val"].device.type != "cpu" and given["x"].meta["val"].is_floating_point():
                return False

        def function(x: Tensor, a: Tensor, b: Tensor, ids: Tensor) -> Tensor:
            result: Tensor = kernel.reference(x, a, b, ids, **node.kwargs)
            return result

        ahead = set(program.graph.nodes)
        result = inline(program, function, *(given[key] for key in ("x", "a", "b", "ids")), before=node, like=node)
        for new in set(program.graph.nodes) - ahead:
            new.meta.pop("fxfreeze", None)
        program.replace(node, result)
        return True
