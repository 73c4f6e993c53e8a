"""Sound bounds on every value of a program, over the ranges its plan declares for the inputs.

Interval arithmetic: each value is a pair of float64 tensors, element by element, between which it lies for all inputs
in their ranges. The graph is gone through once, with one row for the symbolic dim that leads the inputs. Bounds of one
row hold for all rows: what would make them depend on how many there are (a sum over rows, a count of rows in a product,
rows of several values one after the other) widens to what holds for any number, or is unbounded. So is whatever depends
on another symbolic dim, and the result of any operator that is not listed here.

Source: Moore, Kearfott and Cloud, Introduction to Interval Analysis (2009); for networks, Gowal et al., "On the
effectiveness of interval bound propagation" (arXiv 1810.12715).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.constants import lift
from fxfreeze.dataflow import ADAPTIVE_POOLS, AVERAGE_POOLS, MAX_POOLS
from fxfreeze.program import Program, TensorSpec, is_random, lifted_call

from ._gates import GATE
from ._operators import FORMS, arguments

aten = torch.ops.aten

OUTWARD = 1e-9
"""How much wider an operator makes its result than arithmetic without rounding would, relative to the bound."""
_LARGEST = torch.finfo(torch.float64).max


@dataclass(frozen=True, eq=False)
class Interval:
    """``low ≤ value ≤ high``, float64 tensors of the value's shape with one row; the same object for a constant.

    `terms` is what the terms of a product with a weight may add up to without their signs: its rounding is theirs.
    """

    low: Tensor
    high: Tensor
    terms: Tensor | None = None

    @property
    def exact(self) -> bool:
        return self.low is self.high

    @property
    def magnitude(self) -> Tensor:
        return torch.maximum(self.low.abs(), self.high.abs())


Rule = Callable[[Node, dict[str, Any]], Any]
"""The operator's node and its arguments by name, tensors as intervals, to the interval of its result."""


def intervals(program: Program, *, rounding: bool = False) -> dict[Node, Interval]:
    """Bounds of every input and every result of an operator, where its shape is known apart from the number of rows.

    A value that is not in it may be anything, of any size. Bounds are infinite, never NaN, where none are known.

    Args:
        program: stays as it is.
        rounding: let the bounds hold for a run in the storage dtypes too, with what its operators usually round away.
    """
    return {
        node: item for node, item in Bounds(program, rounding=rounding).found().items() if isinstance(item, Interval)
    }


@dataclass(frozen=True)
class _Source:
    """What an interval was computed from, apart from the intervals of operands."""

    call: tuple[Any, ...]
    value: Any

    @classmethod
    def of(cls, program: Program, node: Node) -> _Source:
        names = [str(item.target) for item in node.all_input_nodes if item.op == "get_attr"]
        constants = tuple(program.state.identity(name) for name in names if name in program.state)
        return cls((node.target, node.args, dict(node.kwargs), constants), node.meta.get("val"))

    def same(self, other: _Source) -> bool:
        return self.value is other.value and self.call == other.call


class Bounds:
    """:func:`intervals` on demand, of a program that is rewritten meanwhile: what the node that was asked for hangs on
    is computed, and again only where a rewrite changed it, or what it hangs on."""

    def __init__(self, program: Program, *, rounding: bool = False) -> None:
        self.program, self.rounding = program, rounding
        self._known: dict[Node, tuple[_Source, Any]] = {}

    def of(self, node: Node) -> Interval | None:
        """Bounds of a value, None where it may be anything."""
        found = self.found(node).get(node)
        return found if isinstance(found, Interval) else None

    @torch.no_grad()
    def found(self, last: Node | None = None) -> dict[Node, Any]:
        """What is known of `last`, or of every node, and of what it hangs on: an interval, several, or None."""
        program, fresh = self.program, set[Node]()
        rows = {str(size.node.expr) for node in program.placeholders if node.meta["val"].ndim
                if isinstance(size := node.meta["val"].shape[0], torch.SymInt)}  # fmt: skip
        found: dict[Node, Any] = {}
        for node, spec in zip(program.placeholders, program.inputs, strict=True):
            found[node] = _declared(spec, _sizes(node, rows))
        wanted = set(program.graph.nodes) if last is None else _cone(last)
        for node in program.graph.nodes:
            if node.op == "call_function" and node in wanted:
                source, known = _Source.of(program, node), self._known.get(node)
                if known is None or not source.same(known[0]) or not fresh.isdisjoint(node.all_input_nodes):
                    self._known[node] = source, self._made(node, found, rows)
                    fresh.add(node)
                found[node] = self._known[node][1]
            if node is last:
                break
        return found

    def _made(self, node: Node, found: dict[Node, Any], rows: set[str]) -> Any:
        # A model's weights need not all be there in float64 at once.
        operands = {item: _constant(self.program, item) if item.op == "get_attr" else found.get(item)
                    for item in _read(node)}  # fmt: skip
        if node.target in NORMS:
            operands[node.args[0]] = _fitting(node.args[0], None, rows)  # type: ignore[index, arg-type]
        made = _result(node, operands, rows)
        return _with_rounding(node, made) if self.rounding and isinstance(made, Interval) else made


