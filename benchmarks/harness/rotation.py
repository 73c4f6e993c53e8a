"""Input sets that lie apart in memory, so many that no cache holds them all: every call reads inputs that are cold."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

MOST_BYTES = 2**28
"""Each peer has input sets of its own. A virtual machine may report the cache of a whole host, which is shared."""
MOST_SETS = 2**14
LINE = 64
"""Bytes that every tensor is aligned to."""


def rotated(drawn: Sequence[tuple[Any, ...]]) -> tuple[list[tuple[Any, ...]], dict[str, int]]:
    """Copies of the drawn sets in turn, and how many and how large they are beside the cache.

    Values repeat and addresses do not. Whatever is no tensor is shared by the copies.
    """
    leaves, shape = pytree.tree_flatten(list(drawn))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    each = sum(_room(tensor) for tensor in tensors)
    if not each:
        return list(drawn), {"sets": len(drawn), "bytes": 0, "cache": 0}
    cache = last_level_cache(tensors[0].device)
    rounds = max(1, min(math.ceil(min(2 * cache, MOST_BYTES) / each), MOST_SETS // len(drawn)))
    copies = {id(tensor): _copies(tensor, rounds) for tensor in tensors}
    sets = []
    for turn in range(rounds):
        fresh = [copies[id(leaf)][turn] if id(leaf) in copies else leaf for leaf in leaves]
        sets += pytree.tree_unflatten(fresh, shape)
    return sets, {"sets": len(sets), "bytes": rounds * each, "cache": cache}


def _room(tensor: Tensor) -> int:
    return math.ceil(tensor.numel() * tensor.element_size() / LINE) * LINE


def _copies(tensor: Tensor, count: int) -> list[Tensor]:
    """In one allocation, each at the start of a line, with the strides of a contiguous tensor."""
    if not tensor.is_contiguous() or not tensor.numel():
        return [tensor.clone() for _ in range(count)]
    room = _room(tensor)
    block = torch.empty(count * room, dtype=torch.uint8, device=tensor.device)
    rows = block.view(count, room)[:, : tensor.numel() * tensor.element_size()]
    rows.copy_(tensor.reshape(-1).view(torch.uint8))
    return [row.view(tensor.dtype).view(tensor.shape) for row in rows.unbind(0)]


@functools.cache
def last_level_cache(device: torch.device) -> int:
    """Bytes; 32 MiB where the machine does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    known = [int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]] for size in sizes if size[-1:] in ("K", "M")]
    return max(known, default=2**25)
