"""The pipeline: the contract of a pass is enforced, and verify= decides how much is proven."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

import fxfreeze as fz
from fxfreeze.capture import capture
from fxfreeze.errors import PassError, PlanError, ProofError
from fxfreeze.passes import PIPELINE
from fxfreeze.pipeline import proof_draws, run_passes, stage_passes
from fxfreeze.program import Program
from fxfreeze.rewrite import STAGES, Context, Ledger, NodeRewrite, NoMatch, Pass, fail

aten = torch.ops.aten


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).relu() - 1


PLAN = fz.Plan(inputs=[fz.Input("x", shape=("batch", 4))])


@pytest.fixture(scope="module")
def captured() -> Program:
    return capture(Small(), PLAN)[0]


@pytest.fixture
def program(captured: Program) -> Program:
    return captured.clone()


def find(program: Program, target: object) -> Node:
    return next(node for node in program.graph.nodes if node.target is target)


class Custom(Pass):
    """A pass made of a function that returns its number of rewrites."""

    name, stage = "custom", "clean"

    def __init__(self, function: Callable[[Program], int]) -> None:
        self.function = function

    def run(self, program: Program, ctx: Context) -> int:
        return self.function(program)


def run(program: Program, function: Callable[[Program], int], **options: object) -> None:
    run_passes(program, [Custom(function)], Context(PLAN), **options)  # type: ignore[arg-type]


# ---- the contract


def swap(program: Program) -> int:
    """A harmless rewrite: relu(x) as the maximum of x and 0."""
    node = find(program, aten.relu.default)
    program.replace(node, program.call(aten.clamp_min.default, node.args[0], 0, before=node, like=node))
    return 1


def test_an_honest_pass_is_accepted_and_recorded(program: Program) -> None:
    rows, prover = run_passes(program, [Custom(swap), Custom(lambda program: 0)], Context(PLAN))
    first, second = rows
    assert (first.name, first.stage, first.exact, first.rewrites, first.error) == ("custom", "clean", True, 1, 0.0)
    assert (first.operators_before, first.operators_after) == (3, 3) and first.seconds > 0
    assert (second.rewrites, second.error) == (0, None) and len(prover.rows) == 1
    assert first.to_json()["rewrites"] == 1


def test_a_wrong_count_is_refused(program: Program) -> None:
    with pytest.raises(PassError, match=r"'custom' reported 0 rewrites, but the program changed"):
        run(program, lambda program: swap(program) - 1)
    with pytest.raises(PassError, match=r"'custom' reported 2 rewrites, but the program did not"):
        run(program, lambda program: 2)


def test_a_new_constant_counts_as_a_change(program: Program) -> None:
    def exchange(program: Program) -> int:
        program.state["fc.weight"] = program.state["fc.weight"].clone()
        return 0

    with pytest.raises(PassError, match="reported 0 rewrites, but the program changed"):
        run(program, exchange)


def test_writing_to_a_constant_in_place_is_refused(program: Program) -> None:
    value = program.state["fc.weight"] = program.state["fc.weight"].clone()

    def scribble(program: Program) -> int:
        program.state["fc.weight"].mul_(1.0)
        return 0

    with pytest.raises(PassError, match=r"wrote to constant 'fc.weight' in place"):
        run(program, scribble)
    assert value._version > 0


def unknown_constant(program: Program) -> int:
    find(program, aten.linear.default).args[1].target = "nobody"  # type: ignore[union-attr]
    return 1


def writes(program: Program) -> int:
    node = find(program, aten.relu.default)
    program.replace(node, program.call(aten.relu_.default, node.args[0], before=node, like=node))
    return 1


def loses_shape(program: Program) -> int:
    program.replace(find(program, aten.relu.default), find(program, aten.linear.default))
    del find(program, aten.linear.default).meta["val"]
    return 1


def wrong_shape(program: Program) -> int:
    program.state["fc.bias"] = torch.zeros(1)
    return 1


def wrong_dtype(program: Program) -> int:
    program.state["fc.bias"] = torch.zeros(3, dtype=torch.float16)
    return 1


def stranger(program: Program) -> int:
    find(program, aten.relu.default).target = torch.relu
    return 1


@pytest.mark.parametrize(
    ("mutant", "problem"),
    [
        (unknown_constant, "its constant is missing"),
        (writes, "it writes to an operand"),
        (loses_shape, "carries no shape"),
        (wrong_shape, r"its constant has shape \(1,\), the node says \(3,\)"),
        (wrong_dtype, "its constant is torch.float16"),
        (stranger, "neither an operator nor a function on sizes"),
    ],
)
def test_an_invalid_result_is_refused_by_name(mutant: Callable[[Program], int], problem: str, program: Program) -> None:
    with pytest.raises(PassError, match=f"'custom' left an invalid program: .*{problem}"):
        run(program, mutant, verify="off")


def new_dtype(program: Program) -> int:
    last = program.output_nodes[0]
    half = program.call(aten.to.dtype, last, torch.float16, before=program.graph.output_node(), like=last)
    program.replace(last, half)
    return 1


def new_rank(program: Program) -> int:
    last = program.output_nodes[0]
    program.replace(last, program.call(aten.unsqueeze.default, last, 0, before=program.graph.output_node(), like=last))
    return 1


def new_input(program: Program) -> int:
    program.inputs = (*program.inputs[:-1], type(program.inputs[0])("y", torch.float32, ("batch", 4)))
    program.replace(find(program, aten.relu.default), find(program, aten.linear.default))
    return 1


@pytest.mark.parametrize("mutant", [new_dtype, new_rank, new_input])
def test_a_changed_interface_is_refused(mutant: Callable[[Program], int], program: Program) -> None:
    with pytest.raises(PassError, match="'custom' changed the interface"):
        run(program, mutant, verify="off")


def test_a_node_rewrite_that_never_ends_is_stopped(program: Program) -> None:
    class Restless(NodeRewrite):
        name, stage, targets = "restless", "clean", (aten.relu.default,)

        def rewrite(self, program: Program, node: Node, ctx: Context) -> bool:
            new = program.call(aten.relu.default, node.args[0], before=node, like=node)
            program.replace(node, new)
            return True

    with pytest.raises(PassError, match="restless still finds something to rewrite after 64 sweeps"):
        run_passes(program, [Restless()], Context(PLAN))


# ---- verify=


def drops_bias(program: Program) -> int:
    node = find(program, aten.linear.default)
    node.args = node.args[:2]
    return 1


@pytest.mark.parametrize(("verify", "draws"), [("full", 2), ("sampled", 1), ("off", 0)])
def test_verify_sets_how_much_is_proven(verify: str, draws: int, program: Program) -> None:
    rows, prover = run_passes(program.clone(), [Custom(swap)], Context(PLAN), verify=verify)  # type: ignore[arg-type]
    assert len(prover.draws) == draws and [row.draws for row in prover.rows] == [draws] * bool(draws)
    assert (rows[0].error is None) == (draws == 0)
    if draws:
        with pytest.raises(ProofError, match="'custom' is not exact"):
            run(program, drops_bias, verify=verify)
    else:
        run(program, drops_bias, verify=verify)


def test_an_unknown_verify_is_refused(program: Program) -> None:
    with pytest.raises(PlanError, match="verify='some'"):
        run(program, swap, verify="some")


def test_draws_differ_in_size_and_spread(program: Program) -> None:
    first, second = (draw[0] for draw in proof_draws(program, "full"))
    assert first.shape[0] + 1 == second.shape[0]
    assert float(second.std()) > 3 * float(first.std())


def test_declared_ranges_and_examples_are_respected(program: Program) -> None:
    program.inputs = tuple(type(spec)(spec.name, spec.dtype, spec.shape, 0.5, 1.0) for spec in program.inputs)
    for (draw,) in proof_draws(program, "full"):
        assert 0.5 <= float(draw.min()) and float(draw.max()) <= 1.0
    example = torch.full((5, 4), 0.7)
    draws = proof_draws(program, "full", [example])
    assert torch.equal(draws[0][0], example) and torch.equal(draws[1][0], torch.full((6, 4), 0.7))
    with pytest.raises(PlanError, match="a value of 7 where the plan declares high=1"):
        proof_draws(program, "full", [10 * example])
    program.dims["batch"] = (1, 5)
    assert [len(draw[0]) for draw in proof_draws(program, "full", [example])] == [5, 5]


# ---- the order of everything


def test_the_pipeline_is_in_stage_order_with_unique_names() -> None:
    assert stage_passes(PIPELINE, STAGES) == list(PIPELINE)
    names = [item.name for item in PIPELINE]
    assert len(set(names)) == len(names)
    assert {item.stage for item in stage_passes(PIPELINE, ["lower"])} == {"lower"}
    with pytest.raises(PassError, match="not in stage order"):
        stage_passes(PIPELINE[::-1], STAGES)


def test_the_pipeline_is_proven_and_idempotent(program: Program) -> None:
    run_passes(program, PIPELINE, Context(PLAN))
    rows, _ = run_passes(program, PIPELINE, Context(PLAN))
    assert [row.name for row in rows if row.rewrites] == []


# ---- FXFREEZE_DEBUG


def test_dumps_show_every_change_and_the_near_misses(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Picky(NodeRewrite):
        name, stage, targets = "picky", "clean", (aten.relu.default, aten.sub.Tensor)

        def rewrite(self, program: Program, node: Node, ctx: Context) -> bool | NoMatch:
            if node.target is aten.sub.Tensor:
                return fail("subtractions are not for me", node)
            return bool(swap(program))

    folder = tmp_path / "dumps"
    monkeypatch.setenv("FXFREEZE_DEBUG", str(folder))
    run_passes(program, [Custom(lambda program: 0), Picky()], Context(PLAN))
    assert sorted(file.name for file in folder.iterdir()) == ["000_capture.py", "001_picky.py"]
    before, after = (file.read_text() for file in sorted(folder.iterdir()))
    assert "aten.relu.default" in before and "aten.clamp_min.default" in after
    assert "# no match at sub: subtractions are not for me" in after
    assert "fc_weight: float32[3, 4] = constant fc.weight" in after
    monkeypatch.delenv("FXFREEZE_DEBUG")
    run_passes(program, [], Context(PLAN))
    assert len(list(folder.iterdir())) == 2


def test_a_row_is_in_the_ledger_once() -> None:
    ledger = Ledger()
    for detail in ("one", "two", "one"):
        ledger.add(site="fc", step="lora", requested="fold", outcome="rewritten", detail=detail)
    again = Ledger(list(ledger))
    again.add(site="fc", step="lora", requested="fold", outcome="rewritten", detail="two")
    again.current_pass = "fold-delta"
    again.add(site="fc", step="lora", requested="fold", outcome="rewritten", detail="two")
    assert [row.detail for row in ledger] == ["one", "two"]
    assert [(row.pass_name, row.detail) for row in again] == [("", "one"), ("", "two"), ("fold-delta", "two")]
