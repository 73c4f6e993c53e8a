"""Predictions of the public ResNet-20 on 8-bit integers, by everyone who can: the share that is wrong, and that moved.

On CIFAR-10's 10,000 test images, with the ranges of 512 others. The share of predictions that floats do not make does
not hang on the luck of a few images, as that of the wrong ones does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import models, peers
from .harness import Case, Metric, Options, Peer, Reading
from .quantization import IMAGES, Subject, file_of, folder, images, quantized_by_runtime, session, subjects

SUITE = "accuracy"
WRONG = Metric("wrong predictions", "", rounds=1, quick_rounds=1, timed=False, exact=True)
MOVED = Metric("predictions unlike floats", "", rounds=1, quick_rounds=1, timed=False, exact=True)
FLOATS = 1 - 0.8103
"""Wrong predictions of the float network, which the limit is a share of."""
LOST = 0.003
"""Of all predictions, what int8 may lose."""
RANGES: dict[str, dict[str, Any]] = {
    "min and max": {}, "least squares": {"calibrate": "mse"}, "no bias correction": {"correct_bias": False}
}  # fmt: skip


def cases(options: Options) -> Iterator[Case]:
    subject, limit = subjects(options)[0], 1 + LOST / FLOATS
    makes = quantized(subject)
    if options.quick:
        makes = {name: makes[name] for name in ("quantize_static", "fxfreeze int8, min and max")}
    yield Case(
        name=f"{subject.name}, {IMAGES} images to calibrate on",
        peers=(
            Peer("floats", lambda: share(subject.make, labels)),
            *(Peer(name, functools.partial(share, make, labels), limit=limit if name.startswith("fxfreeze") else None)
              for name, make in makes.items()),
        ), baseline="floats", reference=lambda: None, metric=WRONG,
    )  # fmt: skip
    yield Case(
        name=f"{subject.name}, {IMAGES} images to calibrate on",
        peers=tuple(Peer(name, functools.partial(share, make, predictions)) for name, make in makes.items()),
        baseline="quantize_static", reference=lambda: None, metric=MOVED,
    )  # fmt: skip


def quantized(subject: Subject) -> dict[str, Callable[[], Any]]:
    """Who makes integers of the network: peer → what builds a callable."""
    return {
        "quantize_static": lambda: session(quantized_by_runtime(subject)),
        **{name: functools.partial(by_peer, name.lower(), subject) for name in ("NNCF", "Olive")},
        **{f"fxfreeze int8, {name}": functools.partial(subject.compiled, "onnx", scheme="int8", **how)
           for name, how in RANGES.items()},
        **{f"fxfreeze int8, {target}": functools.partial(subject.compiled, target, scheme="int8")
           for target in ("torch", "aoti")},
    }  # fmt: skip


def by_peer(peer: str, subject: Subject) -> Callable[[Tensor], Tensor]:
    """A session of what a peer makes, in its own environment, of our float file."""
    batches = [{"x": batch.numpy()} for batch in images()]
    return session(peers.quantized(peer, file_of(subject.compiled("onnx")), batches, folder() / "quantized.onnx"))


def share(make: Callable[[], Any], wanted: Callable[[], Tensor]) -> Callable[[], Reading]:
    """Of the test images, those of which `make()` does not predict what is `wanted`."""
    model, pictures, right = make(), models.cifar10("test")[0], wanted()

    @torch.no_grad()
    def read() -> Reading:
        found = torch.cat([model(part).argmax(1) for part in pictures.split(500)])
        return Reading(float((found != right).double().mean()), 0.0)

    return read


def labels() -> Tensor:
    return models.cifar10("test")[1]


@torch.no_grad()
def predictions() -> Tensor:
    model = models.resnet20()
    return torch.cat([model(part).argmax(1) for part in models.cifar10("test")[0].split(500)])
