"""Fold what stands around a frozen codebook into it: a normalization into its keys, a linear layer into its values."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.constants import Edit, Recipe
from fxfreeze.kernels.codebook import KERNEL
from fxfreeze.program import Program
from fxfreeze.rewrite import Context, NodeRewrite, NoMatch, Outcome, fail

from .._operators import WeightOperator, arguments, constant_problem, weight_operator

aten = torch.ops.aten

LAYER_NORM = aten.layer_norm.default
RESHAPES = (aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default,
            aten.squeeze.dim, aten.squeeze.default)  # fmt: skip
GROWTH = 4
"""The table may take this many times the bytes of the values and the weight it is made from, and 16 MiB more."""
_FREE = 16 << 20


class FoldCodebook(NodeRewrite):
    """Of ids = top-k(LN(x)·keysᵀ + b) and y = W·flatten(Σ values[ids]) + c stay a product, a choice and a table.

    * z = γ⊙v + β in front: z·keyᵀ + b = v·(γ⊙key)ᵀ + (b + β·keyᵀ).
    * A normalization v = (x − μ)/σ without γ and β, with b = 0: v·key > v·key′ just where x·(key − mean(key)) is
      greater, for σ > 0 divides all scores alike, and μ meets Σ(key − mean(key)) = 0. It is gone. With b ≠ 0 it stays,
      for σ would weigh b.
    * A linear layer behind that nothing else stands between: T = values·Wᵀ + c/(k·G), where each of the G groups sees
      its columns of W; then the entries of all groups are added up. That takes k·o additions for a row and a group in
      place of k·e and a product of 2·e·o, and is done where it is less, and the table not much larger than what it is
      made of (:data:`GROWTH`).
    """

    name, stage, targets = "fold-codebook", "fold", (KERNEL.op,)

    def missed(self, program: Program, miss: NoMatch, ctx: Context) -> None:
        _report(program, ctx, miss.node, "skipped", "nothing", miss.reason)

    def rewrite(self, program: Program, node: Node, ctx: Context) -> bool | NoMatch:
        given = arguments(node)
        for name in ("keys", "values", "bias"):
            if given[name] is not None and not program.is_constant(given[name]):
                return fail(f"its {name} are not constant but computed by {given[name].target}", node)
        front = fold_front(program, node)
        if isinstance(front, str):
            _report(program, ctx, node, "rewritten", f"{front} folded into the keys", "")
            return True
        back = fold_back(program, node)
        if isinstance(back, NoMatch):
            return back
        if back:
            _report(program, ctx, node, "rewritten", "one table", back)
        return bool(back)


def _report(program: Program, ctx: Context, node: Node, outcome: Outcome, executes: str, detail: str) -> None:
    site = program.module_path(node) or node.name
    ctx.ledger.add(
        site=site, step="", requested="codebook", outcome=outcome, executes=f"{KERNEL.op}: {executes}", detail=detail
    )


# ---- in front


def fold_front(program: Program, node: Node) -> str | None:
    """What was folded into the keys: one thing at a time; None when there is nothing."""
    given = arguments(node)
    groups, size = (int(count) for count in given["keys"].meta["val"].shape[::2])
    value = _behind_reshapes(given["x"], groups, size)
    if value is None or value.op != "call_function":
        return None
    if value.target is LAYER_NORM:
        return _fold_norm(program, node, value, groups, size)
    if (found := _affine(program, value, groups, size)) is None:
        return None
    source, gain, shift = found
    _scale_keys(program, node, gain, shift)
    _read_instead(program, node, source)
    return "a scale and a shift" if shift is not None else "a scale"


def _behind_reshapes(value: Node, groups: int, size: int) -> Node | None:
    """What `value` [..., G, d] is a reshape of, with its last dims G and d, or G·d; None where it is cut otherwise."""
    while value.op == "call_function" and value.target in RESHAPES:
        source = value.args[0]
        if not isinstance(source, Node) or not _ends_in(source, groups, size):
            return None
        value = source
    return value if _ends_in(value, groups, size) else None


def _ends_in(node: Node, groups: int, size: int) -> bool:
    shape = node.meta["val"].shape
    return _is(shape[-1:], (groups * size,)) or _is(shape[-2:], (groups, size))


def _is(sizes: Any, wanted: tuple[int, ...]) -> bool:
    # A symbol is not compared: that would add a guard.
    return len(sizes) == len(wanted) and all(isinstance(size, int) for size in sizes) and tuple(sizes) == wanted


def _affine(program: Program, value: Node, groups: int, size: int) -> tuple[Node, Tensor, Tensor | None] | None:
    """`value` as γ⊙v or v + β with constants [G, d]: v, γ and β."""
    if value.target not in (aten.mul.Tensor, aten.add.Tensor) or value.kwargs.get("alpha", 1) != 1:
        return None
    first, second = (program.constant64(part) for part in value.args[:2])
    source, constant = (value.args[1], first) if second is None else (value.args[0], second)
    if (first is None) == (second is None) or not isinstance(source, Node) or constant is None:
        return None
    before, after = source.meta["val"], value.meta["val"]
    if not isinstance(before, Tensor) or list(map(str, before.shape)) != list(map(str, after.shape)):
        return None
    if before.dtype != after.dtype or not bool(constant.isfinite().all()):
        return None
    tail = (groups, size) if _is(after.shape[-2:], (groups, size)) else (groups * size,)
    if constant.dim() > len(tail) and any(count != 1 for count in constant.shape[: -len(tail)]):
        return None
    channels = constant.reshape(constant.shape[-len(tail) :]).expand(tail).reshape(groups, size)
    if value.target is aten.mul.Tensor:
        return source, channels, None
    return source, torch.ones_like(channels), channels


def _fold_norm(program: Program, node: Node, norm: Node, groups: int, size: int) -> str | None:
    given = arguments(norm)
    weight, bias = (program.constant64(given[name]) for name in ("weight", "bias"))
    if any(given[name] is not None and value is None for name, value in (("weight", weight), ("bias", bias))):
        return None
    count = math.prod(given["normalized_shape"])
    if len(given["normalized_shape"]) != 1 or count not in (size, groups * size):
        return None
    if weight is not None or bias is not None:
        ones = torch.ones(count, dtype=torch.float64)
        gain = (ones if weight is None else weight).repeat(groups * size // count).reshape(groups, size)
        shift = None if bias is None else bias.repeat(groups * size // count).reshape(groups, size)
        _scale_keys(program, node, gain, shift)
        plain = program.call(
            LAYER_NORM, given["input"], given["normalized_shape"], None, None, given["eps"], before=norm, like=norm
        )
        _read_instead(program, node, plain)
        return "the weight and the bias of a normalization"
    if arguments(node)["bias"] is not None or count != size or not given["eps"] > 0:
        return None
    _edit(program, node, "keys", lambda keys: keys - keys.mean(-1, keepdim=True))
    _read_instead(program, node, given["input"])
    return "a normalization"


def _scale_keys(program: Program, node: Node, gain: Tensor, shift: Tensor | None) -> None:
    """Let the scores be of v where they were of gain ⊙ v + shift, both [G, d]."""
    given = arguments(node)
    keys, old = program.constant64(given["keys"]), given["bias"]
    assert keys is not None
    if shift is not None and bool((shift != 0).any()):
        extra = torch.einsum("gd,gkd->gk", shift, keys)
        if old is None:
            _add_bias(program, node, extra)
        else:
            _edit(program, node, "bias", lambda bias: bias + extra)
    if bool((gain != 1).any()):
        _edit(program, node, "keys", lambda keys: keys * gain.unsqueeze(1))


def _edit(program: Program, node: Node, name: str, edit: Edit) -> None:
    """A new value for one of the operator's constants; keys and values may be the same tensor, and then part."""
    given = arguments(node)
    constant = given[name]
    shared = [other for other in ("keys", "values", "bias") if other != name and given[other] is not None]
    if any(given[other].target == constant.target for other in shared):
        recipe = program.state.recipe(str(constant.target)).then(edit)
        dtype = constant.meta["val"].dtype
        own = program.add_constant(f"{constant.target}_{name}", recipe, dtype=dtype, before=node, like=constant)
        _call_with(node, **{name: own})
        return
    program.refine(constant, edit, user=node)


