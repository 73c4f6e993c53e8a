"""Which neurons fired: the hard gates of a compiled program, and what their comparisons say on given inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .program import FIRES, Origin, Program


@dataclass(frozen=True)
class GateRow:
    """One hard gate of a program.

    Attributes:
        site: what it gates: the site of the step, or the module in whose forward the model had it.
        step: the plan's step; "" for a gate of the model's own.
        dim: of the neurons.
        neurons: how many the model has there.
        kept: those still there, in order; None: all. The others never fire, or nothing reads them.
        share: of neurons that fired when the gate was hardened; None: it was hard already.
    """

    site: str
    step: str
    dim: int
    neurons: int
    kept: tuple[int, ...] | None = None
    share: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def comparisons(program: Program) -> list[Node]:
    """The nodes that know which neurons fire, in graph order: comparisons, and operators with a gate inside."""
    return [
        node for node in program.graph.nodes
        if isinstance(origin := node.meta.get("fxfreeze"), Origin) and origin.primitive == FIRES
    ]  # fmt: skip


def gate_rows(program: Program) -> list[GateRow]:
    """The hard gates, in the order of :func:`comparisons`; sites that several gates share are numbered."""
    nodes = comparisons(program)
    sites = [node.meta["fxfreeze"].site for node in nodes]
    rows = []
    for node, name in zip(nodes, numbered(sites), strict=True):
        dim, kept = node.meta["dim"], node.meta.get("kept")
        neurons = node.meta["neurons"] if kept is not None else int(node.meta["val"].shape[dim])
        rows.append(GateRow(name, node.meta["fxfreeze"].step, dim, neurons, kept, node.meta.get("share")))
    return rows


def numbered(sites: Sequence[str]) -> list[str]:
    """A name per gate: its site, with a number where several share it that makes no name of another site."""
    many = Counter(sites)
    names = {site: _free(site, many) for site in many}
    return [site if many[site] == 1 else next(names[site]) for site in sites]


def _free(site: str, taken: Container[str]) -> Iterator[str]:
    return (name for number in count() if (name := f"{site}.{number}") not in taken)


@torch.no_grad()
def fired(program: Program, rows: Sequence[Mapping[str, Any]], inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Run the program in eager torch, and note which neurons fire.

    Args:
        rows: :func:`gate_rows` of the program, as JSON.
        inputs: flat tensors.

    Returns:
        Site → bool of the shape of the gated value, with every neuron the model had along its dim.
    """
    places = dict(zip(comparisons(program), rows, strict=True))
    found: dict[str, Tensor] = {}

    def call(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = node.target(*args, **kwargs)  # type: ignore[operator]
        if node in places:
            row = places[node]
            fires = result if result.dtype == torch.bool else _inside(node, args, kwargs)
            found[row["site"]] = _whole(fires, row)
        return result

    program.execute(inputs, program.stored, call)
    return found


def _inside(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Which neurons fire in a ``fxfreeze::gated_linear``."""
    from .kernels.gate import fires

    names = [item.name for item in node.target._schema.arguments]  # type: ignore[union-attr]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    threshold, score = given.pop("threshold"), given.pop("score", "h")
    bare = {key: value for key, value in given.items() if key not in ("gain", "up_weight", "up_bias")}
    return fires(node.target(**bare), threshold, score=score)  # type: ignore[operator]


def _whole(fires: Tensor, row: Mapping[str, Any]) -> Tensor:
    """With False for the neurons that were removed."""
    if row["kept"] is None:
        return fires
    shape = list(fires.shape)
    shape[row["dim"]] = row["neurons"]
    index = torch.tensor(row["kept"], device=fires.device)
    return fires.new_zeros(shape).index_copy(row["dim"], index, fires)
