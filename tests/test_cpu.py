"""CPUs that add products of integers up in 16 bits: which these are, and that artifacts which overflow there say so."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxfreeze as fz
from fxfreeze import cpu
from fxfreeze.errors import ArtifactError, EmitError

NARROW = "adds products of integers up in pairs of 16 bits"


@pytest.mark.parametrize(
    ("machine", "features", "narrow"),
    [
        ("x86_64", {"avx2": True, "avx512_vnni": False, "avx_vnni": False}, True),
        ("AMD64", {"avx2": True}, True),
        ("x86_64", {"avx512_vnni": True}, False),
        ("x86_64", {"avx_vnni": True}, False),
        ("aarch64", {"neon": True}, False),
    ],
)
def test_x86_without_vnni(
    monkeypatch: pytest.MonkeyPatch, machine: str, features: dict[str, bool], narrow: bool
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    assert cpu.adds_in_16_bits() is narrow


@pytest.mark.parametrize("vnni", [True, False])
def test_older_versions_of_torch_know_one_kind(monkeypatch: pytest.MonkeyPatch, vnni: bool) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    assert cpu.adds_in_16_bits() is not vnni


def test_the_largest_weight_fits() -> None:
    for weight, fits in ((cpu.SAFE_WEIGHT, True), (cpu.SAFE_WEIGHT + 1, False)):
        assert (2 * 255 * weight < 2**15) is fits


def diagonal(reduce_range: bool | None = None, **given: Any) -> fz.Artifact:
    """One weight of each output is not 0, so that nothing overflows anywhere; it is the largest there is."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(8))  # type: ignore[operator]
    plan = fz.Plan([fz.Input("x", ("batch", 8))], [fz.Quantize(reduce_range=reduce_range, **given)], ["onnx"])
    return fz.compile(model, plan, calibration=[3 * torch.randn(32, 8, generator=torch.Generator().manual_seed(1))])


def test_weights_of_8_bits_are_refused_where_they_overflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs fxfreeze[onnx]")
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(cpu, "adds_in_16_bits", lambda: False)
    wide = diagonal()
    assert wide.manifest["wide_products"] is True
    wide.save(tmp_path / "wide")
    want = wide(x)
    monkeypatch.setattr(cpu, "adds_in_16_bits", lambda: True)
    loaded = fz.load(tmp_path / "wide")
    for use in (lambda: loaded(x), loaded.check):
        with pytest.raises(ArtifactError, match=NARROW) as caught:
            use()
        assert not isinstance(caught.value, EmitError) and "reduce_range=True" in str(caught.value)
    with pytest.raises(EmitError, match=NARROW):
        diagonal(False)
    assert diagonal(scheme="int8-weight").manifest["wide_products"] is False  # of floats there are no such sums
    narrow = diagonal()
    assert narrow.manifest["wide_products"] is False
    torch.testing.assert_close(narrow(x), want, rtol=0.0, atol=0.05)
