"""Rows as a table: Markdown for a file, the same cells for the terminal. A column that says nothing is left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .case import Work
from .roofline import bound

if TYPE_CHECKING:
    from rich.console import Console

Row = dict[str, Any]
UNITS: dict[str, tuple[tuple[float, str], ...]] = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "B": ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B")),
    "J": ((1.0, "J"), (1e-3, "mJ"), (1e-6, "µJ")),
    "OP": ((1e9, "GOP"), (1e6, "MOP"), (1.0, "OP")),
}
SHARED = ("benchmark", "quick", "threads", "seed", "command", "time", "git", "machine", "rates", "versions")
NONE = "–"


def quantity(value: float, unit: str, spread: float | None = None) -> str:
    """`12.3 ms ± 0.1`: both numbers in the one unit that suits the value."""
    known = UNITS.get(unit, ((1.0, unit),))
    scale, name = next((pair for pair in known if abs(value) >= pair[0]), known[-1])
    return f"{value / scale:.4g} {name}" + ("" if spread is None else f" ± {spread / scale:.3g}")


def ratio_cell(ratio: dict[str, float | None]) -> str:
    """With its interval; a difference inside of it is none."""
    if ratio["low"] is None or ratio["high"] is None:
        return f"{ratio['value']:.3f}"
    tie = " tie" if ratio["low"] < 1 < ratio["high"] else ""
    return f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]{tie}"


def reached(row: Row) -> float | None:
    """The share of the roofline: the least time that the work takes on this machine, in times of what it took.

    None: the work or the rates are not known, or the sample is no latency.
    """
    if not row["work"] or row["metric"] != "latency" or not row["value"]:
        return None
    least = bound(Work(**row["work"]), row["rates"].get(row["device"], {}))
    return None if least is None else least / row["value"]


def _peer(row: Row) -> str:
    return row["peer"] + (" (baseline)" if row["peer"] == row["baseline"] else "")


def _value(row: Row) -> str:
    """The spread is the interquartile range."""
    return NONE if row["value"] is None else quantity(row["value"], row["unit"], row["spread"]["iqr"])


def _limit(row: Row) -> str:
    return "" if row["limit"] is None else f"≤ {row['limit']:g} {row['verdict']}"


def _error(row: Row) -> str:
    return NONE if row["error"] is None else f"{row['error']:.1e} ≤ {row['tolerance']:.0e}"


def _work(row: Row) -> str:
    work = row["work"]
    return f"{quantity(work['operations'], 'OP')}, {quantity(work['bytes'], 'B')}" if work else ""


def roofline_cell(row: Row) -> str:
    share = reached(row)
    return "" if share is None else f"{share:.1%}"


def remarks(row: Row) -> str:
    """Why there is no value, or why to doubt it."""
    if row["status"] != "ok":
        return f"{row['status']}: {row['reason']}"
    noisy = row["noise"]["noisy"]
    return f"noisy: {', '.join(noisy)}" if noisy else ""


COLUMNS: dict[str, Callable[[Row], str]] = {
    "case": lambda row: row["case"],
    "peer": _peer,
    "value": _value,
    "ratio [95 %]": lambda row: ratio_cell(row["ratio"]) if row["ratio"] else NONE,
    "limit": _limit,
    "error ≤ tolerance": _error,
    "peak memory": lambda row: "" if row["peak_memory"] is None else quantity(row["peak_memory"], "B"),
    "energy": lambda row: "" if row["energy"] is None else quantity(row["energy"], "J"),
    "work": _work,
    "of roofline": roofline_cell,
    "rounds": lambda row: str(row["rounds"]),
    "remarks": remarks,
}


def cells(rows: Sequence[Row], *but: str) -> tuple[list[str], list[list[str]]]:
    """Headings, and a line for each row; without the columns named and those in which no row has anything."""
    columns = {name: [cell(row) for row in rows] for name, cell in COLUMNS.items() if name not in but}
    columns = {name: found for name, found in columns.items() if any(found)}
    return list(columns), [list(line) for line in zip(*columns.values(), strict=True)]


def heading(row: Row) -> str:
    """What the rows of one run share, as a line of text."""
    machine, git = row["machine"], row["git"]
    revision = f"{git['revision'][:12]}{' with changes' if git['dirty'] else ''}" if git else "no revision"
    versions = ", ".join(f"{name} {number}" for name, number in row["versions"].items() if number)
    flags = f" ({' '.join(machine['flags'])})" if machine.get("flags") else ""
    parts = [
        f"{row['benchmark']}{' (quick)' if row['quick'] else ''}",
        row["time"],
        revision,
        f"{machine['cpu']}{flags}, {machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB",
        machine["os"],
        *([machine["gpu"]] if machine["gpu"] else []),
        f"{row['threads']} threads",
        *(_rates(device, known) for device, known in row["rates"].items()),
        versions,
    ]
    return "; ".join(parts)


def _rates(device: str, known: dict[str, float]) -> str:
    others = ", ".join(f"{name} {rate / 1e9:.0f} GOP/s" for name, rate in known.items() if name != "copy")
    return f"{device}: copy {known['copy'] / 1e9:.1f} GB/s, {others}"


def markdown(rows: Sequence[Row]) -> str:
    """One table for each run found in the rows, under a line that says where it was made."""
    runs: list[list[Row]] = []
    for row in rows:
        shared = {name: row[name] for name in SHARED}
        if not runs or shared != {name: runs[-1][0][name] for name in SHARED}:
            runs.append([])
        runs[-1].append(row)
    return "\n".join(f"{heading(run[0])}\n\n{grid(*cells(run))}" for run in runs)


def grid(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in [headings, ["---"] * len(headings), *escaped])


def draw(rows: Sequence[Row], console: Console) -> None:
    """A table for each case; the remarks stand below, where they have room."""
    for case in dict.fromkeys(row["case"] for row in rows):
        _draw_case([row for row in rows if row["case"] == case], console)


def _draw_case(rows: Sequence[Row], console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    headings, lines = cells(rows, "case", "remarks")
    drawn = Table(*headings, title=escape(rows[0]["case"]), title_justify="left", header_style="bold")
    for line in lines:
        drawn.add_row(*map(escape, line))
    console.print(drawn)
    for row in rows:
        if row["status"] != "ok":
            console.print(f"  {escape(row['peer'])}: [red]{escape(remarks(row))}[/red]", highlight=False)
    if noisy := rows[0]["noise"]["noisy"]:
        console.print(f"  [yellow]noisy: {escape(', '.join(noisy))}[/yellow]", highlight=False)
