"""Operators that multiply by a weight, and the one layout in which all their weights look alike.

A weight is *canonical* as ``[out, in / groups, *kernel]``: row by output feature, as ``nn.Linear`` and ``nn.Conv2d``
store it. The others differ:

=============  ==================================  ==========================
kind           operators                           stored as
=============  ==================================  ==========================
linear         ``aten.linear``                     ``[out, in]``
matmul         ``aten.addmm``, ``mm``, ``matmul``  ``[in, out]``
embedding      ``aten.embedding``                  ``[in = rows, out]``
conv           ``aten.conv1d``, ``2d``, ``3d``     ``[out, in / groups, *k]``
transposed     ``aten.conv_transpose1d`` …         ``[in, out / groups, *k]``
=============  ==================================  ==========================

An embedding is a linear layer of one-hot vectors: its input features are its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import Node

from fxfreeze.dataflow import arguments as arguments
from fxfreeze.program import Program
from fxfreeze.rewrite import NoMatch, fail

aten = torch.ops.aten

Kind = Literal["linear", "matmul", "embedding", "conv", "transposed"]
Moves = Sequence[tuple[Any, tuple[Any, ...]]]
"""Operators with their arguments after the first, to apply one after the other."""


@dataclass(frozen=True)
class _Form:
    """How an operator's schema names its input, weight and bias."""

    kind: Kind
    input: str
    weight: str
    bias: str | None = None


_CONV, _TRANSPOSED = (_Form(kind, "input", "weight", "bias") for kind in ("conv", "transposed"))  # type: ignore[arg-type]

FORMS: dict[Any, _Form] = {
    aten.linear.default: _Form("linear", "input", "weight", "bias"),
    aten.addmm.default: _Form("matmul", "mat1", "mat2", "self"),
    aten.mm.default: _Form("matmul", "self", "mat2"),
    aten.matmul.default: _Form("matmul", "self", "other"),
    aten.embedding.default: _Form("embedding", "indices", "weight"),
    aten.conv1d.default: _CONV,
    aten.conv1d.padding: _CONV,
    aten.conv2d.default: _CONV,
    aten.conv2d.padding: _CONV,
    aten.conv3d.default: _CONV,
    aten.conv3d.padding: _CONV,
    aten.conv_transpose1d.default: _TRANSPOSED,
    aten.conv_transpose2d.input: _TRANSPOSED,
    aten.conv_transpose3d.input: _TRANSPOSED,
}
"""Every operator that :func:`weight_operator` knows."""

ACTIVATIONS = frozenset({
    aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.leaky_relu.default, aten.prelu.default,
    aten.elu.default, aten.selu.default, aten.celu.default, aten.gelu.default, aten.silu.default, aten.mish.default,
    aten.softplus.default, aten.hardswish.default, aten.hardsigmoid.default, aten.sigmoid.default, aten.tanh.default,
    aten.erf.default, aten.log_sigmoid.default, aten.threshold.default, aten.hardshrink.default,
    aten.softshrink.default,
})  # fmt: skip
"""Activation functions, element by element; erf is part of one."""


