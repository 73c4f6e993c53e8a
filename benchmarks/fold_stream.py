"""Peak memory of fz.fold_checkpoint above the import baseline, against the bytes of the base's largest shard.

``python -m benchmarks.fold_stream`` says what the stored row means for a base of 7 billion parameters.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from . import models
from .harness import PEAK_MEMORY, Case, Options, Peer, Reading, record
from .harness.memory import peak_above

LIMIT = 1.3
HERE = "benchmarks.fold_stream"
WIDE = {"hidden": 1024, "inner": 2752, "layers": 96, "shards": 3, "vocabulary": 8000}
"""Llama-2-7B's widths by 4; a shard holds about as many of the largest tensors as there."""
SMALL = {"hidden": 256, "inner": 688, "layers": 4, "shards": 2, "vocabulary": 1000}
RANK = 16
LLAMA = {"hidden": 4096, "inner": 11008}
SHARD = 9.98e9
"""Bytes of the larger of the two files that Llama-2-7B is published in."""

Check = Callable[[], float]


def cases(options: Options) -> Iterator[Case]:
    sizes = SMALL if options.quick else WIDE
    folder = tempfile.TemporaryDirectory()
    largest, total, tensor = write(Path(folder.name), sizes, options.seed)
    given: dict[str, Any] = {"folder": folder.name}
    yield Case(
        name=f"bfloat16, {total / 2**20:.0f} MiB in {sizes['shards']} shards of at most {largest / 2**20:.0f} MiB",
        peers=(
            Peer("bytes of the largest shard", functools.partial(constant, largest, folder)),
            Peer("fold_checkpoint", peak_above(f"{HERE}:imports", f"{HERE}:fold", **given), limit=LIMIT),
            Peer("bytes of the largest adapted weight", functools.partial(constant, tensor, folder)),
        ),
        baseline="bytes of the largest shard",
        reference=lambda: None,
        metric=PEAK_MEMORY,
    )


def constant(value: float, folder: Any) -> Callable[[], Reading]:
    """A figure that is known; the peer keeps the folder of the files until all are measured."""

    def read() -> Reading:
        if not Path(folder.name).exists():
            raise RuntimeError("the checkpoint is gone")
        return Reading(value, 0.0)

    return read


def write(folder: Path, sizes: dict[str, int], seed: int) -> tuple[int, int, int]:
    """A Llama-shaped base in bfloat16 and a peft LoRA for its linear layers.

    Returns:
        Bytes of the largest shard, of all shards, and of the largest weight that is adapted.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = sizes["hidden"], sizes["inner"]
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.v_proj": (hidden, hidden),
              "mlp.gate_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}  # fmt: skip

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.02

    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    index: dict[str, str] = {}
    trained: dict[str, torch.Tensor] = {}
    per_shard = -(-sizes["layers"] // sizes["shards"])
    for shard in range(sizes["shards"]):
        name = f"model-{shard + 1:05}-of-{sizes['shards']:05}.safetensors"
        held = {"model.embed_tokens.weight": drawn(sizes["vocabulary"], hidden).bfloat16()} if shard == 0 else {}
        for layer in range(shard * per_shard, min((shard + 1) * per_shard, sizes["layers"])):
            for path, shape in shapes.items():
                full = f"model.layers.{layer}.{path}"
                held[f"{full}.weight"] = drawn(*shape).bfloat16()
                trained[f"base_model.model.{full}.lora_A.weight"] = drawn(RANK, shape[1])
                trained[f"base_model.model.{full}.lora_B.weight"] = drawn(shape[0], RANK)
        save_file(held, base / name)
        index |= dict.fromkeys(held, name)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (base / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    save_file(trained, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none",
              "target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"]}  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    files = [file.stat().st_size for file in base.glob("*.safetensors")]
    return max(files), sum(files), 2 * hidden * inner


# What follows runs in child processes.


def imports() -> Check:
    """The baseline: what the other imports, and one small fold, which starts torch's threads and allocators."""
    models.need("fxfreeze")
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), {"hidden": 16, "inner": 16, "layers": 1, "shards": 1, "vocabulary": 16}, 0)
        fold(folder)
    return lambda: 0.0


def fold(folder: str) -> Check:
    import fxfreeze as fz

    home = Path(folder)
    with tempfile.TemporaryDirectory(dir=home) as out:
        ledger = fz.fold_checkpoint(home / "base", home / "adapter", Path(out) / "folded")
        count = sum(row.outcome == "rewritten" for row in ledger)
    if not count:
        raise RuntimeError("nothing was folded")
    return lambda: 0.0


def main() -> int:
    """Print what the stored row means for a base of 7 billion parameters."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results/fold_stream.jsonl")
    rows = {row["peer"]: row["value"] for row in record.read(path)}
    peak, tensor = rows["fold_checkpoint"], rows["bytes of the largest adapted weight"]
    largest = 2 * LLAMA["inner"] * LLAMA["hidden"]
    print(
        f"measured: {peak / 2**20:.0f} MiB, {peak / tensor:.1f} times the largest adapted weight, with which it grows"
    )
    print(
        f"extrapolated to 7 billion parameters in bfloat16, largest weight {largest / 2**20:.0f} MiB, shards of "
        f"{SHARD / 2**30:.1f} GiB: {peak / tensor * largest / 2**30:.1f} GiB, "
        f"{peak / tensor * largest / SHARD:.2f} times the largest shard"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
