"""`python -m benchmarks list | run NAME | table FILE`, from the repository root."""

from __future__ import annotations

import ast
import fnmatch
import importlib
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from .harness import Case, Options
    from .harness.runner import Measurement

FOLDER = Path(__file__).resolve().parent
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Measure fxfreeze.")
console = Console(width=None if sys.stdout.isatty() else 140)


def benchmarks() -> dict[str, str]:
    """The files beside this one that define `cases`: name -> the first line of what the file says of itself."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "cases" for node in tree.body):
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def fail(message: str) -> typer.Exit:
    Console(stderr=True).print(f"[red]error:[/red] {escape(message)}", highlight=False, soft_wrap=True)
    return typer.Exit(2)


@app.command("list")
def list_() -> None:
    """Name the benchmarks, with the first line of what each says of itself."""
    for name, text in benchmarks().items():
        console.print(f"[bold]{name}[/bold]  {escape(text)}", highlight=False, soft_wrap=True)


@app.command()
def table(file: Annotated[Path, typer.Argument(help="a result file")]) -> None:
    """Print a result file as a Markdown table."""
    from .harness import record
    from .harness import table as rendering

    try:
        typer.echo(rendering.markdown(record.read(file)), nl=False)
    except record.ResultError as error:
        raise fail(str(error)) from error


@app.command()
def run(
    name: Annotated[str, typer.Argument(help="a name that `list` shows")],
    quick: Annotated[bool, typer.Option(help="small and few; writes nothing without --out")] = False,
    rounds: Annotated[int | None, typer.Option(min=1, help="rounds per case")] = None,
    out: Annotated[Path | None, typer.Option(help="default: benchmarks/results/NAME.jsonl")] = None,
    only: Annotated[str, typer.Option(help="a glob over the names of cases")] = "*",
    threads: Annotated[int | None, typer.Option(min=1, help="default: all cores")] = None,
    seed: Annotated[int, typer.Option(help="of models, inputs and the order of the rounds")] = 0,
) -> None:
    """Run a benchmark.

    Exit status 1: a peer is wrong or failed, or a limit is missed or could not be measured.
    """
    if name not in benchmarks():
        raise fail(f"no benchmark is named {name!r}; there are {', '.join(benchmarks())}")
    count = threads or os.cpu_count() or 1
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(count)))  # read on torch's and numpy's first import
    import torch

    from .harness import Options, record

    torch.set_num_threads(count)
    if out is None and not quick and only == "*":
        out = record.RESULTS / f"{name}.jsonl"
    given = {"--rounds": rounds, "--only": only if only != "*" else None, "--threads": count, "--seed": seed}
    words = ["python -m benchmarks run", name, *(["--quick"] if quick else [])]
    words += [f"{option} {shlex.quote(str(value))}" for option, value in given.items() if value is not None]
    shared = record.environment(name, quick=quick, seed=seed, command=" ".join(words))
    measured = _measure(selected(name, Options(seed=seed, quick=quick), only), shared, out, rounds)
    if not measured:
        raise fail(f"no case of {name} matches {only!r}")
    raise typer.Exit(int(any(bad(m) for m in measured)))


def selected(name: str, options: Options, only: str) -> Iterator[Case]:
    cases: Iterator[Case] = importlib.import_module(f"benchmarks.{name}").cases(options)
    return (case for case in cases if fnmatch.fnmatch(case.name, only))


def _measure(cases: Iterator[Case], shared: Any, out: Path | None, rounds: int | None) -> list[Measurement]:
    """Cases are made one at a time, so that only one case's models are in memory."""
    from .harness import Unavailable, record
    from .harness.noise import load_average, reasons
    from .harness.runner import Runner

    for reason in reasons(load_average(), None, None):
        console.print(f"[yellow]this machine is busy: {reason}; the rows will say so[/yellow]")
    measured: list[Measurement] = []
    with record.Writer(out, shared) as writer, console.status(shared.benchmark) as status:
        runner = Runner(
            rounds=rounds, quick=shared.quick, seed=shared.seed, say=lambda text: status.update(escape(text))
        )
        try:
            for case in cases:
                found = runner.run(case)
                writer.write(found)
                show([record.row(m, shared) for m in found])
                measured += found
        except Unavailable as error:  # from a case: its model cannot even be built
            raise fail(f"{shared.benchmark}: {error}") from error
    console.print(f"written to {out}" if out else "not written: --quick or --only without --out")
    return measured


def show(rows: list[dict[str, Any]]) -> None:
    """One case: the cells of the Markdown table, with the remarks below where they have room."""
    from .harness.table import HEADINGS, cells, remarks

    drawn = Table(*HEADINGS[1:-1], title=escape(rows[0]["case"]), title_justify="left")
    for row in rows:
        drawn.add_row(*map(escape, cells(row)[1:-1]))
    console.print(drawn)
    for row in rows:
        if row["status"] != "ok":
            console.print(f"  {escape(row['peer'])}: [red]{escape(remarks(row))}[/red]", highlight=False)
    if rows[0]["noise"]["noisy"]:
        console.print(f"  [yellow]noisy: {', '.join(rows[0]['noise']['noisy'])}[/yellow]", highlight=False)


def bad(measurement: Measurement) -> bool:
    return measurement.status in ("wrong", "failed") or measurement.verdict in ("missed", "not measured")


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
