"""Channel pruning: what goes together, what it is worth by hand, how many stay, and that a channel is zero."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.api import rewrite
from fxfreeze.passes import PIPELINE
from fxfreeze.passes.adapt._scores_channel import _rounded
from fxfreeze.pipeline import run_passes, stage_passes
from fxfreeze.rewrite import Context

IMAGE = [fz.Input("x", ("batch", 3, 8, 8))]


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Residual(nn.Module):
    """A stem and two blocks that add to it: one group of the stem's channels, one of each block's inner ones."""

    def __init__(self, width: int = 16, inner: tuple[int, int] = (12, 20)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.bn = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width)
        self.a, self.b = Block(width, inner[0]), Block(width, inner[1])
        self.fc = nn.Linear(width, 5)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                for value in (module.weight, module.bias, module.running_mean):
                    nn.init.normal_(value, std=0.5)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.a(torch.relu(self.bn(self.stem(x))))).mean((2, 3)))


GROUPS = {"stem": ["stem", "a.conv2", "b.conv2"], "a.conv1": ["a.conv1"], "b.conv1": ["b.conv1"]}
"""First layer → the layers of its group."""


def prune(step: fz.Prune, model: nn.Module | None = None, **options: Any) -> fz.AdaptedModule:
    return fz.adapt(model or Residual(), fz.Plan(IMAGE, [step]), **options)


def held(net: fz.AdaptedModule) -> dict[str, Tensor]:
    return {name.split(".", 2)[2].removesuffix("_mask"): value
            for name, value in net.named_buffers() if name.endswith("_mask")}  # fmt: skip


def folded(net: fz.AdaptedModule) -> dict[str, Tensor]:
    """The constants before what is zero is removed."""
    program = net.program()
    run_passes(program, stage_passes(PIPELINE, ("freeze", "fold")), Context(net.plan), draws=[])
    return dict(program.state)


def stays(net: fz.AdaptedModule) -> dict[str, Tensor]:
    """First layer of a group → which of its channels stay; all that is the group's agrees."""
    masks, found = held(net), {}
    assert not any("running" in name for name in masks)
    norms = {"stem": "bn", "a.conv1": "a.bn1", "b.conv1": "b.bn1", "a.conv2": "a.bn2", "b.conv2": "b.bn2"}
    for first, layers in GROUPS.items():
        if f"{first}.weight" not in masks:
            continue
        found[first] = masks[f"{first}.weight"].flatten(1).any(1)
        for layer in layers:
            rows = masks[f"{layer}.weight"].flatten(1)
            assert torch.equal(rows, found[first].unsqueeze(1).expand_as(rows)), layer
            for name in (f"{norms[layer]}.weight", f"{norms[layer]}.bias", f"{layer}.bias"):
                assert name not in masks or torch.equal(masks[name], found[first]), name
            assert f"{norms[layer]}.weight" in masks and f"{norms[layer]}.bias" in masks
        assert f"{layers[-1]}.bias" in masks or first != "stem"
    return found


def smaller(model: Residual, kept: dict[str, Tensor]) -> Residual:
    """The model without the channels that go, made by hand."""
    stem, a, b = (kept[name].nonzero().squeeze(1) for name in GROUPS)
    small = Residual(len(stem), (len(a), len(b)))

    def conv(to: nn.Conv2d, of: nn.Conv2d, rows: Tensor, columns: Tensor | None) -> None:
        weight = of.weight[rows] if columns is None else of.weight[rows][:, columns]
        to.weight.copy_(weight)
        if of.bias is not None:
            to.bias.copy_(of.bias[rows])

    def norm(to: nn.BatchNorm2d, of: nn.BatchNorm2d, rows: Tensor) -> None:
        for name, value in of.state_dict().items():
            if value.ndim:
                to.state_dict()[name].copy_(value[rows])

    with torch.no_grad():
        conv(small.stem, model.stem, stem, None)
        norm(small.bn, model.bn, stem)
        for name, inner in (("a", a), ("b", b)):
            to, of = getattr(small, name), getattr(model, name)
            conv(to.conv1, of.conv1, inner, stem)
            conv(to.conv2, of.conv2, stem, inner)
            norm(to.bn1, of.bn1, inner)
            norm(to.bn2, of.bn2, stem)
        small.fc.weight.copy_(model.fc.weight[:, stem])
        small.fc.bias.copy_(model.fc.bias)
    return small


