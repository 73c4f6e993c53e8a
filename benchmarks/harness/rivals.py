"""Libraries that would do to the caller's model what the plan of an artifact does; each says itself what it cannot."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import libraries, runtime
from .case import Peer, Unavailable
from .model import Model

Call = Callable[..., Any]
ROUNDING = {"int8": 0.25, "fp8": 0.25, "int8-weight": 0.1, "int4-weight": 0.5}
"""How far two that round by a scheme of Quantize may be apart, in largest outputs: what counts as a result at all."""


def rivals(model: Model) -> Iterator[Peer]:
    """For each library that does the job of a step. What a plan's integers cost is no error of another's floats."""
    from fxfreeze.plan import LoRA, Quantize

    quantize = [step for step in model.plan.steps if isinstance(step, Quantize)]
    makers = PEFT if any(isinstance(step, LoRA) for step in model.plan.steps) else {}
    for step in quantize:
        makers = makers | QUANTIZERS.get((step.scheme, step.mode), {})
    tolerance = max((ROUNDING[step.scheme] for step in quantize), default=None)
    for name, make in makers.items():
        yield Peer(name, functools.partial(_made, make, model), tolerance=tolerance)


def _made(make: Callable[[Model], Call], model: Model) -> Call:
    from fxfreeze.errors import FxfreezeError

    try:
        return make(model)
    except FxfreezeError as error:
        raise Unavailable(str(error)) from error


# ---- LoRA


def updates(model: Model) -> dict[str, tuple[Tensor, Tensor]]:
    """A and scale · B of the plan's LoRAs, by the paths of the layers.

    Raises:
        Unavailable: peft cannot have them without loss, or it is not known what they are.
    """
    from fxfreeze.plan import LoRA, Quantize, Tap

    if others := [step.name for step in model.plan.steps if not isinstance(step, LoRA | Quantize | Tap)]:
        raise Unavailable(f"the plan has steps that it does not do: {', '.join(others)}")
    steps = {step.name: step for step in model.plan.steps if isinstance(step, LoRA)}
    if any(step.adapters for step in steps.values()):
        raise Unavailable("rows select among the plan's LoRAs, and peft's merged weights hold one")
    if any(step.bias for step in steps.values()):
        raise Unavailable("a LoRA of the plan has a bias")
    found: dict[str, tuple[Tensor, Tensor]] = {}
    layers = dict(model.build().named_modules())
    for (step, path), leaves in _trained(model, tuple(steps.values())).items() if steps else ():
        if path in found:
            raise Unavailable(f"{path} has more than one LoRA")
        _refuse_misfit(path, layers[path])
        found[path] = leaves["lora_A"], steps[step].scale * leaves["lora_B"]
    return found


def _trained(model: Model, steps: tuple[Any, ...]) -> dict[tuple[str, str], dict[str, Tensor]]:
    """Parameters by step and path, then by name: what compiling would read, or the caller's file."""
    from fxfreeze.adapt import adapt
    from fxfreeze.binding import nest

    file = model.subject.adapters
    if file is None and any(step.weights is None for step in steps):
        raise Unavailable("the artifact holds merged weights: name a file of the adapters by --adapters")
    examples = nest(model.names, model.examples) if model.examples is not None else None
    net = adapt(model.build(), model.plan.model_copy(update={"steps": steps}), example_inputs=examples, verify="off")
    if file is not None:
        net.load_adapters(file)
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, value in net.adapter_state().items():
        _, step, place = name.split(".", 2)
        path, _, leaf = place.rpartition(".")
        found.setdefault((step, path), {})[leaf] = value
    return found


def _refuse_misfit(path: str, layer: Any) -> None:
    """Beside a convolution, peft's ignores its dilation and groups, and pads with zeros."""
    kept = type(layer) is nn.Linear
    if type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        kept = layer.groups == 1 and layer.padding_mode == "zeros" and set(layer.dilation) == {1}
    if not kept:
        raise Unavailable(f"peft's LoRA is another function at {path}: {layer}")


