"""What stands between convolutions in ONNX, in forms that keep the layout in which ONNX Runtime computes these.

Its optimiser hands channels from one convolution to the next in blocks of 8 or 16 (NCHWc), through sums, products of
equal shapes, pools and a few activations. Whatever else stands between is computed in NCHW, with a copy before and one
behind, and sums with it are not taken into a convolution. So

* a hard gate, Where(u > τ, v, 0), is a product with HardSigmoid(∞ · (u − τ)), which is 0 or 1, of a convolution of each
  channel alone with weight 1 and bias −τ; a ReLU behind it raises the thresholds to 0;
* the strided slice, padded with channels of zeros, that a ResNet for CIFAR has for a shortcut is a convolution with an
  identity for a weight;
* a mean over the pixels is a GlobalAveragePool.

All give what they gave, bit for bit but for the mean, as long as values are finite: 0 · ∞ is not 0.
"""

from __future__ import annotations

from typing import Any

from .onnx_graph import constant, insert, is_mean_of_pixels, is_zero, keeps_dims, number, pads_zeros, sweep

_BLOCK, _ALIGNED = 16, 4
"""Channels of a block, at most (8 with AVX2, 16 with AVX-512), and what their number must be a multiple of: ONNX
Runtime fills the last block up. With fewer than a block a layer reads NCHW."""
_STEEP = 3e38
"""Times the smallest normal number it is above 1."""
_THROUGH = frozenset({"Relu", "HardSigmoid", "HardSwish", "Sigmoid", "Tanh", "Clip", "Add", "Mul", "MaxPool"})
"""Operators through which blocks stay blocks, or almost: of activations, those that ONNX Runtime puts into a Conv."""
_COST = 4
"""A shortcut as a convolution has that many times fewer weights than the one it is added to, at least."""


def stay_blocked(graph: Any) -> None:
    """Put gates, shortcuts and means behind convolutions in float32 into these forms."""
    for node in list(graph.all_nodes()):
        if node.graph is None:
            continue
        if node.op_type == "Where":
            _gate(graph, node)
        elif node.op_type == "Pad":
            _shortcut(graph, node)
        elif node.op_type == "ReduceMean":
            _mean(graph, node)
    sweep(graph)


def _is_blocked(value: Any) -> bool:
    """Whether a convolution in float32 gives this, or an activation or a sum behind one."""
    import onnx_ir

    shape = value.shape
    if shape is None or len(shape) != 4 or not _fills_blocks(shape[1]):
        return False
    node = value.producer()
    while node is not None and node.op_type in _THROUGH:
        node = node.inputs[0].producer()
    if node is None or node.op_type != "Conv":
        return False
    weight, group = node.inputs[1].const_value, number(node, "group") or 1
    return weight is not None and weight.dtype == onnx_ir.DataType.FLOAT and group in (1, weight.shape[0])


def _fills_blocks(channels: Any) -> bool:
    return isinstance(channels, int) and channels >= _BLOCK and channels % _ALIGNED == 0


# ---- gates


def _gate(graph: Any, where: Any) -> None:
    import numpy

    compared, kept, other = where.inputs
    greater = compared.producer()
    if greater is None or greater.op_type != "Greater" or not is_zero(other):
        return
    value, channels = greater.inputs[0], kept.shape[1] if kept.shape is not None and len(kept.shape) == 4 else 0
    threshold = _per_channel(greater.inputs[1], channels)
    if threshold is None or not _is_blocked(value) or not _is_blocked(kept):
        return
    result = where.outputs[0]
    if (relu := _relu_behind(where)) is not None and kept is value:
        threshold, result = numpy.maximum(threshold, 0), relu.outputs[0]
    name = where.name
    weight = constant(graph, f"{name}.ones", numpy.ones((channels, 1, 1, 1), "float32"))
    bias = constant(graph, f"{name}.thresholds", -threshold)
    above = insert(graph, where, "Conv", [value, weight, bias], f"{name}.above", kept, group=channels)
    open_ = insert(graph, where, "HardSigmoid", [above], f"{name}.open", kept, alpha=_STEEP, beta=0.0)
    gated = insert(graph, where, "Mul", [kept, open_], f"{name}.gated", result)
    result.replace_all_uses_with(gated, replace_graph_outputs=True)