def work(model: nn.Module) -> int:
    """Multiply-accumulates of one image, counted while it runs."""
    total = 0

    def count(module: nn.Module, given: Any, result: Tensor) -> None:
        nonlocal total
        total += result[0].numel() * module.weight[0].numel()  # type: ignore[index, operator]

    hooks = [item.register_forward_hook(count) for item in model.modules() if isinstance(item, nn.Conv2d | nn.Linear)]
    model(torch.zeros(1, 3, 8, 8))
    for hook in hooks:
        hook.remove()
    return total


# ---- that channels go


@pytest.mark.parametrize("criterion", ["l1", "batchnorm", "taylor"])
def test_it_computes_what_a_smaller_model_computes(criterion: str) -> None:
    model, x = Residual(), torch.randn(4, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    plan = fz.Plan(IMAGE, [fz.Prune(method="channel", density=0.5, criterion=criterion)])
    net = fz.adapt(model, plan, calibration=[x])
    kept = stays(net)
    assert kept.keys() == GROUPS.keys() and sum(int(mask.sum()) for mask in kept.values()) == 24
    expected = smaller(model, kept)(x)
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)
    done = rewrite(net, plan)
    torch.testing.assert_close(done.program.run(x)[0], expected, rtol=1e-5, atol=1e-5)
    sizes = {name: value.shape for name, value in smaller(model, kept).named_parameters() if "bn" not in name}
    assert {name: done.program.state[name].shape for name in sizes} == sizes, "what is zero is gone"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    refused = {row.site: row.detail for row in net.ledger if row.outcome == "refused"}
    assert list(refused) == ["fc"] and "as their axis reaches an output" in refused["fc"]
    told = {row.site: row.detail for row in net.ledger if row.requested.startswith("channels of")}
    assert told["b.conv2"] == f"{int(kept['stem'].sum())} of 16 channels stay; they go together with stem, a.conv2's"
    assert set(told) == {layer for layers in GROUPS.values() for layer in layers}


def test_channels_that_go_are_zero_wherever_they_are_read() -> None:
    model = Residual()
    plan = fz.Plan(IMAGE, [fz.Prune(method="channel", density=0.4), fz.Tap(["bn", "a", "b", "a.bn1"])])
    net = fz.adapt(model, plan)
    net(torch.randn(2, 3, 8, 8))
    kept = stays(net)
    for name, value in net.tapped.items():
        mask = kept["a.conv1" if name.endswith("a.bn1") else "stem"]
        assert bool((value[:, ~mask] == 0).all()) and bool((value[:, mask] != 0).any()), name


# ---- what they are worth


def by_hand(model: Residual, criterion: str, x: Tensor) -> dict[str, Tensor]:
    found = {}
    if criterion == "taylor":
        for part in x.split(2):  # batch by batch
            model.zero_grad()
            (model(part).square().sum() / 2).backward()
            for first, layers in GROUPS.items():
                weights = [model.get_parameter(f"{layer}.weight") for layer in layers]
                rows = [(weight * weight.grad).abs().flatten(1).sum(1) for weight in weights]
                found[first] = found.get(first, 0) + sum(rows)
        return {first: value.detach() for first, value in found.items()}
    norms = {"stem": ["bn", "a.bn2", "b.bn2"], "a.conv1": ["a.bn1"], "b.conv1": ["b.bn1"]}
    for first, layers in GROUPS.items():
        if criterion == "l1":
            total = sum(model.get_parameter(f"{layer}.weight").abs().flatten(1).sum(1) for layer in layers)
        else:
            total = sum(model.get_parameter(f"{norm}.weight").abs() for norm in norms[first])
        found[first] = (total / total.mean()).detach()
    return found


