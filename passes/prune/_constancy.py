"""What is known of values whatever the inputs are: which of their entries are one and the same number.

A value is described by a float64 tensor of as many dims: along each it has as many entries as the value, or one for
all; of a symbolic size, as many as are counted in it (heads, of batch × heads). NaN: not known. What an operator does
is done to the description, so that a channel that is 0, or the bias of a row of zeros, is followed as far as it stays
one number. Only through continuous functions: what jumps may fall to the other side in the dtype a model is stored in.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from fxfreeze.constants import lift
from fxfreeze.coupling import COPIES, Coupling, op_name, spatial_dims
from fxfreeze.dataflow import reshape_blocks, tensors
from fxfreeze.program import Program, lifted_call

from .._operators import WeightOperator, apply, arguments, weight_operator

LIMIT = 1 << 20
"""Descriptions of more numbers than this are forgotten."""

CONTINUOUS = (COPIES - {"masked_fill", "where", "zeros_like", "ones_like", "full_like", "empty_like"}) | {
    "relu", "relu6", "hardtanh", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus", "hardsigmoid",
    "sigmoid", "tanh", "erf", "softshrink", "add", "sub", "mul", "div", "neg", "abs", "exp", "expm1", "log", "log1p",
    "sqrt", "rsqrt", "reciprocal", "square", "pow", "clamp", "clamp_min", "clamp_max", "maximum", "minimum", "sin",
    "cos", "atan", "lerp", "addcmul", "addcdiv", "prelu",
}  # fmt: skip
PRODUCTS = frozenset({"mul", "multiply"})


class Known:
    """Of every value of a program, its description; None: nothing is known of it.

    Attributes:
        made: operators with a constant weight.
        columns: of these, where a weight has zeros, which of its numbers are none: bool [out, in / groups], of its
            window any.
    """

    def __init__(self, program: Program, found: Coupling) -> None:
        self.program, self.found = program, found
        self.described: dict[Node, Any] = {}
        self.made: dict[Node, WeightOperator] = {}
        self.columns: dict[Node, Tensor] = {}
        with torch.no_grad():
            for node in program.graph.nodes:
                if node.op == "call_function":
                    self.described[node] = self._visit(node)

    def of(self, node: Any) -> Tensor | None:
        """The description of a tensor."""
        if not isinstance(node, Node):
            return None
        if node.op == "get_attr" and node not in self.described:
            value = node.meta["val"]
            small = isinstance(value, Tensor) and value.is_floating_point() and math.prod(value.shape) <= LIMIT
            self.described[node] = lift(self.program.state[str(node.target)]).cpu() if small else None
        return self.described.get(node)

    def along(self, node: Node, dim: int) -> Tensor:
        """Of every entry along a dim of a value, the number that all of it is, or NaN: [counted in the dim]."""
        size = self.counts(node)[dim]
        known = self.of(node)
        if known is None:
            return torch.full((size,), math.nan, dtype=torch.float64)
        flat = known.movedim(dim, 0).reshape(known.shape[dim], -1)
        same = (flat == flat[:, :1]).all(1)
        return torch.where(same, flat[:, 0], math.nan).expand(size)

    def counts(self, node: Node) -> list[int]:
        """Sizes of a value's dims, as descriptions have them."""
        dims = self.found.dims.get(node)
        if dims is None or isinstance(node.meta["val"], list | tuple):
            return [int(size) for size in node.meta["val"].shape]  # a constant
        return [self.found.axes.count(axis) for axis in dims]

    def weight(self, made: WeightOperator) -> Tensor | None:
        """The canonical weight [out, in / groups, *kernel]."""
        value = self.program.constant(made.weight)
        if value is None:
            value = self.of(made.weight)
            if value is None or value.isnan().any() or list(value.shape) != self.counts(made.weight):
                return None
        return apply(made.to_canonical(), value.detach().cpu())

    def multiplied(self, node: Node, entries: Tensor, over: int) -> Tensor:
        """Whether an operator multiplies any of some entries by something: bool, without the dim `over`.

        Args:
            entries: bool, that broadcasts to the weight as [groups, out / groups, in / groups].
        """
        made = self.made[node]
        sizes = [made.groups, made.out_features // made.groups, made.shape[1]]
        if (used := self.columns.get(node)) is not None:
            entries = used.reshape(sizes) & entries
        del sizes[over]
        return entries.any(over).expand(sizes)

    # ---- one operator

    def _visit(self, node: Node) -> Any:
        value = node.meta["val"]
        if node.target is operator.getitem:
            parts = self.described.get(node.args[0])  # type: ignore[arg-type]
            return parts[node.args[1]] if isinstance(parts, list) else None  # type: ignore[index]
        if isinstance(value, Tensor) and not value.is_floating_point():
            return None
        made = weight_operator(node)
        if (
            isinstance(made, WeightOperator)
            and made.kind != "embedding"
            and isinstance(made.groups, int)
            and (weight := self.weight(made)) is not None
        ):
            self.made[node] = made
            return _response(self, node, made, weight)
        name = op_name(node)
        rule = _RULES.get(name) or (_pointwise if name in CONTINUOUS else None)
        if rule is None or not isinstance(value, Tensor | list | tuple):
            return None
        result = rule(self, node, arguments(node))
        return list(map(_tidy, result)) if isinstance(result, list) else _tidy(result)

    def reshaped(self, known: Tensor, before: Sequence[int], node: Node) -> Tensor | None:
        """What a reshape of a value with these counts makes of its description."""
        after = self.counts(node)
        operand: Node = node.all_input_nodes[0]
        blocks = reshape_blocks(operand.meta["val"].shape, node.meta["val"].shape)
        if blocks is None:
            return None
        wide, narrow = list(known.shape), [1] * len(after)
        for old, new in blocks:
            if any(known.shape[at] > 1 for at in old):
                if not (self._counts_last(operand, old) and self._counts_last(node, new)):
                    return None
                for at in old:
                    wide[at] = before[at]
                for at in new:
                    narrow[at] = after[at]
        if math.prod(wide) > LIMIT or math.prod(wide) != math.prod(narrow):
            return None
        return known.expand(wide).reshape(narrow)

    def _counts_last(self, node: Node, dims: Sequence[int]) -> bool:
        """Whether, of these dims in one, what is counted varies faster than what is not."""
        sizes, counts, counting = node.meta["val"].shape, self.counts(node), False
        for at in dims:
            if counting and not isinstance(sizes[at], int):
                return False
            counting = counting or counts[at] > 1
        return True


def _tidy(known: Tensor | None) -> Tensor | None:
    """None where nothing is known, or too much to be kept."""
    if known is None or known.numel() > LIMIT:
        return None
    known = torch.where(known.isfinite(), known, math.nan)
    return None if bool(known.isnan().all()) else known


def unknown(ndim: int) -> Tensor:
    """Of a value of which nothing is known, or not yet."""
    return torch.full([1] * ndim, math.nan, dtype=torch.float64)


def widened(known: Tensor, ndim: int) -> Tensor:
    """With leading dims, as operands are broadcast."""
    return known.reshape([1] * (ndim - known.ndim) + list(known.shape))


def only_zeros(known: Tensor) -> Tensor:
    return torch.where(known == 0, known, math.nan)


def _response(known: Known, node: Node, made: WeightOperator, weight: Tensor) -> Tensor | None:
    """An output feature is known where every input that its row does not multiply by 0 is."""
    if int(weight.count_nonzero()) < weight.numel():
        used = weight != 0
        known.columns[node] = used.flatten(2).any(2) if weight.ndim > 2 else used
    dim = node.meta["val"].ndim - 1 - len(made.kernel)
    source = known.along(made.input, dim)
    if made.kernel and not unpadded(node, made):
        source = only_zeros(source)
    inputs = source.reshape(made.groups, 1, -1)
    fixed = ~known.multiplied(node, inputs.isnan(), over=2).flatten()
    if not bool(fixed.any()):
        return None
    result = torch.zeros(1, dtype=torch.float64)
    if bool((inputs.nan_to_num() != 0).any()):
        result = (summed(weight).reshape(made.groups, -1, made.shape[1]) * inputs.nan_to_num()).sum(2).flatten()
    if made.bias is not None:
        bias = known.of(made.bias)
        result = result + (math.nan if bias is None else only_same(bias))
    shape = [1] * node.meta["val"].ndim
    shape[dim] = -1
    return _tidy(torch.where(fixed, result, math.nan).reshape(shape))


def summed(weight: Tensor) -> Tensor:
    """A canonical weight in float64, summed over its window: [out, in / groups]."""
    return lift(weight).flatten(2).sum(2) if weight.ndim > 2 else lift(weight)


def only_same(known: Tensor) -> Tensor:
    """Of every entry of the last dim, the number that all of it is, or NaN."""
    flat = known.reshape(-1, known.shape[-1] if known.ndim else 1)
    return torch.where((flat == flat[:1]).all(0), flat[0], math.nan)


def unpadded(node: Node, made: WeightOperator) -> bool:
    """Whether a constant channel makes the same of every window of a convolution."""
    given = arguments(node)
    padding = given["padding"]
    if made.kind == "transposed":  # windows overlap, and do not at the edges
        ones = math.prod(made.kernel) == 1 and set(given["stride"]) == {1} and not any(given["output_padding"])
        return ones and not any(padding)
    if isinstance(padding, str):
        return padding == "valid" or math.prod(made.kernel) == 1
    return not any(padding)


# ---------------------------------------------------------------------- rules

Rule = Callable[[Known, Node, dict[str, Any]], Any]
"""The description of the result of a call with these arguments, by name; a list for several."""


def _pointwise(known: Known, node: Node, given: dict[str, Any]) -> Tensor | None:
    """Computed where all operands are known; 0 times whatever is 0."""
    operands = tensors(node)
    found = {item: known.of(item) for item in operands}
    if all(value is None for value in found.values()) or given.get("rounding_mode") or given.get("train"):
        return None
    ndim = node.meta["val"].ndim
    shaped = {item: unknown(ndim) if value is None else widened(value, ndim) for item, value in found.items()}
    if op_name(node) == "prelu" and len(operands) == 2 and ndim > 1:
        slope = shaped[operands[1]]
        shaped[operands[1]] = slope.reshape([1, -1] + [1] * (ndim - 2))
        negative = torch.where(shaped[operands[0]] >= 0, 1.0, shaped[operands[1]])
        return shaped[operands[0]] * negative
    plain = {item: value.nan_to_num() for item, value in shaped.items()}
    symbolic = [item for item in node.all_input_nodes if item not in plain]
    args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), lambda item: plain.get(item, 1))
    result: Tensor = lifted_call(node, args, kwargs).cpu()
    result = torch.full_like(result, math.nan) if symbolic else result
    for value in shaped.values():
        result = torch.where(value.isnan(), math.nan, result)
    if op_name(node) in PRODUCTS:
        for value in shaped.values():
            result = torch.where(value == 0, 0.0, result)
    return result


