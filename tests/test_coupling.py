"""Coupling groups: worked out by hand on small models, and found in whole ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxfreeze as fz
from fxfreeze.capture import capture
from fxfreeze.coupling import Group, coupling, coupling_groups
from fxfreeze.kernels.gate import KERNEL
from fxfreeze.passes import PIPELINE
from fxfreeze.pipeline import run_passes, stage_passes
from fxfreeze.program import Program
from fxfreeze.rewrite import Context


class Fn(nn.Module):
    """A function of the layers and constants it is given, by name."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def program(model: nn.Module, *shape: int | str, stages: list[str] | None = None, **spec: Any) -> Program:
    plan = fz.Plan([fz.Input("x", shape, **spec)], targets=[])
    captured, _ = capture(model.eval(), plan)
    if stages:
        run_passes(captured, stage_passes(PIPELINE, stages), Context(plan), verify="off")
    return captured


def members(group: Group) -> dict[tuple[str, int], Any]:
    """(constant, dim) → entries of every unit."""
    return {(str(item.node.target), item.dim): item.entries.tolist() for item in group.members}


def free(found: Program | list[Group]) -> list[Group]:
    groups = coupling_groups(found) if isinstance(found, Program) else found
    return [group for group in groups if group.reason is None]


def reasons(found: Program) -> dict[tuple[str, int], str | None]:
    """(constant, dim) → why it cannot lose units; the first group's."""
    said: dict[tuple[str, int], str | None] = {}
    for group in coupling_groups(found):
        for key in members(group):
            said.setdefault(key, group.reason)
    return said


def each(count: int, first: int = 0) -> list[list[int]]:
    return [[at] for at in range(first, first + count)]


def runs(count: int, length: int) -> list[list[int]]:
    return [list(range(at * length, at * length + length)) for at in range(count)]


# ---- layers


def test_two_layers_share_their_hidden_neurons() -> None:
    model = Fn(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Linear(4, 6), b=nn.Linear(6, 3))
    groups = coupling_groups(program(model, "batch", 4))
    assert [(group.name, group.size, group.reason) for group in groups] == [
        ("a", 6, None), ("a.weight", 4, "comes from an input"), ("b", 3, "reaches an output"),
    ]  # fmt: skip
    assert members(groups[0]) == {("a.weight", 0): each(6), ("a.bias", 0): each(6), ("b.weight", 1): each(6)}
    assert [item.role for item in groups[0].members] == ["row", "row", "column"]
    assert [(str(item.node.target), item.dim) for item in groups[0].values] == [
        ("aten.linear.default", 1), ("aten.relu.default", 1)
    ]  # fmt: skip


def test_a_batch_norm_belongs_to_the_channels_before_and_after_it_is_folded() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1))
    (group,) = free(program(model, "batch", 3, 8, 8))
    norm = {(f"1.{name}", 0): each(4) for name in ("weight", "bias", "running_mean", "running_var")}
    layers = {("0.weight", 0): each(4), ("0.bias", 0): each(4), ("3.weight", 1): each(4)}
    assert members(group) == layers | norm
    assert {item.role for item in group.members if str(item.node.target).startswith("1.")} == {"channel"}
    (group,) = free(program(model, "batch", 3, 8, 8, stages=["clean", "fold"]))
    assert members(group) == layers


def test_a_residual_stage_is_one_group() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = x + m.b(F.relu(m.a(x)))
        return m.head(x.mean((2, 3)))

    model = Fn(forward, stem=nn.Conv2d(3, 4, 1), a=nn.Conv2d(4, 6, 3, padding=1), b=nn.Conv2d(6, 4, 3, padding=1),
               head=nn.Linear(4, 2))  # fmt: skip
    stage, inner = free(program(model, "batch", 3, 8, 8))
    assert members(stage) == {(name, dim): each(4) for name, dim in (
        ("stem.weight", 0), ("stem.bias", 0), ("a.weight", 1), ("b.weight", 0), ("b.bias", 0), ("head.weight", 1),
    )}  # fmt: skip
    assert members(inner) == {("a.weight", 0): each(6), ("a.bias", 0): each(6), ("b.weight", 1): each(6)}


def test_of_a_concat_every_part_is_a_group() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.c(torch.cat([m.a(x), m.b(x), m.a(x)], 1))

    model = Fn(forward, a=nn.Conv2d(3, 2, 1), b=nn.Conv2d(3, 4, 1), c=nn.Conv2d(8, 5, 1))
    first, second = free(program(model, "batch", 3, 8, 8))
    assert members(first)["c.weight", 1] == [[0, 6], [1, 7]]
    assert members(second)["c.weight", 1] == each(4, 2)


