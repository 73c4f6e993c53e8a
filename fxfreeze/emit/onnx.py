"""Target "onnx": ``model.onnx``, run by ONNX Runtime.

Inputs, outputs and dims carry the plan's names. Weights beyond 1.5 GB lie beside the model in ``model.onnx.data`` (a
protobuf file cannot exceed 2 GB).

Why opset 24 first: from 23 on attention is one operator (``Attention``), which ONNX Runtime executes as such. Measured
with ONNX Runtime 1.32 on two transformers: 102 and 112 nodes after its optimiser at opset 24 (146 and 143 at opset 21),
1 to 10 % faster, and never slower on a CNN; opset 25 exports too, but the exporter and the optimiser know it less well:
334 and 244 nodes, 3 to 20 % slower. Opset 21 comes second, for an ONNX Runtime that does not know 24 or cannot run
``Attention`` as the model needs it. "Cannot" is found out by trying: the file is loaded and run before it counts. Plans
that ask for portable files get 21 alone: few other runtimes are as far as 24, and quantization needs 21.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ArtifactError, EmitError, MissingDependencyError
from ..exporting import quiet
from ..integers import is_head
from ..kernels.float8_linear import KERNEL as FLOAT8
from ..lower import Lowering, emit_error
from ..program import Program, TensorSpec, integer_layers, on_cpu
from ..sampling import sample_inputs, tracing_sizes
from ..serialize import Interface
from . import onnx_blocked, onnx_gates, onnx_heads, onnx_quantized, onnx_sums
from .onnx_torchlib import read_once

FILE = "model.onnx"
OPSETS = (24, 21)
"""Opsets in order of preference; see the module docstring."""

EXTERNAL_BYTES = 1_500_000_000
"""Weights larger than this are stored beside the model."""

_METADATA = "pkg.torch"


def emit(lowering: Lowering, folder: Path) -> dict[str, Any]:
    """Convert into ``model.onnx`` at the first opset that converts, passes onnx.checker, and runs.

    Raises:
        EmitError: no opset does; the error of the preferred one is given, with operator and module where known.
        MissingDependencyError: onnx, onnxscript or onnxruntime is not installed.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        _require(name)
    _refuse_complex(lowering.program)
    first: EmitError | None = None
    for opset in OPSETS[-1:] if lowering.portable else OPSETS:
        try:
            facts, layers, sums = _convert(lowering, folder, opset)
            _try(lowering, folder)
            return {"opset": opset, **facts, **_kernels(lowering.program, folder, layers, sums)}
        except Exception as error:
            for path in folder.glob(f"{FILE}*"):
                path.unlink()
            refusal = emit_error(f"the program cannot be converted to ONNX (opset {opset})", error)
            refusal.__cause__ = error
            first = first or refusal
    assert first is not None
    raise first


def _kernels(program: Program, folder: Path, layers: Sequence[str], sums: Sequence[str]) -> dict[str, Any]:
    """For every quantized layer its site, its step, and the integer kernels that run it, or None.

    The sums of all Tversky heads count as one: which belongs to which is not looked at.
    """
    sites = integer_layers(program)
    if not sites:
        return {}
    counted = [node for node in sites if not is_head(node) and node.target is not FLOAT8.op]
    if len(counted) > len(layers):  # the products are missing
        counted = [node for node in counted if not sites[node].product]
    count = len(counted)
    if count != len(layers):
        raise EmitError(
            f"{count} quantized layers became {len(layers)} in ONNX, and it is not known which is which", where=FILE,
            hint="the converter makes one of small convolutions with equal weights and inputs: exclude all but one",
        )  # fmt: skip
    ran = onnx_quantized.kernels(folder / FILE, [*layers, *sums])
    of_layers, of_heads = iter(ran[:count]), ran[count:]
    known = sorted({kernel for kernel in of_heads if kernel is not None})
    head = " and ".join(known) if known and None not in of_heads else None
    ran_by = {node: next(of_layers) for node in counted}
    ran_by |= dict.fromkeys(filter(is_head, sites), head)
    return {"integer": [row for node, site in sites.items() for row in site.ran(ran_by.get(node))]}


def load(folder: Path, interface: Interface) -> OnnxRunner:
    """Open a session. Raises ArtifactError when ONNX Runtime refuses the file."""
    return OnnxRunner(folder / FILE, interface)


# ---------------------------------------------------------------------------------------------- writing


