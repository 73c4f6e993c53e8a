"""The tile kernel for products over other operations, against the definition."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fxfreeze.kernels import _semiring
from fxfreeze.kernels._semiring import semiring, semiring_kernel

PAIRS = {
    ("min", "sum"): lambda a, b: torch.minimum(a, b).sum(0),
    ("max", "sum"): lambda a, b: torch.maximum(a, b).sum(0),
    ("softmin", "sum"): lambda a, b: torch.where((a > 0) & (b > 0), -torch.logaddexp(-a, -b), 0).sum(0),
    ("add", "min"): lambda a, b: (a + b).amin(0),
    ("add", "max"): lambda a, b: (a + b).amax(0),
    ("min", "max"): lambda a, b: torch.minimum(a, b).amax(0),
}


def expected(a, b, pair, threshold=None):
    a, b = a.double()[:, :, None], b.double()[:, None, :]
    if threshold is not None:
        a, b = (value * (value > threshold) for value in (a, b))
    return PAIRS[pair](a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 7, 5), (65, 129, 17), (64, 64, 4)], ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_the_definition_agrees(device, pair, sizes):
    torch.manual_seed(0)
    rows, columns, depth = sizes
    a, b = torch.randn(depth, rows), torch.randn(depth, columns)
    thresholds = (None, 0.0, 0.5) if pair == ("min", "sum") else (0.0,) if pair[1] == "sum" else (None,)
    for threshold in thresholds:
        found = semiring(a.to(device), b.to(device), *pair, threshold).cpu()
        want = expected(a, b, pair, threshold)
        assert found.dtype == torch.float32 and found.shape == want.shape
        assert (found - want).abs().max() <= 1e-6 * depth


@pytest.mark.gpu
def test_strides(device):
    torch.manual_seed(0)
    a, b = torch.randn(2 * 9, 5).to(device)[::2], torch.randn(7, 9).to(device).T
    assert not a.is_contiguous() and not b.is_contiguous()
    assert (semiring(a, b, "add", "min").cpu() - expected(a.cpu(), b.cpu(), ("add", "min"))).abs().max() < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [0, 4])
def test_nothing_to_do(device, rows):
    assert semiring(torch.ones(3, rows, device=device), torch.ones(3, 0, device=device), "min", "sum").shape == (
        rows,
        0,
    )


@pytest.mark.gpu
def test_a_path_that_is_not_there_stays_infinitely_long(device):
    far = torch.full((3, 3), float("inf"), device=device)
    assert torch.equal(semiring(far, far, "add", "min"), far)


@pytest.mark.slow
def test_in_the_interpreter(interpreter):
    interpreter(__file__)


TYPES = {
    **dict.fromkeys(("a_ptr", "b_ptr", "c_ptr"), "*fp32"), "threshold": "fp32",
    **dict.fromkeys(("N", "P", "K", "stride_ak", "stride_bk", "stride_cn"), "i32"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("config", _semiring.CONFIGS, ids=lambda config: f"{config['BN']}x{config['BP']}")
@pytest.mark.parametrize("pair", [("min", "sum"), ("softmin", "sum")], ids="-".join)
def test_within_budget(within_budget, pair, config):
    sizes, options = dict(config), {"num_warps": config["num_warps"]}
    del sizes["num_warps"]
    constants = {"stride_an": 1, "stride_bp": 1, "COMBINE": pair[0], "REDUCE": pair[1], "MASK": pair[1] == "sum",
                 "START": _semiring.START[pair[1]], **sizes}  # fmt: skip
    within_budget(
        f"semiring {' '.join(pair)} {config['BN']}x{config['BP']}", semiring_kernel, TYPES, constants, **options
    )


def test_sizes_of_one(cost):
    """Triton makes constants of integers that are 1."""
    types = {name: kind for name, kind in TYPES.items() if kind != "i32"}
    ones = {name: 1 for name in (*TYPES, "stride_an", "stride_bp") if name not in types}
    constants = {**ones, "COMBINE": "add", "REDUCE": "min", "MASK": False, "START": 0.0, "BN": 32, "BP": 64}
    assert cost(semiring_kernel, types, constants).spills == 0
