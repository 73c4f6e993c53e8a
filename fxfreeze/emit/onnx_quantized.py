"""Quantized layers in ONNX: QuantizeLinear and DequantizeLinear, and what ONNX Runtime makes of them.

Where dequantize → layer → quantize stand together, ONNX Runtime's optimiser puts one integer kernel in their place, or
does not. Which of the two is read from the graph that it runs.

Of dequantize → Gather it (1.32) makes nothing: the whole table would become floats in every call. Standard operators
cannot look up integers of 4 bits. So embeddings are ``GatherBlockQuantized`` of ONNX Runtime's own domain, or, with 8
bits, a Gather of integers and one of scales, which are multiplied.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..kernels.dequantize import KERNEL as DEQUANTIZE
from ..kernels.quantize import KERNEL as QUANTIZE
from .onnx_dynamic import PRODUCT, to_dynamic

KERNELS = frozenset({
    "QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul", "MatMulNBits", "GatherBlockQuantized", "ReduceSum",
})  # fmt: skip
"""Operators of ONNX and ONNX Runtime that multiply integers, or unpack them block by block while they multiply; and the
one that sums what it is given, which is asked about where that is integers."""

_INT4 = 7
_DOMAIN = "com.microsoft"
_LEAST = 16
"""Elements that share a scale, in GatherBlockQuantized: so many, or a larger power of two."""


def translations() -> dict[Any, Callable[..., Any]]:
    """Operator of ours → the ONNX operator that it is, for ``torch.onnx.export``."""
    from onnxscript import opset21 as op

    def quantize(x, scale, zero_point, axis: int, block: int, low: int, high: int):  # type: ignore[no-untyped-def]
        return op.QuantizeLinear(x, scale, zero_point, axis=axis, block_size=block)

    def dequantize(q, scale, zero_point, axis: int, block: int, dtype: int):  # type: ignore[no-untyped-def]
        return op.DequantizeLinear(q, scale, zero_point, axis=axis, block_size=block)

    return {QUANTIZE.op: quantize, DEQUANTIZE.op: dequantize}


def shape_for_runtime(graph: Any, products: int = 0) -> list[str]:
    """Put what the exporter wrote into the forms that ONNX Runtime has integer kernels for.

    * a product reads its weight as [in, out], transposed in the file and not while it runs;
    * a Gemm's bias is int32 on the grid of the product (ONNX Runtime does this for a Conv by itself);
    * a product with a scale per call is one of integers, see :mod:`fxfreeze.emit.onnx_dynamic`;
    * integers of 4 bits are stored as such, and a zero point of 0 for every block is left out;
    * an embedding looks integers up; a table that a product reads, too, is stored once, and transposed for the product
      when the file is opened;
    * a layer that stays in floats between integers reads them through scales per channel, all alike: behind one scale
      ONNX Runtime would quantize its weight, too, with one scale for all of it (WeightBiasQuantization);
    * a ReLU whose result stays in floats is a Max with 0 behind an integer Gemm, which ONNX Runtime computes in floats
      otherwise, as one operator with the ReLU;
    * conversions carry no notes, which took a tenth of the file of a ResNet-20: shapes follow from their inputs, and
      their module is that of the layer beside them.

    Args:
        products: how many products of two computed values a plan step asked for.

    Returns:
        Names of the nodes that read a quantized weight, in the order of the graph; and of those products, unless there
        are others of two values that are read as integers, so that it is not known which are meant.
    """
    _split(graph)
    weights = [node for node in graph.all_nodes() if _is_weight(node)]
    packed: dict[int, Any] = {}
    lookups = {found.name for node in weights if (found := _look_up(graph, node, packed)) is not None}
    weights = [node for node in weights if node.graph is not None]
    for node in weights:
        _pack(graph, node, packed)
        _transpose(graph, node)
    dynamic = to_dynamic(graph)
    weights = [node for node in weights if node.graph is not None]
    for node in list(graph.all_nodes()):
        if _would_be_quantized(node):
            _read_by_channel(graph, node)
        elif node.op_type == "Gemm":
            _integer_bias(graph, node)
            _part_from_relu(graph, node)
    readers = lookups | dynamic | {reader.name for node in weights for reader, _ in node.outputs[0].uses()}
    pairs = {node.name for node in graph.all_nodes() if _is_product(node)}
    if len(pairs) == products:
        readers |= pairs
    _drop_unread(graph)
    conversions = [node for node in graph.all_nodes() if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    for node in conversions:
        _hush(node)
    return [node.name for node in graph.all_nodes() if node.name in readers]


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
    _drop_unread(graph)
    return found


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


def _is_weight(node: Any) -> bool:
    return (
        node.op_type == "DequantizeLinear"
        and node.inputs[0].const_value is not None
        and len(node.inputs[0].shape or ()) >= 2
    )


def _is_product(node: Any) -> bool:
    """A product of two values that are both read as integers, and of which none is a weight."""
    sources = [value.producer() for value in node.inputs] if node.op_type == "MatMul" else []
    return bool(sources) and all(
        source is not None and source.op_type == "DequantizeLinear" and source.inputs[0].const_value is None
        for source in sources
    )


def _split(graph: Any) -> None:
    """Give every reader of a weight its own DequantizeLinear: each is changed for what reads it."""
    import onnx_ir

    for node in [node for node in graph.all_nodes() if _is_weight(node)]:
        for reader, index in list(node.outputs[0].uses())[1:]:
            twin = onnx_ir.node("DequantizeLinear", inputs=list(node.inputs), attributes=dict(node.attributes))
            _describe(twin, f"{node.outputs[0].name}_{reader.name}_{index}", node.outputs[0])
            graph.insert_before(reader, twin)
            reader.replace_input_with(index, twin.outputs[0])


def _look_up(graph: Any, node: Any, packed: dict[int, Any]) -> Any:
    """Where a Gather reads rows of the weight, let it read integers; what does so then, or None."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or uses[0][0].op_type != "Gather" or uses[0][1] != 0 or len(node.inputs[0].shape) != 2:
        return None
    gather, block, axis = uses[0][0], _number(node, "block_size"), _number(node, "axis")
    scale = node.inputs[1]
    # Else its scales are not those of rows, or its integers not symmetric.
    straight = axis % 2 == (1 if block else 0) or not scale.shape
    if _number(gather, "axis") != 0 or not straight or _has_zero_point(node):
        return None
    if block >= _LEAST and block & (block - 1) == 0 and _fits(node):
        _pack(graph, node, packed)
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
    """Of a table of 8 bits: Gather, and a product with the scales of these rows.

    With DequantizeLinear ONNX Runtime would take a linear layer that reads the rows for one of integers on both sides.
    """
    import numpy
    import onnx_ir

    ids, (values, scale) = gather.inputs[1], node.inputs[:2]
    if len(scale.shape) < 2:  # ONNX Runtime makes no MatMulNBits of a product whose scales something else reads, too
        scale = _constant(graph, f"{scale.name}.rows", scale.const_value.numpy())
    nodes: list[Any] = []

    def add(kind: str, *inputs: Any, **attributes: int) -> Any:
        nodes.append(onnx_ir.node(kind, inputs=list(inputs), attributes=attributes))
        nodes[-1].outputs[0].name = f"{gather.name}.{len(nodes)}"
        return nodes[-1].outputs[0]

    def sizes(name: str, *found: int) -> Any:
        return _constant(graph, f"{gather.name}.{name}", numpy.array(found, "int64"))

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
    _describe(new[-1], old.outputs[0].name, old.outputs[0])
    onnx_ir.convenience.replace_nodes_and_values(graph, old, [old], new, old.outputs, new[-1].outputs)


