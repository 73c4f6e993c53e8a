"""fxfreeze::block_sparse against a dense product in float64."""

from __future__ import annotations

import importlib.util
import itertools
import warnings

import pytest
import torch
from torch import nn

from fxfreeze.kernels import _native
from fxfreeze.kernels._op import OPS
from fxfreeze.kernels.block_sparse import compress, dense, filled

KERNEL = OPS["block_sparse"]
NATIVE = KERNEL.native
FORMS = {"reference": KERNEL.reference, "op": KERNEL.op}


def draw(*shape, dtype=torch.float32, out=70, k=50, depth=16, width=32, keep=0.4, device="cpu"):
    """x, W with a fraction `keep` of nonzero tiles, bias; no tile sizes divide W's."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = -(-out // width), -(-k // depth)
    kept = (torch.rand(rows, columns, generator=generator) < keep).float()
    weight = torch.randn(out, k, generator=generator)
    weight *= kept.repeat_interleave(width, 0)[:out].repeat_interleave(depth, 1)[:, :k]
    others = torch.randn(*shape, k, generator=generator), torch.randn(out, generator=generator)
    x, bias = (value.to(device, dtype) for value in others)
    return x, weight.to(device, dtype), bias


def apply(form, x, weight, bias=None, *, depth=16, width=32):
    return form(x, *compress(weight, depth, width), bias, out_features=len(weight))


def agrees(found, x, weight, bias=None):
    """Every sum within some roundings of its terms' absolute values."""

    def product(x, weight, bias):
        return torch.nn.functional.linear(*(None if v is None else v.double().cpu() for v in (x, weight, bias)))

    want, scale = product(x, weight, bias), product(x.abs(), weight.abs(), None if bias is None else bias.abs())
    assert found.dtype == x.dtype and found.shape == want.shape and found.is_contiguous()
    eps = torch.finfo(x.dtype).eps
    assert ((found.double().cpu() - want).abs() <= 4 * eps * scale + torch.finfo(x.dtype).tiny).all()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---- the format


@pytest.mark.parametrize("sizes", [(16, 32), (32, 16), (64, 64), (7, 5), (1, 1), (128, 128)], ids=str)
@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
def test_compressed_and_back(sizes, keep):
    for out, k in ((70, 50), (64, 128), (1, 1), (33, 16), (5, 0), (0, 5)):
        weight = draw(out=out, k=k, depth=sizes[0], width=sizes[1], keep=keep)[1]
        tiles, crow, col = compress(weight, *sizes)
        assert torch.equal(dense(tiles, crow, col, out, k), weight)
        kept = crow.diff()
        assert torch.equal(kept.long(), filled(weight, *sizes)) and len(tiles) == len(col) == kept.sum()
        assert tiles.is_contiguous() and (tiles != 0).flatten(1).any(1).all()


def test_it_is_the_format_of_torch():
    weight = draw(out=64, k=96)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is in beta
        theirs = weight.to_sparse_bsr((32, 16))
    tiles, crow, col = compress(weight, 16, 32)
    for ours, other in ((tiles.mT, theirs.values()), (crow, theirs.crow_indices()), (col, theirs.col_indices())):
        assert torch.equal(ours, other.to(ours.dtype))


def test_a_tile_of_negative_zeros_is_not_kept():
    weight = draw(keep=1.0)[1]
    weight[:32, :16] = -0.0
    assert compress(weight, 16, 32)[1].tolist() == [0, 3, 7, 11]


# ---- the operator


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_shapes_and_types(form, shape, dtype):
    x, weight, bias = draw(*shape, dtype=dtype)
    for given in (bias, None):
        agrees(apply(FORMS[form], x, weight, given), x, weight, given)


