"""nn.Module → Program, by torch.export: non-strict first, strict as the second rung.

The model is exported behind a wrapper that takes flat tensors, nests them as the plan names them, and returns only
tensors: of a dict or dataclass output it keeps what ``Plan(outputs=[...])`` asks for. An output object that
torch.export cannot flatten (a key-value cache) therefore never reaches it.
"""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Graph, Node

from . import sampling
from .binding import describe, flatten_inputs, nest, select, top_level
from .constants import Constants
from .errors import CaptureError, FxfreezeError
from .exporting import dynamic_shapes, quiet, summary
from .foreign import recognised
from .functional import functionalise, normalise, unhide
from .margin import Decisions, Slack
from .plan import Plan
from .program import Program, TensorSpec, is_effectful, is_operator, is_random
from .proof import relative_error
from .wrapped import unwrapped

_WRAPPED = "model"
_CPU = torch.device("cpu")


class Observation:
    """How a model's outputs nest and what they are called, noted while it runs.

    An object of its own, because torch.export puts a module's attributes back after a trace.
    """

    structure: dict[str, Any] | None = None
    names: tuple[str, ...] = ()


class FlatModel(nn.Module):
    """The user's model behind flat tensors: what is exported, and the eager reference everything is compared with.

    It takes the tensors of `inputs` first, then those that steps of the plan add (``Plan.selects``), which mean nothing
    to the model.

    Attributes:
        observed: structure and names of the outputs, once it was called (see :mod:`fxfreeze.binding`).
    """

    def __init__(self, model: nn.Module, inputs: Sequence[str], outputs: Sequence[str] | None) -> None:
        super().__init__()
        self.model = model
        self.inputs, self.selected = tuple(inputs), tuple(outputs) if outputs is not None else None
        self.positional, self.keywords = bind_names(model, self.inputs)
        self.observed = Observation()

    def forward(self, *flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        nested = nest(self.inputs, flat[: len(self.inputs)])
        result = self.model(
            *(nested[name] for name in self.positional), **{name: nested[name] for name in self.keywords}
        )
        if self.selected is not None:
            result = select(result, self.selected)
        structure, names, tensors = describe(result)
        self.observed.structure, self.observed.names = structure, tuple(names)
        return tuple(tensors)


def bind_names(model: nn.Module, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split top-level input names into those passed by position and those passed by keyword.

    A name that is a parameter of the model's ``forward`` goes by keyword. When none is, all go by position, so that
    a plan may call its inputs what they are.

    Raises:
        CaptureError: some names are parameters and others are not, or ``forward`` wants more or fewer inputs.
    """
    tops = top_level(names)
    parameters = inspect.signature(model.forward).parameters.values()
    kinds = inspect.Parameter
    keyword = {p.name for p in parameters if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)}
    open_ended = any(p.kind is kinds.VAR_KEYWORD for p in parameters)
    known = [name for name in tops if name in keyword]
    if known and len(known) < len(tops) and not open_ended:
        raise CaptureError(
            f"forward has no parameter named {', '.join(sorted(set(tops) - keyword))}",
            where=type(model).__qualname__, hint=f"its parameters are {', '.join(p.name for p in parameters)}",
        )  # fmt: skip
    positional, keywords = ([], tops) if known else (tops, [])
    try:
        inspect.signature(model.forward).bind(*positional, **dict.fromkeys(keywords))
    except TypeError as error:
        raise CaptureError(
            f"the plan's inputs {tops} do not fit forward: {error}",
            where=type(model).__qualname__, hint=f"its parameters are {', '.join(p.name for p in parameters)}",
        ) from error  # fmt: skip
    return positional, keywords


def input_specs(plan: Plan, device: torch.device = _CPU) -> tuple[TensorSpec, ...]:
    """The plan's inputs, those that steps add behind the model's own, with torch dtypes, on `device`."""
    return tuple(
        TensorSpec(item.name, getattr(torch, item.dtype), tuple(item.shape), item.low, item.high, device, added)
        for items, added in ((plan.inputs, False), (plan.selects, True))
        for item in items
    )


def dim_bounds(plan: Plan) -> dict[str, tuple[int, int | None]]:
    """Bounds of every symbolic dim the plan's inputs name."""
    declared = {name: (dim.min, dim.max) for name, dim in plan.dims.items()}
    return {name: declared.get(name, (1, None)) for name in sampling.symbolic_dims(input_specs(plan))}


def flat_examples(plan: Plan, examples: Any) -> list[torch.Tensor] | None:
    """`example_inputs` as the caller gave them (a tensor, a tuple of arguments, a dict by name) → flat tensors.

    Inputs that steps add may be left out: they are then 0, 1, 2, … in turn.

    Raises:
        CaptureError: they do not fit the plan's inputs.
    """
    if examples is None:
        return None
    names, selects = [item.name for item in plan.inputs], {item.name: item for item in plan.selects}
    if isinstance(examples, Mapping):
        own = {key: value for key, value in examples.items() if key not in selects}
        rows = {key: value for key, value in examples.items() if key in selects}
        flat = flatten_inputs(names, (), own, error=CaptureError)
    else:
        args = tuple(examples) if isinstance(examples, list | tuple) else (examples,)
        count = len(args) - len(selects) if len(args) == len(top_level(names)) + len(selects) else len(args)
        rows = dict(zip(selects, args[count:], strict=False))
        flat = flatten_inputs(names, args[:count], {}, error=CaptureError)
    for name, item in selects.items():
        counted = torch.arange(len(flat[0]), device=flat[0].device) % (int(item.high or 0) + 1)
        flat.append(rows.get(name, counted))
    return flat


@contextmanager
def frozen(model: nn.Module, *, gradients: bool = False) -> Iterator[None]:
    """The model in eval mode, without gradients or with them; every module's mode is put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        # Not model.eval(): a module that overrides train() may do more than set a flag.
        for module, _ in modes:
            module.training = False
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def capture(
    model: nn.Module, plan: Plan, examples: Sequence[torch.Tensor] | None = None, *, gradients: bool = False
) -> tuple[Program, FlatModel]:
    """Export `model` as `plan` declares its inputs and outputs.

    Args:
        model: any nn.Module; it is captured in eval mode and left as it was. Of a peft model that changes layers only,
            the model inside is meant.
        plan: names, dtypes, shapes and symbolic dims of the inputs; optionally the outputs to keep.
        examples: flat tensors to trace with; drawn from the plan when absent.
        gradients: trace what the model does while its parameters, and what is before it, train.

    Returns:
        The Program, whose constants share memory with the model, and the flat eager model it was made from.

    Raises:
        CaptureError: with the module path and source line at fault, and what was tried.
    """
    model = unwrapped(model)
    _check_constants(model)
    specs, dims = input_specs(plan, _device(model)), dim_bounds(plan)
    flat = FlatModel(model, [spec.name for spec in plan.inputs], plan.outputs)
    sizes = sampling.tracing_sizes(specs, dims, examples)
    inputs = sampling.sample_inputs(specs, sizes, seed=0, examples=examples)
    for value in inputs:
        value.requires_grad_(gradients and (value.is_floating_point() or value.is_complex()))
    with frozen(model, gradients=gradients), recognised(model) as known, quiet():
        exported = _export(flat, inputs, specs, dims)
        if flat.observed.structure is None:  # a strict trace leaves no side effects
            flat(*inputs)
    _check_dims(exported, specs, dims)
    graph, state = _unlift(exported)
    if functionalise(graph) is not None:
        unhide(exported.graph)
        with frozen(model), quiet():
            graph, state = _unlift(exported.run_decompositions({}))
    normalise(graph)
    _rename(graph, state, known.names)
    structure = flat.observed.structure or {}
    program = Program(graph, Constants(state), specs, flat.observed.names, structure, dims, left=known.left)
    program.sweep()
    program.inputs = tuple(map(_with_range, specs, program.placeholders))
    _refuse_batch_statistics(program)
    return program, flat


def _export(
    flat: FlatModel,
    inputs: Sequence[torch.Tensor],
    specs: Sequence[TensorSpec],
    dims: Mapping[str, tuple[int, int | None]],
) -> ExportedProgram:
    shapes = (dynamic_shapes(specs, dims),)
    tried: list[tuple[str, BaseException]] = []
    for strict in (False, True):
        try:
            return torch.export.export(flat, tuple(inputs), dynamic_shapes=shapes, strict=strict)
        except FxfreezeError:
            raise
        except Exception as error:
            tried.append(("strict" if strict else "non-strict", error))
    raise _capture_error(flat.model, tried)


def _capture_error(model: nn.Module, tried: Sequence[tuple[str, BaseException]]) -> CaptureError:
    where, line = _blame(model, tried[0][1])
    attempts = "; ".join(f"{rung}: {summary(error)}" for rung, error in tried)
    hint = _hint(" ".join(str(error) for _, error in tried))
    return CaptureError(f"torch.export cannot capture this model. Tried {attempts}", where=where, line=line, hint=hint)


def _hint(text: str) -> str:
    if "Constraints violated" in text or "specialized" in text.lower() or "ConstraintViolation" in text:
        return "the model fixes or relates a dim the plan calls symbolic: give it a number, or bounds in Plan(dims=...)"
    if "data-dependent" in text.lower() or "DataDependent" in text or "UserError" in text:
        return "the forward branches on values: use torch.where or torch.cond, or compile the branches one by one"
    return "capture a smaller part of the model, or pass example_inputs that it accepts"


def _blame(model: nn.Module, error: BaseException) -> tuple[str, str | None]:
    """Module path and source line of the innermost forward of the model that is on the error's stack."""
    paths = {id(module): path for path, module in model.named_modules()}
    where, line = type(model).__qualname__, None
    chained: list[BaseException] = []
    cursor: BaseException | None = error
    while cursor is not None and cursor not in chained:
        chained.append(cursor)
        cursor = cursor.__cause__ or cursor.__context__
    for link in chained:
        for frame, number in traceback.walk_tb(link.__traceback__):
            owner = frame.f_locals.get("self")
            # named_modules covers every owner that counts; identity first, since == on a Module's proxy may trace.
            if id(owner) in paths and "/torch/nn/modules/module.py" not in frame.f_code.co_filename:
                where = paths[id(owner)] or type(model).__qualname__
                line = f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{number}"
    if line is None and (found := re.findall(r'File "([^"]+)", line (\d+), in forward', str(error))):
        line = f"{found[-1][0].rsplit('/', 1)[-1]}:{found[-1][1]}"
    return where, line


def _device(model: nn.Module) -> torch.device:
    tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def _check_constants(model: nn.Module) -> None:
    """Refuse NaN and Inf weights: no proof could tell a right rewrite of them from a wrong one.

    Raises:
        CaptureError: names the tensor.
    """
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, value in tensors:
            if value.is_meta:
                raise CaptureError(f"{kind} has no values: it lies on the meta device", where=name)
            if not (value.is_floating_point() or value.is_complex()):
                continue
            # -inf is what an attention mask buffer is made of; NaN never means anything.
            if bool(torch.isnan(value).any()) if kind == "buffer" else not _all_finite(value):
                raise CaptureError(
                    f"{kind} holds NaN{'' if kind == 'buffer' else ' or Inf'}", where=name,
                    hint="load the right checkpoint; a frozen model must hold finite weights",
                )  # fmt: skip


def _all_finite(value: torch.Tensor) -> bool:
    # The sum is finite only if every term is (short of overflow, which is then looked at properly): one pass, no mask.
    return bool(torch.isfinite(value.sum())) or bool(torch.isfinite(value).all())


def _check_dims(
    exported: ExportedProgram, specs: Sequence[TensorSpec], dims: Mapping[str, tuple[int, int | None]]
) -> None:
    names = [item.arg.name for item in exported.graph_signature.input_specs if item.kind is InputKind.USER_INPUT]
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    for spec, name in zip(specs, names, strict=True):
        for axis, (declared, size) in enumerate(zip(spec.shape, nodes[name].meta["val"].shape, strict=True)):
            if isinstance(declared, str) and isinstance(size, int) and dims[declared] != (size, size):
                raise CaptureError(
                    f"the model fixes dim {declared!r} (axis {axis}) to {size}", where=spec.name,
                    hint=f"declare the axis as {size}, or remove what fixes it from the forward",
                )  # fmt: skip


def _with_range(spec: TensorSpec, placeholder: Node) -> TensorSpec:
    """Let indices that the plan gives no range reach every row of the tables they index."""
    if spec.high is not None or spec.dtype not in (torch.int64, torch.int32):
        return spec
    tables = [
        user.all_input_nodes[0].meta["val"].shape[0]
        for user in placeholder.users
        if user.target is torch.ops.aten.embedding.default and user.args[1] is placeholder
    ]
    return replace(spec, low=spec.low or 0, high=min(tables) - 1) if tables else spec


def _refuse_batch_statistics(program: Program) -> None:
    fixed: set[Node] = set()  # computed from constants alone: weight standardisation is a batch-norm of a weight
    for node in program.graph.nodes:
        if node.op in ("get_attr", "call_function") and all(operand in fixed for operand in node.all_input_nodes):
            fixed.add(node)
        elif node.target is torch.ops.aten.batch_norm.default and (node.args[5] or node.args[3] is None):
            raise CaptureError(
                "batch-norm without running statistics normalises by the batch it is given, so it is not frozen",
                where=program.module_path(node), line=program.source_line(node),
                hint="train with track_running_stats=True, or use GroupNorm or InstanceNorm",
            )  # fmt: skip


def _user_name(name: str) -> str:
    return name.removeprefix(f"{_WRAPPED}.")


def _rename(graph: Graph, state: dict[str, torch.Tensor], names: Mapping[str, str]) -> None:
    """Call modules and constants as the user does, who did not write peft's wrappers."""

    def plain(path: str) -> str:
        for made, name in sorted(names.items(), reverse=True):  # inner wrappers first
            if path == made or path.startswith(f"{made}."):
                path = name + path[len(made) :]
        return path

    if not names:
        return
    for name in list(state):
        state[plain(name)] = state.pop(name)
    for node in graph.nodes:
        if node.op == "get_attr":
            node.target = plain(str(node.target))
        stack = node.meta.get("nn_module_stack") or {}
        node.meta["nn_module_stack"] = {key: (plain(path), kind) for key, (path, kind) in stack.items()}


def _unlift(exported: ExportedProgram) -> tuple[Graph, dict[str, torch.Tensor]]:
    """Copy the exported graph with its lifted parameters, buffers and constants as ``get_attr`` nodes."""
    held = {**exported.state_dict, **exported.constants}
    signature = {item.arg.name: item for item in exported.graph_signature.input_specs}
    graph, state, values = Graph(), {}, {}
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            item = signature[node.name]
            if item.kind is InputKind.USER_INPUT:
                values[node] = graph.placeholder(node.name)
            else:
                name = _user_name(str(item.target))
                state[name] = _tensor(held[str(item.target)], name).detach()
                values[node] = graph.create_node("get_attr", name)
            values[node].meta = _user_meta(node.meta)
        elif node.op == "output":
            results = _user_results(exported, node)
            graph.output(tuple(values[result] for result in results))
        else:
            _copy_call(exported, graph, node, values)
    graph.output_node().meta["val"] = tuple(item.meta["val"] for item in graph.output_node().args[0])  # type: ignore[union-attr]
    return graph, state


def _user_results(exported: ExportedProgram, output: Node) -> list[Node]:
    """Results that the user's forward returned, without the mutations torch.export appends.

    An input written in place is such a mutation; a Program computes the same outputs and leaves the input alone.
    """
    kinds = [item.kind for item in exported.graph_signature.output_specs]
    return [node for node, kind in zip(output.args[0], kinds, strict=True) if kind is OutputKind.USER_OUTPUT]  # type: ignore[arg-type]


def _copy_call(exported: ExportedProgram, graph: Graph, node: Node, values: dict[Any, Any]) -> None:
    if node.op == "get_attr":  # the body of a higher-order operator; its caller inlines it
        values[node] = getattr(exported.graph_module, str(node.target))
        return
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        values[node] = _inline(graph, node, values)
        return
    if getattr(node.target, "__name__", "") == "getitem" and isinstance(values.get(node.args[0]), tuple):
        values[node] = values[node.args[0]][node.args[1]]
        return
    if not is_operator(node.target):
        raise CaptureError(f"{node.target} is not an operator", where=_stack_path(node))
    values[node] = graph.node_copy(node, lambda old: values[old])
    values[node].meta = _user_meta(node.meta)
    if is_effectful(values[node]):
        values[node].meta.setdefault("val", None)  # an assertion returns nothing


def _inline(graph: Graph, node: Node, values: dict[Any, Any]) -> tuple[Any, ...]:
    """Replace a grad-mode or disabled-autocast wrapper by its body: neither means anything to a frozen graph."""
    name = getattr(node.target, "_name", str(node.target))
    bodies = [arg for arg in node.args if isinstance(arg, Node) and isinstance(values.get(arg), torch.fx.GraphModule)]
    enabled_autocast = name == "wrap_with_autocast" and node.args[2]
    if name not in ("wrap_with_set_grad_enabled", "wrap_with_autocast") or len(bodies) != 1 or enabled_autocast:
        raise CaptureError(
            f"the higher-order operator {name} is not supported", where=_stack_path(node),
            hint="replace control flow by torch.where, and enter autocast outside of the model",
        )  # fmt: skip
    body = values[bodies[0]]
    operands = [values[arg] if isinstance(arg, Node) else arg for arg in node.args[node.args.index(bodies[0]) + 1 :]]
    inner: dict[Any, Any] = {}
    feed = iter(operands)
    for item in body.graph.nodes:
        if item.op == "placeholder":
            inner[item] = next(feed)
        elif item.op == "output":
            return tuple(inner[result] for result in item.args[0])
        else:
            inner[item] = graph.node_copy(item, lambda old: inner[old])
            inner[item].meta = _user_meta(item.meta)
    raise CaptureError(f"the body of {name} returns nothing", where=_stack_path(node))


def _user_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What a Program keeps of a node's metadata, with module paths as the user knows them."""
    kept = {key: meta[key] for key in ("val", "stack_trace") if key in meta}
    stack = (meta.get("nn_module_stack") or {}).items()
    kept["nn_module_stack"] = {
        key: (re.sub(r"@\d+", "", _user_name(path)), _class_name(kind))
        for key, (path, kind) in stack
        if path not in ("", _WRAPPED) and not path.startswith("_empty_nn_module_stack")  # torch.export's own filler
    }
    return kept


def _class_name(kind: Any) -> str:
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def _stack_path(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return _user_name(next(reversed(stack.values()))[0]) if stack else "<model>"


def _tensor(value: Any, name: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise CaptureError(f"the model holds a {type(value).__name__}, which no target can store", where=name)
    return value


@torch.no_grad()
def check_capture(program: Program, eager: FlatModel, draws: Sequence[Sequence[torch.Tensor]]) -> None:
    """Compare the captured program with the model it was captured from, which nothing sees again after this.

    Raises:
        CaptureError: an output differs by more than the same operators could.
    """
    if any(is_random(node) for node in program.graph.nodes):
        return
    for draw in draws[:1]:
        with frozen(eager):
            expected = eager(*(value.clone() for value in draw))
        decisions = Decisions(program, draw)
        for output, (name, now, then) in enumerate(zip(program.outputs, program.run(*draw), expected, strict=True)):
            loose = then.is_floating_point() and torch.finfo(then.dtype).bits < 32
            bound = 0.1 if loose else 1e-3
            error = _error(now, then, decisions.slacks(output), bound)
            if not error <= bound:
                raise CaptureError(
                    f"the captured graph disagrees with the model: output {name!r} differs by {error:.2g}",
                    hint="the model may keep state between calls, or behave differently when traced",
                )


def _error(now: torch.Tensor, then: torch.Tensor, slacks: Iterable[Slack | None], bound: float) -> float:
    """With the first slack by which it is within the bound, or with the last."""
    for slack in slacks:  # there is one at least
        error = relative_error(now, then) if slack is None else slack.relative_error(now, then)
        if error <= bound:
            break
    return error
