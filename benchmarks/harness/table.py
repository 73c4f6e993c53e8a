"""Rows as a table: Markdown for a file, the same cells for the terminal."""

from __future__ import annotations

from typing import Any

HEADINGS = ("case", "peer", "value", "ratio [95 %]", "limit", "error ≤ tolerance", "rounds", "remarks")
UNITS: dict[str, tuple[tuple[float, str], ...]] = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "B": ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B")),
}
SHARED = ("benchmark", "quick", "threads", "seed", "command", "time", "git", "machine", "versions")


def quantity(value: float, spread: float, unit: str) -> str:
    """`12.3 ms ± 0.1`: both numbers in the one unit that suits the value."""
    known = UNITS.get(unit, ((1.0, unit),))
    scale, name = next((pair for pair in known if abs(value) >= pair[0]), known[-1])
    return f"{value / scale:.4g} {name} ± {spread / scale:.3g}"


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """The row's cells, in the order of HEADINGS. The spread shown is the interquartile range."""
    value, ratio, error = row["value"], row["ratio"], row["error"]
    return (
        row["case"],
        row["peer"] + (" (baseline)" if row["peer"] == row["baseline"] else ""),
        quantity(value, row["spread"]["iqr"], row["unit"]) if value is not None else "–",
        ratio_cell(ratio) if ratio else "–",
        f"≤ {row['limit']:g} {row['verdict']}" if row["limit"] is not None else "",
        f"{error:.1e} ≤ {row['tolerance']:.0e}" if error is not None else "–",
        str(row["rounds"]),
        remarks(row),
    )


def remarks(row: dict[str, Any]) -> str:
    """Why there is no value, or why to doubt it."""
    if row["status"] != "ok":
        return f"{row['status']}: {row['reason']}"
    noisy = row["noise"]["noisy"]
    return f"noisy: {', '.join(noisy)}" if noisy else ""


def ratio_cell(ratio: dict[str, float | None]) -> str:
    interval = "" if ratio["low"] is None else f" [{ratio['low']:.3f}, {ratio['high']:.3f}]"
    return f"{ratio['value']:.3f}{interval}"


def heading(row: dict[str, Any]) -> str:
    """What the rows of one run share, as a line of text."""
    machine, git = row["machine"], row["git"]
    revision = f"{git['revision'][:12]}{' with changes' if git['dirty'] else ''}" if git else "no revision"
    versions = ", ".join(f"{name} {number}" for name, number in row["versions"].items() if number)
    parts = [
        f"{row['benchmark']}{' (quick)' if row['quick'] else ''}",
        row["time"],
        revision,
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB",
        machine["os"],
        *([machine["gpu"]] if machine["gpu"] else []),
        f"{row['threads']} threads",
        versions,
    ]
    return "; ".join(parts)


def markdown(rows: list[dict[str, Any]]) -> str:
    """One table for each run found in the rows, under a line that says where it was made."""
    lines: list[str] = []
    previous = None
    for row in rows:
        shared = {name: row[name] for name in SHARED}
        if shared != previous:
            lines += ["", heading(row), "", _line(HEADINGS), _line(["---"] * len(HEADINGS))]
            previous = shared
        lines.append(_line([cell.replace("|", "\\|") for cell in cells(row)]))
    return "\n".join(lines[1:]) + "\n" if lines else ""


def _line(items: tuple[str, ...] | list[str]) -> str:
    return "| " + " | ".join(items) + " |"
