"""Products of two values that are both computed, such as attention's, on integers."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.inline import inline
from fxfreeze.plan import Quantize
from fxfreeze.program import INTEGERS, IntegerSite, Program
from fxfreeze.rewrite import Context, Pass

from .._adapters import addresses, describe
from .._measured import Tally, constant_cone, measured_rewrite
from .._operators import arguments, aten
from ._activations import Scale, add_scale, quantized, scale_of
from ._calibrate import layer_run, observe
from ._sensitivity import kept
from ._sites import Product, has_budget

ATTENTION = aten.scaled_dot_product_attention.default
PRODUCTS = (aten.matmul.default, aten.bmm.default)


class QuantizeProducts(Pass):
    """a·b with uint8 on both sides, one scale each, for ``Quantize(products=True)``; attention is written out for that.

    softmax(q·kᵀ·scale + mask)·v becomes two products with a softmax in floats between. Scales are measured behind
    QuantizeStatic, on what its integers give.
    """

    name, stage, exact = "quantize_products", "quantize", False
    within_budget: ClassVar[bool] = False
    """Whether it is for steps with a budget."""

    def run(self, program: Program, ctx: Context) -> int:
        steps = [step for step in ctx.plan.steps if isinstance(step, Quantize) and step.products]
        own = [step for step in steps if has_budget(step) == self.within_budget]
        if not own:
            return 0
        return measured_rewrite(ctx, program, "int8 products", lambda: self._quantize(program, ctx, steps, own))

    def _quantize(
        self, program: Program, ctx: Context, steps: list[Quantize], own: list[Quantize]
    ) -> Collection[Product]:
        """The products of the steps `own` that come to run on integers; `steps`: all that ask for products."""
        whole: list[_Whole] = []
        for node in [node for node in program.graph.nodes if node.target is ATTENTION]:
            if (step := _step(program, steps, node)) in own:
                whole += self._write_out(program, ctx, step, node)
        found = [
            Product(program.module_path(node), step, node)
            for node in program.graph.nodes if _computed(node) and (step := _step(program, steps, node)) in own
        ]  # fmt: skip
        self._skip(ctx, [step for step in own if step not in {product.step for product in found}])
        sides = {side: product.step for product in found for side in product.read}
        seen = observe(program, ctx, {side: step.calibrate for side, step in sides.items()})
        scales = {side: scale_of(seen.observers[side].range(step.percentile), side.meta["val"].dtype)
                  for side, step in sides.items()}  # fmt: skip
        chosen = kept(program, ctx, {product: partial(_computed_from, product, scales) for product in found})
        noise = _noise(program, ctx, chosen, scales)
        for product in chosen:
            ctx.ledger.add(
                site=product.path, step=product.step.name, requested=product.requested,
                outcome="rewritten", executes="uint8 on both sides",
                detail=f"{noise[product.node].words} of its result; {seen.basis(ctx)}",
            )  # fmt: skip
        _rewrite(program, chosen, scales)
        _restore(program, whole, chosen)
        return chosen

    def _skip(self, ctx: Context, steps: Iterable[Quantize]) -> None:
        for step in steps:
            ctx.ledger.add(
                site="", step=step.name, requested=f"{describe(step)}, products", outcome="skipped",
                detail="none of the modules that it names multiplies two values that are both computed",
            )  # fmt: skip

    def _write_out(self, program: Program, ctx: Context, step: Quantize, node: Node) -> list[_Whole]:
        given = arguments(node)
        constant = any(constant_cone(given[name]) is not None for name in ("query", "key", "value"))
        if given["dropout_p"] or given["enable_gqa"] or constant:
            ctx.ledger.add(
                site=program.module_path(node), step=step.name, requested=f"{describe(step)}, products",
                outcome="refused", detail="queries, keys or values are constants" if constant
                else "attention with dropout, or with fewer heads of keys than of queries",
            )  # fmt: skip
            return []
        operands = [given[name] for name in ("query", "key", "value", "attn_mask") if given[name] is not None]
        known, call = set(program.graph.nodes), (node.target, node.args, dict(node.kwargs))
        result = inline(program, _attention(given), *operands, before=node, like=node)
        program.replace(node, result)
        program.sweep()
        made = frozenset(node for node in program.graph.nodes if node not in known and node.target in PRODUCTS)
        return [_Whole(result, made, *call)]


class QuantizeProductsWithin(QuantizeProducts):
    """As `quantize_products`, with a budget: behind what has none, so that the budget counts that, too."""

    name, within_budget = "quantize_products_within", True


@dataclass(frozen=True)
class _Whole:
    """Attention that was written out: its result, its products, and the call that it was."""

    result: Node
    products: frozenset[Node]
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _restore(program: Program, whole: Iterable[_Whole], chosen: Iterable[Product]) -> None:
    """Put attention back that has no product on integers."""
    products = {product.node for product in chosen}
    for was in whole:
        if was.products.isdisjoint(products):
            call = program.call(was.target, *was.args, before=was.result, like=was.result, **was.kwargs)
            program.replace(was.result, call)
    program.sweep()


def _computed_from(product: Product, scales: Mapping[Node, Scale], *values: Tensor) -> Tensor:
    """The product of both sides as integers have them."""
    return torch.matmul(*(quantized(value, scales[side]) for side, value in zip(product.read, values, strict=True)))


def _rewrite(program: Program, chosen: Iterable[Product], scales: Mapping[Node, Scale]) -> None:
    readers: dict[Node, list[Node]] = {}
    for product in chosen:
        product.node.meta[INTEGERS] = IntegerSite(product.path, product.step.name, product=True)
        for side in dict.fromkeys(product.read):
            readers.setdefault(side, []).append(product.node)
    for side, nodes in readers.items():
        add_scale(program, side, scales[side], nodes)


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


@torch.no_grad()
def _noise(
    program: Program, ctx: Context, chosen: Iterable[Product], scales: Mapping[Node, Scale]
) -> dict[Node, Tally]:
    """What integers change in each product, from float sides, on one batch."""
    by_node = {product.node: product for product in chosen}
    tallies = {node: Tally() for node in by_node}

    def look(node: Node, args: tuple[Any, ...], compute: Callable[[], Tensor]) -> Tensor:
        result, product = compute(), by_node[node]
        tallies[node].add(_computed_from(product, scales, *product.values(args)), result, result.new_empty(0))
        return result

    layer_run(program, next(iter(ctx.calibration.of(program))), by_node, look)
    return tallies
