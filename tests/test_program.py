"""The IR: clones are independent, the sweep is exact, the hash is stable, and the user's tensors are never touched."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.api import rewrite
from fxfreeze.capture import capture
from fxfreeze.constants import Recipe
from fxfreeze.errors import PassError
from fxfreeze.program import Fold, Program

aten = torch.ops.aten
PLAN = fz.Plan(inputs=[fz.Input("x", shape=("batch", 3, 6, 6))])


class Net(nn.Module):
    def __init__(self, names: tuple[str, str] = ("conv", "fc")) -> None:
        super().__init__()
        self.names = names
        self.add_module(names[0], nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()))
        self.add_module(names[1], nn.Linear(4, 2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = getattr(self, self.names[0])(x).mean((2, 3))
        return {"logits": getattr(self, self.names[1])(features), "features": features + x.shape[0]}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def captured(model: nn.Module) -> Program:
    return capture(model, PLAN)[0]


@pytest.fixture
def program(captured: Program) -> Program:
    return captured.clone()


def node(program: Program, target: object) -> torch.fx.Node:
    return next(item for item in program.graph.nodes if item.target is target)


def digest(model: nn.Module) -> str:
    sha = hashlib.sha256()
    for name, value in model.state_dict().items():
        sha.update(name.encode() + value.numpy().tobytes() + str(value._version).encode())
    return sha.hexdigest()


# ---- cloning


def test_a_clone_shares_tensors_and_nothing_else(captured: Program) -> None:
    text, fingerprint = str(captured), captured.fingerprint()
    clone = captured.clone()
    assert str(clone) == text and clone.fingerprint() == fingerprint
    assert all(clone.state[name] is value for name, value in captured.state.items())
    relu = node(clone, aten.relu.default)
    relu.meta["nn_module_stack"] = {}
    clone.replace(relu, relu.args[0])  # type: ignore[arg-type]
    clone.sweep()
    clone.state["more"] = torch.zeros(1)
    clone.dims["batch"] = (3, 3)
    clone.folds["conv.0.weight"] = Fold("a", "b", Recipe(torch.zeros(1)), 0.5)
    assert str(captured) == text and captured.fingerprint() == fingerprint
    assert captured.dims == {"batch": (1, None)} and captured.folds == {} and "more" not in captured.state


# ---- sweep


def test_the_sweep_drops_what_nothing_reads_and_only_that(program: Program) -> None:
    assert program.sweep() == 0
    norm = node(program, aten.batch_norm.default)
    program.folds["conv.1.weight"] = Fold("a", "b", Recipe(torch.zeros(4)), 0.5)
    program.replace(norm, norm.args[0])  # type: ignore[arg-type]
    assert program.sweep() == 1
    assert set(program.state) == {"conv.0.weight", "fc.weight", "fc.bias"} and program.folds == {}
    program.verify()


def test_the_sweep_keeps_inputs_and_assertions(program: Program) -> None:
    relu = node(program, aten.relu.default)
    total = program.call(aten.sum.default, relu, before=program.graph.output_node(), like=relu)
    program.call(aten._assert_async.default, total, before=program.graph.output_node(), like=relu)
    assert program.sweep() == 0
    program.replace(relu, relu.args[0])  # type: ignore[arg-type]
    assert len(program.placeholders) == 1


# ---- verify


def test_verify_names_what_is_wrong(captured: Program) -> None:
    def broken(change: object) -> str:
        program = captured.clone()
        change(program)  # type: ignore[operator]
        with pytest.raises(PassError) as caught:
            program.verify()
        return str(caught.value)

    def lose(program: Program) -> None:
        del program.state["fc.weight"]

    def meta(program: Program) -> None:
        del node(program, aten.relu.default).meta["val"]

    def scalar_output(program: Program) -> None:
        program.graph.output_node().args = (program.output_nodes[0],)

    def fewer_outputs(program: Program) -> None:
        program.graph.output_node().args = (program.output_nodes[:1],)

    def module_call(program: Program) -> None:
        item = node(program, aten.relu.default)
        item.op, item.target = "call_method", "relu"

    def disorder(program: Program) -> None:
        relu = node(program, aten.relu.default)
        relu.append(relu.args[0])  # type: ignore[arg-type]

    assert "its constant is missing" in broken(lose)
    assert "carries no shape" in broken(meta) and "conv.2" in broken(meta)
    assert "not a flat tuple" in broken(scalar_output)
    assert "1 results for 2 declared outputs" in broken(fewer_outputs)
    assert "malformed" in broken(disorder)
    assert "no place in a Program" in broken(module_call) or "malformed" in broken(module_call)
    assert "1 placeholders for 0" in broken(lambda program: setattr(program, "inputs", ()))


def test_a_call_that_does_not_fit_raises_and_leaves_nothing(program: Program) -> None:
    text, relu = str(program), node(program, aten.relu.default)
    with pytest.raises(PassError, match="refuses these operands"):
        program.call(aten.matmul.default, relu, relu, relu, before=relu, like=relu)
    assert str(program) == text


# ---- hashes


def test_the_structural_hash_ignores_names_and_values(captured: Program) -> None:
    torch.manual_seed(1)
    other = capture(Net(("stem", "head")).eval(), PLAN)[0]
    assert other.structural_hash() == captured.structural_hash()
    assert other.fingerprint() != captured.fingerprint()


def test_the_structural_hash_sees_every_change_of_structure(captured: Program) -> None:
    seen = {captured.structural_hash()}

    def changed(change: object) -> None:
        program = captured.clone()
        change(program)  # type: ignore[operator]
        assert program.structural_hash() not in seen
        seen.add(program.structural_hash())

    def set_arg(target: object, index: int, value: object) -> object:
        return lambda program: node(program, target).update_arg(index, value)

    def narrow(program: Program) -> None:
        weight = next(item for item in program.graph.nodes if item.target == "fc.weight")
        program.state["fc.weight"] = program.state["fc.weight"].bfloat16()
        weight.meta["val"] = weight.meta["val"].to(torch.bfloat16)

    changed(set_arg(aten.batch_norm.default, 7, 1e-3))
    changed(set_arg(aten.mean.dim, 1, [3, 2]))
    changed(narrow)
    changed(lambda program: setattr(node(program, aten.relu.default), "target", aten.sigmoid.default))


HASH = """
import torch
from fxfreeze.constants import Constants
from fxfreeze.program import Program

