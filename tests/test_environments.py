"""Environments of peers: made once, of what the file says, and gone when they cannot be made. No network is asked."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
# Only for this import: on sys.path for good, the root would offer its folder `kernels` to every package.
sys.path.insert(0, str(ROOT))
try:
    from benchmarks import environments, peers
    from benchmarks.harness import Unavailable
finally:
    sys.path.remove(str(ROOT))

Declare = Callable[..., None]


@pytest.fixture
def wheel(tmp_path: Path) -> Callable[..., Path]:
    """A package `borrowed` of a version, and of what it requires."""

    def make(version: str = "1.0", requires: str = "") -> Path:
        path = tmp_path / f"borrowed-{version}-py3-none-any.whl"
        info = f"borrowed-{version}.dist-info"
        needs = f"Requires-Dist: {requires}\n" if requires else ""
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("borrowed.py", f"import numpy\nVERSION = {version!r}\n")
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: borrowed\nVersion: {version}\n{needs}")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        return path

    return make


@pytest.fixture
def declare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Declare:
    """Write the file of environments; what is made of it lies in a folder of the test."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(environments, "FOLDER", tmp_path / "made")
    file = tmp_path / "environments.toml"
    monkeypatch.setattr(environments, "FILE", file)
    read = environments.environments
    monkeypatch.setattr(environments, "environments", lambda: read(file))

    def write(*requirements: str | Path, shares: tuple[str, ...] = ("numpy",), name: str = "test") -> None:
        listed = [list(map(str, requirements)), list(shares)]
        file.write_text(
            f"[{name}]\nrequirements = {json.dumps(listed[0])}\nshares = {json.dumps(listed[1])}\nwhy = ''\n"
        )

    return write


def says(python: Path, code: str) -> str:
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def made() -> list[str]:
    return sorted(path.name for path in environments.FOLDER.glob("*"))


# ---- making


def test_it_has_its_own_packages_and_those_below(declare: Declare, wheel: Callable[..., Path]) -> None:
    declare(wheel())
    python = environments.interpreter("test")
    assert python.is_relative_to(environments.FOLDER / "test")
    assert (
        says(python, "import borrowed; print(borrowed.VERSION, borrowed.numpy.__version__)") == f"1.0 {np.__version__}"
    )
    with pytest.raises(ModuleNotFoundError):
        __import__("borrowed")  # nothing came into this one


def test_it_is_made_once_and_again_when_its_requirements_change(
    declare: Declare, wheel: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    install = environments._install
    monkeypatch.setattr(environments, "_install", lambda python, *rest: (calls.append(rest[0]), install(python, *rest)))
    declare(wheel())
    python = environments.interpreter("test")
    assert environments.interpreter("test") == python and len(calls) == 1
    declare(wheel("2.0"))
    assert says(environments.interpreter("test"), "import borrowed; print(borrowed.VERSION)") == "2.0"
    assert len(calls) == 2 and made() == ["test"]


def test_a_package_that_fights_lies_in_front(declare: Declare, wheel: Callable[..., Path], tmp_path: Path) -> None:
    below = tmp_path / "site-packages"
    below.mkdir()
    (below / "borrowed.py").write_text("VERSION = 'below'")
    declare(wheel())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(below)])
        python = environments.interpreter("test")
    code = "import borrowed, sys; print(borrowed.VERSION, [p for p in sys.path if p.endswith('site-packages')][-1])"
    assert says(python, code) == f"1.0 {below}"


def test_one_that_was_killed_while_it_was_made_is_made_anew(declare: Declare, wheel: Callable[..., Path]) -> None:
    declare(wheel())
    (environments.FOLDER / "test" / "bin").mkdir(parents=True)
    (environments.FOLDER / "test" / "bin" / "python").write_text("half of it")
    assert says(environments.interpreter("test"), "import borrowed") == ""


# ---- failing


def test_what_cannot_be_installed_is_unavailable_and_leaves_nothing(declare: Declare) -> None:
    declare("surely-not-there==1.0")
    with pytest.raises(Unavailable, match="cannot be installed: No matching distribution found for surely-not-there"):
        environments.interpreter("test")
    assert made() == []


