"""Leave out two of four numbers of a weight, on GPUs that can, where that is the faster way."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from fxfreeze.kernels import semi_structured as kernel
from fxfreeze.kernels.semi_structured import KERNEL, compress, pick
from fxfreeze.program import Program
from fxfreeze.rewrite import Context, Pass

from ._timing import medians
from ._zeros import (
    Sparse,
    is_faster,
    is_two_of_four,
    problem,
    report,
    report_size_only,
    said,
    sizes,
    sparse_weights,
    store,
)


@dataclass(frozen=True)
class Layer:
    """What the time of a 2:4 layer hangs on; `sizes` of the input, for each number of rows that is timed."""

    sizes: tuple[tuple[int, ...], ...]
    outputs: int
    dtype: torch.dtype
    device: torch.device


Measure = Callable[[Layer], list[tuple[float, float]]]
"""Seconds of the 2:4 layer, and of the dense one, for each of ``layer.sizes``."""
Capability = Callable[[torch.device], tuple[int, int] | None]
"""Compute capability of a device; None where it is none of CUDA's."""


class SemiStructured(Pass):
    """A linear layer of which at most two of any four consecutive inputs count becomes ``fxfreeze::semi_structured``.

    In half precision, on a CUDA device with tensor cores for it, where nothing but the torch target, which launches the
    kernel, is asked for, and where it was measured to be faster. Every other such weight gets a row that says why it
    stays as it is. A weight that also has blocks of zeros is looked at here after those were found to be of no use.
    """

    name, stage = "semi-structured", "fuse"

    def __init__(self, measure: Measure | None = None, capability: Capability | None = None) -> None:
        self.measure = measure or measured
        self.capability = capability or kernel.capability

    def run(self, program: Program, ctx: Context) -> int:
        count = 0
        for found in sparse_weights(program):
            if not is_two_of_four(found.weight):
                continue
            reason = self._rewrite(program, found, ctx)
            count += reason is None
            if reason is not None:
                report_size_only(program, ctx, found, reason)
        return count

    def _rewrite(self, program: Program, found: Sparse, ctx: Context) -> str | None:
        """None when done, else why not."""
        operator = found.operator
        x = operator.input.meta["val"]
        if reason := kernel.why_not(self.capability(x.device), cusparselt=kernel.has_cusparselt()):
            return reason
        if reason := _form_problem(found) or problem(found, ctx.plan.targets, ()):
            return reason
        layer = Layer(sizes(operator), operator.out_features, x.dtype, x.device)
        times = self.measure(layer)
        if not is_faster(times):
            return f"the dense product is as fast as the 2:4 one: {said(layer.sizes, times)}"
        build(program, found)
        report(program, ctx, found, "rewritten", str(KERNEL.op), f"two of four are left. {said(layer.sizes, times)}")
        return None


def _form_problem(found: Sparse) -> str | None:
    operator = found.operator
    dtype = operator.input.meta["val"].dtype
    if operator.kind not in ("linear", "matmul"):
        return "rows of it are looked up, not multiplied"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"2:4 is for half precision, and this is {dtype}"
    if operator.out_features % kernel.OUT or operator.in_features % kernel.IN:
        return f"2:4 takes multiples of {kernel.OUT} outputs and of {kernel.IN} inputs"
    return None


def build(program: Program, found: Sparse) -> None:
    """Let the users of ``found.node`` read what ``fxfreeze::semi_structured`` makes of its input."""
    operator, node = found.operator, found.node
    _, index = compress(found.weight)
    values = store(program, found, "values", lambda weight: pick(weight, index))
    where = program.add_constant(f"{operator.weight.target}_index", index, before=node, like=operator.weight)
    bias = () if operator.bias is None else (operator.bias,)
    program.replace(node, program.call(KERNEL.op, operator.input, values, where, *bias, before=node, like=node))


@functools.cache
@torch.no_grad()
def measured(layer: Layer) -> list[tuple[float, float]]:
    """On this machine; identical layers once per process."""
    found = []
    for size in layer.sizes:
        x = torch.full(size, 0.5, dtype=layer.dtype, device=layer.device)
        # The first and the last of each four.
        weight = x.new_tensor([0.5, 0.0, 0.0, 0.5]).repeat(layer.outputs, size[-1] // 4)
        bias = x.new_zeros(layer.outputs)
        calls: dict[str, Callable[[], Tensor]] = {
            "ours": partial(KERNEL.op, x, *compress(weight), bias),
            "dense": partial(linear, x, weight, bias),
        }
        times = medians(calls, layer.device)
        found.append((times["ours"], times["dense"]))
    return found