def _describe(node: Any, name: str, like: Any) -> None:
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = name, like.shape, like.type


def _number(node: Any, name: str) -> int:
    return int(node.attributes[name].as_int()) if name in node.attributes else 0


def _has_zero_point(node: Any) -> bool:
    (value,) = node.inputs[2:] or (None,)
    return value is not None and (value.const_value is None or bool(value.const_value.numpy().any()))


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
        _set(reader, "transB", 0)


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

    source, constant = value.producer(), value.const_value
    if constant is not None and source is None:
        array = constant.numpy()
        fits = 0 <= array.min(initial=0) and array.max(initial=0) <= 255
        return _constant(graph, f"{value.name}.bytes", array.astype("uint8")) if fits else None
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


def _turn(graph: Any, node: Any) -> None:
    """Transposed constants; of a table that rows are looked up in, too, ONNX Runtime makes these."""
    import numpy
    import onnx_ir

    shared = any(reader.op_type.startswith("Gather") for reader, _ in node.inputs[0].uses())
    outputs = node.inputs[0].shape[0]
    for index, value in enumerate(node.inputs):
        if shared and not value.shape:  # past a scale for all ONNX Runtime would move the Transpose, to the product
            every = numpy.full(outputs, value.const_value.numpy())
            node.replace_input_with(index, _constant(graph, f"{value.name}.all", every))
        if len(value.shape) != 2:
            continue
        if shared:
            turned = onnx_ir.node("Transpose", inputs=[value], attributes={"perm": [1, 0]})
            turned.name = turned.outputs[0].name = f"{value.name}.T_{node.outputs[0].name}"
            graph.insert_before(node, turned)
            node.replace_input_with(index, turned.outputs[0])
        else:
            found = numpy.ascontiguousarray(value.const_value.numpy().T)
            node.replace_input_with(index, _constant(graph, f"{value.name}.T", found))
    _set(node, "axis", 1 - node.attributes["axis"].as_int() % 2)
    if node.outputs[0].shape is not None:
        node.outputs[0].shape = onnx_ir.Shape(tuple(node.outputs[0].shape)[::-1])


