"""The runs that train layers of fxfreeze.nn: what they count, and that a result that is not good is called so."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from fxfreeze.nn import BayesCap

ROOT = Path(__file__).resolve().parents[1]
# Only for this import: on sys.path for good, the root would offer its folder `kernels` to every package.
sys.path.insert(0, str(ROOT))
try:
    from benchmarks import bayescap_mnist, stitched_edit
    from benchmarks.tversky_mnist import Images
finally:
    sys.path.remove(str(ROOT))

GOOD = {"node": 3, "done": True, "corrected": True, "largest_change": 0.04, "turned": 0}


@pytest.mark.parametrize(
    ("change", "ok"),
    [({}, True), ({"largest_change": 0.06}, False), ({"corrected": False}, False),
     ({"done": False, "corrected": False}, False)],
)  # fmt: skip
def test_a_constrained_edit_must_keep_its_word(change: dict[str, object], ok: bool) -> None:
    name = stitched_edit.FIRST[0]
    row = stitched_edit.summary(name, [{**GOOD, **change}], [0.9], 0.9, 5, {})
    assert row["ok"] is ok
    assert stitched_edit.summary("another way", [{**GOOD, **change}], [0.9], 0.9, 5, {})["ok"]


@pytest.mark.parametrize(("differing", "error", "ok"), [(0, 1e-7, True), (1, 1e-7, False), (0, 1e-4, False)])
def test_targets_must_predict_the_same(differing: int, error: float, ok: bool) -> None:
    targets = {"torch": {"differing": differing, "probability_error": error}}
    assert stitched_edit.summary(stitched_edit.FIRST[0], [GOOD], [0.9], 0.9, 5, {"targets": targets})["ok"] is ok


def test_effects_are_counted_at_other_nodes() -> None:
    class Table(nn.Module):
        def __init__(self, logits: torch.Tensor) -> None:
            super().__init__()
            self.logits = logits

        def forward(self, *graph: torch.Tensor) -> torch.Tensor:
            return self.logits

    before = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.2, 0.0]])
    after = torch.tensor([[0.0, 5.0], [1.0, 0.1], [0.0, 0.2]])
    found = stitched_edit.effect(Table(after), Table(before), (before, before), 0, torch.tensor(1))  # type: ignore[arg-type]
    change = (after.softmax(-1) - before.softmax(-1)).abs()[1:].max()
    assert found == {"corrected": True, "largest_change": pytest.approx(float(change)), "turned": 1}


def test_the_plot_is_an_image_with_a_point_for_each_part() -> None:
    root = ElementTree.fromstring(bayescap_mnist.plot([(1e-4, 2e-4), (0.03, 0.02), (0.5, 0.5)]))
    circles = [item for item in root if item.tag.endswith("circle")]
    x, y = ([float(item.attrib[key]) for item in circles] for key in ("cx", "cy"))
    assert x == sorted(x) and y == sorted(y, reverse=True) and len(x) == 3
    assert all(50 <= value <= 410 for value in (*x, *y))


def test_the_numbers_of_a_cap() -> None:
    images = torch.rand(40, 1, 8, 8)
    frozen = bayescap_mnist.Autoencoder(8).eval()
    model = bayescap_mnist.Capped(frozen, BayesCap(1, hidden=2, blocks=0)).eval()
    labels = torch.zeros(40, dtype=torch.int64)
    numbers, points = bayescap_mnist.quality(model, Images(images, labels, images, labels))
    # A new cap: μ = y, and σ² = ½ everywhere.
    assert numbers["identity"] == 0 and numbers["mse"] == numbers["frozen_mse"]
    assert numbers["mean_variance"] == pytest.approx(0.5, rel=1e-5)
    assert numbers["calibration"]["cap"] == pytest.approx(0.5 - numbers["mse"], rel=1e-3)
    assert numbers["nll"]["one variance"] < numbers["nll"]["cap"] and len(points) == bayescap_mnist.BINS
