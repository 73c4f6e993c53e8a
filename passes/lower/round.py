"""Round every folded constant from float64 to the dtype it is stored in, once."""

from __future__ import annotations

import torch
from torch.fx import Node

from fxfreeze.constants import lift
from fxfreeze.errors import PassError
from fxfreeze.program import Fold, Program
from fxfreeze.rewrite import Context, Pass


class Round(Pass):
    """The only place where a fold loses precision: what it costs the outputs is measured by the pipeline, and how much
    of each adapter survives, ‖rounded − exact‖ / ‖exact − base‖, is written in the ledger.

    Raises:
        PassError: a constant overflows its dtype, or more of an adapter is lost than its limit allows.
    """

    name, stage, exact = "round", "lower", False

    def run(self, program: Program, ctx: Context) -> int:
        count = 0
        for node in program.graph.nodes:
            if node.op != "get_attr":
                continue
            name, dtype = str(node.target), node.meta["val"].dtype
            value, fold = program.state[name], program.folds.pop(name, None)
            rounded = value.to(dtype)
            if fold is not None:
                _measure(program, ctx, node, fold, value, rounded)
            if value.dtype != dtype:
                if _has_inf(rounded) and bool((rounded.isinf() & ~value.isinf()).any()):
                    raise PassError(
                        f"constant {name!r} overflows {dtype}: its largest value is {float(value.abs().max()):.3g}",
                        where=_reader(program, node), hint="keep this layer in bfloat16 or float32",
                    )  # fmt: skip
                program.state[name] = rounded
                count += 1
        return count


def _measure(
    program: Program, ctx: Context, node: Node, fold: Fold, exact: torch.Tensor, rounded: torch.Tensor
) -> None:
    exact = lift(exact)
    change = float(torch.linalg.vector_norm(exact - lift(fold.base.value())))
    error = float(torch.linalg.vector_norm(lift(rounded) - exact))
    loss = error / change if change else 0.0
    dtype = str(rounded.dtype).removeprefix("torch.")
    said = f"{loss:.2%} of the change is lost in {dtype}" if change else "the change is zero"
    if loss > fold.max_loss:
        ctx.ledger.add(site=fold.site, step=fold.step, requested="fold", outcome="refused", executes="", detail=said)
        raise PassError(
            f"{fold.step} cannot be folded into {dtype}: {loss:.1%} of its change is lost (limit {fold.max_loss:.0%})",
            where=fold.site, hint="keep the base in a wider dtype: model.float() before compiling",
        )  # fmt: skip
    ctx.ledger.add(
        site=fold.site, step=fold.step, requested="fold", outcome="measured",
        executes=f"{dtype} constant {node.target}", detail=said,
    )  # fmt: skip


def _has_inf(value: torch.Tensor) -> bool:
    if value.is_complex():
        return bool(value.isinf().any())
    return value.numel() > 0 and any(bool(extreme.isinf()) for extreme in value.aminmax())


def _reader(program: Program, node: Node) -> str:
    return program.where(next(iter(node.users))) if node.users else str(node.target)
