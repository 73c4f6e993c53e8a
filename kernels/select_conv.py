"""``fxfreeze::select_conv``: a low-rank update of a convolution that differs from row to row of a batch.

y[i] = conv(x[i], B[k]·A[k]) with k = ids[i], beside a frozen convolution: what the rows' adapters add to it, for a
LoRA's A and B. With groups, every group's inputs meet the same A, and its outputs their own rows of B.

It is plain torch. One kernel per row is a convolution with as many groups as there are rows, which is fast, but ONNX
and Inductor want to know the groups beforehand. So x meets A in a product of matrices, for every place of the window at
once, and what belongs to one output is added up: r numbers per place, where a window of x has all features of a group.
Where a group has few features, or the stride skips most places, it is the window that is copied.

Measured on one core, compiled, with 4 to 17 adapters of rank 4 beside a layer from 64 to 64 features, 3×3, on 8 images
of 56×56: 13.6 ms alone, 15 to 18 so; 30 to 41 where x meets all adapters side by side, with a mask; 61 to 65 where the
windows are copied. Of six layers that were tried, one was faster another way: 7×7 over 3 channels with 4 adapters,
where the mask took 6.9 ms and this 9.2.

Source: Hu et al., arXiv 2106.09685, for the update; kn2row, Vasudevan et al., arXiv 1709.03395, for the order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ._op import Kernel, register
from ._tversky import cast

SCHEMA = (
    "(Tensor x, Tensor a, Tensor b, Tensor ids, *, int[] stride, int[] padding, int[] dilation, int groups=1) -> Tensor"
)


def reference(
    x: Tensor, a: Tensor, b: Tensor, ids: Tensor, *, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int = 1,
) -> Tensor:  # fmt: skip
    """Convolve every row with the adapter it names.

    Args:
        x: [n, in, *spatial], floating, of one to three spatial dims.
        a: A of every adapter, [K, r, in / groups, *kernel], floating and finite.
        b: B of every adapter, transposed and times its scale, [K, r, out], dtype of `a`, finite.
        ids: integers [n], 0 ≤ ids[i] < K.
        stride, dilation: per spatial dim.
        padding: zeros before and after each spatial dim, all of the first dim before those of the second.
        groups: of the inputs and the outputs.

    Returns:
        [n, out, *spatial'] as the convolution has it, dtype of `x`; computed in the wider of the two dtypes.

    Raises:
        ValueError: shapes or dtypes other than the above.
    """
    _check(x, a, b, ids, stride, padding, dilation, groups)
    wide = torch.promote_types(x.dtype, a.dtype)
    own, kernel = cast(a, wide).index_select(0, ids), tuple(a.shape[3:])
    parts = cast(x, wide).unflatten(1, (groups, x.shape[1] // groups))
    padded = [size for dim in reversed(range(len(kernel))) for size in padding[2 * dim : 2 * dim + 2]]
    window = _Window(kernel, tuple(stride), tuple(dilation))
    compute = _narrow_first if window.trivial or a.shape[1] * math.prod(stride) < a.shape[2] else _window_first
    narrow = compute(parts, own, window, padded)
    rows = cast(b, wide).index_select(0, ids).unflatten(2, (groups, b.shape[2] // groups)).permute(0, 2, 3, 1)
    y = _product(rows, narrow.flatten(3)).flatten(1, 2)
    return cast(y.reshape(*y.shape[:2], *narrow.shape[3:]), x.dtype)


@dataclass(frozen=True)
class _Window:
    """Where the outputs of a convolution look, per place of its window; a spatial dim at a time."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def trivial(self) -> bool:
        """Whether every output looks at its own place, and at no other."""
        return math.prod(self.kernel) == math.prod(self.stride) == 1

    def added(self, values: Tensor) -> Tensor:
        """What stands at every place, added up per output: [n, g, *kernel, r, *spatial] to [n, g, r, *outputs]."""
        dims = len(self.kernel)
        for dim in reversed(range(dims)):
            axis = values.dim() - 1 - dims + dim
            parts = (values.select(2 + dim, place) for place in range(self.kernel[dim]))
            looks = [self._at(dim, place, part, axis) for place, part in enumerate(parts)]
            values = functools.reduce(torch.add, looks)
        return values

    def seen(self, value: Tensor) -> Tensor:
        """What every output sees at every place: [..., *spatial] to [..., *kernel, *outputs]."""
        first = value.dim() - len(self.kernel)
        for dim, (size, step, far) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            axis = first + 2 * dim  # the dims of the window gather in front
            if size == 1:
                value = self._at(dim, 0, value, axis).unsqueeze(first + dim)
                continue
            outputs = (value.shape[axis] - far * (size - 1) - 1) // step + 1
            places = torch.arange(size, device=value.device)[:, None] * far
            looks = (places + torch.arange(outputs, device=value.device) * step).reshape(-1)
            value = value.index_select(axis, looks).unflatten(axis, (size, outputs)).movedim(axis, first + dim)
        return value

    def _at(self, dim: int, place: int, value: Tensor, axis: int) -> Tensor:
        far, behind = self.dilation[dim], self.kernel[dim] - 1 - place
        return torch.ops.aten.slice.Tensor(value, axis, far * place, -far * behind or None, self.stride[dim])


def _narrow_first(x: Tensor, a: Tensor, window: _Window, padded: list[int]) -> Tensor:
    """x [n, g, c, *spatial] and A [n, r, c, *kernel] to [n, g, r, *outputs]: A at every place, then added up."""
    each = a.flatten(3).permute(0, 3, 1, 2).flatten(1, 2).unsqueeze(1)  # [n, 1, places · r, c]
    values = _product(each, x.flatten(3)).reshape(*x.shape[:2], *window.kernel, a.shape[1], *x.shape[3:])
    return window.added(pad(values, padded))  # the same as to pad x, for A has no bias


def _window_first(x: Tensor, a: Tensor, window: _Window, padded: list[int]) -> Tensor:
    """The same: what every output sees, then A."""
    seen = window.seen(pad(x, padded))
    outputs = seen.shape[3 + len(window.kernel) :]
    seen = seen.flatten(2, 2 + len(window.kernel)).flatten(3)
    narrow = _product(a.flatten(2).unsqueeze(1), seen)
    return narrow.reshape(*narrow.shape[:3], *outputs)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Matrices [n, 1 or g, …] times [n, g, …]."""
    if right.shape[1] == 1:
        return torch.bmm(left.squeeze(1), right.squeeze(1)).unsqueeze(1)
    return torch.matmul(left, right)


def fake(
    x: Tensor, a: Tensor, b: Tensor, ids: Tensor, *, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int = 1,
) -> Tensor:  # fmt: skip
    _check(x, a, b, ids, stride, padding, dilation, groups)
    sizes = []
    for dim, (size, kernel, step, far) in enumerate(zip(x.shape[2:], a.shape[3:], stride, dilation, strict=True)):
        free = size + padding[2 * dim] + padding[2 * dim + 1] - far * (kernel - 1) - 1
        sizes.append(free // step + 1)
    return x.new_empty((x.shape[0], b.shape[2], *sizes))


def _check(
    x: Tensor, a: Tensor, b: Tensor, ids: Tensor, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> None:  # fmt: skip
    dims = x.dim() - 2
    if not x.is_floating_point() or not 1 <= dims <= 3:
        raise ValueError(f"select_conv: x is {x.dtype} of shape {list(x.shape)}, not floating [n, in, *spatial]")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"select_conv: {groups} groups do not divide {x.shape[1]} features")
    if not a.is_floating_point() or a.dim() != dims + 3 or a.shape[2] != x.shape[1] // groups:
        raise ValueError(
            f"select_conv: a is {a.dtype} of shape {list(a.shape)}, not floating "
            f"[K, r, in / groups = {x.shape[1] // groups}, *kernel] with {dims} sizes of a kernel"
        )
    if b.dtype != a.dtype or b.dim() != 3 or b.shape[:2] != a.shape[:2] or b.shape[2] % groups:
        raise ValueError(
            f"select_conv: b is {b.dtype} of shape {list(b.shape)}, not {a.dtype} "
            f"[K = {a.shape[0]}, r = {a.shape[1]}, out] with {groups} groups of outputs"
        )
    if ids.dtype not in (torch.int32, torch.int64) or ids.dim() != 1 or ids.shape[0] != x.shape[0]:
        raise ValueError(
            f"select_conv: ids is {ids.dtype} of shape {list(ids.shape)}, not an integer for each of the "
            f"{x.shape[0]} rows of x"
        )
    if not (len(stride) == len(dilation) == dims and len(padding) == 2 * dims):
        raise ValueError(
            f"select_conv: {len(stride)} strides, {len(dilation)} dilations and {len(padding)} paddings for {dims} "
            "dims, of which each has one, one and two"
        )
    if min(*stride, *dilation, 1) < 1 or min(*padding, 0) < 0:
        raise ValueError(f"select_conv: stride {list(stride)}, dilation {list(dilation)}, padding {list(padding)}")


KERNEL = register(Kernel("select_conv", SCHEMA, reference, fake))
