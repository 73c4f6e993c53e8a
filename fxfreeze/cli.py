"""The command line: compile, check, inspect, bench, sensitivity, passes, schema, demo.

Exit codes: 0 done · 1 a defect of fxfreeze · 2 bad usage or a bad plan · 3 capture · 4 a pass · 5 a proof · 6 an
artifact or target · 7 a missing optional package.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .errors import (
    ArtifactError,
    CaptureError,
    FxfreezeError,
    MissingDependencyError,
    PassError,
    PlanError,
    ProofError,
)

app = typer.Typer(
    help="A compiler for frozen neural networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_out, _err = Console(), Console(stderr=True)
_EXIT_CODES: tuple[tuple[type[FxfreezeError], int], ...] = (
    (PlanError, 2), (CaptureError, 3), (PassError, 4), (ProofError, 5), (ArtifactError, 6), (MissingDependencyError, 7),
)  # fmt: skip
CalibrationFile = Annotated[
    Path | None,
    typer.Option(help="Inputs to measure lossy steps on, .safetensors with one tensor per input name; a row a sample."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]


class VerifyChoice(StrEnum):
    full = "full"
    sampled = "sampled"
    off = "off"


def main() -> None:
    """Entry point: errors fxfreeze raises on purpose become a message and an exit code, never a traceback."""
    try:
        app()
    except FxfreezeError as error:
        if "--json" in sys.argv:
            print(json.dumps({"error": type(error).__name__, "what": error.what, "where": error.where,
                              "line": error.line, "hint": error.hint}))  # fmt: skip
        else:
            _err.print(f"{type(error).__name__}: {error}", style="red", markup=False, highlight=False)
        raise SystemExit(next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), 1)) from None


@app.command("compile")
def compile_command(
    factory: Annotated[str, typer.Argument(help="pkg.module:function that returns the nn.Module.")],
    plan: Annotated[Path, typer.Option(help="A plan, .toml or .json.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    weights: Annotated[Path | None, typer.Option(help="Weights of the model, .safetensors; must fit exactly.")] = None,
    examples: Annotated[
        Path | None, typer.Option(help="Example inputs, .safetensors with one tensor per input name.")
    ] = None,
    calibration: CalibrationFile = None,
    verify: Annotated[VerifyChoice, typer.Option(help="How thoroughly passes are proven.")] = VerifyChoice.full,
    as_json: Json = False,
) -> None:
    """Compile a model into a folder of proven artifacts."""
    from . import compile as compile_model
    from .factory import build_model, load_batches, load_tensors
    from .plan import Plan

    if out.exists():  # said before minutes are spent
        raise ArtifactError("the output folder exists", where=str(out), hint="choose another, or remove it")
    loaded = Plan.load(plan)
    model = build_model(factory, weights)
    inputs = load_tensors(examples) if examples else None
    batches = load_batches(calibration, loaded) if calibration else None
    with progress(quiet=as_json) as say:
        artifact = compile_model(
            model, loaded, example_inputs=inputs, calibration=batches, verify=verify.value, progress=say
        )
        artifact.save(out)
    _show(artifact.manifest, as_json)
    if not as_json:
        _out.print(f"saved to {out}", markup=False, highlight=False)


@app.command()
def check(folder: Annotated[Path, typer.Argument(help="A saved artifact.")], as_json: Json = False) -> None:
    """Reload every target of a saved artifact and compare it again with the frozen model's recorded results."""
    from . import report
    from .artifact import Artifact

    with progress(quiet=as_json) as say:
        say("loading")
        artifact = Artifact.load(folder)
        say("running every target")
        rows = [row.to_json() for row in artifact.check()]
    if as_json:
        print(json.dumps({"parity": rows}))
    else:
        _out.print(report.parity_table(rows))
    if not all(row["ok"] for row in rows):
        raise ArtifactError("a target no longer agrees with the frozen model", where=str(folder))


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A saved artifact.")],
    html: Annotated[Path | None, typer.Option(help="Also write the report as one HTML page.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Every pass, and parity at every size.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a saved artifact is: passes, proofs, ledger, parity, sizes."""
    from . import report
    from .artifact import Artifact

    manifest = Artifact.load(folder).manifest
    if html is not None:
        html.write_text(report.as_html(manifest), encoding="utf-8")
    _show(manifest, as_json, full=full)


@app.command()
def bench(
    folder: Annotated[Path, typer.Argument(help="A saved artifact.")],
    model: Annotated[
        str | None, typer.Option(help="pkg.module:function that returns the nn.Module it was compiled from.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights of the model, .safetensors; must fit exactly.")] = None,
    examples: Annotated[
        Path | None, typer.Option(help="Example inputs, .safetensors with one tensor per input name.")
    ] = None,
    sizes: Annotated[
        list[str],
        typer.Option("--size", help="Sizes of the symbolic dims, such as batch=1,tokens=64; may be repeated."),
    ] = [],  # noqa: B006 - typer reads it
    calibration: CalibrationFile = None,
    adapters: Annotated[
        Path | None, typer.Option(help="The plan's adapters as they were saved, .safetensors, for peft.")
    ] = None,
    peer: Annotated[str, typer.Option(help="A glob over the names of peers.")] = "*",
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds of a case; more of them narrow the interval.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: all cores.")] = None,
    quick: Annotated[bool, typer.Option(help="Few and short rounds.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write JSON lines here.")] = None,
    as_json: Json = False,
) -> None:
    """Time every target of a saved artifact beside eager torch, and, where the model is given, beside torch.compile and
    the libraries that do the job of the plan: ONNX Runtime and torchao quantize, peft has LoRAs."""
    from .bench import table
    from .bench.artifact import is_at_fault, measure
    from .bench.model import Subject

    subject = Subject(
        folder.absolute(), tuple(map(_sizes, sizes)), examples, model, weights, calibration=calibration,
        adapters=adapters,
    )  # fmt: skip
    with progress(quiet=as_json) as say:
        measured = measure(
            subject,
            peer=peer,
            rounds=rounds,
            threads=threads,
            quick=quick,
            out=out,
            say=say,
            command=shlex.join(sys.argv[1:]),
        )
    if as_json:
        print(json.dumps({"bench": measured}))
    else:
        _out.print(table.heading(measured[0]), markup=False, highlight=False)
        table.draw(measured, _out)
    if any(map(is_at_fault, measured)):
        raise ArtifactError("a peer is wrong or failed, see above", where=str(folder))


def _sizes(text: str) -> dict[str, int]:
    """batch=1,tokens=64 → {"batch": 1, "tokens": 64}"""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name.strip() and value.strip().isdecimal() for name, _, value in pairs):
        raise PlanError(f"{text!r} is no list of sizes", where="--size", hint="write them as batch=1,tokens=64")
    return {name.strip(): int(value) for name, _, value in pairs}


@app.command()
def sensitivity(
    factory: Annotated[str, typer.Argument(help="pkg.module:function that returns the nn.Module.")],
    plan: Annotated[Path, typer.Option(help="A plan that quantizes, .toml or .json.")],
    weights: Annotated[Path | None, typer.Option(help="Weights of the model, .safetensors; must fit exactly.")] = None,
    examples: Annotated[
        Path | None, typer.Option(help="Example inputs, .safetensors with one tensor per input name.")
    ] = None,
    calibration: CalibrationFile = None,
    as_json: Json = False,
) -> None:
    """Quantize every layer of a plan alone, and show what that does to the outputs, the most sensitive first."""
    from . import report
    from .api import sensitivity as measure
    from .factory import build_model, load_batches, load_tensors
    from .plan import Plan

    loaded = Plan.load(plan)
    model = build_model(factory, weights)
    inputs = load_tensors(examples) if examples else None
    batches = load_batches(calibration, loaded) if calibration else None
    with progress(quiet=as_json) as say:
        rows = measure(model, loaded, example_inputs=inputs, calibration=batches, progress=say)
    found = [row.to_json() for row in rows]
    if as_json:
        print(json.dumps({"sensitivity": found}))
    else:
        _out.print(report.sensitivity_table(found))


@app.command()
def passes(as_json: Json = False) -> None:
    """List the pipeline in the order it runs."""
    from rich.table import Table

    from .passes import PIPELINE

    rows = [
        {
            "name": item.name,
            "stage": item.stage,
            "exact": item.exact,
            "what": (item.__doc__ or "").strip().split("\n")[0],
        }
        for item in PIPELINE
    ]
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("pass", "stage", "exact", "what it does", header_style="bold")
    for row in rows:
        table.add_row(str(row["name"]), str(row["stage"]), "yes" if row["exact"] else "no", str(row["what"]))
    _out.print(table)


@app.command()
def schema() -> None:
    """Print the JSON schema of plans, for editors."""
    from .plan import Plan

    print(json.dumps(Plan.json_schema(), indent=2))


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="Keep the artifact here.")] = None, as_json: Json = False
) -> None:
    """Train, adapt, compile and measure a small CNN on handwritten digits; takes about a minute."""
    from .demo import run_demo

    if out is not None and out.exists():
        raise ArtifactError("the output folder exists", where=str(out), hint="choose another, or remove it")
    with progress(quiet=as_json) as say:
        result = run_demo(out, say=say)
    if as_json:
        print(json.dumps(result.to_json()))
        return
    _show(result.artifact.manifest, as_json=False)
    _show_demo(result)


