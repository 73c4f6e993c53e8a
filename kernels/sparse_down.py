"""``fxfreeze::sparse_down``: a linear layer behind a gate, that reads the weights of neurons that fire, and no others.

y = h·W + b, where h holds a 0 for every neuron that does not fire. W is stored by neuron, so that what one neuron adds
lies in one piece.

On a CPU the nonzero values of h are counted in every call, and above `crossover` the product is the dense one. On a GPU
counting would make the host wait: there the number of rows decides.

Source: Deja Vu, arXiv 2310.17157, for which neurons of a trained network fire; TEAL, arXiv 2408.14690, for a kernel.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from ._native import call
from ._op import Kernel, Native, register

SCHEMA = "(Tensor h, Tensor weight, Tensor? bias=None, *, float crossover=1.0) -> Tensor"


def reference(h: Tensor, weight: Tensor, bias: Tensor | None = None, *, crossover: float = 1.0) -> Tensor:
    """Multiply few nonzero values with the weight's rows.

    Args:
        h: activations [..., K], floating, 0 where a neuron does not fire. What is NaN or infinite fires.
        weight: [K, P], dtype of `h`, finite: the row of a neuron that does not fire may not be read.
        bias: [P], dtype of `h`; None: 0.
        crossover: up to how many nonzero values of `h`, as a multiple of K and in all rows together, leaving out the
            others is the faster way, 0 or more. The result is the same up to rounding on both sides.

    Returns:
        [..., P], dtype of `h`.

    Raises:
        ValueError: shapes or dtypes other than the above.
    """
    _check(h, weight, bias, crossover=crossover)
    product = h @ weight
    return product if bias is None else product + bias


def fake(h: Tensor, weight: Tensor, bias: Tensor | None = None, *, crossover: float = 1.0) -> Tensor:
    _check(h, weight, bias, crossover=crossover)
    return h.new_empty((*h.shape[:-1], weight.shape[1]))


def _check(h: Tensor, weight: Tensor, bias: Tensor | None, *, crossover: float) -> None:
    if not h.is_floating_point() or h.dim() == 0:
        raise ValueError(f"sparse_down: h is {h.dtype} of shape {list(h.shape)}, not floating of [..., K]")
    if weight.dim() != 2 or weight.shape[0] != h.shape[-1] or weight.dtype != h.dtype:
        raise ValueError(
            f"sparse_down: weight is {weight.dtype} of shape {list(weight.shape)}, "
            f"not {h.dtype} of [K = {h.shape[-1]}, P]"
        )
    if bias is not None and (bias.shape != weight.shape[1:] or bias.dtype != h.dtype):
        raise ValueError(
            f"sparse_down: bias is {bias.dtype} of shape {list(bias.shape)}, not {h.dtype} of [P = {weight.shape[1]}]"
        )
    if not crossover >= 0:
        raise ValueError(f"sparse_down: crossover {crossover} is not 0 or more")


def _flat(h: Tensor) -> Tensor:
    # Not −1, which is ambiguous where K is 0.
    return h.reshape(math.prod(h.shape[:-1]), h.shape[-1]).contiguous()


# ---- GPU

MAX_ROWS = 8
"""At 10 % firing, of more rows more than half of all neurons fire in one or another; cuBLAS then reads what it must."""


def supports(h: Tensor, weight: Tensor, bias: Tensor | None = None, *, crossover: float = 1.0) -> bool:
    """Few rows, a weight that lies by neuron, and no float64."""
    one_device = len({value.device for value in (h, weight, bias) if value is not None}) == 1
    few = h.shape[:-1].numel() <= MAX_ROWS
    return few and weight.is_contiguous() and h.dtype != torch.float64 and one_device


def launch(h: Tensor, weight: Tensor, bias: Tensor | None = None, *, crossover: float = 1.0) -> Tensor:
    """As :func:`reference`, summed up in float32 and rounded once, whatever `crossover` is."""
    from ._sparse_down_triton import rows

    _check(h, weight, bias, crossover=crossover)
    y = rows(_flat(h), weight, None if bias is None else bias.contiguous())
    return y.reshape(*h.shape[:-1], weight.shape[1])


# ---- CPU

NATIVE_SCHEMA = "(Tensor h, Tensor weight, Tensor bias, float crossover) -> Tensor"


def native_supports(h: Tensor, weight: Tensor, bias: Tensor | None = None, *, crossover: float = 1.0) -> bool:
    """Half precision stays with plain torch, and so does a weight that would have to be copied."""
    on_cpu = all(value.device.type == "cpu" for value in (h, weight, bias) if value is not None)
    return on_cpu and weight.is_contiguous() and h.dtype in (torch.float32, torch.float64)


def native_apply(h: Tensor, weight: Tensor, bias: Tensor | None = None, *, crossover: float = 1.0) -> Tensor:
    """As :func:`reference`. Of 0 and a weight that is not finite the product is 0 below the crossover."""
    _check(h, weight, bias, crossover=crossover)
    bias = weight.new_zeros(weight.shape[1]) if bias is None else bias.contiguous()
    y = torch.ops.fxfreeze.sparse_down_native(_flat(h), weight, bias, float(crossover))
    return y.reshape(*h.shape[:-1], weight.shape[1])


def native_fake(h: Tensor, weight: Tensor, bias: Tensor, crossover: float) -> Tensor:
    _check(h, weight, bias, crossover=crossover)
    if h.dim() != 2 or h.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"sparse_down_native: h is {h.dtype} of shape {list(h.shape)}, not float32 of [rows, K]")
    return h.new_empty(h.shape[0], weight.shape[1])


def native_run(library: ctypes.CDLL, h: Tensor, weight: Tensor, bias: Tensor, crossover: float) -> Tensor:
    if not all(value.is_contiguous() for value in (h, weight, bias)):
        raise ValueError("sparse_down_native: takes contiguous tensors only")
    y, done = native_fake(h, weight, bias, crossover), torch.empty((), dtype=torch.int32)
    sizes = (h.element_size(), *h.shape, weight.shape[1])
    limit = float(crossover) * h.shape[1]
    call(library.sparse_down, y, done, h, weight, bias, *sizes, limit, torch.get_num_threads())
    return y if done.item() else torch.addmm(bias, h, weight)


NATIVE = Native("sparse_down.cpp", NATIVE_SCHEMA, native_fake, native_run, native_supports, native_apply)
KERNEL = register(Kernel("sparse_down", SCHEMA, reference, fake, supports, launch, native=NATIVE))
