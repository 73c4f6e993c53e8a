"""Which weights of layers stay: the largest, n of every m, or whole tiles. Weights are canonical, masks alike.

Equals are taken in the order of the layers, then of their rows: the same weights give the same masks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


def largest(weights: Sequence[Tensor], density: float) -> list[Tensor]:
    """The share `density` of all weights together that are largest in size, at least one.

    Args:
        weights: of any shapes, one per layer.

    Returns:
        A bool tensor for each.
    """
    return _divided(_top(_flat([weight.abs() for weight in weights]), density), weights)


def n_of_m(weight: Tensor, n: int, m: int) -> Tensor:
    """The `n` largest in size of every `m` consecutive inputs of a row, and of every entry of a window.

    Inputs behind the last whole `m` are a group of their own, of which as many stay at most.

    Args:
        weight: [out, in, *window].
    """
    groups = weight.abs().movedim(1, -1)
    padded = pad(groups, (0, -groups.shape[-1] % m), value=-1.0).unflatten(-1, (-1, m))
    order = padded.sort(dim=-1, descending=True, stable=True).indices
    mask = torch.zeros(padded.shape, dtype=torch.bool, device=weight.device).scatter_(-1, order[..., :n], True)
    return mask.flatten(-2)[..., : groups.shape[-1]].movedim(-1, 1).contiguous()


def tiles(weights: Sequence[Tensor], block: tuple[int, int], density: float) -> list[Tensor]:
    """The tiles with the largest root mean square, in all layers together, as many as hold the share `density` of all
    weights, or as near to it as tiles come; at least one.

    A tile is `block` rows and columns of the weight as a matrix [out, in · window]. Those at the lower and the right
    edge are cut to what is there, which is why it is the mean: whole tiles are in the order of their Frobenius norms.
    """
    scores, sizes = [], []
    for weight in weights:
        matrix = weight.flatten(1)
        scores.append(_per_tile(matrix.double().square(), block))
        sizes.append(_per_tile(torch.ones_like(matrix, dtype=torch.float64), block))
    size, score = _flat(sizes), _flat(scores)
    order = (score / size).sort(descending=True, stable=True).indices
    held = size[order].cumsum(0)
    # A tile is taken when that brings the sum nearer to the target.
    stay = held - size[order] / 2 <= density * float(held[-1])
    stay[0] = True
    chosen = torch.zeros_like(stay).scatter_(0, order, stay)
    return [_spread(mask, weight, block) for mask, weight in zip(_divided(chosen, scores), weights, strict=True)]


def _per_tile(matrix: Tensor, block: tuple[int, int]) -> Tensor:
    """Sums over the tiles of [rows, columns]."""
    (rows, columns), (high, wide) = matrix.shape, block
    padded = pad(matrix, (0, -columns % wide, 0, -rows % high))
    return padded.unflatten(1, (-1, wide)).unflatten(0, (-1, high)).sum(dim=(1, 3))


def _spread(mask: Tensor, weight: Tensor, block: tuple[int, int]) -> Tensor:
    """One bool per tile → one per weight."""
    columns = math.prod(weight.shape[1:])
    whole = mask.repeat_interleave(block[0], 0)[: weight.shape[0]].repeat_interleave(block[1], 1)[:, :columns]
    return whole.reshape(weight.shape)


def _flat(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in values])


def _divided(mask: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = mask.split([value.numel() for value in like])
    return [part.reshape(value.shape) for part, value in zip(parts, like, strict=True)]


def _top(scores: Tensor, density: float) -> Tensor:
    """The largest of a vector, of equals the first."""
    count = max(1, int(density * len(scores) + 0.5))
    bound = scores.kthvalue(len(scores) - count + 1).values
    mask = scores > bound
    equals = (scores == bound).nonzero().squeeze(1)
    mask[equals[: count - int(mask.sum())]] = True
    return mask
