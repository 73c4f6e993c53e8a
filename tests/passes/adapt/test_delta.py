"""Insertion of LoRA, DoRA, IA3, VeRA and OFT: what the adapted graph computes, against weights changed by hand."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.adapt import Origins
from fxfreeze.capture import capture
from fxfreeze.passes import PIPELINE
from fxfreeze.pipeline import run_passes, stage_passes
from fxfreeze.program import Program
from fxfreeze.rewrite import Context

EPS = 1e-12


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(5, 4)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 5), (3, 4)),
    "linear_no_bias": (lambda: nn.Linear(4, 5, bias=False), (4,)),
    "hf_conv1d": (conv1d, (3, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2), (4, 9)),
    "conv1d_same": (lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=2), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=(1, 2), dilation=(2, 1)), (4, 9, 8)),
    "conv2d_groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 7, 6)),
    "conv2d_depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), (4, 7, 6)),
    "conv2d_reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (4, 7, 6)),
    "conv2d_circular": (lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular"), (4, 7, 6)),
    "conv2d_valid": (lambda: nn.Conv2d(4, 6, (1, 3), padding="valid"), (4, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=1), (2, 4, 3, 5)),
    "conv3d_groups": (lambda: nn.Conv3d(4, 6, 2, groups=2), (4, 4, 3, 5)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (4, 5)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (4, 5, 4)),
    "transposed2d_groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2), (4, 5, 4)),
    "transposed3d_groups": (lambda: nn.ConvTranspose3d(4, 6, 2, groups=2, padding=1), (4, 5, 4, 3)),
    "embedding": (lambda: nn.Embedding(7, 5, padding_idx=1), (3,)),
}
SOME = ("linear", "hf_conv1d", "conv2d", "conv2d_groups", "transposed2d_groups", "embedding")


class Zoo(nn.Module):
    """Every kind of layer, each with an input and an output of its own; one runs twice in a row."""

    def __init__(self, names: Iterable[str], dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict({name: LAYERS[name][0]() for name in names})
        self.twice = nn.Linear(4, 4)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)
        self.to(dtype)

    def forward(self, twice: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        outputs = {name: torch.tanh(layer(inputs[name])) for name, layer in self.layers.items()}
        return {**outputs, "twice": torch.tanh(self.twice(self.twice(twice)))}


def make(names: Iterable[str] = LAYERS, dtype: torch.dtype = torch.float64) -> tuple[Zoo, list[fz.Input], Any]:
    """The zoo, its declared inputs, and a draw of them."""
    name = str(dtype).removeprefix("torch.")
    specs = [fz.Input("twice", shape=("batch", 4), dtype=name)]
    for key in names:
        shape = ("batch", *LAYERS[key][1])
        specs.append(fz.Input(key, shape, "int64", 0, 6) if key == "embedding" else fz.Input(key, shape, name))
    return Zoo(names, dtype), specs, draw(specs)


def draw(specs: list[fz.Input]) -> dict[str, Tensor]:
    generator, found = torch.Generator().manual_seed(3), {}
    for spec in specs:
        shape = [2 if isinstance(size, str) else size for size in spec.shape]
        if spec.dtype == "int64":
            found[spec.name] = torch.randint(0, 7, shape, generator=generator)
        else:
            found[spec.name] = torch.randn(shape, generator=generator).to(getattr(torch, spec.dtype))
    return found


def train(net: nn.Module, seed: int = 1) -> None:
    """Adapter values as far from the initial ones as training could take them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)


def agree(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = EPS) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        bounds = {"rtol": tolerance, "atol": tolerance, "msg": lambda text, name=name: f"{name}: {text}"}
        torch.testing.assert_close(actual[name].double(), value.double(), **bounds)


# ---- the reference: change the weights of a copy of the layer, feature by feature


