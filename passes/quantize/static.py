"""Layers that run on integers, with scales measured on the calibration data: quantize → dequantize around each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor
from torch.fx import Node

from fxfreeze.plan import Quantize
from fxfreeze.program import Program
from fxfreeze.rewrite import Context, Pass

from .._adapters import describe
from .._heads import is_static
from .._measured import Tally, measured_rewrite
from .._operators import arguments, aten
from ._activations import Scale, add_scale, quantized, scale_of
from ._calibrate import Seen, layer_run, observe
from ._layers import Layer, corrected
from ._sensitivity import kept
from ._sites import Site, has_budget, quantized_sites
from ._weights import product_bits, range_notes, read_integers

_RECTIFIERS = frozenset({aten.relu.default, aten.relu6.default, aten.hardtanh.default})
_PADS = frozenset({aten.pad.default, aten.constant_pad_nd.default})
_OUTLIER = 16.0
_SATURATED = 1e-3


class QuantizeStatic(Pass):
    """y = layer(dequantize(quantize(x)), dequantize(integers), bias) for ``Quantize(scheme="int8")``.

    Inputs are uint8 with one scale and zero point, weights int8 with a scale per output feature and 0 in the middle. A
    convolution's result is quantized too, behind the ReLU where one follows: integer kernels of convolutions give
    integers. Sums of such results read the same integers; torch and aoti then round once (:mod:`fxfreeze.postops`). The
    bias takes over the mean of what rounding adds, and is moved to the grid of the integer product, scale of x · scale
    of w, on which runtimes store it.
    """

    name, stage, exact = "quantize_static", "quantize", False
    within_budget: ClassVar[bool] = False
    """Whether it is for plans in which a step with measured scales has a budget; all such steps share these scales."""

    def run(self, program: Program, ctx: Context) -> int:
        steps = [step for step in ctx.plan.steps if isinstance(step, Quantize) and is_static(step)]
        if any(map(has_budget, steps)) != self.within_budget:
            return 0
        sites = quantized_sites(program, ctx, is_static, _problem)
        if not sites:
            return 0
        return measured_rewrite(ctx, program, "static int8", lambda: self._quantize(program, ctx, sites))

    def _quantize(self, program: Program, ctx: Context, sites: Sequence[Site]) -> list[Layer]:
        """Those of the sites that come to run on integers."""
        wanted, shared = _values(sites)
        seen = observe(program, ctx, {node: step.calibrate for node, step in wanted.items()})

        def scale(node: Node, step: Quantize) -> Scale:
            seen_at = seen.observers[_origin(node, shared)]
            return scale_of(seen_at.range(step.percentile), node.meta["val"].dtype)

        layers = [Layer.of(program, site, scale(site.operator.input, site.step)) for site in sites]

        def beside(sites: Collection[Site]) -> dict[Node, Callable[[Tensor], Tensor]]:
            values, everywhere = _values(sites)
            return {node: partial(quantized, scale=scale(node, values[node])) for node in everywhere}

        layers = corrected(program, ctx, layers, seen.batches)
        chosen = kept(program, ctx, {layer.site: layer.result for layer in layers}, beside)
        layers = [layer for layer in layers if layer.site in chosen]
        values, everywhere = _values([layer.site for layer in layers])
        noise = _noise(program, ctx, layers)
        for layer in layers:
            self._report(program, ctx, layer, seen, noise[layer.site.operator.node])
        _rewrite(program, layers, {node: scale(node, step) for node, step in values.items()}, everywhere)
        return layers

    def _report(self, program: Program, ctx: Context, layer: Layer, seen: Seen, noise: Tally) -> None:
        site, observer = layer.site, seen.observers[layer.site.operator.input]
        notes = [f"{noise.words} of its result", seen.basis(ctx), *range_notes(product_bits(program, site.step))]
        if (outside := observer.range(site.step.percentile).outside) > _SATURATED:
            notes.append(f"warning: {outside:.2%} of its input saturates")
        if observer.outlier > _OUTLIER:
            notes.append(f"warning: the largest channel of its input is {observer.outlier:.0f} × the median one")
        ctx.ledger.add(
            site=site.path, step=site.step.name, requested=describe(site.step), outcome="rewritten",
            executes=f"int8 weights, one scale per {site.step.granularity}; uint8 input", detail="; ".join(notes),
        )  # fmt: skip


class QuantizeStaticWithin(QuantizeStatic):
    """As `quantize_static`, with a budget: behind what has none, so that the budget counts that, too."""

    name, within_budget = "quantize_static_within", True


def _problem(site: Site) -> str | None:
    kinds = {
        "embedding": "an embedding computes nothing; 'int8-weight' is for layers that multiply",
        "transposed": "there is no integer kernel for transposed convolutions",
    }
    return kinds.get(site.operator.kind)


def _values(sites: Iterable[Site]) -> tuple[dict[Node, Quantize], set[Node]]:
    """What gets a scale, and the step that says how; and which of it everyone reads as integers, not layers alone.

    The latter are results of convolutions, and of the sums that read them with all that these read: in floats both
    sides of a sum would have to be converted.
    """
    found: dict[Node, Quantize] = {}
    everywhere: dict[Node, None] = {}
    for site in sites:
        found.setdefault(site.operator.input, site.step)
        if site.operator.kind == "conv":
            result = _result(site.operator.node)
            for node in (result, *_summed(result)):
                found.setdefault(node, site.step)
                everywhere[node] = None
    return found, set(everywhere)


def _summed(result: Node) -> Iterator[Node]:
    """Other operands of the sums that read `result`, and what they give."""
    for total in result.users:
        if total.target is aten.add.Tensor and not total.kwargs and len(total.all_input_nodes) == 2:
            yield from (
                side
                for side in total.all_input_nodes
                if side is not result and side.op != "get_attr" and side.meta["val"].is_floating_point()
            )
            yield _result(total)


def _origin(node: Node, everywhere: Collection[Node]) -> Node:
    """What is read as integers by all and moved to `node`, with nothing but zeros added: these integers will do."""
    origin = node
    while origin.target is aten.slice.Tensor or _pads_zeros(origin):
        origin = origin.all_input_nodes[0]
        if origin in everywhere:
            return origin
    return node


def _pads_zeros(node: Node) -> bool:
    if node.target not in _PADS:
        return False
    given = arguments(node)
    return given.get("mode", "constant") == "constant" and not given["value"]


def _result(node: Node) -> Node:
    """What an integer kernel of the convolution gives: a ReLU that alone reads it is part of that."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in _RECTIFIERS else node


def _noise(program: Program, ctx: Context, layers: Iterable[Layer]) -> dict[Node, Tally]:
    """What integers change in each layer's result, from float inputs, on one batch."""
    by_node = {layer.site.operator.node: layer for layer in layers}
    tallies = {node: Tally() for node in by_node}

    def look(node: Node, args: tuple[Any, ...], compute: Callable[[], Tensor]) -> Tensor:
        result, layer = compute(), by_node[node]
        tallies[node].add(layer.result(*layer.site.values(args)), result, result.new_empty(0))
        return result

    layer_run(program, next(iter(ctx.calibration.of(program))), by_node, look)
    return tallies


def _rewrite(program: Program, layers: Iterable[Layer], scales: Mapping[Node, Scale], everywhere: set[Node]) -> None:
    by_node = {layer.site.operator.node: layer for layer in layers}
    for node, scale in scales.items():
        add_scale(program, node, scale, node.users if node in everywhere else by_node.keys() & node.users.keys())
    for node, layer in by_node.items():
        operator = layer.site.operator
        read_integers(program, layer.site, layer.weight)
        if layer.bias is not None and operator.bias is not None:
            program.rebind(operator.bias, layer.bias, user=node)