def _convert(lowering: Lowering, folder: Path, opset: int) -> tuple[dict[str, Any], list[str], list[str]]:
    """Facts, the names of the nodes that read a quantized weight, and of those that sum integers in Tversky heads."""
    import onnx

    program, exported = lowering.program, lowering.quantized
    with torch.no_grad(), quiet(), read_once():
        converted: Any = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=opset,
            custom_translation_table=onnx_quantized.translations(),
            verbose=False,
        )
    model = converted.model
    _name_dims(model.graph, program.inputs)
    _strip(model)
    sums = onnx_heads.integer_sums(model.graph) if any(map(is_head, program.graph.nodes)) else []
    asked = sum(site.product for site in integer_layers(program).values())
    layers = onnx_quantized.shape_for_runtime(model.graph, asked, lowering.portable)
    if not lowering.portable:
        onnx_blocked.stay_blocked(model.graph)
        if on_cpu(program.inputs):
            onnx_gates.multiply(model.graph)
            onnx_sums.stay_fast(model.graph)
    # Behind all that puts new values in the place of outputs.
    _name_values(model.graph, [spec.name for spec in program.inputs], program.outputs)
    _add_defaults(model.graph, lowering.defaults)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    external = size > EXTERNAL_BYTES
    converted.save(str(folder / FILE), external_data=external)
    onnx.checker.check_model(str(folder / FILE), full_check=True)
    return {"external_data": external, "outputs": [value.name for value in model.graph.outputs]}, layers, sums


def _add_defaults(graph: Any, defaults: Mapping[str, Tensor]) -> None:
    """An input with an initializer of its name may be left out."""
    from onnx_ir.tensor_adapters import TorchTensor

    for value in graph.inputs:
        if value.name in defaults:
            value.const_value = TorchTensor(defaults[value.name].detach().cpu().contiguous(), name=value.name)
            graph.register_initializer(value)


def _refuse_complex(program: Program) -> None:
    dtypes = [(spec.name, spec.dtype) for spec in program.inputs]
    dtypes += [(name, node.meta["val"].dtype) for name, node in zip(program.outputs, program.output_nodes, strict=True)]
    for name, dtype in dtypes:
        if dtype.is_complex:
            raise EmitError(
                f"ONNX has no complex tensors, and {name!r} is {dtype}",
                where=name, hint="pass it as two real tensors: torch.view_as_real, torch.view_as_complex",
            )  # fmt: skip


