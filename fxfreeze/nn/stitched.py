"""Models whose errors can be corrected: an MLP stitched to a frozen graph network, trained where that is wrong.

>>> model = StitchedMLP(gnn, features=64, classes=7)
>>> report = edit(model, inputs, nodes=[17], labels=[3], limit=0.05)
>>> report.corrected, report.largest_change, report.turned

A graph network cannot be corrected at one node by training it: what changes there changes with its neighbours. An MLP
of a node's own features can, and the graph network is left as it is.

Source: Liu, Jiang et al., Editable graph neural network for node classifications (2023), arXiv 2305.15529.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class StitchedMLP(nn.Module):
    """GNN(x, …) + MLP(x), with the graph network frozen; the MLP's last layer starts as 0: a new one is the GNN alone.

    For a graph that stays, the GNN is a table of its logits: with ``table`` a node's logits are looked up, and the
    network is not needed.

    Args:
        gnn: gives logits [nodes, classes]; its first argument is the features [nodes, features], and what follows is
            handed on. It is not copied, but no gradient reaches it. None: there is a table.
        features, classes: sizes of the MLP's input and output.
        hidden: widths of its layers in between.
        table: logits [nodes, classes] of a fixed graph, copied.

    Raises:
        ValueError: neither or both of `gnn` and `table` are given, a size is not positive, or the table's is another.
    """

    table: Tensor | None

    def __init__(
        self, gnn: nn.Module | None, features: int, classes: int, *, hidden: Sequence[int] = (64,),
        table: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if (gnn is None) == (table is None):
            raise ValueError("give a graph network, or the table of its logits")
        if min(features, classes, *hidden) < 1:
            raise ValueError(f"sizes must be positive, got {features}, {tuple(hidden)}, {classes}")
        if table is not None and (table.dim() != 2 or table.shape[1] != classes):
            raise ValueError(f"table has shape {list(table.shape)}, not [nodes, {classes}]")
        self.gnn = gnn
        self.register_buffer("table", None if table is None else table.detach().clone())
        sizes = [features, *hidden, classes]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.mlp = nn.Sequential(*layers[:-1])
        nn.init.zeros_(self.mlp[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.mlp[-1].bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, /, *graph: Any) -> Tensor:
        """Logits [nodes, classes] of features [nodes, features] and what else the GNN is given.

        With a table: of features [batch, features] and node ids, integers [batch]; without ids, of all nodes in order.
        """
        if self.table is not None:
            return self.mlp(x) + (self.table.index_select(0, *graph) if graph else self.table)
        assert self.gnn is not None
        with torch.no_grad():
            fixed = self.gnn(x, *graph)
        return self.mlp(x) + fixed

    @torch.no_grad()
    def tabulated(self, x: Tensor, *graph: Any) -> StitchedMLP:
        """The same model for this graph alone, with the GNN's logits as a table; the MLP is copied.

        Raises:
            ValueError: it is one already.
        """
        if self.gnn is None:
            raise ValueError("the model has a table already")
        first, last = self.mlp[0], self.mlp[-1]
        table = self.gnn(x, *graph)
        other = StitchedMLP(None, first.in_features, last.out_features, table=table)  # type: ignore[arg-type]
        other.mlp = copy.deepcopy(self.mlp)
        return other.train(self.training)

    def train(self, mode: bool = True) -> StitchedMLP:
        """As of any module, but for the GNN, which stays as it is used."""
        super().train(mode)
        if self.gnn is not None:
            self.gnn.eval()
        return self


@dataclass(frozen=True)
class Edit:
    """What an edit did.

    Attributes:
        corrected: every node of the edit now has its label.
        within: no other node's probability moved by more than the limit.
        largest_change: the largest |p − p before| of any class at any other node.
        at: that node.
        turned: how many other nodes are predicted as another class now.
        steps: how many were taken.
    """

    corrected: bool
    within: bool
    largest_change: float
    at: int
    turned: int
    steps: int

    @property
    def done(self) -> bool:
        return self.corrected and self.within


def edit(
    model: StitchedMLP, inputs: Sequence[Any], nodes: Sequence[int], labels: Sequence[int], *, limit: float = 0.05,
    steps: int = 500, rate: float = 1e-2, weight: float = 10.0, margin: float = 0.1,
) -> Edit:  # fmt: skip
    """Train the MLP until `nodes` have `labels`, while no other node's probabilities move by more than `limit`.

    The loss is the cross-entropy at the nodes of the edit, as long as they have less than `margin` in probability over
    every other class, and `weight` times the mean of what each other node's logits moved by, squared, and of what its
    largest change of probability exceeds half of `limit` by, relative to `limit`. Of all steps the best is kept: of
    those where every node is corrected the one with the smallest change elsewhere, and training ends with the first
    step that does both. Where no step corrects all nodes and keeps the limit, the MLP is put back as it was, and the
    report says which was missed.

    Args:
        model: changed in place: its MLP only.
        inputs: what the model is called with: features, and the graph or the ids.
        nodes, labels: rows of the result, and their right classes.
        limit: on the change of any class's probability at any other row, in (0, 1].
        steps, rate: of Adam.
        margin: by which a corrected node's probability leads.

    Returns:
        What the model now does, or, where it was put back, what the best step did.

    Raises:
        ValueError: `nodes` and `labels` differ in number, repeat or are out of range, or `limit` is not in (0, 1].
    """
    was = {key: value.clone() for key, value in model.mlp.state_dict().items()}
    with torch.no_grad():
        before = model(*inputs)
    rows, wanted = _checked(before, nodes, labels, limit)
    others = torch.ones(len(before), dtype=torch.bool, device=before.device)
    others[rows] = False
    optimizer = torch.optim.Adam(model.mlp.parameters(), lr=rate)
    best: tuple[Edit, dict[str, Tensor]] | None = None
    for step in range(steps + 1):
        logits = model(*inputs)
        found = _judge(logits.detach(), before, rows, wanted, others, limit, margin, step)
        if best is None or _rank(found) < _rank(best[0]):
            best = found, {key: value.clone() for key, value in model.mlp.state_dict().items()}
        if found.done or step == steps:
            break
        optimizer.zero_grad()
        _loss(logits, before, rows, wanted, others, limit, margin, weight).backward()
        optimizer.step()
    assert best is not None
    model.mlp.load_state_dict(best[1] if best[0].done else was)
    model.mlp.zero_grad()
    return best[0]


def _rank(found: Edit) -> tuple[bool, float]:
    return not found.corrected, found.largest_change


def _loss(
    logits: Tensor, before: Tensor, rows: Tensor, wanted: Tensor, others: Tensor, limit: float, margin: float,
    weight: float,
) -> Tensor:  # fmt: skip
    wrong = _lead(logits[rows].detach(), wanted) < margin
    error = (F.cross_entropy(logits[rows], wanted, reduction="none") * wrong).sum()
    if not bool(others.any()):
        return error
    moved = (logits[others] - before[others]).square().mean()
    change = (logits[others].softmax(-1) - before[others].softmax(-1)).abs().amax(-1)
    return error + weight * (moved + ((change - limit / 2).clamp(min=0) / limit).mean())


@torch.no_grad()
def _judge(
    logits: Tensor, before: Tensor, rows: Tensor, wanted: Tensor, others: Tensor, limit: float, margin: float, step: int
) -> Edit:
    corrected = bool((_lead(logits[rows], wanted) >= margin).all())
    change = (logits.softmax(-1) - before.softmax(-1)).abs().amax(-1) * others
    at = int(change.argmax())
    turned = int(((logits.argmax(-1) != before.argmax(-1)) & others).sum())
    return Edit(corrected, float(change[at]) <= limit, float(change[at]), at, turned, step)


def _lead(logits: Tensor, wanted: Tensor) -> Tensor:
    """By how much the probability of the wanted class exceeds that of the next [rows]."""
    p = logits.softmax(-1)
    own = p.gather(-1, wanted.unsqueeze(-1))
    return own.squeeze(-1) - p.scatter(-1, wanted.unsqueeze(-1), -1.0).amax(-1)


def _checked(before: Tensor, nodes: Sequence[int], labels: Sequence[int], limit: float) -> tuple[Tensor, Tensor]:
    count, classes = before.shape
    if len(nodes) != len(labels) or not nodes or len(set(nodes)) < len(nodes):
        raise ValueError(f"nodes and labels must be as many, and no node twice, got {list(nodes)} and {list(labels)}")
    if not all(0 <= node < count for node in nodes) or not all(0 <= label < classes for label in labels):
        raise ValueError(f"nodes must be 0 … {count - 1} and labels 0 … {classes - 1}")
    if not 0 < limit <= 1:
        raise ValueError(f"limit must be in (0, 1], got {limit}")
    return (torch.tensor(list(values), device=before.device) for values in (nodes, labels))  # type: ignore[return-value]
