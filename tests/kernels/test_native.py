"""fxfreeze.kernels._native: C++ beside a kernel file is built once, and plain torch runs where it cannot be."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch

from fxfreeze.kernels import _native
from fxfreeze.kernels._op import OPS, at_most

ROOT = Path(_native.__file__).resolve().parents[1]
ADD = """
#include <cstdint>
#include <cstring>
extern "C" void add(double* out, const double* x, double by, int64_t count, const char* name) {
  for (int64_t i = 0; i < count; ++i) out[i] = x[i] + by + std::strlen(name);
}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of kernels that holds ``add.cpp``, and an empty cache."""
    (tmp_path / "add.cpp").write_text(ADD)
    monkeypatch.setattr(_native, "FOLDER", tmp_path)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    _native.library.cache_clear()
    yield tmp_path
    _native.library.cache_clear()


@pytest.fixture
def logged(tmp_path, monkeypatch):
    """A compiler that writes down what it is asked for; a function to the builds it was asked for."""
    script, log = tmp_path / "cxx", tmp_path / "log"
    script.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {shutil.which("g++") or "c++"} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return lambda: [line for line in log.read_text().splitlines() if "-o" in line.split()] if log.exists() else []


def test_a_function_is_called(folder):
    x, out = torch.arange(3.0, dtype=torch.float64), torch.empty(3, dtype=torch.float64)
    _native.call(_native.library("add.cpp").add, out, x, 0.5, 3, "four")
    assert torch.equal(out, x + 4.5)


def test_a_text_is_built_once(folder, logged):
    for _ in range(2):
        assert _native.library("add.cpp") is not None
        _native.library.cache_clear()
    assert len(logged()) == 1
    (built,) = (folder / "cache" / "fxfreeze").iterdir()
    assert built.suffix == ".so"
    (folder / "add.cpp").write_text(ADD.replace("strlen(name)", "strlen(name) + 1"))
    x, out = torch.zeros(1, dtype=torch.float64), torch.empty(1, dtype=torch.float64)
    _native.call(_native.library("add.cpp").add, out, x, 0.5, 1, "")
    assert out.item() == 1.5 and len(logged()) == 2


@pytest.mark.parametrize("change", ["compiler", "flags", "cpu"])
def test_a_build_is_found_by_all_it_depends_on(folder, logged, monkeypatch, change):
    first = _native.build("add.cpp", _native.compiler(), ["-shared", "-fPIC"])
    if change == "compiler":
        script = Path(os.environ["CXX"])
        script.write_text(script.read_text().replace("exec", '[ "$1" = --version ] && echo 99\nexec'))
    elif change == "cpu":
        monkeypatch.setattr(_native, "_cpu", lambda: "another")
    flags = ["-shared", "-fPIC", "-O1"] if change == "flags" else ["-shared", "-fPIC"]
    assert _native.build("add.cpp", _native.compiler(), flags) != first


def test_importing_builds_nothing_and_a_second_process_only_loads(tmp_path, logged, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    code = textwrap.dedent("""
        import os, sys, torch, fxfreeze
        from fxfreeze.kernels._op import OPS

        kernel, before = OPS["tversky_frozen"], os.path.exists("log")
        how = dict(model="ratio", intersection="min", difference="ignorematch", semantics="aggregate")
        a, b, one = torch.randn(2, 9), torch.randn(9, 7), torch.tensor(1.0)
        arguments = (a, b, b.relu().sum(0), one, one, one)
        same = torch.allclose(kernel.op(*arguments, **how), kernel.reference(*arguments, **how))
        print(before, os.path.exists("log"), same, "torch._inductor.cpp_builder" in sys.modules)
    """)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for before in (False, True):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.stdout.split() == [str(before), "True", "True", "False"], done.stderr[-2000:]
        assert len(logged()) == 1


def tversky_call():
    torch.manual_seed(0)
    a, b, one = torch.randn(2, 9), torch.randn(9, 7), torch.tensor(1.0)
    how = {"model": "contrast", "intersection": "min", "difference": "subtractmatch", "semantics": "inclusive"}
    return (a, b, b.relu().sum(0), one, one, one), how


@pytest.mark.parametrize("cxx", ["no-such-compiler", "false"])
def test_without_a_compiler_plain_torch_runs_after_one_warning(tmp_path, monkeypatch, cxx):
    monkeypatch.setenv("CXX", cxx)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    _native.library.cache_clear()
    kernel, (arguments, how) = OPS["tversky_frozen"], tversky_call()
    try:
        with pytest.warns(UserWarning, match=r"tversky_frozen.cpp was not built, and plain torch .*" + cxx) as caught:
            found = [kernel.op(*arguments, **how) for _ in range(2)]
        assert len(caught) == 1
        assert all(torch.equal(value, kernel.plain(*arguments, **how)) for value in found)
        with pytest.raises(RuntimeError, match=r"tversky_frozen_native: tversky_frozen\.cpp is not built"):
            kernel.native_op(*arguments, "ratio", "min", "ignorematch", "aggregate", 0.0)
    finally:
        _native.library.cache_clear()


def test_a_text_that_does_not_compile(folder):
    (folder / "add.cpp").write_text("int main( {")
    with pytest.warns(UserWarning, match=r"add.cpp was not built.*add.cpp.* error"):
        assert _native.library("add.cpp") is None
    assert not list((folder / "cache" / "fxfreeze").iterdir())


def test_a_compiler_without_openmp(folder, tmp_path, monkeypatch):
    script = tmp_path / "cxx"
    script.write_text('#!/bin/sh\nfor flag; do [ "$flag" = -fopenmp ] && exit 1; done\nexec g++ "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _native.library("add.cpp") is not None


def test_the_text_stands_alone(tmp_path):
    """Without OpenMP, and without a warning."""
    for kernel in OPS.values():
        if kernel.native is not None:
            command = ["-std=c++17", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", "-fsyntax-only"]
            file = _native.FOLDER / kernel.native.source
            subprocess.run([*_native.compiler(), *command, str(file)], check=True, capture_output=True)


def test_the_loops_are_vectors_in_a_package(tmp_path):
    """Inductor compiles it at -O1, without the vectoriser, and with square roots that set errno."""
    command, text = _native.compiler(), _native.source("tversky_frozen.cpp")
    version = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    if "Free Software Foundation" not in version:
        pytest.skip("GCC says what it made vectors of")
    flags = ["-O1", "-fno-tree-loop-vectorize", "-fmath-errno", "-ffp-contract=off", "-fno-trapping-math"]
    flags += ["-fopenmp", "-fopt-info-vec-optimized", "-c", "-o", str(tmp_path / "text.o")]
    file = _native.FOLDER / "tversky_frozen.cpp"
    report = subprocess.run([*command, *flags, str(file)], capture_output=True, text=True, check=True).stderr
    vectors = [int(line) for line in re.findall(r"tversky_frozen\.cpp:(\d+):.*loop vectorized", report)]
    adding, finishing = (number for number, line in enumerate(text.splitlines(), 1) if line == "#pragma omp simd")
    # Two types, one feature or four, six sets of sums without a root.
    assert sum(adding < line < adding + 12 for line in vectors) >= 2 * 2 * 6
    assert sum(finishing < line < finishing + 3 for line in vectors) > 10


def test_an_upper_bound_of_a_symbol():
    found = []

    class Ask(torch.nn.Module):
        def forward(self, x):
            found.append([at_most(x.shape[0] * x.shape[1], limit) for limit in (15, 16)])
            return x + 1

    batch = torch.export.Dim("batch", max=8)
    torch.export.export(Ask(), (torch.randn(3, 2),), dynamic_shapes=({0: batch},), strict=False)
    assert found[0] == [False, True]
    assert [at_most(8, 8), at_most(9, 8)] == [True, False]
