"""Weights of a GPT-2 as integers of 8 and 4 bits: the size of its ONNX file, its perplexity, and memory to calibrate.

Size is of the whole GPT-2 of 124 million weights, which are random: 12 layers, 768 wide, 50,257 tokens, and a table
that is embedding and head. With a scale for every 32 integers of 4 bits, a weight takes 5 bits instead of 32; asked is
a file of at most 0.17 of the float one.

Perplexity is of a GPT-2 of 4 layers that learnt the sources of Python's standard library (``tversky_gpt2.py``), on
files it has not seen. Errors are compensated on windows of the files that it learnt from, whose number has to leave the
peak memory as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import heads, models
from . import tversky_gpt2 as small
from .harness import PEAK_MEMORY, Case, Metric, Options, Peer, Reading, Unavailable
from .harness.memory import peak_above

LIMIT = 0.17
MEMORY_LIMIT = 1.1
SAMPLES = (64, 4096)
HERE = "benchmarks.quantized_weights"
FILE_SIZE = Metric("file size", "B", rounds=7, quick_rounds=1, timed=False)
PERPLEXITY = Metric("perplexity", "", rounds=1, quick_rounds=1, timed=False)
SIZE = small.Size(steps=600)
QUICK = small.Size(vocabulary=300, width=64, layers=1, heads=2, context=32, features=0, batch=4, steps=4, held_out=8)


@dataclass(frozen=True)
class Form:
    """How weights are stored: a scheme of Quantize, or floats; and whether those of the tables are, too."""

    scheme: str | None
    granularity: str = "channel"
    compensate: bool = False
    tables: bool = True

    def __str__(self) -> str:
        if self.scheme is None:
            return "float32"
        words = [self.scheme, self.granularity, *["compensated"] * self.compensate, *["no tables"] * (not self.tables)]
        return ", ".join(words)

    def steps(self) -> list[Any]:
        import fxfreeze as fz

        if self.scheme is None:
            return []
        left = None if self.tables else ["*.wte", "*.wpe", "*.lm_head"]
        return [fz.Quantize(scheme=self.scheme, granularity=self.granularity, compensate=self.compensate, exclude=left)]


FLOAT, BYTES, HALVES = Form(None), Form("int8-weight"), Form("int4-weight", "group:32")
COMPENSATED = Form("int4-weight", "group:32", compensate=True)
LAYERS = Form("int4-weight", "group:128", tables=False)
LAYERS_COMPENSATED = Form("int4-weight", "group:128", compensate=True, tables=False)


def cases(options: Options) -> Iterator[Case]:
    yield size_case(options)
    yield perplexity_case(options)
    yield memory_case(options)


def plan(form: Form, vocabulary: int, context: int, *targets: str) -> Any:
    import fxfreeze as fz

    ids = fz.Input("input_ids", shape=("batch", "sequence"), dtype="int64", low=0, high=vocabulary - 1)
    return fz.Plan([ids], form.steps(), targets, dims={"sequence": fz.Dim(max=context)})


def compiled(model: nn.Module, plan: Any, **given: Any) -> Any:
    import fxfreeze as fz

    try:
        return fz.compile(model, plan, **given)
    except fz.MissingDependencyError as error:
        raise Unavailable(str(error)) from error


# ---- size


def size_case(options: Options) -> Case:
    """Proofs are off: tests have them, and of twelve layers they take minutes."""
    shape = {"vocabulary": 1000, "width": 64, "layers": 2, "heads": 2} if options.quick else {
        "vocabulary": 50257, "width": 768, "layers": 12, "heads": 12
    }  # fmt: skip
    size = small.Size(**shape, context=1024)

    @functools.cache
    def gpt2() -> nn.Module:
        torch.manual_seed(options.seed)
        return small.Logits(size, "linear").eval()

    def peer(form: Form, limit: float | None = None) -> Peer:
        def prepare() -> Callable[[], Reading]:
            given = plan(form, size.vocabulary, size.context, "onnx")
            artifact = compiled(gpt2(), given, verify="off", example_inputs=torch.arange(32).reshape(2, 16))
            stored = sum(size for name, size in artifact.sizes.items() if name.startswith("onnx/"))
            return lambda: Reading(float(stored), 0.0)

        return Peer(str(form), prepare, limit=limit)

    return Case(
        name=f"GPT-2, {size.layers} layers, {size.width} wide, ONNX file",
        peers=(peer(FLOAT), peer(BYTES), peer(HALVES, limit=LIMIT)),
        baseline=str(FLOAT), reference=lambda: None, metric=FILE_SIZE,
    )  # fmt: skip


# ---- perplexity


def perplexity_case(options: Options) -> Case:
    size = QUICK if options.quick else SIZE

    @functools.cache
    def trained() -> tuple[nn.Module, small.Text]:
        files = small.sources()
        text = small.read(files[:20] if options.quick else files, size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            model = small.Logits(size, "linear")
            small.train(model, text.train, size)
        return model, text

    def peer(form: Form) -> Peer:
        def prepare() -> Callable[[], Reading]:
            model, text = trained()
            given = plan(form, size.vocabulary, size.context, "onnx")
            artifact = compiled(model, given, calibration=windows(text.train, size))
            scores = heads.scores(artifact.target("onnx"), text.held_out[:, :-1], size.batch)
            found = small.perplexity(scores, text.held_out)
            return lambda: Reading(found, 0.0)

        return Peer(str(form), prepare)

    return Case(
        name=f"GPT-2, {size.layers} layers, {size.width} wide, standard library",
        peers=tuple(map(peer, (FLOAT, BYTES, HALVES, COMPENSATED, LAYERS, LAYERS_COMPENSATED))),
        baseline=str(FLOAT), reference=lambda: None, metric=PERPLEXITY,
    )  # fmt: skip


def windows(tokens: Tensor, size: small.Size, count: int = 512) -> list[Tensor]:
    """`count` windows from all over the text, in batches."""
    found = tokens.unfold(0, size.context, size.context)
    return list(found[:: max(len(found) // count, 1)][:count].split(size.batch))


# ---- memory


def memory_case(options: Options) -> Case:
    samples = (8, 32) if options.quick else SAMPLES

    def peer(count: int, limit: float | None = None) -> Peer:
        given = {"samples": count, "quick": options.quick, "seed": options.seed}
        return Peer(f"{count} samples", peak_above(f"{HERE}:imports", f"{HERE}:calibrate", **given), limit=limit)

    few, many = samples
    return Case(
        name="calibration of compensated weights", peers=(peer(few), peer(many, limit=MEMORY_LIMIT)),
        baseline=f"{few} samples", reference=lambda: None, metric=PEAK_MEMORY,
    )  # fmt: skip


class Drawn:
    """Batches of token ids that are made as they are read, the same in every pass."""

    def __init__(self, samples: int, size: small.Size, seed: int) -> None:
        self.samples, self.size, self.seed = samples, size, seed

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.samples // self.size.batch):
            yield torch.randint(self.size.vocabulary, (self.size.batch, self.size.context), generator=generator)


def imports() -> Callable[[], float]:
    """The baseline, in a process of its own as what follows: everything that is imported, and one tiny export."""
    for package in ("transformers", "fxfreeze"):
        models.need(package)
    torch.export.export(nn.Linear(2, 2), (torch.ones(2, 2),))
    return lambda: 0.0


def calibrate(samples: int, quick: bool, seed: int) -> Callable[[], float]:
    size = QUICK if quick else SIZE
    torch.manual_seed(seed)
    model = small.Logits(size, "linear").eval()
    artifact = compiled(
        model, plan(COMPENSATED, size.vocabulary, size.context), verify="off", calibration=Drawn(samples, size, seed)
    )
    told = [row["detail"] for row in artifact.manifest["ledger"]]
    return lambda: 0.0 if any(f"on {samples} rows of calibration data" in detail for detail in told) else 1.0
