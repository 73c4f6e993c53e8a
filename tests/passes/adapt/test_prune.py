"""Masks in the graph: on the merged weight, under any training, through files, and zero in what is compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze import weights
from fxfreeze.api import rewrite
from fxfreeze.masks import read_mask, write_mask
from fxfreeze.passes import PIPELINE
from fxfreeze.passes.fold.delta import FoldDelta
from fxfreeze.pipeline import proof_draws, run_passes, stage_passes
from fxfreeze.program import Program
from fxfreeze.rewrite import Context, Ledger

IMAGE = [fz.Input("x", ("batch", 3, 9, 8))]


class Layers(nn.Module):
    """Every layout a weight is stored in, each layer reading the one before; `twice` runs twice in a row."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 6, 2, groups=2, bias=False)
        self.up = nn.ConvTranspose2d(6, 8, 2, groups=2)
        self.c1d = Conv1D(5, 8)
        self.twice = nn.Linear(5, 5)
        for value in [*self.parameters(), self.norm.running_mean]:
            nn.init.normal_(value, std=0.5)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.up(torch.tanh(self.grouped(torch.tanh(self.norm(self.conv(x)))))))
        return self.twice(torch.tanh(self.twice(torch.tanh(self.c1d(h.mean((2, 3)))))))


class Tokens(nn.Module):
    """A head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)))


def some(shape: torch.Size | tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6


@dataclass
class Compiled:
    program: Program
    ledger: Ledger


def compiled(net: fz.AdaptedModule) -> Compiled:
    """With all constants as they will be stored, but before what is zero is removed."""
    program, ctx = net.program(), Context(net.plan, Ledger(list(net.ledger)))
    passes = stage_passes(PIPELINE, ("freeze", "fold", "lower"))
    run_passes(program, passes, ctx, draws=proof_draws(program, "full"))
    return Compiled(program, ctx.ledger)


def disturb(net: nn.Module) -> None:
    """Parameters as far from the initial ones as training could take them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in net.parameters():
            value.add_(torch.randn(value.shape, generator=generator) * 0.5)


