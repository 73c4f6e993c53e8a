"""Insert trained keys and values in front of an attention's own."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from fxfreeze.errors import PlanError
from fxfreeze.inline import inline
from fxfreeze.plan import Prefix
from fxfreeze.program import Origin, Program
from fxfreeze.rewrite import Context, NoMatch, Pass, fail

from .._adapters import TOKENS, describe, parameter_name
from .._operators import arguments, aten
from ._parameters import Parameter, Source, parameter_dtype
from ._positions import Positions, positions
from ._sites import Offers, resolve

_PEFT = "prompt_embeddings"
"""What peft calls the keys and values of all layers in its files."""
_SPREAD = 0.02
"""Standard deviation of what prefixes start as, as transformers' own weights."""

_SOFTMAXES = frozenset({aten.softmax.int, aten._softmax.default, aten.special_softmax.default})
_PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default})
_BEHIND = frozenset({aten.dropout.default, aten.to.dtype, aten._to_copy.default, aten.clone.default})
"""What may stand between a softmax and the product with the values."""
_SCALES = {aten.mul.Tensor: operator.mul, aten.mul.Scalar: operator.mul, aten.div.Tensor: operator.truediv,
           aten.div.Scalar: operator.truediv}  # fmt: skip
_MASKS = frozenset({aten.add.Tensor, aten.masked_fill.Scalar, aten.masked_fill.Tensor})


