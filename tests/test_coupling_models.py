"""Coupling groups of attentions and of whole networks: found, and compacted where units of them are zero."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxfreeze as fz
from fxfreeze.capture import capture
from fxfreeze.coupling import Group, coupling_groups
from fxfreeze.passes import PIPELINE
from fxfreeze.passes.prune.compact import Compact
from fxfreeze.pipeline import proof_draws, run_passes, stage_passes
from fxfreeze.program import Program
from fxfreeze.rewrite import Context

PLAN = fz.Plan([fz.Input("x", ("batch",))])


class Fn(nn.Module):
    """A function of modules, which it holds by name."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def captured(model: nn.Module, *shape: int | str, **spec: Any) -> Program:
    """With parameters of norms and biases that are none that a mistake would hide behind."""
    torch.manual_seed(0)
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            if value.ndim == 1 and value.is_floating_point() and len(value) > 1:
                value.uniform_(0.5, 1.5)
    dims = {"seq": fz.Dim(max=20)} if "seq" in shape else {}
    return capture(model.eval(), fz.Plan([fz.Input("x", shape, **spec)], dims=dims, targets=[]))[0]


def folded(found: Program) -> Program:
    """After what comes before pruning."""
    program = found.clone()
    run_passes(program, stage_passes(PIPELINE, ["clean", "fold"]), Context(PLAN), verify="off")
    return program


def members(group: Group) -> dict[tuple[str, int], Any]:
    """(constant, dim) → entries of every unit."""
    return {(str(item.node.target), item.dim): item.entries.tolist() for item in group.members}


def free(found: Program) -> list[Group]:
    return [group for group in coupling_groups(found) if group.reason is None]


def each(count: int, first: int = 0) -> list[list[int]]:
    return [[at] for at in range(first, first + count)]


def runs(count: int, length: int) -> list[list[int]]:
    return [list(range(at * length, at * length + length)) for at in range(count)]


def shapes(program: Program) -> dict[str, list[int]]:
    return {name: list(program.state.tensor(name).shape) for name in program.state}


def silenced(found: Program, share: float, columns: bool = False) -> tuple[Program, dict[str, list[int]]]:
    """A copy in which this share of every group's units is 0 where it is made, and the shapes of what is left without.

    Of everything that makes units their entries are 0, with `columns` of what reads them too; what a batch norm has
    measured stays.
    """
    program, gone = found.clone(), {}
    for group in free(program):
        units = torch.randperm(group.size)[: max(1, int(share * group.size))]
        for item in group.members:
            name = str(item.node.target)
            gone.setdefault((name, item.dim), set()).update(item.entries[units].flatten().tolist())
            if (columns or item.role != "column") and "running" not in name:
                index = item.entries[units].flatten()
                program.state[name] = program.state[name].detach().index_fill(item.dim, index, 0)
    left = shapes(program)
    for (name, dim), entries in gone.items():
        left[name][dim] -= len(entries)
    return program, left


