"""Who may import whom: the rooms of the house as a table, checked against every import statement.

A new file is a new row (or falls under a row of its folder). If an edge is missing, think about the direction first:
data flows from plan and program towards artifact, and imports point the other way.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).resolve().parents[1]

FOLDERS = {
    "fxfreeze": "fxfreeze",
    "passes": "fxfreeze.passes",
    "kernels": "fxfreeze.kernels",
    "benchmarks/harness": "fxfreeze.bench",
    "benchmarks": "benchmarks",
}
"""Folders that hold code, and the names they are imported by. The harness has two."""

# A room is a file `fxfreeze/<room>.py` or a folder `fxfreeze/<room>/`. Apart from these there are
#   door           fxfreeze/__init__.py, that is `import fxfreeze`
#   passes         passes/__init__.py and the __init__.py of each stage
#   pass           passes/<stage>/<name>.py
#   pass-helper    passes/**/_<name>.py: shared by the passes of its folder and below
#   kernels        kernels/__init__.py
#   kernel         kernels/<name>.py
#   kernel-helper  kernels/_<name>.py
#   benchmarks     everything there
# Every room may import errors.
TABLE: dict[str, str] = {
    "door": "*",
    "_version": "",
    "errors": "",
    "cpu": "",
    "record": "",
    "constants": "",
    "checkpoints": "",
    "adapterhub": "checkpoints",
    "plan": "adapterhub checkpoints record",
    "program": "constants plan",
    "binding": "program",
    "report": "",  # renders the plain data of a manifest, and so knows nobody
    "weights": "checkpoints plan program",
    "masks": "record weights",
    "functional": "program",
    "dataflow": "program",
    "axes": "",
    "coupling": "axes dataflow program",
    "sampling": "plan program",
    "zeros": "",
    "memory": "",
    "serialize": "constants kernels program sampling zeros",
    "exporting": "program",
    "rotations": "",
    "wrapped": "rotations",
    "foreign": "kernels wrapped",
    "capture": "binding constants exporting foreign functional margin plan program proof sampling wrapped",
    "graft": "capture plan program proof sampling",
    "sensitivity": "",
    "calibration": "binding capture plan program sampling",
    "rewrite": "calibration plan program sensitivity",
    "inline": "program",
    "proof": "constants memory program sampling",
    "pipeline": "constants dataflow passes plan program proof rewrite sampling",
    "inductor": "dataflow inline kernels packed program",
    "postops": "inductor kernels program",
    "integers": "cpu exporting inductor kernels postops program",
    "packed": "inline kernels program",
    "launched": "inline kernels packed program",
    "winograd": "dataflow inline kernels program",
    "lower": "exporting integers kernels launched packed program sampling winograd",
    "emit": "binding exporting integers kernels launched lower memory packed program sampling serialize winograd",
    "margin": "constants kernels lower program proof",
    "banks": "plan program serialize",
    "parity": "binding constants emit margin memory plan program proof report sampling",
    "firing": "kernels program",
    "locks": "",
    "factory": "plan",
    "artifact": "banks binding cpu emit firing integers locks lower packed parity plan program report sampling "
    "sensitivity serialize weights _version",
    "adapt": "binding calibration capture margin passes pipeline plan program proof rewrite weights",
    "merging": "pass rewrite",
    "tickets_masks": "record",
    "tickets_run": "masks tickets_masks",
    "tickets_store": "masks plan tickets_masks tickets_run weights",
    "tickets_cluster": "tickets_run",
    "tickets_plot": "",
    "diagnose": "tickets_masks tickets_run",
    "tickets": "locks plan tickets_cluster tickets_masks tickets_plot tickets_run tickets_store",
    "nn": "kernels",
    "api": "adapt artifact binding calibration capture emit lower parity passes pipeline plan program proof report "
    "rewrite sampling sensitivity serialize",
    "bench": "adapt artifact binding calibration capture cpu exporting factory plan proof sampling",
    "demo": "door adapt api artifact plan report",
    "cli": "door adapt api artifact bench demo factory passes plan report rewrite _version",
    "__main__": "cli",
    "passes": "pass rewrite",
    "pass": "axes checkpoints constants coupling dataflow graft inline kernels masks nn packed pass-helper plan "
    "program rewrite rotations weights",
    "pass-helper": "adapterhub axes checkpoints constants coupling cpu dataflow graft inline kernels masks memory nn "
    "plan program rewrite rotations sensitivity weights",
    "kernels": "",
    "kernel": "kernel-helper",
    "kernel-helper": "",
    "benchmarks": "adapt artifact binding calibration capture coupling cpu door emit exporting factory kernel lower "
    "nn pass passes plan proof sampling serialize",
}

GROUPS = {"kernels": {"kernels", "kernel", "kernel-helper"}}
"""Names in the table's right column that stand for several rooms."""

