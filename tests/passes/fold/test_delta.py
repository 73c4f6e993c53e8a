"""Folding of LoRA, DoRA, IA3, VeRA and OFT: proven, compared with peft and with weights by hand; wrong ones caught."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.adapt import Origins
from fxfreeze.api import rewrite
from fxfreeze.capture import capture
from fxfreeze.passes import PIPELINE
from fxfreeze.passes._adapters import changed
from fxfreeze.passes.adapt.delta import InsertDelta
from fxfreeze.passes.fold.delta import FoldDelta
from fxfreeze.pipeline import proof_draws, run_passes, stage_passes
from fxfreeze.program import Origin, Program
from fxfreeze.proof import lifted_run
from fxfreeze.rewrite import Context, LedgerRow


def digest(model: nn.Module) -> str:
    sha = hashlib.sha256()
    for name, value in model.state_dict().items():
        sha.update(name.encode() + value.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def train(net: nn.Module, amount: float = 0.5) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * amount)


def fold(net: fz.AdaptedModule, item: FoldDelta | None = None, verify: Any = "full") -> tuple[Program, list[LedgerRow]]:
    """The fold alone, proven."""
    program, ctx = net.program(), Context(net.plan)
    rows, _ = run_passes(program, [item or FoldDelta()], ctx, draws=proof_draws(program, verify))
    assert rows[0].rewrites
    assert not program.trainable()
    return program, list(ctx.ledger)


def operators(program: Program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


class Mixed(nn.Module):
    """Every layout, each layer reading the one before; `twice` runs twice in a row."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 4)
        self.conv = nn.Conv1d(4, 6, 3, padding=1, padding_mode="reflect", dilation=1)
        self.grouped = nn.Conv1d(6, 4, 2, groups=2, padding="same", dilation=2, bias=False)
        self.up = nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2)
        self.c1d = Conv1D(4, 6)
        self.twice = nn.Linear(4, 4)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)

    def forward(self, ids: Tensor) -> dict[str, Any]:
        h = self.embed(ids).transpose(1, 2)
        h = torch.tanh(self.up(torch.tanh(self.grouped(torch.tanh(self.conv(h))))))
        return {"out": self.twice(self.twice(torch.tanh(self.c1d(h.transpose(1, 2).contiguous())))), "hidden": h}


IDS = [fz.Input("ids", ("batch", 7), "int64", 0, 10)]
EVERY = ["embed", "conv", "grouped", "up", "c1d", "twice"]
STEPS: dict[str, list[Any]] = {
    "lora": [fz.LoRA(at=EVERY, rank=3, alpha=5)],
    "dora": [fz.DoRA(at=EVERY, rank=2, alpha=3)],
    "ia3-out": [fz.IA3(at=EVERY)],
    "ia3-in": [fz.IA3(at=EVERY, side="in")],
    "vera": [fz.VeRA(at=EVERY, rank=2)],
    "lora, ia3-in": [fz.LoRA(at=EVERY, rank=2), fz.IA3(at=EVERY, side="in")],
    "ia3-out, lora, lora": [fz.IA3(at=EVERY), fz.LoRA(at=EVERY, rank=2), fz.LoRA(at=EVERY, rank=1)],
    "ia3-in, dora, lora, ia3-out": [
        fz.IA3(at=EVERY, side="in"), fz.DoRA(at=EVERY, rank=2), fz.LoRA(at=EVERY, rank=1), fz.IA3(at=EVERY)
    ],
}  # fmt: skip


@cache
def captured() -> tuple[Mixed, Program]:
    model = Mixed()
    return model, capture(model, fz.Plan(IDS))[0]


def mixed(*steps: Any, amount: float = 0.5) -> tuple[Mixed, fz.AdaptedModule]:
    """`fz.adapt(Mixed(), ...)`, trained, without capturing it every time."""
    (model, program), plan = captured(), fz.Plan(IDS, steps)
    program, ctx = program.clone(), Context(plan)
    run_passes(program, stage_passes(PIPELINE, ("clean", "adapt")), ctx, verify="off")
    net = fz.AdaptedModule(Origins(program, plan, ctx.ledger))
    train(net, amount)
    return model, net