def compacted(program: Program) -> Context:
    """Proven on two draws, and run once more without anything left to do."""
    ctx, before = Context(PLAN), program.clone()
    (row,), _ = run_passes(program, [Compact()], ctx, draws=proof_draws(program, "full"))
    assert row.rewrites and row.error is not None and row.error < 1e-10
    assert [str(node.meta["val"].shape) for node in program.output_nodes] == [
        str(node.meta["val"].shape) for node in before.output_nodes
    ]
    inputs = proof_draws(program, "sampled")[0]
    for found, wanted in zip(program.run(*inputs), before.run(*inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert Compact().run(program, Context(PLAN)) == 0
    return ctx


def check_compaction(found: Program, share: float = 0.3, columns: bool = False) -> Context:
    """Zero units of all groups are gone, they alone, and the function is what it was."""
    program, left = silenced(found, share, columns)
    ctx = compacted(program)
    assert shapes(program) == left
    assert {row.outcome for row in ctx.ledger} == {"rewritten"}
    return ctx


# ---- attention


class Attention(nn.Module):
    """Heads of 2 entries; how queries, keys and values come out of one layer or of three, and how they are used."""

    def __init__(self, form: str, use: str = "fused", heads: int = 3) -> None:
        super().__init__()
        self.form, self.use, self.heads = form, use, heads
        width = 2 * heads
        if form == "three":
            self.q, self.k, self.v = (nn.Linear(5, width) for _ in range(3))
        elif form == "shared":
            self.q, self.k, self.v = nn.Linear(5, width), nn.Linear(5, 2), nn.Linear(5, 2)
        else:
            self.qkv = nn.Linear(5, 3 * width)
        self.out = nn.Linear(width, 5)

    def parts(self, x: Tensor) -> list[Tensor]:
        shape = [x.shape[0], x.shape[1], -1, 2]
        if self.form in ("three", "shared"):
            return [layer(x).reshape(shape).transpose(1, 2) for layer in (self.q, self.k, self.v)]
        made = self.qkv(x)
        if self.form == "chunk":
            return [part.reshape(shape).transpose(1, 2) for part in made.chunk(3, -1)]
        if self.form == "unbind":
            return list(made.unflatten(-1, (3, self.heads, 2)).permute(2, 0, 3, 1, 4).unbind(0))
        if self.form == "select":
            made = made.reshape(*x.shape[:2], 3, self.heads, 2).permute(2, 0, 3, 1, 4)
            return [made[0], made[1], made[2]]
        return list(made.reshape(*x.shape[:2], self.heads, 6).transpose(1, 2).chunk(3, -1))  # GPT-NeoX

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        if self.form == "shared":
            k, v = (item.expand(-1, self.heads, -1, -1) for item in (k, v))
        if self.use == "fused":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.use == "flat":
            flat = [item.reshape(-1, item.shape[2], 2) for item in (q, k, v)]
            y = torch.bmm(torch.bmm(flat[0], flat[1].mT).softmax(-1), flat[2]).reshape(q.shape)
        else:
            y = ((q @ k.transpose(-2, -1)) / 2**0.5).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(*x.shape[:2], -1))


@pytest.mark.parametrize("use", ["fused", "plain", "flat"])
def test_heads_of_three_layers(use: str) -> None:
    found = captured(Attention("three", use), "batch", "seq", 5)

    def rows(names: str, entries: list[list[int]]) -> dict[tuple[str, int], list[list[int]]]:
        return {(f"{name}.{leaf}", 0): entries for name in names for leaf in ("weight", "bias")}

    apart = [[0, 2, 4], [1, 3, 5]]
    assert [members(group) for group in free(found)] == [
        rows("qkv", runs(3, 2)) | {("out.weight", 1): runs(3, 2)}, rows("qk", apart),
        rows("v", apart) | {("out.weight", 1): apart},
    ]  # fmt: skip
    check_compaction(found)


@pytest.mark.parametrize("use", ["fused", "plain", "flat"])
@pytest.mark.parametrize("form", ["chunk", "unbind", "select", "neox"])
def test_heads_of_one_layer(form: str, use: str) -> None:
    found = captured(Attention(form, use), "batch", "seq", 5)
    groups = free(found)
    rows = [members(group)["qkv.weight", 0] for group in groups]
    columns = [members(group).get(("out.weight", 1)) for group in groups]
    whole, apart = [[0, 1], [2, 3], [4, 5]], [[0, 2, 4], [1, 3, 5]]
    if form == "neox":
        of = lambda *places: [sorted(6 * head + at + own for head in range(3) for at in places) for own in range(2)]  # noqa: E731
        assert rows == [[list(range(6 * head, 6 * head + 6)) for head in range(3)], of(0, 2), of(4)]
        assert columns == [whole, None, apart]
    elif form == "chunk":
        heads = [[0, 1, 6, 7, 12, 13], [2, 3, 8, 9, 14, 15], [4, 5, 10, 11, 16, 17]]
        keys = [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]
        assert rows == [heads, keys, [[12, 14, 16], [13, 15, 17]]] and columns == [whole, None, apart]
    else:  # what a permutation holds together has one width for queries, keys and values
        heads = [[0, 1, 6, 7, 12, 13], [2, 3, 8, 9, 14, 15], [4, 5, 10, 11, 16, 17]]
        assert rows == [heads, [list(range(own, 18, 2)) for own in range(2)]] and columns == [whole, apart]
    check_compaction(found)


def test_heads_that_share_keys_and_values() -> None:
    found = captured(Attention("shared"), "batch", "seq", 5)
    groups = free(found)
    assert [(group.name, group.size) for group in groups] == [("q", 3), ("q", 2), ("v", 2)]
    assert set(members(groups[0])) == {("q.weight", 0), ("q.bias", 0), ("out.weight", 1)}
    assert members(groups[1])["k.weight", 0] == each(2)
    check_compaction(found, columns=True)  # a head without queries looks at all alike
    program, left = silenced(found, 0.3)
    compacted(program)
    assert shapes(program)["q.weight"][0] == left["q.weight"][0] // 2 * 3


@pytest.mark.parametrize("use", ["fused", "plain", "flat"])
@pytest.mark.parametrize("form", ["three", "chunk", "unbind", "neox"])
@pytest.mark.parametrize("part", ["values", "columns"])
def test_a_head_without_values_or_without_columns_is_none(form: str, use: str, part: str) -> None:
    model = Attention(form, use)
    with torch.no_grad():
        if part == "columns":
            model.out.weight[:, 2:4] = 0
        elif form == "three":
            model.v.weight[2:4] = 0
        else:
            model.qkv.weight[[10, 11] if form == "neox" else [14, 15]] = 0
    found = captured(model, "batch", "seq", 5)
    for name in ("v.bias", "qkv.bias") if part == "values" else ():
        if name in found.state:
            rows = {"v.bias": [2, 3], "qkv.bias": [10, 11] if form == "neox" else [14, 15]}[name]
            found.state[name] = found.state[name].detach().index_fill(0, torch.tensor(rows), 0)
    ctx = compacted(found)
    assert shapes(found)["out.weight"] == [5, 4]
    assert shapes(found).get("qkv.weight", [12, 5]) == [12, 5] and shapes(found).get("q.weight", [4, 5]) == [4, 5]
    what = "all zero" if part == "values" else "read by nothing"
    assert [(row.outcome, row.detail.partition(", ")[2]) for row in ctx.ledger] == [("rewritten", what)]


def test_the_scale_of_queries_that_get_narrower_is_what_it_was() -> None:
    program, _ = silenced(captured(Attention("three"), "batch", "seq", 5), 0.5)
    compacted(program)
    (node,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
    assert node.kwargs["scale"] == 1 / math.sqrt(2) and node.args[0].meta["val"].shape[-1] == 1


def test_grouped_queries_belong_to_the_head_of_their_keys() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 2)).transpose(1, 2) for layer in (m.q, m.k, m.v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return m.out(y.transpose(1, 2).flatten(2))

    def spread(m: Any, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 2)).transpose(1, 2) for layer in (m.q, m.k, m.v))
        k, v = (item[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for item in (k, v))
        return m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    for function in (forward, spread):
        model = Fn(function, q=nn.Linear(5, 12), k=nn.Linear(5, 6), v=nn.Linear(5, 6), out=nn.Linear(12, 5))
        found = captured(model, "batch", "seq", 5)
        groups = [members(group) for group in free(found)]
        heads = next(group for group in groups if ("k.weight", 0) in group and ("v.weight", 0) in group)
        assert heads["k.weight", 0] == [[0, 1], [2, 3], [4, 5]]
        assert heads["q.weight", 0] == heads["out.weight", 1] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
        second = next(group for group in groups if ("q.weight", 0) in group and ("k.weight", 0) not in group)
        assert second["q.weight", 0] == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]
        check_compaction(found, 0.5, columns=True)


