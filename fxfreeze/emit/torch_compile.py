"""Target "torch": the Program stored as data, run through ``torch.compile``.

Compilation happens at the first call, in the process that calls.

On a CPU the weights are frozen into the code (Inductor's ``freezing``), which lets it pack them; this works with
symbolic sizes, but only without gradients. The option alone does nothing, and says nothing: Dynamo hands Inductor the
weights of a module as inputs, unless torch's global freezing switch is on while it traces. Weights that are plain
attributes (no buffers) with a guarded static address are made constants of the graph without it, so no global setting
is touched. One thread, torch 2.15, frozen against not: ViT-tiny of depth 4 0.73, 0.79 and 1.19 of the time at 1, 8, 32,
a ResNet-20 0.89, 0.96 and 0.66 at 1, 8 and 32, GPT-2 of 2 layers 0.95 to 1, a three-layer MLP 1.2, 0.93 and 1.07.

torch.compile always specialises a size of 1, and would count that as a recompilation. Every combination of dims that
are 1 therefore gets a compilation of its own, with only the other declared dims dynamic. All sizes of a dim beyond 1
share one; at most the choice between two convolution algorithms (from a batch of 16 on, say) makes Dynamo add another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from .. import packed
from ..exporting import quiet
from ..integers import count_lowered, executed, has_integers, with_integers
from ..launched import executed as launched
from ..launched import has_launched, head_calls, with_launched
from ..lower import Lowering, emit_error
from ..memory import keep_free_memory
from ..program import TensorSpec, on_cpu
from ..sampling import sample_inputs, tracing_sizes
from ..serialize import Interface, load_program, save_program
from ..winograd import has_windows, is_built, with_winograd


def emit(lowering: Lowering, folder: Path) -> dict[str, Any]:
    """Write the Program. Raises ArtifactError when it holds something that cannot be stored."""
    program = lowering.program
    save_program(program, folder)
    facts: dict[str, Any] = {"freezing": on_cpu(program.inputs)}
    calls = _lowered(lowering, folder) if has_integers(program) else 0
    return facts | executed(program, calls, launched(program), head_calls(program))


def _lowered(lowering: Lowering, folder: Path) -> int:
    """How many integer kernels are in the code; it is compiled to see."""
    program, before = lowering.program, count_lowered()
    inputs = sample_inputs(program, tracing_sizes(program.inputs, program.dims, None), 0, lowering.examples)
    load(folder, Interface.of(program))(*inputs)
    return count_lowered() - before


def load(folder: Path, interface: Interface) -> CompiledProgram:
    """Read the Program; nothing is compiled yet. Raises ArtifactError for files that do not hold one."""
    if on_cpu(interface.inputs):
        keep_free_memory()
    program = load_program(folder, shapes=False)
    if has_launched(program):
        return CompiledProgram(with_launched(load_program(folder)).graph_module(), interface)
    if (windows := has_windows(program) and is_built()) or packed.has_packed(program) or has_integers(program):
        program = packed.with_packed(load_program(folder))
    if has_integers(program):
        program = with_integers(program)
    if windows:
        program = with_winograd(program)
    return CompiledProgram(program.graph_module(), interface)


Sizes = tuple[tuple[int, ...], ...]


class CompiledProgram:
    """Runner over ``torch.compile``; a combination of size-1 dims is compiled when it is first met.

    Args:
        module: its weights must be its own, not the user's: they get marked.
        interface: says which dims are symbolic.
    """

    def __init__(self, module: GraphModule, interface: Interface) -> None:
        self._module = module
        self._freezing = on_cpu(interface.inputs)
        self._axes = [_symbolic_axes(spec, interface) for spec in interface.inputs]
        self._compiled: dict[Sizes, Callable[..., Any]] = {}
        self._fixed: dict[Sizes, Callable[..., Any]] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        sizes = tuple(tuple(value.shape) for value in inputs)
        dynamic = tuple(
            tuple(axis for axis in axes if shape[axis] != 1) for axes, shape in zip(self._axes, sizes, strict=True)
        )
        with torch.no_grad():
            try:
                if sizes in self._fixed:
                    return self._fixed[sizes](*_aliases(inputs))
                try:
                    return self._run(self._compiled, dynamic, _aliases(inputs, dynamic))
                except Exception as error:
                    if not _is_constraint_violation(error):
                        raise
                    # A guard on the layout (is a slice of length n − 1 contiguous?) may hold for all sizes but these.
                    return self._run(self._fixed, sizes, _aliases(inputs))
            except Exception as error:
                raise emit_error("torch.compile cannot run the program", error) from error

    def _run(self, cache: dict[Sizes, Callable[..., Any]], key: Sizes, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if (compiled := cache.get(key)) is not None:
            return compiled(*inputs)
        with quiet():
            compiled = cache[key] = self._compile()
            return compiled(*inputs)

    def _compile(self) -> Callable[..., Any]:
        # A copy has code of its own, hence a cache and a recompilation limit of its own. Weights are shared.
        module = GraphModule(self._module, self._module.graph)
        options: dict[str, Any] = {}
        if self._freezing:
            _make_constant(module)
            options = {"freezing": True}
        # fullgraph: beyond its recompilation limit torch.compile would silently run uncompiled otherwise.
        return torch.compile(module, fullgraph=True, dynamic=False, options=options)


def _is_constraint_violation(error: Exception) -> bool:
    from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

    return isinstance(error, ConstraintViolationError)


def _aliases(inputs: Sequence[Tensor], dynamic: Sizes = ()) -> list[Tensor]:
    """Detached, so that marks are not seen by the caller; contiguous, so that there is one layout."""
    aliases = [value.detach().contiguous() for value in inputs]
    for alias, axes in zip(aliases, dynamic, strict=False):
        if axes:
            torch._dynamo.mark_dynamic(alias, axes)
    return aliases


def _make_constant(module: GraphModule) -> None:
    """Turn buffers into plain attributes that Dynamo makes constants of the graph; see the module docstring."""
    for part in module.modules():
        for name, value in list(part._buffers.items()):
            assert value is not None
            torch._dynamo.mark_static_address(value, guard=True)
            del part._buffers[name]
            part.__dict__[name] = value


def _symbolic_axes(spec: TensorSpec, interface: Interface) -> tuple[int, ...]:
    free = {name for name, (low, high) in interface.dims.items() if low != high}
    return tuple(axis for axis, size in enumerate(spec.shape) if size in free)