@pytest.mark.parametrize("steps", STEPS)
def test_a_fold_is_proven_and_leaves_the_bare_model(steps: str) -> None:
    before = digest(captured()[0])
    model, net = mixed(*STEPS[steps])
    bare = mixed()[1].program()
    program, ledger = fold(net)  # proven to 1e-10
    assert operators(program) == operators(bare)
    assert set(program.state) == set(bare.state)
    assert [(row.site, row.step) for row in ledger] == [(path, step.name) for path in EVERY for step in net.plan.steps]
    assert all("with the adapter in its weight" in row.executes for row in ledger)
    assert {item.site for item in program.folds.values()} == set(EVERY)
    assert digest(model) == before


@pytest.mark.parametrize("steps", ["lora", "dora", "ia3-in, dora, lora, ia3-out"])
def test_what_is_compiled_in_the_end_has_the_structure_of_the_bare_model(steps: str) -> None:
    """So a folded adapter costs no time: every target's compiler is given the graph it would get without one."""
    model, net = mixed(*STEPS[steps])
    folded = rewrite(net, fz.Plan(IDS, STEPS[steps], targets=()), verify="off")
    bare = rewrite(model, fz.Plan(IDS, targets=()), verify="off")
    assert folded.program.structural_hash() == bare.program.structural_hash()


def test_a_fold_keeps_what_it_adds_to() -> None:
    model, net = mixed(*STEPS["lora"])
    program, _ = fold(net)
    item = program.folds["twice.weight"]
    assert item.base.value().data_ptr() == model.twice.weight.data_ptr()
    assert program.state.tensor("twice.weight").data_ptr() == model.twice.weight.data_ptr()
    a, b = (net.adapter_state()[f"adapters.lora.twice.lora_{leaf}"].double() for leaf in "AB")
    delta = program.state["twice.weight"] - item.base.value()
    torch.testing.assert_close(delta, 5 / 3 * b @ a, rtol=1e-12, atol=1e-12)


def test_an_untrained_adapter_leaves_the_constants() -> None:
    model, net = mixed(fz.LoRA(at=EVERY, rank=2), fz.IA3(at=EVERY), amount=0)
    program, ledger = fold(net)
    assert program.state["conv.weight"].data_ptr() == model.conv.weight.data_ptr()
    assert not program.folds and {row.detail for row in ledger} == {"the weight stays as it is"}


def test_an_untrained_dora_is_not_measured_as_a_loss() -> None:
    program, _ = fold(mixed(*STEPS["dora"], amount=0)[1])
    assert not program.folds


# ---- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_fold_exactly(dtype: torch.dtype) -> None:
    net = fz.adapt(Mixed().to(dtype), fz.Plan(IDS, STEPS["ia3-in, dora, lora, ia3-out"]), verify="off")
    train(net)
    program, _ = fold(net)
    constants = [node for node in program.graph.nodes if node.op == "get_attr"]
    assert {node.meta["val"].dtype for node in constants} == {dtype}
    assert not any(name.startswith("aten.to") for name in operators(program))


def test_a_lora_that_bfloat16_would_swallow_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32)).bfloat16()
    plan = fz.Plan([fz.Input("x", ("batch", 32), "bfloat16")], [fz.LoRA(at="0", rank=2)])
    net = fz.adapt(model, plan, verify="off")
    train(net, 1e-3)
    with pytest.raises(fz.PassError, match="of its change is lost"):
        program = net.program()
        run_passes(program, [item for item in PIPELINE if item.stage in ("fold", "lower")], Context(plan))


# ---- tied parameters


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.head = nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> dict[str, Any]:
        h = self.wte(ids)
        return {"hidden": h, "logits": self.head(torch.tanh(h))}


