"""Stack linear layers, and convolutions, that read the same value into one, where that is the faster way."""

from __future__ import annotations

import functools
import math
import operator as python
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.constants import Recipe
from fxfreeze.kernels._op import at_most
from fxfreeze.program import Program
from fxfreeze.rewrite import Context, Outcome, Pass

from .._operators import WeightOperator, arguments, constant_problem, weight_operator
from ._timing import medians

aten = torch.ops.aten

ROWS = 512
WORK = 1 << 28
"""More rows than that, or rows of more multiplications, take more time in the same proportion."""
FASTER = 0.95
"""Of the time that the layers take one by one, for any number of rows; a clock is no better than that."""
MAX_BYTES = 256 << 20
"""Of all weights of a stack together: while it is timed, it is in memory as well."""


@dataclass(frozen=True)
class Layer:
    """What the time of a stack hangs on.

    Attributes:
        target: the operator, linear or a convolution.
        shapes: of the weights, canonical, one per layer.
        biased: whether any has a bias.
        how: a convolution's stride, padding and dilation.
        sizes: of the input, for each number of rows that is timed.
    """

    target: Any
    shapes: tuple[tuple[int, ...], ...]
    biased: bool
    how: tuple[Any, ...]
    sizes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: torch.device


Measure = Callable[[Layer], list[tuple[float, float]]]
"""Seconds of the stack and of its layers one by one, for each of ``layer.sizes``."""


class MergeParallel(Pass):
    """[W₁x + b₁, …, W_n x + b_n] = split(W·x + b) with W, b the weights and biases one below the other.

    So do queries, keys and values of attention, the projections of a gated MLP, and a layer with its dendrites; and
    convolutions of the same stride, padding, dilation and window. Their weights must be constants that nothing else
    reads, of one dtype, and no convolution may have groups. Adapters that were folded into them are measured in the
    stack.

    The stack computes the same function, so this is about time only: at the layers' own sizes, for one row and for the
    most that there may be, up to :data:`ROWS`, it is timed against the layers one by one, and made where it is faster
    in one case, and slower in none. That is torch's time: for ONNX Runtime, which copies the parts of a result, stacks
    of linear layers come apart again (:mod:`fxfreeze.emit.onnx_parts`).
    """

    name, stage = "merge-parallel", "fuse"

    def __init__(self, measure: Measure | None = None) -> None:
        self.measure = measure or measured

    def run(self, program: Program, ctx: Context) -> int:
        count = 0
        for group in parallel(program):
            layer = _layer(group)
            times = self.measure(layer)
            said = "; ".join(
                f"{'×'.join(map(str, size))}: {one * 1e3:.3g} ms against {apart * 1e3:.3g}"
                for size, (one, apart) in zip(layer.sizes, times, strict=True)
            )
            faster = any(one < FASTER * apart for one, apart in times) and all(one <= apart for one, apart in times)
            _report(program, ctx, group, "rewritten" if faster else "skipped", said)
            if faster:
                merge(program, group)
                count += 1
        return count


def _report(program: Program, ctx: Context, group: list[WeightOperator], outcome: Outcome, said: str) -> None:
    paths = [program.module_path(item.node) or item.node.name for item in group]
    owners = [str(item.weight.target).rpartition(".")[0] or path for item, path in zip(group, paths, strict=True)]
    first = str(group[0].node.target)
    ctx.ledger.add(
        site=owners[0], step="", requested=f"one layer for {', '.join(owners)}", outcome=outcome,
        executes=first if outcome == "rewritten" else f"{len(group)} times {first}", detail=said,
    )  # fmt: skip


def parallel(program: Program) -> list[list[WeightOperator]]:
    """Layers that can be stacked, in graph order: two or more in each group."""
    groups: dict[Any, list[WeightOperator]] = {}
    for node in program.graph.nodes:
        operator = weight_operator(node) if node.op == "call_function" and node.users else None
        if isinstance(operator, WeightOperator) and (key := _key(program, operator)) is not None:
            groups.setdefault(key, []).append(operator)
    return [group for group in groups.values() if len(group) > 1 and _bytes(group) <= MAX_BYTES]


def _key(program: Program, operator: WeightOperator) -> Any:
    """What layers of one stack have in common; None for a layer that cannot be in one."""
    node, weight, bias = operator.node, operator.weight, operator.bias
    if operator.kind not in ("linear", "conv") or operator.groups != 1 or constant_problem(program, operator):
        return None
    given, dtypes = arguments(node), {item.meta["val"].dtype for item in (node, weight, bias) if item is not None}
    one_each = bias is None or bias.meta["val"].shape == (operator.out_features,)
    owned = all(item is None or program.readers(item) == {node} for item in (weight, bias))
    if not one_each or not owned or len(dtypes) > 1 or operator.input.meta["val"].ndim < 1:
        return None
    if operator.kind == "conv" and operator.input.meta["val"].ndim != len(operator.kernel) + 2:
        return None  # no batch dim
    return operator.input, node.target, operator.kernel, str(_how(given)), dtypes.pop()


