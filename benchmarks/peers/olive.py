"""Olive's pass OnnxStaticQuantization: QDQ, uint8 inputs, int8 weights with a scale per channel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import arguments

SETTINGS = {"quant_format": "QDQ", "activation_type": "uint8", "precision": "int8", "per_channel": True}


def quantized(onnx_file: Path, calibration: list[dict[str, Any]], out: Path) -> Path:
    from olive.data.component.dataset import BaseDataset
    from olive.data.config import DataComponentConfig, DataConfig
    from olive.data.registry import Registry
    from olive.model import ONNXModelHandler
    from olive.passes.olive_pass import create_pass_from_dict
    from olive.passes.onnx.quantization import OnnxStaticQuantization

    rows = [{name: value[at] for name, value in batch.items()}
            for batch in calibration for at in range(len(next(iter(batch.values()))))]  # fmt: skip

    class Rows(BaseDataset):
        """Its loader makes batches, of one row; an item is inputs and a label."""

        def __getitem__(self, at: int) -> tuple[dict[str, Any], int]:
            return rows[at], 0

    Registry.register_dataset("given")(lambda **how: Rows(rows))
    data = DataConfig(name="calibration", load_dataset_config=DataComponentConfig(type="given"))
    how = {**SETTINGS, "data_config": data}
    step = create_pass_from_dict(OnnxStaticQuantization, how, disable_search=True)
    step.run(ONNXModelHandler(str(onnx_file)), str(out))
    return out


if __name__ == "__main__":
    quantized(*arguments())
