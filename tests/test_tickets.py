"""``fxfreeze.find_ticket``: what each run starts from, what is kept, and that nothing kills a search."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxfreeze as fz
from fxfreeze import locks, tickets_cluster, weights
from fxfreeze.errors import ArtifactError, FxfreezeError, MissingDependencyError, PlanError
from fxfreeze.masks import read_mask
from fxfreeze.tickets_plot import Curve, plot, rounded

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] * X[:, 1] > 0).long()


def build(seed: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Dropout(0.1), nn.Linear(12, 2))


def train(model: nn.Module, *, start: int, stop: int, seed: int) -> None:
    """Plain gradient descent with weight decay; order of data and dropout come from the global generator."""
    for _ in range(start, stop):
        for batch in torch.randperm(len(X)).split(16):
            loss = F.cross_entropy(model(X[batch]), Y[batch])
            parameters = list(model.parameters())
            with torch.no_grad():
                for value, grad in zip(parameters, torch.autograd.grad(loss, parameters)):
                    value.sub_(0.2 * (grad + 1e-3 * value))


def evaluate(model: nn.Module) -> float:
    return -float(F.cross_entropy(model(X), Y).detach())


SMALL: dict[str, Any] = {"levels": 2, "steps": 3, "rewind_to": 1, "seeds": [0, 7], "exclude": "3", "progress": False}


def search(folder: Path, **given: Any) -> fz.Tickets:
    return fz.find_ticket(given.pop("build", build), given.pop("train", train), given.pop("evaluate", evaluate),
                          folder=folder, **{**SMALL, **given})  # fmt: skip


def contents(folder: Path) -> dict[str, Any]:
    """What every file of a search holds, bit for bit, without how long a run took."""
    found: dict[str, Any] = {}
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".json":
            found[name] = {key: value for key, value in json.loads(path.read_text()).items() if key != "seconds"}
        elif path.suffix == ".safetensors":  # which writes its metadata in any order
            tensors, about = weights.read(path)
            found[name] = about, {key: (value.dtype, value.numpy().tobytes()) for key, value in tensors.items()}
        else:
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "search"
    search(folder)
    return folder


# ---- the algorithm


class Witness:
    """A train that notes what it is given, and moves every weight by an amount of its own."""

    def __init__(self) -> None:
        self.runs: list[tuple[dict[str, Tensor], int, int, int]] = []

    def __call__(self, model: nn.Module, *, start: int, stop: int, seed: int) -> None:
        state = {name: value.detach().clone() for name, value in model.named_parameters()}
        self.runs.append((state, start, stop, seed))
        with torch.no_grad():
            for name, value in model.named_parameters():
                masked = value == 0 if name == "0.weight" else torch.zeros_like(value, dtype=torch.bool)
                value.add_(torch.randn_like(value).masked_fill(masked, 0))


def test_every_run_starts_from_where_it_should(tmp_path: Path):
    witness = Witness()
    found = search(tmp_path / "s", train=witness, seeds=[3], steps=10, rewind_to=4)
    rewind, dense, first, *_ = witness.runs
    # 1 to W_k, then level by level: ticket, and from level 1 both controls
    assert [(start, stop) for _, start, stop, _ in witness.runs] == [
        (0, 4), (4, 10), (4, 10), (0, 10), (4, 10), (4, 10), (0, 10), (4, 10),
    ]  # fmt: skip
    assert len({seed for *_, seed in witness.runs}) == len(witness.runs)
    rewound = found.rewound(0, 3)
    assert all(torch.equal(dense[0][name], value) for name, value in rewound.items())
    assert any(not torch.equal(rewind[0][name], value) for name, value in rewound.items())
    for level, (ticket, reinit, shuffled) in enumerate(zip(*[iter(witness.runs[2:])] * 3, strict=True), 1):
        mask = found.masks(level, 3)["0.weight"]
        starts = [run[0] for run in (ticket, reinit, shuffled)]
        assert torch.equal(starts[0]["0.weight"], rewound["0.weight"] * mask)
        assert torch.equal(starts[0]["3.weight"], rewound["3.weight"])  # never pruned
        assert torch.equal(starts[1]["0.weight"] != 0, mask)  # the same mask
        assert not torch.equal(starts[1]["3.weight"], rewound["3.weight"])  # other initial weights
        assert not torch.equal(starts[1]["3.weight"], rewind[0]["3.weight"])
        other = starts[2]["0.weight"] != 0
        assert other.sum() == mask.sum() and not torch.equal(other, mask)  # a random mask
        assert torch.equal(starts[2]["0.weight"], rewound["0.weight"] * other)  # on W_k
    assert first[0]["0.weight"].count_nonzero() == round(0.8 * 72)


def test_masks_follow_the_trained_weights_of_the_level_before(whole: Path):
    found = fz.Tickets(whole)
    for seed in (0, 7):
        masks = [found.masks(level, seed) for level in range(3)]
        assert [list(mask) for mask in masks] == [["0.weight"]] * 3
        assert [int(mask["0.weight"].sum()) for mask in masks] == [72, 58, 46]
        for level in (0, 1):
            trained, before, after = (found.trained(level, seed)["0.weight"], masks[level]["0.weight"],
                                      masks[level + 1]["0.weight"])  # fmt: skip
            assert not (after & ~before).any()
            assert trained[before & ~after].abs().max() <= trained[after].abs().min()
            assert not trained[~before].any()
    assert not torch.equal(found.masks(2, 0)["0.weight"], found.masks(2, 7)["0.weight"])


def test_the_initial_weights_may_be_what_is_kept(tmp_path: Path):
    witness = Witness()
    found = search(tmp_path / "s", train=witness, seeds=[0], levels=1, rewind_to=0, controls="none")
    assert [(start, stop) for _, start, stop, _ in witness.runs] == [(0, 3), (0, 3)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert torch.equal(found.rewound(0, 0)["0.weight"], build(0)[0].weight)


def test_buffers_are_set_back_too(tmp_path: Path):
    def with_norm(seed: int) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 2))

    seen = []

    def watched(model: nn.Module, *, start: int, stop: int, seed: int) -> None:
        seen.append((start, int(model[1].num_batches_tracked)))
        train(model, start=start, stop=stop, seed=seed)

    search(tmp_path / "s", build=with_norm, train=watched, seeds=[0], controls="none")
    assert seen == [(0, 0), (1, 4), (1, 4), (1, 4)]


@pytest.mark.parametrize(
    ("controls", "levels"), [("all", {1, 2}), ("last", {2}), ("none", set()), ([1], {1})]
)  # fmt: skip
def test_controls_are_made_where_they_are_asked_for(tmp_path: Path, controls: Any, levels: set[int]):
    found = search(tmp_path / "s", controls=controls, seeds=[0])
    for kind in ("reinit", "random"):
        assert {run.level for run in found.runs if run.kind == kind} == levels


def test_the_callers_generators_go_on_as_if_nothing_had_been(tmp_path: Path):
    def draws() -> Any:
        return torch.rand(1).item(), numpy.random.rand(), random.random()

    states = torch.get_rng_state(), numpy.random.get_state(), random.getstate()
    wanted = draws()
    torch.set_rng_state(states[0]), numpy.random.set_state(states[1]), random.setstate(states[2])
    search(tmp_path / "s", seeds=[0], levels=1)
    assert draws() == wanted


# ---- killed and started again


def test_the_same_again(whole: Path, tmp_path: Path):
    search(tmp_path / "s")
    assert contents(tmp_path / "s") == contents(whole)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_every_write_it_goes_on_and_finds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
):
    """Each file is moved into place once; the process ends before or after any of these moves."""
    replace, moves, trained = os.replace, [0, 0], [0]

    def move(source: Any, target: Any) -> None:
        moves[0] += 1
        if moves[0] == moves[1] and when == "before":
            raise Killed
        replace(source, target)
        if moves[0] == moves[1]:
            raise Killed

    def counted(model: nn.Module, **given: Any) -> None:
        trained[0] += 1
        train(model, **given)

    monkeypatch.setattr(os, "replace", move)
    given = {"seeds": [0], "levels": 1, "train": counted}
    search(tmp_path / "whole", **given)
    (count, _), runs = moves, trained[0]
    assert count == 1 + 2 + 2 + 3 + 2 + 1  # settings, W_k, dense, ticket with its mask, controls, plot
    for at in range(1, count + 1):
        moves[:], trained[0] = [0, at], 0
        folder = tmp_path / f"at {at}"
        with pytest.raises(Killed):
            search(folder, **given)
        moves[1] = 0
        search(folder, **given)
        assert contents(folder) == contents(tmp_path / "whole"), at
        assert trained[0] <= runs + 1, at  # no more than the run in progress


SCRIPT = """
    import os, random, signal, sys, threading, time
    import torch
    from tqdm import tqdm
    sys.path.insert(0, sys.argv[1])
    import test_tickets as t
    from pathlib import Path
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is shared with forks: one that dies with it blocks all
    folder, moments = Path(sys.argv[2]), random.Random(0)
    for name in ("first", "second"):  # torch is slow the first time
        started = time.monotonic()
        t.search(folder.with_name(name))
    whole, kills = time.monotonic() - started, 0
    while True:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                t.search(folder)
                code = 0
            finally:
                os._exit(code)
        time.sleep(moments.uniform(0.02, 0.4) * whole if kills < 40 else 30 * whole)
        os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1] != signal.SIGKILL:
            break  # it had ended before
        kills += 1
    print(kills)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked, so that they start in no time")
