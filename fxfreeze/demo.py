"""``fxfreeze demo``: the main job on real data, in about a minute, without downloads.

A small CNN learns scikit-learn's handwritten digits and is frozen. It fails on digits turned by 45°; a LoRA teaches it
those. One call folds the LoRA and the batch-norms, proves every rewrite, and makes three artifacts that agree.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .adapt import AdaptedModule, adapt
from .api import compile
from .artifact import Artifact
from .errors import MissingDependencyError
from .plan import Input, LoRA, Plan

Progress = Callable[[str], None]
TURN = 45.0


@dataclass
class Digits:
    """8×8 digits, float32 [n, 1, 8, 8] in [0, 1], with their labels; upright and turned by 45°."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    turned_train: Tensor
    turned_test: Tensor


@dataclass
class DemoResult:
    """What the demo measured."""

    accuracy: dict[str, float]
    latency_ms: dict[str, float]
    seconds: float
    parameters: int
    trainable: int
    artifact: Artifact

    def to_json(self) -> dict[str, Any]:
        return {
            "accuracy": self.accuracy, "latency_ms": self.latency_ms, "seconds": self.seconds,
            "parameters": self.parameters, "trainable_parameters": self.trainable, "manifest": self.artifact.manifest,
        }  # fmt: skip


def load_digits() -> Digits:
    """scikit-learn's bundled digits, 1,347 to train on and 450 to test on.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as bundled
    except ImportError as error:
        raise MissingDependencyError(
            "the demo's data comes with scikit-learn, which is not installed", hint='pip install "fxfreeze[demo]"'
        ) from error
    data = bundled()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels, cut = images[order], labels[order], 1347
    turned = turn(images, TURN)
    return Digits(images[:cut], labels[:cut], images[cut:], labels[cut:], turned[:cut], turned[cut:])


def turn(images: Tensor, degrees: float) -> Tensor:
    """Rotate images [n, c, h, w] about their centre, bilinear, zeros outside."""
    angle = torch.deg2rad(torch.tensor(degrees))
    cos, sin = float(torch.cos(angle)), float(torch.sin(angle))
    matrix = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]]).expand(len(images), 2, 3)
    return F.grid_sample(images, F.affine_grid(matrix, list(images.shape), align_corners=False), align_corners=False)


class DigitNet(nn.Module):
    """Two conv/batch-norm blocks and two linear layers, 38 thousand parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.hidden, self.dropout, self.head = nn.Linear(512, 64), nn.Dropout(0.2), nn.Linear(64, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.dropout(F.relu(self.hidden(self.features(image).flatten(1)))))


def train(net: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, rate: float) -> None:
    """Adam, batches of 64, cross-entropy, over the parameters that require grad."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=rate)
    net.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
    net.eval()


@torch.no_grad()
def accuracy(net: Callable[[Tensor], Any], images: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is their label."""
    return float((net(images).argmax(1) == labels).double().mean())


@torch.no_grad()
def latency_ms(net: Callable[[Tensor], Any], image: Tensor, *, runs: int = 100) -> float:
    """Median milliseconds of one call, after 20 calls to warm up."""
    times = []
    for run in range(runs + 20):
        started = time.perf_counter()
        net(image)
        if run >= 20:
            times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


def run_demo(out: Path | None = None, *, say: Progress = lambda text: None) -> DemoResult:
    """Train, adapt, compile, measure; save the artifact to `out` when given. Uses seed 0 throughout.

    Raises:
        MissingDependencyError: scikit-learn or the ONNX packages are not installed.
        ArtifactError: `out` exists.
    """
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        say("training a CNN on upright digits")
        digits, base = load_digits(), DigitNet()
        train(base, digits.train, digits.train_labels, epochs=12, rate=2e-3)
        say(f"frozen; training a LoRA on digits turned by {TURN:.0f}°")
        plan = Plan(
            inputs=[Input("image", shape=("batch", 1, 8, 8))],
            steps=[LoRA(at=["features.3", "hidden", "head"], rank=8, alpha=16)],
            targets=["torch", "aoti", "onnx"],
        )
        net = adapt(base, plan)
        train(net, digits.turned_train, digits.train_labels, epochs=20, rate=3e-3)
    say("compiling to torch, AOTInductor and ONNX, with proofs")
    artifact = compile(net, plan, progress=say)
    if out is not None:
        artifact.save(out)
    say("measuring")
    return _measure(base, net, artifact, digits, started)


def _measure(base: nn.Module, net: AdaptedModule, artifact: Artifact, digits: Digits, started: float) -> DemoResult:
    one, labels = digits.turned_test[:1], digits.test_labels
    callables: dict[str, Callable[[Tensor], Any]] = {"frozen base, eager": base, "with LoRA, eager": net}
    for target in artifact.targets:
        callables[f"folded, {target}"] = artifact.target(target)
    scores = {"frozen base, upright digits": accuracy(base, digits.test, labels)}
    scores.update({name: accuracy(call, digits.turned_test, labels) for name, call in callables.items()})
    times = {name: latency_ms(call, one) for name, call in callables.items()}
    return DemoResult(
        accuracy=scores, latency_ms=times, seconds=time.perf_counter() - started,
        parameters=sum(p.numel() for p in base.parameters()),
        trainable=sum(p.numel() for p in net.parameters() if p.requires_grad), artifact=artifact,
    )  # fmt: skip
