"""Which rows of a value are read, and how an operator computes some of its rows alone.

Rows are the entries along one dim of a value. They are numbered as Python does: from the front, or from the end with
negative numbers, which is how the last of a dynamic number of rows is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.program import FIRES, Origin, Program, is_random
from fxfreeze.rewrite import NoMatch, fail

from .._adapters import GATE
from .._operators import arguments, aten

Rows = tuple[int, ...]
Outcome = Node | NoMatch

_END = 2**63 - 1
_COPIES = frozenset({aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.clone.default,
                     aten.contiguous.default})  # fmt: skip
_SOFTMAXES = frozenset({aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default})


# ---------------------------------------------------------------------- what is read


def size_of(node: Node, dim: int) -> Any:
    return node.meta["val"].shape[dim]


def reading(program: Program, user: Node, node: Node) -> tuple[int, Rows] | None:
    """The dim along which `user` reads rows of `node`, and which; None where it reads all, or which is not known."""
    if user.op != "call_function" or not user.args or user.args[0] is not node or user.all_input_nodes.count(node) > 1:
        return None
    shape, ndim = node.meta["val"].shape, node.meta["val"].ndim
    if user.target is aten.select.int and isinstance(user.args[2], int):
        return user.args[1] % ndim, (user.args[2],)  # type: ignore[operator]
    if user.target is aten.slice.Tensor:
        given = arguments(user)
        dim = given["dim"] % ndim
        rows = _sliced(given["start"], given["end"], given["step"], shape[dim], user.meta["val"].shape[dim])
        return None if rows is None else (dim, rows)
    if user.target is aten.index_select.default:
        index, dim = program.constant(user.args[2]), user.args[1] % ndim  # type: ignore[operator]
    elif user.target is aten.index.Tensor:
        named = [(at, item) for at, item in enumerate(user.args[1]) if item is not None]  # type: ignore[arg-type, var-annotated]
        if len(named) != 1:
            return None
        dim, index = named[0][0], program.constant(named[0][1])
    else:
        return None
    if index is None or index.dtype not in (torch.int64, torch.int32) or index.ndim != 1 or not index.numel():
        return None
    return dim, tuple(index.tolist())


def _sliced(start: Any, end: Any, step: Any, size: Any, count: Any) -> Rows | None:
    start = 0 if start is None else start
    if not isinstance(start, int) or not isinstance(count, int) or not isinstance(step, int) or not count:
        return None
    if isinstance(size, int):
        return tuple(range(size))[start : end if isinstance(end, int) else None : step] if _is_plain(end) else None
    return tuple(range(start, start + count * step, step))  # the trace knows how many: there are as many in every call


def _is_plain(end: Any) -> bool:
    return end is None or isinstance(end, int)


def demanded(program: Program, node: Node) -> tuple[int, Rows] | None:
    """The dim along which all readers of `node` read rows, and their union, where that is less than all."""
    found: set[int] = set()
    dims: set[int] = set()
    if not isinstance(node.meta.get("val"), Tensor) or not node.users:
        return None
    for user in node.users:
        read = reading(program, user, node)
        if read is None:
            return None
        dims.add(read[0])
        found.update(read[1])
    if len(dims) > 1:
        return None
    dim = dims.pop()
    size = size_of(node, dim)
    if not isinstance(size, int):
        return dim, (*sorted(row for row in found if row >= 0), *sorted(row for row in found if row < 0))
    rows = tuple(sorted({row % size for row in found}))
    return (dim, rows) if len(rows) < size else None


# ---------------------------------------------------------------------- reading


def take(program: Program, node: Node, dim: int, rows: Rows) -> Node:
    """Rows of `node` along `dim`: a slice where they follow each other, else a selection by index."""
    anchor = node.next
    while anchor.op == "placeholder":
        anchor = anchor.next
    return _taken(program, node, dim, rows, anchor)


def _taken(program: Program, node: Node, dim: int, rows: Rows, before: Node) -> Node:
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    if step > 0 and rows == tuple(range(rows[0], rows[-1] + 1, step)) and (rows[0] >= 0) == (rows[-1] >= 0):
        end = _END if rows[-1] == -1 else rows[-1] + 1
        steps = () if step == 1 else (step,)
        return program.call(aten.slice.Tensor, node, dim, rows[0], end, *steps, before=before, like=node)
    size = size_of(node, dim)
    if isinstance(size, int):
        device = node.meta["val"].device
        value = torch.tensor([row % size for row in rows], device=device)
        index = program.add_constant(f"{node.name}.rows", value, before=before, like=node)
        return program.call(aten.index_select.default, node, dim, index, before=before, like=node)
    parts = [_taken(program, node, dim, part, before) for part in ((row,) for row in rows)]
    return program.call(aten.cat.default, parts, dim, before=before, like=node)


def reread(program: Program, user: Node, new: Node, dim: int, rows: Rows, size: Any) -> None:
    """Let `user`, which reads some of the rows of a value, read them of `new`, which holds only `rows`."""
    read = reading(program, user, user.args[0])  # type: ignore[arg-type]
    assert read is not None
    at = tuple(rows.index(row % size if isinstance(size, int) else row) for row in read[1])
    if user.target is aten.select.int:
        result = program.call(aten.select.int, new, dim, at[0], before=user, like=user)
    elif at == tuple(range(len(rows))):
        result = new
    else:
        result = _taken(program, new, dim, at, user)
    program.replace(user, result)


# ---------------------------------------------------------------------- computing some rows


def some_rows(program: Program, node: Node, dim: int, rows: Rows) -> Outcome:
    """`node` again, of its operands' rows only; or why its rows are not computed one by one."""
    origin = node.meta.get("fxfreeze")
    if isinstance(origin, Origin) and origin.primitive in (FIRES, GATE):
        return fail("a gate reports which neurons fire in every row", node)
    if (rule := _RULES.get(node.target)) is not None:
        return rule(program, node, dim, rows)
    if is_random(node):
        return fail("it draws random numbers", node)
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten":
        if node.target in _COPIES or torch.Tag.pointwise in node.target.tags:
            return _pointwise(program, node, dim, rows)
    return fail(f"{node.target} mixes rows, or is not known not to", node)


