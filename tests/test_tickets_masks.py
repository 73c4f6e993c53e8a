"""Which weights are pruned, and that pruned ones stay at zero in whatever loop trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxfreeze.errors import PlanError
from fxfreeze.tickets_masks import dense_masks, held, prune_smallest, shuffled

Step = Callable[[nn.Module, Tensor], None]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def half(model: nn.Module) -> dict[str, Tensor]:
    """Every other weight stays."""
    masks = dense_masks(model)
    for mask in masks.values():
        mask.view(-1)[1::2] = False
    return masks


def not_zero(model: nn.Module, masks: dict[str, Tensor]) -> int:
    """How many pruned weights are not zero."""
    parameters = dict(model.named_parameters())
    return sum(int(parameters[name][~mask].count_nonzero()) for name, mask in masks.items())


# ---- which weights


def test_linear_layers_and_convolutions_are_pruned_and_nothing_else():
    assert {name: tuple(mask.shape) for name, mask in dense_masks(net()).items()} == {
        "0.weight": (4, 1, 3, 3), "4.weight": (3, 16),
    }  # fmt: skip
    assert list(dense_masks(net(), ["4"])) == ["0.weight"]


def test_a_glob_that_matches_nothing_is_refused_and_so_is_nothing_to_prune():
    with pytest.raises(PlanError, match=r"'1' matches no linear layer.*\n.*\n.*they are 0, 4"):
        dense_masks(net(), ["1"])
    with pytest.raises(PlanError, match="no weight to prune"):
        dense_masks(net(), ["*"])


def test_frozen_weights_and_weights_of_other_layers_are_not_pruned():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5), "a": nn.Linear(4, 4),
                           "b": nn.Linear(4, 4), "frozen": nn.Linear(4, 4).requires_grad_(False)})  # fmt: skip
    model["head"].weight = model["embed"].weight
    model["b"].weight = model["a"].weight
    assert list(dense_masks(model)) == ["a.weight"]
    # what an excluded layer shares is not pruned either
    with pytest.raises(PlanError, match="no weight to prune"):
        dense_masks(model, ["a"])


def test_a_computed_weight_is_refused():
    model = nn.Sequential(nn.Linear(3, 3), torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(PlanError, match="1 computes its weight from other parameters"):
        dense_masks(model)
    assert list(dense_masks(model, ["1"])) == ["0.weight"]


def test_the_smallest_magnitudes_of_all_layers_go():
    weights = {"a": torch.tensor([[0.5, -0.1], [3.0, 0.2]]), "b": torch.tensor([-0.3, 9.0, 0.05, 7.0])}
    masks = {name: torch.ones(value.shape, dtype=torch.bool) for name, value in weights.items()}
    once = prune_smallest(weights, masks, 0.4)  # 3 of 8
    assert once["a"].tolist() == [[True, False], [True, False]] and once["b"].tolist() == [True, True, False, True]
    twice = prune_smallest(weights, once, 0.4)  # 2 of 5
    assert twice["a"].tolist() == [[False, False], [True, False]] and twice["b"].tolist() == [False, True, False, True]
    assert masks["a"].all()  # the masks of before are left as they were


def test_exactly_as_many_go_also_of_equal_magnitudes():
    weights, masks = {"a": torch.ones(10)}, {"a": torch.ones(10, dtype=torch.bool)}
    for left in (8, 6, 5, 4, 3, 2, 1, 1):
        masks = prune_smallest(weights, masks, 0.2)
        assert int(masks["a"].sum()) == left
    assert masks["a"][-1]  # those that come first go first


def test_twenty_percent_at_each_level_is_a_power_of_0_8():
    weights, masks = {"a": torch.randn(100_000)}, {"a": torch.ones(100_000, dtype=torch.bool)}
    for _ in range(14):
        masks = prune_smallest(weights, masks, 0.2)
    assert float(masks["a"].double().mean()) == pytest.approx(0.8**14, abs=2e-5)


def test_diverged_weights_are_refused_but_pruned_ones_may_be_anything():
    weights, masks = {"a": torch.tensor([1.0, float("nan"), 2.0])}, {"a": torch.tensor([True, True, True])}
    with pytest.raises(PlanError, match="NaN"):
        prune_smallest(weights, masks, 0.2)
    masks["a"][1] = False
    assert prune_smallest(weights, masks, 0.2)["a"].tolist() == [False, False, True]


def test_a_random_mask_has_as_many_weights_in_every_layer():
    masks = {"a": torch.rand(40, 5) < 0.1, "b": torch.rand(30) < 0.7}
    one, other, again = shuffled(masks, 1), shuffled(masks, 2), shuffled(masks, 1)
    for name, mask in masks.items():
        assert one[name].shape == mask.shape and one[name].sum() == mask.sum() == other[name].sum()
        assert torch.equal(one[name], again[name])
        assert not torch.equal(one[name], mask) and not torch.equal(one[name], other[name])


# ---- pruned weights stay at zero


def with_optimizer(make: Callable[[Any], torch.optim.Optimizer]) -> Callable[[nn.Module], Step]:
    def loop(model: nn.Module) -> Step:
        optimizer = make(model.parameters())

        def step(model: nn.Module, x: Tensor) -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(x), torch.arange(len(x)) % 3).backward()
            optimizer.step()

        return step

    return loop


def by_hand(model: nn.Module) -> Step:
    """Momentum and weight decay written out, with ``torch.autograd.grad`` and no optimizer."""
    velocity = [torch.zeros_like(p) for p in model.parameters()]

    def step(model: nn.Module, x: Tensor) -> None:
        loss = F.cross_entropy(model(x), torch.arange(len(x)) % 3)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, v, grad in zip(model.parameters(), velocity, grads, strict=True):
                v.mul_(0.9).add_(grad + 0.01 * p)
                p.sub_(0.1 * v)

    return step


class Stale(torch.optim.SGD):
    """Momentum from before the pruning: it goes on in the direction of weights that are gone."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1, momentum=0.9)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum_buffer"] = torch.ones_like(p)


