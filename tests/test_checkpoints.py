"""peft checkpoints read as steps: what peft's own, unmerged forward computes, or a refusal that says why not."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.api import Compilation, rewrite
from fxfreeze.plan import Step

peft = pytest.importorskip("peft", reason="peft is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        self.norm = nn.LayerNorm(12)
        self.out = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.out(self.norm(torch.cat([self.q(x), self.v(x)[..., :4]], dim=-1))))


class Net(nn.Module):
    """Every layer that peft adapts, and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        self.embed, self.c1d = nn.Embedding(11, 8), Conv1D(8, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.conv, self.point = nn.Conv2d(8, 4, (2, 3), stride=(1, 2), padding=1), nn.Conv2d(4, 8, 1)
        self.lm_head = nn.Linear(8, 11, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.c1d(self.embed(ids)))
        for block in self.blocks:
            h = block(h)
        h = torch.tanh(self.conv(torch.stack([h, h * h], dim=-1).transpose(1, 2)))
        return self.lm_head(torch.tanh(self.point(h)).mean((2, 3)))


IDS = [fz.Input("ids", ("batch", 5), "int64", 0, 10)]
NAMES = ["embed", "c1d", "q", "v", "conv", "point"]


def trained(config: Any, folder: Path, model: nn.Module | None = None, seed: int = 1) -> tuple[nn.Module, nn.Module]:
    """A model, and the same wrapped by peft with drawn values in all that trains, saved to `folder`."""
    model = Net() if model is None else model
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in theirs.parameters():
            if value.requires_grad:
                value.add_(torch.randn(value.shape, generator=generator) * 0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(folder)
    return model.eval(), theirs


def compiled(model: nn.Module, steps: Any, inputs: Any = IDS, verify: Any = "off") -> Compilation:
    return rewrite(model, fz.Plan(inputs, steps, targets=()), verify=verify)


def check(model: nn.Module, theirs: nn.Module, steps: Any, *values: Tensor, inputs: Any = IDS) -> Compilation:
    """Compile `model` with `steps`, and compare with peft's unmerged forward; nothing of an adapter may be left."""
    values = values or (torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(2)),)
    with torch.no_grad():
        expected, base = theirs(*values), model(*values)
    done = compiled(model, steps, inputs)
    assert (expected - base).abs().max() > 0.01, "the adapter must do something, or nothing is tested"
    torch.testing.assert_close(done.program.run(*values)[0], expected, rtol=1e-6, atol=1e-6)
    assert not [name for name in done.program.state if name.startswith(("adapters.", "settings."))]
    return done


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(folder: Path, **changes: Any) -> dict[str, Tensor]:
    """Rename (a string) or remove (None) tensors; the tensors after that."""
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    for old, new in changes.items():
        value = tensors.pop(old.replace("__", "."))
        tensors |= {new: value} if new else {}
    safetensors.torch.save_file(tensors, file)
    return tensors


CONFIGS: dict[str, tuple[type[Step], Any]] = {
    "lora": (fz.LoRA, lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=NAMES)),
    "rslora": (fz.LoRA, lambda: peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=NAMES)),
    "lora_bias": (fz.LoRA, lambda: peft.LoraConfig(r=3, lora_bias=True, target_modules=["c1d", "q", "conv"])),
    "dora": (fz.DoRA, lambda: peft.LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=NAMES)),
    "ia3_out": (fz.IA3, lambda: peft.IA3Config(target_modules=["c1d", "q", "conv"], feedforward_modules=[])),
    "vera": (fz.VeRA, lambda: peft.VeraConfig(r=5, target_modules=["c1d", "q", "v"], projection_prng_key=7)),
    "vera_drawn": (
        fz.VeRA,
        lambda: peft.VeraConfig(r=5, target_modules=["q", "v", "out"], projection_prng_key=7, save_projection=False),
    ),
    "oft": (fz.OFT, lambda: peft.OFTConfig(oft_block_size=4, target_modules=["embed", "q", "v", "point"])),
    "oft_exact": (
        fz.OFT,
        lambda: peft.OFTConfig(oft_block_size=2, use_cayley_neumann=False, target_modules=["embed", "q"]),
    ),
    "oft_shared": (fz.OFT, lambda: peft.OFTConfig(oft_block_size=4, block_share=True, target_modules=["q", "point"])),
    "oft_terms": (fz.OFT, lambda: peft.OFTConfig(oft_block_size=4, num_cayley_neumann_terms=3, target_modules=["q"])),
    "coft": (fz.OFT, lambda: peft.OFTConfig(oft_block_size=4, coft=True, eps=0.5, target_modules=["q", "v"])),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_computes_what_peft_computes(name: str, tmp_path: Path) -> None:
    kind, config = CONFIGS[name]
    model, theirs = trained(config(), tmp_path)
    step = kind.from_peft(tmp_path)  # type: ignore[attr-defined]
    assert (step,) == fz.from_peft(tmp_path)
    done = check(model, theirs, [step])
    rows = [row for row in done.ledger if row.step == kind.__name__.lower()]
    assert {row.outcome for row in rows} == {"rewritten", "measured"}
    for other in {fz.LoRA, fz.DoRA, fz.IA3, fz.VeRA, fz.OFT} - {kind}:
        with pytest.raises(fz.PlanError, match=f"of kind '{step.kind}'"):
            other.from_peft(tmp_path)


