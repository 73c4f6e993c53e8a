"""What is measured: a case, the peers that compete in it, and how an output is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Unavailable(Exception):
    """Raised by `Peer.prepare` when the peer cannot run here; the message is reported as the reason."""


class WrongOutput(Exception):
    """What a peer returned is not what the reference says."""


@dataclass(frozen=True)
class Metric:
    """What a sample is. `timed`: seconds per call on a clock; otherwise the callable returns a `Reading`.

    `looped` metrics call a peer as often per sample as the calibration asks, under no_grad; the others once. `exact`
    ones, such as bytes of a file, are the same in every round, so that one round says all.
    """

    name: str
    unit: str
    rounds: int
    quick_rounds: int
    timed: bool = True
    looped: bool = False
    exact: bool = False


LATENCY = Metric("latency", "s", rounds=60, quick_rounds=7, looped=True)
DURATION = Metric("duration", "s", rounds=7, quick_rounds=3)
PEAK_MEMORY = Metric("peak memory", "B", rounds=3, quick_rounds=1, timed=False)


@dataclass(frozen=True)
class Reading:
    """A value that a peer measured itself (say, in a child process), with the error of what it computed."""

    value: float
    error: float


@dataclass(frozen=True)
class Peer:
    """One competitor.

    `prepare()` builds and returns the callable that is measured, to be called with the case's inputs. It
    raises `Unavailable` or ImportError where the peer cannot run. `observe` turns a result into the outputs
    to compare, untimed, for instance by calling a freshly compiled model. `reference` replaces the case's where
    the peer is to compute another function, `tolerance` the case's where it rounds more. `limit` is the largest
    accepted ratio to the baseline. `behind` names a peer that is prepared first, and may leave this one what it built.
    """

    name: str
    prepare: Callable[[], Callable[..., Any]]
    observe: Callable[[Any], Any] | None = None
    reference: Callable[..., Any] | None = None
    tolerance: float | None = None
    limit: float | None = None
    behind: str = ""


@dataclass(frozen=True)
class Work:
    """What a call must do at least: operations (2 for a multiply-add) in `dtype`, and bytes that it must move.

    Bytes are those of the weights as they are stored, of the inputs and of the outputs.
    """

    operations: int
    bytes: int
    dtype: str = "float32"


@dataclass(frozen=True)
class Case:
    """One comparison: the same inputs for all peers, drawn from a seeded generator, and the expected outputs.

    `tolerance` bounds `relative_error`; 0 asks for equal values. Ratios are to the peer named `baseline`. `work` says
    what a call is for a roofline. Cases next to each other with the same word in `together` are prepared at a time, and
    measured one after the other. What peers leave each other lies in `folder`, and goes where a case has another.
    """

    name: str
    peers: tuple[Peer, ...]
    baseline: str
    reference: Callable[..., Any]
    inputs: Callable[[torch.Generator], tuple[Any, ...]] = lambda generator: ()
    tolerance: float = 1e-4
    metric: Metric = LATENCY
    device: str = "cpu"
    work: Callable[[], Work] | None = None
    together: str = ""
    folder: Path | None = None

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ValueError(
                f"case {self.name!r}: the device {self.device!r} is neither cpu nor cuda (the current one)"
            )
        names = [peer.name for peer in self.peers]
        if len(set(names)) != len(names):
            raise ValueError(f"case {self.name!r}: two peers share a name: {names}")
        if self.baseline not in names:
            raise ValueError(f"case {self.name!r}: the baseline {self.baseline!r} is not one of {names}")
        for peer in self.peers:
            if peer.behind and (peer.behind == peer.name or peer.behind not in names):
                raise ValueError(f"case {self.name!r}: {peer.name!r} stands behind {peer.behind!r}, no other peer")

    def tolerance_of(self, peer: Peer) -> float:
        return self.tolerance if peer.tolerance is None else peer.tolerance


@dataclass(frozen=True)
class Options:
    """What a benchmark file's `cases(options)` may depend on. `quick` asks for small models. Processes may leave
    each other what takes long to build in `folder`, which ends with the run."""

    seed: int = 0
    quick: bool = False
    folder: Path | None = None


def flatten(value: Any) -> list[torch.Tensor]:
    """The tensors of nested tuples, lists, mappings, arrays and numbers, in order; None holds none."""
    if value is None:
        return []
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, np.ndarray | np.generic | int | float):
        return [torch.as_tensor(value)]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in flatten(item)]
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in flatten(item)]
    raise TypeError(f"cannot compare an output of type {type(value).__name__}")


def relative_error(output: Any, reference: Any) -> float:
    """max |output - reference| / max |reference|, the worst over all tensors, in float64; inf for NaN or Inf.

    Raises WrongOutput where the two do not have the same number of tensors and the same shapes.
    """
    got, want = flatten(output), flatten(reference)
    if [tuple(t.shape) for t in got] != [tuple(t.shape) for t in want]:
        raise WrongOutput(f"output shapes {[tuple(t.shape) for t in got]}, expected {[tuple(t.shape) for t in want]}")
    if not want:
        raise ValueError("the reference returned no tensor to compare with")
    return max(_tensor_error(a, b) for a, b in zip(got, want, strict=True))


def _tensor_error(got: torch.Tensor, want: torch.Tensor) -> float:
    if want.numel() == 0:
        return 0.0
    a, b = got.detach().cpu().double(), want.detach().cpu().double()
    if not bool(torch.isfinite(b).all()):
        raise ValueError("the reference is not finite")
    if not bool(torch.isfinite(a).all()):
        return float("inf")
    scale = float(b.abs().max())
    return float((a - b).abs().max()) / (scale if scale > 0 else 1.0)
