"""The networks and plans of the regression gate: small, seeded, of plain torch, so that all of them compile in seconds.

What is counted must not hang on values, which differ by a last bit between processors: masks keep the same share of
every layer, and gates start open.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import models

WIDTH, HEADS, WORDS = 64, 2, 96


@dataclass(frozen=True)
class Case:
    """A network, what its plan asks for, and what is emitted.

    Attributes:
        steps: of the plan, by a function, so that fxfreeze is imported when a case is compiled.
        onnx: emit an ONNX file and count what is in it.
        inductor: count what Inductor generates for the torch target.
    """

    network: str
    plan: str
    steps: Callable[[], list[Any]]
    onnx: bool = False
    inductor: bool = False

    @property
    def name(self) -> str:
        return f"{self.network}, {self.plan}"


def compiled(case: Case) -> Any:
    """The artifact. Proofs are the other tests' job."""
    import fxfreeze as fz

    plan = fz.Plan(INPUTS[case.network](), case.steps(), ["onnx"] if case.onnx else [])
    model, batches = NETWORKS[case.network](), CALIBRATION[case.network]()
    if plan.steps:
        model = fz.adapt(model, plan, calibration=batches, verify="off")
        disturb(model)
    return fz.compile(model, plan, calibration=batches, verify="off")


