"""Write gates that no kernel took as plain operators, which a compiler fuses with what is around them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Node

from fxfreeze.inline import inline
from fxfreeze.kernels.gate import KERNEL, reference
from fxfreeze.program import Program
from fxfreeze.rewrite import Context, NodeRewrite, NoMatch

from .._gates import tell_firing
from .._operators import arguments, aten

_OPERANDS = ("h", "threshold", "gain", "temperature", "mode")


class InlineGates(NodeRewrite):
    """A hard gate becomes where(s(h) > τ, g·h, 0), a soft one g·h·σ(…).

    The comparison keeps the gate's origin with the primitive FIRES: :meth:`fxfreeze.Artifact.firing` reads it there.
    """

    name, stage, targets = "inline-gates", "lower", (KERNEL.op,)

    def rewrite(self, program: Program, node: Node, ctx: Context) -> bool | NoMatch:
        given = arguments(node)
        operands = {name: given[name] for name in _OPERANDS if given[name] is not None}

        def function(*values: Tensor) -> Tensor:
            named: dict[str, Any] = dict(zip(operands, values, strict=True))
            return reference(**named, score=given["score"], dim=given["dim"])

        ahead = set(program.graph.nodes)
        result = inline(program, function, *operands.values(), before=node, like=node)
        for new in set(program.graph.nodes) - ahead:
            new.meta.pop("fxfreeze", None)  # one node tells of the gate
            if new.target is aten.gt.Tensor:
                tell_firing(program, new, node, given["dim"])
        program.replace(node, result)
        return True
