"""Compute now what depends on constants alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch.fx import Node

from fxfreeze.constants import lift
from fxfreeze.program import Program, first_line, is_effectful, is_operator, is_random, lifted_call
from fxfreeze.rewrite import Context, NoMatch, Pass, fail

from .._adapters import SPLICE
from .._operators import FORMS

aten = torch.ops.aten

# Free at run time: storing what they return would only cost memory.
MOVES = frozenset(
    {aten.reshape.default, aten.expand.default, aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default,
     aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.permute.default, aten.transpose.int,
     aten.t.default, aten.slice.Tensor, aten.select.int, aten.chunk.default, aten.split.Tensor,
     aten.split_with_sizes.default, aten.unbind.int, aten.clone.default, aten.contiguous.default}
)  # fmt: skip
STRIDE_READERS = frozenset({aten.as_strided.default})


@dataclass
class Budget:
    """How many bytes folding may add to the program: 4 MiB and a tenth of what it holds."""

    left: int
    credited: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, program: Program) -> Budget:
        return cls((4 << 20) + sum(program.state.tensor(name).nbytes for name in program.state) // 10)


class FoldConstants(Pass):
    """Replace operators whose operands are all constants by their result.

    The result is computed twice: in float64, which is what is kept, and in the storage dtypes, as the model itself
    does. Where the two differ by more than rounding (a cast to integers just below a whole number, an fp16 overflow)
    the operators stay. So do random ones, sizes that are symbolic, results the size of which the program cannot
    afford (:class:`Budget`), and layers that a step of the plan addresses.
    """

    name, stage = "fold-constants", "clean"
    spare_addressed: ClassVar[bool] = True

    def may_fold(self, node: Node) -> bool:
        """Whether `node` trains no more: not what a step put there."""
        return "fxfreeze" not in node.meta

    def run(self, program: Program, ctx: Context) -> int:
        globs = ctx.plan.patterns if self.spare_addressed else []
        spared = {node for path, nodes in program.sites().items() for node in nodes
                  if node.target in FORMS and any(fnmatchcase(path, glob) for glob in globs)}  # fmt: skip
        known = _constant_nodes(program, spared, self.may_fold)
        budget, count = Budget.of(program), 0
        # Backwards: what cannot be folded leaves its operands to be folded in its place.
        for node in reversed(list(program.graph.nodes)):
            if node not in known or all(user in known for user in node.users):
                continue
            outcome = self._fold(program, node, known, budget)
            if isinstance(outcome, NoMatch):
                ctx.near_misses.append(outcome)
            count += outcome is True
            known.discard(node)
        return count

    def _fold(self, program: Program, node: Node, known: set[Node], budget: Budget) -> bool | NoMatch:
        value = node.meta["val"]
        cone = _cone(node, known)
        if not isinstance(value, torch.Tensor) or not _is_worth_it(program, node, cone, known):
            return False
        leaves = {str(leaf.target): leaf for item in cone for leaf in item.all_input_nodes if leaf.op == "get_attr"}
        freed = {name: leaf for name, leaf in leaves.items() if _is_freed(program, leaf, known)}
        growth = _bytes(value) - sum(_bytes(freed[name].meta["val"]) for name in freed.keys() - budget.credited)
        if growth > budget.left:
            return fail(f"its result would add {growth / 2**20:.1f} MiB to the program", node)
        if growth > 0 and value.is_floating_point() and any(_is_8bit(leaf) for leaf in leaves.values()):
            return fail("it would store an 8-bit weight in a wider dtype", node)
        result = _evaluate(program, node, cone)
        if isinstance(result, NoMatch):
            return result
        budget.left -= growth
        budget.credited |= freed.keys()
        self._replace(program, node, result)
        return True

    def _replace(self, program: Program, node: Node, result: torch.Tensor) -> None:
        constant = program.add_constant(
            _name(program, node), result, dtype=node.meta["val"].dtype, before=node, like=node
        )
        program.replace(node, constant)
        program.graph.erase_node(node)
        output = program.graph.output_node()
        if output in constant.users:
            # A caller may write to what is returned, and must not reach the constant.
            copy = program.call(aten.clone.default, constant, before=output, like=node)
            output.replace_input_with(constant, copy)


class FoldLateConstants(FoldConstants):
    """:class:`FoldConstants` once more, after the adapters were folded: the layers spared for them, and what is new."""

    name, stage = "fold-late-constants", "fold"
    spare_addressed = False

    def may_fold(self, node: Node) -> bool:
        """Not what the fold of an adapter left, with its reasons."""
        origin = node.meta.get("fxfreeze")
        return origin is None or origin.primitive == SPLICE


def _constant_nodes(program: Program, spared: set[Node], may_fold: Callable[[Node], bool]) -> set[Node]:
    """Operators computed from constants alone, at sizes that are known."""
    known: set[Node] = set()
    for node in program.graph.nodes:
        if node.op != "call_function" or node in spared or not may_fold(node) or not _is_foldable(node):
            continue
        if all(operand.op == "get_attr" or operand in known for operand in node.all_input_nodes):
            known.add(node)
    return known


def _is_foldable(node: Node) -> bool:
    if is_random(node) or is_effectful(node) or not is_operator(node.target):
        return False
    if isinstance(node.target, torch._ops.HigherOrderOperator) or "empty" in str(node.target):
        return False
    values = node.meta["val"] if isinstance(node.meta["val"], list | tuple) else [node.meta["val"]]
    return all(
        isinstance(value, torch.Tensor) and all(isinstance(size, int) for size in value.shape) for value in values
    )


def _cone(node: Node, known: set[Node]) -> list[Node]:
    """`node` and every constant operator it depends on, in graph order."""
    seen: dict[Node, None] = {}
    stack = [(node, False)]
    while stack:
        item, done = stack.pop()
        if done:
            seen[item] = None
        elif item in known and item not in seen:
            stack.append((item, True))
            stack.extend((operand, False) for operand in item.all_input_nodes)
    return list(seen)


def _is_worth_it(program: Program, node: Node, cone: Iterable[Node], known: set[Node]) -> bool:
    """Whether anything is saved: a lone `zeros` or a transpose of a weight read elsewhere is best left as it is."""
    value = node.meta["val"]
    if any(user.target in STRIDE_READERS for user in node.users):
        return False
    if node.target is aten.expand.default and _bytes(value) > _bytes(node.args[0].meta["val"]):  # type: ignore[union-attr]
        return False
    creators = [item for item in cone if not item.all_input_nodes]
    if any(item.target not in MOVES and item not in creators and not _is_getitem(item) for item in cone):
        return True
    if creators:
        return value.numel() == 1
    leaves = {leaf for item in cone for leaf in item.all_input_nodes if leaf.op == "get_attr"}
    if node.target is aten.clone.default and all(user.op == "output" for user in node.users):
        return False
    freed = sum(_bytes(leaf.meta["val"]) for leaf in leaves if _is_freed(program, leaf, known))
    return _bytes(value) <= freed


def _is_getitem(node: Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _is_freed(program: Program, leaf: Node, known: set[Node]) -> bool:
    """Whether nothing but constant operators reads the constant."""
    return program.readers(leaf) <= known


def _is_8bit(leaf: Node) -> bool:
    return leaf.meta["val"].dtype in (torch.int8, torch.uint8)


def _bytes(value: torch.Tensor) -> int:
    return math.prod(int(size) for size in value.shape) * value.element_size()


@torch.no_grad()
def _evaluate(program: Program, node: Node, cone: list[Node]) -> torch.Tensor | NoMatch:
    """The value of `node`: in its storage dtype where that is exact, else in float64; or why there is none to keep."""
    stored: dict[Node, Any] = {}
    lifted: dict[Node, Any] = {}
    try:
        for item in cone:
            for leaf in item.all_input_nodes:
                if leaf.op == "get_attr":
                    value = program.state[str(leaf.target)]
                    stored[leaf], lifted[leaf] = value.to(leaf.meta["val"].dtype), lift(value)
            args, kwargs = torch.fx.map_arg((item.args, dict(item.kwargs)), stored.__getitem__)
            stored[item] = item.target(*args, **kwargs)  # type: ignore[operator]
            args, kwargs = torch.fx.map_arg((item.args, dict(item.kwargs)), lifted.__getitem__)
            lifted[item] = lifted_call(item, args, kwargs)
    except Exception as error:
        return fail(f"it does not run on its own: {first_line(error)}", node)
    narrow, wide, declared = stored[node], lifted[node], node.meta["val"]
    if narrow.dtype != declared.dtype or tuple(narrow.shape) != tuple(declared.shape):
        return fail(f"it gives {narrow.dtype}{list(narrow.shape)}, not what the trace said", node)
    if bool(_equal(lift(narrow), wide).all()):
        return _compact(narrow)
    if not _differ_by_rounding(narrow, wide):
        return fail(f"float64 and {declared.dtype} disagree about it by more than rounding", node)
    return _compact(wide)


def _compact(value: torch.Tensor) -> torch.Tensor:
    """`value` in memory of its own, unless it already is all there is in the memory it shares."""
    value = value.contiguous()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def _equal(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (first == second) | (first.isnan() & second.isnan())


def _differ_by_rounding(narrow: torch.Tensor, wide: torch.Tensor) -> bool:
    """Whether `narrow` may be `wide` computed with less precision: not a different integer, not an overflow."""
    if not (narrow.is_floating_point() or narrow.is_complex()):
        return False
    near, far = lift(narrow), wide
    finite = near.isfinite() & far.isfinite()
    if not bool((finite | _equal(near, far)).all()):
        return False
    near, far = near[finite], far[finite]
    if near.is_complex():
        near, far = torch.view_as_real(near), torch.view_as_real(far)
    # A step (floor, sign, one-hot) that falls to the other side gives whole numbers, and other ones.
    if bool((near == near.round()).all()):
        return False
    bound = math.sqrt(torch.finfo(narrow.dtype).eps) * far.abs().max()
    return bool(((near - far).abs() <= bound).all())


def _name(program: Program, node: Node) -> str:
    path = program.module_path(node)
    return f"{path}.{node.name}" if path else node.name