def disturb(net: nn.Module) -> None:
    """Trained-looking adapters: a fresh LoRA is zero, and zeros might be folded away. Thresholds stay low."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.rand(parameter.shape, generator=generator)


# ---- networks


class Residual(nn.Module):
    """Two convolutions with batch norms, and a way around them, as in a ResNet-20."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.act = nn.ReLU()
        plain = (inputs, stride) == (outputs, 1)
        self.shortcut = nn.Sequential() if plain else nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        inner = self.act(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class ResNet(nn.Module):
    """Images [batch, 3, 16, 16] -> logits [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 32, 1))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.bn(self.conv(x)))).mean((2, 3)))


class Attention(nn.Module):
    """Queries, keys and values by three layers, or by one."""

    def __init__(self, *, joint: bool, causal: bool = False) -> None:
        super().__init__()
        self.joint, self.causal = joint, causal
        if joint:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        else:
            self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        parts = self.qkv(x).chunk(3, -1) if self.joint else (self.query(x), self.key(x), self.value(x))
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return self.out(found.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block with its norms in front (ViT, GPT-2), or behind (BERT)."""

    def __init__(self, *, joint: bool = True, causal: bool = False, behind: bool = False) -> None:
        super().__init__()
        self.behind, self.attention = behind, Attention(joint=joint, causal=causal)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.act, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.behind:
            x = self.norm1(x + self.attention(x, mask))
            return self.norm2(x + self.down(self.act(self.up(x))))
        x = x + self.attention(self.norm1(x), mask)
        return x + self.down(self.act(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Patches [batch, 9, 48] -> logits [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(48, WIDTH), nn.Parameter(torch.randn(9, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.drop, self.head = nn.LayerNorm(WIDTH), nn.Dropout(), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.embed(x) + self.position)
        for block in self.blocks:
            x = block(x)
        return self.head(self.drop(self.norm(x)).mean(1))


class Decoder(nn.Module):
    """Token ids [batch, tokens] -> the next token's logits at every position; the head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(WORDS, WIDTH), nn.Embedding(16, WIDTH)
        self.blocks = nn.ModuleList(Block(causal=True) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Encoder(nn.Module):
    """Token ids and a mask of those that count [batch, tokens] -> logits [batch, 4] from the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(WORDS, WIDTH), nn.Embedding(16, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList(Block(joint=False, behind=True) for _ in range(2))
        self.pooler, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        bias = (1.0 - mask[:, None, None, :].to(torch.float32)) * -1e4
        x = self.norm(self.embed(ids) + self.position(torch.arange(ids.shape[1], device=ids.device)))
        for block in self.blocks:
            x = block(x, bias)
        return self.head(torch.tanh(self.pooler(x[:, 0])))


def seeded(network: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = network()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.1, 0.1)
    return models.frozen(model)


NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "ResNet": functools.partial(seeded, ResNet),
    "transformer": functools.partial(seeded, Transformer),
    "GPT-2": functools.partial(seeded, Decoder),
    "BERT": functools.partial(seeded, Encoder),
}


# ---- inputs


def _inputs(*made: Mapping[str, Any]) -> Callable[[], list[Any]]:
    def make() -> list[Any]:
        import fxfreeze as fz

        return [fz.Input(**given) for given in made]

    return make


_IDS = {"name": "ids", "shape": ("batch", "tokens"), "dtype": "int64", "low": 0, "high": WORDS - 1}
_MASK = {"name": "mask", "shape": ("batch", "tokens"), "dtype": "int64", "low": 0, "high": 1}

INPUTS: Mapping[str, Callable[[], list[Any]]] = {
    "ResNet": _inputs({"name": "x", "shape": ("batch", 3, 16, 16)}),
    "transformer": _inputs({"name": "x", "shape": ("batch", 9, 48)}),
    "GPT-2": _inputs(_IDS),
    "BERT": _inputs(_IDS, _MASK),
}


def _floats(*shape: int) -> list[Any]:
    return [torch.randn(4, *shape, generator=torch.Generator().manual_seed(2))]


def _ids(*more: Tensor) -> list[Any]:
    ids = torch.randint(WORDS, (4, 8), generator=torch.Generator().manual_seed(2))
    return [(ids, *more) if more else ids]


CALIBRATION: Mapping[str, Callable[[], list[Any]]] = {
    "ResNet": lambda: _floats(3, 16, 16),
    "transformer": lambda: _floats(9, 48),
    "GPT-2": _ids,
    "BERT": lambda: _ids(torch.ones(4, 8, dtype=torch.int64)),
}


# ---- plans


def _step(kind: str, *args: Any, **given: Any) -> Callable[[], Any]:
    def make() -> Any:
        import fxfreeze as fz

        return getattr(fz, kind)(*args, **given)

    return make


def _cases(
    network: str, layers: str, *plans: str, onnx: Sequence[str] = (), inductor: Sequence[str] = ()
) -> list[Case]:
    """`network` with each of `plans`.

    Args:
        layers: pattern of the layers that get adapters.
        onnx, inductor: of `plans`, those that are emitted and counted there, too: it takes longest.
    """
    acts, head, lora = "blocks.*.act", "head", functools.partial(_step, "LoRA", layers, rank=2)
    gate, tversky = _step("Gate", acts), _step("Tversky", head, features=32, start="random")
    prune = functools.partial(_step, "Prune", "blocks.*", scope="layer")
    channels = prune(method="channel", density=0.5, multiple=8)
    steps = {
        "bare": [],
        "LoRA folded": [lora()],
        "LoRA selected": [lora(adapters=3)],
        "gates": [gate],
        "Tversky head": [tversky],
        "ticket": [prune(method="magnitude", density=0.2)],
        "channels": [channels],
        "int8": [_step("Quantize")],
        "int4 weights": [_step("Quantize", scheme="int4-weight", granularity="group:32")],
        "all": [lora(), gate, tversky, channels, _step("Quantize", exclude=head)],
    }
    return [
        Case(network, plan, lambda plan=plan: [make() for make in steps[plan]], plan in onnx, plan in inductor)  # type: ignore[misc]
        for plan in plans
    ]


ALL: Mapping[str, Case] = {
    case.name: case
    for case in (
        *_cases("ResNet", "blocks.0.conv*", "bare", "LoRA folded", "LoRA selected", "gates", "Tversky head", "ticket",
                "channels", "int8", "all", onnx=["bare", "int8"], inductor=["bare"]),
        *_cases("transformer", "blocks.*", "bare", "LoRA folded", "LoRA selected", "gates", "Tversky head", "ticket",
                "channels", "int8", "int4 weights", "all", onnx=["bare", "LoRA selected", "all"], inductor=["bare"]),
        *_cases("GPT-2", "blocks.*", "bare", "LoRA folded", "gates", "int4 weights", "all", onnx=["int4 weights"]),
        *_cases("BERT", "blocks.*", "bare", "LoRA folded", "channels", "int8", "all"),
    )
}  # fmt: skip
"""Every case by its name."""
