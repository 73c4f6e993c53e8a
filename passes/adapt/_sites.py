"""Where an adapter goes: from the globs of a step to the operators it changes, or the values.

Every operator with a weight belongs to one module path, the one its user would name: the module that owns the weight
where that lies below the module that ran the operator (``nn.MultiheadAttention`` runs its ``out_proj`` itself), else
the module that ran it (a tied ``lm_head`` reads the weight of the token embedding, and is still the ``lm_head``).

A glob takes the matched paths that hold such an operator themselves. It is an error if it takes none; where it takes
some, every other matched path is refused with its reason, except a container whose layers are all taken.

An activation belongs to the module that runs it. What a module without weights and children computes around one (a
GELU written out, say) is one activation, the value that leaves the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import count
from typing import Any, ClassVar

import torch
from torch.fx import Node

from fxfreeze.errors import PlanError
from fxfreeze.plan import Step
from fxfreeze.program import Program
from fxfreeze.rewrite import NoMatch, match_sites

from .._adapters import SPLICE
from .._operators import ACTIVATIONS, FORMS, WeightOperator, aten, constant_problem, weight_operator

_ADAPTABLE = "Linear, Conv1d/2d/3d, ConvTranspose1d/2d/3d, Embedding and transformers' Conv1D"
_SHOWN = 6


@dataclass
class Offers:
    """What the paths of a program offer to a step.

    Attributes:
        operators: path → what is there, in graph order.
        refused: path → why what is at that path cannot be taken.
        lacking: what to say of a path with nothing.
    """

    program: Program
    operators: dict[str, list[Any]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    lacking: ClassVar[str]

    def reason(self, path: str) -> str:
        """Why no adapter can act on `path`, in a sentence without a subject."""
        if path in self.refused:
            return self.refused[path]
        if inner := _below(path, self.operators):
            return f"is a container; name its layers, such as {_some(inner)}"
        kind = self.program.module_paths().get(path, "").rpartition(".")[2] or "module"
        ran = [node for node in self.program.sites().get(path, ()) if isinstance(node.target, torch._ops.OpOverload)]
        read = [node for node in ran if any(item.op == "get_attr" for item in node.all_input_nodes)]
        runs = f" (it runs {_some(sorted({str(node.target) for node in read or ran}))})" if ran else ""
        return f"is a {kind}{runs}, which {self.lacking}"

    def of_model(self) -> str | None:
        """What to do about operators in the forward of the model itself, which no pattern can name."""
        return None


class Sites(Offers):
    """Layers with a weight: path → calls of the one weight it holds; several when its module runs repeatedly."""

    operators: dict[str, list[WeightOperator]]
    lacking = f"holds no weight that an adapter can act on; {_ADAPTABLE} do"


@dataclass(frozen=True)
class Value:
    """A value to gate.

    Attributes:
        node: it.
        users: who reads it gated.
        body: what makes it of the module's input.
    """

    node: Node
    users: frozenset[Node]
    body: frozenset[Node]


@dataclass
class Chain:
    """What steps put behind one value: each for some of its users, what is for more of them nearer to the value.

    Attributes:
        links: who reads a link, its result, the operators that make it, and the site it is for.
    """

    value: Node
    links: list[tuple[frozenset[Node], Node, frozenset[Node], str]] = field(default_factory=list)

    def end(self, users: frozenset[Node], site: str | None = None) -> Node:
        """What `users` read, up to links that only some of them see.

        Args:
            site: look no further than what is for this path or one below it.
        """
        seen = [item for item in self.links if site is None or item[3] == site or item[3].startswith(f"{site}.")]
        return next((link for readers, link, *_ in reversed(seen) if readers >= users), self.value)

    def add(self, link: Node, users: frozenset[Node], made: frozenset[Node], site: str = "") -> None:
        """Put `link`, which the operators `made` compute of :meth:`end`, behind that, for `users` only."""
        inner = {node for seen, _, nodes, _ in self.links if seen < users for node in nodes}
        self.end(users).replace_all_uses_with(link, delete_user_cb=lambda user: user in users or user in inner)
        self.links.append((users, link, made, site))
        self.links.sort(key=lambda item: -len(item[0]))


class Activations(Offers):
    """Activation functions: path → their results."""

    operators: dict[str, list[Value]]
    lacking = "runs no activation function itself; on='output' gates what any module returns"

    def of_model(self) -> str | None:
        if "" not in self.operators:
            return None
        names = _some(sorted({str(value.node.target) for value in self.operators[""]}))
        return f"the model's own forward runs {names}, which no path names: make it a module, such as nn.ReLU"


class Results(Offers):
    """What modules return: path → the floating values that leave a call of it, for those outside of that call."""

    operators: dict[str, list[Value]]
    lacking = "returns no floating tensor"


class Held(Offers):
    """Parameters of modules: path → the one parameter, for those operators of the path that read it."""

    operators: dict[str, list[Value]]
    lacking = "has no such parameter that its own operators read"


class Operands(Offers):
    """What modules are given: path → the first floating tensor that each call reads from outside, for the call."""

    operators: dict[str, list[Value]]
    lacking = "reads no floating tensor"


def find_activations(program: Program) -> Activations:
    """Every activation, by the module that runs it."""
    found = Activations(program)
    ran: dict[str, list[Node]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and not _grafted(node):
            ran.setdefault(program.module_path(node), []).append(node)
    inner = program.module_paths()
    for path, nodes in ran.items():
        functions = [node for node in nodes if node.target in ACTIVATIONS]
        if not functions:
            continue
        plain = path and not _below(path, inner) and not any(map(_constants, nodes))
        single = [
            Value(node, frozenset(node.users), frozenset([node]))
            for node in functions if node.target is not aten.erf.default
        ]  # fmt: skip
        if results := _leaving(program, path, _grafted) if plain else single:
            found.operators[path] = results
    return found


def find_results(program: Program) -> Results:
    """What every module returns."""
    found = Results(program)
    for path in program.module_paths():
        if leaving := _leaving(program, path):
            found.operators[path] = leaving
    return found


def find_operands(program: Program) -> Operands:
    """What every module is given."""
    found = Operands(program)
    for path in program.module_paths():
        given = [value for body in _calls(program, path) if (value := _entering(program, body)) is not None]
        if given:
            found.operators[path] = given
    return found


def find_parameters(program: Program, leaf: str) -> Held:
    """The parameter `leaf` of every module, for its own operators: a tied one is one parameter per path."""
    found, sites, layers = Held(program), program.sites(), find_sites(program).operators
    for path in program.module_paths():
        operators: dict[Node, set[Node]] = {}
        for layer in layers.get(path, ()):
            operators.setdefault(layer.weight if leaf == "weight" else layer.bias or layer.node, set()).add(layer.node)
        for node in sites.get(path, ()):
            for held in node.all_input_nodes if node.target not in FORMS else ():
                if held.op == "get_attr" and str(held.target) == f"{path}.{leaf}":
                    operators.setdefault(held, set()).add(node)
        values = [
            Value(held, frozenset(users), frozenset(users)) for held, users in operators.items()
            if held.op == "get_attr" and held.meta["val"].is_floating_point()
        ]  # fmt: skip
        if values:
            found.operators[path] = values
    return found


def _entering(program: Program, body: frozenset[Node]) -> Value | None:
    for node in program.graph.nodes:
        for operand in node.all_input_nodes if node in body else ():
            value = operand.meta.get("val")
            if operand in body or operand.op == "get_attr" or not isinstance(value, torch.Tensor):
                continue
            if value.is_floating_point() and value.ndim:
                return Value(operand, frozenset(operand.users) & body, body)
    return None


def _grafted(node: Node) -> bool:
    """Whether a plan step put `node` there as part of a module of its own."""
    origin = node.meta.get("fxfreeze")
    return origin is not None and origin.primitive == SPLICE


def _leaving(program: Program, path: str, apart: Callable[[Node], bool] | None = None) -> list[Value]:
    """Floating tensors that a call of a module makes and something outside of that call reads.

    Args:
        apart: which nodes do not count as the call's.
    """
    found: dict[Node, Value] = {}
    for call in _calls(program, path):
        body = call if apart is None else frozenset(node for node in call if not apart(node))
        for node in body:
            value, users = node.meta.get("val"), frozenset(node.users) - body
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim and users:
                found[node] = Value(node, users, body)
    return [found[node] for node in program.graph.nodes if node in found]


def _calls(program: Program, path: str) -> list[frozenset[Node]]:
    """The operators of every call of a module."""
    calls: dict[str, list[Node]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and (call := _call(node, path)) is not None:
            calls.setdefault(call, []).append(node)
    return list(map(frozenset, calls.values()))


def _call(node: Node, path: str) -> str | None:
    """Which call of the module at `path` made `node`: torch.export numbers them in the keys, not in the paths."""
    stack: dict[str, tuple[str, str]] = node.meta.get("nn_module_stack") or {}
    return next((key for key, (inner, _) in stack.items() if inner == path), None)


def _constants(node: Node) -> set[Any]:
    return {item for item in node.all_input_nodes if item.op == "get_attr" and item.meta["val"].ndim}


def find_sites(program: Program) -> Sites:
    """Sort every operator with a weight by the path it belongs to."""
    sites = Sites(program)
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target not in FORMS:
            continue
        operator = weight_operator(node)
        problem = operator if isinstance(operator, NoMatch) else constant_problem(program, operator)
        if isinstance(operator, WeightOperator) and problem is None:
            sites.operators.setdefault(owner(program, node, str(operator.weight.target)), []).append(operator)
        elif problem is not None and FORMS[node.target].kind != "matmul":  # which also multiplies activations
            sites.refused.setdefault(program.module_path(node), f"runs {node.target}, but {problem.reason}")
    for path, operators in list(sites.operators.items()):
        weights = {(str(item.weight.target), item.kind, item.shape) for item in operators}
        if len(weights) > 1:
            names = sorted({name for name, *_ in weights})
            what = f"the weights {_some(names)}" if len(names) > 1 else f"{names[0]} in different ways"
            sites.refused[path] = f"uses {what}, so it is not clear which one to adapt"
        elif path in sites.refused:
            sites.refused[path] += ", beside another operator with a weight"
        if path in sites.refused:
            del sites.operators[path]
    return sites


def resolve(sites: Offers, step: Step, index: int) -> tuple[list[str], dict[str, str]]:
    """The paths that `step` (the plan's number `index`) takes, and the paths it matches but cannot take, with why.

    Raises:
        PlanError: a pattern matches no module, or nothing an adapter can act on.
    """
    try:
        matched = match_sites(sites.program, step, index)
    except PlanError as error:
        if own := sites.of_model():
            error.hint = f"{error.hint}; {own}" if error.hint else own
        raise
    for pattern in step.patterns:
        hits = [path for path in matched if fnmatchcase(path, pattern)]
        if not any(path in sites.operators for path in hits):
            reasons = "".join(f"\n  {path} {sites.reason(path)}" for path in hits[:_SHOWN])
            more = f"\n  and {len(hits) - _SHOWN} more" if len(hits) > _SHOWN else ""
            raise PlanError(
                f"steps[{index}].at: {pattern!r} matches nothing that {type(step).__name__} can adapt:{reasons}{more}",
                where=step.name, hint=sites.of_model(),
            )  # fmt: skip
    taken = [path for path in matched if path in sites.operators]
    refused = {
        path: sites.reason(path)
        for path in matched
        if path not in sites.operators and not _covered(path, sites.operators, taken)
    }
    return taken, refused


def owner(program: Program, node: Node, weight: str) -> str:
    """The path that an operator with the constant `weight` belongs to; see the module docstring."""
    ran, home = program.module_path(node), weight.rpartition(".")[0]
    return home if not ran or home.startswith(f"{ran}.") else ran


def _below(path: str, paths: Iterable[str]) -> list[str]:
    return [other for other in paths if other.startswith(f"{path}.")]


def _covered(path: str, adaptable: Iterable[str], taken: Iterable[str]) -> bool:
    inner = set(_below(path, adaptable))
    return bool(inner) and inner <= set(taken)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def numbered(found: dict[str, list[Value]]) -> dict[str, Value]:
    """A name per value; no number is used that makes the name of another path."""
    sites: dict[str, Value] = {}
    for path, values in found.items():
        numbers = (number for number in count() if f"{path}.{number}" not in found)
        names = [path] if len(values) == 1 else [f"{path}.{number}" for number, _ in zip(numbers, values, strict=False)]
        sites |= dict(zip(names, values, strict=True))
    return sites
