"""Compute once what is computed several times over."""

from __future__ import annotations

from collections.abc import Hashable
from fnmatch import fnmatchcase
from typing import Any

from torch.fx import Node

from fxfreeze.program import Program, is_effectful, is_random
from fxfreeze.rewrite import Context, Pass


class CommonSubexpressions(Pass):
    """Merge calls of the same operator on the same operands.

    What draws random numbers stays apart, and so do two results that are both returned (a caller may write to one of
    them), adapters of different origin, and calls of different modules when a step of the plan addresses one of them:
    the step would no longer find its module.
    """

    name, stage = "merge-common", "clean"

    def run(self, program: Program, ctx: Context) -> int:
        first: dict[Hashable, Node] = {}
        count = 0
        for node in list(program.graph.nodes):
            if not _is_pure(node):
                continue
            key = self._key(program, node, ctx.plan.patterns)
            kept = first.setdefault(key, node)
            if kept is not node and not (_is_returned(kept) and _is_returned(node)):
                program.replace(node, kept)
                count += 1
        return count

    def _key(self, program: Program, node: Node, globs: list[str]) -> Hashable:
        addressed = [path for path in program.module_classes(node) if any(fnmatchcase(path, glob) for glob in globs)]
        origin = node.meta.get("fxfreeze")
        return node.op, node.target, _freeze(node.args), _freeze(dict(node.kwargs)), tuple(addressed), origin


def _is_pure(node: Node) -> bool:
    if node.op == "get_attr":
        return True
    return node.op == "call_function" and bool(node.users) and not is_random(node) and not is_effectful(node)


def _is_returned(node: Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _freeze(value: Any) -> Hashable:
    """A key that tells 1 from 1.0 from True and 0.0 from −0.0, as operators do."""
    if isinstance(value, Node):
        return value
    if isinstance(value, list | tuple):
        return tuple(map(_freeze, value))
    if isinstance(value, dict):
        return tuple((key, _freeze(item)) for key, item in sorted(value.items()))
    if isinstance(value, slice):
        return "slice", _freeze(value.start), _freeze(value.stop), _freeze(value.step)
    return type(value), repr(value)
