"""What else changes when one error of a frozen graph network is corrected?

    python -m benchmarks.stitched_edit [--targets torch,aoti,onnx] [--edits 20] [--quick] [--out FILE]

scikit-learn's 1,797 digits are the nodes of a graph, each joined to its 8 nearest. A graph convolutional network of two
layers learns a tenth of the labels, and is frozen. Of the nodes it gets wrong and never saw, each of the first 20 is
corrected, one at a time and from the same start, in three ways:

* an MLP stitched to it, trained by ``fxfreeze.nn.edit`` within a change of 0.05 of any other node's probabilities;
* the same MLP, trained on the one error alone until it is corrected;
* the network itself, trained on the one error alone until it is corrected.

One JSON line each: how many errors were corrected, the largest change of any other node's probability, how many other
nodes are predicted as another class, and the accuracy on all nodes that were not trained on, before and after. The last
model of the first way is made a table and an MLP, and compiled: `targets` holds how far the probabilities of all nodes
are from eager torch's, and the predictions that differ.

Exit status 1: a constrained edit that is said to be done broke its limit or did not correct its node, fewer than half
were done, or a target predicts otherwise than eager torch.
"""

from __future__ import annotations

import copy
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxfreeze.nn import StitchedMLP, edit

from . import heads, models
from .harness import record

TARGETS = ("torch", "aoti", "onnx")
NEIGHBOURS, HIDDEN, LIMIT, MARGIN = 8, 32, 0.05, 0.1
TOLERANCE = 1e-5
Graph = tuple[Tensor, Tensor]


