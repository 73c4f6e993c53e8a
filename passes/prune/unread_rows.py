"""Compute only the rows that are read: of a transformer's last block, one, where a classifier reads one token."""

from __future__ import annotations

from torch.fx import Node

from fxfreeze.program import Program
from fxfreeze.rewrite import Context, NoMatch, Pass

from .._gates import GATE
from .._operators import FORMS, aten
from ._projections import bundle
from ._rows import Rows, demanded, reread, size_of, some_rows

_COSTLY = frozenset(FORMS) - {aten.embedding.default} | {aten.scaled_dot_product_attention.default}
"""What the ledger lists."""


class UnreadRows(Pass):
    """Where all readers of a value read rows of it, by constant slices and indices along one dim, only those are made.

    Backwards from the readers, the union of their rows is taken of the operands in place of the result: through
    operators that treat rows one by one (pointwise ones, linear layers, norms and softmaxes over other dims), those
    that move them (reshape, permute, cat, of which parts can go), and the queries of attention. It ends where rows mix
    (keys and values of attention, convolutions, sums over rows), at values that something else reads whole, and at
    gates, which report which neurons fire in every row.

    A layer that makes queries, keys and values at once is taken apart where only some rows of one of them are read.
    A dynamic number of rows can be read from either end (``x[:, 0]``, ``x[:, -1]``); rows whose numbers hang on sizes
    are all made. The last query of causal attention sees all keys, and others get their part of the triangle.
    """

    name, stage = "unread-rows", "prune"

    def run(self, program: Program, ctx: Context) -> int:
        total = 0
        while True:
            count, separated = self._sweep(program, ctx)
            total += count + separated
            program.sweep()
            if not separated:
                return total

    def _sweep(self, program: Program, ctx: Context) -> tuple[int, int]:
        """Once from the outputs to the inputs; how many values were cut, and layers taken apart, which ends it."""
        count = 0
        for node in reversed(list(program.graph.nodes)):
            if node.op != "call_function" or node._erased or (read := demanded(program, node)) is None:
                continue
            if (found := bundle(program, node)) is not None and found.keeps_rows(read[0]):
                found.separate(program, int(node.args[1]))  # type: ignore[arg-type, call-overload]
                return count, 1
            count += self._cut(program, node, *read, ctx)
        return count, 0

    def _cut(self, program: Program, node: Node, dim: int, rows: Rows, ctx: Context) -> int:
        size = size_of(node, dim)
        new = some_rows(program, node, dim, rows)
        if isinstance(new, NoMatch):
            ctx.near_misses.append(new)
            if node.target is GATE:
                _report(program, ctx, node, rows, size, new.reason)
            return 0
        for user in list(node.users):
            reread(program, user, new, dim, rows, size)
        _report(program, ctx, node, rows, size, None)
        for user in list(node.users):
            _drop(program, user)
        return 1


def _drop(program: Program, node: Node) -> None:
    """Erase what nothing reads any more: its operands must not seem to be read whole."""
    if node._erased or node.users or node.op != "call_function":
        return
    operands = node.all_input_nodes
    program.graph.erase_node(node)
    for operand in operands:
        _drop(program, operand)


def _report(program: Program, ctx: Context, node: Node, rows: Rows, size: object, reason: str | None) -> None:
    made = node
    if node.target is aten.reshape.default and node.args[0].target in FORMS:  # type: ignore[union-attr]
        made = node.args[0]  # type: ignore[assignment]
    if reason is None and made.target not in _COSTLY:
        return
    of = f"{len(rows)} of {size if isinstance(size, int) else 'a dynamic number of'} rows"
    ctx.ledger.add(
        site=program.module_path(made), step="", requested="unread rows",
        outcome="skipped" if reason else "rewritten", executes=str(made.target),
        detail=f"only {of} are read, but all are computed: {reason}" if reason else f"computes {of}",
    )  # fmt: skip
