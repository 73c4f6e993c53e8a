"""fxfreeze::select_conv against every row convolved alone, with the weight of its own adapter, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from fxfreeze.kernels._op import OPS

KERNEL = OPS["select_conv"]
CONVS = (functional.conv1d, functional.conv2d, functional.conv3d)


def how(dims=2, stride=1, padding=1, dilation=1, groups=1):
    """Keywords of the operator, the same for all dims; of two paddings the first is in front."""
    pair = [padding, padding] if isinstance(padding, int) else list(padding)
    return {"stride": [stride] * dims, "padding": pair * dims, "dilation": [dilation] * dims, "groups": groups}


def draw(rows=4, dims=2, features=8, out=6, kernel=3, rank=2, adapters=5, groups=1, ids=None, size=9):
    """x, a, b, and ids that come in no order and repeat."""
    generator = torch.Generator().manual_seed(0)
    spatial = [size, size - 1, size - 2][:dims]
    x = torch.randn(rows, features, *spatial, generator=generator)
    a = torch.randn(adapters, rank, features // groups, *[kernel] * dims, generator=generator)
    b = torch.randn(adapters, rank, out, generator=generator)
    ids = torch.randint(adapters, (rows,), generator=generator) if ids is None else torch.tensor(ids)
    return x, a, b, ids


def exact(x, a, b, ids, stride, padding, dilation, groups=1):
    dims, results = x.dim() - 2, []
    padded = [size for dim in reversed(range(dims)) for size in padding[2 * dim : 2 * dim + 2]]
    for row, id in zip(x.double(), ids.tolist()):
        weight = (b[id].double().T @ a[id].double().flatten(1)).reshape(b.shape[2], *a.shape[2:])
        row = functional.pad(row[None], padded)
        results.append(CONVS[dims - 1](row, weight, None, stride, 0, dilation, groups))
    return torch.cat(results)


def agrees(found, x, a, b, ids, **given):
    want, scale = exact(x, a, b, ids, **given), exact(x.abs(), a.abs(), b.abs(), ids, **given)
    assert found.dtype == x.dtype and found.shape == want.shape and found.is_contiguous()
    eps = torch.finfo(x.dtype).eps
    assert ((found.double() - want).abs() <= 4 * eps * scale + torch.finfo(x.dtype).tiny).all()


WINDOWS = [
    how(), how(padding=(0, 2)), how(stride=2), how(dilation=2), how(stride=3, padding=2, dilation=2),
    how(padding=0), how(stride=2, dilation=3, padding=(3, 1)),
]  # fmt: skip


@pytest.mark.parametrize("rank", [1, 3, 9])  # narrower than the features, and not
@pytest.mark.parametrize("given", WINDOWS, ids=str)
def test_windows(given, rank):
    operands = draw(rank=rank)
    agrees(KERNEL.op(*operands, **given), *operands, **given)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
def test_dims_and_groups(kernel, stride, groups, dims):
    operands, given = draw(dims=dims, kernel=kernel, groups=groups, out=16), how(dims, stride, groups=groups)
    agrees(KERNEL.op(*operands, **given), *operands, **given)


def test_a_window_that_is_no_square():
    x, _, b, ids = draw()
    a = torch.randn(5, 2, 8, 1, 4, generator=torch.Generator().manual_seed(3))
    given = {"stride": [2, 1], "padding": [0, 1, 2, 3], "dilation": [1, 2], "groups": 1}
    agrees(KERNEL.op(x, a, b, ids, **given), x, a, b, ids, **given)
    wide = a.repeat(1, 9, 1, 1, 1), b.repeat(1, 9, 1)  # windows first
    agrees(KERNEL.op(x, *wide, ids, **given), x, *wide, ids, **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 4, 0])
def test_types_and_rows(rows, dtype):
    x, a, b, ids = draw(rows)
    operands = x.to(dtype), a.to(dtype), b.to(dtype), ids.int()
    found = KERNEL.op(*operands, **how())
    if rows:
        agrees(found, *operands, **how())
    else:
        assert found.shape == (0, 6, 9, 8) and found.dtype == dtype


def test_a_wider_bank_is_computed_in_its_dtype():
    x, a, b, ids = draw()
    found = KERNEL.op(x.bfloat16(), a, b, ids, **how())
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, KERNEL.op(x.bfloat16().float(), a, b, ids, **how()).bfloat16())


@pytest.mark.parametrize("rank", [1, 9])
def test_a_row_sees_no_other_adapter(rank):
    x, a, b, ids = draw(rank=rank, ids=[0, 2, 2, 4])
    a, b = a.clone(), b.clone()
    a[1], b[3] = float("inf"), float("nan")
    agrees(KERNEL.op(x, a, b, ids, **how()), x, a, b, ids, **how())


def sizes(*args, **given):
    """How many numbers each operator of the plain form makes."""
    seen = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                seen.append(result.numel())
            return result

    with Sizes():
        KERNEL.reference(*args, **given)
    return seen


@pytest.mark.parametrize(("rank", "kernel"), [(1, 3), (9, 3), (2, 1)])
def test_the_time_does_not_depend_on_the_bank(rank, kernel):
    """Not timed: nothing in the graph has the size of all adapters."""
    x, _, _, ids = draw(2)
    a = torch.zeros(3000, rank, 8, kernel, kernel, device="meta")
    b = torch.zeros(3000, rank, 6, device="meta")
    found = sizes(x.to("meta"), a, b, ids.to("meta"), **how(padding=kernel // 2))
    assert max(found) <= 2 * 8 * 11 * 10 * kernel * kernel < b.numel()


@pytest.mark.parametrize(
    ("rank", "features", "groups", "stride", "most"),
    [(1, 16, 1, 1, 16), (3, 64, 1, 1, 64), (9, 4, 1, 1, 36), (2, 4, 4, 1, 36), (3, 8, 1, 2, 18), (1, 8, 1, 2, 9)],
)
def test_at_the_places_of_a_window_stands_what_is_narrower(rank, features, groups, stride, most):
    """The rank, or the features of a group, of which a stride of 2 × 2 leaves a quarter; `most`: per place of x."""
    operands = draw(2, rank=rank, features=features, out=4, groups=groups, size=31)
    found = sizes(*operands, **how(stride=stride, groups=groups))
    assert max(found) <= most * 2 * 33 * 32


@pytest.mark.parametrize("rank", [1, 9])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad, rank):
    x, a, b, ids = draw(rank=rank)
    given = [value.requires_grad_(grad) for value in (x, a, b)]
    torch.library.opcheck(KERNEL.op, (*given, ids), how(stride=2))


@pytest.mark.parametrize("rank", [1, 3])
def test_gradients(rank):
    x, a, b, ids = draw(2, features=2, out=2, rank=rank, adapters=3, size=4)
    given = [value.double().requires_grad_() for value in (x, a, b)]
    assert torch.autograd.gradcheck(lambda x, a, b: KERNEL.op(x, a, b, ids, **how()), given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 8)}, r"x is torch.float32 of shape \[4, 8\], not floating \[n, in, \*spatial\]"),
        ({"x": torch.zeros(4, 8, 3, 3).long()}, r"x is torch.int64"),
        ({"groups": 3}, r"3 groups do not divide 8 features"),
        ({"a": torch.zeros(5, 2, 7, 3, 3)}, r"a is .*, not floating \[K, r, in / groups = 8, \*kernel\] with 2 sizes"),
        ({"a": torch.zeros(5, 2, 8, 3)}, r"a is torch.float32 of shape \[5, 2, 8, 3\]"),
        ({"b": torch.zeros(5, 6, 2)}, r"b is .* \[5, 6, 2\], not torch.float32 \[K = 5, r = 2, out\] with 1 groups"),
        ({"b": torch.zeros(5, 2, 6).double()}, r"b is torch.float64"),
        ({"ids": torch.zeros(3).long()}, r"ids is torch.int64 of shape \[3\], not an integer for each of the 4 rows"),
        ({"stride": [1]}, r"1 strides, 2 dilations and 4 paddings for 2 dims"),
        ({"padding": [1, 1]}, r"2 strides, 2 dilations and 2 paddings for 2 dims"),
        ({"stride": [1, 0]}, r"stride \[1, 0\], dilation"),
        ({"padding": [1, 1, -1, 1]}, r"padding \[1, 1, -1, 1\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals(change, message):
    given = {**dict(zip(("x", "a", "b", "ids"), draw())), **how(), **change}
    for form in (KERNEL.reference, KERNEL.op):
        with pytest.raises(ValueError, match=message):
            form(**given)
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(ValueError, match=message):
        KERNEL.op(**{k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in given.items()})


class Layer(nn.Module):
    def __init__(self, given):
        super().__init__()
        self.given = given

    def forward(self, x, a, b, ids):
        return torch.ops.fxfreeze.select_conv(x, a, b, ids, **self.given)


@pytest.mark.parametrize(("rank", "given"), [(1, how()), (1, how(stride=2)), (9, how(stride=2, dilation=2))], ids=str)
def test_export_and_onnx_with_any_rows_adapters_and_sizes(tmp_path, rank, given):
    import onnxruntime

    rows, bank, size = (torch.export.Dim(name, min=low) for name, low in (("rows", 1), ("bank", 2), ("size", 5)))
    dims = ({0: rows, 2: size}, {0: bank}, {0: bank}, {0: rows})
    with torch.no_grad():
        exported = torch.export.export(Layer(given), draw(rank=rank), dynamic_shapes=dims)
        plain = exported.run_decompositions({KERNEL.op: KERNEL.reference})
        torch.onnx.export(plain, dynamo=True, verbose=False).save(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for count, size in ((2, 9), (9, 12)):
        x, a, b, ids = draw(3, rank=rank, adapters=count)
        x = torch.randn(3, 8, size, 8, generator=torch.Generator().manual_seed(1))
        names = [item.name for item in session.get_inputs()]
        (y,) = session.run(None, {name: value.numpy() for name, value in zip(names, (x, a, b, ids))})
        agrees(torch.from_numpy(y), x, a, b, ids, **given)