def _cone(last: Node) -> set[Node]:
    """The node, and all that its bounds hang on."""
    cone, stack = set[Node](), [last]
    while stack:
        node = stack.pop()
        if node not in cone:
            cone.add(node)
            stack.extend(_read(node))
    return cone


def _read(node: Node) -> list[Node]:
    """The operands that the node's bounds hang on."""
    return [item for item in node.all_input_nodes if node.target not in NORMS or item is not node.args[0]]


def _with_rounding(node: Node, made: Interval) -> Interval:
    """Wider by a few roundings of a value, or of the terms where many are added, and infinite beyond its dtype."""
    dtype = node.meta["val"].dtype
    if not dtype.is_floating_point:
        return made
    largest, eps = torch.finfo(dtype).max, torch.finfo(dtype).eps
    made = _overflowed(made, largest)
    size = made.magnitude
    if made.exact or node.target in MOVES:
        wider = made
    elif made.terms is not None:
        wider = _made(made.low, made.high, 32 * eps * made.terms)
    elif node.target in SUMMING:
        finite = size[size.isfinite()]
        wider = _made(made.low, made.high, 32 * eps * float(finite.max()) if finite.numel() else 0.0)
    else:
        size = torch.where(size.isfinite(), size, torch.minimum(made.low.abs(), made.high.abs()))
        wider = _made(made.low, made.high, torch.where(size.isfinite(), 4 * eps * size, 0.0))
    return _overflowed(wider, largest)


def _overflowed(value: Interval, largest: float) -> Interval:
    """What is beyond the largest number of a dtype is stored as an infinity."""
    above, below = value.high > largest, value.low < -largest
    if not bool(above.any() or below.any()):
        return value
    low, high = torch.where(below, -math.inf, value.low), torch.where(above, math.inf, value.high)
    return replace(value, low=low, high=high)


def _declared(spec: TensorSpec, shape: list[int] | None) -> Interval | None:
    if shape is None:
        return None
    if spec.dtype == torch.bool:
        return _filled(shape, 0.0, 1.0)
    if spec.low is None or spec.high is None or spec.dtype.is_complex:
        return _filled(shape, -math.inf, math.inf)
    # The ends as the input's dtype rounds them belong to the range too.
    ends = [float(end) for end in (spec.low, spec.high)]
    stored = [float(torch.tensor(end, dtype=spec.dtype)) for end in ends]
    return _filled(shape, min(ends[0], stored[0]), max(ends[1], stored[1]))


def _constant(program: Program, node: Node) -> Interval | None:
    value = program.constant64(node)
    if value is None or value.is_complex() or bool(value.isnan().any()):
        return None
    value = value.double().cpu()
    return Interval(value, value)


def _result(node: Node, found: dict[Node, Any], rows: set[str]) -> Any:
    """The interval of one operator's result (a tuple for several), or None where not even its shape is known."""
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt):
        return _size(value, rows)
    if isinstance(value, list | tuple):
        return _several(node, found, rows)
    if not isinstance(value, Tensor):
        return value if isinstance(value, int | float) else None
    if getattr(node.target, "__name__", "") == "getitem":
        parts, at = found.get(node.args[0]), node.args[1]  # type: ignore[arg-type]
        return _fitting(node, parts[at] if isinstance(parts, tuple) else None, rows)  # type: ignore[index]
    return _fitting(node, _apply(node, found), rows)


