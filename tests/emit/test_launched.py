"""Quantized layers on a GPU in torch.compile. That a program lies on one is data here; operators run as references."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze import artifact
from fxfreeze.api import rewrite
from fxfreeze.emit import torch_compile
from fxfreeze.errors import EmitError
from fxfreeze.kernels._op import OPS
from fxfreeze.launched import executed, has_launched, with_launched
from fxfreeze.lower import Lowering
from fxfreeze.nn import TverskyProjection
from fxfreeze.packed import executed as packed_executed
from fxfreeze.packed import with_packed
from fxfreeze.program import Program
from fxfreeze.serialize import Interface

WIDTH, INNER, ROWS = 64, 96, 50
BOTH, ALONE = OPS["integer_linear"].op, OPS["quantized_linear"].op


class Product(nn.Module):
    """A weight stored [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(INNER, WIDTH) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Net(nn.Module):
    """A linear layer with a bias, a product, one layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, WIDTH, bias=False)
        self.second = Product()

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu())
        return self.twice(self.twice(x).relu())


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)))


def on_gpu(model: nn.Module, *steps: Any, shape: tuple[int, ...] = (5, WIDTH), dtype: str = "float32") -> Program:
    torch.manual_seed(0)
    plan = fz.Plan([fz.Input("x", ("batch", *shape), dtype=dtype)], steps, ())
    program = rewrite(model.eval().to(getattr(torch, dtype)), plan).program
    program.inputs = tuple(replace(spec, device=torch.device("cuda")) for spec in program.inputs)
    return program


def calls(program: Program, *targets: Any) -> int:
    return sum(node.target in targets for node in program.graph.nodes)


def constants(program: Program, dtype: torch.dtype) -> list[Tensor]:
    values = [program.state.tensor(name) for name in program.state]
    return [value for value in values if value.dtype == dtype and value.ndim]


STEPS = {
    "static": (fz.Quantize(), BOTH), "dynamic": (fz.Quantize(mode="dynamic"), BOTH),
    "tensor": (fz.Quantize(granularity="tensor"), BOTH), "int8-weight": (fz.Quantize(scheme="int8-weight"), ALONE),
    "int8-weight in groups": (fz.Quantize(scheme="int8-weight", granularity="group:32"), ALONE),
    "int4-weight": (fz.Quantize(scheme="int4-weight", granularity="group:32"), ALONE),
}  # fmt: skip


@pytest.mark.parametrize("step", STEPS)
def test_every_linear_layer_is_one_call_and_the_function_stays(step: str) -> None:
    given, operator = STEPS[step]
    program = on_gpu(Net(), given)
    assert has_launched(program)
    changed, x = with_launched(program), torch.randn(3, 5, WIDTH)
    names = [str(node.target) for node in changed.graph.nodes if "fxfreeze" in str(node.target)]
    assert names == [str(operator)] * 4
    assert list(executed(program).values()) == [str(operator).split(".")[1]] * 4
    torch.testing.assert_close(changed.run(x)[0], program.run(x)[0], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("step", ["static", "dynamic", "int4-weight"])
def test_of_a_weight_that_two_calls_read_there_is_one(step: str) -> None:
    changed = with_launched(on_gpu(Net(), STEPS[step][0]))
    part = 2 if step == "int4-weight" else 1
    assert sorted(value.numel() for value in constants(changed, torch.int8)) == [
        WIDTH * WIDTH // part, *[WIDTH * INNER // part] * 2
    ]  # fmt: skip


def test_sums_of_the_weights_rows_are_constants() -> None:
    changed = with_launched(on_gpu(Net(), fz.Quantize()))
    for node in changed.graph.find_nodes(op="call_function", target=BOTH):
        weight, total = (changed.constant(node.args[position]) for position in (3, 6))
        assert weight is not None and total is not None
        assert torch.equal(total, weight.sum(1, dtype=torch.int32)) and weight.is_contiguous()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("step", ["static", "int4-weight"])
def test_half_precision(dtype: str, step: str) -> None:
    """The kernels round results alone, the program inputs and weights as well, and so an input to another integer."""
    given, operator = STEPS[step]
    program = on_gpu(Net(), given, dtype=dtype)
    changed, x = with_launched(program), torch.randn(3, 5, WIDTH).to(getattr(torch, dtype))
    assert calls(changed, operator) == 4
    (found,), (want,) = changed.run(x), program.run(x)
    assert found.dtype == want.dtype
    gap = float((found.double() - want.double()).norm() / want.double().norm())
    assert gap < (0.02 if operator is BOTH else 4 * torch.finfo(found.dtype).eps)


def test_an_embedding_looks_integers_up() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(ROWS, WIDTH)

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids)

    plan = fz.Plan([fz.Input("ids", ("batch", 5), dtype="int64", low=0, high=ROWS - 1)],
                   [STEPS["int4-weight"][0]], ())  # fmt: skip
    program = rewrite(Lookup().eval(), plan).program
    program.inputs = tuple(replace(spec, device=torch.device("cuda")) for spec in program.inputs)
    changed, ids = with_launched(program), torch.randint(0, ROWS, (3, 5))
    assert list(executed(program).values()) == ["embedding"]
    assert torch.equal(changed.run(ids)[0], program.run(ids)[0])
    assert not any(tuple(node.meta["val"].shape)[:1] == (ROWS,) for node in changed.graph.nodes
                   if node.op == "call_function")  # fmt: skip


def told(program: Program, folder: Path, *steps: fz.Quantize) -> dict[str, str]:
    """The rows that a compile would write for the torch target."""
    facts = {"torch": torch_compile.emit(Lowering(program), folder)}
    rows = artifact._executed(program, fz.Plan([fz.Input("x", ("batch",))], steps, ["torch"]), facts)
    return {row["site"]: row["executes"] for row in rows}


def test_the_ledger_says_what_the_graph_calls(tmp_path: Path) -> None:
    step = fz.Quantize(allow_simulated=True)
    program = on_gpu(Image(), step, shape=(3, 8, 8))
    assert told(program, tmp_path, step) == {
        "conv": "simulated in torch", "head": "integer-executed by integer_linear in torch"
    }  # fmt: skip
    changed = with_launched(program)
    x = torch.randn(2, 3, 8, 8)
    assert calls(changed, BOTH) == 1 and not calls(changed, OPS["quantize"].op, OPS["dequantize"].op)
    torch.testing.assert_close(changed.run(x)[0], program.run(x)[0], rtol=1e-5, atol=1e-5)


def test_a_convolution_on_integers_is_refused_unless_it_may_be_simulated(tmp_path: Path) -> None:
    program = on_gpu(Image(), fz.Quantize(), shape=(3, 8, 8))
    with pytest.raises(EmitError, match=r"(?s)1 quantized layers would be computed in floats.*conv: int8 by"):
        told(program, tmp_path, fz.Quantize())


@pytest.mark.parametrize("step", ["static", "int8-weight"])
def test_without_triton_nothing_runs_on_integers(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for room in ("launched", "packed"):
        monkeypatch.setattr(f"fxfreeze.{room}.has_triton", lambda: False)
    program = on_gpu(Net(), STEPS[step][0])
    assert not executed(program) and not calls(with_launched(program), BOTH, ALONE)


@pytest.mark.parametrize("known", [True, False])
def test_a_tversky_head_counts_where_triton_is(known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxfreeze.launched.has_triton", lambda: known)
    step = fz.Quantize("0", allow_simulated=True)
    program = on_gpu(nn.Sequential(TverskyProjection(WIDTH, 6, 24)), step)
    assert told(program, tmp_path, step) == {
        "0": "integer-executed by tversky_integer in torch" if known else "simulated in torch"
    }


@pytest.mark.parametrize("step", ["static", "int8-weight"])
def test_aoti_launches_nothing_of_ours(step: str) -> None:
    program = on_gpu(Net(), STEPS[step][0])
    assert not packed_executed(program, calls=0)
    assert not calls(with_packed(program, launches=False), BOTH, ALONE)


def test_float64_has_no_kernel() -> None:
    program = on_gpu(Net(), fz.Quantize(), dtype="float64")
    assert not executed(program) and not calls(with_launched(program), BOTH)


def test_on_a_cpu_it_is_not_asked() -> None:
    plan = fz.Plan([fz.Input("x", ("batch", 5, WIDTH))], [fz.Quantize()], ())
    program = rewrite(Net().eval(), plan).program
    assert not has_launched(program) and not executed(program)


@pytest.mark.slow
@pytest.mark.parametrize("step", ["dynamic", "int4-weight"])
def test_a_compiler_takes_the_graph(step: str) -> None:
    """With a dynamic batch; on a CPU the operators run as references, or C++."""
    program = on_gpu(Net(), STEPS[step][0])
    changed, x = with_launched(program), torch.randn(6, 5, WIDTH)
    changed.inputs = tuple(replace(spec, device=torch.device("cpu")) for spec in changed.inputs)
    runner = torch_compile.CompiledProgram(changed.graph_module(), Interface.of(changed))
    for rows in (6, 3, 1):
        torch.testing.assert_close(runner(x[:rows])[0], program.run(x[:rows])[0], rtol=1e-5, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("step", STEPS)
def test_torch_runs_them_on_a_gpu(step: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    torch.manual_seed(0)
    given, operator = STEPS[step]
    model = Net().eval().cuda()
    found = fz.compile(model, fz.Plan([fz.Input("x", ("batch", 5, WIDTH))], [given], ["torch"]))
    ran = [row["executes"] for row in found.manifest["ledger"] if row["executes"].endswith("in torch")]
    assert ran == [f"integer-executed by {str(operator).split('.')[1]} in torch"] * 4
    x = torch.randn(7, 5, WIDTH, device="cuda")
    assert float((found(x) - model(x)).norm() / model(x).norm()) < 0.2