@pytest.mark.parametrize("criterion", ["l1", "batchnorm", "taylor"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_those_that_are_worth_most_stay(criterion: str, scope: str) -> None:
    model, x = Residual(), torch.randn(6, 3, 8, 8)
    step = fz.Prune(method="channel", density=0.5, criterion=criterion, scope=scope)
    kept, worth = stays(prune(step, model, calibration=x.split(2))), by_hand(model, criterion, x)
    if scope == "layer":
        assert {first: int(mask.sum()) for first, mask in kept.items()} == {"stem": 8, "a.conv1": 6, "b.conv1": 10}
        for first, mask in kept.items():
            assert worth[first][mask].min() >= worth[first][~mask].max(), first
    else:
        every = torch.cat([worth[first] for first in GROUPS])
        masks = torch.cat([kept[first] for first in GROUPS])
        assert int(masks.sum()) == 24 and every[masks].min() >= every[~masks].max()


def test_equals_go_from_all_groups_alike() -> None:
    model = Residual()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    kept = stays(prune(fz.Prune(method="channel", density=0.5, criterion="batchnorm"), model))
    assert {first: int(mask.sum()) for first, mask in kept.items()} == {"stem": 8, "a.conv1": 6, "b.conv1": 10}
    assert kept["stem"].tolist() == [True] * 8 + [False] * 8, "of equals, the first stay"


# ---- how many stay


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("flops", [0.2, 0.5, 0.8])
def test_as_many_stay_as_the_work_allows(scope: str, multiple: int, flops: float) -> None:
    model = Residual(32, (24, 40))
    net = prune(fz.Prune(method="channel", flops=flops, scope=scope, multiple=multiple), model)
    kept = stays(net)
    share = work(smaller(model, kept)) / work(model)
    assert flops - (0.06 if multiple == 1 else 0.2) < share <= flops
    assert all(int(mask.sum()) % multiple == 0 for mask in kept.values())
    total = sum(int(mask.sum()) for mask in kept.values())
    (row,) = [row for row in net.ledger if row.site == "" and "channels" in row.detail]
    assert row.detail == f"{total} of 96 channels stay, and {share:.1%} of the multiply-accumulates"


def test_a_group_smaller_than_the_multiple_stays_whole() -> None:
    kept = stays(prune(fz.Prune(method="channel", density=0.1, multiple=16), Residual(32, (12, 40))))
    assert {first: int(mask.sum()) for first, mask in kept.items()} == {"stem": 16, "a.conv1": 12, "b.conv1": 16}


class Wider(nn.Module):
    """Twice as many channels behind a shortcut that pads with zeros: three groups make the wide layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.a, self.b = (
            nn.Conv2d(width, count, 3, padding=1) for width, count in ((3, 8), (8, 16), (16, 16))
        )
        self.fc = nn.Linear(16, 5)
        with torch.no_grad():
            for layer in (self.a, self.b):  # what is behind the zeros in front is worth least
                layer.weight[:4] *= 0.8

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(nn.functional.pad(x, (0, 0, 0, 0, 4, 4)) + self.a(x))
        return self.fc(torch.relu(x + self.b(x)).mean((2, 3)))


def widths_of_wider(multiple: int, flops: float) -> tuple[list[int], list[int]]:
    """Which channels of the stem stay, and which of the wide layers."""
    masks = held(prune(fz.Prune(method="channel", flops=flops, multiple=multiple), Wider()))
    stem, a, b = (masks[f"{name}.weight"].flatten(1).any(1).nonzero().flatten().tolist() for name in ("stem", "a", "b"))
    assert a == b
    return stem, a


@pytest.mark.parametrize("flops", [0.4, 0.9])
def test_what_only_widens_goes_whole_where_that_makes_the_width_round(flops: float) -> None:
    assert widths_of_wider(8, flops) == (list(range(8)), list(range(4, 12)))


@pytest.mark.parametrize("flops", [0.3, 0.5, 0.8])
def test_layers_that_several_groups_make_have_round_widths(flops: float) -> None:
    stem, wide = widths_of_wider(4, flops)
    assert len(stem) % 4 == len(wide) % 4 == 0 < len(stem) <= len(wide)
    assert {channel + 4 for channel in stem} == set(wide) & set(range(4, 12))


def test_all_but_one_may_go() -> None:
    kept = stays(prune(fz.Prune(method="channel", density=0.01)))
    assert [int(mask.sum()) for mask in kept.values()] == [1, 1, 1]


def test_work_that_cannot_be_had() -> None:
    with pytest.raises(fz.PlanError, match=r"flops=0.05: with the fewest channels \d+\.\d% of multiply"):
        prune(fz.Prune(["a.conv1"], method="channel", flops=0.05))


def test_work_of_groups_and_of_transposed_convolutions() -> None:
    """A depthwise convolution loses work once with its channels, not twice."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 2, stride=2), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(),
    ).eval()  # fmt: skip
    net = prune(fz.Prune(method="channel", density=0.5, scope="layer"), model)
    masks = held(net)
    assert [int(masks[f"{at}.weight"].flatten(1).any(1).sum()) for at in (0, 2)] == [8, 8]
    assert torch.equal(masks["0.weight"].flatten(1).any(1), masks["2.weight"].flatten(1).any(1))
    assert masks["4.weight"].any(0).flatten(1).any(1).sum() == 4 and bool(masks["4.weight"].any(1).all())
    before = 64 * (3 * 16 + 16 * 9 + 16 * 8 * 4) + 256 * 8 * 4
    after = 64 * (3 * 8 + 8 * 9 + 8 * 4 * 4) + 256 * 4 * 4
    (row,) = [row for row in net.ledger if "channels stay, and" in row.detail]
    assert row.detail == f"12 of 24 channels stay, and {after / before:.1%} of the multiply-accumulates"


# ---- which may not


def refusals(net: fz.AdaptedModule) -> dict[str, str]:
    return {row.site: row.detail for row in net.ledger if row.outcome == "refused"}


def test_layers_that_share_channels_with_one_that_is_not_named() -> None:
    net = prune(fz.Prune("[sa]*", method="channel", density=0.5))
    assert list(stays(net)) == ["a.conv1"]
    told = refusals(net)
    assert "they are made by b.conv2 too, which the step does not name" in told["stem"] and "b.conv2" in told["a.conv2"]
    with pytest.raises(fz.PlanError, match=r"they are made by b\.conv2 too"):
        prune(fz.Prune(["stem", "a.conv2"], method="channel", density=0.5))


def test_channels_that_a_graft_adds_to() -> None:
    steps = [fz.Prune(method="channel", density=0.5), fz.Bottleneck(at="a", width=4)]
    net = fz.adapt(Residual(), fz.Plan(IMAGE, steps))
    assert list(stays(net)) == ["a.conv1", "b.conv1"]
    assert "they are made by what 'bottleneck' adds, too" in refusals(net)["stem"]


def test_channels_without_a_batch_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(),
                          nn.Conv2d(8, 4, 1), nn.Flatten()).eval()  # fmt: skip
    net = prune(fz.Prune(method="channel", density=0.5, criterion="batchnorm"), model)
    assert "makes channels that no batch norm scales" in refusals(net)["3"]
    assert sorted(held(net)) == ["0.bias", "0.weight", "1.bias", "1.weight"]