FOLDER_ROOMS = {"bench", "emit", "nn", "benchmarks", "passes", "pass-helper", "kernel-helper"}
"""Rooms of several files that may import each other (without a cycle). Passes and kernels may not."""

TORCHLESS = {"adapterhub", "checkpoints", "errors", "record", "plan", "_version"}
"""Rooms that a build script or an editor can use without waiting for torch."""


# ---- the checker


@dataclass(frozen=True)
class Module:
    name: str
    file: Path
    room: str


@dataclass(frozen=True)
class Import:
    source: Module
    line: int
    target: str
    """Full name of what is imported: a module, or a name in one."""


def modules(root: Path) -> dict[str, Module]:
    """Every module of the house by the name it is imported by."""
    found: dict[str, Module] = {}
    for folder, prefix in FOLDERS.items():
        for file in sorted((root / folder).rglob("*.py")):
            parts = file.relative_to(root / folder).with_suffix("").parts
            package = parts[-1] == "__init__"
            name = ".".join((prefix, *(parts[:-1] if package else parts)))
            found[name] = Module(name, file, room(name, package))
    return found


def room(name: str, package: bool) -> str:
    top, *rest = name.split(".")
    if top == "benchmarks":
        return "benchmarks"
    if not rest:
        return "door"
    if rest[0] in ("passes", "kernels"):
        kind = {"passes": "pass", "kernels": "kernel"}[rest[0]]
        return rest[0] if package else f"{kind}-helper" if rest[-1].startswith("_") else kind
    return rest[0]


