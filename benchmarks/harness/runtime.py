"""ONNX Runtime as a peer: files as torch exports them, bare sessions, and its own post-training quantization."""

from __future__ import annotations

import ast
import contextlib
import io
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .libraries import need

FILE = "model.onnx"


def exported(
    module: nn.Module, inputs: Sequence[Tensor], names: Sequence[str], folder: Path, sizes: Any = None
) -> Path:
    """An ONNX file as torch's own exporter writes it."""
    need("onnxscript")
    path = folder / FILE
    with contextlib.redirect_stdout(io.StringIO()):  # it tells what it does
        torch.onnx.export(
            module, tuple(inputs), str(path), dynamo=True, input_names=names, dynamic_shapes=sizes, external_data=True
        )
    return path


def session(path: Path) -> Callable[..., tuple[Tensor, ...]]:
    """A bare session, with torch's number of threads: tensors in the order of the file's inputs → its outputs."""
    runtime = need("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    running = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in running.get_inputs()]

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        given = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return tuple(map(torch.from_numpy, running.run(None, given)))

    return run


def quantize_static(
    source: Path, batches: Iterable[Mapping[str, Tensor]], folder: Path, floats: Collection[str] = ()
) -> Path:
    """The file that it makes of a float one: QDQ, uint8 inputs, int8 weights per channel, ranges by min and max.

    On a CPU without VNNI weights have the reduced range that its documentation advises there.

    Args:
        floats: paths of the modules that stay in floats.
    """
    need("onnxruntime")
    from onnxruntime import quantization as ort

    from fxfreeze.cpu import adds_in_16_bits

    class Reader(ort.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {name: value.numpy() for name, value in batch.items()}

    done = folder / "quantized.onnx"
    ort.quantize_static(
        str(_prepared(source, folder)), str(done), Reader(), quant_format=ort.QuantFormat.QDQ, per_channel=True,
        activation_type=ort.QuantType.QUInt8, weight_type=ort.QuantType.QInt8,
        nodes_to_exclude=_nodes_of(source, floats), reduce_range=adds_in_16_bits(),
    )  # fmt: skip
    return done


def quantize_dynamic(source: Path, folder: Path, floats: Collection[str] = ()) -> Path:
    """The same with ranges that every call finds for itself."""
    need("onnxruntime")
    from onnxruntime import quantization as ort

    from fxfreeze.cpu import adds_in_16_bits

    done = folder / "quantized.onnx"
    ort.quantize_dynamic(
        str(_prepared(source, folder)), str(done), per_channel=True, weight_type=ort.QuantType.QInt8,
        nodes_to_exclude=_nodes_of(source, floats), reduce_range=adds_in_16_bits(),
    )  # fmt: skip
    return done


def _prepared(source: Path, folder: Path) -> Path:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = folder / "prepared.onnx"
    try:
        quant_pre_process(str(source), str(path))
    except Exception:  # its symbolic shapes do not get through attention
        quant_pre_process(str(source), str(path), skip_symbolic_shape=True)
    return path


def _nodes_of(source: Path, modules: Collection[str]) -> list[str]:
    """Names of the nodes that torch's exporter made of modules: it notes what ran them, and calls weights by path.

    A convolution that took in a batch norm is noted as that.
    """
    if not modules:
        return []
    graph = need("onnx").load(source, load_external_data=False).graph
    weights = {f"{path}.weight" for path in modules}
    return [node.name for node in graph.node if weights & set(node.input) or _scopes(node) & set(modules)]


def _scopes(node: Any) -> set[str]:
    noted = {item.key: item.value for item in node.metadata_props}.get("pkg.torch.onnx.name_scopes", "[]")
    return set(ast.literal_eval(noted))
