"""Where integers meet floats in ONNX: forms that ONNX Runtime runs as they are written.

Between integers it would quantize a weight that is to stay in floats; and it would compute a product of floats with a
weight of integers in floats in front of a ReLU, and in front of what is quantized. In front of a ReLU that is not
quantized it would do so with a Gemm of integers, too.
"""

from __future__ import annotations

from typing import Any

from .onnx_graph import constant, describe, is_quantized, is_weight, number


def would_be_quantized(node: Any) -> bool:
    """A layer with a weight in floats that reads integers, and whose result, or its ReLU, is read as integers alone."""
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or node.inputs[1].const_value is None:
        return False
    source, value = node.inputs[0].producer(), node.outputs[0]
    if source is None or source.op_type != "DequantizeLinear" or len(source.inputs[1].shape or ()) != 0:
        return False
    while len(readers := [reader for reader, _ in value.uses()]) == 1 and readers[0].op_type in ("Relu", "Clip"):
        value = readers[0].outputs[0]
    return len(readers) == 1 and readers[0].op_type == "QuantizeLinear"


def read_by_channel(graph: Any, node: Any) -> None:
    import numpy
    import onnx_ir

    source, weight = node.inputs[0].producer(), node.inputs[1].const_value.shape
    if node.op_type == "Conv":
        channels = weight[1] * max(number(node, "group"), 1)
    else:
        transposed = node.op_type == "Gemm" and number(node, "transB")
        channels = weight[1 if transposed else 0]
    scales = [
        constant(graph, f"{value.name}.each", numpy.repeat(value.const_value.numpy(), channels))
        for value in source.inputs[1:3]
    ]
    own = onnx_ir.node("DequantizeLinear", inputs=[source.inputs[0], *scales], attributes={"axis": 1})
    own.outputs[0].name = f"{node.name}.input"
    graph.insert_before(node, own)
    node.replace_input_with(0, own.outputs[0])


def computes_in_floats(node: Any) -> bool:
    """A product of floats with a weight of integers."""
    if node.op_type not in ("MatMul", "Gemm"):
        return False
    source, weight = (value.producer() for value in node.inputs[:2])
    return weight is not None and is_weight(weight) and (source is None or source.op_type != "DequantizeLinear")


def rectifies_floats(node: Any) -> bool:
    """A Gemm of integers whose ReLU gives floats to something that does not quantize them."""
    if node.op_type != "Gemm":
        return False
    source, weight = (value.producer() for value in node.inputs[:2])
    reads_integers = source is not None and source.op_type == "DequantizeLinear" and weight is not None
    return reads_integers and is_weight(weight) and not is_quantized(node.outputs[0])


def keep_apart(graph: Any, product: Any) -> None:
    """Let the ReLU behind the product be a Max with 0, or put one with the least number where it is quantized next."""
    import numpy

    value = product.outputs[0]
    readers = [reader for reader, _ in value.uses()]
    if [reader.op_type for reader in readers] == ["Relu"]:
        _as_max(graph, product, readers[0])
    elif [reader.op_type for reader in readers] == ["QuantizeLinear"]:
        import onnx_ir

        dtype = product.inputs[1].producer().inputs[1].const_value.numpy().dtype
        least = constant(graph, f"{product.name}.least", numpy.array(numpy.finfo(dtype).min, dtype))
        kept = onnx_ir.node("Max", inputs=[value, least], name=f"{product.name}.kept")
        describe(kept, f"{value.name}.kept", value)
        graph.insert_before(readers[0], kept)
        readers[0].replace_input_with(0, kept.outputs[0])


def _as_max(graph: Any, product: Any, relu: Any) -> None:
    import numpy
    import onnx_ir

    dtype = product.inputs[1].producer().inputs[1].const_value.numpy().dtype
    zero = constant(graph, f"{product.name}.zero", numpy.zeros((), dtype))
    largest = onnx_ir.node("Max", inputs=[product.outputs[0], zero], name=relu.name)
    describe(largest, relu.outputs[0].name, relu.outputs[0])
    graph.insert_before(relu, largest)
    relu.outputs[0].replace_all_uses_with(largest.outputs[0], replace_graph_outputs=True)
    graph.remove(relu, safe=True)
