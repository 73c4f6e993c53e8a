"""Capture: what a Program says about the model it was made from, and what is refused, with the place at fault."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import fxfreeze as fz
from fxfreeze.capture import capture, frozen
from fxfreeze.program import Program, is_random
from fxfreeze.rewrite import match_sites
from fxfreeze.sampling import sample_inputs

aten = torch.ops.aten


def plan_of(*shape: int | str, **options) -> fz.Plan:
    return fz.Plan(inputs=[fz.Input("x", shape=shape)], **options)


def agree(program: Program, flat: nn.Module, **sizes: int) -> None:
    """The program and the eager model agree bit for bit at these sizes."""
    inputs = sample_inputs(program, sizes, seed=3)
    with frozen(flat):
        expected = flat(*(value.clone() for value in inputs))
    for actual, wanted in zip(program.run(*inputs), expected, strict=True):
        assert torch.equal(actual, wanted)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu_(self.bn(self.conv(x))).mean((2, 3)))


def test_constants_keep_their_names_and_memory_and_nodes_their_modules():
    model = Block()
    program, flat = capture(model, plan_of("batch", 3, 8, 8))
    assert set(program.state) == {name for name in model.state_dict() if "num_batches" not in name}
    assert program.state["conv.weight"].data_ptr() == model.conv.weight.data_ptr()
    sites = program.sites()
    assert [node.target for node in sites["conv"]] == [aten.conv2d.default]
    assert [node.target for node in sites["head"]] == [aten.linear.default]
    assert program.module_classes(sites["bn"][0])["bn"].endswith("BatchNorm2d")
    agree(program, flat, batch=5)


def test_the_model_is_left_as_it_was():
    model = Block()
    model.train()
    model.bn.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    capture(model, plan_of("batch", 3, 8, 8))
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_model_is_left_as_it_was_when_capture_fails():
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no")

    model = Fails().train()
    with pytest.raises(fz.CaptureError, match="ValueError: no"):
        capture(model, plan_of("batch", 3))
    assert model.training


class Nested(nn.Module):
    def forward(self, batch: dict, pair: list, *, scale: Tensor) -> dict:
        hidden = batch["ids"] * scale + pair[0] - pair[1]
        return {"hidden": hidden, "parts": (hidden.relu(), [hidden.sum(-1)]), "nothing": None}


def test_nested_dict_list_and_keyword_inputs_and_nested_outputs():
    inputs = [fz.Input(name, shape=("batch", 4)) for name in ("batch.ids", "pair.0", "pair.1", "scale")]
    program, flat = capture(Nested(), fz.Plan(inputs=inputs))
    assert program.outputs == ("hidden", "parts.0", "parts.1.0")
    assert program.structure["items"]["nothing"] == {"kind": "none"}
    agree(program, flat, batch=3)


def test_inputs_may_have_names_of_their_own_when_forward_has_others():
    program, flat = capture(Block(), fz.Plan(inputs=[fz.Input("image", shape=("batch", 3, 8, 8))]))
    assert program.inputs[0].name == "image"
    agree(program, flat, batch=2)


def test_inputs_that_do_not_fit_forward_are_refused():
    plan = fz.Plan(inputs=[fz.Input("x", shape=("b", 3)), fz.Input("y", shape=("b", 3))])
    with pytest.raises(fz.CaptureError, match=r"do not fit forward|no parameter named y"):
        capture(nn.ReLU(), plan)


class Cache:
    """Like a key-value cache: an object torch.export cannot flatten."""

    def __init__(self, key: Tensor) -> None:
        self.key = key


@dataclass
class Result:
    logits: Tensor
    cache: Cache


class WithCache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Result:
        return Result(self.proj(x), Cache(x))


def test_outputs_keep_tensors_of_a_result_that_also_holds_a_cache():
    program, flat = capture(WithCache(), plan_of("batch", 4, outputs=["logits"]))
    assert program.outputs == ("logits",)
    agree(program, flat, batch=3)
    with pytest.raises(fz.CaptureError, match="logits"):
        capture(WithCache(), plan_of("batch", 4))
    with pytest.raises(fz.CaptureError, match="logits"):
        capture(WithCache(), plan_of("batch", 4, outputs=["logit"]))


def test_a_result_that_is_not_a_tensor_is_refused():
    class Counts(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            return x + 1, x.shape[1]

    with pytest.raises(fz.CaptureError, match="int"):
        capture(Counts(), plan_of("batch", 4))


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


def test_data_dependent_control_flow_names_module_line_and_rungs():
    with pytest.raises(fz.CaptureError) as caught:
        capture(nn.Sequential(nn.Linear(3, 3), Branch()), plan_of("batch", 3))
    error = caught.value
    assert error.where == "1"
    assert error.line is not None and error.line.startswith("test_capture.py:")
    assert "non-strict" in error.what and "strict:" in error.what
    assert "torch.where" in (error.hint or "")


def test_a_dim_the_model_fixes_is_refused():
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, -1) if x.shape[0] == 2 else x.reshape(-1, 2)

    with pytest.raises(fz.CaptureError, match="batch"):
        capture(Fixed(), plan_of("batch", 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with torch.no_grad():
        model[1].weight[1, 1] = value
    with pytest.raises(fz.CaptureError, match="NaN or Inf") as caught:
        capture(model, plan_of("batch", 3))
    assert caught.value.where == "1.weight"


def test_huge_finite_weights_and_masks_of_infinity_are_not_refused():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((4,), 3e38))  # the sum overflows
            self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))

        def forward(self, x: Tensor) -> Tensor:
            return (x * 1e-38 * self.scale) @ torch.softmax(self.mask, -1)

    capture(Masked(), plan_of("batch", 4))


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3, affine=False, track_running_stats=False)]
)
def test_batch_norm_without_statistics_is_refused(norm: nn.Module):
    with pytest.raises(fz.CaptureError, match="running statistics") as caught:
        capture(nn.Sequential(nn.Linear(3, 3), norm), plan_of("batch", 3))
    assert caught.value.where == "1"


def test_a_model_that_writes_to_its_own_buffer_is_refused():
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return x + self.count

    model = Counter()
    with pytest.raises(fz.CaptureError, match="writes to a buffer") as caught:
        capture(nn.Sequential(model), plan_of("batch", 3))
    assert caught.value.where == "0.count"
    assert torch.equal(model.count, torch.zeros(3))


def test_weights_on_the_meta_device_are_refused():
    with pytest.raises(fz.CaptureError, match="meta"):
        capture(nn.Linear(3, 3, device="meta"), plan_of("batch", 3))


class InPlace(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        hidden = x * 2
        if self.kind == "slice":
            hidden[:, 0] = 7.0
        elif self.kind == "view":
            hidden.view(-1).add_(1)
        elif self.kind == "alias later":
            view = hidden.t()
            hidden.add_(1)
            return view * 2
        elif self.kind == "input":
            x.mul_(3)
            return x + hidden
        elif self.kind == "chain":
            hidden.relu_().add_(1).clamp_(max=2)
            return hidden + x
        elif self.kind == "residual":
            hidden += x
            hidden = torch.relu_(hidden)
            return nn.functional.dropout(hidden, 0.5, training=False) * hidden
        elif self.kind == "first name":
            added = hidden.add_(1)
            added.relu_()
            return added * hidden
        elif self.kind == "view of a result":
            view = hidden.add_(1).view(-1)
            hidden.mul_(3)
            return view
        elif self.kind == "write to a view of a result":
            added = hidden.add_(1)
            added.view(-1).mul_(3)
            return added
        elif self.kind == "dropout":
            same = nn.functional.dropout(hidden, 0.5, training=False)
            hidden.add_(5)
            return same + hidden
        elif self.kind == "chunks":
            left, right = hidden.chunk(2, dim=1)
            left.add_(right)
            return hidden
        elif self.kind == "masked":
            return hidden.masked_fill_(hidden > 0, 0.5).zero_().fill_(2.0) + x
        return hidden


SWAPPED = ["input", "chain", "residual", "first name", "masked"]
RETRACED = ["slice", "view", "alias later", "view of a result", "write to a view of a result", "chunks"]


@pytest.mark.parametrize("kind", [*SWAPPED, *RETRACED, "dropout"])
def test_in_place_operators_become_functional_with_the_same_meaning(kind: str, monkeypatch: pytest.MonkeyPatch):
    traced = []
    again = ExportedProgram.run_decompositions
    monkeypatch.setattr(ExportedProgram, "run_decompositions", lambda *given: traced.append(kind) or again(*given))
    program, flat = capture(InPlace(kind), plan_of("batch", 4))
    program.verify()  # refuses every operator that writes
    agree(program, flat, batch=3)
    # Writes that nobody else sees take no second trace; what a dropout is does hang on torch.
    assert kind == "dropout" or bool(traced) == (kind in RETRACED)


def test_a_dropout_that_drops_is_no_alias():
    class Drops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            dropped = nn.functional.dropout(x * 2, 0.5)
            dropped[:, 0] = 7.0
            return dropped

    program, _ = capture(Drops(), plan_of("batch", 4))
    assert any(is_random(node) for node in program.graph.nodes)


def test_a_module_called_twice_is_one_site():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(self.shared(x))

    program, _ = capture(Twice(), plan_of("batch", 4))
    assert [node.target for node in program.sites()["shared"]] == [aten.linear.default] * 2


def test_a_parameter_owner_is_a_site_though_its_forward_never_runs():
    inputs = [fz.Input(name, shape=("batch", 5, 8)) for name in ("query", "key", "value")]
    program, _ = capture(nn.MultiheadAttention(8, 2, batch_first=True), fz.Plan(inputs=inputs, outputs=["0"]))
    assert any(node.target is aten.linear.default for node in program.sites()["out_proj"])


def test_patterns_match_paths_and_name_the_nearest_when_they_do_not():
    program, _ = capture(nn.Sequential(Block()), plan_of("batch", 3, 8, 8))
    assert match_sites(program, fz.LoRA(at=["0.head", "*.conv"], rank=1), 0) == ["0.conv", "0.head"]
    with pytest.raises(fz.PlanError, match=r"steps\[2\]\.at: no module matches '0.haed'") as caught:
        match_sites(program, fz.LoRA(at="0.haed", rank=1), 2)
    assert (caught.value.hint or "").startswith("nearest paths: 0.head")


def test_indices_without_a_range_reach_every_row_of_their_table():
    plan = fz.Plan(inputs=[fz.Input("input", dtype="int64", shape=("batch", 6))])
    program, flat = capture(nn.Embedding(11, 3), plan)
    assert (program.inputs[0].low, program.inputs[0].high) == (0, 10)
    values = sample_inputs(program, {"batch": 64}, seed=0)[0]
    assert values.min() == 0 and values.max() == 10
    agree(program, flat, batch=2)


def test_grad_mode_and_disabled_autocast_regions_are_inlined():
    class Regions(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = x * 2
            with torch.autocast("cpu", enabled=False):
                return x + 1

    program, flat = capture(Regions(), plan_of("batch", 4))
    agree(program, flat, batch=3)


def test_two_symbolic_dims_stay_apart_and_keep_their_bounds():
    class Attend(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(x @ x.transpose(1, 2), -1) @ x

    program, flat = capture(Attend(), plan_of("batch", "sequence", 4, dims={"sequence": fz.Dim(min=2, max=16)}))
    assert program.dims == {"batch": (1, None), "sequence": (2, 16)}
    agree(program, flat, batch=4, sequence=4)
    agree(program, flat, batch=1, sequence=9)


def test_examples_are_checked_against_the_plan_and_used():
    example = torch.full((1, 3), 0.25)
    program, _ = capture(nn.ReLU(), plan_of("batch", 3), [example])
    assert program.inputs[0].shape == ("batch", 3)
    with pytest.raises(fz.PlanError, match="shape"):
        capture(nn.ReLU(), plan_of("batch", 3), [torch.zeros(2, 4)])
    with pytest.raises(fz.PlanError, match="float64"):
        capture(nn.ReLU(), plan_of("batch", 3), [torch.zeros(2, 3, dtype=torch.float64)])


def test_a_dim_whose_bounds_leave_one_size_is_that_size():
    program, flat = capture(nn.Linear(3, 2), plan_of("batch", "fixed", 3, dims={"fixed": fz.Dim(min=4, max=4)}))
    assert program.dims["fixed"] == (4, 4)
    agree(program, flat, batch=5, fixed=4)
