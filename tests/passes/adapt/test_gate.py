"""fz.Gate: where gates go, how they start, what they refuse, modes, training, and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
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
        # 2 % of the least value, −0.18, at most; what is well above it passes whole.
        assert 0 < float((net(x) - model(x)).detach().abs().max()) < 0.02 * 0.18 + 0.2 * temperature
    written = WrittenOut()(torch.linspace(-20, 20, 40001, dtype=torch.float64))
    starts = {name: float(value[0]) for name, value in net.adapter_state().items() if name.endswith("threshold")}
    assert list(starts.values()) == pytest.approx([-0.004, -0.004 + float(written.min())], abs=1e-5)
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
    with pytest.raises(PlanError, match=r"step 'gate' was trained as .*kind gate, .*s h, but the plan says"):
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
    net = adapted(fz.Gate(at="1", modes=3), fz.Gate(at="3", modes=3), fz.Gate(at="1", modes=4, select="task"))
    assert [(spec.name, spec.high) for spec in net.program().inputs] == [("x", None), ("mode", 2), ("task", 3)]
    with pytest.raises(PlanError, match=r"steps\[1\].modes: 'b' has 2 modes by 'mode', but 'a' \(steps\[0\]\) has 3"):
        fz.Plan(INPUT, [fz.Gate(at="1", modes=3, name="a"), fz.Gate(at="3", modes=2, name="b")])


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


class Joined(nn.Module):
    """Two convolutions whose results meet in the way that `how` says, before an activation."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.second = how, nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm, self.fc, self.act = nn.BatchNorm2d(8), nn.Linear(6, 6), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = self.second(a)
        joined = torch.cat([a, b], 1)
        squeezed = torch.sigmoid(b.mean((2, 3), keepdim=True))
        values = {"add": a + b, "input": x[:, :1] + a, "cat": joined, "norm": self.norm(joined), "scaled": a * squeezed,
                  "gated": a.chunk(2, 1)[0] * torch.sigmoid(b.chunk(2, 1)[1]), "mixed": a + self.fc(a),
                  "moved": a.permute(0, 2, 3, 1) + b.permute(0, 2, 3, 1),
                  "upsampled": functional.interpolate(a, scale_factor=2)}  # fmt: skip
        return self.act(values[self.how])


IMAGE = [fz.Input("x", shape=("batch", 3, 6, 6))]


@pytest.mark.parametrize(
    ("how", "dim", "size"),
    [("add", -3, 4), ("input", -3, 4), ("cat", -3, 8), ("norm", -3, 8), ("scaled", -3, 4), ("gated", -3, 2),
     ("moved", -1, 4), ("upsampled", -3, 4)],
)  # fmt: skip
def test_channels_are_followed_through_every_operand(how: str, dim: int, size: int) -> None:
    net = adapted(fz.Gate(at="act"), model=Joined(how).eval(), inputs=IMAGE)
    assert [found[1:] for found in gates(net)] == [(dim, [size])]


def test_operands_that_disagree_ask_for_the_dim() -> None:
    with pytest.raises(PlanError, match=r"act makes .* whose neurons lie along dims -3, -1[^@]*dim="):
        adapted(fz.Gate(at="act"), model=Joined("mixed").eval(), inputs=IMAGE)
    net = adapted(fz.Gate(at="act", dim=-3), model=Joined("mixed").eval(), inputs=IMAGE)
    assert [found[1:] for found in gates(net)] == [(-3, [4])]


