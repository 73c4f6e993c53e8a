"""Small changes to a graph of onnx-ir that several files here make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

INT4 = 7
"""The largest integer of 4 bits; the smallest that is used is its negative, or -8."""


def is_weight(node: Any) -> bool:
    return (
        node.op_type == "DequantizeLinear"
        and node.inputs[0].const_value is not None
        and len(node.inputs[0].shape or ()) >= 2
    )


def is_quantized(value: Any) -> bool:
    """Whether all that reads a product, or the ReLU behind it, quantizes it."""
    readers = [reader for reader, _ in value.uses()]
    if [reader.op_type for reader in readers] == ["Relu"]:
        value = readers[0].outputs[0]
        readers = [reader for reader, _ in value.uses()]
    return not value.is_graph_output() and {reader.op_type for reader in readers} == {"QuantizeLinear"}


def bias_behind(product: Any, columns: int) -> tuple[Any, Any] | None:
    """The constant with a number for each column that alone is added to a product, and the Add."""
    readers = [reader for reader, _ in product.outputs[0].uses()]
    if [reader.op_type for reader in readers] != ["Add"] or product.outputs[0].is_graph_output():
        return None
    biases = [value for value in readers[0].inputs if value.const_value is not None]
    found = next((value for value in biases if tuple(value.const_value.shape) == (columns,)), None)
    return None if found is None else (found, readers[0])


def reads_integers(value: Any) -> bool:
    """Whether this is integers made floats, perhaps of another shape by now: a conversion moves behind such changes."""
    node = value.producer()
    while node is not None and node.op_type in ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity"):
        node = node.inputs[0].producer()
    return node is not None and node.op_type == "DequantizeLinear"


def is_zero(value: Any) -> bool:
    stored = value.const_value
    return stored is not None and stored.size == 1 and not stored.numpy().any()


def pads_zeros(node: Any) -> bool:
    """A Pad that adds zeros."""
    mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "constant"
    value = (*node.inputs, None, None, None)[2]
    return node.op_type == "Pad" and mode == "constant" and (value is None or is_zero(value))


def is_mean_of_pixels(node: Any) -> bool:
    """A ReduceMean over the last two of four dims."""
    if node.op_type != "ReduceMean" or len(node.inputs) < 2 or node.inputs[1] is None:
        return False
    shape, axes = node.inputs[0].shape, node.inputs[1].const_value
    if shape is None or len(shape) != 4 or axes is None:
        return False
    return sorted(int(axis) % 4 for axis in axes.numpy()) == [2, 3]


def keeps_dims(node: Any) -> bool:
    return "keepdims" not in node.attributes or bool(number(node, "keepdims"))


def constant(graph: Any, name: str, array: Any) -> Any:
    import onnx_ir

    while name in graph.initializers:
        name += "_"
    tensor = onnx_ir.Tensor(array, name=name)
    value = onnx_ir.Value(name=name, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def set_number(node: Any, name: str, value: int) -> None:
    import onnx_ir

    node.attributes[name] = onnx_ir.AttrInt64(name, value)


def number(node: Any, name: str) -> int:
    return int(node.attributes[name].as_int()) if name in node.attributes else 0


def describe(node: Any, name: str, like: Any) -> None:
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = name, like.shape, like.type


def insert(
    graph: Any, before: Any, kind: str, inputs: Sequence[Any], name: str, like: Any = None, **attributes: Any
) -> Any:
    """The output of a new node, with the shape and type of `like`, and from the module of the node behind it."""
    import onnx_ir

    node = onnx_ir.node(kind, inputs=inputs, attributes=attributes, name=name)
    node.metadata_props.update(before.metadata_props)
    node.outputs[0].name = name
    if like is not None:
        describe(node, name, like)
    graph.insert_before(before, node)
    return node.outputs[0]


def replace(graph: Any, old: Any, kind: str, inputs: Sequence[Any], name: str) -> None:
    """Let a new node give what `old` gave, under the same name."""
    (was,) = old.outputs
    new = insert(graph, old, kind, inputs, name, was)
    new.name = was.name
    was.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(old, safe=True)


def drop_unread(graph: Any) -> None:
    outputs = {id(value) for value in graph.outputs}
    for name, value in list(graph.initializers.items()):
        if not value.uses() and id(value) not in outputs:
            del graph.initializers[name]


def sweep(graph: Any) -> None:
    """Remove nodes that nothing reads."""
    outputs = {id(value) for value in graph.outputs}
    for node in reversed(list(graph.all_nodes())):
        if not any(value.uses() or id(value) in outputs for value in node.outputs):
            graph.remove(node, safe=True)


def has_zero_point(node: Any) -> bool:
    (value,) = node.inputs[2:] or (None,)
    return value is not None and (value.const_value is None or bool(value.const_value.numpy().any()))


def pack(graph: Any, node: Any, packed: dict[int, Any]) -> None:
    """Blocked integers from -8 to 7 as INT4, two a byte; `packed` holds those of other nodes.

    A table that rows are looked up in as bytes stays in bytes, and is stored once.
    """
    import ml_dtypes

    if not number(node, "block_size"):
        return
    if not has_zero_point(node) and len(node.inputs) > 2:
        node.resize_inputs(2)
    if not fits_4_bits(node) or any(reader.op_type == "Gather" for reader, _ in node.inputs[0].uses()):
        return
    for index in (0, 2)[: len(node.inputs) - 1]:
        value = node.inputs[index]
        if id(value) not in packed:
            packed[id(value)] = constant(graph, f"{value.name}4", value.const_value.numpy().astype(ml_dtypes.int4))
        node.replace_input_with(index, packed[id(value)])


def fits_4_bits(node: Any) -> bool:
    """Whether the integers of a weight have 4 bits."""
    values = node.inputs[0].const_value.numpy()
    return bool(values.dtype == "int8" and abs(values).max(initial=0) <= INT4)
