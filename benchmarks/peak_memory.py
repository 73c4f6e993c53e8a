"""Peak memory of fz.compile with proofs on, above the import baseline, against the bytes of the model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from . import models
from .harness import PEAK_MEMORY, Case, Options, Peer, Reading
from .harness.case import relative_error
from .harness.memory import peak_above

SUITE = "compile"
LIMIT = 4.0
HERE = "benchmarks.peak_memory"
TOKENS = 64
SMALL_BERT = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
SWEEP = {
    "bert, half as deep": {"num_hidden_layers": 6},
    "bert, half as wide": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
}

Check = Callable[[], float]


def cases(options: Options) -> Iterator[Case]:
    subjects = ("bert small", "resnet18") if options.quick else ("bert", *SWEEP, "resnet152")
    for subject in subjects:
        with torch.device("meta"):  # the sizes are enough here; only the child processes hold weights
            whole = models.size(build(subject, options.seed))
        given: dict[str, Any] = {"subject": subject, "seed": options.seed}
        exporting = peak_above(f"{HERE}:imports", f"{HERE}:export", **given)
        freezing = peak_above(f"{HERE}:imports", f"{HERE}:freeze", **given)
        yield Case(
            name=f"{subject}, {whole / 2**20:.0f} MiB",
            peers=(
                Peer("bytes of the model", functools.partial(constant, whole)),
                Peer("torch.export", exporting),
                Peer("fxfreeze, verify=full", freezing, limit=LIMIT),
            ),
            baseline="bytes of the model",
            reference=lambda: None,
            metric=PEAK_MEMORY,
        )


def constant(value: float) -> Callable[[], Reading]:
    return lambda: Reading(value, 0.0)


# What follows runs in child processes: the work first, then the check that the function returns.


def imports() -> Check:
    """The baseline: everything that the others import, and the machinery of one tiny export."""
    for package in ("timm", "torchvision", "transformers", "fxfreeze"):
        models.need(package)
    torch.export.export(nn.Linear(2, 2), (torch.ones(2, 2),))
    return lambda: 0.0


def export(subject: str, seed: int) -> Check:
    for package in ("timm", "torchvision", "transformers", "fxfreeze"):
        models.need(package)
    model = build(subject, seed)
    inputs = example(subject)
    batch = {name: {0: torch.export.Dim("batch")} for name in inputs}
    exported = torch.export.export(model, (), inputs, dynamic_shapes=batch)
    return lambda: relative_error(exported.module()(**inputs), model(**inputs))


def freeze(subject: str, seed: int) -> Check:
    import fxfreeze as fz

    for package in ("timm", "torchvision", "transformers"):
        models.need(package)
    model = build(subject, seed)
    artifact = fz.compile(model, plan(subject), verify="full")

    def check() -> float:
        emitted = fz.compile(model, plan(subject, "onnx"))
        got = models.outputs_without_target(artifact, emitted, **example(subject))
        return relative_error(got, model(**example(subject)))

    return check


def build(subject: str, seed: int) -> nn.Module:
    if subject.startswith("resnet"):
        return models.resnet(subject, seed)
    return models.bert(seed, **SMALL_BERT if subject == "bert small" else SWEEP.get(subject, {}))


def example(subject: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if subject.startswith("resnet"):
        return {"x": torch.randn(2, 3, 224, 224, generator=generator)}
    ids = torch.randint(0, 30522, (2, TOKENS), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def plan(subject: str, *targets: str) -> Any:
    import fxfreeze as fz

    if subject.startswith("resnet"):
        return fz.Plan(inputs=[fz.Input("x", shape=("batch", 3, 224, 224))], targets=targets)
    ids = fz.Input("input_ids", shape=("batch", TOKENS), dtype="int64", low=0, high=30521)
    mask = fz.Input("attention_mask", shape=("batch", TOKENS), dtype="int64", low=1, high=1)
    return fz.Plan(inputs=[ids, mask], targets=targets)