@dataclass(frozen=True)
class Attention:
    """One call of an attention.

    Attributes:
        node: the operator, or the product of probabilities and values where it is written out.
        query, key, value: [batch, heads, length, width] each; the heads of keys may be fewer (grouped queries).
        softmax, scale: of one that is written out, and what its scores are multiplied by; else None.
    """

    node: Node
    query: Node
    key: Node
    value: Node
    softmax: Node | None = None
    scale: float = 1.0

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Heads and width of keys and of values."""
        key, value = self.key.meta["val"].shape, self.value.meta["val"].shape
        return (key[-3], key[-1]), (value[-3], value[-1])


class Attentions(Offers):
    """Attentions: path → its calls, several when its module runs repeatedly."""

    operators: dict[str, list[Attention]]
    lacking = "runs no attention (scaled_dot_product_attention, or a softmax between two products) itself"


class InsertPrefix(Pass):
    """Put P trained keys and values per head in front of those of every addressed attention.

    The parameters are ``prefix_key`` and ``prefix_value``, [heads, P, width]; heads are those of the keys. A mask lets
    every query see all P; causal attention, whose triangle would count the prefix as tokens, gets its mask written out.

    With `hidden` there is a network in place of the two: with w the heads' widths in all, ``prefix_embedding`` [P, w],
    ``prefix_in_weight`` [hidden, w], ``prefix_in_bias``, ``prefix_out_weight`` [keys' and values' w, hidden] and
    ``prefix_out_bias``. It hangs on constants alone, and is folded with them.
    """

    name, stage, exact = "insert-prefix", "adapt", False

    def run(self, program: Program, ctx: Context) -> int:
        steps = [(index, step) for index, step in enumerate(ctx.plan.steps) if isinstance(step, Prefix)]
        if not steps:
            return 0
        offers, count = find_attentions(program), 0
        requests = [(step, *resolve(offers, step, index)) for index, step in steps]
        where = positions(program, _fills(program))
        for step, taken, refused in requests:
            for path, reason in refused.items():
                ctx.ledger.add(
                    site=path, step=step.name, requested=describe(step), outcome="refused", detail=f"{path} {reason}"
                )
            source = Source(step, ctx.plan.steps)
            if _PEFT in source.stored:
                _read_peft(step, source, {path: offers.operators[path][0] for path in taken}, bool(where))
            for path in taken:
                # Read again: a prefix before may have changed its operands.
                count += _insert(program, ctx, step, path, [item.node for item in offers.operators[path]], source)
            source.finish()
        return count + _shift(program, [step for step, *_ in requests if step.shift], where, ctx)


# ---------------------------------------------------------------------- finding


def find_attentions(program: Program) -> Attentions:
    """Every attention, by the module that runs it."""
    found = Attentions(program)
    for node in program.graph.nodes:
        item = attention(node)
        path = program.module_path(node)
        if isinstance(item, Attention):
            found.operators.setdefault(path, []).append(item)
        elif item is not None:
            found.refused.setdefault(path, f"runs an attention, but {item.reason}")
    for path, items in list(found.operators.items()):
        if len({item.shapes for item in items}) > 1:
            found.refused[path] = "runs attentions of different heads, so it is not clear which one to adapt"
        if path in found.refused:
            del found.operators[path]
    return found


def attention(node: Node) -> Attention | NoMatch | None:
    """`node` as an attention; the reason where it is one that takes no prefix, None where it is none."""
    if node.target is aten.scaled_dot_product_attention.default:
        given = arguments(node)
        item = Attention(node, given["query"], given["key"], given["value"])
    elif node.target in _PRODUCTS and (written := _written_out(node)) is not None:
        item = written
    else:
        return None
    shapes = [part.meta["val"].shape for part in (item.query, item.key, item.value)]
    if any(len(shape) != 4 for shape in shapes):
        return fail(f"its keys have {len(shapes[1])} dims, not batch, heads, length and width", node)
    if not all(isinstance(size, int) for pair in item.shapes for size in pair):
        return fail("its heads have no fixed number or width", node)
    if item.softmax is not None and any(len(chain.users) > 1 for chain in _chain(item)):
        return fail("something else reads its probabilities, which would get columns for the prefix", node)
    return item


def _written_out(product: Node) -> Attention | None:
    """softmax(scale · q·kᵀ + mask)·v, with the scale and the mask in any order."""
    probabilities, value = product.args
    while isinstance(probabilities, Node) and probabilities.target in _BEHIND:
        probabilities = probabilities.args[0]
    if not isinstance(probabilities, Node) or probabilities.target not in _SOFTMAXES or not isinstance(value, Node):
        return None
    scores, factors = probabilities.args[0], []
    if probabilities.args[1] not in (-1, scores.meta["val"].ndim - 1):  # type: ignore[union-attr]
        return None
    while isinstance(scores, Node) and scores.target not in _PRODUCTS:
        if scores.target in _SCALES and isinstance(scores.args[1], int | float):
            factors.append(_SCALES[scores.target](1.0, scores.args[1]))
        elif scores.target not in _MASKS and scores.target not in _BEHIND:
            return None
        scores = scores.args[0]
    if not isinstance(scores, Node):
        return None
    query, turned = scores.args
    if not isinstance(query, Node) or not isinstance(turned, Node):
        return None
    key = turned.args[0] if _is_transpose(turned) else None
    if not isinstance(key, Node):
        return None
    return Attention(product, query, key, value, probabilities, reduce(operator.mul, factors, 1.0))


def _is_transpose(node: Node) -> bool:
    ndim = node.meta["val"].ndim
    if node.target is aten.transpose.int:
        return {dim % ndim for dim in node.args[1:]} == {ndim - 1, ndim - 2}  # type: ignore[operator]
    swapped = [*range(ndim - 2), ndim - 1, ndim - 2]
    return node.target is aten.permute.default and [dim % ndim for dim in node.args[1]] == swapped  # type: ignore[union-attr, operator]


def _chain(item: Attention) -> list[Node]:
    """The nodes from the softmax to the product, without it."""
    chain, node = [], item.node.args[0]
    while node is not item.softmax:
        assert isinstance(node, Node)
        chain.append(node)
        node = node.args[0]
    assert item.softmax is not None
    return [item.softmax, *reversed(chain)]


# ---------------------------------------------------------------------- parameters


def _parameters(step: Prefix, item: Attention) -> list[Parameter]:
    keys, values = ((heads, step.tokens, width) for heads, width in item.shapes)
    if step.hidden is None:
        return [Parameter("prefix_key", keys, _drawn(keys)), Parameter("prefix_value", values, _drawn(values))]
    narrow, out = keys[0] * keys[2], keys[0] * keys[2] + values[0] * values[2]
    shapes = {
        "prefix_embedding": (step.tokens, narrow),
        "prefix_in_weight": (step.hidden, narrow), "prefix_in_bias": (step.hidden,),
        "prefix_out_weight": (out, step.hidden), "prefix_out_bias": (out,),
    }  # fmt: skip
    return [Parameter(leaf, shape, _started(leaf, shape)) for leaf, shape in shapes.items()]


def _drawn(shape: tuple[int, ...]) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(shape, generator=generator) * _SPREAD


def _started(leaf: str, shape: tuple[int, ...]) -> Callable[[torch.Generator], Tensor]:
    """An embedding is normal, weights are as ``nn.Linear``'s, biases 0."""
    if leaf.endswith("bias"):
        return lambda generator: torch.zeros(shape)
    if leaf.endswith("embedding"):
        return lambda generator: torch.randn(shape, generator=generator)
    bound = 1 / math.sqrt(shape[1])
    return lambda generator: (torch.rand(shape, generator=generator) * 2 - 1) * bound


