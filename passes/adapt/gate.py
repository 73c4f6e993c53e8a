"""Insert the plan's gates behind activations and modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.dataflow import passage
from fxfreeze.errors import PlanError
from fxfreeze.kernels.gate import KERNEL
from fxfreeze.plan import Gate
from fxfreeze.program import SETTINGS, Origin, Program
from fxfreeze.rewrite import Context, Pass

from .._adapters import GATE, describe, parameter_name
from .._operators import ACTIVATIONS, LEAST, WeightOperator, weight_operator
from ._parameters import Parameter, Source, parameter_dtype
from ._sites import find_activations, find_results, resolve

_WIDTHS = 4
"""Temperatures between a gate's threshold and the least value, when training starts: σ(4) = 0.98."""


_WRITTEN_OUT = -0.375
"""No GELU, SiLU, Mish or hard Swish has a smaller value."""


class InsertGates(Pass):
    """Put a soft ``fxfreeze::gate`` behind each addressed activation, or behind what a module returns.

    Every value is a site of its own, with ``gain`` and ``threshold`` per neuron (and mode): a module that makes
    several, or runs several times, has the sites ``<path>.0``, ``<path>.1``, … in the order of the graph. Gates of
    several steps at one value follow each other in plan order.

    The temperature is one constant per step, ``settings.<step>.temperature``.
    """

    name, stage, exact = "insert-gates", "adapt", False

    def run(self, program: Program, ctx: Context) -> int:
        steps = [(index, step) for index, step in enumerate(ctx.plan.steps) if isinstance(step, Gate)]
        if not steps:
            return 0
        # All globs are resolved on the user's graph.
        offers = {"activation": find_activations(program), "output": find_results(program)}
        taken: list[tuple[Gate, dict[str, Node]]] = []
        for index, step in steps:
            paths, refused = resolve(offers[step.on], step, index)
            taken.append((step, _numbered({path: offers[step.on].operators[path] for path in paths})))
            for path, reason in refused.items():
                ctx.ledger.add(
                    site=path, step=step.name, requested=describe(step), outcome="refused", detail=f"{path} {reason}"
                )
        names = [step.name for step in ctx.plan.steps]
        gated: dict[Node, Node] = {}
        for step, values in taken:
            source = Source(step, [name for name in names if name != step.name])
            for site, value in values.items():
                current = gated.get(value, value)
                gated[value] = _insert(program, ctx, current, step, site, source)
            source.finish()
        return sum(len(values) for _, values in taken)


def _numbered(found: dict[str, list[Node]]) -> dict[str, Node]:
    return {
        path if len(values) == 1 else f"{path}.{number}": value
        for path, values in found.items()
        for number, value in enumerate(values)
    }


def _insert(program: Program, ctx: Context, value: Node, step: Gate, site: str, source: Source) -> Node:
    dim = neuron_dim(value) if step.dim is None else step.dim
    mode = _mode(program, value, step, site)
    shape = _shape(value, step, site, dim)
    dtype, device = parameter_dtype(value.meta["val"].dtype), value.meta["val"].device
    before, origin = value.next, Origin(step.name, GATE, site)
    starts = {"gain": 1.0, "threshold": _open(value, step) if step.threshold is None else float(step.threshold)}
    nodes: dict[str, Node] = {}
    for leaf, start in starts.items():
        name = parameter_name(step, site, leaf)
        if name in program.state:
            raise PlanError(f"the model already has a parameter named {name}", where=site, hint="rename the step")
        held = source.value(site, Parameter(leaf, shape, _filled(shape, start)))
        nodes[leaf] = program.add_constant(name, held.to(device, dtype), before=before, like=value)
        nodes[leaf].meta["fxfreeze"] = origin
    temperature = _temperature(program, value, before, step, origin)
    gate = program.call(
        KERNEL.op, value, nodes["threshold"], nodes["gain"], temperature, mode, score=step.s, dim=dim,
        before=before, like=value,
    )  # fmt: skip
    gate.meta["fxfreeze"] = origin
    value.replace_all_uses_with(gate, delete_user_cb=lambda user: user is not gate)
    trained = f"weights from {step.weights}" if step.weights else "untrained: all but open"
    ctx.ledger.add(
        site=site, step=step.name, requested=describe(step), outcome="rewritten", executes=str(KERNEL.op),
        detail=f"{shape[-1]} neurons along dim {dim}; {trained}",
    )  # fmt: skip
    return gate


def _open(value: Node, step: Gate) -> float:
    """A threshold so far below all values that the soft gate is all but open; where they have no least, below 0."""
    elementwise = value.target not in ACTIVATIONS and step.on == "activation"  # an activation written out
    least = _WRITTEN_OUT if elementwise else LEAST.get(value.target, 0.0)
    return (least if step.s == "h" else 0.0) - _WIDTHS * step.temperature


def _filled(shape: tuple[int, ...], value: float) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.full(shape, value)


def _temperature(program: Program, value: Node, before: Node, step: Gate, origin: Origin) -> Node:
    """Another node of the step's one temperature."""
    name = f"{SETTINGS}{step.name}.temperature"
    shared = program.graph.find_nodes(op="get_attr", target=name)
    if not shared:
        if name in program.state:
            raise PlanError(f"the model already has a constant named {name}", where=origin.site, hint="rename the step")
        held = torch.tensor(float(step.temperature), device=value.meta["val"].device)
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


def neuron_dim(value: Node) -> int:
    """Where the neurons of `value` lie: the channels of the operator with a weight it comes from, else the last dim."""
    way: list[Node] = []
    cursor = value
    while cursor.op == "call_function":
        operator = weight_operator(cursor)
        if isinstance(operator, WeightOperator):
            dim: int | None = -1 - len(operator.kernel)
            for node in reversed(way):
                found = passage(node)
                dim = dim if found is None or dim is None else found.to_result(dim)
            return -1 if dim is None else dim
        if not cursor.args or not _keeps_rank(cursor):
            break
        way.append(cursor)
        cursor = cursor.args[0]  # type: ignore[assignment]
    return -1


def _keeps_rank(node: Node) -> bool:
    """Whether `node` is a function of a tensor of its own shape, or moves channels in a way that can be followed."""
    source: Any = node.args[0]
    operand = source.meta.get("val") if isinstance(source, Node) else None
    if not isinstance(operand, torch.Tensor) or not isinstance(result := node.meta.get("val"), torch.Tensor):
        return False
    return passage(node) is not None or list(map(str, operand.shape)) == list(map(str, result.shape))
