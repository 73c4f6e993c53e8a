"""fz.LoRA(adapters=K): every row of a batch with an adapter of its own, or with none."""

from __future__ import annotations

import copy
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


def test_a_layer_reads_what_the_adapters_of_the_layer_before_it_make() -> None:
    def chain() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 7), nn.Linear(7, 4)).eval()

    net, (x, ids) = adapted(selected(at="*"), model=chain()), draw()
    torch.testing.assert_close(net(x, ids).double(), by_weights(net, x.double(), ids, chain), rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("form", ["gather", "mask"])
def test_neither_form_holds_the_number_of_adapters(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    seconds = {"gather": 1.0, "mask": 2.0 if form == "gather" else 0.5}
    monkeypatch.setattr("fxfreeze.passes.PIPELINE", tuple(
        fuse.SelectForm(lambda layer: {(1, 1): seconds}) if item.name == "select-form" else item
        for item in _pipeline()))  # fmt: skip
    layer = torch.nn.Sequential(torch.nn.Linear(8, 12)).requires_grad_(False)
    plan = fz.Plan([fz.Input("x", ("n", 3, 8))], [fz.LoRA("0", rank=2, adapters=3)], ["onnx"])
    artifact = fz.compile(layer, plan)
    a, b, x = torch.randn(2, 8), torch.randn(12, 2), torch.randn(2, 3, 8)
    added = artifact.add_adapter("more", {"0.lora_A": a, "0.lora_B": b})
    wanted = torch.stack([layer(x[0]), layer(x[1]) + x[1] @ a.T @ b.T])
    torch.testing.assert_close(artifact(x, adapter=torch.tensor([0, added])), wanted, rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("layers", ["net", "every"])
@pytest.mark.parametrize("mutant", [Unscaled, Shifted, NoneIsOne])
def test_the_proof_rejects_wrong_banks(
    layers: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, mutant: type[FoldSelected]
) -> None:
    module: fz.AdaptedModule = request.getfixturevalue(layers)
    swapped = tuple(mutant() if isinstance(item, FoldSelected) else item for item in _pipeline())
    monkeypatch.setattr("fxfreeze.passes.PIPELINE", swapped)
    with pytest.raises(ProofError, match="fold-selected"):
        rewrite(module, module.plan)


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


# ---- embeddings and convolutions


class Mixed(nn.Module):
    """Token ids through layers of every kind that is not linear, with every argument that a convolution has."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.line = nn.Conv1d(6, 8, 3, padding="same", dilation=2)
        self.image = nn.Conv2d(1, 6, 3, stride=(2, 1), padding=(1, 0))
        self.each = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.groups = nn.Conv2d(12, 4, (1, 3), groups=2, padding=1, padding_mode="reflect", bias=False)
        self.point = nn.Conv2d(4, 5, 1, stride=2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.line(self.words(ids).transpose(1, 2))
        return self.point(torch.tanh(self.groups(self.each(torch.relu(self.image(x[:, None]))))))


WORDS = [fz.Input("ids", shape=("batch", 12), dtype="int64", low=0, high=10)]
EVERY = fz.LoRA(at="*", rank=2, alpha=3, adapters=ADAPTERS)


def mixed() -> Mixed:
    torch.manual_seed(0)
    return Mixed().eval()


def merged(state: dict[str, Tensor], id: int, model: nn.Module) -> nn.Module:
    """`model` in float64, with the adapter `id` of `state` in its weights."""
    model = model.double()
    for name, layer in model.named_modules() if id else ():
        if f"adapters.lora.{name}.lora_A" not in state:
            continue
        a, b = (state[f"adapters.lora.{name}.lora_{leaf}"][id - 1].double().flatten(1) for leaf in "AB")
        delta = 1.5 * b @ a
        layer.weight.data += delta.T if isinstance(layer, nn.Embedding) else delta.reshape(layer.weight.shape)
    return model


@torch.no_grad()
def by_weights(net: fz.AdaptedModule, x: Tensor, ids: Tensor, model: Any = mixed) -> Tensor:
    return torch.cat([merged(net.adapter_state(), id, model())(row[None]) for row, id in zip(x, ids.tolist())])


def sentences(rows: int = 5, time: int = 12) -> tuple[Tensor, Tensor]:
    ids = torch.randint(11, (rows, time), generator=torch.Generator().manual_seed(3))
    return ids, torch.tensor([0, 2, 1, 3, 2])[:rows]


@pytest.fixture(scope="module")
def every() -> fz.AdaptedModule:
    return adapted(EVERY, model=mixed(), inputs=WORDS)


def test_embeddings_and_convolutions_start_as_the_model() -> None:
    model, (x, ids) = mixed(), sentences()
    net = fz.adapt(model, fz.Plan(WORDS, [EVERY]))
    assert torch.equal(net(x, ids), model(x))
    shapes = {name.removeprefix("adapters.lora."): tuple(value.shape) for name, value in net.adapter_state().items()}
    assert shapes["words.lora_A"] == (3, 2, 11) and shapes["words.lora_B"] == (3, 6, 2)
    assert shapes["groups.lora_A"] == (3, 2, 6, 1, 3) and shapes["groups.lora_B"] == (3, 4, 2, 1, 1)
    rows = {row.site: row for row in net.ledger}
    assert rows["words"].executes == "fxfreeze.select_lora.default beside aten.embedding.default"
    assert rows["line"].executes == "fxfreeze.select_conv.default beside aten.conv1d.padding"
    assert {row.outcome for row in rows.values()} == {"rewritten"} and len(rows) == 6


def test_every_row_of_any_layer_has_its_own(every: fz.AdaptedModule) -> None:
    (x, ids), model = sentences(), mixed().double()
    want = by_weights(every, x, ids)
    torch.testing.assert_close(every(x, ids).double(), want, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert (want[1:] - model(x[1:])).flatten(1).norm(dim=1).min() > 0.1
        torch.testing.assert_close(want[0], model(x[:1])[0])


@pytest.mark.parametrize("site", ["words", "line", "image", "each", "groups", "point"])
def test_every_kind_of_layer_by_itself(site: str) -> None:
    net, (x, ids) = adapted(fz.LoRA(at=site, rank=2, alpha=3, adapters=3), model=mixed(), inputs=WORDS), sentences()
    want = by_weights(net, x, ids)
    with torch.no_grad():
        assert (want[1:] - mixed().double()(x[1:])).flatten(1).norm(dim=1).min() > 1e-2
    torch.testing.assert_close(net(x, ids).double(), want, rtol=1e-5, atol=1e-5)


def test_compiled_every_row_of_any_layer_has_its_own(every: fz.AdaptedModule) -> None:
    done, (x, ids) = rewrite(every, every.plan), sentences()
    torch.testing.assert_close(done.program.run(x, ids)[0].double(), by_weights(every, x, ids), rtol=1e-5, atol=1e-5)
    assert done.lossless and not [node for node in done.program.graph.nodes if "select_" in str(node.target)]
    state = {name.removeprefix("adapters.lora."): tuple(value.shape) for name, value in done.program.state.items()}
    assert state["each.lora_A"] == (4, 2, 1, 3, 3) and state["each.lora_B"] == (4, 2, 12)
    assert state["words.lora_A"] == (4, 2, 11) and state["words.lora_B"] == (4, 2, 6)
    rows = {row.site: row for row in done.ledger if row.pass_name == "fold-selected"}
    assert len(rows) == 6 and rows["each"].executes == "fxfreeze.select_conv.default"
    assert not [row for row in done.ledger if row.pass_name == "select-form"]  # one form each: nothing is timed


def test_rows_and_images_of_any_size(every: fz.AdaptedModule) -> None:
    inputs = [fz.Input("ids", shape=("batch", "time"), dtype="int64", low=0, high=10)]
    plan = fz.Plan(inputs, [EVERY], dims={"time": fz.Dim(min=12, max=40)})
    net = fz.adapt(mixed(), plan, verify="off")
    with torch.no_grad():
        for name, value in net.named_parameters():
            value.copy_(every.get_parameter(name))
    done = rewrite(net, plan)
    for rows, time in ((5, 12), (2, 19), (1, 40)):
        x, ids = sentences(rows, time)
        want = by_weights(net, x, ids)
        torch.testing.assert_close(net(x, ids).double(), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(done.program.run(x, ids)[0].double(), want, rtol=1e-5, atol=1e-5)


def test_only_the_adapter_that_a_row_names_gets_a_gradient_of_any_layer(every: fz.AdaptedModule) -> None:
    x, _ = sentences(2)
    every(x, torch.tensor([0, 2])).square().sum().backward()
    for name, value in every.named_parameters():
        assert value.grad is not None and not value.grad[[0, 2]].any() and value.grad[1].any(), name
    words = every.get_parameter("adapters.lora.words.lora_A").grad
    assert words is not None and not words[1][:, [word for word in range(11) if word not in x[1]]].any()
    every.zero_grad(set_to_none=True)


def test_a_layer_of_half_precision_keeps_banks_of_it() -> None:
    model = nn.Sequential(nn.Embedding(11, 8), nn.Flatten(2), nn.Conv1d(6, 4, 3)).eval().bfloat16()
    inputs = [fz.Input("ids", shape=("batch", 6), dtype="int64", low=0, high=10)]
    net = adapted(fz.LoRA(at=["0", "2"], rank=2, adapters=2), model=model, inputs=inputs)
    assert {value.dtype for value in net.parameters()} == {torch.float32}
    done = rewrite(net, net.plan)
    banks = {name: value.dtype for name, value in done.program.state.items() if "lora" in name}
    assert set(banks.values()) == {torch.bfloat16} and len(banks) == 4
    x, ids = torch.randint(11, (4, 6)), torch.tensor([0, 1, 2, 1])
    y = done.program.run(x, ids)[0]
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, net(x, ids), rtol=0.05, atol=0.1)


def test_an_embedding_of_one_word_per_row_and_of_words_in_int32() -> None:
    for shape, dtype in ((("batch",), "int64"), (("batch", 2, 3), "int32")):
        inputs = [fz.Input("ids", shape=shape, dtype=dtype, low=0, high=10)]
        model = nn.Sequential(nn.Embedding(11, 4)).eval()
        net = adapted(fz.LoRA(at="0", rank=2, adapters=2), model=model, inputs=inputs)
        x = torch.randint(11, (3, *shape[1:])).to(getattr(torch, dtype))
        a, b = (net.adapter_state()[f"adapters.lora.0.lora_{leaf}"] for leaf in "AB")
        want = model(x) + torch.stack([
            functional.embedding(row, a[id - 1].T) @ b[id - 1].T * (id > 0) for row, id in zip(x, (2, 0, 1))
        ])  # fmt: skip
        torch.testing.assert_close(net(x, torch.tensor([2, 0, 1])), want)
        torch.testing.assert_close(rewrite(net, net.plan).program.run(x, torch.tensor([2, 0, 1]))[0], want)


def test_layers_without_rows_are_refused_with_the_reason() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places, self.fc = nn.Embedding(5, 8), nn.Embedding(6, 8), nn.Linear(8, 4)
            self.flat, self.up, self.one = nn.Linear(8, 4), nn.ConvTranspose1d(8, 8, 3), nn.Conv1d(8, 8, 1)

        def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
            x = self.words(ids) + self.places(torch.arange(6)[None])
            alone = self.one(x.flatten(0, 1).T)
            return self.fc(x), self.flat(x.flatten(0, 1) * 2), self.up(x.transpose(1, 2)), alone

    inputs = [fz.Input("ids", shape=("batch", 6), dtype="int64", low=0, high=4)]
    net = fz.adapt(Other().eval(), fz.Plan(inputs, [fz.LoRA(at="*", rank=1, adapters=2)]))
    refused = {row.site: row.detail for row in net.ledger if row.outcome == "refused"}
    assert "places reads [1, 6], whose first dim is not the rows" in refused["places"]
    assert "up is a transposed convolution, whose windows overlap" in refused["up"]
    assert "one reads [8, " in refused["one"] and "it is one image, with its features first" in refused["one"]
    assert "whose first dim is not the rows" in refused["flat"]
    assert list(net.adapter_state()) == [
        f"adapters.lora.{site}.lora_{leaf}" for site in ("words", "fc") for leaf in "AB"
    ]  # fmt: skip
    with pytest.raises(PlanError, match="matches nothing that LoRA can adapt:\n  up is a transposed"):
        fz.adapt(Other().eval(), fz.Plan(inputs, [fz.LoRA(at="up", rank=1, adapters=2)]))


def test_files_of_embeddings_and_convolutions(every: fz.AdaptedModule, tmp_path: Path) -> None:
    """One each, of which the second has a smaller rank and a scale of its own."""
    paths = [str(tmp_path / f"{number}.safetensors") for number in (1, 2, 3)]
    for number, path in enumerate(paths, 1):
        safetensors.torch.save_file(lone(every, number), path)
    small = adapted(fz.LoRA(at="*", rank=1, alpha=7, name="own"), model=mixed(), inputs=WORDS)
    small.save_adapters(paths[1])
    plan = fz.Plan(WORDS, [fz.LoRA(at="*", rank=2, alpha=3, adapters=3, weights=paths)])
    many, (x, _) = fz.adapt(mixed(), plan, verify="off"), sentences()
    torch.testing.assert_close(many(x, torch.full((5,), 2)), small(x), rtol=1e-4, atol=1e-4)
    ids = torch.tensor([1, 3, 0, 3, 1])
    torch.testing.assert_close(many(x, ids).double(), by_weights(every, x, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv1d(4, 4, 3, dilation=2), "0 is dilated, and peft's update of it is not"),
        (
            nn.Conv1d(4, 4, 3, padding=1, padding_mode="reflect"),
            "0 pads by 'reflect' where peft's update pads",
        ),
        (nn.Conv1d(4, 4, 3, groups=2), "0 has 2 groups, and peft's update of it mixes them"),
        (nn.Conv1d(4, 4, 3, stride=2, padding=1), ""),
    ],
    ids=lambda value: "",
)
def test_what_peft_computes_as_no_single_layer_is_refused(layer: nn.Module, message: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = nn.Sequential(layer).eval()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["0"]))
    with torch.no_grad():
        for value in theirs.parameters():
            if value.requires_grad:
                value.copy_(torch.linspace(-1, 1, value.numel()).view(value.shape))
    theirs.save_pretrained(tmp_path / "one")
    inputs = [fz.Input("x", shape=("batch", 4, 9))]
    plan = fz.Plan(inputs, [fz.LoRA(at="0", rank=2, adapters=1, weights=[str(tmp_path / "one")])])
    if message:
        with pytest.raises(PlanError, match=message):
            fz.adapt(base, plan)
        return
    x = torch.linspace(-2, 2, 108).view(3, 4, 9)
    torch.testing.assert_close(fz.adapt(base, plan)(x, torch.ones(3).long()), theirs.eval()(x), rtol=1e-4, atol=1e-4)


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
            value.copy_(torch.linspace(-1, 1, value.numel()).view(value.shape))
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