def test_slices_and_splits_take_channels_apart() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        one, two = y[:, :2], y[:, 2:].split([1, 3], 1)[1]
        return m.b(one) + m.c(two) + m.d(y.chunk(2, 1)[0])

    model = Fn(forward, a=nn.Linear(4, 6), b=nn.Linear(2, 2), c=nn.Linear(3, 2), d=nn.Linear(3, 2))
    one, two = free(program(model, "batch", 4))
    assert members(one) == {("a.weight", 0): each(2), ("a.bias", 0): each(2), ("b.weight", 1): each(2),
                            ("d.weight", 1): each(2)}  # fmt: skip
    assert members(two) == {("a.weight", 0): each(3, 3), ("a.bias", 0): each(3, 3), ("c.weight", 1): each(3)}


def test_depthwise_convolutions_keep_their_channels() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.c(F.relu6(m.b(F.relu6(m.a(x)))))

    model = Fn(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 4, 3, groups=4), c=nn.Conv2d(4, 2, 1))
    (group,) = free(program(model, "batch", 3, 8, 8))
    assert members(group) == {("a.weight", 0): each(4), ("a.bias", 0): each(4), ("b.weight", 0): each(4),
                              ("b.bias", 0): each(4), ("c.weight", 1): each(4)}  # fmt: skip


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_convolutions_lose_groups_or_the_same_of_each(transposed: bool) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    model = nn.Sequential(nn.Conv2d(3, 6, 1), kind(6, 4, 3, groups=2), nn.Conv2d(4, 2, 1))
    groups, inside, outside = sorted(free(program(model, "batch", 3, 8, 8)), key=lambda item: (
        ("2.weight", 1) not in members(item) or ("0.weight", 0) not in members(item), item.size == 2
    ))  # fmt: skip
    rows = [[0, 1, 2], [3, 4, 5]]
    assert members(groups) == {
        ("0.weight", 0): rows, ("0.bias", 0): rows, ("1.weight", 0): rows if transposed else [[0, 1], [2, 3]],
        ("1.bias", 0): [[0, 1], [2, 3]], ("2.weight", 1): [[0, 1], [2, 3]],
    }  # fmt: skip
    apart = [[0, 3], [1, 4], [2, 5]]
    assert members(inside) == {("0.weight", 0): apart, ("0.bias", 0): apart} | (
        {("1.weight", 0): apart} if transposed else {("1.weight", 1): each(3)}
    )
    apart = [[0, 2], [1, 3]]
    assert members(outside) == {("1.bias", 0): apart, ("2.weight", 1): apart} | (
        {("1.weight", 1): each(2)} if transposed else {("1.weight", 0): apart}
    )


def test_transposed_convolutions_store_their_columns_first() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.ConvTranspose1d(4, 5, 2, stride=2), nn.Conv1d(5, 2, 1))
    first, second = free(program(model, "batch", 3, 8))
    assert members(first) == {("0.weight", 0): each(4), ("0.bias", 0): each(4), ("1.weight", 0): each(4)}
    assert members(second) == {("1.weight", 1): each(5), ("1.bias", 0): each(5), ("2.weight", 1): each(5)}
    assert [item.role for item in second.members] == ["row", "row", "column"]


def test_a_channel_of_a_flattened_map_owns_a_column_for_every_pixel() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 4))
    (group,) = free(program(model, "batch", 3, 6, 6))
    assert members(group)["3.weight", 1] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_an_embedding_has_its_columns() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3))
    found = program(model, "batch", 5, dtype="int64", low=0, high=8)
    (group,) = free(found)
    assert members(group) == {("0.weight", 1): each(4), ("1.weight", 1): each(4)}
    assert reasons(found)["0.weight", 0] == "is looked up in by embedding at 0"


def test_transformers_conv1d_stores_its_rows_second() -> None:
    transformers = pytest.importorskip("transformers")
    layer = transformers.pytorch_utils.Conv1D
    (group,) = free(program(nn.Sequential(layer(6, 4), nn.GELU(), layer(3, 6)), "batch", "seq", 4))
    assert members(group) == {("0.weight", 1): each(6), ("0.bias", 0): each(6), ("2.weight", 0): each(6)}
    assert [item.role for item in group.members] == ["row", "row", "column"]


