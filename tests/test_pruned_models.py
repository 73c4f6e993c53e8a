"""Adapters, pruned channels, tiles and a mask in one plan: what is trained under the masks is what is compiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.api import rewrite

INPUTS = [fz.Input("x", ("batch", 3, 16, 16))]


class Net(nn.Module):
    """A residual block behind a stem, and a wide head of two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.bn = nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv1, self.conv2 = nn.Conv2d(32, 48, 3, padding=1), nn.Conv2d(48, 32, 3, padding=1)
        self.up, self.down, self.out = nn.Linear(32, 256), nn.Linear(256, 256), nn.Linear(256, 10)
        with torch.no_grad():
            self.bn.running_mean.normal_(std=0.3)
            self.bn.running_var.uniform_(0.5, 2.0)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(x + self.conv2(torch.relu(self.conv1(x))))
        return self.out(torch.relu(self.down(torch.relu(self.up(x.mean((2, 3)))))))


def plan(*targets: str) -> fz.Plan:
    return fz.Plan(
        INPUTS,
        [
            fz.LoRA("conv*", rank=2),
            fz.IA3("down"),
            fz.Prune(["stem", "conv*"], method="channel", flops=0.5, multiple=16, name="channels"),
            fz.Prune("down", method="block", density=0.25, block=(64, 64), name="tiles"),
            fz.Prune("out", method="magnitude", density=0.5, train=True, name="weights"),
        ],
        targets,
    )


@pytest.fixture(scope="module")
def trained() -> fz.AdaptedModule:
    net, generator = fz.adapt(Net(), plan()), torch.Generator().manual_seed(1)
    x, labels = torch.randn(32, 3, 16, 16, generator=generator), torch.randint(10, (32,), generator=generator)
    optimizer = torch.optim.AdamW(net.parameters(), 0.01, weight_decay=0.1)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(net(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    return net


def test_channels_are_gone_and_the_rest_is_zero(trained: fz.AdaptedModule) -> None:
    done = rewrite(trained, plan())
    shapes = {name: tuple(value.shape) for name, value in done.program.state.items()}
    stem, inner = shapes["stem.weight"][0], shapes["conv1.weight"][0]
    assert stem % 16 == inner % 16 == 0 and (stem, inner) != (32, 48)
    assert (shapes["conv1.weight"], shapes["conv2.weight"]) == ((inner, stem, 3, 3), (stem, inner, 3, 3))
    assert shapes["up.weight"] == (shapes["down.weight"][1], stem), "what no tile reads is gone"
    left = {name: int((done.program.state[f"{name}.weight"] != 0).sum()) for name in ("down", "out")}
    assert 0 < left["down"] <= 256 * 256 // 4 and 0 < left["out"] <= 256 * 10 // 2
    assert not [node for node in done.program.graph.nodes if "frozen" in str(node.target)], "no mask is left"
    x = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(done.program.run(x)[0], trained(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_all_targets_compute_it(trained: fz.AdaptedModule, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs fxfreeze[onnx]")
    artifact, x = fz.compile(trained, plan("torch", "aoti", "onnx")), torch.randn(5, 3, 16, 16)
    for target in ("torch", "aoti", "onnx"):
        torch.testing.assert_close(artifact.target(target)(x), trained(x).detach(), rtol=1e-4, atol=1e-5)
    ledger = artifact.manifest["ledger"]
    assert [row for row in ledger if row["requested"] == "compaction" and row["outcome"] == "rewritten"]


@pytest.mark.slow
def test_what_adapters_and_pruning_leave_is_quantized() -> None:
    pytest.importorskip("onnxruntime", reason="needs fxfreeze[onnx]")
    pytest.importorskip("torchao", reason="needs fxfreeze[int8]")
    targets, x = ("torch", "onnx"), torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    steps = [*plan().steps[:3], fz.Quantize()]
    net = fz.adapt(Net(), fz.Plan(INPUTS, steps))
    with torch.no_grad():
        for value in net.parameters():
            value.normal_(std=0.1, generator=torch.Generator().manual_seed(value.numel()))
    artifact = fz.compile(net, fz.Plan(INPUTS, steps, targets), calibration=[x])
    wanted, ledger = net(x).detach(), artifact.manifest["ledger"]
    for target in targets:
        gap = (artifact.target(target)(x) - wanted).norm() / wanted.norm()
        assert 1e-4 < float(gap) < 0.03, (target, gap)
        ran = {
            row["site"] for row in ledger if row["executes"].startswith("integer") and row["executes"].endswith(target)
        }
        assert ran == {"stem", "conv1", "conv2", "up", "down", "out"}
    assert [row["executes"] for row in ledger if row["requested"] == "compaction"] == ["16 channels", "32 channels"]
