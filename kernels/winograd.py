"""``fxfreeze::winograd``: a convolution with windows of 3×3 and stride 1, with fewer multiplications.

y = relu(x ∗ W + b + r): a sum with another tensor and a ReLU are part of it, since what comes out is still in registers
when they are taken. A tile of m×m outputs takes (m + 2)² products of an input channel with an output channel in the
place of 9·m²: 36 for 144 with m = 4, 16 for 36 with m = 2. Filters are transformed once, to (m + 2)² numbers each in
the place of 9, so a smaller m is for layers whose filters take longer to read than to multiply with.

Rounding is amplified by the transforms, the more, the larger the tile. Largest error in largest outputs, against
float64, of normal inputs and weights with 64 channels of 56×56 (512 of 7×7): 1.1e-6 (2.6e-6) with m = 4, 2.6e-7 (7e-7)
with m = 2, and 6.9e-7 (1.6e-6) of oneDNN's direct sum. A NaN or an infinity reaches all outputs of the tiles that read
it.

Source: Lavin and Gray, *Fast Algorithms for Convolutional Neural Networks* (2016); that points beside ±1 and ±2 lose
less: Barabasz, Anderson, Soodhalter, Gregg, *Error Analysis and Improving the Accuracy of Winograd Convolution for Deep
Neural Networks* (2020).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from ._native import call
from ._op import Kernel, Native, register

SCHEMA = (
    "(Tensor x, Tensor filters, Tensor? bias=None, Tensor? residual=None, *, int tile, int out_channels, "
    "int[2] padding, bool relu=False) -> Tensor"
)
WINDOW = 3
TILES = (2, 4)
"""Outputs of a tile, in either direction."""
BLOCK = 64
"""Outputs whose filters lie together."""
WHOLE = 16
"""Those of one strip: the widest vector there is has as many float32."""


def transform(tile: int) -> Tensor:
    """G [tile + 2, 3], float64: G·g is what the values of an input of one dim are multiplied with.

    A filter g is a polynomial, taken at 0, ±1 and ∞, or at 0, ±√½, ±√2 and ∞; each row is divided by what the C++
    multiplies the same row of inputs with.
    """
    points = {2: [(1.0, 2.0)], 4: [(math.sqrt(0.5), 1.5), (math.sqrt(2.0), 6.0)]}[tile]
    rows = [[1.0, 0.0, 0.0]]
    for point, scale in points:
        rows += [[1 / scale, sign * point / scale, point**2 / scale] for sign in (1, -1)]
    return torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64)


def pack(weight: Tensor, tile: int) -> Tensor:
    """The filters of a weight [out, in, 3, 3], floating, as the operator reads them: flat, of the weight's dtype.

    Blocks of 64 outputs, the last one filled up with zeros to a multiple of 16, each [(tile + 2)², strips, in, 16].
    """
    matrix = transform(tile).to(weight.device)

    def block(weight: Tensor) -> Tensor:
        filters = torch.einsum("ai,bj,ocij->abco", matrix, matrix, weight.double()).to(weight.dtype)
        strips = pad(filters, (0, -len(weight) % WHOLE)).unflatten(-1, (-1, WHOLE))
        return strips.flatten(0, 1).transpose(1, 2).flatten()

    # Block by block, since it is done in float64, where all of it would be ten times as large as the weight.
    return torch.cat([block(part) for part in weight.split(BLOCK)])


def dense(filters: Tensor, tile: int, in_channels: int, out_channels: int) -> Tensor:
    """The weight [out, in, 3, 3] again, up to rounding."""
    inverse = torch.linalg.pinv(transform(tile)).to(filters.device)
    area, padded = (tile + WINDOW - 1) ** 2, out_channels + -out_channels % WHOLE
    widths = [min(BLOCK, padded - begin) for begin in range(0, padded, BLOCK)]
    blocks = filters.split([area * in_channels * width for width in widths])
    strips = torch.cat([block.reshape(area, -1, in_channels, WHOLE) for block in blocks], 1)
    found = strips.transpose(1, 2).flatten(2)[..., :out_channels].unflatten(0, (tile + WINDOW - 1, -1))
    return torch.einsum("ia,jb,abco->ocij", inverse, inverse, found.double()).to(filters.dtype)


def reference(
    x: Tensor, filters: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, *,
    tile: int, out_channels: int, padding: Sequence[int], relu: bool = False,
) -> Tensor:  # fmt: skip
    """A convolution with a window of 3×3, stride 1 and dilation 1, a sum, and a ReLU.

    Args:
        x: [batch, in, height, width], floating.
        filters: flat, dtype of `x`, as :func:`pack` makes them of the weight.
        bias: [out], dtype of `x`; None: 0.
        residual: of the shape and dtype of the result, added to it; None: 0.
        tile: outputs of a tile, in either direction: 2 or 4.
        out_channels: out.
        padding: zeros around the image, above and below, left and right.
        relu: take the ReLU at last.

    Returns:
        [batch, out, height + 2·padding[0] − 2, width + 2·padding[1] − 2], dtype of `x`, channels last in memory.

    Raises:
        ValueError: shapes or dtypes other than the above.
    """
    _checked(x, filters, bias, residual, tile, out_channels, padding)
    weight = dense(filters, tile, x.shape[1], out_channels)
    y = conv2d(x, weight, bias, padding=list(padding))
    y = y if residual is None else y + residual
    return _channels_last(torch.relu(y) if relu else y)


def fake(
    x: Tensor, filters: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, *,
    tile: int, out_channels: int, padding: Sequence[int], relu: bool = False,
) -> Tensor:  # fmt: skip
    result = _checked(x, filters, bias, residual, tile, out_channels, padding)
    return _channels_last(x.new_empty(result))


def _checked(
    x: Tensor, filters: Tensor, bias: Tensor | None, residual: Tensor | None, tile: int, out_channels: int,
    padding: Sequence[int],
) -> tuple[int, ...]:  # fmt: skip
    """The shape of the result."""
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(
            f"winograd: x is {x.dtype} of shape {list(x.shape)}, not floating of [batch, in, height, width]"
        )
    if tile not in TILES:
        raise ValueError(f"winograd: tile is {tile}, not {' or '.join(map(str, TILES))}")
    size = (tile + WINDOW - 1) ** 2 * x.shape[1] * (out_channels + -out_channels % WHOLE)
    extents = [extent + 2 * zeros - WINDOW + 1 for extent, zeros in zip(x.shape[2:], padding, strict=True)]
    result = (x.shape[0], out_channels, *extents)
    for what, value, shape in (
        ("filters", filters, (size,)),
        ("bias", bias, (out_channels,)),
        ("residual", residual, result),
    ):
        if value is not None and (tuple(value.shape) != shape or value.dtype != x.dtype):
            raise ValueError(
                f"winograd: {what} is {value.dtype} of shape {list(value.shape)}, not {x.dtype} of {list(shape)}"
            )
    return result


def _channels_last(y: Tensor) -> Tensor:
    return y.movedim(1, -1).contiguous().movedim(-1, 1)


# ---- CPU

NATIVE_SCHEMA = (
    "(Tensor x, Tensor filters, Tensor bias, Tensor residual, int tile, int top, int left, int adds, int relu) "
    "-> Tensor"
)


def native_supports(
    x: Tensor, filters: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, *,
    tile: int, out_channels: int, padding: Sequence[int], relu: bool = False,
) -> bool:  # fmt: skip
    """float32."""
    on_cpu = all(value.device.type == "cpu" for value in (x, filters, bias, residual) if value is not None)
    return on_cpu and x.dtype == torch.float32


def native_apply(
    x: Tensor, filters: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, *,
    tile: int, out_channels: int, padding: Sequence[int], relu: bool = False,
) -> Tensor:  # fmt: skip
    """As :func:`reference`. A NaN or infinity of `x` shows in all outputs of the tiles that read it."""
    _checked(x, filters, bias, residual, tile, out_channels, padding)
    bias = filters.new_zeros(out_channels) if bias is None else bias
    # Without a residual something stands in its place that is not read.
    added = bias if residual is None else residual.movedim(1, -1)
    y: Tensor = torch.ops.fxfreeze.winograd_native(
        x.movedim(1, -1), filters, bias, added, tile, *padding, int(residual is not None), int(relu)
    )
    return y.movedim(-1, 1)


def native_fake(
    x: Tensor, filters: Tensor, bias: Tensor, residual: Tensor, tile: int, top: int, left: int, adds: int, relu: int
) -> Tensor:
    if any(value.dtype != torch.float32 for value in (x, filters, bias, residual)) or x.dim() != 4:
        raise ValueError(f"winograd_native: x is {x.dtype} of shape {list(x.shape)}, or another tensor is not float32")
    batch, height, width, _ = x.shape
    return x.new_empty(batch, height + 2 * top - WINDOW + 1, width + 2 * left - WINDOW + 1, len(bias))


def native_run(
    library: ctypes.CDLL, x: Tensor, filters: Tensor, bias: Tensor, residual: Tensor,
    tile: int, top: int, left: int, adds: int, relu: int,
) -> Tensor:  # fmt: skip
    x, filters, bias, residual = (value.contiguous() for value in (x, filters, bias, residual))
    y = native_fake(x, filters, bias, residual, tile, top, left, adds, relu)
    sizes = (tile, *x.shape, y.shape[-1], top, left, *y.shape[1:3], relu, torch.get_num_threads())
    call(library.winograd_conv, y, x, filters, bias, residual, adds, *sizes)
    return y


NATIVE = Native("winograd.cpp", NATIVE_SCHEMA, native_fake, native_run, native_supports, native_apply)
KERNEL = register(Kernel("winograd", SCHEMA, reference, fake, native=NATIVE))
