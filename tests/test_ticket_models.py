"""A search for a ticket as benchmarks/tickets_mnist.py makes it: a small one, and what counts as found."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fxfreeze import demo
from fxfreeze.tickets import Level

ROOT = Path(__file__).resolve().parents[1]
# Only for this import: on sys.path for good, the root would offer its folder `kernels` to every package.
sys.path.insert(0, str(ROOT))
try:
    from benchmarks import tickets_mnist
finally:
    sys.path.remove(str(ROOT))


@functools.cache
def digits() -> tickets_mnist.Data:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    data = demo.load_digits()
    return tickets_mnist.standardised(data.train, data.train_labels, data.test, data.test_labels)


def test_a_small_search_finds_what_it_counts(tmp_path: Path):
    """scikit-learn's digits stand in for MNIST."""
    given: dict[str, Any] = {"seeds": 2, "levels": 2, "controls": [], "epochs": 5, "progress": False}
    found = tickets_mnist.search(digits(), tmp_path / "s", **given)
    row = tickets_mnist.measured(found, digits(), limits=False)
    assert row["ok"] and row["density"] == pytest.approx(0.64, abs=1e-4)
    assert row["weights_left"] == round(0.64 * (64 * 300 + 300 * 100)) and row["never_pruned"] == 300 + 100 + 10 + 1000
    assert row["ticket"]["score"] > 0.85  # by chance 0.1
    assert {level["level"] for level in row["levels"]["random"]} == {2}
    assert set(row["last_by_seed"]["ticket"]) == {0, 1} == set(row["last_by_seed"]["reinit"])
    assert not tickets_mnist.measured(found, digits(), limits=True)["ok"]  # 64 % are too many


def test_images_are_standardised_by_those_that_are_trained_on():
    train, labels = torch.rand(50, 1, 4, 4), torch.zeros(50)
    data = tickets_mnist.standardised(train, labels, 2 * train + 1, labels)
    assert data.train.shape == (50, 16)
    assert float(data.train.mean()) == pytest.approx(0, abs=1e-6) and float(data.train.std()) == pytest.approx(1)
    torch.testing.assert_close(data.test, 2 * data.train + ((train.mean() + 1) / train.std()))


def found(density: float, ticket: list[float], reinit: list[float], random: list[float]) -> Any:
    """Tickets whose dense networks score 0.98."""
    scores: dict[Any, list[float]] = {"ticket": ticket, "reinit": reinit, "random": random}

    def levels(kind: Any) -> list[Level]:
        last = Level(kind, 14, density, sum(scores[kind]) / len(scores[kind]), 0.0)
        return [Level(kind, 0, 1.0, 0.98, 0.0), last] if kind == "ticket" else [last]

    runs = [SimpleNamespace(kind=kind, level=14, seed=seed, score=score, seconds=1.0)
            for kind, of in scores.items() for seed, score in enumerate(of)]  # fmt: skip
    masks = {"0.weight": torch.ones(300, 16, dtype=torch.bool), "2.weight": torch.ones(100, 300, dtype=torch.bool)}
    return SimpleNamespace(levels=levels, runs=runs, masks=lambda level, seed: masks,
                           best=lambda within: SimpleNamespace(level=14))  # fmt: skip


@pytest.mark.parametrize(
    ("tickets", "ok"),
    [
        (found(0.044, [0.979, 0.977], [0.96, 0.97], [0.95, 0.97]), True),
        (found(0.051, [0.979, 0.977], [0.96, 0.97], [0.95, 0.97]), False),  # too many weights
        (found(0.044, [0.975, 0.974], [0.96, 0.97], [0.95, 0.97]), False),  # 0.55 points below
        (found(0.044, [0.979, 0.977], [0.96, 0.977], [0.95, 0.97]), False),  # one is not above the mask alone
        (found(0.044, [0.979, 0.977], [0.96, 0.97], [0.98, 0.9]), False),  # nor one above a random mask
    ],
)
def test_what_counts_as_found(tickets: Any, ok: bool):
    data = tickets_mnist.Data(torch.zeros(1, 16), torch.zeros(1), torch.zeros(1, 16), torch.zeros(1))
    row = tickets_mnist.measured(tickets, data, limits=True)
    assert row["ok"] is ok
    assert row["loss"] == pytest.approx(0.98 - sum(row["last_by_seed"]["ticket"].values()) / 2)