def _show_demo(result: Any) -> None:
    from rich.table import Table

    table = Table(
        "", "accuracy", "ms per image", title="digits turned by 45°", title_justify="left", header_style="bold"
    )
    for name, score in result.accuracy.items():
        time_ms = result.latency_ms.get(name)
        table.add_row(name, f"{100 * score:.1f} %", "" if time_ms is None else f"{time_ms:.3f}")
    _out.print(table)
    _out.print(
        f"{result.trainable:,} trainable parameters beside {result.parameters:,} frozen ones; "
        f"{result.seconds:.0f} s in all",
        highlight=False,
    )


def _show(manifest: Any, as_json: bool, *, full: bool = False) -> None:
    from . import report

    if as_json:
        print(json.dumps(manifest))
    else:
        _out.print(report.summary(manifest, full=full))


@contextmanager
def progress(*, quiet: bool) -> Iterator[Callable[[str], None]]:
    """A function that shows what is going on and for how long, on stderr; silent for scripts."""
    if quiet:
        yield lambda text: None
        return
    if not _err.is_terminal:
        started = time.perf_counter()
        yield lambda text: _err.print(f"[{time.perf_counter() - started:5.1f} s] {text}", markup=False, highlight=False)
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=_err, transient=True
    ) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda text: bar.update(task, description=text)


if __name__ == "__main__":
    main()
