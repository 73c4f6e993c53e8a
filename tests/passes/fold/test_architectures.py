"""The cleaning and folding passes over whole networks: proven, and every batch-norm that can go is gone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxfreeze as fz
from fxfreeze.capture import capture
from fxfreeze.passes import PIPELINE
from fxfreeze.pipeline import run_passes
from fxfreeze.rewrite import Context

pytestmark = pytest.mark.slow


def resnet() -> nn.Module:
    import torchvision

    return torchvision.models.resnet18()


def densenet() -> nn.Module:
    import torchvision

    return torchvision.models.DenseNet(growth_rate=8, block_config=(3, 3), num_init_features=16)


def shufflenet() -> nn.Module:
    import torchvision

    return torchvision.models.shufflenet_v2_x0_5()


def levit() -> nn.Module:
    import timm

    return timm.create_model("levit_128s", num_classes=5)


def nfnet() -> nn.Module:
    import timm

    return timm.create_model("nf_regnet_b0", num_classes=5)


@pytest.mark.parametrize(
    ("make", "size", "batch_norms", "reason"),
    [
        (resnet, 32, 0, ""),
        # Every dense layer and transition begins with a batch-norm and a ReLU, of a concatenation.
        (densenet, 32, 8, "relu does not let a shift pass"),
        (shufflenet, 32, 0, ""),
        (levit, 224, 0, ""),
        (nfnet, 32, 0, ""),
    ],
)
def test_a_network(make: Callable[[], nn.Module], size: int, batch_norms: int, reason: str) -> None:
    torch.manual_seed(0)
    model = make().eval()
    for item in model.modules():
        if isinstance(item, nn.modules.batchnorm._BatchNorm):
            item.running_mean.normal_(0, 0.3)  # type: ignore[union-attr]
            item.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
            item.weight.data.normal_(1, 0.3)
            item.bias.data.normal_(0, 0.3)
    plan = fz.Plan(inputs=[fz.Input("x", shape=("batch", 3, size, size))])
    program, flat = capture(model, plan)
    ctx = Context(plan)
    rows, _ = run_passes(program, PIPELINE, ctx)
    left = [node for node in program.graph.nodes if node.target is torch.ops.aten.batch_norm.default]
    assert len(left) == batch_norms
    skipped = [row for row in ctx.ledger if row.outcome == "skipped" and row.pass_name == "fold-affine"]
    assert len(skipped) == batch_norms and all(reason in row.detail for row in skipped)
    assert all(row.error is None or row.error < (1e-12 if row.exact else 1e-5) for row in rows)
    x = torch.randn(3, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(program.run(x), flat(x), rtol=1e-4, atol=1e-4)
