"""Networks people use, through the whole of fxfreeze: real weights where there are any, random ones elsewhere.

The CIFAR-10 images and the public ResNet-20 weights lie outside of the repository (FXFREEZE_DATA, or ``../shared/data``
beside it); the tests that need them skip when they are not there.
"""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxfreeze as fz

pytestmark = pytest.mark.slow
DATA = Path(os.environ.get("FXFREEZE_DATA", Path(__file__).parents[2] / "shared" / "data"))
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions; the shortcut drops every other pixel and pads channels with zeros (option A)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside)
        self.conv2, self.bn2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside)
        self.extra = (outside - inside) // 2 if stride != 1 else 0

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.extra:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))
        return F.relu(out + x)


class ResNet20(nn.Module):
    """The CIFAR ResNet-20 of He et al. 2015."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(BasicBlock(i, o, s), BasicBlock(o, o, 1), BasicBlock(o, o, 1)) for i, o, s in widths
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def resnet20() -> nn.Module:
    weights = DATA / "resnet20_cifar10.safetensors"
    if not weights.is_file():
        pytest.skip("the public ResNet-20 weights are not here")
    from safetensors.torch import load_file

    model = ResNet20()
    state = load_file(weights)
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and all("num_batches_tracked" in key for key in missing.missing_keys)
    return model.eval()


@pytest.fixture(scope="module")
def cifar10() -> tuple[Tensor, Tensor]:
    """The 10,000 test images, float32 [n, 3, 32, 32] normalised as ImageNet's, and their labels."""
    numpy = pytest.importorskip("numpy")
    if not (DATA / "cifar10.npz").is_file():
        pytest.skip("the CIFAR-10 images are not here")
    with numpy.load(DATA / "cifar10.npz") as data:
        images = torch.from_numpy(data["x_test"]).permute(0, 3, 1, 2).float() / 255
        labels = torch.from_numpy(data["y_test"]).long()
    mean, deviation = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(DEVIATION).view(3, 1, 1)
    return (images - mean) / deviation, labels


