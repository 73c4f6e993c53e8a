"""fxfreeze.margin: which elements hang on a decision that rounding can turn, how far, and that no others may move."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxfreeze as fz
from fxfreeze import Input, Plan, margin
from fxfreeze.capture import capture, check_capture
from fxfreeze.errors import CaptureError, EmitError
from fxfreeze.margin import Decisions, Slack, decides
from fxfreeze.nn import TverskyProjection
from fxfreeze.parity import check_model, check_target, draw
from fxfreeze.proof import checked_run, lifted_run
from fxfreeze.serialize import load_program

WIDTH, FEATURES, PROTOTYPES = 3, 5, 7


class Body(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def captured(model, width=WIDTH, low=None, high=None):
    return capture(model.eval(), Plan(inputs=[Input("x", shape=("batch", width), low=low, high=high)]))


def head():
    """With a first feature that is the sum of a vector's elements."""
    torch.manual_seed(0)
    module = TverskyProjection(WIDTH, PROTOTYPES, features=FEATURES)
    with torch.no_grad():
        module.features.normal_()
        module.prototypes.normal_()
        module.features[0] = 1.0
    return module


def cancelling(tiny=2.0**-26):
    """A vector whose sum is `tiny` in float64; float32 finds that or 0, as the order of its additions has it."""
    return torch.tensor([1.0, tiny, -1.0])


def slacks(program, inputs):
    """Of every output, as all runs give it."""
    decisions = Decisions(program, inputs)
    return tuple(list(decisions.slacks(output))[-1] for output in range(len(program.outputs)))


def masks(program, *rows):
    """Which elements of the only output may move."""
    x = torch.stack(rows)
    (slack,) = slacks(program, [x])
    return torch.zeros(program.run(x)[0].shape, dtype=torch.bool) if slack is None else slack.high > slack.low


# ---- what takes decisions


@pytest.mark.parametrize(
    "function, answer",
    [
        (lambda x: (x > 0) * x, True),
        (lambda x: torch.where(x <= x.mean(), x, 0.0), True),
        (lambda x: x.relu(), False),
        (lambda x: x.relu() * (torch.arange(x.shape[1]) > 1), False),
    ],
    ids=["scalar", "tensor", "none", "integers"],
)
def test_decides(function, answer):
    assert decides(captured(Body(function))[0]) is answer


def test_an_operator_of_ours_decides():
    assert decides(captured(head())[0])


def test_without_decisions_nothing_is_masked():
    program, _ = captured(nn.Linear(WIDTH, 4))
    assert not masks(program, cancelling()).any()


# ---- what hangs on them


def test_a_row_at_the_threshold_and_no_other():
    program, _ = captured(head())
    torch.manual_seed(1)
    found = masks(program, torch.randn(WIDTH), cancelling(), torch.randn(WIDTH))
    assert found[1].any() and not found[0].any() and not found[2].any()


def test_a_prototype_at_the_threshold_and_no_other():
    module = head()
    module.prototypes.data[4] = cancelling()
    program, _ = captured(module)
    torch.manual_seed(1)
    found = masks(program, *torch.randn(20, WIDTH))
    assert found[:, 4].any() and not found[:, [0, 1, 2, 3, 5, 6]].any()


@pytest.mark.parametrize("distance, answer", [(1e-9, True), (1e-7, True), (1e-5, False), (1e-3, False)])
def test_the_margin_is_a_few_roundings(distance, answer):
    """Where the threshold is 0.3 and the sides are about 1, a rounding is about 1e-7."""
    program, _ = captured(Body(lambda x: ((x * 1.0).sum(-1) > 0.3).float()))
    row = torch.tensor([1.0, distance, -0.7]).double()
    row[2] += 0.3 - row.float().double().sum() + distance
    assert bool(masks(program, row.float()).any()) is answer


