"""ExplicitShapes: a shape borrowed from another value becomes numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.capture import capture
from fxfreeze.passes.clean.shapes import ExplicitShapes
from fxfreeze.pipeline import run_passes
from fxfreeze.program import Program
from fxfreeze.rewrite import Context


def rewrite(function: Any, *inputs: fz.Input) -> tuple[Program, int]:
    class Fn(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return function(x, y)

    plan = fz.Plan(inputs=inputs)
    program, _ = capture(Fn(), plan)
    rows, _ = run_passes(program, [ExplicitShapes()], Context(plan))
    return program, rows[0].rewrites


def borrowed(program: Program) -> bool:
    return any(str(node.target).endswith("_as.default") for node in program.graph.nodes)


X, Y = fz.Input("x", shape=("batch", 6)), fz.Input("y", shape=("batch", 2, 3))


def test_one_symbolic_size_becomes_minus_one() -> None:
    program, count = rewrite(lambda x, y: x.reshape_as(y) * x.view_as(y), X, Y)
    assert count >= 1 and not borrowed(program)
    assert program.run(torch.ones(5, 6), torch.ones(5, 2, 3))[0].shape == (5, 2, 3)


def test_expand_keeps_what_is_symbolic_already() -> None:
    one = fz.Input("x", shape=("batch", 1, 3))
    program, count = rewrite(lambda x, y: x.sin().expand_as(y), one, Y)
    assert count == 1 and not borrowed(program)
    assert program.run(torch.ones(5, 1, 3), torch.ones(5, 2, 3))[0].shape == (5, 2, 3)


def test_what_numbers_cannot_say_stays() -> None:
    program, count = rewrite(
        lambda x, y: x.reshape_as(y), fz.Input("x", shape=("a", "b")), fz.Input("y", shape=("a", "b"))
    )
    assert count == 0 and borrowed(program)
    for shape in ((2, 3), (1, 2, 3)):  # a dim that is new, or grows
        program, count = rewrite(lambda x, y: x.expand_as(y), fz.Input("x", shape=shape), Y)
        assert count == 0 and borrowed(program)
