"""RESULTS.md, made of the files in results/: the suite side by side first, losses before wins, then every table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .harness import record, stats, table

Row = dict[str, Any]
OURS = "fxfreeze"
SUITES = ("networks", "scale")
"""Benchmarks that are told side by side; a file of one for another kind of machine has that behind its name."""
FILE = record.ROOT / "benchmarks" / "RESULTS.md"
HEAD = """# Results

Made by `python -m benchmarks report` from the files in [results/](results); [README.md](README.md) says how they were
measured, and what the words mean. Each table stands under what made it: when, which revision, machine and versions.
"""


@dataclass(frozen=True)
class Duel:
    """The fastest target of ours in a case, and the fastest other peer: how often ours fits into its time."""

    case: str
    ours: Row
    peer: Row
    speed: stats.Ratio

    @property
    def verdict(self) -> str:
        """A difference inside the interval is none."""
        assert self.speed.low is not None and self.speed.high is not None
        return "loss" if self.speed.high < 1 else "win" if self.speed.low > 1 else "tie"


def duels(rows: Iterable[Row]) -> list[Duel]:
    """One for each case of latencies that both sides can do, the worst for us first."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        if row["status"] == "ok" and row["metric"] == "latency":
            cases.setdefault(row["case"], []).append(row)
    found = []
    for case, entries in cases.items():
        ours, others = ([row for row in entries if row["peer"].startswith(OURS) is side] for side in (True, False))
        if ours and others:
            mine, theirs = (min(side, key=lambda row: row["value"]) for side in (ours, others))
            ratio = stats.ratio(theirs["samples"], mine["samples"])
            if ratio.low is not None:
                found.append(Duel(case, mine, theirs, ratio))
    return sorted(found, key=lambda duel: (("loss", "tie", "win").index(duel.verdict), duel.speed.value))


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def side_by_side(rows: Sequence[Row]) -> str:
    """The duels of a suite as a table, a chart, and the peers that cannot."""
    found = duels(rows)
    if not found:
        return ""
    counts = {word: sum(duel.verdict == word for duel in found) for word in ("win", "tie", "loss")}
    speeds = [duel.speed.value for duel in found]
    lines = [
        [duel.case, _who(duel.ours).removeprefix(f"{OURS}, "), _who(duel.peer),
         table.ratio_cell(vars(duel.speed)).removesuffix(" tie"), duel.verdict, table.roofline_cell(duel.ours)]
        for duel in found
    ]  # fmt: skip
    told = ", ".join(
        f"{count} {word}{'' if count == 1 else 'es' if word == 'loss' else 's'}" for word, count in counts.items()
    )
    parts = [
        f"`{rows[0]['command']}`\n",
        f"{table.heading(rows[0])}\n",
        f"{len(found)} cases: {told}. Geometric mean of the best peer's time over ours: "
        f"**{geometric_mean(speeds):.2f}**.\n",
        table.grid(["case", "ours", "best peer", "its time / ours [95 %]", "", "of roofline"], lines),
        chart(found),
        absent(rows),
    ]
    return "\n".join(filter(None, parts))


def _who(row: Row) -> str:
    return f"{row['peer']}, {table.quantity(row['value'], row['unit'])}"


def chart(found: Sequence[Duel]) -> str:
    """In Mermaid, which GitHub draws."""
    names = ", ".join(json.dumps(duel.case, ensure_ascii=False) for duel in found)
    values = ", ".join(f"{duel.speed.value:.2f}" for duel in found)
    body = [
        "xychart-beta horizontal",
        '    title "best peer\'s time / ours"',
        f"    x-axis [{names}]",
        f"    bar [{values}]",
    ]
    return "```mermaid\n" + "\n".join(body) + "\n```\n"


def absent(rows: Iterable[Row]) -> str:
    """Peers without a time, each with its own error."""
    lines = [[row["case"], row["peer"], f"{row['status']}: {row['reason']}"] for row in rows if row["status"] != "ok"]
    return "Peers that cannot:\n\n" + table.grid(["case", "peer", "why"], lines) if lines else ""


def text(folder: Path = record.RESULTS) -> str:
    """All of RESULTS.md."""
    files = {path: _lines(path) for path in sorted(folder.glob("*.jsonl"))}
    tables = {path: record.read(path) for path, lines in files.items() if lines and "case" in lines[0]}
    suites = {path: rows for path, rows in tables.items() if duels(rows) and path.stem.split("_")[0] in SUITES}
    parts = [HEAD]
    parts += [f"## {path.stem}, side by side\n\n{side_by_side(rows)}" for path, rows in suites.items()]
    for path, lines in files.items():
        body = table.markdown(tables[path]) if path in tables else _other(lines)
        picture = f"![]({folder.name}/{path.stem}.svg)\n" if path.with_suffix(".svg").exists() else ""
        parts.append("\n".join(filter(None, [f"## {path.stem}\n", picture, body])))
    return "\n".join(parts)


def _lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _other(lines: Sequence[Row]) -> str:
    """A run that is no comparison of peers has fields of its own; what it asked, and whether that holds."""
    good = sum(bool(line.get("ok")) for line in lines)
    if len(lines) > 20:
        bad = ", ".join(line["name"] for line in lines if not line.get("ok"))
        return f"{good} of {len(lines)} ok" + (f"; not ok: {bad}" if bad else "") + ".\n"
    return table.grid(["run", "ok", "when", "command"], [
        [line["name"], "yes" if line.get("ok") else "no", line["time"], f"`{line['command']}`"] for line in lines
    ])  # fmt: skip
