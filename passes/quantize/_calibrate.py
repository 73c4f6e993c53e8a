"""Runs a program over the calibration data, and watches some of its values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxfreeze.errors import PassError
from fxfreeze.memory import return_free_memory
from fxfreeze.program import Program
from fxfreeze.rewrite import Context

from .._operators import WeightOperator, weight_operator
from ._observers import Method, Observer

_PATIENCE = 16
"""Batches without news after which no more are read."""
_NEWS = 0.01
"""A range that grows by less than this share of its width is none."""


@dataclass(frozen=True)
class Seen:
    """What was remembered of each value, and how many batches and rows of the calibration data were read."""

    observers: Mapping[Node, Observer]
    batches: int
    rows: int
    converged: bool

    def basis(self, ctx: Context) -> str:
        """What ranges were measured on."""
        return f"ranges of {self.rows} rows of {ctx.calibration.source}" + (", then converged" * self.converged)


@torch.no_grad()
def observe(program: Program, ctx: Context, values: Mapping[Node, Method]) -> Seen:
    """Watch `values` until the data ends, or no range has grown for some batches; memory does not hang on their number.

    Raises:
        PassError: a value is NaN or Inf; names its module.
    """
    from tqdm import tqdm

    observers = {node: Observer(method, _channel_dim(node)) for node, method in values.items()}
    count = rows = quiet = 0
    bar = tqdm(ctx.calibration.of(program), desc="calibration", unit="batch", disable=None)
    with program.computed_once(), bar as batches:
        for count, inputs in enumerate(batches, 1):  # noqa: B007
            widths = {node: observer.high - observer.low for node, observer in observers.items()}
            watched_run(program, inputs, lambda node, value: _look(program, observers, node, value))
            rows += len(inputs[0]) if inputs[0].dim() else 1
            news = any(
                not observer.high - observer.low <= (1 + _NEWS) * widths[node] for node, observer in observers.items()
            )
            quiet = 0 if news else quiet + 1
            if quiet == _PATIENCE:
                break
    return_free_memory()
    return Seen(observers, count, rows, quiet >= _PATIENCE)


def _channel_dim(value: Node) -> int:
    """Where the layers that read `value` have its channels, or the layer that gives it."""
    for operator in map(weight_operator, (*value.users, value, *value.all_input_nodes)):
        if isinstance(operator, WeightOperator):
            return -1 - len(operator.kernel)
    return -1


def watched_run(program: Program, inputs: list[Tensor], look: Any) -> None:
    """Run `program`, and show every input and result to `look`(node, value)."""
    for node, value in zip(program.placeholders, inputs, strict=True):
        look(node, value)

    def call(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = node.target(*args, **kwargs)  # type: ignore[operator]
        look(node, result)
        return result

    program.execute(inputs, program.stored, call)


@torch.no_grad()
def layer_run(
    program: Program, inputs: Sequence[Tensor], layers: Collection[Node],
    act: Callable[[Node, tuple[Any, ...], Callable[[], Tensor]], Tensor],
    after: Mapping[Node, Callable[[Tensor], Tensor]] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Run `program` with `act`(node, args, compute) for the results of `layers`; `compute` gives the layer's own.

    Args:
        after: what is done to other values, and to results, before they are read.
    """

    def call(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def compute() -> Any:
            return node.target(*args, **kwargs)  # type: ignore[operator]

        result = act(node, args, compute) if node in layers else compute()
        return after[node](result) if after and node in after else result

    return program.execute(inputs, program.stored, call)


def _look(program: Program, observers: Mapping[Node, Observer], node: Node, value: Any) -> None:
    if node in observers and not observers[node].add(value):
        raise PassError(
            f"{node.name!r} is NaN or Inf on the calibration data, so it has no range",
            where=program.where(node), hint="repair the data or the model, or exclude the layers that read it",
        )  # fmt: skip
