"""Products of two values that are both computed, such as attention's, on integers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.inline import inline
from fxfreeze.plan import Quantize
from fxfreeze.program import INTEGERS, IntegerSite, Program
from fxfreeze.rewrite import Context, Pass

from .._adapters import addresses, describe
from .._measured import Tally, constant_cone, measure_outputs
from .._operators import arguments, aten
from ._activations import Scale, add_scale, quantized, scale_of
from ._calibrate import observe, watched_run

ATTENTION = aten.scaled_dot_product_attention.default
PRODUCTS = (aten.matmul.default, aten.bmm.default)


class QuantizeProducts(Pass):
    """a·b with uint8 on both sides, one scale each, for ``Quantize(products=True)``; attention is written out for that.

    softmax(q·kᵀ·scale + mask)·v becomes two products with a softmax in floats between. Scales are measured behind
    QuantizeStatic, on what its integers give.
    """

    name, stage, exact = "quantize_products", "quantize", False

    def run(self, program: Program, ctx: Context) -> int:
        steps = [step for step in ctx.plan.steps if isinstance(step, Quantize) and step.products]
        if not steps:
            return 0
        before = program.clone()
        for node in [node for node in program.graph.nodes if node.target is ATTENTION]:
            if step := _step(program, steps, node):
                self._write_out(program, ctx, step, node)
        found = {
            node: step for node in program.graph.nodes if _computed(node) and (step := _step(program, steps, node))
        }
        for step in steps:
            if step not in found.values():
                ctx.ledger.add(
                    site="", step=step.name, requested=f"{describe(step)}, products", outcome="skipped",
                    detail="none of the modules that it names multiplies two values that are both computed",
                )  # fmt: skip
        if not found:
            return 0
        sides = {side: step for node, step in found.items() for side in node.args[:2]}
        seen = observe(program, ctx, {side: step.calibrate for side, step in sides.items()})  # type: ignore[misc]
        scales = {side: scale_of(seen.observers[side].range(step.percentile), side.meta["val"].dtype)  # type: ignore[index, union-attr]
                  for side, step in sides.items()}  # fmt: skip
        noise = _noise(program, ctx, found, scales)
        for side, scale in scales.items():
            add_scale(program, side, scale, found.keys() & side.users.keys())  # type: ignore[union-attr]
        for node, step in found.items():
            path = program.module_path(node)
            node.meta[INTEGERS] = IntegerSite(path, step.name, product=True)
            ctx.ledger.add(
                site=path, step=step.name, requested=f"{describe(step)}, products", outcome="rewritten",
                executes="uint8 on both sides", detail=f"{noise[node].words} of its result; {seen.basis(ctx)}",
            )  # fmt: skip
        measure_outputs(ctx, program, before, "int8 products")
        return len(found)

    def _write_out(self, program: Program, ctx: Context, step: Quantize, node: Node) -> None:
        given = arguments(node)
        constant = any(constant_cone(given[name]) is not None for name in ("query", "key", "value"))
        if given["dropout_p"] or given["enable_gqa"] or constant:
            ctx.ledger.add(
                site=program.module_path(node), step=step.name, requested=f"{describe(step)}, products",
                outcome="refused", detail="queries, keys or values are constants" if constant
                else "attention with dropout, or with fewer heads of keys than of queries",
            )  # fmt: skip
            return
        operands = [given[name] for name in ("query", "key", "value", "attn_mask") if given[name] is not None]
        program.replace(node, inline(program, _attention(given), *operands, before=node, like=node))
        program.sweep()


def _attention(given: dict[str, Any]) -> Callable[..., Tensor]:
    """The operator's definition, as torch documents it."""

    def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        scale = 1 / math.sqrt(query.shape[-1]) if given["scale"] is None else given["scale"]
        scores = torch.matmul(query * scale, key.transpose(-2, -1))
        if given["is_causal"]:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if mask is not None:
            scores = torch.where(mask, scores, -math.inf) if mask.dtype == torch.bool else scores + mask
        weights = scores.softmax(-1)
        if mask is not None:  # of a row that sees nothing torch makes zeros
            seen = mask if mask.dtype == torch.bool else mask > -math.inf
            weights = torch.where(seen.any(-1, keepdim=True), weights, 0.0)
        return torch.matmul(weights, value)

    return attention


def _step(program: Program, steps: list[Quantize], node: Node) -> Quantize | None:
    """The last of the steps that names the module of `node`."""
    path = program.module_path(node)
    return next((step for step in reversed(steps) if addresses(step, path)), None)


def _computed(node: Node) -> bool:
    """Whether it multiplies two values that are floats and no constants."""
    if node.target not in PRODUCTS:
        return False
    return all(
        isinstance(side, Node) and side.meta["val"].is_floating_point() and side.meta["val"].dim() >= 2
        and constant_cone(side) is None
        for side in node.args[:2]
    )  # fmt: skip


def _noise(program: Program, ctx: Context, found: dict[Node, Quantize], scales: dict[Any, Scale]) -> dict[Node, Tally]:
    """What integers change in each product, from float sides, on one batch."""
    tallies, held = {node: Tally() for node in found}, dict[Node, Tensor]()

    def look(node: Node, value: Tensor) -> None:
        if node in scales:
            held[node] = quantized(value, scales[node])
        if node in tallies:
            left, right = (held[side] for side in node.args[:2])  # type: ignore[index]
            tallies[node].add(torch.matmul(left, right), value, value.new_empty(0))

    with torch.no_grad():
        watched_run(program, next(iter(ctx.calibration.of(program))), look)
    return tallies