def rows(layer: nn.Module) -> list[tuple[Any, Any]]:
    """For every output feature: the index of its weights in `weight`, and the input features they multiply."""
    kind = type(layer).__name__
    if kind == "Linear":
        return [((o, slice(None)), range(layer.in_features)) for o in range(layer.out_features)]
    if kind in ("Conv1D", "Embedding"):
        n, m = layer.weight.shape
        return [((slice(None), o), range(n)) for o in range(m)]
    group_in, group_out = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    found = []
    for o in range(layer.out_channels):
        group, within = divmod(o, group_out)
        inputs = range(group * group_in, (group + 1) * group_in)
        if "Transpose" in kind:
            found.append(((slice(inputs.start, inputs.stop), within), inputs))
        else:
            found.append(((o,), inputs))
    return found


def change(layer: nn.Module, step: Any, state: dict[str, Tensor]) -> None:
    """What the step's formula says, one output feature at a time."""
    a, b, gain = state.get("lora_A"), state.get("lora_B"), state.get("ia3")
    for o, (index, inputs) in enumerate(rows(layer)):
        row = layer.weight.data[index].clone()
        if a is not None and b is not None:
            alpha = step.rank if step.alpha is None else step.alpha
            scale = alpha / math.sqrt(step.rank) if step.rslora else alpha / step.rank
            for r in range(step.rank):
                row = row + scale * b.flatten(1)[o, r] * a[r].reshape(row.shape)
        if "vera_A" in state:
            first = state["vera_A"][:, : row.numel()].reshape(step.rank, *row.shape)
            for r in range(step.rank):
                row = row + state["lambda_b"][o] * state["vera_B"][o, r] * state["lambda_d"][r] * first[r]
        if "lora_bias" in state:
            layer.bias.data[o] += scale * state["lora_bias"][o]
        if "lora_magnitude" in state:
            row = row / row.square().sum().sqrt() * state["lora_magnitude"][o]
        if gain is not None:
            row = row * (gain[o] if step.side == "out" else gain[list(inputs)].reshape(-1, *[1] * (row.ndim - 1)))
            if step.side == "out" and getattr(layer, "bias", None) is not None:
                layer.bias.data[o] *= gain[o]
        layer.weight.data[index] = row


def by_hand(model: nn.Module, net: fz.AdaptedModule) -> nn.Module:
    """A copy of `model` in float64 with the adapters of `net` worked into its weights."""
    twin, state = copy.deepcopy(model).double(), net.adapter_state()
    frozen = {name.rpartition(".")[2]: value.double() for name, value in net._setting_state().items()}
    for step in net.plan.steps:
        for path, layer in twin.named_modules():
            prefix = f"adapters.{step.name}.{path}."
            mine = {name.removeprefix(prefix): value.double() for name, value in state.items() if prefix in name}
            if mine and not list(layer.children()):
                change(layer, step, mine | frozen if isinstance(step, fz.VeRA) else mine)
    return twin


EVERY = ["layers.*", "twice"]
BIASED = [
    "twice",
    *(f"layers.{name}" for name in LAYERS if name not in ("linear_no_bias", "conv2d_depthwise", "embedding")),
]
STEPS: dict[str, list[Any]] = {
    "lora": [fz.LoRA(at=EVERY, rank=3, alpha=5)],
    "rslora": [fz.LoRA(at=EVERY, rank=2, alpha=5, rslora=True)],
    "dora": [fz.DoRA(at=EVERY, rank=2, alpha=3)],
    "ia3-out": [fz.IA3(at=EVERY)],
    "ia3-in": [fz.IA3(at=EVERY, side="in")],
    "lora, lora": [fz.LoRA(at=EVERY, rank=1), fz.LoRA(at=EVERY, rank=2, alpha=3)],
    "lora, ia3-out": [fz.LoRA(at=EVERY, rank=2), fz.IA3(at=EVERY)],
    "ia3-out, lora": [fz.IA3(at=EVERY), fz.LoRA(at=EVERY, rank=2)],
    "lora, ia3-in": [fz.LoRA(at=EVERY, rank=2), fz.IA3(at=EVERY, side="in")],
    "ia3-in, lora": [fz.IA3(at=EVERY, side="in"), fz.LoRA(at=EVERY, rank=2)],
    "ia3-in, dora, lora, ia3-out": [
        fz.IA3(at=EVERY, side="in"), fz.DoRA(at=EVERY, rank=2), fz.LoRA(at=EVERY, rank=1), fz.IA3(at=EVERY)
    ],
    "lora with a bias, ia3-out": [fz.LoRA(at=BIASED, rank=2, alpha=3, bias=True), fz.IA3(at=EVERY)],
    "vera": [fz.VeRA(at=EVERY, rank=3, seed=2)],
    "ia3-in, vera, dora": [fz.IA3(at=EVERY, side="in"), fz.VeRA(at=EVERY, rank=2), fz.DoRA(at=EVERY, rank=1)],
    "dora, dora": [fz.DoRA(at=EVERY, rank=2), fz.DoRA(at=EVERY, rank=1)],
}  # fmt: skip


