"""fxfreeze.kernels._op: declaring an operator, and who runs when it is called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fxfreeze.kernels import _op
from fxfreeze.kernels._op import Kernel, register

FILES = {file.stem for file in (Path(__file__).resolve().parents[2] / "kernels").glob("[!_]*.py")}


def double(x, *, by=2.0):
    return x * by


@pytest.fixture
def declare(monkeypatch):
    """Declares kernels whose operators are gone after the test."""
    with torch.library._scoped_library("fxfreeze_test", "DEF") as library:
        monkeypatch.setattr(_op, "NAMESPACE", "fxfreeze_test")
        monkeypatch.setattr(_op, "_library", library)
        monkeypatch.setattr(_op, "_registered", {})
        yield lambda name="double", **more: register(
            Kernel(
                name, "(Tensor x, *, float by=2.0) -> Tensor", double, lambda x, *, by=2.0: torch.empty_like(x), **more
            )
        )


def test_every_file_of_the_folder_is_a_kernel_of_its_name():
    assert set(_op.OPS) == FILES
    for name, kernel in _op.OPS.items():
        assert kernel.op is getattr(torch.ops.fxfreeze, name).default


def test_importing_is_cheap_and_the_first_look_finds_the_files():
    code = (
        "import sys; from fxfreeze.kernels import _op; print('fxfreeze.kernels.tversky' in sys.modules);"
        "print(sorted(_op.OPS)); print(any(name.partition('.')[0] == 'triton' for name in sys.modules))"
    )
    root = str(Path(_op.__file__).resolve().parents[1])
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    # torch itself may look at triton when it is imported, which is not our doing.
    torch_alone = "import sys, torch; print(any(name.partition('.')[0] == 'triton' for name in sys.modules))"
    alone = subprocess.run([sys.executable, "-c", torch_alone], capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == ["False", str(sorted(FILES)), alone.strip()]


def test_the_module_has_no_other_lazy_name():
    with pytest.raises(AttributeError, match="OOPS"):
        _ = _op.OOPS


def test_the_reference_runs_on_a_cpu(declare):
    x = torch.arange(3.0)
    assert torch.equal(declare().op(x, by=3.0), x * 3)


def test_the_eager_form_goes_before_the_reference(declare):
    kernel = declare(eager=lambda x, *, by=2.0: x - by)
    x = torch.arange(3.0, requires_grad=True)
    assert torch.equal(kernel.op(x), x - 2)
    assert torch.equal(kernel.op(x.detach()), x.detach() - 2)


def test_a_gradient_passes_through_the_plain_operators(declare):
    x = torch.arange(3.0, requires_grad=True)
    y = declare().op(x, by=3.0)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full((3,), 3.0))
    with torch.no_grad():
        assert not declare("other").op(x).requires_grad


@pytest.mark.parametrize("supported", [True, False])
def test_a_launcher_runs_where_it_is_supported(declare, monkeypatch, supported):
    kernel = declare(supports=lambda x, *, by=2.0: supported, launch=lambda x, *, by=2.0: x + 100)
    run, x = _op._gpu(kernel), torch.arange(3.0)
    monkeypatch.setattr(_op, "has_triton", lambda: True)
    assert torch.equal(run(x), x + 100 if supported else x * 2)
    monkeypatch.setattr(_op, "has_triton", lambda: False)
    assert torch.equal(run(x), x * 2)


def test_a_launcher_needs_its_condition():
    with pytest.raises(ValueError, match="'double': supports and launch come together"):
        Kernel("double", "(Tensor x) -> Tensor", double, double, launch=double)


def test_a_name_is_taken_once(declare):
    declare()
    with pytest.raises(ValueError, match="'double' is registered twice"):
        declare()
