"""Linear layers of 8-bit floats: weights with a scale per output feature, inputs with one for all or one per row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.errors import PlanError
from fxfreeze.inline import inline
from fxfreeze.kernels._quantized import FLOAT8_LIMIT
from fxfreeze.kernels.float8_linear import KERNEL as LINEAR
from fxfreeze.kernels.float8_linear import MULTIPLE, fits
from fxfreeze.kernels.quantize_float8 import KERNEL as QUANTIZE
from fxfreeze.plan import Quantize
from fxfreeze.program import INTEGERS, IntegerSite, Program
from fxfreeze.rewrite import Context, Pass

from .._adapters import describe
from .._measured import Tally, measured_rewrite
from ._calibrate import Seen, layer_run, observe
from ._sensitivity import kept
from ._sites import Site, has_budget, quantized_sites
from ._weights import stored_weight


@dataclass(frozen=True)
class Layer:
    """A site, its weight [out, in] in float8 and the scales of its rows, its bias, and the scale of its input, if that
    is known."""

    site: Site
    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    x_scale: Tensor | None

    @classmethod
    def of(cls, program: Program, site: Site, seen: Seen | None) -> Layer:
        operator = site.operator
        weight = stored_weight(program, operator)
        weight = weight.T if operator.kind == "matmul" else weight
        wide = torch.promote_types(operator.weight.meta["val"].dtype, torch.float32)
        scale = step_of(weight.abs().amax(1), wide)
        x_scale = None
        if seen is not None and site.step.mode == "static":
            found = seen.observers[operator.input].range(site.step.percentile)
            x_scale = step_of(torch.tensor(max(-found.low, found.high), device=weight.device), wide)
        values = QUANTIZE.reference(weight, scale.double().unsqueeze(1))
        return cls(site, values, scale, program.constant(operator.bias), x_scale)

    def result(self, value: Tensor) -> Tensor:
        """What float8 makes of the layer's input."""
        dtype = self.site.operator.weight.meta["val"].dtype
        x_scale = row_scales(value) if self.x_scale is None else self.x_scale
        bias = None if self.bias is None else self.bias.to(dtype)
        found: Tensor = LINEAR.op(QUANTIZE.op(value, x_scale), x_scale, self.weight, self.scale, bias, dtype=dtype)
        return found


class QuantizeFloat8(Pass):
    """Linear layers become ``fxfreeze::float8_linear``, behind ``fxfreeze::quantize_float8``, for scheme="fp8".

    A scale spans up to 448, the largest number of float8_e4m3fn: the largest weight of an output feature, and what of
    the input the calibration data has shown, or the largest of each row. Larger inputs saturate.
    """

    name, stage, exact = "quantize_float8", "quantize", False
    within_budget: ClassVar[bool] = False
    """Whether it is for steps with a budget."""

    def run(self, program: Program, ctx: Context) -> int:
        refused: list[tuple[Site, str]] = []
        sites = quantized_sites(program, ctx, self._wants, _noting(refused))
        _check_named(refused, sites)
        if not sites:
            return 0
        return measured_rewrite(ctx, program, "float8", lambda: self._quantize(program, ctx, sites))

    def _quantize(self, program: Program, ctx: Context, sites: Sequence[Site]) -> list[Layer]:
        """Those of the sites that come to run on float8."""
        seen = _observed(program, ctx, sites)
        layers = [Layer.of(program, site, seen) for site in sites]
        chosen = kept(program, ctx, {layer.site: layer.result for layer in layers})
        layers = [layer for layer in layers if layer.site in chosen]
        noise = _noise(program, ctx, layers)
        inputs: dict[tuple[Node, Quantize], tuple[Node, Node]] = {}
        for layer in layers:
            _report(ctx, layer, noise[layer.site.operator.node], seen)
            _rewrite(program, layer, inputs)
        program.sweep()
        return layers

    def _wants(self, step: Quantize) -> bool:
        return step.scheme == "fp8" and has_budget(step) == self.within_budget


class QuantizeFloat8Within(QuantizeFloat8):
    """As `quantize_float8`, with a budget: behind what has none, so that the budget counts that, too."""

    name, within_budget = "quantize_float8_within", True


