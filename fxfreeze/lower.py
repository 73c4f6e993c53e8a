"""Program → what a target's compiler takes: one re-export, and `fxfreeze::` operators decomposed where no kernel runs.

The torch target runs the program's own graph module, so an operator of ours stays one call there. AOTInductor and ONNX
take a ``torch.export.ExportedProgram`` in which every operator of ours has become its plain-torch reference (rule 1 of
the design: one op, one reference). For AOTInductor, one whose C++ form supports its arguments becomes that form, which
is compiled in.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from .errors import EmitError
from .exporting import dynamic_shapes, quiet, summary
from .integers import OPERATORS, has_integers, with_integers
from .launched import has_scaled, with_scaled
from .packed import has_packed, with_packed
from .program import Program, is_effectful
from .sampling import sample_inputs, tracing_sizes
from .winograd import has_windows, with_winograd

_KERNELS = "fxfreeze.kernels._op"


@dataclass
class Lowering:
    """A Program on its way to its targets. It is exported once, when the first target asks.

    Attributes:
        program: what to emit.
        examples: flat tensors that the model accepts, resized as needed; None: draw from the plan.
        defaults: values that some inputs have when none are given, by name, for targets that know such a thing.
        portable: targets that are files for a runtime hold nothing that only one runtime has.
    """

    program: Program
    examples: Sequence[torch.Tensor] | None = None
    defaults: Mapping[str, torch.Tensor] = field(default_factory=dict)
    portable: bool = False

    @cached_property
    def exported(self) -> ExportedProgram:
        """Operators of ours decomposed into their references."""
        return export(self.program, examples=self.examples)

    @cached_property
    def native(self) -> ExportedProgram:
        """As `exported`, with the C++ form of operators of ours where it supports the arguments, torch's own where they
        quantize, and weights that are read as integers; for AOTInductor."""
        table, quantized, windows = natives(), has_integers(self.program), has_windows(self.program)
        program = with_packed(self.program, launches=False) if has_packed(self.program) else self.program
        program = with_scaled(program) if has_scaled(program) else program
        changed = quantized or windows or program is not self.program
        if not changed and not any(node.target in table for node in program.graph.nodes):
            return self.exported
        program = with_integers(program) if quantized else program
        program = with_winograd(program) if windows else program
        exported = export(program, table=references() | table, examples=self.examples)
        return exported if changed or shims(exported) else self.exported

    @cached_property
    def quantized(self) -> ExportedProgram:
        """As `exported`, with quantize and dequantize whole; for targets that know them."""
        if not any(node.target in OPERATORS for node in self.program.graph.nodes):
            return self.exported
        table = {op: function for op, function in references().items() if op not in OPERATORS}
        return export(self.program, table=table, examples=self.examples)


def references() -> dict[Any, Callable[..., Any]]:
    """Operator → its plain-torch reference, of every kernel there is (``OPS`` in ``kernels/_op.py``)."""
    return {kernel.op: kernel.reference for kernel in _kernels()}


def natives() -> dict[Any, Callable[..., Any]]:
    """Operator → what it becomes for AOTInductor, of every kernel with a C++ form: decided call by call."""
    return {kernel.op: kernel.lowered for kernel in _kernels() if kernel.native is not None}


def shims(exported: ExportedProgram) -> dict[Any, list[str]]:
    """C++ forms that `exported` calls → their source, as Inductor's ``aot_inductor.custom_ops_to_c_shims``."""
    present = {node.target for node in exported.graph.nodes}
    forms = {kernel.native_op: kernel for kernel in _kernels() if kernel.native is not None}
    return {op: [kernel.shim()] for op, kernel in forms.items() if op in present}


def _kernels() -> Collection[Any]:
    try:
        kernels = importlib.import_module(_KERNELS)
    except ModuleNotFoundError as error:
        if error.name != _KERNELS:
            raise
        return ()
    return kernels.OPS.values()