def test_a_plan_with_a_checkpoint_is_data(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    model, theirs = trained(CONFIGS["lora"][1](), tmp_path / "a")
    fz.Plan(IDS, fz.from_peft(tmp_path / "a"), targets=()).save(tmp_path / "plan.toml")
    assert 'weights = "a/adapter_model.safetensors"' in (tmp_path / "plan.toml").read_text()
    check(model, theirs, fz.Plan.load(tmp_path / "plan.toml").steps)


def test_ranks_alphas_and_sides_by_pattern_are_steps_of_their_own(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["q", "v", "c1d"],
        rank_pattern={"blocks.1.q": 4, r"c\dd": 3}, alpha_pattern={"v": 8},
    )  # fmt: skip
    model, theirs = trained(config, tmp_path / "lora")
    steps = fz.from_peft(tmp_path / "lora")
    assert sorted((step.rank, step.alpha) for step in steps) == [(2, 3), (2, 8), (3, 3), (4, 3)]  # type: ignore[attr-defined]
    check(model, theirs, steps)
    with pytest.raises(fz.PlanError, match=r"takes 4 steps(.|\n)*from_peft\(folder\)"):
        fz.LoRA.from_peft(tmp_path / "lora")
    edit(tmp_path / "lora", rank_pattern={})
    with pytest.raises(fz.PlanError, match=r"give blocks\.1\.q rank 2, but .* has 4"):
        fz.from_peft(tmp_path / "lora")
    config = peft.IA3Config(target_modules=["q", "out", "conv"], feedforward_modules=["out", "conv"])
    model, theirs = trained(config, tmp_path / "ia3")
    steps = fz.from_peft(tmp_path / "ia3")
    assert sorted(step.side for step in steps) == ["in", "out"]  # type: ignore[attr-defined]
    check(model, theirs, steps)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"target_modules": r"blocks\.[01]\.(q|v)"}, 4),
        ({"target_modules": "all-linear"}, 8),
        ({"target_modules": ["q", "blocks.1.v"], "exclude_modules": ["blocks.0.q"]}, 2),
        ({"target_modules": ["q", "v"], "layers_to_transform": [0, 1], "layers_pattern": "blocks"}, 4),
        ({"target_modules": ["q", "v"], "layers_to_transform": 1, "layers_pattern": ["blocks"]}, 2),
    ],
)
def test_targets_are_those_of_the_configuration(options: Any, count: int, tmp_path: Path) -> None:
    model, theirs = trained(peft.LoraConfig(r=2, **options), tmp_path)
    (step,) = fz.from_peft(tmp_path)
    assert len(step.patterns) == count
    check(model, theirs, [step])
    if isinstance(options["target_modules"], list):
        edit(tmp_path, exclude_modules=["q"])
        with pytest.raises(fz.PlanError, match=r"holds an adapter of blocks\.\d\.q, which the configuration"):
            fz.from_peft(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["norm", "point"]}, {"modules_to_save": ["blocks.1"], "exclude_modules": ["blocks.1.q"]},
        {"bias": "all"}, {"bias": "lora_only"},
    ],
)  # fmt: skip
def test_parameters_that_peft_trained_replace_the_models(options: Any, tmp_path: Path) -> None:
    model, theirs = trained(peft.LoraConfig(r=2, target_modules=["q", "c1d"], **options), tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    steps = fz.from_peft(tmp_path)
    assert [step.kind for step in steps] == ["lora", "replace"]
    done = check(model, theirs, steps)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {row.outcome for row in done.ledger if row.step == "replace"} == {"rewritten"}
    with pytest.raises(fz.PlanError, match="takes 2 steps"):
        fz.LoRA.from_peft(tmp_path)
    with pytest.raises(fz.PlanError, match=r"unexpected: base_model\.model"):
        compiled(model, steps[:1])


@pytest.mark.parametrize("target", ["embed", "lm_head"])
def test_a_tied_weight_changes_where_it_is_adapted_only(target: str, tmp_path: Path) -> None:
    """peft's own merge would change the other use too."""
    model, theirs = trained(peft.LoraConfig(r=2, lora_alpha=8, target_modules=[target]), tmp_path)
    check(model, theirs, fz.from_peft(tmp_path))
    model, theirs = trained(peft.LoraConfig(r=2, target_modules=["q"], modules_to_save=[target]), tmp_path)
    done = check(model, theirs, fz.from_peft(tmp_path))
    row = next(row for row in done.ledger if row.step == "replace")
    assert "keeps the old ones" in row.detail


# ---- where peft's own merge is wrong or refuses


class One(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = layer
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


def one(layer: nn.Module, config: Any, folder: Path, *shape: int) -> tuple[nn.Module, nn.Module, Tensor, Any]:
    model, theirs = trained(config, folder, One(layer))
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(3))
    return model, theirs, x, [fz.Input("x", ("batch", *shape))]


def lora(**options: Any) -> Any:
    return peft.LoraConfig(r=4, lora_alpha=6, target_modules=["layer"], **options)


@pytest.mark.parametrize("dora", [False, True])
def test_conv3d_folds(dora: bool, tmp_path: Path) -> None:
    model, theirs, x, inputs = one(nn.Conv3d(2, 3, 2, padding=1), lora(use_dora=dora), tmp_path, 2, 4, 3, 5)
    check(model, theirs, fz.from_peft(tmp_path), x, inputs=inputs)


CONVOLUTIONS = {
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), "pads by 'reflect' where peft's"),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), "pads by 'circular' where peft's"),
    "dilation": (lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2), "is dilated, and peft's update"),
    "groups": (lambda: nn.Conv2d(4, 8, 3, groups=2), "has 2 groups, and peft's update of it mixes them"),
    "pointwise_groups": (lambda: nn.Conv2d(4, 8, 1, groups=2), "has 2 groups, and peft's update of it mixes them"),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_what_is_no_convolution_with_one_weight_is_refused(name: str, tmp_path: Path) -> None:
    """peft trains another function there than its merge computes, and one that no weight of the layer has."""
    layer, reason = CONVOLUTIONS[name]
    model, theirs, x, inputs = one(layer(), lora(), tmp_path, 4, 7, 6)
    theirs(x)  # runs, and so could be trained
    with pytest.raises(fz.PlanError, match=reason):
        compiled(model, fz.from_peft(tmp_path), inputs)


