"""Dendrites: further copies of a layer, grown one by one, each of which learns what the layer still gets wrong.

>>> layer = model.fc = Dendrites(model.fc)
>>> train(model)                       # as always, until it gets no better
>>> layer.grow()                       # a candidate; the same loop now trains it, and nothing else, to correlate
>>> train(model, layer.candidate_parameters())
>>> layer.adopt()                      # its weights are frozen, and how it is mixed in is trained
>>> train(model)

Frozen, a layer with D dendrites is D + 1 layers of one input, which fxfreeze stacks into one where that is faster.

Source: Brenner and Itti, Perforated Backpropagation (2025), arXiv 2501.18018; the rule that candidates are trained by
is that of Fahlman and Lebiere, The cascade-correlation learning architecture (NIPS 1989).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

PHI: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu, "identity": lambda value: value
}  # fmt: skip
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Dendrites(nn.Module):
    r"""y = L(x) + Σ_j t_j ⊙ d_j with d_j = φ(L_j(x) + Σ_{i<j} s_ji ⊙ d_i); without dendrites, y = L(x).

    `layer` itself becomes L, and each L_j is a copy of it with new weights. t_j, and s_ji, hold a number per neuron.
    Dendrites are perforated: no gradient of the loss goes through them, neither to x nor to their weights.

    A candidate, from :meth:`grow` to :meth:`adopt`, is not part of y. While it is there, `layer`, t and all older
    dendrites get no gradient, and ``loss.backward()`` leaves with L_j and s_j of the candidate the gradient of

        −Σ_neurons | mean over patterns of (d − mean d) · (E − mean E) |,   E = ∂loss/∂y · number of patterns,

    where a pattern is one example, or one position of one example. A step of any optimizer therefore makes the
    candidate correlate more with the error that is left. Other layers of the model go on getting their gradients: leave
    them out of the optimizer, as :meth:`candidate_parameters` does.

    What is simplified: means are over the batch at hand, not over a running average or all of the data; there is one
    candidate at a time, not a pool; and an adopted dendrite starts with t = 0, so that nothing changes by adoption,
    where cascade correlation would start with the sign of the correlation.

    Args:
        layer: nn.Linear, nn.Conv1d, 2d or 3d, or an nn.Sequential of one of them and a batch norm.
        phi: φ: "sigmoid", "tanh", "relu" or "identity".

    Raises:
        ValueError: `layer` is something else, or `phi` is unknown.
    """

    def __init__(self, layer: nn.Module, *, phi: str = "sigmoid") -> None:
        super().__init__()
        if phi not in PHI:
            raise ValueError(f"phi must be one of {', '.join(map(repr, PHI))}, got {phi!r}")
        weighted = _weighted(layer)
        self.phi = phi
        self.neurons = weighted.weight.shape[0]
        self.dim = -1 if isinstance(weighted, nn.Linear) else -1 - len(weighted.kernel_size)
        self.layer, self.copies = layer, nn.ModuleList()
        self.mixing, self.cascade = nn.ParameterList(), nn.ParameterList()
        self.growing = False
        self._trained: list[bool] = []

    @property
    def count(self) -> int:
        """D, the number of dendrites without a candidate."""
        return len(self.mixing)

    def forward(self, x: Tensor) -> Tensor:
        """What `layer` makes of `x`, in shape and dtype; see the class."""
        y = self.layer(x)
        if not len(self.copies):
            return y
        outputs = self._outputs(_cut(x))
        for weight, output in zip(self.mixing, outputs, strict=False):
            y = y + self._along(weight) * _cut(output)
        if self.growing and torch.is_grad_enabled():
            y = _Correlate.apply(y, outputs[-1], self.dim)
        return y

    def _outputs(self, x: Tensor) -> list[Tensor]:
        """d_1 … d_D, and the candidate's, of `x`."""
        outputs: list[Tensor] = []
        count = len(self.copies) if self.growing and torch.is_grad_enabled() else self.count
        for branch, weights in zip(self.copies[:count], self.cascade, strict=False):
            total = branch(x)
            for weight, earlier in zip(weights, outputs, strict=True):
                total = total + self._along(weight) * _cut(earlier)
            outputs.append(PHI[self.phi](total))
        return outputs

    def _along(self, values: Tensor) -> Tensor:
        return values.reshape([-1, *[1] * (-self.dim - 1)])

    def grow(self) -> nn.Module:
        """Add a candidate, and freeze the layer and all older dendrites; returns the candidate's copy of the layer.

        Raises:
            RuntimeError: there is a candidate already.
        """
        if self.growing:
            raise RuntimeError("there is a candidate already: adopt() or drop() it first")
        branch = copy.deepcopy(self.layer).requires_grad_(True)
        for module in branch.modules():
            if isinstance(module, WEIGHTED + NORMS):
                module.reset_parameters()
        weight = _weighted(self.layer).weight
        weights = nn.Parameter(torch.zeros(self.count, self.neurons, device=weight.device, dtype=weight.dtype))
        self._trained = [parameter.requires_grad for parameter in self.layer.parameters()]
        self.requires_grad_(False)
        self.copies.append(branch.train(self.training))
        self.cascade.append(weights)
        self.growing = True
        return branch

    def candidate_parameters(self) -> Iterator[nn.Parameter]:
        """Weights of the candidate, and s_j, if there are older dendrites.

        Raises:
            RuntimeError: there is no candidate.
        """
        self._check_growing()
        yield from self.copies[-1].parameters()
        if self.count:
            yield self.cascade[-1]

    def adopt(self) -> None:
        """Make the candidate a dendrite, whose weights are frozen; t starts at 0.

        All t are trained then, and the layer is if it was before :meth:`grow`.

        Raises:
            RuntimeError: there is no candidate.
        """
        self._check_growing()
        weights = self.cascade[-1]
        self.mixing.append(nn.Parameter(torch.zeros(self.neurons, device=weights.device, dtype=weights.dtype)))
        self._settle()

    def drop(self) -> None:
        """Remove the candidate.

        Raises:
            RuntimeError: there is no candidate.
        """
        self._check_growing()
        self.copies, self.cascade = self.copies[:-1], nn.ParameterList(list(self.cascade)[:-1])
        self._settle()

    def train(self, mode: bool = True) -> Dendrites:
        """As of any module; but batch norms of adopted dendrites keep their statistics, for their weights are done."""
        super().train(mode)
        for branch in self.copies[: self.count]:
            branch.eval()
        return self

    def _settle(self) -> None:
        self.growing = False
        self.copies.requires_grad_(False)
        self.cascade.requires_grad_(False)
        for parameter, trained in zip(self.layer.parameters(), self._trained, strict=True):
            parameter.requires_grad_(trained)
        self.mixing.requires_grad_(True)
        self.train(self.training)

    def _check_growing(self) -> None:
        if not self.growing:
            raise RuntimeError("there is no candidate: grow() one first")

    def get_extra_state(self) -> dict[str, Any]:
        return {"dendrites": self.count, "growing": self.growing}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.growing = state["growing"]

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        # As many dendrites as were saved, before their weights are looked for.
        saved = state.get(f"{prefix}_extra_state")
        for _ in range(self.count, saved["dendrites"] if saved and not len(self.copies) else 0):
            self.grow()
            self.adopt()
        if saved and saved["growing"] and not self.growing:
            self.grow()
        super()._load_from_state_dict(state, prefix, *rest)

    def extra_repr(self) -> str:
        return f"{self.count} dendrites{' and a candidate' * self.growing}, phi={self.phi!r}"


