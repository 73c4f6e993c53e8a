"""What of a compiled model does not depend on the machine: operators, bytes, multiply-accumulates, and a hash.

Passes that keep a rewrite only where it was measured to be faster are told that it is (:func:`decided`): no clock is
read. Nothing here is timed.
"""

from __future__ import annotations

import hashlib
import platform
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.fx import Node

from . import structure_cases as cases

# ---- decisions


def _one_faster(layer: Any) -> list[tuple[float, float]]:
    return [(1.0, 2.0) for _ in layer.sizes]


def _gather_faster(layer: Any) -> dict[tuple[int, int], dict[str, float]]:
    return {size: {"gather": 1.0, "mask": 2.0} for size in zip(layer.rows, layer.tokens, strict=True)}


def _sparse_faster(layer: Any) -> list[Any]:
    from fxfreeze.passes.fuse.sparse_down import Point

    return [Point(firing, dense=2.0, sparse=1.0) for firing in (0.05, 0.25, 1.0, float(layer.rows))]


FASTER: Mapping[str, Callable[[Any], Any]] = {
    "sparse-down": _sparse_faster,
    "block-sparse": _one_faster,
    "semi-structured": _one_faster,
    "fuse-gated-linear": lambda layer: (1.0, 2.0),
    "fuse-quantized-gate": lambda layer: (1.0, 2.0),
    "merge-parallel": _one_faster,
    "select-form": _gather_faster,  # the form that takes any number of adapters
}
"""Pass → the times that it is given instead of those it measures: its rewrite takes half as long."""


@contextmanager
def decided() -> Iterator[None]:
    """Passes that decide by a clock make their rewrites.

    Raises:
        KeyError: a pass has a clock that is not in :data:`FASTER`.
    """
    from fxfreeze.passes import PIPELINE

    clocks: list[Any] = [item for item in PIPELINE if hasattr(item, "measure")]
    if unknown := {item.name for item in clocks} - FASTER.keys():
        raise KeyError(f"{', '.join(sorted(unknown))}: say in FASTER what is measured")
    before = [item.measure for item in clocks]
    try:
        for item in clocks:
            item.measure = FASTER[item.name]
        yield
    finally:
        for item, measure in zip(clocks, before, strict=True):
            item.measure = measure


# ---- all that is counted of one case


def counted(case: cases.Case) -> dict[str, Any]:
    """The numbers of `case`, as they are stored."""
    with decided():
        artifact = cases.compiled(case)
    found = of_artifact(artifact)
    return found | ({"inductor_calls": of_inductor(artifact)} if case.inductor else {})


def of_artifact(artifact: Any) -> dict[str, Any]:
    from fxfreeze.serialize import load_program

    program = load_program(artifact.folder / "program")
    found = {"stages": stages(artifact.manifest["passes"]), **of_program(program)}
    if "onnx" in artifact.manifest["targets"]:
        found |= of_onnx(artifact.folder / "onnx" / "model.onnx")
    return found


