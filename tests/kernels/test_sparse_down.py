"""fxfreeze::sparse_down against a dense product in float64."""

from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch
from torch import nn

from fxfreeze.kernels import _native
from fxfreeze.kernels._op import OPS

KERNEL = OPS["sparse_down"]
NATIVE = KERNEL.native
ALL = 1e9
"""A crossover that no number of nonzero values exceeds."""
FORMS = {"reference": KERNEL.reference, "op": KERNEL.op}


def draw(*shape, dtype=torch.float32, k=37, p=19, fires=0.3, device="cpu"):
    """h with a fraction of nonzero values, weight, bias."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(*shape, k, generator=generator) * (torch.rand(*shape, k, generator=generator) < fires)
    others = torch.randn(k, p, generator=generator), torch.randn(p, generator=generator)
    return [value.to(device, dtype) for value in (h, *others)]


def exact(h, weight, bias=None):
    product = h.double().cpu() @ weight.double().cpu()
    return product if bias is None else product + bias.double().cpu()


def agrees(found, h, weight, bias=None):
    """Every sum within some roundings of its terms' absolute values."""
    want = exact(h, weight, bias)
    scale = exact(h.abs(), weight.abs(), None if bias is None else bias.abs())
    assert found.dtype == h.dtype and found.shape == want.shape and found.is_contiguous()
    eps = torch.finfo(h.dtype).eps
    assert ((found.double().cpu() - want).abs() <= 4 * eps * scale + torch.finfo(h.dtype).tiny).all()


def branch(h, weight, bias=None, *, form=KERNEL.op, **options):
    """Which product ran: a neuron that does not fire has an infinite weight, which only the sparse one leaves out."""
    silent = (h.reshape(-1, h.shape[-1]) == 0).all(0).nonzero()[0].item()
    weight = weight.clone()
    weight[silent] = float("inf")
    found = form(h, weight, bias, **options)
    assert found.isfinite().all() or found.isnan().all()
    return "sparse" if found.isfinite().all() else "dense"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_shapes_and_types(form, shape, dtype):
    h, weight, bias = draw(*shape, dtype=dtype)
    for given, crossover in itertools.product((bias, None), (0.0, ALL)):
        agrees(FORMS[form](h, weight, given, crossover=crossover), h, weight, given)


