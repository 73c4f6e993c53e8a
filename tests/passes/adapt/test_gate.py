"""fz.Gate: where gates go, how they start, what they refuse, modes, training, and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxfreeze as fz
from fxfreeze.errors import PlanError
from fxfreeze.nn import TemperatureSchedule, firing

INPUT = [fz.Input("x", shape=("batch", 8))]
OPERATOR = "fxfreeze.gate.default"


class Block(nn.Module):
    """Runs one module twice, and a function of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x)))
        x = self.relu(functional.max_pool2d(x, 2).transpose(1, 3) - 0.1)
        return functional.gelu(self.fc(x.mean((1, 2))))


class WrittenOut(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * x**3)))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), WrittenOut(), nn.Linear(12, 4)).eval()


def adapted(*steps: fz.Gate, model: nn.Module | None = None, inputs: Any = INPUT) -> fz.AdaptedModule:
    return fz.adapt(model or network(), fz.Plan(inputs, steps))


def gates(net: fz.AdaptedModule) -> list[tuple[str, int, list[int]]]:
    """What is gated, along which dim, and the parameters' shape."""
    nodes = net.program().graph.find_nodes(op="call_function", target=torch.ops.fxfreeze.gate.default)
    return [(str(node.args[0].target), node.kwargs["dim"], list(node.args[1].meta["val"].shape)) for node in nodes]


def test_an_activation_is_gated_where_it_is_run() -> None:
    net = adapted(fz.Gate(at=["1", "3"]))
    assert gates(net) == [("aten.relu.default", -1, [16]), ("aten.mul.Tensor", -1, [12])]
    assert [name for name, _ in net.named_parameters()] == [
        "adapters.gate.1.gain", "adapters.gate.1.threshold", "adapters.gate.3.gain", "adapters.gate.3.threshold",
    ]  # fmt: skip
    assert [row.outcome for row in net.ledger] == ["rewritten", "rewritten"]
    assert net.ledger.rows[0].detail == "16 neurons along dim -1; untrained: all but open"


def test_a_module_that_runs_several_is_several_sites_and_channels_are_followed() -> None:
    image = [fz.Input("x", shape=("batch", 3, 8, 8))]
    net = adapted(fz.Gate(at=["relu", "conv"], on="output"), model=Block().eval(), inputs=image)
    assert gates(net) == [("aten.conv2d.default", -3, [4]), ("aten.relu.default", -3, [4]),
                          ("aten.relu.default", -1, [4])]  # fmt: skip
    assert {name.rsplit(".", 1)[0] for name, _ in net.named_parameters()} == {
        "adapters.gate.conv", "adapters.gate.relu.0", "adapters.gate.relu.1"}  # fmt: skip


def test_a_glob_takes_activations_and_says_what_it_left() -> None:
    net = adapted(fz.Gate(at="*"))
    assert [name for name, *_ in gates(net)] == ["aten.relu.default", "aten.mul.Tensor"]
    refused = {row.site: row.detail for row in net.ledger if row.outcome == "refused"}
    assert set(refused) == {"0", "2", "4"} and "runs no activation function itself" in refused["0"]


def test_it_starts_all_but_open() -> None:
    model, x = network(), torch.randn(64, 8)
    for temperature in (0.1, 0.001):
        net = adapted(fz.Gate(at=["1", "3"], temperature=temperature), model=model)
        assert 0 < float((net(x) - model(x)).detach().abs().max()) < 0.2 * temperature
    starts = {name: float(value[0]) for name, value in net.adapter_state().items() if name.endswith("threshold")}
    assert list(starts.values()) == pytest.approx([-0.004, -0.379])
    given = adapted(fz.Gate(at="1", threshold=0.3)).adapter_state()
    assert float(given["adapters.gate.1.threshold"][3]) == pytest.approx(0.3)


def test_steps_at_one_value_follow_each_other() -> None:
    net = adapted(fz.Gate(at="1"), fz.Gate(at="1", s="abs"))
    assert [name for name, *_ in gates(net)] == ["aten.relu.default", OPERATOR]
    assert [float(value) for value in net.temperatures] == [pytest.approx(0.1)] * 2


