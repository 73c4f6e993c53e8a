"""Quantized layers in ONNX: QuantizeLinear and DequantizeLinear, and what ONNX Runtime makes of them.

Where dequantize → layer → quantize stand together, ONNX Runtime's optimiser puts one integer kernel in their place, or
does not. Which of the two is read from the graph that it runs.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..kernels.dequantize import KERNEL as DEQUANTIZE
from ..kernels.quantize import KERNEL as QUANTIZE
from .onnx_between import stay_whole
from .onnx_dynamic import PRODUCT, to_dynamic
from .onnx_floats import computes_in_floats, keep_apart, read_by_channel, rectifies_floats, would_be_quantized
from .onnx_graph import constant, describe, drop_unread, is_weight, pack, set_number
from .onnx_lookups import look_up
from .onnx_parts import cut
from .onnx_static import to_floats

KERNELS = frozenset({
    "QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul", "MatMulNBits", "GatherBlockQuantized", "ReduceSum",
})  # fmt: skip
"""Operators of ONNX and ONNX Runtime that multiply integers, or unpack them block by block while they multiply; and the
one that sums what it is given, which is asked about where that is integers."""


def translations() -> dict[Any, Callable[..., Any]]:
    """Operator of ours → the ONNX operator that it is, for ``torch.onnx.export``."""
    from onnxscript import opset21 as op

    def quantize(x, scale, zero_point, axis: int, block: int, low: int, high: int):  # type: ignore[no-untyped-def]
        return op.QuantizeLinear(x, scale, zero_point, axis=axis, block_size=block)

    def dequantize(q, scale, zero_point, axis: int, block: int, dtype: int):  # type: ignore[no-untyped-def]
        return op.DequantizeLinear(q, scale, zero_point, axis=axis, block_size=block)

    return {QUANTIZE.op: quantize, DEQUANTIZE.op: dequantize}


def shape_for_runtime(graph: Any, products: int = 0, portable: bool = False) -> list[str]:
    """Put what the exporter wrote into the forms that ONNX Runtime has integer kernels for.

    * a product reads its weight as [in, out], transposed in the file and not while it runs;
    * a Gemm's bias is int32 on the grid of the product (ONNX Runtime does this for a Conv by itself);
    * a product with a scale per call is one of integers, see :mod:`fxfreeze.emit.onnx_dynamic`; one with a measured
      scale that gives floats has its bias inside, see :mod:`fxfreeze.emit.onnx_static`;
    * integers of 4 bits are stored as such, and a zero point of 0 for every block is left out;
    * an embedding looks integers up; a table that a product reads, too, is stored once, and transposed for the product
      when the file is opened;
    * a layer that stays in floats between integers reads them through scales per channel, all alike: behind one scale
      ONNX Runtime would quantize its weight, too, with one scale for all of it (WeightBiasQuantization);
    * a ReLU behind a product that reads its weight alone as integers, or that gives floats, is a Max with 0: ONNX
      Runtime computes the product in floats otherwise;
    * conversions carry no notes, which took a tenth of the file of a ResNet-20: shapes follow from their inputs, and
      their module is that of the layer beside them.

    Args:
        products: how many products of two computed values a plan step asked for.
        portable: keep to operators of the ONNX standard.

    Returns:
        Names of the nodes that read a quantized weight, in the order of the graph; and of those products, unless there
        are others of two values that are read as integers, so that it is not known which are meant.
    """
    weights = [node for node in graph.all_nodes() if is_weight(node)]
    weights += _split(graph, weights)
    packed: dict[int, Any] = {}
    lookups = {found.name for node in weights if (found := look_up(graph, node, packed, portable)) is not None}
    weights = [node for node in weights if node.graph is not None]
    for node in weights:
        pack(graph, node, packed)
        _transpose(graph, node)
    whole = to_dynamic(graph)
    if not portable:
        whole |= to_floats(graph)
        cut(graph)
        stay_whole(graph)
    weights = [node for node in weights if node.graph is not None]
    for node in list(graph.all_nodes()):
        if would_be_quantized(node):
            read_by_channel(graph, node)
        if computes_in_floats(node) or rectifies_floats(node):
            keep_apart(graph, node)
        if node.op_type == "Gemm":
            _integer_bias(graph, node)
    readers = lookups | whole | {reader.name for node in weights for reader, _ in node.outputs[0].uses()}
    pairs = {node.name for node in graph.all_nodes() if _is_product(node)}
    if len(pairs) == products:
        readers |= pairs
    drop_unread(graph)
    conversions = [node for node in graph.all_nodes() if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    for node in conversions:
        _hush(node)
    return [node.name for node in graph.all_nodes() if node.name in readers]


def kernels(path: Path, names: Sequence[str]) -> list[str | None]:
    """The integer kernel that ONNX Runtime runs for each node of `names`; None: it computes that one in floats."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        options.log_severity_level = 4
        configure(options)
        # What it dumps is for this machine; the file may hold weights beside it.
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.data")
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        optimised = onnx.load(options.optimized_model_filepath, load_external_data=False)
    # A node whose layout was changed on the way keeps its name, with "_token_1" appended.
    whole = {item.name for item in optimised.graph.initializer if item.data_type == onnx.TensorProto.INT8}
    ran = {
        re.sub(r"_token_\d+$", "", node.name): node.op_type
        for node in optimised.graph.node
        if node.op_type in KERNELS or (node.op_type == "Gather" and node.input[0] in whole)
    }
    # One that was fused with what makes its scale has a new name, and reads the weight.
    weights = {node.name: node.input[1] for node in onnx.load(path, load_external_data=False).graph.node
               if node.op_type == PRODUCT}  # fmt: skip
    fused = {name: node.op_type for node in optimised.graph.node for name in node.input if node.op_type in KERNELS}
    return [ran.get(name) or fused.get(weights.get(name, name)) for name in names]