def imports(module: Module, known: dict[str, Module]) -> Iterator[Import]:
    """Every import statement, wherever it stands in the file."""
    package = module.name if module.file.name == "__init__.py" else module.name.rpartition(".")[0]
    for node in ast.walk(ast.parse(module.file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (Import(module, node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield Import(module, node.lineno, inner if inner in known else base)


def home(target: str, known: dict[str, Module]) -> Module | None:
    """The module of the house that a full name belongs to."""
    while target and target not in known:
        target = target.rpartition(".")[0]
    return known.get(target)


def violations(root: Path) -> list[str]:
    """`file:line: what is wrong`, for every import that the table does not allow, and every file without a row."""
    known = modules(root)
    wrong = [f"{_place(m, root)}: no row for room {m.room!r}" for m in known.values() if m.room not in TABLE]
    for module in known.values():
        for item in imports(module, known):
            problem = _problem(item, known)
            if problem:
                wrong.append(f"{_place(module, root)}:{item.line}: {problem}")
    return wrong


def _place(module: Module, root: Path) -> str:
    return module.file.relative_to(root).as_posix()


def _problem(item: Import, known: dict[str, Module]) -> str | None:
    source, top = item.source, item.target.partition(".")[0]
    if top in ("passes", "kernels", "tests") or (top == "benchmarks" and source.room != "benchmarks"):
        return f"{item.target} is not importable once installed"
    if top == "torch" and source.room in TORCHLESS:
        return f"{source.room} must not import torch"
    target = home(item.target, known)
    if target is None or source.room not in TABLE:
        return None
    allowed = {name for word in TABLE[source.room].split() for name in GROUPS.get(word, {word})} | {"errors"}
    if source.room in FOLDER_ROOMS:
        allowed.add(source.room)
    if target.room not in allowed and "*" not in allowed:
        return f"{source.room} may not import {target.room} ({target.name})"
    if target.room == "pass-helper" and not source.name.startswith(target.name.rpartition(".")[0] + "."):
        return f"{target.name} belongs to another stage"
    return None


def cycles(root: Path) -> list[list[str]]:
    """Modules that import each other in a ring; imports inside functions count."""
    known = modules(root)
    graph = networkx.DiGraph()
    for module in known.values():
        targets = (home(item.target, known) for item in imports(module, known))
        graph.add_edges_from((module.name, target.name) for target in targets if target and target != module)
    return sorted(sorted(ring) for ring in networkx.strongly_connected_components(graph) if len(ring) > 1)


def strays(root: Path) -> list[str]:
    """Files whose very names break something."""
    found = [f for folder in FOLDERS for f in (root / folder).rglob("compile.py")]  # would shadow fxfreeze.compile
    found += [root / "conftest.py"] * (root / "conftest.py").exists()  # would put the root on every test's path
    return sorted(file.relative_to(root).as_posix() for file in found)


# ---- the house


def test_every_import_is_in_the_table() -> None:
    found = violations(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_no_cycles() -> None:
    assert cycles(ROOT) == []


def test_no_stray_files() -> None:
    assert strays(ROOT) == []


def test_the_table_is_closed_and_has_an_order() -> None:
    rows = {
        name: {room for word in row.split() for room in GROUPS.get(word, {word})} - {name, "*"}
        for name, row in TABLE.items()
    }
    rows["door"] = {"api", "adapt", "artifact", "diagnose", "plan", "tickets", "errors", "_version"}
    # The door is imported by the rooms that show it to users; these must not be behind it.
    for name in ("demo", "cli", "benchmarks"):
        assert name not in rows["door"]
    unknown = {room for row in rows.values() for room in row} - TABLE.keys()
    assert not unknown, unknown
    graph = networkx.DiGraph([(name, room) for name, row in rows.items() for room in row])
    rings = [sorted(ring) for ring in networkx.strongly_connected_components(graph) if len(ring) > 1]
    assert not rings, f"rooms that may import each other in a ring: {rings}"


# ---- the checker, on a small house with one thing wrong at a time

GOOD = {
    "fxfreeze/__init__.py": "from ._version import __version__\nfrom .api import compile\n",
    "fxfreeze/_version.py": "__version__ = '1'\n",
    "fxfreeze/errors.py": "",
    "fxfreeze/record.py": "from fxfreeze.errors import E\n",
    "fxfreeze/plan.py": "from .record import R\nfrom . import errors\n",
    "fxfreeze/program.py": "import torch\nfrom . import plan\n",
    "fxfreeze/rewrite.py": "from .program import P\n",
    "fxfreeze/pipeline.py": "def run():\n    from .passes import PIPELINE\n",
    "fxfreeze/lower.py": "import fxfreeze.kernels.gate\n",
    "fxfreeze/api.py": "from .pipeline import run\nfrom .rewrite import W\n",
    "fxfreeze/emit/__init__.py": "from .onnx import emit\n",
    "fxfreeze/emit/onnx.py": "from ..lower import lower\n",
    "passes/__init__.py": "from .fold.lora import F\nfrom .fold import norm\nfrom fxfreeze.rewrite import Pass\n",
    "passes/_shared.py": "from fxfreeze.program import P\n",
    "passes/fold/__init__.py": "",
    "passes/fold/lora.py": "from fxfreeze.rewrite import W\nfrom .._shared import s\nfrom ._own import o\n",
    "passes/fold/_own.py": "import math\n",
    "passes/fold/norm.py": "import numpy, fxfreeze.program\nfrom fxfreeze.kernels import gate\n",
    "kernels/__init__.py": "",
    "kernels/_op.py": "import torch\n",
    "kernels/gate.py": "from ._op import op\n",
    "benchmarks/__main__.py": "import fxfreeze as fz\nfrom .harness import h\n",
    "benchmarks/harness.py": "from fxfreeze.errors import E\n",
}


def build(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_the_good_house(tmp_path: Path) -> None:
    build(tmp_path, GOOD)
    assert (violations(tmp_path), cycles(tmp_path), strays(tmp_path)) == ([], [], [])


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("fxfreeze/plan.py", "\nfrom .program import P\n", "2: plan may not import program (fxfreeze.program)"),
        ("fxfreeze/plan.py", "from fxfreeze import program\n", "1: plan may not import program (fxfreeze.program)"),
        ("fxfreeze/plan.py", "import fxfreeze.program as p\n", "1: plan may not import program (fxfreeze.program)"),
        ("fxfreeze/plan.py", "def f():\n    from . import program\n",
         "2: plan may not import program (fxfreeze.program)"),
        ("fxfreeze/plan.py", "import torch.nn\n", "1: plan must not import torch"),
        ("fxfreeze/program.py", "import fxfreeze\n", "1: program may not import door (fxfreeze)"),
        ("fxfreeze/program.py", "from . import __version__\n", "1: program may not import door (fxfreeze)"),
        ("fxfreeze/program.py", "from .passes.fold.lora import F\n",
         "1: program may not import pass (fxfreeze.passes.fold.lora)"),
        ("fxfreeze/emit/onnx.py", "from ..api import compile\n", "1: emit may not import api (fxfreeze.api)"),
        ("fxfreeze/pipeline.py", "from .passes.fold import lora\n",
         "1: pipeline may not import pass (fxfreeze.passes.fold.lora)"),
        ("passes/fold/lora.py", "from .norm import n\n", "1: pass may not import pass (fxfreeze.passes.fold.norm)"),
        ("passes/fold/lora.py", "from . import norm\n", "1: pass may not import pass (fxfreeze.passes.fold.norm)"),
        ("passes/fold/lora.py", "import fxfreeze.passes.fold.norm\n",
         "1: pass may not import pass (fxfreeze.passes.fold.norm)"),
        ("passes/fold/lora.py", "from .. import PIPELINE\n", "1: pass may not import passes (fxfreeze.passes)"),
        ("passes/fold/lora.py", "from fxfreeze.pipeline import run\n",
         "1: pass may not import pipeline (fxfreeze.pipeline)"),
        ("passes/prune/one.py", "from ..fold._own import o\n", "1: fxfreeze.passes.fold._own belongs to another stage"),
        ("passes/fold/lora.py", "from passes.fold import norm\n", "1: passes.fold is not importable once installed"),
        ("fxfreeze/lower.py", "import kernels.gate\n", "1: kernels.gate is not importable once installed"),
        ("fxfreeze/lower.py", "from benchmarks import harness\n",
         "1: benchmarks.harness is not importable once installed"),
        ("kernels/gate.py", "from .other import o\n", "1: kernel may not import kernel (fxfreeze.kernels.other)"),
        ("kernels/gate.py", "from fxfreeze.program import P\n", "1: kernel may not import program (fxfreeze.program)"),
        ("kernels/_op.py", "from .gate import g\n", "1: kernel-helper may not import kernel (fxfreeze.kernels.gate)"),
        ("benchmarks/harness.py", "from fxfreeze.pipeline import run\n",
         "1: benchmarks may not import pipeline (fxfreeze.pipeline)"),
    ],
)  # fmt: skip
def test_a_seeded_violation(tmp_path: Path, file: str, text: str, problem: str) -> None:
    build(tmp_path, {**GOOD, "kernels/other.py": "", file: text})
    assert violations(tmp_path) == [f"{file}:{problem}"]


def test_a_file_without_a_row(tmp_path: Path) -> None:
    build(tmp_path, {**GOOD, "fxfreeze/attic.py": "from .api import compile\n"})
    assert violations(tmp_path) == ["fxfreeze/attic.py: no row for room 'attic'"]


@pytest.mark.parametrize(
    ("files", "ring"),
    [
        ({"fxfreeze/emit/a.py": "from .b import b\n", "fxfreeze/emit/b.py": "def f():\n    from . import a\n"},
         ["fxfreeze.emit.a", "fxfreeze.emit.b"]),
        ({"fxfreeze/errors.py": "from .record import R\n"}, ["fxfreeze.errors", "fxfreeze.record"]),
        ({"fxfreeze/errors.py": "import fxfreeze\n"}, None),
    ],
)  # fmt: skip
def test_a_seeded_cycle(tmp_path: Path, files: dict[str, str], ring: list[str] | None) -> None:
    build(tmp_path, {**GOOD, **files})
    found = cycles(tmp_path)
    assert found == [ring] if ring else len(found) == 1 and "fxfreeze" in found[0]


def test_seeded_strays(tmp_path: Path) -> None:
    build(tmp_path, {**GOOD, "fxfreeze/emit/compile.py": "", "conftest.py": "", "tests/emit/conftest.py": ""})
    assert strays(tmp_path) == ["conftest.py", "fxfreeze/emit/compile.py"]
