"""Tiles of zeros are left out where that was measured to be faster, and the ledger says why where they are not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.capture import capture
from fxfreeze.kernels.block_sparse import KERNEL, compress
from fxfreeze.passes import PIPELINE
from fxfreeze.passes.fuse import block_sparse as module
from fxfreeze.passes.fuse.block_sparse import BlockSparse, Layer, best_tile, drawn, kept_tiles
from fxfreeze.passes.lower.round import Round
from fxfreeze.pipeline import run_passes
from fxfreeze.program import Fold, Program
from fxfreeze.rewrite import Context, LedgerRow

aten = torch.ops.aten
SPARSE = str(KERNEL.op)
FASTER, SLOWER = (1e-3, 2e-3), (2e-3, 1e-3)
IN, OUT = 160, 128  # 4 x 5 tiles of 32, 2 x 3 of 64, 1 x 2 of 128
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALL", 0)


class Clock:
    """Measures as told, the last pair again and again, and keeps what it was asked for."""

    def __init__(self, *times: tuple[float, float]) -> None:
        self.times, self.asked = times or (FASTER,), []

    def __call__(self, layer: Layer) -> list[tuple[float, float]]:
        self.asked.append(layer)
        return [self.times[min(at, len(self.times) - 1)] for at in range(len(layer.sizes))]


def blocks(out: int = OUT, inner: int = IN, tile: int = 32, every: int = 4) -> Tensor:
    """0 and 1: one tile of `every` counts, along diagonals."""
    rows, columns = -(-out // tile), -(-inner // tile)
    kept = (torch.arange(rows)[:, None] + torch.arange(columns)) % every == 0
    return kept.float().repeat_interleave(tile, 0)[:out].repeat_interleave(tile, 1)[:, :inner]


class Net(nn.Module):
    """`how`: the operator that reads the weight, of which `mask` leaves some."""

    def __init__(self, how: str = "linear", mask: Tensor | None = None, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        mask = blocks() if mask is None else mask
        out, inner = mask.shape
        window, groups = {"window": (3, 1), "groups": (1, 2)}.get(how, (1, 1))
        if how in ("conv1d", "conv2d", "strided", "padded", "same", "window", "groups", "no batch"):
            kind = nn.Conv1d if how == "conv1d" else nn.Conv2d
            padding: Any = {"padded": 1, "same": "same"}.get(how, 0)
            stride = 2 if how == "strided" else 1
            self.fc: nn.Module = kind(inner * groups, out, window, stride, padding, groups=groups, bias=bias)
            mask = mask.reshape(out, inner, *[1] * (self.fc.weight.ndim - 2))
        elif how == "transposed":
            self.fc = nn.ConvTranspose2d(out, inner, 1)
            mask = mask[..., None, None]
        else:
            self.fc = nn.Embedding(out, inner) if how == "embedding" else nn.Linear(inner, out, bias=bias)
        self.fc.weight.data *= mask
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.fc.weight, getattr(self.fc, "bias", None)
        match self.how:
            case "addmm":
                return torch.addmm(bias, x, weight.T.contiguous())
            case "matmul":
                return x @ weight.T.contiguous()
            case "twice":
                return self.fc(self.fc(x)[:, :1] + x)
            case "tied":
                return self.fc(x) @ weight
            case "computed":
                return nn.functional.linear(x, weight * x.sum())
            case "odd bias":
                return torch.addmm(x.sum(), x, weight.T.contiguous())
            case "embedding":
                return self.fc(x.argmax(-1) % len(weight))
        return self.fc(x)


def captured(
    model: nn.Module, *shape: int | str, targets: Any = ("torch",), dtype: str = "float32", **dims: Any
) -> tuple[Program, Context]:
    inputs = [fz.Input("x", shape=shape or ("batch", IN), dtype=dtype)]
    plan = fz.Plan(inputs=inputs, dims=dims, targets=targets)
    return capture(model.eval(), plan)[0], Context(plan)


def fused(
    model: nn.Module, *shape: int | str, clock: Clock | None = None, verify: Any = "full", **how: Any
) -> tuple[Program, list[LedgerRow]]:
    """The program after the pass, proven, and its rows."""
    program, ctx = captured(model, *shape, **how)
    rows, _ = run_passes(program, folded() + [BlockSparse(clock or Clock())], ctx, verify=verify)
    assert rows[-1].rewrites == operators(program).count(SPARSE)
    return program, [row for row in ctx.ledger if row.pass_name == "block-sparse"]


def folded() -> list[Any]:
    """Transposed weights are constants."""
    return [item for item in PIPELINE if item.name == "fold-constants"]


def operators(program: Program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


SHAPES = {"conv1d": ("batch", IN, 5), **dict.fromkeys(("conv2d", "same"), ("batch", IN, 3, "height"))}


@pytest.mark.parametrize("how", ["linear", "no bias", "addmm", "matmul", "twice", "conv1d", "conv2d", "same"])
def test_tiles_of_zeros_are_left_out(how: str) -> None:
    """Proven by run_passes in float64."""
    model = Net(how, bias=how != "no bias")
    program, rows = fused(model, *SHAPES.get(how, ()))
    nodes = program.graph.find_nodes(op="call_function", target=KERNEL.op)
    assert len(nodes) == (2 if how == "twice" else 1) and len(rows) == 1
    for node in nodes:
        tiles, crow, col = (program.constant(item) for item in node.args[1:4])
        want = compress(model.fc.weight.detach().flatten(1), 32, 32)
        assert all(torch.equal(one, other) for one, other in zip((tiles, crow, col), want, strict=True))
        assert len(tiles) == 5 and tiles.is_contiguous()
    (row,) = rows
    assert (row.requested, row.outcome, row.executes) == ("leave out the zeros of a weight", "rewritten", SPARSE)
    assert row.detail.startswith("75% zeros; 5 of 20 tiles of 32x32 are left, 0.02 of 0.078 MiB. 1×160")
    assert "ONNX" not in row.detail and row.site in ("fc", "")
    assert not any("fc.weight" == name for name in program.state)
    x = torch.randn(3, *(4 if isinstance(size, str) else size for size in SHAPES.get(how, ("batch", IN))[1:]))
    torch.testing.assert_close(program.run(x)[0], model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("how", "shape", "reason"),
    [
        ("window", ("batch", IN, 4, 4), "a convolution with a window, or with groups, has no form for them"),
        ("groups", ("batch", 2 * IN, 4, 4), "a convolution with a window, or with groups, has no form for them"),
        ("strided", ("batch", IN, 4, 4), "a convolution with a stride or padding, or without a batch, has no form"),
        ("padded", ("batch", IN, 4, 4), "a convolution with a stride or padding, or without a batch, has no form"),
        ("no batch", (IN, 4, 4), "a convolution with a stride or padding, or without a batch, has no form"),
        ("transposed", ("batch", OUT, 4, 4), "a convolution with a window, or with groups, has no form for them"),
        ("embedding", (), "rows of it are looked up, not multiplied"),
        ("odd bias", (), "its operands differ in dtype, or its bias is not one number per output"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_what_has_no_form(how: str, shape: Any, reason: str) -> None:
    model, clock = Net(how), Clock()
    if how == "window":
        model.fc.weight.data *= blocks()[..., None, None]
    program, (row,) = fused(model, *shape, clock=clock)
    assert SPARSE not in operators(program) and not clock.asked
    assert row.outcome == "skipped" and row.executes in operators(program)
    assert row.detail.startswith("75% zeros; size only: no speed-up, since ") and reason in row.detail


def test_a_computed_weight_is_not_looked_at() -> None:
    program, rows = fused(Net("computed"))
    assert SPARSE not in operators(program) and not rows


# ---- which weights get a row


@pytest.mark.parametrize(("zeros", "said"), [(0.29, False), (0.31, True)])
def test_ordinary_models_get_no_rows(zeros: float, said: bool) -> None:
    mask = (torch.arange(OUT * IN) >= zeros * OUT * IN)[torch.randperm(OUT * IN)].reshape(OUT, IN).float()
    clock = Clock()
    program, rows = fused(Net(mask=mask), clock=clock)
    assert SPARSE not in operators(program) and not clock.asked and len(rows) == said
    if said:
        assert rows[0].detail.startswith("31% zeros; size only: no speed-up, since they make no blocks: 20 of 20 tiles")
        assert rows[0].executes == "aten.linear.default"


def test_small_weights_get_none() -> None:
    assert fused(Net(mask=blocks(32, 32, 8)), "batch", 32)[1]
    assert not fused(Net(mask=blocks(31, 32, 8)), "batch", 32)[1]


def test_what_is_two_of_four_is_left_to_its_own_pass() -> None:
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0]).repeat(OUT, IN // 4)
    assert not fused(Net(mask=mask))[1]
    assert fused(Net(mask=mask * blocks()))[1][0].outcome == "rewritten"


def test_weights_that_are_read_at_once_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, size = Clock(), 4 * OUT * IN
    monkeypatch.setattr(module, "SMALL", size + 1)
    _, (row,) = fused(Net(), clock=clock)
    assert "a weight of 0.078 MiB is read as fast as an operator is called" in row.detail and not clock.asked
    monkeypatch.setattr(module, "SMALL", size)
    assert fused(Net(), clock=clock)[1][0].outcome == "rewritten" and clock.asked


# ---- the tiles


@pytest.mark.parametrize(("tile", "every", "best"), [(32, 4, 32), (64, 3, 64), (128, 2, 128), (256, 2, 128)])
def test_the_tiles_that_leave_least(tile: int, every: int, best: int) -> None:
    weight = blocks(512, 512, tile, every)
    kept = kept_tiles(weight)
    assert best_tile(kept) == best
    assert kept[best] * best**2 == weight.sum()


def test_larger_tiles_are_taken_where_they_leave_as_little() -> None:
    weight = blocks(512, 512, 128, 2)
    weight[:32, :32] = 0.0  # 124 of 128 tiles of 32
    assert best_tile(kept_tiles(weight)) == 128
    weight[:96, :96] = 0.0
    assert best_tile(kept_tiles(weight)) == 128
    weight[:, :96] = 0.0
    assert best_tile(kept_tiles(weight)) == 64  # 28, and 104 of 32
    weight[:, 96:112] = weight[:, 128 + 64 : 128 + 96] = 0.0
    assert best_tile(kept_tiles(weight)) == 32


@pytest.mark.parametrize(("every", "makes"), [(1, False), (2, True)])
def test_few_empty_tiles_are_no_blocks(every: int, makes: bool) -> None:
    """Half of all numbers are zeros in any case; of tiles of 32 all are left, or half."""
    mask = blocks(256, 256, 32, every) * torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0]).repeat(256, 32)
    _, (row,) = fused(Net(mask=mask), "batch", 256)
    assert (row.outcome == "rewritten") == makes
    assert makes or "they make no blocks: 64 of 64 tiles of 32x32 hold something else" in row.detail


# ---- dtypes, targets, sizes


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_half_precision_is_left_to_plain_torch_on_a_cpu(dtype: str) -> None:
    clock = Clock()
    program, (row,) = fused(Net().to(getattr(torch, dtype)), clock=clock, dtype=dtype, verify="off")
    assert (SPARSE in operators(program)) == (dtype == "float64") == bool(clock.asked)
    assert dtype == "float64" or row.detail.endswith(f"since there is no form for torch.{dtype} on cpu")


@pytest.mark.parametrize(
    ("targets", "fuses"),
    [(("torch",), True), (("aoti",), True), (("torch", "aoti"), True), (("onnx", "aoti"), True), (("onnx",), False),
     ((), False)],
    ids=str,
)  # fmt: skip
def test_targets_of_a_cpu(targets: tuple[str, ...], fuses: bool) -> None:
    program, (row,) = fused(Net(), targets=targets)
    assert (SPARSE in operators(program)) == fuses == (row.outcome == "rewritten")
    if not fuses:
        held = "; files for onnx hold them" if "onnx" in targets else ""
        says = f"since there is no form for targets {', '.join(targets) or 'none'} on cpu{held}"
        assert row.detail == f"75% zeros; size only: no speed-up, {says}"
    elif "onnx" in targets:
        assert row.detail.endswith("; ONNX Runtime runs the dense product")


def test_which_files_hold_the_zeros() -> None:
    _, (row,) = fused(Net(), clock=Clock(SLOWER), targets=("onnx", "torch", "aoti"))
    assert row.detail.endswith("; files for aoti and onnx hold them")


@pytest.mark.parametrize(
    ("dtype", "targets", "reason"),
    [
        ("float16", ("torch",), None),
        ("float32", ("torch",), None),
        ("float64", ("torch",), "there is no form for torch.float64 on cuda"),
        ("float32", ("torch", "aoti"), "there is no form for targets torch, aoti on cuda"),
    ],
)
def test_a_gpu(dtype: str, targets: tuple[str, ...], reason: str | None) -> None:
    clock = Clock()
    program, ctx = captured(Net().to(getattr(torch, dtype)), targets=targets, dtype=dtype)
    for node in program.graph.nodes:
        if isinstance(value := node.meta.get("val"), Tensor):
            with program.fake_mode:
                node.meta["val"] = torch.empty(value.shape, dtype=value.dtype, device="cuda")
    (found,) = module.sparse_weights(program)
    assert BlockSparse(clock)._rewrite(program, found, ctx) == reason
    assert [layer.device.type for layer in clock.asked] == ([] if reason else ["cuda"])


@pytest.mark.parametrize(
    ("shape", "dims", "sizes"),
    [
        ((IN,), {}, [(1, IN)]),
        ((7, IN), {}, [(8, IN)]),
        ((3, 4, IN), {}, [(16, IN)]),
        ((5000, IN), {}, [(512, IN)]),
        (("batch", IN), {}, [(1, IN), (512, IN)]),
        (("batch", IN), {"batch": fz.Dim(max=60)}, [(1, IN), (64, IN)]),
        (("batch", 4, IN), {"batch": fz.Dim(max=4)}, [(1, IN), (16, IN)]),
    ],
    ids=str,
)
def test_rows_to_time_are_read_off_the_declared_sizes(shape: Any, dims: Any, sizes: Any) -> None:
    clock = Clock()
    fused(Net(), *shape, clock=clock, **dims)
    assert clock.asked == [Layer(tuple(sizes), IN, OUT, 32, 0.25, False, torch.float32, CPU)]


def test_rows_of_a_convolution_are_its_batch() -> None:
    clock = Clock()
    fused(Net("conv2d"), "batch", IN, 3, 5, clock=clock)
    layer = Layer(((1, IN, 3, 5), (512, IN, 3, 5)), IN, OUT, 32, 0.25, True, torch.float32, CPU)
    assert clock.asked == [layer]


@pytest.mark.parametrize(
    ("times", "fuses"),
    [
        ((FASTER,), True),
        ((SLOWER,), False),
        ((FASTER, SLOWER), False),
        ((SLOWER, FASTER), False),
        (((0.96, 1.0),), False),
        (((1.0, 1.0), (0.94, 1.0)), True),
    ],
    ids=str,
)
def test_it_is_faster_for_one_number_of_rows_and_slower_for_none(times: Any, fuses: bool) -> None:
    program, (row,) = fused(Net(), clock=Clock(*times))
    assert (SPARSE in operators(program)) == fuses
    if times == (FASTER, SLOWER):
        assert row.detail == (
            "75% zeros; size only: no speed-up, since with 25% of the tiles of 32x32 the dense product is as fast: "
            "1×160: 1 ms against 2; 512×160: 2 ms against 1"
        )


# ---- what is stored


def test_other_readers_keep_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net("tied", mask=blocks(OUT, OUT), bias=False)
    program, rows = fused(model, "batch", OUT)
    assert operators(program).count(SPARSE) == 2 and {row.outcome for row in rows} == {"rewritten"}  # both readers
    clock = Clock(FASTER)
    monkeypatch.setattr(module, "SHARED", 4 * 4 * 32**2 - 1)
    program, rows = fused(model, "batch", OUT, clock=clock)
    assert SPARSE not in operators(program) and not clock.asked
    assert all(
        "its weight is read by something else, too, and the tiles would take 0 MiB" in row.detail for row in rows
    )
    assert fused(Net())[1][0].outcome == "rewritten"  # which nothing else reads


def test_what_was_folded_into_the_weight_is_kept_and_still_measured() -> None:
    """A mask applied in float64 makes the zeros; what an adapter added is rounded, and measured, in the tiles."""
    model = Net(mask=torch.ones(OUT, IN))
    program, ctx = captured(model)
    name, edit = "fc.weight", blocks().double()
    base = program.state.recipe(name).then(lambda value: value * edit)
    program.folds[name] = Fold("LoRA", "fc", base, 0.1)
    program.state[name] = program.state.recipe(name).then(lambda value: (value + 1 / 3) * edit)
    want = program.state[name]
    x = torch.randn(3, IN)
    before = program.run(x)[0]
    run_passes(program, [BlockSparse(Clock())], ctx)
    found = program.state["fc.weight_tiles"]
    assert found.dtype == torch.float64 and torch.equal(found, compress(want, 32, 32)[0])
    assert program.folds.keys() == {"fc.weight_tiles"}
    fold = program.folds["fc.weight_tiles"]
    assert torch.allclose(found - fold.base.value(), torch.tensor(1 / 3, dtype=torch.float64)) and fold.max_loss == 0.1
    run_passes(program, [Round()], ctx)
    assert program.state["fc.weight_tiles"].dtype == torch.float32
    assert [row.site for row in ctx.ledger if row.outcome == "measured"] == ["fc"]
    torch.testing.assert_close(program.run(x)[0], before, rtol=1e-5, atol=1e-5)


def test_negative_zeros_are_zeros() -> None:
    model = Net()
    model.fc.weight.data[model.fc.weight == 0] = -0.0
    program, (row,) = fused(model)
    assert SPARSE in operators(program) and row.detail.startswith("75% zeros; 5 of 20 tiles")


# ---- measuring


def test_identical_layers_are_measured_once_and_nothing_is_drawn_from_the_global_generator() -> None:
    state = torch.get_rng_state()
    layer = Layer(((1, 64), (8, 64)), 64, 96, 32, 0.5, False, torch.float32, CPU)
    times = module.measured(layer)
    assert len(times) == 2 and all(ours > 0 and dense > 0 for ours, dense in times)
    assert module.measured(layer) == times and torch.equal(torch.get_rng_state(), state)
    calls = module._measured.cache_info().misses
    module.measured(replace(layer))
    assert module._measured.cache_info().misses == calls


@pytest.mark.parametrize("size", [(4, 160), (4, 160, 5), (4, 160, 2, 3)], ids=str)
def test_what_is_timed(size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both calls compute the same function of the layer's sizes, with as many tiles as it says."""
    results: list[dict[str, Tensor]] = []

    def once(calls: Any, device: Any) -> dict[str, float]:
        results.append({name: call() for name, call in calls.items()})
        return {"ours": 1.0, "dense": 2.0}

    monkeypatch.setattr(module, "medians", once)
    layer = Layer((size,), IN, OUT, 32, 0.35, len(size) > 2, torch.float64, CPU)
    assert module._measured.__wrapped__(layer, 1) == ((1.0, 2.0),)
    (found,) = results
    assert found["ours"].shape == (4, OUT, *size[2:]) and found["dense"].std() > 0
    torch.testing.assert_close(found["ours"], found["dense"])
    assert kept_tiles(drawn(layer))[32] == 7