@dataclass(frozen=True)
class WeightOperator:
    """One call of an operator with a weight.

    Attributes:
        node: the call.
        kind: which layout its weight is stored in; see the module docstring.
        input, weight, bias: its operands; the weight may be a constant or computed.
        groups: of a convolution, else 1.
        shape: of the canonical weight, ``(out, in / groups, *kernel)``.
    """

    node: Node
    kind: Kind
    input: Node
    weight: Node
    bias: Node | None
    groups: int
    shape: tuple[int, ...]

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[1] * self.groups

    @property
    def kernel(self) -> tuple[int, ...]:
        """Sizes of a convolution's window; empty for the others."""
        return self.shape[2:]

    def to_canonical(self) -> Moves:
        """Stored layout → canonical."""
        if self.kind in ("matmul", "embedding"):
            return [(aten.transpose.int, (0, 1))]
        if self.kind != "transposed":
            return []
        out, inner, *kernel = self.shape
        grouped = [self.groups, inner, out // self.groups, *kernel]
        return _regroup(self.groups, grouped, [out, inner, *kernel])

    def from_canonical(self) -> Moves:
        """Canonical layout → stored."""
        if self.kind != "transposed":
            return self.to_canonical()
        out, inner, *kernel = self.shape
        grouped = [self.groups, out // self.groups, inner, *kernel]
        return _regroup(self.groups, grouped, [self.in_features, out // self.groups, *kernel])

    def per_feature(self) -> list[int]:
        """Shape in which a vector with one number per feature multiplies the operator's input, or its output."""
        return [-1, *[1] * len(self.kernel)]

    def per_row(self) -> list[int]:
        """Shape in which a vector with one number per output feature multiplies the canonical weight."""
        return [-1] + [1] * (len(self.shape) - 1)

    def call_arguments(self, **changes: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the call with `input`, `weight` or `bias`, or any argument by its schema name, changed."""
        form = FORMS[self.node.target]
        values = arguments(self.node)
        for key, value in changes.items():
            values[getattr(form, key, None) or key] = value
        schema = self.node.target._schema.arguments  # type: ignore[union-attr]
        # As export writes calls: a default is left out, so that what is folded has the form of what never was adapted.
        told = {item.name for item in schema
                if not item.has_default_value() or values[item.name] != item.default_value}  # fmt: skip
        count = max(i for i, item in enumerate(schema, 1) if item.name in told and not item.kwarg_only)
        positional = tuple(values[item.name] for item in schema[:count])
        return positional, {item.name: values[item.name] for item in schema if item.kwarg_only and item.name in told}


def weight_operator(node: Node) -> WeightOperator | NoMatch:
    """Read `node` as an operator with a weight; the reason where it is none, or not a plain one."""
    form = FORMS.get(node.target)
    if node.op != "call_function" or form is None:
        return fail(f"{node.target} has no weight", node)
    values = arguments(node)
    source, weight = values[form.input], values[form.weight]
    if not isinstance(source, Node) or not isinstance(weight, Node):
        return fail("an operand is not a tensor", node)
    if values.get("alpha", 1) != 1 or values.get("beta", 1) != 1:
        return fail("addmm with alpha or beta other than 1", node)
    stored = tuple(weight.meta["val"].shape)
    if (form.kind == "matmul" and len(stored) != 2) or not all(isinstance(size, int) for size in stored):
        return fail(f"its right operand has shape {stored}, which is no weight matrix", node)
    groups = values.get("groups", 1)
    bias = values[form.bias] if form.bias else None
    return WeightOperator(node, form.kind, source, weight, bias, groups, _canonical_shape(form.kind, stored, groups))


def constant_problem(program: Program, operator: WeightOperator) -> NoMatch | None:
    """Why the weight or bias of `operator` is no constant that could be replaced, or None."""
    for name, operand in (("weight", operator.weight), ("bias", operator.bias)):
        if operand is None:
            continue
        if operand.op != "get_attr":
            return fail(f"its {name} is not a parameter but computed by {operand.target}", operator.node)
        if not (stored := operand.meta["val"]).is_floating_point():
            return fail(f"its {name} is {stored.dtype}, not floating", operator.node)
    return None


def apply(moves: Moves, value: torch.Tensor) -> torch.Tensor:
    """`moves` on a tensor."""
    for target, args in moves:
        value = target(value, *args)
    return value


def _canonical_shape(kind: Kind, stored: tuple[int, ...], groups: int) -> tuple[int, ...]:
    first, second, *kernel = stored
    if kind == "transposed":
        return (second * groups, first // groups, *kernel)
    return (second, first) if kind in ("matmul", "embedding") else stored


def _regroup(groups: int, grouped: list[int], final: list[int]) -> Moves:
    if groups == 1:
        return [(aten.transpose.int, (0, 1))]
    return [(aten.reshape.default, (grouped,)), (aten.transpose.int, (1, 2)), (aten.reshape.default, (final,))]
