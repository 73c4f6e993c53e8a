"""``fxfreeze::codebook``: each vector is replaced by the sum of the entries of its k best keys.

y = Σ_{i ∈ top-k(x·keysᵀ + bias)} values_i, group by group. With keys c/‖c‖ and values c/k it is a layer of codebook
features: the mean of the k codes that point most nearly where x does. Keys and values are apart because a frozen layer
around them folds into one of them: a normalization in front into the keys, a linear layer behind into the values.

Source: Tamkin, Taufeeque and Goodman, Codebook features (2023), arXiv 2310.17230.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding, embedding_bag

from ._op import Kernel, register
from ._tversky import cast, working_dtype

SCHEMA = "(Tensor x, Tensor keys, Tensor values, Tensor? bias=None, *, int k=1, bool joint=False) -> Tensor"


def reference(
    x: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None, *, k: int = 1, joint: bool = False
) -> Tensor:
    """Look up the entries of the k best keys of every group, and add them up.

    Scores are computed in float32 at least: an id flips where the rounding of two scores exceeds their distance. Of
    equal scores, any may win. Gradients reach `values` only.

    Args:
        x: [..., G, d], floating.
        keys: [G, K, d].
        values: [G, K, e].
        bias: [G, K], what is added to the scores; None: 0.
        k: how many keys win, 1 … K.
        joint: add up over the groups, too.

    Returns:
        [..., G, e], with `joint` [..., e]; dtype of `x`.

    Raises:
        ValueError: shapes or dtypes other than the above.
    """
    ids = top(x, keys, bias, k=k, values=values, joint=joint)
    # Row g·K + i of the flat table is entry i of group g.
    found = embedding(_flat(ids, keys), cast(values, working_dtype(x)).flatten(0, 1))
    return _shaped(found.sum((1, 2) if joint else 2), x)


def eager(
    x: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None, *, k: int = 1, joint: bool = False
) -> Tensor:
    """As :func:`reference`, without a copy of every entry that is added up."""
    ids = _flat(top(x, keys, bias, k=k, values=values, joint=joint), keys)
    bags = ids.flatten(1) if joint else ids.flatten(0, 1)
    found = embedding_bag(bags, cast(values, working_dtype(x)).flatten(0, 1), mode="sum")
    return _shaped(found if joint else found.unflatten(0, ids.shape[:2]), x)


def top(
    x: Tensor, keys: Tensor, bias: Tensor | None = None, *, k: int = 1, values: Tensor | None = None,
    joint: bool = False,
) -> Tensor:  # fmt: skip
    """The ids of the k best keys [rows, G, k], int64, in no order; arguments as of :func:`reference`."""
    _check(x, keys, keys if values is None else values, bias, k=k, joint=joint)
    dtype = working_dtype(x)
    rows = cast(x, dtype).reshape(-1, *x.shape[-2:]).transpose(0, 1)
    scores = torch.matmul(rows, cast(keys, dtype).transpose(1, 2))
    if bias is not None:
        scores = scores + cast(bias, dtype).unsqueeze(1)
    return scores.topk(k, -1).indices.transpose(0, 1)


def fake(
    x: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None, *, k: int = 1, joint: bool = False
) -> Tensor:
    _check(x, keys, values, bias, k=k, joint=joint)
    return x.new_empty(*x.shape[: -2 if joint else -1], values.shape[2])


def _flat(ids: Tensor, keys: Tensor) -> Tensor:
    if keys.shape[0] == 1:
        return ids
    return ids + torch.arange(keys.shape[0], device=ids.device).unsqueeze(1) * keys.shape[1]


def _shaped(found: Tensor, x: Tensor) -> Tensor:
    """`found` [rows, ...] with the leading sizes of `x`, in its dtype."""
    return cast(found, x.dtype).reshape(*x.shape[:-2], *found.shape[1:])


def _check(x: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, *, k: int, joint: bool) -> None:
    if not x.is_floating_point() or x.dim() < 2:
        raise ValueError(f"codebook: x is {x.dtype} of shape {list(x.shape)}, not floating [..., G, d]")
    groups, size = x.shape[-2:]
    if not keys.is_floating_point() or keys.dim() != 3 or keys.shape[0] != groups or keys.shape[2] != size:
        what = f"[G = {groups}, K, d = {size}]"
        raise ValueError(f"codebook: keys is {keys.dtype} of shape {list(keys.shape)}, not floating {what}")
    if not values.is_floating_point() or values.dim() != 3 or values.shape[:2] != keys.shape[:2]:
        what = f"[G = {groups}, K = {keys.shape[1]}, e]"
        raise ValueError(f"codebook: values is {values.dtype} of shape {list(values.shape)}, not floating {what}")
    if bias is not None and (not bias.is_floating_point() or bias.shape != keys.shape[:2]):
        what = f"[G = {groups}, K = {keys.shape[1]}]"
        raise ValueError(f"codebook: bias is {bias.dtype} of shape {list(bias.shape)}, not floating {what}")
    if not 1 <= k <= keys.shape[1]:
        raise ValueError(f"codebook: k is {k}, not 1 … {keys.shape[1]}")


KERNEL = register(Kernel("codebook", SCHEMA, reference, fake, eager=eager))
