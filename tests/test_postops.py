"""Roundings between a convolution and what its kernel does before it rounds: which ones are left out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxfreeze as fz
from fxfreeze.capture import capture
from fxfreeze.kernels._op import OPS
from fxfreeze.postops import with_post_ops
from fxfreeze.program import Program

QUANTIZE, DEQUANTIZE = OPS["quantize"].op, OPS["dequantize"].op


class Net(nn.Module):
    """Three convolutions on integers, and `forward` of a case; `once` leaves out the roundings that are to be gone."""

    def __init__(self, case: Callable[[Net, Tensor], Tensor], once: bool) -> None:
        super().__init__()
        self.case, self.once = case, once
        generator = torch.Generator().manual_seed(0)
        for name in "abc":
            self.register_buffer(name, torch.randint(-127, 128, (4, 4, 3, 3), dtype=torch.int8, generator=generator))
        self.register_buffer("scales", torch.rand(4, generator=generator) * 0.003 + 0.001)
        self.register_buffer("zeros", torch.zeros(4, dtype=torch.int8))
        self.register_buffer("scale", torch.tensor(0.04))
        self.register_buffer("other", torch.tensor(0.07))
        self.register_buffer("zero", torch.tensor(100, dtype=torch.uint8))

    def grid(self, x: Tensor, scale: str = "scale") -> Tensor:
        step: Tensor = getattr(self, scale)
        return DEQUANTIZE(QUANTIZE(x, step, self.zero, 0, 0, 0, 255), step, self.zero, 0, 0, torch.float32)

    def gone(self, x: Tensor) -> Tensor:
        return x if self.once else self.grid(x, "other")

    def conv(self, name: str, x: Tensor) -> Tensor:
        weight = DEQUANTIZE(getattr(self, name), self.scales, self.zeros, 0, 0, torch.float32)
        return F.conv2d(x, weight, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.case(self, self.grid(x))


def program(case: Callable[[Net, Tensor], Tensor], *, once: bool = False) -> Program:
    return capture(Net(case, once).eval(), fz.Plan([fz.Input("x", ("batch", 4, 6, 6))], targets=[]))[0]


def roundings(found: Program) -> int:
    return sum(node.target is QUANTIZE for node in found.graph.nodes)


def behind(net: Net, x: Tensor) -> Tensor:
    """A convolution on x: what is added to it need not be overwritten by its only reader."""
    return net.grid(F.relu(net.conv("a", x)))


LEFT_OUT: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "sum, relu": lambda net, x: net.grid(F.relu(net.gone(net.conv("b", behind(net, x))) + x)),
    "sum": lambda net, x: net.grid(net.gone(net.conv("b", behind(net, x))) + x),
    "sum, the other way round": lambda net, x: net.grid(F.relu(x + net.gone(net.conv("b", behind(net, x))))),
    "two convolutions": lambda net, x: net.grid(net.grid(net.conv("a", x)) + net.gone(net.conv("b", x))),
    "two convolutions, the later first": lambda net, x: net.grid(
        (lambda early: net.gone(net.conv("b", x)) + early)(net.grid(net.conv("a", x)))
    ),
    "a chain": lambda net, x: net.grid(
        (lambda y: net.gone(net.conv("c", behind(net, y))) + y)(
            net.grid(F.relu(net.gone(net.conv("b", behind(net, x))) + x))
        )
    ),
    "hardswish": lambda net, x: net.grid(F.hardswish(net.gone(net.conv("a", x)))),
    "silu": lambda net, x: net.grid(F.silu(net.gone(net.conv("a", x)))),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_the_kernel_rounds_once(name: str) -> None:
    rounded, once = program(LEFT_OUT[name]), program(LEFT_OUT[name], once=True)
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    before = rounded.fingerprint()
    changed = with_post_ops(rounded)
    changed.verify()
    assert rounded.fingerprint() == before
    assert roundings(changed) == roundings(once) < roundings(rounded)
    assert torch.equal(changed.run(x)[0], once.run(x)[0])
    assert not torch.equal(rounded.run(x)[0], once.run(x)[0])
    assert with_post_ops(changed) is changed


def _read_later(net: Net, x: Tensor) -> Tensor:
    return net.grid(net.grid(F.relu(net.grid(net.conv("b", behind(net, x))) + x)) - x)


def _read_beside(net: Net, x: Tensor) -> Tensor:
    """The convolution `c` reads what is added to `b`, and does not lead there."""
    return net.grid(net.grid(net.conv("b", behind(net, x))) + x) * net.conv("c", x)


def _read_twice(net: Net, x: Tensor) -> Tensor:
    found = net.grid(net.conv("b", behind(net, x)))
    return net.grid(found + x) * found


def _activated_twice(net: Net, x: Tensor) -> Tensor:
    found = F.hardswish(net.grid(net.conv("a", x)))
    return net.grid(found) * found.mean()


def _with_itself(net: Net, x: Tensor) -> Tensor:
    found = net.grid(net.conv("a", x))
    return net.grid(found + found)


STAYS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "the other operand is read later": _read_later,
    "the other operand is read beside": _read_beside,
    "it is what the convolution reads": lambda net, x: net.grid(net.grid(net.conv("a", x)) + x),
    "the result is read twice": _read_twice,
    "other shapes": lambda net, x: net.grid(
        net.grid(net.conv("b", behind(net, x))) + net.grid(x.mean((2, 3), keepdim=True))
    ),
    "the sum is not rounded": lambda net, x: net.grid(net.conv("b", behind(net, x))) + x,
    "what is added is not rounded": lambda net, x: net.grid(net.grid(net.conv("b", behind(net, x))) + x.tanh()),
    "a factor": lambda net, x: net.grid(torch.add(net.grid(net.conv("b", behind(net, x))), x, alpha=2)),
    "another activation": lambda net, x: net.grid(F.relu6(net.grid(net.conv("b", behind(net, x))) + x)),
    "with itself": _with_itself,
    "an activation that is not rounded": lambda net, x: F.silu(net.grid(net.conv("a", x))),
    "an activation that is read twice": _activated_twice,
    "a convolution of floats": lambda net, x: net.grid(
        F.hardswish(net.grid(F.conv2d(behind(net, x), torch.ones(4, 4, 1, 1))))
    ),
    "none": lambda net, x: net.conv("a", x),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_a_kernel_cannot_do_stays(name: str) -> None:
    found = program(STAYS[name])
    assert with_post_ops(found) is found