def test_a_pointwise_convolution_folds_whatever_its_padding(tmp_path: Path) -> None:
    layer = nn.Conv2d(4, 6, 1, stride=2, dilation=3)
    model, theirs, x, inputs = one(layer, lora(), tmp_path, 4, 7, 6)
    check(model, theirs, fz.from_peft(tmp_path), x, inputs=inputs)


def test_a_rotation_of_a_larger_convolution_is_refused(tmp_path: Path) -> None:
    config = peft.OFTConfig(oft_block_size=4, target_modules=["layer"])
    model, _, _, inputs = one(nn.Conv2d(4, 6, 3), config, tmp_path, 4, 7, 6)
    with pytest.raises(fz.PlanError, match="has a window of 3×3"):
        compiled(model, fz.from_peft(tmp_path), inputs)


def test_what_bfloat16_would_lose_is_refused(tmp_path: Path) -> None:
    """peft's merge leaves most weights of such a base as they were, and says nothing."""
    model = One(nn.Linear(64, 64)).bfloat16()
    wide = One(nn.Linear(64, 64))
    trained(lora(), tmp_path, wide)
    file, inputs = tmp_path / "adapter_model.safetensors", [fz.Input("x", ("batch", 64), "bfloat16")]
    tensors = safetensors.torch.load_file(file)
    done = compiled(model, fz.from_peft(tmp_path), inputs)
    (row,) = [row for row in done.ledger if row.outcome == "measured"]
    assert "of the change is lost in bfloat16" in row.detail
    assert done.program.state["layer.weight"].dtype == torch.bfloat16
    safetensors.torch.save_file({key: value * 0.02 for key, value in tensors.items()}, file)
    with pytest.raises(fz.PassError, match="of its change is lost"):
        compiled(model, fz.from_peft(tmp_path), inputs)


