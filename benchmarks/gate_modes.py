"""Latency of gates with 1,000 modes in one artifact against 2, on each target."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import models
from .harness import Case, Options, Peer, Unavailable

LIMIT = 1.05
FEW, MANY = 2, 1000
TARGETS = ("torch", "aoti", "onnx")
STEP = 1 / 64
"""Inputs and weights are whole multiples of it, so that float32 sums are exact in any order; thresholds lie between."""


@dataclass(frozen=True)
class Size:
    """A feed-forward block: rows per call, width of its input and output, hidden neurons."""

    batch: int
    width: int
    hidden: int

    def __str__(self) -> str:
        return f"FFN {self.width}-{self.hidden}-{self.width}, batch {self.batch}"


SIZES = (Size(1, 512, 2048), Size(64, 512, 2048))
SMALL = (Size(2, 16, 32),)


def cases(options: Options) -> Iterator[Case]:
    for size in SMALL if options.quick else SIZES:
        for target in TARGETS:
            yield modes_case(size, target, options.seed)


def modes_case(size: Size, target: str, seed: int) -> Case:
    """Every call is for other modes, in turn all there are, so the table is read and not only its first rows.

    The control is 2 modes compiled again: as far as its ratio is from 1, this machine cannot resolve.
    """
    few, many = Gated(size, FEW, seed), Gated(size, MANY, seed)

    def peer(name: str, gated: Gated, **given: Any) -> Peer:
        turns: list[Turns] = []

        def prepare() -> Turns:
            turns.append(Turns(gated.compiled(target), gated.modes))
            return turns[-1]

        return Peer(name, prepare, observe=lambda result: turns[-1].every(), reference=gated.reference, **given)

    return Case(
        name=f"{size}, {target}",
        peers=(
            peer(f"{FEW} modes", few),
            peer(f"{FEW} modes again (control)", few),
            peer(f"{MANY} modes", many, limit=LIMIT),
        ),
        baseline=f"{FEW} modes",
        reference=few.reference,
        inputs=lambda generator: (
            steps((size.batch, size.width), generator),
            draw(FEW, size.batch, generator),
            draw(MANY, size.batch, generator),
        ),
        tolerance=1e-5,
    )


def steps(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Multiples of STEP in [−1/8, 1/8]. Products are multiples of STEP², 512 of them need 15 of 24 bits."""
    return torch.randint(-8, 9, shape, generator=generator) * STEP


def draw(modes: int, batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """The modes of one call after another, int64 [batch] each; over all calls each mode comes about equally often."""
    most = max(modes, MANY)
    rounds = [torch.randperm(most, generator=generator) % modes for _ in range(-(-batch * 16 // most))]
    ids = torch.cat(rounds)
    return ids[: len(ids) // batch * batch].split(batch)


class Turns:
    """A peer: each call is for the next modes. Takes x, and the ids of the calls for FEW and for MANY modes."""

    def __init__(self, call: Callable[[Tensor, Tensor], Tensor], modes: int) -> None:
        self.call, self.modes = call, modes
        self.x: Tensor | None = None
        self.ids: tuple[Tensor, ...] = ()

    def __call__(self, x: Tensor, few: tuple[Tensor, ...], many: tuple[Tensor, ...]) -> Tensor:
        if self.x is not x:
            self.x, self.ids = x, few if self.modes == FEW else many
            self.following = itertools.cycle(self.ids)
        return self.call(x, next(self.following))

    def every(self) -> Tensor:
        """The outputs of a whole turn, one below the other; not timed."""
        return torch.cat([self.call(self.x, ids) for ids in self.ids])


class Gated:
    """A block with `modes` gains and thresholds per hidden neuron. Its weights are the same for any `modes`."""

    def __init__(self, size: Size, modes: int, seed: int) -> None:
        self.size, self.modes, self.seed = size, modes, seed

    @functools.cached_property
    def model(self) -> nn.Sequential:
        generator = torch.Generator().manual_seed(self.seed + 1)
        block = nn.Sequential(nn.Linear(self.size.width, self.size.hidden), nn.ReLU(),
                              nn.Linear(self.size.hidden, self.size.width))  # fmt: skip
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.copy_(steps(tuple(parameter.shape), generator))
        models.frozen(block)
        return block

    @functools.cached_property
    def net(self) -> Any:
        """With gates that let about half of what is above 0 pass."""
        import fxfreeze as fz

        inputs = [fz.Input("x", shape=(self.size.batch, self.size.width), low=-0.125, high=0.125)]
        net = fz.adapt(self.model, fz.Plan(inputs, [fz.Gate(at="1", modes=self.modes)]), verify="off")
        generator = torch.Generator().manual_seed(self.seed + 2)
        with torch.no_grad():
            for name, value in net.named_parameters():
                drawn = torch.rand(value.shape, generator=generator)
                level = ((drawn / 4 / STEP**2).floor() + 0.5) * STEP**2
                value.copy_(level if name.endswith("threshold") else drawn + 0.5)
        return net

    def compiled(self, target: str) -> Callable[[Tensor, Tensor], Tensor]:
        """Without the checks of an artifact's call, beside which a difference would look smaller."""
        import fxfreeze as fz

        plan = fz.Plan(inputs=self.net.plan.inputs, steps=self.net.plan.steps, targets=(target,))
        try:
            artifact = fz.compile(self.net, plan, verify="off")
        except fz.MissingDependencyError as error:
            raise Unavailable(str(error)) from error
        runner = artifact.runner()

        def call(x: Tensor, mode: Tensor) -> Tensor:
            output: Tensor = runner(x, mode)[0]
            return output

        call.artifact = artifact  # type: ignore[attr-defined]  # its files go with it
        return call

    def reference(self, x: Tensor, few: tuple[Tensor, ...], many: tuple[Tensor, ...]) -> Tensor:
        """The outputs of a whole turn, with hard gates in plain torch and float64."""
        first, _, last = self.model
        state = {name.rsplit(".")[-1]: value.double() for name, value in self.net.adapter_state().items()}
        h = torch.relu(nn.functional.linear(x.double(), first.weight.double(), first.bias.double()))
        outputs = []
        for ids in few if self.modes == FEW else many:
            gated = torch.where(h > state["threshold"][ids], state["gain"][ids] * h, 0.0)
            outputs.append(nn.functional.linear(gated, last.weight.double(), last.bias.double()))
        return torch.cat(outputs)
