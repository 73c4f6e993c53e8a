"""fxfreeze.parity: what it accepts, and the wrong targets it must reject."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from fxfreeze import Input, Plan
from fxfreeze.capture import capture
from fxfreeze.errors import EmitError
from fxfreeze.parity import MODEL, Draws, check_model, check_target, compare, draw, floor


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, x):
        logits = self.body(x)
        return logits, logits.argmax(-1), logits > 0


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model = Net().eval()
    program, flat = capture(model, Plan(inputs=[Input("x", shape=("batch", 16))]))
    return program, flat, draw(program, flat)


def wrong(program, change):
    """A runner whose first call's outputs pass through `change`."""
    return lambda x: change(*program.run(x))


def test_the_model_itself_passes(net):
    program, _, draws = net
    rows = check_model(program, draws) + check_target("eager", program.run, program, draws)
    assert {row.target for row in rows} == {MODEL, "eager"}
    assert [row.sizes["batch"] for row in rows[:9:3]] == [item.sizes["batch"] for item in draws]
    assert len({row.sizes["batch"] for row in rows}) == 3 and min(row.sizes["batch"] for row in rows) == 1
    assert all(row.ok and row.repeats_equal and row.inputs_unchanged and not row.detail for row in rows)
    assert all(row.tolerance < 2e-5 for row in rows)
    assert all(row.to_json()["output"] in ("output_0", "output_1", "output_2") for row in rows)


MUTANTS = {
    "scaled by 1 + 1e-4": (lambda a, b, c: (a * (1 + 1e-4), b, c), "output_0"),
    "one element off": (lambda a, b, c: (a + 1e-4 * a.abs().max() * torch.eye(*a.shape), b, c), "output_0"),
    "another dtype": (lambda a, b, c: (a.double(), b, c), "torch.float64"),
    "another shape": (lambda a, b, c: (a[:, :7], b, c), "instead of"),
    "NaN": (lambda a, b, c: (torch.where(a == a.max(), math.nan, a), b, c), "NaN"),
    "Inf": (lambda a, b, c: (torch.where(a == a.max(), math.inf, a), b, c), "NaN or Inf"),
    "another class": (lambda a, b, c: (a, (b + 1) % 8, c), "output_1"),
    "a bool flipped": (lambda a, b, c: (a, b, c ^ (a == a.max())), "output_2"),
    "an output short": (lambda a, b, c: (a, b), "2 outputs of 3"),
}


def test_a_target_is_held_to_what_it_computes_of_the_program(net):
    program, flat, _ = net

    def computes(found):
        other = found.clone()
        for node in [node for node in other.graph.nodes if "relu" in str(node.target)]:
            node.target = torch.ops.aten.tanh.default
        return other

    draws, other = Draws(program, flat), computes(program)
    check_target("eager", program.run, program, draws.of())
    check_target("other", other.run, program, draws.of(computes))
    assert draws.of(computes) is draws.of(computes) is not draws.of()
    assert draws.of(lambda found: found) is draws.of()
    with pytest.raises(EmitError, match="other"):
        check_target("other", other.run, program, draws.of())
    with pytest.raises(EmitError, match="eager"):
        check_target("eager", program.run, program, draws.of(computes))


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_target_is_rejected(mutant, net):
    program, _, draws = net
    change, message = MUTANTS[mutant]
    with pytest.raises(EmitError, match=message):
        check_target("mutant", wrong(program, change), program, draws)


def test_a_target_that_is_wrong_only_beyond_batch_1_is_rejected(net):
    program, _, draws = net

    def run(x):
        logits, top, positive = program.run(x)
        return (logits[:1].expand_as(logits), top[:1].expand_as(top), positive[:1].expand_as(positive))

    with pytest.raises(EmitError, match="output_0"):
        check_target("mutant", run, program, draws)


def test_a_target_that_is_wrong_only_the_second_time_is_rejected(net):
    program, _, draws = net
    calls = itertools.count()
    with pytest.raises(EmitError):
        check_target("mutant", lambda x: program.run(x if next(calls) % 3 == 0 else 2 * x), program, draws)


@pytest.mark.parametrize("write", [lambda x: x.mul_(1.0 + 1e-7), lambda x: x[:, :1].add_(1), lambda x: x.zero_()])
def test_a_target_that_writes_to_its_inputs_is_rejected(write, net):
    program, _, draws = net

    def run(x):
        result = program.run(x)
        write(x)
        return result

    with pytest.raises(EmitError, match="writes to its inputs"):
        check_target("mutant", run, program, draws)


def test_the_draws_themselves_stay_what_they_are(net):
    program, flat, _ = net
    draws = draw(program, flat)
    before = [item.inputs[0].clone() for item in draws]
    with pytest.raises(EmitError):
        check_target("mutant", lambda x: (x.zero_(), *program.run(x)[1:]), program, draws)
    assert all(torch.equal(item.inputs[0], old) for item, old in zip(draws, before, strict=True))