def configure(options: Any) -> None:
    """Let blocks of integers be multiplied by floats; by default ONNX Runtime rounds these to integers as well."""
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")


def _is_product(node: Any) -> bool:
    """A product of two values that are both read as integers, and of which none is a weight."""
    sources = [value.producer() for value in node.inputs] if node.op_type == "MatMul" else []
    return bool(sources) and all(
        source is not None and source.op_type == "DequantizeLinear" and source.inputs[0].const_value is None
        for source in sources
    )


def _split(graph: Any, weights: Sequence[Any]) -> list[Any]:
    """Give every reader of a weight its own DequantizeLinear, the new ones: each is changed for what reads it.

    What reads it through a Transpose gets its own of these, too.
    """
    import onnx_ir

    new = []
    for node in weights:
        for turned in [reader for reader, _ in node.outputs[0].uses() if reader.op_type == "Transpose"]:
            for reader, index in list(turned.outputs[0].uses())[1:]:
                twin = onnx_ir.node("Transpose", inputs=list(turned.inputs), attributes=dict(turned.attributes))
                describe(twin, f"{turned.outputs[0].name}_{reader.name}_{index}", turned.outputs[0])
                twin.name = twin.outputs[0].name
                graph.insert_before(reader, twin)
                reader.replace_input_with(index, twin.outputs[0])
        for reader, index in list(node.outputs[0].uses())[1:]:
            twin = onnx_ir.node("DequantizeLinear", inputs=list(node.inputs), attributes=dict(node.attributes))
            describe(twin, f"{node.outputs[0].name}_{reader.name}_{index}", node.outputs[0])
            graph.insert_before(reader, twin)
            reader.replace_input_with(index, twin.outputs[0])
            new.append(twin)
    return new


def _transpose(graph: Any, node: Any) -> None:
    """Of a weight [out, in] that one Transpose reads, or one Gemm without alpha or beta, transposed."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or len(node.inputs[0].shape) != 2:
        return
    (reader, _) = uses[0]
    if reader.op_type == "Transpose" and tuple(reader.attributes["perm"].as_ints()) == (1, 0):
        _turn(graph, node)
        reader.outputs[0].replace_all_uses_with(node.outputs[0])
        graph.remove(reader, safe=True)
    elif reader.op_type == "Gemm" and reader.attributes["transB"].as_int():
        _turn(graph, node)
        set_number(reader, "transB", 0)


def _turn(graph: Any, node: Any) -> None:
    """Transposed constants; of a table that rows are looked up in, too, ONNX Runtime makes these.

    A weight that two products read is stored twice, with its scales: of one that both share ONNX Runtime makes no
    MatMulNBits.
    """
    import numpy
    import onnx_ir

    shared = any(reader.op_type.startswith("Gather") for reader, _ in node.inputs[0].uses())
    outputs = node.inputs[0].shape[0]
    for index, value in enumerate(node.inputs):
        if shared and not value.shape:  # past a scale for all ONNX Runtime would move the Transpose, to the product
            every = numpy.full(outputs, value.const_value.numpy())
            node.replace_input_with(index, constant(graph, f"{value.name}.all", every))
        if len(value.shape) == 1 and not shared and len(list(value.uses())) > 1:
            node.replace_input_with(index, constant(graph, f"{value.name}.own", value.const_value.numpy()))
        if len(value.shape) != 2:
            continue
        if shared:
            turned = onnx_ir.node("Transpose", inputs=[value], attributes={"perm": [1, 0]})
            turned.name = turned.outputs[0].name = f"{value.name}.T_{node.outputs[0].name}"
            graph.insert_before(node, turned)
            node.replace_input_with(index, turned.outputs[0])
        else:
            found = numpy.ascontiguousarray(value.const_value.numpy().T)
            node.replace_input_with(index, constant(graph, f"{value.name}.T", found))
    set_number(node, "axis", 1 - node.attributes["axis"].as_int() % 2)
    if node.outputs[0].shape is not None:
        node.outputs[0].shape = onnx_ir.Shape(tuple(node.outputs[0].shape)[::-1])


def _integer_bias(graph: Any, gemm: Any) -> None:
    import numpy
    import onnx_ir

    left, right, *bias = gemm.inputs
    first, second = left.producer(), right.producer()
    if not bias or bias[0] is None or bias[0].const_value is None or first is None or second is None:
        return
    if first.op_type != "DequantizeLinear" or first.inputs[1].const_value is None or not is_weight(second):
        return
    step = first.inputs[1].const_value.numpy() * second.inputs[1].const_value.numpy()
    whole = numpy.rint(bias[0].const_value.numpy().astype("float64") / step.astype("float64")).astype("int32")
    scale = constant(graph, f"{bias[0].name}.scale", step)
    values = constant(graph, f"{bias[0].name}.int", whole)
    node = onnx_ir.node("DequantizeLinear", inputs=[values, scale], attributes={"axis": 0})
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = (
        f"{gemm.name}.bias", bias[0].shape, bias[0].type,
    )  # fmt: skip
    graph.insert_before(gemm, node)
    gemm.replace_input_with(2, node.outputs[0])


def _hush(node: Any) -> None:
    node.metadata_props.clear()
    for value in (*node.inputs, *node.outputs):
        if value.const_value is not None or (value in node.outputs and not value.is_graph_output()):
            value.metadata_props.clear()
            value.shape = value.type = None
