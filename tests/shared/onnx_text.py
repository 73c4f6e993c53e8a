"""Graphs of ONNX as text: parsed, changed as the target does, run, and as ONNX Runtime optimises them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import onnx
import onnx_ir
import onnxruntime

Array = numpy.ndarray[Any, Any]


def parsed(text: str, stored: Mapping[str, Array]) -> onnx.ModelProto:
    """`text`, from the name on, at opset 21, with a name for every node, open output shapes, and what is `stored`."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {text}')
    for position, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{position}"
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in stored.items())
    return onnx.shape_inference.infer_shapes(model)


def changed(before: onnx.ModelProto, change: Callable[[Any], object]) -> onnx.ModelProto:
    """What `change` makes of the graph; it has to be valid."""
    model = onnx_ir.serde.deserialize_model(before)
    change(model.graph)
    found = onnx_ir.serde.serialize_model(model)
    onnx.checker.check_model(found, full_check=True)
    return found


def kinds(found: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in found.graph.node]


def session(found: onnx.ModelProto, options: Any = None) -> Any:
    options = options or onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what matters is raised
    return onnxruntime.InferenceSession(found.SerializeToString(), options, providers=["CPUExecutionProvider"])


def result(found: onnx.ModelProto, **given: Array) -> Array:
    """The first output; of what is given, each input of the graph gets its own."""
    running = session(found)
    first: Array = running.run(None, {item.name: given[item.name] for item in running.get_inputs()})[0]
    return first


def optimised(found: onnx.ModelProto, folder: Path) -> list[str]:
    """The operators that are left when ONNX Runtime has optimised the graph."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    session(found, options)
    return kinds(onnx.load(folder / "optimised.onnx"))