def _carried(known: Known, node: Node, given: dict[str, Any]) -> Tensor | None:
    """The operator itself, on the description: it treats dims of one entry as those of many."""
    source = node.all_input_nodes[0]
    if (value := known.of(source)) is None or len(node.all_input_nodes) > 1:
        return None
    args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), lambda item: value if item is source else item)
    return lifted_call(node, args, kwargs)  # type: ignore[no-any-return]


def _reshaped(known: Known, node: Node, given: dict[str, Any]) -> Tensor | None:
    source = node.all_input_nodes[0]
    value = known.of(source)
    return None if value is None else known.reshaped(value, known.counts(source), node)


def _expanded(known: Known, node: Node, given: dict[str, Any]) -> Tensor | None:
    value = known.of(given["self"])
    return None if value is None else widened(value, node.meta["val"].ndim)


def _repeated(known: Known, node: Node, given: dict[str, Any]) -> Tensor | None:
    value, ndim = known.of(given["self"]), node.meta["val"].ndim
    times = list(given["repeats"] if "repeats" in given else given["dims"])
    if value is None or not all(isinstance(item, int) for item in times):
        return None
    value = widened(value, ndim)
    times = [1] * (ndim - len(times)) + times
    return value.repeat([count if size > 1 else 1 for count, size in zip(times, value.shape, strict=True)])


