"""Layers to graft into a frozen model: identities at first, the maths of the papers, and all of them compile."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxfreeze as fz
from fxfreeze.capture import capture
from fxfreeze.nn import (
    Bottleneck,
    CrossAttentionFusion,
    DiReFT,
    FrozenBlock,
    Hypernetwork,
    InnerAdaptor,
    LinearBank,
    LoReFT,
)
from fxfreeze.passes import PIPELINE
from fxfreeze.pipeline import run_passes
from fxfreeze.rewrite import Context

aten = torch.ops.aten


def moved(module: nn.Module) -> nn.Module:
    """Away from where it started."""
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    return module


def block() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)


# Name → layer, shapes of what it is given (the batch first), and whether it starts as the identity of its first input.
LAYERS: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]], bool]] = {
    "bottleneck": (lambda: Bottleneck(6, 3), [(4, 5, 6)], True),
    "bottleneck with norm": (lambda: Bottleneck(6, 3, norm=True, scale=0.5, activation="relu"), [(4, 5, 6)], True),
    "parallel bottleneck": (lambda: Bottleneck(6, 3, residual=False), [(4, 5, 6)], False),
    "conv bottleneck": (lambda: Bottleneck(6, 3, dims=2, window=3, norm=True), [(4, 6, 5, 7)], True),
    "loreft": (lambda: LoReFT(6, 2, positions="f1+l2"), [(4, 7, 6)], True),
    "loreft everywhere": (lambda: LoReFT(6, 2), [(4, 6)], True),
    "direft": (lambda: DiReFT(6, 2, positions="l2"), [(4, 7, 6)], True),
    "fusion": (lambda: CrossAttentionFusion(6, 5, heads=2), [(4, 7, 6), (4, 3, 5)], True),
    "fusion of maps": (lambda: CrossAttentionFusion(6, 5, heads=2), [(4, 6, 3, 4), (4, 5, 2, 2)], True),
    "frozen block": (lambda: FrozenBlock(block(), 6, 8), [(4, 7, 6)], False),
    "frozen block beside": (lambda: FrozenBlock(block(), 6, 8, residual=True), [(4, 7, 6)], True),
    "inner adaptor": (lambda: InnerAdaptor([nn.Identity(), nn.Linear(6, 6)], task=0), [(4, 7, 6)], True),
    "hypernetwork": (lambda: Hypernetwork(6, 6, hidden=(4,)), [(4, 7, 6), (4, 1)], False),
}


@pytest.mark.parametrize("name", [name for name, (_, _, identity) in LAYERS.items() if identity])
def test_it_starts_as_the_identity(name: str) -> None:
    make, shapes, _ = LAYERS[name]
    layer, given = make(), [torch.randn(shape) for shape in shapes]
    torch.testing.assert_close(layer(*given), given[0], rtol=0, atol=1e-6)
    with torch.no_grad():
        moved(layer)
        assert name == "inner adaptor" or not torch.allclose(layer(*given), given[0], atol=1e-3)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_finite_and_reach_every_parameter(name: str) -> None:
    make, shapes, _ = LAYERS[name]
    layer, given = moved(make()), [torch.randn(shape, requires_grad=True) for shape in shapes]
    layer(*given).pow(2).sum().backward()
    trained = [item for key, item in layer.named_parameters() if item.requires_grad and not key.startswith("layers.")]
    assert all(item.grad is not None and item.grad.isfinite().all() for item in [*trained, given[0]])
    # softmax does not see a constant in all scores, such as the keys' bias.
    assert sum(not bool(item.grad.any()) for item in trained) == 0 or name.startswith("fusion")


@pytest.mark.parametrize("name", LAYERS)
def test_it_is_captured_with_any_batch_and_proven(name: str) -> None:
    make, shapes, _ = LAYERS[name]
    layer = moved(make()).eval()
    keys = [f"x{at}" for at in range(len(shapes))]
    plan = fz.Plan(inputs=[fz.Input(key, shape=("batch", *shape[1:])) for key, shape in zip(keys, shapes)])
    program, _ = capture(layer, plan)
    run_passes(program, PIPELINE, Context(plan))
    given = [torch.randn(7, *shape[1:]) for shape in shapes]
    torch.testing.assert_close(program.run(*given)[0], layer(*given), rtol=1e-4, atol=1e-5)


# ---- one by one


def test_a_bottleneck_by_hand() -> None:
    layer, v = moved(Bottleneck(6, 3, norm=True, scale=0.5, activation="silu")), torch.randn(4, 5, 6)
    h = F.layer_norm(v, [6], layer.norm.weight, layer.norm.bias)
    want = v + 0.5 * (F.silu(h @ layer.down.weight.T + layer.down.bias) @ layer.up.weight.T + layer.up.bias)
    torch.testing.assert_close(layer(v), want)
    layer.residual = False
    torch.testing.assert_close(layer(v), want - v)


def test_a_convolutional_bottleneck_of_window_1_is_one_for_each_place() -> None:
    conv, linear = moved(Bottleneck(6, 3, dims=2, norm=True)), Bottleneck(6, 3, norm=True)
    linear.load_state_dict({key: value.flatten(1) if value.dim() == 4 else value
                            for key, value in conv.state_dict().items()})  # fmt: skip
    v = torch.randn(2, 6, 4, 5)
    torch.testing.assert_close(conv(v), linear(v.movedim(1, -1)).movedim(-1, 1))


def test_loreft_by_hand_and_its_rows_stay_orthonormal() -> None:
    layer = moved(LoReFT(6, 2))
    rotation = layer.rotation()
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(2))
    h = torch.randn(5, 6)
    want = torch.stack(
        [row + rotation.T @ (layer.source.weight @ row + layer.source.bias - rotation @ row) for row in h]
    )
    torch.testing.assert_close(layer(h), want)
    # Within the subspace of R it is W·h + b, and orthogonal to it nothing changes.
    torch.testing.assert_close(layer(h) @ rotation.T, layer.source(h))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        layer(h).pow(2).sum().backward()
        optimizer.step()
    torch.testing.assert_close(layer.rotation() @ layer.rotation().T, torch.eye(2))


def test_rotation_moves_with_its_parameter() -> None:
    layer = LoReFT(6, 2)
    with torch.no_grad():
        layer.basis.copy_(torch.linalg.qr(torch.randn(6, 2))[0] * torch.tensor([-2.0, 3.0]))
    torch.testing.assert_close(layer.rotation(), F.normalize(layer.basis, dim=0).T)


@pytest.mark.parametrize(
    ("positions", "length", "edited"),
    [("all", 3, "111"), ("f2", 4, "1100"), ("l1", 4, "0001"), ("f1+l2", 5, "10011"), ("f3+l2", 4, "1111"),
     ("f10", 2, "11")],
)  # fmt: skip
@pytest.mark.parametrize("kind", [LoReFT, DiReFT])
def test_positions(kind: Any, positions: str, length: int, edited: str) -> None:
    layer, everywhere = moved(kind(6, 2, positions=positions)), kind(6, 2)
    everywhere.load_state_dict(layer.state_dict())
    h = torch.randn(3, length, 6)
    chosen = torch.tensor([letter == "1" for letter in edited]).unsqueeze(-1)
    torch.testing.assert_close(layer(h), torch.where(chosen, everywhere(h), h))


def test_direft_by_hand() -> None:
    layer, h = moved(DiReFT(6, 2)), torch.randn(5, 6)
    torch.testing.assert_close(layer(h), h + layer.source(h) @ layer.target.weight.T)


def test_fusion_is_torchs_attention() -> None:
    layer = moved(CrossAttentionFusion(6, 5, heads=2))
    v, context = torch.randn(4, 7, 6), torch.randn(4, 3, 5)
    twin = nn.MultiheadAttention(6, 2, kdim=5, vdim=5, batch_first=True)
    with torch.no_grad():
        for name, part in (("q", layer.query), ("k", layer.key), ("v", layer.value)):
            getattr(twin, f"{name}_proj_weight").copy_(part.weight)
        twin.in_proj_bias.copy_(torch.cat([layer.query.bias, layer.key.bias, layer.value.bias]))
        twin.out_proj.load_state_dict(layer.out.state_dict())
    c, mask = layer.context_norm(context), torch.tensor([[True, True, False]]).expand(4, 3)
    for given, ignored in ((None, None), (mask, ~mask)):
        want = v + layer.gate.tanh() * twin(layer.norm(v), c, c, key_padding_mask=ignored)[0]
        torch.testing.assert_close(layer(v, context, mask=given), want)


def test_fusion_of_maps_is_that_of_their_places() -> None:
    layer = moved(CrossAttentionFusion(6, 5, heads=2))
    v, context = torch.randn(2, 6, 3, 4), torch.randn(2, 5, 2, 2)
    want = layer(v.flatten(2).mT, context.flatten(2).mT)
    torch.testing.assert_close(layer(v, context), want.mT.reshape(v.shape))


def test_a_frozen_block_is_shared_untouched_and_never_trains() -> None:
    given = block().train()
    layer, v = FrozenBlock(given, 6, 8).train(), torch.randn(2, 3, 6)
    assert all(item.requires_grad for item in given.parameters()) and given.training
    shared = zip(layer.block.parameters(), given.parameters(), strict=True)
    assert all(mine.data_ptr() == theirs.data_ptr() and not mine.requires_grad for mine, theirs in shared)
    assert {key.partition(".")[0] for key, item in layer.named_parameters() if item.requires_grad} == {"into", "back"}
    assert torch.equal(layer(v), layer(v))  # no dropout
    torch.testing.assert_close(layer(v), layer.back(copy.deepcopy(given).eval()(layer.into(v))))


def test_of_a_block_that_returns_more_the_first_counts() -> None:
    layer = FrozenBlock(nn.LSTM(8, 4, batch_first=True), 6, 8, outer=4)
    v = torch.randn(2, 3, 6)
    torch.testing.assert_close(layer(v), layer.back(layer.block(layer.into(v))[0]))


def test_tasks_per_row() -> None:
    layer = InnerAdaptor([nn.Identity(), nn.Linear(6, 6), nn.Linear(6, 6)], task=1)
    h, tasks = torch.randn(4, 5, 6), torch.tensor([2, 0, 1, 2])
    found = layer(h, tasks)
    for row, task in enumerate(tasks.tolist()):
        torch.testing.assert_close(found[row], layer.layers[task](h[row]))
    assert torch.equal(layer(h), layer.layers[1](h))
    with pytest.raises(IndexError):
        layer(h, torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError, match="no task"):
        InnerAdaptor([nn.Identity()])(h)


def test_tasks_compile_and_one_task_leaves_the_others_out() -> None:
    layer = InnerAdaptor([nn.Linear(6, 6), nn.Linear(6, 6)], task=1).eval()
    own = fz.Input("h", shape=("batch", 6))
    for more, count in (([], 1), ([fz.Input("task", shape=("batch",), dtype="int64", low=0, high=1)], 2)):
        plan = fz.Plan(inputs=[own, *more])
        program, _ = capture(layer, plan)
        assert len(program.graph.find_nodes(op="call_function", target=aten.linear.default)) == count
    h, task = torch.randn(5, 6), torch.tensor([0, 1, 1, 0, 1])
    torch.testing.assert_close(program.run(h, task)[0], layer(h, task))


def test_a_hypernetwork_by_hand() -> None:
    layer = moved(Hypernetwork(3, 2, condition=2, hidden=(5,)))
    x, gamma = torch.randn(4, 3), torch.rand(4, 2)
    for row in range(4):
        angle = torch.pi * gamma[row] / 2
        made = layer.network(torch.cat([angle.cos(), angle.sin()])).reshape(2, 4)
        want = (layer.weight + made[:, :3]) @ x[row] + layer.bias + made[:, 3]
        torch.testing.assert_close(layer(x, gamma)[row], want)
        torch.testing.assert_close(layer(x, gamma[row])[row], want)
        torch.testing.assert_close(layer.fixed(gamma[row])(x[row]), want)
    torch.testing.assert_close(layer.bank(gamma)(x.flip(0), torch.tensor([3, 2, 1, 0])).flip(0), layer(x, gamma))
    deep = torch.randn(4, 6, 3)
    torch.testing.assert_close(layer(deep, gamma)[2], layer(deep, gamma[2])[2])


def test_a_hypernetwork_starts_as_its_base() -> None:
    base = nn.Linear(3, 2).requires_grad_(False)
    layer, x = Hypernetwork(3, 2, base=base), torch.randn(4, 3)
    torch.testing.assert_close(layer(x, torch.rand(4, 1)), base(x))
    assert not layer.weight.requires_grad and layer.weight is not base.weight


def test_a_constant_condition_leaves_one_linear_layer() -> None:
    layer = moved(Hypernetwork(6, 4, hidden=(5,))).eval()

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer
            self.register_buffer("gamma", torch.tensor([0.3]))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, self.gamma)

    plan = fz.Plan(inputs=[fz.Input("x", shape=("batch", 6))])
    program, _ = capture(Fixed(), plan)
    run_passes(program, PIPELINE, Context(plan))
    assert [str(node.target) for node in program.graph.nodes if node.op == "call_function"] == ["aten.linear.default"]
    x = torch.randn(3, 6)
    torch.testing.assert_close(program.run(x)[0], layer.fixed(torch.tensor([0.3]))(x))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Bottleneck(6, 0), "positive"),
        (lambda: Bottleneck(6, 2, activation="mish"), "'gelu', 'relu'"),
        (lambda: Bottleneck(6, 2, dims=4), "0, 1, 2 or 3"),
        (lambda: Bottleneck(6, 2, window=3), "1 where dims is 0"),
        (lambda: Bottleneck(6, 2, window=2, dims=1), "odd"),
        (lambda: LoReFT(6, 7), r"1 … 6"),
        (lambda: LoReFT(6, 2, positions="f3l2"), "f<n>\\+l<n>"),
        (lambda: LoReFT(6, 2, positions="+l2"), "f<n>\\+l<n>"),
        (lambda: DiReFT(6, 2, positions=""), "must be 'all'"),
        (lambda: CrossAttentionFusion(6, 5, heads=4), "divide"),
        (lambda: InnerAdaptor([]), "none"),
        (lambda: InnerAdaptor([nn.Identity()], task=1), "0 … 0"),
        (lambda: Hypernetwork(0, 3), "positive"),
        (lambda: Hypernetwork(3, 3, base=nn.Linear(3, 2)), "3 → 2"),
        (lambda: Hypernetwork(3, 3)(torch.ones(2, 3), torch.ones(2, 2)), r"\[\.\.\., 1\]"),
        (lambda: LinearBank(torch.ones(2, 3, 4), torch.ones(3)), "shapes"),
    ],
)
def test_misuse_is_refused(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()
