"""What a loaded target is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from ..memory import huge_pages_from_here


class Runner(Protocol):
    """Flat tensors in the order of the interface → flat tuple of tensors.

    It must leave the inputs alone, take any strides, and run every size the interface allows. What a compiler assumes
    beyond that (contiguous inputs, a size that is known to be more than 1) is the runner's business. Dtypes and shapes
    are checked before, by the artifact.
    """

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]: ...


def on_huge_pages(load: Callable[[], Runner]) -> Runner:
    """What `load` gives. Behind the first call, all that it has allocated until then moves to huge pages."""
    move = huge_pages_from_here()
    runner = load()

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        results = runner(*inputs)
        move()
        return results

    return run
