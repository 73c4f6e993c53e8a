"""Store the adapters that rows select from as the kernel reads them: one row each, after a row of zeros."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.functional import pad

from fxfreeze.constants import Recipe
from fxfreeze.kernels.select_lora import KERNEL
from fxfreeze.plan import LoRA
from fxfreeze.program import BANK, Origin, Program
from fxfreeze.rewrite import Context, Pass

from .._adapters import SELECTED, describe, parameter_name
from .._operators import arguments

aten = torch.ops.aten


class FoldSelected(Pass):
    """A becomes [1 + adapters, r, in], and B, transposed and times its scale, [1 + adapters, r, out].

    They are stored in the dtype of their layer, and rounded to it once. The operator reads its input as it is: what
    the adapters were trained in no longer counts.
    """

    name, stage = "fold-selected", "fold"

    def run(self, program: Program, ctx: Context) -> int:
        steps = {step.name: step for step in ctx.plan.steps if isinstance(step, LoRA)}
        banks: dict[tuple[str, str], tuple[Node, Node]] = {}
        count = 0
        for node in program.graph.find_nodes(op="call_function", target=KERNEL.op):
            origin = node.meta.get("fxfreeze")
            if not isinstance(origin, Origin) or origin.primitive != SELECTED:
                continue
            step, given = steps[origin.step], arguments(node)
            source, dtype = given["x"], node.meta["val"].dtype
            if source.target is aten.to.dtype and source.meta.get("fxfreeze") == origin:
                source = source.args[0]
                dtype = source.meta["val"].dtype
            key = origin.step, origin.site
            if key not in banks:
                banks[key] = self._stored(program, step, origin.site, dtype, node)
                ctx.ledger.add(
                    site=origin.site, step=step.name, requested=describe(step), outcome="rewritten",
                    executes=str(KERNEL.op), detail=_words(banks[key][0], dtype),
                )  # fmt: skip
            new = program.call(KERNEL.op, source, *banks[key], given["ids"], before=node, like=node)
            program.replace(node, new)
            count += 1
        program.sweep()
        _release(program)
        return count

    def _stored(self, program: Program, step: LoRA, site: str, dtype: torch.dtype, before: Node) -> tuple[Node, Node]:
        nodes = []
        for leaf in ("lora_A", "lora_B"):
            name = parameter_name(step, site, leaf)
            recipe = self.bank(program.state.tensor(name), leaf, step.scale)
            if recipe.dtype != dtype:
                recipe = recipe.then(lambda value: value)  # computed in float64, rounded with all others
            del program.state[name]
            node = program.add_constant(name, recipe, dtype=dtype, before=before, like=before)
            node.meta["fxfreeze"] = Origin(step.name, BANK, site)
            nodes.append(node)
        return nodes[0], nodes[1]

    def bank(self, trained: Tensor, leaf: str, scale: float) -> Recipe:
        """[adapters, …] → [1 + adapters, r, …]; its own method so that tests can break it and see the proof object."""
        rows = trained if leaf == "lora_A" else trained.transpose(1, 2)
        base = Recipe(pad(rows.detach(), (0, 0, 0, 0, 1, 0)).contiguous())
        return base if leaf == "lora_A" or scale == 1 else base.then(lambda value: value * scale)


def _release(program: Program) -> None:
    """What adds the rows' part to the layer is the model's from now on; the part itself stays the step's."""
    for node in program.graph.nodes:
        origin = node.meta.get("fxfreeze")
        if isinstance(origin, Origin) and origin.primitive == SELECTED and node.target is not KERNEL.op:
            del node.meta["fxfreeze"]


def _words(bank: Node, dtype: torch.dtype) -> str:
    rows, rank, _ = bank.meta["val"].shape
    return f"{rows - 1} adapters of rank {rank} in {str(dtype).removeprefix('torch.')}, chosen row by row"
