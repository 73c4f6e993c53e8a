"""Gates between quantized layers, in one plan: layers run on integers, gates decide as before, targets agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.kernels.dequantize import KERNEL as DEQUANTIZE
from fxfreeze.kernels.quantize import KERNEL as QUANTIZE

SIZE, WIDTH = 12, 24
CLOSE = 0.01
"""Of a neuron's largest value: what 8 bits may turn, a gate in the middle of them at that."""


class Net(nn.Module):
    """A layer in front of an activation, and two behind it."""

    def __init__(self, conv: bool, act: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = conv
        if conv:
            self.front, self.back = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        else:
            self.front, self.back = nn.Linear(SIZE, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.act, self.head = act or nn.ReLU(), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.back(self.act(self.front(x))).relu()
        return self.head(x.mean((2, 3)) if self.conv else x)


def shape(conv: bool) -> tuple[int, ...]:
    return (3, 6, 6) if conv else (SIZE,)


def batches(conv: bool, count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(64, *shape(conv), generator=generator) for _ in range(count)]


def trained(model: Net, *steps: Any, targets: Any) -> tuple[fz.AdaptedModule, fz.Plan]:
    """With gains around 1, and thresholds that silence much and differ by neuron."""
    plan = fz.Plan([fz.Input("x", ("batch", *shape(model.conv)))], steps, targets=targets)
    net = fz.adapt(model.eval(), plan)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, value in net.named_parameters():
            drawn = torch.rand(value.shape, generator=generator)
            value.copy_(0.5 + drawn if name.endswith("gain") else 0.2 + 0.4 * drawn)
    return net, plan


@torch.no_grad()
def gap(
    found: Tensor, net: fz.AdaptedModule, model: Net, x: Tensor, site: str = "act", mode: int | None = None
) -> float:
    """Of `found` from the gated network in floats, by the definition y = g · h · 1[|h| > τ], after a ReLU 1[h > τ].

    Rows of vectors count where no gate is close to a decision; of images, where hundreds are added up, all do.
    """
    values = {name.rpartition(".")[2]: value.detach() for name, value in net.named_parameters()}
    gain, threshold = (values[name] if mode is None else values[name][mode] for name in ("gain", "threshold"))
    if model.conv:
        gain, threshold = gain.reshape(-1, 1, 1), threshold.reshape(-1, 1, 1)
    clear = torch.ones(len(x), dtype=torch.bool)

    def gated(module: nn.Module, args: Any, h: Tensor) -> Tensor:
        size = h if site == "front" else h.abs()
        if not model.conv:
            clear.copy_(((size - threshold).abs() > CLOSE * size.amax(0)).all(1))
        return gain * h * (size > threshold)

    plain = model(x)
    hook = getattr(model, site).register_forward_hook(gated)
    want = model(x)
    hook.remove()
    assert clear.sum() >= 20
    want, plain, found = want[clear], plain[clear], found[clear]
    assert float((want - plain).norm() / plain.norm()) > 0.05, "a gate that does nothing would do"
    return float((found - want).norm() / want.norm())


def ran(artifact: fz.Artifact) -> dict[str, str]:
    """Site → what the ledger says that the one target runs."""
    rows = [row for row in artifact.manifest["ledger"] if row["step"] == "quantize" and row["outcome"] == "measured"]
    return {row["site"]: row["executes"] for row in rows}


GATES = {
    "relu": (fz.Gate("act"), "act", nn.ReLU()),
    "size": (fz.Gate("act", s="abs"), "act", nn.Tanh()),
    "output": (fz.Gate("front", on="output"), "front", nn.ReLU()),
}
LINEAR = {
    "front": "integer-executed by MatMulIntegerToFloat in onnx", "back": "integer-executed by QGemm in onnx",
    "head": "integer-executed by MatMulIntegerToFloat in onnx",
}  # fmt: skip
"""What is quantized next gives integers, and what a gate reads floats."""


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
def test_onnx_runs_layers_around_a_gate_on_integers(conv: bool, kind: str) -> None:
    """Parity with the program is a condition of compiling; here it is with the gated network in floats."""
    pytest.importorskip("onnxruntime")
    gate, site, act = GATES[kind]
    net, plan = trained(Net(conv, act), gate, fz.Quantize(), targets=["onnx"])
    artifact = fz.compile(net, plan, calibration=batches(conv))
    assert ran(artifact) == LINEAR | (
        dict.fromkeys(("front", "back"), "integer-executed by QLinearConv in onnx") if conv else {}
    )
    x = batches(conv)[-1]
    assert gap(artifact(x), net, Net(conv, act).eval(), x, site) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
def test_torch_runs_layers_around_a_gate_on_integers(conv: bool) -> None:
    pytest.importorskip("torchao", reason="needs fxfreeze[int8]")
    net, plan = trained(Net(conv), fz.Gate("act"), fz.Quantize(), targets=["torch"])
    artifact = fz.compile(net, plan, calibration=batches(conv))
    assert ran(artifact) == dict.fromkeys(("front", "back", "head"), "integer-executed by oneDNN in torch")
    x = batches(conv)[-1]
    assert gap(artifact(x), net, Net(conv).eval(), x) < 0.02


def test_what_a_gate_silences_is_the_zero_of_the_integers_behind_it() -> None:
    """Silence is exact: the layer behind reads no remainder of it."""
    from fxfreeze.api import rewrite

    net, plan = trained(Net(False), fz.Gate("act"), fz.Quantize(), targets=())
    program = rewrite(net, plan, calibration=batches(False)).program
    seen: dict[Any, Tensor] = {}

    def call(node: Any, args: Any, kwargs: Any) -> Tensor:
        seen[node] = node.target(*args, **kwargs)
        return seen[node]

    program.execute(batches(False, 1), lambda node: program.state[str(node.target)].to(node.meta["val"].dtype), call)
    linear = torch.ops.aten.linear.default
    (back,) = [node for node in seen if node.target is linear and program.module_path(node) == "back"]
    floats = back.args[0]
    assert floats.target is DEQUANTIZE.op and floats.args[0].target is QUANTIZE.op
    silent = seen[floats.args[0].args[0]] == 0
    assert 0.1 < float(silent.double().mean()) < 0.9
    assert bool((seen[floats][silent] == 0).all()) and bool((seen[floats][~silent] != 0).all())


@pytest.mark.parametrize("some", [("front",), ("back", "head")], ids="-".join)
def test_one_side_of_a_gate_alone(some: tuple[str, ...]) -> None:
    pytest.importorskip("onnxruntime")
    net, plan = trained(Net(False), fz.Gate("act"), fz.Quantize(some), targets=["onnx"])
    artifact = fz.compile(net, plan, calibration=batches(False))
    assert ran(artifact) == {site: LINEAR[site] for site in some}
    x = batches(False)[-1]
    assert gap(artifact(x), net, Net(False).eval(), x) < 0.02


def test_modes_choose_gates_between_integers() -> None:
    pytest.importorskip("onnxruntime")
    net, plan = trained(Net(False), fz.Gate("act", modes=2), fz.Quantize(), targets=["onnx"])
    artifact = fz.compile(net, plan, calibration=[(batch, torch.arange(64) % 2) for batch in batches(False)])
    assert ran(artifact) == LINEAR
    x = batches(False)[-1]
    for mode in (0, 1):
        assert gap(artifact(x, torch.full((64,), mode)), net, Net(False).eval(), x, mode=mode) < 0.02
