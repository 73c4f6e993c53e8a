"""Hardening: the limit of the soft gate, measured site by site, and parity held to the hard function."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.api import Compilation, rewrite
from fxfreeze.capture import flat_examples
from fxfreeze.errors import FxfreezeError
from fxfreeze.nn import Gate
from fxfreeze.pipeline import proof_draws

INPUT = [fz.Input("x", shape=("batch", 8))]


def trained(temperature: float = 0.1, model: nn.Module | None = None, **options: Any) -> fz.AdaptedModule:
    """Gates that half of what comes shuts."""
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 5)).eval()
    net = fz.adapt(model, fz.Plan(INPUT, [fz.Gate(at="1", temperature=temperature, **options)]))
    with torch.no_grad():
        for name, value in net.named_parameters():
            value.copy_(torch.rand_like(value) + (0.5 if name.endswith("gain") else 0.0))
    return net


def by_hand(net: fz.AdaptedModule, x: Tensor) -> Tensor:
    state = net.adapter_state()
    weights = {name: net.origins.program.state[name] for name in ("0.weight", "0.bias", "2.weight", "2.bias")}
    h = torch.relu(x @ weights["0.weight"].T + weights["0.bias"])
    h = h * state["adapters.gate.1.gain"] * (h > state["adapters.gate.1.threshold"])
    return h @ weights["2.weight"].T + weights["2.bias"]


def details(done: Compilation) -> dict[str, str]:
    return {row.site: row.detail for row in done.ledger if row.outcome == "measured" and row.pass_name == "harden"}


def test_it_is_hard_and_the_ledger_says_what_changed() -> None:
    net = trained()
    batches = [torch.randn(100, 8), torch.randn(50, 8)]
    done = rewrite(net, net.plan, calibration=batches)
    x = torch.cat(batches)
    torch.testing.assert_close(done.program.run(x)[0], by_hand(net, x), rtol=1e-5, atol=1e-5)
    assert not done.lossless
    found = details(done)
    h = torch.relu(x @ net.origins.program.state["0.weight"].T + net.origins.program.state["0.bias"])
    state = net.adapter_state()
    gain, threshold = state["adapters.gate.1.gain"], state["adapters.gate.1.threshold"]
    soft, hard = gain * h * torch.sigmoid((h - threshold) / 0.1), gain * h * (h > threshold)
    gap, share = float((hard - soft).norm() / soft.norm()), float((h > threshold).float().mean())
    assert f"relative gap {gap:.2g}" in found["1"] and f"{share:.1%} of neurons fire" in found["1"]
    same = float((net(x).argmax(1) == by_hand(net, x).argmax(1)).float().mean())
    assert f"{same:.2%} of predictions stay; on 150 rows of calibration data" in found[""]


def test_a_cold_gate_has_less_of_a_gap() -> None:
    gaps = [float(re.findall(r"relative gap ([\d.e-]+)", details(rewrite(net, net.plan))["1"])[0])
            for net in (trained(0.3), trained(0.03))]  # fmt: skip
    assert gaps[1] < gaps[0] / 3


def test_soft_on_request_and_then_nothing_is_lost() -> None:
    net, x = trained(harden=False), torch.randn(16, 8)
    done = rewrite(net, net.plan)
    assert done.lossless and not details(done)
    torch.testing.assert_close(done.program.run(x)[0], net(x))
    net.temperatures[0].fill_(0.5)  # what the schedule left is what is compiled
    torch.testing.assert_close(rewrite(net, net.plan).program.run(x)[0], net(x))


def test_a_layer_of_the_models_own_is_hardened() -> None:
    model = nn.Sequential(nn.Linear(8, 6), Gate(6, temperature=0.2, threshold=0.3, s="abs"), nn.Linear(6, 2)).eval()
    done = rewrite(model, fz.Plan(INPUT))
    x = torch.randn(9, 8)
    h = model[0](x)
    torch.testing.assert_close(done.program.run(x)[0], model[2](h * (h.abs() > 0.3)))
    assert not torch.allclose(done.program.run(x)[0], model(x), atol=1e-3)


def test_calibration_is_checked_and_a_generator_is_kept() -> None:
    net = trained()
    done = rewrite(net, net.plan, calibration=(torch.randn(10, 8) for _ in range(3)))
    assert "on 30 rows of calibration data" in details(done)["1"]
    for bad, says in ((torch.randn(3, 8), "one tensor, not batches"), ([], "no batches"),
                      ([torch.randn(2, 7)], "axis 1 is 7")):  # fmt: skip
        with pytest.raises(FxfreezeError, match=says):
            rewrite(net, net.plan, calibration=bad)


def test_targets_are_held_to_the_hard_function_near_the_threshold_too() -> None:
    net = trained()
    artifact = fz.compile(net, fz.Plan(INPUT, net.plan.steps, targets=["torch", "onnx"]))
    rows = artifact.manifest["parity"]
    assert {row["target"] for row in rows} == {"torch", "onnx"} and all(row["tolerance"] < 2e-5 for row in rows)
    x = torch.randn(11, 8)
    for target in artifact.targets:
        torch.testing.assert_close(artifact(x, target=target), by_hand(net, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("number", [1, 2, 4])
def test_what_rounding_decides_is_counted_and_no_error(number: int) -> None:
    """Thresholds where float32 puts activations of the example: any order of summation may decide either way."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 5)).eval()
    x = torch.randn(1, 8)
    net = trained(model=model)
    with torch.no_grad():
        h = model[:2](x)[0]
        near = h >= h.topk(number).values[-1]
        net.adapters.gate.get_submodule("1").threshold.copy_(torch.where(near, h, h * 0.9 - 0.1))
    artifact = fz.compile(net, fz.Plan(INPUT, net.plan.steps, targets=["torch", "onnx"]), example_inputs=x)
    rows = artifact.manifest["parity"]
    assert {row["target"] for row in rows if row["undecided"] == 1} == {"torch", "onnx"}
    with torch.no_grad():
        net.adapters.gate.get_submodule("1").threshold.mul_(0.9)
    artifact = fz.compile(net, fz.Plan(INPUT, net.plan.steps, targets=["torch", "onnx"]), example_inputs=x)
    assert all(row["undecided"] == 0 for row in artifact.manifest["parity"])