def test_a_target_that_reuses_its_output_memory_is_rejected(net):
    program, _, draws = net
    buffer = torch.empty(100, 8)
    calls = itertools.count()

    def run(x):
        logits, top, positive = program.run(x)
        held = buffer[: len(x)]
        held.copy_(logits * (1 + 1e-7 * (next(calls) % 3)))
        return held, top, positive

    with pytest.raises(EmitError, match="overwrites"):
        check_target("mutant", run, program, draws)


def test_repeats_that_differ_within_the_bound_are_recorded(net):
    program, _, draws = net
    calls = itertools.count()

    def run(x):
        logits, top, positive = program.run(x)
        return logits * (1 + 1e-6 * (next(calls) % 3)), top, positive

    rows = check_target("unsteady", run, program, draws)
    assert [row.repeats_equal for row in rows[:3]] == [False, True, True] and all(row.ok for row in rows)


def test_a_target_that_fails_is_named_with_the_sizes(net):
    program, _, draws = net
    with pytest.raises(EmitError, match=r"'broken' does not run at sizes \{'batch': 1\}: boom"):
        check_target("broken", lambda x: (_ for _ in ()).throw(ValueError("boom")), program, draws)


def test_the_error_shows_the_table(net):
    program, _, draws = net
    with pytest.raises(EmitError) as caught:
        check_target("mutant", wrong(program, MUTANTS["scaled by 1 + 1e-4"][0]), program, draws)
    assert "batch=1" in str(caught.value) and "1.0e-04" in str(caught.value) and "NO" in str(caught.value)


def test_a_program_that_is_not_the_model_is_rejected(net):
    program, flat, _ = net
    torch.manual_seed(1)
    with pytest.raises(EmitError, match="eager torch"):
        check_model(program, draw(program, Net().eval()))
    check_model(program, draw(program, lambda x: flat(x)))


def test_a_model_that_writes_to_its_inputs_does_not_spoil_them(net):
    program, flat, _ = net
    check_model(program, draw(program, lambda x: [flat(x), x.zero_()][0]))


def test_a_model_that_does_not_run_at_a_size_is_reported(net):
    program, _, _ = net

    def model(x):
        if len(x) < 2:
            raise RuntimeError("too small")
        return program.run(x)

    with pytest.raises(EmitError, match=r"does not run at sizes \{'batch': 1\}: too small"):
        draw(program, model)


def test_an_output_of_nothing_but_nan_is_no_evidence():
    program, flat = capture(nn.ReLU(), Plan(inputs=[Input("x", shape=("batch", 2))]))
    with pytest.raises(EmitError, match="nothing to compare"):
        draw(program, flat, examples=[torch.full((2, 2), math.nan)])


def test_fixed_shapes_and_no_reference():
    program, _ = capture(nn.Linear(4, 2).eval(), Plan(inputs=[Input("x", shape=(3, 4))]))
    draws = draw(program)
    assert [item.sizes for item in draws] == [{}]
    assert all(row.ok for row in check_target("eager", program.run, program, draws))


T = torch.tensor


@pytest.mark.parametrize(
    ("actual", "truth", "eager", "error"),
    [
        (T([1.0, 2.0]), T([1.0, 2.0]).double(), T([1.0, 2.0]), 0.0),
        (T([1.0, 2.5]), T([1.0, 2.0]).double(), T([1.0, 2.0]), 0.25),
        (T([1.0, math.nan]), T([1.0, math.nan]).double(), T([1.0, math.nan]), 0.0),
        (T([1.0, 2.0]), T([1.0, math.nan]).double(), T([1.0, math.nan]), math.inf),
        (T([1.0, math.inf]), T([1.0, 1e300]).double(), T([1.0, math.inf]), 0.0),
        (T([1.0, -math.inf]), T([1.0, math.inf]).double(), T([1.0, math.inf]), math.inf),
        (T([1.0, math.inf]), T([1.0, 2.0]).double(), T([1.0, 2.0]), math.inf),
        (T([0.0, 0.0]), T([0.0, 0.0]).double(), T([0.0, 0.0]), 0.0),
        (T([0.0, 1e-30]), T([0.0, 0.0]).double(), T([0.0, 0.0]), math.inf),
        (T([1, 2, 3, 4]), T([1, 2, 3, 5]), T([1, 2, 3, 5]), 0.25),
        (T([True, False]), T([True, True]), T([True, False]), 0.5),
        (T([1.0 + 1.0j]), T([1.0 + 0.0j]).to(torch.complex128), T([1.0 + 0.0j]), 1.0),
        (torch.empty(0), torch.empty(0).double(), torch.empty(0), 0.0),
        (T(1.0), T([1.0]).double(), T([1.0]), math.inf),
        (T([1.0]).half(), T([1.0]).double(), T([1.0]), math.inf),
    ],
)
def test_compare(actual, truth, eager, error):
    assert compare(actual, truth, eager)[0] == error


def test_the_floor_can_be_broken_in_every_dtype():
    assert floor(torch.float64) < floor(torch.float32) < 2e-5
    assert max(floor(torch.float16), floor(torch.bfloat16)) < 0.05
    assert floor(torch.int64) == floor(torch.bool) == 0
