"""Insert the plan's gates behind activations and modules."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from fxfreeze.dataflow import passage
from fxfreeze.errors import PlanError
from fxfreeze.kernels.gate import KERNEL
from fxfreeze.plan import Gate
from fxfreeze.program import SETTINGS, Origin, Program
from fxfreeze.rewrite import Context, Pass

from .._adapters import GATE, describe, parameter_name
from .._operators import WeightOperator, aten, weight_operator
from ._parameters import Parameter, Source, parameter_dtype
from ._sites import Chain, Value, find_activations, find_results, numbered, resolve

_WIDTHS = 4
"""Temperatures between a gate's threshold and the least value, when training starts: σ(4) = 0.98."""

_FAR = 600.0
"""What the search for a least value takes for far below 0; exp of it is still finite in float64."""

_NORMS = {aten.batch_norm.default, aten.instance_norm.default, aten.group_norm.default}
"""Their channels are dim 1, whatever came before."""

_PARTS = {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.slice.Tensor, aten.narrow.default}
"""Part of the channels is still channels."""


class InsertGates(Pass):
    """Put a soft ``fxfreeze::gate`` behind each addressed activation, or behind what a module returns.

    Every value is a site of its own, with ``gain`` and ``threshold`` per neuron (and mode): a module that makes
    several, or runs several times, has the sites ``<path>.0``, ``<path>.1``, … in the order of the graph. Gates of
    several steps at one value follow each other in plan order, except that a gate on what leaves a module comes after
    those that the module's inside sees too.

    The temperature is one constant per step, ``settings.<step>.temperature``.
    """

    name, stage, exact = "insert-gates", "adapt", False

    def run(self, program: Program, ctx: Context) -> int:
        steps = [(index, step) for index, step in enumerate(ctx.plan.steps) if isinstance(step, Gate)]
        if not steps:
            return 0
        # All globs are resolved on the user's graph.
        offers = {"activation": find_activations(program), "output": find_results(program)}
        dims = neuron_dims(program)
        taken: list[tuple[Gate, dict[str, Value]]] = []
        for index, step in steps:
            paths, refused = resolve(offers[step.on], step, index)
            taken.append((step, numbered({path: offers[step.on].operators[path] for path in paths})))
            for path, reason in refused.items():
                ctx.ledger.add(
                    site=path, step=step.name, requested=describe(step), outcome="refused", detail=f"{path} {reason}"
                )
        chains: dict[Node, Chain] = {}
        for step, values in taken:
            source = Source(step, ctx.plan.steps)
            for site, value in values.items():
                chain = chains.setdefault(value.node, Chain(value.node))
                _insert(program, ctx, value, chain, dims.get(value.node, frozenset()), step, site, source)
            source.finish()
        return sum(len(values) for _, values in taken)


def _insert(
    program: Program, ctx: Context, value: Value, chain: Chain, dims: frozenset[int], step: Gate, site: str,
    source: Source,
) -> None:  # fmt: skip
    node = chain.end(value.users)
    dim = _chosen(dims, node, step, site) if step.dim is None else step.dim
    mode = _mode(program, node, step, site)
    shape = _shape(node, step, site, dim)
    dtype, device = parameter_dtype(node.meta["val"].dtype), node.meta["val"].device
    before, origin = node.next, Origin(step.name, GATE, site)
    open_at, threshold = _open(program, value, step)
    starts = {"gain": 1.0, "threshold": threshold}
    nodes: dict[str, Node] = {}
    for leaf, start in starts.items():
        name = parameter_name(step, site, leaf)
        if name in program.state:
            raise PlanError(f"the model already has a parameter named {name}", where=site, hint="rename the step")
        held = source.value(site, Parameter(leaf, shape, _filled(shape, start)))
        nodes[leaf] = program.add_constant(name, held.to(device, dtype), before=before, like=node)
        nodes[leaf].meta["fxfreeze"] = origin
    temperature = _temperature(program, node, before, step, origin, source)
    gate = program.call(
        KERNEL.op, node, nodes["threshold"], nodes["gain"], temperature, mode, score=step.s, dim=dim,
        before=before, like=node,
    )  # fmt: skip
    gate.meta["fxfreeze"] = origin
    chain.add(gate, value.users, frozenset([gate]))
    trained = f"weights from {step.weights}" if step.weights else f"untrained: {open_at}"
    ctx.ledger.add(
        site=site, step=step.name, requested=describe(step), outcome="rewritten", executes=str(KERNEL.op),
        detail=f"{shape[-1]} neurons along dim {dim}; {trained}",
    )  # fmt: skip