def test_which_neurons_fire_for_each_sample() -> None:
    net = trained()
    artifact = fz.compile(net, net.plan)
    x = torch.randn(7, 8)
    h = torch.relu(x @ net.origins.program.state["0.weight"].T + net.origins.program.state["0.bias"])
    found = artifact.firing(x)
    assert list(found) == ["1"] and torch.equal(found["1"], h > net.adapter_state()["adapters.gate.1.threshold"])
    (row,) = artifact.manifest["gates"]
    assert (row["site"], row["step"], row["neurons"]) == ("1", "gate", 32) and 0 < row["share"] < 1


def test_modes_come_out_in_every_target() -> None:
    net = trained(modes=4)
    artifact = fz.compile(net, fz.Plan(INPUT, net.plan.steps, targets=["torch", "onnx"]))
    x, mode = torch.randn(6, 8), torch.tensor([3, 0, 1, 2, 2, 0])
    h = torch.relu(x @ net.origins.program.state["0.weight"].T + net.origins.program.state["0.bias"])
    gain, threshold = (net.adapter_state()[f"adapters.gate.1.{leaf}"][mode] for leaf in ("gain", "threshold"))
    assert torch.equal(artifact.firing(x, mode)["1"], h > threshold)
    weight, bias = (net.origins.program.state[name] for name in ("2.weight", "2.bias"))
    want = (gain * h * (h > threshold)) @ weight.T + bias
    for target in artifact.targets:
        torch.testing.assert_close(artifact(x, mode, target=target), want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_saved_package_selects_modes_and_says_who_fired(tmp_path: Path) -> None:
    net = trained(modes=3)
    fz.compile(net, fz.Plan(INPUT, net.plan.steps, targets=["aoti"])).save(tmp_path / "out")
    artifact = fz.load(tmp_path / "out")
    x, mode = torch.randn(9, 8), torch.arange(9) % 3
    singles = [trained(modes=3) for _ in range(3)]
    for one, single in enumerate(singles):
        with torch.no_grad():
            for value in single.parameters():
                value.copy_(value[one].expand_as(value).clone())
        want = rewrite(single, single.plan).program.run(x, mode)[0]
        torch.testing.assert_close(artifact(x, mode)[mode == one], want[mode == one], rtol=1e-4, atol=1e-5)
        threshold = net.adapter_state()["adapters.gate.1.threshold"][one]
        h = torch.relu(x @ net.origins.program.state["0.weight"].T + net.origins.program.state["0.bias"])
        assert torch.equal(artifact.firing(x, mode)["1"][mode == one], (h > threshold)[mode == one])
    with pytest.raises(fz.ArtifactError, match="input 'mode' is missing"):
        artifact(x)


def test_predictions_are_counted_as_such() -> None:
    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.act, self.last = nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.act(self.first(x))).argmax(-1)

    torch.manual_seed(0)
    net = fz.adapt(Classes().eval(), fz.Plan(INPUT, [fz.Gate(at="act", temperature=2.0)]))
    with torch.no_grad():
        net.adapters.gate.act.threshold.fill_(0.3)
    x = torch.randn(400, 8)
    done = rewrite(net, net.plan, calibration=[x])
    stay = float((net(x) == done.program.run(x)[0]).double().mean())
    assert 0.5 < stay < 1 and f"{stay:.2%} of predictions stay" in details(done)[""]


