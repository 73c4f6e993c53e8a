"""Is the perplexity of a language model with a tied Tversky head the same when it is compiled?

    python -m benchmarks.tversky_gpt2 [--steps 600] [--targets torch,aoti,onnx] [--out FILE]

A GPT-2 of four layers (transformers' own, with a config of its own) learns Python from the sources of the standard
library, in tokens of a byte-pair encoding made from them, from seed 0; every tenth file is held out. Its head is
``fxfreeze.nn.TverskyProjection`` with the token embedding as prototypes. Beside it stands GPT-2's usual head, linear
and tied, trained with the same steps. Each gives one JSON line.

Exit status 1: a target's perplexity on the held-out files is more than 1e-4, relatively, from eager's.
"""

from __future__ import annotations

import math
import shlex
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import heads, models
from .harness import record

LIMIT = 1e-4
TARGETS = ("torch", "aoti", "onnx")
RATE = 3e-3
EMBEDDING = 0.1
"""Standard deviation of the token embedding at the start, for both heads. With GPT-2's 0.02 all measures of a tied
prototype are near 0, and a Tversky head learns slowly: a perplexity of 364 after 150 steps, instead of 119."""


@dataclass(frozen=True)
class Size:
    """Of the model, and of its training: `steps` batches of `batch` windows of `context` tokens."""

    vocabulary: int = 1024
    width: int = 128
    layers: int = 4
    heads: int = 4
    context: int = 128
    features: int = 256
    batch: int = 16
    steps: int = 600
    held_out: int = 256
    """Windows that the perplexity is taken over."""


@dataclass(frozen=True)
class Text:
    """Token ids: one long tensor to train on, and windows [n, context + 1] of held-out files."""

    train: Tensor
    held_out: Tensor


def sources() -> list[Path]:
    """The standard library's files in the order of their names, without its tests and what was installed beside it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    inside = {file.relative_to(root): file for file in root.rglob("*.py")}
    left_out = {"site-packages", "test", "tests"}
    return [file for name, file in sorted(inside.items()) if not left_out & set(name.parts)]


def read(files: Sequence[Path], size: Size) -> Text:
    """Every tenth file is held out; the byte-pair encoding is made from the others."""
    tokenizer = models.need("tokenizers").ByteLevelBPETokenizer()
    parts = [[file.read_text("utf-8", errors="replace") for file in chosen] for chosen in split(files)]
    tokenizer.train_from_iterator(parts[0], vocab_size=size.vocabulary, show_progress=False)
    train, held = (torch.tensor([i for e in tokenizer.encode_batch(part) for i in e.ids]) for part in parts)
    windows = held.unfold(0, size.context + 1, size.context + 1)
    return Text(train, windows[:: max(1, len(windows) // size.held_out)][: size.held_out].contiguous())


def split(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    return [file for n, file in enumerate(files) if n % 10], list(files[::10])


class Logits(nn.Module):
    """GPT-2 from token ids [batch, sequence] to logits [batch, sequence, vocabulary]."""

    def __init__(self, size: Size, head: str) -> None:
        from fxfreeze.nn import TverskyProjection

        super().__init__()
        transformers = models.need("transformers")
        config = transformers.GPT2Config(
            vocab_size=size.vocabulary, n_positions=size.context, n_embd=size.width, n_layer=size.layers,
            n_head=size.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
            tie_word_embeddings=head == "linear", bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        self.model = transformers.GPT2LMHeadModel(config)
        nn.init.normal_(self.model.transformer.wte.weight, std=EMBEDDING)
        if head == "tversky":
            self.model.lm_head = TverskyProjection(size.width, self.model.transformer.wte, size.features)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids).logits


def train(model: nn.Module, tokens: Tensor, size: Size) -> None:
    """AdamW, one cycle of the rate, cross-entropy of the next token; the windows are drawn from seed 0."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=size.steps, pct_start=0.1)
    windows = tokens.unfold(0, size.context + 1, 1)
    model.train()
    for _ in range(size.steps):
        batch = windows[torch.randint(len(windows), (size.batch,), generator=generator)]
        optimizer.zero_grad()
        F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def perplexity(logits: Tensor, windows: Tensor) -> float:
    """exp of the mean negative log-likelihood of each next token, in float64; `logits` [windows · context, P]."""
    answers = windows[:, 1:].flatten()
    sums = [
        F.cross_entropy(rows.double(), wanted, reduction="sum")
        for rows, wanted in zip(logits.split(4096), answers.split(4096), strict=True)
    ]
    return math.exp(float(sum(sums)) / len(answers))


