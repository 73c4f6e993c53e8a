"""Where integers meet floats in ONNX: forms that ONNX Runtime runs as they are written.

Between integers it would quantize a weight that is to stay in floats, and in front of a ReLU in floats it would compute
a product of integers in floats.
"""

from __future__ import annotations

from typing import Any

from .onnx_graph import constant, is_weight


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
        channels = weight[1] * (node.attributes["group"].as_int() if "group" in node.attributes else 1)
    else:
        transposed = node.op_type == "Gemm" and node.attributes["transB"].as_int()
        channels = weight[1 if transposed else 0]
    scales = [
        constant(graph, f"{value.name}.each", numpy.repeat(value.const_value.numpy(), channels))
        for value in source.inputs[1:3]
    ]
    own = onnx_ir.node("DequantizeLinear", inputs=[source.inputs[0], *scales], attributes={"axis": 1})
    own.outputs[0].name = f"{node.name}.input"
    graph.insert_before(node, own)
    node.replace_input_with(0, own.outputs[0])


def part_from_relu(graph: Any, gemm: Any) -> None:
    import numpy
    import onnx_ir

    weight, readers = gemm.inputs[1].producer(), [reader for reader, _ in gemm.outputs[0].uses()]
    if weight is None or not is_weight(weight) or [reader.op_type for reader in readers] != ["Relu"]:
        return
    (relu,) = readers
    if {reader.op_type for reader, _ in relu.outputs[0].uses()} == {"QuantizeLinear"}:
        return
    zero = constant(graph, f"{gemm.name}.zero", numpy.zeros((), weight.inputs[1].const_value.numpy().dtype))
    largest = onnx_ir.node("Max", inputs=[gemm.outputs[0], zero], name=relu.name)
    result, relu_result = largest.outputs[0], relu.outputs[0]
    result.shape, result.type, result.name = relu_result.shape, relu_result.type, relu_result.name
    graph.insert_before(relu, largest)
    relu_result.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(relu, safe=True)