def _per_channel(value: Any, channels: int) -> Any:
    """[channels] in float32, of a constant with a number for each along the second of four dims, or one for all."""
    import numpy

    if (stored := value.const_value) is None or not channels:
        return None
    shape = (1,) * (4 - len(stored.shape)) + tuple(stored.shape)
    if shape not in ((1, channels, 1, 1), (1, 1, 1, 1)):
        return None
    return numpy.broadcast_to(stored.numpy().reshape(-1), channels).astype("float32")


def _relu_behind(node: Any) -> Any:
    (result,) = node.outputs
    readers = [reader for reader, _ in result.uses()]
    alone = [reader.op_type for reader in readers] == ["Relu"] and not result.is_graph_output()
    return readers[0] if alone else None


# ---- shortcuts


def _shortcut(graph: Any, pad: Any) -> None:
    import numpy

    if (ends := _channels_added(pad)) is None or (found := _strided(pad.inputs[0])) is None:
        return
    source, strides = found
    if not _is_blocked(source):
        return
    inputs, (before, behind) = source.shape[1], ends
    outputs = before + inputs + behind
    if not _fills_blocks(outputs) or not _is_cheap(pad, inputs * outputs):
        return
    identity = numpy.zeros((outputs, inputs, 1, 1), "float32")
    identity[before : before + inputs, :, 0, 0] = numpy.eye(inputs)
    weight = constant(graph, f"{pad.name}.identity", identity)
    old = pad.outputs[0]
    new = insert(graph, pad, "Conv", [source, weight], f"{pad.name}.shortcut", old, strides=strides)
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _channels_added(pad: Any) -> tuple[int, int] | None:
    """Channels of zeros in front of and behind those that are there; None where anything else is padded."""
    stored, axes = pad.inputs[1].const_value, (*pad.inputs, None, None)[3]
    if stored is None or axes is not None or not pads_zeros(pad):
        return None
    amounts = [int(item) for item in stored.numpy()]
    rest = [amount for position, amount in enumerate(amounts) if position not in (1, 5)]
    return (amounts[1], amounts[5]) if len(amounts) == 8 and not any(rest) and min(amounts) >= 0 else None


def _strided(value: Any) -> tuple[Any, list[int]] | None:
    """What `value` has every so manieth row and column of, and how many; None where nothing is sliced, or otherwise."""
    steps, source = {2: 1, 3: 1}, value
    while (node := source.producer()) is not None and node.op_type == "Slice":
        source = node.inputs[0]
        taken = [given.const_value for given in node.inputs[1:] if given is not None]
        if len(taken) != 4 or None in taken or source.shape is None or len(source.shape) != 4:
            return None
        for start, end, axis, step in zip(*(item.numpy().tolist() for item in taken), strict=True):
            if axis % 4 not in steps or start != 0 or step < 1 or not _reaches(source.shape[axis % 4], end, step):
                return None
            steps[axis % 4] *= step
    return (source, [steps[2], steps[3]]) if source is not value else None


def _reaches(size: Any, end: int, step: int) -> bool:
    """Whether nothing that a slice could take lies behind its end."""
    return end >= 2**31 or (isinstance(size, int) and -(-min(end, size) // step) == -(-size // step))


def _is_cheap(pad: Any, weights: int) -> bool:
    """Whether it is only added to what convolutions with many more weights give."""
    for reader, position in pad.outputs[0].uses():
        other = reader.inputs[1 - position].producer() if reader.op_type == "Add" else None
        if other is None or other.op_type != "Conv" or other.inputs[1].const_value is None:
            return False
        if other.inputs[1].const_value.size < _COST * weights:
            return False
    return not pad.outputs[0].is_graph_output()


# ---- means


def _mean(graph: Any, node: Any) -> None:
    value, old, keeps = node.inputs[0], node.outputs[0], keeps_dims(node)
    if not is_mean_of_pixels(node) or not _is_blocked(value):
        return
    mean = insert(graph, node, "GlobalAveragePool", [value], f"{node.name}.pool", old if keeps else None)
    if not keeps:
        mean = insert(graph, node, "Flatten", [mean], f"{node.name}.flat", old, axis=1)
    old.replace_all_uses_with(mean, replace_graph_outputs=True)
