"""Let weights take over a scale and a shift per channel: those that make a value, or all that read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.constants import Edit
from fxfreeze.dataflow import Passage, passage
from fxfreeze.program import Program
from fxfreeze.rewrite import NoMatch, fail

from ._affine import Affine, pads, response, scaled_inputs, scaled_outputs
from ._change import Change
from ._gates import GATE, HardGate, hard_gate
from ._operators import FORMS, WeightOperator, constant_problem, weight_operator


@dataclass(frozen=True)
class Levels:
    """What a gain that passes a hard gate does to its thresholds."""

    gate: HardGate
    edit: Edit

    def values(self, program: Program) -> tuple[Tensor | None, Tensor | None]:
        """The new thresholds, as :meth:`Change.values` gives weight and bias."""
        old = program.constant64(self.gate.threshold)
        assert old is not None
        return self.edit(old), None

    def misfit(self, program: Program, levels: Tensor | None, _: Tensor | None, limit: int) -> str | None:
        """Why they cannot be stored."""
        assert levels is not None
        stored = self.gate.threshold.meta["val"].dtype
        finite = levels[levels.isfinite()]
        if bool((finite.abs() > torch.finfo(stored).max).any()):
            return f"a threshold of {self.gate.node.name} would overflow {stored}"
        return None

    def apply(self, program: Program) -> None:
        """Let the gate read them; another that reads the old ones keeps them."""
        program.refine(self.gate.threshold, self.edit, user=self.gate.node)


def fold_back(program: Program, affine: Affine) -> list[Change | Levels] | NoMatch:
    """The changes that make the operator behind ``affine.value`` give γ⊙x + β itself."""
    found = _way_back(program, affine)
    if isinstance(found, NoMatch):
        return found
    operator, gates = found
    change, gain = _scaled_result(operator, affine), affine.gain
    return change if isinstance(change, NoMatch) else [change, *(Levels(gate, lambda t: t * gain) for gate in gates)]


def _way_back(program: Program, affine: Affine) -> tuple[WeightOperator, list[HardGate]] | NoMatch:
    """The operator behind ``affine.value``, and the gates between the two."""
    cursor, reader, dim = affine.value, affine.node, affine.dim
    gates: list[HardGate] = []
    while True:
        if set(cursor.users) != {reader}:
            return fail(f"{cursor.name} is read elsewhere too", cursor)
        operator = _operator(program, cursor)
        if isinstance(operator, WeightOperator):
            break
        gate = hard_gate(program, cursor) if cursor.target is GATE else None
        if gate is not None and not isinstance(gate, HardGate):
            return gate
        way = passage(cursor) if gate is None else _through(gate)
        if way is None:
            return operator
        if gate is not None and not _keeps_ties(program, gate, affine.gain):
            return fail("its gain would be rounded in the thresholds of a gate", cursor)
        if gate is not None:
            gates.append(gate)
        dim = None if dim is None else way.to_operand(dim)
        if reason := _blocked(way, affine, dim):
            return fail(f"{operator_name(cursor)} {reason}", cursor)
        reader, cursor = cursor, cursor.args[0]  # type: ignore[assignment]
    if dim not in (None, _channel_dim(operator)):
        return fail(f"it does not vary along the channels of {operator_name(cursor)}", cursor)
    return operator, gates


def _keeps_ties(program: Program, gate: HardGate, gain: Tensor) -> bool:
    levels = program.constant64(gate.threshold)
    assert levels is not None
    return bool(((torch.frexp(gain).mantissa.abs() == 0.5) | (levels == 0)).all())


def _through(gate: HardGate) -> Passage | None:
    """A gate lets a positive gain pass along its own dim, or one for all; not where a row chooses its thresholds."""
    return Passage({gate.dim: gate.dim}, positive=True, shift=False) if gate.mode is None else None


def _scaled_result(operator: WeightOperator, affine: Affine) -> Change | NoMatch:
    cursor, gain, shift = operator.node, affine.gain, affine.shift
    scale = (lambda w: scaled_outputs(operator, w, gain)) if bool((gain != 1).any()) else None
    if operator.kind == "embedding":
        return Change(operator, lambda w: scaled_outputs(operator, w, gain) + (0 if shift is None else shift), None)
    if shift is not None and not _takes_bias(operator):
        return fail(f"{operator_name(cursor)} has no bias to take the shift", cursor)
    if shift is None and (scale is None or operator.bias is None):
        return Change(operator, scale, None)
    return Change(operator, scale, lambda b: b * gain + (0 if shift is None else shift))


def fold_forward(program: Program, affine: Affine) -> list[Change | Levels] | NoMatch:
    """The changes that let all readers of y read x instead."""
    changes: list[Change | Levels] = []
    stack = [(affine.node, affine.dim)]
    while stack:
        value, dim = stack.pop()
        for user in value.users:
            operator, way = _operator(program, user), passage(user)
            if isinstance(operator, WeightOperator):
                if reason := _unfit(operator, affine, value, dim):
                    return fail(f"{operator_name(user)} {reason}", user)
                changes.append(_scaled_operand(program, operator, affine))
            elif way is None or user.args[0] is not value or value in user.args[1:]:
                return operator
            else:
                onward = None if dim is None else way.to_result(dim)
                if reason := _blocked(way, affine, onward):
                    return fail(f"{operator_name(user)} {reason}", user)
                stack.append((user, onward))
    return changes


def _scaled_operand(program: Program, operator: WeightOperator, affine: Affine) -> Change:
    gain, shift = affine.gain, affine.shift
    scale = (lambda w: scaled_inputs(operator, w, gain)) if bool((gain != 1).any()) else None
    if shift is None:
        return Change(operator, scale, None)
    weight = program.constant64(operator.weight)
    assert weight is not None
    extra = response(operator, weight, shift)
    return Change(operator, scale, lambda b: b + extra)


def _operator(program: Program, node: Node) -> WeightOperator | NoMatch:
    """`node` as an operator with constant weight and bias."""
    if node.op != "call_function":
        return fail(f"{'an input' if node.op == 'placeholder' else f'an {node.op}'} has no weight", node)
    operator = weight_operator(node)
    if isinstance(operator, NoMatch):
        return operator
    problem = constant_problem(program, operator)  # a NoMatch is falsy: it cannot be chained with `or`
    return operator if problem is None else problem


def _blocked(way: Passage, affine: Affine, dim: int | None) -> str | None:
    """Why γ and β do not pass an operator on the way; `dim` is where the channels are behind it."""
    if affine.dim is not None and dim is None:
        return "mixes the channels"
    if affine.shift is not None and not way.shift:
        return "does not let a shift pass"
    if way.positive and not bool((affine.gain > 0).all()):
        return "lets only positive gains pass"
    return None


def _unfit(operator: WeightOperator, affine: Affine, value: Node, dim: int | None) -> str | None:
    """Why the reader `operator` of `value` cannot take γ and β over."""
    if operator.kind == "embedding" or operator.input is not value or operator.bias is value:
        return "does not read it as its input"
    if affine.dim is not None and dim != _channel_dim(operator):
        return "has its channels along another dim"
    if affine.shift is not None and pads(operator):
        return "pads with zeros, which the shift would not reach"
    return "has no bias to take the shift" if affine.shift is not None and not _takes_bias(operator) else None


def _takes_bias(operator: WeightOperator) -> bool:
    return FORMS[operator.node.target].bias is not None


def _channel_dim(operator: WeightOperator) -> int:
    return -1 - len(operator.kernel)


def operator_name(node: Node) -> str:
    """The operator without its namespace and overload, as "conv2d"."""
    return node.target._schema.name.partition("::")[2] if hasattr(node.target, "_schema") else str(node.target)
