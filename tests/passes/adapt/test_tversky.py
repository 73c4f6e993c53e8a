"""fz.Tversky: a head in the place of a linear layer, from warm start to artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.kernels import _tversky as maths

INPUT = [fz.Input("x", shape=("batch", 8))]
OPERATOR = "fxfreeze.tversky.default"


def network(*, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5, bias=bias)).to(dtype).eval()


def adapted(step: fz.Tversky, model: nn.Module | None = None, **options: Any) -> fz.AdaptedModule:
    return fz.adapt(model or network(), fz.Plan(options.pop("inputs", INPUT), [step]), **options)


def operators(net: fz.AdaptedModule) -> list[str]:
    return [str(node.target) for node in net.program().graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("bias", [True, False])
def test_the_head_takes_the_place_of_the_layer_and_starts_out_of_it(bias: bool) -> None:
    model = network(bias=bias)
    net = adapted(fz.Tversky(at="2"), model)
    assert operators(net).count(OPERATOR) == 1 and operators(net).count("aten.linear.default") == 1
    shapes = {name.rpartition(".")[2]: tuple(value.shape) for name, value in net.named_parameters()}
    expected = {"features": (32, 16), "prototypes": (5, 16), "theta": (), "alpha": (), "beta": ()}
    assert shapes == {**expected, "bias": (5,)} if bias else expected
    x = torch.randn(512, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        agreement = float((net(x).argmax(1) == model(x).argmax(1)).double().mean())
        fresh = float((adapted(fz.Tversky(at="2", start="random"), model)(x).argmax(1) == model(x).argmax(1)).double()
                      .mean())  # fmt: skip
    assert agreement > 0.8 and fresh < 0.5


def test_gradients_are_those_of_finite_differences() -> None:
    net = adapted(fz.Tversky(at="2"), network(dtype=torch.float64), inputs=[fz.Input("x", ("batch", 8), "float64")])
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    names, values = zip(*net.named_parameters(), strict=True)
    assert {value.dtype for value in values} == {torch.float64}

    def function(*given: Tensor) -> Tensor:
        return torch.func.functional_call(net, dict(zip(names, given, strict=True)), x)

    assert torch.autograd.gradcheck(function, tuple(value.detach().requires_grad_() for value in values), eps=1e-7)


@pytest.mark.parametrize(
    "options",
    [{}, {"start": "random", "model": "ratio", "intersection": "gmean", "features": 7},
     {"start": "random", "semantics": "per_feature", "intersection": "min", "threshold": 0.1, "normalize": True}],
)  # fmt: skip
def test_a_trained_head_is_folded_and_onnx_agrees(options: dict[str, Any]) -> None:
    step = fz.Tversky(at="2", **options)
    net = adapted(step)
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(3))
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(3):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), torch.arange(40) % 5).backward()
        optimiser.step()
    artifact = fz.compile(net, fz.Plan(INPUT, [step], targets=["onnx"]))
    folds = [row for row in artifact.manifest["ledger"] if row["pass_name"] == "fold-tversky"]
    assert [(row["site"], row["step"], row["outcome"]) for row in folds] == [("2", step.name, "rewritten")]
    with torch.no_grad():
        torch.testing.assert_close(artifact(x), net(x), rtol=1e-4, atol=1e-4)


def test_the_bias_ends_in_the_one_product() -> None:
    from fxfreeze.api import rewrite

    step = fz.Tversky(at="2")
    program = rewrite(adapted(step), fz.Plan(INPUT, [step], targets=())).program
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert names[-1] == "aten.linear.default" and "aten.add.Tensor" not in names and "aten.to.dtype" not in names[:2]


def test_weights_are_saved_and_read_back(tmp_path: Path) -> None:
    net = adapted(fz.Tversky(at="2"))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1)
    net.save_adapters(tmp_path / "head.safetensors")
    again = adapted(fz.Tversky(at="2", weights=str(tmp_path / "head.safetensors")))
    x = torch.randn(4, 8)
    assert torch.equal(net(x), again(x))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_layer_gets_a_head_in_float32(dtype: str) -> None:
    kind = getattr(torch, dtype)
    net = adapted(fz.Tversky(at="2"), network(dtype=kind), inputs=[fz.Input("x", ("batch", 8), dtype)])
    assert {value.dtype for value in net.parameters()} == {torch.float32}
    assert net(torch.randn(3, 8, dtype=kind)).dtype == kind


def test_random_starts_are_the_same_whatever_else_the_process_draws() -> None:
    step, model = fz.Tversky(at="2", start="random"), network()
    first = adapted(step, model).state_dict()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    second = adapted(step, model).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


# ---- refusals


def test_a_layer_that_is_no_linear_one_is_refused() -> None:
    model = nn.Sequential(nn.Conv1d(8, 4, 1)).eval()
    with pytest.raises(fz.PlanError, match=r"takes the place of linear layers"):
        adapted(fz.Tversky(at="0"), model, inputs=[fz.Input("x", ("batch", 8, 3))])


def test_another_step_on_the_layer_that_goes_is_refused() -> None:
    plan = fz.Plan(INPUT, [fz.LoRA(at="*", rank=2), fz.Tversky(at="2")])
    with pytest.raises(fz.PlanError, match="'tversky' and 'lora' both address 2"):
        fz.adapt(network(), plan)


def test_a_mask_goes_with_a_head_on_a_layer_that_it_excludes() -> None:
    mask = fz.Prune(at="*", method="magnitude", density=0.5, exclude="2")
    net = fz.adapt(network(), fz.Plan(INPUT, [mask, fz.Tversky(at="2")]))
    assert operators(net).count(OPERATOR) == 1
    with pytest.raises(fz.PlanError, match="'tversky' and 'prune' both address 2"):
        fz.adapt(network(), fz.Plan(INPUT, [mask.model_copy(update={"exclude": "0"}), fz.Tversky(at="2")]))


def test_a_layer_whose_outputs_are_all_alike_cannot_be_started_from() -> None:
    model = network()
    nn.init.ones_(model[2].weight)
    with pytest.raises(fz.PlanError, match="rows of the weight are equal") as caught:
        adapted(fz.Tversky(at="2"), model)
    assert caught.value.where == "2" and "random" in str(caught.value.hint)
    adapted(fz.Tversky(at="2", start="random"), model)


def test_nothing_is_started_from_where_a_file_has_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = adapted(fz.Tversky(at="2"))
    net.save_adapters(tmp_path / "head.safetensors")
    monkeypatch.setattr(
        fz.nn.TverskyProjection, "from_linear", lambda *given: pytest.fail("the linear layer is taken apart")
    )
    x = torch.randn(5, 8)
    again = adapted(fz.Tversky(at="2", weights=str(tmp_path / "head.safetensors")))
    assert torch.equal(again(x), net(x))


@pytest.mark.parametrize(
    ("options", "key"),
    [({"model": "ratio"}, "start"), ({"normalize": True}, "start"), ({"features": 7}, "features"),
     ({"threshold": -1.0, "intersection": "gmean", "start": "random"}, "threshold"), ({"model": "cosine"}, "model")],
)  # fmt: skip
def test_impossible_heads_are_refused_by_key(options: dict[str, Any], key: str) -> None:
    with pytest.raises(fz.PlanError, match=rf"\b{key}: must"):
        fz.Tversky(at="2", **options)


def test_the_plan_knows_every_combination_there_is() -> None:
    fields = fz.Tversky.model_fields
    for name, known in {"model": maths.MODELS, "intersection": maths.INTERSECTIONS, "difference": maths.DIFFERENCES,
                        "semantics": maths.SEMANTICS}.items():  # fmt: skip
        assert get_args(fields[name].annotation) == known


def test_weights_of_another_similarity_are_refused(tmp_path: Path) -> None:
    adapted(fz.Tversky(at="2", start="random")).save_adapters(tmp_path / "head.safetensors")
    other = fz.Tversky(at="2", start="random", semantics="inclusive", weights=str(tmp_path / "head.safetensors"))
    with pytest.raises(fz.PlanError, match=r"semantics aggregate.*, but the plan says .*semantics inclusive"):
        adapted(other)