# ---- the whole way


@pytest.mark.slow
def test_a_compiled_model_leaves_them_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """From the plan to an artifact that was saved and loaded; neither of its files has room for the zeros."""
    (item,) = (item for item in PIPELINE if isinstance(item, BlockSparse))
    monkeypatch.setattr(item, "measure", Clock())
    model = Net(mask=blocks(512, 512))
    plan = fz.Plan(inputs=[fz.Input("x", shape=("batch", 512))], targets=["torch", "onnx"])
    artifact = fz.compile(model, plan)
    rows = [row for row in artifact.manifest["ledger"] if row["pass_name"] == "block-sparse"]
    assert [row["outcome"] for row in rows] == ["rewritten"]
    assert all(artifact.sizes[name] < 0.3 * 4 * 512**2 for name in ("onnx/model.onnx", "program/weights.safetensors"))
    artifact.save(tmp_path / "a")
    loaded = fz.load(tmp_path / "a")
    x = torch.randn(5, 512)
    for found in (artifact(x), loaded(x), loaded(x, target="onnx")):
        torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-5)


# ---- wrong rewrites


@pytest.mark.parametrize("mutant", ["turned tiles", "bias", "a tile too few", "a column off"])
def test_a_wrong_rewrite_is_not_exact(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Program.call

    def wrong(self: Program, target: Any, *args: Any, **kwargs: Any) -> Any:
        if target is KERNEL.op:
            _, tiles, _, col, _ = args
            name = str(tiles.target)
            if mutant == "turned tiles":
                self.state[name] = self.state[name].mT.contiguous()
            if mutant == "a tile too few":
                self.state[name] = self.state[name].index_fill(0, torch.tensor(1), 0.0)
            if mutant == "a column off":
                self.state[str(col.target)] = (self.state[str(col.target)] + 1) % 5
            args = args[:4] if mutant == "bias" else args
        return right(self, target, *args, **kwargs)

    monkeypatch.setattr(Program, "call", wrong)
    with pytest.raises(fz.ProofError, match="block-sparse"):
        fused(Net())