class Shared(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.blk = block

    def forward(self, x: Tensor) -> Tensor:
        return self.blk(self.blk(x))


@pytest.mark.parametrize("on", ["output", "activation"])
def test_every_call_of_a_shared_module_is_gated(on: Any) -> None:
    block = nn.Sequential(nn.Linear(8, 8), nn.Tanh()) if on == "output" else WrittenOut()
    model, x = Shared(block), torch.randn(6, 8)
    net = adapted(fz.Gate(at="blk", on=on, threshold=-100.0), model=model)
    gain = {name: value for name, value in net.named_parameters() if name.endswith("gain")}
    assert list(gain) == ["adapters.gate.blk.0.gain", "adapters.gate.blk.1.gain"]
    with torch.no_grad():
        for factor, value in zip((0.5, 3.0), gain.values(), strict=True):
            value.fill_(factor)
        torch.testing.assert_close(net(x), 3 * block(0.5 * block(x)))


class Both(nn.Module):
    """Returns a value, and what it makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Tanh(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.a(x)
        return h, self.b(h)


@pytest.mark.parametrize("turned", [False, True])
def test_a_returned_value_is_not_gated_inside_of_its_module(turned: bool) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = Both()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h, g = self.both(x)
            return h + 0, g * 2

    model, x = Outer(), torch.randn(5, 8)
    steps = [fz.Gate(at="both", on="output", threshold=-100.0, name="out"),
             fz.Gate(at="both.a", threshold=-100.0, name="inner")]  # fmt: skip
    for with_inner in (False, True):
        taken = steps[::-1] if turned else steps
        net = adapted(*(step for step in taken if with_inner or step.name == "out"), model=model)
        with torch.no_grad():
            for name, value in net.named_parameters():
                if name.endswith("gain"):
                    value.fill_(5.0 if ".inner." in name else {"0": 2.0, "1": 3.0}[name.split(".")[-2]])
            h = torch.tanh(x) * (5 if with_inner else 1)
            found = net(x)
            torch.testing.assert_close(found[0], 2 * h)
            torch.testing.assert_close(found[1], 6 * model.both.b(h))


@pytest.mark.parametrize(
    ("act", "least"),
    [(nn.Hardtanh(-2.0, 2.0), -2.0), (nn.ELU(2.0), -2.0), (nn.CELU(3.0), -3.0), (nn.SELU(), -1.7581),
     (nn.Threshold(0.2, -0.5), -0.5), (nn.SiLU(), -0.2785), (nn.Hardswish(), -0.375), (nn.Softplus(), 0.0),
     (nn.LeakyReLU(), None), (nn.LogSigmoid(), None), (nn.Tanhshrink(), None), (nn.Softshrink(), None),
     (nn.PReLU(), None)],
)  # fmt: skip
def test_a_gate_starts_below_the_least_value_of_its_activation(act: nn.Module, least: float | None) -> None:
    model = nn.Sequential(nn.Linear(8, 8), act)
    net = adapted(fz.Gate(at="1"), model=model)
    start = float(next(value[0] for name, value in net.named_parameters() if name.endswith("threshold")))
    assert start == pytest.approx((least or 0.0) - 0.4, abs=1e-4)
    words = "all but open" if least is not None else "open above 0 only"
    assert words in net.ledger.rows[0].detail
    sizes = adapted(fz.Gate(at="1", s="abs"), model=model)
    assert "all but open" in sizes.ledger.rows[0].detail


def test_a_layers_result_starts_open_above_zero() -> None:
    rows = [adapted(step).ledger.rows[0].detail for step in (
        fz.Gate(at="0", on="output"), fz.Gate(at="1", on="output"), fz.Gate(at="1", threshold=0.3))]  # fmt: skip
    assert [row.split("untrained: ")[1][:17] for row in rows] == ["open above 0 only", "all but open", "open above 0.3"]


class Clashing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.outer = Numbered()

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(x)


class Numbered(nn.Sequential):
    """Its own two activations would be called as its children are."""

    def __init__(self) -> None:
        super().__init__(nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(torch.tanh(x)))


def test_numbers_of_values_keep_clear_of_other_paths() -> None:
    net = adapted(fz.Gate(at=["outer", "outer.0"]), model=Clashing().eval())
    names = [name for name, _ in net.named_parameters() if name.endswith("gain")]
    assert sorted(names) == [f"adapters.gate.outer.{number}.gain" for number in (0, 1, 2)]


def test_a_schedule_finds_the_temperatures_after_a_move_and_no_others() -> None:
    class Heated(nn.Module):
        temperatures = (torch.tensor([20, 30]),)

    net = nn.Sequential(fz.nn.Gate(4), Heated())
    schedule = TemperatureSchedule(net, 0.4, 0.1, steps=2)
    net.double()
    schedule.step()
    assert float(net[0].temperature) == pytest.approx(0.2) and Heated.temperatures[0].tolist() == [20, 30]
    within = adapted(fz.Gate(at="1"))
    schedule = TemperatureSchedule(within, 0.4, 0.1, steps=2)
    within.double()
    schedule.step()
    assert float(within.temperatures[0]) == pytest.approx(0.2)


def test_files_keep_temperatures(tmp_path: Path) -> None:
    model, file, x = network(), str(tmp_path / "gates.safetensors"), torch.randn(16, 8)
    net = adapted(fz.Gate(at=["1", "3"], harden=False), fz.LoRA(at="0", rank=1), model=model)
    net.temperatures[0].fill_(0.7)
    net.save_adapters(file)
    loaded = adapted(fz.Gate(at=["1", "3"], harden=False), fz.LoRA(at="0", rank=1), model=model)
    loaded.load_adapters(file)
    named = adapted(fz.LoRA(at="0", rank=1, weights=file), fz.Gate(at=["1", "3"], harden=False, weights=file),
                    model=model)  # fmt: skip
    for other in (loaded, named):
        assert float(other.temperatures[0]) == pytest.approx(0.7) and torch.equal(other(x), net(x))
    state = net.adapter_state()
    safetensors.torch.save_file(state, file)
    loaded.temperatures[0].fill_(0.3)
    loaded.load_adapters(file)
    assert float(loaded.temperatures[0]) == pytest.approx(0.3)
    key = "settings.gate.temperature"
    for wrong, says in ((torch.tensor(0.0), "must be > 0"), (torch.ones(2), "has shape")):
        safetensors.torch.save_file(state | {key: wrong}, file)
        with pytest.raises(PlanError, match=f"{key} {says}"):
            loaded.load_adapters(file)
        with pytest.raises(PlanError, match=f"{key} {says}"):
            adapted(fz.Gate(at=["1", "3"], weights=file), fz.LoRA(at="0", rank=1), model=model)


def test_a_file_says_its_dim_and_a_missing_key_is_named_as_a_gates(tmp_path: Path) -> None:
    file = str(tmp_path / "gates.safetensors")
    inputs = [fz.Input("x", shape=("batch", 8, 8))]
    net = adapted(fz.Gate(at="1", dim=-1), model=nn.Sequential(nn.Identity(), nn.ReLU()), inputs=inputs)
    net.save_adapters(file)
    with pytest.raises(PlanError, match=r"was trained as .*dim -1, .* but the plan says .*dim -2"):
        adapted(fz.Gate(at="1", dim=-2, weights=file), model=nn.Sequential(nn.Identity(), nn.ReLU()), inputs=inputs)
    with pytest.raises(PlanError, match=r"missing: 1.gain") as caught:
        safetensors.torch.save_file({"adapters.gate.1.threshold": torch.zeros(16)}, file)
        adapted(fz.Gate(at="1", weights=file))
    assert "adapters.gate.<module path>.gain" in str(caught.value) and "lora_A" not in str(caught.value)


def test_an_activation_of_the_models_own_forward_says_what_to_do() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return functional.relu(self.fc(x))

    for at in ("*", "relu"):
        with pytest.raises(PlanError, match=r"the model's own forward runs aten.relu.default.* make it a module"):
            adapted(fz.Gate(at=at), model=Own())
