"""fz.Tap: seen while an adapted module trains, and gone from what is compiled."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxfreeze as fz
from fxfreeze.api import rewrite
from fxfreeze.errors import PlanError

INPUT = [fz.Input("x", shape=("batch", 8))]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4)).eval()


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.relu(self.layer(x)))


def test_what_a_loss_sees_and_an_artifact_does_not() -> None:
    model, x = network(), torch.randn(5, 8)
    net = fz.adapt(model, fz.Plan(INPUT, [fz.LoRA(at="3", rank=2), fz.Tap(at=["1", "3"])]))
    y = net(x)
    assert isinstance(y, torch.Tensor) and torch.equal(y, model(x))
    assert list(net.tapped) == ["tap.1", "tap.3"]
    assert torch.equal(net.tapped["tap.1"], model[:2](x)) and net.tapped["tap.3"] is y
    (net.tapped["tap.3"] ** 2).sum().backward()
    assert any(value.grad is not None and bool(value.grad.any()) for value in net.parameters())
    program = rewrite(net, net.plan).program
    assert program.outputs == ("output",) and not program.taps and len(program.output_nodes) == 1
    torch.testing.assert_close(fz.compile(net, net.plan)(x), model(x))


def test_a_tap_sees_what_the_other_steps_left() -> None:
    module, x = nn.Linear(8, 8), torch.randn(5, 8)
    net = fz.adapt(network(), fz.Plan(INPUT, [fz.Tap(at="1"), fz.Splice(module, at="1", how="add")]))
    net(x)
    h = network()[:2](x)
    torch.testing.assert_close(net.tapped["tap.1"], h + module(h))


def test_calls_are_numbered() -> None:
    net = fz.adapt(Twice().eval(), fz.Plan(INPUT, [fz.Tap(at="layer")]))
    y = net(torch.randn(2, 8))
    assert list(net.tapped) == ["tap.layer.0", "tap.layer.1"] and net.tapped["tap.layer.1"] is y


def test_heads_and_taps() -> None:
    model, x = network(), torch.randn(5, 8)
    net = fz.adapt(model, fz.Plan(INPUT, [fz.Tap(at="1"), fz.Head(nn.Linear(8, 2), at="1")]))
    y, head = net(x)
    assert y.shape == (5, 4) and head.shape == (5, 2) and list(net.tapped) == ["tap.1"]


def test_a_tap_of_nothing_is_refused() -> None:
    with pytest.raises(PlanError, match="no module matches 'nowhere'"):
        fz.adapt(network(), fz.Plan(INPUT, [fz.Tap(at="nowhere")]))


def test_a_net_is_copied_after_a_call_without_what_it_saw() -> None:
    net, x = fz.adapt(network(), fz.Plan(INPUT, [fz.LoRA(at="3", rank=2), fz.Tap(at="1")])), torch.randn(5, 8)
    y = net(x)
    twin = copy.deepcopy(net)
    assert twin.tapped == {} and list(net.tapped) == ["tap.1"]
    assert torch.equal(twin(x), y) and twin.tapped["tap.1"] is not net.tapped["tap.1"]
