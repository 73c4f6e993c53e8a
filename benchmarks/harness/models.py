"""Models with random weights for the benchmarks; what they need comes with the extra `bench`."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from .case import Unavailable, WrongOutput


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


def need(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise Unavailable(f"needs {package}, which is not installed") from error


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
