"""Representation finetuning: edits of a hidden state within a subspace of low rank, at some of the positions.

Source: Wu et al., ReFT: Representation finetuning for language models (2024), arXiv 2404.03592.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn


class _Edit(nn.Module):
    """h + δ(h) at some positions, h at the others."""

    def __init__(self, features: int, rank: int, positions: str) -> None:
        super().__init__()
        if not 1 <= rank <= features:
            raise ValueError(f"rank must be 1 … {features}, the number of features, got {rank}")
        self.positions, (self.first, self.last) = positions, _ends(positions)

    def forward(self, h: Tensor) -> Tensor:
        """`h` [..., positions, features] to the same shape and dtype; for all positions also [..., features]."""
        delta = self.delta(h)
        if self.first is None:
            return h + delta
        place = torch.arange(h.shape[-2], device=h.device)
        chosen = (place < self.first) | (place >= h.shape[-2] - self.last)
        return h + torch.where(chosen.unsqueeze(-1), delta, 0.0)

    def delta(self, h: Tensor) -> Tensor:
        """What is added to `h` [..., features] where it is edited."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"positions={self.positions!r}"


class LoReFT(_Edit):
    """h + Rᵀ(W·h + b − R·h), with the rows of R [rank, features] orthonormal.

    R is the Q of the QR decomposition of a parameter, and W starts as R, b as 0: a new edit is the identity (up to
    rounding, by which two equal products are subtracted). pyreft draws W at random.

    Args:
        features: the size of h's last dim.
        rank: of the subspace.
        positions: "all", or the first n "f<n>", the last n "l<n>", or both, as "f3+l2", of the dim before the last. A
            sequence that is shorter is edited everywhere, once. Padding counts as positions.

    Raises:
        ValueError: `rank` is not 1 … features, or `positions` is none of these.
    """

    def __init__(self, features: int, rank: int, *, positions: str = "all") -> None:
        super().__init__(features, rank, positions)
        self.basis = nn.Parameter(nn.init.orthogonal_(torch.empty(features, rank)))
        self.source = nn.Linear(features, rank)
        with torch.no_grad():
            self.source.weight.copy_(self.rotation())
            self.source.bias.zero_()

    def rotation(self) -> Tensor:
        """R [rank, features]."""
        wide = self.basis.to(torch.promote_types(self.basis.dtype, torch.float32))
        q, r = torch.linalg.qr(wide)
        # Of the two signs that a column may have, the one that moves with the parameter.
        return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).T.to(self.basis.dtype)

    def delta(self, h: Tensor) -> Tensor:
        rotation = self.rotation()
        return (self.source(h) - nn.functional.linear(h, rotation)) @ rotation


class DiReFT(_Edit):
    """h + W₂ᵀ(W₁·h + b): as :class:`LoReFT`, without its difference and its constraint; W₂ starts as 0.

    Args, raises: as :class:`LoReFT`.
    """

    def __init__(self, features: int, rank: int, *, positions: str = "all") -> None:
        super().__init__(features, rank, positions)
        self.source, self.target = nn.Linear(features, rank), nn.Linear(rank, features, bias=False)
        nn.init.zeros_(self.target.weight)

    def delta(self, h: Tensor) -> Tensor:
        return self.target(self.source(h))


def _ends(positions: str) -> tuple[int | None, int]:
    """How many of the first and of the last positions; (None, 0) for all."""
    if positions == "all":
        return None, 0
    found = re.fullmatch(r"(?:f(\d+))?\+?(?:l(\d+))?", positions)
    if found is None or not any(found.groups()) or (("+" in positions) != all(found.groups())):
        raise ValueError(f"positions must be 'all', 'f<n>', 'l<n>' or 'f<n>+l<n>', got {positions!r}")
    first, last = (int(count or 0) for count in found.groups())
    return first, last
