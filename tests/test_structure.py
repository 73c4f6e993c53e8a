"""The regression gate: compiled networks consist of what is stored, and whatever changes that is told in words."""

from __future__ import annotations

import dataclasses
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import fxfreeze as fz
from fxfreeze.program import Program
from fxfreeze.serialize import load_program

ROOT = Path(__file__).resolve().parents[1]
# Only for this import: on sys.path for good, the root would offer its folder `kernels` to every package.
sys.path.insert(0, str(ROOT))
try:
    from benchmarks import structure, structure_cases, structure_counts
    from benchmarks.structure import Change, changes, message
finally:
    sys.path.remove(str(ROOT))

aten = torch.ops.aten
STORED = structure.read()


# ---- the gate


@pytest.mark.slow
@pytest.mark.parametrize("name", structure_cases.ALL)
def test_a_case_is_as_stored(name: str) -> None:
    left_out = structure.ignored(STORED[structure.MADE_WITH], structure_counts.versions())
    stored, found = STORED.get(name, {}), structure_counts.counted(structure_cases.ALL[name])
    told = message(name, changes(stored, found, left_out))
    assert not told, told
    if reasons := [reason for key, reason in left_out.items() if key in stored]:
        pytest.skip("; ".join(reasons))


def test_every_case_is_stored_and_nothing_else() -> None:
    assert list(STORED) == [structure.MADE_WITH, *structure_cases.ALL]


def test_what_folds_leaves_the_bare_network() -> None:
    """Adapters that fold, and masks of single weights, cost no operator, no byte, and change no edge."""
    ours = ("operators", "constants", "bytes", "multiply_accumulates", "hash")
    for name in ("ResNet, LoRA folded", "ResNet, ticket", "transformer, LoRA folded", "GPT-2, LoRA folded"):
        bare = f"{name.partition(',')[0]}, bare"
        assert [STORED[name][key] for key in ours] == [STORED[bare][key] for key in ours]


# ---- seeded mistakes


CASE = dataclasses.replace(structure_cases.ALL["ResNet, bare"], onnx=False)


@pytest.fixture(scope="module")
def artifact() -> fz.Artifact:
    with structure_counts.decided():
        return structure_cases.compiled(CASE)


@pytest.fixture
def program(artifact: fz.Artifact) -> Program:
    return load_program(artifact.folder / "program")


@pytest.fixture(scope="module")
def right(artifact: fz.Artifact) -> dict[str, Any]:
    return structure_counts.of_artifact(artifact)


def told(right: dict[str, Any], program: Program) -> str:
    return message("ResNet", changes(right, {**right, **structure_counts.of_program(program)}))


def calls(program: Program, target: Any) -> list[Any]:
    return program.graph.find_nodes(op="call_function", target=target)