def step_of(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """What 1.0 stands for, so that `largest` is 448; of zeros alone, 1."""
    scale = (largest.double() / FLOAT8_LIMIT).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(largest > 0, scale, 1.0).to(dtype)


def row_scales(x: Tensor) -> Tensor:
    """A scale per row of `x` [..., n], [..., 1], computed in float32 or better."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.abs().amax(-1, keepdim=True).to(wide) / FLOAT8_LIMIT).clamp(min=torch.finfo(torch.float32).tiny)


def _noting(refused: list[tuple[Site, str]]) -> Callable[[Site], str | None]:
    def problem(site: Site) -> str | None:
        reason = _problem(site)
        if reason is not None:
            refused.append((site, reason))
        return reason

    return problem


def _problem(site: Site) -> str | None:
    operator = site.operator
    if operator.kind in ("conv", "transposed"):
        return "there are no convolutions of float8; leave it in floats, or use scheme='int8'"
    if operator.kind == "embedding":
        return "an embedding computes nothing; 'int8-weight' stores it in as many bytes"
    if operator.bias is not None and tuple(operator.bias.meta["val"].shape) != (operator.out_features,):
        return "its bias is not one number per output"
    return None


def _check_named(refused: Iterable[tuple[Site, str]], sites: Sequence[Site]) -> None:
    """A step that names layers, not all there are, and gets none of them, is a mistake."""
    served = {site.step for site in sites}
    for site, reason in refused:
        if site.step.at != "*" and site.step not in served:
            raise PlanError(
                f"no layer that {site.step.name!r} names can be float8: {reason}", where=site.path,
                hint="name linear layers with at=, or take the step out of the plan",
            )  # fmt: skip


def _observed(program: Program, ctx: Context, sites: Iterable[Site]) -> Seen | None:
    wanted = {site.operator.input: site.step.calibrate for site in sites if site.step.mode == "static"}
    return observe(program, ctx, wanted) if wanted else None


def _noise(program: Program, ctx: Context, layers: Iterable[Layer]) -> Mapping[Node, Tally]:
    """What float8 changes in each layer's result, from float inputs, on one batch; hits are inputs that saturate."""
    by_node = {layer.site.operator.node: layer for layer in layers}
    tallies = {node: Tally() for node in by_node}

    def look(node: Node, args: tuple[Any, ...], compute: Callable[[], Tensor]) -> Tensor:
        result, layer = compute(), by_node[node]
        (value,) = layer.site.values(args)
        limit = None if layer.x_scale is None else FLOAT8_LIMIT * layer.x_scale
        tallies[node].add(layer.result(value), result, value.new_empty(0) if limit is None else value.abs() > limit)
        return result

    layer_run(program, next(iter(ctx.calibration.of(program))), by_node, look)
    return tallies


def _report(ctx: Context, layer: Layer, noise: Tally, seen: Seen | None) -> None:
    site, static = layer.site, layer.x_scale is not None
    notes = [f"{noise.words} of its result"]
    if static and seen is not None:
        notes += [seen.basis(ctx), f"{noise.hits / max(noise.count, 1):.2%} of its input saturates"]
    if not fits(layer.weight, site.operator.weight.meta["val"].dtype):
        notes.append(f"warning: kernels take inputs and outputs in multiples of {MULTIPLE}, and no float64")
    ctx.ledger.add(
        site=site.path, step=site.step.name, requested=describe(site.step), outcome="rewritten",
        executes=f"float8 weights, one scale per channel; float8 input, {'one scale' if static else 'scaled per row'}",
        detail="; ".join(notes),
    )  # fmt: skip


def _rewrite(program: Program, layer: Layer, inputs: dict[tuple[Node, Quantize], tuple[Node, Node]]) -> None:
    """Put the operator in the layer's place; `inputs`: what is quantized already, and its scale."""
    operator, site = layer.site.operator, layer.site
    node, value, key = operator.node, operator.input, (operator.input, site.step)
    if key not in inputs:
        if layer.x_scale is None:
            x_scale = inline(program, row_scales, value, before=node, like=node)
        else:
            x_scale = program.add_constant(f"{value.name}.scale", layer.x_scale, before=node, like=node)
        inputs[key] = program.call(QUANTIZE.op, value, x_scale, before=node, like=node), x_scale
    name = str(operator.weight.target)
    weight, scale = (
        program.add_constant(f"{name}.{suffix}", constant.contiguous(), before=node, like=node)
        for suffix, constant in (("float8", layer.weight), ("scale", layer.scale))
    )
    dtype = operator.weight.meta["val"].dtype
    bias = () if operator.bias is None else (operator.bias,)
    new = program.call(LINEAR.op, *inputs[key], weight, scale, *bias, before=node, like=node, dtype=dtype)
    new.meta[INTEGERS] = IntegerSite(site.path, site.step.name)
    program.replace(node, new)