def run(
    text: Text,
    size: Size,
    *,
    kinds: Sequence[str] = ("tversky", "linear"),
    targets: Sequence[str] = TARGETS,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, Any]]:
    """A row for each kind of head: trained, compiled, and its perplexities compared."""
    for kind in kinds:
        say(f"training with a {kind} head, {size.steps} steps on {len(text.train)} tokens")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, started = Logits(size, kind), time.perf_counter()
            train(model, text.train, size)
        seconds = time.perf_counter() - started
        say("compiling")
        row = {"name": f"{kind} head", "size": asdict(size), "train_seconds": round(seconds, 1)}
        yield row | compiled(model, text, size, targets)


def compiled(model: Logits, text: Text, size: Size, targets: Sequence[str]) -> dict[str, Any]:
    """Compile `model` with batch and length open, and compare each target with eager on the held-out windows."""
    import fxfreeze as fz

    head, path, ids = model.model.lm_head, "model.lm_head", text.held_out[:, :-1]
    dtype = {"dtype": "int64", "low": 0, "high": size.vocabulary - 1}
    plan = fz.Plan(
        inputs=[fz.Input("input_ids", shape=("batch", "sequence"), **dtype)],
        dims={"sequence": fz.Dim(max=size.context)},
        targets=targets,
    )
    started = time.perf_counter()
    artifact = fz.compile(model, plan, example_inputs=ids[:4])
    seconds = time.perf_counter() - started
    eager = heads.scores(model, ids, size.batch)
    near = torch.zeros(len(eager), dtype=torch.bool)
    if not isinstance(head, nn.Linear):
        near = heads.near_threshold(model, head, ids, size.batch)
    before = perplexity(eager, text.held_out)
    results: dict[str, dict[str, Any]] = {"eager": {"perplexity": before}}
    for target in targets:
        found = heads.scores(artifact.target(target), ids, size.batch)
        after = perplexity(found, text.held_out)
        change = {"perplexity": after, "relative_difference": abs(after - before) / before}
        results[target] = change | heads.compared(found, eager, near)
    return {
        "ok": good(results),
        "tokens": {"train": len(text.train), "held_out": text.held_out[:, 1:].numel()},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "head_bytes": heads.parameter_bytes(model, path),
        "frozen_head_bytes": heads.frozen_bytes(artifact, model, path),
        "head_executes": heads.executes(artifact, path),
        "near_threshold": int(near.sum()),
        "results": results,
        "largest_proof_error": heads.largest_proof_error(artifact),
        "compile_seconds": round(seconds, 1),
        "file_bytes": artifact.sizes,
    }


def good(results: dict[str, dict[str, Any]]) -> bool:
    """What the exit status says."""
    return all(
        result["relative_difference"] <= LIMIT and not result["differing_away_from_threshold"]
        for name, result in results.items()
        if name != "eager"
    )


def main() -> int:
    parser = heads.parser(__doc__, TARGETS)
    parser.add_argument("--steps", type=int, default=Size.steps)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shared = asdict(record.environment("tversky_gpt2", quick=False, seed=0, command=shlex.join(sys.argv[1:])))
    versions = {name: record.version(name) for name in ("transformers", "tokenizers")}
    shared["versions"] = {**shared["versions"], **versions}
    size, targets = Size(steps=options.steps), tuple(options.targets.split(","))
    rows = run(read(sources(), size), size, targets=targets, say=lambda text: print(text, flush=True))
    return 0 if heads.publish(rows, shared, options.out) else 1


if __name__ == "__main__":
    sys.exit(main())
