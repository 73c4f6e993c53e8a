"""Channels brought to like ranges before they are quantized: the function stays exactly, and integers fit better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.api import Compilation, rewrite
from fxfreeze.errors import ProofError
from fxfreeze.passes.quantize import equalize

SIZE = 8
FACTORS = 2.0 ** torch.tensor([-7, 4, 0, 7, -3, 1, -6, 2])


class Net(nn.Module):
    """Layers by name, and what is done with them."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.call = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


@torch.no_grad()
def uneven(first: Any, *readers: Any) -> None:
    """Scale the output features of `first` by :data:`FACTORS`, and `readers` against it: the function stays."""
    for value in first.parameters():
        value *= FACTORS.reshape(-1, *[1] * (value.ndim - 1))
    for reader in readers:
        groups = getattr(reader, "groups", 1)
        weight = reader.weight.view(groups, -1, *reader.weight.shape[1:])
        weight /= FACTORS.reshape(groups, 1, -1, *[1] * (reader.weight.ndim - 2))


def net(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A model in which what layer `two` reads is uneven, and the shape of its input without the batch."""
    torch.manual_seed(0)
    if "conv" in name:
        groups = {"conv": 1, "grouped conv": 2, "depthwise conv": SIZE}[name]
        one, two = nn.Conv2d(3, SIZE, 3), nn.Conv2d(SIZE, SIZE, 3, groups=groups)
        uneven(one, two)
        pool = nn.functional.max_pool2d
        return Net(lambda m, x: m.two(pool(m.one(x).relu(), 2)), one=one, two=two).eval(), (3, 12, 12)
    two, three = nn.Linear(SIZE, 3), nn.Linear(SIZE, 5)
    if "norm" in name:
        one: Any = nn.LayerNorm(SIZE, elementwise_affine="bare" not in name)
        if one.elementwise_affine:
            nn.init.normal_(one.bias)
            uneven(one, two, three)
        else:  # its result is even, and so the weights are not
            uneven(nn.Linear(1, SIZE), two, three)
        both = Net(lambda m, x: torch.cat([m.two(m.one(x)), m.three(m.one(x))], 1), one=one, two=two, three=three)
        return both.eval(), (SIZE,)
    one = nn.Linear(4, SIZE)
    uneven(one, two)
    ways = {
        "relu": lambda m, x: m.two(m.one(x).relu()),
        "gate": lambda m, x: m.two((h := m.one(x)) * (h > 0)),
        "sum": lambda m, x: m.two(h := m.one(x).relu()) + h[:, :3],
        "gelu": lambda m, x: m.two(nn.functional.gelu(m.one(x))),
    }
    return Net(ways[name], one=one, two=two).eval(), (4,)


def done(model: nn.Module, shape: tuple[int, ...], **step: Any) -> Compilation:
    data = [torch.randn(64, *shape, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    plan = fz.Plan([fz.Input("x", ("batch", *shape))], [fz.Quantize(granularity="tensor", **step)], ())
    return rewrite(model, plan, calibration=data)


def snr(found: Compilation, model: nn.Module, shape: tuple[int, ...]) -> float:
    x = torch.randn(64, *shape, generator=torch.Generator().manual_seed(9))
    want = model(x)
    return float(20 * (want.norm() / (found.program.run(x)[0] - want).norm()).log10().detach())


def told(found: Compilation, site: str) -> tuple[str, str]:
    (row,) = [row for row in found.ledger if row.pass_name == "equalize" and row.site == site]
    return row.outcome, row.detail


ALL = ["relu", "gate", "conv", "grouped conv", "depthwise conv", "norm", "bare norm"]


@pytest.mark.parametrize("name", ALL)
def test_the_function_stays_exactly_and_integers_lose_less(name: str) -> None:
    model, shape = net(name)
    found = done(model, shape, equalize=True)
    assert told(found, "two")[0] == "rewritten"
    (proof,) = [row for row in found.proofs if row.pass_name == "equalize"]
    assert proof.error == 0, "powers of 2 round nothing"
    plain = snr(done(model, shape), model, shape)
    # What a bare norm gives is even: there the weights gain, which have a scale each by default.
    assert snr(found, model, shape) > plain + (1 if name == "bare norm" else 12)


def test_the_ledger_says_how_far_channels_stood_out() -> None:
    model, shape = net("relu")
    outcome, detail = told(done(model, shape, equalize=True), "two")
    before, after = (float(word) for word in detail.split() if word.replace(".", "").isdigit())
    assert outcome == "rewritten" and "× the median one" in detail and before > 4 * after


@pytest.mark.parametrize(("name", "why"), [("sum", "slice"), ("gelu", "gelu.default has no weight")])
def test_what_others_read_or_make_stays(name: str, why: str) -> None:
    model, shape = net(name)
    found = done(model, shape, equalize=True)
    outcome, detail = told(found, "two")
    assert outcome == "skipped" and why in detail
    assert found.program.structural_hash() == done(model, shape).program.structural_hash()


@pytest.mark.parametrize("length", [SIZE, 12])
def test_channels_of_a_1d_convolution_are_no_time_steps(length: int) -> None:
    """Also where there are as many of both."""
    torch.manual_seed(0)
    one, two = nn.Conv1d(3, SIZE, 3, padding=1), nn.Conv1d(SIZE, 4, 3)
    uneven(one, two)
    model = Net(lambda m, x: m.two(m.one(x).relu()), one=one, two=two).eval()
    found = done(model, (3, length), equalize=True)
    assert told(found, "two")[0] == "rewritten"
    assert snr(found, model, (3, length)) > snr(done(model, (3, length)), model, (3, length)) + 12


def test_a_norm_over_another_dim_stays() -> None:
    torch.manual_seed(0)
    one, two = nn.LayerNorm(SIZE), nn.Conv1d(SIZE, 4, 1)
    with torch.no_grad():
        two.weight *= FACTORS.reshape(1, -1, 1)
    outcome, detail = told(done(Net(lambda m, x: m.two(m.one(x)), one=one, two=two).eval(), (SIZE, SIZE),
                                equalize=True), "two")  # fmt: skip
    assert outcome == "skipped" and "lie along another dim" in detail


def test_even_channels_stay() -> None:
    layers = nn.Sequential(nn.Linear(SIZE, SIZE), nn.ReLU(), nn.Linear(SIZE, SIZE)).eval()
    with torch.no_grad():
        for layer in (layers[0], layers[2]):
            layer.weight.copy_(torch.eye(SIZE))  # type: ignore[operator]
    assert told(done(layers, (SIZE,), equalize=True), "2") == (
        "skipped", "the channels of its input have like ranges"
    )  # fmt: skip


@pytest.mark.parametrize("name", ["relu", "norm"])
def test_the_proof_rejects_one_side_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equalize, "fold_forward", lambda program, affine: [])
    model, shape = net(name)
    with pytest.raises(ProofError, match="equalize"):
        done(model, shape, equalize=True)
