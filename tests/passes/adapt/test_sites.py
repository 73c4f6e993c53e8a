"""Which operators a glob reaches, and what is said about those it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxfreeze as fz


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Any:
        return self.conv2(self.relu(self.bn1(self.conv1(x)))) + x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.layer2 = Block(), nn.Sequential(Block())
        self.fc = nn.Linear(4, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        h = self.layer2(self.layer1(x)).mean((2, 3))
        return F.linear(self.fc(h), self.out.weight)  # never runs self.out


PLAN = fz.Plan([fz.Input("x", ("batch", 4, 3, 3))])


def adapt(at: Any, model: nn.Module | None = None, plan: fz.Plan = PLAN, step: type = fz.LoRA) -> fz.AdaptedModule:
    options = {} if step is fz.IA3 else {"rank": 2}
    steps = [step(at=at, **options)]
    return fz.adapt(model or Net(), plan.model_copy(update={"steps": steps}), verify="off")


def taken(net: fz.AdaptedModule) -> list[str]:
    return list(dict.fromkeys(row.site for row in net.ledger if row.outcome == "rewritten"))


def refused(net: fz.AdaptedModule) -> dict[str, str]:
    return {row.site: row.detail for row in net.ledger if row.outcome == "refused"}


def message(at: Any, **options: Any) -> str:
    with pytest.raises(fz.PlanError) as caught:
        adapt(at, **options)
    return str(caught.value)


def test_a_glob_takes_what_it_names() -> None:
    assert taken(adapt("layer1.conv*")) == ["layer1.conv1", "layer1.conv2"]
    assert taken(adapt(["fc", "*.0.conv2"])) == ["layer2.0.conv2", "fc"]


def test_a_layer_that_is_only_read_is_found_by_the_name_of_its_weight() -> None:
    assert taken(adapt("out")) == ["out"]


def test_a_mixed_glob_says_what_it_left_out() -> None:
    net = adapt("layer1*")
    assert taken(net) == ["layer1.conv1", "layer1.conv2"]
    why = refused(net)
    # not layer1 itself: all its layers are taken
    assert set(why) == {"layer1.bn1", "layer1.relu"}
    assert "is a ReLU (it runs aten.relu.default), which holds no weight" in why["layer1.relu"]
    assert "is a BatchNorm2d" in why["layer1.bn1"]
    assert {row.requested for row in net.ledger} == {"LoRA rank 2, scale 1"}


def test_a_pattern_that_matches_nothing_lists_the_nearest_paths() -> None:
    text = message("layer1.conv3")
    assert "steps[0].at: no module matches 'layer1.conv3'" in text
    assert "layer1.conv1" in text and "layer1.conv2" in text


def test_an_unsupported_module_is_refused_by_class() -> None:
    text = message("layer1.relu", step=fz.DoRA)
    assert "steps[0].at: 'layer1.relu' matches nothing that DoRA can adapt" in text
    assert "is a ReLU" in text and "Embedding" in text


def test_a_container_is_refused_with_the_names_of_its_layers() -> None:
    assert "layer1 is a container; name its layers, such as layer1.conv1, layer1.conv2" in message("layer1")
    # one good pattern does not excuse a bad one
    assert "layer1 is a container" in message(["fc", "layer1"])


def test_recurrent_layers_are_refused() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.fc = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Any:
            return self.fc(self.lstm(x)[0])

    plan = fz.Plan([fz.Input("x", ("batch", 3, 4))])
    assert "lstm is a LSTM (it runs aten.lstm.input" in message("lstm", model=Recurrent(), plan=plan)
    net = adapt("*", model=Recurrent(), plan=plan)
    assert taken(net) == ["fc"] and set(refused(net)) == {"lstm"}


class Attention(nn.Module):
    def __init__(self, crossed: bool = False) -> None:
        super().__init__()
        self.crossed, self.attn = crossed, nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return self.attn(x, 2 * x if self.crossed else x, 2 * x if self.crossed else x, need_weights=False)[0]


ATTENTION = fz.Plan([fz.Input("x", ("batch", 3, 8))])


def test_packed_and_output_projection_of_attention_are_two_layers() -> None:
    net = adapt("attn", Attention(), ATTENTION)
    assert {name: tuple(value.shape) for name, value in net.adapter_state().items()} == {
        "adapters.lora.attn.lora_A": (2, 8), "adapters.lora.attn.lora_B": (24, 2)
    }  # fmt: skip
    net = adapt("attn.out_proj", Attention(), ATTENTION)
    assert {name: tuple(value.shape) for name, value in net.adapter_state().items()} == {
        "adapters.lora.attn.out_proj.lora_A": (2, 8), "adapters.lora.attn.out_proj.lora_B": (8, 2)
    }  # fmt: skip


def test_a_split_projection_is_refused() -> None:
    text = message("attn", model=Attention(crossed=True), plan=ATTENTION)
    assert "attn uses the weights" in text and "not clear which one" in text


def test_a_computed_weight_is_refused() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.w * x.mean())

    plan = fz.Plan([fz.Input("x", ("batch", 4))])
    text = message("0", model=nn.Sequential(Scaled()), plan=plan)
    assert "0 runs aten.linear.default, but its weight is not a parameter but computed by aten.mul.Tensor" in text


def test_two_weights_at_one_path_are_ambiguous() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u, self.v = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.u), self.v)

    plan = fz.Plan([fz.Input("x", ("batch", 4))])
    assert "uses the weights 0.u, 0.v" in message("0", model=nn.Sequential(Inner()), plan=plan)


def test_matmul_with_a_parameter_is_a_layer_and_without_one_is_not() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            h = x @ self.w
            return h @ h.transpose(1, 2)

    plan = fz.Plan([fz.Input("x", ("batch", 3, 4))])
    net = adapt("0", nn.Sequential(Product()), plan)
    assert [tuple(value.shape) for value in net.parameters()] == [(2, 4), (6, 2)]


def test_tied_layers_are_two_sites() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.wte.weight

        def forward(self, ids: Tensor) -> Any:
            return self.head(self.wte(ids))

    plan = fz.Plan([fz.Input("ids", ("batch", 3), "int64", 0, 8)])
    for path, shapes in (("wte", [(2, 9), (4, 2)]), ("head", [(2, 4), (9, 2)])):
        net = adapt(path, Tied(), plan)
        assert [tuple(value.shape) for value in net.parameters()] == shapes


def test_a_step_without_a_site_inside_an_adapted_graph_does_not_see_earlier_adapters() -> None:
    plan = PLAN.model_copy(update={"steps": [fz.LoRA(at="fc", rank=2), fz.LoRA(at="fc", rank=1), fz.IA3(at="fc")]})
    assert len(list(fz.adapt(Net(), plan, verify="off").parameters())) == 5