@pytest.mark.parametrize(("k", "p"), [(0, 5), (5, 0), (0, 0), (1, 1), (8, 1), (9, 3)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_small_sizes(form, k, p):
    h, weight, bias = draw(3, k=k, p=p, fires=1.0)
    for crossover in (0.0, ALL):
        agrees(FORMS[form](h, weight, bias, crossover=crossover), h, weight, bias)


@pytest.mark.parametrize("fires", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 11])
def test_native(rows, dtype, fires):
    """Three chunks of columns for one thread, and dozens of blocks of neurons."""
    arguments, threads = draw(rows, dtype=dtype, k=517, p=4099, fires=fires), torch.get_num_threads()
    for count in (1, 2, 7):
        torch.set_num_threads(count)
        try:
            agrees(NATIVE.apply(*arguments, crossover=ALL), *arguments)
        finally:
            torch.set_num_threads(threads)


def test_nothing_fires():
    h, weight, bias = draw(3, fires=0.0)
    for crossover in (0.0, 1.0):  # none are not more than none
        assert torch.equal(KERNEL.op(h, weight, bias, crossover=crossover), bias.expand(3, -1))
        assert branch(h, weight, bias, crossover=crossover) == "sparse"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_crossover_counts_all_rows(dtype):
    h, weight, bias = (value.to(dtype) for value in draw(4, k=40))
    h[:, -1] = 0.0
    count = int((h != 0).sum())
    assert 40 < count < 60 and len({int((row != 0).sum()) for row in h}) > 1
    for given in (bias, None):
        assert branch(h, weight, given, crossover=count / 40) == "sparse"
        assert branch(h, weight, given, crossover=(count - 1) / 40) == "dense"
    assert branch(h, weight, form=KERNEL.reference, crossover=ALL) == "dense"


def test_a_bad_value_fires():
    h, weight, bias = draw(3, k=40, fires=0.0)
    h[0, 3], h[1, 4], h[2, 5] = float("nan"), float("inf"), float("-inf")
    for crossover in (2 / 40, 3 / 40):
        found = KERNEL.op(h, weight, bias, crossover=crossover)
        assert found[0].isnan().all() and (found[1:].abs() == float("inf")).all()
        assert torch.equal(found[1:].sign(), torch.stack([weight[4], -weight[5]]).sign())
    with_silent = weight.clone()
    with_silent[0] = float("inf")
    assert KERNEL.op(h, with_silent, bias, crossover=2 / 40).isnan().all()  # three are more than two: dense
    assert KERNEL.op(h, with_silent, bias, crossover=3 / 40)[1:].isinf().all()


def test_a_negative_zero_does_not_fire():
    h, weight, bias = draw(2, fires=0.0)
    assert branch(-h, weight, bias, crossover=0.0) == "sparse"


@pytest.mark.parametrize("crossover", [0.0, ALL])
def test_two_calls_agree_in_every_bit(crossover):
    arguments = draw(5, k=517, p=4099)
    first = KERNEL.op(*arguments, crossover=crossover)
    assert all(torch.equal(KERNEL.op(*arguments, crossover=crossover), first) for _ in range(3))


def test_a_row_is_the_same_whatever_the_others_are():
    h, weight, bias = draw(5, k=517, p=300)
    found = KERNEL.op(h, weight, bias, crossover=ALL)
    assert all(torch.equal(KERNEL.op(row, weight, bias, crossover=ALL), found[i]) for i, row in enumerate(h))


def test_any_strides():
    h, weight, bias = draw(6)
    strided = torch.stack([bias] * 2, 1)[:, 0]
    for other in (h.T.contiguous().T, torch.stack([h, h], 2)[:, :, 0], h.reshape(2, 3, 37)):
        agrees(KERNEL.op(other, weight, strided, crossover=ALL), other, weight, bias)
    by_column = weight.T.contiguous().T
    assert not NATIVE.supports(h, by_column, bias)
    agrees(KERNEL.op(h, by_column, bias, crossover=ALL), h, weight, bias)


def test_what_the_native_form_leaves_to_plain_torch(monkeypatch):
    arguments = draw(2)
    assert NATIVE.supports(*arguments) and NATIVE.supports(*arguments[:2])
    assert not NATIVE.supports(*(value.half() for value in arguments))
    assert not NATIVE.supports(*(value.to("meta") for value in arguments))
    assert branch(*arguments, crossover=ALL) == "sparse"
    monkeypatch.setattr(_native, "library", lambda name: None)
    assert branch(*arguments, crossover=ALL) == "dense"


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    h, weight, bias = (value.requires_grad_(grad) for value in draw(5))
    torch.library.opcheck(KERNEL.op, (h, weight, bias), {"crossover": 0.5})
    torch.library.opcheck(KERNEL.op, (h, weight))


def test_native_opcheck():
    torch.library.opcheck(KERNEL.native_op, (*draw(5), 0.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.zeros(())}, r"h is torch.float32 of shape \[\], not floating of \[\.\.\., K\]"),
        ({"h": torch.zeros(5, 37, dtype=torch.int64)}, r"h is torch.int64 of shape \[5, 37\]"),
        (
            {"weight": torch.zeros(36, 19)},
            r"weight is torch.float32 of shape \[36, 19\], not torch.float32 of \[K = 37",
        ),
        ({"weight": torch.zeros(37)}, r"weight is torch.float32 of shape \[37\]"),
        ({"weight": torch.zeros(37, 19).half()}, r"weight is torch.float16 of .* not torch.float32 of \[K = 37, P\]"),
        ({"bias": torch.zeros(37)}, r"bias is torch.float32 of shape \[37\], not torch.float32 of \[P = 19\]"),
        ({"bias": torch.zeros(19).double()}, r"bias is torch.float64 of shape \[19\], not torch.float32"),
        ({"crossover": -0.1}, r"crossover -0\.1 is not 0 or more"),
        ({"crossover": float("nan")}, r"crossover nan is not 0 or more"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals(change, message):
    given = {**dict(zip(("h", "weight", "bias"), draw(5))), "crossover": 0.5, **change}
    for form in FORMS.values():
        with pytest.raises(ValueError, match=message):
            form(**given)
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(ValueError, match=message):
        KERNEL.op(**{k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in given.items()})


def test_native_refuses_what_it_would_read_beyond():
    h, weight, bias = draw(3)
    for wrong in ((h[:, :5], weight, bias), (h, weight[:5], bias), (h, weight, bias[:5]), (h[0], weight, bias),
                  (h.half(), weight.half(), bias.half())):  # fmt: skip
        with pytest.raises(ValueError, match="sparse_down"):
            KERNEL.native_op(*wrong, ALL)
    with pytest.raises(ValueError, match="contiguous"):
        KERNEL.native_op(h, weight.T.contiguous().T, bias, ALL)


class Down(nn.Module):
    def __init__(self):
        super().__init__()
        _, weight, bias = draw()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, h):
        return torch.ops.fxfreeze.sparse_down(h.relu(), self.weight, self.bias, crossover=0.5)


def test_export_and_onnx(tmp_path):
    import onnxruntime

    with torch.no_grad():
        exported = torch.export.export(Down(), (torch.randn(3, 37),), dynamic_shapes=({0: torch.export.Dim("batch")},))
        plain = exported.run_decompositions({KERNEL.op: KERNEL.reference})
        torch.onnx.export(plain, dynamo=True, verbose=False).save(tmp_path / "m.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
        for n in (1, 5):
            h = torch.randn(n, 37)
            assert torch.equal(exported.module()(h), Down()(h))
            (y,) = session.run(None, {session.get_inputs()[0].name: h.numpy()})
            agrees(torch.from_numpy(y), h.relu(), Down().weight, Down().bias)


def test_gradients():
    arguments = [value.requires_grad_() for value in draw(3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *given: KERNEL.op(*given, crossover=ALL), arguments)


# ---- GPU

triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 4)], ids=str)
def test_launch(device, shape, dtype):
    """Two slices of K and a part of one."""
    h, weight, bias = draw(*shape, dtype=dtype, k=1100, p=70, fires=0.1, device=device)
    for given in (bias, None):
        assert KERNEL.supports(h, weight, given)
        found = KERNEL.launch(h, weight, given, crossover=0.0)
        agrees(found, h, weight, given)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(1, 1), (0, 5), (5, 0), (513, 33), (33, 513)], ids=str)
