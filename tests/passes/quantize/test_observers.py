"""Ranges from what an observer remembers, against the same computed from all values at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxfreeze.passes.quantize._activations import quantized, scale_of
from fxfreeze.passes.quantize._observers import BINS, Method, Observer, Range


@pytest.fixture(scope="module")
def values() -> Tensor:
    """A long tail, and batches that grow, so that bins are merged on the way."""
    torch.manual_seed(0)
    tail = torch.distributions.Laplace(0.3, 1.0).sample((200_000,)) * torch.linspace(0.2, 1.0, 200_000)
    tail[-1] = 40.0
    return tail


def observed(method: Method, values: Tensor) -> Observer:
    observer = Observer(method)
    for batch in values.split(10_000):
        assert observer.add(batch)
    return observer


def error(values: Tensor, found: Range) -> float:
    return float((quantized(values, scale_of(found, values.dtype)) - values).double().square().sum())


def test_extremes_are_exact(values: Tensor) -> None:
    found = observed("minmax", values).range(100)
    assert (found.low, found.high, found.outside) == (float(values.min()), 40.0, 0.0)


def test_every_value_is_counted_in_its_bin_however_late_the_range_grew(values: Tensor) -> None:
    observer = observed("mse", values)
    assert observer.reach == 64 and float(observer.counts.sum()) == len(values)
    direct = torch.histc(values, BINS, -64, 64).double()
    assert float((observer.counts.cumsum(0) - direct.cumsum(0)).abs().max()) <= 2  # rounding at the edges of bins


@pytest.mark.parametrize("share", [99.0, 99.9])
def test_percentiles_are_those_of_all_values(values: Tensor, share: float) -> None:
    found, width = observed("percentile", values).range(share), 128 / BINS
    want = torch.quantile(values, torch.tensor([1 - share / 100, share / 100]))
    assert abs(found.low - float(want[0])) <= width and abs(found.high - float(want[1])) <= width
    inside = (values >= found.low) & (values <= found.high)
    assert found.outside == pytest.approx(float((~inside).double().mean()), abs=2e-3)


def test_the_least_squared_error_is_found(values: Tensor) -> None:
    values = values[:-1]
    found = observed("mse", values).range(100)
    parts = torch.linspace(0.2, 1.0, 33)
    tried = [error(values, Range(float(part * values.min()), float(part * values.max()))) for part in parts]
    assert error(values, found) <= 1.02 * min(tried) < 0.9 * tried[-1]


def test_divergence_leaves_out_a_tail_that_holds_next_to_nothing(values: Tensor) -> None:
    found = observed("entropy", values).range(100)
    assert 5 < found.high < 30 and found.outside < 1e-3
    even = torch.linspace(-1, 1, 100_000)
    assert observed("entropy", even).range(100).high > 0.95  # nothing to leave out


def test_memory_does_not_hang_on_the_number_of_batches() -> None:
    observer = Observer("entropy", channel=-3)
    for scale in (1.0, 1e-3, 1e6):
        assert observer.add(torch.randn(64, 8, 4, 4) * scale)
    assert observer.counts.shape == (BINS,) and observer.channels is not None and observer.channels.shape == (8,)


def test_nan_is_not_remembered() -> None:
    observer = Observer("mse")
    assert observer.add(torch.ones(3)) and not observer.add(torch.tensor([1.0, torch.nan]))
    assert not observer.add(torch.tensor([torch.inf])) and observer.high == 1.0


@pytest.mark.parametrize("value", [0.0, 2.5, -2.5])
def test_a_constant_keeps_its_value(value: float) -> None:
    scale = scale_of(observed("mse", torch.full((4,), value)).range(100), torch.float32)
    assert quantized(torch.tensor([value]), scale).item() == pytest.approx(value)
