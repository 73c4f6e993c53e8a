"""A tensor without its zeros: the elements that are not 0, and bits that say where they were.

It works on the bits of the elements, so it takes any dtype and restores every bit. An element is a zero where no bit is
set; and, where there are many, where none but the highest is, which makes −0 of a float: a mask that is multiplied with
a weight leaves many of those.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

LEAST = 4096
"""Bytes of a tensor that is worth a second one."""
WORTH = 0.9
"""Of its bytes that may be left."""

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_HIGHEST = {1: 1 << 7, 2: -1 << 15, 4: -1 << 31, 8: -1 << 63}
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_BITS = torch.arange(8, dtype=torch.uint8)


def without_zeros(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """The elements of a contiguous tensor on the CPU that are no zeros, and where they were; None: that is no less.

    Returns:
        elements [count], dtype of `tensor`, and bits, uint8: first one for each element of `tensor`, whether it is
        there, then, if −0 counts as a zero, one for each zero, whether it is that. Both begin in a byte of their own,
        lowest bit first.
    """
    if tensor.nbytes < LEAST or not _has_zeros_enough(tensor):
        return None
    words = _words(tensor)
    there = words.ne(0).any(1) if words.dim() > 1 else words.ne(0)
    negative = _is_highest(words)
    zeros = len(words) - int((there & ~negative).count_nonzero())
    if signed := int(negative.count_nonzero()) * tensor.itemsize > _bytes(zeros):
        there &= ~negative
    count = int(there.count_nonzero())
    left = count * tensor.itemsize + _bytes(len(words)) + signed * _bytes(len(words) - count)
    if left > WORTH * tensor.nbytes:
        return None
    bits = [_packed(there), *([_packed(negative[~there])] if signed else [])]
    return words[there].view(tensor.dtype).reshape(count), torch.cat(bits)


def _has_zeros_enough(tensor: Tensor) -> bool:
    """Whether masks may be worth making. Only floats are counted, whose comparison takes −0 for 0 as well."""
    if tensor.dtype not in _FLOATS:
        return True
    return int(tensor.count_nonzero()) * tensor.itemsize + _bytes(tensor.numel()) <= WORTH * tensor.nbytes


def with_zeros(elements: Tensor, bits: Tensor, length: int) -> Tensor:
    """The inverse of :func:`without_zeros`, flat: `length` elements.

    Raises:
        ValueError: as many elements, or zeros, have no such bits.
    """
    words, first = _words(elements), _bytes(length)
    zeros = length - len(words)
    if bits.dtype != torch.uint8 or bits.dim() != 1 or zeros < 0 or len(bits) not in (first, first + _bytes(zeros)):
        raise ValueError(f"{list(bits.shape)} {bits.dtype} are no bits for {len(words)} of {length} elements")
    there = _unpacked(bits[:first], length)
    if int(there.count_nonzero()) != len(words):
        raise ValueError(f"the bits are not those of {len(words)} of {length} elements")
    whole = words.new_zeros(length, *words.shape[1:])
    whole[there] = words
    if len(bits) > first:
        filling = whole.new_zeros(zeros)
        filling[_unpacked(bits[first:], zeros)] = _HIGHEST[elements.itemsize]
        whole[~there] = filling
    return whole.view(elements.dtype).reshape(length)


def _words(tensor: Tensor) -> Tensor:
    """The bits of a contiguous tensor as integers [numel], or [numel, 2] where an element has 16 bytes."""
    # Up to one element may have any stride; a view of other element size wants 1.
    flat = tensor.as_strided((tensor.numel(),), (1,))
    word = _WORDS.get(tensor.itemsize)
    return flat.view(torch.int64).reshape(-1, 2) if word is None else flat.view(word)


def _is_highest(words: Tensor) -> Tensor:
    """Whether the highest bit is the only one; of elements of 16 bytes, which have two such bits, none counts."""
    if words.dim() > 1:
        return words.new_zeros(len(words), dtype=torch.bool)
    return words.eq(_HIGHEST[words.itemsize])


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def _packed(bits: Tensor) -> Tensor:
    whole = pad(bits.to(torch.uint8), (0, 8 * _bytes(len(bits)) - len(bits)))
    return (whole.reshape(-1, 8) << _BITS).sum(1, dtype=torch.uint8)


def _unpacked(packed: Tensor, length: int) -> Tensor:
    bits = ((packed.unsqueeze(1) >> _BITS) & 1).bool().reshape(-1)
    if bits[length:].any():
        raise ValueError(f"there are bits beyond {length} elements")
    return bits[:length]
