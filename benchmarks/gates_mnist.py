"""What do gates buy when a trained network is specialised, and what does it cost to make them hard?

    python -m benchmarks.gates_mnist [--seeds 5] [--targets torch,aoti,onnx] [--quick] [--choose] [--out FILE]

An MLP 784-256-256-10 learns MNIST, half of it upright and half turned by 45°. It is frozen, and specialised on images
turned by 45° only: not at all; with gates at both hidden activations, trained for accuracy alone or also for few firing
neurons; with LoRA on all layers; and by training all weights of a copy. Gates are compiled, and so made hard, for every
seed to the first target, and for the first seed to all of them; every prediction on the test images is compared.

Rates, and where thresholds start, were chosen without the test images, and on a seed of its own: 5,000 of the 60,000
training images are never trained on, and of each method's candidates the one with the least loss on those is used
(``--choose`` does that again). The gates' gap is measured on the same images while compiling. Each method gives one
JSON line. The images are ``mnist.npz`` in FXFREEZE_DATA, or in ``../shared/data`` beside the repository.

Exit status 1: hardening loses more than 0.2 points of accuracy in the mean over seeds, or a target predicts anything
else than the hard gates computed with plain torch. ``--quick`` has no such limit, as 1,000 images cannot show it.
"""

from __future__ import annotations

import copy
import itertools
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import heads
from .harness import record
from .tversky_mnist import Images, mnist, mnist_folder

LOSS = 0.002
TARGETS = ("torch", "aoti", "onnx")
TURN, HELD_OUT, CHUNK, BATCH = 45.0, 5000, 1000, 256
PRETRAINING, SPECIALISING = 5, 3
"""Epochs: over both kinds of images, and over the turned ones."""
BASE_RATE, RANK = 3e-3, 4
TEMPERATURES = 0.3, 0.005
"""Of the gates, first and last; the activations' standard deviations are about 0.6 and 1.1."""
CHOICE_SEED = 1000


# ---- images


@dataclass(frozen=True)
class Views:
    """The same images upright and turned: float32 [n, 1, side, side] in [0, 1], with their labels [n]."""

    upright: Tensor
    turned: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Data:
    train: Views
    held_out: Views
    test: Views


