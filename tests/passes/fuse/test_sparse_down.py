"""A linear layer behind a gate leaves out what does not fire, where that was measured to be faster."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.capture import capture
from fxfreeze.constants import Recipe
from fxfreeze.kernels.gate import KERNEL as GATE
from fxfreeze.kernels.sparse_down import KERNEL
from fxfreeze.passes.fuse import _timing as timing
from fxfreeze.passes.fuse import sparse_down as module
from fxfreeze.passes.fuse.sparse_down import Layer, Point, SparseDown, crossing
from fxfreeze.pipeline import run_passes
from fxfreeze.program import Fold, Origin, Program
from fxfreeze.rewrite import Context, LedgerRow

aten = torch.ops.aten
K, P = 12, 12  # square: a weight that is not transposed has the right shape, too
WINS = (Point(0.05, 4.0, 1.0), Point(0.25, 4.0, 2.0), Point(1.0, 4.0, 5.0))  # equal at 0.75
LOSES = (Point(0.05, 4.0, 1.0), Point(0.25, 4.0, 5.0), Point(1.0, 4.0, 9.0))  # equal at 0.2
SPARSE = str(KERNEL.op)


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALL", 0)


class Gated(nn.Module):
    """`how`: what stands between the gate and the weight."""

    def __init__(self, how: str = "linear", **gate: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.plain = nn.Linear(6, K), nn.Linear(K, P), nn.Linear(K, P, bias=False)
        self.register_buffer("threshold", torch.full((K,), 0.3))
        self.register_buffer("levels", torch.linspace(-0.2, 0.4, 2 * K).reshape(2, K))
        self.how, self.gate = how, gate

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        if self.how == "mode":
            return self.down(GATE.op(up, self.levels, mode=torch.arange(x.shape[0]) % 2))
        h = GATE.op(up, self.threshold, **self.gate)
        match self.how:
            case "linear":
                return self.down(h)
            case "no bias":
                return self.plain(h)
            case "addmm":
                return torch.addmm(self.down.bias, h, self.down.weight)
            case "mm":
                return torch.mm(h, self.down.weight)
            case "matmul":
                return h @ self.down.weight
            case "scaled":
                return self.down(2 * (h * 0.5))
            case "gated MLP":
                return self.down(up.sigmoid() * h)
            case "reshaped":
                return self.down(h.unsqueeze(1).reshape(-1, 1, K) * up.unsqueeze(1)).squeeze(1)
            case "twice":
                return self.down(h) + self.down(h * up)
            case "read by another":
                return self.down(h) @ self.down.weight
            case "computed weight":
                return nn.functional.linear(h, self.down.weight * x.sum())
            case "odd bias":
                return torch.addmm(x.sum(), h, self.down.weight)
            case "shifted":
                return self.down(h + 1)
            case "mixed":
                return self.down(h.reshape(-1, 3, K // 3).transpose(1, 2).reshape(-1, K))
            case "ungated":
                return self.down(up)
            case "one gate for all":
                return self.down(GATE.op(up[:, :1], self.threshold[:1]) * up)
            case "regrouped":
                return self.down(GATE.op(up.reshape(-1, K // 2), self.threshold[: K // 2]).reshape(-1, K))
        raise AssertionError(self.how)


class Clock:
    """Measures as told, and keeps what it was asked for."""

    def __init__(self, points: tuple[Point, ...] = WINS) -> None:
        self.points, self.asked = points, []

    def __call__(self, layer: Layer) -> tuple[Point, ...]:
        self.asked.append(layer)
        return self.points


def captured(model: nn.Module, *shape: int | str, targets: Any = ("torch",), **dims: Any) -> tuple[Program, Context]:
    plan = fz.Plan(inputs=[fz.Input("x", shape=shape or ("batch", 6))], dims=dims, targets=targets)
    return capture(model.eval(), plan)[0], Context(plan)


def fused(
    model: nn.Module, *shape: int | str, clock: Clock | None = None, **how: Any
) -> tuple[Program, list[LedgerRow]]:
    program, ctx = captured(model, *shape, **how)
    rows, _ = run_passes(program, [SparseDown(clock or Clock())], ctx)
    assert rows[0].rewrites == operators(program).count(SPARSE)
    return program, list(ctx.ledger)


def operators(program: Program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    "how",
    ["linear", "no bias", "addmm", "mm", "matmul", "scaled", "gated MLP", "reshaped", "mode"],
)
def test_a_product_behind_a_gate_is_fused(how: str) -> None:
    """Proven by run_passes in float64."""
    model, clock = Gated(how), Clock()
    program, (row,) = fused(model, clock=clock)
    (node,) = program.graph.find_nodes(op="call_function", target=KERNEL.op)
    assert node.kwargs == {"crossover": 0.75}
    assert clock.asked == [Layer(K, P, 8, torch.float32, torch.device("cpu"))]
    assert program.constant(node.args[1]).is_contiguous()  # type: ignore[union-attr]
    assert (row.requested, row.outcome, row.executes) == ("skip neurons that do not fire", "rewritten", SPARSE)
    assert row.detail.startswith("crossover 0.75. Firing 0.05: 1e+03 ms against 4e+03; 0.25: 2e+03 ms against 4e+03")
    assert row.pass_name == "sparse-down" and row.site == ("down" if how in ("linear", "scaled") else row.site)
    x = torch.randn(5, 6)
    torch.testing.assert_close(program.run(x)[0], model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["shifted", "mixed", "ungated", "one gate for all", "regrouped"])
def test_a_product_of_something_else_is_left_alone(how: str) -> None:
    clock = Clock()
    program, rows = fused(Gated(how), clock=clock)
    assert SPARSE not in operators(program) and not rows and not clock.asked


@pytest.mark.parametrize("gate", [{"dim": 0}, {"temperature": torch.tensor(0.5)}], ids=str)
def test_a_gate_of_another_dim_or_a_soft_one_is_left_alone(gate: dict[str, Any]) -> None:
    model = Gated(**gate)
    if "dim" in gate:
        model.threshold = torch.full((4,), 0.3)
    program, rows = fused(model, 4, 6)
    assert SPARSE not in operators(program) and not rows


def test_a_small_layer_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, size = Clock(), 4 * K * P
    monkeypatch.setattr(module, "SMALL", size + 1)
    assert not fused(Gated(), clock=clock)[1] and not clock.asked
    monkeypatch.setattr(module, "SMALL", size)
    assert fused(Gated(), clock=clock)[1] and clock.asked


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("computed weight", "its weight is not a parameter but computed by aten.mul.Tensor"),
        ("odd bias", "its bias is not one number per output"),
    ],
)
def test_what_is_refused(how: str, reason: str) -> None:
    program, (row,) = fused(Gated(how))
    assert row.outcome == "skipped" and reason in row.detail and SPARSE not in operators(program)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_half_precision_is_left_to_plain_torch_on_a_cpu(dtype: str) -> None:
    model, clock = Gated().to(getattr(torch, dtype)), Clock()
    plan = fz.Plan(inputs=[fz.Input("x", shape=("batch", 6), dtype=dtype)])
    program, ctx = capture(model.eval(), plan)[0], Context(plan)
    run_passes(program, [SparseDown(clock)], ctx, verify="off")
    (row,) = ctx.ledger
    assert (SPARSE in operators(program)) == (dtype == "float64") == bool(clock.asked)
    assert dtype == "float64" or row.detail == f"there is no form for torch.{dtype} on cpu"


@pytest.mark.parametrize(
    ("targets", "fuses"),
    [(("torch",), True), (("aoti",), True), (("torch", "aoti"), True), (("onnx", "aoti"), True), (("onnx",), False),
     ((), False)],
    ids=str,
)  # fmt: skip
def test_targets_of_a_cpu(targets: tuple[str, ...], fuses: bool) -> None:
    program, (row,) = fused(Gated(), targets=targets)
    assert (SPARSE in operators(program)) == fuses == (row.outcome == "rewritten")
    assert fuses or f"there is no form for targets {', '.join(targets) or 'none'} on cpu" == row.detail


@pytest.mark.parametrize(("targets", "fuses"), [(("torch",), True), (("torch", "aoti"), False)], ids=str)
def test_targets_of_a_gpu(targets: tuple[str, ...], fuses: bool) -> None:
    program, _ = captured(Gated())
    (node,) = program.graph.find_nodes(op="call_function", target=aten.linear.default)[1:]
    with program.fake_mode:
        for part in node.all_input_nodes:
            part.meta["val"] = torch.empty(part.meta["val"].shape, device="cuda")
    operator = module.weight_operator(node)
    reason = module._problem(program, operator, targets)  # type: ignore[arg-type]
    assert (reason is None) == fuses
    assert module._layer(operator).device.type == "cuda"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "dims", "rows"),
    [
        ((6,), {}, 1),
        ((1, 6), {}, 1),
        ((2, 6), {}, 8),
        ((2, 4, 6), {}, 8),
        ((9, 6), {}, None),
        ((3, 3, 6), {}, None),
        (("batch", 6), {"batch": fz.Dim(min=8, max=64)}, 8),
        (("batch", 6), {"batch": fz.Dim(min=9, max=64)}, None),
        (("batch", 4, 6), {"batch": fz.Dim(min=2, max=64)}, 8),
        (("batch", 4, 6), {"batch": fz.Dim(min=3, max=64)}, None),
    ],
    ids=str,
)
def test_how_few_rows_there_may_be_is_read_off_the_declared_sizes(shape: Any, dims: Any, rows: int | None) -> None:
    clock = Clock()
    program, (row,) = fused(Gated(), *shape, clock=clock, **dims)
    assert [layer.rows for layer in clock.asked] == ([] if rows is None else [rows])
    assert (SPARSE in operators(program)) == (rows is not None)
    assert rows or row.detail == "there are more than 8 rows at least"


def test_where_the_dense_product_is_as_fast_it_stays() -> None:
    clock = Clock(LOSES)
    program, (row,) = fused(Gated(), clock=clock)
    assert SPARSE not in operators(program) and row.outcome == "skipped" and row.executes == "aten.linear.default"
    assert row.detail.startswith("the dense product is as fast. Firing 0.05: 1e+03 ms against 4e+03; 0.25: 5e+03 ms")


@pytest.mark.parametrize(
    ("points", "crossover"),
    [
        (WINS, 0.75),
        (LOSES, 0.2),
        ((Point(0.05, 1.0, 2.0), Point(0.25, 1.0, 0.5)), 0.0),
        ((Point(0.05, 1.0, 0.1), Point(1.0, 1.0, 1.0)), 1.0),
        ((Point(0.05, 1.0, 0.1), Point(1.0, 1.0, 0.9), Point(8.0, 6.0, 5.0)), 8.0),
        ((Point(0.05, 1.0, 0.5), Point(1.0, 1.0, 0.5), Point(8.0, 6.0, 9.5)), 1.85),  # 1 + 7/8, rounded down
        ((Point(0.05, 1.0, 1.0), Point(1.0, 1.0, 2.0)), 0.05),
    ],
)
def test_the_crossover_is_where_the_lines_cross(points: tuple[Point, ...], crossover: float) -> None:
    assert crossing(points) == crossover


# ---- the weight


def test_other_readers_keep_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Gated("read by another")
    program, (row,) = fused(model)
    assert row.outcome == "rewritten"
    assert program.state["down.weight"].data_ptr() == model.down.weight.data_ptr()
    assert torch.equal(program.state["down.weight_by_neuron"], model.down.weight.T)
    monkeypatch.setattr(module, "SHARED", 4 * K * P - 1)
    program, (row,) = fused(model)
    assert SPARSE not in operators(program) and row.detail.startswith("its weight is read by something else, too")
    assert fused(Gated())[1][0].outcome == "rewritten"  # which nothing else reads


def test_a_layer_that_is_called_twice_has_one_weight_in_the_end() -> None:
    program, _ = fused(Gated("twice"))
    assert operators(program).count(SPARSE) == 2 and "down.weight" not in program.state
    artifact = [node for node in program.graph.nodes if "by_neuron" in str(node.target)]
    assert len({str(node.target) for node in artifact}) == 2
    from fxfreeze.passes.lower.merge import MergeConstants

    big = MergeConstants()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxfreeze.passes.lower.merge._WORTH", 0)
        big.run(program, Context(fz.Plan(inputs=[fz.Input("x", shape=("batch", 6))])))
    assert len({str(node.target) for node in artifact}) == 1


def test_a_weight_that_lies_by_neuron_is_not_copied() -> None:
    model = Gated("matmul")
    program, _ = fused(model)
    assert program.state["down.weight"].data_ptr() == model.down.weight.data_ptr()
    model.down.weight = nn.Parameter(model.down.weight.detach().T.contiguous().T)
    program, _ = fused(model)
    assert program.state["down.weight_by_neuron"].is_contiguous()


@pytest.mark.parametrize("how", ["linear", "matmul"])
def test_what_was_folded_into_the_weight_is_kept_and_still_measured(how: str) -> None:
    model = Gated(how)
    if how == "matmul":
        model.down.weight = nn.Parameter(model.down.weight.detach().T.contiguous().T)
    program, ctx = captured(model)
    name = "down.weight"
    edit = torch.arange(1.0, P + 1, dtype=torch.float64)[:, None]
    program.folds[name] = Fold("LoRA", "down", Recipe(program.state[name], (lambda value: value + edit,)), 0.1)
    program.state[name] = program.state.recipe(name).then(lambda value: value * edit)
    want = program.state[name]
    x = torch.randn(3, 6)
    before = program.run(x)[0]
    base = program.folds[name].base.value()
    run_passes(program, [SparseDown(Clock())], ctx)
    found = program.state.held(f"{name}_by_neuron")
    assert isinstance(found, Recipe) and found.value().is_contiguous() and found.base.is_contiguous()
    turned = want.T if how == "linear" else want
    assert torch.equal(found.value(), turned) and found.value().dtype == torch.float64
    assert program.folds.keys() == {f"{name}_by_neuron"}
    fold = program.folds[f"{name}_by_neuron"]
    assert torch.equal(fold.base.value(), base.T if how == "linear" else base) and fold.max_loss == 0.1
    torch.testing.assert_close(program.run(x)[0], before, rtol=1e-5, atol=1e-5)


def test_the_gate_stays_what_a_step_asked_for() -> None:
    program, ctx = captured(Gated())
    origin = Origin("step", "gate", "down")
    (gate,) = program.graph.find_nodes(op="call_function", target=GATE.op)
    gate.meta["fxfreeze"] = origin
    run_passes(program, [SparseDown(Clock())], ctx)
    (gate,) = program.graph.find_nodes(op="call_function", target=GATE.op)
    (down,) = program.graph.find_nodes(op="call_function", target=KERNEL.op)
    assert gate.meta["fxfreeze"] == origin and "fxfreeze" not in down.meta
    assert program.module_path(down) == "down"


# ---- measuring


def test_identical_layers_are_measured_once_and_nothing_is_drawn_from_the_global_generator() -> None:
    state = torch.get_rng_state()
    layer = Layer(64, 24, 8, torch.float32, torch.device("cpu"))
    points = module.measured(layer)
    assert [point.firing for point in points] == [0.05, 0.25, 1.0, 8.0]
    assert all(point.dense > 0 and point.sparse > 0 for point in points)
    assert points[0].dense == points[2].dense != points[3].dense  # one row, and eight
    assert module.measured(layer) is points
    one = module.measured(Layer(64, 24, 1, torch.float32, torch.device("cpu")))
    assert [point.firing for point in one] == [0.05, 0.25, 1.0]
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds are those of the calls: dense ones of one and eight rows, sparse ones of all that fire."""
    seen: list[tuple[str, int, int]] = []

    class Spy:
        def op(self, h: Tensor, weight: Tensor, bias: Tensor, *, crossover: float) -> Tensor:
            assert (h != 0).sum() <= crossover * h.shape[1]
            seen.append(("sparse", len(h), int((h != 0).sum())))
            return h @ weight + bias

    def dense(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        assert weight.shape == (24, 1000) and weight.is_contiguous()
        seen.append(("dense", len(h), 0))
        return nn.functional.linear(h, weight, bias)

    monkeypatch.setattr(module, "KERNEL", Spy())
    monkeypatch.setattr(module, "linear", dense)
    module._measured.__wrapped__(Layer(1000, 24, 8, torch.float32, torch.device("cpu")), 1)
    turn = seen[:6]
    assert seen == turn * (len(seen) // 6) and 3 <= len(seen) // 6 <= 8
    assert [(name, rows) for name, rows, _ in turn] == [
        ("dense", 1), ("sparse", 1), ("sparse", 1), ("sparse", 1), ("dense", 8), ("sparse", 8)
    ]  # fmt: skip
    counts = [count / 1000 for name, _, count in turn if name == "sparse"]
    assert counts == pytest.approx([0.05, 0.25, 1.0, 8.0], abs=0.03)


def test_slow_calls_are_repeated_less(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], [0]

    def slow() -> Tensor:
        calls[0] += 1
        now[0] += 0.3
        return torch.zeros(())

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    assert timing.medians({("dense", 1): slow}, torch.device("cpu")) == {("dense", 1): pytest.approx(0.3)}
    assert calls[0] == 3  # one to warm up


# ---- the whole way


def test_a_compiled_model_skips_neurons(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """From the plan to an artifact that was saved and loaded, with every proof on the way."""
    monkeypatch.setattr(module, "_measured", lambda layer, threads: WINS)
    model = Gated()
    plan = fz.Plan(inputs=[fz.Input("x", shape=("batch", 6))], targets=["torch", "onnx"])
    artifact = fz.compile(model, plan)
    rows = [row for row in artifact.manifest["ledger"] if row["pass_name"] == "sparse-down"]
    assert [row["outcome"] for row in rows] == ["rewritten"]
    artifact.save(tmp_path / "a")
    loaded = fz.load(tmp_path / "a")
    x = torch.randn(5, 6)
    for found in (artifact(x), loaded(x)):
        torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-5)


# ---- wrong rewrites


@pytest.mark.parametrize("mutant", ["not transposed", "bias", "before the product"])
def test_a_wrong_rewrite_is_not_exact(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mutant == "not transposed":
        monkeypatch.setattr(module, "_transposed", lambda recipe: recipe)
    right = Program.call

    def wrong(self: Program, target: Any, *args: Any, **kwargs: Any) -> Any:
        if target is KERNEL.op and mutant == "bias":
            args = args[:2]
        if target is KERNEL.op and mutant == "before the product":
            args = (args[0].args[1], *args[1:])
        return right(self, target, *args, **kwargs)

    monkeypatch.setattr(Program, "call", wrong)
    with pytest.raises(fz.ProofError, match="sparse-down"):
        fused(Gated("gated MLP"))