# ---- refusals


def test_a_bias_needs_one_to_fold_into(tmp_path: Path) -> None:
    model, _ = trained(peft.LoraConfig(r=2, lora_bias=True, target_modules=["v"]), tmp_path)
    with pytest.raises(fz.PlanError, match="has no bias that B's could be added to"):
        compiled(model, fz.from_peft(tmp_path))


def refusal(folder: Path) -> str:
    with pytest.raises(fz.PlanError) as caught:
        fz.from_peft(folder)
    return str(caught.value)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    trained(peft.LoraConfig(r=2, target_modules=["q"]), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "'PREFIX_TUNING' is none of LORA, IA3, VERA, OFT"),
        ({"peft_type": None}, "peft_type None is none of"),
        ({"peft_type": "IA3"}, "unknown key 'init_lora_weights' = 'gaussian'"),
        ({"use_rslora": True, "r": 3}, "give blocks.0.q rank 3, but"),
        ({"use_dora": True}, "is of a type with lora_A, lora_B, lora_magnitude"),
        ({"lora_bias": True}, "is of a type with lora_A, lora_B, lora_bias"),
        ({"lora_bias": True, "use_dora": True}, "the magnitude does not scale"),
        ({"target_parameters": ["q.weight"]}, "parameters rather than layers"),
        ({"trainable_token_indices": [1]}, "single rows"),
        ({"alora_invocation_tokens": [1, 2]}, "behind certain tokens"),
        ({"layer_replication": [[0, 1]]}, "layers of the base are repeated"),
        ({"megatron_config": {"a": 1}}, "split over devices"),
        ({"use_qalora": True}, "pooled inputs"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base before training"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"use_frobnication": 0.5}, "unknown key 'use_frobnication' = 0.5"),
        ({"modules_to_save": ["head"]}, "holds no weights of such a module"),
        ({"bias": "all"}, "holds no biases"),
        ({"target_modules": ["v"]}, "holds an adapter of blocks.0.q"),
    ],
)
def test_what_no_step_can_do_is_refused(saved: Path, changes: Any, message: str) -> None:
    edit(saved, use_frobnication=False, init_lora_weights="gaussian", lora_dropout=0.3)
    fz.from_peft(saved)
    edit(saved, **changes)
    assert message in refusal(saved)


def test_older_series_of_oft_are_refused(tmp_path: Path) -> None:
    trained(CONFIGS["oft"][1](), tmp_path)
    edit(tmp_path, peft_version="0.17.1")
    assert "before peft 0.18" in refusal(tmp_path)
    edit(tmp_path, use_cayley_neumann=False)
    fz.from_peft(tmp_path)


def test_damaged_folders_are_refused(saved: Path) -> None:
    first = "base_model__model__blocks__0__q__lora_A__weight"
    edit_weights(saved, **{first: "base_model.model.blocks.0.q.lora_C.weight"})
    assert "lora_C.weight is nothing that can be read" in refusal(saved)
    edit_weights(saved, **{first.replace("lora_A", "lora_C"): None})
    assert "blocks.0.q has lora_B in the weights file" in refusal(saved)
    weights, config = saved / "adapter_model.safetensors", saved / "adapter_config.json"
    weights.write_bytes(b"PK\x03\x04 a pickle")
    assert "not a safetensors file" in refusal(saved)
    weights.rename(saved / "adapter_model.bin")
    assert "safe_serialization=True" in refusal(saved)
    config.write_text("[]")
    assert "not a list" in refusal(saved)
    config.write_text("{")
    assert "cannot read the configuration" in refusal(saved)
    config.unlink()
    assert "no peft checkpoint" in refusal(saved)


def test_vera_without_its_matrices_is_refused(tmp_path: Path) -> None:
    trained(CONFIGS["vera_drawn"][1](), tmp_path)
    edit(tmp_path, save_projection=True)
    assert "does not hold vera_A and vera_B" in refusal(tmp_path)
