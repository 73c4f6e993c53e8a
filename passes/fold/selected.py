"""Store the adapters that rows select from as the operator reads them: one row each, after a row of zeros."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.functional import pad

from fxfreeze.constants import Recipe
from fxfreeze.kernels import select_conv, select_lora
from fxfreeze.plan import LoRA
from fxfreeze.program import BANK, BANK_NOTE, Origin, Program
from fxfreeze.rewrite import Context, Pass

from .._adapters import SELECTED, describe, parameter_name
from .._operators import arguments

aten = torch.ops.aten

OPS = (select_lora.KERNEL.op, select_conv.KERNEL.op)


class FoldSelected(Pass):
    """A becomes [1 + adapters, r, in], and B, transposed and times its scale, [1 + adapters, r, out].

    Of a convolution, A keeps the dims of the window; the window of B is 1, and goes. They are stored in the dtype of
    their layer, and rounded to it once. The operator reads its input as it is: what the adapters were trained in no
    longer counts.
    """

    name, stage = "fold-selected", "fold"

    def run(self, program: Program, ctx: Context) -> int:
        steps = {step.name: step for step in ctx.plan.steps if isinstance(step, LoRA)}
        banks: dict[tuple[str, str], tuple[Node, Node]] = {}
        count = 0
        for node in [node for op in OPS for node in program.graph.find_nodes(op="call_function", target=op)]:
            origin = node.meta.get("fxfreeze")
            if not isinstance(origin, Origin) or origin.primitive != SELECTED:
                continue
            step, given = steps[origin.step], arguments(node)
            source = given["x"]
            if source.target is aten.to.dtype and source.meta.get("fxfreeze") == origin:
                source = source.args[0]
            # Token ids have no dtype that counts; what they are looked up in has.
            dtype = source.meta["val"].dtype if source.meta["val"].is_floating_point() else _beside(node)
            key = origin.step, origin.site
            if key not in banks:
                banks[key] = self._stored(program, step, origin.site, dtype, node)
                ctx.ledger.add(
                    site=origin.site, step=step.name, requested=describe(step), outcome="rewritten",
                    executes=str(node.target), detail=_words(banks[key][0], dtype),
                )  # fmt: skip
            how = dict(node.kwargs)
            new = program.call(node.target, source, *banks[key], given["ids"], before=node, like=node, **how)
            program.replace(node, new)
            count += 1
        program.sweep()
        _release(program)
        return count

    def _stored(self, program: Program, step: LoRA, site: str, dtype: torch.dtype, before: Node) -> tuple[Node, Node]:
        nodes = []
        for leaf in ("lora_A", "lora_B"):
            name = parameter_name(step, site, leaf)
            note = program.graph.find_nodes(op="get_attr", target=name)[0].meta.get(BANK_NOTE)
            recipe = self.bank(program.state.tensor(name), leaf, step.scale)
            if recipe.dtype != dtype:
                recipe = recipe.then(lambda value: value)  # computed in float64, rounded with all others
            del program.state[name]
            node = program.add_constant(name, recipe, dtype=dtype, before=before, like=before)
            node.meta["fxfreeze"] = Origin(step.name, BANK, site)
            if note:
                node.meta[BANK_NOTE] = note
            nodes.append(node)
        return nodes[0], nodes[1]

    def bank(self, trained: Tensor, leaf: str, scale: float) -> Recipe:
        """[adapters, …] → [1 + adapters, r, …]; its own method so that tests can break it and see the proof object."""
        rows = trained if leaf == "lora_A" else trained.flatten(2).transpose(1, 2)
        base = Recipe(pad(rows.detach(), [0, 0] * (rows.dim() - 1) + [1, 0]).contiguous())
        return base if leaf == "lora_A" or scale == 1 else base.then(lambda value: value * scale)


def _release(program: Program) -> None:
    """What adds the rows' part to the layer is the model's from now on; the part itself stays the step's."""
    for node in program.graph.nodes:
        origin = node.meta.get("fxfreeze")
        if isinstance(origin, Origin) and origin.primitive == SELECTED and node.target not in OPS:
            del node.meta["fxfreeze"]


def _beside(node: Node) -> torch.dtype:
    """Dtype of the layer that `node` is added to."""
    total = next(user for user in node.users if user.target is aten.add.Tensor)
    layer: Node = total.args[0]  # type: ignore[assignment]
    dtype: torch.dtype = layer.meta["val"].dtype
    return dtype


def _words(bank: Node, dtype: torch.dtype) -> str:
    rows, rank, *_ = bank.meta["val"].shape
    return f"{rows - 1} adapters of rank {rank} in {str(dtype).removeprefix('torch.')}, chosen row by row"
