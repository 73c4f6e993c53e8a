"""Prompt tuning against the eager model on embeddings with the prompt in front, and against peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import fxfreeze as fz
from fxfreeze.api import rewrite
from fxfreeze.errors import PlanError

P, LONGEST = 4, 32
IDS = fz.Input("input_ids", ("batch", "seq"), "int64", low=1, high=49)
MASK = fz.Input("attention_mask", ("batch", "seq"), "int64", low=1, high=1)
TYPES = fz.Input("token_type_ids", ("batch", "seq"), "int64", low=0, high=1)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 50, "n_positions": LONGEST}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


def bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=32, vocab_size=50,
                        max_position_embeddings=LONGEST)  # fmt: skip
    return BertModel(config).eval()


MODELS: dict[str, tuple[Any, str, list[str]]] = {
    "gpt2": (gpt2, "transformer.wte", ["logits"]),
    "bert": (bert, "embeddings.word_embeddings", ["last_hidden_state", "pooler_output"]),
}


def plan_for(
    at: str, outputs: list[str] | None, inputs: list[fz.Input], longest: int | None = 20, **step: Any
) -> fz.Plan:
    prompt = fz.Prompt(at=at, tokens=P, **step)
    return fz.Plan(inputs, [prompt], outputs=outputs, dims={"seq": {"max": longest}} if longest else {}, targets=[])


def drawn(inputs: list[fz.Input], batch: int, length: int) -> dict[str, torch.Tensor]:
    values = {item.name: torch.randint(item.low, item.high + 1, (batch, length)) for item in inputs}
    if "attention_mask" in values:
        values["attention_mask"][0, length // 2 :] = 0
    return values


def eager(model: nn.Module, prompt: torch.Tensor, values: dict[str, torch.Tensor]) -> Any:
    """transformers' own path for embeddings, with everything written out."""
    given = dict(values)
    embedded = model.get_input_embeddings()(given.pop("input_ids"))
    rows, ones = embedded.shape[0], torch.ones(embedded.shape[0], P, dtype=torch.int64)
    for name, front in (("attention_mask", ones), ("token_type_ids", 0 * ones)):
        if name in given:
            given[name] = torch.cat([front, given[name]], 1)
    return model(inputs_embeds=torch.cat([prompt.expand(rows, -1, -1), embedded], 1), **given)


@pytest.mark.parametrize("name, inputs, keep", [
    ("gpt2", [IDS], "tokens"), ("gpt2", [IDS, MASK], "all"), ("bert", [IDS], "all"),
    ("bert", [IDS, MASK, TYPES], "tokens"),
])  # fmt: skip
def test_a_prompt_is_what_the_model_makes_of_longer_embeddings(name: str, inputs: list[fz.Input], keep: str) -> None:
    make, at, outputs = MODELS[name]
    model = make().double()
    net = fz.adapt(model, plan_for(at, outputs, inputs, keep=keep), verify="off")
    (prompt,) = net.parameters()
    assert prompt.shape == (P, 16)
    assert prompt.dtype == torch.float64
    with torch.no_grad():
        prompt.normal_()
        for batch, length in ((3, 6), (1, 9), (2, 20)):
            values = drawn(inputs, batch, length)
            wanted, found = eager(model, prompt, values), net(**values)
            for output in outputs:
                full = wanted[output]
                cut = full[:, P:] if keep == "tokens" and full.ndim == 3 else full
                assert torch.allclose(found[output], cut, rtol=0, atol=1e-12)


def test_a_prompt_trains_and_folds_to_a_constant() -> None:
    plan = plan_for("transformer.wte", ["logits"], [IDS])
    net = fz.adapt(gpt2(), plan)
    net(torch.randint(1, 50, (2, 6)))["logits"].square().mean().backward()
    (prompt,) = net.parameters()
    assert bool((prompt.grad.abs().sum(1) > 0).all())
    done = rewrite(net, plan)
    assert done.lossless
    x = torch.randint(1, 50, (3, 8))
    assert torch.allclose(done.program.run(x)[0], net(x)["logits"], atol=1e-5)
    rows = [row for row in done.ledger if row.step == "prompt"]
    assert [row.outcome for row in rows] == ["rewritten"]
    assert "sequences of up to 28 fit" in rows[0].detail