def test_killed_at_random_again_and_again_it_ends_with_the_same(whole: Path, tmp_path: Path):
    """SIGKILL after 2 to 40 % of the time that a whole search takes, until a process reaches the end."""
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(Path(__file__).parent), str(tmp_path / "s")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= 2
    assert contents(tmp_path / "s") == contents(whole)


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path):
    search(tmp_path / "s", seeds=[0], levels=1)
    left = [tmp_path / "s" / ".search.json.1.tmp", tmp_path / "s" / "seed-0" / ".level-01.mask.safetensors.1.tmp"]
    for path in left:
        path.write_bytes(b"half")
    search(tmp_path / "s", seeds=[0], levels=1)
    assert not any(path.exists() for path in left)


def test_more_may_be_asked_for_later(whole: Path, tmp_path: Path):
    search(tmp_path / "s", levels=1, seeds=[0], controls="none")
    search(tmp_path / "s", levels=1, seeds=[0, 7], controls="last")
    search(tmp_path / "s")
    assert contents(tmp_path / "s") == contents(whole)


def test_a_search_that_is_done_trains_nothing(whole: Path, tmp_path: Path):
    def never(model: nn.Module, **given: Any) -> None:
        raise AssertionError

    shutil.copytree(whole, tmp_path / "s")
    assert len(search(tmp_path / "s", train=never).runs) == 2 * 7
    assert {run.level for run in search(tmp_path / "s", train=never, levels=1).runs} == {0, 1}  # what was asked for
    assert len(fz.Tickets(tmp_path / "s").runs) == 2 * 7  # what is there


