"""fxfreeze::select_lora against every row computed alone, with its own adapter, in float64."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from fxfreeze.kernels._op import OPS

KERNEL = OPS["select_lora"]
FORMS = ("gather", "mask")


def draw(*shape, dtype=torch.float32, k=37, p=19, rank=3, adapters=5, device="cpu", ids=None):
    """x, a, b, and ids that come in no order and repeat."""
    generator = torch.Generator().manual_seed(0)
    x, a = torch.randn(*shape, k, generator=generator), torch.randn(adapters, rank, k, generator=generator)
    b = torch.randn(adapters, rank, p, generator=generator)
    ids = torch.randint(adapters, shape[:1], generator=generator) if ids is None else torch.tensor(ids)
    return [*(value.to(device, dtype) for value in (x, a, b)), ids.to(device)]


def exact(x, a, b, ids):
    rows = [row.double() @ a[id].double().T @ b[id].double() for row, id in zip(x.cpu(), ids.tolist())]
    return torch.stack(rows) if rows else x.cpu().double().new_zeros(*x.shape[:-1], b.shape[-1])


def agrees(found, x, a, b, ids):
    x, a, b = x.cpu(), a.cpu(), b.cpu()
    want, scale = exact(x, a, b, ids), exact(x.abs(), a.abs(), b.abs(), ids)
    assert found.dtype == x.dtype and found.shape == want.shape and found.is_contiguous()
    eps = torch.finfo(x.dtype).eps
    assert ((found.double().cpu() - want).abs() <= 4 * eps * scale + torch.finfo(x.dtype).tiny).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7,), (4, 6), (3, 2, 5), (1,), (0,), (3, 0)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_shapes_and_types(form, shape, dtype):
    given = draw(*shape, dtype=dtype)
    agrees(KERNEL.op(*given, form=form), *given)
    agrees(KERNEL.op(*given[:3], given[3].int(), form=form), *given)


@pytest.mark.parametrize("form", FORMS)
def test_a_wider_bank_is_computed_in_its_dtype(form):
    x, a, b, ids = draw(5, 4)
    half = x.bfloat16()
    found = KERNEL.op(half, a, b, ids, form=form)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, KERNEL.op(half.float(), a, b, ids, form=form).bfloat16())


@pytest.mark.parametrize("form", FORMS)
def test_a_row_sees_no_other_adapter(form):
    x, a, b, ids = draw(4, 3, ids=[0, 2, 2, 4])
    a, b = a.clone(), b.clone()
    a[1], b[3] = float("inf"), float("nan")
    if form == "gather":
        agrees(KERNEL.op(x, a, b, ids, form=form), x, a, b, ids)
    a[1], b[3] = 1e38, 1.0  # x·Aᵀ overflows there
    assert not (x @ a[1].T).isfinite().all()
    agrees(KERNEL.op(x, a, b, ids, form=form), x, a, b, ids)


# ---- words


def words(*shape, dtype=torch.int64, vocabulary=11, **given):
    """As `draw`, with integers for x, of which the first and the last are there."""
    _, a, b, ids = draw(shape[0], k=vocabulary, **given)
    x = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(1))
    x.view(-1)[:2] = torch.tensor([0, vocabulary - 1])[: x.numel()]
    return x.to(dtype), a, b, ids


def one_hot(x, a):
    return nn.functional.one_hot(x.long(), a.shape[-1]).to(a.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7,), (4, 6), (3, 2, 5), (1,), (3, 0)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_integers_stand_for_one_hot_vectors(form, shape, dtype):
    x, a, b, ids = words(*shape, dtype=torch.int32 if form == "mask" else torch.int64)
    a, b = a.to(dtype), b.to(dtype)
    found = KERNEL.op(x, a, b, ids.int() if form == "mask" else ids, form=form)
    agrees(found, one_hot(x, a), a, b, ids)


def test_a_look_at_a_large_vocabulary_copies_none_of_it():
    x, _, _, ids = words(2, 3)
    a, b = torch.zeros(1000, 3, 50000, device="meta"), torch.zeros(1000, 3, 19, device="meta")
    assert max(sizes(KERNEL.reference, x.to("meta"), a, b, ids.to("meta"))) < 1000


def test_integers_are_exported_and_checked():
    x, a, b, ids = words(4, 2)
    torch.library.opcheck(KERNEL.op, (x, a.requires_grad_(), b.requires_grad_(), ids))
    a, b = (value.detach().double().requires_grad_() for value in (a, b))
    assert torch.autograd.gradcheck(lambda a, b: KERNEL.op(x, a, b, ids), (a, b))


def sizes(function, *args):
    """How many numbers each operator makes."""
    seen = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            views = {"aten.view", "aten.t", "aten.transpose", "aten.reshape", "aten._unsafe_view"}
            if isinstance(result, torch.Tensor) and str(func.overloadpacket) not in views:
                seen.append(result.numel())
            return result

    with Sizes():
        function(*args)
    return seen


# ---- what all share


def test_the_time_of_a_gather_does_not_depend_on_the_bank():
    """Not timed: nothing in the graph has the size of all adapters."""
    x, _, _, ids = draw(2, 3)
    a, b = torch.zeros(1000, 3, 37, device="meta"), torch.zeros(1000, 3, 19, device="meta")
    assert max(sizes(KERNEL.reference, x.to("meta"), a, b, ids.to("meta"))) < 1000


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_opcheck(grad, form):
    x, a, b, ids = draw(4, 2)
    given = [value.requires_grad_(grad) for value in (x, a, b)]
    torch.library.opcheck(KERNEL.op, (*given, ids), {"form": form})


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form):
    x, a, b, ids = draw(3, 2, dtype=torch.float64, k=5, p=4)
    given = [value.requires_grad_() for value in (x, a, b)]
    assert torch.autograd.gradcheck(lambda x, a, b: KERNEL.op(x, a, b, ids, form=form), given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "loop"}, r"form 'loop' is none of 'gather', 'mask'"),
        (
            {"x": torch.zeros(37)},
            r"x is torch.float32 of shape \[37\], neither floating \[n, .*, in\] nor integers",
        ),
        ({"x": torch.zeros(7, 37, dtype=torch.bool)}, r"x is torch.bool"),
        ({"x": torch.tensor(3)}, r"x is torch.int64 of shape \[\]"),
        ({"a": torch.zeros(5, 3, 36)}, r"a is torch.float32 of shape \[5, 3, 36\], not floating \[K, r, in = 37\]"),
        ({"a": torch.zeros(3, 37)}, r"a is torch.float32 of shape \[3, 37\]"),
        ({"x": torch.zeros(7, 2).long(), "a": torch.zeros(5, 37)}, r"a is .* \[5, 37\], not floating \[K, r, in\]"),
        ({"b": torch.zeros(5, 19, 3)}, r"b is torch.float32 of shape \[5, 19, 3\], not .* \[K = 5, r = 3, out\]"),
        ({"b": torch.zeros(4, 3, 19)}, r"b is torch.float32 of shape \[4, 3, 19\]"),
        ({"b": torch.zeros(5, 3, 19).double()}, r"b is torch.float64 .* not torch.float32"),
        ({"ids": torch.zeros(6, dtype=torch.int64)}, r"ids is torch.int64 of shape \[6\], not an integer for each"),
        ({"ids": torch.zeros(7)}, r"ids is torch.float32 of shape \[7\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals(change, message):
    given = {**dict(zip(("x", "a", "b", "ids"), draw(7))), **change}
    for form in (KERNEL.reference, KERNEL.op):
        with pytest.raises(ValueError, match=message):
            form(**given)
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(ValueError, match=message):
        KERNEL.op(**{k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in given.items()})


class Layer(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, x, a, b, ids):
        return torch.ops.fxfreeze.select_lora(x, a, b, ids, form=self.form)


@pytest.mark.parametrize("given", [draw, words], ids=["floats", "words"])
@pytest.mark.parametrize("form", FORMS)
def test_export_and_onnx_with_any_number_of_adapters(tmp_path, form, given):
    import onnxruntime

    rows, bank = torch.export.Dim("rows"), torch.export.Dim("bank", min=2)
    dims = ({0: rows}, {0: bank}, {0: bank}, {0: rows})
    with torch.no_grad():
        exported = torch.export.export(Layer(form), tuple(given(4, 2)), dynamic_shapes=dims)
        plain = exported.run_decompositions({KERNEL.op: KERNEL.reference})
        torch.onnx.export(plain, dynamo=True, verbose=False).save(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for count in (2, 9):
        x, a, b, ids = given(6, 2, adapters=count)
        names = [item.name for item in session.get_inputs()]
        (y,) = session.run(None, {name: value.numpy() for name, value in zip(names, (x, a, b, ids))})
        agrees(torch.from_numpy(y), x if given is draw else one_hot(x, a), a, b, ids)
        agrees(exported.module()(x, a, b, ids), x if given is draw else one_hot(x, a), a, b, ids)


# ---- GPU

triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(6,), (3, 4), (2, 2, 35), (2, 70), (0,)], ids=str)
def test_launch(device, shape, dtype):
    """With sums in registers and with tensor cores, in one tile of tokens and in several."""
    given = draw(*shape, dtype=dtype, k=130, p=70, device=device)
    assert KERNEL.supports(*given)
    agrees(KERNEL.launch(*given), *given)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1100, 33, 4), (33, 530, 17), (70, 5, 128)], ids=str)
@pytest.mark.parametrize("length", [1, 6])
def test_launch_of_odd_sizes(device, sizes, length):
    k, p, rank = sizes
    given = draw(3, length, k=k, p=p, rank=rank, device=device)
    agrees(KERNEL.launch(*given), *given)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 6])
def test_launch_reads_only_the_rows_own_adapters(device, length):
    x, a, b, ids = draw(3, length, device=device, ids=[4, 1, 4])
    a[0], a[2], b[3] = float("nan"), float("inf"), float("nan")
    agrees(KERNEL.launch(x, a, b, ids), x, a, b, ids)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 6])
def test_launch_is_deterministic(device, length):
    given = draw(9, length, k=2500, device=device)
    first = KERNEL.launch(*given)
    assert all(torch.equal(KERNEL.launch(*given), first) for _ in range(2))


@pytest.mark.gpu
def test_launch_takes_any_strides(device):
    x, a, b, ids = draw(4, 6, device=device)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    agrees(KERNEL.launch(turned, a, b, ids), x, a, b, ids)


def test_what_the_launcher_leaves_to_the_reference():
    x, a, b, ids = draw(4, 6)
    assert KERNEL.supports(x, a, b, ids)
    assert not KERNEL.supports(*draw(4, dtype=torch.float64))
    assert not KERNEL.supports(*draw(4, rank=129))
    assert not KERNEL.supports(x, a.transpose(0, 1).contiguous().transpose(0, 1), b, ids)
    assert not KERNEL.supports(x.half(), a, b, ids)
    assert not KERNEL.supports(x, a, b, ids.to("meta"))


@pytest.mark.slow
@triton
def test_in_the_interpreter(interpreter):
    interpreter(__file__)


# ---- compiling

SIZES = dict.fromkeys(("n", "L", "R"), "i32")
POINTERS = {"ids_ptr": "*i64", "order_ptr": "*i64", "h_ptr": "*fp32"}


def compiled(within_budget, name, kernel, dtype, dot, rank, **given):
    import triton.language as tl

    precision = "ieee" if dtype == "fp32" else "tf32"
    given |= {"FACTOR": {"bf16": tl.bfloat16, "fp32": tl.float32}[dtype]} if "FACTOR" in kernel.arg_names else {}
    own = {"x_ptr", "a_ptr", "b_ptr", "y_ptr", "K", "P", "slices"} & set(kernel.arg_names)
    types = {**POINTERS, **SIZES, **{item: f"*{dtype}" if "ptr" in item else "i32" for item in own}}
    constants = {"DOT": dot, "PRECISION": precision, "BL": 64 if dot else 1, "BR": rank}
    options = {item: given.pop(item) for item in ("num_warps", "num_stages") if item in given}
    within_budget(name, kernel, types, {**constants, **given}, **options)


@pytest.mark.slow
@triton
def test_dots_within_budget(within_budget):
    from fxfreeze.kernels import _select_lora_triton as file

    name = "select lora {} dot bf16 64"
    compiled(within_budget, name.format("shrink"), file.shrink_kernel, "bf16", True, 64, SLICE=1024, **file.SHRINK)
    compiled(within_budget, name.format("expand"), file.expand_kernel, "bf16", True, 64, **file.EXPAND)


@pytest.mark.slow
@triton
def test_sums_within_budget(within_budget):
    from fxfreeze.kernels import _select_lora_triton as file

    given = {"SLICE": file.SLICE, "BK": file.BLOCK // 8, "num_warps": 4}
    compiled(within_budget, "select lora shrink sum 8", file.shrink_kernel, "bf16", False, 8, **given)
    given = {"BP": file.BLOCK // 8, "num_warps": 4}
    compiled(within_budget, "select lora expand sum 8", file.expand_kernel, "bf16", False, 8, **given)
