"""``fxfreeze::semi_structured``: a linear layer of whose weight at most two of any four consecutive inputs count.

y = x·Wᵀ + b. Of each group of four inputs of a row of W two numbers are kept, and where they were, two bits each. So a
weight of half precision takes 9/16 of its room. A form that says so plainly is stored, and not one of those that
cuSPARSELt and CUTLASS take: theirs differ, and hang on the GPU. On a GPU theirs is made of it at the first call, by
``torch.sparse.to_sparse_semi_structured``, and kept as long as the weight.

Source: Mishra et al., *Accelerating Sparse Deep Neural Networks*, arXiv 2104.08378.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ._op import Kernel, register

SCHEMA = "(Tensor x, Tensor values, Tensor index, Tensor? bias=None) -> Tensor"

GROUP = 4
"""Inputs of which two count."""


def compress(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The two numbers of each group, and where they were.

    Args:
        weight: W [out, in], in a multiple of 8.

    Returns:
        values [out, in / 2], dtype of `weight`, and index [out, in / 8], uint8: see :func:`reference`. Of a group that
        has fewer than two numbers besides zeros, zeros are taken, the first ones.

    Raises:
        ValueError: more than two numbers of a group are not 0, or `in` is no multiple of 8.
    """
    if weight.dim() != 2 or weight.shape[1] % (2 * GROUP):
        raise ValueError(f"semi_structured: weight is of shape {list(weight.shape)}, not [out, in], in a multiple of 8")
    out, inner = weight.shape
    groups = weight.reshape(out, inner // GROUP, GROUP)
    counts = groups.ne(0)
    if (counts.sum(-1) > 2).any():
        raise ValueError("semi_structured: more than two of four consecutive inputs of the weight are not 0")
    # Sorted by whether they are 0, then by place; the two in front, by place.
    order = counts.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :2].sort(-1).values
    nibbles = (order[..., 0] + GROUP * order[..., 1]).reshape(out, inner // 8, 2)
    index = (nibbles[..., 0] + 16 * nibbles[..., 1]).to(torch.uint8)
    return pick(weight, index), index


def pick(weight: Tensor, index: Tensor) -> Tensor:
    """The numbers of a weight [out, in] that `index` names: [out, in / 2]."""
    places = _places(index)
    return weight.reshape(*places.shape[:2], GROUP).gather(2, places).reshape(len(weight), weight.shape[1] // 2)


def dense(values: Tensor, index: Tensor) -> Tensor:
    """W [out, in] again."""
    places, out = _places(index), len(values)
    zeros = values.new_zeros(*places.shape[:2], GROUP)
    return zeros.scatter(2, places, values.reshape(places.shape)).reshape(out, 2 * values.shape[1])


def _places(index: Tensor) -> Tensor:
    """The two places of each group [out, in / 4, 2]."""
    # Of the two groups of a byte: first and second place of the one, of the other; in operators that ONNX has, too.
    places = torch.stack([index.to(torch.int64) // GROUP**digit % GROUP for digit in range(4)], -1)
    return places.reshape(index.shape[0], 2 * index.shape[1], 2)


def reference(x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply by a weight of which two of four inputs are there.

    Args:
        x: [..., in], floating, in a multiple of 8.
        values: [out, in / 2], dtype of `x`: of each group of four inputs two numbers, by place.
        index: [out, in / 8], uint8: where they stand in their group, two bits each, the first one lowest; of two groups
            the first one in the lower four bits. The places of a group are two different ones, in ascending order.
        bias: b [out], dtype of `x`; None: 0.

    Returns:
        [..., out], dtype of `x`.

    Raises:
        ValueError: shapes or dtypes other than the above.
    """
    _check(x, values, index, bias)
    return linear(x, dense(values, index), bias)


def fake(x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None = None) -> Tensor:
    _check(x, values, index, bias)
    return x.new_empty((*x.shape[:-1], values.shape[0]))


def _check(x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None) -> None:
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] % (2 * GROUP):
        raise ValueError(
            f"semi_structured: x is {x.dtype} of shape {list(x.shape)}, not floating of [..., in], in a multiple of 8"
        )
    out, inner = len(values) if values.dim() else 0, x.shape[-1]
    for what, value, shape, dtype in (
        ("values", values, (out, inner // 2), x.dtype),
        ("index", index, (out, inner // 8), torch.uint8),
        ("bias", bias, (out,), x.dtype),
    ):
        if value is not None and (tuple(value.shape) != shape or value.dtype != dtype):
            raise ValueError(
                f"semi_structured: {what} is {value.dtype} of shape {list(value.shape)}, not {dtype} of {list(shape)}"
            )


# ---- GPU

OUT, IN = 32, 64
"""What the numbers of outputs and inputs must be multiples of, for the stricter one of the two libraries."""


def capability(device: torch.device) -> tuple[int, int] | None:
    """Of a CUDA device; None for any other."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


def why_not(found: tuple[int, int] | None, *, cusparselt: bool) -> str | None:
    """Why a device of that capability cannot run it, or None. Without cuSPARSELt, CUTLASS has kernels for 8.x."""
    if found is None or found < (8, 0):
        return "2:4 needs a CUDA device of compute capability ≥ 8.0"
    if found >= (9, 0) and not cusparselt:
        return "2:4 on a device of compute capability ≥ 9.0 needs a torch that is built with cuSPARSELt"
    return None


def supports(x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None = None) -> bool:
    """Half precision, sizes that the libraries take, and a GPU that can."""
    one_device = len({value.device for value in (x, values, index, bias) if value is not None}) == 1
    sizes = values.dim() == 2 and values.shape[0] % OUT == 0 and x.shape[-1] % IN == 0 and 0 not in values.shape
    half = x.dtype in (torch.float16, torch.bfloat16)
    return one_device and sizes and half and why_not(capability(x.device), cusparselt=has_cusparselt()) is None


def launch(x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None = None) -> Tensor:
    """As :func:`reference`, summed up in float32."""
    _check(x, values, index, bias)
    if not x.numel():  # the libraries take none
        return reference(x, values, index, bias)
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()
    y = linear(flat, prepared(values, index), None if bias is None else bias.contiguous())
    return y.reshape(*x.shape[:-1], len(values))


def prepared(values: Tensor, index: Tensor) -> Tensor:
    """The weight as the GPU takes it, made once."""
    from torch.utils.weak import WeakTensorKeyDictionary

    # Equal values of two weights may be one tensor.
    by_index = _by_values().setdefault(values, WeakTensorKeyDictionary())
    if index not in by_index:
        by_index[index] = on_gpu(dense(values, index))
    weight: Tensor = by_index[index]
    return weight


@functools.cache
def _by_values() -> Any:
    """Values → index → the weight as the GPU takes it, as long as both are there."""
    from torch.utils.weak import WeakTensorKeyDictionary

    return WeakTensorKeyDictionary()


def on_gpu(weight: Tensor) -> Tensor:
    """A weight [out, in] as cuSPARSELt or CUTLASS take it."""
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

    kind = SparseSemiStructuredTensorCUSPARSELT if has_cusparselt() else SparseSemiStructuredTensorCUTLASS
    return kind.from_dense(weight)


def has_cusparselt() -> bool:
    return bool(torch.backends.cusparselt.is_available())


KERNEL = register(Kernel("semi_structured", SCHEMA, reference, fake, supports, launch))
