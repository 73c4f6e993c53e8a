"""Layers with a scale per call in ONNX: DynamicQuantizeLinear and MatMulInteger, for which runtimes have kernels."""

from __future__ import annotations

from typing import Any

from .onnx_graph import sweep

PRODUCT = "MatMulInteger"


def to_dynamic(graph: Any) -> set[str]:
    """Let products read what DynamicQuantizeLinear gives, where a QuantizeLinear has a scale that was computed.

    Such a scale is of the smallest and the largest value, and 0, as :mod:`fxfreeze.passes.quantize.dynamic` computes
    it, and as DynamicQuantizeLinear does. What nothing reads then is removed.

    Returns:
        Names of the products.
    """
    names: set[str] = set()
    for node in list(graph.all_nodes()):
        if node.op_type != "QuantizeLinear" or node.inputs[1].const_value is not None:
            continue
        products = [
            (reader, reader.inputs[1].producer())
            for floats, _ in node.outputs[0].uses()
            if floats.op_type == "DequantizeLinear"
            for reader, place in floats.outputs[0].uses()
            if place == 0 and _fits(reader)
        ]
        if products:
            integers = _insert(
                graph, node, "DynamicQuantizeLinear", [node.inputs[0]], f"{node.name}.dynamic", outputs=3
            )
            for reader, weight in products:
                names.add(_multiply(graph, reader, weight, integers))
    sweep(graph)
    return names


def _fits(reader: Any) -> bool:
    """A product with a weight [in, out] in int8 and one scale for all or per output, and float32 around it."""
    import onnx_ir

    if reader.op_type not in ("MatMul", "Gemm") or (reader.op_type == "Gemm" and reader.attributes["transB"].as_int()):
        return False
    weight = reader.inputs[1].producer()
    if weight is None or weight.op_type != "DequantizeLinear" or weight.inputs[0].const_value is None:
        return False
    scale = weight.inputs[1].const_value
    per_output = len(scale.shape) == 0 or (len(scale.shape) == 1 and weight.attributes["axis"].as_int() == 1)
    return per_output and scale.dtype == onnx_ir.DataType.FLOAT and len(weight.inputs[0].const_value.shape) == 2


def _multiply(graph: Any, reader: Any, weight: Any, integers: Any) -> str:
    """(x's integers · W's integers) · (x's scale · W's scales) + bias instead of `reader`; the product's name."""
    import onnx_ir

    values, step, zero = integers.outputs
    name = reader.name
    product = _insert(graph, reader, PRODUCT, [values, weight.inputs[0], zero], f"{name}.integer")
    wide = _insert(graph, reader, "Cast", [product.outputs[0]], f"{name}.cast", {"to": onnx_ir.DataType.FLOAT.value})
    scale = _insert(graph, reader, "Mul", [step, weight.inputs[1]], f"{name}.scale")
    last = _insert(graph, reader, "Mul", [wide.outputs[0], scale.outputs[0]], f"{name}.scaled")
    if len(reader.inputs) > 2 and reader.inputs[2] is not None:
        last = _insert(graph, reader, "Add", [last.outputs[0], reader.inputs[2]], f"{name}.biased")
    old, new = reader.outputs[0], last.outputs[0]
    new.name, new.shape, new.type = old.name, old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(reader, safe=True)
    return str(product.name)


def _insert(
    graph: Any, before: Any, kind: str, inputs: list[Any], name: str, attributes: Any = None, outputs: int = 1
) -> Any:
    import onnx_ir

    node = onnx_ir.node(kind, inputs=inputs, attributes=attributes or {}, num_outputs=outputs, name=name)
    for number, value in enumerate(node.outputs):
        value.name = f"{name}.{number}" if number else name
    graph.insert_before(before, node)
    return node
