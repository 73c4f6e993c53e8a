"""``fxfreeze::select_lora``: a low-rank update of a linear layer that differs from row to row of a batch.

y[i] = x[i]·A[k]ᵀ·B[k] with k = ids[i], beside a frozen layer: what the rows' adapters add to it. One artifact so serves
any number of adapters of one base, in one batch. An embedding is a linear layer of one-hot vectors: integers x stand
for those, and a product with one is a look into A. What a convolution adds is ``fxfreeze::select_conv``.

Source: Hu et al., arXiv 2106.09685, for the update; Punica, arXiv 2310.18547, and S-LoRA, arXiv 2311.03285, for the
product with a different adapter per row, of which `gather` is the plain-torch form.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._op import Kernel, register
from ._tversky import cast

SCHEMA = '(Tensor x, Tensor a, Tensor b, Tensor ids, *, str form="gather") -> Tensor'

FORMS = ("gather", "mask")
INTEGERS = (torch.int32, torch.int64)


def reference(x: Tensor, a: Tensor, b: Tensor, ids: Tensor, *, form: str = "gather") -> Tensor:
    """Multiply every row with the adapter it names.

    Args:
        x: [n, ..., in], floating; or integers [n, ...] from 0 to in − 1, each for a vector with one 1, at that place.
        a: A of every adapter, [K, r, in], floating and finite.
        b: B of every adapter, transposed and times its scale, [K, r, out], dtype of `a`, finite.
        ids: integers [n], 0 ≤ ids[i] < K.
        form: how plain torch computes it; the function is the same. "gather" copies the rows' own A and B, and takes
            n small products, in a time that does not depend on K. "mask" takes two products with all adapters side by
            side and a mask in between: K times the work, in large products, which is faster for few adapters and short
            rows. Integers are looked up in one way only, and it makes no difference.

    Returns:
        [n, ..., out], dtype of `x`, computed in the wider of the two dtypes; for integers dtype of `a`.

    Raises:
        ValueError: an unknown form, or shapes or dtypes other than the above.
    """
    _check(x, a, b, ids, form)
    if not x.is_floating_point():
        return torch.bmm(_look_up(x, a, ids), b.index_select(0, ids)).reshape(*x.shape, b.shape[-1])
    wide = torch.promote_types(x.dtype, a.dtype)
    compute = _gather if form == "gather" else _mask
    y = compute(cast(_rows(x), wide), cast(a, wide), cast(b, wide), ids)
    return cast(y if x.dim() == 3 else y.reshape(*x.shape[:-1], b.shape[-1]), x.dtype)


def _rows(x: Tensor) -> Tensor:
    """[n, tokens, in]."""
    # Not −1, which is ambiguous where there are no rows.
    return x if x.dim() == 3 else x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def _look_up(x: Tensor, a: Tensor, ids: Tensor) -> Tensor:
    """A[k][:, x[i]] as [n, tokens, r], read one by one from A as it lies: an A for a vocabulary is large."""
    _, rank, inner = a.shape
    words, ids = x.reshape(x.shape[0], 1, math.prod(x.shape[1:])).long(), ids.long()
    rows = ids[:, None] * rank + torch.arange(rank, device=a.device)
    at = (rows[:, :, None] * inner + words).transpose(1, 2)
    return a.reshape(-1).index_select(0, at.reshape(-1)).reshape(at.shape)


def _gather(x: Tensor, a: Tensor, b: Tensor, ids: Tensor) -> Tensor:
    narrow = torch.bmm(x, a.index_select(0, ids).transpose(1, 2))
    return torch.bmm(narrow, b.index_select(0, ids))


def _mask(x: Tensor, a: Tensor, b: Tensor, ids: Tensor) -> Tensor:
    # K stands nowhere as a number: adapters are added to what was compiled.
    narrow = torch.matmul(x, a.flatten(0, 1).t()).unflatten(-1, (-1, a.shape[1]))
    own = ids[:, None] == torch.ones_like(a[:, 0, 0], dtype=ids.dtype).cumsum(0) - 1
    # Not a product with 0 and 1: what another adapter makes of the row may be infinite.
    kept = torch.where(own[:, None, :, None], narrow, 0.0)
    return torch.matmul(kept.flatten(2), b.flatten(0, 1))


def fake(x: Tensor, a: Tensor, b: Tensor, ids: Tensor, *, form: str = "gather") -> Tensor:
    _check(x, a, b, ids, form)
    if not x.is_floating_point():
        return a.new_empty((*x.shape, b.shape[-1]))
    return x.new_empty((*x.shape[:-1], b.shape[-1]))


def _check(x: Tensor, a: Tensor, b: Tensor, ids: Tensor, form: str) -> None:
    if form not in FORMS:
        raise ValueError(f"select_lora: form {form!r} is none of {', '.join(map(repr, FORMS))}")
    words = x.dtype in INTEGERS
    if x.dim() < 2 - words or not (words or x.is_floating_point()):
        raise ValueError(
            f"select_lora: x is {x.dtype} of shape {list(x.shape)}, neither floating [n, ..., in] nor integers [n, ...]"
        )
    if not a.is_floating_point() or a.dim() != 3 or not (words or a.shape[-1] == x.shape[-1]):
        inner = "in" if words else f"in = {x.shape[-1]}"
        raise ValueError(f"select_lora: a is {a.dtype} of shape {list(a.shape)}, not floating [K, r, {inner}]")
    if b.dtype != a.dtype or b.dim() != 3 or b.shape[:2] != a.shape[:2]:
        raise ValueError(
            f"select_lora: b is {b.dtype} of shape {list(b.shape)}, not {a.dtype} "
            f"[K = {a.shape[0]}, r = {a.shape[1]}, out]"
        )
    if ids.dtype not in INTEGERS or ids.dim() != 1 or ids.shape[0] != x.shape[0]:
        raise ValueError(
            f"select_lora: ids is {ids.dtype} of shape {list(ids.shape)}, not an integer for each of the "
            f"{x.shape[0]} rows of x"
        )


# ---- GPU

MAX_RANK = 128


def supports(x: Tensor, a: Tensor, b: Tensor, ids: Tensor, *, form: str = "gather") -> bool:
    """No integers, no float64, no larger rank than a tile takes, one device and one dtype, and banks row by row."""
    one_device = len({value.device for value in (x, a, b, ids)}) == 1
    plain = a.is_contiguous() and b.is_contiguous() and x.dtype == a.dtype != torch.float64
    return one_device and plain and a.shape[1] <= MAX_RANK


def launch(x: Tensor, a: Tensor, b: Tensor, ids: Tensor, *, form: str = "gather") -> Tensor:
    """As :func:`reference`, in float32 and rounded once, whatever `form` is."""
    from ._select_lora_triton import grouped

    _check(x, a, b, ids, form)
    return grouped(_rows(x).contiguous(), a, b, ids).reshape(*x.shape[:-1], b.shape[-1])


KERNEL = register(Kernel("select_lora", SCHEMA, reference, fake, supports, launch))