graph = torch.fx.Graph()
size = graph.call_function(torch.sym_max, (3, 2.0))
graph.output((graph.call_function(torch.ops.aten.full.default, ([size], 1), {"dtype": torch.float16}),))
digest = Program(graph, Constants(), (), ("ones",), {}).structural_hash()
"""


def test_the_structural_hash_is_the_same_in_another_process() -> None:
    here: dict[str, str] = {}
    exec(HASH, here)
    there = subprocess.run(
        [sys.executable, "-c", HASH + "print(digest)"], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONHASHSEED": "1"},
    )  # fmt: skip
    assert len(here["digest"]) == 64 and there.stdout.strip() == here["digest"]


def test_the_fingerprint_sees_new_and_overwritten_constants(program: Program) -> None:
    before = program.fingerprint()
    program.state["fc.bias"] = program.state["fc.bias"].clone()
    renewed = program.fingerprint()
    program.state["fc.bias"].add_(0)
    assert len({before, renewed, program.fingerprint()}) == 3


def test_a_second_fingerprint_sees_what_changed_since_the_first(program: Program) -> None:
    def fresh() -> str:
        return program.clone().fingerprint()

    relu = node(program, aten.relu.default)

    def negate() -> None:
        relu.target = aten.neg.default

    def add() -> None:
        relu.target, relu.args, relu.kwargs = aten.add.Tensor, (relu.args[0], relu.args[0]), {"alpha": 2}

    def more() -> None:
        relu.kwargs = {"alpha": 3}

    def bypass() -> None:
        program.replace(relu, relu.args[0])  # type: ignore[arg-type]

    def rename() -> None:
        program.inputs = (replace(program.inputs[0], name="other"), *program.inputs[1:])

    seen = [program.fingerprint()]
    for edit in (negate, add, more, bypass, program.sweep, rename):
        assert program.fingerprint() == seen[-1]
        edit()
        seen.append(program.fingerprint())
        assert seen[-1] == fresh(), edit
    assert len(set(seen)) == len(seen)


# ---- constants


def test_a_fold_is_computed_once_until_something_else_is_folded_in(program: Program) -> None:
    weight = node(program, aten.linear.default).args[1]
    assert isinstance(weight, torch.fx.Node)
    name, calls = str(weight.target), list[int]()

    def double(value: Tensor) -> Tensor:
        calls.append(1)
        return value * 2

    program.state[name] = program.state.recipe(name).then(double)
    with program.computed_once():
        first = program.stored(weight)
        assert program.stored(weight) is first and len(calls) == 1 and first.dtype == weight.meta["val"].dtype
        program.state[name] = program.state.recipe(name).then(lambda value: value + 1)
        assert torch.equal(program.stored(weight), first + 1)
    assert program.stored(weight) is not program.stored(weight)


def test_a_table_in_float64_is_rounded_once_and_programs_keep_together(program: Program) -> None:
    weight = node(program, aten.linear.default).args[1]
    assert isinstance(weight, torch.fx.Node)
    name = str(weight.target)
    program.state[name] = program.state[name].double()
    other = program.clone()
    twin = next(item for item in other.graph.nodes if item.name == weight.name)
    with program.computed_once(other):
        first = program.stored(weight)
        assert first.dtype == torch.float32 and program.stored(weight) is first and other.stored(twin) is first
        with other.computed_once():
            assert other.stored(twin) is first
        other.state[name] = other.state[name] + 1
        assert torch.equal(other.stored(twin), (program.state[name] + 1).float())
    assert other.stored(twin) is not other.stored(twin) and program.stored(weight) is not first


def test_rebind_changes_one_reader_only(program: Program) -> None:
    relu, weight = node(program, aten.relu.default), node(program, aten.linear.default).args[1]
    assert isinstance(weight, torch.fx.Node)
    linear, value = node(program, aten.linear.default), torch.ones(2, 4, dtype=torch.float64)
    assert program.rebind(weight, value, user=linear) is weight and program.state["fc.weight"] is value
    second = program.call(aten.mul.Tensor, weight, 2, before=relu, like=relu)
    other = program.rebind(weight, value + 1, user=linear)
    assert other is not weight and other.target == "fc.weight_1"
    assert linear.args[1] is other and second.args[0] is weight
    assert other.meta["val"].dtype == torch.float32 and program.state["fc.weight"] is value
    program.graph.erase_node(second)
    program.verify()


def test_sites_and_paths(captured: Program) -> None:
    sites = captured.sites()
    assert [str(item.target) for item in sites["conv.1"]] == ["aten.batch_norm.default"]
    assert captured.module_paths()["fc"].endswith("Linear") and "conv" in captured.module_paths()
    assert captured.where(sites["fc"][0]).startswith("fc (aten.linear.default")


# ---- executing


def test_every_way_to_run_agrees(model: nn.Module, captured: Program) -> None:
    x = torch.randn(5, 3, 6, 6)
    with torch.no_grad():
        expected = model(x)
    module = captured.graph_module()
    for results in (captured.run(x), module(x)):
        assert torch.equal(results[0], expected["logits"]) and torch.equal(results[1], expected["features"])
    assert captured.outputs == ("logits", "features")
    assert set(module.state_dict()) == set(captured.state) and not list(module.parameters())


def test_a_graph_module_holds_storage_dtypes_and_trainable_copies(program: Program) -> None:
    program.state["fc.weight"] = program.state["fc.weight"].double()
    original = program.state["fc.bias"]
    module = program.graph_module(trainable=["fc.bias"])
    assert module.state_dict()["fc.weight"].dtype == torch.float32
    assert [name for name, value in module.named_parameters() if value.requires_grad] == ["fc.bias"]
    module(torch.randn(2, 3, 6, 6))[0].sum().backward()
    with torch.no_grad():
        module.get_parameter("fc.bias").add_(1)
    assert program.state["fc.bias"] is original and not torch.equal(module.get_parameter("fc.bias"), original)
    assert program.state["fc.weight"].dtype == torch.float64


def test_names_that_mean_something_to_a_module_are_no_trouble() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.graph, self.code = nn.Linear(2, 2), nn.Parameter(torch.ones(2))
            self.training_ = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.training_(self.graph(x)) + self.code

    odd = Odd()
    program, _ = capture(odd, fz.Plan(inputs=[fz.Input("x", shape=("batch", 2))]))
    x = torch.randn(3, 2)
    assert torch.equal(program.graph_module()(x)[0], odd(x))


def test_the_users_model_is_never_changed(model: nn.Module) -> None:
    before, training = digest(model), model.training
    program = rewrite(model, PLAN).program
    assert digest(model) == before and model.training == training
    # Constants that no pass replaced are the user's own memory.
    assert program.state["fc.weight"].data_ptr() == model.fc.weight.data_ptr()  # type: ignore[union-attr]
    assert not any(value.requires_grad for value in program.state.values())