def test_training_moves_gains_and_thresholds_only_and_files_bring_them_back(tmp_path: Path) -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    net, x = adapted(fz.Gate(at=["1", "3"]), model=model), torch.randn(32, 8)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    start = net.adapter_state()
    for _ in range(5):
        optimizer.zero_grad()
        with firing() as shares:
            loss = net(x).square().mean()
        assert len(shares.shares) == 2
        (loss + shares.mean()).backward()
        optimizer.step()
    assert all(not torch.equal(value, start[name]) for name, value in net.adapter_state().items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    net.save_adapters(tmp_path / "gates.safetensors")
    again = adapted(fz.Gate(at=["1", "3"], weights=str(tmp_path / "gates.safetensors")), model=model)
    assert torch.equal(again(x), net(x))
    with pytest.raises(PlanError, match=r"step 'gate' was trained as kind gate, .*s h, but the plan says"):
        adapted(fz.Gate(at=["1", "3"], s="abs", weights=str(tmp_path / "gates.safetensors")), model=model)


def test_the_penalty_shuts_gates() -> None:
    net, x = adapted(fz.Gate(at="1")), torch.randn(256, 8)
    optimizer = torch.optim.SGD(net.parameters(), lr=5.0)
    seen = []
    for _ in range(20):
        with firing() as shares:
            net(x)
        seen.append(shares.mean().item())
        optimizer.zero_grad()
        shares.mean().backward()
        optimizer.step()
    assert seen[-1] < 0.8 * seen[0]
    want = torch.sigmoid((network()[:2](x) - net.adapters.gate.get_submodule("1").threshold) / 0.1).mean()
    with firing() as shares:
        net(x)
    assert float(shares.mean()) == pytest.approx(float(want))
    with pytest.raises(ValueError, match="no gate ran"), firing() as shares:
        shares.mean()


def test_a_mode_per_row_is_the_gate_of_that_mode() -> None:
    model, x, mode = network(), torch.randn(5, 8), torch.tensor([2, 0, 1, 1, 2])
    net = adapted(fz.Gate(at=["1", "3"], modes=3), model=model)
    with torch.no_grad():
        for value in net.parameters():
            value.copy_(torch.rand_like(value))
    assert gates(net)[0] == ("aten.relu.default", -1, [3, 16])
    found = net(x, mode)
    for one in range(3):
        single = adapted(fz.Gate(at=["1", "3"]), model=model)
        with torch.no_grad():
            for few, many in zip(single.parameters(), net.parameters(), strict=True):
                few.copy_(many[one])
        torch.testing.assert_close(found[mode == one], single(x)[mode == one])
    assert torch.equal(net(x=x, mode=mode), found)
    with pytest.raises(PlanError, match="input 'mode' is missing"):
        net(x)
    with pytest.raises(PlanError, match="input 'mode' is torch"):
        net(x, mode.float())


def test_steps_share_an_input_or_have_their_own() -> None:
    net = adapted(fz.Gate(at="1", modes=3), fz.Gate(at="3", modes=2), fz.Gate(at="1", modes=4, select="task"))
    assert [(spec.name, spec.high) for spec in net.program().inputs] == [("x", None), ("mode", 1), ("task", 3)]


@pytest.mark.parametrize(
    ("step", "says"),
    [
        (fz.Gate(at="0"), "matches nothing that Gate can adapt:\n  0 is a Linear"),
        (fz.Gate(at="1", dim=2), "1 makes .* which has no dim 2"),
        (fz.Gate(at="1", dim=0), "whose dim 0 has no fixed size"),
        (fz.Gate(at="nope"), "no module matches 'nope'"),
    ],
)
def test_what_it_refuses(step: fz.Gate, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        adapted(step)


def test_modes_are_rows_of_the_batch() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x.transpose(0, 1)).transpose(0, 1)

    inputs = [fz.Input("x", shape=("batch", 5, 8))]
    assert gates(adapted(fz.Gate(at="act"), model=Turned(), inputs=inputs)) == [("aten.relu.default", -1, [8])]
    with pytest.raises(PlanError, match="whose first dim is not the rows of 'mode'"):
        adapted(fz.Gate(at="act", modes=2), model=Turned(), inputs=inputs)
    with pytest.raises(PlanError, match="'x' is an input of the model"):
        fz.Plan(INPUT, [fz.Gate(at="1", modes=2, select="x")])
    with pytest.raises(PlanError, match="temperature: must be > 0"):
        fz.Gate(at="1", temperature=0)


def test_a_schedule_moves_every_temperature_and_remembers_where_it_was() -> None:
    net = adapted(fz.Gate(at="1"), fz.Gate(at="3"))
    schedule = TemperatureSchedule(net, 0.4, 0.1, steps=2)
    seen = [float(net.temperatures[1])] + [schedule.step() for _ in range(3)]
    assert seen == pytest.approx([0.4, 0.2, 0.1, 0.1])
    assert [float(value) for value in net.temperatures] == pytest.approx([0.1, 0.1])
    other = TemperatureSchedule(net, 0.4, 0.1, steps=4, kind="linear")
    other.load_state_dict({"count": 2})
    assert float(net.temperatures[0]) == pytest.approx(0.25) and other.state_dict() == {"count": 2}
    assert TemperatureSchedule(net, 0.4, 0.1, 4, "cosine").temperature == pytest.approx(0.4)
    assert float(net.state_dict()["settings.gate.temperature"]) == pytest.approx(0.4)
    for module, values, says in ((nn.ReLU(), (1, 1, 1), "no gates"), (net, (0, 1, 1), "start must be positive")):
        with pytest.raises(ValueError, match=says):
            TemperatureSchedule(module, *values)
