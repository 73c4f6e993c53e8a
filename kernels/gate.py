"""``fxfreeze::gate``: neurons with a gain of their own each, that are silent up to a threshold.

y = g ⊙ h ⊙ 1[s(h) > τ], and while it trains y = g ⊙ h ⊙ σ((s(h) − τ) / T). As T goes to 0, the soft gate goes to the
hard one wherever s(h) ≠ τ.

Source: section 2 of arXiv 2602.11726, whose own gate is not published in full; IA3 (arXiv 2205.05638) is the gain
without a threshold, JumpReLU (arXiv 1907.09381, 2407.14435) the threshold without a gain.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._op import Kernel, register
from ._tversky import cast

SCORES = ("h", "abs")

SCHEMA = (
    "(Tensor h, Tensor threshold, Tensor? gain=None, Tensor? temperature=None, Tensor? mode=None, *, "
    'str score="h", int dim=-1) -> Tensor'
)


def reference(
    h: Tensor,
    threshold: Tensor,
    gain: Tensor | None = None,
    temperature: Tensor | None = None,
    mode: Tensor | None = None,
    *,
    score: str = "h",
    dim: int = -1,
) -> Tensor:
    """Gate the neurons that lie along `dim` of `h`.

    Args:
        h: activations, floating, with C neurons along `dim`.
        threshold: τ [C], or [modes, C] with `mode`; floating. A neuron fires strictly above it.
        gain: g, shape and dtype of `threshold`; None: 1.
        temperature: T > 0 of a soft gate, 0-d; None: the gate is hard.
        mode: integers [n], which row of `threshold` and `gain` each of the n rows ``h[i]`` uses; with it `dim` is not
            the first. None: `threshold` and `gain` hold for all rows.
        score: s(h): "h", or "abs" for \\|h\\|.
        dim: where the neurons are.

    Returns:
        Shape and dtype of `h`. Half precision is computed in the dtype of `threshold`, and rounded once. Where a hard
        gate is shut the result is 0, whatever `h` is there.

    Raises:
        ValueError: an unknown score, or shapes or dtypes other than the above.
    """
    _check(h, threshold, gain, temperature, mode, score=score, dim=dim)
    wide = cast(h, torch.promote_types(h.dtype, threshold.dtype))
    gained = wide if gain is None else wide * along(gain, wide, mode, dim)
    if temperature is None:
        return cast(torch.where(fires(h, threshold, mode, score=score, dim=dim), gained, 0.0), h.dtype)
    scored, level = compared(h, threshold, mode, score, dim)
    return cast(gained * torch.sigmoid((scored - level) / temperature), h.dtype)


def fires(h: Tensor, threshold: Tensor, mode: Tensor | None = None, *, score: str = "h", dim: int = -1) -> Tensor:
    """1[s(h) > τ], bool of the shape of `h`; arguments as of :func:`reference`."""
    scored, level = compared(h, threshold, mode, score, dim)
    return scored > level


def compared(h: Tensor, threshold: Tensor, mode: Tensor | None, score: str, dim: int) -> tuple[Tensor, Tensor]:
    """s(h) and τ, in the wider of their dtypes."""
    wide = cast(h, torch.promote_types(h.dtype, threshold.dtype))
    return wide.abs() if score == "abs" else wide, along(threshold, wide, mode, dim)


def along(values: Tensor, h: Tensor, mode: Tensor | None, dim: int) -> Tensor:
    """`values`, a number per neuron or per mode and neuron, shaped to meet `h`."""
    shape = [1] * h.dim()
    shape[dim] = -1
    if mode is not None:
        # Gathered per row, so that a thousand modes cost no more than two.
        values, shape[0] = values.index_select(0, mode), h.shape[0]
    return cast(values.reshape(shape), h.dtype)


def fake(
    h: Tensor,
    threshold: Tensor,
    gain: Tensor | None = None,
    temperature: Tensor | None = None,
    mode: Tensor | None = None,
    *,
    score: str = "h",
    dim: int = -1,
) -> Tensor:
    _check(h, threshold, gain, temperature, mode, score=score, dim=dim)
    return torch.empty_like(h)


def _check(
    h: Tensor,
    threshold: Tensor,
    gain: Tensor | None,
    temperature: Tensor | None,
    mode: Tensor | None,
    *,
    score: str,
    dim: int,
) -> None:
    if score not in SCORES:
        raise ValueError(f"gate: score {score!r} is none of {', '.join(map(repr, SCORES))}")
    if not h.is_floating_point() or not -h.dim() <= dim < h.dim():
        raise ValueError(f"gate: h is {h.dtype} of shape {list(h.shape)}, not floating with neurons along dim {dim}")
    rank = 1 if mode is None else 2
    if not threshold.is_floating_point() or threshold.dim() != rank or threshold.shape[-1] != h.shape[dim]:
        what = f"[C = {h.shape[dim]}]" if mode is None else f"[modes, C = {h.shape[dim]}]"
        raise ValueError(f"gate: threshold is {threshold.dtype} of shape {list(threshold.shape)}, not floating {what}")
    if gain is not None and (gain.shape != threshold.shape or gain.dtype != threshold.dtype):
        raise ValueError(
            f"gate: gain is {gain.dtype} of shape {list(gain.shape)}, "
            f"threshold {threshold.dtype} of shape {list(threshold.shape)}"
        )
    if temperature is not None and (temperature.dim() != 0 or not temperature.is_floating_point()):
        raise ValueError(f"gate: temperature is {temperature.dtype} of shape {list(temperature.shape)}, not 0-d")
    if mode is not None and (mode.dim() != 1 or mode.dtype not in (torch.int32, torch.int64) or dim in (0, -h.dim())):
        raise ValueError(
            f"gate: mode is {mode.dtype} of shape {list(mode.shape)} with neurons along dim {dim}, "
            "not an integer per row of h with neurons along another dim"
        )


KERNEL = register(Kernel("gate", SCHEMA, reference, fake))
