"""Which convolutions the torch and aoti targets compute by Winograd's filtering, and with what behind them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxfreeze as fz
from fxfreeze.capture import capture
from fxfreeze.kernels import _native
from fxfreeze.kernels._op import OPS
from fxfreeze.program import Program
from fxfreeze.winograd import has_windows, is_built, with_winograd

NATIVE = OPS["winograd"].native_op
aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self, forward: Callable[..., Tensor], *, channels: int = 16, **kind: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        kind = {"kernel_size": 3, "padding": 1, **kind}
        self.a, self.b = (nn.Conv2d(channels, channels, **kind) for _ in range(2))
        self.case = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.case(self, x)


def program(forward, shape=("n", 16, 12, 12), dtype="float32", **kind) -> Program:
    model = Net(forward, **kind).to(getattr(torch, dtype)).eval()
    return capture(model, fz.Plan([fz.Input("x", shape, dtype=dtype)], targets=[]))[0]


def calls(found: Program) -> list[torch.fx.Node]:
    return found.graph.find_nodes(op="call_function", target=NATIVE)


def others(found: Program) -> list[object]:
    ours = (NATIVE, aten.permute.default, aten.movedim.int)
    return [node.target for node in found.graph.nodes if node.op == "call_function" and node.target not in ours]


def agrees(found: Program, before: Program, shape=(3, 16, 12, 12)) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    (ours,), (theirs,) = found.run(x), before.run(x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 * float(theirs.abs().max()))


WHOLE = {
    "bare": (1, lambda net, x: net.a(x)),
    "relu": (1, lambda net, x: F.relu(net.a(x))),
    "sum": (1, lambda net, x: net.a(x) + x),
    "sum the other way round, relu": (1, lambda net, x: F.relu(x + net.a(x))),
    "two": (2, lambda net, x: net.b(F.relu(net.a(x)))),
    "a block": (2, lambda net, x: F.relu(net.b(F.relu(net.a(x))) + x)),
    "a sum of two": (2, lambda net, x: F.relu(net.a(x) + net.b(x))),
    "a chain of blocks": (4, lambda net, x: block(net, block(net, x))),
    "a result read twice": (2, lambda net, x: (lambda y: net.b(y) + y)(F.relu(net.a(x)))),
}


def block(net: Net, x: Tensor) -> Tensor:
    return F.relu(net.b(F.relu(net.a(x))) + x)


@pytest.mark.parametrize("case", WHOLE)
def test_all_is_in_the_calls(case):
    count, forward = WHOLE[case]
    before = program(forward)
    text = str(before)
    found = with_winograd(before)
    assert has_windows(before) and len(calls(found)) == count and not others(found)
    assert str(before) == text
    agrees(found, before)
    found.verify()


LEFT = {
    "another activation": (lambda net, x: F.silu(net.a(x)), {aten.silu.default}),
    "a sum with another shape": (lambda net, x: net.a(x) + x[:, :1], {aten.add.Tensor}),
    "a sum with a factor": (lambda net, x: torch.add(x, net.a(x), alpha=2), {aten.add.Tensor}),
    "twice itself": (lambda net, x: (lambda y: y + y)(net.a(x)), {aten.add.Tensor}),
    "a sum with a number": (lambda net, x: net.a(x) + 1.0, {aten.add.Tensor}),
    "a sum of other numbers": (lambda net, x: net.a(x) + x.half(), {aten.add.Tensor}),
    "a result read twice": (lambda net, x: (lambda y: F.relu(y) * y)(net.a(x)), {aten.relu.default}),
    "a sum read twice": (lambda net, x: (lambda y: F.relu(y) * y)(net.a(x) + x), {aten.relu.default}),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_does_not_fit_stays_behind_the_call(case):
    forward, want = LEFT[case]
    before = program(forward)
    found = with_winograd(before)
    assert len(calls(found)) == 1 and want <= set(others(found))
    agrees(found, before)


REFUSED = {
    "stride": {"stride": 2},
    "dilation": {"dilation": 2},
    "groups": {"groups": 2, "channels": 32, "shape": ("n", 32, 12, 12)},
    "another window": {"kernel_size": 5},
    "a row": {"kernel_size": (1, 3)},
    "few channels": {"channels": 8, "shape": ("n", 8, 12, 12)},
    "float64": {"dtype": "float64"},
    "bfloat16": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_convolutions_stay(case):
    assert not has_windows(program(lambda net, x: net.a(x), **REFUSED[case]))


def test_a_weight_that_is_computed_stays():
    before = program(lambda net, x: F.conv2d(x, net.a.weight * x.sum(), padding=1))
    assert not has_windows(before)


def test_an_image_without_a_batch_stays():
    before = program(lambda net, x: net.a(x), shape=(16, 12, 12))
    assert not calls(with_winograd(before))


@pytest.mark.parametrize("padding", [0, 2, (1, 0), "same", "valid"])
def test_paddings(padding):
    before = program(lambda net, x: net.a(x), padding=padding)
    found = with_winograd(before)
    assert len(calls(found)) == 1
    agrees(found, before)


def test_without_a_bias():
    before = program(lambda net, x: net.b(net.a(x)), bias=False)
    found = with_winograd(before)
    assert len(calls(found)) == 2
    agrees(found, before)


def test_filters_of_a_shared_weight_are_stored_once():
    found = with_winograd(program(lambda net, x: net.a(net.a(x))))
    first, second = calls(found)
    assert first.args[1] is second.args[1] and not any(name.endswith("weight") for name in found.state)


@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((1, 192, 8, 8), 2),
        (("n", 192, 7, 7), 2),
        ((1, 192, 12, 9), 2),
        ((1, 192, 16, 12), 4),
        ((4, 192, 7, 7), 4),
        ((1, 192, "h", 8), 4),
        ((1, 64, 8, 8), 4),
    ],
    ids=str,
)
def test_filters_that_take_long_to_read_are_for_small_tiles(shape, tile):
    (call,) = calls(with_winograd(program(lambda net, x: net.a(x), shape=shape, channels=shape[1])))
    assert call.args[4] == tile


def test_without_a_compiler_the_program_runs_as_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    _native.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"winograd.cpp was not built"):
            assert not is_built()
    finally:
        _native.library.cache_clear()
