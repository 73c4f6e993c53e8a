"""The libraries that compete: each takes a network and a variant, and gives a callable that does the same job.

Nothing here knows fxfreeze, but for :func:`fxfreeze`. What a library cannot do it says itself.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from .. import peers as environments
from ..harness import Loaded, Peer, libraries, runtime, shelf
from . import plans
from .networks import Network
from .plans import Variant

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
    return libraries.peft_lora(network.model, plans.updates(network))


def peft_merged(network: Network, variant: Variant) -> nn.Module:
    return libraries.peft_merged(network.model, plans.updates(network))


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
    fast: Call = libraries.compiled(build(network, variant), freezing)
    return fast


def aot_inductor(build: Build, network: Network, variant: Variant) -> Call:
    folder = tempfile.TemporaryDirectory()
    with torch.no_grad():
        program = torch.export.export(build(network, variant), network.example, dynamic_shapes=network.open_sizes())
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=f"{folder.name}/model.pt2", inductor_configs={"freezing": True}
        )
    return Loaded(lambda: torch._inductor.aoti_load_package(path), folder)


def onnx_file(build: Build, network: Network, variant: Variant, folder: Path) -> Path:
    """As torch's own exporter writes it: in `folder`, but for the bare network's, which several peers start from."""

    def export(folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        names = list(network.shapes)
        return runtime.exported(build(network, variant), network.example, names, folder, network.open_sizes())

    if network.folder and build is plain and variant in (plans.BARE, plans.QUANTIZED):
        return shelf.shared(network.folder, "exported", export) / runtime.FILE
    return export(folder)


def exported_session(module: nn.Module, inputs: Sequence[Tensor], names: Sequence[str]) -> Call:
    """A module of other cases on ONNX Runtime."""
    return session(lambda folder: runtime.exported(module.eval(), inputs, names, folder))


def session(write: Callable[[Path], Path]) -> Call:
    """ONNX Runtime on the file that is written into a folder."""
    models.need("onnxruntime")
    folder = tempfile.TemporaryDirectory()
    path = write(Path(folder.name))
    return Loaded(lambda: runtime.session(path), folder)


def onnx_runtime(build: Build, network: Network, variant: Variant) -> Call:
    return session(lambda folder: onnx_file(build, network, variant, folder))


def quantize_static(build: Build, network: Network, variant: Variant) -> Call:
    """ONNX Runtime's own, on the same ONNX file."""
    batches = [dict(zip(network.shapes, given, strict=True)) for given in network.calibration()]
    return session(lambda folder: runtime.quantize_static(onnx_file(build, network, variant, folder), batches, folder))


def nncf(build: Build, network: Network, variant: Variant) -> Call:
    """NNCF on the same ONNX file, with its defaults, in an environment of its own."""
    names = list(network.shapes)
    batches = [{name: value.numpy() for name, value in zip(names, given, strict=True)}
               for given in network.calibration()]  # fmt: skip

    def write(folder: Path) -> Path:
        source = onnx_file(build, network, variant, folder)
        return environments.quantized("nncf", source, batches, folder / "done.onnx")

    return session(write)


def torchao(build: Build, network: Network, variant: Variant) -> Call:
    fast: Call = libraries.torchao_static(
        build(network, variant), network.example, network.open_sizes(), network.calibration()
    )
    return fast


def fxfreeze(target: str, network: Network, variant: Variant, *others: str) -> Call:
    """What the artifact of the plan runs, without the checks of its call; it has `others` for the peers behind."""
    artifact = plans.artifact(network, variant, target, *others)
    if target == "torch":  # as the others' torch.compile: loaded again, it would be compiled again
        call: Any = functools.partial(artifact.runner(target))
        call.artifact = artifact  # its files go with it
        return call
    return Loaded(lambda: type(artifact)(artifact.folder, artifact.manifest).runner(target), artifact)


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
PREFIX = "fxfreeze, "
OURS: dict[str, Call] = {
    f"{PREFIX}{target}": functools.partial(fxfreeze, target) for target in ("onnx", "aoti", "torch")
}
EVERY = PLAIN | OTHERS | OURS


def peer(name: str, network: Network, variant: Variant, among: Sequence[str] = ()) -> Peer:
    """The peer of that name, `among` the others of a case. One artifact has all targets of ours, of which the last is
    compiled first."""
    ours = [other for other in among if other in OURS and name in OURS and network.folder] or [name]
    first = ours[-1]
    others = [other.removeprefix(PREFIX) for other in ours[:-1]] if name == first else []
    return Peer(name, functools.partial(EVERY[name], network, variant, *others),
                behind="" if first == name else first)  # fmt: skip
