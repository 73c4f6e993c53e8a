"""StripNoOps: what goes, what stays, and that nothing else changes, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.capture import capture
from fxfreeze.passes.clean.noops import StripNoOps
from fxfreeze.pipeline import run_passes
from fxfreeze.program import Program
from fxfreeze.rewrite import Context

F = nn.functional
X = fz.Input("x", shape=("batch", 3, 4))


class Fn(nn.Module):
    def __init__(self, function: Callable[..., Tensor | tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.function = function
        self.table = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.function(self, x)


def strip(function: Callable[..., Tensor | tuple[Tensor, ...]], spec: fz.Input = X) -> tuple[Program, int]:
    plan = fz.Plan(inputs=[spec])
    program, _ = capture(Fn(function), plan)
    rows, _ = run_passes(program, [StripNoOps()], Context(plan))
    return program, rows[0].rewrites


def operators(program: Program) -> list[str]:
    return [str(node.target).split(".")[1] for node in program.graph.nodes if node.op == "call_function"]


NOOPS: list[Callable[[Fn, Tensor], Tensor]] = [
    lambda m, x: F.dropout(x, 0.5, False),
    lambda m, x: F.dropout(x, 0.0, True),
    lambda m, x: F.alpha_dropout(x, 0.5, False),
    lambda m, x: F.feature_alpha_dropout(x, 0.5, False),
    lambda m, x: F.dropout1d(x, 0.5, False),
    lambda m, x: x.detach(),
    lambda m, x: x.clone(),
    lambda m, x: x.contiguous(),
    lambda m, x: x.float(),
    lambda m, x: x.to(torch.float32, copy=True),
    lambda m, x: x.type_as(m.table),
    lambda m, x: x.to(m.table),
    lambda m, x: x.reshape(-1, 3, 4),
    lambda m, x: x.view(x.shape),
    lambda m, x: x.expand(-1, 3, 4),
    lambda m, x: x.flatten(2),
    lambda m, x: x[:, :3, :9],
    lambda m, x: x.permute(0, -2, 2),
    lambda m, x: x.transpose(-1, 2),
    lambda m, x: F.pad(x, (0, 0, 0, 0)),
    lambda m, x: torch.cat([x], 1),
    lambda m, x: x * 1,
    lambda m, x: 1.0 * x,
    lambda m, x: x / 1,
    lambda m, x: x - 0.0,
]

KEPT: dict[str, Callable[[Fn, Tensor], Tensor]] = {
    "dropout": lambda m, x: F.dropout(x, 0.5, True),
    "alpha_dropout": lambda m, x: F.alpha_dropout(x, 0.5, True),
    "to": lambda m, x: x.double(),
    "reshape": lambda m, x: x.reshape(-1, 4, 3),
    "slice": lambda m, x: x[:, ::2],
    "permute": lambda m, x: x.permute(0, 2, 1),
    "transpose": lambda m, x: x.transpose(1, 2),
    "expand": lambda m, x: x.expand(5, -1, 3, 4),
    "pad": lambda m, x: F.pad(x, (1, -1)),
    "cat": lambda m, x: torch.cat([x, x]),
    "add": lambda m, x: x + 0,  # turns −0 into +0
    "sub": lambda m, x: x - (-0.0),  # so does this
    "mul": lambda m, x: x * 1.0000001,
    "squeeze": lambda m, x: x.squeeze(),
}


def test_every_noop_goes() -> None:
    def chain(m: Fn, x: Tensor) -> Tensor:
        x = x.sin()
        for noop in NOOPS:
            x = noop(m, x)
        return x.cos()

    program, count = strip(chain)
    assert operators(program) == ["sin", "cos"] and count >= len(NOOPS) - 2  # some leave no trace in the export


def test_everything_else_stays() -> None:
    program, _ = strip(lambda m, x: tuple(keep(m, x.sin()).cos() for keep in KEPT.values()))
    assert sorted(set(operators(program)) - {"sin", "cos"}) == sorted(KEPT)


def test_integer_plus_zero_goes_but_a_promotion_stays() -> None:
    spec = fz.Input("x", shape=("batch",), dtype="int64", low=0, high=9)
    assert operators(strip(lambda m, x: (x.abs() + 0).neg(), spec)[0]) == ["abs", "neg"]
    assert operators(strip(lambda m, x: (x.abs() * 1.0).neg(), spec)[0]) == ["abs", "mul", "neg"]
    assert operators(strip(lambda m, x: (x.abs() / 1).neg(), spec)[0]) == ["abs", "div", "neg"]


def test_assertions_go_and_what_they_looked_at() -> None:
    def checked(m: Fn, x: Tensor) -> Tensor:
        torch._assert_async((x.sum() > -1e9), "finite")
        return x.sin()

    program, count = strip(checked)
    assert operators(program) == ["sin"] and count >= 1


def test_a_returned_copy_of_an_input_or_a_constant_stays() -> None:
    program, _ = strip(lambda m, x: (x.clone(), m.table.clone(), x.transpose(1, 2).clone(), x.sin().clone()))
    assert operators(program).count("clone") == 3
    results = program.run(x := torch.randn(2, 3, 4))
    for result in results:
        result.zero_()
    assert bool(x.any()) and bool(program.state["table"].any())


def test_a_copy_that_fixes_strides_stays() -> None:
    def rotate(m: Fn, x: Tensor) -> Tensor:
        pairs = x.sin().transpose(1, 2).contiguous().unsqueeze(0)  # last stride 1
        return torch.view_as_real(torch.view_as_complex(pairs))

    program, _ = strip(rotate, fz.Input("x", shape=("batch", 2, 4)))
    assert "contiguous" in operators(program)


def test_the_last_operand_keeps_its_layout_request() -> None:
    spec = fz.Input("x", shape=("batch", 3, 4, 4))
    program, _ = strip(lambda m, x: x.sin().contiguous(memory_format=torch.channels_last).cos(), spec)
    assert "contiguous" in operators(program)


def test_negative_zero_and_nan_survive_bit_for_bit() -> None:
    program, _ = strip(lambda m, x: (((x * 1) / 1 - 0.0).contiguous() + 0).reshape(-1, 3, 4))
    x = torch.tensor([-0.0, float("nan"), float("inf"), 1e-45]).expand(1, 3, 4).contiguous()
    model = lambda x: ((x * 1) / 1 - 0.0) + 0  # noqa: E731
    assert torch.equal(program.run(x)[0].view(torch.int32), model(x).view(torch.int32))
