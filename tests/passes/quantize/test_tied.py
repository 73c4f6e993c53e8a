"""Layers on integers with the same weight and the same input: one product, and rows for all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.api import Compilation, rewrite
from fxfreeze.program import integer_layers

SIZE = 8
SCHEMES: list[dict[str, Any]] = [{}, {"mode": "dynamic"}, {"scheme": "int8-weight"}]


class Twice(nn.Module):
    """Two layers, of which the second reads `shift` more than the first; with its weight and bias, or alike but one."""

    def __init__(self, first: nn.Module, second: nn.Module, untied: str = "", shift: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.shift = first, second, shift
        for name in ("weight", "bias"):
            if name != untied:
                setattr(self.b, name, getattr(self.a, name))
        self.c = nn.Linear(2 * SIZE, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.shift is None else x + self.shift
        return self.c((self.a(x).relu() + self.b(y).tanh()).reshape(-1, 2 * SIZE))


def linear() -> nn.Linear:
    return nn.Linear(SIZE, 2 * SIZE)


def data(*shape: int) -> list[Tensor]:
    return [torch.randn(16, *shape, generator=torch.Generator().manual_seed(1))]


def compiled(model: nn.Module, *shape: int, **step: Any) -> Compilation:
    plan = fz.Plan([fz.Input("x", ("batch", *shape))], [fz.Quantize(**step)], targets=())
    return rewrite(model.eval(), plan, calibration=data(*shape))


@pytest.mark.parametrize("step", SCHEMES, ids=str)
def test_tied_layers_on_one_input_are_one_product(step: dict[str, Any]) -> None:
    done = compiled(Twice(linear(), linear()), SIZE, **step)
    found = [[row[0] for row in site.ran("it")] for site in integer_layers(done.program).values()]
    assert found == [["a", "b"], ["c"]]
    assert [(row.site, row.executes) for row in done.ledger if "tied" in row.requested] == [("b", "the product of 'a'")]


@pytest.mark.parametrize(
    "model",
    [
        Twice(linear(), linear(), untied="weight"), Twice(linear(), linear(), untied="bias"),
        Twice(linear(), linear(), shift=1.0),
    ],
    ids=["weight", "bias", "input"],
)  # fmt: skip
def test_layers_that_differ_stay_apart(model: nn.Module) -> None:
    assert [site.twins for site in integer_layers(compiled(model, SIZE).program).values()] == [()] * 3


def test_convolutions_stay_apart() -> None:
    first, second = (nn.Conv2d(1, 4, 1) for _ in "ab")
    done = compiled(Twice(first, second), 1, 2, 2)
    assert [site.path for site in integer_layers(done.program).values()] == ["a", "b", "c"]


def test_two_results_that_are_returned_are_two_tensors() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = linear(), linear()
            self.b.weight, self.b.bias = self.a.weight, self.a.bias

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    done = compiled(Both(), SIZE)
    assert len(integer_layers(done.program)) == 1
    first, second = done.program.run(*data(SIZE))
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()


@pytest.mark.parametrize("step", SCHEMES, ids=str)
def test_onnx_says_of_both_what_runs_them(step: dict[str, Any]) -> None:
    pytest.importorskip("onnxruntime")
    plan = fz.Plan([fz.Input("x", ("batch", SIZE))], [fz.Quantize(**step)], ["onnx"])
    artifact = fz.compile(Twice(linear(), linear()).eval(), plan, calibration=data(SIZE))
    told = {row["site"]: row["executes"] for row in artifact.manifest["ledger"] if row["executes"].endswith("in onnx")}
    assert told.keys() == set("abc") and all(text.startswith("integer-executed") for text in told.values())