class _Correlate(torch.autograd.Function):
    """y as it is; backwards, the candidate gets what raises its correlation with y's gradient, neuron by neuron."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, candidate: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(candidate)
        ctx.dim = dim
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        (candidate,) = ctx.saved_tensors
        if gradient.dim() == 1:
            return gradient, torch.zeros_like(candidate), None  # one pattern correlates with nothing
        patterns = [at for at in range(gradient.dim()) if at != ctx.dim % gradient.dim()]
        count = gradient.numel() // gradient.shape[ctx.dim]
        error = gradient * count  # a mean over the batch makes each pattern's part small
        error = error - error.mean(patterns, keepdim=True)
        covariance = ((candidate - candidate.mean(patterns, keepdim=True)) * error).mean(patterns, keepdim=True)
        # ∂(d − mean d) drops out, since the errors' mean is 0.
        return gradient, -covariance.sign() * error / count, None


def _cut(value: Tensor) -> Tensor:
    """`value` without its gradient; where there is none anyhow, nothing that a graph would have to hold."""
    return value.detach() if torch.is_grad_enabled() else value


def _weighted(layer: nn.Module) -> Any:
    """The linear layer or convolution that `layer` is or begins with.

    Raises:
        ValueError: it is neither.
    """
    parts = list(layer) if isinstance(layer, nn.Sequential) else [layer]
    if not parts or not isinstance(parts[0], WEIGHTED) or not all(isinstance(part, NORMS) for part in parts[1:]):
        raise ValueError(
            f"layer must be nn.Linear, nn.Conv1d, 2d or 3d, or one of them and a batch norm, got {type(layer).__name__}"
        )
    return parts[0]
