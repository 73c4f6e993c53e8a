"""Latency of a batch whose rows have different LoRAs, against the bare base, and against peft's adapter_names.

A BERT encoder with random weights; LoRAs of rank 8 on query and value of every layer, all ids in one batch, 0 (no
adapter) among them. Asked: 16 adapters ≤ 1.3 times the bare base, 1,000 adapters ≤ 1.5 times, and what 16 adapters add
to the compiled base ≤ a quarter of what peft's adapter_names add to the eager one. Both pairs are in the torch case, in
the same rounds: compare (16 adapters - base) with (peft - eager base).
"""

from __future__ import annotations

import copy
import functools
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import models
from .harness import LATENCY, Case, Options, Peer, Unavailable

FEW, MANY = 16, 1000
LIMITS = {FEW: 1.3, MANY: 1.5}
RANK = 8
TARGETS = ("torch", "aoti", "onnx")
METRIC = replace(LATENCY, rounds=9, quick_rounds=3)
"""A call takes seconds."""


@dataclass(frozen=True)
class Size:
    """Of the encoder and its input; `many`: how many adapters are many."""

    batch: int
    tokens: int
    width: int = 768
    depth: int = 12
    words: int = 30522
    many: int = MANY

    def __str__(self) -> str:
        return f"BERT {self.width} wide, {self.depth} deep, batch {self.batch}, {self.tokens} tokens"


FULL = Size(32, 128)
SMALL = Size(4, 16, width=64, depth=2, words=50, many=100)


def cases(options: Options) -> Iterator[Case]:
    for target in TARGETS:
        yield select_case(SMALL if options.quick else FULL, target, options.seed)


def select_case(size: Size, target: str, seed: int) -> Case:
    """The control is the base compiled again: as far as its ratio is from 1, this machine cannot resolve."""
    subject = Subject(size, seed)
    few, many = Selected(subject, FEW), Selected(subject, size.many)
    peers = [
        Peer("base", lambda: subject.compiled(target), reference=subject.reference),
        Peer("base again (control)", lambda: subject.compiled(target), reference=subject.reference),
        Peer(f"{FEW} adapters", lambda: few.compiled(target), reference=few.reference, limit=LIMITS[FEW]),
        Peer(f"{size.many} adapters", lambda: many.compiled(target), reference=many.reference, limit=LIMITS[MANY]),
    ]
    if target == "torch":
        peers += [
            Peer("eager base", lambda: subject.eager, reference=subject.reference),
            Peer(f"peft, {FEW} adapter_names, eager", few.peft, reference=few.reference),
        ]
    return Case(
        name=f"{size}, {target}",
        peers=tuple(peers),
        baseline="base",
        reference=subject.reference,
        inputs=lambda generator: (
            torch.randint(size.words, (size.batch, size.tokens), generator=generator),
            draw(FEW, size.batch, generator),
            draw(size.many, size.batch, generator),
        ),
        tolerance=1e-4,
        metric=METRIC,
    )


