"""Networks with gates, trained, hardened and compiled: small variants of benchmarks/gates_mnist.py and gate_modes.py.

scikit-learn's digits stand in for MNIST.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fxfreeze import demo

ROOT = Path(__file__).resolve().parents[1]
# Only for this import: on sys.path for good, the root would offer its folder `kernels` to every package.
sys.path.insert(0, str(ROOT))
try:
    from benchmarks import gate_modes, gates_mnist, tversky_mnist
    from benchmarks.harness.case import relative_error
    from benchmarks.harness.runner import Runner
finally:
    sys.path.remove(str(ROOT))

METHODS = {method.name: method for method in gates_mnist.METHODS}
FEW = dataclasses.replace(METHODS["gates, few firing"], rate=0.03, penalty=0.3, start=0.0)


@functools.cache
def digits() -> gates_mnist.Data:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    data = demo.load_digits()
    images = tversky_mnist.Images(data.train, data.train_labels, data.test, data.test_labels)
    return gates_mnist.split(images, 200)


@functools.cache
def base() -> gates_mnist.Net:
    with torch.random.fork_rng(devices=[]):
        return gates_mnist.pretrained(digits(), 0, 20)


@functools.cache
def gated() -> Any:
    return gates_mnist.specialised(base(), FEW, digits(), 0, 30)


# ---- gates_mnist


# Building the targets takes the most time, so the quickest to build stands for all.
@pytest.mark.slow
def test_hard_gates_predict_what_soft_ones_did_and_few_neurons_fire():
    pytest.importorskip("onnxruntime")
    row = gates_mnist.hardened(base(), gated(), FEW, digits(), ["onnx"])
    assert row["targets"]["onnx"]["differing"] == 0 and row["targets"]["onnx"]["score_error"] < 1e-5
    assert row["soft"] > 0.85 and abs(row["soft"] - row["turned"]) < 0.02 and row["agreement"] > 0.98
    before = gates_mnist.by_hand(base(), {}, digits().test.turned)[1]
    for site, share in row["firing"].items():
        assert 0.02 < share < before[site] - 0.1
        assert row["nonzero"][site] == pytest.approx(share)  # thresholds are above 0, where ReLU gives 0
    assert "neurons fire; on 200 rows of calibration data" in row["ledger"][0]


def test_every_method_trains_what_it_says_and_leaves_the_base_alone():
    weights = {name: value.clone() for name, value in base().state_dict().items()}
    side, found = 8, {}
    for name, method in METHODS.items():
        net = gates_mnist.specialised(base(), method, digits(), 0, 1)
        found[name] = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    lora = 4 * (side**2 + 256 + 256 + 256 + 256 + 10)
    full = sum(value.numel() for value in weights.values())
    assert list(found.values()) == [0, 1024, 1024, lora, full]
    assert all(torch.equal(value, base().state_dict()[name]) for name, value in weights.items())


def test_the_penalty_is_the_share_of_neurons_that_fire():
    part, labels = digits().test.turned[:50], digits().test.labels[:50]
    plain, more = (gates_mnist.loss(gated(), part, labels, penalty) for penalty in (0.0, 0.5))
    assert plain.item() == pytest.approx(F.cross_entropy(gated()(part), labels).item())
    assert 0 < (more - plain).item() < 0.5
    more.backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in gated().parameters())


def test_held_out_images_are_not_trained_on_and_turning_back_gives_the_image():
    data = digits()
    assert len(data.held_out.labels) == 200 and len(data.train.labels) == len(data.train.upright)
    image = torch.zeros(1, 1, 9, 9)
    image[..., 4, 6] = 1.0  # right of the centre: after a quarter turn above or below it, after four there again
    quarter = gates_mnist.turned(image, 90)
    assert quarter[0, 0, :, 4].argmax() in (2, 6) and quarter.sum() == pytest.approx(1.0, abs=1e-4)
    torch.testing.assert_close(gates_mnist.turned(quarter, -90), image, atol=1e-4, rtol=0)


def seeds(*lost: float, differing: int = 0) -> list[dict[str, Any]]:
    shares = {"act1": 0.2, "act2": 0.4}
    return [
        {"trainable": 8, "turned": 0.9 - one, "upright": 0.5, "soft": 0.9, "agreement": 1.0, "firing": shares,
         "nonzero": shares, "targets": {"torch": {"differing": differing}}}
        for one in lost
    ]  # fmt: skip


def test_what_is_not_good():
    assert gates_mnist.summary(seeds(0.001, 0.0025), 0.002)["ok"]
    assert not gates_mnist.summary(seeds(0.001, 0.0035), 0.002)["ok"]
    assert gates_mnist.summary(seeds(0.5), None)["ok"]
    assert not gates_mnist.summary(seeds(0.0, differing=1), None)["ok"]
    plain = gates_mnist.summary([{"trainable": 0, "turned": 0.9, "upright": 0.8}], 0.002)
    assert plain["ok"] and "lost" not in plain and plain["turned"] == {"mean": 0.9, "sd": 0.0}


def test_the_table_has_means_and_deviations_in_percent():
    row = {"name": "gates", **gates_mnist.summary(seeds(0.0, 0.01), 0.002)}
    head, line = gates_mnist.table([row]).splitlines()
    assert head.split()[:2] == ["method", "trainable"]
    assert "89.50 ± 0.71" in line and "20 / 40" in line and line.endswith("FAIL")


# ---- gate_modes


@pytest.mark.slow
def test_modes_compute_the_same_in_one_artifact_and_every_call_is_for_others():
    pytest.importorskip("onnxruntime")
    case = gate_modes.modes_case(gate_modes.SMALL[0], "onnx", seed=0)
    found = Runner(quick=True, rounds=1).run(case)
    assert [(m.peer, m.status) for m in found] == [(peer.name, "ok") for peer in case.peers]
    _, few, many = case.inputs(torch.Generator().manual_seed(0))
    assert len(few) == len(many) == 500
    assert set(torch.cat(few).tolist()) == {0, 1} and len(set(torch.cat(many).tolist())) == 1000


def test_no_neuron_of_the_modes_hangs_on_rounding():
    """Sums are exact in float32, so the thresholds are half a step away from all of them."""
    size = dataclasses.replace(gate_modes.SMALL[0], batch=8)
    gated = gate_modes.Gated(size, 5, seed=0)
    x = gate_modes.steps((8, size.width), torch.Generator().manual_seed(1))
    first = gated.model[0]
    h, exact = first(x), F.linear(x.double(), first.weight.double(), first.bias.double())
    assert torch.equal(h.double(), exact)
    threshold = gated.net.adapter_state()["adapters.gate.1.threshold"]
    assert (exact[:, None] - threshold).abs().min() >= 0.5 * gate_modes.STEP**2


def test_a_wrong_mode_is_noticed():
    case = gate_modes.modes_case(gate_modes.SMALL[0], "torch", seed=0)
    x, few, many = case.inputs(torch.Generator().manual_seed(0))
    gated = gate_modes.Gated(gate_modes.SMALL[0], gate_modes.MANY, seed=0)
    right, wrong = (gated.reference(x, few, ids) for ids in (many, many[1:] + many[:1]))
    assert relative_error(wrong, right) > 100 * case.tolerance
