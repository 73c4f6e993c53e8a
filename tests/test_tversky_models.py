"""Networks with Tversky heads, trained and compiled: small variants of benchmarks/tversky_mnist.py and tversky_gpt2.py.

scikit-learn's digits stand in for MNIST, and the first files of the standard library for all of it.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxfreeze import demo
from fxfreeze.nn import TverskyProjection

ROOT = Path(__file__).resolve().parents[1]
# Only for this import: on sys.path for good, the root would offer its folder `kernels` to every package.
sys.path.insert(0, str(ROOT))
try:
    from benchmarks import heads, tversky_gpt2, tversky_mnist
    from benchmarks.harness import record
finally:
    sys.path.remove(str(ROOT))

SMALL = tversky_gpt2.Size(
    vocabulary=320, width=32, layers=2, heads=2, context=16, features=48, batch=8, steps=80, held_out=64
)


def digits() -> tversky_mnist.Images:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    data = demo.load_digits()
    return tversky_mnist.Images(data.train, data.train_labels, data.test, data.test_labels)


@pytest.fixture(scope="module")
def text() -> tversky_gpt2.Text:
    pytest.importorskip("tokenizers")
    return tversky_gpt2.read(tversky_gpt2.sources()[:11], SMALL)


def proven(row: dict[str, Any]) -> bool:
    return 0 < row["largest_proof_error"] < 1e-10


# ---- end to end


# Building with torch takes the most time, so one layer does; the real runs build everything with everything.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "targets"), list(zip(tversky_mnist.LAYERS, [("torch", "onnx"), ("onnx",)], strict=True))
)
def test_digits_are_predicted_the_same_in_every_target(layer: str, targets: tuple[str, ...]):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("tversky")
    (row,) = tversky_mnist.run(digits(), epochs=5, layers=[layer], targets=targets)
    assert row["name"] == layer and list(row["results"]) == ["eager", *targets] and proven(row)
    assert row["head_executes"] == ["one matrix product with table [10, 256]"]
    for result in row["results"].values():
        assert result["differing"] == 0
        assert result["accuracy"] == row["results"]["eager"]["accuracy"] > 0.95  # measured: .98


@pytest.mark.slow
def test_the_perplexity_of_a_tied_gpt2_stays(text):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("transformers")
    (row,) = tversky_gpt2.run(text, SMALL, kinds=("tversky",), targets=("onnx",))
    assert row["ok"] and row["head_executes"] == ["one matrix product with table [320, 96]"] and proven(row)
    before = row["results"]["eager"]["perplexity"]
    assert before < 160  # of 320 tokens: it has learnt what a wrong compile could lose
    assert row["results"]["onnx"]["relative_difference"] <= 1e-4
    assert row["results"]["onnx"]["differing_away_from_threshold"] == 0
    # The bank and θ, α and β are the head's own, the prototypes are the embedding.
    assert row["head_bytes"] == 4 * (48 * 32 + 3)
    # Of the table, what features lack is 0 and takes a bit in the file.
    dense = 4 * (48 * 32 + 320 * 96 + 320)
    assert dense / 2 < row["frozen_head_bytes"] < dense


# ---- what the runs are made of


@pytest.mark.slow  # transformers takes its time to import
def test_prototypes_are_the_embedding_and_train_with_it(text):
    pytest.importorskip("transformers")
    model = tversky_gpt2.Logits(SMALL, "tversky")
    head, embedding = model.model.lm_head, model.model.transformer.wte
    assert isinstance(head, TverskyProjection) and head.prototypes is embedding.weight
    tversky_gpt2.train(model, text.train, dataclasses.replace(SMALL, steps=2))
    assert head.prototypes is embedding.weight and not model.training
    linear = tversky_gpt2.Logits(SMALL, "linear").model
    assert linear.lm_head.weight is linear.transformer.wte.weight
    bank = SMALL.features * SMALL.width + 3
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in linear.parameters()) == bank


def test_text_is_held_out_and_the_same_every_time(text):
    files = tversky_gpt2.sources()[:11]
    train, held = tversky_gpt2.split(files)
    assert held == [files[0], files[10]] and sorted(train + held) == sorted(files)
    assert text.held_out.shape == (SMALL.held_out, SMALL.context + 1) and text.train.dtype == torch.int64
    assert 256 < int(text.train.max()) < SMALL.vocabulary
    again = tversky_gpt2.read(files, SMALL)
    assert torch.equal(again.train, text.train) and torch.equal(again.held_out, text.held_out)


def test_perplexity_is_the_number_of_equally_likely_tokens():
    windows = torch.randint(0, 7, (5, 4))
    assert tversky_gpt2.perplexity(torch.zeros(15, 7), windows) == pytest.approx(7)
    sure = 100.0 * nn.functional.one_hot(windows[:, 1:].flatten(), 7).float()
    assert tversky_gpt2.perplexity(sure, windows) == pytest.approx(1)


def test_scores_are_rows_of_predictions():
    table = torch.randn(9, 3)
    ids = torch.randint(0, 9, (5, 4))
    assert torch.equal(heads.scores(lambda ids: table[ids], ids, 2), table[ids].flatten(0, 1))


def test_rows_whose_features_hang_on_rounding_are_found():
    """Features are e₁ and (1, 1): x has the first by x₁, the second by a sum that float32 rounds."""
    head = TverskyProjection(2, 3, torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    x = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.3, -0.3 * (1 + 2**-23)], [0.3, -0.3 * (1 + 1e-5)], [-1.0, 0.5]])
    assert heads.near_threshold(head, head, x, 2).tolist() == [False, True, True, False, False]
    head.threshold = 2.0
    assert heads.near_threshold(head, head, x, 2).tolist() == [True, False, False, False, False]
    head.normalize = True
    with pytest.raises(ValueError, match="normalize"):
        heads.near_threshold(head, head, x, 2)


def test_predictions_that_differ_are_counted_apart_where_rounding_decides():
    wanted = torch.tensor([[2.0, 1.0], [0.0, 1.0], [1.0, 0.0], [4.0, 0.0]])
    actual = torch.tensor([[1.0, 2.0], [0.0, 1.0], [0.0, 1.0], [4.0, 1.0]])
    near = torch.tensor([True, True, False, False])
    found = heads.compared(actual, wanted, near)
    assert found == {"differing": 2, "differing_away_from_threshold": 1, "score_error": 0.25}


def test_what_is_not_good():
    right = {"accuracy": 0.985, "differing": 1, "differing_away_from_threshold": 0}
    assert tversky_mnist.good({"eager": right, "onnx": right})
    for wrong in ({"accuracy": 0.9849}, {"differing_away_from_threshold": 1}):
        assert not tversky_mnist.good({"eager": right, "onnx": right | wrong})
    before, same = {"perplexity": 5.0}, {"relative_difference": 1e-4, "differing_away_from_threshold": 0}
    assert tversky_gpt2.good({"eager": before, "torch": same, "onnx": same})
    away = {"differing_away_from_threshold": 1}
    for wrong in ({"relative_difference": 1.1e-4}, {"relative_difference": float("nan")}, away):
        assert not tversky_gpt2.good({"eager": before, "torch": same, "onnx": same | wrong})


def test_the_package_layer_gets_the_trained_weights():
    pytest.importorskip("tversky")
    net = tversky_mnist.Net(8).eval()
    other = tversky_mnist.with_package_head(net)
    assert type(other.head).__module__ == "tversky.nn" and isinstance(net.head, TverskyProjection)
    x: Tensor = torch.rand(6, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(other(x), net(x), rtol=1e-5, atol=1e-5)


def test_a_row_takes_the_place_of_the_one_of_its_name(tmp_path: Path):
    file = tmp_path / "results.jsonl"
    for row in ({"name": "a", "n": 1}, {"name": "b", "n": 2}, {"name": "a", "n": 3}):
        record.replace_row(file, row)
    assert file.read_text() == '{"name": "a", "n": 3}\n{"name": "b", "n": 2}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]
