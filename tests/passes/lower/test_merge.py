"""MergeConstants: equal constants become one; nearly equal ones do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.api import rewrite
from fxfreeze.capture import capture
from fxfreeze.constants import Recipe
from fxfreeze.passes.lower.merge import MergeConstants
from fxfreeze.pipeline import run_passes
from fxfreeze.program import Fold, Program
from fxfreeze.rewrite import Context

BIG = 2048


class Sum(nn.Module):
    def __init__(self, *constants: Tensor) -> None:
        super().__init__()
        for index, value in enumerate(constants):
            self.register_buffer(f"c{index}", value)

    def forward(self, x: Tensor) -> Tensor:
        return sum((x.sum() * value.sum().float() for value in self.buffers()), x)


def merge(*constants: Tensor, prepare: Any = None) -> Program:
    plan = fz.Plan(inputs=[fz.Input("x", shape=("batch", 2))])
    program, _ = capture(Sum(*constants), plan)
    if prepare:
        prepare(program)
    run_passes(program, [MergeConstants()], Context(plan))
    return program


def test_equal_bits_are_merged() -> None:
    value = torch.randn(BIG)
    program = merge(value, value.clone(), value.reshape(-1, 2).t().contiguous().t().reshape(-1))
    assert list(program.state) == ["c0"]


def test_one_different_number_keeps_them_apart() -> None:
    value = torch.randn(BIG)
    other = value.clone()
    other[1234] += 1e-6
    assert len(merge(value, other).state) == 2


def test_bits_count_not_values() -> None:
    zero, nan = torch.zeros(BIG), torch.full((BIG,), 1.0)
    nan[7] = float("nan")
    assert len(merge(zero, -zero).state) == 2
    plan = fz.Plan(inputs=[fz.Input("x", shape=("batch", 2))])
    program, _ = capture(Sum(zero, zero.clone()), plan)
    program.state["c0"], program.state["c1"] = nan, nan.clone()
    assert MergeConstants().run(program, Context(plan)) == 1


def test_shape_and_dtype_count() -> None:
    zero = torch.zeros(BIG)
    assert len(merge(zero, zero.reshape(2, -1), zero.double(), zero.int(), zero.half()).state) == 5


def test_the_storage_dtype_counts_before_rounding() -> None:
    def lift(program: Program) -> None:
        program.state.update({name: value.double() for name, value in program.state.items()})

    assert len(merge(torch.zeros(BIG), torch.zeros(BIG).half(), prepare=lift).state) == 2
    assert len(merge(torch.zeros(BIG), torch.zeros(BIG), prepare=lift).state) == 1


def test_small_ones_and_measured_ones_stay() -> None:
    assert len(merge(torch.zeros(8), torch.zeros(8)).state) == 2

    def folded(program: Program) -> None:
        program.folds["c0"] = Fold("lora", "c0", Recipe(torch.zeros(BIG)), 0.5)

    program = merge(torch.zeros(BIG), torch.zeros(BIG), torch.zeros(BIG), prepare=folded)
    assert set(program.state) == {"c0", "c1"} and "c0" in program.folds


def test_adapters_that_rows_select_stay_apart() -> None:
    """Equal while none is trained, they are filled up one by one later on."""
    size = 512
    model = nn.Sequential(nn.Linear(size, size), nn.Linear(size, size)).eval()
    plan = fz.Plan([fz.Input("x", shape=("batch", size))], [fz.LoRA(at=["0", "1"], rank=2, adapters=1)])
    net = fz.adapt(model, plan, verify="off")
    done = rewrite(net, plan, verify="off")
    names = {str(node.target) for node in done.program.graph.nodes if node.op == "get_attr"}
    same = {f"adapters.lora.{site}.lora_B" for site in "01"}
    assert same <= names and all(done.program.state[name].nbytes >= 4096 for name in same)
    assert torch.equal(*(done.program.state[name] for name in same))