def test_zeros_that_are_zero_in_every_dtype_are_decided():
    """Masked positions, padding, what a ReLU made 0: a comparison with 0 is no matter of rounding there."""
    program, _ = captured(head())
    assert not masks(program, torch.zeros(WIDTH), torch.randn(WIDTH)).any()
    program, _ = captured(Body(lambda x: (x.relu() > 0).float()))
    assert not masks(program, torch.tensor([-1.0, 0.0, 1.0])).any()


def test_a_decision_without_a_jump_masks_nothing():
    program, _ = captured(Body(lambda x: torch.where(x.sum(-1, keepdim=True) > 0, x.sum(-1, keepdim=True), 0.0)))
    assert not masks(program, cancelling(), torch.ones(WIDTH)).any()


def test_outputs_that_are_decisions():
    program, _ = captured(Body(lambda x: x.sum(-1) > 0))
    assert masks(program, torch.ones(WIDTH), cancelling(), -torch.ones(WIDTH)).tolist() == [False, True, False]


def test_what_follows_a_layer_hangs_on_its_decisions():
    torch.manual_seed(0)
    program, _ = captured(nn.Sequential(head(), nn.Linear(PROTOTYPES, 2), nn.Softmax(-1)))
    found = masks(program, torch.randn(WIDTH), cancelling())
    assert found[1].all() and not found[0].any()


def test_a_folded_program_has_taken_the_decisions_of_its_prototypes():
    """Hence `source`."""
    module = head()
    module.prototypes.data[4] = cancelling()
    source = captured(module)[0]
    artifact = fz.compile(module, Plan(inputs=[Input("x", shape=("batch", WIDTH))], targets=("torch",)))
    folded = load_program(artifact.folder / "program", shapes=False)
    rows = torch.randn(20, WIDTH)
    assert masks(source, *rows)[:, 4].any() and not masks(folded, *rows)[:, 4].any()


def test_a_mask_of_large_numbers_leaves_its_neighbours_decided():
    def function(x):
        scores = torch.where(torch.arange(WIDTH) == 1, -1e9, x)
        return (scores > -0.5).float() * x

    program, _ = captured(Body(function))
    assert not masks(program, torch.tensor([0.1, 1.0, 2.0])).any()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: ((x > (x.sum(-1, keepdim=True) == 0)) * x, (x > 1) * 1.0),
        lambda x: (torch.arange(WIDTH) > x) * x,
        lambda x: torch.greater(x, 0.1) * x,
    ],
    ids=["a bool on the right", "integers on the left", "another name"],
)
def test_sides_of_any_dtype(function):
    program, _ = captured(Body(function))
    assert decides(program)
    slacks(program, [torch.randn(4, WIDTH)])


def test_a_float64_model_has_a_margin_too():
    program, _ = capture(head().double(), Plan(inputs=[Input("x", shape=("batch", WIDTH), dtype="float64")]))
    (slack,) = slacks(program, [torch.stack([cancelling(2.0**-52), torch.ones(3)]).double()])
    assert slack is not None and (slack.high > slack.low)[0].any() and not (slack.high > slack.low)[1].any()


# ---- slack


def test_excess_is_the_distance_from_the_span():
    slack = Slack(torch.tensor([-1.0, 0.0]).double(), torch.tensor([2.0, 0.0]).double())
    assert slack.share == 0.5
    assert slack.excess(torch.tensor([2.5, 0.25]).double()).tolist() == [0.5, 0.25]
    assert slack.excess(torch.tensor([-1.5, -0.25]).double()).tolist() == [0.5, 0.25]
    assert slack.excess(torch.tensor([1.5, 0.0]).double()).tolist() == [0.0, 0.0]
    assert slack.excess(torch.tensor([torch.nan, 0.0]).double())[0].isnan()


def test_two_runs_may_be_as_far_apart_as_the_span_is_wide():
    slack = Slack(torch.tensor([-1.0, 0.0]).double(), torch.tensor([2.0, 0.0]).double())
    other = torch.tensor([4.0, 10.0])
    errors = [slack.relative_error(other + torch.tensor(gap), other) for gap in ([3.0, 0.0], [-3.5, 0.0], [0.0, 1.0])]
    assert errors == pytest.approx([0, 0.05, 0.1])
    assert slack.relative_error(other[:1], other) == float("inf")


