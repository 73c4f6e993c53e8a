"""Where accuracy goes by name, what a budget leaves in floats, and what correcting biases gives back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.api import Compilation, rewrite
from fxfreeze.errors import ArtifactError, PlanError

SIZE, LAYERS = 6, ["0", "2", "4"]


@pytest.fixture
def net() -> nn.Module:
    """Three layers, of which the middle one bears rounding badly: few of its inputs are large, and they cancel."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZE, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        first, second = model[0], model[2]
        first.weight[1], first.bias[1] = first.weight[0] * 1.01, first.bias[0] * 1.01  # type: ignore[index, operator]
        first.weight[:2] *= 100  # type: ignore[operator]
        first.bias[:2] *= 100  # type: ignore[operator]
        second.weight[:, 1] = -second.weight[:, 0]  # type: ignore[index, operator]
    return model


def batches(count: int = 2) -> list[Tensor]:
    return [torch.randn(64, SIZE, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def done(model: nn.Module, step: Any, **given: Any) -> Compilation:
    return rewrite(model, _plan(step), calibration=batches(), **given)


def _plan(step: Any, *targets: str) -> fz.Plan:
    return fz.Plan([fz.Input("x", ("batch", SIZE))], [step], targets)


def snr(found: Compilation, model: nn.Module) -> float:
    (x, *_), want = batches(), model(batches()[0])
    return float(20 * (want.norm() / (found.program.run(x)[0] - want).norm()).log10().detach())


def _stored(found: Compilation) -> list[tuple[str, Tensor]]:
    return [(name, found.program.state.tensor(name)) for name in found.program.state]


def floats(found: Compilation) -> set[str]:
    return {row.site for row in found.ledger if row.detail.startswith("kept in floats for the budget")}


def agreement(model: nn.Module) -> Callable[[Callable[..., Tensor]], float]:
    """The share of predictions that are the model's."""
    x = torch.cat(batches(16))
    want = model(x).argmax(1)
    return lambda call: float((call(x).argmax(1) == want).double().mean())


# ---- sensitivity


def test_the_layer_that_bears_it_worst_comes_first(net: nn.Module) -> None:
    rows = fz.sensitivity(net, _plan(fz.Quantize()), calibration=batches())
    assert rows[0].site == "2" and {row.site for row in rows} == set(LAYERS)
    assert rows[0].output_snr < min(row.output_snr for row in rows[1:]) - 10  # type: ignore[operator, type-var]
    assert {row.scheme for row in rows} == {"int8"} and {row.drop for row in rows} == {None}
    assert sum(row.gain for row in rows) == pytest.approx(1)


@pytest.mark.parametrize("site", LAYERS)
def test_alone_means_alone(net: nn.Module, site: str) -> None:
    """What the row says of a layer is what a plan that quantizes nothing else gives."""
    row = next(row for row in fz.sensitivity(net, _plan(fz.Quantize()), calibration=batches()) if row.site == site)
    assert row.output_snr == pytest.approx(snr(done(net, fz.Quantize(at=site)), net), abs=0.01)


def test_the_result_of_a_convolution_is_rounded_with_it() -> None:
    """Integer kernels of convolutions give integers, and so does what a sum with them reads."""
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x).relu()
            return (self.two(x) + x).relu().mean((2, 3))

    model, plan = Block().eval(), fz.Plan([fz.Input("x", ("batch", 3, 6, 6))], [fz.Quantize()], ())
    data = [torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(1))]
    want = model(data[0]).detach()
    for row in fz.sensitivity(model, plan, calibration=data):
        alone = rewrite(model, plan.model_copy(update={"steps": (fz.Quantize(row.site),)}), calibration=data)
        gap = (alone.program.run(data[0])[0] - want).norm()
        assert row.output_snr == pytest.approx(float(20 * (want.norm() / gap).log10()), abs=0.01)


def test_a_score_is_measured_per_layer(net: nn.Module) -> None:
    score = agreement(net)
    rows = fz.sensitivity(net, _plan(fz.Quantize()), calibration=batches(), evaluate=score)
    for row in rows:
        alone = done(net, fz.Quantize(at=row.site)).program
        assert row.drop == pytest.approx(1 - score(lambda x: alone.run(x)[0]))  # noqa: B023
    assert rows[0].drop == max(row.drop for row in rows) > 0  # type: ignore[type-var, operator]


def test_a_plan_that_quantizes_nothing_has_no_sensitivities(net: nn.Module) -> None:
    with pytest.raises(PlanError, match="the plan quantizes nothing"):
        fz.sensitivity(net, _plan(fz.Prune(method="magnitude", density=0.5)))


# ---- budgets