def _how(given: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(
        (name, tuple(value) if isinstance(value, list | tuple) else value)
        for name in ("stride", "padding", "dilation") if (value := given.get(name)) is not None
    )  # fmt: skip


def _bytes(group: list[WeightOperator]) -> int:
    return sum(math.prod(item.shape) * item.weight.meta["val"].element_size() for item in group)


# ---- the rewrite


def merge(program: Program, group: list[WeightOperator]) -> None:
    """One layer in front of the first of `group`, and its parts in the places of all of them."""
    first = group[0]
    weight = _stacked(program, group, [item.weight for item in group], "weight")
    biased = any(item.bias is not None for item in group)
    bias = _stacked(program, group, [item.bias for item in group], "bias") if biased else None
    args, kwargs = first.call_arguments(weight=weight, bias=bias)
    stack = program.call(first.node.target, *args, before=first.node, like=first.node, **kwargs)  # type: ignore[arg-type]
    dim = -1 - len(first.kernel)
    sizes = [item.out_features for item in group]
    parts = program.call(aten.split_with_sizes.default, stack, sizes, dim, before=first.node, like=first.node)
    for at, item in enumerate(group):
        part = program.call(python.getitem, parts, at, before=first.node, like=item.node)
        program.replace(item.node, part)


def _stacked(program: Program, group: list[WeightOperator], nodes: list[Node | None], name: str) -> Node:
    """The constants `nodes`, one below the other, with what was folded into any; zeros for None."""
    first, like = group[0], next(node for node in nodes if node is not None)
    zeros = program.state.tensor(str(like.target)).new_zeros
    held = [None if node is None else str(node.target) for node in nodes]
    parts = [Recipe(zeros(item.out_features)) if target is None else program.state.recipe(target)
             for item, target in zip(group, held, strict=True)]  # fmt: skip
    path = str(like.target).rpartition(".")[0]
    new = program.add_constant(
        f"{path}.stacked_{name}".lstrip("."), _rows(parts), dtype=like.meta["val"].dtype, before=first.node, like=like
    )
    folds = [None if target is None else program.folds.get(target) for target in held]
    known = [fold for fold in folds if fold is not None]
    if known:
        # What adapters put into the layers is measured in the stack, by the strictest of their limits.
        bases = [part if fold is None else fold.base for fold, part in zip(folds, parts, strict=True)]
        program.folds[str(new.target)] = replace(min(known, key=lambda fold: fold.max_loss), base=_rows(bases))
    return new


def _rows(parts: list[Recipe]) -> Recipe:
    """`parts` one below the other, each with its own edits, which are applied when the whole is read."""
    stacked = Recipe(torch.cat([part.base.detach() for part in parts]))
    if not any(part.edits for part in parts):
        return stacked
    sizes = [len(part.base) for part in parts]

    def edit(value: Tensor) -> Tensor:
        pieces = zip(value.split(sizes), parts, strict=True)
        return torch.cat([replace(part, base=piece).value() for piece, part in pieces])

    return stacked.then(edit)


# ---- the time


def _layer(group: list[WeightOperator]) -> Layer:
    first = group[0]
    x = first.input.meta["val"]
    how = _how(arguments(first.node))
    biased = any(item.bias is not None for item in group)
    # A convolution's rows are those of its batch; of a linear layer's input, all but the last dim.
    rest: tuple[int, ...]
    if first.kind == "linear":
        count, rest = math.prod(x.shape[:-1]), (first.in_features,)
    else:
        count, rest = x.shape[0], tuple(_hint(size) for size in x.shape[1:])
    shapes = tuple(item.shape for item in group)
    work = sum(map(math.prod, shapes)) * math.prod(rest[1:])
    powers = [2**power for power in range(ROWS.bit_length()) if 2**power * work <= WORK] or [1]
    most = next((size for size in powers if at_most(count, size)), powers[-1])
    fewest = most if isinstance(count, int) else 1  # a symbol's range says 2, though 1 is what it often is
    sizes = tuple((rows, *rest) for rows in sorted({fewest, most}))
    return Layer(first.node.target, shapes, biased, how, sizes, first.weight.meta["val"].dtype, x.device)


def _hint(size: int | torch.SymInt) -> int:
    """A size as it is, or as it was when the model was traced."""
    return size if isinstance(size, int) else int(cast(int, size.node.hint))


def measured(layer: Layer) -> list[tuple[float, float]]:
    """On this machine, with as many threads as torch has now; identical layers once per process."""
    return list(_measured(layer, torch.get_num_threads()))


@functools.cache
@torch.no_grad()
def _measured(layer: Layer, threads: int) -> tuple[tuple[float, float], ...]:
    how, found = dict(layer.how), []
    weights = [torch.full(shape, 0.5, dtype=layer.dtype, device=layer.device) for shape in layer.shapes]
    biases = [weight.new_zeros(len(weight)) if layer.biased else None for weight in weights]
    stacked = torch.cat(weights), torch.cat(biases) if layer.biased else None  # type: ignore[arg-type]
    pairs = list(zip(weights, biases, strict=True))
    for size in layer.sizes:
        x = torch.full(size, 0.5, dtype=layer.dtype, device=layer.device)

        def apart(x: Tensor = x) -> Tensor:
            return [layer.target(x, weight, bias, **how) for weight, bias in pairs][-1]

        calls: dict[str, Callable[[], Tensor]] = {"one": partial(layer.target, x, *stacked, **how), "apart": apart}
        times = medians(calls, layer.device)
        found.append((times["one"], times["apart"]))
    return tuple(found)
