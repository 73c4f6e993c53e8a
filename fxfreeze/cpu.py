"""What the processor of this machine can do, where results depend on it."""

from __future__ import annotations

import platform

import torch

SAFE_WEIGHT = 64
"""The largest integer of a weight for which 16 bits hold two products with a byte: 2 · 255 · 64 < 2**15."""


def adds_in_16_bits() -> bool:
    """Whether products of a byte and a signed byte are added up in pairs of 16 bits, which saturate.

    x86 has such an instruction, VPMADDUBSW, and oneDNN and ONNX Runtime use it where VNNI's (with 32 bits) is missing:
    https://oneapi-src.github.io/oneDNN/dev_guide_int8_computations.html.
    """
    return platform.machine().lower() in ("x86_64", "amd64") and not _has_vnni()


def _has_vnni() -> bool:
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        return bool(found.get("avx512_vnni") or found.get("avx_vnni"))
    return torch.cpu._is_vnni_supported()  # of AVX-512 alone; all that a torch without capabilities can say
