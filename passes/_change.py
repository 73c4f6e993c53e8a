"""New values for the weight and the bias of one operator, in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.constants import Edit
from fxfreeze.program import Program

from ._operators import WeightOperator


@dataclass(frozen=True)
class Change:
    """What to do to the weight and to the bias of `operator`; None leaves one as it is.

    They are functions rather than values, because what was folded into a constant before (:class:`~fxfreeze.program.
    Fold`) must be changed in the same way. A bias that is not there is zero.
    """

    operator: WeightOperator
    weight: Edit | None
    bias: Edit | None

    def values(self, program: Program) -> tuple[Tensor | None, Tensor | None]:
        """The new weight and bias, where they are new."""
        old = program.constant64(self.operator.weight)
        assert old is not None
        bias = program.constant64(self.operator.bias)
        bias = old.new_zeros(self.operator.out_features) if bias is None else bias
        return self.weight and self.weight(old), self.bias and self.bias(bias)

    def misfit(self, program: Program, weight: Tensor | None, bias: Tensor | None, limit: int) -> str | None:
        """Why new values cannot be stored, or are not worth a copy of a shared weight of more than `limit` bytes."""
        node, stored = self.operator.node, self.operator.weight.meta["val"]
        for value in (weight, bias):
            if value is not None and max(abs(float(item)) for item in value.aminmax()) > torch.finfo(stored.dtype).max:
                return f"a folded weight of {node.name} would overflow {stored.dtype}"
        size = stored.numel() * stored.element_size()
        if weight is not None and size > limit and program.readers(self.operator.weight) != {node}:
            return f"the weight of {node.name} is read elsewhere too, and a copy takes {size / 2**20:.1f} MiB"
        return None

    def apply(self, program: Program) -> None:
        """Let the operator read the new values; whatever else reads the old ones keeps them."""
        if self.weight is not None:
            self._refine(program, self.operator.weight, self.weight)
        if self.bias is None:
            return
        if self.operator.bias is not None and self.operator.bias.meta["val"].shape == (self.operator.out_features,):
            self._refine(program, self.operator.bias, self.bias)
        else:
            self._add_bias(program, self.bias)

    def _refine(self, program: Program, old: Node, edit: Edit) -> None:
        fold = program.folds.get(str(old.target))
        new = program.refine(old, edit, user=self.operator.node)
        if fold is not None:
            program.folds[str(new.target)] = replace(fold, base=fold.base.then(edit))

    def _add_bias(self, program: Program, edit: Edit) -> None:
        """A bias for an operator that has none, or one with a number for all outputs."""
        node, weight, bias = self.operator.node, self.operator.weight, program.constant64(self.operator.bias)
        name = f"{str(weight.target).rpartition('.')[0]}.bias".lstrip(".")
        value = edit(self._zeros(program) if bias is None else bias)
        new = program.add_constant(name, value, dtype=weight.meta["val"].dtype, before=node, like=node)
        node.args, node.kwargs = self.operator.call_arguments(bias=new)

    def _zeros(self, program: Program) -> Tensor:
        device = program.state.tensor(str(self.operator.weight.target)).device
        return torch.zeros(self.operator.out_features, dtype=torch.float64, device=device)