# ---- in the checks


def flipped(module, row):
    """The module with the first feature's indicator of prototype `row` turned, as another order of additions would."""
    with torch.no_grad():
        module.prototypes[row, 1] *= -1
    return module


def test_a_model_that_decided_otherwise_is_accepted_and_counted():
    module, other = head(), head()
    module.prototypes.data[4] = cancelling(1.5 * 2.0**-24)
    other.load_state_dict(module.state_dict())
    flipped(other, 4)
    program, flat = captured(module)
    _, other_flat = captured(other)
    with torch.no_grad():
        x = torch.randn(5, WIDTH)
        assert (flat(x)[0] - other_flat(x)[0])[:, 4].abs().max() > 1e-3 * flat(x)[0].abs().max()
        rows = check_model(program, draw(program, other_flat))
    shares = [row.undecided for row in rows]
    # Where the object lacks the feature, it matters to nobody that the prototype may have it.
    assert all(row.ok for row in rows) and 0 < max(shares) <= 1 / PROTOTYPES + 1e-9
    assert max(row.error for row in rows) < 1e-6


def test_what_is_decided_is_still_compared():
    module = head()
    module.prototypes.data[4] = cancelling()
    program, flat = captured(module)
    draws = draw(program, flat)

    def wrong(x):
        (scores,) = program.run(x)
        return (scores * (1 + 1e-4 * (torch.arange(PROTOTYPES) == 3)),)

    with pytest.raises(EmitError, match="does not agree"):
        check_target("mutant", wrong, program, draws)


def test_a_target_with_no_more_than_rounding_waits_for_no_runs(monkeypatch):
    program, flat = captured(head())
    monkeypatch.setattr(margin, "checked_run", lambda *args: pytest.fail("decisions were looked at"))
    rows = check_target("itself", program.run, program, draw(program, flat))
    assert all(row.ok and row.undecided == 0 for row in rows)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, 5.0, -5.0])
def test_what_is_undecided_is_not_anything(wrong):
    module = head()
    module.prototypes.data[4] = cancelling()
    program, flat = captured(module)

    def run(x):
        (scores,) = program.run(x)
        return (torch.where(torch.arange(PROTOTYPES) == 4, scores + wrong, scores),)

    with pytest.raises(EmitError, match="does not agree"):
        check_target("mutant", run, program, draw(program, flat))


def test_where_all_is_undecided_a_wrong_target_is_rejected():
    """Every row is at the threshold, and one of a model and its target has flipped."""
    program, flat = captured(nn.Sequential(head(), nn.Softmax(-1)))
    example = cancelling().expand(4, WIDTH).clone()
    draws = draw(program, flat, examples=[example])
    assert all(list(item.decisions.slacks(0))[-1].share > 0.5 for item in draws)
    rows = check_target("itself", program.run, program, draws)
    assert all(row.undecided > 0.5 for row in rows)
    with pytest.raises(EmitError, match="does not agree"):
        check_target("mutant", lambda x: tuple(value + 0.5 for value in program.run(x)), program, draws)


def test_adapting_a_model_that_decided_otherwise():
    module, other = head(), head()
    module.prototypes.data[4] = cancelling(1.5 * 2.0**-24)
    other.load_state_dict(module.state_dict())
    program, _ = captured(module)
    _, flat = captured(flipped(other, 4))
    x = torch.randn(5, WIDTH)
    check_capture(program, flat, [[x]])
    other.prototypes.data[3] += 1
    with pytest.raises(CaptureError, match="disagrees"):
        check_capture(program, captured(other)[1], [[x]])


def test_decisions_that_cancel_are_seen_one_by_one() -> None:
    """Two gates at their thresholds with opposite weights: both move nothing, and one alone does."""

    class Pair(nn.Module):
        def forward(self, x):
            y = x * (x > 0.3)
            return y[:, :1] - y[:, 1:]

    program, _ = capture(Pair(), fz.Plan([fz.Input("x", ("batch", 2))]))
    (slack,) = slacks(program, [torch.full((4, 2), 0.3)])
    assert slack is not None
    seen = ((slack.low <= -0.3) & (slack.high >= 0.3)).double().mean()
    assert seen >= 0.5


