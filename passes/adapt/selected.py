"""Insert LoRA with several adapters, of which every row of a batch names one, beside the layers they change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze import weights
from fxfreeze.errors import PlanError
from fxfreeze.kernels import select_conv, select_lora
from fxfreeze.plan import IA3, DoRA, LoRA
from fxfreeze.program import BANK_NOTE, Origin, Program
from fxfreeze.rewrite import Context, Pass

from .._adapters import SELECTED, describe, parameter_name
from .._operators import WeightOperator, arguments, aten, weight_operator
from ._parameters import Parameter, Source, parameter_dtype, parameters, peft_misfit
from ._sites import Sites, find_sites, resolve

_FLATTENS = (aten.view.default, aten.reshape.default)


class InsertSelected(Pass):
    """Put ``fxfreeze::select_lora`` beside each layer that a LoRA with `adapters` addresses: y = W·x + s·B[id]·A[id]·x.

    A and B of all adapters train as one parameter each: those of one adapter (``lora_A`` [r, in], ``lora_B`` [out, r];
    of a convolution [r, in / groups, *kernel] and [out, r, 1, …]) with a dim for all in front. In the graph a row of
    zeros stands before them: id 0 is the layer as it is. An embedding's token ids are looked up in A; beside a
    convolution stands ``fxfreeze::select_conv``.

    It adds to what the layer's other steps make of it, and so comes after them: a second LoRA at the site adds up with
    it in any order, an IA3 before it changes the layer alone. What would change both (a DoRA, or an IA3 after it) is
    refused, and so is a transposed convolution.
    """

    name, stage, exact = "insert-selected", "adapt", False

    def run(self, program: Program, ctx: Context) -> int:
        steps = [(i, step) for i, step in enumerate(ctx.plan.steps) if isinstance(step, LoRA) and step.adapters]
        if not steps:
            return 0
        found, count = find_sites(program), 0
        names = [spec.name for spec in program.inputs]
        for index, step in steps:
            ids = program.placeholders[names.index(step.select)]
            sites = _selectable(found, ids)
            taken, refused = resolve(sites, step, index)
            for path, reason in refused.items():
                ctx.ledger.add(
                    site=path, step=step.name, requested=describe(step), outcome="refused", detail=f"{path} {reason}"
                )
            _check_order(ctx, found, index, taken)
            source = _source(step, ctx, program, found)
            for path in taken:
                _insert(program, ctx, path, found.operators[path], step, source, ids)
                count += len(found.operators[path])
            source.finish()
        return count


# ---- where


def _selectable(found: Sites, ids: Node) -> Sites:
    """The sites whose input has the rows that `ids` chooses for; the others are refused, with why."""
    sites = Sites(found.program, dict(found.operators), dict(found.refused))
    for path, operators in found.operators.items():
        if reason := next((said for item in operators if isinstance(said := _rows(item, ids), str)), None):
            del sites.operators[path]
            sites.refused[path] = reason
    return sites


def _rows(operator: WeightOperator, ids: Node) -> Node | str:
    """The input of `operator` as [rows, ..., in], or why there is none.

    A layer that multiplies matrices only, such as transformers' Conv1D, reads a view in which the rows of a batch and
    their tokens are one dim; what it is a view of has the rows apart.
    """
    if operator.kind == "transposed":
        return "is a transposed convolution, whose windows overlap in what it makes: none of an output's row is known"
    source = operator.input
    shape = source.meta["val"].shape
    if operator.kind == "conv" and len(shape) != len(operator.kernel) + 2:
        return f"reads {list(shape)}, which has no rows: it is one image, with its features first"
    if _has_rows(source, ids) and (len(shape) > 1 or operator.kind == "embedding"):
        return source
    before = source.args[0] if operator.kind in ("linear", "matmul") and source.target in _FLATTENS else None
    if isinstance(before, Node) and _has_rows(before, ids) and _last(before) == _last(source):
        return before
    return f"reads {list(source.meta['val'].shape)}, whose first dim is not the rows that adapters are selected for"


def _has_rows(value: Node, ids: Node) -> bool:
    shape = value.meta["val"].shape
    return len(shape) > 0 and str(shape[0]) == str(ids.meta["val"].shape[0])


def _last(value: Node) -> str:
    return str(value.meta["val"].shape[-1])


def _check_order(ctx: Context, found: Sites, index: int, taken: list[str]) -> None:
    """Refuse steps that would have to change the adapters, too.

    Raises:
        PlanError: names the two steps and the site.
    """
    step = ctx.plan.steps[index]
    for other_index, other in enumerate(ctx.plan.steps):
        if not isinstance(other, DoRA | IA3) or (isinstance(other, IA3) and other_index < index):
            continue
        shared = set(taken) & set(resolve(found, other, other_index)[0])
        if shared:
            raise PlanError(
                f"{other.name!r} would scale what the adapters of {step.name!r} add, row by row differently",
                where=min(shared), hint="an IA3 may come before them, and then scales the layer alone",
            )  # fmt: skip


# ---- what


@dataclass
class _Files:
    """Where values come from when every adapter has a file of its own."""

    step: LoRA
    adapters: list[weights.Lone]
    foreign: Callable[[str], str | None]

    def value(self, site: str, parameter: Parameter) -> Tensor:
        rows = []
        for adapter in self.adapters:
            if adapter.from_peft and (reason := self.foreign(site)):
                raise PlanError(f"{site} {reason}", where=adapter.where)
            shapes = {"a_shape" if parameter.leaf == "lora_A" else "b_shape": parameter.shape[1:]}
            a, b = adapter.pair(self.step, site, **shapes)
            row = a if parameter.leaf == "lora_A" else b / self.step.scale
            rows.append(row.reshape(parameter.shape[1:]))
        return torch.stack(rows)

    def finish(self) -> None:
        for adapter in self.adapters:
            adapter.finish()


def _source(step: LoRA, ctx: Context, program: Program, found: Sites) -> Source | _Files:
    if isinstance(step.weights, tuple):

        def foreign(site: str) -> str | None:
            return peft_misfit(program, found.operators[site][0], site)

        return _Files(step, [weights.Lone(path) for path in step.weights], foreign)
    return Source(step, ctx.plan.steps)


def _insert(
    program: Program, ctx: Context, path: str, operators: list[WeightOperator], step: LoRA, source: Source | _Files,
    ids: Node,
) -> None:  # fmt: skip
    first = operators[0].node
    banks = {}
    for leaf, value in _values(program, path, operators[0], step, source).items():
        name = parameter_name(step, path, leaf)
        if name in program.state:
            raise PlanError(f"the model already has a parameter named {name}", where=path, hint="rename the step")
        banks[leaf] = program.add_constant(name, value, before=first, like=first)
        banks[leaf].meta["fxfreeze"] = Origin(step.name, SELECTED, path)
        if note := peft_misfit(program, operators[0], path):
            banks[leaf].meta[BANK_NOTE] = note
    for call, operator in enumerate(operators):
        current = weight_operator(operator.node)  # read again: an insertion upstream has changed its input
        assert isinstance(current, WeightOperator)
        _beside(program, current, banks, step, ids, Origin(step.name, SELECTED, path, call))
    state = "untrained: the identity"
    if step.weights is not None:
        named = [step.weights] if isinstance(step.weights, str) else step.weights
        state = f"weights from {', '.join(named[:3])}" + (f" and {len(named) - 3} more" if len(named) > 3 else "")
    times = f", in {len(operators)} calls" if len(operators) > 1 else ""
    ctx.ledger.add(
        site=path, step=step.name, requested=describe(step), outcome="rewritten",
        executes=f"{_beside_op(operators[0])} beside {first.target}", detail=state + times,
    )  # fmt: skip


def _values(
    program: Program, path: str, operator: WeightOperator, step: LoRA, source: Source | _Files
) -> dict[str, Tensor]:
    """What trains at `path`, by leaf name: as for one adapter, with a dim for all of them in front."""
    stored = program.state.tensor(str(operator.weight.target))
    dtype, count = parameter_dtype(operator.weight.meta["val"].dtype), step.adapters
    assert count is not None
    found = {}
    for item in parameters(step, operator, stored):

        def drawn(generator: torch.Generator, item: Parameter = item) -> Tensor:
            return torch.stack([item.initial(generator) for _ in range(count)])

        bank = Parameter(item.leaf, (count, *item.shape), drawn)
        found[item.leaf] = source.value(path, bank).to(stored.device, dtype)
    return found


def _beside(
    program: Program, operator: WeightOperator, banks: dict[str, Node], step: LoRA, ids: Node, origin: Origin
) -> None:
    """One call of the layer, plus what the rows' adapters make of its input."""
    layer, before = operator.node, operator.node.next
    kind, shape = layer.meta["val"].dtype, layer.meta["val"].shape

    def emit(target: Any, *args: Any, **kwargs: Any) -> Node:
        node = program.call(target, *args, before=before, like=layer, **kwargs)
        node.meta["fxfreeze"] = origin
        return node

    a, b = banks["lora_A"], banks["lora_B"]
    if operator.kernel:
        b = emit(aten.flatten.using_ints, b, 2)
    a, b = (emit(aten.constant_pad_nd.default, bank, _first_row(bank)) for bank in (a, b))
    b = emit(aten.transpose.int, b, 1, 2)
    b = b if step.scale == 1 else emit(aten.mul.Tensor, b, step.scale)
    rows = _rows(operator, ids)
    assert isinstance(rows, Node)
    wide = a.meta["val"].dtype
    if operator.kind != "embedding" and rows.meta["val"].dtype != wide:
        rows = emit(aten.to.dtype, rows, wide)
    delta = emit(_beside_op(operator), rows, a, b, ids, **_window(operator))
    if delta.meta["val"].dim() != len(shape):
        delta = emit(aten.reshape.default, delta, [-1, operator.out_features])
    total = emit(aten.add.Tensor, layer, delta)
    total = total if total.meta["val"].dtype == kind else emit(aten.to.dtype, total, kind)
    mine = {node for node in program.graph.nodes if node.meta.get("fxfreeze") == origin}
    layer.replace_all_uses_with(total, delete_user_cb=lambda user: user not in mine)


def _beside_op(operator: WeightOperator) -> torch._ops.OpOverload:
    return (select_conv if operator.kernel else select_lora).KERNEL.op


def _first_row(bank: Node) -> list[int]:
    """What pads `bank` with one row of zeros before its first."""
    return [0, 0] * (bank.meta["val"].dim() - 1) + [1, 0]


def _window(operator: WeightOperator) -> dict[str, Any]:
    """Where a convolution looks, in the words of ``select_conv``; nothing for the others."""
    if not operator.kernel:
        return {}
    given, dims = arguments(operator.node), len(operator.kernel)
    stride, dilation = (list(given[key]) * (dims if len(given[key]) == 1 else 1) for key in ("stride", "dilation"))
    padding = given["padding"]
    if isinstance(padding, str):
        sizes = zip(dilation, operator.kernel, strict=True)
        whole = [0 if padding == "valid" else far * (size - 1) for far, size in sizes]
        pairs = [(size // 2, size - size // 2) for size in whole]
    else:
        pairs = [(size, size) for size in list(padding) * (dims if len(padding) == 1 else 1)]
    return {"stride": stride, "padding": [size for pair in pairs for size in pair], "dilation": dilation,
            "groups": operator.groups}  # fmt: skip
