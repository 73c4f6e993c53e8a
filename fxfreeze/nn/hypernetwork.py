"""A linear layer whose weights are what a small network makes of a condition.

>>> layer = Hypernetwork(64, 32, condition=1)
>>> layer(x, gamma)                    # gamma [1] for all rows, or [batch, 1]
>>> layer.fixed(gamma)                 # an nn.Linear, for a gamma that stays
>>> layer.bank(gammas)                 # for gammas [n, 1] chosen by an id per row
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Hypernetwork(nn.Module):
    """y = W(γ)·x + b(γ) with [W(γ), b(γ)] = [W₀, b₀] + MLP([cos πγ/2, sin πγ/2]).

    The embedding keeps the size of what the network is given the same for every γ in [0, 1]. The MLP's last layer
    starts as 0, so that a new layer is an ordinary one, `base` if it is given.

    Args:
        in_features, out_features: of the linear layer.
        condition: the number of values in γ.
        hidden: widths of the MLP.
        embed: False: the MLP is given γ itself.
        base: W₀ and b₀, copied, and trained if they were. Default: drawn as nn.Linear does.

    Raises:
        ValueError: a size is not positive, or `base` has other sizes.

    Source: Ortiz, Guttag and Dalca, Magnitude invariant parametrizations improve hypernetwork learning (ICLR 2024),
    arXiv 2304.07645, sections 4.1 (embedding) and 4.2 (the sum).
    """

    def __init__(
        self, in_features: int, out_features: int, *, condition: int = 1, hidden: Sequence[int] = (64, 64),
        embed: bool = True, base: nn.Linear | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if min(in_features, out_features, condition, *hidden) < 1:
            raise ValueError(f"sizes must be positive, got {in_features}, {out_features}, {condition}, {tuple(hidden)}")
        if base is not None and (base.in_features, base.out_features) != (in_features, out_features):
            raise ValueError(f"base is {base.in_features} → {base.out_features}, not {in_features} → {out_features}")
        self.in_features, self.out_features, self.condition, self.embed = in_features, out_features, condition, embed
        given = nn.Linear(in_features, out_features) if base is None else base
        bias = torch.zeros(out_features) if given.bias is None else given.bias.detach().clone()
        self.weight = nn.Parameter(given.weight.detach().clone(), given.weight.requires_grad)
        self.bias = nn.Parameter(bias.to(given.weight), given.weight.requires_grad)
        sizes = [condition * (2 if embed else 1), *hidden, out_features * (in_features + 1)]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after), nn.GELU()]
        self.network = nn.Sequential(*layers[:-1])
        nn.init.zeros_(self.network[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.network[-1].bias)  # type: ignore[arg-type]

    def weights(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """W [..., out, in] and b [..., out] of γ [..., condition].

        Raises:
            ValueError: γ has another number of values.
        """
        if condition.dim() < 1 or condition.shape[-1] != self.condition:
            raise ValueError(f"the condition has shape {list(condition.shape)}, not [..., {self.condition}]")
        angle = condition * (math.pi / 2)
        given = torch.cat([angle.cos(), angle.sin()], -1) if self.embed else condition
        made = self.network(given).unflatten(-1, (self.out_features, self.in_features + 1))
        return self.weight + made[..., :-1], self.bias + made[..., -1]

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """`x` [batch, ..., in] to [batch, ..., out], for γ [condition] or [batch, condition]."""
        weight, bias = self.weights(condition)
        return F.linear(x, weight, bias) if condition.dim() == 1 else _each(x, weight, bias)

    @torch.no_grad()
    def fixed(self, condition: Tensor) -> nn.Linear:
        """The layer for one γ [condition]: an nn.Linear of its own, without the network."""
        weight, bias = self.weights(condition)
        return _linear(weight, bias)

    @torch.no_grad()
    def bank(self, conditions: Tensor) -> LinearBank:
        """The layers for γ [n, condition], to choose from by id."""
        return LinearBank(*self.weights(conditions))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, condition={self.condition}, embed={self.embed}"


class LinearBank(nn.Module):
    """n linear layers, of which each row chooses one: y[i] = W[id[i]]·x[i] + b[id[i]].

    Args:
        weight, bias: [n, out, in] and [n, out], copied.

    Raises:
        ValueError: they are of other shapes.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        if weight.dim() != 3 or bias.shape != weight.shape[:2]:
            raise ValueError(f"weight and bias have shapes {list(weight.shape)}, {list(bias.shape)}")
        self.weight, self.bias = (nn.Parameter(value.detach().clone()) for value in (weight, bias))

    def forward(self, x: Tensor, id: Tensor) -> Tensor:
        """`x` [batch, ..., in], `id` integers [batch] in 0 … n − 1, to [batch, ..., out]."""
        return _each(x, self.weight.index_select(0, id), self.bias.index_select(0, id))

    def extra_repr(self) -> str:
        count, out_features, in_features = self.weight.shape
        return f"{count} of {in_features} → {out_features}"


def _each(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A layer of its own for each row: [batch, ..., in], [batch, out, in], [batch, out] to [batch, ..., out]."""
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    found = torch.baddbmm(bias.unsqueeze(1), rows, weight.transpose(1, 2))
    return found.reshape(*x.shape[:-1], weight.shape[1])


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
    return layer
