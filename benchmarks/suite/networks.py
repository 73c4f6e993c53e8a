"""The networks of the suite: how each is built, what it is called with, and where adapters and the like go."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..harness import Options, shelf

Inputs = tuple[Tensor, ...]
TOKENS = 128
"""Of a sentence, of a prompt, and of what a cache holds."""
COMPARED = 2e-2
"""float32 may find a value on either side of a threshold, and of the millions that are compared a few lie that close;
one that is on the other side moves an output by about a thousandth."""


@dataclass(frozen=True)
class Hidden:
    """Units (neurons, channels) that no residual addition couples, so that some of them may go.

    Attributes:
        at: globs of the layers that make them.
        name: what the path of such a layer ends with; the paths below stand in its place.
        beside: layers and norms that have a number per unit, too.
        into: layers that read them.
    """

    at: tuple[str, ...]
    name: str
    beside: tuple[str, ...] = ()
    into: tuple[str, ...] = ()

    def paths(self, maker: str, names: Iterable[str]) -> list[str]:
        return [maker.removesuffix(self.name) + name for name in names]


@dataclass(frozen=True, eq=False)
class Network:
    """A network, frozen and seeded.

    Attributes:
        build: makes it; use :attr:`model`.
        shapes: of its inputs, by name: sizes, or names of sizes that stay open.
        draw: inputs from a generator.
        calibration: what ranges of activations, and thresholds of gates, are measured on.
        adapted: globs of the layers that get a LoRA.
        gated: globs of the modules whose results are gated.
        fire: the share of gated units that are above their threshold.
        head: path of the linear layer that a Tversky head replaces.
        hidden: the units of which a ticket keeps half.
        words: ids of integer inputs lie below it.
        features: of the bank of the Tversky head.
        calls: how many of the calibration inputs the thresholds are measured on.
        large: it takes long to build, and to call.
        convolutional: its integers are those of convolutions.
        windows: these have windows of 3×3 over all channels.
        transposed: its linear layers are transformers' Conv1D: torchao leaves them in floats, Torch-Pruning fails.
        panel: all that compete do so here.
        single: a call is one row of everything.
        tolerance: of floats. Gates and Tversky heads compare with thresholds, and have their own.
        compared: of what thresholds decide, in largest outputs.
        rounding: of 8 bits, in largest outputs: of what counts as a result at all.
        batch: what is said behind the name. Networks of one name differ in what they are called with alone.
        folder: where processes leave each other what they built; None where they do not.
    """

    name: str
    build: Callable[[], nn.Module]
    shapes: dict[str, tuple[int | str, ...]]
    draw: Callable[[torch.Generator], Inputs]
    calibration: Callable[[], list[Inputs]]
    adapted: tuple[str, ...]
    gated: tuple[str, ...]
    fire: float
    head: str
    hidden: tuple[Hidden, ...]
    words: int = 0
    features: int = 1024
    calls: int = 2
    large: bool = False
    convolutional: bool = False
    windows: bool = False
    transposed: bool = False
    panel: bool = False
    single: bool = False
    tolerance: float = 1e-4
    compared: float = COMPARED
    rounding: float = 0.25
    batch: str = ""
    folder: Path | None = None

    @property
    def title(self) -> str:
        return ", ".join(filter(None, (self.name, self.batch)))

    @functools.cached_property
    def model(self) -> nn.Module:
        """Not to be changed: copy it."""
        if self.folder is None:
            return self.build()
        file = shelf.shared(self.folder, "model", self._write) / "model.pt"
        model: nn.Module = torch.load(file, weights_only=False, mmap=True)  # no copy for each process
        return model

    def _write(self, folder: Path) -> None:
        folder.mkdir()
        torch.save(self.build(), folder / "model.pt")

    def sites(self, globs: Iterable[str]) -> list[str]:
        """Paths of the modules that match."""
        return [path for path, _ in self.model.named_modules() if any(fnmatchcase(path, glob) for glob in globs)]

    @functools.cached_property
    def example(self) -> Inputs:
        """What exporters trace: sizes that stay open are 2, since a size of 1 is taken for a fact."""
        drawn, shapes = self.draw(torch.Generator().manual_seed(2)), self.shapes.values()
        return tuple(
            value[:1].expand(2, *value.shape[1:]).contiguous() if isinstance(shape[0], str) else value
            for value, shape in zip(drawn, shapes, strict=True)
        )

    def open_sizes(self) -> tuple[dict[int, Any], ...]:
        """As torch.export names them, one dict for each input."""
        return tuple(
            {dim: torch.export.Dim(size) for dim, size in enumerate(shape) if isinstance(size, str)}
            for shape in self.shapes.values()
        )

    def plan_inputs(self) -> list[Any]:
        """The inputs as a plan names them."""
        import fxfreeze as fz

        whole: dict[str, Any] = {"dtype": "int64", "low": 0, "high": self.words - 1}
        return [fz.Input(name, shape, **(whole if name == "ids" else {})) for name, shape in self.shapes.items()]


def networks(options: Options) -> list[Network]:
    """All of them, or two small ones. Nothing is built before it is asked for."""
    seed = options.seed
    found = [resnet20(1), encoder(seed)] if options.quick else [
        resnet20(1), resnet20(64), resnet("resnet18", seed), resnet("resnet50", seed), mobilenet(seed),
        vit("ViT-tiny", "vit_tiny_patch16_224", seed), vit("ViT-base", "vit_base_patch16_224", seed), bert(seed),
        gpt2(seed, decode=False), gpt2(seed, decode=True),
    ]  # fmt: skip
    if options.folder is None:
        return found
    return [replace(network, folder=options.folder / network.name) for network in found]


SAMPLES, FEW = 8, 4
"""Calls of one image, or of a sentence or prompt, that ranges are measured on; of large networks fewer, since libraries
run each many times."""


def repeated(draw: Callable[[torch.Generator], Inputs], count: int, seed: int = 1) -> Callable[[], list[Inputs]]:
    """As many draws, always the same."""

    def drawn() -> list[Inputs]:
        generator = torch.Generator().manual_seed(seed)
        return [draw(generator) for _ in range(count)]

    return drawn


# ---- convolutions

IMAGE = (3, 224, 224)
BASIC = Hidden(("layer*.*.conv1",), "conv1", ("bn1",), ("conv2",))
BOTTLENECK = (BASIC, Hidden(("layer*.*.conv2",), "conv2", ("bn2",), ("conv3",)))


DEEP = 0.4
"""With random weights, ranges by min and max leave that little of 50 layers, or of 12 whose gates open for one value in
ten, whoever rounds."""


def images(batch: int, *shape: int) -> Callable[[torch.Generator], Inputs]:
    return lambda generator: (torch.randn(batch, *shape, generator=generator),)


def pictures() -> list[Inputs]:
    return [(batch,) for batch in models.cifar10("calib")[0][:512].split(64)]


def resnet20(batch: int) -> Network:
    """With its public weights, on CIFAR-10."""
    return Network(
        "ResNet-20", models.resnet20, {"x": ("batch", 3, 32, 32)}, images(batch, 3, 32, 32), pictures,
        adapted=("layer*.*.conv*",), gated=("layer*.*.bn1",), fire=0.5, head="linear", hidden=(BASIC,), features=128,
        batch=f"batch {batch}", convolutional=True, windows=True, panel=batch > 1,
    )  # fmt: skip


def torchvision(name: str, seed: int) -> nn.Module:
    """With random weights, and the statistics that activations have under them: with any others, what a deep network
    says hardly depends on what it is asked, and a wrong result could not be told from a right one."""
    model = models.resnet(name, seed)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        model(torch.randn(4, *IMAGE, generator=torch.Generator().manual_seed(seed)))
    return model.eval()


def resnet(name: str, seed: int) -> Network:
    draw = images(1, *IMAGE)
    deep = name == "resnet50"
    return Network(
        name.replace("resnet", "ResNet-"), functools.partial(torchvision, name, seed), {"x": (1, *IMAGE)}, draw,
        repeated(draw, FEW if deep else SAMPLES), adapted=("layer*.*.conv*",),
        gated=("layer*.*.bn1",) + ("layer*.*.bn2",) * deep, fire=0.5,
        head="fc", hidden=BOTTLENECK if deep else (BASIC,), large=deep,
        convolutional=True, windows=True, rounding=DEEP if deep else 0.25,
    )  # fmt: skip


def mobilenet(seed: int) -> Network:
    """MobileNetV3-large. The first of its blocks has no hidden channels of its own."""
    draw, blocks = images(1, *IMAGE), ("features.[2-9].block.0", "features.1[0-5].block.0")
    expand = tuple(f"{block}.0" for block in blocks)
    return Network(
        "MobileNetV3", functools.partial(torchvision, "mobilenet_v3_large", seed), {"x": (1, *IMAGE)}, draw,
        repeated(draw, SAMPLES), adapted=expand, gated=blocks, fire=0.5, head="classifier.3",
        hidden=(Hidden(expand, "0.0", ("0.1", "1.0", "1.1"), ("2.0", "3.0")),), convolutional=True, rounding=DEEP,
    )  # fmt: skip


# ---- transformers


def vit(name: str, timm: str, seed: int) -> Network:
    def build() -> nn.Module:
        torch.manual_seed(seed)
        return models.frozen(models.need("timm").create_model(timm, pretrained=False))

    draw, large = images(1, *IMAGE), name == "ViT-base"
    return Network(
        name, build, {"x": (1, *IMAGE)}, draw, repeated(draw, FEW if large else SAMPLES),
        adapted=("blocks.*.attn.qkv",),
        gated=("blocks.*.mlp.act",), fire=0.5, head="head",
        hidden=(Hidden(("blocks.*.mlp.fc1",), "fc1", into=("fc2",)),), large=large,
    )  # fmt: skip


def encoder(seed: int, depth: int = 2, tokens: int = 16, width: int = 64) -> Network:
    """A small transformer of our own."""

    def build() -> nn.Module:
        torch.manual_seed(seed)
        return models.frozen(Pooled(models.Encoder(depth), width))

    draw = images(1, tokens, width)
    return Network(
        "encoder", build, {"x": ("batch", tokens, width)}, draw, repeated(draw, SAMPLES),
        adapted=("encoder.blocks.*.qkv",), gated=("encoder.blocks.*.mlp.1",), fire=0.5, head="head",
        hidden=(Hidden(("encoder.blocks.*.mlp.0",), "0", into=("2",)),), features=64,
    )  # fmt: skip


class Pooled(nn.Module):
    """An encoder, and a classifier on the mean token."""

    def __init__(self, encoder: nn.Module, width: int, classes: int = 10) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class Classifier(nn.Module):
    """transformers' classifier of sentences: ids to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits


