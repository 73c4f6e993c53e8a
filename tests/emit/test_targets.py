"""Every target runs what the model computes, at every size, and touches nothing of the caller's."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap

import pytest
import torch
from torch._dynamo.utils import counters

from fxfreeze import Dim, Input, Plan
from fxfreeze.capture import capture
from fxfreeze.emit import EMITTERS, aoti, torch_compile
from fxfreeze.errors import ArtifactError
from fxfreeze.parity import check_model, check_target, draw
from fxfreeze.sampling import sample_inputs
from fxfreeze.serialize import Interface

TARGETS = list(EMITTERS)
SIZES = [{"batch": 1, "time": 1}, {"batch": 4, "time": 4}, {"batch": 1, "time": 5}, {"batch": 7, "time": 1}]


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_has_parity(name, built, runners):
    draws = draw(built.program, built.reference)
    check_model(built.program, draws)
    rows = check_target(name, runners[name], built.program, draws)
    assert len(rows) == 3 * len(built.program.outputs)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", TARGETS)
def test_any_size_runs(name, sizes, built, runners):
    inputs = sample_inputs(built.program, sizes, seed=1)
    for mine, theirs in zip(runners[name](*inputs), built.program.run(*inputs), strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", TARGETS)
def test_any_strides_and_any_grad_mode_run(name, built, runners):
    image, steps = sample_inputs(built.program, {"batch": 4, "time": 3}, seed=2)
    want = built.program.run(image, steps)
    wide = torch.zeros(8, 6)
    wide[::2, ::2] = steps
    variants = [
        (image.to(memory_format=torch.channels_last), steps.T.contiguous().T),
        (image.flip(0).flip(0), wide[::2, ::2]),
        (image.clone().requires_grad_(), steps.clone().requires_grad_()),
    ]
    with torch.inference_mode():
        variants.append((image.clone(), steps.clone()))
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        for variant in variants:
            with mode():
                result = runners[name](*variant)
            for mine, theirs in zip(result, want, strict=True):
                torch.testing.assert_close(mine, theirs)
                assert not mine.requires_grad


@pytest.mark.parametrize("name", TARGETS)
def test_the_callers_tensors_carry_no_mark(name, built, runners):
    inputs = sample_inputs(built.program, {"batch": 3, "time": 2}, seed=3)
    runners[name](*inputs)
    assert not any(vars(value) for value in inputs)


class TestTorch:
    def test_one_compilation_per_combination_of_dims_that_are_1(self, built, monkeypatch):
        runner = built.load("torch")
        calls = []
        real = torch.compile

        def compile(*args, **kwargs):
            calls.append(kwargs)
            # The eager backend: only Dynamo's decisions are counted here.
            return real(*args, backend="eager", **{**kwargs, "options": None})

        monkeypatch.setattr(torch, "compile", compile)
        before = counters["stats"]["unique_graphs"]
        for batch, time in [(1, 2), (3, 4), (1, 5), (2, 2), (9, 3), (4, 4), (1, 30), (11, 30)]:
            inputs = sample_inputs(built.program, {"batch": batch, "time": time}, seed=0)
            torch.testing.assert_close(runner(*inputs), built.program.run(*inputs))
        assert counters["stats"]["unique_graphs"] - before == len(calls) == 2
        assert calls[0]["options"] == {"freezing": True} and calls[0]["fullgraph"]
        # A convolution chooses its algorithm by the batch, and Dynamo guards on the choice.
        inputs = sample_inputs(built.program, {"batch": 64, "time": 5}, seed=0)
        torch.testing.assert_close(runner(*inputs), built.program.run(*inputs))
        assert counters["stats"]["unique_graphs"] - before <= 3 and len(calls) == 2

    def test_weights_are_frozen_with_symbolic_sizes(self, built):
        from torch._inductor.utils import run_and_get_code

        runner = built.load("torch")
        for batch in (3, 64):  # the second is a recompilation, see above
            inputs = sample_inputs(built.program, {"batch": batch, "time": 4}, seed=0)
            _, sources = run_and_get_code(runner, *inputs)
            assert any("_frozen_param" in source for source in sources)

    def test_no_global_setting_is_touched(self, built):
        configs = (torch._dynamo.config, torch._inductor.config)
        before = [copy.deepcopy(config.get_config_copy()) for config in configs]
        built.load("torch")(*sample_inputs(built.program, {"batch": 3, "time": 4}, seed=0))
        assert [config.get_config_copy() for config in configs] == before
        assert built.facts["torch"] == {"freezing": True}

    def test_nothing_is_compiled_before_the_first_call(self, built, monkeypatch):
        monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: pytest.fail("compiled"))
        built.load("torch")


class TestAoti:
    def test_it_runs_in_a_process_with_only_torch(self, built, tmp_path):
        script = f"""
            import sys, torch
            model = torch._inductor.aoti_load_package({str(built.folder / "aoti" / aoti.FILE)!r})
            for batch in (1, 5):
                image, steps = torch.ones(batch, 3, 8, 8), torch.ones(batch, 2)
                outputs = model(image, steps)
                assert outputs[0].shape == (batch, 5), outputs[0].shape
            torch.save(outputs[0], {str(tmp_path / "linear.pt")!r})
            assert not [name for name in sys.modules if name.split(".")[0] in ("fxfreeze", "onnx", "onnxruntime")]
        """
        command = [sys.executable, "-c", textwrap.dedent(script)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        want = built.program.run(torch.ones(5, 3, 8, 8), torch.ones(5, 2))[0]
        torch.testing.assert_close(torch.load(tmp_path / "linear.pt", weights_only=True), want)

    def test_it_is_one_frozen_file(self, built):
        assert [path.name for path in (built.folder / "aoti").iterdir()] == [aoti.FILE]
        assert built.facts["aoti"] == {"freezing": True}

    def test_a_package_that_is_none_is_refused(self, built, tmp_path):
        (tmp_path / aoti.FILE).write_bytes(b"PK")
        with pytest.raises(ArtifactError, match="cannot be loaded"):
            aoti.load(tmp_path, built.interface)


class Shifted(torch.nn.Module):
    """Dynamo asks whether x[:, 1:] is contiguous, and so tells a length of 2 from all others."""

    def forward(self, x):
        return torch.nn.functional.pad(x[:, 1:], (0, 0, 0, 1)) + x


def test_a_size_that_a_guard_singles_out_runs_too():
    plan = Plan(inputs=[Input("x", shape=("batch", "length", 4))], dims={"length": Dim(min=2, max=9)})
    program, _ = capture(Shifted().eval(), plan)
    runner = torch_compile.CompiledProgram(program.graph_module(), Interface.of(program))
    for length in (2, 3, 9, 2, 2):
        x = torch.randn(3, length, 4)
        torch.testing.assert_close(runner(x)[0], Shifted()(x))
    assert len(runner._fixed) == 1