def turned(images: Tensor, degrees: float) -> Tensor:
    """`images` [n, 1, side, side] turned about their centre, bilinear, what comes in from outside is 0."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]])
    grid = F.affine_grid(matrix.expand(CHUNK, 2, 3), [CHUNK, *images.shape[1:]], align_corners=False)
    return torch.cat([F.grid_sample(part, grid[: len(part)], align_corners=False) for part in images.split(CHUNK)])


def split(images: Images, held_out: int) -> Data:
    """The last `held_out` training images are not trained on."""
    both = Views(images.train, turned(images.train, TURN), images.train_labels)
    cut = len(images.train) - held_out
    train, held = (Views(both.upright[s], both.turned[s], both.labels[s]) for s in (slice(cut), slice(cut, None)))
    return Data(train, held, Views(images.test, turned(images.test, TURN), images.test_labels))


# ---- the network, and what is trained


class Net(nn.Module):
    def __init__(self, side: int, width: int = 256) -> None:
        super().__init__()
        self.fc1, self.act1 = nn.Linear(side * side, width), nn.ReLU()
        self.fc2, self.act2 = nn.Linear(width, width), nn.ReLU()
        self.fc3 = nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        h = self.act1(self.fc1(image.flatten(1)))
        return self.fc3(self.act2(self.fc2(h)))


@dataclass(frozen=True)
class Method:
    """How a frozen base is specialised.

    `kind` is none, gates, lora or full; `start` is where thresholds start (None: all but open), `penalty` the weight of
    the share of neurons that fire.
    """

    name: str
    kind: str
    rate: float = 0.0
    penalty: float = 0.0
    start: float | None = None

    @property
    def gated(self) -> bool:
        return self.kind == "gates"


METHODS = (
    Method("frozen base", "none"),
    Method("gates", "gates", rate=1e-3),
    Method("gates, few firing", "gates", rate=3e-3, penalty=0.1, start=0.0),
    Method("LoRA, rank 4", "lora", rate=1e-2),
    Method("full fine-tuning", "full", rate=3e-3),
)
"""With the rates and starts that :func:`choose` found."""


def candidates(method: Method) -> list[Method]:
    """What :func:`choose` compares."""
    if method.gated:
        return [replace(method, rate=rate, start=start) for rate in (1e-3, 3e-3, 1e-2, 3e-2) for start in (None, 0.0)]
    rates = {"lora": (1e-3, 3e-3, 1e-2, 3e-2), "full": (3e-4, 1e-3, 3e-3, 1e-2)}
    return [replace(method, rate=rate) for rate in rates.get(method.kind, (0.0,))]


def pretrained(data: Data, seed: int, epochs: int) -> Net:
    torch.manual_seed(seed)
    net = Net(data.train.upright.shape[-1])
    both = torch.cat([data.train.upright, data.train.turned])
    fit(net, both, data.train.labels.repeat(2), epochs=epochs, rate=BASE_RATE, seed=seed)
    return net.eval().requires_grad_(False)


def plan(base: Net, method: Method, targets: Sequence[str] = ()) -> Any:
    import fxfreeze as fz

    side = math.isqrt(base.fc1.in_features)
    gate = fz.Gate(at=["act1", "act2"], temperature=TEMPERATURES[0], threshold=method.start)
    step = gate if method.gated else fz.LoRA(at=["fc1", "fc2", "fc3"], rank=RANK)
    image = fz.Input("image", shape=("batch", 1, side, side), low=0, high=1)
    return fz.Plan(inputs=[image], steps=[step], targets=targets)


def specialised(base: Net, method: Method, data: Data, seed: int, epochs: int) -> nn.Module:
    import fxfreeze as fz

    if method.kind == "none":
        return base
    net = copy.deepcopy(base).requires_grad_(True) if method.kind == "full" else fz.adapt(base, plan(base, method))
    fit(net, data.train.turned, data.train.labels, epochs=epochs, rate=method.rate, seed=seed, method=method)
    return net


def fit(
    net: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, rate: float, seed: int, method: Method | None = None
) -> None:
    """Adam, one cycle of the rate, in an order from `seed`; gates cool down by the same factor at every step."""
    from fxfreeze.nn import TemperatureSchedule

    generator, count = torch.Generator().manual_seed(seed), epochs * -(-len(labels) // BATCH)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=count)
    cooling = TemperatureSchedule(net, *TEMPERATURES, steps=count) if method and method.gated else None
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=generator).split(BATCH):
            optimizer.zero_grad()
            loss(net, images[batch], labels[batch], method.penalty if method else 0.0).backward()
            optimizer.step()
            schedule.step()
            if cooling:
                cooling.step()


def loss(net: nn.Module, images: Tensor, labels: Tensor, penalty: float) -> Tensor:
    """Cross-entropy, and `penalty` times the mean over gates of the share of neurons that fire."""
    from fxfreeze.nn import firing

    if not penalty:
        return F.cross_entropy(net(images), labels)
    with firing() as shares:
        result = F.cross_entropy(net(images), labels)
    return result + penalty * shares.mean()


def choose(data: Data, epochs: tuple[int, int], say: Callable[[str], None]) -> dict[str, Any]:
    """A row with the loss and the accuracy of every candidate on the held-out images, and the best of each method."""
    with torch.random.fork_rng(devices=[]):
        base, tried = pretrained(data, CHOICE_SEED, epochs[0]), []
        for method in itertools.chain.from_iterable(map(candidates, METHODS)):
            net = specialised(base, method, data, CHOICE_SEED, epochs[1])
            with torch.no_grad():
                found = loss(net, data.held_out.turned, data.held_out.labels, method.penalty)
            right = accuracy(heads.scores(net, data.held_out.turned, CHUNK), data.held_out.labels)
            tried.append({**asdict(method), "loss": float(found), "accuracy": right})
            say(f"{method.name}, rate {method.rate:g}, start {method.start}: loss {found:.4f}, accuracy {right:.4f}")
    best = [min(rows, key=lambda row: row["loss"]) for _, rows in itertools.groupby(tried, lambda row: row["name"])]
    return {"name": "choice", "ok": True, "seed": CHOICE_SEED, "held_out": len(data.held_out.labels), "tried": tried,
            "best": {row["name"]: {"rate": row["rate"], "start": row["start"]} for row in best}}  # fmt: skip


# ---- what is measured


def accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(-1) == labels).double().mean())


def agreement(one: Tensor, other: Tensor) -> float:
    return float((one.argmax(-1) == other.argmax(-1)).double().mean())


@torch.no_grad()
def by_hand(base: Net, gates: dict[str, Tensor], images: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Scores [n, 10] of the base with hard gates in plain torch, and the share of hidden values other than 0."""
    h, shares = images.flatten(1), {}
    for layer, act in (("fc1", "act1"), ("fc2", "act2")):
        h = torch.relu(getattr(base, layer)(h))
        if gates:
            gain, threshold = (gates[f"adapters.gate.{act}.{leaf}"] for leaf in ("gain", "threshold"))
            h = torch.where(h > threshold, gain * h, 0.0)
        shares[act] = float((h != 0).double().mean())
    return base.fc3(h), shares


