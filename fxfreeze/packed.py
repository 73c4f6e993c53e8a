"""Weights alone as integers, in torch.compile and in AOTInductor: read as the bytes they are.

A Program holds dequantize → layer, which ONNX Runtime makes kernels of. Inductor would make a float weight of it,
before the first call or in every one. So, for these two targets, a linear layer becomes ``fxfreeze::quantized_linear``,
whose C++ reads integers of 8 or 4 bits, and an embedding looks integers up and makes floats of those rows only.

On a GPU the operator's Triton kernel does that, in torch.compile: AOTInductor launches none of ours, and leaves such a
layer in floats there. Layers with integers on both sides: :mod:`fxfreeze.launched`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .inline import inline
from .kernels import _native
from .kernels._op import has_triton
from .kernels.dequantize import KERNEL as DEQUANTIZE
from .kernels.quantized_linear import CHUNK, NATIVE, pack, unpack
from .kernels.quantized_linear import KERNEL as LINEAR
from .program import Program, on_cpu

aten = torch.ops.aten

PRODUCTS: dict[Any, tuple[int, int, int | None]] = {
    aten.linear.default: (0, 1, 2),
    aten.addmm.default: (1, 2, 0),
    aten.mm.default: (0, 1, None),
    aten.matmul.default: (0, 1, None),
}
"""Operator → where its input, weight and bias stand among its arguments."""

CALL = re.compile(r"AOTI_TORCH_ERROR_CODE_CHECK\(aoti_torch_cpu_quantized_linear_native\(")
"""Of the C++ form, in AOTInductor's code."""

LOOKUP = "embedding"
READERS = frozenset({LINEAR.name, LOOKUP, "MatMulNBits", "GatherBlockQuantized", "Gather"})
"""What runs a layer from its weight's integers and computes in floats, in any target."""


@dataclass(frozen=True)
class Weight:
    """The constants behind a dequantize: int8 [rows, columns], and scales [rows, groups of columns].

    Attributes:
        name: of the constant that holds the integers.
        turned: it holds them the other way round.
    """

    name: str
    turned: bool
    values: Tensor
    scale: Tensor

    @property
    def halves(self) -> bool:
        """Whether the integers fit into 4 bits each, in pieces of :data:`CHUNK`."""
        low, high = (int(extreme) for extreme in self.values.aminmax())
        return -8 <= low and high <= 7 and self.values.shape[1] % CHUNK == 0

    def stored(self) -> Tensor:
        return pack(self.values) if self.halves else self.values.contiguous()


def has_packed(program: Program) -> bool:
    """Whether :func:`with_packed` may change `program`; shapes need not be known."""
    return any(_dequantized(node, _position(node)) is not None for node in program.graph.nodes)


def with_packed(program: Program, *, launches: bool = True) -> Program:
    """A copy in which layers read the integers of their weight, where there is a form for them.

    Args:
        launches: whether the target calls operators by name, and so their Triton kernels.
    """
    program = program.clone()
    shelf = _Shelf(program)
    for node, weight in list(_layers(program, launches)):
        program.replace(node, _lookup(shelf, node, weight) if _is_lookup(node) else _product(shelf, node, weight))
    program.sweep()
    return program


def executed(program: Program, calls: int | None = None) -> dict[Node, str]:
    """The layers that run from the integers of their weight, and what runs them.

    Args:
        calls: of ``quantized_linear`` in the code that was generated; None: the operator is called by name, and runs in
            C++ where that is built, or on a GPU. With fewer than there are layers, none of these counts.
    """
    layers = [node for node, _ in _layers(program, launches=calls is None)]
    layers += [node for node in program.graph.find_nodes(op="call_function", target=LINEAR.op) if calls is None]
    products = [node for node in layers if not _is_lookup(node)]
    if calls is None:
        done = not products or not on_cpu(program.inputs) or _native.library(NATIVE.source) is not None
    else:
        done = calls >= len(products)
    return {node: LOOKUP if _is_lookup(node) else LINEAR.name for node in layers if done or _is_lookup(node)}


def _layers(program: Program, launches: bool) -> Iterator[tuple[Node, Weight]]:
    for node in program.graph.nodes:
        weight = constant_weight(program, node)
        if weight is not None and (_is_lookup(node) or has_form(program, node, weight, launches)):
            yield node, weight


def constant_weight(program: Program, node: Node) -> Weight | None:
    """The weight that `node`, a linear layer or an embedding, reads through a dequantize; None: it reads none."""
    source = _dequantized(node, _position(node))
    return None if source is None else _weight(program, source, turned=_is_turned(node))


def _position(node: Node) -> int | None:
    """Where the weight stands among the arguments."""
    if node.target is aten.embedding.default:
        return 0
    return PRODUCTS[node.target][1] if node.target in PRODUCTS else None


