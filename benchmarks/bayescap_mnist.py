"""How well does a BayesCap know where a frozen autoencoder is wrong?

    python -m benchmarks.bayescap_mnist [--targets torch,aoti,onnx] [--train 6000] [--epochs 2] [--quick] [--out FILE]

A convolutional autoencoder learns to reconstruct MNIST through 16 numbers, and is frozen. A BayesCap on its output
learns to reconstruct that output, and to say how far it is from the image. Both are compiled as one network with
outputs mean, alpha and beta. On the 10,000 test images one JSON line holds: the frozen network's error and the cap's,
the mean of σ², how σ² goes along with the squared error, and two calibration errors (see ``fxfreeze.nn``), each beside
that of one σ² for all pixels, fitted on training images; and for every target how far its outputs are from eager
torch's. One σ² that is right in the mean has next to no uncertainty calibration error, for it is all in one bin; and
coverage counts pixels, of which four fifths are exactly 0, as no density foresees. What tells the two apart is the mean
negative log-likelihood of the images, in nats a pixel, and the correlation.

Beside FILE a plot is written, as SVG: mean squared error against predicted variance, by parts of equally many pixels.

Exit status 1: a target's mean, or its log σ², is off by more than 1e-4 of the largest, or the cap's μ is off by more
than 0.02 from the frozen output in the mean, or σ² does not go along with the error (correlation ≤ 0.3), or the images
are no likelier than with one σ² for all pixels. ``--quick`` has no such limits but the targets'. The images are
``mnist.npz`` in FXFREEZE_DATA, or in ``../shared/data`` beside the repository.
"""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxfreeze.nn import (
    BayesCap,
    calibration_error,
    cap_loss,
    coverage_error,
    log_variance,
    negative_log_likelihood,
    variance,
)

from . import heads
from .harness import record
from .tversky_mnist import Images, mnist, mnist_folder

TARGETS = ("torch", "aoti", "onnx")
BATCH, CHUNK, RATE, CODE = 128, 500, 3e-3, 16
WEIGHTS = (1.0, 0.01)
"""Of the identity and of the likelihood, which is of the order of −5 a pixel."""
TOLERANCE, IDENTITY, CORRELATION = 1e-4, 0.02, 0.3
BINS = 15


class Autoencoder(nn.Module):
    """image [n, 1, side, side] → as many pixels, through `CODE` numbers; side a multiple of 4."""

    def __init__(self, side: int) -> None:
        super().__init__()
        small = side // 4
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * small * small, CODE),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(CODE, 32 * small * small), nn.ReLU(), nn.Unflatten(1, (32, small, small)),
            nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1), nn.ReLU(),
            nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:
        return self.decoder(self.encoder(image))


class Capped(nn.Module):
    """The frozen network and the cap on it: what is compiled."""

    def __init__(self, frozen: nn.Module, cap: BayesCap) -> None:
        super().__init__()
        self.frozen, self.cap = frozen, cap

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        mean, alpha, beta = self.cap(self.frozen(image))
        return {"mean": mean, "alpha": alpha, "beta": beta}


