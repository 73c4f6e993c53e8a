"""Target "torch": the Program stored as data, run through ``torch.compile``.

Compilation happens at the first call, in the process that calls. On a CPU the weights are frozen into the code
(Inductor's ``freezing``), which lets it pack them; that works with symbolic sizes, but only without gradients, and the
``options`` of one ``torch.compile`` suffice: no global setting of torch is touched.

torch.compile always specialises a size of 1, and would count that as a recompilation. Every combination of dims that
are 1 therefore gets a compilation of its own, with only the other declared dims dynamic. All sizes of a dim beyond 1
share one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..errors import ArtifactError
from ..lower import Lowering, emit_error, quiet
from ..program import TensorSpec
from ..serialize import Interface, load_program, save_program
from .runner import on_cpu


def emit(lowering: Lowering, folder: Path) -> dict[str, Any]:
    """Write the Program. Raises ArtifactError when it holds something that cannot be stored."""
    save_program(lowering.program, folder)
    return {"freezing": on_cpu(lowering.program.inputs)}


def load(folder: Path, interface: Interface) -> CompiledProgram:
    """Read the Program; nothing is compiled yet. Raises ArtifactError for files that do not hold one."""
    program = load_program(folder, shapes=False)
    return CompiledProgram(program.graph_module(), interface)


class CompiledProgram:
    """Runner over ``torch.compile``; a combination of size-1 dims is compiled when it is first met."""

    def __init__(self, module: GraphModule, interface: Interface) -> None:
        self.module = module
        self.freezing = on_cpu(interface.inputs)
        self._axes = [_symbolic_axes(spec, interface) for spec in interface.inputs]
        self._compiled: dict[tuple[tuple[int, ...], ...], Callable[..., Any]] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        dynamic = tuple(
            tuple(axis for axis in axes if value.shape[axis] != 1)
            for axes, value in zip(self._axes, inputs, strict=True)
        )
        with torch.no_grad():
            # A detached alias: marks set on it are not seen by the caller. Contiguous, so that there is one layout.
            aliases = [value.detach().contiguous() for value in inputs]
            for alias, axes in zip(aliases, dynamic, strict=True):
                if axes:
                    torch._dynamo.mark_dynamic(alias, axes)
            if (compiled := self._compiled.get(dynamic)) is None:
                return self._first_call(dynamic, aliases)
            return compiled(*aliases)

    def _first_call(self, dynamic: tuple[tuple[int, ...], ...], inputs: list[Tensor]) -> tuple[Tensor, ...]:
        # A copy has code of its own, hence a cache and a recompilation limit of its own. Weights are shared.
        module = GraphModule(self.module, self.module.graph)
        options: dict[str, Any] = {"freezing": True} if self.freezing else {}
        # fullgraph: beyond its recompilation limit torch.compile would silently run uncompiled otherwise.
        compiled = torch.compile(module, fullgraph=True, dynamic=False, options=options)
        try:
            with quiet():
                result = compiled(*inputs)
        except ArtifactError:
            raise
        except Exception as error:
            raise emit_error("torch.compile cannot run the program", error) from error
        self._compiled[dynamic] = compiled
        return result


def _symbolic_axes(spec: TensorSpec, interface: Interface) -> tuple[int, ...]:
    free = {name for name, (low, high) in interface.dims.items() if low != high}
    return tuple(axis for axis, size in enumerate(spec.shape) if size in free)