def test_a_model_with_a_gate_is_compared_with_its_capture() -> None:
    class Sly(nn.Module):
        def __init__(self, gate: nn.Module) -> None:
            super().__init__()
            self.fc, self.gate = nn.Linear(8, 6), gate

        def forward(self, x: Tensor) -> Tensor:
            return self.gate(self.fc(x)) + (0.0 if torch.compiler.is_exporting() else 5.0)

    for gate in (nn.Identity(), Gate(6)):
        with pytest.raises(FxfreezeError, match=r"disagrees with the model|does not agree with the model"):
            fz.compile(Sly(gate).eval(), fz.Plan(INPUT))


def test_values_outside_of_the_declared_range_are_refused() -> None:
    net = fz.adapt(nn.Sequential(nn.Linear(8, 4), nn.ReLU()).eval(),
                   fz.Plan([fz.Input("x", ("batch", 8), low=0.0, high=1.0)], [fz.Gate(at="1")]))  # fmt: skip
    rewrite(net, net.plan, calibration=[torch.rand(5, 8)])
    for options in ({"calibration": [torch.full((5, 8), 2.0)]}, {"example_inputs": torch.full((5, 8), -1.0)}):
        with pytest.raises(fz.PlanError, match=r"where the plan declares (high=1|low=0)"):
            rewrite(net, net.plan, **options)


def test_one_example_row_does_not_leave_modes_unseen() -> None:
    net = trained(modes=4)
    draws = proof_draws(net.program(), "full", flat_examples(net.plan, torch.randn(1, 8)))
    assert len({int(value) for draw in draws for value in draw[1]}) > 1


def test_a_mode_there_is_not() -> None:
    net = trained(modes=3)
    artifact = fz.compile(net, fz.Plan(INPUT, net.plan.steps, targets=["onnx"]))
    for mode in ([0, 3], [-1, 0]):
        with pytest.raises(fz.ArtifactError, match=r"input 'mode' holds .*, expected 0 to 2"):
            artifact(torch.randn(2, 8), torch.tensor(mode))