def _would_be_quantized(node: Any) -> bool:
    """A layer with a weight in floats that reads integers, and whose result, or its ReLU, is read as integers alone."""
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or node.inputs[1].const_value is None:
        return False
    source, value = node.inputs[0].producer(), node.outputs[0]
    if source is None or source.op_type != "DequantizeLinear" or len(source.inputs[1].shape or ()) != 0:
        return False
    while len(readers := [reader for reader, _ in value.uses()]) == 1 and readers[0].op_type in ("Relu", "Clip"):
        value = readers[0].outputs[0]
    return len(readers) == 1 and readers[0].op_type == "QuantizeLinear"


def _read_by_channel(graph: Any, node: Any) -> None:
    import numpy
    import onnx_ir

    source, weight = node.inputs[0].producer(), node.inputs[1].const_value.shape
    if node.op_type == "Conv":
        channels = weight[1] * (node.attributes["group"].as_int() if "group" in node.attributes else 1)
    else:
        transposed = node.op_type == "Gemm" and node.attributes["transB"].as_int()
        channels = weight[1 if transposed else 0]
    scales = [
        _constant(graph, f"{value.name}.each", numpy.repeat(value.const_value.numpy(), channels))
        for value in source.inputs[1:3]
    ]
    own = onnx_ir.node("DequantizeLinear", inputs=[source.inputs[0], *scales], attributes={"axis": 1})
    own.outputs[0].name = f"{node.name}.input"
    graph.insert_before(node, own)
    node.replace_input_with(0, own.outputs[0])


def _integer_bias(graph: Any, gemm: Any) -> None:
    import numpy
    import onnx_ir

    left, right, *bias = gemm.inputs
    first, second = left.producer(), right.producer()
    if not bias or bias[0] is None or bias[0].const_value is None or first is None or second is None:
        return
    if first.op_type != "DequantizeLinear" or first.inputs[1].const_value is None or not _is_weight(second):
        return
    step = first.inputs[1].const_value.numpy() * second.inputs[1].const_value.numpy()
    whole = numpy.rint(bias[0].const_value.numpy().astype("float64") / step.astype("float64")).astype("int32")
    scale = _constant(graph, f"{bias[0].name}.scale", step)
    values = _constant(graph, f"{bias[0].name}.int", whole)
    node = onnx_ir.node("DequantizeLinear", inputs=[values, scale], attributes={"axis": 0})
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = (
        f"{gemm.name}.bias", bias[0].shape, bias[0].type,
    )  # fmt: skip
    graph.insert_before(gemm, node)
    gemm.replace_input_with(2, node.outputs[0])


def _part_from_relu(graph: Any, gemm: Any) -> None:
    import numpy
    import onnx_ir

    weight, readers = gemm.inputs[1].producer(), [reader for reader, _ in gemm.outputs[0].uses()]
    if weight is None or not _is_weight(weight) or [reader.op_type for reader in readers] != ["Relu"]:
        return
    (relu,) = readers
    if {reader.op_type for reader, _ in relu.outputs[0].uses()} == {"QuantizeLinear"}:
        return
    zero = _constant(graph, f"{gemm.name}.zero", numpy.zeros((), weight.inputs[1].const_value.numpy().dtype))
    largest = onnx_ir.node("Max", inputs=[gemm.outputs[0], zero], name=relu.name)
    result, relu_result = largest.outputs[0], relu.outputs[0]
    result.shape, result.type, result.name = relu_result.shape, relu_result.type, relu_result.name
    graph.insert_before(relu, largest)
    relu_result.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(relu, safe=True)


def _pack(graph: Any, node: Any, packed: dict[int, Any]) -> None:
    """Blocked integers from -8 to 7 as INT4, two a byte; `packed` holds those of other nodes."""
    import ml_dtypes

    if not _number(node, "block_size"):
        return
    if not _has_zero_point(node) and len(node.inputs) > 2:
        node.resize_inputs(2)
    if not _fits(node):
        return
    for index in (0, 2)[: len(node.inputs) - 1]:
        value = node.inputs[index]
        if id(value) not in packed:
            packed[id(value)] = _constant(graph, f"{value.name}4", value.const_value.numpy().astype(ml_dtypes.int4))
        node.replace_input_with(index, packed[id(value)])


def _fits(node: Any) -> bool:
    """Whether the integers of a weight have 4 bits."""
    values = node.inputs[0].const_value.numpy()
    return bool(values.dtype == "int8" and abs(values).max(initial=0) <= _INT4)


def _constant(graph: Any, name: str, array: Any) -> Any:
    import onnx_ir

    while name in graph.initializers:
        name += "_"
    tensor = onnx_ir.Tensor(array, name=name)
    value = onnx_ir.Value(name=name, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _set(node: Any, name: str, value: int) -> None:
    import onnx_ir

    node.attributes[name] = onnx_ir.AttrInt64(name, value)


def _hush(node: Any) -> None:
    node.metadata_props.clear()
    for value in (*node.inputs, *node.outputs):
        if value.const_value is not None or (value in node.outputs and not value.is_graph_output()):
            value.metadata_props.clear()
            value.shape = value.type = None


def _drop_unread(graph: Any) -> None:
    outputs = {id(value) for value in graph.outputs}
    for name, value in list(graph.initializers.items()):
        if not value.uses() and id(value) not in outputs:
            del graph.initializers[name]