def draw(adapters: int, batch: int, generator: torch.Generator) -> Tensor:
    """Ids of the rows, int64 [batch]: 0 and as many others as there are, each about equally often."""
    order = torch.randperm(adapters, generator=generator) + 1
    ids = torch.cat([torch.zeros(1, dtype=torch.int64), order]).repeat(-(-batch // (adapters + 1)))[:batch]
    return ids[torch.randperm(batch, generator=generator)]


class Subject:
    """The base. Every callable takes the words, the ids among FEW, and those among many."""

    def __init__(self, size: Size, seed: int) -> None:
        self.size, self.seed = size, seed

    @functools.cached_property
    def model(self) -> nn.Module:
        size = self.size
        return models.bert(
            self.seed, hidden_size=size.width, num_hidden_layers=size.depth, intermediate_size=4 * size.width,
            num_attention_heads=max(size.width // 64, 2), vocab_size=size.words,
        )  # fmt: skip

    @functools.cached_property
    def sites(self) -> list[str]:
        return [name for name, _ in self.model.named_modules() if name.endswith(("self.query", "self.value"))]

    def plan(self, target: str, *steps: Any) -> Any:
        import fxfreeze as fz

        words = fz.Input("input_ids", ("batch", self.size.tokens), "int64", low=0, high=self.size.words - 1)
        return fz.Plan([words], steps, targets=(target,), outputs=["last_hidden_state"])

    def eager(self, words: Tensor, few: Tensor, many: Tensor) -> Tensor:
        output: Tensor = self.model(words).last_hidden_state
        return output

    def reference(self, words: Tensor, few: Tensor, many: Tensor) -> Tensor:
        return self.eager(words, few, many)

    def compiled(self, target: str) -> Callable[..., Tensor]:
        runner = built(self.size, self.seed, target, None)
        return lambda words, few, many: runner(words)[0]


def built(size: Size, seed: int, target: str, adapters: int | None) -> Callable[..., Any]:
    """What an artifact runs, without the checks of its call, beside which a difference would look smaller.

    It is compiled in a process of its own: what that takes is a multiple of what all the peers hold at last.
    """
    import fxfreeze as fz

    folder = tempfile.TemporaryDirectory()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(_save, size, seed, target, adapters, f"{folder.name}/artifact").result()
    artifact = fz.load(f"{folder.name}/artifact")
    runner = artifact.runner()

    def call(*inputs: Tensor) -> Any:
        return runner(*inputs)

    call.files = artifact, folder  # type: ignore[attr-defined]  # they go with it
    return call


def _save(size: Size, seed: int, target: str, adapters: int | None, folder: str) -> None:
    import fxfreeze as fz

    subject = Subject(size, seed)
    model, plan = subject.model, subject.plan(target)
    if adapters is not None:
        model, plan = Selected(subject, adapters).adapted(target)
    try:
        fz.compile(model, plan, verify="off").save(folder)
    except fz.MissingDependencyError as error:
        raise Unavailable(str(error)) from error


class Selected:
    """The base with `adapters` of them: as trained ones are, not zero."""

    def __init__(self, subject: Subject, adapters: int) -> None:
        self.subject, self.adapters = subject, adapters

    def pair(self, site: str) -> tuple[Tensor, Tensor]:
        """A [adapters, rank, in] and B [adapters, out, rank] at `site`."""
        number, width = self.subject.sites.index(site), self.subject.size.width
        generator = torch.Generator().manual_seed(self.subject.seed + 1 + number)
        a = torch.randn(self.adapters, RANK, width, generator=generator) / width**0.5
        b = torch.randn(self.adapters, width, RANK, generator=generator) / 20
        return a, b

    def compiled(self, target: str) -> Callable[..., Tensor]:
        runner = built(self.subject.size, self.subject.seed, target, self.adapters)
        return lambda words, few, many: runner(words, self._own(few, many))[0]

    def adapted(self, target: str) -> tuple[nn.Module, Any]:
        """The base with the adapters, and its plan."""
        import fxfreeze as fz

        globs = ["encoder.layer.*.attention.self.query", "encoder.layer.*.attention.self.value"]
        plan = self.subject.plan(target, fz.LoRA(at=globs, rank=RANK, adapters=self.adapters))
        net = fz.adapt(self.subject.model, plan, verify="off")
        parameters = dict(net.named_parameters())
        with torch.no_grad():
            for site in self.subject.sites:
                for leaf, value in zip(("lora_A", "lora_B"), self.pair(site), strict=True):
                    parameters[f"adapters.lora.{site}.{leaf}"].copy_(value)
        return net, plan

    def _own(self, few: Tensor, many: Tensor) -> Tensor:
        return few if self.adapters == FEW else many

    def reference(self, words: Tensor, few: Tensor, many: Tensor) -> Tensor:
        """Every row through the base with its own adapter in its weights."""
        ids = self._own(few, many)
        output = words.new_empty(0, dtype=torch.float32)
        pairs = {site: self.pair(site) for site in self.subject.sites}
        for id in ids.unique().tolist():
            model = copy.deepcopy(self.subject.model)
            for site, (a, b) in pairs.items() if id else ():
                model.get_submodule(site).weight.data += b[id - 1] @ a[id - 1]
            rows = model(words[ids == id]).last_hidden_state
            output = rows.new_empty(len(ids), *rows.shape[1:]) if not len(output) else output
            output[ids == id] = rows
        return output

    def peft(self) -> Callable[..., Tensor]:
        """What a user does today: peft's mixed batches, in eager torch, for it branches on the names."""
        peft = models.need("peft")
        config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["query", "value"])
        net = peft.get_peft_model(copy.deepcopy(self.subject.model), config, adapter_name="1")
        for number in range(2, self.adapters + 1):
            net.add_adapter(str(number), config)
        for site in self.subject.sites:
            a, b = self.pair(site)
            layer = net.base_model.model.get_submodule(site)
            for number in range(self.adapters):
                layer.lora_A[str(number + 1)].weight.data.copy_(a[number])
                layer.lora_B[str(number + 1)].weight.data.copy_(b[number])
        net.eval()

        def call(words: Tensor, few: Tensor, many: Tensor) -> Tensor:
            names = [str(id) if id else "__base__" for id in few.tolist()]
            output: Tensor = net(input_ids=words, adapter_names=names).last_hidden_state
            return output

        return call