def merged(model: Model) -> nn.Module:
    """The model with the plan's LoRAs in its weights, in floats."""
    found = updates(model)
    return libraries.peft_merged(model.build(), found) if found else model.build()


def peft_eager(model: Model) -> Call:
    return model.flat(libraries.peft_lora(model.build(), updates(model)).get_base_model())


def peft_compiled(model: Model) -> Call:
    fast: Call = libraries.compiled(model.flat(merged(model)))
    return fast


def peft_onnx(model: Model) -> Call:
    return _session(model, merged(model))


# ---- Quantize


def quantize_static(model: Model) -> Call:
    module, floats = merged(model), _floats(model)
    batches = [dict(zip(model.names, batch, strict=True)) for batch in model.calibration()]
    return _session(model, module, lambda file, folder: runtime.quantize_static(file, batches, folder, floats))


def quantize_dynamic(model: Model) -> Call:
    module, floats = merged(model), _floats(model)
    return _session(model, module, lambda file, folder: runtime.quantize_dynamic(file, folder, floats))


def torchao_static(model: Model) -> Call:
    if model.device != "cpu":
        raise Unavailable("its integers are for CPUs")
    module, floats = model.flat(merged(model)), _floats(model)
    fast: Call = libraries.torchao_static(module, model.example(), model.open_sizes(), model.calibration(), floats)
    return fast


def torchao_weights(model: Model) -> Call:
    step, floats = _quantize(model), _floats(model)
    bits = int(step.scheme.removeprefix("int").removesuffix("-weight"))
    fast: Call = libraries.torchao_weights(model.flat(merged(model)), bits, step.block, floats)
    return fast


def _session(model: Model, module: nn.Module, quantized: Callable[[Path, Path], Path] | None = None) -> Call:
    """ONNX Runtime on the module, or on what `quantized` makes of its file in a folder."""
    if model.device != "cpu":
        raise Unavailable("ONNX Runtime is compared on CPUs only")
    libraries.need("onnxruntime")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = runtime.exported(model.flat(module), model.example(), model.names, folder, model.open_sizes())
        return runtime.session(quantized(file, folder) if quantized else file)


def _quantize(model: Model) -> Any:
    """The plan's one way to quantize."""
    from fxfreeze.plan import Quantize

    steps = [step for step in model.plan.steps if isinstance(step, Quantize)]
    if len({(step.scheme, step.mode, step.block) for step in steps}) > 1:
        raise Unavailable(f"the plan quantizes in several ways: {', '.join(step.name for step in steps)}")
    return steps[0]


def _floats(model: Model) -> list[str]:
    """Paths, in the flat model, of the layers with a matrix that no target of the artifact runs in integers."""
    step = _quantize(model)
    done = {row["site"] for row in model.artifact.manifest["ledger"]
            if row["requested"] == step.scheme and row["executes"].startswith(("integer", "simulated"))}  # fmt: skip
    weights = {path: getattr(layer, "weight", None) for path, layer in model.build().named_modules()}
    return [f"model.{path}" for path, weight in weights.items()
            if isinstance(weight, Tensor) and weight.ndim > 1 and path not in done]  # fmt: skip


# ---- by name

PEFT: dict[str, Callable[[Model], Call]] = {
    "peft, eager": peft_eager,
    "peft merged, torch.compile, freezing": peft_compiled,
    "peft merged, ONNX Runtime": peft_onnx,
}
QUANTIZERS: dict[tuple[str, str], dict[str, Callable[[Model], Call]]] = {
    ("int8", "static"): {
        "ONNX Runtime, quantize_static": quantize_static,
        "torchao PT2E, torch.compile, freezing": torchao_static,
    },
    ("int8", "dynamic"): {"ONNX Runtime, quantize_dynamic": quantize_dynamic},
    ("int8-weight", "static"): {"torchao int8_weight_only, torch.compile, freezing": torchao_weights},
    ("int4-weight", "static"): {"torchao int4_weight_only, torch.compile, freezing": torchao_weights},
}
"""By the scheme and the mode of a Quantize."""
