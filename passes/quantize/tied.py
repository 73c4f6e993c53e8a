"""Layers with the same weight that read the same value: one product on integers for all of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from fxfreeze.kernels.dequantize import KERNEL as DEQUANTIZE
from fxfreeze.program import INTEGERS, Program, integer_layers
from fxfreeze.rewrite import Context, Pass

from .._operators import FORMS, aten

_CONVOLUTIONS = ("conv", "transposed")


class MergeTied(Pass):
    """layer(x), layer(x) → layer(x) for linear layers and embeddings on integers with equal weights and biases.

    What runs targets would merge some of them, and leave it open which kernel ran which. Results of convolutions are
    quantized for what reads them, and so stay apart.
    """

    name, stage = "merge_tied", "quantize"

    def run(self, program: Program, ctx: Context) -> int:
        kept: list[Node] = []
        count = 0
        for node in integer_layers(program):
            if node.target not in FORMS or FORMS[node.target].kind in _CONVOLUTIONS:
                continue
            twin = next((other for other in kept if _same(program, node, other)), None)
            if twin is None:
                kept.append(node)
            else:
                _merge(program, ctx, twin, node)
                count += 1
        return count


def _same(program: Program, one: Any, two: Any) -> bool:
    """Whether both are one value, or equal constants, or layers, or their weights, made of such."""
    if not (isinstance(one, Node) and isinstance(two, Node)):
        return bool(one == two) and type(one) is type(two)
    if one is two or one.op != two.op:
        return one is two
    if one.op == "get_attr":
        return _equal(program, one, two)
    layers = INTEGERS in one.meta or (one.target is DEQUANTIZE.op and one.args[0].op == "get_attr")  # type: ignore[union-attr]
    if not layers or one.target is not two.target or one.kwargs != two.kwargs or len(one.args) != len(two.args):
        return False
    return all(_same(program, *pair) for pair in zip(one.args, two.args, strict=True))


def _equal(program: Program, one: Node, two: Node) -> bool:
    names = str(one.target), str(two.target)
    if names[0] == names[1]:
        return True
    if not program.folds.keys().isdisjoint(names) or program.state.dtype(names[0]) != program.state.dtype(names[1]):
        return False
    return torch.equal(*map(program.state.tensor, names))


def _merge(program: Program, ctx: Context, kept: Node, node: Node) -> None:
    site, gone = kept.meta[INTEGERS], node.meta[INTEGERS]
    kept.meta[INTEGERS] = replace(site, twins=(*site.twins, gone))
    ctx.ledger.add(
        site=gone.path, step=gone.step, requested="one product for layers that are tied", outcome="rewritten",
        executes=f"the product of {site.path!r}", detail="the same integers, and the same input",
    )  # fmt: skip
    both = all(any(user.op == "output" for user in item.users) for item in (kept, node))
    # A caller may write to one of two results.
    result = program.call(aten.clone.default, kept, before=node, like=node) if both else kept
    program.replace(node, result)
