"""The command line: compile, check, inspect, sensitivity, passes, schema, demo.

Exit codes: 0 done · 1 a defect of fxfreeze · 2 bad usage or a bad plan · 3 capture · 4 a pass · 5 a proof · 6 an
artifact or target · 7 a missing optional package.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    from torch import nn

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
_CALIBRATION_ROWS = 64
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
    from .plan import Plan

    if out.exists():  # said before minutes are spent
        raise ArtifactError("the output folder exists", where=str(out), hint="choose another, or remove it")
    loaded = Plan.load(plan)
    model = build_model(factory, weights)
    inputs = _load_tensors(examples) if examples else None
    batches = _load_batches(calibration) if calibration else None
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
    from .plan import Plan

    loaded = Plan.load(plan)
    model = build_model(factory, weights)
    inputs = _load_tensors(examples) if examples else None
    batches = _load_batches(calibration) if calibration else None
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


def build_model(factory: str, weights: Path | None) -> nn.Module:
    """Import ``pkg.module:function``, call it, and load `weights` into the result.

    Raises:
        CaptureError: there is no such function, or it does not return an nn.Module.
        ArtifactError: the weights file is unreadable or does not fit the model.
    """
    from torch import nn

    module_name, _, function_name = factory.partition(":")
    if not function_name:
        raise PlanError(f"{factory!r} does not name a function", hint="write it as pkg.module:function")
    sys.path.insert(0, os.getcwd())
    try:
        function: Callable[[], Any] = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise CaptureError(f"cannot import {factory}: {error}", hint="run from the folder that holds it") from error
    finally:
        sys.path.remove(os.getcwd())
    model = function()
    if not isinstance(model, nn.Module):
        raise CaptureError(f"{factory} returned {type(model).__name__}, not an nn.Module", where=factory)
    if weights is not None:
        _load_weights(model, weights)
    return model


def _load_weights(model: nn.Module, weights: Path) -> None:
    tensors = _load_tensors(weights)
    known = dict(model.state_dict())
    # A file keeps one name of tied tensors; the others are filled by the tie.
    given = {known[name].data_ptr() for name in tensors if name in known}
    tied = {name for name, value in known.items() if name not in tensors and value.data_ptr() in given}
    missing, unknown = sorted(known.keys() - tensors.keys() - tied), sorted(tensors.keys() - known.keys())
    wrong = [f"{name} {tuple(tensors[name].shape)} (model: {tuple(known[name].shape)})"
             for name in known.keys() & tensors.keys() if tensors[name].shape != known[name].shape]  # fmt: skip
    kinds = (("missing", missing), ("unknown", unknown), ("wrong shape", wrong))
    problems = [f"{what}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}" for what, names in kinds if names]
    if problems:
        raise ArtifactError(f"the weights do not fit the model; {'; '.join(problems)}", where=str(weights))
    model.load_state_dict(tensors, strict=False)


def _load_tensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot read tensors: {error}", where=str(path)) from error


def _load_batches(path: Path) -> list[dict[str, Any]]:
    """What a file of samples holds, some rows at a time."""
    tensors = _load_tensors(path)
    rows = {name: len(value) if value.ndim else 0 for name, value in tensors.items()}
    if not rows or min(rows.values()) != max(rows.values()) or not min(rows.values()):
        raise ArtifactError(f"its tensors hold different numbers of samples, or none: {rows}", where=str(path))
    count = min(rows.values())
    return [{name: value[start : start + _CALIBRATION_ROWS] for name, value in tensors.items()}
            for start in range(0, count, _CALIBRATION_ROWS)]  # fmt: skip


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