def fit(module: nn.Module, images: Tensor, epochs: int, loss: Any) -> None:
    """Adam, one cycle of the rate; `loss` of a batch; the order is from seed 0."""
    generator, steps = torch.Generator().manual_seed(0), epochs * -(-len(images) // BATCH)
    optimizer = torch.optim.Adam(module.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    module.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(BATCH):
            optimizer.zero_grad()
            loss(images[batch]).backward()
            optimizer.step()
            schedule.step()
    module.eval()


def trained(images: Images, epochs: int) -> Capped:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        frozen = Autoencoder(images.train.shape[-1])
        fit(frozen, images.train, 4 * epochs, lambda batch: F.mse_loss(frozen(batch), batch))
        frozen.requires_grad_(False)
        cap = BayesCap(1, hidden=8, blocks=1, least=(1e-2, 0.3))

        def loss(batch: Tensor) -> Tensor:
            y = frozen(batch)
            return cap_loss(*cap(y), frozen=y, truth=batch, weights=WEIGHTS)

        fit(cap, images.train, epochs, loss)
    return Capped(frozen, cap).eval()


@torch.no_grad()
def outputs(call: Any, images: Tensor) -> dict[str, Tensor]:
    """mean, alpha and beta of all images."""
    parts = [call(part) for part in images.split(CHUNK)]
    return {name: torch.cat([part[name] for part in parts]) for name in ("mean", "alpha", "beta")}


@torch.no_grad()
def quality(model: Capped, images: Images) -> tuple[dict[str, Any], list[tuple[float, float]]]:
    """The numbers of the row, and the points of the plot: mean σ² and mean squared error."""
    found = outputs(model, images.test)
    frozen = torch.cat([model.frozen(part) for part in images.test.split(CHUNK)])
    mean, sigma2 = found["mean"], variance(found["alpha"], found["beta"])
    error = (mean - images.test).square()
    some = images.train[:5000]
    one = torch.full_like(sigma2, float((outputs(model, some)["mean"] - some).square().mean()))
    normal = (2 * one).sqrt(), torch.full_like(one, 2.0)  # α and β of a normal distribution of that variance
    numbers = {
        "frozen_mse": float((frozen - images.test).square().mean()),
        "mse": float(error.mean()),
        "identity": float((mean - frozen).abs().mean()),
        "mean_variance": float(sigma2.mean()),
        "correlation": float(torch.corrcoef(torch.stack([error.flatten(), sigma2.flatten()]))[0, 1]),
        "nll": {"cap": float(negative_log_likelihood(mean, found["alpha"], found["beta"], images.test).mean()),
                "one variance": float(negative_log_likelihood(mean, *normal, images.test).mean())},
        "calibration": {"cap": calibration_error(mean, sigma2, images.test, bins=BINS),
                        "one variance": calibration_error(mean, one, images.test, bins=BINS)},
        "coverage": {"cap": coverage_error(mean, found["alpha"], found["beta"], images.test),
                     "one variance": coverage_error(mean, *normal, images.test)},
    }  # fmt: skip
    order = sigma2.flatten().argsort()
    points = [(float(sigma2.flatten()[part].mean()), float(error.flatten()[part].mean()))
              for part in order.chunk(BINS)]  # fmt: skip
    return numbers, points


def compiled(model: Capped, images: Images, targets: Sequence[str]) -> dict[str, Any]:
    """For every target, how far its μ and its log σ² are from eager torch's, relative to the largest."""
    import fxfreeze as fz

    side, started = images.test.shape[-1], time.perf_counter()
    plan = fz.Plan(inputs=[fz.Input("image", shape=("batch", 1, side, side), low=0, high=1)], targets=targets)
    artifact = fz.compile(model, plan)
    seconds, wanted, rows = round(time.perf_counter() - started, 1), outputs(model, images.test[:1000]), {}
    for target in targets:
        found = outputs(artifact.target(target), images.test[:1000])
        spreads = [log_variance(item["alpha"], item["beta"]) for item in (found, wanted)]
        pairs = {"mean": (found["mean"], wanted["mean"]), "log_variance": (spreads[0], spreads[1])}
        rows[target] = {name: float((one - other).abs().max() / other.abs().max())
                        for name, (one, other) in pairs.items()}  # fmt: skip
    folded = sum(row["requested"] == "batch-norm" and row["outcome"] == "rewritten"
                 for row in artifact.manifest["ledger"])  # fmt: skip
    return {"targets": rows, "compile_seconds": seconds, "norms_folded": folded}


def measured(images: Images, *, epochs: int, targets: Sequence[str], limits: bool) -> tuple[dict[str, Any], str]:
    """The row, and the plot."""
    started = time.perf_counter()
    model = trained(images, epochs)
    seconds = round(time.perf_counter() - started, 1)
    numbers, points = quality(model, images)
    run = compiled(model, images, targets)
    same = all(error <= TOLERANCE for row in run["targets"].values() for error in row.values())
    likelier = numbers["nll"]["cap"] < numbers["nll"]["one variance"]
    good = likelier and numbers["identity"] <= IDENTITY and numbers["correlation"] > CORRELATION
    row = {"name": "autoencoder and cap", "ok": same and (good or not limits), "trained_on": len(images.train),
           "epochs": epochs,
           "training_seconds": seconds, **numbers, **run}  # fmt: skip
    return row, plot(points)


def plot(points: list[tuple[float, float]]) -> str:
    """SVG: squared error against variance on logarithmic axes, with the diagonal on which both are the same."""
    size, edge = 360, 50
    logs = [[math.log10(max(value, 1e-9)) for value in point] for point in points]
    low, high = math.floor(min(map(min, logs))), math.floor(max(map(max, logs))) + 1

    def place(value: float) -> float:
        return edge + (value - low) / (high - low) * size

    def flip(value: float) -> float:
        return size + 2 * edge - place(value)

    view, diagonal = f"0 0 {size + 2 * edge} {size + 2 * edge}", f"M{place(low)} {flip(low)}L{place(high)} {flip(high)}"
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{view}" font-family="sans-serif" font-size="12">',
             '<rect width="100%" height="100%" fill="white"/>',
             f'<path d="{diagonal}" stroke="#999" stroke-dasharray="4"/>']  # fmt: skip
    for power in range(low, high + 1):
        lines.append(f'<text x="{place(power)}" y="{size + edge + 18}" text-anchor="middle">1e{power}</text>')
        lines.append(f'<text x="{edge - 6}" y="{flip(power) + 4}" text-anchor="end">1e{power}</text>')
    lines.append(f'<rect x="{edge}" y="{edge}" width="{size}" height="{size}" fill="none" stroke="black"/>')
    lines += [f'<circle cx="{place(x):.1f}" cy="{flip(y):.1f}" r="4" fill="#1f77b4"/>' for x, y in logs]
    middle = edge + size / 2
    lines.append(f'<text x="{middle}" y="{size + edge + 38}" text-anchor="middle">mean predicted variance</text>')
    lines.append(f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">mean squared error</text>')
    return "\n".join([*lines, "</svg>", ""])


def publish(row: dict[str, Any], picture: str, shared: dict[str, Any], out: Path | None) -> None:
    for name, value in row.items():
        print(f"{name}: {value}")
    if out:
        record.replace_row(out, {**row, **shared})
        out.with_suffix(".svg").write_text(picture, encoding="utf-8")


def main() -> int:
    parser = heads.parser(__doc__, TARGETS)
    parser.add_argument("--train", type=int, default=6000, help="how many of the 60,000 training images")
    parser.add_argument("--epochs", type=int, default=2, help="of the cap; of the autoencoder four times as many")
    parser.add_argument("--quick", action="store_true", help="few images, one epoch, limits for the targets only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images, epochs, count, tests = mnist(mnist_folder(parser)), options.epochs, options.train, 10_000
    if options.quick:
        epochs, count, tests = 1, 1000, 1000
    images = Images(images.train[:count], images.train_labels[:count], images.test[:tests], images.test_labels[:tests])
    command = shlex.join(sys.argv[1:])
    shared = asdict(record.environment("bayescap_mnist", quick=options.quick, seed=0, command=command))
    row, picture = measured(images, epochs=epochs, targets=options.targets.split(","), limits=not options.quick)
    publish(row, picture, shared, options.out)
    return 0 if row["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
