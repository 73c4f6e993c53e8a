"""The bottleneck of AdapterHub's ``adapters`` library, with its options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda value: F.gelu(value, approximate="tanh"),
    "gelu_pytorch_tanh": lambda value: F.gelu(value, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leakyrelu": F.leaky_relu,
    "leaky_relu": F.leaky_relu,
    "linear": lambda value: value,
}


class HubBottleneck(nn.Module):
    """s · U·σ(D·LayerNorm(v)) + v, with LayerNorms, residuals and a trained s where they are asked for.

    U is 0 at first.

    Args:
        features: C, the size of the last dim of v.
        width: of the bottleneck.
        activation: σ, by transformers' name of it.
        scaling: s: a number, or one that is trained: "learned" (of shape [1]) or "channel" ([C]).
        norm_before: normalize what D reads.
        norm_after: normalize what comes of U.
        keep: add v itself: "inside" of the norm after U, "outside" of it, or not at all.

    Raises:
        ValueError: a size is not positive, or an option is unknown.

    Source: Pfeiffer et al. (2020), AdapterHub, arXiv 2007.07779; Poth et al. (2023), arXiv 2311.11077.
    """

    def __init__(
        self, features: int, width: int, *, activation: str = "relu", scaling: float | str = 1.0,
        norm_before: bool = False, norm_after: bool = False, keep: Literal["inside", "outside"] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if features < 1 or width < 1:
            raise ValueError(f"features and width must be positive, got {features} and {width}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
        if isinstance(scaling, str) and scaling not in ("learned", "channel"):
            raise ValueError(f"scaling must be a number, 'learned' or 'channel', got {scaling!r}")
        if keep not in (None, "inside", "outside"):
            raise ValueError(f"keep must be None, 'inside' or 'outside', got {keep!r}")
        self.activation, self.keep = activation, keep
        self.scaling: float | nn.Parameter
        if isinstance(scaling, str):
            self.scaling = nn.Parameter(torch.ones(1 if scaling == "learned" else features))
        else:
            self.scaling = float(scaling)
        self.norm_before = nn.LayerNorm(features) if norm_before else None
        self.norm_after = nn.LayerNorm(features) if norm_after else None
        self.down, self.up = nn.Linear(features, width), nn.Linear(width, features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, v: Tensor, source: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """`v` [..., C] to the same shape and dtype.

        Args:
            source: what D reads in the place of v, of its shape.
            residual: added to the result, of its shape.
        """
        h = v if source is None else source
        h = self.up(ACTIVATIONS[self.activation](self.down(h if self.norm_before is None else self.norm_before(h))))
        h = h * self.scaling
        h = h + v if self.keep == "inside" else h
        h = h if self.norm_after is None else self.norm_after(h)
        h = h + v if self.keep == "outside" else h
        return h if residual is None else h + residual

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, keep={self.keep!r}"
