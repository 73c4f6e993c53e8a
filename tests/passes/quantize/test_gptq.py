"""Quantize(compensate=True): errors of rounded weights are compensated by weights that are not rounded yet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.api import Compilation, rewrite
from fxfreeze.errors import PassError, PlanError
from fxfreeze.kernels.dequantize import KERNEL as DEQUANTIZE
from fxfreeze.passes.quantize import _gptq
from fxfreeze.passes.quantize._gptq import Hessian, compensated
from fxfreeze.passes.quantize._weights import LIMITS, Layout, to_integers

INPUTS, OUTPUTS = 64, 24


def rows(count: int = 512, seed: int = 0, inputs: int = INPUTS) -> Tensor:
    """Inputs of which a few directions hold most: what one weight does wrong, others can make up for."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(8, inputs, generator=torch.Generator().manual_seed(99))
    return torch.randn(count, 8, generator=generator) @ mixed + 0.1 * torch.randn(count, inputs, generator=generator)


def weight(inputs: int = INPUTS) -> Tensor:
    return torch.randn(OUTPUTS, inputs, generator=torch.Generator().manual_seed(1)).double()


def hessian(x: Tensor) -> Tensor:
    found = Hessian(torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64))
    for part in x.split(100):
        found.add(part)
    torch.testing.assert_close(found.total, 2 * x.double().T @ x.double(), rtol=1e-12, atol=1e-9)
    return found.total


def textbook(w: Tensor, h: Tensor, bits: int, block: int) -> Tensor:
    """Equations (2) and (3) of the paper, with an inverse of what is left of H for every column; float scales."""
    w, limit, done, scale = w.clone(), LIMITS[bits], torch.zeros_like(w), torch.empty(0)
    damping = 0.01 * h.diagonal().mean()
    h = h + torch.diag(torch.where(h.diagonal() == 0, 1.0, 0.0) + damping)
    for column in range(w.shape[1]):
        if column % (block or w.shape[1]) == 0:
            scale = (w[:, column : column + (block or w.shape[1])].abs().amax(1) / limit).float().double()
        done[:, column] = torch.round(w[:, column] / scale).clamp(-limit, limit) * scale
        inverse = torch.linalg.inv(h[column:, column:])
        w[:, column:] -= ((w[:, column] - done[:, column]) / inverse[0, 0]).outer(inverse[0])
    return done


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("block", [0, 8, 16, 32])
@pytest.mark.parametrize("lazy", [16, 24, 128])
@pytest.mark.parametrize("turned", [False, True])
def test_it_is_the_textbook_s(bits: int, block: int, lazy: int, turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gptq, "LAZY", lazy)
    w, h = weight(), hessian(rows())
    layout = Layout((0 if block else 1) if turned else (1 if block else 0), block, True)
    given = w.clone()
    found = compensated(given.T if turned else given, layout, bits, torch.float32, h).floats()
    assert torch.equal(given, w)
    want = textbook(w, h, bits, block)
    torch.testing.assert_close(found.T if turned else found, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("bits", "block", "factor"), [(8, 0, 2.0), (4, 0, 2.0), (4, 32, 2.0), (4, 16, 2.0)])
def test_results_are_closer_than_of_the_nearest_integers(bits: int, block: int, factor: float) -> None:
    """On other rows, too; `factor` is of the norm of the error."""
    w, layout = weight(), Layout(1 if block else 0, block, True)
    found = compensated(w, layout, bits, torch.float32, hessian(rows())).floats()
    nearest = to_integers(w, layout, bits, torch.float32).floats()
    for x in (rows(), rows(seed=5)):
        error, plain = ((x.double() @ (value - w).T).norm() for value in (found, nearest))
        assert factor * error < plain
    assert (found - w).norm() > (nearest - w).norm()


def test_the_error_is_read_from_the_matrix() -> None:
    x, w, now = rows(), weight(), weight() + 0.01 * torch.randn(OUTPUTS, INPUTS).double()
    tally = Hessian(hessian(x)).error(now, w)
    assert tally.gap == pytest.approx(float((x.double() @ (now - w).T).square().sum()), rel=1e-9)
    assert tally.size == pytest.approx(float((x.double() @ w.T).square().sum()), rel=1e-9)


def test_dead_inputs_are_rounded_to_the_nearest_and_move_nothing() -> None:
    x, w, layout = rows(), weight(), Layout(0, 0, True)
    dead = torch.tensor([0, 7, INPUTS - 1])
    x[:, dead] = 0.0
    found = compensated(w, layout, 4, torch.float32, hessian(x))
    nearest = to_integers(w, layout, 4, torch.float32)
    assert torch.equal(found.values[:, dead], nearest.values[:, dead])
    torch.testing.assert_close(found.floats(), textbook(w, hessian(x), 4, 0), rtol=0, atol=1e-9)
    other = w.clone()
    other[:, dead] *= 0.5  # no scale hangs on these columns
    again = compensated(other, layout, 4, torch.float32, hessian(x))
    alive = [column for column in range(INPUTS) if column not in dead]
    assert torch.equal(again.values[:, alive], found.values[:, alive])


