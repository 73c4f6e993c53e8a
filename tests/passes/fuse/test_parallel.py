"""Stacking layers that read the same value: the same function, only where it is faster, and never where it must not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.capture import capture
from fxfreeze.errors import ProofError
from fxfreeze.nn import Dendrites
from fxfreeze.passes import PIPELINE
from fxfreeze.passes.fuse import parallel as module
from fxfreeze.passes.fuse.parallel import Layer, MergeParallel
from fxfreeze.pipeline import run_passes, stage_passes
from fxfreeze.program import Program
from fxfreeze.rewrite import Context, LedgerRow

aten = torch.ops.aten
LINEAR, CONV, NORM = (str(op) for op in (aten.linear.default, aten.conv2d.default, aten.batch_norm.default))


class Net(nn.Module):
    def __init__(self, function: Callable[[Net, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def pretend(*times: tuple[float, float]) -> MergeParallel:
    """The pass with a clock that shows `times`, the last ones again and again; default: stacks are faster."""
    given = times or ((1e-3, 2e-3),)
    return MergeParallel(lambda layer: [given[min(at, len(given) - 1)] for at in range(len(layer.sizes))])


def merged(
    model: nn.Module, shape: tuple[Any, ...], *steps: Any, dtype: str = "float32"
) -> tuple[Program, list[LedgerRow]]:
    """The program after the passes, which proved them, compared with the model, and the pass's rows."""
    torch.manual_seed(1)
    plan = fz.Plan(inputs=[fz.Input("x", shape=shape, dtype=dtype)])
    program, _ = capture(model.eval(), plan)
    ctx = Context(plan)
    run_passes(program, steps or [pretend()], ctx)
    x = torch.randn([4 if isinstance(size, str) else size for size in shape], dtype=getattr(torch, dtype))
    want = model(x)
    for found, one in zip(program.run(x), want if isinstance(want, tuple) else (want,), strict=True):
        torch.testing.assert_close(found, one, rtol=1e-4, atol=1e-5)
    return program, [row for row in ctx.ledger if row.pass_name == "merge-parallel"]


def count(program: Program, name: str) -> int:
    return sum(str(node.target) == name for node in program.graph.nodes)


def attention(bias: bool = True) -> Net:
    def function(net: Net, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], 2, 3).transpose(1, 2) for layer in (net.q, net.k, net.v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    return Net(function, q=nn.Linear(6, 6), k=nn.Linear(6, 6, bias=bias), v=nn.Linear(6, 6))


@pytest.mark.parametrize("bias", [True, False], ids=["biases", "one without"])
def test_queries_keys_and_values(bias: bool) -> None:
    program, (row,) = merged(attention(bias), ("batch", 5, 6))
    assert count(program, LINEAR) == 1 and count(program, str(aten.split_with_sizes.default)) == 1
    assert row.requested == "one layer for q, k, v" and row.outcome == "rewritten"
    assert row.detail == "1×6: 1 ms against 2; 512×6: 1 ms against 2"
    (node,) = program.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert node.args[1].meta["val"].shape == (18, 6)


def test_layers_of_different_widths_in_graph_order() -> None:
    def function(net: Net, x: Tensor) -> Any:
        return net.b(x), net.a(x), net.c(x).relu()

    program, _ = merged(Net(function, a=nn.Linear(4, 3), b=nn.Linear(4, 1), c=nn.Linear(4, 7)), ("batch", 4))
    (split,) = program.graph.find_nodes(op="call_function", target=aten.split_with_sizes.default)
    assert split.args[1] == [1, 3, 7]


@pytest.mark.parametrize("where", ["linear", "conv"])
def test_a_layer_and_its_dendrites_are_one_after_their_norms_are_folded(where: str) -> None:
    if where == "linear":
        base, shape = nn.Linear(6, 4), ("batch", 6)
    else:
        base, shape = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.BatchNorm2d(4)), ("batch", 3, 8, 8)
    layer = Dendrites(base)
    for _ in range(3):
        layer.grow()
        layer.adopt()
    for name, value in [*layer.named_parameters(), *layer.named_buffers()]:
        if value.is_floating_point():
            value.data = torch.rand(value.shape) + 0.1 if "var" in name else torch.randn(value.shape) / 2
    stages = stage_passes(PIPELINE, ["clean", "fold"])
    program, (row,) = merged(Net(lambda net, x: net.layer(x), layer=layer), shape, *stages, pretend())
    assert count(program, NORM) == 0 and count(program, LINEAR) + count(program, CONV) == 1
    assert row.requested.count(",") == 3