# ---- whole models


def checked(found: Program) -> list[Group]:
    """All groups; entries of a constant are shared out among the units of every group, and in range."""
    groups = coupling_groups(found)
    for group in groups:
        for item in (*group.members, *group.values):
            assert item.entries.shape[0] == group.size
            flat = item.entries.flatten()
            assert len(flat.unique()) == len(flat) and int(flat.max()) < item.node.meta["val"].shape[item.dim]
    return groups


@pytest.fixture(scope="module")
def resnet50() -> Program:
    torchvision = pytest.importorskip("torchvision")
    return captured(torchvision.models.resnet50(), "batch", 3, 32, 32)


def test_resnet50(resnet50: Program) -> None:
    groups = checked(resnet50)
    taken = {group.name: group for group in groups if group.reason is None}
    # The stem, two convolutions in each of 16 blocks, and four stages.
    assert len(taken) == 1 + 2 * 16 + 4
    assert {name: group.size for name, group in taken.items() if group.size >= 256 and "conv3" in name} == {
        "layer1.0.conv3": 256, "layer2.0.conv3": 512, "layer3.0.conv3": 1024, "layer4.0.conv3": 2048
    }  # fmt: skip
    stage = members(taken["layer2.0.conv3"])
    rows = [f"layer2.{at}.conv3.weight" for at in range(4)] + ["layer2.0.downsample.0.weight"]
    columns = [f"layer2.{at}.conv1.weight" for at in (1, 2, 3)] + [
        "layer3.0.conv1.weight",
        "layer3.0.downsample.0.weight",
    ]
    norms = {name for name, dim in stage if ".bn" in name or "downsample.1" in name}
    assert {key for key in stage if key[0] not in norms} == {(name, 0) for name in rows} | {
        (name, 1) for name in columns
    }
    assert len(norms) == 5 * 4
    assert {group.reason for group in groups} == {None, "comes from an input", "reaches an output"}
    after = free(folded(resnet50))
    assert [(group.name, group.size) for group in after] == [(group.name, group.size) for group in taken.values()]


