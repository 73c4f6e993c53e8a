"""New values for the weight and the bias of one operator, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.program import Program, lift

from .._operators import WeightOperator


@dataclass(frozen=True)
class Change:
    """What to do to the weight and to the bias of `operator`; None leaves one as it is.

    They are functions rather than values, because what was folded into a constant before (:class:`~fxfreeze.program.
    Fold`) must be changed in the same way. A bias that is not there is zero.
    """

    operator: WeightOperator
    weight: Callable[[Tensor], Tensor] | None
    bias: Callable[[Tensor], Tensor] | None

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

    def apply(self, program: Program, weight: Tensor | None, bias: Tensor | None) -> None:
        """Let the operator read the new values; whatever else reads the old ones keeps them."""
        if weight is not None and self.weight is not None:
            self._set(program, "weight", self.operator.weight, weight, self.weight)
        if bias is not None and self.bias is not None:
            self._set(program, "bias", self.operator.bias, bias, self.bias)

    def _set(
        self, program: Program, slot: str, old: Node | None, value: Tensor, change: Callable[[Tensor], Tensor]
    ) -> None:
        node, weight = self.operator.node, self.operator.weight
        fold = None if old is None else program.folds.get(str(old.target))
        if old is not None and old.meta["val"].shape == value.shape:
            new = program.rebind(old, value, user=node)
        else:
            name = f"{str(weight.target).rpartition('.')[0]}.bias".lstrip(".")
            new = program.add_constant(name, value, dtype=weight.meta["val"].dtype, before=node, like=node)
            node.args, node.kwargs = self.operator.call_arguments(**{slot: new})
        if fold is not None:
            program.folds[str(new.target)] = replace(fold, base=change(lift(fold.base)))