def test_constants_per_channel_and_thresholds_of_gates() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(KERNEL.op(m.a(x) * m.gain + m.place, m.level, m.modes[0]))

    model = Fn(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 3), gain=torch.rand(6), place=torch.rand(5, 6),
               level=torch.rand(6), modes=torch.rand(2, 6))  # fmt: skip
    (group,) = free(program(model, "batch", 5, 4))
    assert members(group) == {(name, dim): each(6) for name, dim in (
        ("a.weight", 0), ("a.bias", 0), ("gain", 0), ("place", 1), ("modes", 1), ("level", 0), ("b.weight", 1),
    )}  # fmt: skip


# ---- what leaves channels where they are, or moves them

MOVES: dict[str, tuple[Callable[[Tensor], Tensor], int, list[list[int]]]] = {
    "pools": (lambda x: F.adaptive_avg_pool2d(F.avg_pool2d(F.max_pool2d(x, 2), 2), 1).flatten(1), 4, each(4)),
    "upsample": (lambda x: F.interpolate(F.interpolate(x, scale_factor=2), 3, mode="bicubic").sum((2, 3)), 4, each(4)),
    "pads": (lambda x: F.pad(F.pad(x, (1, 1, 2, 0)), (1, 1, 1, 1), mode="reflect").amax((2, 3)), 4, each(4)),
    "shift": (lambda x: F.pad(x.mean((2, 3)), (2, 1)), 7, each(4, 2)),
    "crop": (lambda x: F.pad(x.mean((2, 3)), (0, -1)), 3, each(3)),
    "permute": (lambda x: x.permute(0, 2, 3, 1).sum((1, 2)), 4, each(4)),
    "movedim": (lambda x: x.movedim(1, -1).sum((1, 2)), 4, each(4)),
    "transposes": (lambda x: x.transpose(1, 3).flatten(1, 2).mT.sum(-1), 4, each(4)),
    "activations": (lambda x: F.prelu(F.hardswish(F.silu(F.gelu(x))), torch.full((4,), 0.1)).sum((2, 3)), 4, each(4)),
    "repeat": (lambda x: x.sum((2, 3)).repeat(1, 2), 8, [[at, at + 4] for at in range(4)]),
    "interleave": (lambda x: x.sum((2, 3)).repeat_interleave(2, 1), 8, [[2 * at, 2 * at + 1] for at in range(4)]),
    "stack": (lambda x: torch.stack([x, x.relu()], 1).sum((1, 3, 4)), 4, each(4)),
    "unfold": (lambda x: F.unfold(x, 2).sum(2), 16, runs(4, 4)),
    "unshuffle": (lambda x: F.pixel_unshuffle(x, 2).sum((2, 3)), 16, runs(4, 4)),
    "instance": (lambda x: F.instance_norm(x).amax((2, 3)), 4, each(4)),
    "einsum": (lambda x: torch.einsum("bchw,bdhw->bc", x, x.sum(1, keepdim=True)), 4, each(4)),
    "expand": (lambda x: x.sum((2, 3))[:, None].expand(-1, 3, -1).amax(1), 4, each(4)),
    "masked": (lambda x: torch.where(x > 0, x, 0).masked_fill(x > 5, 1.0).sum((2, 3)), 4, each(4)),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVES)
def test_where_channels_are_behind_an_operator(name: str) -> None:
    function, width, columns = MOVES[name]
    model = Fn(lambda m, x: m.b(function(m.a(x))), a=nn.Conv2d(3, 4, 1), b=nn.Linear(width, 3))
    found = program(model, "batch", 3, 8, 8)
    groups = [group for group in free(found) if ("a.weight", 0) in members(group)]
    assert [members(group).get(("b.weight", 1)) for group in groups] == [columns], coupling_groups(found)


def test_a_shuffle_puts_channels_elsewhere() -> None:
    """(2, 3) → (3, 2): entries 0 3 1 4 2 5."""
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ChannelShuffle(2), nn.Conv2d(6, 2, 1))
    outer, inner = free(program(model, "batch", 3, 4, 4))
    assert members(outer) == {("0.weight", 0): [[0, 1, 2], [3, 4, 5]], ("0.bias", 0): [[0, 1, 2], [3, 4, 5]],
                              ("2.weight", 1): [[0, 2, 4], [1, 3, 5]]}  # fmt: skip
    assert members(inner)["0.weight", 0] == [[0, 3], [1, 4], [2, 5]]
    assert members(inner)["2.weight", 1] == [[0, 1], [2, 3], [4, 5]]


