"""Insert LoRA, DoRA, IA3, VeRA and OFT next to the operators they change."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.constants import lift
from fxfreeze.errors import PlanError
from fxfreeze.inline import inline
from fxfreeze.plan import IA3, OFT, DoRA, LoRA, VeRA
from fxfreeze.program import SETTINGS, Origin, Program
from fxfreeze.rewrite import Context, Pass
from fxfreeze.rotations import rotated

from .._adapters import (
    BASE,
    DELTA,
    NORM_FLOOR,
    DeltaStep,
    blocks,
    changed,
    describe,
    is_pruned,
    misfit,
    parameter_name,
    projections,
    turned,
)
from .._operators import Moves, WeightOperator, apply, aten, weight_operator
from ._parameters import Source, parameter_dtype, parameters
from ._parameters import projections as drawn_projections
from ._sites import Sites, find_sites, resolve

_POINTWISE = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}


class InsertDelta(Pass):
    """Put the plan's LoRA, DoRA, IA3, VeRA and OFT steps into the graph, as parameters and operators that train.

    Steps at one site compose in plan order, each acting on the layer that the steps before it left: two LoRAs add up,
    an IA3 after a LoRA scales both, an IA3 before it only the base. With W the weight in canonical layout, b the bias:

    * LoRA: W ← W + s·B·A
    * DoRA: W ← m ⊙ V / ‖V‖ with V = W + s·B·A, the norm per output feature and without gradient (section 4.3 of the
      paper, and peft)
    * IA3: W ← diag(l)·W and b ← l ⊙ b on the output side, W ← W·diag(l) on the input side
    * VeRA: W ← W + diag(λ_b)·B·diag(λ_d)·A, with A and B shared by the step's sites and frozen
    * OFT: W ← W·Rᵀ; of an embedding, whose rows are what it returns, each row times R. Convolutions must be 1×1

    While it trains, a LoRA or VeRA is a low-rank branch beside its operator, which costs little, and an IA3 or OFT acts
    on its operand or result. Up to the last DoRA of a site, LoRA on a grouped or transposed convolution, or VeRA or OFT
    on any convolution, the changed weight itself is computed in the graph, and so it is wherever a Prune step may put a
    mask on it. Half-precision layers compute their adapters
    in float32. A convolution's branch reads what the convolution reads, padding included: with
    ``padding_mode="reflect"`` that is the reflected image. (peft's branch pads with zeros there, ignores dilation and
    mixes groups: weights that it trained so are refused.)

    A module that runs several times has one set of parameters.
    """

    name, stage, exact = "insert-delta", "adapt", False

    def run(self, program: Program, ctx: Context) -> int:
        steps = [
            (i, step) for i, step in enumerate(ctx.plan.steps)
            if isinstance(step, DeltaStep) and step.selection is None
        ]  # fmt: skip
        if not steps:
            return 0
        # All globs are resolved on the user's graph: an inserted LoRA is made of linear layers too.
        sites = find_sites(program)
        sources = {step.name: Source(step, ctx.plan.steps) for _, step in steps}
        requests: dict[str, list[DeltaStep]] = {}
        for index, step in steps:
            for path in self._taken(program, ctx, sites, step, index, sources[step.name]):
                requests.setdefault(path, []).append(step)
        shared = {step.name: _add_shared(program, step, [sites.operators[path][0] for path, asked in requests.items()
                                                         if step in asked], sources[step.name])
                  for _, step in steps if isinstance(step, VeRA)}  # fmt: skip
        for path in [path for path in sites.operators if path in requests]:
            self._insert(program, ctx, path, sites.operators[path], requests[path], sources, shared)
        for source in sources.values():
            source.finish()
        return sum(len(sites.operators[path]) * len(asked) for path, asked in requests.items())

    def _taken(
        self, program: Program, ctx: Context, sites: Sites, step: DeltaStep, index: int, source: Source
    ) -> list[str]:
        """The paths at which to insert `step`; those it matches and cannot take get a row in the ledger.

        Raises:
            PlanError: there is none to take, or the step has trained weights for one it cannot take.
        """
        taken, refused = resolve(sites, step, index)
        problems = {
            path: misfit(step, sites.operators[path][0]) or source.misfit(program, sites, path) for path in taken
        }
        misfits = {path: reason for path, reason in problems.items() if reason}
        if misfits and (step.weights or len(misfits) == len(taken)):
            lines = "".join(f"\n  {path} {reason}" for path, reason in list(misfits.items())[:6])
            raise PlanError(f"steps[{index}].at: {type(step).__name__} cannot act on what it matches:{lines}",
                            where=step.name)  # fmt: skip
        for path, reason in {**refused, **misfits}.items():
            ctx.ledger.add(
                site=path, step=step.name, requested=describe(step), outcome="refused", detail=f"{path} {reason}"
            )
        return [path for path in taken if path not in misfits]

    def _insert(
        self, program: Program, ctx: Context, path: str, operators: list[WeightOperator], steps: list[DeltaStep],
        sources: dict[str, Source], shared: dict[str, dict[str, Node]],
    ) -> None:  # fmt: skip
        values = _add_parameters(program, path, operators[0], steps, sources, shared)
        for call, operator in enumerate(operators):
            # Read again: an insertion upstream has changed its input.
            current = weight_operator(operator.node)
            assert isinstance(current, WeightOperator)
            _Site(program, path, call, current, steps, values, whole=is_pruned(ctx.plan.steps, path)).insert()
        for step in steps:
            state = f"weights from {step.weights}" if step.weights else "untrained: the identity"
            times = f", in {len(operators)} calls" if len(operators) > 1 else ""
            ctx.ledger.add(
                site=path, step=step.name, requested=describe(step), outcome="rewritten",
                executes=f"beside {operators[0].node.target}", detail=state + times,
            )  # fmt: skip


def _add_parameters(
    program: Program, path: str, operator: WeightOperator, steps: list[DeltaStep], sources: dict[str, Source],
    shared: dict[str, dict[str, Node]],
) -> dict[str, dict[str, Node]]:  # fmt: skip
    """Constants for what `steps` train at `path`, by step and leaf, before `operator`, the first call there.

    Raises:
        PlanError: the model has a parameter of that name, or a weights file does not fit.
    """
    stored = program.state[str(operator.weight.target)]
    dtype = parameter_dtype(operator.weight.meta["val"].dtype)
    current = apply(operator.to_canonical(), stored)
    dora = max((i for i, step in enumerate(steps) if isinstance(step, DoRA)), default=-1)
    found: dict[str, dict[str, Node]] = {}
    for position, step in enumerate(steps):
        nodes = found[step.name] = dict(shared.get(step.name, {}))
        for item in parameters(step, operator, current):
            name = parameter_name(step, path, item.leaf)
            if name in program.state:
                raise PlanError(f"the model already has a parameter named {name}", where=path, hint="rename the step")
            value = sources[step.name].value(path, item).to(stored.device, dtype)
            nodes[item.leaf] = program.add_constant(name, value, before=operator.node, like=operator.node)
            nodes[item.leaf].meta["fxfreeze"] = Origin(step.name, DELTA, path)
        if position < dora:  # a magnitude starts as the norm of the weight that the steps before it left
            values = {leaf: lift(program.state[str(node.target)]) for leaf, node in nodes.items()}
            current, _ = changed(step, operator, lift(current), None, values)
    return found


def _add_shared(program: Program, step: VeRA, operators: list[WeightOperator], source: Source) -> dict[str, Node]:
    """VeRA's A and B for the layers `operators`, as constants that do not train; adapter files keep them.

    Raises:
        PlanError: the model has a constant of that name, or the file's matrices are too small.
    """
    inner = max(math.prod(operator.shape[1:]) for operator in operators)
    out = max(operator.out_features for operator in operators)
    stored = [source.shared("vera_A", (step.rank, inner)), source.shared("vera_B", (out, step.rank))]
    drawn = drawn_projections(step.rank, inner, out, step.seed)
    found, first = {}, next(iter(program.graph.nodes))
    weights = [program.state.tensor(str(operator.weight.target)) for operator in operators]
    dtype = functools.reduce(torch.promote_types, (parameter_dtype(weight.dtype) for weight in weights))
    for leaf, held, fresh in zip(("vera_A", "vera_B"), stored, drawn, strict=True):
        name = f"{SETTINGS}{step.name}.{leaf}"
        if name in program.state:
            raise PlanError(f"the model already has a constant named {name}", where=step.name, hint="rename the step")
        value = (fresh if held is None else held).to(weights[0].device, dtype)
        found[leaf] = program.add_constant(name, value, before=first, like=operators[0].node)
        found[leaf].meta = {"val": found[leaf].meta["val"], "fxfreeze": Origin(step.name, DELTA, "")}
    return found


class _Site:
    """One call of one operator, and the steps around it.

    Attributes:
        values: nodes of the parameters, by step and leaf name.
        whole: all steps are worked into the weight.
        in_weight: how many of the steps, from the first, are worked into the weight itself.
    """

    def __init__(
        self, program: Program, path: str, call: int, operator: WeightOperator, steps: list[DeltaStep],
        values: dict[str, dict[str, Node]], whole: bool = False,
    ) -> None:  # fmt: skip
        self.program, self.path, self.call = program, path, call
        self.operator, self.steps, self.values = operator, steps, values
        needing = [i for i, step in enumerate(steps, 1) if whole or self._needs_weight(step)]
        self.in_weight = max(needing, default=0)
        self.before, self.dtype = operator.node.next, operator.node.meta["val"].dtype
        self.mine = {operator.node}

    def insert(self) -> None:
        node = self.operator.node
        node.meta["fxfreeze"] = Origin(self.steps[0].name, BASE, self.path, self.call)
        result = self._after(len(self.steps), self.operator.input)
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in self.mine)

    def _needs_weight(self, step: DeltaStep) -> bool:
        plain = self.operator.kind != "transposed" and self.operator.groups == 1
        if isinstance(step, VeRA | OFT):
            return bool(self.operator.kernel)
        return isinstance(step, DoRA) or (isinstance(step, LoRA) and not plain)

    def _emit(self, step: DeltaStep, target: Any, *args: Any, **kwargs: Any) -> Node:
        node = self.program.call(target, *args, before=self.before, like=self.operator.node, **kwargs)
        node.meta["fxfreeze"] = Origin(step.name, DELTA, self.path, self.call)
        self.mine.add(node)
        return node

    def _cast(self, step: DeltaStep, node: Node, dtype: torch.dtype) -> Node:
        value = node.meta["val"]
        if value.dtype == dtype or not value.dtype.is_floating_point:
            return node
        return self._emit(step, aten.to.dtype, node, dtype)

    def _move(self, step: DeltaStep, node: Node, moves: Moves) -> Node:
        for target, args in moves:
            node = self._emit(step, target, node, *args)
        return node

    # ------------------------------------------------------------------ beside the operator

    def _after(self, count: int, source: Node) -> Node:
        """The layer that the first `count` steps leave, on the input `source`."""
        if count == self.in_weight:
            return self._with_weight(source) if count else self._unchanged(source)
        step = self.steps[count - 1]
        if isinstance(step, IA3):
            return self._gained(step, count, source)
        if isinstance(step, OFT):
            return self._turned(step, count, source)
        base = self._after(count - 1, source)
        total = self._emit(step, aten.add.Tensor, base, self._branch(step, source))
        return self._cast(step, total, self.dtype)

    def _unchanged(self, source: Node) -> Node:
        if source is self.operator.input:
            return self.operator.node
        return self._call(self.steps[0], input=source)

    def _call(self, step: DeltaStep, **changes: Any) -> Node:
        """The operator again, with other operands."""
        args, kwargs = self.operator.call_arguments(**changes)
        node = self._emit(step, self.operator.node.target, *args, **kwargs)
        node.meta["fxfreeze"] = Origin(step.name, BASE, self.path, self.call)
        return node

    def _gained(self, step: IA3, count: int, source: Node) -> Node:
        gain, embedding = self.values[step.name]["ia3"], self.operator.kind == "embedding"
        if step.side == "in" and not embedding:
            return self._after(count - 1, self._times(step, source, gain))
        base = self._after(count - 1, source)
        if step.side == "in":  # one gain per row: looked up as the row is
            gains = self._lookup(step, self._emit(step, aten.reshape.default, gain, [-1, 1]), source)
            return self._cast(step, self._emit(step, aten.mul.Tensor, base, gains), self.dtype)
        return self._times(step, base, gain)

    def _turned(self, step: OFT, count: int, source: Node) -> Node:
        if self.operator.kind != "embedding":
            return self._after(count - 1, self._rotated(step, source))
        return self._rotated(step, self._after(count - 1, source))

    def _rotated(self, step: OFT, value: Node) -> Node:
        vectors, dtype = self.values[step.name]["oft_R"], value.meta["val"].dtype
        wide = self._cast(step, value, vectors.meta["val"].dtype)
        result = self._inline(step, lambda value, vectors: rotated(value, blocks(step, vectors)), wide, vectors)
        return self._cast(step, result, dtype)

    def _inline(self, step: DeltaStep, function: Callable[..., Tensor], *operands: Node) -> Node:
        """The operators that `function` runs on `operands`; the node of its result."""
        last = self.before.prev
        result = inline(self.program, function, *operands, before=self.before, like=self.operator.node)
        while (last := last.next) is not self.before:
            last.meta["fxfreeze"] = Origin(step.name, DELTA, self.path, self.call)
            self.mine.add(last)
        return result

    def _times(self, step: IA3, value: Node, gain: Node) -> Node:
        if self.operator.kernel:
            gain = self._emit(step, aten.reshape.default, gain, self.operator.per_feature())
        return self._cast(step, self._emit(step, aten.mul.Tensor, value, gain), value.meta["val"].dtype)

    def _shift(self, step: DeltaStep) -> Node | None:
        """What `step` adds to the bias."""
        leaf = self.values[step.name].get("lora_bias")
        return None if leaf is None else self._scaled(step, leaf)

    def _branch(self, step: LoRA | DoRA | VeRA, source: Node) -> Node:
        """What `step` adds to the weight, applied to `source`; the scale sits on the narrow side."""
        if isinstance(step, VeRA):
            return self._scaled_branch(step, source)
        a, b = self.values[step.name]["lora_A"], self.values[step.name]["lora_B"]
        source = self._cast(step, source, a.meta["val"].dtype)
        if self.operator.kernel:
            args, kwargs = self.operator.call_arguments(input=source, weight=a, bias=None)
            narrow = self._emit(step, self.operator.node.target, *args, **kwargs)
            return self._emit(
                step, _POINTWISE[len(self.operator.kernel)], self._scaled(step, narrow), b, self._shift(step)
            )
        if self.operator.kind == "embedding":
            narrow = self._lookup(step, self._emit(step, aten.transpose.int, a, 0, 1), source)
        else:
            narrow = self._emit(step, aten.linear.default, source, a)
        return self._emit(step, aten.linear.default, self._scaled(step, narrow), b, self._shift(step))

    def _scaled_branch(self, step: VeRA, source: Node) -> Node:
        values, operator = self.values[step.name], self.operator
        a, b = (self._emit(step, aten.slice.Tensor, values[leaf], axis, 0, size) for leaf, axis, size in (
            ("vera_A", 1, operator.in_features), ("vera_B", 0, operator.out_features)))  # fmt: skip
        source = self._cast(step, source, a.meta["val"].dtype)
        if operator.kind == "embedding":
            narrow = self._lookup(step, self._emit(step, aten.transpose.int, a, 0, 1), source)
        else:
            narrow = self._emit(step, aten.linear.default, source, a)
        narrow = self._emit(step, aten.mul.Tensor, narrow, values["lambda_d"])
        return self._emit(step, aten.mul.Tensor, self._emit(step, aten.linear.default, narrow, b), values["lambda_b"])

    def _lookup(self, step: DeltaStep, table: Node, rows: Node) -> Node:
        args, kwargs = self.operator.call_arguments(input=rows, weight=table, sparse=False, scale_grad_by_freq=False)
        return self._emit(step, aten.embedding.default, *args, **kwargs)

    def _scaled(self, step: Any, value: Node) -> Node:
        return value if step.scale == 1 else self._emit(step, aten.mul.Tensor, value, step.scale)

    # ------------------------------------------------------------------ in the weight

    def _with_weight(self, source: Node) -> Node:
        """The operator with the weight and bias that the first `in_weight` steps make."""
        operator, first = self.operator, self.steps[0]
        wide = next(iter(self.values[first.name].values())).meta["val"].dtype
        weight = self._move(first, self._cast(first, operator.weight, wide), operator.to_canonical())
        bias = None if operator.bias is None else self._cast(first, operator.bias, wide)
        for step in self.steps[: self.in_weight]:
            if not isinstance(step, IA3):
                weight = self._changed(step, weight)
                if bias is not None and (shift := self._shift(step)) is not None:
                    bias = self._emit(step, aten.add.Tensor, bias, shift)
                continue
            gain = self.values[step.name]["ia3"]
            factor = self._emit(step, aten.reshape.default, gain, operator.per_row()) if step.side == "out" else (
                self._columns(step, gain))  # fmt: skip
            weight = self._emit(step, aten.mul.Tensor, weight, factor)
            if bias is not None and step.side == "out":
                bias = self._emit(step, aten.mul.Tensor, bias, gain)
        last = self.steps[self.in_weight - 1]
        weight = self._move(last, weight, operator.from_canonical())
        changes = {"sparse": False} if operator.kind == "embedding" else {}
        result = self._call(last, input=self._cast(last, source, wide), weight=weight, bias=bias, **changes)
        return self._cast(last, result, self.dtype)

    def _changed(self, step: LoRA | DoRA | VeRA | OFT, weight: Node) -> Node:
        if isinstance(step, VeRA | OFT):
            return self._traced(step, weight)
        values, shape = self.values[step.name], list(self.operator.shape)
        b = self._emit(step, aten.reshape.default, values["lora_B"], [self.operator.out_features, step.rank])
        a = self._emit(step, aten.reshape.default, values["lora_A"], [step.rank, -1])
        delta = self._emit(step, aten.reshape.default, self._emit(step, aten.matmul.default, b, a), shape)
        weight = self._emit(step, aten.add.Tensor, weight, self._scaled(step, delta))
        if isinstance(step, LoRA):
            return weight
        constant = self._emit(step, aten.detach.default, weight)
        dims = list(range(1, len(shape)))
        norm = self._emit(step, aten.linalg_vector_norm.default, constant, 2, dims, True)
        norm = self._emit(step, aten.clamp_min.default, norm, NORM_FLOOR)
        magnitude = self._emit(step, aten.reshape.default, values["lora_magnitude"], self.operator.per_row())
        return self._emit(step, aten.mul.Tensor, weight, self._emit(step, aten.div.Tensor, magnitude, norm))

    def _traced(self, step: VeRA | OFT, weight: Node) -> Node:
        values, operator = self.values[step.name], self.operator
        if isinstance(step, OFT):
            return self._inline(step, lambda weight, r: turned(step, operator, weight, r), weight, values["oft_R"])

        def scaled(weight: Tensor, lambda_b: Tensor, lambda_d: Tensor, a: Tensor, b: Tensor) -> Tensor:
            a, b = projections(operator, a, b)
            return weight + ((lambda_b.unsqueeze(1) * b) @ (lambda_d.unsqueeze(1) * a)).reshape(operator.shape)

        return self._inline(
            step, scaled, weight, *(values[leaf] for leaf in ("lambda_b", "lambda_d", "vera_A", "vera_B"))
        )

    def _columns(self, step: IA3, gain: Node) -> Node:
        """A gain per input feature as a factor of the canonical weight, whose rows see only their group's inputs."""
        out, inner, *kernel = self.operator.shape
        groups = self.operator.groups
        if groups == 1:
            return self._emit(step, aten.reshape.default, gain, [1, -1, *[1] * len(kernel)])
        gain = self._emit(step, aten.reshape.default, gain, [groups, 1, inner])
        gain = self._emit(step, aten.expand.default, gain, [groups, out // groups, inner])
        return self._emit(step, aten.reshape.default, gain, [out, inner, *[1] * len(kernel)])
