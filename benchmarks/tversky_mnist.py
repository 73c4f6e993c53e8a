"""Does a trained network with a Tversky head predict the same on every MNIST test image when it is compiled?

    python -m benchmarks.tversky_mnist [--epochs 4] [--targets torch,aoti,onnx] [--out FILE]

A small CNN learns the 60,000 training images, from seed 0. It is compiled twice: with the layer of ``fxfreeze.nn`` it
was trained with, and with that of the package `tversky`, which is given the same weights and recognised at capture.
Each gives one JSON line. The images are ``mnist.npz`` in FXFREEZE_DATA, or in ``../shared/data`` beside the repository.

Exit status 1: an accuracy below 98.5 %, or a prediction that differs from eager's in a row whose features are all
farther from the threshold than rounding reaches; those that differ nearer to it are counted apart.
"""

from __future__ import annotations

import argparse
import copy
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import heads, models
from .harness import record

ACCURACY = 0.985
LAYERS = ("fxfreeze.nn.TverskyProjection", "tversky.nn.TverskyProjection")
TARGETS = ("torch", "aoti", "onnx")
FEATURES, BATCH, RATE = 128, 128, 5e-3
CHUNK = 500
"""Images per call where all test images are scored."""


@dataclass(frozen=True)
class Images:
    """float32 [n, 1, side, side] in [0, 1], with their labels."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def mnist_folder(parser: argparse.ArgumentParser) -> Path:
    """Where ``mnist.npz`` is; an error of the command line where it is not."""
    folder = Path(os.environ.get("FXFREEZE_DATA", record.ROOT.parent / "shared" / "data"))
    if not (folder / "mnist.npz").is_file():
        parser.error("mnist.npz is not there: name its folder in FXFREEZE_DATA")
    return folder


def mnist(folder: Path) -> Images:
    import numpy

    with numpy.load(folder / "mnist.npz") as data:
        images = [torch.from_numpy(data[f"x_{part}"]).unsqueeze(1).float() / 255 for part in ("train", "test")]
        labels = [torch.from_numpy(data[f"y_{part}"]).long() for part in ("train", "test")]
    return Images(images[0], labels[0], images[1], labels[1])


class Net(nn.Module):
    """Three convolutions, the last as wide as the image is by then, and a similarity to ten prototypes."""

    def __init__(self, side: int) -> None:
        from fxfreeze.nn import TverskyProjection

        super().__init__()
        # No ReLU at the end: what is about 0 on either side has about half of the features.
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, side // 4, bias=False), nn.BatchNorm2d(64), nn.Flatten(),
        )  # fmt: skip
        self.head: nn.Module = TverskyProjection(64, 10, FEATURES)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.body(image))


def train(net: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """AdamW, one cycle of the rate, cross-entropy; the order of the images is from seed 0."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE)
    steps = epochs * -(-len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    net.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=generator).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    net.eval()


def with_package_head(net: Net) -> Net:
    """A copy of `net` whose head is the layer of the package `tversky`, with the weights of ours."""
    own: Any = net.head
    how = own.model, own.normalize, own.intersection, own.difference
    with torch.random.fork_rng(devices=[]):  # it draws weights, which are then replaced
        package = models.need("tversky.nn").TverskyProjection(
            own.in_features, own.num_prototypes, own.num_features, *how
        )
    state = {"feature_bank.weight": own.features, "prototypes.weight": own.prototypes}
    state |= {name: getattr(own, name) for name in ("theta", "alpha", "beta")}
    package.load_state_dict(state)
    result = copy.deepcopy(net)
    result.head = package
    return result.eval()


def run(
    images: Images,
    *,
    epochs: int,
    layers: Sequence[str] = LAYERS,
    targets: Sequence[str] = TARGETS,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, Any]]:
    """Train once, then a row for each of `layers` as the head."""
    say(f"training on {len(images.train)} images, {epochs} epochs")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net, started = Net(images.train.shape[-1]), time.perf_counter()
        train(net, images.train, images.train_labels, epochs)
        seconds = time.perf_counter() - started
    near = heads.near_threshold(net, net.head, images.test, CHUNK)
    trained = heads.scores(net, images.test, CHUNK)
    for name in layers:
        say(f"compiling with {name}")
        model = net if name.startswith("fxfreeze") else with_package_head(net)
        row = {"name": name, "epochs": epochs, "train_seconds": round(seconds, 1)}
        yield row | compiled(model, images, trained, near, targets)


def compiled(model: Net, images: Images, trained: Tensor, near: Tensor, targets: Sequence[str]) -> dict[str, Any]:
    """Compile `model` and compare it and its targets, eager with the network as trained, targets with eager."""
    import fxfreeze as fz

    inputs = [fz.Input("image", shape=("batch", *images.test.shape[1:]), low=0, high=1)]
    started = time.perf_counter()
    artifact = fz.compile(model, fz.Plan(inputs=inputs, targets=targets), example_inputs=images.test[:16])
    seconds = time.perf_counter() - started
    eager = heads.scores(model, images.test, CHUNK)
    results = {"eager": scored(eager, trained, near, images.test_labels)}
    for target in targets:
        found = heads.scores(artifact.target(target), images.test, CHUNK)
        results[target] = scored(found, eager, near, images.test_labels)
    return {
        "ok": good(results),
        "images": {"train": len(images.train), "test": len(images.test)},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "head_bytes": heads.parameter_bytes(model, "head"),
        "frozen_head_bytes": heads.frozen_bytes(artifact, model, "head"),
        "head_executes": heads.executes(artifact, "head"),
        "near_threshold": int(near.sum()),
        "results": results,
        "largest_proof_error": heads.largest_proof_error(artifact),
        "compile_seconds": round(seconds, 1),
        "file_bytes": artifact.sizes,
    }


def good(results: dict[str, dict[str, Any]]) -> bool:
    """What the exit status says."""
    return all(
        result["accuracy"] >= ACCURACY and result["differing_away_from_threshold"] == 0 for result in results.values()
    )


def scored(actual: Tensor, wanted: Tensor, near: Tensor, labels: Tensor) -> dict[str, Any]:
    right = actual.argmax(-1) == labels
    return {"accuracy": float(right.double().mean()), **heads.compared(actual, wanted, near)}


def main() -> int:
    parser = heads.parser(__doc__, TARGETS)
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = mnist_folder(parser)
    shared = asdict(record.environment("tversky_mnist", quick=False, seed=0, command=shlex.join(sys.argv[1:])))
    targets = tuple(options.targets.split(","))
    rows = run(mnist(folder), epochs=options.epochs, targets=targets, say=lambda text: print(text, flush=True))
    return 0 if heads.publish(rows, shared, options.out) else 1


if __name__ == "__main__":
    sys.exit(main())
