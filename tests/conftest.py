"""Every test draws the same numbers in every run, and no test's graph hangs on a clock: what fails once fails again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


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
