"""Layers of other libraries: recognised while they are captured, and left as they were."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.api import rewrite
from fxfreeze.capture import capture
from fxfreeze.foreign import recognised

tversky = pytest.importorskip("tversky.nn", reason="the package tversky is not installed")
OPERATOR = "fxfreeze.tversky.default"


class Net(nn.Module):
    def __init__(self, *how: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(6, 8)
        self.head = tversky.TverskyProjection(8, 5, 12, *how)
        nn.init.normal_(self.head.feature_bank.weight)
        nn.init.normal_(self.head.prototypes.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def operators(program: Any) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def plan(*shape: int | str, **options: Any) -> fz.Plan:
    return fz.Plan(inputs=[fz.Input("x", shape=shape)], **options)


@pytest.mark.parametrize("shape", [("batch", 6), ("batch", "length", 6)])
@pytest.mark.parametrize(
    "how",
    [("contrast", False), ("ratio", True), ("contrast", True, "gmean", "substractmatch"), ("ratio", False, "softmin")],
)
def test_a_projection_of_the_package_is_one_operator_and_folds(how: tuple[Any, ...], shape: tuple[Any, ...]) -> None:
    model = Net(*how).eval()
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    program, _ = capture(model, plan(*shape))
    assert operators(program).count(OPERATOR) == 1
    assert {path: dict(vars(module)) for path, module in model.named_modules()} == before
    done = rewrite(model, plan(*shape, targets=()))
    assert OPERATOR not in operators(done.program)
    (row,) = [row for row in done.ledger if "Tversky" in row.requested]
    assert (row.site, row.outcome) == ("head", "rewritten")
    x = torch.randn(7, 6) if len(shape) == 2 else torch.randn(3, 4, 6)
    with torch.no_grad():
        torch.testing.assert_close(done.program.run(x)[0], model(x), rtol=1e-4, atol=1e-4)


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.compare = tversky.TverskySimilarity(6, 9, "contrast", True)
        nn.init.normal_(self.compare.feature_bank.weight)
        self.known = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.compare(x, self.known)


def test_a_similarity_to_a_constant_folds_too() -> None:
    model = Pairs().eval()
    done = rewrite(model, plan("batch", 6, targets=()))
    assert OPERATOR not in operators(done.program)
    x = torch.randn(5, 6)
    with torch.no_grad():
        torch.testing.assert_close(done.program.run(x)[0], model(x), rtol=1e-4, atol=1e-4)


def test_weights_given_in_the_call_are_the_packages_own_business() -> None:
    class Given(Pairs):
        def forward(self, x: Tensor) -> Tensor:
            return self.compare(x, self.known, alpha=0.1)

    program, _ = capture(Given().eval(), plan("batch", 6))
    assert OPERATOR not in operators(program)


def test_a_layer_that_means_something_else_is_not_touched() -> None:
    model = Net("contrast", False)
    odd = copy.deepcopy(model)
    odd.head.intersection_reduction = "median"
    mine = copy.deepcopy(model)
    mine.head.forward = lambda x: x
    with recognised(odd) as first, recognised(mine) as second, recognised(model) as third:
        assert (first.paths, second.paths, third.paths) == ([], [], ["head"])
        assert mine.head.forward(3) == 3
    assert mine.head.forward(3) == 3 and "forward" not in vars(model.head)


def test_the_layer_is_put_back_when_the_trace_fails() -> None:
    class Failing(Net):
        def forward(self, x: Tensor) -> Tensor:
            if self.head(x).sum() > 0:
                return x
            return -x

    model = Failing("contrast", False).eval()
    with pytest.raises(fz.CaptureError):
        capture(model, plan("batch", 8))
    assert "forward" not in vars(model.head)
