"""Weights of which many numbers are zeros: which they are, at what sizes to time them, what the ledger says of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor
from torch.fx import Node

from fxfreeze.constants import Recipe
from fxfreeze.kernels._op import at_most
from fxfreeze.program import Program
from fxfreeze.rewrite import Context, Outcome

from .._operators import WeightOperator, apply, weight_operator

REQUESTED = "leave out the zeros of a weight"
SHARE = 0.3
"""Of a weight's numbers; where fewer are zeros nothing is said, so that ordinary models get no rows."""
LEAST = 4096
"""Bytes of a weight; fewer are not worth a row."""

ROWS = 512
WORK = 1 << 28
"""More rows than that, or rows of more multiplications, take more time in the same proportion."""
FASTER = 0.95
"""Of the time of the dense product, for any number of rows; a clock is no better than that."""


@dataclass(frozen=True)
class Sparse:
    """An operator whose weight has many zeros.

    Attributes:
        operator: the call.
        weight: its weight, canonical; in float64 where something was folded into it.
        zeros: share of its numbers that are 0 (or −0).
    """

    operator: WeightOperator
    weight: Tensor
    zeros: float

    @property
    def node(self) -> Node:
        return self.operator.node

    @property
    def nbytes(self) -> int:
        """Of the weight, as it is stored in the end."""
        return self.weight.numel() * self.operator.weight.meta["val"].element_size()


def sparse_weights(program: Program) -> Iterator[Sparse]:
    """Operators with a constant weight of which a share of :data:`SHARE` is zeros, in graph order."""
    for node in list(program.graph.nodes):
        if node._erased or node.op != "call_function" or not node.users:
            continue
        operator = weight_operator(node)
        if not isinstance(operator, WeightOperator) or operator.weight.op != "get_attr":
            continue
        declared = operator.weight.meta["val"]
        if not declared.is_floating_point() or declared.numel() * declared.element_size() < LEAST:
            continue
        weight = program.state[str(operator.weight.target)].detach()
        zeros = 1 - int(weight.count_nonzero()) / weight.numel()
        if zeros >= SHARE:
            yield Sparse(operator, apply(operator.to_canonical(), weight), zeros)


def is_two_of_four(weight: Tensor) -> bool:
    """Whether of any four consecutive inputs of a row of a weight [out, in] no more than two count."""
    if weight.dim() != 2 or weight.shape[1] % 4:
        return False
    return bool(weight.ne(0).reshape(len(weight), -1, 4).sum(-1).le(2).all())


def problem(found: Sparse, targets: Sequence[str], cpu: Sequence[str]) -> str | None:
    """Why no operator could take the place of this one, whatever its zeros, or None.

    Args:
        targets: of the plan.
        cpu: those that have a form of the operator on a CPU; on a GPU it is torch, which launches the kernel.
    """
    operator = found.operator
    x, weight = operator.input.meta["val"], operator.weight.meta["val"]
    bias = None if operator.bias is None else operator.bias.meta["val"]
    if not (set(cpu) & set(targets) if x.device.type == "cpu" else tuple(targets) == ("torch",)):
        return f"there is no form for targets {', '.join(targets) or 'none'} on {x.device.type}"
    if x.dtype != weight.dtype or (bias is not None and (bias.dtype != x.dtype or len(bias.shape) != 1)):
        return "its operands differ in dtype, or its bias is not one number per output"
    return None


def report(program: Program, ctx: Context, found: Sparse, outcome: Outcome, executes: str, detail: str) -> None:
    """Write a row; `detail` follows the share of zeros."""
    site = program.module_path(found.node) or str(found.operator.weight.target).rpartition(".")[0]
    ctx.ledger.add(
        site=site, step="", requested=REQUESTED, outcome=outcome, executes=executes,
        detail=f"{found.zeros:.0%} zeros; {detail}",
    )  # fmt: skip


def report_size_only(program: Program, ctx: Context, found: Sparse, reason: str) -> None:
    """The weight stays as it is: it takes less room in the stored program, and no less time."""
    whole = " and ".join(target for target in ("aoti", "onnx") if target in ctx.plan.targets)
    held = f"; files for {whole} hold them" if whole else ""
    report(program, ctx, found, "skipped", str(found.node.target), f"size only: no speed-up, since {reason}{held}")


def store(program: Program, found: Sparse, name: str, take: Callable[[Tensor], Tensor]) -> Node:
    """A constant `<weight>_<name>` of what `take` leaves of the canonical weight.

    What was folded into the weight is rounded, and measured, in what is left.
    """
    old, target = found.operator.weight, str(found.operator.weight.target)
    new = program.add_constant(
        f"{target}_{name}", take(found.weight), dtype=old.meta["val"].dtype, before=found.node, like=old
    )
    if (fold := program.folds.get(target)) is not None:
        base = apply(found.operator.to_canonical(), fold.base.value().detach())
        program.folds[str(new.target)] = replace(fold, base=Recipe(take(base)))
    return new


# ---- the time


def sizes(operator: WeightOperator) -> tuple[tuple[int, ...], ...]:
    """Of the input, for the numbers of rows to time: the fewest there may be, and the most, up to :data:`ROWS`."""
    x = operator.input.meta["val"]
    # A convolution's rows are those of its batch; of a linear layer's input, all but the last dim.
    rest = tuple(_hint(size) for size in (x.shape[1:] if operator.kernel else x.shape[-1:]))
    count = x.shape[0] if operator.kernel else math.prod(x.shape[:-1])
    work = math.prod(operator.shape) * math.prod(rest[1:])
    powers = [2**power for power in range(ROWS.bit_length()) if 2**power * work <= WORK] or [1]
    most = next((size for size in powers if at_most(count, size)), powers[-1])
    fewest = most if isinstance(count, int) else 1  # a symbol's range says 2, though 1 is what it often is
    return tuple((rows, *rest) for rows in sorted({fewest, most}))


def _hint(size: int | object) -> int:
    """A size as it is, or as it was when the model was traced."""
    return size if isinstance(size, int) else int(cast(int, size.node.hint))  # type: ignore[attr-defined]


def is_faster(times: Sequence[tuple[float, float]]) -> bool:
    """Whether the first of each pair is less in one case, and more in none."""
    return any(ours < FASTER * dense for ours, dense in times) and all(ours <= dense for ours, dense in times)


def said(shapes: Sequence[tuple[int, ...]], times: Sequence[tuple[float, float]]) -> str:
    """``1×1024: 0.07 ms against 0.18; …``"""
    return "; ".join(
        f"{'×'.join(map(str, shape))}: {ours * 1e3:.3g} ms against {dense * 1e3:.3g}"
        for shape, (ours, dense) in zip(shapes, times, strict=True)
    )
