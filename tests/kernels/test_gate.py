"""``fxfreeze::gate``: soft and hard, per mode, along any dim, in every dtype; bad operands are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fxfreeze.kernels.gate import KERNEL, SCORES

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def by_loop(h: Tensor, threshold: Tensor, gain: Tensor, temperature: float | None, score: str) -> Tensor:
    """Neuron by neuron in Python's floats; the neurons are the last dim."""
    rows = []
    for row in h.double().reshape(-1, h.shape[-1]).tolist():
        out = []
        for value, level, factor in zip(row, threshold.tolist(), gain.tolist(), strict=True):
            s = abs(value) if score == "abs" else value
            mask = float(s > level) if temperature is None else 1 / (1 + math.exp(-(s - level) / temperature))
            out.append(value * factor * mask)
        rows.append(out)
    return torch.tensor(rows, dtype=torch.float64).reshape(h.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("temperature", [None, 0.5])
def test_it_is_what_a_loop_says(score: str, temperature: float | None, dtype: torch.dtype) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    h, threshold, gain = torch.randn(2, 3, 7).to(dtype), torch.rand(7, dtype=wide) - 0.5, torch.randn(7, dtype=wide)
    heat = None if temperature is None else torch.tensor(temperature, dtype=wide)
    found = KERNEL.op(h, threshold, gain, heat, score=score)
    want = by_loop(h, threshold, gain, temperature, score)
    assert found.dtype == dtype and found.shape == h.shape
    assert (found.double() - want).abs().max() <= 2 * torch.finfo(dtype).eps * want.abs().max()
    assert bool(((found == 0) == (want.to(dtype) == 0)).all())


@pytest.mark.parametrize("dim", [1, -2, -1])
def test_neurons_lie_along_dim(dim: int) -> None:
    h, count = torch.randn(2, 3, 4), (2, 3, 4)[dim]
    threshold, gain = torch.randn(count), torch.randn(count)
    want = KERNEL.op(h.movedim(dim, -1), threshold, gain).movedim(-1, dim)
    assert torch.equal(KERNEL.op(h, threshold, gain, dim=dim), want)


def test_a_mode_per_row() -> None:
    h, threshold, gain = torch.randn(5, 3, 4), torch.randn(6, 3), torch.randn(6, 3)
    mode = torch.tensor([5, 0, 0, 3, 2])
    found = KERNEL.op(h, threshold, gain, None, mode, dim=1)
    for row, one in enumerate(mode.tolist()):
        assert torch.equal(found[row], KERNEL.op(h[row], threshold[one], gain[one], dim=0))
    assert torch.equal(KERNEL.op(h, threshold, gain, None, mode.int(), dim=1), found)
    with pytest.raises(IndexError):
        KERNEL.op(h, threshold, gain, None, torch.tensor([0, 1, 2, 3, 6]), dim=1)


def test_it_fires_strictly_above_and_a_shut_gate_is_0_whatever_is_there() -> None:
    h = torch.tensor([1.0, math.nextafter(1.0, 2.0), -math.inf, math.nan, math.inf], dtype=torch.float64)
    threshold = torch.ones(5, dtype=torch.float64)
    assert KERNEL.op(h, threshold).tolist() == [0.0, h[1].item(), 0.0, 0.0, math.inf]


def test_gradients_of_the_soft_gate() -> None:
    values = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 4), (4,), (4,))]
    heat = torch.tensor(0.7, dtype=torch.float64)
    for score in SCORES:
        torch.autograd.gradcheck(lambda h, t, g, s=score: KERNEL.op(h, t, g, heat, score=s), values)


def test_the_operator_is_a_good_citizen() -> None:
    h, mode = torch.randn(4, 5, 3), torch.tensor([0, 3, 6, 1])
    torch.library.opcheck(KERNEL.op, (h, torch.zeros(5), torch.ones(5)), {"dim": 1})
    torch.library.opcheck(KERNEL.op, (h, torch.zeros(7, 3), None, torch.tensor(1.0), mode), {"score": "abs"})
    torch.library.opcheck(KERNEL.op, (h, torch.zeros(3, requires_grad=True), torch.ones(3), torch.tensor(1.0)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"score": "H"}, "none of 'h', 'abs'"),
        ({"h": torch.ones(2, 3, dtype=torch.int64)}, "not floating"),
        ({"dim": 2}, "along dim 2"),
        ({"threshold": torch.zeros(4)}, r"not floating \[C = 3\]"),
        ({"threshold": torch.zeros(5, 3)}, r"not floating \[C = 3\]"),
        ({"mode": torch.zeros(2, dtype=torch.int64)}, r"\[modes, C = 3\]"),
        ({"gain": torch.zeros(3, dtype=torch.float64)}, "gain is torch.float64"),
        ({"temperature": torch.ones(1)}, "not 0-d"),
        ({"mode": torch.zeros(2), "threshold": torch.zeros(5, 3)}, "not an integer per row"),
        ({"mode": torch.zeros(2, dtype=torch.int64), "threshold": torch.zeros(5, 2), "dim": 0}, "along another dim"),
    ],
)
def test_bad_operands_are_refused(change: dict[str, Any], says: str) -> None:
    given = {"h": torch.randn(2, 3), "threshold": torch.zeros(3), **change}
    with pytest.raises(ValueError, match=says):
        KERNEL.op(**given)
    with pytest.raises(ValueError, match=says):
        KERNEL.fake(**given)