def _interleaved(known: Known, node: Node, given: dict[str, Any]) -> Tensor | None:
    value, dim = known.of(given["self"]), given.get("dim")
    if value is None or dim is None or not isinstance(given["repeats"], int):
        return None
    return value if value.shape[dim] == 1 else value.repeat_interleave(given["repeats"], dim)


def _cat(known: Known, node: Node, given: dict[str, Any]) -> Tensor | None:
    tensors = [item for item in given["tensors"] if list(item.meta["val"].shape) != [0]]
    found = [known.of(item) for item in tensors]
    dim, ndim = given["dim"] % node.meta["val"].ndim, node.meta["val"].ndim
    if all(value is None for value in found):
        return None
    shaped = [unknown(ndim) if value is None else value for value in found]
    if not all(isinstance(item.meta["val"].shape[dim], int) for item in tensors):
        same = [_uniform(value, (dim,)) for value in shaped]  # what is the same in all of them
        return functools.reduce(lambda one, other: torch.where(one == other, one, math.nan), same)
    others = [max(value.shape[at] for value in shaped) for at in range(ndim)]
    parts = []
    for item, value in zip(tensors, shaped, strict=True):
        size = int(item.meta["val"].shape[dim])
        parts.append(value.expand([size if at == dim else other for at, other in enumerate(others)]))
    return torch.cat(parts, dim) if sum(map(Tensor.numel, parts)) <= LIMIT else None


