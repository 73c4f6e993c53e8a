"""Target "aoti": an AOTInductor package, ``model.pt2``, native code that needs nothing but torch to load and run::

    model = torch._inductor.aoti_load_package("model.pt2")
    outputs = model(*flat_inputs)       # contiguous tensors, in the order of the manifest's inputs

It is built once, for the kind of machine that builds it (instruction set, GPU architecture), and loading it runs
native code. The bare package checks neither dtypes nor strides nor sizes; an artifact's runner does.

On a CPU the weights are frozen into the package. Measured with torch 2.15 on ResNet-18 at 64×64 and a dynamic batch:
the build takes as long, the package is as large, and a call is 1.2 to 1.9 times faster than without.

An operator of ours that has a form in C++ for its arguments stays whole: its source is compiled with the rest, so the
package needs no fxfreeze.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import launched, packed
from ..errors import ArtifactError
from ..exporting import quiet
from ..integers import CALL, HEAD_CALL, count_calls, executed
from ..lower import Lowering, emit_error, shims
from ..memory import keep_free_memory
from ..program import integer_layers, on_cpu
from ..serialize import Interface
from .runner import Runner

FILE = "model.pt2"


def emit(lowering: Lowering, folder: Path) -> dict[str, Any]:
    """Compile into ``model.pt2``.

    Raises:
        EmitError: Inductor or the C++ compiler refuses the program; names operator and module where known.
    """
    from torch._inductor import aoti_compile_and_package

    exported, path = lowering.native, folder / FILE
    configs: dict[str, Any] = {"freezing": on_cpu(lowering.program.inputs)}
    if sources := shims(exported):
        configs["aot_inductor.custom_ops_to_c_shims"] = sources
    try:
        # Freezing is silently skipped while gradients are enabled.
        with torch.no_grad(), quiet():
            aoti_compile_and_package(exported, package_path=str(path), inductor_configs=configs)
    except Exception as error:
        path.unlink(missing_ok=True)
        raise emit_error("AOTInductor cannot compile the program", error) from error
    facts: dict[str, Any] = {"freezing": configs["freezing"]}  # the compiler adds settings of its own to configs
    if not integer_layers(lowering.program):
        return facts
    calls, heads, products, floats = count_calls(path, CALL, HEAD_CALL, packed.CALL, launched.CALL)
    read = packed.executed(lowering.program, products) | launched.scaled(lowering.program, floats)
    return facts | executed(lowering.program, calls, read, heads)


def load(folder: Path, interface: Interface) -> Runner:
    """Load the package. Raises ArtifactError when it does not run here (another platform, another torch)."""
    from torch._inductor import aoti_load_package

    if on_cpu(interface.inputs):
        keep_free_memory()
    try:
        with quiet():
            model: Any = aoti_load_package(str(folder / FILE))
    except Exception as error:
        raise ArtifactError(
            f"the AOTInductor package cannot be loaded: {error}", where=FILE,
            hint="it is native code for the torch version and the platform it was built with",
        ) from error  # fmt: skip

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tuple(model(*(value.detach().contiguous() for value in inputs)))

    return run
