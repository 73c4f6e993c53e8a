"""fxfreeze.inline: plain torch functions as operators of a program."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.capture import capture
from fxfreeze.errors import PassError
from fxfreeze.inline import inline
from fxfreeze.program import Program


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x))


@pytest.fixture
def program() -> Program:
    torch.manual_seed(0)
    return capture(Net().eval(), fz.Plan(inputs=[fz.Input("x", shape=("batch", "length", 4))]))[0]


def node(program: Program, target: object) -> torch.fx.Node:
    return next(node for node in program.graph.nodes if node.target is target)


def put(program: Program, function: object) -> torch.fx.Node:
    relu = node(program, torch.ops.aten.relu.default)
    new = inline(program, function, relu.args[0], before=relu, like=relu)  # type: ignore[arg-type]
    program.replace(relu, new)
    program.sweep()
    program.verify()
    return new


def test_the_function_runs_in_the_graph_at_every_size(program: Program) -> None:
    def function(x: Tensor, slope: float = 0.5) -> Tensor:
        flat = x.flatten(0, 1)
        return nn.functional.linear(torch.where(flat > 0, flat, slope * flat), torch.eye(3)).reshape(x.shape)

    before = Net.forward
    new = put(program, function)
    assert [str(size) for size in new.meta["val"].shape] == [str(s) for s in program.placeholders[0].meta["val"].shape[
        :2]] + ["3"]  # fmt: skip
    assert before is Net.forward
    for batch, length in ((1, 2), (5, 3)):
        x = torch.randn(batch, length, 4)
        hidden = nn.functional.linear(x, program.state["body.weight"], program.state["body.bias"])
        torch.testing.assert_close(program.run(x)[0], nn.functional.leaky_relu(hidden, 0.5))


def test_composite_operators_stay_whole_and_come_from_where_the_old_one_did(program: Program) -> None:
    path = program.module_path(node(program, torch.ops.aten.relu.default))
    put(program, lambda x: nn.functional.gelu(x) @ torch.ones(3, 2))
    ours = [node for node in program.graph.nodes if node.op == "call_function"][1:]
    assert {"aten.gelu.default", "aten.matmul.default"} <= {str(node.target) for node in ours}
    assert {program.module_path(node) for node in ours} == {path}


def test_a_tensor_the_function_brings_along_becomes_a_constant(program: Program) -> None:
    table = torch.arange(3.0)
    put(program, lambda x: x + table)
    (name,) = [name for name in program.state if not name.startswith("body")]
    assert torch.equal(program.state[name], table)


def test_a_function_that_does_not_run_leaves_the_program_alone(program: Program) -> None:
    before = program.fingerprint()
    with pytest.raises(PassError, match="cannot be traced"):
        put(program, lambda x: x.reshape(7, 7))
    assert program.fingerprint() == before


def test_branching_on_values_is_refused(program: Program) -> None:
    with pytest.raises(PassError, match="cannot be traced"):
        put(program, lambda x: x if x.sum() > 0 else -x)
