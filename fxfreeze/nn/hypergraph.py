"""Tokens in the context of their hyperedges: a head over an encoder's tokens whose global token reads few of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class HypergraphContext(nn.Module):
    """Tokens refined by hyperedges between the most similar of them; token 0 is the global one.

    Every token m is the centre of a hyperedge, which holds it with weight 1 and its `k` most similar tokens with the
    softmax of their similarities: cosine among the others, `attention` for token 0. Token 0 is in a hyperedge if that
    one's centre is in the hyperedge of token 0, and with the weight it has there. With A[m, i] the weight of token i in
    hyperedge m, x' = ν(Aᵀ·ε(A·x)), where ε and ν are bottlenecks D → hidden → D with a LeakyReLU of slope 0.2.

    The row of token 0 hangs on k + 1 hyperedges only, and is computed from these; so where a model reads ``[:, 0]`` of
    the result, compiling removes all that makes the other rows.

    Args:
        features: D of the tokens.
        hidden: width of both bottlenecks.
        k: members of a hyperedge beside its centre.

    Raises:
        ValueError: `hidden` or `k` is less than 1.

    Source: Aydın et al., ACE-LoRA (2026), arXiv 2603.17079, and its public code. The weight of a token in its own
    hyperedge is 1 beside the softmax, as there.
    """

    def __init__(self, features: int, *, hidden: int = 128, k: int = 5) -> None:
        super().__init__()
        if min(hidden, k) < 1:
            raise ValueError(f"hidden and k must be at least 1, got {hidden} and {k}")
        self.k = k
        self.edge, self.node = (
            nn.Sequential(nn.Linear(features, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, features)) for _ in range(2)
        )

    def forward(self, tokens: Tensor, attention: Tensor) -> Tensor:
        """`tokens` [batch, N, D] to the same shape; N > k + 1.

        Args:
            attention: [batch, N − 1]: how much token 0 attends to each of the others.
        """
        scores, near = attention.topk(self.k)
        shares = scores.softmax(-1)
        return torch.cat([self._global(tokens, near, shares), self._others(tokens, near, shares)], 1)

    def _global(self, tokens: Tensor, near: Tensor, shares: Tensor) -> Tensor:
        """Row 0, [batch, 1, D], from the hyperedges of token 0 and of the `k` tokens in that."""
        first, others = tokens[:, :1], tokens[:, 1:]
        members = _rows(others, near)
        own = first + shares.unsqueeze(1) @ members
        directions = F.normalize(others, dim=-1)
        chosen = _rows(directions, near) @ directions.transpose(1, 2)
        weights, theirs = self._most_similar(chosen.scatter(2, near.unsqueeze(-1), -torch.inf))
        inner = weights.unsqueeze(2) @ _rows(others, theirs.flatten(1)).unflatten(1, theirs.shape[1:])
        edges = members + shares.unsqueeze(-1) * first + inner.squeeze(2)
        refined = self.edge(torch.cat([own, edges], 1))
        return self.node(refined[:, :1] + shares.unsqueeze(1) @ refined[:, 1:])

    def _others(self, tokens: Tensor, near: Tensor, shares: Tensor) -> Tensor:
        """Rows 1 …, [batch, N − 1, D], from all hyperedges."""
        first, others = tokens[:, :1], tokens[:, 1:]
        directions = F.normalize(others, dim=-1)
        itself = torch.eye(others.shape[1], dtype=torch.bool, device=tokens.device)
        similar = (directions @ directions.transpose(1, 2)).masked_fill(itself, -torch.inf)
        weights, places = self._most_similar(similar)
        among = torch.zeros_like(similar).scatter(2, places, weights) + itself
        in_first = torch.zeros_like(others[..., 0]).scatter(1, near, shares)
        own = first + in_first.unsqueeze(1) @ others
        edges = among @ others + in_first.unsqueeze(-1) * first
        refined = self.edge(torch.cat([own, edges], 1))
        return self.node(in_first.unsqueeze(-1) * refined[:, :1] + among.transpose(1, 2) @ refined[:, 1:])

    def _most_similar(self, similarity: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and places of the `k` largest along the last dim."""
        scores, places = similarity.topk(self.k)
        return scores.softmax(-1), places

    def extra_repr(self) -> str:
        return f"k={self.k}"


def _rows(tokens: Tensor, places: Tensor) -> Tensor:
    """The tokens [batch, M, D] of `tokens` [batch, N, D] at `places` [batch, M]."""
    return tokens.gather(1, places.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