def _splits(known: Known, node: Node, given: dict[str, Any]) -> list[Tensor | None] | None:
    value, dim = known.of(given["self"]), given["dim"]
    if value is None:
        return None
    sizes = [part.shape[dim] for part in node.meta["val"]]
    return [*(value.split(sizes, dim) if value.shape[dim] > 1 else [value] * len(sizes))]


def _unbind(known: Known, node: Node, given: dict[str, Any]) -> list[Tensor] | None:
    value, dim = known.of(given["self"]), given["dim"]
    if value is None:
        return None
    return [*(value.unbind(dim) if value.shape[dim] > 1 else [value.squeeze(dim)] * len(node.meta["val"]))]


def _select(known: Known, node: Node, given: dict[str, Any]) -> Tensor | None:
    value, dim, index = known.of(given["self"]), given["dim"], given["index"]
    if value is None:
        return None
    if value.shape[dim] == 1:
        return value.squeeze(dim)
    return value.select(dim, index) if isinstance(index, int) else None


def _slice(known: Known, node: Node, given: dict[str, Any]) -> Tensor | None:
    value, dim = known.of(given["self"]), given["dim"]
    if value is None or value.shape[dim] == 1:
        return value
    ends = given["start"], given["end"]
    return _carried(known, node, given) if not any(isinstance(item, Node) for item in ends) else None


def _narrowed(known: Known, node: Node, given: dict[str, Any]) -> Tensor | None:
    value, dim = known.of(given["self"]), given["dim"]
    if value is None or value.shape[dim] == 1:
        return value
    return _carried(known, node, given) if isinstance(given["start"], int) else None


