"""Layers that peft put around those of a live model, known by the names of their classes: peft is not imported.

For the length of a trace such a layer computes its base layer with one changed weight, written out from the adapters
that are active, which a pass then folds in float64. What peft computes is a branch beside the base layer; where no
one weight does the same, the layer is left as it is, and a reason is kept for the ledger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import CaptureError
from .rotations import rotated, rotations

Forward = Callable[..., Any]
Weights = tuple[Tensor, Tensor | None]
"""The weight of a base layer as it stores it, and its bias."""

_LAYER = "peft.tuners.tuners_utils.BaseTunerLayer"
_TUNER = "peft.tuners.tuners_utils.BaseTuner"
_MODEL = "peft.peft_model.PeftModel"
_SAVED = "peft.utils.other.ModulesToSaveWrapper"


class _LeftError(Exception):
    """Why a layer is left as it is."""


def is_a(module: Any, name: str) -> bool:
    """Whether the module's class is, or derives from, the class of that qualified name."""
    return any(f"{kind.__module__}.{kind.__qualname__}" == name for kind in type(module).__mro__)


def unwrapped(model: Any) -> nn.Module:
    """The user's model inside of a peft model that only changes its layers; any other model as it is."""
    inner = model.base_model if is_a(model, _MODEL) and not _has_hooks(model) else model
    return inner.model if is_a(inner, _TUNER) else model


def _has_hooks(model: Any) -> bool:
    return any(getattr(config, "alora_invocation_tokens", None) for config in model.peft_config.values())


def wrappers(model: nn.Module) -> dict[str, str]:
    """Paths that peft's wrappers made → what the user calls them."""
    found = {}
    for path, module in model.named_modules():
        if is_a(module, _LAYER):
            found[f"{path}.base_layer"] = path
        elif is_a(module, _SAVED):
            saved: Any = module
            active = "original_module" if saved.disable_adapters else f"modules_to_save.{saved.active_adapters[0]}"
            found[f"{path}.{active}"] = path
    return found


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Forward | str]]:
    """Every peft layer of `model` with its path and the forward it has as one layer, or why it has none.

    Raises:
        CaptureError: its forward would change the model.
    """
    for path, module in model.named_modules():
        if is_a(module, _LAYER):
            yield path, module, _forward(path, module)


def _forward(path: str, module: Any) -> Forward | str:
    if module.disable_adapters and module.merged:
        raise CaptureError("adapters are merged and disabled, and running the model would unmerge them", where=path,
                           hint="call unmerge_adapter() or merge_and_unload() first")  # fmt: skip
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    make = _KNOWN.get(kind)
    if "forward" in vars(module):
        return "its forward has been replaced"
    if make is None:
        return f"{kind} is not known"
    base = module.base_layer
    run = _RUN.get(f"{type(base).__module__}.{type(base).__qualname__}")
    if run is None or "forward" in vars(base) or base._forward_hooks or base._forward_pre_hooks:
        return f"its base layer is a {type(base).__qualname__}, which has a forward of its own"
    off = module.disable_adapters or module.merged
    names = [] if off else [name for name in module.active_adapters if name in getattr(module, make.holds)]
    try:
        make.weights(module, base, names)  # the reasons do not depend on values: any will show while tracing
    except _LeftError as reason:
        return str(reason)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return run(base, x, *make.weights(module, base, names))

    return forward


# ---- what the base layers compute


