"""Networks on 8-bit integers, against floats and against ONNX Runtime's own quantize_static: time and bytes.

Times are ratios to floats on ONNX Runtime, which is the fastest of our targets in floats here, and all ONNX files run
in bare sessions of it. All are calibrated on the same inputs. What it costs in accuracy: ``accuracy.py``.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import models
from .harness import PEAK_MEMORY, Case, Metric, Options, Peer, Reading, Unavailable, runtime
from .harness.case import relative_error
from .harness.memory import peak_above

HERE = "benchmarks.quantization"
IMAGES, BATCH = 512, 64
SIZE = Metric("file", "B", rounds=1, quick_rounds=1, timed=False, exact=True)
FEW, MANY = 64, 4096
GROWTH = 1.1
"""Peak memory with many samples in peaks with few."""
ROUNDING = 0.25
"""The largest error of 8 bits, in largest outputs: what counts as a result at all."""


@dataclass(frozen=True)
class Subject:
    """A network, and the batch sizes with the share of the float time that int8 may take."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    limits: tuple[tuple[int, float], ...]
    calibration: Callable[[], list[Tensor]]

    def plan(self, *targets: str, **quantize: Any) -> Any:
        import fxfreeze as fz

        return fz.Plan([fz.Input("x", ("batch", *self.shape))], [fz.Quantize(**quantize)] if quantize else [], targets)

    def compiled(self, *targets: str, **quantize: Any) -> Any:
        import fxfreeze as fz

        try:
            return fz.compile(self.make(), self.plan(*targets, **quantize), calibration=self.calibration())
        except fz.MissingDependencyError as error:
            raise Unavailable(str(error)) from error