def _add_bias(program: Program, node: Node, bias: Tensor) -> None:
    keys = arguments(node)["keys"]
    name = f"{program.module_path(node) or node.name}.score_bias"
    own = program.add_constant(name, bias, dtype=keys.meta["val"].dtype, before=node, like=node)
    _call_with(node, bias=own)


def _call_with(node: Node, **changes: Node | None) -> None:
    given = {**arguments(node), **changes}
    operands = [given[name] for name in ("x", "keys", "values", "bias")]
    node.args = tuple(operands if given["bias"] is not None else operands[:3])


def _read_instead(program: Program, node: Node, source: Node) -> None:
    """Let the operator read `source` [..., G, d] or [..., G·d] in place of its x."""
    given = arguments(node)
    groups, size = given["keys"].meta["val"].shape[::2]
    if not _is(source.meta["val"].shape[-2:], (groups, size)):
        source = program.call(aten.unflatten.int, source, -1, [groups, size], before=node, like=node)
    _call_with(node, x=source)


# ---- behind


@dataclass(frozen=True)
class Behind:
    """A linear layer of what the codebook gives, and numbers for one row: operations and stored elements.

    `before` and `after` count additions and multiplications.
    """

    linear: WeightOperator
    before: int
    after: int
    held: int
    table: int


