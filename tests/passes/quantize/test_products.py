"""Products of two computed values on integers: attention written out, and what runs them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxfreeze as fz
from fxfreeze.api import Compilation, rewrite
from fxfreeze.errors import EmitError, PlanError
from fxfreeze.kernels.quantize import KERNEL as QUANTIZE

HEADS, LENGTH, WIDTH = 2, 6, 8
aten = torch.ops.aten


class Attention(nn.Module):
    """Self-attention in one of its forms, and a linear layer behind it."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.inner, self.out = form, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("seen", torch.rand(LENGTH, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.7)
        self.seen.fill_diagonal_(True)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in self.inner(x).chunk(3, 2))
        if self.form == "written out":
            found = (q @ k.transpose(2, 3) / 2.0).softmax(-1) @ v
        else:
            options: dict[str, Any] = {
                "plain": {}, "scaled": {"scale": 0.3}, "causal": {"is_causal": True},
                "masked": {"attn_mask": self.seen}, "biased": {"attn_mask": torch.where(self.seen, 0.5, -3.0)},
            }[self.form]  # fmt: skip
            found = F.scaled_dot_product_attention(q, k, v, **options)
        return self.out(found.transpose(1, 2).flatten(2))


def batches() -> list[Tensor]:
    return [torch.randn(16, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def plan(targets: tuple[str, ...] = (), **step: Any) -> fz.Plan:
    return fz.Plan([fz.Input("x", ("batch", LENGTH, WIDTH))], [fz.Quantize(**{"products": True, **step})], targets)


def done(form: str, **step: Any) -> tuple[Compilation, nn.Module]:
    torch.manual_seed(0)
    model = Attention(form).eval()
    return rewrite(model, plan(**step), calibration=batches()), model


@pytest.mark.parametrize("form", ["plain", "causal", "masked", "biased", "scaled", "written out"])
def test_both_sides_of_both_products_are_integers(form: str) -> None:
    found, model = done(form)
    products = [node for node in found.program.graph.nodes if node.target in (aten.matmul.default, aten.bmm.default)]
    assert len(products) == 2
    assert all(side.args[0].target is QUANTIZE.op for node in products for side in node.args)
    x = batches()[0]
    want = model(x).detach()
    assert 1e-4 < float((found.program.run(x)[0] - want).norm() / want.norm()) < 0.04
    rows = [row for row in found.ledger if row.executes == "uint8 on both sides"]
    assert len(rows) == 2 and all("dB) of its result; ranges of 48 rows" in row.detail for row in rows)


def test_a_row_that_sees_nothing_gets_zeros() -> None:
    class Blind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
            mask[2] = False
            q = self.linear(x).unflatten(2, (HEADS, -1)).transpose(1, 2)
            return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    x, model = batches()[0], Blind().eval()
    found = rewrite(model, plan(), calibration=batches())
    want, (got,) = model(x).detach(), found.program.run(x)
    assert bool((got[:, :, 2] == 0).all()) and float((got - want).norm() / want.norm()) < 0.04


def test_keys_that_are_constants_are_refused() -> None:
    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slots, self.out = nn.Parameter(torch.randn(1, 1, 5, WIDTH)), nn.Linear(WIDTH, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.scaled_dot_product_attention(x.unsqueeze(1), self.slots, self.slots))

    found = rewrite(Memory().eval(), plan(), calibration=batches())
    details = [row.detail for row in found.ledger if row.pass_name == "quantize_products"]
    assert details[0] == "queries, keys or values are constants" and details[1].startswith("none of the modules")


def test_without_the_wish_attention_stays_whole() -> None:
    found, _ = done("plain", products=False)
    assert [node.target for node in found.program.graph.nodes].count(aten.scaled_dot_product_attention.default) == 1


def test_excluded_attention_stays_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Attention("plain"), Attention("plain")).eval()
    found = rewrite(model, plan(exclude="1"), calibration=batches())
    assert [node.target for node in found.program.graph.nodes].count(aten.scaled_dot_product_attention.default) == 1


def test_products_run_in_integers_in_onnx_runtime_and_nowhere_else() -> None:
    pytest.importorskip("onnxruntime", reason="needs fxfreeze[onnx]")
    torch.manual_seed(0)
    model = Attention("plain").eval()
    artifact = fz.compile(model, plan(("onnx",)), calibration=batches())
    ran = [row["executes"] for row in artifact.manifest["ledger"] if row["executes"].endswith("in onnx")]
    assert len(ran) == 4 and all(words.startswith("integer-executed by ") for words in ran)
    want, x = model(batches()[0]).detach(), batches()[0]
    assert float((artifact(x) - want).norm() / want.norm()) < 0.04


@pytest.mark.slow
def test_torch_has_no_kernel_for_them() -> None:
    pytest.importorskip("torchao", reason="needs fxfreeze[int8]")
    with pytest.raises(EmitError, match="2 quantized layers would be computed in floats"):
        fz.compile(Attention("plain").eval(), plan(("torch",)), calibration=batches())


@pytest.mark.parametrize("step", [{"mode": "dynamic"}, {"scheme": "int8-weight"}])
def test_only_static_int8_has_products(step: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="products"):
        fz.Quantize(products=True, **step)


def snr(found: Compilation, model: nn.Module) -> float:
    x = batches()[0]
    want = model(x)
    return float(20 * (want.norm() / (found.program.run(x)[0] - want).norm()).log10().detach())


def kept(found: Compilation) -> list[str]:
    return [row.site for row in found.ledger if row.detail.startswith("kept in floats for the budget")]


@pytest.mark.parametrize("form", ["masked", "written out"])
def test_a_budget_puts_products_back(form: str) -> None:
    """Layers have no say in it: they are left out."""
    step = {"exclude": ["inner", "out"]}
    (whole, model), (floats, _) = done(form, **step), done(form, **step, budget="snr:300")
    assert kept(floats) == ["", ""] and floats.program.structural_hash() == exported(form).structural_hash()
    some, _ = done(form, **step, budget=f"snr:{snr(whole, model) + 1:.2f}")
    assert len(kept(some)) == 1 and snr(some, model) >= snr(whole, model) + 1
    assert sum(node.target is QUANTIZE.op for node in some.program.graph.nodes) == 2
    all_, _ = done(form, **step, budget=f"snr:{snr(whole, model) - 1:.2f}")
    assert not kept(all_) and all_.program.structural_hash() == whole.program.structural_hash()


def exported(form: str) -> Any:
    torch.manual_seed(0)
    bare = fz.Plan([fz.Input("x", ("batch", LENGTH, WIDTH))], [], ())
    return rewrite(Attention(form).eval(), bare).program


def test_products_have_sensitivities() -> None:
    torch.manual_seed(0)
    rows = fz.sensitivity(Attention("plain").eval(), plan(), calibration=batches())
    assert sorted(row.site for row in rows) == ["", "", "inner", "out"]