def test_a_file_may_hold_the_adapters_of_the_whole_plan(tmp_path: Any) -> None:
    model, file = Reader(lambda x, _: x), str(tmp_path / "all.safetensors")

    def plan(weights: str | None) -> fz.Plan:
        steps = [fz.Prompt(at="table", tokens=P, weights=weights), fz.LoRA(at="line", rank=2, weights=weights)]
        return fz.Plan([IDS], steps, dims={"seq": {"max": 20}}, targets=[])

    net = fz.adapt(model, plan(None), verify="off")
    with torch.no_grad():
        for value in net.parameters():
            value.normal_()
    net.save_adapters(file)
    x = torch.randint(1, 50, (2, 5))
    assert torch.equal(fz.adapt(model, plan(file), verify="off")(x), net(x))


def test_a_half_precision_model_keeps_a_wide_prompt() -> None:
    model = gpt2().bfloat16()
    net = fz.adapt(model, plan_for("transformer.wte", ["logits"], [IDS]), verify="off")
    (prompt,) = net.parameters()
    assert prompt.dtype == torch.float32
    x = torch.randint(1, 50, (2, 6))
    wanted = eager(model, prompt.detach().bfloat16(), {"input_ids": x})["logits"]
    assert torch.allclose(net(x)["logits"].float(), wanted.float(), atol=1e-2)


def test_a_prompt_starts_as_rows_of_the_embedding() -> None:
    model = gpt2()
    rows = model.get_input_embeddings().weight
    near = fz.adapt(
        model, plan_for("transformer.wte", ["logits"], [IDS], start="vocabulary"), verify="off"
    ).adapter_state()
    (prompt,) = near.values()
    assert all(bool((rows == row).all(1).any()) for row in prompt)
    again = fz.adapt(
        model, plan_for("transformer.wte", ["logits"], [IDS], start="random"), verify="off"
    ).adapter_state()
    assert not any(bool((rows == row).all(1).any()) for row in next(iter(again.values())))


