"""Prefix tuning against attention written out by hand, and against peft."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import fxfreeze as fz
from fxfreeze.adapt import AdaptedModule
from fxfreeze.api import rewrite
from fxfreeze.errors import PlanError

P, HEADS, WIDTH, LONGEST = 3, 4, 5, 32
X = fz.Input("x", ("batch", "seq", HEADS * WIDTH))


class Attention(nn.Module):
    """Attention in the form under test; `kind` names it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.groups = kind, 2 if kind == "grouped" else HEADS
        self.query = nn.Linear(HEADS * WIDTH, HEADS * WIDTH)
        self.key, self.value = (nn.Linear(HEADS * WIDTH, self.groups * WIDTH) for _ in range(2))
        self.register_buffer("bias", torch.randn(1, HEADS, 40, 40))

    def split(self, x: Tensor) -> list[Tensor]:
        q, k, v = self.query(x), self.key(x), self.value(x)
        return [part.unflatten(-1, (-1, WIDTH)).transpose(1, 2) for part in (q, k, v)]

    def mask(self, length: Any) -> Tensor | None:
        """What is added to the scores."""
        ones = torch.ones(length, length, dtype=torch.bool)
        masks = {
            "causal": ones.tril(), "band": ones.tril(1), "bias": self.bias[:, :, :length, :length],
            "row": (torch.arange(length) > 1)[:, None],
        }  # fmt: skip
        return masks.get(self.kind)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        if self.kind == "written":
            out = (
                functional.softmax(
                    (q @ k.transpose(-2, -1)) * WIDTH**-0.5 + self.bias[..., : x.shape[1], : x.shape[1]], -1
                )
                @ v
            )
        elif self.kind == "causal":
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            out = functional.scaled_dot_product_attention(
                q,
                k,
                v,
                self.mask(x.shape[1]),
                enable_gqa=self.groups != HEADS,
                scale=0.3 if self.kind == "band" else None,
            )
        return out.transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.attention = Attention(kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x)


def by_hand(module: Attention, x: Tensor, front_key: Tensor, front_value: Tensor) -> Tensor:
    """One query, one head at a time: what it sees is the prefix, and then what it saw before."""
    q, k, v = module.split(x)
    mask = module.bias[..., : x.shape[1], : x.shape[1]] if module.kind == "written" else module.mask(x.shape[1])
    out = torch.zeros_like(q)
    for b, h, i in ((b, h, i) for b in range(q.shape[0]) for h in range(HEADS) for i in range(q.shape[2])):
        group = h * module.groups // HEADS
        keys = torch.cat([front_key[group], k[b, group]])
        values = torch.cat([front_value[group], v[b, group]])
        scores = keys @ q[b, h, i] * (0.3 if module.kind == "band" else 1 / math.sqrt(WIDTH))
        if mask is not None:
            row = mask.expand(1, HEADS, q.shape[2], q.shape[2])[0, h, i]
            scores[P:] += row if row.is_floating_point() else torch.where(row, 0.0, -math.inf)
        out[b, h, i] = scores.softmax(0) @ values
    return out.transpose(1, 2).flatten(2)


def adapted(model: nn.Module, **step: Any) -> AdaptedModule:
    dtype = str(next(model.parameters()).dtype)
    plan = fz.Plan(
        [fz.Input(X.name, X.shape, dtype)],
        [fz.Prefix(**{"at": "attention", "tokens": P, **step})],
        dims={"seq": {"max": 20}},
        targets=[],
    )
    return fz.adapt(model, plan, verify="off")


@pytest.mark.parametrize("kind", ["plain", "causal", "grouped", "band", "bias", "row", "written"])
def test_a_prefix_is_more_keys_and_values_in_every_form_of_attention(kind: str) -> None:
    model = Model(kind).double()
    net = adapted(model)
    for name, value in net.named_parameters():
        assert value.shape == (model.attention.groups, P, WIDTH), name
        nn.init.normal_(value)
    front = {name.rpartition("_")[2]: value for name, value in net.named_parameters()}
    for batch, length in ((2, 6), (1, 9)):
        x = torch.randn(batch, length, HEADS * WIDTH, dtype=torch.float64)
        with torch.no_grad():
            wanted = by_hand(model.attention, x, front["key"], front["value"])
            assert torch.allclose(net(x), wanted, rtol=0, atol=1e-12)


def test_the_hidden_network_is_folded_to_constant_keys_and_values() -> None:
    net = adapted(Model("grouped"), hidden=7)
    assert {name.rpartition(".")[2]: tuple(value.shape) for name, value in net.named_parameters()} == {
        "prefix_embedding": (P, 10), "prefix_in_weight": (7, 10), "prefix_in_bias": (7,),
        "prefix_out_weight": (20, 7), "prefix_out_bias": (20,),
    }  # fmt: skip
    for value in net.parameters():
        nn.init.normal_(value)
    x = torch.randn(2, 5, 20)
    net(x).square().sum().backward()
    assert all(bool(value.grad.abs().sum() > 0) for value in net.parameters())
    done = rewrite(net, net.plan)
    operators = [str(node.target) for node in done.program.graph.nodes if node.op == "call_function"]
    assert "aten.tanh.default" not in operators
    assert operators.count("aten.linear.default") == 3
    assert done.lossless
    assert torch.allclose(done.program.run(x)[0], net(x), atol=1e-5)
    shapes = {tuple(value.shape) for name, value in done.program.state.items() if value.shape[-1:] == (WIDTH,)}
    assert shapes == {(2, P, WIDTH)}