@pytest.mark.parametrize("when", ["as captured", "folded"])
def test_resnet50_gets_smaller(resnet50: Program, when: str) -> None:
    program = resnet50 if when == "as captured" else folded(resnet50)
    before, ctx = sum(map(math.prod, shapes(program).values())), check_compaction(program)
    assert len(ctx.ledger) == 37
    left, _ = silenced(program, 0.3)
    compacted(left)
    # 0.7² of the convolutions between groups, 0.7 of the first and of the last layer.
    assert 0.48 < sum(map(math.prod, shapes(left).values())) / before < 0.53


def test_vit() -> None:
    timm = pytest.importorskip("timm")
    found = captured(timm.create_model("vit_tiny_patch16_224", depth=2, img_size=48), "batch", 3, 48, 48)
    groups = checked(found)
    assert [(group.name, group.size) for group in groups if group.reason is None] == [
        (f"blocks.{at}.{name}", size) for at in range(2)
        for name, size in (("attn.qkv", 3), ("attn.qkv", 64), ("mlp.fc1", 768))
    ]  # fmt: skip
    heads = members(next(group for group in groups if group.size == 3 and group.reason is None))
    assert heads["blocks.0.attn.qkv.weight", 0] == [
        [part * 192 + head * 64 + at for part in range(3) for at in range(64)] for head in range(3)
    ]
    assert heads["blocks.0.attn.proj.weight", 1] == [list(range(head * 64, head * 64 + 64)) for head in range(3)]
    stream = next(group for group in groups if group.size == 192)
    assert stream.reason == "is normalised over by layer_norm at blocks.0.norm1"
    assert {("cls_token", 2), ("pos_embed", 2), ("patch_embed.proj.weight", 0), ("head.weight", 1)} <= set(
        members(stream)
    )
    tokens = [group for group in groups if ("pos_embed", 1) in members(group)]
    assert tokens and all(group.reason for group in tokens)
    check_compaction(found)
    check_compaction(folded(found))


def test_mobilenet() -> None:
    torchvision = pytest.importorskip("torchvision")
    found = captured(torchvision.models.mobilenet_v3_small(), "batch", 3, 32, 32)
    groups = checked(found)
    taken = {group.name: members(group) for group in groups if group.reason is None}
    block = taken["features.4.block.0.0"]  # expansion, depthwise, squeeze and excitation, projection
    assert {key for key in block if ".1." not in key[0][len("features.4.block."):]} >= {
        ("features.4.block.0.0.weight", 0), ("features.4.block.1.0.weight", 0), ("features.4.block.2.fc1.weight", 1),
        ("features.4.block.2.fc2.weight", 0), ("features.4.block.2.fc2.bias", 0), ("features.4.block.3.0.weight", 1),
    }  # fmt: skip
    assert set(taken["features.4.block.2.fc1"]) == {
        ("features.4.block.2.fc1.weight", 0),
        ("features.4.block.2.fc1.bias", 0),
        ("features.4.block.2.fc2.weight", 1),
    }
    assert {group.reason for group in groups} == {None, "comes from an input", "reaches an output"}
    check_compaction(found)
    check_compaction(folded(found))


