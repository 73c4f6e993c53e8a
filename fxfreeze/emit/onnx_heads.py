"""Tversky heads on integers in ONNX: products of bytes, and sums of minima of integers."""

from __future__ import annotations

from typing import Any

from .onnx_graph import constant, drop_unread


def integer_sums(graph: Any) -> list[str]:
    """Let products of bytes that were widened multiply the bytes, and find the sums of minima of integers.

    Returns:
        Names of the nodes that sum the features of Tversky heads, in the order of the graph.
    """
    found: list[str] = []
    bytes_of: dict[Any, Any] = {}
    for node in list(graph.all_nodes()):
        if node.op_type == "MatMul" and _is_int32(node.outputs[0]):
            _multiply_bytes(graph, node, bytes_of)
            found.append(node.name)
        elif node.op_type == "ReduceSum" and _is_int32(node.inputs[0]):
            source = node.inputs[0].producer()
            found += [node.name] if source is not None and source.op_type == "Min" else []
    drop_unread(graph)
    return found


def _is_int32(value: Any) -> bool:
    import onnx_ir

    return bool(value.dtype == onnx_ir.DataType.INT32)


def _multiply_bytes(graph: Any, node: Any, bytes_of: dict[Any, Any]) -> None:
    """MatMulInteger of what a MatMul reads as int32, where both sides are bytes; those are remembered."""
    import onnx_ir

    for value in node.inputs:
        if value not in bytes_of:
            bytes_of[value] = _narrow(graph, node, value)
    operands = [bytes_of[value] for value in node.inputs]
    if None in operands:
        return
    product = onnx_ir.node("MatMulInteger", inputs=operands, outputs=[_like(node.outputs[0])], name=node.name)
    product.metadata_props.update(node.metadata_props)
    graph.insert_before(node, product)
    node.outputs[0].replace_all_uses_with(product.outputs[0])
    graph.remove(node, safe=True)


def _narrow(graph: Any, reader: Any, value: Any) -> Any:
    """The uint8 value that `value`, int32, was made of; None where it was made of something else."""
    import onnx_ir

    source, stored = value.producer(), value.const_value
    if stored is not None and source is None:
        array = stored.numpy()
        fits = 0 <= array.min(initial=0) and array.max(initial=0) <= 255
        return constant(graph, f"{value.name}.bytes", array.astype("uint8")) if fits else None
    if source is None or source.op_type != "Cast":
        return None
    before = source.inputs[0]
    if before.dtype == onnx_ir.DataType.UINT8:
        return before
    if before.dtype != onnx_ir.DataType.BOOL:
        return None
    narrow = onnx_ir.node("Cast", inputs=[before], attributes={"to": onnx_ir.DataType.UINT8.value})
    narrow.outputs[0].name = f"{value.name}.bytes"
    narrow.outputs[0].type, narrow.outputs[0].shape = onnx_ir.TensorType(onnx_ir.DataType.UINT8), before.shape
    graph.insert_before(reader, narrow)
    return narrow.outputs[0]


def _like(value: Any) -> Any:
    import onnx_ir

    return onnx_ir.Value(name=f"{value.name}.whole", shape=value.shape, type=value.type)