def _stack(known: Known, node: Node, given: dict[str, Any]) -> Tensor | None:
    found, ndim = [known.of(item) for item in given["tensors"]], node.meta["val"].ndim - 1
    if all(value is None for value in found):
        return None
    shaped = torch.broadcast_tensors(*(unknown(ndim) if value is None else value for value in found))
    return torch.stack(shaped, given["dim"])


def _einsum(known: Known, node: Node, given: dict[str, Any]) -> Tensor | None:
    """0 where one of the factors is, for all that is summed over."""
    left, _, right = given["equation"].replace(" ", "").partition("->")
    if "." in left or not right:
        return None
    result = torch.zeros([1] * len(right), dtype=torch.bool)
    for term, tensor in zip(left.split(","), given["tensors"], strict=True):
        value = known.of(tensor)
        if value is None or len(set(term)) < len(term):
            continue
        gone = [at for at, letter in enumerate(term) if letter not in right]
        zero = (value == 0).all(dim=tuple(gone)) if gone else value == 0
        left_over = [letter for letter in term if letter in right]
        order = sorted(range(len(left_over)), key=lambda at: right.index(left_over[at]))
        sizes = iter(zero.permute(order).shape)
        result = result | zero.permute(order).reshape([next(sizes) if letter in term else 1 for letter in right])
    return torch.where(result, 0.0, math.nan).to(torch.float64)


def _rearranged(known: Known, node: Node, given: dict[str, Any]) -> Tensor | None:
    """Channels that go elsewhere with what is next to them: of maps that are one number everywhere."""
    name, value, shape = op_name(node), given["self"], node.meta["val"].shape
    at = len(shape) - (2 if name == "im2col" else 3)
    numbers = known.along(value, 1 if name == "channel_shuffle" else value.meta["val"].ndim - 3)
    if name == "channel_shuffle":
        at, numbers = 1, numbers.reshape(given["groups"], -1).T.flatten()
    elif name == "pixel_shuffle":
        numbers = _uniform(numbers.reshape(int(shape[at]), -1), (1,)).flatten()
    else:
        numbers = (only_zeros(numbers) if name == "im2col" else numbers).repeat_interleave(
            int(shape[at]) // len(numbers)
        )
    return numbers.reshape([-1 if dim == at else 1 for dim in range(len(shape))])


def _window(known: Known, node: Node, given: dict[str, Any]) -> Tensor | None:
    """Pools and resamplings of maps that are one number everywhere: their windows hold nothing else."""
    source = node.all_input_nodes[0]
    value, spatial = known.of(source), spatial_dims(op_name(node))
    return None if value is None else _flat(value, spatial)


def _flat(value: Tensor, spatial: int) -> Tensor:
    """NaN where a map is not one number."""
    flat = value.flatten(-spatial)
    return torch.where((flat == flat[..., :1]).all(-1), flat[..., 0], math.nan)[(..., *[None] * spatial)]


def _average(known: Known, node: Node, given: dict[str, Any]) -> Tensor | None:
    """Zeros that are padded may count."""
    value = _window(known, node, given)
    whole = not any(given["padding"]) and not given["ceil_mode"] and given.get("divisor_override") is None
    return value if value is None or whole else only_zeros(value)


