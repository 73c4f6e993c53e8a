"""An adapter folded into a base on disk: what peft's unmerged forward computes, in files laid out as the base's."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import fxfreeze as fz

peft = pytest.importorskip("peft", reason="peft is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        self.embed, self.wide, self.square = nn.Embedding(11, 8), Conv1D(12, 8), Conv1D(12, 12)
        self.narrow, self.fc, self.point = nn.Linear(12, 8), nn.Linear(8, 8), nn.Conv2d(8, 6, 1)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.square(torch.tanh(self.wide(self.embed(ids)))))
        h = torch.tanh(self.fc(torch.tanh(self.narrow(h))))
        return self.conv(torch.tanh(self.point(h.transpose(1, 2).unsqueeze(-1))).squeeze(-1))


X = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(2))


def saved(config: Any, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Net, Any]:
    """A base in two shards under `folder`/base, and an adapter of it under `folder`/adapter."""
    model = Net().to(dtype).eval()
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in theirs.parameters():
            if value.requires_grad:
                value.add_(torch.randn(value.shape, generator=generator).to(value.dtype) * 0.3)
    theirs.save_pretrained(folder / "adapter")
    (folder / "base").mkdir()
    state = model.state_dict()
    half = len(state) // 2
    for i, names in enumerate((list(state)[:half], list(state)[half:])):
        file = folder / "base" / f"model-{i + 1:05}-of-00002.safetensors"
        safetensors.torch.save_file({name: state[name] for name in names}, file, {"format": "pt"})
    (folder / "base" / "config.json").write_text("{}")
    return model, theirs


def loaded(folder: Path) -> dict[str, Tensor]:
    return {
        key: value for file in folder.glob("*.safetensors") for key, value in safetensors.torch.load_file(file).items()
    }


CONFIGS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["embed", "wide", "square"],
        modules_to_save=["conv"],
        rank_pattern={"wide": 2},
    ),
    "lora_linear": lambda: peft.LoraConfig(r=3, lora_bias=True, target_modules=["narrow", "fc", "point"], bias="all"),
    "dora": lambda: peft.LoraConfig(r=2, use_dora=True, target_modules=["embed", "narrow", "fc", "point"]),
    "ia3": lambda: peft.IA3Config(target_modules=["narrow", "fc", "point"], feedforward_modules=["fc"]),
    "vera": lambda: peft.VeraConfig(r=5, target_modules=["narrow", "fc"], save_projection=False),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=["embed", "narrow", "point"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folded_checkpoint_computes_what_peft_computes(name: str, tmp_path: Path) -> None:
    model, theirs = saved(CONFIGS[name](), tmp_path)
    before = {file.name: file.read_bytes() for file in (tmp_path / "base").iterdir()}
    ledger = fz.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    with torch.no_grad():
        expected, base = theirs(X), model(X)
        model.load_state_dict(loaded(tmp_path / "out"))
        assert (expected - base).abs().max() > 0.01
        torch.testing.assert_close(model(X), expected, rtol=1e-6, atol=1e-6)
    assert {file.name: file.read_bytes() for file in (tmp_path / "base").iterdir()} == before
    assert {file.name for file in (tmp_path / "out").iterdir()} == {*before, "fxfreeze_ledger.json"}
    assert json.loads((tmp_path / "out" / "fxfreeze_ledger.json").read_text()) == ledger.to_json()
    assert {row.outcome for row in ledger} == {"rewritten"}
    assert not [item for item in tmp_path.iterdir() if item.name.startswith(".")]


def refusal(folder: Path, kind: type[Exception] = fz.PlanError) -> str:
    with pytest.raises(kind) as caught:
        fz.fold_checkpoint(folder / "base", folder / "adapter", folder / "out")
    assert not (folder / "out").exists()
    assert not [item for item in folder.iterdir() if item.name.startswith(".")]
    return str(caught.value)


def test_folders_of_the_base_are_copied_and_the_output_lies_outside(tmp_path: Path) -> None:
    saved(peft.LoraConfig(r=2, target_modules=["fc"]), tmp_path)
    (tmp_path / "base" / "1_Pooling" / "deep").mkdir(parents=True)
    (tmp_path / "base" / "1_Pooling" / "deep" / "config.json").write_text("[1]")
    for inner in ("out", "1_Pooling/out"):
        with pytest.raises(fz.PlanError, match="in the base's folder"):
            fz.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "base" / inner)
    fz.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert (tmp_path / "out" / "1_Pooling" / "deep" / "config.json").read_text() == "[1]"


def test_what_a_checkpoint_does_not_tell_is_refused(tmp_path: Path) -> None:
    saved(peft.LoraConfig(r=2, target_modules=["conv"]), tmp_path / "conv")
    assert "does not say how a convolution pads" in refusal(tmp_path / "conv")
    saved(peft.LoraConfig(r=2, target_modules=["wide", "square", "narrow"]), tmp_path / "mixed")
    assert "some layers of this base are stored transposed" in refusal(tmp_path / "mixed")
    folder = tmp_path / "other"
    saved(peft.LoraConfig(r=2, target_modules=["fc"]), folder)
    (folder / "out").mkdir()
    with pytest.raises(fz.PlanError, match="something at this path already"):
        fz.fold_checkpoint(folder / "base", folder / "adapter", folder / "out")
    (folder / "out").rmdir()
    for file in (folder / "base").glob("*.safetensors"):
        tensors = safetensors.torch.load_file(file)
        safetensors.torch.save_file({f"model.{key}": value for key, value in tensors.items()}, file)
    assert "the base holds no fc.weight" in refusal(folder)
    for file in (folder / "base").glob("*.safetensors"):
        file.write_bytes(b"PK\x03\x04")
    assert "not a safetensors file" in refusal(folder)


def test_a_tied_layer_is_refused(tmp_path: Path) -> None:
    saved(peft.LoraConfig(r=2, target_modules=["embed"]), tmp_path)
    for name in ("adapter/adapter_model.safetensors", *(f"base/{f.name}" for f in (tmp_path / "base").glob("*.s*"))):
        tensors = safetensors.torch.load_file(tmp_path / name)
        safetensors.torch.save_file({key.replace("embed", "lm_head"): v for key, v in tensors.items()}, tmp_path / name)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"embed"', '"lm_head"'))
    # The key of an embedding's adapter holds "embedding" too.
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file(
        {key.replace("lora_lm_headding", "lora_embedding"): v for key, v in tensors.items()}, file
    )
    (tmp_path / "base" / "config.json").write_text('{"tie_word_embeddings": true}')
    assert "ties this layer to another one" in refusal(tmp_path)
    (tmp_path / "base" / "config.json").write_text('{"tie_word_embeddings": false}')
    fz.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_what_bfloat16_would_lose_is_refused(tmp_path: Path) -> None:
    saved(peft.LoraConfig(r=2, target_modules=["fc"]), tmp_path, torch.bfloat16)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    (row,) = fz.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "fine")
    assert row.executes == "BF16 fc.weight" and "of the change is lost" in row.detail
    safetensors.torch.save_file({key: value * 0.02 for key, value in tensors.items()}, file)
    assert "of its change is lost (limit 50%)" in refusal(tmp_path, fz.PassError)
