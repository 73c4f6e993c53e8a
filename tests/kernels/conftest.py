"""The rig for Triton kernels: they run in Triton's interpreter where there is no GPU, and are compiled for four GPUs.

A test that runs a kernel takes the fixture `device` and is marked `gpu`. On a GPU machine it runs there. Elsewhere it
skips itself, and one test per file runs all of them again with `interpreter`, in a process of its own, because
TRITON_INTERPRET decides at import what ``triton.jit`` makes.

What a compile may cost is declared in ``budgets.toml``, per kernel and GPU, for one version of Triton: torch pins its
own, and what one version does in 104 registers takes another 121. Under others all is compiled, and only tensor cores
are counted. After a change that is worth its price, and with a newer Triton:

    FXFREEZE_WRITE_BUDGETS=1 python -m pytest tests/kernels -k within_budget
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BUDGETS = Path(__file__).with_name("budgets.toml")
TARGETS = {"cuda:80": ("cuda", 80, 32), "cuda:90": ("cuda", 90, 32), "cuda:100": ("cuda", 100, 32),
           "hip:gfx942": ("hip", "gfx942", 64)}  # fmt: skip
TENSOR_CORES = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_s?mfma_)")


# ---- running


@pytest.fixture(scope="session")
def device() -> str:
    if INTERPRETED:
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no GPU; runs in the interpreter instead")
    return "cuda"


@pytest.fixture
def interpreter() -> Callable[[str], int]:
    """Run the tests marked `gpu` of a file in the interpreter; at least one, and all must pass. Returns how many."""
    if _triton_version() == "3.6" and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("Triton 3.6 (torch 2.11) counts loops by int() of an array, which NumPy 2.4 refuses: use numpy<2.4")

    def run(file: str) -> int:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist", file]
        # A GPU would be found by Triton's autotuner, say, and half of a test would run there.
        environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        counts = dict(
            reversed(pair.split()) for pair in re.findall(r"\d+ (?:passed|failed|skipped|error)", done.stdout)
        )
        assert done.returncode == 0 and set(counts) == {"passed"}, done.stdout[-6000:] + done.stderr[-2000:]
        return int(counts["passed"])

    return run


# ---- compiling


@dataclass(frozen=True)
class Cost:
    """What a compile took: registers per thread, spilled bytes, shared bytes, tensor-core instructions in the text."""

    registers: int
    spills: int
    shared: int
    tensor_cores: int


def compile_ahead(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], options: Mapping[str, Any], target: str
) -> Cost:
    """Compile for a GPU that need not be there. Pointers and integers count as divisible by 16, as most are."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    assert set(names) == types.keys() | constants.keys(), set(names) ^ (types.keys() | constants.keys())
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs=dict(constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items() if kind != "fp32"},
    )
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options={"enable_fp_fusion": True, **options})
    registers, spills = _hip(compiled.asm["amdgcn"]) if "amdgcn" in compiled.asm else _cuda(compiled.asm["cubin"])
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    return Cost(registers, spills, compiled.metadata.shared, len(TENSOR_CORES.findall(text)))


def _cuda(cubin: bytes) -> tuple[int, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _hip(text: str) -> tuple[int, int]:
    # Scalar registers spill into lanes of vector registers, and so are in their count.
    found = {name: int(value) for name, value in re.findall(r"\.(\w+_count):\s+(\d+)", text)}
    return found["vgpr_count"], 4 * found["vgpr_spill_count"]


@pytest.fixture
def cost() -> Callable[..., Cost]:
    """:func:`compile_ahead` for cuda:90: a function of kernel, types, constants and options."""
    return lambda kernel, types, constants, **options: compile_ahead(kernel, types, constants, options, "cuda:90")


@pytest.fixture
def within_budget() -> Callable[..., None]:
    """Compile for every target and compare with the row in ``budgets.toml``.

    The fixture is a function of the row's name, the kernel, the types of its arguments, the values of its constants,
    and options such as num_warps.
    """

    def check(name: str, kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], **options: Any) -> None:
        costs = {target: compile_ahead(kernel, types, constants, options, target) for target in TARGETS}
        if os.environ.get("FXFREEZE_WRITE_BUDGETS") == "1":
            _declare(name, costs)
        table = tomllib.loads(BUDGETS.read_text(encoding="utf-8"))
        declared, same = table.get(name, {}), table["triton"] == _triton_version()
        wrong = [
            problem for target, cost in costs.items() for problem in excess(cost, declared.get(target), target, same)
        ]
        assert not wrong, f"{name}:\n" + "\n".join(wrong)
        if not same:
            pytest.skip(f"costs are declared for Triton {table['triton']}, and this is {_triton_version()}")

    return check


def excess(cost: Cost, declared: Mapping[str, int] | None, target: str, same_compiler: bool) -> list[str]:
    """What is wrong with `cost`: one line each."""
    if declared is None:
        return [f"{target}: nothing declared; measured {asdict(cost)}"]
    wrong = [
        f"{target}: {name} {value}, declared at most {declared[name]}"
        for name, value in asdict(cost).items()
        if same_compiler and name != "tensor_cores" and value > declared[name]
    ]
    if bool(cost.tensor_cores) != bool(declared["tensor_cores"]):
        wrong.append(f"{target}: tensor_cores {cost.tensor_cores}, declared {declared['tensor_cores']}")
    return wrong


def _triton_version() -> str:
    """Major and minor: what is fixed between the others changes no code worth a row."""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def _declare(name: str, costs: Mapping[str, Cost]) -> None:
    import tomli_w

    table = tomllib.loads(BUDGETS.read_text(encoding="utf-8")) if BUDGETS.exists() else {}
    if table.get("triton") != _triton_version():  # rows of another version would be taken for this one's
        table = {"triton": _triton_version()}
    table[name] = {
        # Versions of the compiler differ by a few registers, and a thread has 255.
        target: {**asdict(cost), "registers": min(-(-(cost.registers + 8) // 8) * 8, 255 if "cuda" in target else 512)}
        for target, cost in costs.items()
    }
    BUDGETS.write_text(tomli_w.dumps(dict(sorted(table.items()))), encoding="utf-8")
