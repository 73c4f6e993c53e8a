"""One run of a ticket search: build, load, mask, train, evaluate, with every generator seeded.

A run depends on its task and on the caller's functions alone, so it can be made anywhere, and again. On a CPU it gives
the same bits each time, given as many threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy
import torch
from torch import Tensor, nn

from .errors import PlanError
from .masks import check_masks
from .tickets_masks import Masks, dense_masks, held

Kind = Literal["rewind", "ticket", "reinit", "random"]
"""Training up to W_k; the ticket; its mask on other initial weights; a random mask on W_k."""

State = dict[str, Tensor]
"""What `state_dict` gives, on the CPU, sharing no memory with the model nor with each other."""

Build = Callable[[int], nn.Module]
Evaluate = Callable[[nn.Module], float]


class Train(Protocol):
    """Trains `model` in place from step `start` up to, not including, step `stop`, with an optimizer of its own.

    What a step is, an iteration or an epoch, is the caller's choice. `seed` is for the order of the data; torch's,
    NumPy's and Python's global generators are seeded with it before.
    """

    def __call__(self, model: nn.Module, *, start: int, stop: int, seed: int) -> None: ...


class Key(NamedTuple):
    """Which run: kind, replicate, level."""

    kind: Kind
    seed: int
    level: int = 0


@dataclass(frozen=True)
class Task:
    """What a run needs beside the caller's functions.

    Attributes:
        build_seed: of the initial weights, which `weights` replaces if they are given.
        train_seed: of the order of the data.
        start, stop: the steps to train; none where they are equal.
        masks: what stays at zero; None where nothing does.
        exclude: of a "rewind", which finds the masks of ones: layers that are not pruned.
    """

    key: Key
    build_seed: int
    train_seed: int
    start: int
    stop: int
    weights: State | None = None
    masks: Masks | None = None
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """`state` after training, and, of a "rewind", the masks of ones; of any other run its score."""

    state: State
    score: float | None = None
    masks: Masks | None = None
    seconds: float = 0.0


def perform(task: Task, build: Build, train: Train, evaluate: Evaluate) -> Outcome:
    """Make one run.

    Raises:
        PlanError: one of the functions does not keep to its contract; names which, and how.
    """
    started = time.perf_counter()
    model = built(build, task.build_seed)
    if task.weights is not None:
        load(model, task.weights)
    check_masks(task.masks or {}, {name: value.shape for name, value in model.named_parameters()}, "build")
    masks = dense_masks(model, task.exclude) if task.key.kind == "rewind" else None
    trained(model, train, task.start, task.stop, task.train_seed, task.masks or {})
    state = snapshot(model)
    score = None if task.key.kind == "rewind" else scored(model, evaluate, task.train_seed)
    return Outcome(state, score, masks, time.perf_counter() - started)


def built(build: Build, seed: int) -> nn.Module:
    """A fresh model."""
    with seeded(seed):
        model = build(seed)
    if not isinstance(model, nn.Module):
        raise PlanError(f"build returned {type(model).__name__}, not an nn.Module", where="build")
    return model


def trained(model: nn.Module, train: Train, start: int, stop: int, seed: int, masks: Mapping[str, Tensor]) -> None:
    """Train `model` in place, with `masks` held.

    Raises:
        PlanError: the loop trained something else than `model`.
    """
    with held(model, masks):
        if start == stop:
            return
        before = [value.detach().clone() for value in model.parameters()]
        model.train()
        with seeded(seed):
            other: Any = train(model, start=start, stop=stop, seed=seed)  # type: ignore[func-returns-value]
        if isinstance(other, nn.Module) and other is not model:
            raise PlanError("train returned another model", where="train", hint="train the one it is given, in place")
        after = list(model.parameters())
        if len(before) == len(after) and all(map(_same, before, after)):
            raise PlanError(
                f"training from step {start} to {stop} changed no parameter", where="train",
                hint="train the model that is given, in place; `start` and `stop` are steps, `stop` not included",
            )  # fmt: skip


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other.detach().to(one))


def scored(model: nn.Module, evaluate: Evaluate, seed: int, name: str = "evaluate") -> float:
    """What `evaluate` says of `model` in eval mode.

    Raises:
        PlanError: it is no finite number.
    """
    model.eval()
    with seeded(seed):
        score = evaluate(model)
    try:
        number = float(score)
    except (TypeError, ValueError, RuntimeError):
        raise PlanError(f"{name} returned {type(score).__name__}, not a number", where=name) from None
    if not math.isfinite(number):
        raise PlanError(f"{name} returned {number}", where=name, hint="the training diverged, or nothing was counted")
    return number


def snapshot(model: nn.Module) -> State:
    """The state of `model` on the CPU.

    Raises:
        PlanError: it holds something else than tensors.
    """
    state = model.state_dict()
    if wrong := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise PlanError(
            f"the model's state_dict holds {type(state[wrong[0]]).__name__} as {wrong[0]!r}; only tensors can be kept"
        )
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}


def load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """
    Raises:
        PlanError: `build` made another model than it did for `state`.
    """
    try:
        model.load_state_dict(dict(state))
    except RuntimeError as error:
        raise PlanError(
            f"build makes different models for different seeds: {error}", where="build",
            hint="the seed may choose initial weights only; in a folder of before, `build` must be as it was",
        ) from None  # fmt: skip


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's, NumPy's and Python's global generators, and give them back as they were."""
    plain, ours = random.getstate(), numpy.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(plain)
            numpy.random.set_state(ours)


def derived(seed: int, *words: object) -> int:
    """Another seed, of 31 bits, for each of what `words` name."""
    text = "/".join(map(str, (seed, *words)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def check_call(name: str, function: Any, *args: str, named: Sequence[str] = ()) -> None:
    """Refuse a function that could not be called as it will be, before anything is trained.

    Raises:
        PlanError: names the function, and how it is called.
    """
    if not callable(function):
        raise PlanError(f"{name} is {type(function).__name__}, not a function", where=name)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # a builtin, say
    try:
        signature.bind(*args, **dict.fromkeys(named))
    except TypeError as error:
        shown = ", ".join([*args, *(f"{key}=…" for key in named)])
        raise PlanError(f"{name} cannot be called as {name}({shown}): {error}", where=name) from None


def check_functions(build: Any, train: Any, **measures: Any) -> None:
    """:func:`check_call` of what every search is given; `measures` are called with a model."""
    check_call("build", build, "seed")
    check_call("train", train, "model", named=("start", "stop", "seed"))
    for name, function in measures.items():
        check_call(name, function, "model")
