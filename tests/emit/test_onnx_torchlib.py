"""What onnxscript reads of its translations, with more than one export in a process."""

from __future__ import annotations

from collections import Counter

import pytest
from torch import nn

import fxfreeze as fz
from fxfreeze.emit.onnx_torchlib import read_once

onnxscript = pytest.importorskip("onnxscript")
TRACED = onnxscript.TracedOnnxFunction


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the source of each translation is read; onnxscript's own reading is behind it."""
    read = vars(TRACED)["function_ir"].fget
    counted: Counter[str] = Counter()

    def counting(function):
        counted[function.name] += 1
        return read(function)

    monkeypatch.setattr(TRACED, "function_ir", property(counting))
    return counted


def test_a_second_export_reads_no_source(reads):
    plan = fz.Plan([fz.Input("x", ("batch", 4))], [], targets=["onnx"])
    for width in (3, 5):
        fz.compile(nn.Linear(4, width).requires_grad_(False), plan)
    assert reads and set(reads.values()) == {1}


def test_what_is_remembered_is_what_is_read():
    from onnxscript.function_libs.torch_lib.ops.core import aten_abs, aten_addmm

    before = [function.function_ir for function in (aten_addmm, aten_abs)]
    for _ in range(2):
        with read_once():
            within = [function.function_ir for function in (aten_addmm, aten_abs)]
            assert within == [function.function_ir for function in (aten_addmm, aten_abs)]
        assert [(ir.domain, ir.name, str(ir)) for ir in within] == [(ir.domain, ir.name, str(ir)) for ir in before]


def test_the_class_is_left_as_it_was_also_by_an_error():
    own = vars(TRACED)["function_ir"]
    with pytest.raises(RuntimeError, match="on the way"), read_once():
        assert vars(TRACED)["function_ir"] is not own
        raise RuntimeError("on the way")
    assert vars(TRACED)["function_ir"] is own


def test_an_onnxscript_without_the_property_is_left_as_it_is(monkeypatch):
    monkeypatch.delattr(TRACED, "function_ir")
    with read_once():
        assert "function_ir" not in vars(TRACED)
    assert "function_ir" not in vars(TRACED)