def predictions(call: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([call(chunk).argmax(1) for chunk in images.split(500)])


def test_resnet20_predicts_the_same_on_all_10000_test_images_in_every_target(resnet20, cifar10):
    images, labels = cifar10
    eager = predictions(resnet20, images)
    assert 0.80 < float((eager == labels).double().mean()) < 0.82
    plan = fz.Plan(inputs=[fz.Input("image", shape=("batch", 3, 32, 32))], targets=["torch", "aoti", "onnx"])
    artifact = fz.compile(resnet20, plan)
    rewrites = {row["name"]: row["rewrites"] for row in artifact.manifest["passes"]}
    assert rewrites["fold-affine"] == 19, "every batch-norm is in its convolution"
    for target in plan.targets:
        same = predictions(artifact.target(target), images)
        assert torch.equal(same, eager), f"{target}: {int((same != eager).sum())} predictions differ"


class TwoInputs(nn.Module):
    """Two inputs, one of them nested; a dict output."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 8), nn.Conv1d(2, 8, 3, padding=1)

    def forward(self, features: dict[str, Tensor], signal: Tensor) -> dict[str, Any]:
        pooled = self.right(signal).amax(-1)
        hidden = F.gelu(self.left(features["dense"])) * features["mask"].unsqueeze(-1)
        return {"joint": hidden + pooled, "parts": (hidden, pooled)}


def small_transformer(name: str, **config: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    return cls(cls.config_class(**config)).eval()


IDS = {"dtype": "int64", "shape": ("batch", "sequence")}
LENGTHS = {"sequence": fz.Dim(min=1, max=64)}


def gpt2() -> tuple[nn.Module, fz.Plan]:
    model = small_transformer("GPT2LMHeadModel", n_layer=2, n_embd=32, n_head=4, vocab_size=101, n_positions=64)
    inputs = [fz.Input("input_ids", **IDS), fz.Input("attention_mask", **IDS, low=1, high=1)]
    return model, fz.Plan(inputs=inputs, outputs=["logits"], dims=LENGTHS)


def bert() -> tuple[nn.Module, fz.Plan]:
    model = small_transformer(
        "BertModel", num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=64, vocab_size=101,
        max_position_embeddings=64,
    )  # fmt: skip
    return model, fz.Plan(inputs=[fz.Input("input_ids", **IDS)], dims=LENGTHS)


def lstm() -> tuple[nn.Module, fz.Plan]:
    model = nn.LSTM(8, 16, 2, batch_first=True, bidirectional=True).eval()
    return model, fz.Plan(inputs=[fz.Input("input", shape=("batch", 7, 8))])


def two_inputs() -> tuple[nn.Module, fz.Plan]:
    inputs = [fz.Input("features.dense", shape=("batch", 6)), fz.Input("features.mask", shape=("batch",)),
              fz.Input("signal", shape=("batch", 2, 9))]  # fmt: skip
    return TwoInputs().eval(), fz.Plan(inputs=inputs)


def vision(library: str, name: str, size: int) -> tuple[nn.Module, fz.Plan]:
    torch.manual_seed(0)
    if library == "timm":
        model = pytest.importorskip("timm").create_model(name, pretrained=False)
    else:
        model = pytest.importorskip("torchvision").models.get_model(name, weights=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # trained-looking statistics: folds must not be trivial
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval(), fz.Plan(inputs=[fz.Input("image", shape=("batch", 3, size, size))])


MODELS = {
    "gpt2": gpt2,
    "bert": bert,
    "lstm": lstm,
    "two inputs": two_inputs,
    "resnet18": lambda: vision("torchvision", "resnet18", 64),
    "mobilenet_v3": lambda: vision("torchvision", "mobilenet_v3_small", 64),
    "vit_tiny": lambda: vision("timm", "vit_tiny_patch16_224", 224),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_exact_pass_is_proven_and_onnx_agrees(name: str):
    model, plan = MODELS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    artifact = fz.compile(model, plan.model_copy(update={"targets": ("onnx",)}))
    for row in artifact.manifest["passes"]:
        assert not row["rewrites"] or row["error"] is not None
        assert not row["exact"] or not row["rewrites"] or row["error"] <= 1e-10
    assert all(row["ok"] for row in artifact.manifest["parity"])
    assert len({tuple(row["sizes"].items()) for row in artifact.manifest["parity"]}) == 3
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", ["two inputs", "gpt2"])
def test_native_targets_agree_too(name: str):
    model, plan = MODELS[name]()
    artifact = fz.compile(model, plan.model_copy(update={"targets": ("torch", "aoti")}))
    assert {row["target"] for row in artifact.manifest["parity"] if row["ok"]} == {"model", "torch", "aoti"}


def with_cache(name: str) -> tuple[nn.Module, str]:
    """A model whose output holds a cache object, and the name of a tensor in it."""
    if name == "t5":
        return small_transformer(
            "T5Model", vocab_size=101, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4
        ), "last_hidden_state"  # fmt: skip
    if name == "bart":
        return small_transformer(
            "BartModel", vocab_size=101, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=1,
        ), "last_hidden_state"  # fmt: skip
    return small_transformer(
        "MambaForCausalLM", vocab_size=101, hidden_size=32, num_hidden_layers=1, state_size=4
    ), "logits"  # fmt: skip


@pytest.mark.parametrize("name", ["t5", "bart", "mamba"])
def test_models_that_also_return_a_cache_compile_when_asked_for_tensors(name: str):
    inputs = [fz.Input(key, **IDS, low=2, high=99) for key in ("input_ids", "decoder_input_ids")]
    model, output = with_cache(name)
    dims = {"sequence": fz.Dim(min=2, max=64)}
    if name == "mamba":  # its scan is a Python loop over the sequence, which no export can leave open
        inputs, dims = [fz.Input("input_ids", dtype="int64", shape=("batch", 8), low=2, high=99)], {}
    artifact = fz.compile(model, fz.Plan(inputs=inputs, outputs=[output], dims=dims, targets=["onnx"]))
    assert artifact.interface.outputs == (output,)


def native_code(artifact: fz.Artifact) -> list[str]:
    """C++ of an AOTInductor package, without comments, which hold paths of the build, and without numbers written out:
    Inductor does that with the values of small constants."""
    with zipfile.ZipFile(artifact.folder / "aoti" / "model.pt2") as package:
        sources = [package.read(name).decode() for name in package.namelist() if name.endswith(".cpp")]
    return [re.sub(r"^//.*$|static_cast<float>\([^()]*\)", "", source, flags=re.MULTILINE) for source in sources]


def onnx_nodes(artifact: fz.Artifact) -> list[tuple[str, int, int, str]]:
    model = pytest.importorskip("onnx").load(artifact.folder / "onnx" / "model.onnx")
    return [(node.op_type, len(node.input), len(node.output), str(node.attribute)) for node in model.graph.node]


def test_a_folded_adapter_runs_the_code_of_the_bare_model():
    """So it costs nothing, whatever a clock on a busy machine says."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)).eval()
    inputs = [fz.Input("image", shape=("batch", 3, 8, 8))]
    layers = ["0", "4"]
    steps = [fz.LoRA(at=layers, rank=2), fz.DoRA(at=layers, rank=2), fz.OFT(at="4", block_size=4), fz.IA3(at="4")]
    net = fz.adapt(model, fz.Plan(inputs, steps))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter))
    folded = fz.compile(net, fz.Plan(inputs, steps, targets=["aoti", "onnx"]))
    bare = fz.compile(model, fz.Plan(inputs, targets=["aoti", "onnx"]))
    assert native_code(folded) == native_code(bare) and len(native_code(bare)) >= 1
    assert onnx_nodes(folded) == onnx_nodes(bare)
    assert folded.manifest["structural_hash"] == bare.manifest["structural_hash"]
