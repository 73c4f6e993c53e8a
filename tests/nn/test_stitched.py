"""Editing a graph network by a stitched MLP: one error is corrected, and others stay within what was allowed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.capture import capture
from fxfreeze.nn import StitchedMLP, edit
from fxfreeze.passes import PIPELINE
from fxfreeze.pipeline import run_passes
from fxfreeze.rewrite import Context

NODES, FEATURES, CLASSES = 60, 16, 3


class GCN(nn.Module):
    """Two layers of A·relu(A·x·W₁)·W₂."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return adjacency @ self.second(torch.relu(adjacency @ self.first(x)))


@pytest.fixture
def graph() -> tuple[Tensor, Tensor]:
    edges = torch.rand(NODES, NODES) < 0.05
    adjacency = (edges | edges.T | torch.eye(NODES, dtype=torch.bool)).float()
    return torch.randn(NODES, FEATURES), adjacency / adjacency.sum(1, keepdim=True)


def other_class(logits: Tensor, node: int) -> int:
    return int(logits[node].argsort()[-2])


def test_it_starts_as_the_network_and_no_gradient_reaches_that(graph: tuple[Tensor, Tensor]) -> None:
    gnn = GCN()
    model = StitchedMLP(gnn, FEATURES, CLASSES)
    assert torch.equal(model(*graph), gnn(*graph))
    model(*graph).pow(2).sum().backward()
    assert gnn.first.weight.grad is None and model.mlp[-1].weight.grad.abs().sum() > 0
    assert not model.train().gnn.training


def test_an_error_is_corrected_and_others_stay(graph: tuple[Tensor, Tensor]) -> None:
    model = StitchedMLP(GCN(), FEATURES, CLASSES)
    gnn = copy.deepcopy(model.gnn.state_dict())
    before = model(*graph).detach()
    label = other_class(before, 7)
    found = edit(model, graph, [7], [label], limit=0.05)
    after = model(*graph).detach()
    assert found.done and found.steps > 0
    p = after[7].softmax(-1)
    assert p.argmax() == label and p[label] - p.sort().values[-2] >= 0.1
    change = (after.softmax(-1) - before.softmax(-1)).abs().amax(-1)
    change[7] = 0
    assert float(change.max()) <= 0.05 and found.largest_change == pytest.approx(float(change.max()), abs=1e-6)
    assert found.at == int(change.argmax())
    turned = (after.argmax(-1) != before.argmax(-1)).sum() - 1
    assert found.turned == int(turned)
    assert all(torch.equal(value, gnn[key]) for key, value in model.gnn.state_dict().items())


def test_without_a_constraint_others_move(graph: tuple[Tensor, Tensor]) -> None:
    model = StitchedMLP(GCN(), FEATURES, CLASSES)
    label = other_class(model(*graph), 7)
    free = edit(copy.deepcopy(model), graph, [7], [label], limit=1.0, weight=0.0)
    held = edit(model, graph, [7], [label], limit=0.05)
    assert free.done and free.largest_change > 2 * held.largest_change


def test_what_cannot_be_done_is_undone(graph: tuple[Tensor, Tensor]) -> None:
    """Two nodes with the same features: one cannot be changed without the other."""
    x = graph[0].clone()
    x[8] = x[7]
    model = StitchedMLP(GCN(), FEATURES, CLASSES)
    before = model(x, graph[1]).detach()
    found = edit(model, (x, graph[1]), [7], [other_class(before, 7)], limit=0.01, steps=60)
    assert not found.done and torch.equal(model(x, graph[1]), before)
    found = edit(model, (x, graph[1]), [7], [other_class(before, 7)], limit=0.01, steps=60, weight=0.0)
    assert found.corrected and not found.within and torch.equal(model(x, graph[1]), before)


def test_a_table_is_the_network_for_this_graph(graph: tuple[Tensor, Tensor]) -> None:
    model = StitchedMLP(GCN(), FEATURES, CLASSES, hidden=(4, 5))
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape) / 3
    table, ids = model.tabulated(*graph), torch.tensor([4, 4, 0])
    assert table.gnn is None
    torch.testing.assert_close(table(graph[0]), model(*graph))
    torch.testing.assert_close(table(graph[0][ids], ids), model(*graph)[ids])
    with pytest.raises(ValueError, match="already"):
        table.tabulated(*graph)
    before = table(graph[0]).detach()
    assert edit(table, (graph[0],), [3], [other_class(before, 3)]).done


def test_a_table_compiles_to_a_lookup_and_an_mlp(graph: tuple[Tensor, Tensor]) -> None:
    table = StitchedMLP(GCN(), FEATURES, CLASSES).tabulated(*graph).eval()
    inputs = [fz.Input("x", shape=("batch", FEATURES)),
              fz.Input("node", shape=("batch",), dtype="int64", low=0, high=NODES - 1)]  # fmt: skip
    plan = fz.Plan(inputs=inputs)
    program, _ = capture(table, plan)
    run_passes(program, PIPELINE, Context(plan))
    ids = torch.tensor([5, 1, 1, 59])
    torch.testing.assert_close(program.run(graph[0][ids], ids)[0], table(graph[0][ids], ids))


@pytest.mark.parametrize(
    ("change", "says"),
    [({"nodes": [1, 2]}, "as many"), ({"nodes": [NODES]}, f"0 … {NODES - 1}"), ({"labels": [3]}, "labels 0 … 2"),
     ({"limit": 0.0}, r"\(0, 1\]"), ({"nodes": [], "labels": []}, "as many")],
)  # fmt: skip
def test_bad_edits_are_refused(graph: tuple[Tensor, Tensor], change: dict[str, Any], says: str) -> None:
    given: dict[str, Any] = {"nodes": [1], "labels": [1], "limit": 0.1, **change}
    with pytest.raises(ValueError, match=says):
        edit(StitchedMLP(GCN(), FEATURES, CLASSES), graph, **given)


def test_bad_models_are_refused() -> None:
    for gnn, table, says in ((None, None, "give a graph"), (GCN(), torch.ones(2, 3), "give a graph"),
                             (None, torch.ones(2, 4), r"\[nodes, 3\]")):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            StitchedMLP(gnn, FEATURES, CLASSES, table=table)
    with pytest.raises(ValueError, match="positive"):
        StitchedMLP(GCN(), FEATURES, CLASSES, hidden=(0,))