@pytest.mark.parametrize(("k", "out"), [(0, 5), (5, 0), (0, 0), (1, 1), (16, 32), (17, 33), (15, 31)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_small_sizes(form, k, out):
    x, weight, bias = draw(3, k=k, out=out, keep=1.0)
    agrees(apply(FORMS[form], x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("sizes", [(32, 32), (64, 64), (128, 128), (16, 48), (5, 112), (64, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 11, 23, 24, 63, 64, 65, 150])
def test_native(rows, dtype, sizes, threads):
    """All numbers of rows and of vectors at a time, rows of tiles without any, and edges."""
    x, weight, bias = draw(rows, dtype=dtype, k=300, out=410, depth=sizes[0], width=sizes[1])
    weight[sizes[1] : 2 * sizes[1]] = 0.0
    for count in (1, 3):
        threads(count)
        agrees(apply(NATIVE.apply, x, weight, bias, depth=sizes[0], width=sizes[1]), x, weight, bias)


def test_many_threads(threads):
    """Work enough for several, and a result that does not depend on them."""
    x, weight, bias = draw(130, k=500, out=600, depth=64, width=64)
    found = {}
    for count in (1, 2, 7):
        threads(count)
        found[count] = apply(KERNEL.op, x, weight, bias, depth=64, width=64)
    agrees(found[1], x, weight, bias)
    assert torch.equal(found[1], found[2]) and torch.equal(found[1], found[7])


def test_a_row_is_the_same_whatever_the_others_are():
    x, weight, bias = draw(75)
    found = apply(KERNEL.op, x, weight, bias)
    assert all(torch.equal(apply(KERNEL.op, row, weight, bias), found[i]) for i, row in enumerate(x))


def test_empty_tiles_are_left_out():
    """An input of an empty tile is NaN, which only a dense product shows."""
    x, weight, bias = draw(3, out=64, k=64, keep=1.0)
    weight[32:, 16:32] = 0.0
    x[:, 16:32] = float("nan")
    found = apply(NATIVE.apply, x, weight, bias)
    assert found[:, :32].isnan().all() and found[:, 32:].isfinite().all()


def test_bad_values_are_seen_where_there_is_a_tile():
    x, weight, bias = draw(2, keep=1.0)
    x[0, 49], x[1, 0] = float("inf"), float("nan")
    found = apply(KERNEL.op, x, weight, bias)
    assert found[0].isinf().all() and found[1].isnan().all()


def test_any_strides():
    x, weight, bias = draw(6)
    tiles, crow, col = compress(weight, 16, 32)
    strided = torch.stack([bias] * 2, 1)[:, 0]
    for other in (x.T.contiguous().T, torch.stack([x, x], 2)[:, :, 0], x.reshape(2, 3, 50)):
        agrees(KERNEL.op(other, tiles, crow, col, strided, out_features=70), other, weight, bias)
    turned = tiles.mT.contiguous().mT
    assert not NATIVE.supports(x, turned, crow, col, bias, out_features=70)
    agrees(KERNEL.op(x, turned, crow, col, bias, out_features=70), x, weight, bias)
    twice = torch.stack([crow] * 2, 1)[:, 0], torch.stack([col] * 2, 1)[:, 0]
    agrees(KERNEL.op(x, tiles, *twice, bias, out_features=70), x, weight, bias)


def test_what_the_native_form_leaves_to_plain_torch(monkeypatch):
    x, weight, bias = draw(2)
    stored = compress(weight, 16, 32)
    assert NATIVE.supports(x, *stored, bias, out_features=70) and NATIVE.supports(x, *stored, out_features=70)
    assert not NATIVE.supports(x, *compress(weight, 16, 24), bias, out_features=70)
    assert not NATIVE.supports(x.half(), stored[0].half(), *stored[1:], out_features=70)
    assert not NATIVE.supports(x.to("meta"), *stored, out_features=70)
    agrees(apply(KERNEL.op, x, weight, bias, width=24), x, weight, bias)
    monkeypatch.setattr(_native, "library", lambda name: None)
    agrees(apply(KERNEL.op, x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    x, weight, bias = draw(5)
    tiles, crow, col = compress(weight, 16, 32)
    x, tiles, bias = (value.requires_grad_(grad) for value in (x, tiles, bias))
    torch.library.opcheck(KERNEL.op, (x, tiles, crow, col, bias), {"out_features": 70})
    torch.library.opcheck(KERNEL.op, (x, tiles, crow, col), {"out_features": 70})


def test_native_opcheck():
    x, weight, bias = draw(5)
    torch.library.opcheck(KERNEL.native_op, (x, *compress(weight, 16, 32), bias))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(())}, r"x is torch.float32 of shape \[\], not floating of \[\.\.\., in\]"),
        ({"x": torch.zeros(5, 50, dtype=torch.int64)}, r"x is torch.int64 of shape \[5, 50\]"),
        ({"tiles": torch.zeros(5, 16)}, r"tiles is torch.float32 of shape \[5, 16\], not torch.float32 of \[kept"),
        ({"tiles": torch.zeros(5, 0, 32)}, r"tiles is torch.float32 of shape \[5, 0, 32\]"),
        ({"tiles": torch.zeros(5, 16, 32).half()}, r"tiles is torch.float16 of shape .* not torch.float32 of"),
        ({"crow": torch.zeros(3, dtype=torch.int32)}, r"crow is torch.int32 of shape \[3\], not torch.int32 of \[4\]"),
        ({"crow": torch.zeros(4, dtype=torch.int64)}, r"crow is torch.int64 of shape \[4\], not torch.int32"),
        ({"col": torch.zeros(6, dtype=torch.int32)}, r"col is torch.int32 of shape \[6\], not torch.int32 of \[5\]"),
        ({"bias": torch.zeros(71)}, r"bias is torch.float32 of shape \[71\], not torch.float32 of \[70\]"),
        ({"bias": torch.zeros(70).double()}, r"bias is torch.float64 of shape \[70\], not torch.float32"),
        ({"out_features": 130}, r"crow is torch.int32 of shape \[4\], not torch.int32 of \[6\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals(change, message):
    given = {
        "x": torch.zeros(5, 50), "tiles": torch.zeros(5, 16, 32), "crow": torch.zeros(4, dtype=torch.int32),
        "col": torch.zeros(5, dtype=torch.int32), "bias": torch.zeros(70), "out_features": 70, **change,
    }  # fmt: skip
    for form in FORMS.values():
        with pytest.raises(ValueError, match=message):
            form(**given)
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(ValueError, match=message):
        KERNEL.op(**{k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in given.items()})


@pytest.mark.parametrize(
    ("crow", "col"),
    [
        ([0, 1, 2, 4], [0, 1, 2]),
        ([1, 1, 2, 3], [0, 1, 2]),
        ([0, 2, 1, 3], [0, 1, 2]),
        ([0, 1, 2, 3], [0, 1, 4]),
        ([0, 1, 2, 3], [0, -1, 2]),
    ],
)
def test_indices_that_lead_outside_are_refused(crow, col):
    x, tiles = torch.zeros(5, 50), torch.zeros(3, 16, 32)
    crow, col = (torch.tensor(value, dtype=torch.int32) for value in (crow, col))
    with pytest.raises(ValueError, match="crow does not ascend from 0 to the number of tiles, or col is outside"):
        KERNEL.op(x, tiles, crow, col, out_features=70)


def test_native_refuses_what_it_would_read_beyond():
    x, weight, bias = draw(3)
    tiles, crow, col = compress(weight, 16, 32)
    for wrong in ((x[0], tiles, crow, col, bias), (x.half(), tiles.half(), crow, col, bias.half()),
                  (x, tiles, crow[:2], col, bias), (x, tiles, crow, col[:2], bias), (x, tiles[:2], crow, col, bias),
                  (x, tiles, crow, col, bias[:5]), (x, *compress(weight, 16, 24), bias)):  # fmt: skip
        with pytest.raises(ValueError, match="block_sparse"):
            KERNEL.native_op(*wrong)
    with pytest.raises(ValueError, match="contiguous"):
        KERNEL.native_op(x, tiles.mT.contiguous().mT, crow, col, bias)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        _, weight, bias = draw()
        for name, value in zip(("tiles", "crow", "col", "bias"), (*compress(weight, 16, 32), bias)):
            self.register_buffer(name, value)
        self.weight = weight

    def forward(self, x):
        return torch.ops.fxfreeze.block_sparse(x, self.tiles, self.crow, self.col, self.bias, out_features=70)


def test_export_and_onnx(tmp_path):
    """The file holds the tiles alone; ONNX Runtime makes the dense weight of them once, when it opens the file."""
    import onnxruntime

    with torch.no_grad():
        exported = torch.export.export(Layer(), (torch.randn(3, 50),), dynamic_shapes=({0: torch.export.Dim("batch")},))
        plain = exported.run_decompositions({KERNEL.op: KERNEL.reference})
        torch.onnx.export(plain, dynamo=True, verbose=False).save(tmp_path / "m.onnx")
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "m.onnx", options)
        for n in (1, 5):
            x = torch.randn(n, 50)
            assert torch.equal(exported.module()(x), Layer()(x))
            (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            agrees(torch.from_numpy(y), x, Layer().weight, Layer().bias)
    import onnx

    assert [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node] in (["Gemm"], ["MatMul", "Add"])


def test_gradients():
    x, weight, bias = draw(3, dtype=torch.float64)
    tiles, crow, col = compress(weight, 16, 32)
    arguments = [value.requires_grad_() for value in (x, tiles[:3].clone(), bias)]
    crow = crow.clamp(max=3)
    form = lambda x, tiles, bias: KERNEL.op(x, tiles, crow, col[:3], bias, out_features=70)  # noqa: E731
    assert torch.autograd.gradcheck(form, arguments)


# ---- GPU

triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 20)], ids=str)
def test_launch(device, shape, dtype):
    x, weight, bias = draw(*shape, dtype=dtype, device=device)
    for given in (bias, None):
        assert KERNEL.supports(x, *compress(weight, 16, 32), given, out_features=70)
        agrees(apply(KERNEL.launch, x, weight, given), x, weight, given)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", list(itertools.product((16, 64, 128), repeat=2)), ids=str)
def test_launch_of_tiles(device, sizes):
    """Edges and none, rows of tiles without any, and nothing at all."""
    depth, width = sizes
    for out, k in ((2 * width, 2 * depth), (2 * width + 3, 3 * depth - 5), (5, 7)):
        x, weight, bias = draw(17, out=out, k=k, depth=depth, width=width, keep=0.6, device=device)
        for given in (weight, weight.index_fill(0, torch.arange(min(width, out), device=device), 0.0), 0 * weight):
            found = apply(KERNEL.launch, x, given, bias, depth=depth, width=width)
            agrees(found, x, given, bias)


@pytest.mark.gpu
def test_launch_of_odd_sizes(device):
    for out, k in ((1, 1), (0, 5), (5, 0)):
        x, weight, bias = draw(3, out=out, k=k, keep=1.0, device=device)
        agrees(apply(KERNEL.launch, x, weight, bias), x, weight, bias)


@pytest.mark.gpu
def test_launch_leaves_out_empty_tiles(device):
    x, weight, bias = draw(3, out=64, k=64, keep=1.0, device=device)
    weight[32:, 16:32] = 0.0
    x[:, 16:32] = float("nan")
    found = apply(KERNEL.launch, x, weight, bias)
    assert found[:, :32].isnan().all() and found[:, 32:].isfinite().all()


@pytest.mark.gpu
def test_launch_of_bad_values(device):
    x, weight, bias = draw(2, keep=1.0, device=device)
    x[0, 49], x[1, 0] = float("inf"), float("nan")
    found = apply(KERNEL.launch, x, weight, bias)
    assert found[0].isinf().all() and found[1].isnan().all()


@pytest.mark.gpu
def test_launch_is_deterministic(device):
    x, weight, bias = draw(40, device=device)
    first = apply(KERNEL.launch, x, weight, bias)
    assert all(torch.equal(apply(KERNEL.launch, x, weight, bias), first) for _ in range(2))


def test_what_the_launcher_leaves_to_the_reference():
    x, weight, bias = draw(8)
    stored = compress(weight, 16, 32)
    assert KERNEL.supports(x, *stored, bias, out_features=70) and KERNEL.supports(x, *stored, out_features=70)
    assert not KERNEL.supports(x.double(), stored[0].double(), *stored[1:], out_features=70)
    assert not KERNEL.supports(x, stored[0].mT.contiguous().mT, *stored[1:], out_features=70)
    assert not KERNEL.supports(x.to("meta"), *stored, out_features=70)
    for depth, width in ((24, 32), (16, 256), (8, 32)):
        assert not KERNEL.supports(x, *compress(weight, depth, width), out_features=70)


@pytest.mark.slow
@triton
def test_in_the_interpreter(interpreter):
    interpreter(__file__)


# ---- compiling

NUMBERS = ("M", "N", "K")


def build(dtype, config, *, depth=64, width=64, precision="ieee", even=True):
    """Kernel, types, constants, options."""
    from fxfreeze.kernels import _block_sparse_triton as file

    pointer = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}[dtype]
    types = dict.fromkeys(("x_ptr", "tile_ptr", "bias_ptr", "y_ptr"), pointer)
    types |= {**dict.fromkeys(("crow_ptr", "col_ptr"), "*i32"), **dict.fromkeys(NUMBERS, "i32")}
    constants = {key: value for key, value in config.items() if not key.startswith("num_")}
    constants |= {"DEPTH": depth, "WIDTH": width, "EVEN": even, "PRECISION": precision}
    constants |= {"FACTOR": file.factor(getattr(torch, dtype))}
    options = {key: value for key, value in config.items() if key.startswith("num_")}
    return file.block_sparse_kernel, types, constants, options


CASES = [
    ("bfloat16", "half", "ieee", (128, 128)),
    ("bfloat16", "half", "ieee", (64, 64)),
    ("bfloat16", "half", "ieee", (16, 32)),
    ("float16", "half", "ieee", (128, 64)),
    ("float32", "single", "ieee", (64, 64)),
    ("float32", "single", "ieee", (16, 16)),
    ("float32", "tf32", "tf32", (128, 64)),
]


@pytest.mark.slow
@triton
@pytest.mark.parametrize(("dtype", "kind", "precision", "block"), CASES, ids=str)
def test_within_budget(within_budget, dtype, kind, precision, block):
    from fxfreeze.kernels import _block_sparse_triton as file

    size = max(64, block[1])
    config = next(c for c in file.configs(kind, size, size) if (c["BM"], c["BN"]) == block)
    name = f"block sparse {kind} {dtype} {block[0]}x{block[1]}x{config['BK']} of {size}"
    kernel, types, constants, options = build(dtype, config, depth=size, width=size, precision=precision)
    within_budget(name, kernel, types, constants, **options)


@triton
@pytest.mark.parametrize(
    ("dtype", "kind", "precision", "on"),
    [("bfloat16", "half", "ieee", True), ("float32", "tf32", "tf32", True), ("float32", "single", "ieee", False)],
)
def test_tensor_cores(cost, dtype, kind, precision, on):
    from fxfreeze.kernels import _block_sparse_triton as file

    kernel, types, constants, options = build(dtype, file.configs(kind, 64, 64)[1], precision=precision, even=False)
    found = cost(kernel, types, constants, **options)
    assert (found.tensor_cores > 0) == on and found.spills == 0


@triton
def test_sizes_of_one(cost):
    """Triton makes constants of integers that are 1."""
    from fxfreeze.kernels import _block_sparse_triton as file

    kernel, types, constants, options = build("float32", file.configs("single", 64, 64)[0], even=False)
    types = {name: kind for name, kind in types.items() if name not in NUMBERS}
    assert cost(kernel, types, {**constants, **dict.fromkeys(NUMBERS, 1)}, **options).spills == 0


@triton
@pytest.mark.parametrize("kind", ["half", "single", "tf32"])
def test_every_config_divides_every_tile(kind):
    from fxfreeze.kernels import _block_sparse_triton as file
    from fxfreeze.kernels.block_sparse import TILE_SIZES

    for depth, width in itertools.product(TILE_SIZES, repeat=2):
        found = file.configs(kind, depth, width)
        assert found and all(depth % config["BK"] == 0 and width % config["BN"] == 0 for config in found)