def _again(program: Program, node: Node, changes: dict[Node, Node], **given: Any) -> Node:
    """The call of `node` with other operands, or other arguments by their schema names."""
    args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), lambda old: changes.get(old, old))
    names = [item.name for item in node.target._schema.arguments]  # type: ignore[union-attr]
    args = tuple(given.pop(name, value) for name, value in zip(names, args, strict=False))
    return program.call(node.target, *args, before=node, like=node, **{**kwargs, **given})  # type: ignore[arg-type]


def _pointwise(program: Program, node: Node, dim: int, rows: Rows) -> Outcome:
    size, ndim, changes = size_of(node, dim), node.meta["val"].ndim, {}
    for operand in node.all_input_nodes:
        value = operand.meta["val"]
        at = dim - ndim + value.ndim if isinstance(value, Tensor) else -1
        if at < 0 or _is_one(value.shape[at]):
            continue
        if str(value.shape[at]) != str(size):
            return fail("an operand has another number of rows", node)
        changes[operand] = take(program, operand, at, rows)
    return _again(program, node, changes) if changes else fail("no operand has its rows", node)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _first(program: Program, node: Node, dim: int, rows: Rows, **given: Any) -> Node:
    """Rows of the first operand along its dim `dim`, through the same call."""
    source: Node = node.args[0]  # type: ignore[assignment]
    return _again(program, node, {source: take(program, source, dim, rows)}, **given)


