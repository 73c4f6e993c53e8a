"""Masks become constants, proven, and what they change is measured on the data that is given."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.api import rewrite
from fxfreeze.constants import Recipe
from fxfreeze.passes.freeze.masks import FoldMasks
from fxfreeze.pipeline import proof_draws, run_passes
from fxfreeze.rewrite import Context

INPUT = [fz.Input("x", ("batch", 8))]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def pruned(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    return model


def masks(net: fz.AdaptedModule) -> dict[str, Tensor]:
    return {".".join(name.split(".")[2:]).removesuffix("_mask"): mask
            for name, mask in net.named_buffers() if name.endswith("_mask")}  # fmt: skip


def measured(ledger: Any) -> dict[str, str]:
    return {row.site: row.detail for row in ledger if row.outcome == "measured" and row.pass_name == "fold-masks"}


def words(now: Tensor, then: Tensor) -> str:
    ratio = float((now.double() - then.double()).norm() / then.double().norm())
    return f"relative gap {ratio:.2g} ({-20 * math.log10(ratio):.0f} dB)"


def test_what_masks_change_is_measured_on_the_calibration_data() -> None:
    plan = fz.Plan(INPUT, [fz.Prune(method="nm", n=1, m=4)])
    net = fz.adapt(model(), plan)
    batches = [torch.randn(30, 8), torch.randn(20, 8)]
    done = rewrite(net, plan, calibration=iter(batches))
    x, whole, found = torch.cat(batches), model(), measured(done.ledger)
    now, then = pruned(model(), masks(net))(x), whole(x)
    same = float((now.argmax(1) == then.argmax(1)).float().mean())
    assert 0 < same < 1
    assert found[""] == f"{words(now, then)}; {same:.2%} of predictions stay; on 50 rows of calibration data"
    for path in ("0", "2"):
        weight = whole.get_parameter(f"{path}.weight")
        gap = words(weight * masks(net)[f"{path}.weight"], weight)
        assert found[path] == f"density 25.00%, {gap}"
    assert not done.lossless or all(row.exact for row in done.passes if row.name == "fold-masks")


def test_what_a_mask_takes_of_a_merged_weight_is_measured() -> None:
    plan = fz.Plan(INPUT, [fz.LoRA("0", rank=2), fz.Prune("0", method="nm")])
    net = fz.adapt(model(), plan)
    with torch.no_grad():
        for value in net.parameters():
            value.add_(torch.randn(value.shape))
    done = rewrite(net, plan)
    state = net.adapter_state()
    merged = model().get_parameter("0.weight") + state["adapters.lora.0.lora_B"] @ state["adapters.lora.0.lora_A"]
    expected = words(merged * masks(net)["0.weight"], merged)
    assert measured(done.ledger)["0"] == f"density 50.00%, {expected}"
    assert measured(done.ledger)[""].endswith("on 64 rows of inputs drawn from the plan")


def test_adapted_on_the_way_and_with_a_generator() -> None:
    """A generator is read while the model is adapted, and again behind."""
    plan = fz.Plan(INPUT, [fz.Prune("0", method="nm"), fz.Prune("2", method="nm", train=True)])
    done = rewrite(model(), plan, calibration=(torch.randn(5, 8) for _ in range(3)))
    rows = [row.detail for row in done.ledger if (row.site, row.outcome) == ("", "measured")]
    assert len(rows) == 2 and all(row.endswith("on 15 rows of calibration data") for row in rows)


def test_an_adapted_module_says_what_the_masks_took_before_it_trains() -> None:
    batches = [torch.randn(30, 8)]
    plan = fz.Plan(INPUT, [fz.Prune(method="nm", train=True)])
    net = fz.adapt(model(), plan, calibration=batches)
    rows = [row.detail for row in net.ledger if (row.site, row.outcome) == ("", "measured")]
    now, then = pruned(model(), masks(net))(batches[0]), model()(batches[0])
    assert len(rows) == 1 and rows[0].startswith(words(now, then)) and "on 30 rows of calibration data" in rows[0]
    weight = model().get_parameter("0.weight")
    gap = words(weight * masks(net)["0.weight"], weight)
    assert any(row.detail == f"density 50.00%, {gap} before it trains" for row in net.ledger)


class Inverted(FoldMasks):
    def zeroed(self, given: Recipe, dtype: torch.dtype, mask: Tensor) -> Tensor | Recipe:
        return super().zeroed(given, dtype, ~mask)


class Unmasked(FoldMasks):
    def zeroed(self, given: Recipe, dtype: torch.dtype, mask: Tensor) -> Tensor | Recipe:
        return given.value()


@pytest.mark.parametrize("wrong", [Inverted, Unmasked])
def test_a_wrong_fold_is_rejected(wrong: type[FoldMasks]) -> None:
    net = fz.adapt(model(), fz.Plan(INPUT, [fz.Prune(method="nm")]))
    program = net.program()
    draws = proof_draws(program, "full")
    with pytest.raises(fz.ProofError, match="'fold-masks' is not exact"):
        run_passes(program, [wrong()], Context(net.plan), draws=draws)
    program = net.program()
    rows, _ = run_passes(program, [FoldMasks()], Context(net.plan), draws=draws)
    assert rows[0].rewrites == 2 and rows[0].error == 0


def test_weights_keep_their_memory_until_they_are_masked() -> None:
    """A masked constant is a tensor in its own dtype, no recipe in float64."""
    net = fz.adapt(model(), fz.Plan(INPUT, [fz.Prune("0", method="nm")]))
    program = net.program()
    FoldMasks().run(program, Context(net.plan))
    program.sweep()
    held = program.state.held("0.weight")
    assert isinstance(held, Tensor) and held.dtype == torch.float32
    assert re.findall(r"constant (\S+)", str(program)).count("0.weight") == 1