def test_pixel_shuffles_lose_channels_of_the_larger_map() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.PixelShuffle(2), nn.Conv2d(2, 2, 1))
    (group,) = free(program(model, "batch", 3, 4, 4))
    assert members(group)["0.weight", 0] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_gated_units_have_two_rows() -> None:
    model = Fn(lambda m, x: m.b(F.glu(m.a(x))), a=nn.Linear(4, 6), b=nn.Linear(3, 2))
    (group,) = free(program(model, "batch", 4))
    assert members(group) == {("a.weight", 0): [[0, 3], [1, 4], [2, 5]], ("a.bias", 0): [[0, 3], [1, 4], [2, 5]],
                              ("b.weight", 1): each(3)}  # fmt: skip


def test_group_norm_loses_whole_groups() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.GroupNorm(3, 6), nn.Conv2d(6, 2, 1))
    found = program(model, "batch", 3, 4, 4)
    (group,) = free(found)
    assert all(entries == [[0, 1], [2, 3], [4, 5]] for entries in members(group).values()) and len(group.members) == 5
    inner = next(
        item for item in coupling_groups(found) if members(item).get(("1.weight", 0)) == [[0, 2, 4], [1, 3, 5]]
    )
    assert inner.reason == "is normalised over by group_norm at 1"


# ---- what cannot be removed

STAYS: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "output": (lambda m, x: (m.b(y := m.a(x)), y.relu()), "reaches an output"),
    "input": (lambda m, x: m.b(m.a(x) + F.pad(x, (0, 2))[:, :6] + x.repeat(1, 2)[:, :6]), "comes from an input"),
    "layer_norm": (lambda m, x: m.b(F.layer_norm(m.a(x), (6,))), "is normalised over by layer_norm"),
    "rms_norm": (lambda m, x: m.b(F.rms_norm(m.a(x), (6,))), "is normalised over by rms_norm"),
    "softmax": (lambda m, x: m.b(m.a(x).softmax(-1)), "is normalised over by softmax"),
    "mean": (lambda m, x: m.b(y := m.a(x)) + y.mean(-1, keepdim=True), "is mixed by mean"),
    "sort": (lambda m, x: m.b(m.a(x).sort(-1)[0]), "is read by sort, which is not known"),
    "fft": (lambda m, x: m.b(torch.fft.fft(m.a(x)).real), "is read by fft_fft, which is not known"),
    "flip": (lambda m, x: m.b(m.a(x).flip(1)), "is mixed by flip"),
    "picked": (lambda m, x: m.b(m.a(x)[:, [0, 2, 1, 3, 5, 4]]), "is looked up in by index"),
    "steps": (lambda m, x: m.b(m.a(x)) + m.c(m.a(x)[:, ::2]), "is mixed by slice"),
    "layouts": (lambda m, x: m.b((y := m.a(x)).unflatten(1, (2, 3)).mT.flatten(1) + y), "do not fit each other"),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYS)
def test_the_reason_is_said(name: str) -> None:
    function, reason = STAYS[name]
    model = Fn(function, a=nn.Linear(4, 6), b=nn.Linear(6, 3), c=nn.Linear(3, 3))
    found = program(model, "batch", 4)
    assert reason in str(reasons(found)["a.weight", 0])


def test_an_operator_that_is_not_known_says_where_it_is() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LSTM(6, 3, batch_first=True))
    found = program(Fn(lambda m, x: m.s(x)[0], s=model), "batch", 5, 4)
    assert "is read by lstm at s.1, which is not known" in str(reasons(found)["s.0.weight", 0])


def test_tied_weights_couple_what_reads_them() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.b(self.a(x).relu()), F.linear(x, self.a.weight)

    found = program(Tied(), "batch", 4)
    assert reasons(found)["a.weight", 0] == "reaches an output"
    apart = coupling_groups(found, tied=False)
    (hidden,) = free(apart)
    assert set(members(hidden)) == {("a.weight", 0), ("a.bias", 0), ("b.weight", 1)}
    (weight,) = [item for item in hidden.members if str(item.node.target) == "a.weight"]
    assert [str(node.target) for node in weight.readers] == ["aten.linear.default"] and weight.role == "row"
    (other,) = [item for group in apart if group.reason == "reaches an output" for item in group.members
                if str(item.node.target) == "a.weight"]  # fmt: skip
    assert other.readers != weight.readers


def test_axes_of_all_values_are_there() -> None:
    found = program(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), "batch", 4)
    all_of = coupling(found)
    for node in found.graph.nodes:
        if node.op == "call_function":
            assert [axis.size for axis in all_of.dims[node]] == [
                size if isinstance(size, int) else str(size) for size in node.meta["val"].shape
            ]
