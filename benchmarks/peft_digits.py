"""An adapter that peft trained and saved, compiled from its folder: does every target predict what peft does?

    python -m benchmarks.peft_digits [--method dora] [--targets torch,aoti,onnx] [--epochs 30] [--out FILE]

A small BERT classifier of transformers reads scikit-learn's digits (1,797 images of 8 by 8) as sequences of 64 tokens,
one per pixel, each one of 17 shades. It learns digits 0 to 9 upright, is frozen, and adapted to images upside down with
peft: DoRA (or LoRA) of rank 8 on queries, values and both feed-forward layers. What peft's ``save_pretrained`` wrote is
all that fxfreeze sees beside the base. One JSON line. Exit status 1: a target predicts anything else than peft, or a
score is off by more than 1e-3.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import heads, models
from .harness import record

TARGETS = ("torch", "aoti", "onnx")
SIDE, SHADES, TRAINED, ERROR = 8, 17, 1200, 1e-3
MODULES = ["query", "value", "intermediate.dense", "output.dense"]


def digits() -> tuple[Tensor, Tensor]:
    """Shades [1797, 8, 8] of 0 to 16, and labels [1797], in an order of their own."""
    data = models.need("sklearn.datasets").load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.images).long()[order], torch.tensor(data.target)[order]


def classifier(seed: int) -> nn.Module:
    transformers = models.need("transformers")
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=SHADES, hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=192,
        max_position_embeddings=SIDE * SIDE, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)  # type: ignore[no-any-return]


def train(net: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float) -> None:
    trained = [value for value in net.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * -(-len(images) // 64))
    net.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            loss = nn.functional.cross_entropy(net(input_ids=images[rows].flatten(1)).logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()


@torch.no_grad()
def scores(call: Callable[[Tensor], Any], images: Tensor) -> Tensor:
    """Logits [n, 10]."""
    return torch.cat([call(part.flatten(1))["logits"] for part in images.split(200)])


def run(options: argparse.Namespace) -> dict[str, Any]:
    peft = models.need("peft")
    images, labels = digits()
    turned, held = images.flip(1), labels[TRAINED:]
    base = classifier(options.seed)
    train(base, images[:TRAINED], labels[:TRAINED], options.epochs, 2e-3)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=MODULES, use_dora=options.method == "dora")
    net = peft.get_peft_model(copy.deepcopy(base), config)
    train(net, turned[:TRAINED], labels[:TRAINED], options.epochs, 5e-3)
    accuracy = {
        "base_upright": scores(base, images[TRAINED:]),
        "base_turned": scores(base, turned[TRAINED:]),
        "peft_turned": scores(net, turned[TRAINED:]),
    }
    row: dict[str, Any] = {"name": f"{options.method}, digits upside down", "test_images": len(held)}
    row |= {name: float((found.argmax(1) == held).double().mean()) for name, found in accuracy.items()}
    with tempfile.TemporaryDirectory() as folder:
        net.save_pretrained(folder)
        row |= compared(base, folder, turned[TRAINED:], accuracy["peft_turned"], options.targets.split(","))
    return row


def compared(base: nn.Module, folder: str, images: Tensor, truth: Tensor, targets: list[str]) -> dict[str, Any]:
    """Compile `base` with what peft saved in `folder`, and hold every target's scores against `truth`."""
    import fxfreeze as fz

    shades = fz.Input("input_ids", ("batch", SIDE * SIDE), "int64", low=0, high=SHADES - 1)
    started = time.perf_counter()
    artifact = fz.compile(base, fz.Plan([shades], fz.from_peft(folder), targets=targets, outputs=["logits"]))
    row: dict[str, Any] = {"compile_seconds": round(time.perf_counter() - started, 1), "results": {}}
    for target in targets:
        found = scores(partial(artifact, target=target), images)
        row["results"][target] = {
            "differing": int((found.argmax(1) != truth.argmax(1)).sum()),
            "score_error": float((found - truth).abs().max() / truth.abs().max()),
        }
    row["ok"] = all(item["differing"] == 0 and item["score_error"] <= ERROR for item in row["results"].values())
    return row


def main() -> int:
    parser = heads.parser(__doc__, TARGETS)
    parser.add_argument("--method", choices=("dora", "lora"), default="dora")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    command = shlex.join(sys.argv[1:])
    shared = asdict(record.environment("peft_digits", quick=False, seed=options.seed, command=command))
    row = shared | run(options)
    print(json.dumps({key: row[key] for key in row.keys() - shared.keys()}))
    if options.out is not None:
        record.replace_row(options.out, row)
    return 0 if row["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
