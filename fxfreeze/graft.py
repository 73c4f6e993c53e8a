"""Any nn.Module into a Program: captured at the shapes of the values it is given, its operators copied behind them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node, map_arg

from .capture import FlatModel, capture, check_capture, frozen
from .errors import CaptureError, PlanError
from .plan import Dim, Input, Plan
from .program import Origin, Program, first_line, is_effectful, is_random
from .proof import relative_error
from .sampling import dim_choices, sample_inputs

_LONGEST = 2**31
"""A bound as large as this says nothing."""


@dataclass(frozen=True)
class Graft:
    """What became of a module.

    Attributes:
        results: the nodes of what it returns, flat, in order.
        names: what its results are called, as :func:`fxfreeze.binding.describe` names them.
        nodes: its operators.
    """

    results: tuple[Node, ...]
    names: tuple[str, ...]
    nodes: frozenset[Node]


@dataclass(frozen=True)
class Scion:
    """A module captured by itself.

    Attributes:
        trainable: names of the constants that require a gradient.
    """

    program: Program
    trainable: frozenset[str]


def scion(host: Program, module: nn.Module, operands: Mapping[str, Node], where: str) -> Scion:
    """Capture `module` at the shapes and dtypes of `operands`.

    A dim that is symbolic in `host` is symbolic here: equal sizes stay equal, others are free.

    Args:
        operands: argument of the module's forward → the node it is given, in the order of its arguments.
        where: the site, for errors.

    Raises:
        PlanError: an operand is no tensor with an element type that a plan knows.
        CaptureError: the module cannot be captured at these shapes, or its graph, or the gradients of that, disagree
            with it.
    """
    plan = _plan(host, operands, where)
    try:
        program, eager = capture(module, plan, gradients=True)
        draws = [sample_inputs(program, sizes, seed) for seed, sizes in enumerate(dim_choices(program, 2))]
        check_capture(program, eager, draws)
    except CaptureError as error:
        inner = f" (in {error.where})" if error.where else ""
        raise CaptureError(
            f"cannot put {type(module).__name__} at {where}, where it is given {_shapes(operands)}: "
            f"{error.what}{inner}",
            where=where, line=error.line, hint=error.hint,
        ) from error  # fmt: skip
    trains = {name: value for name, value in module.named_parameters(remove_duplicate=False) if value.requires_grad}
    trainable = {name: value for name, value in trains.items() if name in program.state}
    _check_gradients(program, eager, trainable, draws[-1], where)
    return Scion(program, frozenset(trainable))


def graft(
    host: Program, scion: Scion, operands: Sequence[Node], constants: Mapping[str, Node], *, before: Node, like: Node,
    origin: Origin,
) -> Graft:  # fmt: skip
    """Copy the operators of `scion` before the node `before`, reading `operands` and `constants`.

    Args:
        constants: name of a constant of the scion → the node that stands for it in `host`.
        like: a node of the site, whose provenance the copies get.
    """
    program = scion.program
    copies: dict[Node, Any] = dict(zip(program.placeholders, operands, strict=True))
    made: list[Node] = []
    for node in program.graph.nodes:
        if node.op == "get_attr":
            copies[node] = constants[str(node.target)]
        elif node.op == "call_function" and not is_effectful(node):
            args, kwargs = map_arg((node.args, dict(node.kwargs)), copies.__getitem__)
            copy = host.call(node.target, *args, before=before, like=like, **kwargs)
            copy.meta["fxfreeze"] = origin
            copies[node] = copy
            made.append(copy)
    results = tuple(copies[node] for node in program.output_nodes)
    return Graft(results, program.outputs, frozenset(made))


def first_argument(module: nn.Module) -> str:
    """Name of the argument that the module's forward takes first.

    Raises:
        PlanError: it takes none by position.
    """
    kinds = inspect.Parameter
    for item in inspect.signature(module.forward).parameters.values():
        if item.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD):
            return item.name
    raise PlanError(
        f"the forward of {type(module).__name__} names no argument that a value could be given by",
        hint="write forward(self, x, ...)",
    )


def infer_again(program: Program, changed: Iterable[Node], where: str) -> None:
    """Compute the shapes behind the nodes `changed` anew.

    Raises:
        PlanError: an operator cannot take the new shapes; names it.
    """
    moved = set(changed)
    for node in program.graph.nodes:
        if node.op != "call_function" or node in moved or moved.isdisjoint(node.all_input_nodes):
            continue
        before = node.meta.get("val")
        try:
            program.infer(node)
        except Exception as error:
            raise PlanError(
                f"{where} changes a shape, which {program.where(node)} cannot take: {first_line(error)}",
                hint="return the shape that the rest of the model expects",
            ) from error
        if _form(before) != _form(node.meta["val"]):
            moved.add(node)
    program.graph.output_node().meta["val"] = tuple(node.meta["val"] for node in program.output_nodes)


def same_form(one: Node, other: Node) -> bool:
    """Whether two nodes have the same shape and dtype."""
    return _form(one.meta["val"]) == _form(other.meta["val"])


def _form(value: Any) -> object:
    return (str(value.dtype), tuple(map(str, value.shape))) if isinstance(value, Tensor) else str(value)


def _check_gradients(
    program: Program, eager: FlatModel, parameters: Mapping[str, Tensor], draw: Sequence[Tensor], where: str
) -> None:
    """Raises CaptureError: the module trains in another way than its graph would."""
    if any(is_random(node) for node in program.graph.nodes):
        return
    leaves = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}

    def load(node: Node) -> Tensor:
        name = str(node.target)
        return leaves[name] if name in leaves else program.state[name].to(node.meta["val"].dtype)

    def call(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return node.target(*args, **kwargs)  # type: ignore[operator]

    with frozen(eager, gradients=True):
        mine = _gradients(lambda given: program.execute(given, load, call), draw, leaves.values())
        theirs = _gradients(lambda given: eager(*given), draw, parameters.values())
    names = [f"input {spec.name!r}" for spec in program.inputs] + [f"parameter {name!r}" for name in leaves]
    for name, now, then in zip(names, mine, theirs, strict=True):
        loose = then is not None and torch.finfo(then.dtype).bits < 32
        one, other = (torch.zeros(1) if value is None else value for value in (now, then))
        same = one.shape == other.shape and relative_error(one, other) <= (0.1 if loose else 1e-3)
        if not same and (bool(one.any()) or bool(other.any())):
            raise CaptureError(
                f"the gradient of {name} is another one in the captured graph than in the module",
                where=where, hint="a custom autograd function, or a block without gradients, is lost: use detach()",
            )  # fmt: skip


def _gradients(
    run: Callable[[list[Tensor]], Sequence[Tensor]], draw: Sequence[Tensor], parameters: Iterable[Tensor]
) -> list[Tensor | None]:
    """Of a weighted sum of the results, by the inputs and `parameters`; None: it does not depend on it."""
    given = [value.detach().clone().requires_grad_(value.is_floating_point()) for value in draw]
    results = [value for value in run(given) if value.requires_grad]
    wanted = [value for value in (*given, *parameters) if value.requires_grad]
    found: dict[int, Tensor | None] = {}
    if results and wanted:
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(value.shape, generator=generator).to(value.device, value.dtype) for value in results]
        made = torch.autograd.grad(results, wanted, weights, allow_unused=True)
        found = {id(value): gradient for value, gradient in zip(wanted, made, strict=True)}
    return [found.get(id(value)) for value in (*given, *parameters)]


def _plan(host: Program, operands: Mapping[str, Node], where: str) -> Plan:
    """The operands as the inputs of a model of its own."""
    symbols: dict[str, str] = {}
    bounds: dict[str, Dim] = {}
    inputs = []
    ranges = {spec.name: spec for spec in host.inputs}
    for name, node in operands.items():
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            raise PlanError(f"{name} would be {type(value).__name__}, not a tensor", where=where)
        shape: list[int | str] = []
        for size in value.shape:
            if isinstance(size, int):
                shape.append(size)
                continue
            symbol = symbols.setdefault(str(size), f"d{len(symbols)}")
            bounds[symbol] = _bounds(host, size)
            shape.append(symbol)
        spec = ranges.get(node.name) or ranges.get(_input_name(host, node))
        low, high = (spec.low, spec.high) if spec is not None else (None, None)
        inputs.append(Input(name, shape, str(value.dtype).removeprefix("torch."), low, high))
    return Plan(inputs, targets=(), dims=bounds)


def _input_name(host: Program, node: Node) -> str:
    placeholders = host.placeholders
    return host.inputs[placeholders.index(node)].name if node in placeholders else ""


def _bounds(host: Program, size: Any) -> Dim:
    env = host.fake_mode.shape_env
    found = env.bound_sympy(size.node.expr) if env is not None else None
    # sympy's infinities of whole numbers compare, and convert to nothing.
    low = int(found.lower) if found is not None and found.lower > 1 else 1
    high = int(found.upper) if found is not None and found.upper < _LONGEST else None
    return Dim(low, high)


def _shapes(operands: Mapping[str, Node]) -> str:
    def words(node: Node) -> str:
        value = node.meta["val"]
        return f"{re.sub('^torch.', '', str(value.dtype))}[{', '.join(map(str, value.shape))}]"

    return ", ".join(f"{name}: {words(node)}" for name, node in operands.items())
