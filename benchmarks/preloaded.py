"""What the processes of peers are forked with: torch, its exporters and compilers, and the libraries of the networks.

None of the libraries that compete is here, but for torchao, which transformers imports. A peer imports its own, and has
no other's in its process.
"""

from __future__ import annotations

import contextlib
import importlib

NAMES = (
    "torch", "torch.export", "torch._dynamo", "torch._inductor.compile_fx", "torch.utils.cpp_extension",
    "torch.onnx._internal.exporter._core", "onnx", "onnxscript.function_libs.torch_lib.ops", "onnxscript.rewriter",
    "torchvision", "timm", "transformers.models.bert.modeling_bert", "transformers.models.gpt2.modeling_gpt2",
)  # fmt: skip

for name in NAMES:
    with contextlib.suppress(Exception):  # the peers that need it say why they cannot run
        importlib.import_module(name)