def test_taylor_needs_data() -> None:
    with pytest.raises(fz.PlanError, match="'taylor' differentiates on data") as caught:
        prune(fz.Prune(method="channel", density=0.5, criterion="taylor"))
    assert "calibration=" in str(caught.value)
    plan = fz.Plan(IMAGE, [fz.Prune(method="channel", density=0.5, criterion="taylor")])
    batches = [torch.randn(4, 3, 8, 8)]
    done = rewrite(Residual(), plan, calibration=iter(batches))  # read once, and kept for what is measured
    kept = stays(fz.adapt(Residual(), plan, calibration=batches))
    expected = smaller(Residual(), kept)(batches[0])
    torch.testing.assert_close(done.program.run(batches[0])[0], expected, rtol=1e-5, atol=1e-5)


# ---- under adapters, and while it trains

STEPS: dict[str, Callable[[], list[Any]]] = {
    "lora": lambda: [fz.LoRA(["stem", "a.conv2"], rank=2)],
    "lora_bias": lambda: [fz.LoRA(["a.conv2"], rank=2, bias=True)],
    "ia3": lambda: [fz.IA3("*.conv*")],
    "train": list,
}


@pytest.mark.parametrize("kind", STEPS)
def test_channels_stay_zero_through_training(kind: str) -> None:
    torch.manual_seed(1)
    steps = [fz.Prune(method="channel", density=0.5, train=kind == "train"), fz.Tap(["bn", "b"]), *STEPS[kind]()]
    plan, x = fz.Plan(IMAGE, steps), torch.randn(8, 3, 8, 8)
    net = fz.adapt(Residual(), plan)
    if kind == "train":
        names = {name for name, _ in net.named_parameters()}
        assert {"adapters.prune.bn.bias", "adapters.prune.a.bn1.weight", "adapters.prune.a.conv2.bias"} <= names
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.5)
    first = float(net(x).detach().square().mean())
    for _ in range(4):
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    kept = stays(net)["stem"]
    assert float(net(x).detach().square().mean()) < first
    for name, value in net.tapped.items():
        assert bool((value[:, ~kept] == 0).all()) and bool((value[:, kept] != 0).any()), name
    done = rewrite(net, plan)
    torch.testing.assert_close(done.program.run(x)[0], net(x), rtol=1e-4, atol=1e-4)
    state = folded(net)
    for name in ("stem.weight", "a.conv2.weight", "a.conv2.bias"):
        assert bool((state[name][~kept] == 0).all()) and bool((state[name][kept] != 0).all())


