"""Models with random weights for the benchmarks; what they need comes with the extra `bench`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .harness import record
from .harness.case import Unavailable, WrongOutput
from .harness.libraries import need


def vit_tiny(seed: int) -> nn.Module:
    """timm's vit_tiny_patch16_224: images [batch, 3, 224, 224] -> logits [batch, 1000]."""
    torch.manual_seed(seed)
    return frozen(need("timm").create_model("vit_tiny_patch16_224", pretrained=False))


def resnet(name: str, seed: int) -> nn.Module:
    """A torchvision ResNet: images [batch, 3, 224, 224] -> logits [batch, 1000]."""
    torch.manual_seed(seed)
    return frozen(getattr(need("torchvision").models, name)())


def bert(seed: int, **config: Any) -> nn.Module:
    """transformers' BertModel, bert-base by default: ids and mask [batch, tokens] -> hidden states."""
    torch.manual_seed(seed)
    transformers = need("transformers")
    return frozen(transformers.BertModel(transformers.BertConfig(**config)))


class Block(nn.Module):
    """A pre-norm transformer block; nn.TransformerEncoderLayer would be exported as one fused operator."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(*qkv.unbind(0))
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """`depth` blocks of width 64 with 2 heads: [batch, tokens, 64] -> the same shape."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[Block(64, 2) for _ in range(depth)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


def encoder(depth: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return frozen(Encoder(depth))


def cifar10(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images "test" (10,000) or "calib" (2,000 others) as ResNet-20 takes them, float32 [n, 3, 32, 32], and labels."""
    with need("numpy").load(data("cifar10.npz")) as stored:
        images = torch.from_numpy(stored[f"x_{part}"]).permute(0, 3, 1, 2).float() / 255
        labels = torch.from_numpy(stored[f"y_{part}"]).long()
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (images - mean) / deviation, labels


def frozen(model: nn.Module) -> nn.Module:
    """In eval mode, without gradients, with batch-norm statistics that a wrong fold could not hide behind."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.8, 1.25)
    return model.eval().requires_grad_(False)


def size(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; a tied one counts once."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def outputs_without_target(artifact: Any, emitted: Any, *args: Any, **kwargs: Any) -> Any:
    """What `artifact`, compiled without a target, computes: it cannot be called, so `emitted` is, its like with one.

    Both hold their program and its weights as files, which have to be the same to the last byte.
    """

    def program(artifact: Any) -> dict[str, str]:
        files = artifact.manifest["files"]
        return {name: file["sha256"] for name, file in files.items() if name.startswith("program/")}

    if not program(artifact) or program(artifact) != program(emitted):
        raise WrongOutput("compiled with a target, the model gave another program")
    return emitted(*args, **kwargs)


class Shortcut(nn.Module):
    """Every other pixel, and channels of zeros before and behind (option A of He et al. 2015)."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))


class ResNet20(nn.Module):
    """The CIFAR ResNet-20 of He et al. 2015: images [batch, 3, 32, 32] -> logits [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        block = need("torchvision.models.resnet").BasicBlock
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(block(16, 16) for _ in range(3)))
        self.layer2 = nn.Sequential(block(16, 32, 2, Shortcut(8)), block(32, 32), block(32, 32))
        self.layer3 = nn.Sequential(block(32, 64, 2, Shortcut(16)), block(64, 64), block(64, 64))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


DATA = Path(os.environ.get("FXFREEZE_DATA", record.ROOT.parent / "shared" / "data"))
"""Where public weights and images are."""


def data(name: str) -> Path:
    """A file of :data:`DATA`, which is no part of the repository; Unavailable where it is not there."""
    if not (DATA / name).is_file():
        raise Unavailable(f"{name} is not there: name its folder in FXFREEZE_DATA")
    return DATA / name


def resnet20() -> nn.Module:
    """ResNet-20 with the public CIFAR-10 weights."""
    model = ResNet20()
    state = need("safetensors.torch").load_file(data("resnet20_cifar10.safetensors"))
    counters = {name for name in model.state_dict() if name.endswith("num_batches_tracked")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or not counters.issuperset(missing):
        raise WrongOutput(f"the file of weights does not fit: {missing[:3]}, {unexpected[:3]}")
    return model.eval().requires_grad_(False)
