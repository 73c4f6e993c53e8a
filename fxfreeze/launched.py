"""Quantized layers on a GPU, in torch.compile: Triton kernels that the graph calls by name.

A Program holds quantize → dequantize → layer. Linear layers become ``fxfreeze::integer_linear``, with integers on both
sides and the sums of the weight's rows as a constant; those with weights alone ``fxfreeze::quantized_linear``, see
:mod:`fxfreeze.packed`. For convolutions, and products of two computed values, there is no kernel: they compute the
values of integers in floats. What is left of quantize and dequantize is plain operators, which Inductor fuses.

AOTInductor's graph holds references, as for every operator of ours on a GPU, and so no layer in integers. Layers of
float8 it has: they are ``torch._scaled_mm``, on GPUs that multiply float8, and no kernel of ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from .inline import inline
from .kernels import float8_linear
from .kernels._op import has_triton
from .kernels.dequantize import KERNEL as DEQUANTIZE
from .kernels.float8_linear import KERNEL as FLOAT8
from .kernels.integer_linear import KERNEL as LINEAR
from .kernels.integer_linear import MAX_INPUTS
from .kernels.quantize import KERNEL as QUANTIZE
from .kernels.quantize_float8 import KERNEL as QUANTIZE_FLOAT8
from .packed import PRODUCTS, Weight, constant_weight, operands, with_packed
from .packed import executed as read
from .program import Program, on_cpu

SCALED = "torch._scaled_mm"
"""What runs a layer of float8."""
CALL = re.compile(r"AOTI_TORCH_ERROR_CODE_CHECK\(aoti_torch_cuda__scaled_mm\w*\(")
"""Of it, in AOTInductor's code."""


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
    kinds = (QUANTIZE.op, DEQUANTIZE.op, FLOAT8.op)
    return not on_cpu(program.inputs) and any(node.target in kinds for node in program.graph.nodes)


def with_launched(program: Program) -> Program:
    """A copy in which layers with a Triton kernel are calls of it."""
    program = with_scaled(with_packed(program))
    shelf = _Shelf(program)
    for product in list(_products(program)):
        _rewrite(shelf, product)
    program.sweep()
    for kernel in (QUANTIZE, DEQUANTIZE, QUANTIZE_FLOAT8):
        for node in program.graph.find_nodes(op="call_function", target=kernel.op):
            _inline(program, node, kernel.reference)
    program.sweep()
    return program


def has_scaled(program: Program) -> bool:
    """Whether there are layers of float8 on a GPU; shapes need not be known."""
    return not on_cpu(program.inputs) and any(node.target is FLOAT8.op for node in program.graph.nodes)


def with_scaled(program: Program) -> Program:
    """A copy in which layers of float8 are ``torch._scaled_mm``, where the GPU and their sizes allow it."""
    program = program.clone()
    for node in list(_scaled(program)):
        _inline(program, node, float8_linear.launch)
    program.sweep()
    return program


def scaled(program: Program, calls: int | None = None) -> dict[Node, str]:
    """The layers that run in float8, and what runs them.

    Args:
        calls: of it, in the code that was generated; with fewer than there are layers, none counts. None: the graph
            calls it.
    """
    layers = list(_scaled(program))
    return dict.fromkeys(layers, SCALED) if calls is None or calls >= len(layers) else {}


def executed(program: Program) -> dict[Node, str]:
    """The layers that kernels run from integers or float8, and which."""
    return read(program) | {product.node: LINEAR.name for product in _products(program)} | scaled(program)


def _scaled(program: Program) -> Iterator[Node]:
    if on_cpu(program.inputs):
        return
    for node in program.graph.find_nodes(op="call_function", target=FLOAT8.op):
        weight, dtype = node.args[2].meta["val"], node.kwargs["dtype"]
        if float8_linear.fits(weight, dtype) and float8_linear.has_kernel(program.inputs[0].device):
            yield node


def _inline(program: Program, node: Node, function: Callable[..., torch.Tensor]) -> None:
    """Write `function` of the call's arguments in its place."""
    tensors = [value for value in node.args if isinstance(value, Node)]
    others = [value for value in node.args if not isinstance(value, Node)]

    def body(*values: torch.Tensor) -> torch.Tensor:
        return function(*values, *others, **node.kwargs)

    program.replace(node, inline(program, body, *tensors, before=node, like=node))


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
