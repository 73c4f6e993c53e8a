"""What oneDNN's integer kernels of convolutions do before they round, their post-ops; for torch and AOTInductor.

A Program rounds what a convolution gives to integers at once, or behind a ReLU: an integer kernel of ONNX Runtime does
no more. oneDNN's also takes other activations, or adds another tensor, and rounds what comes of that. So the rounding
in between is left out for the targets that use it, which saves a pass over memory and is closer to the floats. It makes
another function of the Program, and that is what such a target is then compared with.

The sum is written over its other operand: hence Inductor takes only integers that nothing reads from then on.
One thread, AVX2, torch 2.14, against rounding in between: ResNet-20 at 64 images 0.65 of the time, ResNet-18 0.88,
MobileNetV3 0.71.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from .inductor import reads_integers
from .kernels.dequantize import KERNEL as DEQUANTIZE
from .kernels.quantize import KERNEL as QUANTIZE
from .program import Program

aten = torch.ops.aten
_ACTIVATIONS = frozenset({aten.hardswish.default, aten.silu.default})
"""Beside those that the Program takes before it rounds, too; see passes/quantize/static.py."""


def with_post_ops(program: Program) -> Program:
    """A copy that rounds behind the post-ops of its convolutions, or `program` itself where there are none."""
    changed = program.clone()
    return changed if take_post_ops(changed) else program


def take_post_ops(program: Program) -> int:
    """Round behind the post-ops of convolutions; `program` is changed. How many roundings that leaves out."""
    found = 0
    for node in list(program.graph.nodes):
        if node.target is aten.add.Tensor:
            found += _add_unrounded(program, node)
        elif node.target in _ACTIVATIONS and _is_rounded(node):
            found += _activate_unrounded(node)
    program.sweep()
    return found


def _activate_unrounded(activation: Node) -> bool:
    """Whether its operand was a convolution's, and is now as it was before it was rounded."""
    layer = _layer(activation.args[0], activation)
    if layer is not None:
        activation.args = (layer,)
    return layer is not None


def _add_unrounded(program: Program, total: Node) -> bool:
    """Whether one operand of the sum was a convolution's, and is now as it was before it was rounded."""
    operands: Any = total.args
    if total.kwargs or not _is_rounded(total, aten.relu.default) or not all(map(_from_grid, operands)):
        return False
    # Of two convolutions the later one: what it adds must be there already.
    for side, other in sorted([operands, operands[::-1]], reverse=True):
        layer = _layer(side, total) if side is not other else None
        if layer is not None and side.meta["val"].shape == other.meta["val"].shape and _is_last(other, layer, total):
            # The pattern asks for a reading of its own.
            own = program.call(DEQUANTIZE.op, *other.args, before=total, like=other)
            total.args = tuple(layer if operand is side else own for operand in operands)
            return True
    return False


def _layer(floats: Any, reader: Node) -> Node | None:
    """The convolution on integers whose rounded result `floats` is, where `reader` alone reads it."""
    if not _from_grid(floats):
        return None
    whole: Any = floats.args[0]
    layer = whole.args[0]
    alone = all(list(node.users) == [user] for node, user in ((floats, reader), (whole, floats), (layer, whole)))
    return layer if alone and layer.target is aten.conv2d.default and reads_integers(layer) else None


def _from_grid(floats: Any) -> bool:
    """Whether it is read from bytes that the call computes, on one grid of constants."""
    whole = floats.args[0] if isinstance(floats, Node) and floats.target is DEQUANTIZE.op else None
    if not isinstance(whole, Node) or whole.target is not QUANTIZE.op:
        return False
    scale: Any = whole.args[1]
    return scale.op == "get_attr" and scale.meta["val"].ndim == 0 and not whole.args[4]


def _is_rounded(node: Node, *between: Any) -> bool:
    """Whether all that becomes of `node` is a rounding, perhaps behind one of `between`."""
    readers = list(node.users)
    if len(readers) == 1 and readers[0].target in between:
        readers = list(readers[0].users)
    return len(readers) == 1 and readers[0].target is QUANTIZE.op


def _is_last(other: Node, layer: Node, total: Node) -> bool:
    """Whether all else that reads the integers behind `other` has done so once `layer` runs, since it needs that."""
    integers: Any = other.args[0]
    waiting = {reader for floats in integers.users for reader in floats.users} - {total}
    seen, todo = {layer}, [layer]
    while waiting and todo:
        for node in todo.pop().all_input_nodes:
            if node not in seen and integers < node:
                seen.add(node)
                todo.append(node)
                waiting.discard(node)
    return not waiting
