"""``fxfreeze::codebook``: both forms against a loop, in every dtype, with gradients; bad operands are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxfreeze.kernels.codebook import KERNEL, eager, reference, top

FORMS = {"reference": reference, "eager": eager, "op": KERNEL.op}


def drawn(dtype: torch.dtype = torch.float32, groups: int = 3) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for shape in ((2, 5, groups, 4), (groups, 7, 4), (groups, 7, 6), (groups, 7))]


def by_loop(x: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, k: int) -> Tensor:
    """[rows, G, e], one score at a time, in float64."""
    rows = x.double().reshape(-1, *x.shape[-2:])
    out = torch.zeros(*rows.shape[:2], values.shape[2], dtype=torch.float64)
    for row in range(len(rows)):
        for group in range(rows.shape[1]):
            scores = [float(rows[row, group] @ key) for key in keys[group].double()]
            if bias is not None:
                scores = [score + float(extra) for score, extra in zip(scores, bias[group])]
            for best in sorted(range(len(scores)), key=lambda i: -scores[i])[:k]:
                out[row, group] += values[group, best].double()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("k", "biased", "groups"), [(1, False, 1), (1, True, 3), (3, True, 3), (7, False, 2)])
def test_it_is_what_a_loop_says(form: str, k: int, biased: bool, groups: int, dtype: torch.dtype) -> None:
    x, keys, values, bias = drawn(dtype, groups)
    given = (x, keys, values, bias if biased else None)
    want = by_loop(*given, k)
    found, joint = (FORMS[form](*given, k=k, joint=together) for together in (False, True))
    assert found.dtype == joint.dtype == dtype and found.shape == (2, 5, groups, 6) and joint.shape == (2, 5, 6)
    scale = 4 * torch.finfo(dtype).eps * want.abs().max() * k
    assert (found.double().reshape(want.shape) - want).abs().max() <= scale
    assert (joint.double().reshape(-1, 6) - want.sum(1)).abs().max() <= scale * groups


def test_ids_are_the_best() -> None:
    x, keys, _, bias = drawn()
    scores = torch.einsum("abgd,gkd->abgk", x, keys) + bias
    found = top(x, keys, bias, k=2).reshape(2, 5, 3, 2).sort(-1).values
    assert torch.equal(found, scores.argsort(-1, descending=True)[..., :2].sort(-1).values)


def test_half_precision_decides_in_float32() -> None:
    x, keys = torch.tensor([[[1.0, 2.0**-9]]]).half(), torch.tensor([[[1.0, 0.0], [1.0, 2.0**-3]]]).half()
    assert top(x, keys).item() == 1  # 1 + 2⁻¹² is 1 in half precision


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("joint", [False, True])
def test_gradients_reach_the_values(form: str, joint: bool) -> None:
    x, keys, values, bias = drawn(torch.float64)
    values.requires_grad_()
    torch.autograd.gradcheck(lambda v: FORMS[form](x, keys, v, bias, k=2, joint=joint), (values,))


def test_no_rows() -> None:
    _, keys, values, _ = drawn()
    assert KERNEL.op(torch.zeros(0, 3, 4), keys, values).shape == (0, 3, 6)
    assert KERNEL.op(torch.zeros(0, 3, 4), keys, values, joint=True).shape == (0, 6)


def test_the_operator_is_a_good_citizen() -> None:
    x, keys, values, bias = drawn()
    torch.library.opcheck(KERNEL.op, (x, keys, values, bias), {"k": 2})
    torch.library.opcheck(KERNEL.op, (x, keys, values.requires_grad_()), {"joint": True})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.ones(2, 3, 4, dtype=torch.int64)}, "x is torch.int64"),
        ({"x": torch.ones(4)}, r"not floating \[..., G, d\]"),
        ({"x": torch.ones(2, 1, 4)}, r"keys is torch.float32 of shape \[3, 7, 4\], not floating \[G = 1"),
        ({"keys": torch.ones(3, 7, 5)}, "d = 4"),
        ({"values": torch.ones(3, 6, 5)}, "K = 7"),
        ({"bias": torch.ones(7)}, r"bias is torch.float32 of shape \[7\]"),
        ({"k": 8}, "k is 8"),
        ({"k": 0}, "k is 0"),
    ],
)
def test_bad_operands_are_refused(change: dict[str, Any], says: str) -> None:
    x, keys, values, bias = drawn()
    given = {"x": x, "keys": keys, "values": values, "bias": bias, **change}
    for function in (KERNEL.op, KERNEL.fake):
        with pytest.raises(ValueError, match=says):
            function(**given)
