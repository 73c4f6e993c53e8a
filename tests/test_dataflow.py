"""Passages: what is said of every operator, f(γ·x + β) = γ·f(x) + β along its dims, is true of its numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

import fxfreeze as fz
from fxfreeze.capture import capture
from fxfreeze.dataflow import passage, reshape_blocks

F = nn.functional

PASSING: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky": lambda x: F.leaky_relu(x, -0.2),
    "prelu": lambda x: F.prelu(x, torch.linspace(-1, 1, 3)),
    "max1": lambda x: F.max_pool1d(x.flatten(2), 3, padding=1),
    "max2": lambda x: F.max_pool2d(x, 2, ceil_mode=True),
    "max3": lambda x: F.max_pool3d(x, 2),
    "avg1": lambda x: F.avg_pool1d(x.flatten(0, 1), 2, padding=1),
    "avg2": lambda x: F.avg_pool2d(x, 3, padding=1),
    "avg3": lambda x: F.avg_pool3d(x, 2, divisor_override=3),
    "adaptive1": lambda x: F.adaptive_avg_pool1d(x.flatten(2), 3),
    "adaptive2": lambda x: F.adaptive_avg_pool2d(x, (1, 3)),
    "adaptive3": lambda x: F.adaptive_avg_pool3d(x, 2),
    "mean": lambda x: x.mean((-1, 2)),
    "mean_keep": lambda x: x.mean((2, 3), keepdim=True),
    "permute": lambda x: x.permute(0, 3, 1, 2),
    "transpose": lambda x: x.transpose(1, -1),
    "flatten": lambda x: x.flatten(2),
    "reshape": lambda x: x.reshape(-1, 3, 2, 10),
    "unsqueeze": lambda x: x.unsqueeze(2),
    "squeeze": lambda x: x[:, :, :1].squeeze(2),
    "unflatten": lambda x: x.unflatten(3, (1, 5)),
}

MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "relu6": F.relu6,
    "softmax": lambda x: x.softmax(1),
    "gelu": F.gelu,
    "norm": lambda x: F.layer_norm(x, (5,)),
    "pool_dim": lambda x: F.max_pool2d(x.transpose(1, 3), 2),
    "mean_channels": lambda x: x.mean(1),
    "mixed": lambda x: x.transpose(1, 2).reshape(-1, 3, 4, 5),
    "merged": lambda x: x.reshape(-1, 60),
}
"""Operators (the last one of each) without a passage for dim 1 of x."""


SYMBOLIC: dict[str, Callable[[Tensor], Tensor]] = {
    "merged": lambda x: x.flatten(0, 1),
    "split": lambda x: x.flatten(0, 1).unflatten(0, (-1, 3)),
    "all": lambda x: x.flatten(),
}


class Each(nn.Module):
    def __init__(self, functions: dict[str, Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: function(x.sin()) for name, function in self.functions.items()}


def last_nodes(functions: dict[str, Callable[[Tensor], Tensor]]) -> dict[str, Node]:
    program, _ = capture(Each(functions), fz.Plan(inputs=[fz.Input("x", shape=("batch", 3, 4, 5))]))
    return dict(zip(functions, program.output_nodes, strict=True))


@pytest.fixture(scope="module")
def passing() -> dict[str, Node]:
    return last_nodes(PASSING)


def concrete(value: Tensor) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else 2 for size in value.shape)


def run(node: Node, value: Tensor) -> Tensor:
    rest = [torch.linspace(-1, 1, 3) if isinstance(arg, Node) else arg for arg in node.args[1:]]
    return node.target(value, *rest, **node.kwargs)  # type: ignore[operator]


@pytest.mark.parametrize("name", PASSING)
def test_what_a_passage_says_is_true(name: str, passing: dict[str, Node]) -> None:
    node = passing[name]
    way = passage(node)
    assert way is not None and way.dims
    operand: Node = node.args[0]  # type: ignore[assignment]
    # The symbolic sizes of the trace may be products; take the operand's from a real one.
    x = torch.randn(concrete(operand.meta["val"]))
    plain = run(node, x)
    for result_dim, operand_dim in way.dims.items():
        channels = x.shape[operand_dim]
        assert plain.shape[result_dim] == channels
        gain, shift = torch.rand(channels) + 0.2, torch.randn(channels)
        if not way.positive:
            gain = gain * torch.tensor([1.0, -1.0]).repeat(channels)[:channels]
        if not way.shift:
            shift = torch.zeros(channels)
        along = [1] * x.ndim
        along[operand_dim] = channels
        outward = [1] * plain.ndim
        outward[result_dim] = channels
        moved = run(node, x * gain.reshape(along) + shift.reshape(along))
        torch.testing.assert_close(moved, plain * gain.reshape(outward) + shift.reshape(outward), rtol=1e-5, atol=1e-5)


def test_channels_are_found_on_both_sides(passing: dict[str, Node]) -> None:
    way = passage(passing["permute"])
    assert way is not None and way.to_operand(-2) == -3 and way.to_result(-3) == -2
    way = passage(passing["flatten"])
    assert way is not None and way.to_result(-3) == -2 and way.to_result(-1) is None
    way = passage(passing["mean"])
    assert way is not None and way.to_result(-3) == -1 and way.to_result(-1) is None


def test_what_mixes_channels_has_none() -> None:
    for name, node in last_nodes(MIXING).items():
        way = passage(node)
        assert way is None or way.to_result(-3 if name != "pool_dim" else -1) is None, name


def test_only_operators_have_one(passing: dict[str, Node]) -> None:
    graph = passing["relu"].graph
    assert all(passage(node) is None for node in graph.nodes if node.op != "call_function")


@pytest.mark.parametrize("before, after, blocks", [
    ((2, 3, 4), (6, 4), [("01", "0"), ("2", "1")]),
    ((5, 12, 7), (5, 3, 4, 7), [("0", "0"), ("1", "12"), ("2", "3")]),
    ((2, 12, 6), (2, 4, 18), [("0", "0"), ("12", "12")]),
    ((8,), (2, 4), [("0", "01")]), ((3, 1, 4), (3, 4), [("0", "0"), ("2", "1")]),
    ((2, 3), (1, 6, 1), [("01", "1")]),
    ((4, 6, 5), (4, 2, 15), [("0", "0"), ("12", "12")]), ((0, 3), (3, 0), None),
])  # fmt: skip
def test_a_reshape_takes_dims_in_blocks(before: tuple[int, ...], after: tuple[int, ...], blocks: Any) -> None:
    def full(block: tuple[Any, Any]) -> list[list[int]]:
        """Without dims of one entry, which may be in any block."""
        return [[at for at in map(int, part) if shape[at] != 1] for part, shape in zip(block, (before, after))]

    found = reshape_blocks(before, after)
    if blocks is None or found is None:
        assert found is blocks
    else:
        assert [full(block) for block in found if any(full(block))] == [full(block) for block in blocks]


def test_a_reshape_of_symbolic_sizes_takes_what_is_the_same() -> None:
    shapes = {name: node.all_input_nodes[0].meta["val"].shape for name, node in last_nodes(SYMBOLIC).items()}
    results = {name: node.meta["val"].shape for name, node in last_nodes(SYMBOLIC).items()}
    blocks = {name: reshape_blocks(shapes[name], results[name]) for name in shapes}
    said = {name: [tuple(map(len, block)) for block in found or []] for name, found in blocks.items()}
    assert said == {"merged": [(2, 1), (1, 1), (1, 1)], "split": [(1, 2), (1, 1), (1, 1)], "all": [(4, 1)]}