def _linear(base: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _transformers_conv1d(base: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return torch.addmm(bias, flat, weight).reshape(*x.shape[:-1], weight.shape[1])  # type: ignore[arg-type]


def _conv(base: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = base._conv_forward(x, weight, bias)
    return result


def _embedding(base: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.embedding(x, weight, base.padding_idx)


_RUN: dict[str, Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]] = {
    "torch.nn.modules.linear.Linear": _linear,
    "torch.nn.modules.linear.NonDynamicallyQuantizableLinear": _linear,
    "transformers.pytorch_utils.Conv1D": _transformers_conv1d,
    "torch.nn.modules.conv.Conv1d": _conv,
    "torch.nn.modules.conv.Conv2d": _conv,
    "torch.nn.modules.conv.Conv3d": _conv,
    "torch.nn.modules.sparse.Embedding": _embedding,
}


def _is_transposed(base: Any) -> bool:
    """Whether the layer stores its weight as ``[in, out]``, where it is not said to be the other way round."""
    return isinstance(base, nn.Embedding) or type(base).__qualname__ == "Conv1D"


def _stored(base: Any, weight: Tensor, like: Tensor) -> Tensor:
    """A weight ``[out, in, ...]`` as the layer stores it."""
    return (weight.T if _is_transposed(base) else weight).to(like.dtype)


def _rows(base: Any, wide: torch.dtype) -> Tensor:
    """The layer's weight as ``[out, in / groups, ...]``, in a dtype at least as wide."""
    weight = base.weight.T if _is_transposed(base) else base.weight
    return weight.to(torch.promote_types(weight.dtype, wide))


def _window(base: Any) -> int:
    return base.weight[0, 0].numel() if isinstance(base, nn.modules.conv._ConvNd) else 1


# ---- the adapters


def _lora(module: Any, base: Any, names: list[str]) -> Weights:
    if not names:
        return base.weight, getattr(base, "bias", None)
    _check_lora(module, base, names)
    embedding = isinstance(base, nn.Embedding)
    bias = getattr(base, "bias", None)
    first = (module.lora_embedding_A if embedding else module.lora_A)[names[0]]
    rows = _rows(base, first.dtype if embedding else first.weight.dtype)
    for name in names:
        if embedding:
            a, b, shift = module.lora_embedding_A[name], module.lora_embedding_B[name], None
        else:
            a, b, shift = module.lora_A[name].weight, module.lora_B[name].weight, module.lora_B[name].bias
        scale = module.scaling[name]
        # A batch of one: a plain matrix product would look like a layer of the model to what reads the graph.
        delta = torch.bmm(b.flatten(1).unsqueeze(0), a.flatten(1).unsqueeze(0)).squeeze(0)
        rows = rows + scale * delta.reshape(rows.shape)
        if shift is not None:
            bias = scale * shift if bias is None else bias + scale * shift
        if module.use_dora[name]:
            magnitude = module.lora_magnitude_vector[name].weight.flatten()
            norm = torch.linalg.vector_norm(rows.flatten(1), dim=1)
            rows = rows * (magnitude / norm).reshape(-1, *[1] * (rows.ndim - 1))
    return _stored(base, rows, base.weight), bias if bias is None else bias.to(base.weight.dtype)


def _check_lora(module: Any, base: Any, names: list[str]) -> None:
    for name in names:
        kind = type(module.lora_variant[name]).__qualname__ if name in module.lora_variant else ""
        if kind and not kind.startswith("Dora"):
            raise _LeftError(f"it is a {kind.removesuffix('Variant')}, which is no change of its weight alone")
        if module.use_dora[name] and (len(names) > 1 or module.lora_bias[name]):
            raise _LeftError("DoRA beside another adapter, or with a bias in B, is no change of its weight alone")
    if not isinstance(base, nn.modules.conv._ConvNd):
        return
    if base.groups > 1:
        raise _LeftError("its update mixes the groups of the convolution, which no grouped convolution does")
    if _window(base) > 1 and base.padding_mode != "zeros" and any(base._reversed_padding_repeated_twice):
        raise _LeftError(f"it pads by {base.padding_mode!r} and its update with zeros: no one convolution does both")
    if _window(base) > 1 and any(step != 1 for step in base.dilation):
        raise _LeftError("it is dilated and its update is not: no one convolution does both")


def _ia3(module: Any, base: Any, names: list[str]) -> Weights:
    weight, bias = base.weight, base.bias
    for name in names:
        gain = module.ia3_l[name].flatten()
        if not module.is_feedforward:
            weight = weight * (gain if _is_transposed(base) else gain.reshape(-1, *[1] * (weight.ndim - 1)))
            bias = None if bias is None else bias * gain
        elif _is_transposed(base):
            weight = weight * gain.unsqueeze(1)
        elif getattr(base, "groups", 1) == 1:
            weight = weight * gain.reshape(1, -1, *[1] * (weight.ndim - 2))
        else:
            raise _LeftError("it scales the inputs of a grouped convolution")
    return weight.to(base.weight.dtype), bias if bias is None else bias.to(base.bias.dtype)


def _vera(module: Any, base: Any, names: list[str]) -> Weights:
    if not names:
        return base.weight, base.bias
    rows = _rows(base, module.vera_lambda_d[names[0]].dtype)
    for name in names:
        a = module.vera_A[name][:, : module.in_features] * module.vera_lambda_d[name].unsqueeze(1)
        b = module.vera_B[name][: module.out_features] * module.vera_lambda_b[name].unsqueeze(1)
        rows = rows + torch.bmm(b.unsqueeze(0), a.unsqueeze(0)).squeeze(0)
    return _stored(base, rows, base.weight), base.bias


def _oft(module: Any, base: Any, names: list[str]) -> Weights:
    bias = getattr(base, "bias", None)
    if not names:
        return base.weight, bias
    embedding = isinstance(base, nn.Embedding)
    if _window(base) > 1:
        raise _LeftError("what OFT does to the patches under its window is no convolution")
    if getattr(base, "groups", 1) > 1:
        raise _LeftError("it rotates the inputs of a grouped convolution")
    held = module.oft_embedding_R if embedding else module.oft_R
    weight = base.weight.to(torch.promote_types(base.weight.dtype, held[names[0]].weight.dtype))
    weight = weight if embedding else weight.flatten(1)
    for name in names if embedding else reversed(names):  # the first rotates first
        turn = held[name]
        blocks = rotations(
            turn.weight, turn.block_size, eps=turn.eps if turn.coft else None,
            terms=turn.num_cayley_neumann_terms if turn.use_cayley_neumann else None,
        )  # fmt: skip
        weight = rotated(weight, blocks if embedding else blocks.transpose(1, 2))
    return weight.reshape(base.weight.shape).to(base.weight.dtype), bias


class _Kind:
    """Of an adapter: what makes the weights of its layer, and the attribute that holds the adapters there are."""

    def __init__(self, weights: Callable[[Any, Any, list[str]], Weights], holds: str) -> None:
        self.weights, self.holds = weights, holds


_KNOWN = {
    **{f"peft.tuners.lora.layer.{name}": _Kind(_lora, "lora_A") for name in ("Linear", "Conv1d", "Conv2d", "Conv3d")},
    "peft.tuners.lora.layer.Embedding": _Kind(_lora, "lora_embedding_A"),
    **{f"peft.tuners.ia3.layer.{name}": _Kind(_ia3, "ia3_l") for name in ("Linear", "Conv2d", "Conv3d")},
    "peft.tuners.vera.layer.Linear": _Kind(_vera, "vera_lambda_d"),
    "peft.tuners.oft.layer.Linear": _Kind(_oft, "oft_R"),
    "peft.tuners.oft.layer.Conv2d": _Kind(_oft, "oft_R"),
    "peft.tuners.oft.layer.Embedding": _Kind(_oft, "oft_embedding_R"),
}
"""Qualified class name → kind of adapter."""