@pytest.mark.parametrize("path", ["wte", "head"])
def test_a_tied_weight_is_untied(path: str) -> None:
    model, ids = Tied(), torch.randint(0, 11, (2, 7))
    net = fz.adapt(model, fz.Plan(IDS, [fz.LoRA(at=path, rank=2)]), verify="off")
    train(net)
    program, ledger = fold(net)
    hidden, logits = program.run(ids)
    a, b = (net.adapter_state()[f"adapters.lora.{path}.lora_{leaf}"] for leaf in "AB")
    delta = b @ a if path == "head" else (b @ a).T
    base, new = model.wte.weight, model.wte.weight + delta
    expected = (base if path == "head" else new)[ids]
    torch.testing.assert_close(hidden, expected)
    torch.testing.assert_close(logits, torch.tanh(expected) @ (new if path == "head" else base).T)
    other = {"wte": "head", "head": "wte"}[path]
    assert f"which {other} reads unchanged" in ledger[0].detail and "a copy of" in ledger[0].detail


def test_both_ends_of_a_tied_weight_fold() -> None:
    net = fz.adapt(Tied(), fz.Plan(IDS, [fz.LoRA(at=["wte", "head"], rank=2)]), verify="off")
    train(net)
    program, _ = fold(net)
    assert len(program.state) == 2 and len(program.folds) == 2


def test_gpt2_keeps_its_embedding_when_its_head_is_adapted() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    size = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0)).eval()
    before = digest(model)
    plan = fz.Plan(
        [fz.Input("input_ids", ("batch", "seq"), "int64", 0, 49)],
        [fz.LoRA(at=["lm_head", "transformer.h.*.attn.c_attn"], rank=2)],
        outputs=["logits"], dims={"seq": fz.Dim(max=16)},
    )  # fmt: skip
    net = fz.adapt(model, plan)
    train(net)
    program, ledger = fold(net)
    table = next(node for node in program.graph.nodes if program.module_path(node) == "transformer.wte").args[0]
    assert torch.equal(program.state[str(table.target)], model.transformer.wte.weight)
    assert "which transformer.wte reads unchanged" in next(row.detail for row in ledger if row.site == "lm_head")
    assert digest(model) == before


# ---- wrong folds


class Off(FoldDelta):
    """A fold with a mistake in it."""

    def __init__(self, mistake: Callable[..., Any]) -> None:
        self.mistake = mistake

    def change(self, step: Any, operator: Any, weight: Tensor, bias: Any, values: Mapping[str, Tensor]) -> Any:
        return self.mistake(step, operator, weight, bias, dict(values))


def scale_off(step: Any, operator: Any, weight: Tensor, bias: Any, values: dict[str, Tensor]) -> Any:
    values["lora_B"] = values["lora_B"] * (1 + 1e-6)
    return changed(step, operator, weight, bias, values)


def transposed(step: Any, operator: Any, weight: Tensor, bias: Any, values: dict[str, Tensor]) -> Any:
    a, b = values["lora_A"].flatten(1), values["lora_B"].flatten(1)
    values.update(lora_A=a.T.reshape(values["lora_A"].shape), lora_B=b.T.reshape(values["lora_B"].shape))
    return changed(step, operator, weight, bias, values)


def without_magnitude(step: Any, operator: Any, weight: Tensor, bias: Any, values: dict[str, Tensor]) -> Any:
    return changed(fz.LoRA(at="x", rank=step.rank, alpha=step.alpha), operator, weight, bias, values)


def norm_of_the_base(step: Any, operator: Any, weight: Tensor, bias: Any, values: dict[str, Tensor]) -> Any:
    norm = weight.flatten(1).norm(dim=1)
    lora = fz.LoRA(at="x", rank=step.rank, alpha=step.alpha)
    weight, bias = changed(lora, operator, weight, bias, values)
    return weight * (values["lora_magnitude"] / norm).reshape(operator.per_row()), bias