class Gates(nn.Module):
    """Hard gates in a row, each behind a product: what one lets through decides what the next ones do."""

    def __init__(self, depth, width=32):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            h = layer(x)
            x = torch.where(h > 0.1, 3.0 * h, 0.0)
        return x


def near_a_gate(depth, closest):
    """Gates, and rows of which the second has a value of the first layer that far above its gate."""
    model, width = Gates(depth), 32
    x = torch.randn(3, width)
    first = model.layers[0]
    with torch.no_grad():
        short = 0.1 + closest - (first.weight[5].double() @ x[1].double() + first.bias[5])
        x[1] += (short * first.weight[5] / first.weight[5].square().sum()).float()
    return captured(model, width)[0], x


def spans(depth, closest):
    """Slack by row, float64, of the rows near a gate."""
    program, x = near_a_gate(depth, closest)
    (slack,) = slacks(program, [x])
    return slack


def test_a_gate_that_turns_others_lets_any_element_of_its_row_move():
    """Which of the later ones turn is different in every run: the span is the row's, and no other row's."""
    slack = spans(3, 1e-9)
    assert slack.low[1].unique().numel() == slack.high[1].unique().numel() == 1
    assert slack.high[1].min() > 0 and not slack.high[[0, 2]].any() and not slack.low[[0, 2]].any()


def test_slacks_widen_with_the_runs_that_were_asked_for(monkeypatch):
    runs = []
    monkeypatch.setattr(margin, "checked_run", lambda *args: runs.append(args) or checked_run(*args))
    program, x = near_a_gate(3, 1e-9)
    decisions = Decisions(program, [x])
    found = decisions.slacks(0)
    assert next(found) is None and not runs  # whoever is content with that has waited for nothing
    narrow = next(found)
    assert narrow is not None and len(runs) == 3  # the margins are measured in one, decisions shifted in two
    wide = list(found)
    assert len(runs) == 9
    for slack in wide:
        assert (slack.low <= narrow.low).all() and (slack.high >= narrow.high).all()
        narrow = slack
    assert [slack.share for slack in list(decisions.slacks(0))[2:]] == [slack.share for slack in wide]
    assert len(runs) == 9  # of another output, or target, they are there


def test_a_gate_with_none_behind_it_moves_what_hangs_on_it():
    slack = spans(1, 1e-9)
    assert (slack.high > slack.low).nonzero().tolist() == [[1, 5]]
    assert spans(3, 0.01) is None


# ---- top-k


def picking(k, dim=-1, largest=True):
    """The numbers 1, 2, 4, … of the columns that are picked, added up; x is summed up first, so that it is rounded."""

    def function(x):
        values = torch.stack([x[:, :3].sum(-1), x[:, 3], x[:, 4]], dim)
        ids = values.topk(k, dim, largest).indices
        return (2.0**ids).sum(dim)

    return captured(Body(function), width=5)[0]


def row(*values):
    """Of which the first three add up to 2⁻²⁶."""
    return torch.tensor([1.0, 2.0**-26, -1.0, *values])


@pytest.mark.parametrize("dim", [-1, 0])
@pytest.mark.parametrize("k, largest, moves", [(1, True, False), (2, True, True), (1, False, True), (3, True, False)])
def test_what_is_picked_where_two_are_as_good(k, largest, moves, dim):
    """0 and 2⁻²⁶ beside 1: which of the two is the larger is decided in rounding; beside −1 it does not matter."""
    program = picking(k, dim, largest)
    assert bool(masks(program, row(0.0, 1.0)).any()) is moves
    assert not masks(program, row(0.5, 1.0)).any()


def test_a_top_k_that_is_not_close_is_not_run_again():
    assert decides(picking(1))
    assert slacks(picking(1), [torch.stack([row(0.5, 1.0)])]) == (None,)


