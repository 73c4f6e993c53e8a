"""Embeddings of integers in ONNX: rows are looked up before they become floats.

ONNX Runtime 1.32 makes nothing of DequantizeLinear and a Gather behind it: the whole table would become floats in every
call. Standard operators cannot look up integers of 4 bits. So embeddings are ``GatherBlockQuantized`` of ONNX Runtime's
own domain, or, with 8 bits and in portable files, a Gather of integers and one of scales, which are multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .onnx_graph import constant, describe, fits_4_bits, has_zero_point, number, pack

_DOMAIN = "com.microsoft"
_LEAST = 16
"""Elements that share a scale, in GatherBlockQuantized: so many, or a larger power of two."""


def look_up(graph: Any, node: Any, packed: dict[int, Any], portable: bool = False) -> Any:
    """Where a Gather reads rows of the weight, let it read integers; what does so then, or None."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or uses[0][0].op_type != "Gather" or uses[0][1] != 0 or len(node.inputs[0].shape) != 2:
        return None
    gather, block, axis = uses[0][0], number(node, "block_size"), number(node, "axis")
    scale = node.inputs[1]
    # Else its scales are not those of rows, or its integers not symmetric.
    straight = axis % 2 == (1 if block else 0) or not scale.shape
    if number(gather, "axis") != 0 or not straight or has_zero_point(node):
        return None
    if not portable and block >= _LEAST and block & (block - 1) == 0 and fits_4_bits(node):
        pack(graph, node, packed)
        found = _gather_blocks(graph, node, gather, block)
    else:
        found = _gather_rows(graph, node, gather, block)
    graph.remove(node, safe=True)
    return found


def _gather_blocks(graph: Any, node: Any, gather: Any, block: int) -> Any:
    import onnx_ir

    graph.opset_imports[_DOMAIN] = 1
    found = onnx_ir.node(
        "GatherBlockQuantized", domain=_DOMAIN, inputs=[node.inputs[0], gather.inputs[1], node.inputs[1]],
        attributes={"gather_axis": 0, "quantize_axis": 1, "block_size": block},
    )  # fmt: skip
    _replace(graph, gather, [found])
    return found


def _gather_rows(graph: Any, node: Any, gather: Any, block: int) -> Any:
    """Of a table with a byte each: Gather, and a product with the scales of these rows.

    With DequantizeLinear ONNX Runtime would take a linear layer that reads the rows for one of integers on both sides.
    """
    import numpy
    import onnx_ir

    ids, (values, scale) = gather.inputs[1], node.inputs[:2]
    if len(scale.shape) < 2:  # ONNX Runtime makes no MatMulNBits of a product whose scales something else reads, too
        scale = constant(graph, f"{scale.name}.rows", scale.const_value.numpy())
    nodes: list[Any] = []

    def add(kind: str, *inputs: Any, **attributes: int) -> Any:
        nodes.append(onnx_ir.node(kind, inputs=list(inputs), attributes=attributes))
        nodes[-1].outputs[0].name = f"{gather.name}.{len(nodes)}"
        return nodes[-1].outputs[0]

    def sizes(name: str, *found: int) -> Any:
        return constant(graph, f"{gather.name}.{name}", numpy.array(found, "int64"))

    rows = add("Cast", add("Gather", values, ids, axis=0), to=int(scale.dtype))
    if not scale.shape:
        add("Mul", rows, scale)
    else:
        steps = add("Unsqueeze", add("Gather", scale, ids, axis=0), sizes("last", -1))
        same = [0] * len(ids.shape)
        parts = add("Reshape", rows, sizes("parts", *same, -1, block)) if block else rows
        floats = add("Mul", parts, steps)
        if block:
            add("Reshape", floats, sizes("whole", *same, values.shape[1]))
    _replace(graph, gather, nodes)
    return nodes[0]


def _replace(graph: Any, old: Any, new: Sequence[Any]) -> None:
    """`new` in the place of `old`: the first gets its name, the last its output."""
    import onnx_ir

    new[0].name = old.name
    for position, node in enumerate(new[1:], 1):
        node.name = f"{old.name}.{position}"
    for key, value in old.metadata_props.items():
        new[0].metadata_props[key] = value
    describe(new[-1], old.outputs[0].name, old.outputs[0])
    onnx_ir.convenience.replace_nodes_and_values(graph, old, [old], new, old.outputs, new[-1].outputs)