@pytest.mark.parametrize("name, task", [("gpt2", "CAUSAL_LM"), ("bert", "FEATURE_EXTRACTION")])
def test_peft_prompt_tuning_files_are_read(name: str, task: str, tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    make, at, outputs = MODELS[name]
    theirs = peft.get_peft_model(make().double(), peft.PromptTuningConfig(task_type=task, num_virtual_tokens=P)).eval()
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.normal_()
    theirs.save_pretrained(tmp_path)
    file = str(tmp_path / "adapter_model.safetensors")
    plan = plan_for(at, outputs, [IDS, MASK], weights=file)
    values = drawn([IDS, MASK], 3, 7)
    with torch.no_grad():
        wanted = theirs(**values)
    # Their file is float32 where the module was float64 too: compare with what they run.
    found = fz.adapt(make().double(), plan, verify="off")(**values)
    for output in outputs:
        assert torch.allclose(found[output], wanted[output].double(), rtol=0, atol=1e-6)


# ---- what it refuses


class Reader(nn.Module):
    """An embedding, and a forward to try things in."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.table, self.line, self.body = nn.Embedding(50, 6), nn.Linear(6, 6), body

    def forward(self, input_ids: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        return self.body(self.line(self.table(input_ids)), other)


def refusal(model: nn.Module, plan: fz.Plan) -> str:
    with pytest.raises(PlanError) as caught:
        fz.adapt(model, plan, verify="off")
    return str(caught.value)


def test_tables_that_are_too_short_are_refused() -> None:
    text = refusal(gpt2(), plan_for("transformer.wte", ["logits"], [IDS], longest=30))
    assert "the model has 32 positions, of which the prompt takes 4" in text
    assert "Dim(max=28)" in text


def test_without_bounds_the_longest_sequence_is_the_tables_less_the_prompt() -> None:
    net = fz.adapt(gpt2(), plan_for("transformer.wte", ["logits"], [IDS], longest=None), verify="off")
    assert net(torch.ones(1, 28, dtype=torch.int64))["logits"].shape == (1, 32, 50)
    with pytest.raises(PlanError, match="seq"):
        net(torch.ones(1, 29, dtype=torch.int64))


def test_a_fixed_length_is_refused() -> None:
    inputs = [fz.Input("input_ids", ("batch", 8), "int64", low=1, high=49)]
    plan = fz.Plan(inputs, [fz.Prompt(at="table", tokens=P)])
    assert "fixed to 8" in refusal(Reader(lambda x, _: x), plan)


def test_a_size_that_does_not_follow_is_refused() -> None:
    scale = torch.rand(20, 6)
    text = refusal(Reader(lambda x, _: x * scale[: x.shape[1]]), plan_for("table", None, [IDS]))
    assert "a size is baked into" in text
    assert "aten.slice" in text


def test_inputs_that_are_not_known_must_be_told() -> None:
    other = fz.Input("other", ("batch", "seq"), low=0, high=1)
    model = Reader(lambda x, other: x * other[..., None])
    assert "fill={'other': ...}" in refusal(model, plan_for("table", None, [IDS, other]))
    net = fz.adapt(model, plan_for("table", None, [IDS, other], fill={"other": 0.5}))
    (prompt,) = net.parameters()
    x, scale = torch.randint(1, 50, (2, 5)), torch.rand(2, 5)
    assert torch.allclose(net(x, scale)[:, :P], (model.line(prompt) * 0.5).expand(2, -1, -1), atol=1e-6)


def test_an_input_with_the_dim_twice_is_refused() -> None:
    other = fz.Input("other", ("batch", "seq", "seq"), "bool")
    model = Reader(lambda x, other: other.to(x.dtype) @ x)
    assert "more than once" in refusal(model, plan_for("table", None, [IDS, other]))


def test_what_is_no_embedding_is_refused_with_its_reason() -> None:
    model = Reader(lambda x, _: x)
    assert "a prompt stands behind an embedding" in refusal(model, plan_for("line", None, [IDS]))
    plan = fz.Plan([IDS], [fz.Prompt(at="table", tokens=1), fz.Prompt(at="table", tokens=1)])
    assert "a second prompt" in refusal(model, plan)


def test_rows_that_cannot_be_cut_off_are_refused() -> None:
    flat = Reader(lambda x, _: x.flatten(1))
    assert "grows by 24" in refusal(flat, plan_for("table", None, [IDS], keep="tokens"))
    assert fz.adapt(flat, plan_for("table", None, [IDS]))(torch.ones(1, 3, dtype=torch.int64)).shape == (1, 42)


def test_a_model_that_looks_for_padding_sees_none_in_the_prompt() -> None:
    """Positions counted from ids that are no padding, as RoBERTa does."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.places = nn.Embedding(50, 6, padding_idx=0), nn.Embedding(40, 6)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            real = (input_ids != 0).long()
            return self.table(input_ids) + self.places(real.cumsum(1) * real)

    model = Counting()
    net = fz.adapt(model, plan_for("table", None, [fz.Input("input_ids", ("batch", "seq"), "int64", low=0, high=49)]))
    (prompt,) = net.parameters()
    x = torch.tensor([[7, 8, 0, 0]])
    wanted = torch.cat([prompt + model.places.weight[1:5], model.table(x[0]) + model.places.weight[[5, 6, 0, 0]]])
    assert torch.allclose(net(x)[0], wanted, atol=1e-6)