# ---- refusals


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"levels": 0}, "at least 1, got 0\n  at levels"),
        ({"levels": True}, "got True"),
        ({"steps": 2.5}, r"got 2\.5\n  at steps"),
        ({"rewind_to": -1}, "got -1\n  at rewind_to"),
        ({"rewind_to": 3}, "before the last step: 3 of 3"),
        ({"fraction": 1.0}, r"between 0 and 1, got 1\.0"),
        ({"fraction": "a"}, "between 0 and 1, got 'a'"),
        ({"seeds": []}, r"one for each replicate, got \[\]"),
        ({"seeds": [1, 1]}, r"got \[1, 1\]"),
        ({"seeds": [-1]}, r"got \[-1\]"),
        ({"controls": "some"}, "got 'some'"),
        ({"controls": [0]}, "no level 0 to control"),
        ({"controls": [3]}, "no level 3 to control"),
        ({"exclude": "fc"}, "'fc' matches no linear layer"),
        ({"build": lambda: None}, r"build cannot be called as build\(seed\)"),
        ({"build": lambda seed: 3}, "build returned int"),
        ({"train": lambda model, start, stop: 0}, r"cannot be called as train\(model, start=…, stop=…, seed=…\)"),
        ({"train": 3}, "train is int, not a function"),
        ({"train": lambda model, start, stop, seed: None}, "training from step 0 to 1 changed no parameter"),
        ({"train": lambda model, start, stop, seed: train(model, start=0, stop=1, seed=0) or build(0)},
         "train returned another model"),
        ({"train": lambda model, start, stop, seed: train(build(0), start=0, stop=1, seed=0)}, "changed no parameter"),
        ({"evaluate": lambda: 0}, r"evaluate cannot be called as evaluate\(model\)"),
        ({"evaluate": lambda model: float("nan")}, "evaluate returned nan"),
        ({"evaluate": lambda model: "good"}, "evaluate returned str, not a number"),
        ({"evaluate": lambda model: model(X).detach()}, "evaluate returned Tensor, not a number"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(tmp_path: Path, given: dict[str, Any], text: str):
    with pytest.raises(PlanError, match=text):
        search(tmp_path / "s", **given)


def test_pruned_weights_that_come_back_are_refused_and_nothing_is_kept_of_that_run(tmp_path: Path):
    def forgetful(model: nn.Module, **given: Any) -> None:
        model[0] = nn.Linear(6, 12)
        train(model, **given)

    with pytest.raises(PlanError, match=r"14 pruned weights of 0\.weight are not zero after training"):
        search(tmp_path / "s", train=forgetful, seeds=[0])
    assert sorted(path.name for path in (tmp_path / "s" / "seed-0").glob("*.json")) == ["level-00.ticket.json"]


def test_an_error_of_the_loop_is_the_callers_and_the_search_can_go_on(whole: Path, tmp_path: Path):
    calls = []

    def fails(model: nn.Module, **given: Any) -> None:
        calls.append(given)
        if len(calls) == 5:
            raise ZeroDivisionError("in the loop")
        train(model, **given)

    with pytest.raises(ZeroDivisionError, match="in the loop"):
        search(tmp_path / "s", train=fails)
    search(tmp_path / "s")
    assert contents(tmp_path / "s") == contents(whole)


def test_a_network_that_diverged_has_no_smallest_weights(tmp_path: Path):
    def diverges(model: nn.Module, *, start: int, **given: Any) -> None:
        with torch.no_grad():
            model[0].weight.mul_(float("inf") if start else 2)

    with pytest.raises(PlanError, match="NaN or infinite"):
        search(tmp_path / "s", train=diverges, evaluate=lambda model: 0.0)


def test_a_model_whose_seed_chooses_more_than_weights_is_refused(tmp_path: Path):
    def of_a_width(seed: int) -> nn.Module:
        width = 12 if seed == 0 else 13
        return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 2))

    with pytest.raises(PlanError, match=r"do not fit the model:\n  0\.weight: the mask has shape \(12, 6\)"):
        search(tmp_path / "s", build=of_a_width, exclude=(), seeds=[0])

    calls = []

    def of_a_depth(seed: int) -> nn.Module:
        calls.append(seed)
        return build(seed) if len(calls) == 1 else nn.Sequential(build(seed))

    with pytest.raises(PlanError, match="build makes different models"):
        search(tmp_path / "t", build=of_a_depth, seeds=[0])


