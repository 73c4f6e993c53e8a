"""Activations replaced by a few learnt vectors: which ones is readable, and a frozen layer behind becomes a table.

>>> layer = Codebook(256, codes=1024, k=8)
>>> layer.start(activations)                      # k-means on what flows there
>>> loss = task(model(x)) + 0.1 * layer.reconstruction(h)
>>> layer.dead(h)                                 # codes that no row chose
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.codebook import KERNEL, top

SIMILARITIES = ("cosine", "euclidean")


class Codebook(nn.Module):
    r"""The mean of the k codes most similar to x; with groups, each chunk of x has a codebook of its own.

    With z = LayerNorm(x), chunk by chunk, a code c scores z·c/‖c‖ ("cosine") or −‖z − c‖² ("euclidean"), and the result
    is the mean of the k best codes as they are. Backwards, the result counts as x (straight through), and codes get the
    gradient of what they were chosen for; the normalization and the choice itself get none.

    Args:
        features: size of the last dim of x, a multiple of `groups`.
        codes: K, of each group.
        k: how many codes are chosen, 1 … K.
        groups: G; a chunk has d = features / G elements.
        similarity: "cosine" or "euclidean".
        norm: False: z = x, as codes are compared with "euclidean" in the scale they have.
        eps: of the normalization.

    Parameters: ``codes`` [G, K, d], standard normal; with `norm` ``weight`` and ``bias`` [G, d] of the normalization.

    Raises:
        ValueError: a size is not positive, does not divide, or `similarity` is unknown.

    Source: Tamkin, Taufeeque and Goodman, Codebook features (2023), arXiv 2310.17230, section 2.
    """

    def __init__(
        self, features: int, codes: int, *, k: int = 1, groups: int = 1, similarity: str = "cosine", norm: bool = True,
        eps: float = 1e-5, device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("features", features), ("codes", codes), ("k", k), ("groups", groups)):
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if features % groups or k > codes:
            raise ValueError(f"features {features} must be a multiple of groups {groups}, and k {k} at most {codes}")
        if similarity not in SIMILARITIES:
            raise ValueError(f"similarity must be one of {', '.join(map(repr, SIMILARITIES))}, got {similarity!r}")
        made: Any = {"device": device, "dtype": dtype}
        self.k, self.groups, self.similarity, self.eps = k, groups, similarity, eps
        self.codes = nn.Parameter(torch.randn(groups, codes, features // groups, **made))
        self.weight = nn.Parameter(torch.ones(groups, features // groups, **made)) if norm else None
        self.bias = nn.Parameter(torch.zeros(groups, features // groups, **made)) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., features] to the same shape and dtype."""
        values = self.codes if self.k == 1 else self.codes / self.k
        found = KERNEL.op(self.compared(x), *self._scored(values), k=self.k).flatten(-2)
        # The value stays what it is: the two differ by an exact 0, and by a slope of 1.
        return found + (x - x.detach()) if torch.is_grad_enabled() and x.requires_grad else found

    def compared(self, x: Tensor) -> Tensor:
        """z [..., G, d] of `x` [..., features]: what codes are compared with."""
        chunks = x.unflatten(-1, (self.groups, -1))
        if self.weight is None or self.bias is None:
            return chunks
        return F.layer_norm(chunks, self.weight.shape[1:], eps=self.eps) * self.weight + self.bias

    def _scored(self, values: Tensor) -> tuple[Tensor, ...]:
        """Keys, values and perhaps biases that score as the similarity does, up to a term that all codes share."""
        if self.similarity == "cosine":
            return F.normalize(self.codes, dim=-1), values
        return self.codes, values, -self.codes.square().sum(-1) / 2

    def ids(self, x: Tensor) -> Tensor:
        """Which codes `x` [..., features] chooses: int64 [..., G, k], in no order."""
        keys, _, *bias = self._scored(self.codes)
        return top(self.compared(x), keys, *bias, k=self.k).reshape(*x.shape[:-1], self.groups, self.k)

    def reconstruction(self, x: Tensor) -> Tensor:
        """Mean squared distance of an element of `x` from what stands for it, 0-d; its gradient reaches codes only."""
        return F.mse_loss(self(x.detach()), x.detach())

    @torch.no_grad()
    def usage(self, x: Tensor) -> Tensor:
        """How often each code is chosen for `x` [..., features]: int64 [G, K]."""
        ids = self.ids(x).reshape(-1, self.groups, self.k)
        return torch.stack([torch.bincount(ids[:, group].flatten(), minlength=self.codes.shape[1])
                            for group in range(self.groups)])  # fmt: skip

    def dead(self, x: Tensor) -> int:
        """How many codes, of all groups together, are never chosen for `x` [..., features]."""
        return int((self.usage(x) == 0).sum())

    @torch.no_grad()
    def start(self, x: Tensor, *, steps: int = 10, seed: int = 0) -> float:
        """Set the codes by k-means, and return what :meth:`reconstruction` then is.

        It begins with rows far from each other (k-means++). Rows are assigned by the layer's own similarity to one
        code each. A code becomes the mean of its rows: of x with "cosine", whose scale the score does not see, and of z
        with "euclidean". A code without rows is put on one drawn at random.

        Args:
            x: [..., features], at least K rows.
            steps: assignments.
            seed: of the rows that codes begin with.

        Raises:
            ValueError: there are fewer rows than codes.
        """
        z = self.compared(x).flatten(0, -3) if x.dim() > 1 else self.compared(x).unsqueeze(0)
        rows = x.reshape(-1, self.groups, self.codes.shape[2]) if self.similarity == "cosine" else z
        count, total = self.codes.shape[1], len(rows)
        if total < count:
            raise ValueError(f"x has {total} rows, fewer than the {count} codes")
        generator = torch.Generator().manual_seed(seed)
        points = F.normalize(z, dim=-1) if self.similarity == "cosine" else z
        for group, codes in enumerate(self.codes):
            codes.copy_(rows[_far_apart(points[:, group], count, generator), group])
        for _ in range(steps):
            keys, _, *bias = self._scored(self.codes)
            ids = top(z, keys, *bias)[..., 0]
            for group, codes in enumerate(self.codes):
                sums = torch.zeros_like(codes).index_add_(0, ids[:, group], rows[:, group].to(codes.dtype))
                sizes = torch.bincount(ids[:, group], minlength=count)
                empty = sizes == 0
                codes.copy_(sums / sizes.clamp(min=1).unsqueeze(1))
                drawn = torch.randperm(total, generator=generator)[: int(empty.sum())].to(x.device)
                codes[empty] = rows[drawn, group].to(codes.dtype)
        return float(self.reconstruction(x))

    def extra_repr(self) -> str:
        groups, codes, size = self.codes.shape
        return f"{groups * size}, codes={codes}, k={self.k}, groups={groups}, similarity={self.similarity!r}"


def _far_apart(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices of `count` of the points [n, d], each drawn by its squared distance to the nearest one before it."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    nearest = (points - points[chosen[0]]).square().sum(-1)
    for _ in range(count - 1):
        # Where all distances are 0, any will do.
        weights = (nearest if bool(nearest.any()) else torch.ones_like(nearest)).double().cpu()
        place = torch.rand(1, dtype=torch.float64, generator=generator) * weights.sum()
        chosen.append(min(int(torch.searchsorted(weights.cumsum(0), place, right=True)), len(points) - 1))
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(-1))
    return torch.tensor(chosen, device=points.device)
