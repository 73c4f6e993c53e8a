"""``fxfreeze.diagnose_prunability``: would another temperature of training make a network easier to prune?

Zhou, Yang, Chang, Mahoney 2023, *A Three-regime Model of Network Pruning*: the sparse networks that are trained from
one pruned network with different orders of data lie in one of three regimes, told apart by whether the straight line
between two of them is free of a barrier, and by how similar their outputs are. Whoever trains the dense network with
more noise (a higher rate, smaller batches, fewer epochs: hotter) or with less (cooler) moves between them.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .errors import PlanError
from .tickets_masks import dense_masks, prune_smallest
from .tickets_run import (
    Build,
    State,
    Train,
    built,
    check_call,
    check_functions,
    derived,
    load,
    scored,
    seeded,
    snapshot,
    trained,
)

Answer = Literal["train hotter", "train cooler", "keep", "unknown"]

MARGIN, SIMILAR, POINTS = 0.02, 0.9, 11


@dataclass(frozen=True)
class Pair:
    """Two sparse networks: see :func:`mode_connectivity` and :func:`cka`.

    Attributes:
        seeds: of their retraining.
        connectivity: of the line between them.
        similarity: CKA of their outputs; NaN where those of one are the same for all inputs.
        errors: along the line, its ends included.
    """

    seeds: tuple[int, int]
    connectivity: float
    similarity: float
    errors: tuple[float, ...]


@dataclass(frozen=True)
class Diagnosis:
    """What to do, why, and the measurements behind it."""

    answer: Answer
    reason: str
    density: float
    margin: float
    similar: float
    pairs: tuple[Pair, ...] = ()

    @property
    def connectivity(self) -> float:
        """Mean over pairs; NaN where there are none."""
        return statistics.fmean(pair.connectivity for pair in self.pairs) if self.pairs else math.nan

    @property
    def similarity(self) -> float:
        """Mean over pairs; NaN where there are none."""
        return statistics.fmean(pair.similarity for pair in self.pairs) if self.pairs else math.nan

    def __str__(self) -> str:
        return f"{self.answer}: {self.reason}"


def diagnose_prunability(
    build: Build,
    train: Train | None,
    error: Callable[[nn.Module], float],
    outputs: Callable[[nn.Module], Tensor],
    *,
    steps: int,
    density: float,
    retrain_steps: int | None = None,
    exclude: str | Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    refresh: Callable[[nn.Module], Any] | None = None,
    margin: float = MARGIN,
    similar: float = SIMILAR,
    points: int = POINTS,
) -> Diagnosis:
    """Train a network, prune it to `density`, train that once with each of `seeds`, and compare every two of these.

    | connectivity of a pair | CKA | answer |
    |---|---|---|
    | < −`margin`: a barrier is between them | | "train hotter" |
    | within ±`margin` | < `similar` | "train cooler" |
    | within ±`margin` | ≥ `similar` | "keep" |
    | > `margin`: a lower error lies between them, so the training is too hot to reach it | | "train cooler" |

    The answer is that of all pairs, and "unknown" where they disagree, that is, where they are spread over more than
    their distance to a threshold; also where there are fewer than two seeds, or no `train`: one frozen network does not
    tell how it was trained. The paper's regimes have no numbers; the thresholds are this library's, chosen for errors
    between 0 and 1, and for softmax outputs.

    Args:
        build, train: as for :func:`fxfreeze.find_ticket`. `train` is the training whose temperature is in question; it
            also trains the pruned network. None: there is no way to train.
        error: ``error(model)`` is its error on the training data, the lower the better; a share of wrong answers as in
            the paper, or a loss with a `margin` to fit it.
        outputs: ``outputs(model)`` are its outputs [n, …] for the same n ≥ 2 training inputs each time, in the paper
            after softmax.
        steps: of the dense network.
        density: the share of weights that shall be left in the layers that are pruned, above 0 and up to 1; the answer
            may be another for another one.
        retrain_steps: of the pruned networks; None: `steps`.
        exclude: globs over module paths that keep all their weights.
        seeds: of the retrainings. The dense network has the first one.
        refresh: ``refresh(model)`` estimates the statistics of batch norms anew, for every network on a line:
            ``lambda model: torch.optim.swa_utils.update_bn(loader, model)``. Needed where there are any.
        margin, similar: the thresholds.
        points: networks on a line, both ends included.

    Raises:
        PlanError: an argument is out of range, or a function does not keep to its contract.
    """

    def say(answer: Answer, reason: str, pairs: Sequence[Pair] = ()) -> Diagnosis:
        return Diagnosis(answer, reason, density, margin, similar, tuple(pairs))

    _check(steps, retrain_steps, density, seeds, margin, similar, points)
    if train is None:
        return say("unknown", "there is no training function, and a frozen network does not tell how it was trained")
    if len(seeds) < 2:
        return say("unknown", "one network has no pair; two or more seeds are needed")
    check_functions(build, train, error=error, outputs=outputs)
    if refresh is not None:
        check_call("refresh", refresh, "model")
    globs = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    states = _minima(build, train, steps, retrain_steps or steps, density, globs, seeds, refresh is None)
    line = _Line(build, seeds[0], error, outputs, refresh, points)
    pairs = [line.pair((one, other), states[one], states[other]) for one, other in itertools.combinations(seeds, 2)]
    return say(*judge(pairs, margin, similar), pairs)


def judge(pairs: Sequence[Pair], margin: float = MARGIN, similar: float = SIMILAR) -> tuple[Answer, str]:
    """The answer that all pairs give, and the reason for it; "unknown" where they disagree."""
    found = [_verdict(pair, margin, similar) for pair in pairs]
    reasons = dict.fromkeys(reason for _, reason in found)
    if len({answer for answer, _ in found}) == 1:
        return found[0][0], "; ".join(reasons)
    counts = ", ".join(f"{sum(reason == other for _, other in found)} × {reason}" for reason in reasons)
    return "unknown", f"pairs disagree: {counts}"


def _verdict(pair: Pair, margin: float, similar: float) -> tuple[Answer, str]:
    if pair.connectivity < -margin:
        return "train hotter", "a barrier of error lies between networks that differ in the order of data"
    if pair.connectivity > margin:
        return "train cooler", "the error is lower between two networks than at them, so that they are no minima"
    if math.isnan(pair.similarity):
        return "unknown", "outputs are the same for all inputs, which leaves nothing to compare"
    if pair.similarity < similar:
        return "train cooler", "no barrier lies between networks, but their outputs differ"
    return "keep", "no barrier lies between networks, and their outputs are similar"


# ---- the measures


def mode_connectivity(errors: Sequence[float]) -> float:
    """The mean error of both ends of a line less the error that is farthest from it, anywhere on the line.

    Below 0 where there is a barrier between the ends, above 0 where a lower error lies between them. Yang et al. 2021,
    *Taxonomizing local versus global structure in neural network loss landscapes*, with a straight line for the curve.
    """
    ends = (errors[0] + errors[-1]) / 2
    return ends - max(errors, key=lambda value: abs(ends - value))


def cka(one: Tensor, other: Tensor) -> float:
    """Centered kernel alignment with a linear kernel, of features [n, p] and [n, q] of the same n inputs: 0 to 1.

    ‖YᵀX‖² / (‖XᵀX‖·‖YᵀY‖) of columns without their means, in float64. Not changed by a rotation or a scale of either.
    NaN where one of them is constant. Kornblith et al. 2019, *Similarity of Neural Network Representations Revisited*.
    """
    x, y = (value.detach().cpu().double().flatten(1) for value in (one, other))
    x, y = x - x.mean(0), y - y.mean(0)
    if len(x) < max(x.shape[1], y.shape[1]):  # the same numbers from n × n products
        kernels = x @ x.T, y @ y.T
        shared, norms = (kernels[0] * kernels[1]).sum(), [kernel.norm() for kernel in kernels]
    else:
        shared, norms = (y.T @ x).square().sum(), [(value.T @ value).norm() for value in (x, y)]
    return float(shared / (norms[0] * norms[1]))


# ---- the networks


def _minima(
    build: Build, train: Train, steps: int, retrain_steps: int, density: float, exclude: Sequence[str],
    seeds: Sequence[int], plain: bool,
) -> dict[int, State]:  # fmt: skip
    """Seed → weights of the pruned network after retraining it with that seed."""
    model = built(build, seeds[0])
    if plain and (norms := [path for path, module in model.named_modules() if _keeps_statistics(module)]):
        raise PlanError(
            "a batch norm's statistics mean nothing between two networks", where=norms[0],
            hint="refresh=lambda model: torch.optim.swa_utils.update_bn(loader, model)",
        )  # fmt: skip
    masks = dense_masks(model, exclude)
    trained(model, train, 0, steps, derived(seeds[0], "dense"), {})
    dense = snapshot(model)
    if density < 1:
        masks = prune_smallest(dense, masks, 1 - density)
    states = {}
    for seed in seeds:
        model = built(build, seeds[0])
        load(model, dense)
        trained(model, train, 0, retrain_steps, derived(seed, "retrain"), masks)
        states[seed] = snapshot(model)
    return states


def _keeps_statistics(module: nn.Module) -> bool:
    return isinstance(getattr(module, "running_mean", None), Tensor)


@dataclass(frozen=True)
class _Line:
    """Measures along straight lines between networks."""

    build: Build
    seed: int
    error: Callable[[nn.Module], float]
    outputs: Callable[[nn.Module], Tensor]
    refresh: Callable[[nn.Module], Any] | None
    points: int

    def pair(self, seeds: tuple[int, int], one: State, other: State) -> Pair:
        errors = tuple(self._error(one, other, i / (self.points - 1)) for i in range(self.points))
        return Pair(seeds, mode_connectivity(errors), self._similarity(one, other), errors)

    def _error(self, one: State, other: State, t: float) -> float:
        return scored(self._model(_between(one, other, t)), self.error, self.seed, "error")

    def _similarity(self, one: State, other: State) -> float:
        found = []
        for state in (one, other):
            model = self._model(state).eval()
            with seeded(self.seed), torch.no_grad():
                found.append(self.outputs(model))
        for value in found:
            if not isinstance(value, Tensor) or value.ndim < 2 or len(value) < 2 or len(value) != len(found[0]):
                what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise PlanError(
                    f"outputs returned {what}, not a tensor [n, …] of the same n ≥ 2 inputs", where="outputs"
                )
        return cka(*found)

    def _model(self, state: State) -> nn.Module:
        model = built(self.build, self.seed)
        load(model, state)
        if self.refresh is not None:
            with seeded(self.seed):
                self.refresh(model)
        return model


def _between(one: State, other: State, t: float) -> State:
    """(1 − t)·one + t·other of everything that is floating; of the rest, counters say, those of `one`."""
    return {name: ((1 - t) * value.double() + t * other[name].double()).to(value.dtype)
            if value.is_floating_point() else value for name, value in one.items()}  # fmt: skip


def _check(steps: Any, retrain_steps: Any, density: Any, seeds: Any, margin: Any, similar: Any, points: Any) -> None:
    for name, value, least in (("steps", steps, 1), ("retrain_steps", retrain_steps, 1), ("points", points, 3)):
        if value is None and name == "retrain_steps":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise PlanError(f"must be a whole number of at least {least}, got {value!r}", where=name)
    if not isinstance(density, int | float) or not 0 < density <= 1:
        raise PlanError(f"must be above 0 and at most 1, got {density!r}", where="density")
    for name, value in (("margin", margin), ("similar", similar)):
        if not isinstance(value, int | float) or not value >= 0:
            raise PlanError(f"must be at least 0, got {value!r}", where=name)
    if not all(isinstance(seed, int) for seed in seeds) or len(set(seeds)) != len(seeds):
        raise PlanError(f"must be different whole numbers, got {seeds!r}", where="seeds")