def _open(program: Program, value: Value, step: Gate) -> tuple[str, float]:
    """Where thresholds start, and which values pass then, in words.

    By default that is so far below all values that the soft gate is all but open; where they have no least, below 0.
    """
    least: float | None = 0.0
    if step.s != "abs":
        bodies = (value.body, frozenset([value.node]))  # a block may end with an activation
        least = next((found for body in bodies if (found := _least(program, value.node, body)) is not None), None)
    start = (least or 0.0) - _WIDTHS * step.temperature
    if step.threshold is not None and (least is None or step.threshold > start):
        return f"open above {step.threshold:g}", float(step.threshold)
    words = "all but open" if least is not None else "open above 0 only, as the values have no known least"
    return words, start if step.threshold is None else float(step.threshold)


@torch.no_grad()
def _least(program: Program, value: Node, body: frozenset[Node]) -> float | None:
    """The least `value` that `body` makes of any one tensor, element by element: looked for between ±`_FAR`."""
    operands = {item for node in body for item in node.all_input_nodes} - body
    outside = [node for node in operands if node.op != "get_attr"]
    constants = {node: program.state[str(node.target)] for node in operands if node.op == "get_attr"}
    if len(outside) != 1 or any(held.ndim for held in constants.values()):
        return None

    def run(x: Tensor) -> Tensor | None:
        env: dict[Node, Any] = {outside[0]: x} | {node: held.to(x.device) for node, held in constants.items()}
        for node in value.graph.nodes:
            if node in body:
                given = map_arg((node.args, node.kwargs), lambda old: env[old])
                env[node] = node.target(*given[0], **given[1])
        found = env[value]
        return found if isinstance(found, Tensor) and found.shape == x.shape else None

    size = torch.logspace(-3, math.log10(_FAR), 8000, dtype=torch.float64)
    x = torch.cat([-size.flip(0), size.new_zeros(1), size])
    near = x.abs() <= _FAR / 2
    try:
        far, few = run(x), run(x[near])
    except Exception:  # a shape of the model's is in it, or an operator that wants another dtype
        return None
    if far is None or few is None or not torch.allclose(far[near], few):  # not element by element, or NaN
        return None
    least = float(far.min())
    return least if abs(least - float(few.min())) <= 1e-6 * max(1.0, abs(least)) else None


def _filled(shape: tuple[int, ...], value: float) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.full(shape, value)


def _temperature(
    program: Program, value: Node, before: Node, step: Gate, origin: Origin, source: Source
) -> Node:  # fmt: skip
    """Another node of the step's one temperature."""
    name = f"{SETTINGS}{step.name}.temperature"
    shared = program.graph.find_nodes(op="get_attr", target=name)
    if not shared:
        if name in program.state:
            raise PlanError(f"the model already has a constant named {name}", where=origin.site, hint="rename the step")
        held = torch.tensor(source.setting("temperature", step.temperature), device=value.meta["val"].device)
        node = program.add_constant(name, held, before=next(iter(program.graph.nodes)), like=value)
        node.meta = {"val": node.meta["val"], "fxfreeze": Origin(step.name, GATE, "")}
        return node
    return shared[0]


