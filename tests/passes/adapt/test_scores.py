"""Which weights stay: every choice against a loop that makes it one entry at a time."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fxfreeze.passes.adapt._scores import largest, n_of_m, tiles


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 1.0])
def test_the_largest_of_all_layers(density: float) -> None:
    weights = [draw(4, 5), 3 * draw(2, 3, 2, 2, seed=1), draw(1, 7, seed=2).double()]
    entries = sorted(((float(value), layer, at) for layer, weight in enumerate(weights)
                      for at, value in enumerate(weight.abs().flatten())), key=lambda item: -item[0])  # fmt: skip
    expected = {(layer, at) for _, layer, at in entries[: max(1, int(density * 51 + 0.5))]}
    masks = largest(weights, density)
    found = {(layer, int(at)) for layer, mask in enumerate(masks) for at in mask.flatten().nonzero()}
    assert found == expected and [mask.shape for mask in masks] == [weight.shape for weight in weights]


def test_of_equals_the_first_stay() -> None:
    assert [mask.tolist() for mask in largest([torch.ones(2, 2), torch.tensor([[0.5, -1.0]])], 0.5)] == [
        [[True, True], [True, False]], [[False, False]],
    ]  # fmt: skip
    assert n_of_m(torch.tensor([[1.0, -1.0, 1.0, 1.0, 0.0, 0.0, 0.0]]), 2, 4).tolist() == [[1, 1, 0, 0, 1, 1, 0]]
    assert tiles([torch.ones(1, 4)], (1, 1), 0.5)[0].tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("shape", [(3, 8), (5, 10), (2, 6, 3, 2), (4, 3, 3)])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 3), (3, 8)])
def test_n_of_m(shape: tuple[int, ...], n: int, m: int) -> None:
    weight = draw(*shape)
    expected = torch.zeros(shape, dtype=torch.bool)
    for row, *window in itertools.product(range(shape[0]), *map(range, shape[2:])):
        for start in range(0, shape[1], m):
            group = range(start, min(start + m, shape[1]))
            for column in sorted(group, key=lambda at: -abs(float(weight[(row, at, *window)])))[:n]:
                expected[(row, column, *window)] = True
    assert torch.equal(n_of_m(weight, n, m), expected)


def test_n_of_m_of_zeros_keeps_no_more_than_n() -> None:
    mask = n_of_m(torch.zeros(2, 6), 2, 4)
    assert mask.tolist() == [[True, True, False, False, True, True]] * 2


@pytest.mark.parametrize("block", [(2, 3), (4, 4), (64, 64), (1, 5)])
@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_tiles(block: tuple[int, int], density: float) -> None:
    weights = [draw(5, 7), 2 * draw(4, 3, 2, 2, seed=1)]
    found = []
    for layer, weight in enumerate(weights):
        matrix = weight.flatten(1)
        for row, column in itertools.product(range(0, matrix.shape[0], block[0]), range(0, matrix.shape[1], block[1])):
            tile = matrix[row : row + block[0], column : column + block[1]]
            found.append((float(tile.double().square().mean()), tile.numel(), layer, row, column))
    found.sort(key=lambda item: -item[0])
    total, held = sum(item[1] for item in found), 0
    expected = [torch.zeros_like(weight.flatten(1), dtype=torch.bool) for weight in weights]
    for place, (_, size, layer, row, column) in enumerate(found):
        if place and abs(held + size - density * total) > abs(held - density * total):
            break
        held += size
        expected[layer][row : row + block[0], column : column + block[1]] = True
    masks = tiles(weights, block, density)
    assert all(torch.equal(mask.flatten(1), other) for mask, other in zip(masks, expected, strict=True))
