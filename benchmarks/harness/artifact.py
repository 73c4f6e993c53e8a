"""A saved artifact: its targets, beside eager torch and the compilers that its owner would use instead."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import record
from .case import Case, Peer, Unavailable
from .worker import runner

MODEL, PROGRAM = "model, eager", "program, eager"


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
    """

    folder: Path
    sizes: tuple[Mapping[str, int], ...] = ()
    examples: Path | None = None
    factory: str | None = None
    weights: Path | None = None
    seed: int = 0


def cases(subject: Subject) -> Iterator[Case]:
    """One for each assignment of sizes."""
    from fxfreeze.artifact import Artifact
    from fxfreeze.errors import PlanError
    from fxfreeze.sampling import symbolic_dims

    artifact = Artifact.load(subject.folder)
    dims = artifact.interface.dims
    smallest = {name: dims.get(name, (1, None))[0] for name in symbolic_dims(artifact.interface.inputs)}
    for sizes in subject.sizes or (smallest,):
        if sizes.keys() != smallest.keys():
            raise PlanError(f"sizes of {sorted(sizes)} where the inputs have {sorted(smallest)}", where="sizes")
        yield _case(subject, artifact, dict(sizes))


def measure(
    subject: Subject,
    *,
    peer: str = "*",
    rounds: int | None = None,
    threads: int | None = None,
    quick: bool = False,
    out: Path | None = None,
    command: str = "",
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Measure all cases; the rows, see record.py.

    Args:
        peer: a glob over the names of peers; the baseline is there in any case.
        threads: of each peer; None: all cores.
        out: a file for the rows.

    Raises:
        ArtifactError: there is no artifact, or it was altered.
        PlanError: sizes that its inputs do not have.
    """
    threads = threads or os.cpu_count() or 1
    running = runner(
        f"{__package__}.artifact", subject, threads=threads, seed=subject.seed, rounds=rounds, quick=quick, peer=peer,
        say=say,
    )  # fmt: skip
    shared = record.environment(subject.folder.name, threads=threads, quick=quick, seed=subject.seed, command=command)
    rows = []
    with record.Writer(out, shared) as writer:
        for case in cases(subject):
            found = running.run(case)
            writer.write(found)
            rows += [record.row(measurement, shared) for measurement in found]
    return rows


def _case(subject: Subject, artifact: Any, sizes: dict[str, int]) -> Case:
    # A bound that holds for every size the parity check ran at. A lossy plan's truth is its own program.
    bounds = [row["tolerance"] for row in artifact.manifest["parity"]]
    yours: list[Peer] = []
    if subject.factory is not None:
        model = _Model(subject, artifact)
        yours = [
            Peer(MODEL, model.eager, reference=model.truth),
            Peer("model, torch.compile, freezing", model.compiled, reference=model.truth),
        ]
    return Case(
        name=", ".join(f"{name} {size}" for name, size in sizes.items()) or "fixed sizes",
        peers=(
            *yours,
            Peer(PROGRAM, lambda: artifact.program.run),
            *(Peer(f"fxfreeze, {name}", _runner(artifact, name)) for name in artifact.targets),
        ),
        baseline=MODEL if yours else PROGRAM,
        reference=lambda *inputs: _truth(artifact.program, inputs),
        inputs=lambda generator: _inputs(subject, artifact, sizes, generator),
        tolerance=max(bounds, default=1e-4),
        device="cpu" if all(spec.device.type == "cpu" for spec in artifact.interface.inputs) else "cuda",
    )


def _runner(artifact: Any, name: str) -> Callable[[], Callable[..., Any]]:
    def prepare() -> Callable[..., Any]:
        from fxfreeze.errors import ArtifactError, MissingDependencyError

        try:
            found: Callable[..., Any] = artifact.runner(name)
        except (ArtifactError, MissingDependencyError) as error:
            raise Unavailable(str(error)) from error
        return found

    return prepare


def _truth(program: Any, inputs: tuple[Tensor, ...]) -> Any:
    from fxfreeze.proof import lifted_run

    return lifted_run(program, inputs)


def _inputs(subject: Subject, artifact: Any, sizes: dict[str, int], generator: torch.Generator) -> tuple[Tensor, ...]:
    from fxfreeze.errors import ArtifactError
    from fxfreeze.factory import load_tensors
    from fxfreeze.sampling import sample_inputs

    examples = None
    if subject.examples is not None:
        given = load_tensors(subject.examples)
        if missing := [spec.name for spec in artifact.interface.inputs if spec.name not in given]:
            raise ArtifactError(f"no tensor is named {', '.join(missing)}", where=str(subject.examples))
        examples = [given[spec.name] for spec in artifact.interface.inputs]
    seed = int(torch.randint(2**31, (), generator=generator))
    return tuple(sample_inputs(artifact.interface.inputs, sizes, seed, examples))


class _Model:
    """The caller's model, flat tensors to flat tensors."""

    def __init__(self, subject: Subject, artifact: Any) -> None:
        self.subject, self.artifact = subject, artifact

    def build(self) -> nn.Module:
        from fxfreeze.capture import FlatModel
        from fxfreeze.factory import build_model

        assert self.subject.factory is not None
        model = build_model(self.subject.factory, self.subject.weights).eval().requires_grad_(False)
        interface = self.artifact.interface
        return FlatModel(model, [spec.name for spec in interface.inputs if not spec.select], interface.outputs)

    def eager(self) -> Callable[..., Any]:
        return self.build()

    def compiled(self) -> Callable[..., Any]:
        # The switch of the whole process, which the peer has for itself: dynamo does not see the option of a call.
        torch._inductor.config.freezing = True  # type: ignore[attr-defined]
        fast: Callable[..., Any] = torch.compile(self.build())
        return fast

    def truth(self, *inputs: Tensor) -> Any:
        return self.build().double()(*(x.double() if x.is_floating_point() else x for x in inputs))