# ---- other layouts


class Mlp(nn.Module):
    """A transformer block: attention with one projection of queries, keys and values, and a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).unbind(2)
        heads = nn.functional.scaled_dot_product_attention(*(item.transpose(1, 2) for item in (q, k, v)))
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        return self.head(x + self.down(nn.functional.gelu(self.up(x))))


def test_feed_forward_neurons_of_a_transformer() -> None:
    model, x = Mlp(), torch.randn(2, 6, 16)
    plan = fz.Plan([fz.Input("x", ("batch", 6, 16))], [fz.Prune(["up"], method="channel", density=0.25)])
    net = fz.adapt(model, plan)
    masks = held(net)
    assert sorted(masks) == ["up.bias", "up.weight"] and int(masks["up.bias"].sum()) == 8
    kept = masks["up.bias"]
    assert set(model.up.weight.abs().sum(1).topk(8).indices.tolist()) == set(kept.nonzero().flatten().tolist())
    small = copy.deepcopy(model)
    small.up.weight, small.up.bias = nn.Parameter(model.up.weight[kept]), nn.Parameter(model.up.bias[kept])
    small.down.weight = nn.Parameter(model.down.weight[:, kept])
    torch.testing.assert_close(net(x), small(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(fz.PlanError, match="down makes 16 channels that stay, as their axis comes from an input"):
        fz.adapt(model, fz.Plan(plan.inputs, [fz.Prune(["down"], method="channel", density=0.25)]))


def test_entries_of_heads_go_from_all_heads() -> None:
    """Heads overlap with them, and are fewer; queries, keys and values of one layer lose the same ones."""
    model, x = Mlp(), torch.randn(2, 6, 16)
    step = fz.Prune("qkv", method="channel", density=0.5, scope="layer")
    net = fz.adapt(model, fz.Plan([fz.Input("x", ("batch", 6, 16))], [step]))
    rows = held(net)["qkv.weight"].all(1).unflatten(0, (3, 2, 8))  # part, head, entry
    assert torch.equal(rows, rows[:, :1].expand_as(rows)) and torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2]) and rows[:, 0].sum(1).tolist() == [4, 4, 4]
    assert torch.equal(held(net)["qkv.bias"], rows.flatten())
    size = model.qkv.weight.abs().sum(1).unflatten(0, (6, 8)).sum(0)
    assert set(rows[0, 0].nonzero().flatten().tolist()) == set(size.topk(4).indices.tolist())
    expected = copy.deepcopy(model)
    with torch.no_grad():
        expected.qkv.weight.mul_(rows.reshape(48, 1))
        expected.qkv.bias.mul_(rows.flatten())
    torch.testing.assert_close(net(x), expected(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("count", "size", "multiple", "base", "rounded"),
    [(13, 20, 8, 0, 16), (11, 20, 8, 0, 8), (12, 20, 8, 0, 16), (1, 20, 8, 0, 8), (20, 20, 8, 0, 20),
     (19, 20, 8, 0, 16), (23, 23, 8, 0, 23), (22, 23, 8, 0, 23), (0, 20, 1, 0, 1), (3, 6, 8, 0, 6), (7, 20, 1, 0, 7),
     (3, 8, 8, 8, 0), (4, 8, 8, 8, 8), (0, 8, 1, 8, 0), (1, 20, 8, 3, 5), (9, 20, 8, 3, 13), (1, 20, 8, 9, 0)],
)  # fmt: skip
def test_counts_are_rounded_to_the_nearest_multiple(
    count: int, size: int, multiple: int, base: int, rounded: int
) -> None:
    assert _rounded(count, size, multiple, base) == rounded


def test_a_step_behind_another_one() -> None:
    """Half the channels, and two of every four inputs of what is left."""
    steps = [fz.Prune(method="channel", density=0.5, scope="layer"), fz.Prune("b.conv1", method="nm")]
    net = fz.adapt(Residual(), fz.Plan(IMAGE, steps))
    found = {name: value for name, value in net.named_buffers() if name.endswith("b.conv1.weight_mask")}
    rows = found["frozen.prune.b.conv1.weight_mask"]
    both = rows & found["frozen.prune_2.b.conv1.weight_mask"]
    assert torch.equal(both.flatten(2).any(2).any(1), rows.flatten(1).any(1))
    assert torch.equal(folded(net)["b.conv1.weight"] != 0, both)