def bias_scaled(step: Any, operator: Any, weight: Tensor, bias: Any, values: dict[str, Tensor]) -> Any:
    weight, bias = changed(step, operator, weight, bias, values)
    return weight, None if bias is None else bias * (1 + 1e-6)


def bias_forgotten(step: Any, operator: Any, weight: Tensor, bias: Any, values: dict[str, Tensor]) -> Any:
    return changed(step, operator, weight, bias, values)[0], bias


def other_side(step: Any, operator: Any, weight: Tensor, bias: Any, values: dict[str, Tensor]) -> Any:
    side = {"in": "out", "out": "in"}[step.side]
    return changed(fz.IA3(at="x", side=side), operator, weight, bias, values)


def rotated_back(step: Any, operator: Any, weight: Tensor, bias: Any, values: dict[str, Tensor]) -> Any:
    return changed(step, operator, weight, bias, {"oft_R": -values["oft_R"]})


def series_of_the_transform(step: Any, operator: Any, weight: Tensor, bias: Any, values: dict[str, Tensor]) -> Any:
    return changed(step.model_copy(update={"terms": 6}), operator, weight, bias, values)


def bias_unscaled(step: Any, operator: Any, weight: Tensor, bias: Any, values: dict[str, Tensor]) -> Any:
    return changed(step, operator, weight, bias, values | {"lora_bias": values["lora_bias"] / step.scale})


def other_columns(step: Any, operator: Any, weight: Tensor, bias: Any, values: dict[str, Tensor]) -> Any:
    return changed(step, operator, weight, bias, values | {"vera_A": values["vera_A"].flip(1)})


@pytest.mark.parametrize(
    ("step", "mistake"),
    [
        (fz.OFT(at="twice", block_size=4), rotated_back),
        (fz.OFT(at="embed", block_size=2), rotated_back),
        (fz.OFT(at="c1d", block_size=3, terms=5), series_of_the_transform),
        (fz.VeRA(at=["twice", "up"], rank=2), other_columns),
        (fz.LoRA(at="twice", rank=2, alpha=5, bias=True), bias_unscaled),
        (fz.LoRA(at="up", rank=2, alpha=5, bias=True), bias_unscaled),
        (fz.LoRA(at="twice", rank=4), scale_off),
        (fz.LoRA(at="twice", rank=4), transposed),
        (fz.LoRA(at="twice", rank=4), bias_scaled),
        (fz.LoRA(at="conv", rank=4), scale_off),
        (fz.LoRA(at="embed", rank=4), scale_off),
        (fz.DoRA(at="twice", rank=4), scale_off),
        (fz.DoRA(at="twice", rank=2), without_magnitude),
        (fz.DoRA(at="up", rank=2), norm_of_the_base),
        (fz.IA3(at="twice"), bias_forgotten),
        (fz.IA3(at="twice"), other_side),
        (fz.IA3(at="twice", side="in"), other_side),
    ],
    ids=lambda value: f"{value.kind}-{value.at}" if isinstance(value, fz.plan.Step) else value.__name__,
)
def test_the_proof_rejects_a_wrong_fold(step: Any, mistake: Any) -> None:
    _, net = mixed(step)
    with pytest.raises(fz.ProofError, match="'fold-delta' is not exact"):
        fold(net, Off(mistake), verify="sampled")


# ---- regions that cannot be folded


def test_a_value_read_from_inside_an_adapter_keeps_it_unfolded() -> None:
    _, net = mixed(fz.LoRA(at=["twice", "c1d"], rank=2))
    program, ctx = net.program(), Context(net.plan)
    inner = next(node for node in program.graph.nodes if node.meta.get("fxfreeze") == Origin("lora", "BASE", "c1d"))
    output = program.graph.output_node()
    leak = program.call(torch.ops.aten.sum.default, inner, before=output, like=output)
    output.args = ((*output.args[0], leak),)
    program.outputs += ("leak",)
    rows, _ = run_passes(program, [FoldDelta()], ctx)
    assert rows[0].rewrites == 2
    row = next(row for row in ctx.ledger if row.site == "c1d")
    assert row.outcome == "refused" and "is used elsewhere" in row.detail
    assert program.trainable() == [f"adapters.lora.c1d.lora_{leaf}" for leaf in "AB"]


