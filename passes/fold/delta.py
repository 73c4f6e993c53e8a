"""Fold LoRA, DoRA, IA3, VeRA and OFT, and masks behind them, into the weight and bias of the operator they change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.constants import Recipe
from fxfreeze.errors import PassError
from fxfreeze.plan import Prune
from fxfreeze.program import Fold, Origin, Program
from fxfreeze.rewrite import Context, NoMatch, Outcome, Pass, fail

from .._adapters import BASE, DELTA, WeightStep, changed, describe, split_name
from .._operators import WeightOperator, apply, weight_operator

MAX_LOSS = 0.5
"""Rounding to the storage dtype may take half of what an adapter adds (‖realised Δ − Δ‖ / ‖Δ‖), not more."""


@dataclass(frozen=True)
class Region:
    """What the steps at a site put around one call of its operator: one value goes in, one comes out.

    Attributes:
        operator: the call itself, `operator.weight` and `operator.bias` being the user's constants.
        result: the node whose value leaves.
        parameters: the adapters' constants, by step and leaf name.
    """

    operator: WeightOperator
    result: Node
    parameters: dict[str, dict[str, Node]]


class FoldDelta(Pass):
    """Replace each adapted operator, with everything its steps put around it, by the operator with one new weight.

    What belongs together is read from the nodes' origin, not guessed from their shape; what it means is
    :func:`~fxfreeze.passes._adapters.changed`, in float64. The weight is rounded to its storage dtype later, once.

    A weight that something else reads too (a tied embedding, say) keeps its value there: the operator gets its own.
    """

    name, stage = "fold-delta", "fold"

    def run(self, program: Program, ctx: Context) -> int:
        groups: dict[str, dict[int, list[Node]]] = {}
        for node in program.graph.nodes:
            origin = node.meta.get("fxfreeze")
            if node.op == "call_function" and isinstance(origin, Origin) and origin.primitive in (BASE, DELTA):
                groups.setdefault(origin.site, {}).setdefault(origin.call, []).append(node)
        return sum(self._fold(program, ctx, path, list(calls.values())) for path, calls in groups.items())

    def _fold(self, program: Program, ctx: Context, path: str, calls: list[list[Node]]) -> int:
        """Fold every call of the site at `path`, or none; the number of calls folded."""
        found = [find_region(program, nodes) for nodes in calls]
        regions = [region for region in found if isinstance(region, Region)]
        steps = _steps(ctx, calls)
        if misses := [region for region in found if isinstance(region, NoMatch)]:
            ctx.near_misses.extend(misses)
            _report(ctx, path, steps, "refused", detail=f"stays beside its operator: {misses[0].reason}")
            return 0
        inside = {node for nodes in calls for node in nodes}
        weight, bias, detail = self._constants(program, path, regions[0], steps, inside)
        moved: dict[Node, Node] = {}  # results of earlier calls, which later ones may read
        for region in regions:
            operator = region.operator
            source = moved.get(operator.input, operator.input)
            args, kwargs = operator.call_arguments(input=source, weight=weight, bias=bias)
            target: Any = operator.node.target
            folded = program.call(target, *args, before=region.result, like=operator.node, **kwargs)
            folded.meta.pop("fxfreeze", None)
            program.replace(region.result, folded)
            moved[region.result] = folded
        for nodes in reversed(calls):
            for node in reversed(nodes):
                program.graph.erase_node(node)
        _report(ctx, path, steps, "rewritten", f"{target} with the adapter in its weight", detail)
        return len(regions)

    def _constants(
        self, program: Program, path: str, region: Region, steps: list[WeightStep], inside: set[Node]
    ) -> tuple[Node, Node | None, str]:
        """Constants with what `steps` make of the weight and bias at `path`, and what the ledger should say of them."""
        operator = region.operator
        values = {step.name: {leaf: _float64(program, node) for leaf, node in region.parameters[step.name].items()}
                  for step in steps}  # fmt: skip
        base, bias = program.state.recipe(str(operator.weight.target)), operator.bias
        old, old_bias = _float64(program, operator.weight), None if bias is None else _float64(program, bias)
        weight, new_bias = self.effective(operator, steps, values, old, old_bias)
        if bias is not None and new_bias is not None and old_bias is not None and not torch.equal(new_bias, old_bias):
            bias = _replaced(program, bias, new_bias, region, path, inside)
        if torch.equal(weight, old):
            return operator.weight, bias, "the weight stays as it is"
        shared = _other_readers(program, operator.weight, inside)
        recipe = base.then(lambda given: self.effective(operator, steps, values, given, None)[0])
        new = _replaced(program, operator.weight, recipe, region, path, inside)
        # What a mask takes away would hide what rounding takes of the adapters: it counts as part of the base.
        masks: list[WeightStep] = [step for step in steps if isinstance(step, Prune)]
        if masks:
            old = self.effective(operator, masks, values, old, None)[0]
            base = base.then(lambda given: self.effective(operator, masks, values, given, None)[0])
        if _is_more_than_rounding(weight, old):
            adapters = ", ".join(step.name for step in steps if step not in masks)
            program.folds[str(new.target)] = Fold(adapters, path, base, MAX_LOSS)
        detail = f"a copy of {operator.weight.target}, which {', '.join(shared)} reads unchanged" if shared else ""
        return new, bias, detail

    def effective(
        self, operator: WeightOperator, steps: list[WeightStep], values: Mapping[str, Mapping[str, Tensor]],
        weight: Tensor, bias: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Weight, in its stored layout, and bias after all `steps`, from those before them; all in float64."""
        weight = apply(operator.to_canonical(), weight)
        for step in steps:
            weight, bias = self.change(step, operator, weight, bias, values[step.name])
        return apply(operator.from_canonical(), weight).contiguous(), bias

    def change(
        self, step: WeightStep, operator: WeightOperator, weight: Tensor, bias: Tensor | None,
        values: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """One step; its own method so that tests can break it and see the proof object."""
        return changed(step, operator, weight, bias, values)


def find_region(program: Program, nodes: list[Node]) -> Region | NoMatch:
    """The region that `nodes`, all nodes of one call of one site, make up; or why it is none."""
    inside = set(nodes)
    bases = [node for node in nodes if node.meta["fxfreeze"].primitive == BASE]
    if len(bases) != 1:
        return fail(f"{len(bases)} operators claim to be the adapted one", nodes[0])
    leaving = [node for node in nodes if any(user not in inside for user in node.users)]
    if len(leaving) != 1:
        return fail("a value between the adapter's operators is used elsewhere", leaving[0] if leaving else nodes[0])
    outside = list(dict.fromkeys(item for node in nodes for item in node.all_input_nodes if item not in inside))
    parameters: dict[str, dict[str, Node]] = {}
    for item in outside:
        if item.op == "get_attr" and "fxfreeze" in item.meta:
            step, leaf = split_name(str(item.target))
            parameters.setdefault(step, {})[leaf] = item
    operator = weight_operator(bases[0])
    if isinstance(operator, NoMatch):
        return operator
    weight, bias = _source(operator.weight, inside), _source(operator.bias, inside)
    if weight is None or (bias is None) != (operator.bias is None):
        return fail("the adapted weight or bias does not come from one constant", bases[0])
    entering = [item for item in outside if item.op != "get_attr"] or [
        # The input may be a constant too, a position embedding say.
        item for item in outside if "fxfreeze" not in item.meta and item not in (weight, bias)
    ]  # fmt: skip
    if len(entering) != 1:
        return fail("the adapter reads something other than its operator's input", bases[0])
    plain = WeightOperator(bases[0], operator.kind, entering[0], weight, bias, operator.groups, operator.shape)
    return Region(plain, leaving[0], parameters)


def _source(operand: Node | None, inside: set[Node]) -> Node | None:
    """The one constant of the user's that `operand` was made from within the region."""
    found: dict[Node, None] = {}
    stack = [operand] if operand is not None else []
    while stack:
        node = stack.pop()
        if node in inside:
            stack.extend(node.all_input_nodes)
        elif "fxfreeze" not in node.meta or node.op != "get_attr":
            found[node] = None
    return next(iter(found)) if len(found) == 1 and next(iter(found)).op == "get_attr" else None


def _steps(ctx: Context, calls: list[list[Node]]) -> list[WeightStep]:
    """The steps behind some nodes, in plan order, masks last.

    Raises:
        PassError: one of them is not in the plan.
    """
    names = {split_name(str(item.target))[0] for nodes in calls for node in nodes for item in node.all_input_nodes
             if item.op == "get_attr" and "fxfreeze" in item.meta}  # fmt: skip
    steps = [step for step in ctx.plan.steps if isinstance(step, WeightStep) and step.name in names]
    steps.sort(key=lambda step: isinstance(step, Prune))
    if missing := names - {step.name for step in steps}:
        raise PassError(f"the program holds adapters of steps the plan does not have: {', '.join(sorted(missing))}")
    return steps


def _report(
    ctx: Context, path: str, steps: list[WeightStep], outcome: Outcome, executes: str = "", detail: str = ""
) -> None:
    for step in steps:
        ctx.ledger.add(
            site=path, step=step.name, requested=describe(step), outcome=outcome, executes=executes, detail=detail
        )


def _float64(program: Program, node: Node) -> Tensor:
    value = program.constant64(node)
    assert value is not None
    return value


def _is_more_than_rounding(weight: Tensor, base: Tensor) -> bool:
    # A DoRA that was never trained moves the weight by the rounding of its magnitudes: nothing that could get lost.
    return float((weight - base).norm()) > 4 * torch.finfo(torch.float32).eps * float(base.norm())


def _other_readers(program: Program, constant: Node, inside: set[Node]) -> list[str]:
    """Module paths outside the region that read the same constant."""
    same = program.graph.find_nodes(op="get_attr", target=constant.target)
    readers = [user for node in same for user in node.users if user not in inside]
    return list(dict.fromkeys(program.module_path(user) or "the model" for user in readers))


def _replaced(
    program: Program, old: Node, value: Tensor | Recipe, region: Region, path: str, inside: set[Node]
) -> Node:
    """A new constant with `value`, under the name of the old one if nothing else reads that."""
    name, first = str(old.target), region.operator.node
    if _other_readers(program, old, inside):
        name = f"{path}.{name.rpartition('.')[2]}"
    else:
        del program.state[name]  # its node goes with the region
    node = program.add_constant(name, value, dtype=old.meta["val"].dtype, before=first, like=first)
    node.meta.pop("fxfreeze", None)
    return node
