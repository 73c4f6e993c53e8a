"""Mask files: what is written is read back, foreign files are taken at their word, and nothing else passes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from fxfreeze import PlanError, weights
from fxfreeze.masks import as_mask, check_masks, density, read_mask, write_mask


def masks() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "conv.weight": torch.rand(4, 3, 3, 3, generator=generator) < 0.3,
        "fc.weight": torch.rand(5, 8, generator=generator) < 0.6,
    }


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "ticket.safetensors"
    write_mask(file, masks(), {"level": "3"})
    found = read_mask(file)
    assert found.keys() == masks().keys()
    assert all(value.dtype == torch.bool and torch.equal(value, masks()[name]) for name, value in found.items())
    assert weights.read(file)[1] == {"format": "fxfreeze.masks", "version": "1", "level": "3"}
    assert os.listdir(tmp_path) == ["ticket.safetensors"]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32, torch.bfloat16])
def test_any_dtype_of_zeros_and_ones(tmp_path: Path, dtype: torch.dtype) -> None:
    plain = {name: value.to(dtype) for name, value in masks().items()}
    safetensors.torch.save_file(plain, tmp_path / "a.safetensors")
    torch.save(plain, tmp_path / "mask.pth")
    for name in ("a.safetensors", "mask.pth"):
        assert all(torch.equal(value, masks()[key]) for key, value in read_mask(tmp_path / name).items())


def test_tied_and_expanded_masks_are_written(tmp_path: Path) -> None:
    one = torch.tensor([[True], [False]]).expand(2, 3)
    write_mask(tmp_path / "m.safetensors", {"a": one, "b": one})
    assert read_mask(tmp_path / "m.safetensors")["b"].tolist() == [[True] * 3, [False] * 3]


def test_density_is_over_all_weights() -> None:
    assert density({"a": torch.tensor([1.0, 0, 0, 0]), "b": torch.tensor([True, True])}) == 0.5
    with pytest.raises(PlanError, match="no masks"):
        density({})
    with pytest.raises(PlanError, match=r"a holds 0\.5"):
        density({"a": torch.tensor([0.5])})


@pytest.mark.parametrize("value", [2, -1, float("nan"), 0.5])
def test_other_values_are_refused(tmp_path: Path, value: float) -> None:
    wrong = {"fc.weight": torch.tensor([[1.0, value, value, 0.0]])}
    with pytest.raises(PlanError, match=r"fc\.weight holds .*2 of 4 values are neither") as caught:
        write_mask(tmp_path / "m.safetensors", wrong)
    assert str(value) in caught.value.what and not list(tmp_path.iterdir())
    torch.save(wrong, tmp_path / "m.pt")
    with pytest.raises(PlanError, match=r"fc\.weight holds .*a mask holds 0 and 1 only"):
        read_mask(tmp_path / "m.pt")


def test_a_mask_that_is_none() -> None:
    with pytest.raises(PlanError, match="fc is list, but a mask is a tensor"):
        as_mask("fc", [0, 1], "")


@pytest.mark.parametrize("name", ["none.safetensors", "none.pth"])
def test_no_such_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(PlanError, match=r"no such (weights|mask) file"):
        read_mask(tmp_path / name)


def test_files_that_hold_something_else(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(b"PK\x03\x04 broken")
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    torch.save([torch.ones(2)], tmp_path / "c.pt")
    torch.save({"fc.weight": Path("x")}, tmp_path / "d.pt")  # an object that is no tensor is not unpickled
    torch.save({}, tmp_path / "e.pt")
    torch.save({"fc.weight": 1}, tmp_path / "f.pt")
    weights.write(tmp_path / "g.safetensors", {"a": torch.ones(2)}, {"format": "fxfreeze.adapters", "version": "1"})
    for name, words in [
        ("a.pth", "not a file of tensors"), ("b.safetensors", "not a safetensors file"), ("c.pt", "holds a list"),
        ("d.pt", "not a file of tensors"), ("e.pt", "empty"), ("f.pt", "is int"),
        ("g.safetensors", "fxfreeze.adapters"),
    ]:  # fmt: skip
        with pytest.raises(PlanError, match=words) as caught:
            read_mask(tmp_path / name)
        assert caught.value.where == str(tmp_path / name)


@pytest.mark.parametrize(("version", "words"), [("2", "reads up to 1"), ("x", "damaged"), ("", "damaged")])
def test_versions(tmp_path: Path, version: str, words: str) -> None:
    weights.write(tmp_path / "m.safetensors", masks(), {"format": "fxfreeze.masks", "version": version})
    with pytest.raises(PlanError, match=words):
        read_mask(tmp_path / "m.safetensors")


def test_what_cannot_be_written(tmp_path: Path) -> None:
    for path, found, metadata, words in [
        ("m.pt", masks(), {}, "written as safetensors"),
        ("m.safetensors", {}, {}, "no masks to write"),
        ("m.safetensors", masks(), {"version": "7"}, "has a version of its own"),
        ("m.safetensors", masks(), {"level": 3}, "'level' is 3"),
        ("none/m.safetensors", masks(), {}, "cannot write"),
    ]:
        with pytest.raises(PlanError, match=words):
            write_mask(tmp_path / path, found, metadata)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_killed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "m.safetensors"
    write_mask(file, masks())
    before = file.read_bytes()

    def fail(*args: object) -> None:
        raise OSError(28, "no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(PlanError, match="no space left"):
        write_mask(file, {"fc.weight": torch.ones(5, 8)})
    assert file.read_bytes() == before and os.listdir(tmp_path) == [file.name]


def test_masks_that_do_not_fit_a_model() -> None:
    shapes = {"layer1.conv.weight": (4, 3, 3, 3), "fc.weight": (5, 8), "fc.bias": (5,)}
    check_masks({"fc.weight": torch.ones(5, 8)}, shapes, "m")  # what has no mask stays dense
    with pytest.raises(PlanError) as caught:
        check_masks({"layer1.conv2.weight": torch.ones(4), "fc.weight": torch.ones(8, 5)}, shapes, "m.safetensors")
    assert "did you mean layer1.conv.weight" in caught.value.what
    assert "the mask has shape (8, 5), the parameter (5, 8)" in caught.value.what
    assert caught.value.where == "m.safetensors"
