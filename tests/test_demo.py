"""The demo does what its table says: the LoRA helps, folding changes nothing, three targets agree."""

from __future__ import annotations

import pytest
import torch

from fxfreeze import demo


def test_turning_by_90_degrees_is_an_exact_rotation():
    images = torch.rand(3, 1, 8, 8)
    turned = demo.turn(images, 90)
    assert torch.allclose(turned, torch.rot90(images, 1, (2, 3)), atol=1e-5) or torch.allclose(
        turned, torch.rot90(images, -1, (2, 3)), atol=1e-5
    )


@pytest.mark.slow
def test_demo_end_to_end(tmp_path):
    pytest.importorskip("sklearn", reason="the demo's digits come with scikit-learn")
    pytest.importorskip("onnxruntime", reason="the demo emits ONNX")
    steps: list[str] = []
    result = demo.run_demo(tmp_path / "out", say=steps.append)
    score = result.accuracy
    assert score["frozen base, upright digits"] > 0.95
    assert score["with LoRA, eager"] > score["frozen base, eager"] + 0.3
    for target in ("torch", "aoti", "onnx"):
        assert score[f"folded, {target}"] == score["with LoRA, eager"]
    assert all(row["ok"] for row in result.artifact.manifest["parity"])
    proofs = {row["name"]: row["error"] for row in result.artifact.manifest["passes"] if row["rewrites"]}
    assert 0 < proofs["fold-delta"] < 1e-10 and 0 < proofs["fold-affine"] < 1e-10
    assert (tmp_path / "out" / "onnx" / "model.onnx").is_file() and len(steps) > 4