def hardened(base: Net, net: Any, method: Method, data: Data, targets: Sequence[str]) -> dict[str, Any]:
    """Compile gates, and compare: the soft gates with the hard ones, every target with the hard ones by hand."""
    import fxfreeze as fz

    test, started = data.test, time.perf_counter()
    artifact = fz.compile(net, plan(base, method, targets), calibration=data.held_out.turned.split(CHUNK))
    seconds = time.perf_counter() - started
    soft = heads.scores(net, test.turned, CHUNK)
    wanted, nonzero = by_hand(base, net.adapter_state(), test.turned)
    found = {target: heads.scores(artifact.target(target), test.turned, CHUNK) for target in targets}
    hard = found[targets[0]]
    return {
        "soft": accuracy(soft, test.labels),
        "turned": accuracy(hard, test.labels),
        "upright": accuracy(heads.scores(artifact, test.upright, CHUNK), test.labels),
        "agreement": agreement(soft, hard),
        "firing": fired(artifact, test.turned),
        "nonzero": nonzero,
        "targets": {name: differences(scores, wanted) for name, scores in found.items()},
        "compile_seconds": round(seconds, 1),
        "ledger": [row["detail"] for row in artifact.manifest["ledger"] if row["outcome"] == "measured"],
    }


def fired(artifact: Any, images: Tensor) -> dict[str, float]:
    """The share of neurons that fire, by gate; 1 for a gate that compiling removed because it is always open."""
    counts = dict.fromkeys(("act1", "act2"), 0.0)
    parts = [artifact.firing(part) for part in images.split(CHUNK)]
    for site in counts:
        every = [part[site].double().mean(-1) for part in parts if site in part]
        counts[site] = float(torch.cat(every).mean()) if every else 1.0
    return counts


def differences(actual: Tensor, wanted: Tensor) -> dict[str, Any]:
    return {
        "differing": int((actual.argmax(-1) != wanted.argmax(-1)).sum()),
        "score_error": float((actual - wanted).abs().max() / wanted.abs().max()),
    }


def measured(base: Net, net: nn.Module, method: Method, data: Data, targets: Sequence[str]) -> dict[str, Any]:
    """One seed of one method: accuracies on the test images, and what gates do."""
    trainable = 0 if method.kind == "none" else sum(p.numel() for p in net.parameters() if p.requires_grad)
    if method.gated:
        return {"trainable": trainable, **hardened(base, net, method, data, targets)}
    test = data.test
    views = {"turned": test.turned, "upright": test.upright}
    found = {name: accuracy(heads.scores(net, images, CHUNK), test.labels) for name, images in views.items()}
    # Neither LoRA nor training all weights has gates, but their ReLUs shut neurons too; of LoRA's no one can ask.
    own = {} if method.kind == "lora" else {"nonzero": by_hand(net, {}, test.turned)[1]}  # type: ignore[arg-type]
    return {"trainable": trainable, **found, **own}


def run(
    images: Images,
    *,
    seeds: int,
    held_out: int = HELD_OUT,
    epochs: tuple[int, int] = (PRETRAINING, SPECIALISING),
    targets: Sequence[str] = TARGETS,
    limit: float | None = LOSS,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, Any]]:
    """A row for each of METHODS, over all seeds; the first seed's gates are compiled to all `targets`."""
    data = split(images, held_out)
    found: dict[str, list[dict[str, Any]]] = {method.name: [] for method in METHODS}
    for seed in range(seeds):
        with torch.random.fork_rng(devices=[]):
            base = pretrained(data, seed, epochs[0])
            for method in METHODS:
                started = time.perf_counter()
                net = specialised(base, method, data, seed, epochs[1])
                seconds = round(time.perf_counter() - started, 1)
                one = measured(base, net, method, data, targets if seed == 0 else targets[:1])
                found[method.name].append({"seed": seed, "train_seconds": seconds, **one})
                say(f"seed {seed}, {method.name}: {one['turned']:.4f} turned, {one['upright']:.4f} upright")
    counts = {name: len(getattr(data, name).labels) for name in ("train", "held_out", "test")}
    for method in METHODS:
        row = {"method": asdict(method), "epochs": epochs, "images": counts}
        yield {"name": method.name, **summary(found[method.name], limit), **row, "seeds": found[method.name]}


