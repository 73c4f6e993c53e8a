"""A saved artifact: its targets, beside eager torch, and what its owner would use instead."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from . import record
from .case import Case, Peer, Unavailable
from .model import Model, Subject
from .rivals import rivals
from .worker import nursery, runner

MODEL, PROGRAM = "model, eager", "program, eager"


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
    shared = record.environment(subject.folder.name, threads=threads, quick=quick, seed=subject.seed, command=command)
    file, rows = f"{__package__}.artifact", []
    with record.Writer(out, shared) as writer, nursery(file, threads) as workers:
        running = runner(file, subject, workers, seed=subject.seed, rounds=rounds, quick=quick, peer=peer, say=say)
        for case in cases(subject):
            found = running.run(case)
            writer.write(found)
            rows += [record.row(measurement, shared) for measurement in found]
    return rows


def is_at_fault(row: dict[str, Any]) -> bool:
    """Whether the artifact, or what it is compared with, is broken. Of another library that is a result."""
    return row["status"] in ("wrong", "failed") and row["peer"].startswith(("fxfreeze,", "model,", "program,"))


def _case(subject: Subject, artifact: Any, sizes: dict[str, int]) -> Case:
    # A bound that holds for every size the parity check ran at. A lossy plan's truth is its own program.
    bounds = [row["tolerance"] for row in artifact.manifest["parity"]]
    model = Model(subject, artifact)
    yours = [
        Peer(MODEL, model.eager, reference=model.truth),
        Peer("model, torch.compile, freezing", model.compiled, reference=model.truth),
    ]
    return Case(
        name=", ".join(f"{name} {size}" for name, size in sizes.items()) or "fixed sizes",
        peers=(
            *(yours if subject.factory else ()),
            Peer(PROGRAM, lambda: artifact.program.run),
            *(Peer(f"fxfreeze, {name}", _runner(artifact, name)) for name in artifact.targets),
            *rivals(model),
        ),
        baseline=MODEL if subject.factory else PROGRAM,
        reference=lambda *inputs: _truth(artifact.program, inputs),
        inputs=lambda generator: model.inputs(sizes, generator),
        tolerance=max(bounds, default=1e-4),
        device=model.device,
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
