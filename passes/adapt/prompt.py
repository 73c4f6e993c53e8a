"""Insert trained vectors in front of the sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.errors import PassError, PlanError
from fxfreeze.plan import Prompt, Step
from fxfreeze.program import Origin, Program, TensorSpec, first_line
from fxfreeze.rewrite import Context, Pass

from .._adapters import TOKENS, describe, parameter_name
from .._operators import WeightOperator, aten
from ._parameters import Initial, Parameter, Source, parameter_dtype
from ._positions import Positions, positions
from ._sites import find_sites, resolve

_END = 2**63 - 1
_LONG, _SOME = 2**20, 3
"""A length to try for one without bounds, and a size for dims that are not the sequence's."""
_PEFT = "prompt_embeddings"
"""What peft calls the vectors in its files."""


class InsertPrompt(Pass):
    """Make every sequence longer by P positions, and put trained vectors there.

    The sequence is the last dim of the input that the embedding looks up. Every input with that dim gets P positions in
    front of its own, inside the graph; whatever is computed of them or of their sizes (positions, causal masks, shapes)
    follows, and must follow: a value whose shape is not what it was with s + P for s is refused, and so is a
    sequence of fixed length, since its length is written all over the graph. At the embedding's result, the first P
    rows are replaced by the parameter ``prompt`` [P, width].

    What is computed from the ids themselves sees ids that are no padding where the prompt is.
    """

    name, stage, exact = "insert-prompt", "adapt", False

    def run(self, program: Program, ctx: Context) -> int:
        steps = [(index, step) for index, step in enumerate(ctx.plan.steps) if isinstance(step, Prompt)]
        if not steps:
            return 0
        if len(steps) > 1:
            raise PlanError(
                f"steps[{steps[1][0]}]: a second prompt, behind {steps[0][1].name!r}", where=steps[1][1].name,
                hint="one prompt of as many tokens as both does the same",
            )  # fmt: skip
        index, step = steps[0]
        sites = find_sites(program)
        taken, refused = resolve(sites, step, index)
        refused |= {
            path: _not_embedding(sites.operators[path]) for path in taken if _not_embedding(sites.operators[path])
        }
        for path, reason in refused.items():
            ctx.ledger.add(
                site=path, step=step.name, requested=describe(step), outcome="refused", detail=f"{path} {reason}"
            )
        taken = [path for path in taken if path not in refused]
        if len(taken) != 1:
            reasons = "".join(f"\n  {path} {reason}" for path, reason in refused.items())
            raise PlanError(
                f"steps[{index}].at: matches {', '.join(taken) if taken else 'no embedding of ids'}{reasons}",
                where=step.name, hint="name the one embedding that looks up the tokens",
            )  # fmt: skip
        _Insertion(program, step, taken[0], sites.operators[taken[0]][0], ctx.plan.steps).run(ctx)
        return 1


def _not_embedding(operators: list[WeightOperator]) -> str:
    if operators[0].kind != "embedding":
        return f"runs {operators[0].node.target}, and a prompt stands behind an embedding"
    return f"looks up {len(operators)} times; it is not clear where the prompt belongs" if len(operators) > 1 else ""


