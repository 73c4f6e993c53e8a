"""fxfreeze.lower: the one re-export, and the decomposition of our own operators."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from fxfreeze import Dim, Input, Plan, lower
from fxfreeze.capture import capture
from fxfreeze.errors import EmitError
from fxfreeze.lower import Lowering, emit_error, export


def targets(exported):
    return {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}


def test_the_torch_target_takes_the_programs_own_module(built):
    assert isinstance(lower.lower(built.program, "torch"), GraphModule)
    assert isinstance(lower.lower(built.program, "onnx"), torch.export.ExportedProgram)


def test_named_dims_stay_dynamic_and_module_paths_stay(built):
    before = built.program.structural_hash()
    exported = export(built.program)
    image, steps = (
        node.meta["val"].shape
        for node in exported.graph.nodes
        if node.op == "placeholder" and node.name in exported.graph_signature.user_inputs
    )
    assert str(image[0]) == str(steps[0]) and not str(image[0]).isdigit()
    assert list(image[1:]) == [3, 8, 8]
    bounds = {str(symbol): limits for symbol, limits in exported.range_constraints.items()}
    assert bounds[str(steps[1])].upper == 32
    conv = next(node for node in exported.graph.nodes if "conv2d" in str(node.target))
    assert "stem.0" in [path for path, _ in conv.meta["nn_module_stack"].values()]
    assert not any(
        "stack_trace" in node.meta and "conftest" in node.meta["stack_trace"] for node in exported.graph.nodes
    )
    for batch in (1, 3):
        inputs = torch.randn(batch, 3, 8, 8), torch.randn(batch, 2)
        torch.testing.assert_close(exported.module()(*inputs), built.program.run(*inputs))
    assert built.program.structural_hash() == before


def test_a_dim_of_one_size_is_static():
    program, _ = capture(nn.Linear(2, 2).eval(), Plan(inputs=[Input("x", shape=("n", 2))]))
    program.dims["n"] = (3, 3)
    assert lower.dynamic_shapes(program.inputs, program.dims) == ({},)
    assert export(program).module()(torch.ones(3, 2))[0].shape == (3, 2)


class Shifted(nn.Module):
    """Whether x[:, 1:] is contiguous depends on its length being 1: a guard, though every length computes the same."""

    def forward(self, x):
        return torch.nn.functional.pad(x[:, 1:], (0, 0, 0, 1)) + x


def test_a_guard_on_the_layout_does_not_narrow_a_declared_dim():
    shape = ("batch", "length", 4)
    program, _ = capture(Shifted().eval(), Plan(inputs=[Input("x", shape=shape)], dims={"length": Dim(min=2, max=9)}))
    exported = export(program)
    assert not any("assert" in name for name in targets(exported))
    for length in (2, 3, 9):
        x = torch.randn(2, length, 4)
        assert torch.equal(exported.module()(x)[0], Shifted()(x))


@pytest.fixture
def own_operator():
    with torch.library._scoped_library("fxfreeze_test", "DEF") as library:
        library.define("gate(Tensor x, float threshold) -> Tensor")
        library.impl("gate", lambda x, threshold: torch.where(x > threshold, x, 0), "CompositeExplicitAutograd")
        library.impl("gate", lambda x, threshold: torch.empty_like(x), "Meta")
        yield torch.ops.fxfreeze_test.gate.default


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return torch.ops.fxfreeze_test.gate(self.linear(x), 0.25)


def reference(x, threshold):
    return torch.where(x > threshold, x, torch.zeros_like(x))


def test_our_operators_become_their_reference_and_nothing_else_changes(own_operator):
    program, _ = capture(Gated().eval(), Plan(inputs=[Input("x", shape=("n", 4))]))
    assert "fxfreeze_test.gate.default" in targets(export(program))
    exported = export(program, table={own_operator: reference})
    assert "fxfreeze_test.gate.default" not in targets(exported)
    assert {"aten.linear.default", "aten.where.self"} <= targets(exported)
    for n in (1, 5):
        x = torch.randn(n, 4)
        torch.testing.assert_close(exported.module()(x), program.run(x))


def test_the_table_is_read_from_the_kernels(own_operator, monkeypatch):
    assert isinstance(lower.references(), dict)
    kernel = type("Kernel", (), {"op": own_operator, "reference": staticmethod(reference)})
    monkeypatch.setitem(sys.modules, lower._KERNELS, types.SimpleNamespace(OPS={"gate": kernel}))
    assert lower.references() == {own_operator: reference}
    program, _ = capture(Gated().eval(), Plan(inputs=[Input("x", shape=("n", 4))]))
    assert "fxfreeze_test.gate.default" not in targets(Lowering(program).exported)


def test_the_program_is_exported_once(built, monkeypatch):
    lowering = Lowering(built.program)
    first = lowering.exported
    monkeypatch.setattr(lower, "export", lambda *args, **kwargs: pytest.fail("exported again"))
    assert lowering.exported is first


def test_an_error_says_which_module_was_at_work(built):
    node = next(node for node in built.program.graph.nodes if "linear" in str(node.target))

    def compiler(node):
        raise ValueError("no such thing\nsecond line")

    try:
        try:
            compiler(node)
        except ValueError as inner:
            raise RuntimeError("see above") from inner
    except RuntimeError as error:
        found = emit_error("refused", error)
    assert isinstance(found, EmitError)
    assert found.where == "head, aten.linear.default"
    assert found.what == "refused: ValueError: no such thing second line"


def test_a_program_that_torch_refuses_is_an_emit_error(built, monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("no")

    monkeypatch.setattr(torch.export, "export", refuse)
    with pytest.raises(EmitError, match="cannot be exported: ValueError: no"):
        export(built.program)
