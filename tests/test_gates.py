"""Gates from training to artifact: what is removed, what is skipped, what is left, and who is said to fire."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.api import rewrite
from fxfreeze.firing import gate_rows

IMAGE = [fz.Input("x", shape=("batch", 12), low=0.0, high=1.0)]


def specialised(model: nn.Module, *steps: fz.Gate, inputs: Any = IMAGE, **options: Any) -> fz.AdaptedModule:
    """Gates as a training might leave them: some wide open, some out of reach, gains of both signs."""
    net = fz.adapt(model, fz.Plan(inputs, steps, **options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in net.named_parameters():
            drawn = torch.rand(value.shape, generator=generator)
            value.copy_(drawn + 0.5 if name.endswith("gain") else torch.where(drawn < 0.25, 50.0, drawn * 0.3))
    return net


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 24), nn.GELU(), nn.Linear(24, 4)).eval()


def hard(net: fz.AdaptedModule, model: nn.Sequential, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The network by hand, and who fires."""
    state, found = net.adapter_state(), {}
    for at, layer in enumerate(model):
        x = layer(x)
        if f"adapters.gate.{at}.gain" in state:
            found[str(at)] = x > state[f"adapters.gate.{at}.threshold"]
            x = (x * state[f"adapters.gate.{at}.gain"] * found[str(at)]).to(x.dtype)
    return x, found


def test_neurons_out_of_reach_are_gone_and_still_have_their_place_in_firing() -> None:
    model = network()
    net = specialised(model, fz.Gate(at=["1", "3"]), targets=["torch"])
    done = rewrite(net, net.plan)
    sizes = [list(done.program.state.tensor(name).shape) for name in ("0.weight", "2.weight", "4.weight")]
    never = {name: int((value == 50).sum()) for name, value in net.adapter_state().items() if "threshold" in name}
    first, second = never["adapters.gate.1.threshold"], never["adapters.gate.3.threshold"]
    assert first > 4 and second > 2
    assert sizes[0][0] <= 40 - first and sizes[1] == [sizes[2][1], sizes[0][0]] and sizes[1][0] <= 24 - second
    artifact = fz.compile(net, net.plan)
    x = torch.rand(50, 12)
    want, fires = hard(net, model, x)
    torch.testing.assert_close(artifact(x), want, rtol=1e-4, atol=1e-5)
    found = artifact.firing(x)
    assert list(found) == ["1", "3"] and all(torch.equal(found[site], fires[site]) for site in found)
    rows = {row["site"]: row for row in artifact.manifest["gates"]}
    assert rows["1"]["neurons"] == 40 and len(rows["1"]["kept"]) == sizes[0][0]
    removed = [row["detail"] for row in artifact.manifest["ledger"] if row["pass_name"] == "dead-neurons"]
    assert len(removed) == 2 and all("never fire for x in [0, 1]: removed" in text for text in removed)


def test_without_a_range_nothing_is_removed() -> None:
    net = specialised(network(), fz.Gate(at=["1", "3"]), inputs=[fz.Input("x", shape=("batch", 12))])
    done = rewrite(net, net.plan)
    assert list(done.program.state.tensor("0.weight").shape) == [40, 12]
    assert not [row for row in done.ledger if row.pass_name == "dead-neurons"]


def test_gains_are_in_the_weights_and_one_comparison_is_left_per_gate() -> None:
    net = specialised(network(), fz.Gate(at=["1", "3"]))
    operators = [str(node.target) for node in rewrite(net, net.plan).program.graph.nodes if node.op == "call_function"]
    assert operators.count("aten.gt.Tensor") == operators.count("aten.where.ScalarOther") == 2
    assert "aten.mul.Tensor" not in operators and "fxfreeze.gate.default" not in operators


def test_gates_that_cannot_shut_cost_nothing() -> None:
    model = network()
    net = fz.adapt(model, fz.Plan(IMAGE, [fz.Gate(at="1")]))
    with torch.no_grad():
        next(net.parameters()).uniform_(0.5, 2.0)  # the gains; thresholds are where they start, below 0
    done = rewrite(net, net.plan)
    operators = [str(node.target) for node in done.program.graph.nodes if node.op == "call_function"]
    assert operators == [str(node.target) for node in rewrite(model, fz.Plan(IMAGE)).program.graph.nodes
                         if node.op == "call_function"]  # fmt: skip
    x = torch.rand(9, 12)
    torch.testing.assert_close(done.program.run(x)[0], hard(net, model, x)[0], rtol=1e-5, atol=1e-6)


def test_a_models_own_thresholds_are_gates_too() -> None:
    class JumpReLU(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.threshold = nn.Parameter(torch.linspace(0.1, 0.6, 40))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x) * (x > self.threshold)

    model = network()
    model[1], model[3] = JumpReLU(), nn.Threshold(0.2, 0.0)
    artifact = fz.compile(model, fz.Plan(IMAGE, targets=["torch", "onnx"]))
    x = torch.rand(20, 12)
    for target in artifact.targets:
        torch.testing.assert_close(artifact(x, target=target), model(x), rtol=1e-4, atol=1e-5)
    found = artifact.firing(x)
    assert torch.equal(found["1"], model[0](x) > model[1].threshold)
    assert torch.equal(found["3"], model[2](model[1](model[0](x))) > 0.2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype: str) -> None:
    model, kind = network().to(getattr(torch, dtype)), getattr(torch, dtype)
    net = specialised(model, fz.Gate(at=["1", "3"]), inputs=[fz.Input("x", ("batch", 12), dtype, low=0.0, high=1.0)],
                      targets=["torch"])  # fmt: skip
    artifact = fz.compile(net, net.plan)
    x = torch.rand(30, 12).to(kind)
    want, fires = hard(net, model, x)
    found = artifact.firing(x)
    differ = {site: float((found[site] != fires[site]).float().mean()) for site in found}
    assert differ["1"] < 0.01 and differ["3"] < 0.05
    assert float((artifact(x).double() - want.double()).norm() / want.double().norm()) < 0.05


class Container(nn.Sequential):
    """Two gates of its own around those of its children, which are called as its own would be numbered."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(torch.where(x > 0.1, x, 0.0))
        return torch.where(x > 0.3, x, 0.0)


def test_sites_that_are_numbered_do_not_take_the_names_of_others() -> None:
    block = Container(nn.Threshold(0.2, 0.0), nn.Linear(12, 12), nn.Threshold(0.4, 0.0), nn.Linear(12, 12))
    program = rewrite(nn.Sequential(block).eval(), fz.Plan([fz.Input("x", shape=("batch", 12))])).program
    assert [row.site for row in gate_rows(program)] == ["0.1", "0.0", "0.2", "0.3"]
