"""A plain torch function as operators of a program: what a pass puts into the graph can be written as code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from .errors import PassError
from .program import Program, first_line


def inline(program: Program, function: Callable[..., torch.Tensor], *operands: Node, before: Node, like: Node) -> Node:
    """Trace `function` on `operands` and put its operators before `before`; provenance is copied from `like`.

    Args:
        function: of as many tensors as there are operands, to one tensor; must not branch on their values. Symbolic
            sizes stay symbolic, composite operators (linear, matmul) whole.

    Returns:
        The node of the result.

    Raises:
        PassError: the function does not run on these shapes and dtypes.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    def body(*values: torch.Tensor) -> torch.Tensor:  # make_fx counts defaults as operands
        return function(*values)

    try:
        with torch.no_grad():
            traced = make_fx(body, tracing_mode="fake", pre_dispatch=True)(*(item.meta["val"] for item in operands))
    except Exception as error:
        raise PassError(
            f"{getattr(function, '__name__', function)} cannot be traced: {first_line(error)}",
            where=program.module_path(like),
        ) from error
    traced.graph.eliminate_dead_code()
    copies: dict[Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), operands, strict=True))
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            value = getattr(traced, str(node.target))
            copies[node] = program.add_constant(f"{like.name}.{node.name}", value, before=before, like=like)
        elif node.op == "call_function":
            args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), copies.__getitem__)
            copies[node] = program.call(node.target, *args, before=before, like=like, **kwargs)  # type: ignore[arg-type]
    result: Node = copies[traced.graph.output_node().args[0]]  # type: ignore[index]
    return result
