"""Layers on integers, as static quantization has them: input, weight and bias on grids that fit each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.program import Program
from fxfreeze.rewrite import Context

from ._activations import Scale, quantized
from ._calibrate import layer_run
from ._sites import Site
from ._weights import Integers, Layout, computed, product_bits, stored_weight, to_integers

_BIAS_LIMIT = 2**30
"""A bias in steps of the integer product, at most: runtimes add it as an int32."""


@dataclass(frozen=True)
class Layer:
    """A site, its weight as integers, its bias (float64) on the grid of the product, and the scale of its input."""

    site: Site
    weight: Integers
    bias: Tensor | None
    scale: Scale

    @classmethod
    def of(cls, program: Program, site: Site, scale: Scale) -> Layer:
        operator = site.operator
        bias = None if operator.bias is None else program.constant64(operator.bias)
        layout, dtype = Layout.of(operator, site.step.granularity), operator.weight.meta["val"].dtype
        least = None
        if bias is not None:
            least = bias.abs() / (scale.step * _BIAS_LIMIT)
            least = least if layout.each else least.max()
        integers = to_integers(stored_weight(program, operator), layout, product_bits(program, site.step), dtype, least)
        return cls(site, integers, None, scale).with_bias(bias)

    def with_bias(self, bias: Tensor | None) -> Layer:
        """The layer with `bias` (float64, [out]), rounded to scale of x · scale of w, on which runtimes store it."""
        if bias is not None:
            grid = self.weight.scale.double() * self.scale.step
            bias = torch.round(bias / grid) * grid
        return replace(self, bias=bias)

    def result(self, value: Tensor) -> Tensor:
        """What integers make of the layer's input, which is in floats."""
        return computed(self.site, quantized(value, self.scale), self.weight, self.bias)


@torch.no_grad()
def corrected(program: Program, ctx: Context, layers: Iterable[Layer], batches: int) -> list[Layer]:
    """Layers whose results have the mean of the float ones, per output feature, on the first `batches` of the data.

    What rounding adds to a result is no noise around 0: inputs that are never negative carry the error of a weight to
    one side. Its mean goes into the bias (Nagel et al., Data-Free Quantization Through Weight Equalization and Bias
    Correction, 2019, arXiv 1906.04721, section 4.2). A layer without a bias keeps what it has.
    """
    layers = list(layers)
    wanted = [layer for layer in layers if layer.bias is not None and layer.site.step.correct_bias]
    known = {layer.site.operator.node: layer for layer in wanted}
    sums = {node: torch.zeros(layer.site.operator.out_features, dtype=torch.float64) for node, layer in known.items()}
    counts = dict.fromkeys(known, 0)

    def look(node: Node, args: tuple[Any, ...], compute: Callable[[], Tensor]) -> Tensor:
        result, site = compute(), known[node].site
        kernel = site.operator.kernel
        gap = (result.double() - known[node].result(*site.values(args)).double()).movedim(-1 - len(kernel), -1)
        sums[node] += gap.reshape(-1, gap.shape[-1]).sum(0).cpu()
        counts[node] += gap.numel() // gap.shape[-1]
        return result

    for inputs in islice(ctx.calibration.of(program), batches if known else 0):
        layer_run(program, inputs, known, look)
    return [_shifted(layer, sums[node] / counts[node]) if counts.get(node := layer.site.operator.node) else layer
            for layer in layers]  # fmt: skip


def _shifted(layer: Layer, shift: Tensor) -> Layer:
    assert layer.bias is not None
    return layer.with_bias(layer.bias + shift.to(layer.bias.device))