def test_a_folder_of_other_settings_is_refused(whole: Path, tmp_path: Path):
    before = contents(whole)
    with pytest.raises(PlanError, match=r"other settings: steps was 3, not 4; exclude was \('3',\), not \(\)"):
        search(whole, steps=4, exclude=())
    with pytest.raises(PlanError, match=r"fraction was 0\.2, not 0\.5"):
        search(whole, fraction=0.5)
    assert contents(whole) == before
    with pytest.raises(PlanError, match="cannot be made: No such file"):
        search(tmp_path / "missing" / "s")


def test_one_process_at_a_time(whole: Path):
    with (
        locks.alone(whole, "busy", "wait"),
        pytest.raises(ArtifactError, match="another process is searching in this folder"),
    ):
        search(whole)


@pytest.mark.parametrize(
    ("file", "text", "error"),
    [
        ("search.json", '{"format": 2}', r"of format 2; this fxfreeze reads 1"),
        ("search.json", '{"format": 1}', r"search\.json is damaged"),
        ("search.json", "[", r"damaged: Expecting value"),
        ("seed-0/level-01.ticket.json", "{}", r"damaged: .*missing"),
        ("seed-0/level-01.ticket.json", "7", r"no JSON object"),
        ("seed-0/level-01.other.json", "{}", r"not a file of a search"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, file: str, text: str, error: str):
    search(tmp_path / "s", seeds=[0], levels=1, controls="none")
    (tmp_path / "s" / file).write_text(text)
    with pytest.raises(ArtifactError, match=error):
        fz.Tickets(tmp_path / "s")
    with pytest.raises(ArtifactError, match="there is no search here"):
        fz.Tickets(tmp_path)


def test_a_renamed_result_is_noticed(tmp_path: Path):
    search(tmp_path / "s", seeds=[0], levels=1, controls="none")
    os.replace(tmp_path / "s/seed-0/level-00.ticket.json", tmp_path / "s/seed-0/level-01.ticket.json")
    with pytest.raises(ArtifactError, match="the file was renamed"):
        fz.Tickets(tmp_path / "s")


# ---- what was found


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> fz.Tickets:
    """Scores that are given: by seed and level of the tickets, 0.5 of all controls."""
    table = {0: (0.90, 0.95, 0.85, 0.89, 0.60), 1: (0.92, 0.91, 0.87, 0.91, 0.70)}
    scores = iter([
        score for level in range(5) for kind in range(3 if level else 1) for seed in (0, 1)
        for score in [0.5 if kind else table[seed][level]]
    ])  # fmt: skip
    return search(
        tmp_path_factory.mktemp("scripted") / "s", levels=4, seeds=[0, 1], evaluate=lambda model: next(scores)
    )


def test_means_and_spread_over_seeds(scripted: fz.Tickets):
    levels = scripted.levels()
    assert [round(level.score, 6) for level in levels] == [0.91, 0.93, 0.86, 0.90, 0.65]
    assert levels[1].sd == pytest.approx(statistics.stdev([0.95, 0.91]))
    assert [level.density for level in levels] == [n / 72 for n in (72, 58, 46, 37, 30)]
    assert [(level.level, level.score, level.sd) for level in scripted.levels("random")] == [
        (level, 0.5, 0.0) for level in (1, 2, 3, 4)
    ]  # fmt: skip


def test_the_best_is_the_sparsest_within_the_loss(scripted: fz.Tickets):
    assert [scripted.best(within).level for within in (0.0, 0.009, 0.0101, 0.049, 0.3)] == [1, 1, 3, 3, 4]
    best = scripted.best(0.0101)
    assert (best.seed, best.score, best.density) == (1, 0.91, 37 / 72)  # of two replicates the better
    assert best.loss == pytest.approx(0.01)
    assert scripted.ticket(3, seed=0).score == 0.89
    with pytest.raises(PlanError, match="no ticket of level 5"):
        scripted.ticket(5)
    with pytest.raises(PlanError, match="at least 0"):
        scripted.best(-0.1)


def test_the_files_of_a_ticket(scripted: fz.Tickets):
    best = scripted.best(0.3)
    masks = read_mask(best.mask)
    assert list(masks) == ["0.weight"] and int(masks["0.weight"].sum()) == 30
    model = build(0)
    model.load_state_dict(scripted.trained(best.level, best.seed))
    assert torch.equal(model[0].weight != 0, masks["0.weight"])
    rewound = scripted.rewound(best.level, best.seed)
    assert torch.equal(rewound["0.weight"] != 0, masks["0.weight"])
    assert best.rewound.is_file() and best.trained.is_file()


def test_a_ticket_compiles(scripted: fz.Tickets):
    best, model = scripted.best(0.3), build(0).eval()
    model.load_state_dict(scripted.trained(best.level, best.seed))
    plan = fz.Plan([fz.Input("x", shape=("batch", 6))], [fz.Prune(mask=best.mask)], targets=[])
    program = fz.adapt(model, plan)
    assert torch.equal(program(X), model(X))  # it is pruned already
    model.load_state_dict(scripted.trained(0, best.seed))
    wanted = model(X)
    with torch.no_grad():
        model[0].weight.mul_(scripted.masks(best.level, best.seed)["0.weight"])
    dense = build(0).eval()
    dense.load_state_dict(scripted.trained(0, best.seed))
    pruned = fz.adapt(dense, plan)(X)
    torch.testing.assert_close(pruned, model(X))
    assert float((pruned - wanted).detach().abs().max()) > 0.01


def test_a_level_that_not_all_replicates_reached_has_no_mean(tmp_path: Path):
    search(tmp_path / "s", seeds=[0], controls="none")
    search(tmp_path / "s", seeds=[7], levels=1, controls="none")
    assert [level.level for level in fz.Tickets(tmp_path / "s").levels()] == [0, 1]


def test_its_text_has_every_level(scripted: fz.Tickets):
    lines = repr(scripted).splitlines()
    assert len(lines) == 1 + 5 + 2 * 4
    assert lines[1] == "level  0  100.00 %  0.9100 ± 0.0141  ticket"


SVG = "{http://www.w3.org/2000/svg}"


def test_the_plot_has_a_curve_for_each_kind(scripted: fz.Tickets):
    root = ElementTree.fromstring(scripted.plot.read_text())
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"ticket", "same mask, other initial weights", "random mask", "100 %", "50 %"} <= set(texts)
    dots = [(dot.get("fill"), float(dot.get("cx", 0)), float(dot.get("cy", 0))) for dot in root.iter(f"{SVG}circle")]
    colours = list(dict.fromkeys(colour for colour, *_ in dots))
    assert [sum(colour == dot[0] for dot in dots) for colour in colours] == [5, 5, 5]  # controls begin at dense, too
    ticket = [dot[1:] for dot in dots if dot[0] == colours[0]]
    assert [x for x, _ in ticket] == sorted(x for x, _ in ticket)  # sparser to the right
    by_score = sorted(ticket, key=lambda place: place[1])
    assert [ticket.index(place) for place in by_score] == [1, 0, 3, 2, 4]  # the higher the better


def test_bars_are_one_deviation_long_and_labels_are_escaped():
    root = ElementTree.fromstring(plot([Curve("a < b", [(1.0, 0.5, 0.1), (0.5, 0.9, 0.0)])]))
    assert "a < b" in [text.text for text in root.iter(f"{SVG}text")]
    ys = [float(dot.get("cy", 0)) for dot in root.iter(f"{SVG}circle")]
    bars = [path.get("d", "") for path in root.iter(f"{SVG}path") if "V" in path.get("d", "")]
    top, bottom = (float(part) for part in bars[0].split(" ")[1].split("V"))
    assert bottom - top == pytest.approx(2 * 0.1 * (ys[0] - ys[1]) / 0.4, abs=0.2)


@pytest.mark.parametrize(("low", "high"), [(0.91, 0.984), (-3.2, 5.0), (0.5, 0.5), (0.0, 0.0), (1e-7, 3e-7)])
def test_ticks_are_round_and_span_the_values(low: float, high: float):
    ticks = rounded(low, high)
    assert 2 <= len(ticks) <= 9 and ticks[0] <= low + 1e-12 and ticks[-1] >= high - 1e-12
    assert all(len(f"{tick:.6g}") <= 8 for tick in ticks)


# ---- on a cluster


def test_without_ray_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"package 'ray'\n  hint: pip install 'fxfreeze\[search\]'"):
        search(tmp_path / "s", cluster="local")
    assert not (tmp_path / "s").exists()


