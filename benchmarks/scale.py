"""How latency grows with what one artifact holds: LoRAs up to 10,000 that rows select, and modes of gates as many.

Beside fxfreeze stands what one would write by hand, in plain torch: tables of all adapters, or of all gains and
thresholds, of which every row gathers its own. peft's adapter_names take one module per adapter and layer.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import gate_modes, select_lora
from .harness import Case, Options, Peer, Unavailable, libraries
from .networks import METRIC
from .suite.peers import exported_session

SUITE = "cpu"
ADAPTERS = (1, 100, 10_000)
MODES = (1_000, 10_000)
ENCODER = select_lora.Size(batch=32, tokens=32, width=128, depth=2, words=1000)
BLOCK = gate_modes.Size(batch=64, width=512, hidden=2048)
TARGETS, MODE_TARGETS = ("onnx", "aoti"), ("onnx", "torch")
MOST_MODULES = 1000
"""Adapters that peft is given: it takes milliseconds to add one, and longer the more there are."""


def cases(options: Options) -> Iterator[Case]:
    for adapters in ADAPTERS[1:2] if options.quick else ADAPTERS:
        yield adapters_case(adapters, options)
    for modes in MODES[:1] if options.quick else MODES:
        yield modes_case(modes, options)


# ---- adapters


def adapters_case(adapters: int, options: Options) -> Case:
    """A BERT encoder whose rows have different LoRAs on query and value of every layer; id 0 is none."""
    subject = select_lora.Subject(ENCODER, options.seed)
    chosen = select_lora.Selected(subject, adapters)

    def ours(target: str) -> Callable[..., Any]:
        call = chosen.compiled(target)
        return lambda words, ids: call(words, ids, ids)

    return Case(
        name=f"{adapters:,} adapters, {ENCODER}",
        peers=(
            Peer("by hand, ONNX Runtime", lambda: exported_session(Selecting(chosen), batch(chosen), ("words", "ids"))),
            Peer("by hand, torch.compile, freezing",
                 lambda: libraries.compiled(Selecting(chosen))),
            Peer("peft, adapter_names", functools.partial(named, chosen)),
            *(Peer(f"fxfreeze, {target}", functools.partial(ours, target))
              for target in (TARGETS[:1] if options.quick else TARGETS)),
        ),
        baseline="by hand, ONNX Runtime",
        reference=lambda words, ids: chosen.reference(words, ids, ids),
        inputs=lambda generator: batch(chosen, generator),
        metric=METRIC,
        together="adapters",
    )  # fmt: skip


def batch(chosen: select_lora.Selected, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Words and ids."""
    generator, size = generator or torch.Generator().manual_seed(0), chosen.subject.size
    words = torch.randint(size.words, (size.batch, size.tokens), generator=generator)
    return words, select_lora.draw(chosen.adapters, size.batch, generator)


def named(chosen: select_lora.Selected) -> Callable[..., Any]:
    if chosen.adapters > MOST_MODULES:
        raise Unavailable(f"{chosen.adapters:,} adapters are as many modules per layer: left out above {MOST_MODULES}")
    call = chosen.peft()
    return lambda words, ids: call(words, ids, ids)


class Selecting(nn.Module):
    """The encoder with tables of adapters, the first of zeros, by hand."""

    def __init__(self, chosen: select_lora.Selected) -> None:
        super().__init__()
        self.model = copy.deepcopy(chosen.subject.model)
        for site in chosen.subject.sites:
            self.model.set_submodule(site, Row(self.model.get_submodule(site), *chosen.pair(site)))
        self.rows = [module for module in self.model.modules() if isinstance(module, Row)]

    def forward(self, words: Tensor, ids: Tensor) -> Tensor:
        for row in self.rows:
            row.ids = ids
        hidden: Tensor = self.model(words).last_hidden_state
        return hidden


class Row(nn.Module):
    ids: Tensor

    def __init__(self, layer: nn.Module, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.a, self.b = (nn.Parameter(torch.cat([torch.zeros_like(v[:1]), v]), requires_grad=False) for v in (a, b))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) + x @ self.a[self.ids].mT @ self.b[self.ids].mT
        return y


# ---- modes


def modes_case(modes: int, options: Options) -> Case:
    """A feed-forward block whose rows have gains and thresholds of their own, other ones in every call. How many rows
    there are is fixed for all: torch.compile packs weights for so many, and is the fastest in floats."""
    gated = gate_modes.Gated(BLOCK, modes, options.seed)

    return Case(
        name=f"{modes:,} modes, {BLOCK}",
        peers=(
            Peer("by hand, ONNX Runtime", lambda: exported_session(Moded(gated), rows(gated), ("x", "mode"))),
            Peer("by hand, torch.compile, freezing", lambda: libraries.compiled(Moded(gated))),
            *(Peer(f"fxfreeze, {target}", functools.partial(gated.compiled, target))
              for target in (MODE_TARGETS[:1] if options.quick else MODE_TARGETS)),
        ),
        baseline="by hand, ONNX Runtime",
        reference=lambda x, ids: Moded(gated).double()(x.double(), ids),
        inputs=functools.partial(rows, gated),
        tolerance=1e-5,
        metric=METRIC,
        together="modes",
    )  # fmt: skip


def rows(gated: gate_modes.Gated, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Inputs and modes."""
    generator, size = generator or torch.Generator().manual_seed(0), gated.size
    ids = torch.randint(gated.modes, (size.batch,), generator=generator)
    return gate_modes.steps((size.batch, size.width), generator), ids


class Moded(nn.Module):
    """The block with tables of gains and thresholds, by hand."""

    def __init__(self, gated: gate_modes.Gated) -> None:
        super().__init__()
        self.first, _, self.last = copy.deepcopy(gated.model)
        state = {name.rsplit(".")[-1]: value for name, value in gated.net.adapter_state().items()}
        self.gain, self.threshold = (nn.Parameter(state[leaf], requires_grad=False) for leaf in ("gain", "threshold"))

    def forward(self, x: Tensor, mode: Tensor) -> Tensor:
        h = self.first(x).relu()
        y: Tensor = self.last(torch.where(h > self.threshold[mode], self.gain[mode] * h, 0.0))
        return y