def test_the_order_of_what_is_picked():
    program, _ = captured(Body(lambda x: torch.stack([x[:, :3].sum(-1), x[:, 3]], -1).topk(2).indices), width=4)
    assert masks(program, row(0.0)).all() and not masks(program, row(0.5)).any()


def test_values_that_are_picked_are_as_they_were():
    values = torch.tensor([[3.0, 1.0, 2.5, 0.0]]).double()
    with margin._Comparisons(lambda left, right: left + 1.0, margin._shift_neighbours):
        picked, ids = values.topk(1)
    assert ids.item() == 2 and picked.item() == 2.5
    program, _ = captured(Body(lambda x: torch.stack([x[:, :3].sum(-1), x[:, 3]], -1).topk(1).values), width=4)
    assert not masks(program, row(0.0), row(1.0)).any()


def test_every_candidate_may_be_picked():
    program, _ = captured(Body(lambda x: (x[:, :1] + x[:, 1:] - x[:, :1]).topk(1).indices), width=4)
    (slack,) = slacks(program, [torch.tensor([[1.0, 0.0, 2.0**-26, 2.0**-27]])])
    assert slack.high.item() == 2.0 or slack.low.item() == -2.0 or float(slack.high - slack.low) >= 1


def test_equal_in_every_dtype_is_decided():
    program, _ = captured(Body(lambda x: x.relu().topk(2).values.sum(-1)), width=4)
    assert not masks(program, -torch.ones(4)).any()


class Rounded(nn.Module):
    """Integers of x, and their mean."""

    def __init__(self, zero: int = 0) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(0.1))
        self.register_buffer("zero", torch.tensor(zero, dtype=torch.int8))

    def forward(self, x):
        whole = torch.ops.fxfreeze.quantize(x.mul(3).div(3), self.scale, self.zero, 0, 0, -128, 127)
        return torch.ops.fxfreeze.dequantize(whole, self.scale, self.zero, 0, 0, torch.float32)


def rounded(x):
    import fxfreeze.kernels.dequantize
    import fxfreeze.kernels.quantize  # noqa: F401

    program, _ = capture(Rounded().eval(), Plan(inputs=[Input("x", shape=tuple(x.shape))]))
    return program, slacks(program, [x])[0]


def test_halfway_between_two_integers_it_may_be_either():
    x = torch.tensor([[0.12, 0.24, 0.25, -0.35, 0.33]])
    _, slack = rounded(x)
    moves = (slack.high - slack.low) > 0.09
    assert moves.tolist() == [[False, False, True, True, False]]


def test_away_from_there_an_integer_is_decided():
    assert rounded(torch.tensor([[0.1, 0.24, 0.26, -0.34, 0.3]]))[1] is None


def test_one_integer_off_is_more_than_rounding():
    x = torch.tensor([[0.1, 0.24, 0.25, -0.35, 0.3]])
    program, slack = rounded(x)
    (right,) = lifted_run(program, [x])
    wrong = right + torch.tensor([[0.1, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    assert float(slack.excess(wrong - right).max()) > 0.09


class Float8(nn.Module):
    """x, computed, as float8 has it."""

    def forward(self, x):
        from fxfreeze.kernels.quantize_float8 import KERNEL

        return KERNEL.op(x.mul(3).div(3), torch.full((), 0.5, dtype=torch.float32)).to(x.dtype)


def test_halfway_between_two_numbers_of_float8_it_may_be_either():
    x = torch.tensor([[0.6, 0.53125, 0.56, -31.0, 0.3]])  # in steps of a half 1.0625 and -62 lie halfway
    program, _ = capture(Float8().eval(), Plan(inputs=[Input("x", shape=tuple(x.shape))]))
    moves = slacks(program, [x])[0]
    assert ((moves.high - moves.low) > 0.01).tolist() == [[False, True, False, True, False]]
    away = torch.tensor([[0.6, 0.54, 0.56, -32.0, 0.3]])
    assert slacks(program, [away])[0] is None