class Ray:
    """What a search uses of Ray, in this process; the last task that was submitted ends first."""

    exceptions = SimpleNamespace(RayTaskError=type("RayTaskError", (Exception,), {}), RayError=OSError)

    def __init__(self, running: bool) -> None:
        self.calls: list[Any] = []
        self.running, self.waited = running, 0

    def is_initialized(self) -> bool:
        return self.running

    def init(self, address: str, **given: Any) -> None:
        self.calls.append(("init", address, given))
        if address == "nowhere":
            raise ConnectionError("nobody there")

    def shutdown(self) -> None:
        self.calls.append("shutdown")

    def put(self, value: Any) -> Any:
        return value

    def remote(self, function: Any) -> Any:
        def options(**given: Any) -> Any:
            self.calls.append(given)
            return SimpleNamespace(remote=lambda *args: lambda: function(*args))

        return SimpleNamespace(options=options)

    def wait(self, references: list[Any], num_returns: int) -> Any:
        self.waited = max(self.waited, len(references))
        return references[-1:], references[:-1]

    def get(self, reference: Any) -> Any:
        return reference()


def test_a_cluster_is_given_all_that_is_ready_and_stopped_if_it_was_started(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, running in (("a", False), ("b", True)):
        ray = Ray(running)
        monkeypatch.setitem(sys.modules, "ray", ray)
        search(tmp_path / name, cluster="local", cpus=1, gpus=0.5)
        assert contents(tmp_path / name) == contents(whole)
        assert {"num_cpus": 1, "num_gpus": 0.5, "max_retries": 3} in ray.calls
        assert ray.waited >= 4  # two replicates' tickets and controls at once
        started = ("init", "local", {"log_to_driver": False, "include_dashboard": False})
        assert (ray.calls[0] == started) == (ray.calls[-1] == "shutdown") == (not running)


def test_a_cluster_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", Ray(False))
    with pytest.raises(FxfreezeError, match="no Ray cluster answers: nobody there\n  at cluster='nowhere'"):
        search(tmp_path / "s", cluster="nowhere")


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import the tests
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_on_a_cluster_it_finds_the_same_though_a_worker_is_lost(ray: Any, whole: Path, tmp_path: Path):
    """A worker kills itself in the middle of a control."""
    marks = tmp_path / "marks"
    marks.mkdir()

    def fragile(model: nn.Module, *, start: int, stop: int, seed: int) -> None:
        (marks / f"{start}-{stop}-{seed}-{os.getpid()}").touch()
        if (start, stop) == (0, 3) and not (marks / "killed").exists():
            (marks / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        train(model, start=start, stop=stop, seed=seed)

    search(tmp_path / "s", train=fragile, cluster="local")
    assert (marks / "killed").exists()
    assert contents(tmp_path / "s") == contents(whole)
    tried = [mark.name.rpartition("-") for mark in marks.glob("*-*-*-*")]
    assert len({run for run, *_ in tried}) == 2 * 8 and len(tried) > 2 * 8  # at least one was made twice
    assert str(os.getpid()) not in {process for *_, process in tried}
    assert ray.is_initialized()  # it was there before


@pytest.mark.slow
def test_errors_come_back_from_a_cluster_as_they_are(ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(model: nn.Module, **given: Any) -> None:
        raise ZeroDivisionError("in the loop")

    def dies(model: nn.Module, **given: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ZeroDivisionError, match="in the loop"):
        search(tmp_path / "a", train=fails, cluster="local")
    with pytest.raises(PlanError, match="changed no parameter"):
        search(tmp_path / "b", train=lambda model, **given: None, cluster="local")
    monkeypatch.setattr(tickets_cluster, "RETRIES", 0)
    with pytest.raises(FxfreezeError, match=r"rewind, seed 0, level 0 lost its worker in all of 1 attempts"):
        search(tmp_path / "c", train=dies, cluster="local", seeds=[0])
