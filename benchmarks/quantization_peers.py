"""ResNet-20 on 8-bit integers by NNCF and Olive, beside ONNX Runtime's quantize_static and fxfreeze.

All start from the same float ONNX file (fxfreeze from the network) and calibrate on the same 512 images; all files run
in bare sessions of the same ONNX Runtime. NNCF and Olive quantize in environments of their own. The seconds that it
takes have the start of their interpreters in them, the compile of the float file with quantize_static, and all checks
with fxfreeze.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import peers, quantization
from .harness import Case, Metric, Options, Peer, Reading
from .quantization import IMAGES, MOVED, WRONG, Subject, file_of, labels, predictions, session, share

SECONDS = Metric("quantizing", "s", rounds=1, quick_rounds=1, timed=False, exact=True)
OTHERS = ("nncf", "olive")


def cases(options: Options) -> Iterator[Case]:
    subject = quantization._subjects(options)[0]
    files = {"quantize_static": lambda: quantization.quantized_by_runtime(subject)}
    files |= {name: functools.partial(by_peer, name, subject) for name in OTHERS}
    files |= {"fxfreeze int8": lambda: file_of(subject.compiled("onnx", scheme="int8"))}
    makes = {name: _Once(make) for name, make in files.items()}
    for batch in (1, 64):
        yield latency_case(subject, batch, makes)
    calibrated = f"{subject.name}, {IMAGES} images to calibrate on"
    yield _case(calibrated, WRONG, makes, lambda make: share(lambda: session(make()), labels))
    yield _case(calibrated, MOVED, makes, lambda make: share(lambda: session(make()), predictions))
    yield _case(f"{subject.name}, {IMAGES} images", SECONDS, makes, _seconds)


def latency_case(subject: Subject, batch: int, makes: dict[str, _Once]) -> Case:
    like = quantization.latency_case(subject, batch, 1.0)
    floats = Peer("onnx, floats", lambda: session(float_file(subject)))
    others = (Peer(name, lambda make=make: session(make())) for name, make in makes.items())  # type: ignore[misc]
    return Case(like.name, (floats, *others), floats.name, like.reference, inputs=like.inputs, tolerance=like.tolerance)


def _case(name: str, metric: Metric, makes: dict[str, _Once], read: Callable[[_Once], Any]) -> Case:
    every = tuple(Peer(peer, lambda make=make: read(make)) for peer, make in makes.items())  # type: ignore[misc]
    return Case(name, every, "quantize_static", lambda: None, metric=metric)


class _Once:
    """A file that is made at the first call, and how long that took. What it raises it raises again."""

    def __init__(self, make: Callable[[], Path]) -> None:
        self.make, self.seconds = make, 0.0
        self.made: Path | Exception | None = None

    def __call__(self) -> Path:
        if self.made is None:
            started = time.perf_counter()
            try:
                self.made = self.make()
            except Exception as error:
                self.made = error
            self.seconds = time.perf_counter() - started
        if isinstance(self.made, Exception):
            raise self.made
        return self.made


def _seconds(make: _Once) -> Callable[[], Reading]:
    make()
    return lambda: Reading(make.seconds, 0.0)


@functools.cache
def float_file(subject: Subject) -> Path:
    return file_of(subject.compiled("onnx"))


def by_peer(name: str, subject: Subject) -> Path:
    from .environments import interpreter

    interpreter(name)  # made here, and not within the seconds of quantizing
    batches = [{"x": batch.numpy()} for batch in subject.calibration()]
    return peers.quantized(name, float_file(subject), batches, quantization._folder() / "quantized.onnx")
