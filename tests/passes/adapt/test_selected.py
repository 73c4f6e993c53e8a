"""fz.LoRA(adapters=K): every row of a batch with an adapter of its own, or with none."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxfreeze as fz
from fxfreeze.api import Compilation, rewrite
from fxfreeze.errors import PlanError, ProofError
from fxfreeze.passes.fold.selected import FoldSelected
from fxfreeze.passes.fuse import selected as fuse
from fxfreeze.program import BANK

INPUT = [fz.Input("x", shape=("batch", "time", 8))]
ADAPTERS = 3


class Conv1D(nn.Module):
    """A layer as transformers' GPT-2 has it: a weight the other way round, applied to a matrix of all tokens."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inner, outer)), nn.Parameter(torch.randn(outer))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return y.view(*x.shape[:-1], -1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.mix, self.down = nn.Linear(8, 12), Conv1D(12, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.mix(functional.gelu(self.up(x)))) + self.up(2 * x).mean(1, keepdim=True)[..., :4]


def network() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def selected(**given: Any) -> fz.LoRA:
    return fz.LoRA(**{"at": ["up", "mix", "down"], "rank": 2, "alpha": 3, "adapters": ADAPTERS, **given})


def adapted(*steps: Any, model: nn.Module | None = None, inputs: Any = INPUT) -> fz.AdaptedModule:
    net = fz.adapt(model or network(), fz.Plan(inputs, steps), verify="off")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in net.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) / 2)
    return net


def lone(net: fz.AdaptedModule, number: int) -> dict[str, Tensor]:
    """The adapter `number` as a file of its own holds it."""
    return {
        name.removeprefix("adapters.lora."): value[number - 1].clone() for name, value in net.adapter_state().items()
    }


@functools.cache
def single() -> fz.AdaptedModule:
    """The model with one adapter and nothing to select."""
    return fz.adapt(network(), fz.Plan(INPUT, [selected(adapters=None)]), verify="off")


