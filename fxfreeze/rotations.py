"""The rotations of orthogonal finetuning (OFT), in peft's parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOOR = 1e-30
"""Lengths are divided by no less than this."""


def rotations(vectors: Tensor, size: int, *, eps: float | None = None, terms: int | None = None) -> Tensor:
    """The blocks of R, ``[blocks, size, size]``, from the upper triangles of their skew-symmetric Q.

    Args:
        vectors: ``[blocks, size · (size − 1) / 2]``, row by row.
        eps: keep every Q shorter than eps / √blocks.
        terms: of the Neumann series, as peft counts them; None is (I − Q)(I + Q)⁻¹ itself.
    """
    blocks = vectors.shape[0]
    rows, columns = torch.triu_indices(size, size, 1, device=vectors.device)
    first = torch.arange(blocks, device=vectors.device).unsqueeze(1)
    upper = vectors.new_zeros(blocks, size, size).index_put((first, rows, columns), vectors)
    skew = upper - upper.transpose(1, 2)
    if eps is not None:
        length = torch.linalg.vector_norm(skew, dim=(1, 2), keepdim=True).clamp_min(FLOOR)
        # peft projects the parameter itself before every forward: no gradient goes through the length.
        skew = skew * (eps / math.sqrt(blocks) / length).clamp_max(1).detach()
    identity = torch.eye(size, dtype=vectors.dtype, device=vectors.device)
    if terms is None:
        return torch.linalg.solve(identity + skew, identity - skew, left=False)
    total, power = identity + skew * (2 if terms > 1 else 0), skew
    last = max(terms, 4) - 1  # peft's three terms are its four
    for n in range(2, last + 1) if terms > 2 else ():
        power = power @ skew
        total = total + power * (1 if n == last else 2)
    return total


def rotated(value: Tensor, blocks: Tensor) -> Tensor:
    """``value · R`` along the last dim; one block serves all groups of features."""
    return (value.unflatten(-1, (-1, 1, blocks.shape[-1])) @ blocks).flatten(-3)
