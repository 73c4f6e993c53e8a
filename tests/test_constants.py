"""Constants: plain tensors stay the objects they were; folded ones are computed when read, and cost no memory."""

from __future__ import annotations

import pytest
import torch

from fxfreeze.constants import Constants, Recipe, lift_dtype


def test_a_tensor_comes_out_as_the_object_that_went_in() -> None:
    value = torch.ones(3)
    constants = Constants({"a": value})
    constants["b"] = Recipe(value)
    assert constants["a"] is value and constants["b"] is value and list(constants) == ["a", "b"]
    assert constants.held("a") is constants.held("b") and constants.dtype("b") == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.complex64])
def test_a_recipe_is_computed_in_double_precision_in_order(dtype: torch.dtype) -> None:
    base = torch.tensor([1.0, 3.0]).to(dtype)
    recipe = Recipe(base).then(lambda x: x / 3).then(lambda x: x + 1)
    constants = Constants()
    constants["w"] = recipe
    wide = lift_dtype(dtype)
    assert constants.dtype("w") == wide == constants["w"].dtype
    assert torch.equal(constants["w"], base.to(wide) / 3 + 1)
    assert constants.tensor("w") is base and constants["w"] is not constants["w"]
    assert torch.equal(base, torch.tensor([1.0, 3.0]).to(dtype))


def test_looking_for_a_name_computes_nothing() -> None:
    def never(value: torch.Tensor) -> torch.Tensor:
        raise AssertionError("computed")

    constants = Constants()
    constants["w"] = Recipe(torch.ones(2)).then(never)
    assert "w" in constants and len(constants) == 1 and list(constants.copy()) == ["w"]
    assert constants.identity("w") == constants.copy().identity("w")
    with pytest.raises(AssertionError, match="computed"):
        _ = constants["w"]


def test_the_identity_changes_with_the_value_and_with_a_write() -> None:
    constants = Constants({"w": torch.ones(2)})
    seen = [constants.identity("w")]
    constants["w"] = constants["w"]
    assert constants.identity("w") == seen[0]
    constants["w"] = constants["w"].clone()
    seen.append(constants.identity("w"))
    constants["w"].mul_(2)
    seen.append(constants.identity("w"))
    constants["w"] = constants.recipe("w").then(lambda x: x)
    seen.append(constants.identity("w"))
    constants["w"] = constants.recipe("w").then(lambda x: x)
    seen.append(constants.identity("w"))
    assert len(set(seen)) == 5


def test_a_copy_goes_its_own_way() -> None:
    constants = Constants({"w": torch.ones(2), "v": torch.zeros(2)})
    copy = constants.copy()
    del copy["v"]
    copy["w"] = torch.zeros(2)
    assert set(constants) == {"w", "v"} and bool((constants["w"] == 1).all())


def test_a_fold_that_changes_the_shape_is_a_defect() -> None:
    with pytest.raises(ValueError, match=r"of shape \[2\] into \[1, 2\]"):
        Recipe(torch.ones(2)).then(lambda x: x[None]).value()