def alone(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """What the model with that one adapter makes of `x`."""
    with torch.no_grad():
        for name, value in single().named_parameters():
            value.copy_(state[name.removeprefix("adapters.lora.")])
        result: Tensor = single()(x)
    return result


def every_row(net: fz.AdaptedModule, x: Tensor, ids: Tensor) -> Tensor:
    """Each row by itself, through the bare model or the module with its own adapter."""
    model = network()
    rows = [model(row[None]) if id == 0 else alone(lone(net, id), row[None]) for row, id in zip(x, ids.tolist())]
    return torch.cat(rows)


def draw(rows: int = 5, time: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(rows, time, 8, generator=generator), torch.tensor([0, 2, 1, 3, 2])[:rows]


@pytest.fixture(scope="module")
def net() -> fz.AdaptedModule:
    return adapted(selected())


@pytest.fixture(scope="module")
def done(net: fz.AdaptedModule) -> Compilation:
    return rewrite(net, net.plan)


def test_a_fresh_one_is_the_model() -> None:
    model, (x, ids) = network(), draw()
    net = fz.adapt(model, fz.Plan(INPUT, [selected()]))
    assert torch.equal(net(x, ids), model(x))
    shapes = {name.rpartition("up.")[2]: tuple(value.shape) for name, value in net.named_parameters() if "up" in name}
    assert shapes == {"lora_A": (3, 2, 8), "lora_B": (3, 12, 2)}
    a = net.adapter_state()["adapters.lora.up.lora_A"]
    assert a[0].abs().sum() > 0 and not torch.equal(a[0], a[1])


def test_every_row_has_its_own(net: fz.AdaptedModule) -> None:
    x, ids = draw()
    want = every_row(net, x, ids)
    torch.testing.assert_close(net(x, ids), want)
    assert not torch.allclose(net(x, ids), net(x, ids.flip(0)), atol=0.1)


def test_compiled_every_row_has_its_own(net: fz.AdaptedModule, done: Compilation) -> None:
    x, ids = draw()
    torch.testing.assert_close(done.program.run(x, ids)[0], every_row(net, x, ids))
    assert done.lossless and not [node for node in done.program.graph.nodes if "select_lora" in str(node.target)]


def test_the_ledger_says_what_became_of_every_site(done: Compilation) -> None:
    rows = {(row.site, row.pass_name): row for row in done.ledger}
    for site in ("up", "mix", "down"):
        inserted, folded = rows[site, "insert-selected"], rows[site, "fold-selected"]
        assert inserted.requested == "LoRA rank 2, scale 1.5, 3 adapters by 'adapter'"
        assert folded.detail == "3 adapters of rank 2 in float32, chosen row by row"
        assert rows[site, "select-form"].executes.startswith("fxfreeze.select_lora.default, ")
    assert "in 2 calls" in rows["up", "insert-selected"].detail


def test_banks_begin_with_a_row_of_zeros_and_hold_the_scale(net: fz.AdaptedModule, done: Compilation) -> None:
    state, stored = net.adapter_state(), done.program.state
    banks = {
        str(node.target) for node in done.program.graph.nodes
        if node.op == "get_attr" and getattr(node.meta.get("fxfreeze"), "primitive", "") == BANK
    }  # fmt: skip
    assert banks == set(state)
    a, b = (stored[f"adapters.lora.up.{leaf}"] for leaf in ("lora_A", "lora_B"))
    assert a.shape == (4, 2, 8) and b.shape == (4, 2, 12) and not a[0].any() and not b[0].any()
    assert torch.equal(a[1:], state["adapters.lora.up.lora_A"])
    torch.testing.assert_close(b[1:], 1.5 * state["adapters.lora.up.lora_B"].transpose(1, 2))


def test_only_the_adapter_that_a_row_names_gets_a_gradient(net: fz.AdaptedModule) -> None:
    x, _ = draw(2)
    net(x, torch.tensor([0, 2])).sum().backward()
    gradients = {name: value.grad for name, value in net.named_parameters()}
    for gradient in gradients.values():
        assert gradient is not None and not gradient[[0, 2]].any() and gradient[1].any()
    net.zero_grad(set_to_none=True)


@pytest.mark.parametrize("form", ["gather", "mask"])
def test_both_forms_are_the_same_function(net: fz.AdaptedModule, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    seconds = {"gather": 1.0, "mask": 2.0 if form == "gather" else 0.5}
    monkeypatch.setattr(fuse, "measured", lambda layer: {(1, 1): seconds})
    monkeypatch.setattr("fxfreeze.passes.PIPELINE", tuple(
        fuse.SelectForm(fuse.measured) if item.name == "select-form" else item for item in _pipeline()))  # fmt: skip
    done, (x, ids) = rewrite(net, net.plan), draw()
    assert [row.executes.rpartition(" ")[2] for row in done.ledger if row.pass_name == "select-form"] == [form] * 3
    torch.testing.assert_close(done.program.run(x, ids)[0], every_row(net, x, ids))
    masks = [node for node in done.program.graph.nodes if "aten.where" in str(node.target)]
    assert bool(masks) == (form == "mask")


def _pipeline() -> Any:
    from fxfreeze.passes import PIPELINE

    return PIPELINE


def test_many_adapters_are_not_timed_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    net = adapted(fz.LoRA(at="up", rank=4, adapters=fuse.WIDEST // 4))
    (row,) = [row for row in rewrite(net, net.plan).ledger if row.pass_name == "select-form"]
    assert row.executes.endswith("gather") and "257 times rank 4 are too many" in row.detail


class Unscaled(FoldSelected):
    def bank(self, trained: Tensor, leaf: str, scale: float) -> Any:
        return super().bank(trained, leaf, 1.0)


class Shifted(FoldSelected):
    def bank(self, trained: Tensor, leaf: str, scale: float) -> Any:
        return super().bank(trained.roll(1, 0) if leaf == "lora_A" else trained, leaf, scale)


class NoneIsOne(FoldSelected):
    def bank(self, trained: Tensor, leaf: str, scale: float) -> Any:
        base = super().bank(trained, leaf, scale).value()
        from fxfreeze.constants import Recipe

        return Recipe(torch.cat([base[1:2], base[1:]]))


@pytest.mark.parametrize("mutant", [Unscaled, Shifted, NoneIsOne])
def test_the_proof_rejects_wrong_banks(
    net: fz.AdaptedModule, monkeypatch: pytest.MonkeyPatch, mutant: type[FoldSelected]
) -> None:
    swapped = tuple(mutant() if isinstance(item, FoldSelected) else item for item in _pipeline())
    monkeypatch.setattr("fxfreeze.passes.PIPELINE", swapped)
    with pytest.raises(ProofError, match="fold-selected"):
        rewrite(net, net.plan)


# ---- beside other steps


def test_beside_other_steps() -> None:
    """A plain LoRA, an IA3 before, other adapters by another input, and modes by the same one."""
    steps = [
        fz.IA3(at="up", name="gain"), selected(), fz.LoRA(at="up", rank=1, name="plain"),
        selected(at="up", adapters=2, select="style", name="styles"), fz.Gate(at="mix", on="output", modes=4,
                                                                             select="adapter", threshold=-0.2),
    ]  # fmt: skip
    plan = fz.Plan(INPUT, steps)
    assert [(item.name, item.high) for item in plan.selects] == [("adapter", 3), ("style", 2)]
    net, (x, ids) = adapted(*steps), draw()
    styles = torch.tensor([0, 1, 2, 0, 2])
    state = net.adapter_state()
    layer = network().up
    a, b = (state[f"adapters.{name}"] for name in ("lora.up.lora_A", "lora.up.lora_B"))
    up = layer(x) * state["adapters.gain.up.ia3"]
    up = up + x @ (state["adapters.plain.up.lora_B"] @ state["adapters.plain.up.lora_A"]).T
    up = torch.stack([u + (0 if i == 0 else 1.5 * r @ (b[i - 1] @ a[i - 1]).T) for u, r, i in zip(up, x, ids)])
    a, b = (state[f"adapters.styles.up.{leaf}"] for leaf in ("lora_A", "lora_B"))
    up = torch.stack([u + (0 if i == 0 else 1.5 * r @ (b[i - 1] @ a[i - 1]).T) for u, r, i in zip(up, x, styles)])
    seen = net.origins.program.clone()
    after = next(node for node in seen.graph.nodes if node.target is torch.ops.aten.gelu.default).args[0]
    seen.graph.output_node().args = ((after,),)
    for name, value in state.items():
        seen.state[name] = value
    torch.testing.assert_close(seen.run(x, ids, styles)[0], up)
    done = rewrite(net, plan)
    assert torch.isfinite(done.program.run(x, ids, styles)[0]).all()
    assert {row.site for row in done.ledger if row.pass_name == "fold-delta"} == {"up"}


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([selected(), fz.IA3(at="up")], "'ia3' would scale what the adapters of 'lora' add"),
        ([fz.DoRA(at="up", rank=1), selected()], "'dora' would scale what the adapters of 'lora' add"),
        ([selected(), fz.DoRA(at="down", rank=1)], "'dora' would scale"),
    ],
)
def test_what_would_scale_the_adapters_is_refused(steps: list[Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        fz.adapt(network(), fz.Plan(INPUT, steps))


def test_layers_that_are_not_linear_are_refused_with_the_reason() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.conv, self.fc = nn.Embedding(5, 8), nn.Conv1d(8, 8, 1), nn.Linear(8, 4)
            self.flat = nn.Linear(8, 4)

        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            x = self.conv(self.words(ids).transpose(1, 2)).transpose(1, 2)
            return self.fc(x), self.flat(x.flatten(0, 1) * 2)

    inputs = [fz.Input("ids", shape=("batch", 6), dtype="int64", low=0, high=4)]
    net = fz.adapt(Other().eval(), fz.Plan(inputs, [fz.LoRA(at="*", rank=1, adapters=2)]))
    refused = {row.site: row.detail for row in net.ledger if row.outcome == "refused"}
    assert "an embedding, and adapters are selected for linear layers only" in refused["words"]
    assert "a convolution" in refused["conv"]
    assert "whose first dim is not the rows" in refused["flat"]
    assert list(net.adapter_state()) == ["adapters.lora.fc.lora_A", "adapters.lora.fc.lora_B"]
    with pytest.raises(PlanError, match="matches nothing that LoRA can adapt:\n  words is an embedding"):
        fz.adapt(Other().eval(), fz.Plan(inputs, [fz.LoRA(at="words", rank=1, adapters=2)]))


def test_half_precision_is_computed_in_float32_until_it_is_compiled() -> None:
    model = nn.Sequential(nn.Linear(8, 8)).eval().bfloat16()
    inputs = [fz.Input("x", shape=("batch", 8), dtype="bfloat16")]
    net = adapted(fz.LoRA(at="0", rank=2, adapters=2), model=model, inputs=inputs)
    assert {value.dtype for value in net.parameters()} == {torch.float32}
    done = rewrite(net, net.plan)
    assert done.program.state["adapters.lora.0.lora_B"].dtype == torch.bfloat16
    x, ids = torch.randn(4, 8).bfloat16(), torch.tensor([0, 1, 2, 1])
    torch.testing.assert_close(done.program.run(x, ids)[0], net(x, ids), rtol=0.05, atol=0.05)


# ---- files


def test_one_file_with_all(net: fz.AdaptedModule, tmp_path: Path) -> None:
    net.save_adapters(tmp_path / "all.safetensors")
    again = fz.adapt(network(), fz.Plan(INPUT, [selected(weights=tmp_path / "all.safetensors")]), verify="off")
    assert all(torch.equal(value, net.adapter_state()[name]) for name, value in again.adapter_state().items())


def singles(net: fz.AdaptedModule, folder: Path) -> list[str]:
    paths = [str(folder / f"{k}.safetensors") for k in range(1, ADAPTERS + 1)]
    for k, path in enumerate(paths, 1):
        safetensors.torch.save_file(lone(net, k), path)
    return paths


def test_a_file_per_adapter_of_any_rank_and_scale(net: fz.AdaptedModule, tmp_path: Path) -> None:
    paths, (x, _) = singles(net, tmp_path), draw()
    small = fz.adapt(network(), fz.Plan(INPUT, [selected(adapters=None, rank=1, alpha=7, name="own")]), verify="off")
    with torch.no_grad():
        for value in small.parameters():
            value.normal_()
    small.save_adapters(paths[1])
    many = fz.adapt(network(), fz.Plan(INPUT, [selected(weights=paths)]), verify="off")
    torch.testing.assert_close(many(x, torch.full((5,), 2)), small(x))
    torch.testing.assert_close(many(x, torch.full((5,), 3)), alone(lone(net, 3), x))
    state = many.adapter_state()["adapters.lora.up.lora_A"]
    assert state[1, 0].any() and not state[1, 1].any()
    fz.Plan(INPUT, [selected(weights=paths)]).save(tmp_path / "plan.toml")
    assert '"1.safetensors",' in (tmp_path / "plan.toml").read_text()
    assert fz.Plan.load(tmp_path / "plan.toml").steps[0].weights == tuple(paths)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("up.lora_B"), r"missing up\.lora_B"),
        (lambda state: state.update({"other.lora_A": torch.zeros(2, 8)}), r"unexpected: other\.lora_A"),
        (lambda state: state.update({"up.lora_A": torch.zeros(3, 8)}), "has rank 3, but the adapters have rank 2"),
        (lambda state: state.update({"up.lora_A": torch.zeros(2, 9)}), r"shape \(2, 9\), but \(2, 8\) is needed"),
        (lambda state: state.update({"up.lora_B": torch.zeros(12, 1)}), r"shape \(12, 1\), but \(12, 2\) is needed"),
        (lambda state: state.update({"up.lora_B": torch.full((12, 2), torch.nan)}), "NaN or Inf"),
        (lambda state: state.update({"up.lora_B": torch.zeros(12, 2).int()}), "int32, but a floating"),
        (lambda state: state.update({"adapters.a.up.lora_B": torch.zeros(12, 2)}), "both .* may be"),
    ],
)
def test_files_that_do_not_fit(net: fz.AdaptedModule, tmp_path: Path, change: Any, message: str) -> None:
    paths = singles(net, tmp_path)
    state = lone(net, 1)
    change(state)
    safetensors.torch.save_file(state, paths[0])
    with pytest.raises(PlanError, match=message) as caught:
        fz.adapt(network(), fz.Plan(INPUT, [selected(weights=paths)]), verify="off")
    assert caught.value.where == paths[0]


def test_a_file_of_something_else_is_refused(net: fz.AdaptedModule, tmp_path: Path) -> None:
    paths = singles(net, tmp_path)
    fz.adapt(network(), fz.Plan(INPUT, [fz.DoRA(at="up", rank=2)])).save_adapters(paths[2])
    with pytest.raises(PlanError, match=r"holds more than a LoRA: dora \(dora\)"):
        fz.adapt(network(), fz.Plan(INPUT, [selected(weights=paths)]), verify="off")
