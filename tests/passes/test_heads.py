"""Tversky heads in runs over calibration data: prototypes are measured once for all programs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.capture import capture
from fxfreeze.kernels.tversky import KERNEL
from fxfreeze.kernels.tversky_frozen import KERNEL as FROZEN
from fxfreeze.nn import TverskyProjection
from fxfreeze.passes import _heads
from fxfreeze.passes._heads import measured_heads
from fxfreeze.program import Program


def program(model: nn.Module, dtype: str = "float32") -> Program:
    return capture(model.eval(), fz.Plan([fz.Input("x", (3, 8), dtype=dtype)]))[0]


def head(**how: str | bool | float) -> TverskyProjection:
    torch.manual_seed(0)
    return TverskyProjection(8, 5, features=6, **how)


def count(program: Program, op: object) -> int:
    return len(list(program.graph.find_nodes(op="call_function", target=op)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("how", [{}, {"normalize": True}, {"model": "ratio", "intersection": "min"}], ids=str)
def test_they_give_what_heads_give(dtype: str, how: dict[str, str]) -> None:
    kind = getattr(torch, dtype)
    one = program(head(**how).to(kind), dtype)
    fingerprint = one.fingerprint()
    (two,) = measured_heads(one)
    assert (count(one, KERNEL.op), count(one, FROZEN.op)) == (1, 0) and one.fingerprint() == fingerprint
    assert (count(two, KERNEL.op), count(two, FROZEN.op)) == (0, 1)
    x = torch.randn(3, 8).to(kind)
    (found,), (wanted,) = two.run(x), one.run(x)
    eps, working = torch.finfo(kind).eps, torch.finfo(torch.float64 if kind == torch.float64 else torch.float32).eps
    # Sums are in another order in the working dtype; a half is rounded once, which may be to its neighbour.
    rounding = eps if eps > working else 0.0
    torch.testing.assert_close(found, wanted, rtol=rounding, atol=8 * working * float(wanted.abs().max()))


def test_prototypes_are_measured_once_for_all_that_have_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []
    project = _heads.project
    monkeypatch.setattr(_heads, "project", lambda v, *rest: calls.append(v) or project(v, *rest))
    one = program(head())
    two, three = one.clone(), one.clone()
    name = next(name for name in three.state if "prototypes" in name)
    three.state[name] = three.state[name] * 2
    found = measured_heads(one, two, three)
    measured = [value for value in calls if type(value) is Tensor and value.shape == (5, 8)]
    assert len(measured) == 2
    x = torch.randn(3, 8)
    for now, then in zip(found, (one, two, three), strict=True):
        torch.testing.assert_close(now.run(x), then.run(x))
    assert not torch.allclose(found[2].run(x)[0], found[0].run(x)[0])


def test_what_has_no_head_with_constant_prototypes_is_no_copy() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head()

        def forward(self, x: Tensor) -> Tensor:
            bank, prototypes, *weights = (self.head.features, x * 2, *(torch.ones(()),) * 3)
            how = {"model": "contrast", "intersection": "product", "difference": "ignorematch"}
            return KERNEL.op(x, bank, prototypes, *weights, **how, semantics="aggregate")

    for item in (program(nn.Linear(8, 4)), program(Computed())):
        assert measured_heads(item) == [item]
