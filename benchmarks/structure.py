"""The regression gate: what compiled networks consist of, against what is stored. No clock is read.

    python -m benchmarks.structure                       # compare; exit status 1 where anything differs
    python -m benchmarks.structure --diff                # the stored file against what it would be
    python -m benchmarks.structure --update              # write it; read its diff before you commit it
    python -m benchmarks.structure --case "BERT*"        # some cases only, with any of these

``structure.toml`` has a table per case of ``structure_cases.py``; ``structure_counts.py`` says what the numbers are.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

FILE = Path(__file__).with_suffix(".toml")
MADE_WITH = "made_with"
UPDATE = "python -m benchmarks.structure --update"

LABELS = {
    "stages": "operations after",
    "operators": "operations",
    "constants": "constants",
    "bytes": "bytes",
    "multiply_accumulates": "multiply-accumulates",
    "onnx_bytes": "bytes of the ONNX file",
    "onnx_initializers": "ONNX initializers",
    "onnx_nodes": "ONNX nodes",
    "runtime_nodes": "nodes in ONNX Runtime",
    "inductor_calls": "calls in Inductor's code",
}
"""Number → what a message calls it."""

_ONNX = ("torch", "onnx", "onnxscript")
DEPENDS: Mapping[str, tuple[str, ...]] = {
    "onnx_bytes": _ONNX, "onnx_initializers": _ONNX, "onnx_nodes": _ONNX,
    "runtime_nodes": (*_ONNX, "onnxruntime", "architecture"), "inductor_calls": ("torch", "architecture"),
}  # fmt: skip
"""Numbers that other software makes → what must be the same as when they were stored for a comparison to mean anything.
The others are ours, under any version."""

Counts = Mapping[str, Any]


# ---- what changed


@dataclass(frozen=True)
class Change:
    """A number that is not the stored one, in words; and by how much it grew, 0 where that has no meaning."""

    text: str
    growth: int = 0


def changes(stored: Counts, found: Counts, ignored: Mapping[str, str] | None = None) -> list[Change]:
    """Of one case: all that differs but for numbers `ignored`, and the hash only where nothing else says so."""
    told = []
    for key in dict.fromkeys((*found, *stored)):
        if key not in (ignored or {}) and key != "hash" and stored.get(key) != found.get(key):
            told.append(_change(key, stored.get(key), found.get(key)))
    if not told and stored.get("hash") != found.get("hash"):
        told.append(Change(f"the graph is another one with the same counts: other edges, shapes, dtypes or arguments "
                           f"(hash {stored.get('hash')} → {found.get('hash')})"))  # fmt: skip
    return told


def _change(key: str, old: Any, new: Any) -> Change:
    label = LABELS.get(key, key)
    if old is None or new is None:
        return Change(f"{label}: {'not stored yet' if old is None else 'stored, and not counted any more'}")
    if key == "stages":
        steps = [f"{stage} {old.get(stage, '–')} → {new.get(stage, '–')}" for stage in dict.fromkeys((*old, *new))
                 if old.get(stage) != new.get(stage)]  # fmt: skip
        return Change(f"{label} {', '.join(steps)}")
    if isinstance(old, int):
        return Change(f"{label} {old:,} → {new:,} ({new - old:+,})", new - old)
    more = {name: new.get(name, 0) - old.get(name, 0) for name in (*old, *new)}
    total, grown = sum(old.values()), sum(more.values())
    parts = ", ".join(f"{count:+d} {name}" for name, count in sorted(more.items()) if count)
    return Change(f"{label} {total} → {total + grown}: {parts}", grown)


def message(name: str, found: list[Change]) -> str:
    """What a test says of a case that changed; "" where nothing did."""
    if not found:
        return ""
    text = f"{name}: {'; '.join(change.text for change in found)}."
    growth = [change.growth for change in found]
    if min(growth) < 0 and max(growth) <= 0:
        return f"{text} That is less than stored, well done: `{UPDATE}` makes it the new mark."
    return f"{text} If that is meant, run `{UPDATE}`, and say why in the commit message."


def ignored(stored: Mapping[str, str], here: Mapping[str, str]) -> dict[str, str]:
    """Numbers that cannot be compared here → the reason."""
    found = {}
    for key, packages in DEPENDS.items():
        other = [f"{name} {stored.get(name)} → {here[name]}" for name in packages if stored.get(name) != here[name]]
        if other:
            found[key] = f"{LABELS[key]}: stored with other versions ({', '.join(other)})"
    return found


# ---- the file


def read(file: Path = FILE) -> dict[str, Any]:
    return tomllib.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def written(tables: Mapping[str, Counts]) -> str:
    """TOML with a line per number, so that a diff reads well."""
    head = f"# Written by `{UPDATE}`; see benchmarks/README.md.\n"
    return head + "".join(f"\n[{_key(name)}]\n{''.join(_lines(table))}" for name, table in tables.items())


def _lines(table: Counts) -> Iterator[str]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            value = f"{{ {', '.join(f'{_key(name)} = {count}' for name, count in value.items())} }}"
        else:
            value = json.dumps(value, ensure_ascii=False)
        yield f"{key} = {value}\n"


def _key(name: str) -> str:
    return name if re.fullmatch(r"[\w-]+", name, re.ASCII) else json.dumps(name, ensure_ascii=False)


def updated(
    stored: Mapping[str, Counts], found: Mapping[str, Counts], known: list[str], here: Counts
) -> dict[str, Any]:
    """The file's tables with those that were counted, in the order of `known`; cases that are no more are left out.

    Raises:
        ValueError: some are left as they were, and were counted with other versions.
    """
    kept = [name for name in known if name in stored and name not in found]
    if kept and stored[MADE_WITH] != here:
        raise ValueError("other cases were counted with other versions: update all, without --case")
    return {MADE_WITH: here, **{name: {**stored, **found}[name] for name in known if name in stored or name in found}}


# ---- the command


def main(
    case: Annotated[str, typer.Option(help="a glob over the names of cases")] = "*",
    update: Annotated[bool, typer.Option("--update", help="store what is counted")] = False,
    diff: Annotated[bool, typer.Option("--diff", help="show what an update would change in the file")] = False,
) -> None:
    """Count what compiled networks consist of, and compare it with benchmarks/structure.toml."""
    from . import structure_cases, structure_counts

    stored, here = read(), structure_counts.versions()
    names = [name for name in structure_cases.ALL if fnmatch.fnmatchcase(name, case)]
    if not names:
        raise typer.BadParameter(f"no case matches {case!r}; there are {', '.join(structure_cases.ALL)}")
    found = {name: structure_counts.counted(structure_cases.ALL[name]) for name in names}
    if update or diff:
        try:
            text = written(updated(stored, found, list(structure_cases.ALL), here))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    if diff:
        before = FILE.read_text(encoding="utf-8") if FILE.exists() else ""
        sys.stdout.writelines(difflib.unified_diff(before.splitlines(True), text.splitlines(True), "stored", "counted"))
    if update:
        FILE.write_text(text, encoding="utf-8")
    if not update and not diff:
        raise typer.Exit(_told(stored, found, here))


def _told(stored: Mapping[str, Counts], found: Mapping[str, Counts], here: Mapping[str, str]) -> int:
    left_out = ignored(stored.get(MADE_WITH, {}), here)
    for reason in left_out.values():
        typer.echo(f"not compared: {reason}")
    told = [text for name, counts in found.items()
            if (text := message(name, changes(stored.get(name, {}), counts, left_out)))]  # fmt: skip
    typer.echo("\n".join(told) or f"{len(found)} cases are as stored")
    return 1 if told else 0


if __name__ == "__main__":
    typer.run(main)