def test_another_version_of_what_is_shared_is_refused(declare: Declare, wheel: Callable[..., Path]) -> None:
    declare(wheel(requires="numpy<1"))
    with pytest.raises(Unavailable, match=r"(?i)cannot install|no matching distribution") as caught:
        environments.interpreter("test")
    assert "http" not in str(caught.value) and made() == []


def test_a_shared_package_must_be_there(declare: Declare, wheel: Callable[..., Path]) -> None:
    declare(wheel(), shares=("surely-not-there",))
    with pytest.raises(Unavailable, match="shares surely-not-there, which is not installed"):
        environments.interpreter("test")


def test_pip_is_given_up_at_last(declare: Declare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "LIMIT", 0.01)
    declare("anything")
    with pytest.raises(Unavailable, match="pip took more than"):
        environments.interpreter("test")
    assert made() == []


def test_an_unknown_name_is_told(declare: Declare) -> None:
    declare()
    with pytest.raises(Unavailable, match="no environment 'other', only test"):
        environments.interpreter("other")


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("WARNING: x\nERROR: Could not find a\nERROR: No matching a for b\n", "No matching a for b"),
        ("ERROR: Cannot install a and b\nERROR: ResolutionImpossible: for help visit x", "Cannot install a and b"),
        ("Traceback\nOSError: disk full", "OSError: disk full"),
        ("", "pip said nothing"),
    ],
)  # fmt: skip
def test_the_last_error_with_a_reason_counts(said: str, reason: str) -> None:
    assert environments.reason(said) == reason


# ---- the file, and what runs inside


def test_every_peer_has_an_environment_and_every_environment_a_peer() -> None:
    files = {path.stem for path in (ROOT / "benchmarks" / "peers").glob("*.py")} - {"__init__"}
    found = environments.environments()
    assert found.keys() == files
    for entry in found.values():
        assert entry.keys() == {"requirements", "shares", "why"}
        assert {"torch", "onnxruntime"} <= set(entry["shares"])


def test_a_peer_runs_in_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arrays arrive as they were; the file is the one that was asked for."""
    root = tmp_path / "root"
    folder = root / "benchmarks" / "peers"
    folder.mkdir(parents=True)
    (root / "benchmarks" / "__init__.py").touch()
    (folder / "__init__.py").write_text((ROOT / "benchmarks" / "peers" / "__init__.py").read_text())
    (folder / "fake.py").write_text(
        "from . import arguments\nfile, batches, out = arguments()\nassert file.name == 'in.onnx'\n"
        "out.write_text(repr([{k: v.tolist() for k, v in b.items()} for b in batches]))\n"
    )
    (folder / "broken.py").write_text("raise ValueError('no such operator')")
    monkeypatch.setattr(peers, "ROOT", root)
    monkeypatch.setattr(environments, "interpreter", lambda name: Path(sys.executable))
    batches = [{"a b": np.arange(2), "c": np.ones((1, 1))} for _ in range(11)]
    out = peers.quantized("fake", tmp_path / "in.onnx", batches, tmp_path / "out.onnx")
    assert out.read_text() == repr([{"a b": [0, 1], "c": [[1.0]]}] * 11)
    with pytest.raises(RuntimeError, match="broken: ValueError: no such operator"):
        peers.quantized("broken", tmp_path / "in.onnx", batches, tmp_path / "out.onnx")


def test_the_command_lists_and_removes(declare: Declare, wheel: Callable[..., Path]) -> None:
    from typer.testing import CliRunner

    run = CliRunner().invoke
    declare(wheel())
    assert "test (not made)" in run(environments.app, ["list"]).output
    done = run(environments.app, ["make", "test"])
    assert done.exit_code == 0 and Path(done.output.strip()).is_file()
    assert "test (made)" in run(environments.app, ["list"]).output
    assert run(environments.app, ["remove", "test"]).exit_code == 0 and made() == []
    declare("surely-not-there")
    assert run(environments.app, ["make", "test"]).exit_code == 1
