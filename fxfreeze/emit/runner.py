"""What a loaded target is."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Runner(Protocol):
    """Flat tensors in the order of the interface → flat tuple of tensors.

    It must leave the inputs alone, take any strides, and run every size the interface allows. What a compiler assumes
    beyond that (contiguous inputs, a size that is known to be more than 1) is the runner's business. Dtypes and shapes
    are checked before, by the artifact.
    """

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]: ...