class Transformer(nn.Module):
    """Four pre-norm layers of width 256, and a classifier on the mean token."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([
            nn.TransformerEncoderLayer(256, 8, 1024, activation="gelu", batch_first=True, norm_first=True)
            for _ in range(4)
        ])  # fmt: skip
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def cases(options: Options) -> Iterator[Case]:
    found = subjects(options)
    for subject in found[:1] if options.quick else found:
        for batch, limit in subject.limits:
            yield latency_case(subject, batch, limit)
    yield size_case(found[0])
    yield memory_case(options)


def subjects(options: Options) -> list[Subject]:
    @functools.cache
    def transformer() -> nn.Module:
        torch.manual_seed(options.seed)
        return Transformer().eval().requires_grad_(False)

    def drawn(*shape: int) -> Callable[[], list[Tensor]]:
        generator = torch.Generator().manual_seed(options.seed)
        return functools.cache(lambda: [torch.randn(8, *shape, generator=generator) for _ in range(4)])

    resnet18 = functools.cache(lambda: models.resnet("resnet18", options.seed))
    return [
        Subject("ResNet-20", functools.cache(models.resnet20), (3, 32, 32), ((1, 1 / 1.5), (64, 1 / 1.8)), images),
        Subject("ResNet-18", resnet18, (3, 224, 224), ((1, 1 / 2.5),), drawn(3, 224, 224)),
        Subject("transformer 4x256, 64 tokens", transformer, (64, 256), ((1, 1 / 1.4), (16, 1 / 1.4)), drawn(64, 256)),
    ]


@functools.cache
def images() -> list[Tensor]:
    return list(models.cifar10("calib")[0][:IMAGES].split(BATCH))


# ---- latency


def latency_case(subject: Subject, batch: int, limit: float) -> Case:
    """Every int8 peer is compared with floats on ONNX Runtime."""
    compiled = functools.partial(subject.compiled, scheme="int8")
    return Case(
        name=f"{subject.name}, batch {batch}",
        peers=(
            Peer("onnx, floats", lambda: session(file_of(subject.compiled("onnx")))),
            Peer("quantize_static", lambda: session(quantized_by_runtime(subject))),
            Peer("fxfreeze int8, onnx", lambda: session(file_of(compiled("onnx"))), limit=limit),
            *(Peer(f"fxfreeze int8, {target}", lambda target=target: compiled(target))  # type: ignore[misc]
              for target in ("torch", "aoti")),
        ),
        baseline="onnx, floats",
        reference=lambda x: copy.deepcopy(subject.make()).double()(x.double()),
        inputs=lambda generator: (torch.randn(batch, *subject.shape, generator=generator),),
        tolerance=ROUNDING,
    )  # fmt: skip


def file_of(artifact: Any) -> Path:
    """The ONNX file of an artifact, which may go."""
    return artifact.save(folder() / "artifact") / "onnx" / "model.onnx"


def folder() -> Path:
    return Path(tempfile.mkdtemp(dir=_scratch().name))


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fxfreeze-bench-")


def session(path: Path) -> Callable[[Tensor], Tensor]:
    """A bare session of ONNX Runtime."""
    running = runtime.session(path)
    return lambda x: running(x)[0]


@functools.cache
def quantized_by_runtime(subject: Subject) -> Path:
    """The file that onnxruntime makes of our float one."""
    batches = [{"x": batch} for batch in subject.calibration()]
    return runtime.quantize_static(file_of(subject.compiled("onnx")), batches, folder())


# ---- bytes


def size_case(subject: Subject) -> Case:
    def bytes_of(**quantize: Any) -> Callable[[], Reading]:
        size = subject.compiled("onnx", **quantize).sizes["onnx/model.onnx"]
        return lambda: Reading(float(size), 0.0)

    def runtime() -> Callable[[], Reading]:
        size = quantized_by_runtime(subject).stat().st_size
        return lambda: Reading(float(size), 0.0)

    return Case(
        name=f"{subject.name}, ONNX file", peers=(
            Peer("floats", bytes_of),
            Peer("quantize_static", runtime),
            Peer("fxfreeze int8", lambda: bytes_of(scheme="int8"), limit=0.28),
        ), baseline="floats", reference=lambda: None, metric=SIZE,
    )  # fmt: skip


# ---- memory of the calibration; what follows runs in child processes


def memory_case(options: Options) -> Case:
    """Peak memory of compiling with ranges of few samples and of many, which come one batch at a time.

    What is held: with what glibc keeps of the freed, 238 to 380 MiB in five runs with many and 255 to 321 with few.
    """
    few, many = (peak_above(f"{HERE}:imports", f"{HERE}:calibrate", held=True, samples=count, seed=options.seed)
                 for count in (FEW, FEW * 4 if options.quick else MANY))  # fmt: skip
    return Case(
        name="ResNet-18, calibration", peers=(
            Peer(f"{FEW} samples", few),
            Peer(f"{FEW * 4 if options.quick else MANY} samples", many, limit=GROWTH),
        ), baseline=f"{FEW} samples", reference=lambda: None, metric=PEAK_MEMORY,
    )  # fmt: skip


def imports() -> Callable[[], float]:
    for package in ("torchvision", "fxfreeze"):
        models.need(package)
    torch.export.export(nn.Linear(2, 2), (torch.ones(2, 2),))
    return lambda: 0.0


class Growing:
    """Batches of which each has a wider range than all before, so that calibration does not end early."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        for number in range(self.samples // 16):
            yield torch.randn(16, 3, 64, 64, generator=generator) * 1.02**number


def calibrate(samples: int, seed: int) -> Callable[[], float]:
    import fxfreeze as fz

    model, x = models.resnet("resnet18", seed), torch.zeros(1, 3, 64, 64)
    plan = fz.Plan([fz.Input("x", ("batch", 3, 64, 64))], [fz.Quantize()], ["onnx"])
    artifact = fz.compile(model, plan, calibration=Growing(samples), verify="off")
    told = [row["detail"] for row in artifact.manifest["ledger"] if "ranges of" in row["detail"]]
    if not told or f"ranges of {samples} rows" not in told[0]:
        raise RuntimeError(f"calibration did not read {samples} samples: {told[:1]}")
    return lambda: relative_error(artifact(x), artifact(x))