def test_a_budget_in_decibels_leaves_the_worst_layer_in_floats(net: nn.Module) -> None:
    whole = snr(done(net, fz.Quantize()), net)
    found = done(net, fz.Quantize(budget="snr:25"))
    assert floats(found) == {"2"} and whole < 25 <= snr(found, net)


def test_a_budget_that_is_kept_anyway_changes_nothing(net: nn.Module) -> None:
    found = done(net, fz.Quantize(budget="snr:1"))
    assert not floats(found)
    assert found.program.structural_hash() == done(net, fz.Quantize()).program.structural_hash()


def test_a_budget_that_nothing_keeps_leaves_everything_in_floats(net: nn.Module) -> None:
    found = done(net, fz.Quantize(budget="snr:300"))
    assert floats(found) == set(LAYERS) and torch.equal(found.program.run(batches()[0])[0], net(batches()[0]))


def test_a_budget_of_the_score(net: nn.Module) -> None:
    score = agreement(net)
    found = done(net, fz.Quantize(budget="drop:0.01"), evaluate=score)
    assert floats(found) == {"2"}
    every = done(net, fz.Quantize()).program
    assert score(lambda x: found.program.run(x)[0]) >= 0.99 > score(lambda x: every.run(x)[0])


def test_budgets_of_several_steps_are_of_the_whole_model(net: nn.Module) -> None:
    """Each layer alone would keep it, and both together do not."""
    rows = {row.site: row.output_snr for row in fz.sensitivity(net, _plan(fz.Quantize()), calibration=batches())}
    limit = min(rows["0"], rows["4"]) - 0.1  # type: ignore[operator, type-var]
    for modes in (("static", "static"), ("static", "dynamic")):
        steps = [fz.Quantize(at, mode=mode, budget=f"snr:{limit:.2f}") for at, mode in zip("04", modes, strict=True)]
        found = rewrite(net, fz.Plan([fz.Input("x", ("batch", SIZE))], steps, ()), calibration=batches())
        assert snr(found, net) >= limit and floats(found), modes


@pytest.mark.parametrize("other", [{"mode": "dynamic"}, {"scheme": "int8-weight"}], ids=str)
@pytest.mark.parametrize("order", [1, -1])
def test_a_budget_counts_what_has_none(net: nn.Module, other: dict[str, Any], order: int) -> None:
    """The layer alone keeps it, and so does what is quantized without one; both together do not."""

    def compiled(budget: str | None) -> Compilation:
        steps = [fz.Quantize("0", budget=budget), fz.Quantize("4", **other)][::order]
        return rewrite(net, fz.Plan([fz.Input("x", ("batch", SIZE))], steps, ()), calibration=batches())

    alone = min(snr(done(net, fz.Quantize("0")), net), snr(done(net, fz.Quantize("4", **other)), net))
    both = snr(compiled(None), net)
    limit = (alone + both) / 2
    found = compiled(f"snr:{limit:.2f}")
    assert both < limit - 0.1 and floats(found) == {"0"} and snr(found, net) >= limit
    assert not floats(compiled(f"snr:{both - 0.1:.2f}"))


def test_the_score_is_not_asked_for_decibels(net: nn.Module) -> None:
    asked = []

    def evaluate(call: Any) -> float:
        asked.append(call)
        return 1.0

    done(net, fz.Quantize(budget="snr:25"), evaluate=evaluate)
    assert not asked
    with pytest.raises(PlanError, match="the score is NaN"):
        done(net, fz.Quantize(budget="drop:0.1"), evaluate=lambda call: float("nan"))


def test_a_weight_that_two_layers_read_stays_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inner, self.head = nn.Embedding(40, 32), nn.Linear(32, 32), nn.Linear(32, 40, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.inner(self.table(ids)).relu())

    torch.manual_seed(0)
    model, kinds = Tied().eval(), set()
    ids = fz.Input("ids", ("batch", 5), dtype="int64", low=0, high=39)
    data = [torch.randint(0, 40, (16, 5), generator=torch.Generator().manual_seed(1))]
    for budget in range(10, 40, 2):
        step = fz.Quantize(scheme="int4-weight", granularity="group:8", budget=f"snr:{budget}")
        found = rewrite(model, fz.Plan([ids], [step], ()), calibration=data)
        bits = {row.site: row.executes[:4] for row in found.ledger if row.outcome == "rewritten" and row.executes}
        assert bits.get("table") == bits.get("head")
        kinds.add(bits.get("table"))
    assert {"int4", "int8"} <= kinds


def test_a_budget_of_a_score_needs_one(net: nn.Module) -> None:
    with pytest.raises(PlanError, match=r"the budget 'drop:0\.01' is of a score, and there is none"):
        done(net, fz.Quantize(budget="drop:0.01"))


