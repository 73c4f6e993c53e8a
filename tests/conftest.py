"""Every test draws the same numbers in every run, and no test's graph hangs on a clock: what fails once fails again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def one_clock() -> Iterator[None]:
    """Layers of one input stay apart in the pipeline, and zeros are multiplied, whatever this machine is faster at."""
    from fxfreeze.passes import PIPELINE
    from fxfreeze.passes.fuse.block_sparse import BlockSparse
    from fxfreeze.passes.fuse.parallel import MergeParallel
    from fxfreeze.passes.fuse.semi_structured import SemiStructured

    with pytest.MonkeyPatch.context() as patch:
        for item in PIPELINE:
            if isinstance(item, MergeParallel | BlockSparse | SemiStructured):
                patch.setattr(item, "measure", lambda layer: [(2.0, 1.0)] * len(layer.sizes))
        yield


@pytest.fixture
def scaled_rows() -> Iterator[None]:
    """``torch._scaled_mm`` with a scale per row on CPUs, by its definition where torch (2.11) has that on GPUs only."""
    if _scales_rows():
        yield
        return
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_scaled_mm", _scaled_mm, "CPU", allow_override=True)
        yield


def _scales_rows() -> bool:
    x, scales = torch.zeros(16, 16).to(FLOAT8), torch.ones(16, 1)
    try:
        torch._scaled_mm(x, x.T, scales, scales.T, out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


def _scaled_mm(
    x: Tensor, right: Tensor, x_scale: Tensor, scale: Tensor, bias: Tensor | None = None,
    result_scale: Tensor | None = None, out_dtype: torch.dtype = torch.bfloat16, use_fast_accum: bool = False,
) -> Tensor:  # fmt: skip
    y = x.float() @ right.float() * (x_scale * scale)
    return (y if bias is None else y + bias.float()).to(out_dtype)