def stages(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Operators after each stage of the pipeline."""
    return {row["stage"]: row["operators_after"] for row in rows}


def of_program(program: Any) -> dict[str, Any]:
    constants = {str(node.target): node.meta["val"] for node in program.graph.nodes if node.op == "get_attr"}
    return {
        "operators": tally(_operator(node) for node in program.graph.nodes if node.op == "call_function"),
        "constants": len(constants),
        "bytes": sum(value.numel() * value.element_size() for value in constants.values()),
        "multiply_accumulates": multiply_accumulates(program),
        "hash": structural_hash(program),
    }


def _operator(node: Node) -> str:
    """``linear`` for one of ATen's, ``fxfreeze.gate`` for one of ours, ``getitem`` for a function on sizes."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return str(getattr(target, "__name__", target))
    return target._schema.name.replace("::", ".").removeprefix("aten.")


def tally(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


# ---- multiply-accumulates


def multiply_accumulates(program: Any) -> int:
    """Of matrix products and convolutions, at the sizes the program is traced at; operators of ours count as their
    plain-torch references do, and attention as its two products."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from fxfreeze.lower import references
    from fxfreeze.sampling import sample_inputs, tracing_sizes

    inputs = sample_inputs(program, tracing_sizes(program.inputs, program.dims, None), seed=0)
    plain = references()

    def call(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return plain.get(node.target, node.target)(*args, **kwargs)

    # Of the fused form of a CPU the counter knows nothing.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        program.execute(inputs, program.stored, call)
    return counter.get_total_flops() // 2


# ---- the hash


def structural_hash(program: Any) -> str:
    """Of operators, edges, attributes, shapes and dtypes: not of names, values, or the order in which nodes stand.

    Every node is hashed with all that it is computed from, and then with all that reads it. A graph without cycles
    needs no more; networkx's Weisfeiler-Lehman hash changes between its versions.
    """
    nodes = list(program.graph.nodes)
    down: dict[Node, str] = {}
    for node in nodes:
        if node.op != "output":
            down[node] = _digest(_label(program, node), _operands(node, down))
    up: dict[Node, str] = {}
    for node in reversed(nodes):
        if node.op == "output":
            up[node] = "output"
        else:
            up[node] = _digest(down[node], sorted(f"{_position(node, user)} {up[user]}" for user in node.users))
    return _digest(_operands(program.graph.output_node(), down), sorted(up[node] for node in nodes if node in down))


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _label(program: Any, node: Node) -> tuple[Any, ...]:
    if node.op == "placeholder":
        return "input", program.inputs[program.placeholders.index(node)].name, _kind(node)
    if node.op == "get_attr":
        return "constant", _kind(node)
    overload = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else ""
    return _operator(node), overload, _kind(node)


def _kind(node: Node) -> Any:
    """Shapes and dtypes of what a node gives. A size that may vary is that of the trace, with a mark: how torch writes
    expressions of symbols depends on its version."""

    def describe(value: Any) -> Any:
        if isinstance(value, Tensor):
            return str(value.dtype), [_size(size) for size in value.shape]
        if isinstance(value, list | tuple):
            return [describe(item) for item in value]
        return _size(value)

    return describe(node.meta.get("val"))


def _size(size: Any) -> Any:
    return f"~{size.node.hint}" if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) else size


def _operands(node: Node, known: Mapping[Node, str]) -> str:
    """The arguments, with hashes in the place of nodes."""

    def describe(value: Any) -> Any:
        if isinstance(value, Node):
            return known[value]
        if isinstance(value, Mapping):
            return {str(key): describe(item) for key, item in sorted(value.items())}
        if isinstance(value, list | tuple):
            return [describe(item) for item in value]
        return f"{type(value).__name__} {value}"

    return repr((describe(node.args), describe(node.kwargs)))


def _position(node: Node, user: Node) -> str:
    """Where among the arguments of `user` the node stands."""
    return _operands(user, {other: "x" if other is node else "" for other in user.all_input_nodes})


# ---- what is emitted


def of_onnx(file: Path) -> dict[str, Any]:
    import onnx

    graph = onnx.load(file, load_external_data=False).graph
    return {
        "onnx_bytes": sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*")),
        "onnx_initializers": len(graph.initializer),
        "onnx_nodes": tally(node.op_type for node in graph.node),
        "runtime_nodes": of_runtime(file),
    }


def of_runtime(file: Path) -> dict[str, int]:
    """Nodes of the graph that ONNX Runtime makes of the file, up to where it arranges memory for this processor."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.log_severity_level = 4
        onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        return tally(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


CALLS = re.compile(r"^\s+(?:\w+ = )?(cpp_fused|extern_kernels\.\w+|torch\.ops\.[\w.]+)\w*\(", re.MULTILINE)
"""In the Python that Inductor writes: of a kernel of its own, or of a library's."""
SETTINGS = {"force_disable_caches": True, "compile_threads": 1, "cpp.simdlen": 1}
"""No vectors: how wide those of this processor are does not matter then."""


class _Written(Exception):
    """The code is there, and need not be built."""


def of_inductor(artifact: Any) -> dict[str, int]:
    """Calls in the code that Inductor writes for the torch target, by what is called; ``fused`` are its own kernels."""
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    from fxfreeze.emit import EMITTERS, PROGRAM
    from fxfreeze.errors import EmitError
    from fxfreeze.sampling import sample_inputs, tracing_sizes
    from fxfreeze.serialize import load_program

    written: list[str] = []

    def write(graph: Any) -> None:
        written.append(graph.codegen()[0].value)
        raise _Written

    program = load_program(artifact.folder / PROGRAM, shapes=False)
    inputs = sample_inputs(program, tracing_sizes(program.inputs, program.dims, None), seed=0)
    run = EMITTERS["torch"].load(artifact.folder / PROGRAM, artifact.interface)
    with config.patch(SETTINGS), mock.patch.object(GraphLowering, "compile_to_module", write), suppress(EmitError):
        run(*inputs)
    if not written:
        raise RuntimeError("Inductor wrote no code")
    names = (name.replace("cpp_fused", "fused").removeprefix("torch.ops.") for name in CALLS.findall(written[0]))
    return tally(names)


# ---- what the numbers depend on


def versions() -> dict[str, str]:
    """Of what they were counted with."""
    import onnx
    import onnxruntime
    import onnxscript

    return {
        "torch": torch.__version__.partition("+")[0], "onnx": onnx.__version__, "onnxscript": onnxscript.__version__,
        "onnxruntime": onnxruntime.__version__, "architecture": platform.machine(),
    }  # fmt: skip
