"""What the target tests share: one small network, and its three targets built once per session.

The inputs are named to collide with what a converter might call things; one output is an input, one is returned twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from fxfreeze import Dim, Input, Plan
from fxfreeze.capture import FlatModel, capture
from fxfreeze.emit import EMITTERS, Runner
from fxfreeze.lower import Lowering
from fxfreeze.program import Program
from fxfreeze.serialize import Interface


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 5)
        self.register_buffer("scale", torch.arange(1.0, 6.0))

    def forward(self, relu, steps):
        hidden = self.stem(relu["image"]).mean((2, 3))
        logits = self.head(hidden) * self.scale + steps.sum(1, keepdim=True)
        return {"linear": logits, "again": logits, "steps": steps, "top": logits.argmax(-1), "constant": self.scale}


PLAN = Plan(
    inputs=[Input("relu.image", shape=("batch", 3, 8, 8)), Input("steps", shape=("batch", "time"))],
    dims={"time": Dim(max=32)},
    targets=["torch", "aoti", "onnx"],
)


@dataclass
class Built:
    """A captured network and the folder with its three targets."""

    program: Program
    reference: FlatModel
    folder: Path
    facts: dict[str, dict[str, object]]

    @property
    def interface(self) -> Interface:
        return Interface.of(self.program)

    def load(self, name: str) -> Runner:
        return EMITTERS[name].load(self.folder / EMITTERS[name].folder, self.interface)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    torch.manual_seed(0)
    program, reference = capture(Net().eval(), PLAN)
    folder, lowering, facts = tmp_path_factory.mktemp("targets"), Lowering(program), {}
    for name, target in EMITTERS.items():
        (folder / target.folder).mkdir()
        facts[name] = target.emit(lowering, folder / target.folder)
    return Built(program, reference, folder, facts)


@pytest.fixture(scope="session")
def runners(built: Built) -> dict[str, Runner]:
    return {name: built.load(name) for name in EMITTERS}