# ---- against peft


IDS = fz.Input("input_ids", ("batch", "seq"), "int64", low=1, high=49)
MASK = fz.Input("attention_mask", ("batch", "seq"), "int64", low=1, high=1)


def gpt2(**more: Any) -> GPT2LMHeadModel:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 50, "n_positions": LONGEST}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, **more})).eval()


def bert(**more: Any) -> BertModel:
    return BertModel(BertConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=32,
                                vocab_size=50, max_position_embeddings=LONGEST, **more)).eval()  # fmt: skip


PEFT: dict[str, tuple[Any, str, str, str]] = {
    "gpt2": (gpt2, "transformer.h.*.attn", "CAUSAL_LM", "logits"),
    "bert": (bert, "encoder.layer.*.attention.self", "FEATURE_EXTRACTION", "last_hidden_state"),
}


def text_plan(at: str, output: str, longest: int = 20, **step: Any) -> fz.Plan:
    prefix = fz.Prefix(at=at, tokens=P, **step)
    return fz.Plan([IDS, MASK], [prefix], outputs=[output], dims={"seq": {"max": longest}}, targets=[])


@pytest.mark.parametrize("name, form", [("gpt2", "sdpa"), ("gpt2", "eager"), ("bert", "sdpa")])
def test_peft_prefix_tuning_files_are_read(name: str, form: str, tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    make, at, task, output = PEFT[name]
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=P)
    model = make(attn_implementation=form).double()
    theirs = peft.get_peft_model(model, config).eval()
    theirs.save_pretrained(tmp_path)
    file = str(tmp_path / "adapter_model.safetensors")
    ids, mask = torch.randint(1, 50, (3, 7)), torch.ones(3, 7, dtype=torch.int64)
    mask[0, 4:] = 0
    with torch.no_grad():
        wanted = theirs(input_ids=ids, attention_mask=mask)[output]
        net = fz.adapt(theirs.get_base_model(), text_plan(at, output, shift=True, weights=file), verify="off")
        assert torch.allclose(net(ids, mask)[output], wanted, rtol=0, atol=1e-12)
    if form == "eager":
        return
    with pytest.raises(PlanError, match="positions begin behind it"):
        fz.adapt(model, text_plan(at, output, weights=file), verify="off")
    with pytest.raises(PlanError, match="match every attention"):
        fz.adapt(model, text_plan(at.replace("*", "0"), output, shift=True, weights=file), verify="off")


# ---- what it refuses


def test_positions_behind_the_table_are_refused() -> None:
    with pytest.raises(PlanError, match="up to 29 fit, and the plan allows 30 for seq"):
        fz.adapt(gpt2(), text_plan("transformer.h.*.attn", "logits", longest=30, shift=True), verify="off")
    assert fz.adapt(gpt2(), text_plan("transformer.h.*.attn", "logits", longest=30), verify="off")


def test_a_shift_of_nothing_is_refused() -> None:
    with pytest.raises(PlanError, match="nothing in this model looks up or counts positions"):
        adapted(Model("plain"), shift=True)


def test_sites_without_attention_are_refused_with_their_reason() -> None:
    with pytest.raises(PlanError, match="runs no attention"):
        adapted(Model("plain"), at="attention.query")


def test_probabilities_that_are_returned_are_refused() -> None:
    class Both(Attention):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            q, k, v = self.split(x)
            seen = functional.softmax(q @ k.transpose(-2, -1), -1)
            return seen @ v, seen

    model = Model("plain")
    model.attention = Both("plain")
    with pytest.raises(PlanError, match="something else reads its probabilities"):
        adapted(model)


# ---- end to end


@pytest.mark.slow
def test_a_prompt_and_prefixes_are_in_every_target(tmp_path: Any) -> None:
    steps = [fz.Prompt(at="transformer.wte", tokens=2, keep="tokens"),
             fz.Prefix(at="transformer.h.*.attn", tokens=P, hidden=6, shift=True)]  # fmt: skip
    plan = fz.Plan([IDS, MASK], steps, outputs=["logits"], dims={"seq": {"max": 20}}, targets=["aoti", "onnx"])
    net = fz.adapt(gpt2(n_layer=1), plan)
    for value in net.parameters():
        nn.init.normal_(value)
    artifact = fz.compile(net, plan)
    artifact.save(tmp_path / "out")
    ids = torch.randint(1, 50, (3, 8))
    wanted = net(ids, torch.ones_like(ids))["logits"]
    assert wanted.shape == (3, 8, 50)
    loaded = fz.load(tmp_path / "out")
    assert torch.allclose(loaded(ids, torch.ones_like(ids))["logits"], wanted, atol=1e-4)