def _but_last(program: Program, node: Node, dim: int, rows: Rows) -> Outcome:
    if dim == node.meta["val"].ndim - 1:
        return fail("they are its features", node)
    if node.target is aten.embedding.default:
        index: Node = node.args[1]  # type: ignore[assignment]
        return _again(program, node, {index: take(program, index, dim, rows)})
    return _first(program, node, dim, rows)


def _norm(program: Program, node: Node, dim: int, rows: Rows) -> Outcome:
    over = len(node.args[1])  # type: ignore[arg-type]
    if dim >= node.meta["val"].ndim - over:
        return fail("it normalises over them", node)
    return _first(program, node, dim, rows)


def _softmax(program: Program, node: Node, dim: int, rows: Rows) -> Outcome:
    if node.args[1] % node.meta["val"].ndim == dim:  # type: ignore[operator]
        return fail("it normalises over them", node)
    return _first(program, node, dim, rows)


def _product(program: Program, node: Node, dim: int, rows: Rows) -> Outcome:
    """Rows of a product are rows of its left operand."""
    left: Node = node.args[1] if node.target is aten.addmm.default else node.args[0]  # type: ignore[assignment]
    ndim, value = node.meta["val"].ndim, left.meta["val"]
    bias = node.args[0].meta["val"].ndim if node.target is aten.addmm.default else 0  # type: ignore[union-attr]
    right: Node = node.args[2] if node.target is aten.addmm.default else node.args[1]  # type: ignore[assignment]
    if dim != ndim - 2 or min(value.ndim, right.meta["val"].ndim) < 2 or bias > 1:
        return fail("they are not the rows of its left operand", node)
    if left is right:
        return fail("it multiplies a value by itself", node)
    return _again(program, node, {left: take(program, left, value.ndim - 2, rows)})


def _permuted(program: Program, node: Node, dim: int, rows: Rows) -> Outcome:
    order: list[Any] = list(range(node.meta["val"].ndim))
    if node.target is aten.transpose.int:
        first, second = node.args[1:3]
        order[first], order[second] = order[second], order[first]  # type: ignore[index]
    else:
        order = [at % len(order) for at in node.args[1]]  # type: ignore[union-attr, operator]
    return _first(program, node, order[dim], rows)


def _unsqueezed(program: Program, node: Node, dim: int, rows: Rows) -> Outcome:
    at = node.args[1] % node.meta["val"].ndim  # type: ignore[operator]
    return fail("they are a dim that it makes", node) if dim == at else _first(program, node, dim - (dim > at), rows)


def _squeezed(program: Program, node: Node, dim: int, rows: Rows) -> Outcome:
    shape = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    named = node.args[1] if isinstance(node.args[1], list | tuple) else [node.args[1]]
    gone = {at % len(shape) for at in named if _is_one(shape[at])}  # type: ignore[operator, index]
    kept = [at for at in range(len(shape)) if at not in gone]
    return _first(program, node, kept[dim], rows)


def _expanded(program: Program, node: Node, dim: int, rows: Rows) -> Outcome:
    source: Node = node.args[0]  # type: ignore[assignment]
    sizes, at = list(node.args[1]), dim - node.meta["val"].ndim + source.meta["val"].ndim  # type: ignore[arg-type]
    sizes[dim] = len(rows)
    if at < 0 or _is_one(size_of(source, at)):
        return _again(program, node, {}, size=sizes)
    return _first(program, node, at, rows, size=sizes)


def _reshaped(program: Program, node: Node, dim: int, rows: Rows) -> Outcome:
    source: Node = node.args[0]  # type: ignore[assignment]
    before, after = source.meta["val"].shape, node.meta["val"].shape
    found = [
        at for at, size in enumerate(before)
        if str(size) == str(after[dim]) and str(math.prod(before[at + 1 :])) == str(math.prod(after[dim + 1 :]))
    ]  # fmt: skip
    if found and node.target is aten.reshape.default:
        return _first(program, node, found[-1], rows, shape=_with_rows(node, dim, rows))
    if found and node.target is aten.unflatten.int:
        at: Any = node.args[1] % len(before)  # type: ignore[operator]
        if at <= dim <= at + len(after) - len(before):
            return fail("they are a dim that it makes", node)
    if found:
        return _first(program, node, found[-1], rows)  # flatten and unflatten name the dims that they change
    return _flat_product(program, node, dim, rows)