def test_a_program_adapted_under_another_plan_is_refused() -> None:
    _, net = mixed(fz.LoRA(at="twice", rank=2))
    with pytest.raises(fz.PassError, match="steps the plan does not have: lora"):
        run_passes(net.program(), [FoldDelta()], Context(fz.Plan(IDS)))


# ---- against peft: the adapted module, its gradients, and the fold


def peft_pair(config: Any, model: nn.Module, steps: list[Any], inputs: list[fz.Input]) -> tuple[Any, fz.AdaptedModule]:
    """A peft model with drawn adapter values, and ours with the same ones."""
    import peft

    ours = fz.adapt(model, fz.Plan(inputs, steps), verify="off")
    theirs = peft.get_peft_model(copy.deepcopy(model), config).double().eval()
    generator, copied = torch.Generator().manual_seed(1), {}
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if value.requires_grad:
                value.add_(torch.randn(value.shape, generator=generator) * 0.5)
                copied[name] = value
        for name, value in ours.named_parameters():
            _, _, path, leaf = [name, *name.split(".", 2)[1:2], *name.split(".", 2)[2].rsplit(".", 1)]
            value.copy_(copied.pop(theirs_name(path, leaf, copied)).reshape(value.shape))
    assert not copied
    return theirs, ours


def theirs_name(path: str, leaf: str, known: Mapping[str, Tensor]) -> str:
    leaves = {
        "lora_A": ("lora_A.default.weight", "lora_embedding_A.default"),
        "lora_B": ("lora_B.default.weight", "lora_embedding_B.default"),
        "lora_magnitude": ("lora_magnitude_vector.default.weight",),
        "ia3": ("ia3_l.default",),
        "lambda_b": ("vera_lambda_b.default",),
        "lambda_d": ("vera_lambda_d.default",),
        "oft_R": ("oft_R.default.weight", "oft_embedding_R.default.weight"),
    }[leaf]
    return next(name for tail in leaves if (name := f"base_model.model.{path}.{tail}") in known)


class Supported(nn.Module):
    """Layers that peft adapts correctly."""

    def __init__(self, conv3d: bool = False) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        self.embed, self.c1d = nn.Embedding(11, 4), Conv1D(6, 4)
        self.conv = nn.Conv2d(6, 4, (2, 3), stride=(1, 2), padding=1)
        self.fc = nn.Linear(4, 3)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)
        self.double()

    def forward(self, ids: Tensor) -> Any:
        h = torch.tanh(self.c1d(self.embed(ids)))  # [batch, 7, 6]
        h = torch.tanh(self.conv(torch.stack([h, h * h], dim=-1).transpose(1, 2)))
        return self.fc(h.mean((2, 3)))


NAMES = ["embed", "c1d", "conv", "fc"]


def configurations() -> dict[str, tuple[Any, list[Any]]]:
    import peft

    def lora(**options: Any) -> Any:
        return peft.LoraConfig(target_modules=NAMES, fan_in_fan_out=False, **options)

    return {
        "lora": (lora(r=3, lora_alpha=5), [fz.LoRA(at=NAMES, rank=3, alpha=5)]),
        "rslora": (lora(r=2, lora_alpha=5, use_rslora=True), [fz.LoRA(at=NAMES, rank=2, alpha=5, rslora=True)]),
        "dora": (lora(r=2, lora_alpha=3, use_dora=True), [fz.DoRA(at=NAMES, rank=2, alpha=3)]),
        "ia3": (
            peft.IA3Config(target_modules=NAMES[1:], feedforward_modules=["fc"]),
            [fz.IA3(at=["c1d", "conv"]), fz.IA3(at="fc", side="in")],
        ),
        "vera": (
            peft.VeraConfig(r=3, target_modules=["c1d", "fc"], projection_prng_key=4),
            [fz.VeRA(at=["c1d", "fc"], rank=3, seed=4)],
        ),
        "oft": (
            peft.OFTConfig(oft_block_size=2, target_modules=["embed", "fc"], use_cayley_neumann=False),
            [fz.OFT(at=["embed", "fc"], block_size=2)],
        ),
        "oft_series": (
            peft.OFTConfig(oft_block_size=4, target_modules=["embed", "fc"], block_share=True),
            [fz.OFT(at=["embed", "fc"], block_size=4, share=True, terms=5)],
        ),
    }


