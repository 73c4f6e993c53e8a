"""CommonSubexpressions: the same work is done once; what only looks the same is not merged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.capture import capture
from fxfreeze.passes.clean.common import CommonSubexpressions
from fxfreeze.pipeline import run_passes
from fxfreeze.program import Program
from fxfreeze.rewrite import Context

F = nn.functional


def merge(model: nn.Module, **plan: Any) -> tuple[Program, int]:
    plan = fz.Plan(inputs=[fz.Input("x", shape=("batch", 4))], **plan)
    program, _ = capture(model, plan)
    rows, _ = run_passes(program, [CommonSubexpressions()], Context(plan))
    return program, rows[0].rewrites


def operators(program: Program) -> list[str]:
    return [
        str(getattr(node.target, "_opname", node.target)) for node in program.graph.nodes if node.op == "call_function"
    ]


class Fn(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.act, self.other = nn.ReLU(), nn.ReLU()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def test_equal_work_is_merged_transitively() -> None:
    program, count = merge(Fn(lambda m, x: (x.sin() + 1).cos() * (x.sin() + 1).cos() + m.fc(x) * m.fc(x)))
    assert sorted(operators(program)) == ["add", "add", "cos", "linear", "mul", "mul", "sin"] and count == 4


def test_numbers_are_told_apart() -> None:
    pairs = lambda m, x: (x.int() * 1, x.int() * 1.0, x.int() * True, x + 0.0, x + (-0.0))  # noqa: E731
    program, count = merge(Fn(pairs))
    assert operators(program).count("mul") == 3 and operators(program).count("add") == 2
    assert count == 2  # only the casts
    dtypes = [str(node.meta["val"].dtype) for node in program.output_nodes]
    assert dtypes == ["torch.int32", "torch.float32", "torch.int32", "torch.float32", "torch.float32"]


def test_random_numbers_stay_apart() -> None:
    program, count = merge(Fn(lambda m, x: F.dropout(x, 0.5, True) - F.dropout(x, 0.5, True) + torch.rand_like(x)))
    assert operators(program).count("dropout") == 2 and count == 0


def test_two_results_stay_two_tensors() -> None:
    program, count = merge(Fn(lambda m, x: (x.sin(), x.sin(), x.sin() + 1)))
    assert operators(program).count("sin") == 2 and count == 1
    first, second, third = program.run(torch.ones(1, 4))
    first.zero_()
    assert float(second[0, 0]) > 0.8 and float(third[0, 0]) > 1.8


def test_a_module_that_the_plan_addresses_keeps_its_nodes() -> None:
    both = lambda m, x: m.act(x) * 2 + m.other(x)  # noqa: E731
    program, count = merge(Fn(both))
    assert operators(program).count("relu") == 1 and count == 1
    program, count = merge(Fn(both), steps=[fz.LoRA(at="other", rank=1)])
    assert operators(program).count("relu") == 2 and count == 0
    assert "other" in program.module_paths()


def test_tied_parameters_are_one_constant() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) - self.b(x) + self.b(x.sin())

    program, _ = merge(Tied())
    assert operators(program).count("linear") == 2 and len(program.state) == 1


def test_sizes_are_merged() -> None:
    program, _ = merge(Fn(lambda m, x: x.new_ones(x.shape[0] + 1) * x.new_ones(x.shape[0] + 1).sin()))
    assert operators(program).count("new_ones") == 1
    assert program.run(torch.ones(6, 4))[0].shape == (7,)