@pytest.mark.parametrize("fires", [0.0, 0.5, 1.0])
def test_launch_of_odd_sizes(device, sizes, fires):
    k, p = sizes
    for rows in (1, 2, 4, 7):
        arguments = draw(rows, k=k, p=p, fires=fires, device=device)
        agrees(KERNEL.launch(*arguments), *arguments)


@pytest.mark.gpu
def test_launch_reads_only_what_fires(device):
    h, weight, bias = draw(2, k=600, p=70, device=device)
    silent = (h == 0).all(0)
    assert 100 < silent.sum() < 500
    weight[silent] = float("nan")
    assert KERNEL.launch(h, weight, bias).isfinite().all()


@pytest.mark.gpu
def test_launch_of_bad_values(device):
    h, weight, bias = draw(3, k=600, p=70, fires=0.0, device=device)
    h[0, 3], h[1, 0] = float("nan"), float("inf")
    found = KERNEL.launch(h, weight, bias)
    assert found[0].isnan().all()
    # Of an infinite value and another row's 0 nothing comes.
    assert (found[1].abs() == float("inf")).all() and torch.equal(found[2], bias)


@pytest.mark.gpu
def test_launch_of_many_slices(device):
    """More than the sums that are added up at once."""
    from fxfreeze.kernels._sparse_down_triton import SLICE, TOTAL

    arguments = draw(2, k=SLICE * (TOTAL["BS"] + 2) + 1, p=5, fires=0.02, device=device)
    agrees(KERNEL.launch(*arguments), *arguments)


