"""Make constants of masked parameters, and measure what the masks change."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.constants import Recipe
from fxfreeze.plan import Prune
from fxfreeze.program import FROZEN, Origin, Program
from fxfreeze.rewrite import Context, Pass

from .._adapters import MASK, MASKED, describe, masked
from .._heads import measured_heads
from .._measured import constant_value, measure_outputs, pruned_words

aten = torch.ops.aten


class FoldMasks(Pass):
    """mask ⊙ W becomes a constant under the name of W; one that something else reads too keeps its value there.

    Exact, as the mask is part of the function by now. What it changes is measured: the ledger has, per site, how much
    of the weight it leaves, and per output the relative gap between with and without it, the same as a signal-to-noise
    ratio, and where it looks like scores of classes the share of predictions that stay, on the calibration data.
    Where a step has trained the weights themselves, there is nothing left to compare with, and what it took away
    before is in the rows of the insertion.

    Masks on what adapters made of a weight are folded with them.
    """

    name, stage = "fold-masks", "freeze"

    def run(self, program: Program, ctx: Context) -> int:
        steps = {step.name: step for step in ctx.plan.steps if isinstance(step, Prune)}
        groups: dict[str, list[Node]] = {}
        for node in program.graph.find_nodes(op="call_function", target=aten.where.ScalarOther):
            if isinstance(origin := node.meta.get("fxfreeze"), Origin) and origin.step in steps:
                groups.setdefault(str(node.args[0]), []).append(node)
        asked = {key: steps[nodes[0].meta["fxfreeze"].step] for key, nodes in groups.items()}
        _measure(program, ctx, [(asked[key], nodes) for key, nodes in groups.items() if not asked[key].train])
        return sum(self._fold(program, ctx, asked[key], nodes) for key, nodes in groups.items())

    def _fold(self, program: Program, ctx: Context, step: Prune, nodes: list[Node]) -> int:
        """One mask, on what every call reads."""
        (mask, value), origin = nodes[0].args[:2], nodes[0].meta["fxfreeze"]
        assert isinstance(mask, Node) and isinstance(value, Node)
        if origin.primitive != MASK:
            return 0
        cast = value if value.target is aten.to.dtype and value.meta.get("fxfreeze") == origin else None
        constant = value if cast is None else cast.all_input_nodes[0]
        if constant.op != "get_attr":  # what a spliced module makes of the parameter is folded later, with the mask
            for node in nodes:
                del node.meta["fxfreeze"]
            return 0
        site, old = origin.site, str(constant.target)
        leaf = str(mask.target).rpartition(".")[2].removesuffix(MASKED)
        name, shared = f"{site}.{leaf}" if site else leaf, program.readers(constant) - {*nodes, cast}
        recipe = self.zeroed(program.state.recipe(old), value.meta["val"].dtype, program.state[str(mask.target)])
        if not shared:
            name = name if "fxfreeze" in constant.meta else old
            del program.state[old]  # its node goes with the masks
        new = program.add_constant(name, recipe, dtype=value.meta["val"].dtype, before=nodes[0], like=nodes[0])
        del new.meta["fxfreeze"]
        for node in nodes:
            program.replace(node, new)
            program.graph.erase_node(node)
        others = list(dict.fromkeys(program.module_path(user) or "the model" for user in shared))
        ctx.ledger.add(
            site=site, step=step.name, requested=describe(step), outcome="rewritten", executes=f"zeros in {name}",
            detail=f"a copy of {old}, which {', '.join(others)} reads unchanged" if others else "",
        )  # fmt: skip
        return len(nodes)

    def zeroed(self, given: Recipe, dtype: torch.dtype, mask: Tensor) -> Tensor | Recipe:
        """`given` where `mask` is True; its own method so that tests can break it and see the proof object."""
        if given.dtype == dtype:
            return masked(given.value(), mask)
        return given.then(lambda value: masked(value, mask))


def _measure(program: Program, ctx: Context, groups: list[tuple[Prune, list[Node]]]) -> None:
    if not groups:
        return
    for step, nodes in groups:
        mask, value = nodes[0].args[:2]
        assert isinstance(mask, Node) and isinstance(value, Node)
        stays, weight = program.state[str(mask.target)], constant_value(program, value)
        name = str(mask.target).removeprefix(f"{FROZEN}{step.name}.").removesuffix(MASKED)
        ctx.ledger.add(
            site=nodes[0].meta["fxfreeze"].site, step=step.name, requested=f"mask of {name}", outcome="measured",
            detail=pruned_words(weight, stays),
        )  # fmt: skip
    whole, names = program.clone(), {node.name for _, nodes in groups for node in nodes}
    for node in [node for node in whole.graph.nodes if node.name in names]:
        whole.replace(node, node.args[1])  # type: ignore[arg-type]
    now, then = measured_heads(program, whole)
    measure_outputs(ctx, now, then, "masks")
