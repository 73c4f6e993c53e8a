"""Masks while a network trains: which weights can be pruned, which are, and how pruned ones stay at zero.

Magnitude pruning as in Frankle et al. 2020, *Linear Mode Connectivity and the Lottery Ticket Hypothesis*: of all
weights that remain, over all layers together, the share with the smallest magnitudes goes. A mask is a bool tensor in
its parameter's shape, on the CPU, True where a weight stays; masks are named by their parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .errors import PlanError
from .record import suggest

Masks = dict[str, Tensor]


def dense_masks(model: nn.Module, exclude: Sequence[str] = ()) -> Masks:
    """A mask of ones for every weight that can be pruned: those of linear layers and convolutions that train.

    Args:
        exclude: globs over module paths; what they match keeps all its weights.

    A weight that another kind of layer uses too, an embedding say, is not pruned, and neither is a frozen one.

    Raises:
        PlanError: a glob matches no such layer, nothing is left to prune, or a layer computes its weight from other
            parameters (weight norm), of which a mask could hold none at zero.
    """
    layers = {path: module for path, module in model.named_modules() if _prunable(module)}
    for glob in exclude:
        if not any(fnmatchcase(path, glob) for path in layers):
            known = ", ".join(list(layers)[:8])
            raise PlanError(
                f"{glob!r} matches no linear layer or convolution{suggest(glob, layers)}",
                where="exclude", hint=f"they are {known}" if known else None,
            )  # fmt: skip
    kept = {path: module for path, module in layers.items() if not any(fnmatchcase(path, glob) for glob in exclude)}
    made = [path for path, module in kept.items() if not isinstance(module._parameters.get("weight"), nn.Parameter)]
    if made:
        raise PlanError(
            f"{made[0]} computes its weight from other parameters, so no mask can hold its weights at zero",
            where=made[0], hint="remove the parametrization, or exclude the layer",
        )  # fmt: skip
    elsewhere = {id(value) for path, module in model.named_modules() if path not in kept
                 for value in module._parameters.values()}  # fmt: skip
    names = dict(model.named_parameters())  # a tied weight once, by its first name
    owned = {id(module.weight) for module in kept.values()} - elsewhere
    masks = {name: torch.ones(value.shape, dtype=torch.bool) for name, value in names.items()
             if id(value) in owned and value.requires_grad}  # fmt: skip
    if not masks:
        raise PlanError("there is no weight to prune", hint="linear layers and convolutions are, unless excluded")
    return masks


def _prunable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.modules.conv._ConvNd)


def prune_smallest(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], fraction: float) -> Masks:
    """`masks` without the `fraction` of remaining weights whose magnitudes are smallest, over all layers together.

    As many as that is, to the nearest integer but at least one, and never the last; of equal magnitudes those that come
    first in the order of `masks` go first.

    Raises:
        PlanError: a remaining weight is NaN or infinite: the training diverged.
    """
    magnitudes = torch.cat([weights[name].detach().abs()[mask].double() for name, mask in masks.items()])
    if not bool(torch.isfinite(magnitudes).all()):
        raise PlanError("trained weights are NaN or infinite, so none are smallest", hint="the training diverged")
    count = min(max(1, round(fraction * len(magnitudes))), len(magnitudes) - 1)
    stays = torch.ones(len(magnitudes), dtype=torch.bool)
    stays[magnitudes.argsort(stable=True)[:count]] = False
    pruned, start = {}, 0
    for name, mask in masks.items():
        rest = int(mask.sum())
        pruned[name] = mask.clone()
        pruned[name][mask] = stays[start : start + rest]
        start += rest
    return pruned


def shuffled(masks: Mapping[str, Tensor], seed: int) -> Masks:
    """Random masks with as many weights in every layer as `masks` have."""
    generator = torch.Generator().manual_seed(seed)
    return {name: mask.flatten()[torch.randperm(mask.numel(), generator=generator)].reshape(mask.shape)
            for name, mask in masks.items()}  # fmt: skip


@contextlib.contextmanager
def held(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Set the pruned weights of `model` to zero, and keep them there while any loop trains it in place.

    The gradient of a pruned weight is zero in every backward pass, so momentum never gathers and weight decay has
    nothing to shrink; and after each step of an optimizer of ``torch.optim``, whichever it is and whatever state it had
    from before, they are set to zero again. At the end they are looked at once more.

    Raises:
        PlanError: at the end, a pruned weight is not zero: the loop trained other parameters than those of `model`, or
            wrote to them in a way that no gradient and no optimizer has part in.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    holds = [_Held(parameters[name], mask) for name, mask in masks.items() if not bool(mask.all())]
    handles = [hold.parameter.register_hook(hold.gradient) for hold in holds]

    def after_step(*_: object) -> None:
        for hold in holds:
            hold.clear()

    after_step()
    handles.append(register_optimizer_step_post_hook(after_step))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    check_zeros(model, masks)


def check_zeros(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """
    Raises:
        PlanError: a pruned weight of `model` is not zero, or a masked parameter is gone.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        if name not in parameters:
            raise PlanError(f"after training the model has no parameter {name!r}", hint="train the model in place")
        count = int(parameters[name].detach().cpu()[~mask].count_nonzero())
        if count:
            raise PlanError(
                f"{count:,} pruned weights of {name} are not zero after training", where=name,
                hint="train the parameters of the model you are given, with an optimizer of torch.optim; "
                "do not replace them, and write to them under no other name",
            )  # fmt: skip


class _Held:
    """One parameter, and its mask as factors: on its device, and of its dtype."""

    def __init__(self, parameter: nn.Parameter, mask: Tensor) -> None:
        self.parameter, self.mask = parameter, mask
        self.factors = mask.to(parameter.device, parameter.dtype)

    def of(self, value: Tensor) -> Tensor:
        """The factors for `value`; a loop may have moved the model to another device or dtype."""
        if self.factors.device != value.device or self.factors.dtype != value.dtype:
            self.factors = self.mask.to(value.device, value.dtype)
        return self.factors

    def gradient(self, value: Tensor) -> Tensor:
        return value * self.of(value)

    @torch.no_grad()
    def clear(self) -> None:
        # Through `data`, as the parameter may be saved for a backward pass that is still to come.
        self.parameter.data.mul_(self.of(self.parameter))