def bert(seed: int, words: int = 30522, **config: Any) -> Network:
    def build() -> nn.Module:
        transformers = models.need("transformers")
        torch.manual_seed(seed)
        given = transformers.BertConfig(vocab_size=words, num_labels=10, **config)
        return models.frozen(Classifier(transformers.BertForSequenceClassification(given)))

    def draw(generator: torch.Generator) -> Inputs:
        return (torch.randint(words, (1, TOKENS), generator=generator),)

    layer = "model.bert.encoder.layer.*."
    return Network(
        "BERT-base", build, {"ids": (1, TOKENS)}, draw, repeated(draw, FEW),
        adapted=(f"{layer}attention.self.query", f"{layer}attention.self.value"),
        gated=(f"{layer}intermediate.intermediate_act_fn",), fire=0.5, head="model.classifier",
        hidden=(Hidden((f"{layer}intermediate.dense",), "intermediate.dense", into=("output.dense",)),), words=words,
        large=True,
    )  # fmt: skip


class Prefill(nn.Module):
    """A prompt's ids [1, T] to the logits of the next token, and the keys and values [layers, 1, heads, T, width]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Inputs:
        cache = models.need("transformers").DynamicCache()
        return self.step(ids, cache, ids.shape[1])

    def step(self, ids: Tensor, cache: Any, new: int) -> Inputs:
        found = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        layers = found.past_key_values.layers
        keys, values = (torch.stack([getattr(layer, name)[:, :, -new:] for layer in layers])
                        for name in ("keys", "values"))  # fmt: skip
        return found.logits, keys, values


class Decode(Prefill):
    """One id [1, 1] behind a cache to the logits of the next, and its own keys and values, for the caller's buffer."""

    def forward(self, ids: Tensor, keys: Tensor, values: Tensor) -> Inputs:  # type: ignore[override]
        cache = models.need("transformers").DynamicCache(list(zip(keys.unbind(0), values.unbind(0), strict=True)))
        return self.step(ids, cache, 1)


