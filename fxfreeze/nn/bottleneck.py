"""Bottleneck adapters: what a small network adds to a value of a frozen model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh, "identity": lambda value: value
}  # fmt: skip
CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Bottleneck(nn.Module):
    r"""v + s · U·σ(D·v), or with `norm` of LayerNorm(v); U is 0 at first, so that a new adapter is the identity.

    Behind an attention and behind a feed-forward layer it is Houlsby's adapter, behind the latter alone Pfeiffer's.
    With ``residual=False`` it is what is added, for the parallel form: of what a layer is given, to what it returns.

    Args:
        features: C, the size of the last dim of v, or with ``dims`` > 0 of the second.
        width: of the bottleneck.
        activation: σ, "gelu", "relu", "silu", "tanh" or "identity".
        norm: normalize v over its C channels first.
        scale: s.
        residual: False: give s · U·σ(D·v) alone.
        dims: 0: v is [..., C]. 1, 2 or 3: [batch, C, \*sizes], D and U are convolutions, as beside the image encoder of
            SAM.
        window: of the convolution D, odd; zeros are put around. U's is 1.

    Raises:
        ValueError: a size is not positive, `window` is even, or `activation` or `dims` is unknown.

    Source: Houlsby et al. (2019), arXiv 1902.00751; Pfeiffer et al. (2021), arXiv 2005.00247; He et al. (2022), arXiv
    2110.04366, section 3; Wu et al. (2023), arXiv 2304.12620.
    """

    def __init__(
        self, features: int, width: int, *, activation: str = "gelu", norm: bool = False, scale: float = 1.0,
        residual: bool = True, dims: int = 0, window: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        if features < 1 or width < 1:
            raise ValueError(f"features and width must be positive, got {features} and {width}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
        if dims not in (0, *CONVOLUTIONS):
            raise ValueError(f"dims must be 0, 1, 2 or 3, got {dims!r}")
        if window < 1 or window % 2 == 0 or (window > 1 and not dims):
            raise ValueError(f"window must be odd, and 1 where dims is 0, got {window}")
        self.activation, self.scale, self.residual, self.dims = activation, scale, residual, dims
        self.norm = nn.LayerNorm(features) if norm else None
        if dims:
            self.down: nn.Module = CONVOLUTIONS[dims](features, width, window, padding=window // 2)
            self.up: nn.Module = CONVOLUTIONS[dims](width, features, 1)
        else:
            self.down, self.up = nn.Linear(features, width), nn.Linear(width, features)
        nn.init.zeros_(self.up.weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.up.bias)  # type: ignore[arg-type]

    def forward(self, v: Tensor) -> Tensor:
        """Shape and dtype of `v`."""
        h = v
        if self.norm is not None:
            h = self.norm(h.movedim(1, -1)).movedim(-1, 1) if self.dims else self.norm(h)
        added = self.up(ACTIVATIONS[self.activation](self.down(h)))
        if self.scale != 1:
            added = added * self.scale
        return v + added if self.residual else added

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, scale={self.scale}, residual={self.residual}"
