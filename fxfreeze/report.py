"""A manifest as tables for a terminal, and the same as one self-contained HTML page."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

Manifest = Mapping[str, Any]
_OUTCOME_STYLES = {"refused": "red", "skipped": "yellow", "rewritten": "green", "measured": "cyan"}


def summary(manifest: Manifest, *, full: bool = False) -> RenderableType:
    """What was built and how that is known, as tables.

    Args:
        full: every pass and every parity row, instead of passes that did something and each target's worst row.
    """
    rows = manifest["passes"] if full else [row for row in manifest["passes"] if row["rewrites"]]
    parity = manifest["parity"] if full else worst_rows(manifest["parity"])
    parts = [passes_table(rows), ledger_table(manifest["ledger"])]
    parts += [sensitivity_table(manifest["sensitivity"])] if manifest.get("sensitivity") else []
    parts += [parity_table(parity)] if parity else []
    parts += [scores_table(manifest["scores"])] if manifest.get("scores") else []
    return Group(*parts, sizes_table(manifest["sizes"], manifest.get("dense") or {}))


def worst_rows(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Per target the row that comes closest to its bound; a row that failed before all others."""
    worst: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if row["target"] not in worst or _badness(row) > _badness(worst[row["target"]]):
            worst[row["target"]] = row
    return list(worst.values())


def _badness(row: Mapping[str, Any]) -> tuple[bool, float]:
    # JSON has no infinity: an infinite error was stored as null.
    error = float("inf") if row["error"] is None else row["error"]
    return not row["ok"], error / (row["tolerance"] or 1e-300)


def passes_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Which pass made how many rewrites, what it cost, and the float64 error of its proof."""
    columns = ["pass", "stage", "exact", "rewrites", "operators", "ms", "float64 error"]
    table = _table("passes", columns, right=(3, 4, 5, 6))
    for row in rows:
        operators = f"{row['operators_before']} → {row['operators_after']}"
        table.add_row(
            row["name"], row["stage"], "yes" if row["exact"] else "measured", str(row["rewrites"]), operators,
            f"{1000 * row['seconds']:.1f}", _number(row["error"]), style=None if row["rewrites"] else "dim",
        )  # fmt: skip
    return table


def ledger_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What was asked for at every site, and what became of it in the end."""
    table = _table("ledger", ["site", "asked for", "outcome", "what executes"])
    for row in {(row["site"], row["step"], row["requested"]): row for row in rows}.values():
        asked = f"{row['step']}: {row['requested']}" if row["step"] else row["requested"]
        outcome = Text(row["outcome"], style=_OUTCOME_STYLES.get(row["outcome"], ""))
        executes = "; ".join(filter(None, (row["executes"], row["detail"])))
        table.add_row(row["site"], asked, outcome, executes)
    if not rows:
        table.add_row("–", "nothing", "", "")
    return table


def sensitivity_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """What quantizing each layer alone does to its result and to the outputs."""
    columns = ["site", "tried", "own dB", "outputs dB", "same", "lost", "saves", "became"]
    table = _table("sensitivity: SNR of results and outputs, predictions that stay, score", columns, right=range(2, 7))
    for row in rows:
        decibels = ["∞" if row[key] is None else f"{row[key]:.1f}" for key in ("snr", "output_snr")]
        stays = "–" if row["stays"] is None else f"{row['stays']:.2%}"
        drop = "–" if row["drop"] is None else f"{row['drop']:.4g}"
        table.add_row(row["site"], row["scheme"], *decibels, stays, drop, f"{row['gain']:.1%}", row["chosen"])
    return table


def parity_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Every target against the frozen model in float64, with the eager model's own error beside it."""
    columns = ["target", "sizes", "output", "error", "eager", "bound", "undecided", "repeats", "inputs", "ok"]
    table = _table("parity with the frozen model in float64", columns, right=(3, 4, 5, 6))
    for row in rows:
        sizes = ", ".join(f"{name}={size}" for name, size in row["sizes"].items()) or "fixed"
        table.add_row(
            row["target"], sizes, row["output"],
            _number(row["error"]), _number(row["eager_error"]), _number(row["tolerance"]),
            f"{row['undecided']:.2%}" if row.get("undecided") else "–",
            "same" if row["repeats_equal"] else "differ", "same" if row["inputs_unchanged"] else "CHANGED",
            Text("yes", style="green") if row["ok"] else Text("NO", style="bold red"),
        )  # fmt: skip
    return table


def scores_table(scores: Mapping[str, float]) -> Table:
    """What `evaluate` said of the frozen model and of every target."""
    table = _table("scores", ["", "score"], right=(1,))
    for name, score in scores.items():
        table.add_row(name, f"{score:.6g}")
    return table


def sizes_table(sizes: Mapping[str, int], dense: Mapping[str, int]) -> Table:
    """Bytes of every file, and of those that leave out zeros what they would take with them."""
    table = _table("sizes", ["file", "size", *["with its zeros"] * bool(dense)], right=(1, 2))
    for name, size in sizes.items():
        table.add_row(name, _bytes(size), *[_bytes(dense[name]) if name in dense else "–"] * bool(dense))
    return table


def _bytes(size: int) -> str:
    return f"{size / 1024:,.1f} KiB" if size < 1 << 20 else f"{size / (1 << 20):,.1f} MiB"


def as_text(renderable: RenderableType, *, width: int = 140) -> str:
    """`renderable` as plain text."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def as_html(manifest: Manifest, *, width: int = 160) -> str:
    """One page that needs nothing else."""
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(summary(manifest, full=True))
    return console.export_html()


def _number(value: float | None) -> str:
    return "–" if value is None else "0" if value == 0 else f"{value:.1e}"


def _table(title: str, columns: Sequence[str], right: Sequence[int] = ()) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", header_style="bold", pad_edge=False, box=SIMPLE_HEAD
    )
    for position, column in enumerate(columns):
        table.add_column(
            column, justify="right" if position in right else "left", overflow="fold", no_wrap=position in right
        )
    return table
