"""Fold what peft put around the layers of a live model into their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.constants import Recipe, lift
from fxfreeze.program import Fold, Program, lifted_call
from fxfreeze.rewrite import Context, Pass

from .._operators import FORMS, WeightOperator, weight_operator

MAX_LOSS = 0.5
"""Rounding to the storage dtype may take half of what an adapter adds, not more; as for adapters of a plan."""


class FoldWrapped(Pass):
    """Make one constant of every weight and bias that capture wrote out from a layer's adapters (fxfreeze/wrapped.py).

    The constant is computed in float64 from the base weight, and rounded once, later. Layers that capture left as they
    are get a row in the ledger that says why.
    """

    name, stage = "fold-wrapped", "clean"

    def run(self, program: Program, ctx: Context) -> int:
        for path, reason in program.left.items():
            ctx.ledger.add(site=path, step="", requested="adapter of peft", outcome="refused",
                           executes="as peft runs it", detail=reason)  # fmt: skip
        count = 0
        for node in list(program.graph.nodes):
            if node.target in FORMS and _kind(program, node):
                operator = weight_operator(node)
                if isinstance(operator, WeightOperator):
                    count += _fold(program, ctx, operator)
        return count


def _kind(program: Program, node: Node) -> str:
    """The peft class whose forward made `node`, or ""."""
    kind = next(reversed(program.module_classes(node).values()), "")
    return kind if kind.startswith("peft.tuners.") else ""


def _fold(program: Program, ctx: Context, operator: WeightOperator) -> bool:
    path, done = program.module_path(operator.node), False
    for leaf, operand in (("weight", operator.weight), ("bias", operator.bias)):
        cone = _cone(operand) if operand is not None else None
        if operand is None or not cone:
            continue
        base = _base(program, cone, path, leaf, operand)
        recipe, held = _recipe(program, cone, base), program.state.recipe(base) if base else None
        if base and all(node.users.keys() <= set(cone) for node in _named(program, base)):
            del program.state[base]  # its node goes with what read it
        like = operator.node
        new = program.add_constant(
            f"{path}.{leaf}", recipe, dtype=operand.meta["val"].dtype, before=operator.node, like=like
        )
        operator.node.replace_input_with(operand, new)
        for node in [*reversed(cone), *(_named(program, base) if base else ())]:
            if not node.users:
                program.graph.erase_node(node)
        if leaf == "weight" and held is not None:
            program.folds[str(new.target)] = Fold("", path, held, MAX_LOSS)
        done = True
    if done:
        kind = ".".join(_kind(program, operator.node).split(".")[2::2])
        ctx.ledger.add(
            site=path, step="", requested=f"adapter of peft ({kind})", outcome="rewritten",
            executes=f"{operator.node.target} with the adapter in its weight",
        )  # fmt: skip
    return done


def _cone(result: Node) -> list[Node]:
    """The operators that compute `result` from constants alone, in graph order; none if it is one, or an input."""
    found: dict[Node, None] = {}
    stack = [result]
    while stack:
        node = stack.pop()
        if node.op == "get_attr" or node in found:
            continue
        if node.op != "call_function":
            return []
        found[node] = None
        stack.extend(node.all_input_nodes)
    return sorted(found)


def _named(program: Program, name: str) -> list[Node]:
    return list(program.graph.find_nodes(op="get_attr", target=name))


def _base(program: Program, cone: list[Node], path: str, leaf: str, result: Node) -> str | None:
    """The constant of the base layer, which has another module's name where the two are tied."""
    leaves = {str(item.target): item for node in cone for item in node.all_input_nodes if item.op == "get_attr"}
    if f"{path}.{leaf}" in leaves:
        return f"{path}.{leaf}"
    tied = [name for name, item in leaves.items() if not name.startswith(f"{path}.")
            and item.meta["val"].shape == result.meta["val"].shape]  # fmt: skip
    return tied[0] if len(tied) == 1 else None


def _recipe(program: Program, cone: list[Node], base: str | None) -> Tensor | Recipe:
    """How to compute the last of `cone` out of the constant `base`; a plain value where that is not among them."""
    names = {str(leaf.target) for node in cone for leaf in node.all_input_nodes if leaf.op == "get_attr"}
    small = {name: lift(program.state[name]) for name in names - {base}}
    calls = [(node.name, _call(node)) for node in cone]

    def edit(given: Tensor) -> Tensor:
        values: dict[str, Any] = {
            **{f"get_attr:{name}": value for name, value in small.items()},
            f"get_attr:{base}": given,
        }
        for name, call in calls:
            values[name] = call(values)
        result: Tensor = values[calls[-1][0]]
        return result.contiguous()

    return edit(torch.empty(0)) if base is None else program.state.recipe(base).then(edit)


def _call(node: Node) -> Any:
    """The operator as a function of values by name, which keeps its meaning when the graph is gone."""
    target, args, kwargs = node.target, node.args, dict(node.kwargs)
    copy = _Frozen(target)

    def name(item: Node) -> str:
        return f"get_attr:{item.target}" if item.op == "get_attr" else item.name

    places = {item: name(item) for item in node.all_input_nodes}

    def run(values: dict[str, Any]) -> Any:
        given, named = torch.fx.map_arg((args, kwargs), lambda item: values[places[item]])
        return lifted_call(copy, given, named)  # type: ignore[arg-type]

    return run


class _Frozen:
    """As much of a node as performing it takes."""

    def __init__(self, target: Any) -> None:
        self.target = target
