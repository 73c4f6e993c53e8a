"""`python -m benchmarks list | run NAME | suite | table FILE | report`, from the repository root."""

from __future__ import annotations

import ast
import contextlib
import fnmatch
import importlib
import itertools
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from .harness import Case, Options
    from .harness.nursery import Nursery
    from .harness.runner import Measurement, Runner

FOLDER = Path(__file__).resolve().parent

RATES = 300.0
"""Seconds after which it is measured again what the machine can do."""

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Measure fxfreeze.")
console = Console(width=None if sys.stdout.isatty() else 140)


@dataclass(frozen=True)
class Benchmark:
    """A file beside this one that defines `cases`: the first line of what it says of itself, and its `SUITE`."""

    text: str
    suite: str | None


def benchmarks() -> dict[str, Benchmark]:
    """All of them, by name; none is imported."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "cases" for node in tree.body):
            found[path.stem] = Benchmark((ast.get_docstring(tree) or "").partition("\n")[0], _suite(tree))
    return found


def _suite(tree: ast.Module) -> str | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SUITE":
            return str(ast.literal_eval(node.value))
    return None


def fail(message: str) -> typer.Exit:
    Console(stderr=True).print(f"[red]error:[/red] {escape(message)}", highlight=False, soft_wrap=True)
    return typer.Exit(2)


@app.command("list")
def list_() -> None:
    """Name the benchmarks, with the first line of what each says of itself."""
    for name, found in benchmarks().items():
        suite = f" ({found.suite})" if found.suite else ""
        console.print(f"[bold]{name}[/bold]{suite}  {escape(found.text)}", highlight=False, soft_wrap=True)


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
def report(
    check: Annotated[bool, typer.Option(help="write nothing; exit status 2 where it is out of date")] = False,
) -> None:
    """Write RESULTS.md from the result files."""
    from .report import FILE, text

    made = text()
    if check and (not FILE.exists() or FILE.read_text(encoding="utf-8") != made):
        raise fail(f"{FILE.name} is out of date: run `python -m benchmarks report`")
    if not check:
        FILE.write_text(made, encoding="utf-8")


Quick = Annotated[bool, typer.Option(help="small and few; writes nothing without --out")]
Rounds = Annotated[int | None, typer.Option(min=1, help="rounds per case")]
CaseGlob = Annotated[str, typer.Option("--case", help="a glob over the names of cases")]
PeerGlob = Annotated[str, typer.Option("--peer", help="a glob over the names of peers; the baseline is always there")]
Threads = Annotated[int | None, typer.Option(min=1, help="default: all cores")]
Seed = Annotated[int, typer.Option(help="of models, inputs and the order of the rounds")]


@app.command()
def run(
    name: Annotated[str, typer.Argument(help="a name that `list` shows")],
    quick: Quick = False,
    rounds: Rounds = None,
    out: Annotated[Path | None, typer.Option(help="default: benchmarks/results/NAME.jsonl")] = None,
    case: CaseGlob = "*",
    peer: PeerGlob = "*",
    threads: Threads = None,
    seed: Seed = 0,
) -> None:
    """Run a benchmark.

    Exit status 1: a peer is wrong or failed, or a limit is missed or could not be measured.
    """
    if name not in benchmarks():
        raise fail(f"no benchmark is named {name!r}; there are {', '.join(benchmarks())}")
    request = Request(pin_threads(threads), seed, quick, rounds, case, peer)
    with request.workers() as workers:
        measured = request.measure(name, out, workers)
    if not measured:
        raise fail(f"no case of {name} matches {case!r}")
    raise typer.Exit(int(any(bad(m) for m in measured)))


@app.command()
def suite(
    name: Annotated[str, typer.Option("--suite", help="cpu, gpu, compile or accuracy")] = "cpu",
    quick: Quick = False,
    rounds: Rounds = None,
    case: CaseGlob = "*",
    peer: PeerGlob = "*",
    threads: Threads = None,
    seed: Seed = 0,
) -> None:
    """Run all benchmarks of a suite; the same as `python benchmarks/run.py`.

    Exit status 1: a peer of ours is wrong or failed, or a limit is missed or could not be measured.
    """
    found = benchmarks()
    names = [item for item in found if found[item].suite == name]
    if not names:
        raise fail(f"no suite {name!r}; there are {', '.join(sorted({b.suite for b in found.values() if b.suite}))}")
    request = Request(pin_threads(threads), seed, quick, rounds, case, peer)
    started = time.perf_counter()
    with request.workers() as workers:
        measured = [m for item in names for m in request.measure(item, None, workers)]
    if not measured:
        raise fail(f"no case of the suite {name} matches {case!r}")
    console.print(f"{len(measured)} measurements in {time.perf_counter() - started:.0f} s")
    raise typer.Exit(int(any(bad(m) for m in measured if m.peer.startswith("fxfreeze"))))


def pin_threads(threads: int | None) -> int:
    """For what is measured in this process; workers are told."""
    import torch

    count = threads or os.cpu_count() or 1
    torch.set_num_threads(count)
    return count


@dataclass(frozen=True)
class Request:
    """What is asked for on the command line; every benchmark of a suite gets the same."""

    threads: int
    seed: int
    quick: bool
    rounds: int | None
    case: str
    peer: str

    def command(self, name: str) -> str:
        given = {"--rounds": self.rounds, "--case": self.case, "--peer": self.peer, "--threads": self.threads,
                 "--seed": self.seed}  # fmt: skip
        words = ["python -m benchmarks run", name, *(["--quick"] if self.quick else [])]
        words += [f"{key} {shlex.quote(str(value))}" for key, value in given.items() if value not in (None, "*")]
        return " ".join(words)

    def workers(self) -> contextlib.closing[Nursery]:
        """What all that is measured is forked from."""
        from .harness.worker import nursery

        return nursery("benchmarks.preloaded", self.threads)

    def measure(self, name: str, out: Path | None, workers: Nursery) -> list[Measurement]:
        """Run one benchmark, and write its result file where all of it was run."""
        from .harness import Options, Unavailable, record
        from .harness.noise import load_average, reasons
        from .harness.table import draw
        from .harness.worker import runner

        for reason in reasons(load_average(), None, None):
            console.print(f"[yellow]this machine is busy: {reason}; the rows will say so[/yellow]")
        if out is None and not self.quick and self.case == self.peer == "*":
            out = record.RESULTS / f"{name}.jsonl"
        shared = record.environment(name, quick=self.quick, seed=self.seed, command=self.command(name))
        measured: list[Measurement] = []
        with (
            record.Writer(out, shared) as writer, console.status(name) as status,
            tempfile.TemporaryDirectory(prefix="fxfreeze-bench-") as folder,
        ):  # fmt: skip
            options = Options(seed=self.seed, quick=self.quick, folder=Path(folder))
            running = runner(
                f"benchmarks.{name}", options, workers, seed=self.seed, rounds=self.rounds, quick=self.quick,
                peer=self.peer, say=lambda text: status.update(escape(text)),
            )  # fmt: skip
            try:
                for found in results(running, selected(name, options, self.case)):
                    writer.write(found)
                    if not self.quick:
                        writer.measure_rates(every=RATES)
                    draw([record.row(m, writer.shared) for m in found], console)
                    measured += found
            except Unavailable as error:  # from a case: its model cannot even be built
                raise fail(f"{name}: {error}") from error
        console.print(f"written to {out}" if out else "not written: all of a benchmark, or --out, is")
        return measured


def selected(name: str, options: Options, glob: str) -> Iterator[Case]:
    cases: Iterator[Case] = importlib.import_module(f"benchmarks.{name}").cases(options)
    return (case for case in cases if fnmatch.fnmatch(case.name, glob))


def results(running: Runner, cases: Iterable[Case]) -> Iterator[list[Measurement]]:
    """The measurements of every case. What peers left each other is removed when no more cases need it."""
    folder: Path | None = None
    for _, together in itertools.groupby(cases, key=lambda case: (case.together or case.name, case.folder)):
        group = list(together)
        if folder not in (None, group[0].folder):
            shutil.rmtree(folder, ignore_errors=True)
        folder = group[0].folder
        yield from running.run_together(group)


def bad(measurement: Measurement) -> bool:
    return measurement.status in ("wrong", "failed") or measurement.verdict in ("missed", "not measured")


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
