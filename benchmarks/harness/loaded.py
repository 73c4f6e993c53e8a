"""A peer that can be loaded again, so that a measurement is not one of where its memory happens to lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Loaded:
    """What `load` gives, until it is loaded again; `held` lives as long.

    The same session of ONNX Runtime is 5 % faster or slower by the pages that its weights got.
    """

    def __init__(self, load: Callable[[], Callable[..., Any]], *held: Any) -> None:
        self.load, self.held = load, held
        self.call: Callable[..., Any] | None = load()

    def __call__(self, *inputs: Any) -> Any:
        assert self.call is not None
        return self.call(*inputs)

    def again(self) -> None:
        self.call = None  # it goes before the next one comes
        self.call = self.load()
