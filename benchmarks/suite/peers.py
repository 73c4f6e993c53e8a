"""The libraries that compete: each takes a network and a variant, and gives a callable that does the same job.

Nothing here knows fxfreeze, but for :func:`fxfreeze`. What a library cannot do it says itself.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import models, runtime
from .. import peers as environments
from ..harness import Peer
from . import plans
from .networks import Network
from .plans import RANK, Variant

Call = Callable[..., Any]
Build = Callable[[Network, Variant], nn.Module]


# ---- what is run: modules, without the compiler


def plain(network: Network, variant: Variant) -> nn.Module:
    return plans.plain(network, variant)


def merged(network: Network, variant: Variant) -> nn.Module:
    """LoRAs put into the weights by hand."""
    return plans.plain(network, variant, merged=True)


def peft(network: Network, variant: Variant) -> Any:
    """The network with peft's LoRA, which has our A and B."""
    library = models.need("peft")
    config = library.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(plans.updates(network)))
    net = library.get_peft_model(copy.deepcopy(network.model), config)
    for site, (a, b) in plans.updates(network).items():
        layer = net.base_model.model.get_submodule(site)
        layer.lora_A["default"].weight.data.copy_(a)
        layer.lora_B["default"].weight.data.copy_(b)
    return net.eval().requires_grad_(False)


def peft_merged(network: Network, variant: Variant) -> nn.Module:
    module: nn.Module = peft(network, variant).merge_and_unload()
    return module.eval().requires_grad_(False)


def torch_pruning(network: Network, variant: Variant) -> nn.Module:
    """The network without the units that the masks take, by Torch-Pruning; LoRAs are merged."""
    library = models.need("torch_pruning")
    model = merged(network, variant)
    inside = {site: model.get_submodule(site) for site in plans.removed(network)}
    if variant.gates:  # it knows no gates: their numbers go by hand
        inside = {site: getattr(module, "module", module) for site, module in inside.items()}
    model.requires_grad_()  # it sees what autograd does
    with torch.enable_grad():
        graph = library.DependencyGraph().build_dependency(model, example_inputs=network.example)
        for site, (_, gone) in plans.removed(network).items():
            layer = inside[site]
            kind = "linear" if isinstance(layer, nn.Linear) else "conv"
            prune = getattr(library, f"prune_{kind}_out_channels")
            graph.get_pruning_group(layer, prune, idxs=gone.tolist()).prune()
    return model.eval().requires_grad_(False)


# ---- how it is run


def eager(build: Build, network: Network, variant: Variant) -> Call:
    return build(network, variant)


def compiled(build: Build, network: Network, variant: Variant, freezing: bool) -> Call:
    fast: Call = models.compiled(build(network, variant), freezing)
    return fast


def aot_inductor(build: Build, network: Network, variant: Variant) -> Call:
    folder = tempfile.TemporaryDirectory()
    with torch.no_grad():
        program = torch.export.export(build(network, variant), network.example, dynamic_shapes=network.open_sizes())
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=f"{folder.name}/model.pt2", inductor_configs={"freezing": True}
        )
    return keeping(torch._inductor.aoti_load_package(path), folder)


def keeping(call: Any, *held: Any) -> Call:
    """The call; what it reads from lives as long as it does."""

    def run(*inputs: Tensor) -> Any:
        return call(*inputs)

    run.held = held  # type: ignore[attr-defined]
    return run


def onnx_file(build: Build, network: Network, variant: Variant, folder: Path) -> Path:
    """As torch's own exporter writes it."""
    names = list(network.shapes)
    return exported(build(network, variant), network.example, names, folder, network.open_sizes())


def exported(
    module: nn.Module, inputs: Sequence[Tensor], names: Sequence[str], folder: Path, sizes: Any = None
) -> Path:
    models.need("onnxscript")
    path = folder / "model.onnx"
    with contextlib.redirect_stdout(io.StringIO()):  # it tells what it does
        torch.onnx.export(
            module, tuple(inputs), str(path), dynamo=True, input_names=names, dynamic_shapes=sizes, external_data=True
        )
    return path


