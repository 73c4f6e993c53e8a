"""A base in integers, and what stays in floats beside it: adapters that rows select, end to end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz

IN, WIDTH, OUT, RANK, ADAPTERS = 64, 128, 10, 4, 3
SITES = {"0": (IN, WIDTH), "2": (WIDTH, OUT)}
INPUTS = [fz.Input("x", ("batch", IN))]


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, WIDTH), nn.ReLU(), nn.Linear(WIDTH, OUT)).eval()


def lone(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for site, (inner, outer) in SITES.items():
        state[f"{site}.lora_A"] = torch.randn(RANK, inner, generator=generator) / inner**0.5
        state[f"{site}.lora_B"] = torch.randn(outer, RANK, generator=generator) / RANK**0.5
    return state


def alone(state: dict[str, Tensor] | None, x: Tensor) -> Tensor:
    """The base in floats with that adapter in its weights."""
    model = base()
    for site in SITES if state else ():
        assert state is not None
        model[int(site)].weight.data += state[f"{site}.lora_B"] @ state[f"{site}.lora_A"]  # type: ignore[operator]
    return model(x).detach()


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    found: list[dict[str, Tensor]] = []
    for _ in range(4):
        x, id = torch.randn(32, IN, generator=generator), torch.randint(0, ADAPTERS + 1, (32,), generator=generator)
        found.append({"x": x, "adapter": id})
    return found


def gap(found: Tensor, want: Tensor) -> float:
    return float((found - want).norm() / want.norm())


@pytest.fixture(scope="module")
def states() -> dict[int, dict[str, Tensor]]:
    return {id: lone(id) for id in range(1, ADAPTERS + 2)}


def compiled(states: dict[int, dict[str, Tensor]], targets: tuple[str, ...], **quantize: Any) -> fz.Artifact:
    lora = fz.LoRA(at=list(SITES), rank=RANK, alpha=RANK, adapters=ADAPTERS)
    plan = fz.Plan(INPUTS, [lora, fz.Quantize(**quantize)], targets)
    net = fz.adapt(base(), plan)
    with torch.no_grad():
        for name, value in net.named_parameters():
            site, leaf = name.split(".")[-2:]
            for id in range(1, ADAPTERS + 1):
                value[id - 1].copy_(states[id][f"{site}.{leaf}"])
    return fz.compile(net, plan, calibration=batches())


def mixed(states: dict[int, dict[str, Tensor]], x: Tensor, ids: Tensor) -> Tensor:
    return torch.cat([alone(states.get(id), row[None]) for row, id in zip(x, ids.tolist(), strict=True)])


def executed(artifact: fz.Artifact, target: str) -> dict[str, str]:
    rows = [row for row in artifact.manifest["ledger"] if row["executes"].endswith(f"in {target}")]
    return {row["site"]: row["executes"] for row in rows}


@pytest.mark.slow
def test_adapters_that_rows_select_stay_in_floats_beside_int8(states: dict[int, dict[str, Tensor]]) -> None:
    pytest.importorskip("torchao", reason="needs fxfreeze[int8]")
    artifact = compiled(states, ("onnx", "torch"))
    assert executed(artifact, "onnx") == dict.fromkeys(SITES, "integer-executed by MatMulIntegerToFloat in onnx")
    assert executed(artifact, "torch") == dict.fromkeys(SITES, "integer-executed by oneDNN in torch")
    x, ids = batches()[0].values()
    for target in ("onnx", "torch"):
        assert 1e-4 < gap(artifact.target(target)(x, ids), mixed(states, x, ids)) < 0.03
        assert gap(artifact.target(target)(x, 0 * ids), alone(None, x)) < 0.03
    # What is added later is next to the same integers; no other adapter would do.
    new = artifact.add_adapter("new", states[ADAPTERS + 1])
    for target in ("onnx", "torch"):
        found = artifact.target(target)(x, torch.full_like(ids, new))
        assert gap(found, alone(states[new], x)) < 0.05 < 0.3 < gap(found, alone(states[1], x))


@pytest.mark.parametrize(("quantize", "kernel", "most"), [
    ({"mode": "dynamic"}, "DynamicQuantizeMatMul", 0.03),
    ({"scheme": "int4-weight", "granularity": "group:32"}, "MatMulNBits", 0.2),
])  # fmt: skip
def test_other_schemes_beside_them(
    states: dict[int, dict[str, Tensor]], quantize: dict[str, Any], kernel: str, most: float
) -> None:
    artifact = compiled(states, ("onnx",), **quantize)
    assert executed(artifact, "onnx") == dict.fromkeys(SITES, f"integer-executed by {kernel} in onnx")
    x, ids = batches()[0].values()
    assert 1e-4 < gap(artifact(x, ids), mixed(states, x, ids)) < most