def by_hand(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """A copy with the masks multiplied into its parameters."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    return model


def held(net: fz.AdaptedModule) -> dict[str, Tensor]:
    """The masks that an adapted module holds, by path."""
    return {name.split(".", 2)[2].removesuffix("_mask"): value
            for name, value in net.named_buffers() if name.endswith("_mask")}  # fmt: skip


def lines(done: Compiled | fz.AdaptedModule, step: str, outcome: str) -> list[tuple[str, str, str]]:
    return [(row.site, row.pass_name, row.detail) for row in done.ledger if (row.step, row.outcome) == (step, outcome)]


def agree(one: Tensor, other: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


# ---- masks from files


@pytest.fixture
def ticket(tmp_path: Path) -> tuple[str, dict[str, Tensor]]:
    """Masks of every parameter but the biases, of the norm too."""
    names = [name for name, _ in Layers().named_parameters() if name == "norm.bias" or not name.endswith("bias")]
    masks = {name: some(Layers().get_parameter(name).shape, seed) for seed, name in enumerate(names)}
    write_mask(tmp_path / "ticket.safetensors", masks)
    return str(tmp_path / "ticket.safetensors"), masks


def test_a_file_of_masks_in_every_layout(ticket: tuple[str, dict[str, Tensor]]) -> None:
    file, masks = ticket
    model, x = Layers(), torch.randn(4, 3, 9, 8)
    before = copy.deepcopy(model.state_dict())
    plan = fz.Plan(IMAGE, [fz.Prune(mask=file)])
    net = fz.adapt(model, plan)
    assert not list(net.parameters()) and len(held(net)) == 7
    agree(net(x), by_hand(model, masks)(x))
    done = compiled(net)
    agree(done.program.run(x)[0], by_hand(model, masks)(x))
    assert not done.program.graph.find_nodes(op="call_function", target=torch.ops.aten.where.ScalarOther)
    for name in ("grouped.weight", "up.weight", "c1d.weight", "twice.weight"):
        assert torch.equal(done.program.state[name], by_hand(model, masks).get_parameter(name))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {site for site, *_ in lines(done, "prune", "rewritten")} == {name.rpartition(".")[0] for name in masks}


def test_names_outside_of_at_are_told_and_stay_dense(ticket: tuple[str, dict[str, Tensor]]) -> None:
    file, masks = ticket
    model, x = Layers(), torch.randn(4, 3, 9, 8)
    net = fz.adapt(model, fz.Plan(IMAGE, [fz.Prune(["conv", "norm", "c1d"], mask=file, exclude="c1d")]))
    agree(net(x), by_hand(model, {name: mask for name, mask in masks.items() if name.startswith(("conv", "norm"))})(x))
    told = {site: detail for site, _, detail in lines(net, "prune", "skipped")}
    assert told.keys() == {"grouped", "up", "c1d", "twice"} and "whose module the step does not name" in told["up"]


def test_layers_without_a_mask_are_told(tmp_path: Path) -> None:
    torch.save({"conv.weight": some((8, 3, 3, 3)).int()}, tmp_path / "mask.pth")
    model, x = Layers(), torch.randn(4, 3, 9, 8)
    net = fz.adapt(model, fz.Plan(IMAGE, [fz.Prune(mask=tmp_path / "mask.pth")]))
    agree(net(x), by_hand(model, {"conv.weight": some((8, 3, 3, 3))})(x))
    told = {site: detail for site, _, detail in lines(net, "prune", "skipped")}
    assert told.keys() == {"grouped", "up", "c1d", "twice"} and "stays dense" in told["up"]


def test_masks_that_do_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    write_mask(file, {"conv.wieght": some((8, 3, 3, 3)), "twice.weight": some((5, 4))})
    with pytest.raises(fz.PlanError, match=r"did you mean conv\.weight") as caught:
        fz.adapt(Layers(), fz.Plan(IMAGE, [fz.Prune(mask=file)]))
    assert "shape (5, 4), the parameter (5, 5)" in caught.value.what
    write_mask(file, {"conv.weight": some((8, 3, 3, 3))})
    with pytest.raises(fz.PlanError, match="has no mask for what 'up' matches"):
        fz.adapt(Layers(), fz.Plan(IMAGE, [fz.Prune("up", mask=file)]))
    with pytest.raises(fz.PlanError, match="no module matches 'upp'"):
        fz.adapt(Layers(), fz.Plan(IMAGE, [fz.Prune("upp", mask=file)]))


IDS = [fz.Input("ids", ("batch", 3), "int64", 0, 6)]


@pytest.mark.parametrize(("at", "embeds", "heads"), [("head", False, True), ("embed", True, False), ("*", True, True)])
def test_a_tied_weight_is_masked_where_the_step_says(tmp_path: Path, at: str, embeds: bool, heads: bool) -> None:
    mask, ids = some((7, 4)), torch.randint(0, 7, (5, 3))
    write_mask(tmp_path / "m.safetensors", {"embed.weight": mask})
    model = Tokens()
    plan = fz.Plan(IDS, [fz.Prune(at, mask=tmp_path / "m.safetensors")])
    expected = copy.deepcopy(model)
    expected.head.weight = nn.Parameter(model.embed.weight * mask if heads else model.embed.weight.detach())
    expected.embed.weight = nn.Parameter(model.embed.weight * mask if embeds else model.embed.weight.detach())
    net = fz.adapt(model, plan)
    agree(net(ids), expected(ids))
    done = compiled(net)
    agree(done.program.run(ids)[0], expected(ids))
    if not heads or not embeds:
        detail = next(detail for _, name, detail in lines(done, "prune", "rewritten") if name == "fold-masks")
        assert detail == f"a copy of head.weight, which {'embed' if heads else 'head'} reads unchanged"


# ---- masks of our own


def canonical(name: str, value: Tensor) -> Tensor:
    """[out, in, *window], by hand."""
    if name == "c1d.weight":
        return value.T
    if name == "up.weight":  # [in, out / groups, …] in two groups
        return torch.cat([part.transpose(0, 1) for part in value.chunk(2)])
    return value


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_magnitudes(scope: str) -> None:
    model = Layers()
    net = fz.adapt(model, fz.Plan(IMAGE, [fz.Prune(method="magnitude", density=0.3, scope=scope, exclude="twice")]))
    masks, names = held(net), ["conv.weight", "grouped.weight", "up.weight", "c1d.weight"]
    assert sorted(masks) == sorted(names)
    every = torch.cat([model.get_parameter(name).abs().flatten() for name in names]).sort(descending=True).values
    for name in names:
        size = model.get_parameter(name).detach().abs()
        own = size.flatten().sort(descending=True).values if scope == "layer" else every
        bound = own[int(0.3 * len(own) + 0.5) - 1]
        assert torch.equal(masks[name], size >= bound), name
    rows = {site: detail for site, _, detail in lines(net, "prune", "rewritten")}
    assert rows["conv"] == f"density {float(masks['conv.weight'].float().mean()):.2%} of conv.weight"


def test_n_of_m_in_every_layout() -> None:
    net = fz.adapt(Layers(), fz.Plan(IMAGE, [fz.Prune(method="nm", n=1, m=2)]))
    for name, mask in held(net).items():
        rows = canonical(name, mask).movedim(1, -1)
        pairs = rows[..., : rows.shape[-1] // 2 * 2].unflatten(-1, (-1, 2))
        assert bool((pairs.sum(-1) == 1).all()), name
    assert len(held(net)) == 5


def test_tiles_in_every_layout() -> None:
    model = Layers()
    net = fz.adapt(model, fz.Plan(IMAGE, [fz.Prune(method="block", density=0.5, block=[2, 4], scope="layer")]))
    for name, mask in held(net).items():
        matrix = canonical(name, mask).flatten(1)
        weight = canonical(name, model.get_parameter(name).detach()).flatten(1)
        kept, gone = [], []
        for row in range(0, matrix.shape[0], 2):
            for column in range(0, matrix.shape[1], 4):
                tile = matrix[row : row + 2, column : column + 4]
                assert bool((tile == tile[0, 0]).all()), name
                (kept if tile[0, 0] else gone).append(weight[row : row + 2, column : column + 4].square().mean())
        assert min(kept) >= max(gone), name


def test_embeddings_are_not_chosen_from() -> None:
    net = fz.adapt(Tokens(), fz.Plan(IDS, [fz.Prune(method="magnitude", density=0.5)]))
    assert list(held(net)) == ["head.weight"]
    assert [site for site, *_ in lines(net, "prune", "refused")] == ["embed"]
    with pytest.raises(fz.PlanError, match="is an embedding, whose rows are looked up"):
        fz.adapt(Tokens(), fz.Plan(IDS, [fz.Prune("embed", method="nm")]))


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (fz.Prune("norm", method="magnitude", density=0.5), "norm is a BatchNorm2d"),
        (fz.Prune("grouped", method="nm", n=4, m=8), "has 4 inputs per row, of which 4 of 8 would all stay"),
        (fz.Prune("conv", method="nm", exclude="conf"), r"exclude: no module matches 'conf'"),
        (fz.Prune("conv", method="nm", exclude="c*"), "leaves nothing of conv"),
        (fz.Prune("cnv", method="nm"), "no module matches 'cnv'"),
    ],
)
def test_steps_with_nothing_to_choose_from(step: fz.Prune, words: str) -> None:
    with pytest.raises(fz.PlanError, match=words):
        fz.adapt(Layers(), fz.Plan(IMAGE, [step]))


def test_what_is_named_and_has_no_weight_is_refused() -> None:
    net = fz.adapt(Layers(), fz.Plan(IMAGE, [fz.Prune(["conv", "no*"], method="nm"), fz.Prune("*", method="nm")][1:]))
    assert not lines(net, "prune", "refused"), "a lone * is whatever can be pruned"
    with pytest.raises(fz.PlanError, match="'no\\*' matches nothing"):
        fz.adapt(Layers(), fz.Plan(IMAGE, [fz.Prune(["conv", "no*"], method="nm")]))
    net = fz.adapt(Layers(), fz.Plan(IMAGE, [fz.Prune("*o*", method="nm")]))
    assert [site for site, *_ in lines(net, "prune", "refused")] == ["norm"]


def test_exclude_covers_what_is_in_a_module() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stage = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
            self.fc = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.stage(x))

    net = fz.adapt(Outer(), fz.Plan([fz.Input("x", ("batch", 8))], [fz.Prune(method="nm", exclude="stage")]))
    assert list(held(net)) == ["fc.weight"]


def test_a_step_prunes_what_the_one_before_it_left() -> None:
    steps = [fz.Prune("conv", method="nm", n=2, m=3), fz.Prune("conv", method="magnitude", density=0.25)]
    net = fz.adapt(Layers(), fz.Plan(IMAGE, steps))
    found = {name: value for name, value in net.named_buffers() if name.endswith("_mask")}
    one, two = found["frozen.prune.conv.weight_mask"], found["frozen.prune_2.conv.weight_mask"]
    assert float(one.float().mean()) == pytest.approx(2 / 3) and int(two.sum()) == 54 and not bool((two & ~one).any())
    done = compiled(net)
    model = Layers()
    x = torch.randn(2, 3, 9, 8)
    agree(done.program.run(x)[0], by_hand(model, {"conv.weight": one & two})(x))


# ---- with adapters at the same site

ADAPTERS: dict[str, Callable[[str], Any]] = {
    "lora": lambda at: fz.LoRA(at, rank=2, alpha=3),
    "lora_bias": lambda at: fz.LoRA(at, rank=2, bias=True),
    "dora": lambda at: fz.DoRA(at, rank=2),
    "ia3_out": lambda at: fz.IA3(at),
    "ia3_in": lambda at: fz.IA3(at, side="in"),
    "vera": lambda at: fz.VeRA(at, rank=3),
    "oft": lambda at: fz.OFT(at, block_size=2),
}
SITES = {"conv": "conv", "grouped": "grouped", "up": "up", "c1d": "c1d", "twice": "twice"}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("site", ["conv", "up", "c1d", "twice"])
def test_the_mask_is_on_the_merged_weight(kind: str, site: str) -> None:
    if kind == "oft" and site in ("conv", "up", "twice"):
        pytest.skip("OFT needs one input each and blocks that divide it")
    model = Layers().double()
    inputs = [fz.Input("x", ("batch", 3, 9, 8), "float64")]
    x = torch.randn(3, 3, 9, 8, dtype=torch.float64)
    alone = fz.adapt(model, fz.Plan(inputs, [ADAPTERS[kind](site)]))
    pruned = fz.Plan(inputs, [fz.Prune(site, method="magnitude", density=0.5), ADAPTERS[kind](site)])
    net = fz.adapt(model, pruned)
    assert set(dict(net.named_parameters())) == set(dict(alone.named_parameters()))
    disturb(alone), disturb(net)
    # What the adapter alone folds to, masked by hand, is what both must compute.
    merged = compiled(alone).program.state
    mask = held(net)[f"{site}.weight"]
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for leaf in ("weight", "bias"):
            name = f"{site}.{leaf}"
            if name in merged and site != "conv":
                expected.get_parameter(name).copy_(merged[name])
    if site == "conv":  # its batch norm is folded into it
        conv = rewrite_without_norm(alone)
        with torch.no_grad():
            for leaf in ("weight", "bias"):
                expected.get_parameter(f"conv.{leaf}").copy_(conv[f"conv.{leaf}"])
    with torch.no_grad():
        expected.get_parameter(f"{site}.weight").mul_(mask)
    agree(net(x), expected(x), 1e-12)
    done = compiled(net)
    agree(done.program.run(x)[0], expected(x), 1e-12)
    assert torch.equal(done.program.state[f"{site}.weight"] != 0, mask), "exactly zero"
    assert float(mask.double().mean()) == pytest.approx(0.5, abs=0.03)
    assert {row.pass_name for row in done.ledger if row.step == "prune" and row.outcome == "rewritten"} == {
        "insert-masks", "fold-delta",
    }  # fmt: skip


def rewrite_without_norm(net: fz.AdaptedModule) -> dict[str, Tensor]:
    """The constants behind the fold of the adapters alone."""
    program = net.program()
    FoldDelta().run(program, Context(net.plan))
    return dict(program.state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("train", [False, True])
def test_half_precision(dtype: torch.dtype, train: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)
    inputs = [fz.Input("x", ("batch", 16), str(dtype))]
    steps = [fz.Prune(["0", "2"], method="nm", train=train), *([] if train else [fz.LoRA("0", rank=2)])]
    net = fz.adapt(model, fz.Plan(inputs, steps))
    assert {value.dtype for value in net.parameters()} == {torch.float32}
    disturb(net)
    x = torch.randn(5, 16, dtype=dtype)
    done = compiled(net)
    for name, mask in held(net).items():
        assert torch.equal(done.program.state[name] != 0, mask) and done.program.state[name].dtype == dtype
    agree(done.program.run(x)[0], net(x), 0.05)


def test_what_rounding_takes_of_an_adapter_is_not_hidden_by_what_the_mask_takes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16)).bfloat16()
    inputs = [fz.Input("x", ("batch", 16), "bfloat16")]
    net = fz.adapt(model, fz.Plan(inputs, [fz.LoRA("0", rank=2), fz.Prune("0", method="nm")]))
    with torch.no_grad():
        net.get_parameter("adapters.lora.0.lora_B").fill_(1e-4)
    with pytest.raises(fz.PassError, match=r"^lora cannot be folded into bfloat16"):
        compiled(net)


def test_a_bank_of_adapters_stays_beside_the_masked_weight() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    plan = fz.Plan([fz.Input("x", ("batch", 8))], [fz.LoRA("0", 2, adapters=2), fz.Prune("0", method="nm")])
    net = fz.adapt(model, plan)
    disturb(net)
    x, ids = torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
    mask = held(net)["0.weight"]
    state = net.adapter_state()
    expected = x @ (model[0].weight * mask).T + model[0].bias
    for row, number in enumerate(ids.tolist()):
        if number:
            a, b = (state[f"adapters.lora.0.{leaf}"][number - 1] for leaf in ("lora_A", "lora_B"))
            expected[row] += x[row] @ a.T @ b.T
    agree(net(x, adapter=ids), expected, 1e-5)
    done = compiled(net)
    agree(done.program.run(x, ids)[0], expected, 1e-5)
    assert torch.equal(done.program.state["0.weight"] != 0, mask)


def test_a_mask_is_behind_a_splice_on_the_weight() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(3, 8)
    shift = nn.Linear(8, 8)
    steps = [fz.Prune("0", method="nm"), fz.Splice(shift, at="0", on="weight")]
    plan = fz.Plan([fz.Input("x", ("batch", 8))], steps)
    net = fz.adapt(model, plan)
    weight = shift(model[0].weight)
    mask = held(net)["0.weight"]
    assert torch.equal(mask.unflatten(1, (2, 4)).sum(-1), torch.full((4, 2), 2))
    ranked = weight.abs().unflatten(1, (2, 4)).argsort(dim=-1, descending=True)
    assert torch.equal(mask, torch.zeros(4, 2, 4).scatter(-1, ranked[..., :2], 1.0).bool().flatten(1))
    agree(net(x), x @ (weight * mask).T + model[0].bias)
    done = compiled(net)
    agree(done.program.run(x)[0], x @ (weight * mask).T + model[0].bias)
    assert not done.program.graph.find_nodes(op="call_function", target=torch.ops.aten.where.ScalarOther)
    with pytest.raises(fz.PlanError, match="changed by another step too"):
        fz.adapt(model, fz.Plan(plan.inputs, [fz.Prune("0", method="nm", train=True), steps[1]]))


class Selected(nn.Module):
    """A weight for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))

    def forward(self, weight: Tensor, task: Tensor) -> Tensor:
        return weight * self.scale[task[:1]]  # not task[0], of which torch 2.11 makes a number that depends on data