@dataclass
class _Insertion:
    """A prompt at one embedding.

    Attributes:
        site: path of the embedding.
        steps: all of the plan's.
    """

    program: Program
    step: Prompt
    site: str
    operator: WeightOperator
    steps: tuple[Step, ...]

    def run(self, ctx: Context) -> None:
        ids = self._ids()
        dim = ids.shape[-1]
        if not isinstance(dim, str):
            raise self._refusal(
                f"the sequence dim of {ids.name!r} is fixed to {dim}, so its length is baked into the model's shapes",
                f"declare it as a symbolic dim, with Plan(dims=...) for its bounds, such as {{'seq': Dim(max={dim})}}",
            )
        fills = {spec.name: self._fill(spec, ids) for spec in self.program.inputs if dim in spec.shape}
        limit = self._check_tables(positions(self.program, fills), dim)
        low, high = self.program.dims[dim]
        if limit is not None:
            self.program.dims[dim] = (low, limit if high is None else min(high, limit))
        before = _shapes(self.program.output_nodes)
        self._extend(dim, fills)
        self._put()
        if self.step.keep == "tokens":
            self._crop(before)
        self._report(ctx, dim, fills, limit)

    # ------------------------------------------------------------------ reading

    def _refusal(self, what: str, hint: str | None = None) -> PlanError:
        return PlanError(f"{self.site}: {what}", where=self.step.name, hint=hint)

    def _ids(self) -> TensorSpec:
        """The input whose ids the embedding looks up."""
        node, inputs = self.operator.input, dict(zip(self.program.placeholders, self.program.inputs, strict=True))
        moves = (aten.reshape.default, aten.to.dtype, aten.to.device, aten.clone.default, aten.contiguous.default)
        while node not in inputs and node.target in moves:
            node = node.args[0]  # type: ignore[assignment]
        if node not in inputs:
            raise self._refusal(f"it looks up what {node.target} computes, not ids of an input")
        ids, value = node.meta["val"], self.operator.node.meta["val"]
        if not ids.ndim or value.ndim < 2 or str(ids.shape[-1]) != str(value.shape[-2]):
            raise self._refusal(
                f"of ids of shape {list(ids.shape)} it makes {list(value.shape)}, so no dim is the sequence's"
            )
        return inputs[node]

    def _fill(self, spec: TensorSpec, ids: TensorSpec) -> float:
        """What stands at the prompt's positions of an input."""
        if spec.shape.count(ids.shape[-1]) > 1:
            raise self._refusal(f"the input {spec.name!r} has the sequence's dim {ids.shape[-1]!r} more than once")
        if spec.name in self.step.fill:
            return self.step.fill[spec.name]
        if spec is ids:
            return self._valid_id(spec)
        leaf = spec.name.rpartition(".")[2].lower()
        if not spec.dtype.is_floating_point and "mask" in leaf:
            return 1
        if "token_type" in leaf or "segment" in leaf:
            return 0
        raise self._refusal(
            f"the input {spec.name!r} has the sequence's dim {ids.shape[-1]!r}, and it is not known what stands there "
            "where the prompt is", f"say so with fill={{{spec.name!r}: ...}}",
        )  # fmt: skip

    def _valid_id(self, spec: TensorSpec) -> int:
        """An id that is no padding: models count positions, and mask, by comparing with that."""
        rows, padding = (
            self.operator.in_features,
            self.operator.node.args[2] if len(self.operator.node.args) > 2 else -1,
        )
        low = int(spec.low or 0)
        return next((at for at in range(low, rows) if at != padding), low)

    def _check_tables(self, found: list[Positions], dim: str) -> int | None:
        """The longest sequence that the model's tables have positions for beside the prompt's; None: any.

        Raises:
            PlanError: the plan allows longer ones.
        """
        ends = [item.rows - item.first for item in found if item.rows is not None]
        if not ends:
            return None
        limit, (low, high) = min(ends) - self.step.tokens, self.program.dims[dim]
        if limit < max(low, 1) or (high is not None and high > limit):
            raise self._refusal(
                f"the model has {min(ends)} positions, of which the prompt takes {self.step.tokens}: sequences of "
                f"up to {max(limit, 0)} fit, and the plan allows {low if limit < low else high}",
                f"set Plan(dims={{{dim!r}: Dim(max={limit})}})" if limit >= low else "take fewer tokens",
            )  # fmt: skip
        return limit

    # ------------------------------------------------------------------ rewriting

    def _extend(self, dim: str, fills: dict[str, float]) -> None:
        """Put P positions in front of every input with the sequence's dim, and bring all shapes up to date."""
        program, tokens = self.program, self.step.tokens
        start = next(node for node in program.graph.nodes if node.op == "call_function")
        symbol, changed = None, set()
        assumed = len(_guards(program))
        for node, spec in zip(program.placeholders, program.inputs, strict=True):
            if dim not in spec.shape:
                continue
            at = spec.shape.index(dim)
            symbol = node.meta["val"].shape[at].node.expr if not isinstance(node.meta["val"].shape[at], int) else None
            if symbol is None or not symbol.is_Symbol:
                raise self._refusal(f"the model fixes dim {dim!r} of {spec.name!r}, so its length is baked into it")
            pad = [0, 0] * (len(spec.shape) - 1 - at) + [tokens, 0]
            value = fills[spec.name] if spec.dtype.is_floating_point else int(fills[spec.name])
            longer = program.call(aten.constant_pad_nd.default, node, pad, value, before=start, like=node)
            readers = {user for user in node.users if user is not longer and user.op != "output"}
            node.replace_all_uses_with(longer, delete_user_cb=readers.__contains__)
            changed.add(longer)
        for node in program.graph.nodes:
            if node.op == "call_function" and node not in changed and changed.intersection(node.all_input_nodes):
                self._update(node, symbol)
                assumed = self._check_assumed(node, symbol, dim, assumed)
                changed.add(node)

    def _update(self, node: Node, symbol: Any) -> None:
        old = _expressions(node.meta["val"])
        try:
            self.program.infer(node)
        except Exception as error:
            raise self._baked(node, first_line(error)) from error
        wanted = [size if isinstance(size, int) else size.subs(symbol, symbol + self.step.tokens) for size in old]
        now = _expressions(node.meta["val"])
        if len(now) != len(wanted) or any(_difference(a, b) != 0 for a, b in zip(now, wanted, strict=True)):
            raise self._baked(node, f"it makes {now} where {wanted} is needed")

    def _check_assumed(self, node: Node, symbol: Any, dim: str, first: int) -> int:
        """Shapes are inferred at one size, and what that assumes is noted: it must hold at all sizes."""
        low, high = self.program.dims[dim]
        sizes = [max(low, 2), *((high,) if high is not None else (_LONG, _LONG + 1))]
        for guard in _guards(self.program)[first:]:
            for size in sizes:
                others = dict.fromkeys(guard.expr.free_symbols - {symbol}, _SOME)
                if not bool(guard.expr.subs({symbol: size, **others})):
                    raise self._baked(node, f"at {dim} = {size} it would need {guard.expr}")
        return len(_guards(self.program))

    def _baked(self, node: Node, reason: str) -> PlanError:
        return self._refusal(
            f"a size is baked into {self.program.where(node)}, which does not follow a longer sequence: {reason}",
            "compute sizes in forward from the inputs' shapes",
        )

    def _put(self) -> None:
        """The parameter in place of the first rows that the embedding makes."""
        program, looked, tokens = self.program, self.operator.node, self.step.tokens
        value, before, dim = looked.meta["val"], looked.next, looked.meta["val"].ndim - 2
        prompt = self._parameter(before)
        if prompt.meta["val"].dtype != value.dtype:
            prompt = program.call(aten.to.dtype, prompt, value.dtype, before=before, like=looked)
        sizes = [
            size if isinstance(size, int) else program.call(aten.sym_size.int, looked, at, before=before, like=looked)
            for at, size in enumerate(value.shape[:dim])
        ]
        rows = program.call(aten.expand.default, prompt, [*sizes, -1, -1], before=before, like=looked)
        own = program.call(aten.slice.Tensor, looked, dim, tokens, _END, before=before, like=looked)
        result = program.call(aten.cat.default, [rows, own], dim, before=before, like=looked)
        keep = {own, *sizes}
        looked.replace_all_uses_with(result, delete_user_cb=lambda user: user not in keep)
        if _expressions(result.meta["val"]) != _expressions(value):
            raise PassError(f"{self.name} made {result.meta['val'].shape} of {value.shape}", where=self.site)

    @property
    def name(self) -> str:
        return parameter_name(self.step, self.site, "prompt")

    def _parameter(self, before: Node) -> Node:
        program, step, looked = self.program, self.step, self.operator.node
        if self.name in program.state:
            raise PlanError(
                f"the model already has a parameter named {self.name}", where=self.site, hint="rename the step"
            )
        table = program.state[str(self.operator.weight.target)]
        source = Source(step, self.steps)
        if _PEFT in source.stored:
            source.stored[self.name] = source.stored.pop(_PEFT)
        shape = (step.tokens, self.operator.out_features)
        held = source.value(self.site, Parameter("prompt", shape, _start(step, table)))
        source.finish()
        dtype = parameter_dtype(looked.meta["val"].dtype)
        node = program.add_constant(self.name, held.to(table.device, dtype), before=before, like=looked)
        node.meta["fxfreeze"] = Origin(step.name, TOKENS, self.site)
        return node

    def _crop(self, before: list[list[Any]]) -> None:
        """Cut the prompt's rows off all outputs."""
        program, tokens, output = self.program, self.step.tokens, self.program.graph.output_node()
        results = []
        for name, node, old in zip(program.outputs, program.output_nodes, before, strict=True):
            for at, size in enumerate(old):
                grown = _difference(_expressions(node.meta["val"])[at], size)
                if grown == tokens:
                    node = program.call(aten.slice.Tensor, node, at, tokens, _END, before=output, like=node)
                elif grown != 0:
                    raise self._refusal(
                        f"dim {at} of the output {name!r} grows by {grown}, so the prompt's rows cannot be cut off",
                        "set keep='all'",
                    )
            results.append(node)
        output.args = (tuple(results),)
        output.meta["val"] = tuple(node.meta["val"] for node in results)

    def _report(self, ctx: Context, dim: str, fills: dict[str, float], limit: int | None) -> None:
        step = self.step
        said = [f"weights from {step.weights}" if step.weights else f"untrained: starts as {step.start} vectors"]
        said += [
            f"{dim} + {step.tokens} positions of {', '.join(f'{name} ({fill:g})' for name, fill in fills.items())}"
        ]
        if limit is not None:
            said.append(f"sequences of up to {limit} fit")
        ctx.ledger.add(
            site=self.site, step=step.name, requested=describe(step), outcome="rewritten",
            executes=f"behind {self.operator.node.target}", detail="; ".join(said),
        )  # fmt: skip


def _start(step: Prompt, table: Tensor) -> Initial:
    rows, width = table.shape

    def initial(generator: torch.Generator) -> Tensor:
        if step.start == "vocabulary":
            return table.float()[torch.randint(rows, (step.tokens,), generator=generator).to(table.device)]
        return torch.randn(step.tokens, width, generator=generator) * float(table.float().std())

    return initial


def _guards(program: Program) -> list[Any]:
    env = program.fake_mode.shape_env
    return [] if env is None else env.guards


def _shapes(nodes: tuple[Node, ...]) -> list[list[Any]]:
    return [_expressions(node.meta["val"]) for node in nodes]


def _expressions(value: Any) -> list[Any]:
    """All sizes of a value, of all values of a tuple, or a size itself, as expressions."""
    if isinstance(value, list | tuple):
        return [size for item in value for size in _expressions(item)]
    if isinstance(value, Tensor):
        return [size for item in value.shape for size in _expressions(item)]
    if isinstance(value, torch.SymInt):
        return [value.node.expr]
    return [value] if isinstance(value, int) and not isinstance(value, bool) else []


def _difference(size: Any, other: Any) -> Any:
    found = size - other
    return found if isinstance(found, int) else found.expand()