FLIPPED = 6e-2
"""Keys and values of all tokens and layers are outputs, and a gate that float32 turns moves one by 0.04 to 0.05 of the
largest, in ONNX Runtime and torch.compile on the plain modules, and in ours."""


def gpt2(seed: int, decode: bool, words: int = 50257, layers: int = 12, heads: int = 12, width: int = 768) -> Network:
    def build() -> nn.Module:
        transformers = models.need("transformers")
        torch.manual_seed(seed)
        config = transformers.GPT2Config(
            n_layer=layers, n_head=heads, n_embd=width, vocab_size=words, bos_token_id=0, eos_token_id=0
        )
        return models.frozen((Decode if decode else Prefill)(transformers.GPT2LMHeadModel(config)))

    cached = (layers, 1, heads, TOKENS, width // heads)
    shapes: dict[str, tuple[int | str, ...]] = (
        {"ids": (1, 1), "keys": cached, "values": cached} if decode else {"ids": (1, TOKENS)}
    )

    def draw(generator: torch.Generator) -> Inputs:
        ids = torch.randint(words, shapes["ids"], generator=generator)
        return ids, *(torch.randn(cached, generator=generator) for _ in range(2 * decode))

    block = "model.transformer.h.*."
    return Network(
        f"GPT-2, {'decode' if decode else 'prefill'}", build, shapes, draw, repeated(draw, 32 if decode else FEW),
        adapted=(f"{block}attn.c_attn",), gated=(f"{block}mlp.act",), fire=0.1 if decode else 0.5, head="model.lm_head",
        hidden=(Hidden((f"{block}mlp.c_fc",), "c_fc", into=("c_proj",)),), words=words, calls=32 if decode else 2,
        large=True, transposed=True, single=decode, compared=COMPARED if decode else FLIPPED,
        rounding=DEEP if decode else 0.25,
    )  # fmt: skip