@pytest.mark.gpu
def test_launch_is_deterministic(device):
    arguments = draw(8, k=1100, p=300, device=device)
    first = KERNEL.launch(*arguments)
    assert all(torch.equal(KERNEL.launch(*arguments), first) for _ in range(2))


def test_what_the_launcher_leaves_to_the_reference():
    assert KERNEL.supports(*draw(8)) and KERNEL.supports(*draw(2, 4)) and KERNEL.supports(*draw())
    assert not KERNEL.supports(*draw(9)) and not KERNEL.supports(*draw(3, 3))
    assert not KERNEL.supports(*draw(8, dtype=torch.float64))
    h, weight, bias = draw(8)
    assert not KERNEL.supports(h, weight.T.contiguous().T, bias)
    assert not KERNEL.supports(h, weight.to("meta"), bias)


@pytest.mark.slow
@triton
def test_in_the_interpreter(interpreter):
    interpreter(__file__)


# ---- compiling

TYPES = {"h_ptr": "*fp16", "list_ptr": "*i32", "count_ptr": "*i32", "N": "i32", "K": "i32"}


@pytest.mark.slow
@triton
@pytest.mark.parametrize("count", [1, 8])
def test_active_within_budget(within_budget, count):
    from fxfreeze.kernels import _sparse_down_triton as file

    name, constants = f"sparse down active {count}", {"NB": count, "SLICE": file.SLICE}
    within_budget(name, file.active_kernel, TYPES, constants, num_warps=4)


@pytest.mark.slow
@triton
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_rows_within_budget(within_budget, count, dtype):
    from fxfreeze.kernels import _sparse_down_triton as file

    types = {**TYPES, "h_ptr": f"*{dtype}", "w_ptr": f"*{dtype}", "sum_ptr": "*fp32", "P": "i32"}
    for config in file.ROWS_CONFIGS[count]:
        constants = {"NB": count, "SLICE": file.SLICE, "BP": config["BP"], "BK": config["BK"]}
        name = f"sparse down rows {dtype} {count}x{config['BP']}x{config['BK']}"
        within_budget(name, file.rows_kernel, types, constants, num_warps=config["num_warps"])


@pytest.mark.slow
@triton
def test_total_within_budget(within_budget):
    from fxfreeze.kernels import _sparse_down_triton as file

    types = {"sum_ptr": "*fp32", "bias_ptr": "*fp16", "y_ptr": "*fp16", **dict.fromkeys(("N", "P", "slices"), "i32")}
    within_budget("sparse down total", file.total_kernel, types, {"BIAS": True, **file.TOTAL}, num_warps=4)


@triton
def test_sizes_of_one(cost):
    """Triton makes constants of integers that are 1."""
    from fxfreeze.kernels import _sparse_down_triton as file

    types = {name: kind for name, kind in TYPES.items() if kind != "i32"}
    found = cost(file.active_kernel, types, {"N": 1, "K": 1, "NB": 1, "SLICE": file.SLICE})
    assert found.spills == 0
    types |= {"w_ptr": "*fp16", "sum_ptr": "*fp32"}
    sizes = {"N": 1, "P": 1, "K": 1}
    assert cost(file.rows_kernel, types, {**sizes, "NB": 1, "SLICE": file.SLICE, "BP": 256, "BK": 16}).spills == 0
    types = {"sum_ptr": "*fp32", "bias_ptr": "*fp16", "y_ptr": "*fp16"}
    constants = {"N": 1, "P": 1, "slices": 1, "BIAS": True, **file.TOTAL}
    assert cost(file.total_kernel, types, constants).spills == 0
