"""Is there a network of a twentieth of the weights in LeNet-300-100 that trains as well, and is it the mask?

    python -m benchmarks.tickets_mnist [--seeds 3] [--levels 14] [--controls 5,10] [--quick] [--out FILE]

Iterative magnitude pruning on MNIST, set up as in open_lth: an MLP 784-300-100-10 with Kaiming's normal initial
weights, SGD with rate 0.1, batches of 128, 40 epochs, 20 % of the remaining weights pruned at a time and the others set
back to their initial values; the output layer is not pruned. Level 14 has 0.8^14 = 4.4 % of the weights of the two
layers that are. Controls at some levels, always at the last: the same mask on other initial weights, trained for as
long, and a random mask with as many weights in every layer on the same initial weights.

Scores are accuracies on the 10,000 test images. Nothing is chosen by them: the level that is judged is the last one,
and every seed counts. There is one JSON line, and beside FILE the plot of the search as SVG.

The search lies in ``--folder`` (``build/tickets_mnist``) and goes on there when it is started again; name a new one, or
remove it, to begin anew. ``train_seconds`` is what all runs together took, in however many processes.

Exit status 1: at the last level more than 5 % of the weights are left, or the tickets are more than 0.5 points below
the dense network in the mean, or one of them is not above both controls of its own seed. ``--quick`` has no limits. The
images are ``mnist.npz`` in FXFREEZE_DATA, or in ``../shared/data`` beside the repository.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .harness import record
from .tversky_mnist import mnist, mnist_folder

DENSITY, LOSS = 0.05, 0.005
RATE, BATCH, EPOCHS, LEVELS = 0.1, 128, 40, 14
WIDTHS, OUTPUT = (300, 100), "4"
CONTROLS = {"reinit": "same mask, other initial weights", "random": "random mask"}


@dataclass(frozen=True)
class Data:
    """Images float32 [n, 784], standardised by the mean and deviation of all training pixels, and labels [n]."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def standardised(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> Data:
    mean, deviation = train.mean(), train.std()
    flat = [((images - mean) / deviation).flatten(1) for images in (train, test)]
    return Data(flat[0], train_labels, flat[1], test_labels)


@dataclass(frozen=True)
class LeNet:
    """`build`, `train` and `evaluate` of a search; a step is an epoch."""

    data: Data
    rate: float = RATE

    def build(self, seed: int) -> nn.Module:
        sizes = (self.data.train.shape[1], *WIDTHS, 10)
        layers: list[nn.Module] = []
        for inner, outer in itertools.pairwise(sizes):
            layers += [nn.Linear(inner, outer), nn.ReLU()]
            nn.init.kaiming_normal_(layers[-2].weight)  # type: ignore[arg-type]
        return nn.Sequential(*layers[:-1])

    def train(self, model: nn.Module, *, start: int, stop: int, seed: int) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=self.rate)
        for epoch in range(start, stop):
            order = torch.randperm(len(self.data.train), generator=torch.Generator().manual_seed(seed + epoch))
            for batch in order.split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(model(self.data.train[batch]), self.data.train_labels[batch]).backward()
                optimizer.step()

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        return float((model(self.data.test).argmax(-1) == self.data.test_labels).double().mean())


def search(
    data: Data, folder: Path, *, seeds: int, levels: int, controls: Collection[int], epochs: int, progress: bool = True
) -> Any:
    import fxfreeze as fz

    net = LeNet(data)
    return fz.find_ticket(
        net.build, net.train, net.evaluate, levels=levels, steps=epochs, rewind_to=0, exclude=OUTPUT,
        seeds=range(seeds), controls=sorted({*controls, levels}), folder=folder, progress=progress,
    )  # fmt: skip


def measured(tickets: Any, data: Data, limits: bool) -> dict[str, Any]:
    """The row: every level, and whether the last one is a ticket."""
    kinds = ("ticket", *CONTROLS)
    levels = {kind: tickets.levels(kind) for kind in kinds}
    dense, last = levels["ticket"][0], levels["ticket"][-1]
    scores = {kind: {run.seed: run.score for run in tickets.runs if (run.kind, run.level) == (kind, last.level)}
              for kind in kinds}  # fmt: skip
    above = {kind: min(scores["ticket"][seed] - score for seed, score in scores[kind].items()) for kind in CONTROLS}
    loss = dense.score - last.score
    good = last.density <= DENSITY and loss <= LOSS and all(margin > 0 for margin in above.values())
    masks = tickets.masks(last.level, next(iter(scores["ticket"])))
    rest = sum(p.numel() for p in LeNet(data).build(0).parameters()) - sum(mask.numel() for mask in masks.values())
    left = sum(int(mask.sum()) for mask in masks.values())
    return {
        "name": "LeNet-300-100", "ok": good or not limits,
        "limits": {"density": DENSITY, "loss": LOSS} if limits else None,
        "density": last.density, "weights_left": left, "never_pruned": rest,
        "dense": asdict(dense), "ticket": asdict(last), "loss": loss,
        "controls": {CONTROLS[kind]: asdict(levels[kind][-1]) for kind in CONTROLS},
        "least_above_control": {CONTROLS[kind]: margin for kind, margin in above.items()},
        "best_within_loss": tickets.best(LOSS).level,
        "levels": {kind: [asdict(level) for level in of] for kind, of in levels.items()},
        "last_by_seed": scores,
        "train_seconds": round(sum(run.seconds for run in tickets.runs), 1),
    }  # fmt: skip


def publish(row: dict[str, Any], picture: str, shared: dict[str, Any], out: Path | None) -> None:
    for name, value in row.items():
        if name != "levels":
            print(f"{name}: {value}")
    if out:
        record.replace_row(out, {**row, **shared})
        out.with_suffix(".svg").write_text(picture, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many replicates, from 0")
    parser.add_argument("--levels", type=int, default=LEVELS)
    parser.add_argument("--controls", default="5,10", help="levels with controls, comma-separated; the last always has")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=record.ROOT / "build" / "tickets_mnist", help="of the search")
    parser.add_argument("--quick", action="store_true", help="few images, two levels, one epoch, no limits")
    parser.add_argument("--out", type=Path, help="write JSON lines here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    images = mnist(mnist_folder(parser))
    data = standardised(images.train, images.train_labels, images.test, images.test_labels)
    controls = [int(level) for level in options.controls.split(",") if level]
    given: dict[str, Any] = {"seeds": options.seeds, "levels": options.levels, "controls": controls, "epochs": EPOCHS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder
        if options.quick:
            data = Data(data.train[:2000], data.train_labels[:2000], data.test[:1000], data.test_labels[:1000])
            given, folder = {"seeds": 1, "levels": 2, "controls": [], "epochs": 1}, Path(scratch) / "search"
        folder.parent.mkdir(parents=True, exist_ok=True)
        tickets = search(data, folder, **given)
        row, picture = {**measured(tickets, data, limits=not options.quick), "epochs": given["epochs"]}, tickets.svg()
    command = shlex.join(sys.argv[1:])
    shared = asdict(record.environment("tickets_mnist", quick=options.quick, seed=0, command=command))
    publish(row, picture, shared, options.out)
    return 0 if row["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
