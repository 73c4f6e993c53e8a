"""fz.Factorize: heads of low rank become two thin layers, if the predictions stay; the rest stays, and says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.api import Compilation, rewrite
from fxfreeze.errors import PlanError

CLASSES, FEATURES = 10, 256


class Classifier(nn.Module):
    def __init__(self, head: nn.Module, body: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body or nn.Sequential(nn.Linear(16, FEATURES), nn.ReLU())
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def collapsed(rank: int = CLASSES - 1) -> nn.Linear:
    """A simplex of prototypes: centred, so that its rank is one less than there are classes."""
    torch.manual_seed(0)
    head = nn.Linear(FEATURES, CLASSES)
    basis = torch.linalg.qr(torch.randn(FEATURES, CLASSES))[0].T
    centred = basis - basis.mean(0)
    u, s, v = torch.linalg.svd(centred, full_matrices=False)
    s[rank:] = 0
    head.weight.data = 5 * (u * s) @ v
    return head


def compiled(model: nn.Module, *steps: Any, targets: tuple[str, ...] = (), **given: Any) -> Compilation:
    plan = fz.Plan([fz.Input("x", ("batch", 16))], steps, targets=targets)
    batches = [torch.randn(200, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    return rewrite(model.eval(), plan, calibration=batches, **given)


def shapes(done: Compilation) -> list[tuple[int, ...]]:
    linear = torch.ops.aten.linear.default
    return [tuple(node.args[1].meta["val"].shape) for node in done.program.graph.nodes if node.target is linear]


def row(done: Compilation, site: str = "head") -> Any:
    (found,) = [row for row in done.ledger if row.site == site and row.step == "factorize"]
    return found


def test_a_collapsed_head_becomes_two_layers_of_its_rank() -> None:
    model = Classifier(collapsed())
    done = compiled(model, fz.Factorize(at="head", agreement=1.0))
    assert shapes(done) == [(FEATURES, 16), (CLASSES - 1, FEATURES), (CLASSES, CLASSES - 1)]
    told = row(done)
    assert told.outcome == "rewritten" and told.executes.startswith("two products of rank 9, 2,394 weights for 2,560")
    assert told.detail.startswith("100.00% of predictions stay; on 400 rows of calibration data")
    x = torch.randn(50, 16)
    torch.testing.assert_close(done.program.run(x)[0], model(x), rtol=1e-4, atol=1e-5)


def test_the_rank_is_the_smallest_that_keeps_the_predictions() -> None:
    model = Classifier(collapsed(rank=4))
    assert shapes(compiled(model, fz.Factorize(at="head", agreement=1.0)))[1] == (4, FEATURES)
    loose = shapes(compiled(model, fz.Factorize(at="head", agreement=0.5)))[1][0]
    assert 1 <= loose < 4
    assert shapes(compiled(model, fz.Factorize(at="head", rank=6)))[1] == (6, FEATURES)


def test_the_artifact_computes_it_in_every_layout() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(collapsed().weight.T.contiguous()), nn.Parameter(torch.randn(CLASSES))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight)

    model = Classifier(Product())
    plan = fz.Plan([fz.Input("x", ("batch", 16))], [fz.Factorize(at="head")], targets=["onnx"])
    artifact = fz.compile(model.eval(), plan)
    x = torch.randn(7, 16)
    torch.testing.assert_close(artifact(x), model(x), rtol=1e-4, atol=1e-4)
    assert "two products of rank" in str(artifact.report)


def test_a_head_that_has_full_rank_stays() -> None:
    torch.manual_seed(1)
    done = compiled(Classifier(nn.Linear(FEATURES, CLASSES)), fz.Factorize(at="head", rank=2))
    told = row(done)
    assert told.outcome == "refused" and "with rank 2," in told.detail and "99.90% are asked" in told.detail
    assert shapes(done) == [(FEATURES, 16), (CLASSES, FEATURES)]


def test_what_would_be_larger_or_cannot_be_measured_stays() -> None:
    told = row(compiled(Classifier(collapsed()), fz.Factorize(at="head", rank=10)))
    assert told.outcome == "refused" and "up to rank 9 only" in told.detail
    told = row(
        compiled(Classifier(nn.Sequential(collapsed(), nn.Linear(CLASSES, 1))), fz.Factorize(at="head.0")), "head.0"
    )
    assert told.outcome == "refused" and "no output looks like scores" in told.detail


def test_the_model_and_tied_weights_stay_as_they_are() -> None:
    head = collapsed()
    before = head.weight.detach().clone()

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(16, FEATURES), head
            self.other = nn.Linear(FEATURES, CLASSES)
            self.other.weight = head.weight

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x)
            return self.head(h) + self.other(h)

    done = compiled(Tied(), fz.Factorize(at="head"))
    assert (CLASSES, FEATURES) in shapes(done) and (CLASSES - 1, FEATURES) in shapes(done)
    assert torch.equal(head.weight, before)


@pytest.mark.parametrize(
    ("at", "match"),
    [("body.1", r"names no linear layer\n  body.1 is no linear layer"), ("nothing", "no module matches")],
)
def test_what_is_no_linear_layer_is_an_error(at: str, match: str) -> None:
    with pytest.raises(PlanError, match=match):
        compiled(Classifier(collapsed()), fz.Factorize(at=at))
