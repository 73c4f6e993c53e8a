"""NNCF's post-training quantization of ONNX files: its statistics, its bias correction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import arguments


def quantized(onnx_file: Path, calibration: list[dict[str, Any]], out: Path) -> Path:
    import nncf
    import onnx

    # `subset_size` counts items of the data set, of which each is a batch.
    made = nncf.quantize(onnx.load(str(onnx_file)), nncf.Dataset(calibration), subset_size=len(calibration))
    onnx.save(made, str(out))
    return out


if __name__ == "__main__":
    quantized(*arguments())
