"""Folding a frozen codebook: what is left of normalizations and linear layers around it, proven, and when they stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.capture import capture
from fxfreeze.errors import ProofError
from fxfreeze.kernels.codebook import KERNEL
from fxfreeze.margin import decides
from fxfreeze.nn import Codebook
from fxfreeze.passes import PIPELINE
from fxfreeze.passes.fold import codebook as module
from fxfreeze.passes.fold.codebook import FoldCodebook
from fxfreeze.pipeline import run_passes, stage_passes
from fxfreeze.program import Program
from fxfreeze.rewrite import Context, LedgerRow

aten = torch.ops.aten
NORM, LINEAR = str(aten.layer_norm.default), str(aten.linear.default)


class Net(nn.Module):
    """`function` of the net itself and x [batch, 3, 12]."""

    def __init__(self, function: Callable[[Net, Tensor], Any], **how: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function, shifted = function, how.pop("shifted", True)
        self.codes, self.norm, self.out = Codebook(12, 9, **how), nn.LayerNorm(12), nn.Linear(12, 5)
        self.other, self.wide = nn.Linear(12, 5), nn.Linear(12, 5000)
        for name, parameter in self.named_parameters():
            if "weight" in name or (shifted and "bias" in name):
                parameter.data += 0.5 * torch.randn(parameter.shape)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def folded(
    function: Callable[[Net, Tensor], Any], *steps: Any, model: nn.Module | None = None, **how: Any
) -> tuple[Program, list[LedgerRow]]:
    """The program after the stages up to fold, which proved them, compared with the model, and the ledger."""
    model = (model or Net(function, **how)).eval()
    plan = fz.Plan(inputs=[fz.Input("x", shape=("batch", 3, 12))])
    program, _ = capture(model, plan)
    ctx = Context(plan)
    run_passes(program, steps or stage_passes(PIPELINE, ["clean", "adapt", "freeze", "fold"]), ctx)
    x = torch.randn(40, 3, 12)
    want = model(x)
    for found, one in zip(program.run(x), want if isinstance(want, tuple) else (want,), strict=True):
        torch.testing.assert_close(found, one, rtol=1e-4, atol=1e-4)
    return program, [row for row in ctx.ledger if row.requested == "codebook"]


def operators(program: Program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def last(program: Program) -> Any:
    (node,) = program.graph.find_nodes(op="call_function", target=KERNEL.op)
    return node


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_scale_and_shift_fold_into_the_keys_and_the_layer_behind_into_a_table(
    similarity: str, k: int, groups: int
) -> None:
    program, rows = folded(lambda net, x: net.out(net.codes(x)), similarity=similarity, k=k, groups=groups)
    found = operators(program)
    assert found.count(NORM) == 1 and LINEAR not in found and str(aten.mul.Tensor) not in found
    assert last(program).kwargs == ({"k": k, "joint": True} if k > 1 else {"k": 1, "joint": True})
    assert last(program).args[2].meta["val"].shape == (groups, 9, 5)
    before = 12 * k + 2 * 12 * 5 + 5
    assert rows[-1].executes.endswith("one table")
    assert f"{groups * k * 5:,} operations a row in place of {before:,}" in rows[-1].detail


@pytest.mark.parametrize("groups", [1, 3])
def test_a_normalization_without_a_shift_is_gone(groups: int) -> None:
    program, _ = folded(lambda net, x: net.codes(x), groups=groups, shifted=False)
    assert operators(program).count(NORM) == 0 and len(last(program).args) == 3
    keys = program.state[str(last(program).args[1].target)]
    torch.testing.assert_close(keys.mean(-1), torch.zeros(groups, 9, dtype=torch.float64), atol=1e-12, rtol=0)


def test_an_own_layer_norm_in_front() -> None:
    program, _ = folded(lambda net, x: net.codes(net.norm(x)), norm=False)
    (norm,) = program.graph.find_nodes(op="call_function", target=aten.layer_norm.default)
    assert norm.args[2:4] == (None, None)
    program, _ = folded(lambda net, x: net.codes(net.norm(x)), norm=False, shifted=False)
    assert NORM not in operators(program)


def test_a_normalization_over_all_groups_keeps_its_mean() -> None:
    program, _ = folded(lambda net, x: net.codes(net.norm(x)), norm=False, shifted=False, groups=3)
    assert operators(program).count(NORM) == 1


def test_codes_that_are_keys_and_values_part() -> None:
    program, _ = folded(lambda net, x: net.codes(x), similarity="euclidean")
    keys, values = last(program).args[1:3]
    assert keys.target != values.target
    assert torch.equal(program.state[str(values.target)], Net(lambda net, x: x, similarity="euclidean").codes.codes)


def test_two_calls_of_one_codebook_fold_each_for_itself() -> None:
    program, _ = folded(lambda net, x: (net.out(net.codes(x)), net.codes(net.norm(x))), shifted=False)
    first, second = program.graph.find_nodes(op="call_function", target=KERNEL.op)
    assert first.kwargs["joint"] and "joint" not in second.kwargs


def test_one_after_the_other_the_groups_of_a_table_are_one() -> None:
    program, _ = folded(lambda net, x: net.extra(net.out(net.codes(x))), model=_two_layers())
    assert LINEAR not in operators(program) and last(program).args[2].meta["val"].shape == (3, 9, 2)


def _two_layers() -> Net:
    net = Net(lambda net, x: net.extra(net.out(net.codes(x))), groups=3, k=2)
    net.extra = nn.Linear(5, 2)
    return net


@pytest.mark.parametrize(
    ("function", "how"),
    [
        (lambda net, x: (net.out(net.codes(x)), net.other(net.codes(x).relu())), {}),
        (lambda net, x: net.out(net.codes(x).relu()), {}),
        (lambda net, x: (y := net.codes(x), net.out(y)), {}),
    ],
    ids=["two readers", "something between", "read elsewhere"],
)
def test_what_cannot_become_a_table_stays(function: Any, how: dict[str, Any]) -> None:
    program, _ = folded(function, **how)
    assert LINEAR in operators(program)


def test_a_table_that_is_no_less_work_is_refused() -> None:
    """To a layer of d = 12 rows, 9 codes a row and group are 9 additions in place of 2·12/12 … but not of G = 12."""
    program, rows = folded(lambda net, x: net.out(net.codes(x)), k=9, groups=12)
    assert LINEAR in operators(program)
    assert rows[-1].outcome == "skipped" and "a table would take 540 operations a row, not 233" in rows[-1].detail


def test_a_table_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FREE", 0)
    monkeypatch.setattr(module, "GROWTH", 0.5)
    program, rows = folded(lambda net, x: net.wide(net.codes(x)))
    assert LINEAR in operators(program) and "in place of" in rows[-1].detail and rows[-1].outcome == "skipped"


def test_codes_that_are_computed_are_refused() -> None:
    def function(net: Net, x: Tensor) -> Tensor:
        keys = net.codes.codes + x.mean()
        return KERNEL.op(x.unsqueeze(-2), keys, net.codes.codes)

    _, rows = folded(function)
    assert rows[-1].outcome == "skipped" and "keys are not constant" in rows[-1].detail


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("_table", lambda table: lambda *args: 1.001 * table(*args)),
        ("_scale_keys", lambda scale: lambda program, node, gain, shift: scale(program, node, gain, None)),
        ("_scale_keys", lambda scale: lambda program, node, gain, shift: scale(program, node, gain.roll(1, 1), shift)),
    ],
)
def test_the_proof_rejects_a_wrong_fold(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any) -> None:
    monkeypatch.setattr(module, name, wrong(getattr(module, name)))
    with pytest.raises(ProofError, match="fold-codebook"):
        folded(lambda net, x: net.out(net.codes(x)), k=2)


def test_an_adapter_in_the_layer_behind_is_measured_in_the_table() -> None:
    model = Net(lambda net, x: net.out(net.codes(x)))
    inputs, targets = [fz.Input("x", shape=("batch", 3, 12))], ["onnx"]
    plan = fz.Plan(inputs=inputs, steps=[fz.LoRA(at="out", rank=2)], targets=targets)
    adapted = fz.adapt(model.eval(), plan)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape)
    artifact = fz.compile(adapted, plan)
    x = torch.randn(6, 3, 12)
    for target in targets:
        torch.testing.assert_close(artifact.target(target)(x), adapted(x), rtol=1e-4, atol=1e-4)
    assert any(row["requested"] == "codebook" and "table" in row["executes"] for row in artifact.manifest["ledger"])
    (row,) = [row for row in artifact.manifest["ledger"] if row["requested"] == "fold"]
    assert row["executes"] == "float32 constant out.table" and "of the change is lost" in row["detail"]


def test_the_choice_is_compared_with_a_margin() -> None:
    program, _ = folded(lambda net, x: net.codes(x), FoldCodebook())
    assert decides(program)