class GCN(nn.Module):
    """Â·relu(Â·x·W₁)·W₂ with Â the normalized adjacency (Kipf and Welling, 2017)."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(features, HIDDEN), nn.Linear(HIDDEN, classes)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return adjacency @ self.second(torch.relu(adjacency @ self.first(x)))


def digits() -> tuple[Graph, Tensor]:
    """Features [n, 64] in [0, 1], Â [n, n], labels [n]."""
    data = models.need("sklearn.datasets").load_digits()
    x = torch.tensor(data.data, dtype=torch.float32) / 16
    near = torch.cdist(x, x).topk(NEIGHBOURS + 1, largest=False).indices
    joined = torch.zeros(len(x), len(x)).scatter_(1, near, 1.0)
    joined = torch.maximum(joined, joined.T)  # a node is among its own nearest
    root = joined.sum(1).rsqrt()
    return (x, root[:, None] * joined * root), torch.tensor(data.target)


def pretrained(graph: Graph, labels: Tensor, seen: Tensor) -> GCN:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = GCN(graph[0].shape[1], int(labels.max()) + 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, weight_decay=5e-4)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(net(*graph)[seen], labels[seen]).backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


def stitched(net: GCN) -> StitchedMLP:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return StitchedMLP(net, net.first.in_features, net.second.out_features, hidden=(64,))


def alone(model: nn.Module, graph: Graph, node: int, label: Tensor) -> nn.Module:
    """Train `model` on one node until it is corrected by as much as an edit would, for 500 steps at most."""
    optimizer = torch.optim.Adam([item for item in model.parameters() if item.requires_grad], lr=1e-2)
    for _ in range(500):
        logits = model(*graph)[node]
        p = logits.detach().softmax(-1)
        if float(p[label] - p.masked_fill(F.one_hot(label, len(p)).bool(), -1).max()) >= MARGIN:
            break
        optimizer.zero_grad()
        F.cross_entropy(logits[None], label[None]).backward()
        optimizer.step()
    return model


def constrained(net: GCN, graph: Graph, node: int, label: Tensor) -> tuple[nn.Module, bool]:
    model = stitched(net)
    return model, edit(model, graph, [node], [int(label)], limit=LIMIT, margin=MARGIN).done


def ways() -> dict[str, Callable[[GCN, Graph, int, Tensor], tuple[nn.Module, bool]]]:
    """Name → the edited model, and whether it is said to be done, of a network, its inputs, a node and its label."""
    return {
        "stitched MLP, constrained": constrained,
        "stitched MLP, alone": lambda net, *rest: (alone(stitched(net), *rest), True),
        "the network itself": lambda net, *rest: (alone(copy.deepcopy(net).requires_grad_(True), *rest), True),
    }


@torch.no_grad()
def effect(model: nn.Module, net: GCN, graph: Graph, node: int, label: Tensor) -> dict[str, Any]:
    """What an edit of one node did, counted here and not taken from its report."""
    before, after = net(*graph), model(*graph)
    change = (after.softmax(-1) - before.softmax(-1)).abs().amax(-1)
    turned = after.argmax(-1) != before.argmax(-1)
    others = torch.arange(len(before)) != node
    return {"corrected": bool(after[node].argmax() == label), "largest_change": float(change[others].max()),
            "turned": int(turned[others].sum())}  # fmt: skip


def run(targets: Sequence[str], *, edits: int) -> Iterator[dict[str, Any]]:
    graph, labels = digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    seen, rest = order[: len(order) // 10], order[len(order) // 10 :]
    net = pretrained(graph, labels, seen)
    with torch.no_grad():
        wrong = [int(node) for node in rest if net(*graph)[node].argmax() != labels[node]]
    base = accuracy(net, graph, labels, rest)
    for name, way in ways().items():
        found, after, last = [], [], None
        for node in wrong[:edits]:
            model, done = way(net, graph, node, labels[node])
            one = {"node": node, "done": done, **effect(model, net, graph, node, labels[node])}
            found.append(one)
            after.append(accuracy(model, graph, labels, rest))
            last = model if done else last
        yield summary(name, found, after, base, len(wrong), compiled(last, graph, targets) if name in FIRST else {})


FIRST = ("stitched MLP, constrained",)


def accuracy(model: nn.Module, graph: Graph, labels: Tensor, nodes: Tensor) -> float:
    with torch.no_grad():
        return float((model(*graph).argmax(-1) == labels)[nodes].double().mean())


def summary(
    name: str, found: list[dict[str, Any]], after: list[float], base: float, wrong: int, more: dict[str, Any]
) -> dict[str, Any]:
    done = [one for one in found if one["done"]]
    kept = all(one["corrected"] and one["largest_change"] <= LIMIT for one in done) and 2 * len(done) >= len(found)
    same = all(not target["differing"] for target in more.get("targets", {}).values())
    exact = all(target["probability_error"] <= TOLERANCE for target in more.get("targets", {}).values())
    return {
        "name": name, "ok": name not in FIRST or (kept and same and exact), "edits": len(found), "errors": wrong,
        "done": len(done), "corrected": sum(one["corrected"] for one in found),
        "largest_change": max(one["largest_change"] for one in done) if done else None,
        "median_change": statistics.median(one["largest_change"] for one in done) if done else None,
        "turned": sum(one["turned"] for one in done), "accuracy": base,
        "accuracy_after": statistics.fmean(after), **more, "each": found,
    }  # fmt: skip


def compiled(model: Any, graph: Graph, targets: Sequence[str]) -> dict[str, Any]:
    """The edited model as a table and an MLP, on every target, for all nodes."""
    import fxfreeze as fz

    x, nodes = graph[0], torch.arange(len(graph[0]))
    table = model.tabulated(*graph).eval()
    inputs = [fz.Input("features", shape=("batch", x.shape[1]), low=0, high=1),
              fz.Input("node", shape=("batch",), dtype="int64", low=0, high=len(x) - 1)]  # fmt: skip
    artifact = fz.compile(table, fz.Plan(inputs=inputs, targets=targets))
    with torch.no_grad():
        wanted, rows = model(*graph), {}
    for target in targets:
        found = artifact.target(target)(x, nodes)
        rows[target] = {
            "differing": int((found.argmax(-1) != wanted.argmax(-1)).sum()),
            "probability_error": float((found.softmax(-1) - wanted.softmax(-1)).abs().max()),
        }
    return {"targets": rows}


def publish(rows: Iterator[dict[str, Any]], shared: dict[str, Any], out: Path | None) -> bool:
    every = True
    for row in rows:
        every &= row["ok"]
        said = {key: value for key, value in row.items() if key not in ("name", "ok", "each")}
        print(f"{'ok  ' if row['ok'] else 'FAIL'} {row['name']}: {said}", flush=True)
        if out:
            record.replace_row(out, {**row, **shared})
    return every


def main() -> int:
    parser = heads.parser(__doc__, TARGETS)
    parser.add_argument("--edits", type=int, default=20, help="how many errors to correct")
    parser.add_argument("--quick", action="store_true", help="two errors")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    command = shlex.join(sys.argv[1:])
    shared = asdict(record.environment("stitched_edit", quick=options.quick, seed=0, command=command))
    rows = run(options.targets.split(","), edits=2 if options.quick else options.edits)
    return 0 if publish(rows, shared, options.out) else 1


if __name__ == "__main__":
    sys.exit(main())