@cache
def captured(names: tuple[str, ...], dtype: torch.dtype) -> tuple[Zoo, Program, list[fz.Input]]:
    model, specs, _ = make(names, dtype)
    return model, capture(model, fz.Plan(specs))[0], specs


def adapt(
    steps: list[Any], names: Iterable[str] = LAYERS, dtype: torch.dtype = torch.float64
) -> tuple[Zoo, fz.AdaptedModule, dict[str, Tensor]]:
    """`fz.adapt` of the zoo, without capturing it every time."""
    model, program, specs = captured(tuple(names), dtype)
    plan, program = fz.Plan(specs, steps), program.clone()
    ctx = Context(plan)
    run_passes(program, stage_passes(PIPELINE, ("clean", "adapt")), ctx, verify="off")
    return model, fz.AdaptedModule(Origins(program, plan, ctx.ledger)), draw(specs)


@pytest.mark.parametrize("steps", STEPS)
def test_the_adapted_layers_are_the_formula(steps: str) -> None:
    model, net, inputs = adapt(STEPS[steps])
    before = model(**inputs)
    agree(net(**inputs), before)  # the identity at first
    train(net)
    after = net(**inputs)
    assert all((after[name] - before[name]).abs().max() > 0.01 for name in before)
    agree(after, by_hand(model, net)(**inputs))
    assert {row.detail for row in net.ledger if row.site == "twice"} == {"untrained: the identity, in 2 calls"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", ["lora", "dora", "ia3-out", "ia3-in, dora, lora, ia3-out", "vera"])
def test_half_precision_layers_train_float32_adapters(steps: str, dtype: torch.dtype) -> None:
    model, net, inputs = adapt(STEPS[steps], SOME, dtype)
    assert {value.dtype for value in net.adapter_state().values()} == {torch.float32}
    assert {value.dtype for value in net(**inputs).values()} == {dtype}
    agree(net(**inputs), model(**inputs), 0.02)
    train(net)
    wide = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    agree(net(**inputs), by_hand(model, net)(**wide), 0.05)
    sum(value.float().sum() for value in net(**inputs).values()).backward()
    assert all(value.grad is not None for value in net.parameters())


# ---- OFT, against layers whose inputs are rotated


def rotation(vectors: Tensor, size: int, blocks: int) -> Tensor:
    """R from the numbers above the diagonals of its Q, one entry after the other."""
    result = torch.eye(size * blocks, dtype=vectors.dtype)
    for block in range(blocks):
        q, numbers = torch.zeros(size, size, dtype=vectors.dtype), iter(vectors[block % len(vectors)])
        for i in range(size):
            for j in range(i + 1, size):
                q[i, j] = next(numbers)
                q[j, i] = -q[i, j]
        cut, eye = slice(block * size, (block + 1) * size), torch.eye(size, dtype=vectors.dtype)
        result[cut, cut] = (eye - q) @ torch.linalg.inv(eye + q)
    return result


ROTATED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 5), (3, 4)),
    "hf_conv1d": (conv1d, (3, 4)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1, stride=2, padding=1), (4, 5, 6)),
    "groups": (lambda: nn.Conv1d(8, 6, 1, groups=2), (8, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(8, 6, 1, groups=2), (8, 5)),
    "embedding": (lambda: nn.Embedding(7, 4), (3,)),
}


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("name", ROTATED)
def test_oft_rotates_what_a_layer_reads(name: str, share: bool) -> None:
    torch.manual_seed(0)
    layer, shape = ROTATED[name][0]().double(), ROTATED[name][1]
    model, ids = nn.Sequential(OrderedDict(layer=layer, act=nn.Tanh())), name == "embedding"
    spec = fz.Input("x", ("batch", *shape), "int64", 0, 6) if ids else fz.Input("x", ("batch", *shape), "float64")
    net = fz.adapt(model, fz.Plan([spec], [fz.OFT(at="layer", block_size=2, share=share)]), verify="off")
    x = torch.randint(0, 7, (2, *shape)) if ids else torch.randn(2, *shape, dtype=torch.float64)
    torch.testing.assert_close(net(x), model(x), rtol=EPS, atol=EPS)
    train(net)
    (vectors,) = (value.detach() for value in net.parameters())
    axis = 1 if "onv" in type(layer).__name__ and name != "hf_conv1d" else -1
    size = 4 if ids else x.shape[axis]
    assert len(vectors) == (1 if share else size // 2)
    r = rotation(vectors, 2, size // 2)
    torch.testing.assert_close(r @ r.T, torch.eye(size, dtype=r.dtype), rtol=EPS, atol=EPS)
    expected = torch.tanh(layer(x) @ r) if ids else model((x.movedim(axis, -1) @ r).movedim(-1, axis))
    torch.testing.assert_close(net(x), expected, rtol=EPS, atol=EPS)
    net(x).square().sum().backward()
    assert all(value.grad is not None and value.grad.abs().max() > 1e-6 for value in net.parameters())


def test_constrained_oft_stays_near_no_rotation() -> None:
    model, net, x = one(nn.Linear(4, 5), fz.OFT(at="layer", block_size=2, coft=True, eps=1e-3))
    train(net)
    distance = (net(x) - model(x)).abs().max()
    assert 1e-5 < distance < 0.05
    net(x).sum().backward()
    assert all(torch.isfinite(value.grad).all() for value in net.parameters())  # type: ignore[arg-type]


def test_what_oft_cannot_rotate_is_refused() -> None:
    def refused(layer: nn.Module, size: int, *shape: int, more: Any = ()) -> str:
        model = nn.Sequential(OrderedDict(layer=layer, act=nn.Tanh())).double()
        plan = fz.Plan([fz.Input("x", ("batch", *shape), "float64")], [fz.OFT(at="layer", block_size=size), *more])
        with pytest.raises(fz.PlanError) as caught:
            fz.adapt(model, plan, verify="off")
        return str(caught.value)

    assert "layer has a window of 3×1, and what OFT" in refused(nn.Conv2d(4, 4, (3, 1)), 2, 4, 7, 7)
    assert "layer has 4 features, which blocks of 3 do not divide" in refused(nn.Linear(4, 5), 3, 4)
    assert "layer has 2 features in a group, which blocks of 4" in refused(nn.Conv1d(4, 4, 1, groups=2), 4, 4, 5)
    layers = OrderedDict(a=nn.Conv1d(4, 4, 3, padding=1), b=nn.Conv1d(4, 4, 1))
    plan = fz.Plan([fz.Input("x", ("batch", 4, 5))], [fz.OFT(at=["a", "b"], block_size=2)])
    net = fz.adapt(nn.Sequential(layers), plan, verify="off")
    assert [(row.site, row.outcome) for row in net.ledger] == [("a", "refused"), ("b", "rewritten")]


# ---- parameters


def one(layer: nn.Module, *steps: Any, verify: Any = "off") -> tuple[nn.Module, fz.AdaptedModule, Tensor]:
    """An adapted float64 model of one linear layer at the path `layer`, and an input."""
    model = nn.Sequential(OrderedDict(layer=layer, act=nn.Tanh())).double()
    plan = fz.Plan([fz.Input("x", ("batch", 4), "float64")], steps)
    return model, fz.adapt(model, plan, verify=verify), torch.randn(3, 4, dtype=torch.float64)


def test_shapes_are_those_of_the_table() -> None:
    state = adapt([fz.DoRA(at="layers.*", rank=2)], SOME)[1].adapter_state()
    leaves = ("lora_A", "lora_B", "lora_magnitude")
    shapes = {name: [tuple(state[f"adapters.dora.layers.{name}.{leaf}"].shape) for leaf in leaves] for name in SOME}
    assert shapes == {
        "linear": [(2, 4), (5, 2), (5,)],
        "hf_conv1d": [(2, 4), (5, 2), (5,)],
        "conv2d": [(2, 4, 3, 3), (6, 2, 1, 1), (6,)],
        "conv2d_groups": [(2, 2, 3, 3), (6, 2, 1, 1), (6,)],
        "transposed2d_groups": [(2, 2, 3, 3), (6, 2, 1, 1), (6,)],
        "embedding": [(2, 7), (5, 2), (5,)],
    }


def test_a_fresh_adapter_is_the_same_every_time_and_another_at_every_site() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    plan = fz.Plan([fz.Input("x", ("batch", 4))], [fz.LoRA(at="*", rank=2)])
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(fz.adapt(model, plan, verify="off").adapter_state())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["adapters.lora.0.lora_A"], states[0]["adapters.lora.1.lora_A"])
    assert states[0]["adapters.lora.0.lora_A"].abs().max() <= 0.5
    assert not states[0]["adapters.lora.0.lora_B"].any()


def test_a_rank_above_both_sizes_is_allowed() -> None:
    model, net, x = one(nn.Linear(4, 5), fz.LoRA(at="layer", rank=9))
    train(net)
    torch.testing.assert_close(net(x), by_hand(model, net)(x), rtol=EPS, atol=EPS)


def test_dora_leaves_a_row_of_zeros_alone() -> None:
    layer = nn.Linear(4, 5)
    layer.weight.data[2] = 0
    model, net, x = one(layer, fz.DoRA(at="layer", rank=2))
    torch.testing.assert_close(net(x), model(x), rtol=EPS, atol=EPS)


def test_a_dora_after_a_trained_lora_starts_as_the_identity(tmp_path: Any) -> None:
    layer, file = nn.Linear(4, 5), tmp_path / "lora.safetensors"
    _, net, x = one(layer, fz.LoRA(at="layer", rank=2))
    train(net)
    net.save_adapters(file)
    _, both, _ = one(layer, fz.LoRA(at="layer", rank=2, weights=file), fz.DoRA(at="layer", rank=1))
    torch.testing.assert_close(both(x), net(x), rtol=EPS, atol=EPS)


def test_names_of_the_user_may_mean_something_to_torch() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.adapters = nn.ModuleDict({"lora": nn.Linear(4, 4)})

        def forward(self, x: Tensor) -> Any:
            return self.adapters["lora"](x)

    plan = fz.Plan([fz.Input("x", ("batch", 4))], [fz.LoRA(at="adapters.lora", rank=1, name="type")])
    net = fz.adapt(Net(), plan)
    assert [tuple(value.shape) for value in net.parameters()] == [(1, 4), (4, 1)]
    assert set(net.adapter_state()) == {f"adapters.type.adapters.lora.lora_{leaf}" for leaf in "AB"}


# ---- weights from a file


@pytest.fixture
def trained(tmp_path: Any) -> tuple[nn.Module, fz.AdaptedModule, Any, Tensor]:
    model, net, x = one(nn.Linear(4, 5), fz.LoRA(at="layer", rank=2), fz.IA3(at="layer"))
    train(net)
    net.save_adapters(tmp_path / "a.safetensors")
    return model, net, tmp_path / "a.safetensors", x


def test_weights_of_a_step_come_from_its_file(trained: Any, tmp_path: Any) -> None:
    model, net, file, x = trained
    short = tmp_path / "short.safetensors"
    safetensors.torch.save_file({"layer.ia3": net.adapter_state()["adapters.ia3.layer.ia3"]}, short)
    steps = [fz.LoRA(at="layer", rank=2, weights=file), fz.IA3(at="layer", weights=short)]
    again = fz.adapt(model, fz.Plan(net.plan.inputs, steps), verify="off")
    assert torch.equal(again(x), net(x))
    assert all("weights from" in row.detail for row in again.ledger)


def load(model: nn.Module, net: fz.AdaptedModule, file: Any, tensors: dict[str, Tensor] | None = None) -> str:
    """The message of the refusal of a file."""
    if tensors is not None:
        safetensors.torch.save_file(tensors, file)
    with pytest.raises(fz.PlanError) as caught:
        fz.adapt(model, fz.Plan(net.plan.inputs, [fz.LoRA(at="layer", rank=2, weights=file)]))
    return str(caught.value)


def test_bad_weights_are_refused(trained: Any, tmp_path: Any) -> None:
    model, net, _, _ = trained
    a, b = torch.zeros(2, 4), torch.zeros(5, 2)
    file = tmp_path / "x.safetensors"
    message = load(model, net, file, {"layer.lora_A": torch.zeros(4, 2), "layer.lora_B": b})
    assert "layer.lora_A has shape (4, 2), but (2, 4) is needed" in message and "x.safetensors" in message
    message = load(model, net, file, {"layer.lora_A": a, "layer.lora_C": b})
    assert "missing: layer.lora_B" in message and "unexpected: layer.lora_C" in message
    assert "adapters.lora.<module path>.lora_A" in message
    parts = [(path, *part) for path in ("layer", "fc") for part in (("A", a), ("B", b))]
    peft = {f"base_model.model.{path}.lora_{part}.weight": value.clone() for path, part, value in parts}
    message = load(model, net, file, peft)
    assert "unexpected: base_model.model.fc.lora_A.weight" in message and "fxfreeze.from_peft" in message
    assert "NaN or Inf" in load(model, net, file, {"layer.lora_A": a / 0, "layer.lora_B": b})
    assert "floating" in load(model, net, file, {"layer.lora_A": a.long(), "layer.lora_B": b})
    file.write_bytes(b"PK\x03\x04 a pickle")
    assert "not a safetensors file" in load(model, net, file)
    assert "no such weights file" in load(model, net, tmp_path / "none.safetensors")


def test_a_file_of_vera_holds_the_matrices_its_gains_were_trained_with(tmp_path: Any) -> None:
    model, net, x = one(nn.Linear(4, 5), fz.VeRA(at="layer", rank=3, seed=5))
    assert len(list(net.parameters())) == 2 and not net.temperatures
    train(net)
    file = tmp_path / "vera.safetensors"
    net.save_adapters(file)
    stored = safetensors.torch.load_file(file)
    assert {"settings.vera.vera_A", "settings.vera.vera_B"} < stored.keys()
    again = fz.adapt(model, fz.Plan(net.plan.inputs, [fz.VeRA(at="layer", rank=3, seed=5, weights=file)]), verify="off")
    assert torch.equal(again(x), net(x))
    other = one(copy.deepcopy(model.layer), fz.VeRA(at="layer", rank=3, seed=6))[1]
    short = tmp_path / "short.safetensors"
    safetensors.torch.save_file({key: value for key, value in stored.items() if key.startswith("adapters.")}, short)
    other.load_adapters(short)  # the gains alone mean something else beside other matrices
    assert not torch.allclose(other(x), net(x), atol=1e-3)
    small = {"layer.lambda_b": torch.zeros(5), "layer.lambda_d": torch.zeros(3), "base_model.vera_A": torch.zeros(3, 2)}
    safetensors.torch.save_file(small, short)
    with pytest.raises(fz.PlanError, match=r"vera_A has shape \(3, 2\), but at least \(3, 4\) is needed"):
        fz.adapt(model, fz.Plan(net.plan.inputs, [fz.VeRA(at="layer", rank=3, weights=short)]), verify="off")


def test_weights_that_were_trained_with_another_scale_are_refused(trained: Any) -> None:
    model, net, file, _ = trained
    plan = fz.Plan(net.plan.inputs, [fz.LoRA(at="layer", rank=2, alpha=16, weights=file), fz.IA3(at="layer")])
    with pytest.raises(fz.PlanError, match=r"scale 1\.0.*scale 8\.0"):
        fz.adapt(model, plan)
