"""``fxfreeze.find_ticket``: iterative magnitude pruning with rewinding, with the controls that make it a finding.

Frankle et al. 2020, *Linear Mode Connectivity and the Lottery Ticket Hypothesis*, as in open_lth: train to step k and
keep the weights W_k; train to the end; prune, of the weights that remain in all layers together, the share with the
smallest magnitudes; set the others back to W_k; train again from there. Level L has (1 − share)^L of the weights.

A mask that trains well has shown something only beside two others that do not: the same mask on other initial weights,
and a random mask with as many weights in every layer, on W_k.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from . import tickets_plot
from .errors import ArtifactError, PlanError
from .locks import alone
from .plan import write_file
from .tickets_cluster import Cluster, Here, Runner
from .tickets_masks import Masks, shuffled
from .tickets_run import Build, Evaluate, Key, Kind, State, Task, Train, check_functions, derived
from .tickets_store import Run, Settings, Store

LABELS: dict[Kind, str] = {"ticket": "ticket", "reinit": "same mask, other initial weights", "random": "random mask"}
CONTROLS: tuple[Kind, ...] = ("reinit", "random")


def find_ticket(
    build: Build,
    train: Train,
    evaluate: Evaluate,
    *,
    levels: int,
    steps: int,
    rewind_to: int,
    folder: str | os.PathLike[str],
    fraction: float = 0.2,
    exclude: str | Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    controls: Literal["all", "last", "none"] | Sequence[int] = "all",
    cluster: str | None = None,
    cpus: float = 1,
    gpus: float = 0,
    progress: bool = True,
) -> Tickets:
    """Search for sparse networks that train as well as the dense one, and keep all that was found in `folder`.

    Called again with the same folder it goes on where it was, whenever it was killed: only the run in progress is made
    again. More levels, seeds or controls may be asked for later. On a CPU the outcome is the same, bit for bit.

    Args:
        build: ``build(seed)`` makes a fresh model. The seed may choose its initial weights, and nothing else.
        train: ``train(model, start=, stop=, seed=)`` trains the model it is given, in place, from step `start` up to,
            not including, `stop`, with an optimizer that it makes; `seed` is for the order of the data. Any loop will
            do: pruned weights are held at zero from outside (see :func:`fxfreeze.tickets_masks.held`), so it need not
            know of masks, whatever momentum or weight decay it has. Schedules of the rate follow from `start`.
        evaluate: ``evaluate(model)`` gives a number, the higher the better, on data that is not trained on. Levels are
            chosen by it (:meth:`Tickets.best`), so report another split.
        levels: how often to prune; level 0 is dense.
        steps: the step where training ends. What a step is, an iteration or an epoch, is for `train` to say.
        rewind_to: k, the step whose weights are kept; 0: the initial weights.
        folder: where everything is kept; made if it is missing, in a folder that exists.
        fraction: of the remaining weights, how many go at each level.
        exclude: globs over module paths that keep all their weights, such as the output layer. Linear layers and
            convolutions are pruned; biases and everything else never.
        seeds: replicates, each with weights, order of data and masks of its own.
        controls: at which levels the two controls are made: "all" from 1, the "last", "none", or a list.
        cluster: None makes one run after another, here. Else they are tasks on a Ray cluster: "local" for one on this
            machine, or what ``ray.init`` takes as an address. The functions are pickled.
        cpus, gpus: what each task on the cluster takes.
        progress: show a bar of the runs.

    Raises:
        PlanError: an argument is out of range, a function does not keep to its contract, or the folder holds a search
            with other settings.
        ArtifactError: a file in the folder is damaged, or another process is searching there.
        MissingDependencyError: `cluster` is given and ray is not installed.
    """
    check_functions(build, train, evaluate=evaluate)
    _check_numbers(levels, steps, rewind_to, fraction, seeds)
    settings = Settings(steps, rewind_to, fraction, (exclude,) if isinstance(exclude, str) else tuple(exclude))
    keys = _keys(levels, list(seeds), _control_levels(controls, levels))
    runner: Runner = Here(build, train, evaluate)
    if cluster is not None:
        runner = Cluster(build, train, evaluate, address=cluster, cpus=cpus, gpus=gpus)
    place = Path(folder)
    try:
        place.mkdir(exist_ok=True)
    except OSError as error:
        raise PlanError(f"cannot be made: {error.strerror}", where=str(folder)) from None
    with alone(place, "another process is searching in this folder", "wait for it, or name another folder"):
        store = Store(place, settings)
        store.clean()
        _search(store, keys, runner, progress)
        found = Tickets(place, keys)
        write_file(found.plot, found.svg().encode(), "plot")
    return found


def _search(store: Store, keys: Sequence[Key], runner: Runner, progress: bool) -> None:
    """Make all runs of `keys` that are not done."""
    from tqdm import tqdm

    left = [key for key in keys if not store.has(key)]
    done, running = len(keys) - len(left), set[Key]()
    if not left:
        return
    with runner, tqdm(total=len(keys), initial=done, desc="tickets", unit="run", disable=not progress) as bar:
        while left:
            for key in left:
                if key not in running and runner.room() and _ready(store, key):
                    runner.submit(_task(store, key))
                    running.add(key)
            key, outcome = runner.wait()
            store.save(key, outcome)
            running.remove(key)
            left.remove(key)
            bar.set_postfix_str(_words(key, outcome.score))
            bar.update()


def _words(key: Key, score: float | None) -> str:
    return f"seed {key.seed}, level {key.level}, {key.kind}" + (f": {score:.4g}" if score is not None else "")


def _ready(store: Store, key: Key) -> bool:
    """Whether what a run starts from is there."""
    if key.kind == "rewind":
        return True
    return store.has(Key("rewind", key.seed)) and (key.level == 0 or store.has(Key("ticket", key.seed, key.level - 1)))


def _task(store: Store, key: Key) -> Task:
    """Every run has an order of data of its own, so that no mask is fitted to one."""
    kind, seed, level = key
    settings, train_seed = store.settings, derived(seed, "train", kind, level)
    k, end = settings.rewind_to, settings.steps
    if kind == "rewind":
        return Task(key, seed, train_seed, 0, k, exclude=settings.exclude)
    masks = store.masks(seed, level)
    if kind == "reinit":  # from step 0: other initial weights have not been trained to step k
        return Task(key, derived(seed, "build", kind, level), train_seed, 0, end, masks=masks)
    if kind == "random":
        masks = shuffled(masks, derived(seed, "mask", level))
    return Task(key, seed, train_seed, k, end, store.rewound(seed), masks)


def _keys(levels: int, seeds: Sequence[int], controls: Collection[int]) -> list[Key]:
    """Every run of a search, in an order in which each finds what it starts from."""
    keys = [Key("rewind", seed) for seed in seeds]
    for level in range(levels + 1):
        for kind in ("ticket", *CONTROLS) if level in controls else ("ticket",):
            keys += [Key(kind, seed, level) for seed in seeds]  # type: ignore[arg-type]
    return keys


def _control_levels(controls: Any, levels: int) -> Collection[int]:
    if isinstance(controls, str):
        named: dict[str, Collection[int]] = {"all": range(1, levels + 1), "last": [levels], "none": []}
        if controls not in named:
            raise PlanError(f"must be 'all', 'last', 'none' or a list of levels, got {controls!r}", where="controls")
        return named[controls]
    if wrong := [level for level in controls if not _whole(level, 1) or level > levels]:
        raise PlanError(f"there is no level {wrong[0]!r} to control: levels are 1 to {levels}", where="controls")
    return list(controls)


def _check_numbers(levels: Any, steps: Any, rewind_to: Any, fraction: Any, seeds: Any) -> None:
    for name, value, least in (("levels", levels, 1), ("steps", steps, 1), ("rewind_to", rewind_to, 0)):
        if not _whole(value, least):
            raise PlanError(f"must be a whole number of at least {least}, got {value!r}", where=name)
    if rewind_to >= steps:
        raise PlanError(f"must be before the last step: {rewind_to} of {steps}", where="rewind_to")
    if not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise PlanError(f"must be between 0 and 1, got {fraction!r}", where="fraction")
    if not seeds or not all(_whole(seed, 0) for seed in seeds) or len(set(seeds)) != len(seeds):
        raise PlanError(f"must be different whole numbers, one for each replicate, got {seeds!r}", where="seeds")


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(frozen=True)
class Ticket:
    """One replicate's network at one level.

    Attributes:
        level, seed: which.
        density: the share of weights left in the layers that are pruned.
        score: of this replicate.
        loss: how far the level is below the dense network, in the mean over replicates.
        mask: the file of its mask, for ``fxfreeze.Prune(mask=...)``.
        rewound: the file of W_k.
        trained: the file of its weights after training; pruned ones are zero.
    """

    level: int
    seed: int
    density: float
    score: float
    loss: float
    mask: Path
    rewound: Path
    trained: Path


@dataclass(frozen=True)
class Level:
    """Means over replicates of one kind of run: density, score, and the sample standard deviation of the score."""

    kind: Kind
    level: int
    density: float
    score: float
    sd: float


class Tickets:
    """What a search found, read from its folder.

    Attributes:
        runs: one row for each run that is done.
        plot: the file of the plot.

    Raises:
        ArtifactError: there is no search in `folder`, or a file there is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], keys: Sequence[Key] | None = None) -> None:
        self.folder = Path(folder)
        self._store = Store(self.folder)
        if keys is None:
            keys = list(_found(self.folder))
        self.runs: tuple[Run, ...] = tuple(self._store.row(key) for key in keys if key.kind != "rewind")
        self.plot = self.folder / "plot.svg"

    def masks(self, level: int, seed: int) -> Masks:
        """Bool tensors by parameter name, True where a weight stays."""
        return self._store.masks(seed, level)

    def rewound(self, level: int, seed: int) -> State:
        """W_k with the mask of `level` applied: what the ticket is trained from."""
        state, masks = self._store.rewound(seed), self.masks(level, seed)
        return {name: value.masked_fill(~masks[name], 0) if name in masks else value for name, value in state.items()}

    def trained(self, level: int, seed: int) -> State:
        """The ticket after training."""
        return self._store.trained(seed, level)

    def levels(self, kind: Kind = "ticket") -> list[Level]:
        """Means over replicates, level by level, of those levels that all replicates reached."""
        of = [run for run in self.runs if run.kind == kind]
        seeds = {run.seed for run in self.runs}
        grouped = {level: [run for run in of if run.level == level] for level in sorted({run.level for run in of})}
        return [_mean(kind, runs) for runs in grouped.values() if {run.seed for run in runs} == seeds]

    def best(self, within: float = 0.0) -> Ticket:
        """The sparsest level whose mean score is no more than `within` below that of the dense network.

        Of its replicates, the one with the highest score. Level 0, the dense network itself, always qualifies.
        """
        if not within >= 0:
            raise PlanError(f"must be at least 0, got {within!r}", where="within")
        dense, *rest = self.levels()
        level = [dense, *(level for level in rest if level.score >= dense.score - within)][-1]
        return self.ticket(level.level)

    def ticket(self, level: int, seed: int | None = None) -> Ticket:
        """The network of a level, of the replicate with the highest score unless `seed` names another."""
        runs = [run for run in self.runs if run.kind == "ticket" and run.level == level and seed in (None, run.seed)]
        if not runs:
            raise PlanError(f"there is no ticket of level {level}" + (f" and seed {seed}" if seed is not None else ""))
        run = max(runs, key=lambda run: run.score)  # the first of equals
        means = {found.level: found.score for found in self.levels()}
        paths = self._store.mask_path, self._store.trained_path
        mask, trained = (path(run.seed, level) for path in paths)
        return Ticket(level, run.seed, run.density, run.score, means[0] - means.get(level, run.score),
                      mask, self._store.rewound_path(run.seed), trained)  # fmt: skip

    def svg(self) -> str:
        """The plot: score against density, means over replicates, bars of one standard deviation."""
        dense = self.levels()[:1]
        curves = [(LABELS[kind], (dense if kind != "ticket" else []) + self.levels(kind))
                  for kind in LABELS if self.levels(kind)]  # fmt: skip
        return tickets_plot.plot([
            tickets_plot.Curve(label, [(level.density, level.score, level.sd) for level in levels])
            for label, levels in curves
        ])  # fmt: skip

    def __repr__(self) -> str:
        rows = [(level.level, level.density, kind, level.score, level.sd)
                for kind in LABELS for level in self.levels(kind)]  # fmt: skip
        lines = [f"level {level:2}  {100 * density:6.2f} %  {score:.4f} ± {sd:.4f}  {LABELS[kind]}"
                 for level, density, kind, score, sd in sorted(rows, key=lambda row: row[0])]  # fmt: skip
        return "\n".join([f"Tickets({str(self.folder)!r})", *lines])


def _mean(kind: Kind, runs: Sequence[Run]) -> Level:
    scores = [run.score for run in runs]
    sd = statistics.stdev(scores) if len(scores) > 1 else 0.0
    return Level(kind, runs[0].level, statistics.fmean(run.density for run in runs), statistics.fmean(scores), sd)


def _found(folder: Path) -> Iterator[Key]:
    """The runs that are done in a folder."""
    for path in sorted(folder.glob("seed-*/level-*.*.json")):
        level, kind, _ = path.name.removeprefix("level-").split(".")
        seed = path.parent.name.removeprefix("seed-")
        if kind not in LABELS or not level.isdecimal() or not seed.isdecimal():
            raise ArtifactError("not a file of a search", where=str(path))
        yield Key(kind, int(seed), int(level))  # type: ignore[arg-type]
