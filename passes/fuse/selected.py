"""Choose how the adapters that rows select are multiplied, by what is faster."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.fx import Node

from fxfreeze.kernels._op import at_most
from fxfreeze.kernels.select_lora import FORMS, KERNEL
from fxfreeze.program import Origin, Program
from fxfreeze.rewrite import Context, NodeRewrite, NoMatch, fail

from .._operators import arguments
from ._timing import medians

WIDEST = 1024
"""Adapters side by side beyond this are not timed: as a layer of that width, they would cost what a layer costs."""
ROWS, TOKENS = 32, 128
"""The most that are timed where a plan leaves them open."""


@dataclass(frozen=True)
class Layer:
    """What the time hangs on; `rows` and `tokens`: the least and the most there may be, up to `ROWS` and `TOKENS`."""

    rows: tuple[int, int]
    tokens: tuple[int, int]
    inputs: int
    outputs: int
    rank: int
    adapters: int
    dtype: torch.dtype


Times = Mapping[tuple[int, int], Mapping[str, float]]
"""Rows and tokens → form → seconds."""
Measure = Callable[[Layer], Times]


class SelectForm(NodeRewrite):
    """``fxfreeze::select_lora`` in plain torch gathers each row's adapter, or multiplies with all and masks.

    Both compute the same, so this is about time only. They are timed on this machine, at the layer's own size, for the
    least and the most rows and tokens that the plan allows, and the mask is taken where it is never the slower.

    Only on a CPU: on a GPU the torch target launches a kernel, which gathers. What is looked up, or convolved, has one
    form only.
    """

    name, stage, targets = "select-form", "fuse", (KERNEL.op,)

    def __init__(self, measure: Measure | None = None) -> None:
        self.measure = measure or measured

    def missed(self, program: Program, miss: NoMatch, ctx: Context) -> None:
        _report(program, ctx, miss.node, "gather", miss.reason)

    def rewrite(self, program: Program, node: Node, ctx: Context) -> bool | NoMatch:
        given = arguments(node)
        if node.meta["val"].device.type != "cpu" or given["form"] != FORMS[0]:
            return False
        if not given["x"].meta["val"].is_floating_point():  # looked up, in one way only
            return False
        layer = _layer(node)
        if layer.adapters * layer.rank > WIDEST:
            return fail(f"{layer.adapters} times rank {layer.rank} are too many to multiply with all", node)
        times = self.measure(layer)
        said = "; ".join(
            f"{rows}x{tokens}: mask {found['mask'] * 1e3:.3g} ms against {found['gather'] * 1e3:.3g}"
            for (rows, tokens), found in times.items()
        )
        if any(found["mask"] >= found["gather"] for found in times.values()):
            return fail(f"the mask is not always faster. {said}", node)
        operands = (given[key] for key in ("x", "a", "b", "ids"))
        program.replace(node, program.call(KERNEL.op, *operands, form="mask", before=node, like=node))
        _report(program, ctx, node, "mask", said)
        return True


def _report(program: Program, ctx: Context, node: Node, form: str, detail: str) -> None:
    origin = node.meta.get("fxfreeze")
    step, site = (origin.step, origin.site) if isinstance(origin, Origin) else ("", program.module_path(node))
    ctx.ledger.add(
        site=site, step=step, requested="how adapters are selected", outcome="measured",
        executes=f"{KERNEL.op}, {form}", detail=detail,
    )  # fmt: skip


def _layer(node: Node) -> Layer:
    given = arguments(node)
    x, (adapters, rank, inputs) = given["x"].meta["val"], given["a"].meta["val"].shape
    tokens = functools.reduce(lambda count, size: count * size, x.shape[1:-1], 1)
    return Layer(
        _extent(x.shape[0], ROWS), _extent(tokens, TOKENS), inputs, node.meta["val"].shape[-1], rank, adapters, x.dtype
    )


def _extent(size: int | torch.SymInt, most: int) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    return 1, next((count for count in (2**power for power in range(most.bit_length())) if at_most(size, count)), most)


def measured(layer: Layer) -> Times:
    """On this machine, with as many threads as torch has now; identical layers once per process."""
    return _measured(layer, torch.get_num_threads())


@functools.cache
@torch.no_grad()
def _measured(layer: Layer, threads: int) -> Times:
    a = torch.full((layer.adapters, layer.rank, layer.inputs), 0.5, dtype=layer.dtype)
    b = torch.full((layer.adapters, layer.rank, layer.outputs), 0.5, dtype=layer.dtype)
    found = {}
    for rows, tokens in dict.fromkeys(zip(layer.rows, layer.tokens, strict=True)):
        x, ids = torch.ones(rows, tokens, layer.inputs, dtype=layer.dtype), torch.arange(rows) % layer.adapters
        calls = {form: functools.partial(KERNEL.reference, x, a, b, ids, form=form) for form in FORMS}
        found[rows, tokens] = medians(calls, torch.device("cpu"))
    return found