def exported_session(module: nn.Module, inputs: Sequence[Tensor], names: Sequence[str]) -> Call:
    """A module of other cases on ONNX Runtime."""
    models.need("onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        return runtime.session(exported(module.eval(), inputs, names, Path(folder)))


def onnx_runtime(build: Build, network: Network, variant: Variant) -> Call:
    models.need("onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        return runtime.session(onnx_file(build, network, variant, Path(folder)))


def quantize_static(build: Build, network: Network, variant: Variant) -> Call:
    """ONNX Runtime's own, on the same ONNX file."""
    models.need("onnxruntime")
    batches = [dict(zip(network.shapes, given, strict=True)) for given in network.calibration()]
    with tempfile.TemporaryDirectory() as name:
        source = onnx_file(build, network, variant, Path(name))
        return runtime.session(runtime.quantize_static(source, batches, Path(name)))


def nncf(build: Build, network: Network, variant: Variant) -> Call:
    """NNCF on the same ONNX file, with its defaults, in an environment of its own."""
    names = list(network.shapes)
    batches = [{name: value.numpy() for name, value in zip(names, given, strict=True)}
               for given in network.calibration()]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        source = onnx_file(build, network, variant, Path(folder))
        return runtime.session(environments.quantized("nncf", source, batches, Path(folder) / "done.onnx"))


def torchao(build: Build, network: Network, variant: Variant) -> Call:
    """PT2E static quantization for x86, through torch.compile with freezing."""
    models.need("torchao")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    exporting = functools.partial(
        torch.export.export, build(network, variant), network.example, dynamic_shapes=network.open_sizes()
    )
    with torch.no_grad():
        try:
            program = exporting(strict=True)  # else its quantizer takes a ReLU that is called twice for one
        except Exception:
            program = exporting()
        prepared = prepare_pt2e(program.module(), quantizer)
        for inputs in network.calibration():
            prepared(*inputs)
        fast: Call = models.compiled(convert_pt2e(prepared))
    return fast


def fxfreeze(network: Network, variant: Variant, target: str) -> Call:
    """What the artifact of the plan runs, without the checks of its call."""
    artifact = plans.frozen(network, variant, target)
    return keeping(artifact.runner(target), artifact)


# ---- by name

PLAIN: dict[str, Call] = {
    "eager": functools.partial(eager, plain),
    "torch.compile": functools.partial(compiled, plain, freezing=False),
    "torch.compile, freezing": functools.partial(compiled, plain, freezing=True),
    "AOTInductor": functools.partial(aot_inductor, plain),
    "ONNX Runtime": functools.partial(onnx_runtime, plain),
}
OTHERS: dict[str, Call] = {
    "peft, eager": functools.partial(eager, peft),
    "peft merged, torch.compile, freezing": functools.partial(compiled, peft_merged, freezing=True),
    "peft merged, ONNX Runtime": functools.partial(onnx_runtime, peft_merged),
    "Torch-Pruning, torch.compile, freezing": functools.partial(compiled, torch_pruning, freezing=True),
    "Torch-Pruning, ONNX Runtime": functools.partial(onnx_runtime, torch_pruning),
    "quantize_static": functools.partial(quantize_static, plain),
    "torchao": functools.partial(torchao, plain),
    "NNCF, ONNX Runtime": functools.partial(nncf, plain),
    "merged by hand, quantize_static": functools.partial(quantize_static, merged),
}
OURS: dict[str, Call] = {
    f"fxfreeze, {target}": functools.partial(fxfreeze, target=target) for target in ("onnx", "aoti", "torch")
}
EVERY = PLAIN | OTHERS | OURS


def peer(name: str, network: Network, variant: Variant) -> Peer:
    return Peer(name, functools.partial(EVERY[name], network, variant))
