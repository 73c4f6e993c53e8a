"""Leave out the weights of neurons that a gate has shut, where that is the faster way."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.functional import linear

from fxfreeze.constants import Edit, Recipe
from fxfreeze.dataflow import RESHAPES
from fxfreeze.kernels._op import at_most
from fxfreeze.kernels.gate import KERNEL as GATE
from fxfreeze.kernels.sparse_down import KERNEL, MAX_ROWS
from fxfreeze.program import Program
from fxfreeze.rewrite import Context, NodeRewrite, NoMatch, fail

from .._operators import FORMS, WeightOperator, arguments, weight_operator
from ._timing import medians

aten = torch.ops.aten

PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar)
SMALL = 1 << 20
"""Bytes of a weight that is read as fast as an operator is called."""
SHARED = 64 << 20
"""The weight is stored anew, and stays as it is as well where something else reads it: up to this many bytes."""
WORTH = 0.25
"""A gate that leaves a quarter of the neurons is a poor one; if even that many are too many, nothing is gained."""
STEP = 0.05


@dataclass(frozen=True)
class Point:
    """Seconds of both products, for `firing` nonzero values in all rows together, as a multiple of the neurons."""

    firing: float
    dense: float
    sparse: float

    def __str__(self) -> str:
        return f"{self.firing:g}: {self.sparse * 1e3:.3g} ms against {self.dense * 1e3:.3g}"


@dataclass(frozen=True)
class Layer:
    """What the time of a product hangs on; `rows`: the most there may be, up to :data:`MAX_ROWS`."""

    neurons: int
    columns: int
    rows: int
    dtype: torch.dtype
    device: torch.device


Measure = Callable[[Layer], Sequence[Point]]
"""Points by ascending `firing`."""


class SparseDown(NodeRewrite):
    """A linear layer of what a hard ``fxfreeze::gate`` lets through becomes ``fxfreeze::sparse_down``.

    Between the two may be reshapes, and products with something else, as in a gated MLP: where the gate is shut they
    are 0. Both forms compute the same function, so this is about time only, and time is measured, on this machine, at
    the layer's own size: for one row of which 5, 25 and 100 % fire, and for eight rows that fire whole. From this comes
    the crossover that the operator is called with, and whether it is called at all. A dense product takes no less time
    for more rows, so what is measured with few holds for many.

    On a CPU it is for the targets torch and aoti; ONNX gets the dense product in any case. On a GPU it is where nothing
    but the torch target, which launches its kernel, is asked for. Nowhere is it for more than eight rows at least.
    """

    name, stage, targets = "sparse-down", "fuse", tuple(FORMS)

    def __init__(self, measure: Measure | None = None) -> None:
        self.measure = measure or measured

    def missed(self, program: Program, miss: NoMatch, ctx: Context) -> None:
        ctx.ledger.add(
            site=program.module_path(miss.node), step="", requested=REQUESTED, outcome="skipped",
            executes=str(miss.node.target), detail=miss.reason,
        )  # fmt: skip

    def rewrite(self, program: Program, node: Node, ctx: Context) -> bool | NoMatch:
        operator = weight_operator(node)
        if isinstance(operator, NoMatch) or operator.kind not in ("linear", "matmul"):
            return False
        size = math.prod(operator.shape) * operator.weight.meta["val"].element_size()
        if size < SMALL or not is_gated(operator.input, operator.in_features):
            return False
        if reason := _problem(program, operator, ctx.plan.targets):
            return fail(reason, node)
        layer = _layer(operator)
        points = self.measure(layer)
        said = "; ".join(map(str, points))
        crossover = crossing(points)
        if crossover < WORTH:
            return fail(f"the dense product is as fast. Firing {said}", node)
        weight = _by_neuron(program, operator)
        bias = () if operator.bias is None else (operator.bias,)
        new = program.call(KERNEL.op, operator.input, weight, *bias, before=node, like=node, crossover=crossover)
        program.replace(node, new)
        ctx.ledger.add(
            site=program.module_path(node), step="", requested=REQUESTED, outcome="rewritten",
            executes=str(KERNEL.op), detail=f"crossover {crossover:g}. Firing {said}",
        )  # fmt: skip
        return True


REQUESTED = "skip neurons that do not fire"


def is_gated(value: Node, neurons: int) -> bool:
    """Whether a hard gate along the last dim makes zeros of `value` [..., neurons]."""
    stack, seen = [value], set()
    while stack:
        item = stack.pop()
        known = item.meta.get("val")
        if item in seen or not isinstance(known, Tensor) or not known.ndim or not _is(known.shape[-1], neurons):
            continue
        seen.add(item)
        if item.target is GATE.op:
            given = arguments(item)
            if given["temperature"] is None and given["dim"] in (-1, known.ndim - 1):
                return True
        if item.target in PRODUCTS:
            stack += [part for part in item.args[:2] if isinstance(part, Node)]
        elif item.target in RESHAPES:
            # With as many values before and after in its last dim, a reshape keeps that dim.
            stack.append(item.args[0])  # type: ignore[arg-type]
    return False


def _is(size: int | torch.SymInt, neurons: int) -> bool:
    # A symbol is not compared: that would add a guard.
    return isinstance(size, int) and size == neurons


def _problem(program: Program, operator: WeightOperator, targets: Sequence[str]) -> str | None:
    """Why it is not for this layer, or None."""
    h, weight = operator.input.meta["val"], operator.weight.meta["val"]
    bias = None if operator.bias is None else operator.bias.meta["val"]
    cpu = h.device.type == "cpu"
    size = weight.numel() * weight.dtype.itemsize
    if operator.weight.op != "get_attr":
        return f"its weight is not a parameter but computed by {operator.weight.target}"
    if not ({"torch", "aoti"} & set(targets) if cpu else tuple(targets) == ("torch",)):
        return f"there is no form for targets {', '.join(targets) or 'none'} on {h.device.type}"
    if at_most(-math.prod(h.shape[:-1]), -MAX_ROWS - 1):  # that many or more
        return f"there are more than {MAX_ROWS} rows at least"
    if h.dtype != weight.dtype or (
        bias is not None and (bias.dtype != h.dtype or bias.shape != (operator.out_features,))
    ):
        return "its operands differ in dtype, or its bias is not one number per output"
    if h.dtype not in ((torch.float32, torch.float64) if cpu else (torch.float32, torch.float16, torch.bfloat16)):
        return f"there is no form for {h.dtype} on {h.device.type}"
    if not _is_by_neuron(program, operator) and size > SHARED and program.readers(operator.weight) != {operator.node}:
        return f"its weight is read by something else, too, and a copy would take {size / 2**20:.0f} MiB"
    return None


def _layer(operator: WeightOperator) -> Layer:
    h = operator.input.meta["val"]
    rows = 1 if at_most(math.prod(h.shape[:-1]), 1) else MAX_ROWS
    return Layer(operator.in_features, operator.out_features, rows, h.dtype, h.device)


# ---- the weight


def _is_by_neuron(program: Program, operator: WeightOperator) -> bool:
    return operator.kind == "matmul" and program.state.tensor(str(operator.weight.target)).is_contiguous()


def _by_neuron(program: Program, operator: WeightOperator) -> Node:
    """A node of the weight [neurons, columns]; what was folded into it is rounded and measured later, as before."""
    old = operator.weight
    if _is_by_neuron(program, operator):
        return old
    turn = _transposed if operator.kind == "linear" else _contiguous
    name = str(old.target)
    new = program.add_constant(
        f"{name}_by_neuron",
        turn(program.state.recipe(name)),
        dtype=old.meta["val"].dtype,
        before=operator.node,
        like=old,
    )
    if (fold := program.folds.get(name)) is not None:
        program.folds[str(new.target)] = replace(fold, base=turn(fold.base))
    return new


def _transposed(recipe: Recipe) -> Recipe:
    def turned(edit: Edit) -> Edit:
        return lambda value: edit(value.T).T.contiguous()

    return Recipe(recipe.base.detach().T.contiguous(), tuple(map(turned, recipe.edits)))


def _contiguous(recipe: Recipe) -> Recipe:
    return _transposed(_transposed(recipe))


# ---- the time


def crossing(points: Sequence[Point]) -> float:
    """Up to how many nonzero values, as a multiple of the neurons, the sparse product is the faster; rounded down."""
    reached, last = 0.0, 0.0
    for point in points:
        gain = point.dense - point.sparse
        if gain < 0:
            # A straight line between the two; before the first point there is nothing to draw one from.
            reached += (point.firing - reached) * last / (last - gain) if last > 0 else 0.0
            break
        reached, last = point.firing, gain
    return round(math.floor(reached / STEP + 1e-9) * STEP, 2)


def measured(layer: Layer) -> Sequence[Point]:
    """On this machine, with as many threads as torch has now; identical layers once per process."""
    return _measured(layer, torch.get_num_threads())


@functools.cache
@torch.no_grad()
def _measured(layer: Layer, threads: int) -> Sequence[Point]:
    generator = torch.Generator().manual_seed(0)

    def draw(firing: float) -> Tensor:
        """One row, or as many as must fire whole."""
        shape = max(int(firing), 1), layer.neurons
        h = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < firing)
        return h.to(layer.device, layer.dtype)

    # Both products take the same memory for their weight, each in its own layout.
    weight = torch.full((layer.neurons, layer.columns), 0.5, dtype=layer.dtype, device=layer.device)
    bias = weight.new_zeros(layer.columns)
    values = {firing: draw(firing) for firing in (0.05, 0.25, 1.0, float(layer.rows))}
    calls: dict[tuple[str, float], Callable[[], Tensor]] = {}
    for firing, h in values.items():
        calls["dense", len(h)] = functools.partial(linear, h, weight.view(layer.columns, layer.neurons), bias)
        calls["sparse", firing] = functools.partial(KERNEL.op, h, weight, bias, crossover=float(MAX_ROWS))
    times = medians(calls, layer.device)
    return [Point(firing, times["dense", len(h)], times["sparse", firing]) for firing, h in values.items()]
