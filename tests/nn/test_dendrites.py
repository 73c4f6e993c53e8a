"""Dendrites: the function they are, the rule that candidates are trained by, and what training reaches when."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxfreeze.nn import Dendrites

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 4), (7, 5)),
    "linear of sequences": (lambda: nn.Linear(5, 4), (3, 7, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3), (2, 3, 9)),
    "conv2d and norm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)), (2, 3, 6, 6)),
}


def drawn(layer: nn.Module, count: int, **how: Any) -> Dendrites:
    """With `count` dendrites, mixed in and into each other at random."""
    dendrites = Dendrites(layer, **how)
    for _ in range(count):
        dendrites.grow()
        dendrites.adopt()
    for weights in (*dendrites.mixing, *dendrites.cascade):
        weights.data.normal_()
    return dendrites


def by_hand(layer: Dendrites, x: Tensor) -> Tensor:
    def along(values: Tensor) -> Tensor:
        return values.reshape(-1, *[1] * (-layer.dim - 1))

    found: list[Tensor] = []
    for j, branch in enumerate(layer.copies):
        found.append(torch.sigmoid(branch(x) + sum(along(layer.cascade[j][i]) * found[i] for i in range(j))))
    return layer.layer(x) + sum(along(t) * d for t, d in zip(layer.mixing, found))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("count", [1, 3])
def test_it_is_the_sum_it_says(kind: str, count: int) -> None:
    make, shape = LAYERS[kind]
    layer, x = drawn(make(), count).eval(), torch.randn(shape)
    assert layer.count == count
    torch.testing.assert_close(layer(x), by_hand(layer, x))


@pytest.mark.parametrize("kind", LAYERS)
def test_nothing_changes_by_growing_or_adopting(kind: str) -> None:
    make, shape = LAYERS[kind]
    base, x = make().eval(), torch.randn(shape)
    layer = Dendrites(copy.deepcopy(base)).eval()
    assert torch.equal(layer(x), base(x))
    layer.grow()
    assert torch.equal(layer(x), base(x))
    layer.adopt()
    assert torch.equal(layer(x), base(x))
    assert not torch.equal(next(layer.copies.parameters()), next(base.parameters()))


@pytest.mark.parametrize("kind", ["linear", "linear of sequences", "conv1d"])
def test_a_candidate_is_trained_to_correlate(kind: str) -> None:
    make, shape = LAYERS[kind]
    layer = drawn(make(), 1)
    branch = layer.grow()
    layer.cascade[-1].data.normal_()
    x, behind = torch.randn(shape), nn.Linear(2, 2)

    def loss(y: Tensor) -> Tensor:
        return (y.flatten(0, -2).matmul(torch.ones(y.shape[-1], 2)).tanh() @ behind.weight - 0.3).pow(2).mean()

    loss(layer(x)).backward()
    # The definition, with E from a run of its own.
    y = layer.eval()(x).detach().requires_grad_()
    (error,) = torch.autograd.grad(loss(y), y)
    along = [-1, *[1] * (-layer.dim - 1)]
    with torch.no_grad():
        first = torch.sigmoid(layer.copies[0](x))
    twin, mix = copy.deepcopy(branch), layer.cascade[-1].detach().clone().requires_grad_()
    d = torch.sigmoid(twin(x) + mix[0].reshape(along) * first)
    d, error = (value.movedim(layer.dim, 0).flatten(1) for value in (d, error))
    error = error * error.shape[1]
    score = ((d - d.mean(1, keepdim=True)) * (error - error.mean(1, keepdim=True))).mean(1).abs().sum()
    wanted = torch.autograd.grad(-score, (*twin.parameters(), mix))
    for parameter, want in zip(layer.candidate_parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, want)


def test_the_loss_reaches_what_it_should_and_when() -> None:
    layer, x = drawn(nn.Linear(5, 4), 1), torch.randn(6, 5, requires_grad=True)

    def reached() -> list[bool]:
        """Weights of: the layer, t, the first dendrite, the last."""
        layer.zero_grad()
        layer(x).pow(2).mean().backward()
        weights = [layer.layer.weight, layer.mixing[0], layer.copies[0].weight, layer.copies[-1].weight]
        return [weight.grad is not None and bool(weight.grad.any()) for weight in weights]

    assert reached() == [True, True, False, False]
    layer.grow()
    assert reached() == [False, False, False, True]
    layer.adopt()
    assert reached() == [True, True, False, False]
    # And x sees the layer alone, of a candidate too.
    for _ in range(2):
        x.grad = None
        layer(x).pow(2).sum().backward()
        torch.testing.assert_close(x.grad, 2 * layer(x).detach() @ layer.layer.weight)
        if not layer.growing:
            layer.grow()


def test_a_frozen_layer_stays_frozen_and_still_teaches() -> None:
    layer = Dendrites(nn.Linear(5, 4).requires_grad_(False))
    branch = layer.grow()
    layer(torch.randn(6, 5)).pow(2).mean().backward()
    assert branch.weight.grad.abs().sum() > 0
    layer.adopt()
    assert [name for name, item in layer.named_parameters() if item.requires_grad] == ["mixing.0"]


def test_norms_of_adopted_dendrites_are_done() -> None:
    make, shape = LAYERS["conv2d and norm"]
    layer = drawn(make(), 1).train()
    layer.grow()
    means = [layer.copies[at][1].running_mean.clone() for at in range(2)]
    layer(torch.randn(shape))
    assert torch.equal(layer.copies[0][1].running_mean, means[0])
    assert not torch.equal(layer.copies[1][1].running_mean, means[1])


def test_dropping_a_candidate() -> None:
    layer, x = drawn(nn.Linear(5, 4), 1), torch.randn(6, 5)
    before = layer(x)
    layer.grow()
    layer.drop()
    assert layer.count == 1 and len(layer.copies) == len(layer.cascade) == 1 and torch.equal(layer(x), before)


def test_saving_and_loading_with_dendrites() -> None:
    layer, x = drawn(nn.Linear(5, 4), 2), torch.randn(6, 5)
    other = Dendrites(nn.Linear(5, 4))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    layer.grow()
    other = Dendrites(nn.Linear(5, 4))
    other.load_state_dict(layer.state_dict())
    assert other.growing and torch.equal(other.copies[2].weight, layer.copies[2].weight)


def test_a_dendrite_learns_what_a_linear_layer_cannot() -> None:
    """XOR of signs, which no linear layer tells; the steps are those of the module's docstring."""
    x = torch.randn(256, 2)
    wanted = ((x[:, 0] > 0) ^ (x[:, 1] > 0)).float()
    layer = Dendrites(nn.Linear(2, 1), phi="tanh")

    def train(parameters: list[nn.Parameter]) -> float:
        optimizer = torch.optim.Adam(parameters, lr=0.05)
        for _ in range(80):
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(layer(x)[:, 0], wanted)
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    first = last = train(list(layer.layer.parameters()))
    for _ in range(3):
        layer.grow()
        train(list(layer.candidate_parameters()))
        layer.adopt()
        last = train([item for item in layer.parameters() if item.requires_grad])
    assert first > 0.65 and last < 0.5


def test_misuse_is_refused() -> None:
    for wrong in (nn.ReLU(), nn.Sequential(), nn.Sequential(nn.Linear(2, 2), nn.ReLU())):
        with pytest.raises(ValueError, match="batch norm"):
            Dendrites(wrong)
    with pytest.raises(ValueError, match="'sigmoid', 'tanh'"):
        Dendrites(nn.Linear(2, 2), phi="gelu")
    layer = Dendrites(nn.Linear(2, 2))
    for call in (layer.adopt, layer.drop, lambda: list(layer.candidate_parameters())):
        with pytest.raises(RuntimeError, match="no candidate"):
            call()
    layer.grow()
    with pytest.raises(RuntimeError, match="already"):
        layer.grow()
