"""Weights alone as integers, in torch.compile and AOTInductor: the bytes are read as they are."""

from __future__ import annotations

import zipfile
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.api import rewrite
from fxfreeze.capture import capture
from fxfreeze.emit import aoti
from fxfreeze.errors import EmitError
from fxfreeze.kernels.dequantize import KERNEL as DEQUANTIZE
from fxfreeze.kernels.quantized_linear import KERNEL
from fxfreeze.lower import Lowering
from fxfreeze.packed import executed, has_packed, with_packed
from fxfreeze.program import Program

ROWS, WIDTH, INNER = 200, 64, 96


class Product(nn.Module):
    """A weight stored [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(INNER, WIDTH) / 8), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, 1), self.weight).unflatten(0, x.shape[:2])


class Net(nn.Module):
    """A table that is an embedding and a head, and two layers between."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.second = nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, INNER), Product()
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, ROWS, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.head(self.norm(x + self.second(self.first(x).relu())))


LAYERS = {"table": "embedding", **dict.fromkeys(("first", "second", "head"), "quantized_linear")}


def plan(*targets: str, scheme: str = "int4-weight", granularity: str = "group:32", **given: Any) -> fz.Plan:
    step = fz.Quantize(scheme=scheme, granularity=granularity, **given)
    return fz.Plan([fz.Input("ids", ("batch", 5), dtype="int64", low=0, high=ROWS - 1)], [step], targets)


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def quantized(**given: Any) -> Program:
    return rewrite(net(), plan(**given)).program


def draw(batch: int = 3) -> Tensor:
    return torch.randint(0, ROWS, (batch, 5), generator=torch.Generator().manual_seed(batch))


GRANULARITY = {"int8-weight": "channel", "int4-weight": "group:32"}
SCHEMES = [("int8-weight", "channel"), ("int8-weight", "tensor"), ("int8-weight", "group:32"),
           ("int4-weight", "group:32"), ("int4-weight", "group:16")]  # fmt: skip


@pytest.mark.parametrize(("scheme", "granularity"), SCHEMES)
def test_the_function_stays(scheme: str, granularity: str) -> None:
    program = quantized(scheme=scheme, granularity=granularity)
    changed, ids = with_packed(program), draw()
    assert has_packed(program)
    torch.testing.assert_close(changed.run(ids)[0], program.run(ids)[0], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("scheme", "granularity"), SCHEMES[:-1])
def test_no_weight_becomes_floats(scheme: str, granularity: str) -> None:
    """Whatever is floating and as large as a table or a weight would be one, unpacked."""
    changed = with_packed(quantized(scheme=scheme, granularity=granularity))
    calls = [node for node in changed.graph.nodes if node.op == "call_function"]
    assert [node.target for node in calls].count(KERNEL.op) == 3
    assert not any(node.target is torch.ops.fxfreeze.dequantize.default for node in calls)
    shapes = [tuple(node.meta["val"].shape) for node in calls if isinstance(node.meta["val"], Tensor)]
    assert not any(shape[:1] in ((ROWS,), (WIDTH,), (INNER,)) for shape in shapes)


def test_four_bits_are_two_in_a_byte_and_a_tied_table_is_one() -> None:
    changed = with_packed(quantized())
    sizes = [value.numel() for value in map(changed.state.tensor, changed.state) if value.dtype == torch.int8]
    assert sorted(sizes) == sorted([ROWS * WIDTH // 2, WIDTH * INNER // 2, WIDTH * INNER // 2])


def test_groups_that_are_no_whole_chunks_stay_in_floats() -> None:
    program = quantized(granularity="group:16")
    assert set(executed(program).values()) == {"embedding"}
    with pytest.raises(EmitError, match=r"(?s)3 quantized layers would be computed in floats.*first: int4-weight"):
        fz.compile(net(), plan("torch", granularity="group:16"))


def test_a_layer_of_another_dtype_stays_in_floats() -> None:
    program = rewrite(net().double(), plan()).program
    assert set(executed(program).values()) == {"embedding"}
    torch.testing.assert_close(with_packed(program).run(draw())[0], program.run(draw())[0])


def test_what_is_no_weight_alone_is_left() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    given = fz.Plan([fz.Input("x", ("batch", WIDTH))], [fz.Quantize()], ())
    program = rewrite(Both().eval(), given).program
    assert not executed(program) and with_packed(program).structural_hash() == program.structural_hash()


@pytest.mark.parametrize(("dtype", "zero"), [(torch.float64, 0), (torch.float32, 3)])
def test_other_scales_and_zero_points_stay_as_they_are(dtype: torch.dtype, zero: int) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("values", torch.randint(-9, 9, (WIDTH, WIDTH), dtype=torch.int8))
            self.register_buffer("scale", torch.rand(WIDTH, dtype=dtype) + 0.1)
            self.register_buffer("zero", torch.full((WIDTH,), zero, dtype=torch.int8))

        def forward(self, x: Tensor) -> Tensor:
            weight = DEQUANTIZE.op(self.values, self.scale, self.zero, 0, 0, torch.float32)
            return nn.functional.linear(x, weight)

    program = capture(Odd().eval(), fz.Plan([fz.Input("x", ("batch", WIDTH))], targets=[]))[0]
    x = torch.randn(3, WIDTH)
    assert has_packed(program) and not executed(program)
    assert torch.equal(with_packed(program).run(x)[0], program.run(x)[0])


def test_fewer_calls_than_layers_are_no_proof() -> None:
    program = quantized()
    assert [len(executed(program, calls)) for calls in (0, 2, 3)] == [1, 1, 4]


def test_without_a_compiler_products_are_computed_in_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxfreeze.kernels._native.library", lambda name: None)
    assert set(executed(quantized()).values()) == {"embedding"}


def told(artifact: fz.Artifact, target: str) -> dict[str, str]:
    rows = [row for row in artifact.manifest["ledger"] if row["executes"].endswith(f"in {target}")]
    assert all(row["detail"] == "its weight is read as integers, sums are in floats" for row in rows)
    return {row["site"]: row["executes"].removeprefix("integer-executed by ").split()[0] for row in rows}


@pytest.mark.parametrize("scheme", ["int8-weight", "int4-weight"])
def test_torch_runs_them(scheme: str) -> None:
    artifact = fz.compile(net(), plan("torch", scheme=scheme, granularity=GRANULARITY[scheme]))
    assert told(artifact, "torch") == LAYERS
    for batch in (1, 20):
        (want,) = quantized(scheme=scheme, granularity=GRANULARITY[scheme]).run(draw(batch))
        torch.testing.assert_close(artifact(draw(batch)), want, rtol=1e-5, atol=2e-5)


@pytest.mark.slow
def test_aoti_holds_bytes_and_calls_the_cpp(tmp_path: Any) -> None:
    program = quantized()
    facts = aoti.emit(Lowering(program), tmp_path)
    assert [row[2] for row in facts["integer"]] == list(LAYERS.values())
    with zipfile.ZipFile(tmp_path / aoti.FILE) as archive:
        code = "".join(archive.read(name).decode() for name in archive.namelist() if name.endswith(".cpp"))
    assert code.count("AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_quantized_linear_native(") == 3
    assert f"{{{ROWS}L, {WIDTH}L}}" not in code  # no table of floats
