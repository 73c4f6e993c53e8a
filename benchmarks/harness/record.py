"""Result files: one JSON object per line: a measurement with where, when and with what it was made."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .roofline import highest, measured
from .runner import Measurement

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    "torch", "triton", "onnxruntime", "numpy", "fxfreeze", "torchao", "peft", "tversky", "torch-pruning", "nncf",
    "torchvision", "timm", "transformers",
)  # fmt: skip
FLAGS = ("avx2", "fma", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimddp", "sve")
"""Of the CPU, those that decide which kernels run."""


class ResultError(ValueError):
    """A result file that cannot be read."""


@dataclass(frozen=True)
class Environment:
    """What every row of one run shares. `rates` are what each device reached at most, see roofline.py.

    They are measured at the start, and again where a :class:`Writer` is told to; the rows of a file have the highest.
    """

    benchmark: str
    quick: bool
    threads: int
    seed: int
    command: str
    time: str
    git: dict[str, Any] | None
    machine: dict[str, Any]
    rates: dict[str, dict[str, float]]
    versions: dict[str, str | None]


def environment(benchmark: str, *, quick: bool, seed: int, command: str, threads: int | None = None) -> Environment:
    """`threads`: None: those that torch has here."""
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    return Environment(
        benchmark=benchmark,
        quick=quick,
        threads=threads or torch.get_num_threads(),
        seed=seed,
        command=command,
        time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        git=git_revision(ROOT),
        machine=machine(),
        rates=measured(),
        versions=versions,
    )


def machine() -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu_model(),
        "flags": [flag for flag in FLAGS if flag in _cpu("flags").split()],
        "cores": os.cpu_count(),
        "memory": memory,
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def cpu_model() -> str:
    return _cpu("model name") or platform.processor() or "unknown"


def _cpu(what: str) -> str:
    """Of the first processor in /proc/cpuinfo; "" where there is no such file or line."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(what)), "")


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_revision(root: Path) -> dict[str, Any] | None:
    """The commit checked out at `root`, and whether anything but result files differs from it.

    None where there is no git, no commit yet, or `root` is not the top of a checkout: an sdist unpacked in
    someone else's repository has no revision of its own.
    """
    top = _git(root, "rev-parse", "--show-toplevel")
    revision = _git(root, "rev-parse", "--verify", "HEAD")
    if top is None or revision is None or Path(top).resolve() != root.resolve():
        return None
    changes = _git(root, "status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return {"revision": revision, "dirty": changes != ""}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


class Writer:
    """Writes rows as they come to `<path>.partial`, which takes the place of `path` when the run ends well.

    Without a path it writes nothing.
    """

    def __init__(self, path: Path | None, shared: Environment) -> None:
        self.path, self.shared = path, shared
        self.partial: Path | None = None
        self.asked = time.monotonic()

    def __enter__(self) -> Writer:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.partial = self.path.with_name(self.path.name + ".partial")
            self.partial.write_text("")
        return self

    def write(self, measurements: Iterable[Measurement]) -> None:
        lines = [json.dumps(row(m, self.shared), allow_nan=False) + "\n" for m in measurements]
        if self.partial is not None:
            with self.partial.open("a", encoding="utf-8") as file:
                file.writelines(lines)

    def measure_rates(self, every: float = 0.0) -> None:
        """Ask again what the devices reach, for the rows that there are and those that follow.

        Args:
            every: seconds that must have passed since it was asked.
        """
        if time.monotonic() < self.asked + every:
            return
        self.asked = time.monotonic()
        self.shared = replace(self.shared, rates=highest(self.shared.rates, measured()))

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self.partial is None or self.path is None:
            return
        if not (lines := self.partial.read_text(encoding="utf-8").splitlines()):
            self.partial.unlink()
        elif kind is None:
            rows = [json.loads(line) | {"rates": self.shared.rates} for line in lines]
            self.partial.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows), encoding="utf-8")
            self.partial.replace(self.path)


def replace_row(path: Path, row: dict[str, Any]) -> None:
    """Put `row` in the place of the line of its ``name``, or at the end, so that a file can be made in parts."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    rows = {line["name"]: line for line in lines} | {row["name"]: row}
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in rows.values()), encoding="utf-8")
    partial.replace(path)


def row(measurement: Measurement, shared: Environment) -> dict[str, Any]:
    return asdict(shared) | asdict(measurement)


FIELDS = frozenset(field.name for kind in (Environment, Measurement) for field in fields(kind))


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a result file. Raises ResultError, naming the line, where one is not a whole row."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ResultError(f"cannot read {path}: {error.strerror}") from error
    return list(_rows(path, text))


def _rows(path: Path, text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.splitlines(), 1):
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            raise ResultError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(found, dict) or found.keys() != FIELDS:
            differing = sorted(FIELDS ^ found.keys()) if isinstance(found, dict) else "not an object"
            raise ResultError(f"{path}, line {number}: missing or unknown fields: {differing}")
        yield found