def summary(seeds: list[dict[str, Any]], limit: float | None) -> dict[str, Any]:
    """Mean and standard deviation over seeds, what hardening lost (accuracy, in 1), and whether that is good."""
    names = ("turned", "upright", "soft", "agreement", "lost")
    for one in seeds:
        if "soft" in one:
            one["lost"] = one["soft"] - one["turned"]
    row: dict[str, Any] = {name: spread([one[name] for one in seeds]) for name in names if name in seeds[0]}
    for name in ("firing", "nonzero"):
        if name in seeds[0]:
            row[name] = {site: spread([one[name][site] for one in seeds]) for site in seeds[0][name]}
    agree = all(not target["differing"] for one in seeds for target in one.get("targets", {}).values())
    kept = limit is None or "lost" not in row or row["lost"]["mean"] <= limit
    return {"ok": agree and kept, "limit": limit, "trainable": seeds[0]["trainable"], **row}


def spread(values: list[float]) -> dict[str, float]:
    """`sd` is the sample's, 0 for a single value."""
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0}


# ---- what is shown


def table(rows: list[dict[str, Any]]) -> str:
    """Accuracies in percent, mean ± standard deviation over the seeds; the hard gates' where there are gates."""
    head = ("method", "trainable", "45°", "0°", "soft, 45°", "agreement", "fire", "not 0", "")
    lines = [head, *(cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    def percent(name: str) -> str:
        return f"{100 * row[name]['mean']:.2f} ± {100 * row[name]['sd']:.2f}" if name in row else "–"

    def shares(name: str) -> str:
        return " / ".join(f"{100 * share['mean']:.0f}" for share in row[name].values()) if name in row else "–"

    columns = map(percent, ("turned", "upright", "soft", "agreement"))
    return (row["name"], f"{row['trainable']:,}", *columns, shares("firing"), shares("nonzero"),
            "" if row["ok"] else "FAIL")  # fmt: skip


def publish(rows: Iterable[dict[str, Any]], shared: dict[str, Any], out: Path | None) -> bool:
    """Put each row into the file `out` if there is one, then print the table. Are all of them ok?"""
    done = []
    for row in rows:
        done.append(row)
        if out:
            record.replace_row(out, {**row, **shared})
    print(done[0]["best"] if "best" in done[0] else table(done))
    for name, result in ((row["name"], row["seeds"][0].get("targets", {})) for row in done if "seeds" in row):
        for target, found in result.items():
            print(f"{name}, first seed, {target} against hard gates by hand: {found}")
    return all(row["ok"] for row in done)


def main() -> int:
    parser = heads.parser(__doc__, TARGETS)
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    parser.add_argument("--quick", action="store_true", help="one seed, few images, one epoch, no limit")
    parser.add_argument("--choose", action="store_true", help="compare the candidates on held-out images, and end")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images, targets = mnist(mnist_folder(parser)), tuple(options.targets.split(","))
    given: dict[str, Any] = {"seeds": options.seeds, "targets": targets}
    if options.quick:
        images = Images(images.train[:6000], images.train_labels[:6000], images.test[:1000], images.test_labels[:1000])
        given |= {"seeds": 1, "held_out": 1000, "epochs": (2, 1), "limit": None}
    command = shlex.join(sys.argv[1:])
    shared = asdict(record.environment("gates_mnist", quick=options.quick, seed=0, command=command))
    rows: Iterable[dict[str, Any]] = run(images, **given, say=say)
    if options.choose:
        epochs = given.get("epochs", (PRETRAINING, SPECIALISING))
        rows = [choose(split(images, given.get("held_out", HELD_OUT)), epochs, say)]
    return 0 if publish(rows, shared, options.out) else 1


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
