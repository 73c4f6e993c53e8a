"""Attention with other than four dims: rewritten, proven, and taken by the ONNX converter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import fxfreeze as fz
from fxfreeze.capture import capture
from fxfreeze.passes.clean.attention import FourDimAttention
from fxfreeze.pipeline import run_passes
from fxfreeze.program import Program
from fxfreeze.rewrite import Context


class Attention(nn.Module):
    def __init__(self, mask: tuple[int, ...] | None = None, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mask = None if mask is None else nn.Parameter(torch.randn(mask))
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        return scaled_dot_product_attention(x, x.flip(-1), x * 2, attn_mask=self.mask, **self.options)


def rewritten(model: nn.Module, *shape: int | str) -> tuple[Program, int]:
    plan = fz.Plan(inputs=[fz.Input("x", shape=shape)])
    program, _ = capture(model.eval(), plan)
    rows, _ = run_passes(program, [FourDimAttention()], Context(plan))
    return program, rows[0].rewrites


def ranks(program: Program) -> set[int]:
    return {node.args[0].meta["val"].ndim for node in program.graph.nodes if "scaled_dot" in str(node.target)}


@pytest.mark.parametrize("shape", [("batch", 3, 2, 5, 4), ("batch", 2, 3, 2, 5, 4), ("batch", 5, 4)])
@pytest.mark.parametrize(
    ("mask", "options"),
    [(None, {}), ((5, 5), {"scale": 0.3}), ((2, 1, 5), {}), (None, {"is_causal": True})],
    ids=["plain", "scale", "broadcast", "causal"],
)
def test_other_ranks_become_four(shape: tuple[Any, ...], mask: tuple[int, ...] | None, options: dict[str, Any]) -> None:
    if len(shape) == 3 and mask is not None and len(mask) == 3:
        mask = (1, *mask[1:])
    program, count = rewritten(Attention(mask, **options), *shape)
    assert count == 1 and ranks(program) == {4}


def test_four_dims_stay_as_they_are() -> None:
    program, count = rewritten(Attention(), "batch", 2, 5, 4)
    assert count == 0 and ranks(program) == {4}


def test_broadcast_operands_are_left_alone() -> None:
    class Shared(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return scaled_dot_product_attention(x, x[:, :1], x[:, :1])

    program, count = rewritten(Shared(), "batch", 3, 2, 5, 4)
    assert count == 0 and ranks(program) == {5}


def test_onnx_takes_attention_over_windows() -> None:
    plan = fz.Plan(inputs=[fz.Input("x", shape=("batch", 3, 2, 5, 4))], targets=["onnx"])
    artifact = fz.compile(Attention((3, 1, 5, 5)).eval(), plan)
    assert all(row["ok"] for row in artifact.manifest["parity"])