@pytest.mark.parametrize("name", ["lora", "rslora", "dora", "ia3", "vera", "oft", "oft_series"])
@pytest.mark.filterwarnings("ignore")
def test_values_gradients_and_fold_are_those_of_peft(name: str) -> None:
    config, steps = configurations()[name]
    theirs, ours = peft_pair(config, Supported(), steps, IDS)
    ids = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(2))
    expected, actual = theirs(ids), ours(ids)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for result in (expected, actual):
        result.square().sum().backward()
    grads = {key: value.grad for key, value in theirs.named_parameters() if value.grad is not None}
    for key, value in ours.named_parameters():
        path, leaf = key.split(".", 2)[2].rsplit(".", 1)
        expected_grad = grads.pop(theirs_name(path, leaf, grads))
        assert value.grad is not None and value.grad.abs().max() > 1e-6
        torch.testing.assert_close(value.grad, expected_grad.reshape(value.shape), rtol=1e-10, atol=1e-10)
    assert not grads
    program, _ = fold(ours)
    torch.testing.assert_close(lifted_run(program, [ids])[0], expected.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_reflect_padding_folds_where_peft_merges_wrongly() -> None:
    """peft's branch pads with zeros while its base reflects, and merging makes that one convolution."""
    import peft

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.Tanh()).double()
    steps, x = [fz.LoRA(at="0", rank=2)], torch.randn(2, 3, 5, 5, dtype=torch.float64)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["0"])
    theirs, ours = peft_pair(config, model, steps, [fz.Input("x", ("batch", 3, 5, 5), "float64")])
    program, _ = fold(ours)
    folded = lifted_run(program, [x])[0]
    torch.testing.assert_close(folded, ours(x).detach(), rtol=1e-12, atol=1e-12)
    before = theirs(x).detach()
    merged = theirs.merge_and_unload()(x).detach()
    assert (merged - before).abs().max() > 0.01
    torch.testing.assert_close(folded, merged, rtol=1e-12, atol=1e-12)


def test_insertion_and_fold_are_in_the_pipeline_in_this_order() -> None:
    kinds = [type(item) for item in PIPELINE]
    assert kinds.index(InsertDelta) < kinds.index(FoldDelta)
    assert next(item for item in PIPELINE if item.stage == "fold").name == "fold-delta"


class Placed(nn.Module):
    """A bottleneck that adapts a position embedding, as models of images have: its input is a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(1, 7, 12))
        self.down, self.up, self.head = nn.Linear(12, 4), nn.Linear(4, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.place + self.up(self.down(self.place).relu()))


@pytest.mark.parametrize("step", [
    fz.LoRA(at=["up", "down"], rank=2), fz.DoRA(at="down", rank=2), fz.IA3(at="up", side="in"),
])  # fmt: skip
def test_adapters_of_a_constant_are_folded_away_with_it(step: Any) -> None:
    net = fz.adapt(Placed(), fz.Plan([fz.Input("x", ("batch", 7, 12))], [step], targets=[]))
    train(net)
    done = rewrite(net, net.plan)
    assert [name for name in operators(done.program) if "add" not in name] == ["aten.linear.default"]
    assert not done.program.folds
    x = torch.randn(2, 7, 12)
    assert torch.allclose(done.program.run(x)[0], net(x), atol=1e-5)
