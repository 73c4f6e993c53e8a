"""Steps that graft a layer of fxfreeze.nn: where it goes, how it starts, and that the compiled model is it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze import nn as layers
from fxfreeze.api import rewrite
from fxfreeze.errors import PlanError

TOKENS = [fz.Input("x", shape=("batch", "length", 8))]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).eval()


def adapted(step: Any, model: nn.Module | None = None, inputs: Any = TOKENS) -> fz.AdaptedModule:
    return fz.adapt(model or network(), fz.Plan(inputs, [step]))


def trained(net: fz.AdaptedModule) -> dict[str, Tensor]:
    """Random values for all adapters, by the name they have in the layer."""
    torch.manual_seed(1)
    with torch.no_grad():
        for value in net.parameters():
            value.normal_(std=0.3)
    return {name.split(".", 3)[3]: value for name, value in net.adapter_state().items()}


def loaded(layer: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    layer.load_state_dict(state, strict=False)
    return layer.eval()


def compiled(net: fz.AdaptedModule, *x: Tensor) -> tuple[Tensor, ...]:
    """What the program computes after all passes."""
    return rewrite(net, net.plan).program.run(*x)


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [False, True])
def test_bottleneck(norm: bool) -> None:
    model, x = network(), torch.randn(2, 3, 8)
    net = adapted(fz.Bottleneck(at="2", width=3, norm=norm, scale=0.5), model)
    assert torch.equal(net(x), model(x))
    layer = loaded(layers.Bottleneck(8, 3, norm=norm, residual=False), trained(net))
    h = model(x)
    same(net(x), h + 0.5 * layer(h))
    same(compiled(net, x)[0], net(x).detach())


def test_parallel_bottleneck() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval(), torch.randn(2, 3, 8)
    net = adapted(fz.Bottleneck(at="2", width=3, form="parallel"), model)
    layer = loaded(layers.Bottleneck(8, 3, residual=False), trained(net))
    h = model[:2](x)
    same(net(x), model[2](h) + layer(h))


def test_bottleneck_of_channels() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()).eval(), torch.randn(2, 3, 9, 9)
    net = adapted(fz.Bottleneck(at="1", width=2), model, [fz.Input("x", ("batch", 3, 9, 9))])
    layer = loaded(layers.Bottleneck(6, 2, residual=False, dims=2), trained(net))
    same(net(x), model(x) + layer(model(x)))


@pytest.mark.parametrize("positions", ["all", "f1+l2"])
@pytest.mark.parametrize("kind", ["LoReFT", "DiReFT"])
def test_edits(kind: str, positions: str) -> None:
    model, x = network(), torch.randn(2, 5, 8)
    net = adapted(getattr(fz, kind)(at="1", rank=3, positions=positions), model)
    same(net(x), model(x))
    layer = loaded(getattr(layers, kind)(16, 3, positions=positions), trained(net))
    expected = model[2](layer(model[:2](x)))
    same(net(x), expected)
    assert not torch.allclose(expected, model(x), atol=1e-2)
    same(compiled(net, x)[0], expected.detach())


def test_codebook() -> None:
    model, x = network(), torch.randn(2, 3, 8)
    net = adapted(fz.Codebook(at="1", codes=5, k=2, groups=2), model)
    layer = loaded(layers.Codebook(16, 5, k=2, groups=2), trained(net))
    same(net(x), model[2](layer(model[:2](x))))
    same(compiled(net, x)[0], net(x).detach())


def test_bayescap() -> None:
    model, x = network(), torch.randn(2, 3, 8)
    net = adapted(fz.BayesCap(at="2", hidden=6, blocks=1), model)
    y, mean, alpha, beta = net(x)
    assert torch.equal(y, model(x)) and torch.equal(mean, y)
    same(alpha, torch.ones_like(y))
    same(beta, torch.full_like(y, 2.0))
    assert net.origins.program.outputs == ("output", "bayescap.mean", "bayescap.alpha", "bayescap.beta")
    layer = loaded(layers.BayesCap(8, hidden=6, blocks=1, dims=0), trained(net))
    for actual, expected, last in zip(net(x)[1:], layer(y), compiled(net, x)[1:], strict=True):
        same(actual, expected)
        same(last, expected.detach())
    layers.cap_loss(*net(x)[1:], frozen=y, truth=torch.randn_like(y)).backward()
    assert all(value.grad is not None and bool(torch.isfinite(value.grad).all()) for value in net.parameters())


# ---- layers that take modules, or more than a value: by fz.Splice


def test_a_frozen_block_of_another_model() -> None:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True).eval()
    model, x = network(), torch.randn(2, 3, 8)
    layer = layers.FrozenBlock(block, 8, 6)
    net = adapted(fz.Splice(layer, at="2"), model)
    same(net(x), layer.eval()(model(x)))
    assert {name.split(".")[3] for name in net.adapter_state()} == {"into", "back"}
    same(compiled(net, x)[0], net(x).detach())


def test_values_attend_to_another_branch() -> None:
    model, x = network(), torch.randn(2, 3, 8)
    layer = layers.CrossAttentionFusion(8, 16, heads=2)
    net = adapted(fz.Splice(layer, at="2", taps={"context": "1"}), model)
    assert torch.equal(net(x), model(x))
    state = trained(net)
    same(net(x), loaded(layer, state)(model(x), model[:2](x)))
    same(compiled(net, x)[0], net(x).detach())


def test_a_layer_for_every_task_and_for_one() -> None:
    model, x, task = network(), torch.randn(3, 4, 8), torch.tensor([1, 0, 1])
    layer = layers.InnerAdaptor([nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16), nn.Tanh())])
    net = adapted(fz.Splice(layer, at="1", select="task", tasks=2), model)
    expected = model[2](layer(model[:2](x), task))
    same(net(x, task), expected)
    same(compiled(net, x, task)[0], expected.detach())
    one = layers.InnerAdaptor(layer.layers, task=1)
    net = adapted(fz.Splice(one, at="1"), model)
    program = rewrite(net, net.plan).program
    same(program.run(x)[0], model[2](one(model[:2](x))).detach())
    assert len(program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)) == 3  # of 4


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (fz.Bottleneck(at="1", width=3, dims=3), "where the dim of the features has no fixed size"),
        (fz.Bottleneck(at="2", width=3, form="parallel"), r"'bottleneck' makes .*16\], which cannot be added to .*8\]"),
        (fz.LoReFT(at="1", rank=17), "LoReFT does not fit 1: rank must be 1 … 16"),
        (fz.Codebook(at="1", codes=4, groups=3), "Codebook does not fit 1: features 16 must be a multiple"),
    ],
)
def test_refusals(step: Any, text: str) -> None:
    with pytest.raises(PlanError, match=text):
        adapted(step)


def test_a_plan_refuses() -> None:
    with pytest.raises(PlanError, match="positions: must be 'all', 'f3', 'l2' or 'f3"):
        fz.DiReFT(at="1", rank=2, positions="first")
    with pytest.raises(PlanError, match="k: must be ≤ codes"):
        fz.Codebook(at="1", codes=2, k=3)