def _mode(program: Program, value: Node, step: Gate, site: str) -> Node | None:
    if step.modes is None:
        return None
    names = [spec.name for spec in program.inputs]
    mode = program.placeholders[names.index(step.select)]
    sizes = [node.meta["val"].shape[0] for node in (value, mode)]
    if str(sizes[0]) != str(sizes[1]):
        raise PlanError(
            f"{site} makes {list(value.meta['val'].shape)}, whose first dim is not the rows of {step.select!r}",
            where=step.name, hint="modes are chosen per row of the batch: gate a value whose first dim is the batch",
        )  # fmt: skip
    return mode


def _shape(value: Node, step: Gate, site: str, dim: int) -> tuple[int, ...]:
    """Of the parameters.

    Raises:
        PlanError: there is no such dim, its size is not fixed, or it is the rows'.
    """
    sizes, hint = list(value.meta["val"].shape), "name the neurons' with dim="
    if not -len(sizes) <= dim < len(sizes):
        raise PlanError(f"{site} makes {sizes}, which has no dim {dim}", where=step.name, hint=hint)
    if not isinstance(sizes[dim], int):
        raise PlanError(f"{site} makes {sizes}, whose dim {dim} has no fixed size", where=step.name, hint=hint)
    if step.modes is not None and dim in (0, -len(sizes)):
        raise PlanError(f"dim {dim} of {site} is the rows that modes are chosen for", where=step.name, hint=hint)
    return (sizes[dim],) if step.modes is None else (step.modes, sizes[dim])


def _chosen(dims: frozenset[int], value: Node, step: Gate, site: str) -> int:
    """The one of `dims`, or the last dim.

    Raises:
        PlanError: there are several.
    """
    if len(dims) > 1:
        raise PlanError(
            f"{site} makes {list(value.meta['val'].shape)} of values whose neurons lie along dims "
            f"{', '.join(map(str, sorted(dims)))}",
            where=step.name, hint="name the neurons' with dim=",
        )  # fmt: skip
    return next(iter(dims), -1)


def neuron_dims(program: Program) -> dict[Node, frozenset[int]]:
    """Where the neurons of every value may lie, from the end: as the operators with a weight, and the norms, say that
    all its parts come from."""
    found: dict[Node, frozenset[int]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function":
            own = _own_dim(node)
            found[node] = frozenset([own]) if own is not None else _passed(node, found)
    return found


def _own_dim(node: Node) -> int | None:
    value = node.meta.get("val")
    found = weight_operator(node)
    if isinstance(found, WeightOperator):
        return -1 - len(found.kernel)
    if node.target in _NORMS and isinstance(value, Tensor):
        return 1 - value.ndim
    if node.target is aten.layer_norm.default:
        over: list[int] = list(node.args[1])  # type: ignore[arg-type]
        return -1 if len(over) == 1 else None
    return None


def _passed(node: Node, found: dict[Node, frozenset[int]]) -> frozenset[int]:
    """What the operands of `node` say, as far as it leaves dims where they are or moves them in a way that is known."""
    if not node.all_input_nodes:
        return frozenset()
    first = node.all_input_nodes[0]
    through = passage(node)
    if through is not None and first is node.args[0]:
        moved = {through.to_result(dim) for dim in found.get(first, ())}
        return frozenset(dim for dim in moved if dim is not None)
    if node.target in _PARTS or node.target is operator.getitem:
        return found.get(first, frozenset())
    pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    joined = node.target is aten.cat.default
    operands = node.all_input_nodes if pointwise or joined else [first]
    return frozenset(
        dim for operand in operands for dim in found.get(operand, ()) if joined or _stays(operand, node, dim)
    )  # fmt: skip


def _stays(operand: Node, node: Node, dim: int) -> bool:
    """Whether dim `dim` of `operand` has the same size in the result, which has no fewer dims."""
    before, after = operand.meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.ndim > after.ndim:
        return False
    return str(before.shape[dim]) == str(after.shape[dim])