@pytest.mark.parametrize("x", [torch.zeros(4, INPUTS), rows(5), rows(64)[:, :1].expand(64, INPUTS)],
                         ids=["zeros", "fewer rows than inputs", "rank one"])  # fmt: skip
def test_singular_matrices_are_damped(x: Tensor) -> None:
    w, layout = weight(), Layout(0, 0, True)
    found = compensated(w, layout, 4, torch.float32, hessian(x)).floats()
    nearest = to_integers(w, layout, 4, torch.float32).floats()
    error, plain = ((x.double() @ (value - w).T).norm() for value in (found, nearest))
    assert bool(found.isfinite().all()) and (2 * error < plain if bool(x.any()) else torch.equal(found, nearest))


# ---- in a plan


class Net(nn.Module):
    """Two linear layers, one stored [in, out], and a table that is an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first = nn.Embedding(80, INPUTS), nn.Linear(INPUTS, OUTPUTS)
        self.second, self.head = Product(OUTPUTS, INPUTS), nn.Linear(INPUTS, 80, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.table(ids) + x).relu()))


class Product(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def compiled(step: Any, data: Any = None) -> tuple[nn.Module, Compilation]:
    torch.manual_seed(0)
    net = Net().eval()
    inputs = [fz.Input("ids", ("batch",), dtype="int64", low=0, high=79), fz.Input("x", ("batch", INPUTS))]
    return net, rewrite(net, fz.Plan(inputs, [step], targets=()), calibration=data or batches())


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(torch.arange(32) + number, rows(32, number)) for number in range(count)]


def details(done: Compilation) -> dict[str, str]:
    return {row.site: row.detail for row in done.ledger if row.outcome == "rewritten"}


STEP = {"scheme": "int4-weight", "granularity": "group:8"}


def test_the_outputs_are_closer() -> None:
    ids, x = torch.arange(40), rows(40, seed=77)
    errors = []
    for compensate in (True, False):
        net, done = compiled(fz.Quantize(**STEP, compensate=compensate, exclude=["table", "head"]))
        want, (found,) = net(ids, x).detach(), done.program.run(ids, x)
        errors.append(float((found - want).norm() / want.norm()))
    assert 1.4 * errors[0] < errors[1]


def test_the_ledger_says_what_it_buys() -> None:
    told = details(compiled(fz.Quantize(**STEP, compensate=True))[1])
    for path in ("first", "second"):
        better, plain = (float(part.split(" dB")[0]) for part in told[path].split("(")[1:3])
        assert better >= plain + 3
        assert "of its result, " in told[path] and told[path].endswith(
            "without compensation; on 128 rows of calibration data"
        )
    assert told["table"].endswith("of its weight; to the nearest, for errors of linear layers alone are compensated")
    assert told["head"].endswith("of its weight; to the nearest, for something else reads it, too")
    plain = details(compiled(fz.Quantize(**STEP))[1])
    assert all(text.endswith("of its weight") for text in plain.values())


def test_a_tied_table_stays_one() -> None:
    program = compiled(fz.Quantize(**STEP, compensate=True))[1].program
    stored = [str(node.args[0].target) for node in program.graph.nodes if node.target is DEQUANTIZE.op]
    assert len(stored) == 4 and len(set(stored)) == 3


def test_matrices_that_are_not_there_at_once_are_summed_in_several_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    class Data:
        def __iter__(self) -> Any:
            read.append(0)
            yield from batches()

    want = compiled(fz.Quantize(**STEP, compensate=True), Data())[1].program
    once, read[:] = len(read), []
    monkeypatch.setattr(_gptq, "MEMORY", 8 * INPUTS**2)
    found = compiled(fz.Quantize(**STEP, compensate=True), Data())[1].program
    assert len(read) == once + 1
    ids, x = batches(1)[0]
    assert torch.equal(found.run(ids, x)[0], want.run(ids, x)[0])


def test_values_that_are_not_finite_are_named() -> None:
    data = batches()
    data[1][1][0, 0] = torch.inf
    with pytest.raises(PassError, match="is NaN or Inf on the calibration data, so no error can be compensated"):
        compiled(fz.Quantize(**STEP, compensate=True), data)


def test_it_is_for_weights_alone() -> None:
    with pytest.raises(PlanError, match="compensate: is for weights only: use scheme='int8-weight'"):
        fz.Quantize(compensate=True)
