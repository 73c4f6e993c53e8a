"""Where the values of a step come from: its weights file, or what it came with."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.errors import PlanError
from fxfreeze.passes.adapt._parameters import Source

SPLICE, OTHER = fz.Splice(nn.ReLU(), at="1", name="own"), fz.Splice(nn.ReLU(), at="2", name="other")


def source(tmp_path: Path, **stored: Tensor) -> Source:
    file = tmp_path / "w.safetensors"
    safetensors.torch.save_file({name.replace("__", "."): value for name, value in stored.items()}, file)
    step = SPLICE.model_copy(update={"weights": str(file)})
    return Source(step, [step, OTHER])


def test_a_constant_comes_from_the_file_in_the_dtype_of_the_module(tmp_path: Path) -> None:
    mask = torch.tensor([0.0, -torch.inf], dtype=torch.float64)
    found = source(
        tmp_path, frozen__own__1__mask=mask, frozen__own__1__steps=torch.tensor(7), frozen__other__2__a=mask + 1
    )
    value = found.held("frozen.own.1.mask", torch.zeros(2))
    assert value.dtype == torch.float32 and torch.equal(value.double(), mask)
    with pytest.raises(PlanError, match=r"unexpected: frozen\.own\.1\.steps"):  # and none of the other step's
        found.finish()
    steps = found.held("frozen.own.1.steps", torch.tensor(0, dtype=torch.int32))
    assert steps.dtype == torch.int32 and int(steps) == 7
    found.finish()


def test_a_constant_that_the_file_lacks_stays(tmp_path: Path) -> None:
    value = torch.tensor([True])
    found = source(tmp_path)
    assert found.held("frozen.own.1.flag", value) is value
    found.finish()
    assert Source(SPLICE, [SPLICE]).held("frozen.own.1.flag", value) is value


@pytest.mark.parametrize(
    ("value", "like", "text"),
    [
        (torch.zeros(2, 1), torch.zeros(2), r"frozen.own.1.c has shape \(2, 1\), but \(2,\) is needed"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int64), "frozen.own.1.c is torch.float32, but .*int64"),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(2), "frozen.own.1.c is torch.int64, but .*float32"),
        (torch.ones(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool), "frozen.own.1.c is torch.int64"),
        (torch.full((2,), 300), torch.zeros(2, dtype=torch.int8), "holds numbers that torch.int8 does not"),
    ],
)
def test_a_constant_that_does_not_fit_is_refused(tmp_path: Path, value: Tensor, like: Tensor, text: str) -> None:
    found = source(tmp_path, frozen__own__1__c=value)
    with pytest.raises(PlanError, match=text):
        found.held("frozen.own.1.c", like)


def test_a_codebook_starts_with_the_codes_of_a_layer(tmp_path: Path) -> None:
    layer, file = fz.nn.Codebook(6, codes=4, k=2), tmp_path / "codes.safetensors"
    with torch.no_grad():
        layer.codes.uniform_()
    safetensors.torch.save_file({f"0.{name}": value for name, value in layer.state_dict().items()}, file)
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), torch.randn(3, 6)
    step = fz.Codebook(at="0", codes=4, k=2, weights=file)
    net = fz.adapt(model, fz.Plan([fz.Input("x", ("batch", 6))], [step]), verify="off")
    torch.testing.assert_close(net(x), torch.tanh(layer(model[0](x))))