def _with_rows(node: Node, dim: int, rows: Rows) -> list[Any]:
    sizes = list(node.args[1])  # type: ignore[arg-type]
    sizes[dim] = len(rows)
    return sizes


def _flat_product(program: Program, node: Node, dim: int, rows: Rows) -> Outcome:
    """A linear layer over flat rows, as transformers' Conv1D: reshape, addmm, and reshape again."""
    product: Node = node.args[0]  # type: ignore[assignment]
    if node.target is not aten.reshape.default or product.target not in (aten.addmm.default, aten.mm.default):
        return fail("it merges them with another dim", node)
    flat = product.args[1] if product.target is aten.addmm.default else product.args[0]
    leading = node.meta["val"].ndim - 1
    if (
        not isinstance(flat, Node)
        or flat.target is not aten.reshape.default
        or dim >= leading
        or len(product.users) > 1
    ):
        return fail("it merges them with another dim", node)
    source: Node = flat.args[0]  # type: ignore[assignment]
    inner, shape = flat.meta["val"].shape[-1], source.meta["val"].shape
    same = list(map(str, shape[:leading])) == list(map(str, node.meta["val"].shape[:leading]))
    if not same or str(math.prod(shape[leading:])) != str(inner) or (product.target is aten.addmm.default and (
        product.args[0].meta["val"].ndim > 1  # type: ignore[union-attr]
    )):  # fmt: skip
        return fail("it merges them with another dim", node)
    few = take(program, source, dim, rows)
    few = program.call(aten.reshape.default, few, [-1, int(inner)], before=node, like=flat)
    args = tuple(few if item is flat else item for item in product.args)
    few = program.call(product.target, *args, before=node, like=product)  # type: ignore[arg-type]
    return program.call(aten.reshape.default, few, _with_rows(node, dim, rows), before=node, like=node)


def _selected(program: Program, node: Node, dim: int, rows: Rows) -> Outcome:
    source: Node = node.args[0]  # type: ignore[assignment]
    at = node.args[1] % source.meta["val"].ndim  # type: ignore[operator]
    return _first(program, node, dim + (dim >= at), rows)


def _part(program: Program, node: Node, dim: int, rows: Rows) -> Outcome:
    """Rows of a slice are rows of what is sliced."""
    source: Node = node.args[0]  # type: ignore[assignment]
    given = arguments(node)
    if given["dim"] % node.meta["val"].ndim != dim:
        return _first(program, node, dim, rows)
    read = reading(program, node, source)
    if read is None:
        return fail("which rows it reads is not constant", node)
    return take(program, source, dim, tuple(read[1][row] for row in rows))


def _picked(program: Program, node: Node, dim: int, rows: Rows) -> Outcome:
    source: Node = node.args[0]  # type: ignore[assignment]
    read = reading(program, node, source)
    if read is None:
        return fail("which rows it reads is not constant", node)
    if read[0] == dim:
        return take(program, source, dim, tuple(read[1][row] for row in rows))
    return _first(program, node, dim, rows)