@pytest.mark.parametrize("budget", ["20", "snr:", "snr:-3", "drop:1e-3", "loss:2", 20])
def test_other_budgets_are_refused(budget: Any) -> None:
    with pytest.raises(PlanError, match="must be 'snr:20'"):
        fz.Quantize(budget=budget)


def test_a_budget_gives_weights_of_4_bits_8_where_it_must() -> None:
    """Of three equal layers one has a weight that stands out in every group, which 4 bits bear worst."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3))).eval()
    with torch.no_grad():
        model[1].weight[:, ::8] *= 20  # type: ignore[index, operator]
    data = [torch.randn(64, 32, generator=torch.Generator().manual_seed(1))]

    def bits(budget: str | None) -> dict[str, str]:
        step = fz.Quantize(scheme="int4-weight", granularity="group:8", budget=budget, compensate=True)
        found = rewrite(model, fz.Plan([fz.Input("x", ("batch", 32))], [step], ()), calibration=data)
        largest = {
            name.split(".")[0]: int(value.abs().max()) for name, value in _stored(found) if name.endswith(".int")
        }
        rows = [row for row in found.ledger if row.outcome == "rewritten"]
        if budget:
            want, got = model(data[0]), found.program.run(data[0])[0]
            assert 20 * float((want.norm() / (got - want).norm()).log10().detach()) >= float(budget[4:])
            assert {row.scheme for row in found.sensitivity} == {"int4-weight", "int8-weight"}
        told = {row.site: row.executes[:4] for row in rows}
        assert largest == {site: 127 if word == "int8" else 7 for site, word in told.items()}
        return told

    assert bits(None) == dict.fromkeys("012", "int4")
    assert bits("snr:23") == {"0": "int4", "1": "int8", "2": "int4"}
    assert bits("snr:38") == dict.fromkeys("012", "int8")
    assert len(bits("snr:60")) < 3


def test_dynamic_layers_have_sensitivities_and_budgets(net: nn.Module) -> None:
    rows = fz.sensitivity(net, _plan(fz.Quantize(mode="dynamic")), calibration=batches())
    assert rows[0].site == "2" and len(rows) == 3
    alone = snr(done(net, fz.Quantize("2", mode="dynamic")), net)
    assert rows[0].output_snr == pytest.approx(alone, abs=0.01)
    assert floats(done(net, fz.Quantize(mode="dynamic", budget="snr:25"))) == {"2"}


def test_an_artifact_remembers(net: nn.Module) -> None:
    artifact = fz.compile(net, _plan(fz.Quantize(budget="snr:25")), calibration=batches())
    rows = artifact.sensitivity()
    assert rows[0].site == "2" and [row.chosen for row in rows] == ["float", "int8", "int8"]
    assert "outputs dB" in artifact.report
    plain = fz.compile(net, _plan(fz.Quantize()), calibration=batches())
    with pytest.raises(ArtifactError, match="no sensitivities are recorded"):
        plain.sensitivity()
    measured = fz.sensitivity(net, _plan(fz.Quantize()), calibration=batches())
    assert [row.output_snr for row in measured] == [row.output_snr for row in rows]


# ---- biases


def test_what_a_layer_gives_has_its_mean_on_the_calibration_data(net: nn.Module) -> None:
    """One layer, so that no rounding of another comes between."""
    layer = nn.Sequential(nn.Linear(SIZE, 4)).eval()
    data = [batch.abs() for batch in batches()]
    x = torch.cat(data)

    def mean_gap(**step: Any) -> Tensor:
        found = rewrite(layer, _plan(fz.Quantize(granularity="tensor", **step)), calibration=data)
        return (found.program.run(x)[0] - layer(x)).mean(0)

    plain, corrected = mean_gap(correct_bias=False).detach(), mean_gap().detach()
    step = float(x.max() / 255 * layer[0].weight.detach().abs().max() / 127)  # type: ignore[operator]
    assert float(corrected.abs().max()) < step < float(plain.abs().max()) / 3


def test_a_value_of_one_dim() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(SIZE, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.mean(0))

    found, model = done(Mean().eval(), fz.Quantize()), Mean().eval()
    assert found.program.run(batches()[0])[0].shape == model(batches()[0]).shape


def test_a_layer_without_a_bias_stays_without() -> None:
    layer = nn.Sequential(nn.Linear(SIZE, 4, bias=False)).eval()
    one, other = (done(layer, fz.Quantize(correct_bias=wanted)).program for wanted in (True, False))
    assert torch.equal(*(item.run(batches()[0])[0] for item in (one, other)))


@pytest.mark.parametrize(("field", "other"), [("correct_bias", False), ("equalize", True)])
def test_what_means_nothing_without_integers_everywhere_is_refused(field: str, other: bool) -> None:
    with pytest.raises(PlanError, match="has a meaning for scheme='int8'"):
        fz.Quantize(scheme="int8-weight", **{field: other})
