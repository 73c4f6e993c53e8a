"""Quantized layers on a GPU, in torch.compile: Triton kernels that the graph calls by name.

A Program holds quantize → dequantize → layer. Linear layers become ``fxfreeze::integer_linear``, with integers on both
sides and the sums of the weight's rows as a constant; those with weights alone ``fxfreeze::quantized_linear``, see
:mod:`fxfreeze.packed`. For convolutions, and products of two computed values, there is no kernel: they compute the
values of integers in floats. What is left of quantize and dequantize is plain operators, which Inductor fuses.

AOTInductor's graph holds references, as for every operator of ours on a GPU, and so no layer in integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from .inline import inline
from .kernels._op import has_triton
from .kernels.dequantize import KERNEL as DEQUANTIZE
from .kernels.integer_linear import KERNEL as LINEAR
from .kernels.integer_linear import MAX_INPUTS
from .kernels.quantize import KERNEL as QUANTIZE
from .packed import PRODUCTS, Weight, constant_weight, operands, with_packed
from .packed import executed as read
from .program import Program, on_cpu


@dataclass(frozen=True)
class Product:
    """A linear layer of integers: those of its input, the scale and the zero point of these, its weight and bias."""

    node: Node
    x: Node
    scale: Node
    zero: Node
    weight: Weight
    bias: Node | None


def has_launched(program: Program) -> bool:
    """Whether :func:`with_launched` may change `program`; shapes need not be known."""
    kinds = (QUANTIZE.op, DEQUANTIZE.op)
    return not on_cpu(program.inputs) and any(node.target in kinds for node in program.graph.nodes)


def with_launched(program: Program) -> Program:
    """A copy in which layers with a Triton kernel are calls of it."""
    program = with_packed(program)
    shelf = _Shelf(program)
    for product in list(_products(program)):
        _rewrite(shelf, product)
    program.sweep()
    for kernel in (QUANTIZE, DEQUANTIZE):
        for node in program.graph.find_nodes(op="call_function", target=kernel.op):
            tensors, others = node.args[:3], node.args[3:]
            program.replace(node, inline(program, partial(_plain, kernel.reference, others), *tensors,  # type: ignore[arg-type]
                                         before=node, like=node))  # fmt: skip
    program.sweep()
    return program


def _plain(reference: Any, others: tuple[Any, ...], *tensors: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = reference(*tensors, *others)
    return found


def executed(program: Program) -> dict[Node, str]:
    """The layers that kernels run from integers, and which."""
    return read(program) | {product.node: LINEAR.name for product in _products(program)}


def head_calls(program: Program) -> int | None:
    """How many Tversky heads a kernel sums up; None: all there are."""
    return None if on_cpu(program.inputs) or has_triton() else 0


def _products(program: Program) -> Iterator[Product]:
    if on_cpu(program.inputs) or not has_triton():
        return
    for node in program.graph.nodes:
        found = _product(program, node) if node.target in PRODUCTS else None
        if found is not None:
            yield found


def _product(program: Program, node: Node) -> Product | None:
    x, _, bias = operands(node)
    weight = constant_weight(program, node)
    if weight is None or weight.scale.shape[1] != 1 or not isinstance(x, Node) or x.target is not DEQUANTIZE.op:
        return None
    q, scale, zero, *_, dtype = x.args
    assert isinstance(q, Node) and isinstance(scale, Node) and isinstance(zero, Node)
    if scale.meta["val"].ndim or not scale.meta["val"].dtype == weight.scale.dtype == dtype:
        return None
    if not 1 <= weight.values.shape[1] <= MAX_INPUTS or q.meta["val"].shape[-1] != weight.values.shape[1]:
        return None
    if bias is not None and tuple(bias.meta["val"].shape) != (len(weight.values),):
        return None
    given = [None if item is None else item.meta["val"] for item in (q, scale, zero, bias)]
    assert LINEAR.supports is not None
    taken = LINEAR.supports(*given[:3], weight.values, weight.scale[:, 0], given[3])
    return Product(node, q, scale, zero, weight, bias) if taken else None


@dataclass
class _Shelf:
    """A program, and the constants that were put into it: weights that several layers read are there once."""

    program: Program
    held: list[tuple[Weight, list[Node]]] = field(default_factory=list)

    def take(self, weight: Weight, node: Node) -> list[Node]:
        """Rows of the weight, their scales and their sums."""
        for known, found in self.held:
            if (known.name, known.turned) == (weight.name, weight.turned) and torch.equal(known.scale, weight.scale):
                return found
        values = weight.values.contiguous(), weight.scale[:, 0].contiguous(), weight.values.sum(1, dtype=torch.int32)
        found = [
            self.program.add_constant(f"{weight.name}.{suffix}", value, before=node, like=node)
            for suffix, value in zip(("rows", "scale", "sum"), values, strict=True)
        ]
        self.held.append((weight, found))
        return found


def _rewrite(shelf: _Shelf, product: Product) -> None:
    program, node = shelf.program, product.node
    rows, scale, total = shelf.take(product.weight, node)
    arguments = (product.x, product.scale, product.zero, rows, scale, product.bias, total)
    program.replace(node, program.call(LINEAR.op, *arguments, before=node, like=node))