def _joined(program: Program, node: Node, dim: int, rows: Rows) -> Outcome:
    """Parts of which no row is read are dropped."""
    parts: Sequence[Node] = node.args[0]  # type: ignore[assignment]
    along = (node.args[1] if len(node.args) > 1 else 0) % node.meta["val"].ndim  # type: ignore[operator]
    if along != dim:
        return _again(program, node, {part: take(program, part, dim, rows) for part in parts})
    sizes = [size_of(part, dim) for part in parts]
    owned: list[tuple[Node, Rows]] = []
    if isinstance(sizes[0], int) and all(0 <= row < sizes[0] for row in rows):
        owned = [(parts[0], rows)]
    elif isinstance(sizes[-1], int) and all(-sizes[-1] <= row < 0 for row in rows):
        owned = [(parts[-1], rows)]
    elif all(isinstance(size, int) for size in sizes):
        first = 0
        for part, size in zip(parts, sizes, strict=True):
            own = tuple(row - first for row in rows if first <= row < first + size)
            owned += [(part, own)] if own else []
            first += size
    if not owned:
        return fail("which part holds them hangs on sizes", node)
    taken = [
        part if own == tuple(range(size)) else take(program, part, dim, own)
        for part, own in owned if (size := _count(part, dim))
    ]  # fmt: skip
    return taken[0] if len(taken) == 1 else program.call(aten.cat.default, taken, dim, before=node, like=node)


def _count(part: Node, dim: int) -> int:
    size = size_of(part, dim)
    return size if isinstance(size, int) else -1


def _attention(program: Program, node: Node, dim: int, rows: Rows) -> Outcome:
    """Rows of the queries; keys and values are read whole."""
    given, ndim = arguments(node), node.meta["val"].ndim
    query, key, mask = given["query"], given["key"], given["attn_mask"]
    if dim != ndim - 2 or given["dropout_p"]:
        return fail("they are not its queries, or it draws random numbers", node)
    changes: dict[str, Any] = {}
    if given["is_causal"]:
        seen = _triangle(size_of(query, dim), size_of(key, key.meta["val"].ndim - 2), rows)
        if seen is None:
            return fail("which keys a causal query sees hangs on sizes", node)
        if not bool(seen.all()):
            changes["attn_mask"] = program.add_constant(
                f"{node.name}.mask", seen.to(query.meta["val"].device), before=node, like=node
            )
        changes["is_causal"] = False
    elif mask is not None and mask.meta["val"].ndim > 1 and not _is_one(size_of(mask, -2)):
        changes["attn_mask"] = take(program, mask, mask.meta["val"].ndim - 2, rows)
    named = {**given, **changes, "query": take(program, query, query.meta["val"].ndim - 2, rows)}
    args = [named.pop(name) for name in ("query", "key", "value", "attn_mask")]
    defaults = {"dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
    told = {name: value for name, value in named.items() if value != defaults[name]}
    if args[-1] is None:
        args.pop()
    return program.call(node.target, *args, before=node, like=node, **told)  # type: ignore[arg-type]


def _triangle(queries: Any, keys: Any, rows: Rows) -> Tensor | None:
    """Which keys the queries `rows` see: bool [rows, keys]; None where that hangs on sizes."""
    if isinstance(queries, int) and isinstance(keys, int):
        return torch.ones(queries, keys, dtype=torch.bool).tril()[list(rows)]
    return torch.ones(1, dtype=torch.bool) if rows == (-1,) and str(queries) == str(keys) else None


Rule = Callable[[Program, Node, int, Rows], Outcome]

_RULES: dict[Any, Rule] = {
    aten.linear.default: _but_last, aten.embedding.default: _but_last,
    aten.layer_norm.default: _norm, aten.rms_norm.default: _norm,
    **dict.fromkeys(_SOFTMAXES, _softmax),
    **dict.fromkeys((aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default), _product),
    aten.transpose.int: _permuted, aten.permute.default: _permuted,
    aten.unsqueeze.default: _unsqueezed, aten.squeeze.dim: _squeezed, aten.squeeze.dims: _squeezed,
    aten.expand.default: _expanded,
    aten.reshape.default: _reshaped, aten.flatten.using_ints: _reshaped, aten.unflatten.int: _reshaped,
    aten.select.int: _selected, aten.slice.Tensor: _part,
    aten.index_select.default: _picked, aten.index.Tensor: _picked,
    aten.cat.default: _joined, aten.scaled_dot_product_attention.default: _attention,
}  # fmt: skip