def test_only_what_is_alike_is_stacked() -> None:
    def function(net: Net, x: Tensor) -> Any:
        return net.a(x), net.b(x), net.strided(x), net.grouped(x), net.padded(x), net.wide(x), net.a2(x.relu())

    def conv(**how: Any) -> nn.Conv2d:
        return nn.Conv2d(4, 4, how.pop("size", 3), **how)

    layers = {"a": conv(), "b": conv(bias=False), "strided": conv(stride=2), "grouped": conv(groups=2),
              "padded": conv(padding=1), "wide": conv(size=1), "a2": conv()}  # fmt: skip
    program, (row,) = merged(Net(function, **layers), ("batch", 4, 6, 6))
    assert row.requested == "one layer for a, b" and count(program, CONV) == 6


def test_shared_and_computed_weights_stay() -> None:
    shared = nn.Linear(4, 4)

    def function(net: Net, x: Tensor) -> Any:
        return net.a(x), net.a(x.relu()), net.b(x), nn.functional.linear(x, net.b.weight + x.mean())

    program, rows = merged(Net(function, a=shared, b=nn.Linear(4, 4)), ("batch", 4))
    assert not rows and count(program, LINEAR) == 4


@pytest.mark.parametrize(
    ("times", "kept"),
    [
        ([(1.0, 1.0)], False),
        ([(0.97, 1.0)], False),
        ([(0.5, 1.0), (1.1, 1.0)], False),
        ([(0.5, 1.0), (1.0, 1.0)], True),
        ([(1.0, 1.0), (0.9, 1.0)], True),
    ],
)
def test_it_is_kept_only_where_it_is_faster(times: list[tuple[float, float]], kept: bool) -> None:
    program, (row,) = merged(attention(), ("batch", 5, 6), pretend(*times))
    assert count(program, LINEAR) == (1 if kept else 3)
    assert row.outcome == ("rewritten" if kept else "skipped")
    if not kept:
        assert row.executes == "3 times aten.linear.default"


def test_what_is_timed() -> None:
    seen: list[Layer] = []

    def look(layer: Layer) -> list[tuple[float, float]]:
        seen.append(layer)
        return [(2.0, 1.0)] * len(layer.sizes)

    merged(attention(), ("batch", 5, 6), MergeParallel(look))
    merged(attention(), (2, 5, 6), MergeParallel(look))
    conv = Net(lambda net, x: (net.a(x), net.b(x)), a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 8, 3, bias=False))
    merged(conv, ("batch", 3, 32, 32), MergeParallel(look))
    assert [layer.sizes for layer in seen] == [
        ((1, 6), (512, 6)),
        ((16, 6),),
        ((1, 3, 32, 32), (512, 3, 32, 32)),
    ]
    assert seen[2].shapes == ((4, 3, 3, 3), (8, 3, 3, 3)) and dict(seen[2].how)["stride"] == (1, 1)


def test_the_clock_runs() -> None:
    linear = Layer(aten.linear.default, ((3, 4), (2, 4)), False, (), ((1, 4), (8, 4)), torch.float32,
                   torch.device("cpu"))  # fmt: skip
    conv = Layer(aten.conv2d.default, ((3, 2, 3, 3), (1, 2, 3, 3)), True, (("stride", (1, 1)),), ((1, 2, 5, 5),),
                 torch.float32, torch.device("cpu"))  # fmt: skip
    for layer in (linear, conv):
        times = module.measured(layer)
        assert len(times) == len(layer.sizes) and all(min(pair) > 0 for pair in times)


def test_folded_adapters_are_measured_in_the_stack() -> None:
    model = attention().eval()
    plan = fz.Plan(inputs=[fz.Input("x", shape=("batch", 5, 6))], steps=[fz.LoRA(at=["q", "v"], rank=2)])
    adapted = fz.adapt(model, plan)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape)
    program, ctx = adapted.program(), Context(plan)
    fold, lower = (stage_passes(PIPELINE, [stage]) for stage in ("fold", "lower"))
    run_passes(program, [*fold, pretend(), *lower], ctx)
    x = torch.randn(4, 5, 6)
    torch.testing.assert_close(program.run(x)[0], adapted(x), rtol=1e-4, atol=1e-5)
    (row,) = [row for row in ctx.ledger if row.requested == "fold" and row.outcome == "measured"]
    assert row.executes == "float32 constant q.stacked_weight" and "of the change is lost" in row.detail


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("_rows", lambda rows: lambda parts: rows(parts[::-1])),
        ("_stacked", lambda stacked: lambda *args: stacked(*args[:2], args[2][:1] * len(args[2]), args[3])),
    ],
)  # fmt: skip
def test_the_proof_rejects_a_wrong_stack(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any) -> None:
    monkeypatch.setattr(module, name, wrong(getattr(module, name)))
    with pytest.raises(ProofError, match="merge-parallel"):
        merged(attention(), ("batch", 5, 6))
