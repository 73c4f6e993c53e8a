"""What `fxfreeze bench` is told of, and the caller's model: with it targets are compared, and rivals begin."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import libraries
from .case import Unavailable


@dataclass(frozen=True)
class Subject:
    """What is measured, as every process of a peer is told.

    Attributes:
        folder: the artifact.
        sizes: an assignment of sizes to the symbolic dims per case; none: the smallest that are allowed.
        examples: a .safetensors file with inputs, one tensor per name, to crop or repeat; None: random inputs.
        factory: ``pkg.module:function``, which returns the model that the artifact was compiled from; None: it is
            not at hand, and the stored program takes its place.
        weights: of that model, .safetensors.
        calibration: a .safetensors file with inputs, a row a sample, for peers that measure ranges; None: the examples,
            or random inputs.
        adapters: a file of the plan's adapters, trained; None: the files that its steps name.
    """

    folder: Path
    sizes: tuple[Mapping[str, int], ...] = ()
    examples: Path | None = None
    factory: str | None = None
    weights: Path | None = None
    calibration: Path | None = None
    adapters: Path | None = None
    seed: int = 0


class Model:
    """The caller's model; flat tensors to flat tensors, where it is called."""

    def __init__(self, subject: Subject, artifact: Any) -> None:
        from fxfreeze.plan import Plan

        self.subject, self.artifact = subject, artifact
        self.plan = Plan.model_validate(artifact.manifest["plan"])
        self.specs = artifact.interface.inputs
        self.names = [spec.name for spec in self.specs if not spec.select]
        self.device = "cpu" if all(spec.device.type == "cpu" for spec in self.specs) else "cuda"

    def build(self) -> nn.Module:
        """As it was compiled, called as its author calls it."""
        from fxfreeze.factory import build_model

        if self.subject.factory is None:
            raise Unavailable("needs the model that the artifact was compiled from: name it by --model")
        return build_model(self.subject.factory, self.subject.weights).eval().requires_grad_(False)

    def flat(self, module: nn.Module) -> nn.Module:
        from fxfreeze.capture import FlatModel

        return FlatModel(module, self.names, self.artifact.interface.outputs).eval()

    def eager(self) -> Callable[..., Any]:
        return self.flat(self.build())

    def compiled(self) -> Callable[..., Any]:
        fast: Callable[..., Any] = libraries.compiled(self.flat(self.build()))
        return fast

    def truth(self, *inputs: Tensor) -> Any:
        double = self.flat(self.build()).double()
        return double(*(x.double() if x.is_floating_point() else x for x in inputs))

    # ---- what it is called with

    @functools.cached_property
    def examples(self) -> list[Tensor] | None:
        from fxfreeze.errors import ArtifactError
        from fxfreeze.factory import load_tensors

        if self.subject.examples is None:
            return None
        given = load_tensors(self.subject.examples)
        if missing := [spec.name for spec in self.specs if spec.name not in given]:
            raise ArtifactError(f"no tensor is named {', '.join(missing)}", where=str(self.subject.examples))
        return [given[spec.name] for spec in self.specs]

    def inputs(self, sizes: Mapping[str, int], generator: torch.Generator) -> tuple[Tensor, ...]:
        from fxfreeze.sampling import sample_inputs

        seed = int(torch.randint(2**31, (), generator=generator))
        return tuple(sample_inputs(self.specs, sizes, seed, self.examples))

    def example(self) -> tuple[Tensor, ...]:
        """What exporters trace: no size that stays open is 1, or like another."""
        from fxfreeze.sampling import tracing_sizes

        sizes = tracing_sizes(self.specs, self.artifact.interface.dims, self.examples)
        return self.inputs(sizes, torch.Generator().manual_seed(self.subject.seed))

    def open_sizes(self) -> Any:
        """As torch.export names them; a flat model takes all of its inputs as one argument."""
        from fxfreeze.exporting import dynamic_shapes

        return (dynamic_shapes(self.specs, self.artifact.interface.dims),)

    def calibration(self) -> Iterator[list[Tensor]]:
        """Batches to measure ranges on: the caller's, else what compiling would take without any."""
        from fxfreeze.calibration import Calibration
        from fxfreeze.factory import load_batches

        file = self.subject.calibration
        batches = None if file is None else load_batches(file, self.plan)
        return Calibration(self.plan, batches, self.examples).of(self.artifact.program)
