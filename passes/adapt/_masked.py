"""Where a mask can act: every parameter of the model, as the operators read it that all other steps have left.

The weight and the bias of a layer are masked where its operator reads them, behind everything that steps made of them;
any other parameter where it is read. A tensor that several modules share is a place for each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor
from torch.fx import Node

from fxfreeze.program import Program

from .._adapters import BASE
from .._measured import constant_value
from .._operators import FORMS, WeightOperator, weight_operator
from ._sites import Offers, owner


@dataclass(eq=False)
class Place:
    """One parameter of one module.

    Attributes:
        path, leaf: the module, and what the parameter is called in it.
        constant: the node of the model's constant.
        operator: the first call of the layer that this is the weight of.
        readers: the operators that read the parameter, call by call, and the nodes they read it by.
    """

    path: str
    leaf: str
    constant: Node
    operator: WeightOperator | None = None
    readers: list[tuple[Node, Node]] = field(default_factory=list)

    @property
    def key(self) -> str:
        """What it is called where the module is."""
        return f"{self.path}.{self.leaf}" if self.path else self.leaf

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.constant.meta["val"].shape)

    def value(self, program: Program) -> Tensor | None:
        """What is read, in the dtypes that it is computed in; None: it hangs on inputs."""
        return constant_value(program, self.readers[0][1])


class Places(Offers):
    """Path → the parameters of the module there."""

    operators: dict[str, list[Place]]
    lacking: ClassVar[str] = "holds no parameter that could be pruned"

    def __iter__(self) -> Iterator[Place]:
        for places in self.operators.values():
            yield from places

    def names(self) -> dict[Place, tuple[str, ...]]:
        """What a file may call every parameter: as at its own path first, then as at those that it is tied to."""
        tied: dict[str, list[str]] = {}
        for place in self:
            tied.setdefault(str(place.constant.target), []).append(place.key)
        return {place: tuple(dict.fromkeys([place.key, name, *tied[name]]))
                for place in self if (name := str(place.constant.target))}  # fmt: skip

    def add(self, path: str, leaf: str, constant: Node) -> Place | None:
        """The place of that name; None: it is another constant's."""
        held = self.operators.setdefault(path, [])
        for place in held:
            if place.leaf == leaf:
                return place if place.constant.target == constant.target else None
        held.append(Place(path, leaf, constant))
        return held[-1]


def find_places(program: Program) -> Places:
    """Every floating parameter and buffer of the model that an operator reads."""
    places, seen = Places(program), set[tuple[Node, Node]]()
    for node in program.graph.nodes:
        origin = node.meta.get("fxfreeze")
        if node.op == "call_function" and node.target in FORMS and (origin is None or origin.primitive == BASE):
            operator = weight_operator(node)
            if isinstance(operator, WeightOperator):
                seen |= _add_layer(places, operator)
    for node in program.graph.nodes:
        for operand in node.all_input_nodes if node.op == "call_function" and "fxfreeze" not in node.meta else ():
            if (node, operand) not in seen and _is_parameter(operand):
                path, _, leaf = str(operand.target).rpartition(".")
                if (place := places.add(path, leaf, operand)) is not None:
                    place.readers.append((node, operand))
    return places


def _is_parameter(node: Node) -> bool:
    """Whether it is a floating constant of the model's."""
    return node.op == "get_attr" and "fxfreeze" not in node.meta and node.meta["val"].is_floating_point()


def _add_layer(places: Places, operator: WeightOperator) -> set[tuple[Node, Node]]:
    """The weight and the bias of one call of a layer; which operands of it are accounted for."""
    node, program = operator.node, places.program
    weight = _source(operator.weight)
    if weight is None:
        if operator.kind != "matmul":  # which also multiplies activations
            places.refused.setdefault(program.module_path(node), f"runs {node.target}, but its weight is computed")
        return set()
    origin = node.meta.get("fxfreeze")
    path = origin.site if origin else owner(program, node, str(weight.target))
    done = set()
    for role, operand in (("weight", operator.weight), ("bias", operator.bias)):
        constant = _source(operand) if operand is not None else None
        if constant is None or operand is None:
            continue
        home, _, leaf = str(constant.target).rpartition(".")
        place = places.add(path, role if origin or home != path else leaf, constant)
        if place is None:
            places.refused[path] = f"uses several {role}s by one name"
            continue
        place.readers.append((node, operand))
        if role == "weight":
            place.operator = place.operator or operator
        done.add((node, operand))
    return done


def _source(operand: Node) -> Node | None:
    """The one constant of the model's that `operand` is, or that steps made it of; what the model computes is none."""
    found: dict[str, Node] = {}
    stack = [operand]
    while stack:
        node = stack.pop()
        if node.op == "get_attr" and "fxfreeze" not in node.meta:
            found[str(node.target)] = node
        elif node.op == "call_function" and "fxfreeze" in node.meta:
            stack.extend(node.all_input_nodes)
    return next(iter(found.values())) if len(found) == 1 else None