def test_a_fold_that_is_not_done_is_told(right: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from fxfreeze.passes import PIPELINE

    less = tuple(item for item in PIPELINE if item.name != "fold-affine")
    assert len(less) == len(PIPELINE) - 1
    monkeypatch.setattr("fxfreeze.passes.PIPELINE", less)
    text = message("ResNet", changes(right, structure_counts.counted(CASE)))
    assert "operations 20 → 28: +8 batch_norm" in text
    assert "operations after fold 20 → 28" in text and "clean" not in text
    assert "bytes 153,384 → 155,880 (+2,496)" in text and structure.UPDATE in text


def test_a_dead_constant_is_told(right: dict[str, Any], program: Program) -> None:
    (head,) = calls(program, aten.linear.default)
    program.add_constant("left_over", torch.ones(256), before=head, like=head)
    assert "constants 18 → 19 (+1); bytes 153,384 → 154,408 (+1,024)" in told(right, program)


def test_a_redundant_cast_is_told(right: dict[str, Any], program: Program) -> None:
    (head,) = calls(program, aten.linear.default)
    cast = program.call(aten.to.dtype, head.args[0], torch.float32, before=head, like=head)
    head.replace_input_with(head.args[0], cast)
    assert "operations 20 → 21: +1 to" in told(right, program)


def test_a_weight_in_half_precision_is_told(right: dict[str, Any], program: Program) -> None:
    (head,) = calls(program, aten.linear.default)
    half = program.add_constant("half", torch.zeros(32, 10, dtype=torch.float16), before=head, like=head)
    cast = program.call(aten.to.dtype, half, torch.float32, before=head, like=head)
    turned = program.call(aten.t.default, cast, before=head, like=head)
    head.replace_input_with(head.args[1], turned)
    program.sweep()
    assert "bytes 153,384 → 152,744 (-640)" in (text := told(right, program)) and "+1 t, +1 to" in text


def test_another_edge_with_the_same_counts_is_told(right: dict[str, Any], program: Program) -> None:
    second = calls(program, aten.add.Tensor)[1]
    second.args = second.args[::-1]
    assert "another one with the same counts" in told(right, program)


def test_another_argument_is_told(right: dict[str, Any], program: Program) -> None:
    (mean,) = calls(program, aten.mean.dim)
    mean.args = (mean.args[0], [3, 2], *mean.args[2:])
    assert "another one with the same counts" in told(right, program)


# ---- what the hash is of


def test_names_and_values_do_not_count(right: dict[str, Any], program: Program) -> None:
    (head,) = calls(program, aten.linear.default)
    old = head.args[1]
    new = program.add_constant("a.new.name", torch.randn(10, 32), before=head, like=old)
    head.replace_input_with(old, new)
    program.sweep()
    assert told(right, program) == ""


def test_where_a_node_stands_does_not_count(right: dict[str, Any], program: Program) -> None:
    around = next(node for node in calls(program, aten.conv2d.default) if node.args[1].meta["val"].shape[-1] == 1)
    before = structure_counts.structural_hash(program), program.structural_hash()
    around.args[0].append(around)
    for operand in around.args[1:3]:
        around.prepend(operand)
    program.graph.lint()
    assert structure_counts.structural_hash(program) == before[0] and program.structural_hash() != before[1]


def test_a_shared_node_is_not_two_equal_ones(right: dict[str, Any], program: Program) -> None:
    """Of two equal nodes, it counts which of them is read by whom."""
    hashes = set()
    for readers in (0, 1):
        copy = program.clone()
        first = calls(copy, aten.conv2d.default)[0]
        twins = [copy.call(aten.relu.default, first, before=first.next, like=first) for _ in range(2)]
        ends = [
            copy.call(op, twins[0], before=first.next.next.next, like=first)
            for op in (aten.neg.default, aten.abs.default)
        ]
        ends[1].replace_input_with(twins[0], twins[readers])
        hashes.add(structure_counts.structural_hash(copy))
    assert len(hashes) == 2


# ---- what is said


def test_an_improvement_fails_too_and_is_told_kindly() -> None:
    stored = {"operators": {"add": 3, "mul": 2}, "bytes": 4096, "hash": "a"}
    text = message("case", changes(stored, {"operators": {"add": 3}, "bytes": 1024, "hash": "b"}))
    assert text.startswith("case: operations 5 → 3: -2 mul; bytes 4,096 → 1,024 (-3,072).")
    assert "well done" in text and structure.UPDATE in text


def test_less_of_one_and_more_of_another_is_no_improvement() -> None:
    stored = {"operators": {"add": 3}, "bytes": 4096}
    assert "well done" not in message("case", changes(stored, {"operators": {"add": 2}, "bytes": 8192}))


def test_an_exchange_of_operators_is_told() -> None:
    (change,) = changes({"operators": {"mul": 2}}, {"operators": {"add": 1, "mul": 1}})
    assert change == Change("operations 2 → 2: +1 add, -1 mul", 0)
    assert "If that is meant" in message("case", [change])


def test_what_is_missing_on_one_side_is_told() -> None:
    assert changes({}, {"bytes": 1})[0].text == "bytes: not stored yet"
    assert "not counted any more" in changes({"inductor_calls": {"fused": 1}}, {})[0].text


def test_only_numbers_of_other_software_hang_on_its_version() -> None:
    here = dict.fromkeys(("torch", "onnx", "onnxscript", "onnxruntime", "architecture"), "1")
    assert structure.ignored(here, here) == {}
    assert set(structure.ignored({**here, "onnxruntime": "2"}, here)) == {"runtime_nodes"}
    left_out = structure.ignored({**here, "torch": "2"}, here)
    assert not {"operators", "bytes", "hash", "multiply_accumulates", "stages"} & left_out.keys()
    assert changes({"onnx_bytes": 1, "bytes": 1}, {"onnx_bytes": 2, "bytes": 1}, left_out) == []


# ---- the file


def test_the_file_reads_back() -> None:
    tables = {"made_with": {"torch": "2"}, 'a "case", é': {"operators": {"fxfreeze.gate": 1}, "hash": "0"}}
    assert tomllib.loads(structure.written(tables)) == tables
    assert structure.written(STORED) == structure.FILE.read_text(encoding="utf-8")


def test_an_update_of_some_cases_keeps_the_others() -> None:
    stored = {"made_with": {"torch": "1"}, "b": {"bytes": 1}, "gone": {"bytes": 1}}
    new = structure.updated(stored, {"a": {"bytes": 2}}, ["a", "b"], {"torch": "1"})
    assert list(new) == ["made_with", "a", "b"] and new["b"] == {"bytes": 1}
    with pytest.raises(ValueError, match="update all"):
        structure.updated(stored, {"a": {}}, ["a", "b"], {"torch": "2"})


# ---- no clock


def test_no_pass_measures_while_it_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    from fxfreeze.passes import PIPELINE

    before = [item.measure for item in PIPELINE if hasattr(item, "measure")]
    for name in ("sparse_down", "block_sparse", "semi_structured", "gated_linear", "parallel", "selected"):
        module = importlib.import_module(f"fxfreeze.passes.fuse.{name}")
        monkeypatch.setattr(module, "medians", lambda *args: pytest.fail("a clock was read"))
    with structure_counts.decided():
        structure_cases.compiled(structure_cases.ALL["BERT, channels"])
    assert [item.measure for item in PIPELINE if hasattr(item, "measure")] == before


def test_a_pass_with_an_unknown_clock_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxfreeze.passes import PIPELINE
    from fxfreeze.passes.fuse.parallel import MergeParallel

    class Newer(MergeParallel):
        name = "newer"

    monkeypatch.setattr("fxfreeze.passes.PIPELINE", (*PIPELINE, Newer()))
    with pytest.raises(KeyError, match="newer"), structure_counts.decided():
        pass