def _read_peft(step: Prefix, source: Source, sites: dict[str, Attention], counts: bool) -> None:
    """Give every site its part of peft's one tensor [P, layers · 2 · heads · width], layer by layer keys then values.

    Raises:
        PlanError: it does not fit the sites, or the step means something else than peft.
    """
    stored, where = source.stored.pop(_PEFT), str(step.weights)
    if counts and not step.shift:
        raise PlanError(
            "peft trains a prefix as earlier tokens, so that the model's own positions begin behind it",
            where=where, hint=f"set shift=True on step {step.name!r}",
        )  # fmt: skip
    if step.hidden is not None:
        raise PlanError("peft's file holds keys and values, not what made them", where=where, hint="leave hidden out")
    for number, (path, item) in enumerate(sites.items()):
        (heads, width), values = item.shapes
        own, rest = divmod(stored.shape[-1], 2 * len(sites) * width)
        if (
            stored.ndim != 2
            or stored.shape[0] != step.tokens
            or rest
            or not own
            or heads % own
            or values != (heads, width)
        ):
            raise PlanError(
                f"{_PEFT} has shape {tuple(stored.shape)}, which is not {step.tokens} tokens × {len(sites)} layers × 2 "
                f"× {heads} heads × {width}", where=where, hint="match every attention of the model, and no other",
            )  # fmt: skip
        parts = stored.reshape(step.tokens, 2 * len(sites), own, width).permute(1, 2, 0, 3)
        for leaf, part in (("prefix_key", parts[2 * number]), ("prefix_value", parts[2 * number + 1])):
            # Models that repeat keys for groups of queries may do so before the attention; peft's are not repeated.
            source.stored[parameter_name(step, path, leaf)] = part.repeat_interleave(heads // own, 0)


# ---------------------------------------------------------------------- inserting


def _insert(program: Program, ctx: Context, step: Prefix, path: str, nodes: list[Node], source: Source) -> int:
    calls = [item for node in nodes if isinstance(item := attention(node), Attention)]
    held = _add_parameters(program, step, path, calls[0], source)
    causal = False
    for item in calls:
        if item.softmax is None:
            causal |= bool(arguments(item.node)["is_causal"])
            new = _before_operator(program, step, item, held)
        else:
            new = _before_softmax(program, step, item, held)
        program.replace(item.node, new)
    trained = f"weights from {step.weights}" if step.weights else "untrained: starts as noise, not as the identity"
    said = [trained, *(["the causal mask is written out"] if causal else [])]
    said += [f"in {len(calls)} calls"] if len(calls) > 1 else []
    ctx.ledger.add(
        site=path, step=step.name, requested=describe(step), outcome="rewritten",
        executes=f"before the keys of {calls[0].node.target}", detail="; ".join(said),
    )  # fmt: skip
    program.sweep()
    return len(calls)


def _add_parameters(program: Program, step: Prefix, path: str, item: Attention, source: Source) -> list[Node]:
    nodes = []
    dtype, device = parameter_dtype(item.key.meta["val"].dtype), item.key.meta["val"].device
    start = next(node for node in program.graph.nodes if node.op == "call_function")
    for parameter in _parameters(step, item):
        name = parameter_name(step, path, parameter.leaf)
        if name in program.state:
            raise PlanError(f"the model already has a parameter named {name}", where=path, hint="rename the step")
        value = source.value(path, parameter).to(device, dtype)
        nodes.append(program.add_constant(name, value, before=start, like=item.node))
        nodes[-1].meta["fxfreeze"] = Origin(step.name, TOKENS, path)
    return nodes


def _prefixes(step: Prefix, item: Attention, held: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Keys and values [heads, P, width] in their dtypes, of the parameters."""
    if step.hidden is None:
        key, value = held
    else:
        rows, *weights = held
        made = functional.linear(torch.tanh(functional.linear(rows, *weights[:2])), *weights[2:])
        sizes = [heads * width for heads, width in item.shapes]
        key, value = (
            part.reshape(step.tokens, heads, width).transpose(0, 1)
            for part, (heads, width) in zip(made.split(sizes, -1), item.shapes, strict=True)
        )
    return key.to(item.key.meta["val"].dtype), value.to(item.value.meta["val"].dtype)


def _before_operator(program: Program, step: Prefix, item: Attention, held: list[Node]) -> Node:
    given = arguments(item.node)
    options = {name: given[name] for name in ("dropout_p", "scale", "enable_gqa")}
    operands = [item.query, item.key, item.value, *([] if given["attn_mask"] is None else [given["attn_mask"]])]

    def function(*values: Tensor) -> Tensor:
        parameters, (query, key, value, *masks) = values[: len(held)], values[len(held) :]
        front = _prefixes(step, item, parameters)
        mask = masks[0] if masks else None
        if given["is_causal"]:
            # Query i sees tokens up to i, as it did, and all of the prefix.
            shape = (query.shape[-2], key.shape[-2] + step.tokens)
            mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(step.tokens)
        elif mask is not None:
            mask = _longer(mask, key.shape[-2], step.tokens)
        longer = [_joined(part, own) for part, own in zip(front, (key, value), strict=True)]
        return functional.scaled_dot_product_attention(query, longer[0], longer[1], mask, **options)

    return inline(program, function, *held, *operands, before=item.node, like=item.node)


def _joined(front: Tensor, own: Tensor) -> Tensor:
    return torch.cat([front.expand(own.shape[0], -1, -1, -1), own], -2)


def _longer(mask: Tensor, length: Any, tokens: int) -> Tensor:
    if isinstance(mask.shape[-1], int) and mask.shape[-1] == 1:
        mask = mask.expand(*mask.shape[:-1], length)
    return functional.pad(mask, [tokens, 0], value=True if mask.dtype == torch.bool else 0.0)


def _before_softmax(program: Program, step: Prefix, item: Attention, held: list[Node]) -> Node:
    """An attention that is written out: the prefix's scores join the masked ones."""
    softmax, node = item.softmax, item.node
    assert softmax is not None
    dtype = softmax.args[0].meta["val"].dtype  # type: ignore[union-attr]

    def scored(*values: Tensor) -> Tensor:
        *parameters, query, scores = values
        key, _ = _prefixes(step, item, tuple(parameters))
        own = torch.matmul(query, key.transpose(-2, -1)) * item.scale
        return torch.cat([own.to(dtype), scores], -1)

    def valued(*values: Tensor) -> Tensor:
        *parameters, probabilities, value = values
        return torch.matmul(probabilities, _joined(_prefixes(step, item, tuple(parameters))[1], value))

    current = inline(program, scored, *held, item.query, softmax.args[0], before=node, like=node)  # type: ignore[arg-type]
    for link in _chain(item):
        current = program.call(link.target, current, *link.args[1:], before=node, like=link, **link.kwargs)  # type: ignore[arg-type]
    return inline(program, valued, *held, current, item.value, before=node, like=node)


# ---------------------------------------------------------------------- positions


def _fills(program: Program) -> dict[str, float]:
    """Masks of ones, and the last id, which is no padding."""
    return {
        spec.name: 1 if "mask" in spec.name or spec.dtype == torch.bool else spec.high or 1 for spec in program.inputs
    }


def _shift(program: Program, steps: list[Prefix], where: list[Positions], ctx: Context) -> int:
    """Let positions begin behind the prefix.

    Raises:
        PlanError: there are none, or not enough.
    """
    if not steps:
        return 0
    step = steps[0]
    if other := next((other for other in steps if other.tokens != step.tokens), None):
        raise PlanError(f"shifts by {other.tokens}, and {step.name!r} by {step.tokens}", where=other.name)
    if not where:
        raise PlanError(
            "shift: nothing in this model looks up or counts positions in a way that is recognised", where=step.name,
            hint="leave shift out; where the model has no positions, it makes no difference",
        )  # fmt: skip
    for item in where:
        _check_table(program, item, step)
        later = program.call(aten.add.Tensor, item.index, step.tokens, before=item.node, like=item.node)
        item.node.replace_input_with(item.index, later)
    ctx.ledger.add(
        site=program.module_path(where[0].node), step=step.name, requested="positions behind the prefix",
        outcome="rewritten", executes=f"positions + {step.tokens}",
        detail=f"{len(where)} readers of positions",
    )  # fmt: skip
    return len(where)


def _check_table(program: Program, item: Positions, step: Prefix) -> None:
    """Refuse lengths that the table has no rows for, and bound a dim without bounds by it."""
    if item.rows is None:
        return
    size, room = item.index.meta["val"].shape[-1], item.rows - item.first - step.tokens
    if isinstance(size, int):
        dim, longest, limit = "the sequence", size, room
    else:
        dim, symbol = _dim_of(program, size)
        limit = room - int(size.node.expr - symbol)
        low, high = program.dims[dim]
        longest = low if high is None else high
        program.dims[dim] = (low, limit if high is None else high)
    if longest > limit:
        raise PlanError(
            f"the model has {item.rows - item.first} positions, of which the prefix takes {step.tokens}: lengths of up "
            f"to {max(limit, 0)} fit, and the plan allows {longest} for {dim}",
            where=step.name, hint="set its max in Plan(dims=...), or take fewer tokens",
        )  # fmt: skip


def _dim_of(program: Program, size: torch.SymInt) -> tuple[str, Any]:
    for node, spec in zip(program.placeholders, program.inputs, strict=True):
        for name, own in zip(spec.shape, node.meta["val"].shape, strict=True):
            if isinstance(name, str) and not isinstance(own, int) and (size.node.expr - own.node.expr).is_Integer:
                return name, own.node.expr
    raise PlanError(f"positions run over {size}, which is no dim of an input", hint="leave shift out")
