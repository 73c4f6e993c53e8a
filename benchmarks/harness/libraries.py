"""What other libraries make of a torch module, to do the same job: torch.compile, torchao, peft."""

from __future__ import annotations

import copy
import functools
import importlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .case import Unavailable


def need(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise Unavailable(f"needs {package}, which is not installed") from error


def compiled(module: nn.Module, freezing: bool = True) -> Any:
    """torch.compile, with the weights frozen into the code or not.

    The setting is the process's, which a peer has for itself. As an option of torch.compile alone, freezing is not seen
    by dynamo, which passes the weights as inputs: a ResNet-18 then takes twice as long, and integers do not compile.
    """
    torch._inductor.config.freezing = freezing  # type: ignore[attr-defined]
    return torch.compile(module)


# ---- torchao


def torchao_static(
    module: nn.Module, example: Sequence[Tensor], sizes: Any, batches: Iterable[Sequence[Tensor]],
    floats: Collection[str] = (),
) -> Any:  # fmt: skip
    """PT2E static quantization for x86, through torch.compile with freezing.

    Args:
        example, sizes: what torch.export traces, and which sizes stay open.
        batches: what ranges are measured on.
        floats: paths of the layers that stay in floats.
    """
    need("torchao")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    from fxfreeze.cpu import adds_in_16_bits

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(reduce_range=adds_in_16_bits()))
    for path in floats:
        quantizer.set_module_name_qconfig(path, None)
    exporting = functools.partial(torch.export.export, module, tuple(example), dynamic_shapes=sizes)
    with torch.no_grad():
        try:
            program = exporting(strict=True)  # else its quantizer takes a ReLU that is called twice for one
        except Exception:
            program = exporting()
        prepared = prepare_pt2e(program.module(), quantizer)
        for inputs in batches:
            prepared(*inputs)
        return compiled(convert_pt2e(prepared))


def torchao_weights(module: nn.Module, bits: int, group: int = 0, floats: Collection[str] = ()) -> Any:
    """The weights of linear layers as integers, which are changed in place, through torch.compile with freezing.

    Args:
        group: inputs that share a scale; 0: all of them.
        floats: paths of the layers that stay in floats.
    """
    need("torchao")
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    if bits == 8:
        config: Any = Int8WeightOnlyConfig(group_size=group or None)
    elif next(module.parameters()).is_cuda:
        config = Int4WeightOnlyConfig(group_size=group)
    else:  # the other's formats are for GPUs
        config = need("torchao.prototype.quantization.int4").PrototypeInt4WeightOnlyConfig(group_size=group)
    with torch.no_grad():
        quantize_(module, config, lambda layer, path: isinstance(layer, nn.Linear) and path not in floats)
    return compiled(module)


# ---- peft


def peft_lora(model: nn.Module, updates: Mapping[str, tuple[Tensor, Tensor]]) -> Any:
    """A peft model around a copy of `model`, whose layers, by path, have these A and B: W + B·A."""
    library = need("peft")
    ranks = {f"^{re.escape(path)}": len(a) for path, (a, _) in updates.items()}  # a path alone means what ends so, too
    targets = "|".join(map(re.escape, updates))
    config = library.LoraConfig(target_modules=targets, rank_pattern=ranks, alpha_pattern=ranks)
    net = library.get_peft_model(copy.deepcopy(model), config)
    for path, pair in updates.items():
        layer = net.get_base_model().get_submodule(path)
        for given, value in zip((layer.lora_A, layer.lora_B), pair, strict=True):
            weight = given["default"].weight
            weight.data.copy_(value.view_as(weight))
    return net.eval().requires_grad_(False)


def peft_merged(model: nn.Module, updates: Mapping[str, tuple[Tensor, Tensor]]) -> nn.Module:
    """The same, put into the weights by peft."""
    module: nn.Module = peft_lora(model, updates).merge_and_unload()
    return module.eval().requires_grad_(False)