def _pad(known: Known, node: Node, given: dict[str, Any]) -> Tensor | None:
    value, pad = known.of(given["self"]), list(given["pad"])
    if value is None:
        value = unknown(node.meta["val"].ndim)
    if given.get("mode", "constant") != "constant":
        return _flat(value, len(pad) // 2) if not value.isnan().all() else None
    filled, shape, sizes = given["value"] or 0.0, list(value.shape), known.counts(given["self"])
    for at in range(len(pad) // 2):
        dim, edges = value.ndim - 1 - at, pad[2 * at : 2 * at + 2]
        if edges == [0, 0]:
            continue
        numbers = isinstance(node.meta["val"].shape[dim], int) and all(isinstance(item, int) for item in edges)
        if shape[dim] > 1 or (numbers and math.prod(shape) * sizes[dim] <= LIMIT >> 4):
            shape[dim] = sizes[dim]
        else:  # what is padded must be what is there
            value = torch.where(value == filled, value, math.nan)
            pad[2 * at : 2 * at + 2] = [0, 0]
    return functional.pad(value.expand(shape), pad, value=float(filled))


def _batch_norm(known: Known, node: Node, given: dict[str, Any]) -> Tensor | None:
    if given["training"]:
        return None
    shape = [1, -1] + [1] * (node.meta["val"].ndim - 2)
    value = known.of(given["input"])
    numbers = [known.of(given[name]) for name in ("weight", "bias", "running_mean", "running_var")]
    if any(number is None and given[name] is not None for number, name in zip(
        numbers, ("weight", "bias", "running_mean", "running_var"), strict=True
    )):  # fmt: skip
        return None
    gain, shift, mean, variance = (None if item is None else item.reshape(shape) for item in numbers)
    if mean is None or variance is None:
        return None
    value = unknown(node.meta["val"].ndim) if value is None else value
    result = (value - mean) / (variance + given["eps"]).sqrt()
    result = result if gain is None else torch.where(gain == 0, 0.0, result * gain)
    return result if shift is None else result + shift


def _group_norm(known: Known, node: Node, given: dict[str, Any]) -> Tensor | None:
    """What is one number in all channels of a group is its mean; what is multiplied by 0 is 0: the bias is left."""
    channels = int(node.meta["val"].shape[1])
    if not given.get("use_input_stats", True):
        return None
    groups = given.get("num_groups", channels)
    source = known.along(given["input"], 1).reshape(groups, -1)
    level = (source == source[:, :1]).all(1, keepdim=True).expand(source.shape).flatten()
    for name in ("weight", "bias"):
        if given[name] is not None and known.of(given[name]) is None:
            return None
    gain, shift = known.of(given["weight"]), known.of(given["bias"])
    level = level if gain is None else level | (gain == 0)
    result = torch.where(level, 0.0 if shift is None else shift, math.nan)
    return result.to(torch.float64).reshape([1, -1] + [1] * (node.meta["val"].ndim - 2))


def _embedding(known: Known, node: Node, given: dict[str, Any]) -> Tensor | None:
    table = known.program.constant(given["weight"])
    if table is None:
        return None
    same = (table == table[:1]).all(0)
    if not bool(same.any()):
        return None
    return torch.where(same, lift(table[0]), math.nan).cpu().reshape([1] * (node.meta["val"].ndim - 1) + [-1])


def _created(known: Known, node: Node, given: dict[str, Any]) -> Tensor | None:
    name = op_name(node)
    filled = 0.0 if "zeros" in name else 1.0 if "ones" in name else given.get("fill_value")
    if not isinstance(filled, int | float):
        return None
    return torch.full([1] * node.meta["val"].ndim, float(filled), dtype=torch.float64)


def _zero_product(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """Where a matrix product is 0 because one of the two is, term by term."""
    if left is None and right is None:
        return None
    nothing = torch.zeros(1, 1, dtype=torch.bool)
    one = nothing if left is None else left == 0
    other = nothing if right is None else right == 0
    if one.ndim < 2 or other.ndim < 2 or one.numel() * other.shape[-1] > LIMIT:
        return None
    zero = (one[..., :, :, None] | other[..., None, :, :]).all(-2)
    return torch.where(zero, 0.0, math.nan).to(torch.float64)


def _product(left: str, right: str) -> Rule:
    def rule(known: Known, node: Node, given: dict[str, Any]) -> Tensor | None:
        return _zero_product(known.of(given[left]), known.of(given[right]))

    return rule


def _attention(known: Known, node: Node, given: dict[str, Any]) -> Tensor | None:
    """0 where all values are."""
    value = known.of(given["value"])
    if value is None:
        return None
    zero = (value == 0).all(-2, keepdim=True)
    heads = int(node.meta["val"].shape[-3]) if node.meta["val"].ndim > 3 else 1
    if given.get("enable_gqa") and zero.ndim > 2 and zero.shape[-3] not in (1, heads):
        zero = zero.repeat_interleave(heads // zero.shape[-3], -3)
    return torch.where(zero, 0.0, math.nan).to(torch.float64)


def _summed(known: Known, node: Node, given: dict[str, Any]) -> Tensor | None:
    """A sum or a norm: of zeros it is 0; in a sum of others their number counts."""
    result, sizes = _carried(known, node, given), given["self"].meta["val"].shape
    if result is None or op_name(node) != "sum" or not all(isinstance(size, int) for size in _gone(given, sizes)):
        return None if result is None else only_zeros(result)
    value = known.of(given["self"])
    assert value is not None
    return result * (math.prod(_gone(given, sizes)) // math.prod(_gone(given, value.shape)))


def _gone(given: dict[str, Any], sizes: Sequence[Any]) -> list[Any]:
    """Those of the sizes that a reduction takes away."""
    dims = given.get("dim")
    return [sizes[dim] for dim in dims] if dims else [*sizes]


def _cleared(known: Known, node: Node, given: dict[str, Any]) -> Tensor | None:
    """What sets entries to 0, or adds to them those before: zeros stay."""
    value = known.of(given["self"])
    return None if value is None else only_zeros(_uniform(value, (-2, -1) if "dim" not in given else (given["dim"],)))


def _uniform(value: Tensor, dims: Sequence[int]) -> Tensor:
    """NaN where it is not one number along `dims`."""
    low, high = value.amin(tuple(dims), keepdim=True), value.amax(tuple(dims), keepdim=True)
    return torch.where(low == high, low, math.nan)


_RULES: dict[str, Rule] = {
    **dict.fromkeys(("permute", "transpose", "t", "numpy_T", "mT", "adjoint", "swapaxes", "swapdims", "movedim", "flip",
                     "mean", "amax", "amin"), _carried),
    **dict.fromkeys(("reshape", "flatten", "unflatten", "unsqueeze", "squeeze"), _reshaped),
    "expand": _expanded, "broadcast_to": _expanded, "expand_as": _expanded,
    "repeat": _repeated, "tile": _repeated, "repeat_interleave": _interleaved,
    "cat": _cat, "concat": _cat, "unbind": _unbind, "select": _select, "slice": _slice, "narrow": _narrowed,
    "stack": _stack, "einsum": _einsum,
    **dict.fromkeys(("channel_shuffle", "pixel_shuffle", "pixel_unshuffle", "im2col"), _rearranged),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), _splits),
    **dict.fromkeys(
        (f"{kind}{n}d" for n in (1, 2, 3) for kind in (
            "max_pool", "adaptive_avg_pool", "upsample_nearest", "_upsample_nearest_exact", "upsample_linear",
            "upsample_bilinear", "upsample_bicubic", "upsample_trilinear", "reflection_pad", "replication_pad")),
        _window,
    ),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), _average),
    "pad": _pad, "constant_pad_nd": _pad, "batch_norm": _batch_norm, "group_norm": _group_norm,
    "instance_norm": _group_norm, "embedding": _embedding,
    **dict.fromkeys((f"{new}{kind}{like}" for kind in ("zeros", "ones", "full")
                     for new, like in (("", ""), ("new_", ""), ("", "_like"))), _created),
    "matmul": _product("self", "other"), "mm": _product("self", "mat2"), "bmm": _product("self", "mat2"),
    "scaled_dot_product_attention": _attention,
    "sum": _summed, "linalg_vector_norm": _summed, **dict.fromkeys(("cumsum", "tril", "triu"), _cleared),
}  # fmt: skip