def _is_lookup(node: Node) -> bool:
    return node.target is aten.embedding.default


def _is_turned(node: Node) -> bool:
    """Whether the weight is stored [in, out]."""
    return node.target in PRODUCTS and node.target is not aten.linear.default


def _dequantized(node: Node, position: int | None) -> Node | None:
    """The dequantize that gives the weight, when it reads constants."""
    if position is None or len(node.args) <= position or node.kwargs:
        return None
    source = node.args[position]
    if not isinstance(source, Node) or source.target is not DEQUANTIZE.op:
        return None
    return source if all(item.op == "get_attr" for item in source.all_input_nodes) else None


def _weight(program: Program, source: Node, turned: bool) -> Weight | None:
    """None: not two dims, zero points other than 0, or scales that lie along the wrong one."""
    names = [str(item.target) for item in source.args[:3]]  # type: ignore[union-attr]
    values, scale, zero = (program.state.tensor(name) for name in names)
    axis, block = source.args[3], source.args[4]
    if values.dtype != torch.int8 or values.ndim != 2 or bool(zero.any()):
        return None
    if turned:
        values, axis, scale = values.T, 1 - axis % 2, scale.T if scale.ndim == 2 else scale  # type: ignore[operator]
    if scale.ndim == 0:
        scale = scale.expand(len(values), 1)
    elif scale.ndim == 1:
        scale = scale.unsqueeze(1)
    if axis % 2 != (1 if block else 0) and scale.numel() > 1:  # type: ignore[operator]
        return None
    return Weight(names[0], turned, values, scale)


def has_form(program: Program, node: Node, weight: Weight, launches: bool) -> bool:
    """Whether the C++, or the Triton kernel, takes the layer; its operands have their shapes."""
    if _is_lookup(node):
        return False
    x, _, bias = operands(node)
    if any(not isinstance(item, Node) for item in (x, *([] if bias is None else [bias]))):
        return False
    if x.target is DEQUANTIZE.op or weight.scale.dtype != x.meta["val"].dtype:
        return False  # integers on both sides are oneDNN's, or integer_linear's
    if bias is not None and tuple(bias.meta["val"].shape) != (len(weight.values),):
        return False
    given = x.meta["val"]
    if given.shape[-1] != weight.values.shape[1]:
        return False
    if on_cpu(program.inputs):
        return NATIVE.supports(given, weight.values, weight.scale)
    assert LINEAR.supports is not None
    return launches and has_triton() and LINEAR.supports(given, weight.values, weight.scale)


def operands(node: Node) -> tuple[Any, Any, Any]:
    """Input, weight and bias of a layer in :data:`PRODUCTS`."""
    source, weight, bias = PRODUCTS[node.target]
    given = None if bias is None or len(node.args) <= bias else node.args[bias]
    return node.args[source], node.args[weight], given


# ---- the rewrite


@dataclass
class _Shelf:
    """A program, and what has been put into it for its weights: one that two layers read is there once."""

    program: Program
    held: list[tuple[Weight, Node, Node]] = field(default_factory=list)

    def take(self, weight: Weight, node: Node) -> tuple[Node, Node]:
        # A tied table is [rows, columns] for an embedding and for a linear layer.
        for known, *found in self.held:
            if known.name == weight.name and known.turned == weight.turned and torch.equal(known.scale, weight.scale):
                return found[0], found[1]
        values, scale = (
            self.program.add_constant(f"{weight.name}.{suffix}", value, before=node, like=node)
            for suffix, value in (("packed", weight.stored()), ("scale", weight.scale.contiguous()))
        )
        self.held.append((weight, values, scale))
        return values, scale


def _product(shelf: _Shelf, node: Node, weight: Weight) -> Node:
    x, _, bias = operands(node)
    return shelf.program.call(LINEAR.op, x, *shelf.take(weight, node), bias, before=node, like=node)


def _lookup(shelf: _Shelf, node: Node, weight: Weight) -> Node:
    found = partial(looked_up, halves=weight.halves)
    return inline(shelf.program, found, node.args[1], *shelf.take(weight, node), before=node, like=node)  # type: ignore[arg-type]


def looked_up(ids: Tensor, stored: Tensor, scale: Tensor, *, halves: bool) -> Tensor:
    """Rows of an embedding, made floats one by one.

    Args:
        ids: integers [...].
        stored: int8 [rows, dim], or [rows, dim / 2] from :func:`fxfreeze.kernels.quantized_linear.pack`.
        scale: floating [rows, groups].
        halves: it is the latter.

    Returns:
        [..., dim], dtype of `scale`.
    """
    rows = aten.embedding.default(stored, ids)
    whole = unpack(rows) if halves else rows
    steps = whole.unflatten(-1, (scale.shape[1], -1)).to(scale.dtype)
    return (steps * aten.embedding.default(scale, ids).unsqueeze(-1)).flatten(-2)
