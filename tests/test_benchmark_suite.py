"""The cases of the suite: cheap to list, and the same function in every form that a library is given."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# Only for this import: on sys.path for good, the root would offer its folder `kernels` to every package.
sys.path.insert(0, str(ROOT))
try:
    from benchmarks import networks as suite
    from benchmarks.harness import Options, Unavailable
    from benchmarks.harness.case import relative_error
    from benchmarks.suite import networks, peers, plans
finally:
    sys.path.remove(str(ROOT))

FLOATS = (plans.BARE, plans.LORA, plans.GATES, plans.TVERSKY, plans.TICKET)


@pytest.fixture(scope="module")
def small() -> networks.Network:
    return networks.encoder(0)


@pytest.fixture(scope="module")
def inputs(small) -> tuple[torch.Tensor, ...]:
    return small.draw(torch.Generator().manual_seed(5))


@pytest.mark.parametrize("quick", [False, True])
def test_cases_are_listed_without_building_a_network(quick, monkeypatch):
    def build(network):
        raise AssertionError(f"{network.name} is built")

    monkeypatch.setattr(networks.Network, "model", property(build))
    start = time.perf_counter()
    found = list(suite.cases(Options(quick=quick)))
    assert time.perf_counter() - start < 1
    names = [case.name for case in found]
    assert len(set(names)) == len(names) and len(names) == (8 if quick else 70)
    assert names == [case.name for case in suite.cases(Options(quick=quick))]


def test_every_variant_has_the_peers_that_do_its_job():
    for case in suite.cases(Options()):
        names = {peer.name for peer in case.peers}
        assert ("LoRA" in case.name) == any(name.startswith("peft") for name in names), case.name
        assert {"fxfreeze, onnx", "fxfreeze, aoti"} <= names


@pytest.mark.parametrize("variant", plans.VARIANTS, ids=lambda variant: variant.name)
def test_plain_modules_are_the_reference_and_not_another_variant(variant, small, inputs):
    """The tolerance of a case is one that leaving the step out exceeds."""
    wanted = plans.reference(small, variant, *inputs)
    for merged in (False, True):
        assert relative_error(plans.plain(small, variant, merged=merged)(*inputs), wanted) < 1e-5
    if variant not in (plans.BARE, plans.QUANTIZED):
        bare = plans.reference(small, plans.BARE, *inputs)
        assert relative_error(bare, wanted) > 2 * variant.tolerance(small)


def test_a_peer_whose_library_is_missing_says_so(small, monkeypatch):
    for package in ("peft", "torch_pruning", "torchao", "nncf", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    for name in ("peft, eager", "Torch-Pruning, ONNX Runtime", "torchao", "NNCF, ONNX Runtime", "ONNX Runtime"):
        with pytest.raises(Unavailable, match="not installed"):
            peers.peer(name, small, plans.TICKET).prepare()