class Step(nn.Sequential):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__(nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU())


class UNet(nn.Module):
    """Two levels down and up again, with concats."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = Step(3, 4), Step(4, 6), Step(6, 8)
        self.up2, self.up1 = nn.ConvTranspose2d(8, 6, 2, 2), nn.ConvTranspose2d(5, 3, 2, 2)
        self.back2, self.back1, self.head = Step(12, 5), Step(7, 4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        two = self.two(F.max_pool2d(one, 2))
        x = self.up2(self.three(F.max_pool2d(two, 2)))
        x = self.up1(self.back2(torch.cat([x, two], 1)))
        return self.head(self.back1(torch.cat([one, x], 1)))


def test_a_unet_with_concats() -> None:
    found = captured(UNet(), "batch", 3, 16, 16)
    taken = {group.name: members(group) for group in checked(found) if not group.reason}
    assert taken["two.0"]["back2.0.weight", 1] == each(6, 6)
    assert taken["one.0"]["back1.0.weight", 1] == taken["one.0"]["two.0.weight", 1] == each(4)
    assert taken["up1"]["back1.0.weight", 1] == each(3, 4) and taken["up2"]["back2.0.weight", 1] == each(6)
    assert sorted(taken) == ["back1.0", "back2.0", "one.0", "three.0", "two.0", "up1", "up2"]
    for share in (0.3, 0.7):
        check_compaction(found, share)
        check_compaction(folded(found), share)


def test_gpt2() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=32, bos_token_id=0,
                                     eos_token_id=0)  # fmt: skip
    model = Fn(lambda m, x: m.gpt(x).logits, gpt=transformers.GPT2LMHeadModel(config))
    found = captured(model, "batch", "seq", dtype="int64", low=0, high=49)
    groups = checked(found)
    taken = [(group.name.removeprefix("gpt.transformer.h."), group.size) for group in groups if group.reason is None]
    assert taken == [(f"{at}.{name}", size) for at in range(2) for name, size in (
        ("attn.c_attn", 2), ("attn.c_attn", 8), ("attn.c_attn", 8), ("mlp.c_fc", 64)
    )]  # fmt: skip
    values = next(group for group in groups if group.size == 8 and len(group.members) == 3)
    assert members(values)["gpt.transformer.h.0.attn.c_attn.weight", 1] == [[32 + at, 40 + at] for at in range(8)]
    assert members(values)["gpt.transformer.h.0.attn.c_proj.weight", 0] == [[at, 8 + at] for at in range(8)]
    tied = next(group for group in groups if ("gpt.lm_head.weight", 0) in members(group))
    assert tied.reason == "reaches an output"
    check_compaction(found)
    check_compaction(folded(found))


class Shuffle(nn.Module):
    """Two units of ShuffleNet: half of the channels is worked on, then all are shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.units = nn.ModuleList(
            nn.Sequential(Step(4, 6), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 4, 1)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for unit in self.units:
            first, second = x.chunk(2, 1)
            x = torch.cat([first, unit(second)], 1)
            x = x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
        return self.head(x)


def test_shuffled_channels() -> None:
    found = captured(Shuffle(), "batch", 3, 8, 8)
    assert [(group.name, group.size) for group in free(found)][:3] == [("stem", 2), ("stem", 2), ("stem", 4)]
    check_compaction(found)


def test_a_llama() -> None:
    """Queries that share keys, rotary positions, and a gate beside every neuron."""
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16,
             "intermediate_size": 24, "vocab_size": 50, "max_position_embeddings": 32}  # fmt: skip
    model = Fn(lambda m, x: m.llama(x, use_cache=False).logits,
               llama=transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)))  # fmt: skip
    found = captured(model, "batch", "seq", dtype="int64", low=0, high=49)
    check_compaction(found, 0.5, columns=True)
