"""Forms of quantized layers that Inductor's patterns for integer kernels take as they are meant.

Seen with torch 2.14 and torchao 0.18. Of a convolution in one dim torch computes a wrong size once it is an integer
kernel: the padding counts for a dim that is not there. So it becomes one in two dims, of height 1. And of a sum that
reads the activation behind a linear layer, the pattern for sums takes the activation for the layer, and fails: there a
sum is a − (−b), the same number. Patterns for linear layers know a weight [out, in] alone; GPT-2 has them [in, out].
None knows a weight with one scale for all of it: that is written out, once per output. A linear layer on more than two
dims is a product between two reshapes to them; where its result is read in two dims, the second of these is gone.
Such a layer is one on two dims from the start.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from .dataflow import arguments, tensors
from .inline import inline
from .kernels.dequantize import KERNEL as DEQUANTIZE
from .kernels.quantize import KERNEL as QUANTIZE
from .packed import PRODUCTS, constant_weight, operands
from .program import Program

aten = torch.ops.aten
_TWO_DIMS: dict[Any, Any] = {aten.conv1d.default: aten.conv2d.default, aten.conv1d.padding: aten.conv2d.padding}
_LAYERS = frozenset({*_TWO_DIMS, *_TWO_DIMS.values(), aten.linear.default})
_RESHAPES = frozenset({aten.view.default, aten.reshape.default, aten.flatten.using_ints})
_PART_OF_KERNEL = frozenset({aten.relu.default, aten.relu6.default, aten.hardtanh.default, QUANTIZE.op})
_HEIGHT = 2


def prepare(program: Program) -> None:
    """Put layers that read integers into those forms; `program` is changed."""
    for node in list(program.graph.nodes):
        if node.target in _LAYERS and reads_integers(node):
            _spread(program, node)
            if node.target in _TWO_DIMS:
                _widen(program, node)
            elif _is_read_flat(node):
                _flatten(program, node)
        elif node.target in PRODUCTS:
            _turn(program, node)  # a sum comes later, and finds the linear layer
        elif node.target is aten.add.Tensor and not node.kwargs:
            _part_sum(program, node)
    program.sweep()


def reads_integers(layer: Node) -> bool:
    """Whether the layer multiplies integers of an activation with a constant of integers, as a program writes it."""
    value, weight = layer.args[:2]
    if not (isinstance(value, Node) and isinstance(weight, Node) and value.target is weight.target is DEQUANTIZE.op):
        return False
    return weight.args[0].op == "get_attr" and not weight.args[4]  # type: ignore[union-attr]


def _spread(program: Program, node: Node) -> None:
    """One scale for a whole weight → the same one for every output."""
    source: Any = node.args[1]
    integers, *grid = source.args[:3]
    if grid[0].meta["val"].ndim:
        return
    outputs = program.state.tensor(str(integers.target)).shape[:1]
    constants = [program.state.tensor(str(item.target)).expand(outputs).contiguous() for item in grid]
    held = [program.add_constant(f"{item.target}.spread", value, before=node, like=node)
            for item, value in zip(grid, constants, strict=True)]  # fmt: skip
    floats = program.call(DEQUANTIZE.op, integers, *held, 0, *source.args[4:], before=node, like=node)
    node.replace_input_with(source, floats)


def _is_read_flat(node: Node) -> bool:
    """Whether it is a linear layer on more than two dims whose result some reader takes as rows."""
    shape = node.meta["val"].shape
    return node.target is aten.linear.default and len(shape) > 2 and any(
        reader.target in _RESHAPES and reader.meta["val"].ndim == 2 and reader.meta["val"].shape[1] == shape[-1]
        for reader in node.users
    )  # fmt: skip


def _flatten(program: Program, node: Node) -> None:
    """The same layer on rows, with its result in all dims behind it."""
    value: Any = node.args[0]

    def on_rows(integers: Tensor, scale: Tensor, zero: Tensor, *constants: Tensor) -> Tensor:
        rows = DEQUANTIZE.op(integers.flatten(0, -2), scale, zero, *value.args[3:])
        return functional.linear(rows, *constants).unflatten(0, integers.shape[:-1])

    operands: list[Any] = [*value.args[:3], *(item for item in node.args[1:] if item is not None)]
    program.replace(node, inline(program, on_rows, *operands, before=node, like=node))


def _turn(program: Program, node: Node) -> None:
    """A product of integers with a constant [in, out] → a linear layer, whose weight is [out, in]."""
    weight = constant_weight(program, node)
    x, _, bias = operands(node)
    is_row = bias is None or (isinstance(bias, Node) and bias.meta["val"].ndim == 1)
    if weight is None or not weight.turned or weight.scale.shape[1] > 1 or x.target is not DEQUANTIZE.op or not is_row:
        return
    zeros = weight.values.new_zeros(len(weight.values))
    constants = {"turned": weight.values.contiguous(), "turned_scale": weight.scale.flatten(), "turned_zero": zeros}
    held = [program.add_constant(f"{weight.name}.{suffix}", value, before=node, like=node)
            for suffix, value in constants.items()]  # fmt: skip
    floats = program.call(DEQUANTIZE.op, *held, 0, 0, weight.scale.dtype, before=node, like=node)
    given = (x, floats) if bias is None else (x, floats, bias)
    program.replace(node, program.call(aten.linear.default, *given, before=node, like=node))


def _widen(program: Program, node: Node) -> None:
    """conv1d → conv2d, with the ReLU and the quantization behind it, which are part of its kernel."""
    given = arguments(node)
    value, weight = given["input"], given["weight"]
    name = str(weight.args[0].target)
    integers = program.state.tensor(name).unsqueeze(_HEIGHT).contiguous()
    stored = program.add_constant(f"{name}.2d", integers, before=node, like=node)
    flat = program.call(aten.unsqueeze.default, value.args[0], _HEIGHT, before=node, like=node)
    operands = [program.call(DEQUANTIZE.op, first, *source.args[1:], before=node, like=node)
                for first, source in ((flat, value), (stored, weight))]  # fmt: skip
    given |= {"input": operands[0], "weight": operands[1]}
    for key, own in (("stride", 1), ("padding", 0), ("dilation", 1)):
        given[key] = given[key] if isinstance(given[key], str) else [own, *given[key]]
    wide, last = program.call(_TWO_DIMS[node.target], *given.values(), before=node, like=node), node
    while len(last.users) == 1 and (reader := next(iter(last.users))).target in _PART_OF_KERNEL:
        wide, last = program.call(reader.target, wide, *reader.args[1:], before=reader, like=reader), reader  # type: ignore[arg-type]
    program.replace(last, program.call(aten.squeeze.dim, wide, _HEIGHT, before=last, like=last))


def _part_sum(program: Program, node: Node) -> None:
    """Where an operand is made of the result of a layer alone, and is not that result."""
    for operand, other in (node.args[:2], node.args[1::-1]):
        if isinstance(operand, Node) and isinstance(other, Node) and _is_behind_layer(operand):
            negative = program.call(aten.neg.default, operand, before=node, like=node)
            program.replace(node, program.call(aten.sub.Tensor, other, negative, before=node, like=node))
            return


def _is_behind_layer(node: Node) -> bool:
    operand: Any = node
    while operand.target not in _LAYERS and len(read := tensors(operand)) == 1:
        (operand,) = read
    return operand is not node and operand.target in _LAYERS and reads_integers(operand)
