"""An operator with a form in C++: kept for AOTInductor where it serves, and compiled into the package."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from fxfreeze import Dim, Input, Plan
from fxfreeze.capture import capture
from fxfreeze.emit import aoti
from fxfreeze.kernels._op import OPS
from fxfreeze.kernels.block_sparse import compress
from fxfreeze.kernels.winograd import TILES, pack
from fxfreeze.lower import Lowering, shims

KERNEL = OPS["tversky_frozen"]


class Head(nn.Module):
    def __init__(self, **kind):
        super().__init__()
        torch.manual_seed(0)
        measures = torch.randn(37, 1000)
        self.register_buffer("features", torch.randn(37, 6))
        self.register_buffer("measures", measures)
        self.register_buffer("totals", measures.clamp_min(0).sum(0))
        for name, value in (("theta", 1.3), ("alpha", 0.4), ("beta", 0.7)):
            self.register_buffer(name, torch.tensor(value))
        kind = {"intersection": "min", "semantics": "aggregate", **kind}
        self.kind = {"model": "contrast", "difference": "subtractmatch", **kind}

    def forward(self, x):
        weights = (self.measures, self.totals, self.theta, self.alpha, self.beta)
        return torch.ops.fxfreeze.tversky_frozen(x @ self.features.T, *weights, **self.kind)


class Gated(Head):
    """More operators in the same package. One has a neuron with an infinite weight, of which a dense product makes NaN
    where it does not fire."""

    def __init__(self):
        super().__init__()
        self.register_buffer("down", torch.randn(6, 50))
        self.register_buffer("infinite", self.down.index_fill(0, torch.tensor(5), float("inf")))
        self.register_buffer("bias", torch.randn(50))
        for name, value in zip(("tiles", "crow", "col"), compress(torch.randn(50, 6).triu(-15), 4, 16)):
            self.register_buffer(name, value)
        for name, size in (("window", (20, 6, 3, 3)), ("plane", (6, 9, 7)), ("shift", (20,))):
            self.register_buffer(name, torch.randn(size))
        for tile in TILES:
            self.register_buffer(f"filters{tile}", pack(self.window, tile))

    def convolutions(self, x):
        """Of planes; in tiles of both sizes, the second behind the first."""
        planes = x[:, :, None, None] * self.plane
        how = {"out_channels": 20, "padding": [1, 1]}
        first = torch.ops.fxfreeze.winograd(planes, self.filters2, self.shift, None, tile=2, relu=True, **how)
        return torch.ops.fxfreeze.winograd(planes, self.filters4, None, first, tile=4, **how)

    def forward(self, x):
        h = x.relu()
        finite = torch.ops.fxfreeze.sparse_down(h, self.down, self.bias, crossover=0.5)
        tiled = torch.ops.fxfreeze.block_sparse(x, self.tiles, self.crow, self.col, self.bias, out_features=50)
        return (
            super().forward(x),
            finite,
            tiled,
            self.convolutions(x),
            torch.ops.fxfreeze.sparse_down(h, self.infinite, crossover=0.5),
        )


def lowered(largest=8, shape=("n", 6), model=Head, **kind):
    dims = {"n": Dim(max=largest)} if largest else {}
    return Lowering(capture(model(**kind).eval(), Plan(inputs=[Input("x", shape=shape)], dims=dims))[0])


def ours(exported):
    return [str(node.target) for node in exported.graph.nodes if "fxfreeze" in str(node.target)]


@pytest.mark.parametrize(
    ("largest", "shape", "kind", "kept"),
    [
        (16, ("n", 6), {}, True),
        (17, ("n", 6), {}, False),
        (None, ("n", 6), {}, False),
        (8, ("n", 2, 6), {}, True),
        (9, ("n", 2, 6), {}, False),
        (8, ("n", 6), {"intersection": "softmin"}, True),
        (8, ("n", 6), {"intersection": "softmin", "semantics": "per_feature"}, False),
    ],
    ids=str,
)
def test_it_is_kept_where_it_serves(largest, shape, kind, kept):
    lowering = lowered(largest, shape, **kind)
    assert ours(lowering.native) == (["fxfreeze.tversky_frozen_native.default"] if kept else [])
    assert list(shims(lowering.native)) == ([KERNEL.native_op] if kept else [])
    assert ours(lowering.exported) == []
    for n in (1, 3):
        x = torch.randn(n, *(size for size in shape if isinstance(size, int)))
        (found,), want = lowering.native.module()(x), Head(**kind)(x)
        assert (found - want).abs().max() < 1e-6 * want.abs().max()


def test_without_such_an_operator_there_is_one_export():
    lowering = Lowering(capture(nn.Linear(6, 2).eval(), Plan(inputs=[Input("x", shape=("n", 6))]))[0])
    assert lowering.native is lowering.exported


def test_sparse_products_are_kept_where_they_serve():
    lowering = lowered(model=Gated)
    down, tiled = OPS["sparse_down"], OPS["block_sparse"]
    windows = OPS["winograd"]
    assert set(shims(lowering.native)) == {kernel.native_op for kernel in (KERNEL, down, tiled, windows)}
    assert ours(lowering.native).count(str(windows.native_op)) == 2
    assert ours(lowering.native).count(str(down.native_op)) == 2
    assert ours(lowering.native).count(str(tiled.native_op)) == 1
    assert ours(lowering.exported) == []


@pytest.mark.slow
def test_a_package_runs_without_us(tmp_path):
    """A dynamic batch, in a process that cannot import fxfreeze."""
    aoti.emit(lowered(model=Gated), tmp_path)
    few = torch.tensor([[0.5, -1.0, -2.0, 0.7, -0.1, -0.3]])  # 2 values above 0; 3 are as many as the sparse form takes
    inputs = [few, torch.cat([few, -few.abs()]), torch.cat([few, few])]
    inputs += [torch.randn(n, 6) for n in (1, 2, 8)]
    inputs[-1][:, 5] = -1.0
    torch.save([inputs, [Gated()(x) for x in inputs]], tmp_path / "cases.pt")
    code = textwrap.dedent("""
        import sys, torch
        sys.modules["fxfreeze"] = None
        inputs, want = torch.load("cases.pt")
        model = torch._inductor.aoti_load_package("model.pt2")
        found = [model(x) for x in inputs]
        pairs = [(one, other) for ours, theirs in zip(found, want) for one, other in zip(ours[:4], theirs)]
        print(max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs))
        print(*(int(row[4].isfinite().all()) - int(row[4].isnan().all()) for row in found), sep=",")
        print(any(name.startswith("fxfreeze") and sys.modules[name] for name in sys.modules))
        for name in ("tversky_frozen_native", "sparse_down_native", "block_sparse_native", "winograd_native"):
            assert not hasattr(torch.ops.fxfreeze, name)
    """)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    error, sparse, imported = done.stdout.split()
    assert float(error) < 1e-6 and imported == "False"
    # Where the last neuron fires the result is infinite in any case.
    assert sparse.split(",")[:3] == ["1", "1", "-1"] and sparse.split(",")[-1] == "-1"
