"""The tensors of an AdapterHub checkpoint under our names of them."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fxfreeze.adapterhub import core, is_key, places
from fxfreeze.errors import PlanError

_FREE, _BASE = "projection.parametrizations.weight.original", "projection.parametrizations.weight.0.base"
_PLAIN = "projection.weight"
_FAR = 1e-2
"""Farther from orthonormal is no rounding, not even to half precision."""


class Hub:
    """Which key of a file holds which parameter of a site.

    What the library parametrises otherwise than we do is converted in `stored`, under a key of ours: of LoReFT's
    orthogonal projection our basis [features, rank], of DiReFT's projection the transpose.

    Raises:
        PlanError: a projection that should be orthogonal is not.
    """

    def __init__(self, stored: dict[str, Tensor], where: str) -> None:
        for key in [key for key in stored if places(key)]:
            if key.endswith(_FREE) and (pair := key.removesuffix(_FREE) + _BASE) in stored:
                stored[key.removesuffix(_FREE) + "basis"] = _basis(key, stored.pop(key), stored.pop(pair), where)
            elif key.endswith(_PLAIN):
                stored[key.removesuffix(_PLAIN) + "target.weight"] = stored.pop(key).T
        self._places = {key: found for key in stored if (found := places(key, stored))}
        self._keys = {place: key for key, found in self._places.items() for place in found}
        self._used = set(self._keys.values())

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def key(self, site: str, leaf: str) -> str | None:
        """The key of the parameter `leaf` of the step at `site`."""
        return self._keys.get((core(site), leaf))

    def is_spare(self, key: str) -> bool:
        """Whether `key` is the library's, and means nothing: a second name of a tensor, or an edit of no position."""
        return is_key(key) and key not in self._used

    def is_at(self, key: str, patterns: Iterable[str]) -> bool:
        """Whether `key` belongs to a site that one of `patterns` names."""
        sites = {site for site, _ in self._places.get(key, ())}
        return any(fnmatchcase(site, core(glob)) for glob in patterns for site in sites)


def _basis(key: str, free: Tensor, base: Tensor, where: str) -> Tensor:
    """The transpose of what ``torch.nn.utils.parametrizations.orthogonal`` makes of its parameter and buffer."""
    if free.ndim != 2 or base.shape != (free.shape[1], free.shape[1]):
        raise PlanError(f"{key} has shape {tuple(free.shape)}, and its base {tuple(base.shape)}", where=where)
    layer = nn.Linear(free.shape[1], free.shape[0], bias=False, dtype=torch.float64)
    parametrizations.orthogonal(layer)
    state = {"parametrizations.weight.original": free.double(), "parametrizations.weight.0.base": base.double()}
    layer.load_state_dict(state)
    rotation = layer.weight.detach()
    # Torch rounds the diagonal to signs, towards 0: weight decay moves it off -1, and a row of R becomes 0.
    if not bool((rotation @ rotation.T - torch.eye(len(rotation), dtype=torch.float64)).abs().max() < _FAR):
        raise PlanError(
            f"the projection that torch makes of {key} is not orthogonal, so that it is no LoReFT", where=where,
            hint="train it again without weight decay, which breaks torch's orthogonal parametrization",
        )  # fmt: skip
    return rotation.T.to(torch.promote_types(free.dtype, torch.float32))