def lower(
    program: Program,
    target: str,
    *,
    table: Mapping[Any, Callable[..., Any]] | None = None,
    examples: Sequence[torch.Tensor] | None = None,
) -> GraphModule | ExportedProgram:
    """Lower `program` for `target`: a graph module for "torch", else an exported program (see :func:`export`)."""
    if target == "torch":
        return program.graph_module()
    return export(program, table=table, examples=examples)


def export(
    program: Program,
    *,
    table: Mapping[Any, Callable[..., Any]] | None = None,
    examples: Sequence[torch.Tensor] | None = None,
) -> ExportedProgram:
    """Export the program once more, with its named dims dynamic, and decompose the operators of `table`.

    Sizes to trace with are 2 or more wherever the bounds allow, and differ between dims, so that nothing specialises;
    the result also runs at 1. Module stacks survive, so an error of a target's compiler can be traced to a module.

    Args:
        program: stays as it is; weights are shared.
        table: operator → function that replaces it; default :func:`references`.
        examples: tensors to resize to the tracing sizes; default: drawn from the plan.

    Raises:
        EmitError: torch.export refuses the graph.
    """
    sizes = tracing_sizes(program.inputs, program.dims, None)
    inputs = sample_inputs(program, sizes, seed=0, examples=examples)
    table = references() if table is None else table
    module = program.graph_module()
    for node in module.graph.nodes:
        # Lines of the user's source would otherwise end up, with their paths, in the files a target writes.
        node.meta.pop("stack_trace", None)
        # Traced through, which spares torch's own way to decompose: that traces the whole of the graph once more.
        node.target = table.get(node.target, node.target)
    module.recompile()
    try:
        with torch.no_grad(), quiet():
            exported = _export(module, tuple(inputs), dynamic_shapes(program.inputs, program.dims))
    except Exception as error:
        raise emit_error("the rewritten program cannot be exported", error) from error
    return exported


def _export(module: GraphModule, inputs: tuple[torch.Tensor, ...], shapes: Any) -> ExportedProgram:
    from torch._dynamo.exc import UserError  # brings triton along: not when fxfreeze is imported

    try:
        return torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
    except UserError:
        if any(map(is_effectful, module.graph.nodes)):
            raise
        return _unguarded_export(module, inputs, shapes)


def _unguarded_export(module: GraphModule, inputs: tuple[torch.Tensor, ...], shapes: Any) -> ExportedProgram:
    """Export where a guard contradicts the declared dims.

    Asking whether a slice is contiguous is enough for a guard such as "length − 1 ≠ 1", although every length computes
    the same. Deferred, guards become assertions, and those go: the program had none of them, and a target that needed
    one is caught by parity, which runs it at the bounds of every dim.
    """
    exported = torch.export.export(
        module, inputs, dynamic_shapes=shapes, strict=False, prefer_deferred_runtime_asserts_over_guards=True
    )
    for node in filter(is_effectful, list(exported.graph.nodes)):
        exported.graph.erase_node(node)
    exported.graph.eliminate_dead_code()
    return exported


def emit_error(what: str, error: BaseException) -> EmitError:
    """An EmitError that says which operator of which module a compiler was at work on when it raised `error`.

    Compilers walk a graph node by node, so the node in question is a local variable of a frame on the error's stack.
    """
    links = list(_chain(error))
    node = next((found for link in reversed(links) if (found := _node_at_fault(link))), None)
    where = None
    if node is not None:
        stack = node.meta.get("nn_module_stack") or {}
        paths = [path for path, _ in stack.values() if path and "_metadata_hook" not in path]
        where = f"{paths[-1] if paths else '<model>'}, {node.target}"
    return EmitError(f"{what}: {summary(links[-1])}", where=where)


def _node_at_fault(error: BaseException) -> Node | None:
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for name in ("node", "n"):
            candidate = frame.f_locals.get(name)
            if isinstance(candidate, Node) and candidate.op == "call_function":
                found = candidate
    return found


def _chain(error: BaseException) -> Iterator[BaseException]:
    """`error` and its causes, the first cause last."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__