def _fitting(node: Node, made: Any, rows: set[str]) -> Interval | None:
    """`made` where it has the shape that the trace says, else no bounds at all."""
    shape = _sizes(node, rows)
    if shape is None or 0 in shape:
        return None
    if isinstance(made, Interval) and list(made.low.shape) == shape == list(made.high.shape):
        dtype = node.meta["val"].dtype
        whole = not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
        return _wrapped(made, dtype) if whole and not made.exact else made
    return _filled(shape, *((0.0, 1.0) if node.meta["val"].dtype == torch.bool else (-math.inf, math.inf)))


def _wrapped(made: Interval, dtype: torch.dtype) -> Interval:
    """Of an integer: where it may leave its dtype's range it comes back in at the other end, and may be anything."""
    range_ = torch.iinfo(dtype)
    low, high = made.low.ceil(), made.high.floor()
    leaves = (low <= range_.min - 1.0) | (high >= range_.max + 1.0)
    return Interval(torch.where(leaves, float(range_.min), low), torch.where(leaves, float(range_.max), high))


def _apply(node: Node, found: dict[Node, Any]) -> Any:
    """What the operator's rule makes of its operands; None where there is no rule, or an operand is not known."""
    known = all(found.get(item) is not None for item in node.all_input_nodes)
    counted = any(isinstance(item.meta.get("val"), torch.SymInt) for item in node.all_input_nodes)
    if not isinstance(node.target, torch._ops.OpOverload) or not known or (counted and node.target not in MOVES):
        return None  # a number of rows would be taken for 1
    operands = [found[item] for item in node.all_input_nodes]
    constant = bool(operands) and all(isinstance(item, Interval) and item.exact for item in operands)
    rule = RULES.get(node.target)
    try:
        if constant and not is_random(node):
            return _computed(node, found)
        return rule and rule(node, torch.fx.map_arg(arguments(node), found.__getitem__))
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None  # it does not take one row, or not in float64


def _computed(node: Node, found: dict[Node, Any]) -> Interval | None:
    """Of constants alone."""
    args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), lambda item: found[item].low)
    value = lift(lifted_call(node, args, kwargs))
    if value.is_complex() or bool(value.isnan().any()):
        return None
    value = value.double()
    return Interval(value, value)


def _several(node: Node, found: dict[Node, Any], rows: set[str]) -> tuple[Any, ...] | None:
    """Of an operator with several results: the first of a maximum with indices, the pieces of what is cut up."""
    rule = PIECES.get(node.target)
    if rule is None or any(found.get(item) is None for item in node.all_input_nodes):
        return None
    try:
        return rule(node, torch.fx.map_arg(arguments(node), found.__getitem__))
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None


def _sizes(node: Node, rows: set[str]) -> list[int] | None:
    sizes = [_size(size, rows) for size in node.meta["val"].shape]
    return None if None in sizes else sizes  # type: ignore[return-value]


