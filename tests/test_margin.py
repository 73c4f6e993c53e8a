"""fxfreeze.margin: which elements hang on a decision that rounding can turn, and that no others are left out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxfreeze as fz
from fxfreeze import Input, Plan
from fxfreeze.capture import capture
from fxfreeze.errors import EmitError
from fxfreeze.margin import decided, decides, left_out, share, undecided
from fxfreeze.nn import TverskyProjection
from fxfreeze.parity import check_model, check_target, draw
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


def masks(program, *rows):
    (mask,) = undecided(program, [torch.stack(rows)])
    return mask


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


# ---- helpers


def test_a_mask_of_more_than_half_is_dropped():
    most, half = torch.tensor([True, True, False]), torch.tensor([True, False])
    assert [mask.tolist() for mask in left_out([most, half])] == [[False] * 3, [True, False]]
    assert share(most) == pytest.approx(2 / 3) and share(torch.zeros(0, 3).bool()) == 0


def test_decided_takes_values_of_the_masks_shape_only():
    mask, value, other = torch.tensor([True, False]), torch.tensor([1.0, 2.0]), torch.zeros(2, 2)
    assert [item.tolist() for item in decided(mask, value, value)] == [[2.0], [2.0]]
    assert decided(mask, value, other) == (value, other)


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


def test_other_inputs_are_drawn_where_the_first_leave_too_much_undecided(monkeypatch):
    from fxfreeze import parity

    calls = []

    def sample(program, sizes, seed, examples=None):
        calls.append(seed)
        torch.manual_seed(seed)
        row = torch.randn(WIDTH) if seed >= 1000 else cancelling()
        return [row.expand(sizes["batch"], WIDTH).clone()]

    monkeypatch.setattr(parity, "sample_inputs", sample)
    program, flat = captured(nn.Sequential(head(), nn.Softmax(-1)))
    draws = draw(program, flat)
    assert len(calls) == 2 * len(draws) and not any(mask.any() for item in draws for mask in item.undecided)