def fold_back(program: Program, node: Node) -> str | NoMatch:
    """The linear layer behind becomes part of the values: what that saves; "" when there is no such layer."""
    found = _linear_behind(program, node)
    if not isinstance(found, Behind):
        return "" if found is None else found
    given, linear = arguments(node), found.linear
    width = given["values"].meta["val"].element_size()
    if found.after >= found.before:
        return fail(f"a table would take {found.after:,} operations a row, not {found.before:,}", node)
    if found.table * width > GROWTH * found.held * width + _FREE:
        return fail(f"a table would take {_mib(found.table * width)}, in place of {_mib(found.held * width)}", node)
    if reason := _misfit(program, node, linear):
        return fail(reason, node)
    table = _table(program, node, linear)
    name = f"{program.module_path(linear.node) or linear.node.name}.table"
    dtype = linear.weight.meta["val"].dtype
    constant = program.add_constant(name, table, dtype=dtype, before=node, like=linear.node)
    if (fold := program.folds.get(str(linear.weight.target))) is not None:
        # What an adapter put into the weight must survive the rounding of the table.
        base = _table(program, node, linear, fold.base.value().double())
        program.folds[str(constant.target)] = replace(fold, base=Recipe(base))
    operands = [given["x"], given["keys"], constant, *([] if given["bias"] is None else [given["bias"]])]
    new = program.call(KERNEL.op, *operands, before=node, like=node, k=given["k"], joint=True)
    program.replace(linear.node, new)
    return (
        f"values and {program.module_path(linear.node) or linear.node.name}: {found.after:,} operations a row in place "
        f"of {found.before:,}, {_mib(found.table * width)} in place of {_mib(found.held * width)}"
    )


def _linear_behind(program: Program, node: Node) -> Behind | NoMatch | None:
    given = arguments(node)
    groups, codes, size = (int(count) for count in given["values"].meta["val"].shape)
    cursor, columns = node, size if given["joint"] else groups * size
    while True:
        if len(cursor.users) != 1:
            return None
        user = next(iter(cursor.users))
        if user.op != "call_function" or user.target not in RESHAPES:
            break
        cursor = user
    linear = weight_operator(user) if user.op == "call_function" else None
    if not isinstance(linear, WeightOperator) or linear.kind not in ("linear", "matmul") or linear.input is not cursor:
        return None
    problem = constant_problem(program, linear)
    if problem is not None:
        return fail(problem.reason, node)
    lead = given["x"].meta["val"].shape[:-2]
    wanted = [*map(str, lead), str(linear.out_features)]
    if list(map(str, linear.node.meta["val"].shape)) != wanted or linear.in_features != columns:
        return fail(f"{user.name} does not read each row's entries as one row", node)
    k, out = given["k"], linear.out_features
    # Of a table made of a table, the groups are one.
    before = groups * k * size + 2 * columns * out + (0 if linear.bias is None else out)
    freed = program.readers(given["values"]) == {node} and given["values"].target != given["keys"].target
    held = groups * codes * size * freed + columns * out * (program.readers(linear.weight) == {linear.node})
    return Behind(linear, before, groups * k * out, held, groups * codes * out)


def _misfit(program: Program, node: Node, linear: WeightOperator) -> str | None:
    values, weight, x = (item.meta["val"] for item in (arguments(node)["values"], linear.weight, arguments(node)["x"]))
    if not x.dtype == values.dtype == weight.dtype or linear.node.meta["val"].dtype != x.dtype:
        return "its operands differ in dtype"
    if linear.bias is not None and linear.bias.meta["val"].shape != (linear.out_features,):
        return "the bias behind is not one number per output"
    largest = _table(program, node, linear).abs().max()
    return f"the table would overflow {weight.dtype}" if float(largest) > torch.finfo(weight.dtype).max else None


def _table(program: Program, node: Node, linear: WeightOperator, weight: Tensor | None = None) -> Tensor:
    """[G, K, out] in float64; the bias is shared out, since k entries of each group are added up."""
    given = arguments(node)
    values, bias = program.constant64(given["values"]), program.constant64(linear.bias)
    weight = program.constant64(linear.weight) if weight is None else weight
    assert values is not None and weight is not None
    canonical = weight.T if linear.kind == "matmul" else weight
    columns = canonical.reshape(linear.out_features, 1 if given["joint"] else values.shape[0], values.shape[2])
    table = torch.einsum("gke,oge->gko", values, columns.expand(-1, values.shape[0], -1))
    return table if bias is None else table + bias / (given["k"] * values.shape[0])


def _mib(size: int) -> str:
    return f"{size / 2**20:.3g} MiB"