def test_a_weight_that_hangs_on_an_input_takes_a_mask_but_is_not_chosen_from(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, task = nn.Sequential(nn.Linear(8, 4)), torch.randn(3, 8), torch.tensor([1, 1, 1])
    write_mask(tmp_path / "m.safetensors", {"0.weight": some((4, 8))})
    splice = fz.Splice(Selected(), at="0", on="weight", select="task", tasks=3)
    plan = fz.Plan([fz.Input("x", ("batch", 8))], [fz.Prune(mask=tmp_path / "m.safetensors"), splice])
    net = fz.adapt(model, plan)
    expected = x @ (model[0].weight * -2 * some((4, 8))).T + model[0].bias
    agree(net(x, task=task), expected)
    agree(compiled(net).program.run(x, task)[0], expected)
    with pytest.raises(fz.PlanError, match="has a weight that hangs on the model's inputs"):
        fz.adapt(model, fz.Plan(plan.inputs, [fz.Prune("0", method="nm"), splice]))


# ---- training

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda values: torch.optim.SGD(values, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adam": lambda values: torch.optim.Adam(values, lr=0.05, weight_decay=0.1),
    "adamw": lambda values: torch.optim.AdamW(values, lr=0.05, weight_decay=0.5),
}


def fit(net: fz.AdaptedModule, make: Callable[[Any], torch.optim.Optimizer], steps: int = 4) -> list[float]:
    generator, losses = torch.Generator().manual_seed(5), []
    x, y = torch.randn(16, 3, 9, 8, generator=generator), torch.randn(16, 5, generator=generator)
    optimizer = make(net.parameters())
    for _ in range(steps):
        loss = (net(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_that_train_are_zero_where_they_are_pruned(optimizer: str) -> None:
    model = Layers()
    before = copy.deepcopy(model.state_dict())
    plan = fz.Plan(IMAGE, [fz.Prune(method="magnitude", density=0.4, train=True)])
    net = fz.adapt(model, plan)
    names = ["conv.weight", "grouped.weight", "up.weight", "c1d.weight", "twice.weight"]
    assert [name.removeprefix("adapters.prune.") for name, _ in net.named_parameters()] == names
    masks, x = held(net), torch.randn(2, 3, 9, 8)
    agree(net(x), by_hand(model, masks)(x))
    losses = fit(net, OPTIMIZERS[optimizer], 6)
    assert losses[-1] < losses[0]
    done = compiled(net)
    for name in names:
        trained, mask = net.get_parameter(f"adapters.prune.{name}"), masks[name]
        assert not torch.equal(trained[~mask], before[name][~mask]), "the optimizer moved hidden entries"
        if name != "conv.weight":  # which has its batch norm in it
            assert torch.equal(done.program.state[name], trained.detach() * mask)
            assert not torch.isclose(done.program.state[name], before[name] * mask).all()
        assert torch.equal(done.program.state[name] != 0, mask)
    agree(done.program.run(x)[0], net(x), 1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not [row for row in done.ledger if row.outcome == "measured" and row.pass_name == "fold-masks"]
    assert [row.requested for row in done.ledger if (row.site, row.outcome) == ("", "measured")] == [
        "masks, before weights train, seen in 'output'"
    ]


def test_no_gradient_reaches_what_is_pruned() -> None:
    net = fz.adapt(Layers(), fz.Plan(IMAGE, [fz.Prune(method="nm", train=True)]))
    net(torch.randn(2, 3, 9, 8)).square().sum().backward()
    for name, mask in held(net).items():
        gradient = net.get_parameter(f"adapters.prune.{name}").grad
        assert gradient is not None
        assert bool((gradient[~mask] == 0).all()) and float((gradient[mask] != 0).float().mean()) > 0.9


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_adapters_train_under_a_mask(optimizer: str) -> None:
    plan = fz.Plan(IMAGE, [fz.LoRA(["conv", "up"], rank=2), fz.DoRA("twice", rank=1),
                           fz.Prune(method="magnitude", density=0.5)])  # fmt: skip
    net = fz.adapt(Layers(), plan)
    masks = {name: mask.clone() for name, mask in held(net).items()}
    losses = fit(net, OPTIMIZERS[optimizer])
    assert losses[-1] < losses[0] and all(torch.equal(mask, masks[name]) for name, mask in held(net).items())
    state = compiled(net).program.state
    for name, mask in masks.items():
        assert torch.equal(state[name] != 0, mask), name


def test_several_steps_train_apart() -> None:
    steps = [fz.Prune("conv", method="nm", n=1, m=3), fz.Prune("conv", method="magnitude", density=0.2, train=True)]
    net = fz.adapt(Layers(), fz.Plan(IMAGE, steps))
    fit(net, OPTIMIZERS["adam"])
    x = torch.randn(2, 3, 9, 8)
    state = compiled(net).program
    both = [value for name, value in net.named_buffers() if name.endswith("_mask")]
    assert torch.equal(state.state["conv.weight"] != 0, both[0] & both[1])
    agree(state.run(x)[0], net(x), 1e-5)
    again = [steps[0].model_copy(update={"train": True}), steps[1]]
    with pytest.raises(fz.PlanError, match="changed by another step too"):
        fz.adapt(Layers(), fz.Plan(IMAGE, again))


def test_weights_that_adapters_change_do_not_train_themselves() -> None:
    steps = [fz.LoRA("conv", rank=1), fz.Prune("conv", method="nm", n=1, m=3, train=True)]
    with pytest.raises(fz.PlanError, match=r"conv\.weight is changed by another step too") as caught:
        fz.adapt(Layers(), fz.Plan(IMAGE, steps))
    assert "leave out train" in str(caught.value)


# ---- files of adapters


@pytest.mark.parametrize("train", [False, True])
def test_files_of_adapters_keep_the_masks(tmp_path: Path, train: bool) -> None:
    file, x = tmp_path / "a.safetensors", torch.randn(2, 3, 9, 8)
    steps = [*([] if train else [fz.LoRA("twice", rank=1)]), fz.Prune(method="magnitude", density=0.5, train=train)]
    plan = fz.Plan(IMAGE, steps)
    net = fz.adapt(Layers(), plan)
    disturb(net)
    net.save_adapters(file)
    stored, metadata = weights.read(file)
    assert stored["frozen.prune.up.weight_mask"].dtype == torch.bool
    # Other masks than the criterion would choose: it is the file that counts.
    stored["frozen.prune.up.weight_mask"] = ~stored["frozen.prune.up.weight_mask"]
    weights.write(file, stored, metadata)
    fresh = fz.adapt(Layers(), plan)
    assert not torch.equal(held(fresh)["up.weight"], stored["frozen.prune.up.weight_mask"])
    fresh.load_adapters(file)
    assert torch.equal(held(fresh)["up.weight"], stored["frozen.prune.up.weight_mask"])
    done = compiled(fresh)
    assert torch.equal(done.program.state["up.weight"] != 0, stored["frozen.prune.up.weight_mask"])
    named = fz.Plan(IMAGE, [step.model_copy(update={"weights": str(file)}) for step in steps])
    again = fz.adapt(Layers(), named)
    agree(again(x), fresh(x))
    agree(rewrite(Layers(), named).program.run(x)[0], fresh(x), 1e-5)


def test_a_file_of_adapters_with_a_mask_too_many_or_of_another_shape(tmp_path: Path) -> None:
    file, plan = tmp_path / "a.safetensors", fz.Plan(IMAGE, [fz.Prune("conv", method="nm", n=1, m=3)])
    fz.adapt(Layers(), plan).save_adapters(file)
    stored, metadata = weights.read(file)
    named = fz.Plan(IMAGE, [plan.steps[0].model_copy(update={"weights": str(file)})])
    weights.write(file, {**stored, "frozen.prune.cnv.weight_mask": some((2, 2))}, metadata)
    with pytest.raises(fz.PlanError, match=r"unexpected: frozen\.prune\.cnv\.weight_mask"):
        fz.adapt(Layers(), named)
    weights.write(file, {"frozen.prune.conv.weight_mask": some((8, 3, 3))}, metadata)
    with pytest.raises(fz.PlanError, match=r"has shape \(8, 3, 3\), but \(8, 3, 3, 3\) is needed"):
        fz.adapt(Layers(), named)
    weights.write(file, {"frozen.prune.conv.weight_mask": torch.ones(8, 3, 3, 3)}, metadata)
    with pytest.raises(fz.PlanError, match=r"torch\.float32, but a dtype like torch\.bool"):
        fz.adapt(Layers(), named)


def test_a_plan_file_names_its_mask_relative_to_itself(tmp_path: Path, ticket: tuple[str, dict[str, Tensor]]) -> None:
    plan = fz.Plan(IMAGE, [fz.Prune(mask=ticket[0])])
    plan.save(tmp_path / "plan.toml")
    assert 'mask = "ticket.safetensors"' in (tmp_path / "plan.toml").read_text()
    loaded = fz.Plan.load(tmp_path / "plan.toml")
    assert loaded == plan and read_mask(str(loaded.steps[0].mask)).keys() == ticket[1].keys()  # type: ignore[attr-defined]
