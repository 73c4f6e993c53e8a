"""ONNX Runtime as a peer: bare sessions, and its own post-training quantization."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import models


def session(path: Path) -> Callable[..., tuple[Tensor, ...]]:
    """A bare session, with torch's number of threads: tensors in the order of the file's inputs → its outputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    running = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in running.get_inputs()]

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        given = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return tuple(map(torch.from_numpy, running.run(None, given)))

    return run


def quantize_static(source: Path, batches: Iterable[Mapping[str, Tensor]], folder: Path) -> Path:
    """The file that it makes of a float one: QDQ, uint8 inputs, int8 weights per channel, ranges by min and max."""
    models.need("onnxruntime")
    from onnxruntime import quantization as ort
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(ort.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {name: value.numpy() for name, value in batch.items()}

    prepared, done = (folder / f"{name}.onnx" for name in ("prepared", "quantized"))
    try:
        quant_pre_process(str(source), str(prepared))
    except Exception:  # its symbolic shapes do not get through attention
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    ort.quantize_static(
        str(prepared), str(done), Reader(), quant_format=ort.QuantFormat.QDQ, per_channel=True,
        activation_type=ort.QuantType.QUInt8, weight_type=ort.QuantType.QInt8,
    )  # fmt: skip
    return done