def _size(size: Any, rows: set[str]) -> int | None:
    """A size with one row; None where it depends on another symbolic dim."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    expression = expression.subs({symbol: 1 for symbol in expression.free_symbols if str(symbol) in rows})
    return int(expression) if expression.is_Integer else None


def _filled(shape: list[int], low: float, high: float) -> Interval:
    ends = (torch.tensor(end, dtype=torch.float64).expand(shape) for end in (low, high))
    return Interval(*ends)


# ---- arithmetic


def _made(low: Tensor, high: Tensor, slack: Tensor | float = 0.0) -> Interval:
    """Widened a little; where rounding left a NaN nothing is known."""
    low, high = low - low.abs() * OUTWARD - slack, high + high.abs() * OUTWARD + slack
    low = torch.nan_to_num(low, nan=-math.inf, posinf=_LARGEST, neginf=-math.inf)
    return Interval(low, torch.nan_to_num(high, nan=math.inf, posinf=math.inf, neginf=-_LARGEST))


def _as(value: Any) -> Interval:
    """A number as an interval."""
    if isinstance(value, Interval):
        return value
    if type(value) not in (int, float):
        raise TypeError(f"{type(value).__name__} is no number")
    number = torch.tensor(value, dtype=torch.float64)
    return Interval(number, number)


def plus(left: Interval, right: Interval) -> Interval:
    slack = (left.magnitude + right.magnitude) * 1e-15  # where they cancel, the sum says nothing about its rounding
    return _made(left.low + right.low, left.high + right.high, torch.nan_to_num(slack, posinf=0.0))


def negative(value: Interval) -> Interval:
    return Interval(-value.high, -value.low)


def times(left: Interval, right: Interval) -> Interval:
    # 0 · ∞ is 0: an infinite bound stands for numbers without limit, not for infinity.
    ends = [(a * b).nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
            for a in (left.low, left.high) for b in (right.low, right.high)]  # fmt: skip
    stacked = torch.stack(torch.broadcast_tensors(*ends))
    return _made(stacked.amin(0), stacked.amax(0))


def inverse(value: Interval) -> Interval:
    apart = (value.low > 0) | (value.high < 0)
    low = torch.where(apart, 1 / value.high, -math.inf)
    return _made(low, torch.where(apart, 1 / value.low, math.inf))


def union(left: Interval, right: Interval) -> Interval:
    return Interval(torch.minimum(left.low, right.low), torch.maximum(left.high, right.high))


def magnitude(value: Interval) -> Interval:
    spans = (value.low <= 0) & (value.high >= 0)
    return Interval(torch.where(spans, 0.0, torch.minimum(value.low.abs(), value.high.abs())), value.magnitude)


def square(value: Interval) -> Interval:
    size = magnitude(value)
    return _made(size.low.square(), size.high.square())


def weighted(product: Callable[[Tensor, Tensor], Tensor], value: Interval, weight: Tensor) -> Interval:
    """Of a product that is linear in both: each weight meets the end that its sign asks for.

    w · x is w · centre ± |w| · radius, which takes one product for either part.
    """
    low, high = (torch.where(end.isinf(), 0.0, end) for end in (value.low, value.high))
    size = weight.abs()
    product = _sparing(product, bool(size.sum().isfinite()))
    centre, radius = product(low / 2 + high / 2, weight), product(high / 2 - low / 2, size)
    above, below = centre + radius, centre - radius
    terms = product(torch.maximum(low.abs(), high.abs()), size)
    if not bool(value.low.isfinite().all() and value.high.isfinite().all()):
        endless, bottomless = value.high.isinf().double(), value.low.isinf().double()
        rises, falls = (weight > 0).double(), (weight < 0).double()
        above = torch.where(product(endless, rises) + product(bottomless, falls) > 0, math.inf, above)
        below = torch.where(product(bottomless, rises) + product(endless, falls) > 0, -math.inf, below)
    return replace(_made(below, above, terms * 1e-12), terms=terms)


def _sparing(product: Callable[[Tensor, Tensor], Tensor], finite: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """`product`, which is not computed where its first operand is 0 everywhere: what has no bounds has many such parts.

    Args:
        finite: the weights are.
    """

    def found(x: Tensor, weight: Tensor) -> Tensor:
        if not finite or bool(x.any()):
            return product(x, weight)
        return x.new_zeros(product(x.to("meta"), weight.to("meta")).shape)

    return found


# ---- rules


def _linear(node: Node, given: dict[str, Any]) -> Interval | None:
    """An operator with a constant weight; the operand it multiplies may stand on either side of a matrix product."""
    form = FORMS[node.target]
    value, weight, bias = given[form.input], given[form.weight], given[form.bias] if form.bias else None
    if given.get("alpha", 1) != 1 or given.get("beta", 1) != 1:
        return None
    names = arguments(node)
    if form.kind in ("conv", "transposed") and not _static(names[form.input], 0):
        return None  # rows lie where the window slides
    rest = {key: item for key, item in given.items() if key not in (form.input, form.weight, form.bias)}

    def product(x: Tensor, w: Tensor) -> Tensor:
        if form.kind == "matmul":
            return torch.matmul(x, w)
        named = {form.input: x, form.weight: w, **rest}
        return node.target(*(named.get(item.name) for item in node.target._schema.arguments))  # type: ignore

    if weight.exact:
        made = weighted(product, value, weight.low)
    elif value.exact and form.kind == "matmul":
        made = weighted(lambda x, w: product(w, x), weight, value.low)
    else:
        return None
    if bias is None:
        return made
    if form.kind in ("conv", "transposed"):
        bias = _along(bias, weight)  # not by the result's dims: without a batch it has one less
    added = torch.where(bias.magnitude.isfinite(), bias.magnitude, 0.0)
    return replace(plus(made, bias), terms=None if made.terms is None else made.terms + added)


def _embedding(node: Node, given: dict[str, Any]) -> Interval | None:
    table, rows = given["weight"], given["indices"]
    if not table.exact:
        return None
    first, last = float(rows.low.min()), float(rows.high.max())
    count = table.low.shape[0]
    start, stop = (int(first) if math.isfinite(first) else 0, int(last) if math.isfinite(last) else count)
    chosen = table.low[max(start, 0) : stop + 1]
    shape = [*rows.low.shape, table.low.shape[1]]
    return Interval(chosen.amin(0).expand(shape), chosen.amax(0).expand(shape))


def _sum(sign: int, swapped: bool = False) -> Rule:
    def rule(node: Node, given: dict[str, Any]) -> Interval:
        left, right = _as(given["self"]), _as(given["other"])
        if swapped:
            left, right = right, left
        return plus(left, times(_as(sign * given.get("alpha", 1)), right))

    return rule


def _product(node: Node, given: dict[str, Any]) -> Interval:
    left, right = _as(given["self"]), _as(given["other"])
    return square(left) if left is right else times(left, right)


def _quotient(node: Node, given: dict[str, Any]) -> Interval:
    return times(_as(given["self"]), inverse(_as(given["other"])))


def _power(node: Node, given: dict[str, Any]) -> Interval | None:
    return square(given["self"]) if given["exponent"] == 2 else None


def _rising(node: Node, given: dict[str, Any]) -> Interval:
    """Of an operator that grows with each element of its operands; the rest are numbers."""

    def at(end: str) -> Tensor:
        pick = lambda item: getattr(item, end) if isinstance(item, Interval) else item  # noqa: E731
        schema = node.target._schema.arguments  # type: ignore[union-attr]
        plain = {item.name: _each(given[item.name], pick) for item in schema}
        positional = [plain[item.name] for item in schema if not item.kwarg_only]
        return node.target(*positional, **{item.name: plain[item.name] for item in schema if item.kwarg_only})  # type: ignore

    return _made(at("low"), at("high"))


def _each(value: Any, pick: Callable[[Any], Any]) -> Any:
    return [pick(item) for item in value] if isinstance(value, list | tuple) else pick(value)


def _leaky(node: Node, given: dict[str, Any]) -> Interval | None:
    return _rising(node, given) if given["negative_slope"] >= 0 else None


def _prelu(node: Node, given: dict[str, Any]) -> Interval:
    value, weight = given["self"], given["weight"]
    if weight.low.numel() > 1:
        along = [1, -1, *[1] * (value.low.ndim - 2)]
        weight = Interval(weight.low.reshape(along), weight.high.reshape(along))
    above, below = (Interval(clip(value.low), clip(value.high))
                    for clip in (lambda t: t.clamp(min=0), lambda t: t.clamp(max=0)))  # fmt: skip
    return plus(above, times(weight, below))


def _softplus(node: Node, given: dict[str, Any]) -> Interval | None:
    """log(1 + exp(βx)) / β as far as βx ≤ its threshold, and x from there on: there it falls to x."""
    beta, threshold = float(given["beta"]), float(given["threshold"])
    if beta <= 0:
        return None
    made, value, room = _rising(node, given), given["self"], 1e-2 * (1 + abs(threshold))  # rounding may decide
    across = (value.low * beta <= threshold + room) & (value.high * beta >= threshold - room)
    top = math.log1p(math.exp(-abs(threshold))) + max(threshold, 0.0)
    low = torch.where(across, made.low.clamp(max=threshold / beta), made.low)
    return _made(low, torch.where(across, made.high.clamp(min=top / beta), made.high))


def _clamp(node: Node, given: dict[str, Any]) -> Interval | None:
    numbers = [given.get(name) for name in ("min", "max")]
    return _rising(node, given) if all(type(item) in (int, float, type(None)) for item in numbers) else None


def _positive(node: Node, given: dict[str, Any]) -> Interval | None:
    """Of an operator that grows, but where its operand is negative has no value."""
    return _rising(node, given) if bool((given["self"].low >= 0).all()) else None


MINIMA: dict[Any, float] = {aten.gelu.default: -0.75179, aten.silu.default: -1.27846, aten.mish.default: -1.19243,
          aten.hardswish.default: -1.5}  # fmt: skip
"""Operators that fall up to here, and grow from here on; to 1e-5 (gelu's tanh form: −0.75246)."""


def _valley(node: Node, given: dict[str, Any]) -> Interval:
    value, options = given["self"], {"approximate": given["approximate"]} if "approximate" in given else {}
    bottom = torch.tensor(MINIMA[node.target], dtype=torch.float64)
    # Far out on the left they are 0 to all digits; at −∞ itself they are NaN.
    ends = (value.low.clamp(min=-1e4), value.high.clamp(min=-1e4), bottom)
    left, right, lowest = (node.target(end, **options) for end in ends)  # type: ignore[operator]
    across = (value.low <= bottom + 1e-3) & (value.high >= bottom - 1e-3)
    low = torch.where(across, lowest - 1e-6, torch.minimum(left, right))
    return _made(low, torch.maximum(left, right), 1e-12)


def _within(low: float, high: float) -> Rule:
    return lambda node, given: _filled(list(given["self"].low.shape), low, high)


def _batch_norm(node: Node, given: dict[str, Any]) -> Interval | None:
    """(x − mean) / √(var + ε) · weight + bias, along dim 1."""
    mean, variance = given["running_mean"], given["running_var"]
    if given["training"] or mean is None or variance is None or not (mean.exact and variance.exact):
        return None
    centred = plus(given["input"], negative(_along(mean, given["input"])))
    scale = torch.rsqrt(variance.low + given["eps"])
    return _affine(times(centred, _along(Interval(scale, scale), centred)), given["weight"], given["bias"], _along)


def _along(vector: Interval, value: Interval) -> Interval:
    """A number per channel, shaped to meet channels that have as many dims behind them as dim 1 of `value` has."""
    shape = [-1, *[1] * (value.low.ndim - 2)]
    return Interval(vector.low.reshape(shape), vector.high.reshape(shape))


def _affine(value: Interval, weight: Any, bias: Any, shaped: Callable[[Interval, Interval], Interval]) -> Interval:
    value = value if weight is None else times(value, shaped(weight, value))
    return value if bias is None else plus(value, shaped(bias, value))


def _layer_norm(node: Node, given: dict[str, Any]) -> Interval:
    """n values of mean 0 and mean square 1 are within ±√(n − 1); ε makes them smaller."""
    bound = math.sqrt(math.prod(given["normalized_shape"]) - 1) * (1 + OUTWARD)
    value = _filled(list(given["input"].low.shape), -bound, bound)
    return _affine(value, given["weight"], given["bias"], lambda vector, _: vector)


def _rms_norm(node: Node, given: dict[str, Any]) -> Interval:
    bound = math.sqrt(math.prod(given["normalized_shape"])) * (1 + OUTWARD)
    value = _filled(list(given["input"].low.shape), -bound, bound)
    return _affine(value, given["weight"], None, lambda vector, _: vector)


def _pool(node: Node, given: dict[str, Any]) -> Interval | None:
    falls = (given.get("divisor_override") or 1) < 0
    return _rising(node, given) if _static(node.args[0], 0) and not falls else None


def _total(node: Node, given: dict[str, Any]) -> Interval | None:
    """A sum, unless it runs over rows."""
    shape = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    dims = given["dim"] or range(len(shape))
    if not all(isinstance(shape[dim], int) for dim in dims):
        return None
    made = _rising(node, given)
    slack = torch.where(made.low.isfinite() & made.high.isfinite(), _reduced(node, given).nan_to_num(posinf=0.0), 0.0)
    return _made(made.low, made.high, slack * 1e-12)


def _reduced(node: Node, given: dict[str, Any]) -> Tensor:
    size = given["self"].magnitude
    return _rising(node, {**given, "self": Interval(size, size)}).high


def _union(node: Node, given: dict[str, Any]) -> Interval:
    """Either of two values, by a condition."""
    mask, other = ("condition", "other") if "condition" in given else ("mask", "value")
    made = union(_as(given["self"]), _as(given[other]))
    shape = torch.broadcast_shapes(made.low.shape, given[mask].low.shape)
    return Interval(made.low.expand(shape), made.high.expand(shape))


def _same(node: Node, given: dict[str, Any]) -> Interval | None:
    """A cast to another floating dtype, a copy, a dropout that does nothing."""
    value = next(iter(given.values()))
    before, after = node.args[0].meta["val"].dtype, node.meta["val"].dtype  # type: ignore[union-attr]
    kept = after == before or after.is_floating_point
    return value if kept and not given.get("train", False) else None


def _gate(node: Node, given: dict[str, Any]) -> Interval:
    """0, or gain times what is above the threshold; a soft gate gives anything between 0 and gain times h."""
    h, level, gain = given["h"], given["threshold"], given["gain"]
    level, gain = (_per_neuron(node, item, given) for item in (level, gain))
    if given["temperature"] is not None:
        return union(_as(0.0), h if gain is None else times(h, gain))
    score = h if given["score"] == "h" else magnitude(h)
    opens, shuts = score.high > level.low, score.low <= level.high
    above = h if given["score"] == "abs" else Interval(torch.maximum(h.low, level.low), h.high)
    above = above if gain is None else times(above, gain)
    low = torch.where(shuts, above.low.clamp(max=0), above.low)
    high = torch.where(shuts, above.high.clamp(min=0), above.high)
    return Interval(torch.where(opens, low, 0.0), torch.where(opens, high, 0.0))


def _per_neuron(node: Node, values: Interval | None, given: dict[str, Any]) -> Any:
    """Thresholds or gains shaped to meet h; from the smallest to the largest of all modes."""
    if values is None:
        return None
    low, high = values.low, values.high
    if given["mode"] is not None:
        low, high = low.amin(0), high.amax(0)
    shape = [1] * given["h"].low.ndim
    shape[given["dim"]] = -1
    return Interval(low.reshape(shape), high.reshape(shape))


# ---- moves


def _static(node: Any, but: int | None) -> bool:
    """Whether all dims of a value but dim `but` are numbers."""
    return all(isinstance(size, int) for at, size in enumerate(node.meta["val"].shape) if at != but)


def _move(node: Node, given: dict[str, Any]) -> Interval:
    """Each end goes where the operator moves it."""
    return Interval(*(node.target(*_positional(node, given, end)) for end in ("low", "high")))  # type: ignore


def _positional(node: Node, given: dict[str, Any], end: str) -> list[Any]:
    pick = lambda item: getattr(item, end) if isinstance(item, Interval) else item  # noqa: E731
    return [_each(given[item.name], pick) for item in node.target._schema.arguments if not item.kwarg_only]  # type: ignore


def _reshape(node: Node, given: dict[str, Any]) -> Interval:
    """Rows that lead stay rows of the same kind; elsewhere a size that grows would mix what lies beside it."""
    moved = _move(node, given)
    if _static(node.args[0], 0) and _static(node, 0):
        return moved
    return Interval(moved.low.min().expand(moved.low.shape), moved.high.max().expand(moved.high.shape))


def _cut(node: Node, given: dict[str, Any]) -> Interval | None:
    """A part of a value; of rows it may be any."""
    value, dim, source = given["self"], given["dim"], node.args[0]
    if node.all_input_nodes != [source]:
        return None  # as many as there are rows
    if isinstance(source.meta["val"].shape[dim], int) or _is_whole(node, given):  # type: ignore[union-attr]
        return _move(node, given)
    ends = value.low.amin(dim, keepdim=True), value.high.amax(dim, keepdim=True)
    return _move(node, {**given, "self": Interval(*(end.expand_as(value.low) for end in ends))})


def _is_whole(node: Node, given: dict[str, Any]) -> bool:
    ends = given.get("start"), given.get("end")
    return node.target is aten.slice.Tensor and ends in ((0, 2**63 - 1), (None, None)) and given["step"] == 1


def _joined(node: Node, given: dict[str, Any]) -> Interval:
    """Values one after the other; where those are rows, any row may be any of them."""
    made = _move(node, given)
    dim = given["dim"]
    if node.target is aten.cat.default and not isinstance(node.meta["val"].shape[dim], int):
        ends = made.low.amin(dim, keepdim=True), made.high.amax(dim, keepdim=True)
        return Interval(ends[0].expand_as(made.low), ends[1].expand_as(made.high))
    return made


def _extremum(node: Node, given: dict[str, Any]) -> tuple[Any, ...]:
    ends = [node.target(*_positional(node, given, end))[0] for end in ("low", "high")]  # type: ignore
    return _made(*ends), None


def _adaptive_maximum(node: Node, given: dict[str, Any]) -> tuple[Any, ...] | None:
    return _extremum(node, given) if _static(node.args[0], 0) else None


def _pieces(node: Node, given: dict[str, Any]) -> tuple[Any, ...] | None:
    if not isinstance(node.args[0].meta["val"].shape[given["dim"]], int):  # type: ignore[union-attr]
        return None
    ends = [node.target(*_positional(node, given, end)) for end in ("low", "high")]  # type: ignore
    return tuple(Interval(low, high) for low, high in zip(*ends, strict=True))


MOVES: dict[Any, Rule] = {
    **dict.fromkeys((aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int), _reshape),
    **dict.fromkeys((aten.permute.default, aten.transpose.int, aten.t.default, aten.numpy_T.default,
                     aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default), _move),
    **dict.fromkeys((aten.slice.Tensor, aten.select.int), _cut),
}  # fmt: skip
"""Operators that move values about, and to which a number of rows may be an argument."""

PIECES: dict[Any, Rule] = {
    **dict.fromkeys((aten.max.dim, aten.min.dim), _extremum),
    **dict.fromkeys((aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default), _adaptive_maximum),
    **dict.fromkeys((aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int), _pieces),
}

RULES: dict[Any, Rule] = {
    **MOVES,
    **dict.fromkeys(FORMS, _linear),
    aten.bmm.default: lambda node, given: _matrices(given["self"], given["mat2"]),
    aten.embedding.default: _embedding,
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), _sum(1)),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), _sum(-1)),
    **dict.fromkeys((aten.rsub.Tensor, aten.rsub.Scalar), _sum(-1, swapped=True)),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _product),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), _quotient),
    aten.neg.default: lambda node, given: negative(given["self"]),
    aten.abs.default: lambda node, given: magnitude(given["self"]),
    aten.square.default: lambda node, given: square(given["self"]),
    aten.pow.Tensor_Scalar: _power,
    **dict.fromkeys(
        (aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.sigmoid.default, aten.hardsigmoid.default,
         aten.tanh.default, aten.exp.default, aten.maximum.default, aten.minimum.default,
         aten.mean.dim, aten.mean.default, aten.amax.default, aten.amin.default, aten.max.default, aten.min.default),
        _rising,
    ),
    aten.leaky_relu.default: _leaky,
    aten.prelu.default: _prelu,
    aten.softplus.default: _softplus,
    **dict.fromkeys((aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default), _clamp),
    aten.sqrt.default: _positive,
    **dict.fromkeys(MINIMA, _valley),
    **dict.fromkeys((aten.softmax.int, aten._softmax.default, aten.special_softmax.default), _within(0.0, 1.0)),
    aten.batch_norm.default: _batch_norm,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    **dict.fromkeys((*MAX_POOLS, *AVERAGE_POOLS, *ADAPTIVE_POOLS), _pool),
    **dict.fromkeys((aten.sum.dim_IntList,), _total),
    **dict.fromkeys((aten.cat.default, aten.stack.default), _joined),
    **dict.fromkeys((aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.masked_fill.Scalar), _union),
    **dict.fromkeys((aten.to.dtype, aten._to_copy.default, aten.clone.default, aten.contiguous.default,
                     aten.detach.default, aten.alias.default, aten.dropout.default), _same),
    GATE: _gate,
}  # fmt: skip


NORMS = frozenset({aten.layer_norm.default, aten.rms_norm.default})
"""Operators whose result has the same bounds whatever their first operand is."""
SUMMING = frozenset(AVERAGE_POOLS) | frozenset(ADAPTIVE_POOLS) | {
    aten.sum.dim_IntList, aten.mean.dim, aten.mean.default, *NORMS,
}  # fmt: skip
"""Operators without a weight that add many terms: their rounding may be that of the largest, not of the result."""


def _matrices(left: Interval, right: Interval) -> Interval | None:
    if right.exact:
        return weighted(torch.bmm, left, right.low)
    return weighted(lambda x, w: torch.bmm(w, x), right, left.low) if left.exact else None