def _name_values(graph: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Give inputs and outputs their names; the exporter's own renaming lets them collide with values in between.

    An output that is an input, a constant or another output as well becomes a value of its own, for ONNX wants every
    value named once. Where the plan names an input and an output alike, the output gets "_out" appended.
    """
    if (len(graph.inputs), len(graph.outputs)) != (len(inputs), len(outputs)):
        raise EmitError(f"{len(graph.inputs)} inputs and {len(graph.outputs)} outputs came out of the converter")
    _separate_outputs(graph)
    values = [*graph.initializers.values(), *(value for node in graph.all_nodes() for value in node.outputs)]
    taken = {value.name for value in (*graph.inputs, *values)} | set(inputs)
    wanted = [*inputs, *(name if name not in inputs else _fresh(f"{name}_out", taken) for name in outputs)]
    taken |= set(wanted)
    for value in (*graph.inputs, *values):
        if value.name in wanted:
            _rename(graph, value, _fresh(f"{value.name}_value", taken))
    for value, name in zip((*graph.inputs, *graph.outputs), wanted, strict=True):
        _rename(graph, value, name)


def _separate_outputs(graph: Any) -> None:
    import onnx_ir

    seen = {id(value) for value in (*graph.inputs, *graph.initializers.values())}
    for position, value in enumerate(graph.outputs):
        if id(value) in seen:
            node = onnx_ir.node("Identity", inputs=[value])
            graph.append(node)
            (twin,) = node.outputs
            twin.name, twin.shape, twin.type = f"{value.name}_{position}", value.shape, value.type
            graph.outputs[position] = twin
        seen.add(id(value))


def _rename(graph: Any, value: Any, name: str) -> None:
    stored = graph.initializers.get(value.name) is value
    if stored:
        del graph.initializers[value.name]
    value.name = name
    if value.const_value is not None:
        value.const_value.name = name
    if stored:
        graph.initializers[name] = value


def _fresh(name: str, taken: set[str]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        candidate, count = f"{name}_{count}", count + 1
    taken.add(candidate)
    return candidate


def _name_dims(graph: Any, specs: Sequence[TensorSpec]) -> None:
    """Replace torch's symbols (``s77``) by the plan's names, in every shape and every expression of one."""
    import onnx_ir

    names: dict[str, str] = {}
    for value, spec in zip(graph.inputs, specs, strict=True):
        for dim, size in zip(value.shape, spec.shape, strict=True):
            if isinstance(size, str) and isinstance(dim, onnx_ir.SymbolicDim) and dim.value:
                names.setdefault(str(dim.value), size)
    if not names:
        return
    symbol = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    values = {id(value): value for value in (*graph.inputs, *graph.outputs)}
    values |= {id(value): value for node in graph.all_nodes() for value in node.outputs}
    for value in values.values():
        if value.shape is None:
            continue
        value.shape = onnx_ir.Shape(
            [
                symbol.sub(lambda match: names[match[0]], dim.value)
                if isinstance(dim, onnx_ir.SymbolicDim) and dim.value
                else dim
                for dim in value.shape
            ]
        )


def _strip(model: Any) -> None:
    """Drop the exporter's debugging notes (graph dumps, source lines) but for the module path of each node."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        _drop_notes(value.metadata_props)
    for node in model.graph.all_nodes():
        _drop_notes(node.metadata_props)
        for value in node.outputs:
            _drop_notes(value.metadata_props)


def _drop_notes(notes: Any) -> None:
    # "namespace" says the same as the name scopes, at three times the length.
    for key in [key for key in notes if key.startswith((_METADATA, "namespace")) and not key.endswith("name_scopes")]:
        del notes[key]


def _try(lowering: Lowering, folder: Path) -> None:
    program = lowering.program
    inputs = sample_inputs(program, tracing_sizes(program.inputs, program.dims, None), 0, lowering.examples)
    load(folder, Interface.of(program))(*inputs)


# ---------------------------------------------------------------------------------------------- running


class OnnxRunner:
    """Runner over an ``onnxruntime.InferenceSession`` with torch's number of threads."""

    def __init__(self, path: Path, interface: Interface) -> None:
        self._inputs = interface.inputs
        self._device = interface.inputs[0].device if interface.inputs else torch.device("cpu")
        runtime = _require("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Threads may spin while a call runs, which is fast, but not on after it, which would slow everything else down.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        onnx_quantized.configure(options)
        options.log_severity_level = 4  # whatever matters is raised
        providers = ["CPUExecutionProvider"]
        if self._device.type == "cuda" and "CUDAExecutionProvider" in runtime.get_available_providers():
            providers.insert(0, "CUDAExecutionProvider")
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:
            raise ArtifactError(f"ONNX Runtime {runtime.__version__} refuses the model: {error}", where=FILE) from error
        half = [spec for spec in interface.inputs if spec.dtype == torch.bfloat16]
        half += [value for value in self._session.get_outputs() if value.type == "tensor(bfloat16)"]
        self._run = self._run_values if half else self._run_arrays

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        feeds = {spec.name: value.detach().cpu().contiguous() for spec, value in zip(self._inputs, inputs, strict=True)}
        try:
            results = self._run(feeds)
        except Exception as error:
            raise ArtifactError(f"ONNX Runtime failed: {error}", where=FILE) from error
        return tuple(value.to(self._device) for value in results)

    def _run_arrays(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        import numpy

        arrays = {name: value.numpy() for name, value in feeds.items()}
        return [torch.from_numpy(numpy.asarray(value)) for value in self._session.run(None, arrays)]

    def _run_values(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        """For bfloat16, which numpy does not know: its bits go in as int16, and come out through DLPack."""
        values = {name: _to_ort(value) for name, value in feeds.items()}
        results = self._session.run_with_ort_values(None, values)
        return [
            torch.from_dlpack(value._ortvalue.to_dlpack()).clone()
            if value.element_type() == _BFLOAT16
            else torch.from_numpy(value.numpy())
            for value in results
        ]


_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16, spelled out so that running needs onnxruntime alone


def _to_ort(value: Tensor) -> Any:
    kind = _require("onnxruntime").OrtValue
    if value.dtype != torch.bfloat16:
        return kind.ortvalue_from_numpy(value.numpy())
    return kind.ortvalue_from_numpy_with_onnx_type(value.view(torch.int16).numpy(), _BFLOAT16)


def _require(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise MissingDependencyError(
            f"the onnx target needs the package {name!r}", hint="pip install 'fxfreeze[onnx]'"
        ) from error