class Noisy(torch.optim.SGD):
    """Adds noise to every weight, as Langevin dynamics does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(0.01 * torch.randn_like(p))
        return super().step(closure)


LOOPS = {
    "sgd": with_optimizer(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01)),
    "nesterov, foreach": with_optimizer(
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01, foreach=True)
    ),
    "adamw": with_optimizer(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1)),
    "adamw, fused": with_optimizer(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True)),
    "adam, amsgrad": with_optimizer(lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True)),
    "stale momentum": with_optimizer(Stale),
    "noise": with_optimizer(Noisy),
    "by hand": by_hand,
}


@pytest.mark.parametrize("name", LOOPS)
def test_pruned_weights_are_zero_in_every_forward_pass_and_the_others_train(name: str):
    model, x = net(), torch.randn(6, 1, 4, 4)
    masks, before = half(model), {name: value.detach().clone() for name, value in model.named_parameters()}
    seen = []

    def look(module: nn.Module, args: Any) -> None:
        seen.append(
            sum(int(dict(model.named_parameters())[name][~mask].count_nonzero()) for name, mask in masks.items())
        )

    step = LOOPS[name](model)
    with held(model, masks):
        model.register_forward_pre_hook(look)
        for _ in range(5):
            step(model, x)
    assert seen == [0] * 5
    for key, value in model.named_parameters():
        stays = masks.get(key, torch.ones(value.shape, dtype=torch.bool))
        assert bool((value[stays] != before[key][stays]).any()), key


def test_what_remains_trains_as_a_network_without_the_pruned_weights():
    """Against masks as factors in the forward pass, where weight decay and momentum see no pruned weight either."""
    torch.manual_seed(1)
    layer, x, y = nn.Linear(8, 3), torch.randn(20, 8), torch.arange(20) % 3
    mask = torch.rand(3, 8) < 0.5
    weight, bias = (p.detach().clone().requires_grad_() for p in layer.parameters())
    reference = torch.optim.AdamW([weight, bias], lr=0.05, weight_decay=0.1)
    with torch.no_grad():
        weight.mul_(mask)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05, weight_decay=0.1)
    with held(layer, {"weight": mask}):
        for _ in range(10):
            for one, scores in ((optimizer, lambda: layer(x)), (reference, lambda: F.linear(x, weight * mask, bias))):
                one.zero_grad()
                F.cross_entropy(scores(), y).backward()
                one.step()
    torch.testing.assert_close(layer.weight.detach(), weight.detach() * mask, rtol=1e-6, atol=1e-7)


def test_clipping_sees_no_gradient_of_pruned_weights():
    layer = nn.Linear(4, 1, bias=False)
    with held(layer, {"weight": torch.tensor([[True, False, False, False]])}):
        (layer(torch.tensor([[3.0, 100.0, 100.0, 100.0]]))).sum().backward()
        assert float(nn.utils.clip_grad_norm_(layer.parameters(), 1e9)) == 3.0


def test_a_layer_that_is_called_twice_trains():
    """Weights are set to zero under a graph that saved them, and backward still runs."""
    layer = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    other = nn.Linear(2, 2)
    another = torch.optim.SGD(other.parameters(), lr=0.1)
    with held(layer, half(layer)):
        loss = layer(layer(torch.ones(1, 4))).sum()
        other(torch.ones(1, 2)).sum().backward()
        another.step()
        loss.backward()
        optimizer.step()


def test_nothing_is_left_of_it_afterwards():
    model = net()
    masks = half(model)
    with pytest.raises(ZeroDivisionError), held(model, masks):
        raise ZeroDivisionError
    with held(model, masks):
        pass
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(2, 1, 4, 4)).square().sum().backward()
    optimizer.step()
    assert not_zero(model, masks)


def test_a_loop_that_goes_around_it_is_refused():
    model = net()
    with pytest.raises(PlanError, match=r"\d+ pruned weights of 4\.weight are not zero"), held(model, half(model)):
        model[4].weight = nn.Parameter(torch.ones(3, 16))
    with pytest.raises(PlanError, match=r"no parameter '4\.weight'"), held(model, half(model)):
        del model[4]


def test_a_model_may_be_cast_while_it_trains():
    layer = nn.Linear(4, 4)
    masks = half(layer)
    with held(layer, masks):
        layer.bfloat16()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
        layer(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
    assert layer.weight.dtype == torch.bfloat16 and not layer.weight.detach()[~masks["weight"]].any()
