"""Codebook features: chosen as a loop chooses, straight through backwards, started by k-means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fxfreeze.nn import Codebook


def by_loop(layer: Codebook, x: Tensor) -> Tensor:
    """The definition, row by row and group by group, with similarities as they are written."""
    groups, _, size = layer.codes.shape
    out = []
    for row in x.double().reshape(-1, groups * size):
        parts = []
        for group, chunk in enumerate(row.reshape(groups, size)):
            codes = layer.codes[group].double()
            z = chunk
            if layer.weight is not None:
                z = F.layer_norm(chunk, [size], layer.weight[group].double(), layer.bias[group].double(), layer.eps)
            if layer.similarity == "cosine":
                scores = (codes @ z) / codes.norm(dim=-1)
            else:
                scores = -((z - codes) ** 2).sum(-1)
            parts.append(codes[scores.argsort(descending=True)[: layer.k]].mean(0))
        out.append(torch.cat(parts))
    return torch.stack(out).reshape(x.shape).float()


def moved(layer: Codebook) -> Codebook:
    """With a normalization that scales and shifts."""
    for parameter in (layer.weight, layer.bias):
        if parameter is not None:
            parameter.data += 0.5 * torch.randn(parameter.shape)
    return layer


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
@pytest.mark.parametrize(("k", "groups", "norm"), [(1, 1, True), (3, 1, True), (1, 3, True), (2, 3, False)])
def test_it_is_what_a_loop_says(similarity: str, k: int, groups: int, norm: bool) -> None:
    layer = moved(Codebook(12, 9, k=k, groups=groups, similarity=similarity, norm=norm))
    x = torch.randn(2, 20, 12)
    torch.testing.assert_close(layer(x), by_loop(layer, x))
    assert layer(x[0, 0]).shape == (12,)


def test_ids_usage_and_dead_codes() -> None:
    layer = Codebook(6, 5, k=2, groups=2)
    x = torch.randn(4, 3, 6)
    ids = layer.ids(x)
    assert ids.shape == (4, 3, 2, 2) and ids.dtype == torch.int64
    mean = torch.stack([layer.codes[g][ids[..., g, :]].mean(-2) for g in range(2)], -2).flatten(-2)
    torch.testing.assert_close(layer(x), mean)
    usage = layer.usage(x)
    assert usage.shape == (2, 5) and usage.sum(1).tolist() == [24, 24]
    assert usage[0, 3] == (ids[..., 0, :] == 3).sum()
    assert layer.dead(x) == int((usage == 0).sum())
    assert Codebook(6, 50).dead(x[:1]) >= 47


def test_backwards_it_counts_as_its_input_and_codes_learn() -> None:
    layer = moved(Codebook(6, 5, k=2))
    x, upstream = torch.randn(7, 6, requires_grad=True), torch.randn(7, 6)
    y = layer(x)
    with torch.no_grad():
        assert torch.equal(y, layer(x))
    y.backward(upstream)
    assert torch.equal(x.grad, upstream)
    want = torch.zeros(5, 6)
    for row, ids in enumerate(layer.ids(x)[:, 0]):
        want[ids] += upstream[row] / 2
    torch.testing.assert_close(layer.codes.grad[0], want)
    assert layer.weight.grad is None


def test_reconstruction_moves_the_codes_only() -> None:
    layer = Codebook(6, 5)
    x = torch.randn(7, 6, requires_grad=True)
    loss = layer.reconstruction(x)
    torch.testing.assert_close(loss, ((layer(x) - x) ** 2).mean())
    loss.backward()
    assert x.grad is None and layer.codes.grad.abs().sum() > 0


@pytest.mark.parametrize(("similarity", "norm"), [("cosine", True), ("euclidean", False)])
def test_k_means_finds_clusters(similarity: str, norm: bool) -> None:
    centres = F.layer_norm(torch.randn(8, 16), [16]) * 3
    x = centres.repeat(30, 1) + 0.05 * torch.randn(240, 16)
    layer = Codebook(16, 8, similarity=similarity, norm=norm)
    before, after = layer.reconstruction(x).item(), layer.start(x)
    assert after < 0.01 < before and after == layer.reconstruction(x).item() and layer.dead(x) == 0
    assert layer.codes.requires_grad


def test_k_means_is_repeatable_and_wants_enough_rows() -> None:
    x = torch.randn(50, 6)
    first, second = Codebook(6, 8, groups=2), Codebook(6, 8, groups=2)
    first.start(x, seed=3)
    torch.randn(5)
    second.start(x, seed=3)
    assert torch.equal(first.codes, second.codes)
    with pytest.raises(ValueError, match="5 rows, fewer than the 8 codes"):
        first.start(x[:5])


@pytest.mark.parametrize(
    ("change", "says"),
    [({"codes": 0}, "codes must be positive"), ({"groups": 4}, "multiple of groups 4"), ({"k": 6}, "k 6 at most 5"),
     ({"similarity": "dot"}, "'cosine', 'euclidean'")],
)  # fmt: skip
def test_bad_arguments_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Codebook(**{"features": 6, "codes": 5, **change})
