"""Environments for peers whose packages are not to be installed beside fxfreeze's.

    python -m benchmarks.environments list
    python -m benchmarks.environments make NAME          # what interpreter(NAME) does at its first call
    python -m benchmarks.environments remove [NAME]

``environments.toml`` has the names. One is made in ``.venv-peers/<name>``, where it stays until what it is made of
changes: on top of the environment that runs, whose packages it sees, with its own in front of them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .harness import Unavailable
from .harness.record import ROOT

FILE = Path(__file__).with_suffix(".toml")
FOLDER = ROOT / ".venv-peers"
STAMP = "made-of.json"
LIMIT = 1200.0
"""Seconds that an installation may take."""


def environments(file: Path = FILE) -> dict[str, dict[str, Any]]:
    return tomllib.loads(file.read_text(encoding="utf-8"))


def interpreter(name: str) -> Path:
    """The Python of the environment `name`, which is made if it is not there, or is made of something else.

    Raises:
        Unavailable: it cannot be installed; with what pip said. Nothing is left behind then.
    """
    known = environments()
    if name not in known:
        raise Unavailable(f"there is no environment {name!r}, only {', '.join(known)}")
    made_of, folder = ingredients(known[name]), FOLDER / name
    stamp, python = folder / STAMP, folder / "bin" / "python"
    if not (stamp.is_file() and stamp.read_text(encoding="utf-8") == made_of):
        _make(folder, known[name]["requirements"], json.loads(made_of)["shares"])
        stamp.write_text(made_of, encoding="utf-8")
    return python


def ingredients(entry: dict[str, Any]) -> str:
    """All that an environment hangs on: what is asked for, and what it lies on."""
    shares = [f"{package}=={_version(package)}" for package in entry["shares"]]
    files = {place: _hash(place) for place in entry["requirements"] if Path(place).is_file()}
    return json.dumps({
        "requirements": entry["requirements"], "files": files, "shares": shares,
        "python": sys.version, "below": below(),
    }, indent=1)  # fmt: skip


def below() -> list[str]:
    """Folders of packages of the environment that runs."""
    return [place for place in sys.path if Path(place).name in ("site-packages", "dist-packages")]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise Unavailable(f"it shares {package}, which is not installed") from error


def _hash(place: str) -> str:
    return hashlib.sha256(Path(place).read_bytes()).hexdigest()


# ---- making one


def _make(folder: Path, requirements: Sequence[str], shares: Sequence[str]) -> None:
    """Where it was killed before, there is no stamp, and it is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        # pip stays where it is, and installs into the environment from there.
        venv.EnvBuilder(symlinks=os.name != "nt", with_pip=False).create(folder)
        python = folder / "bin" / "python"
        _packages(python).joinpath("below.pth").write_text("\n".join(below()) + "\n", encoding="utf-8")
        _install(python, requirements, shares)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _packages(python: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())


def _install(python: Path, requirements: Sequence[str], shares: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        constraints = Path(scratch) / "shares.txt"
        constraints.write_text("\n".join(shares) + "\n", encoding="utf-8")
        command = [
            sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check",
            "--retries", "1", "--constraint", str(constraints), *requirements,
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"pip took more than {LIMIT:.0f} s to install {', '.join(requirements)}") from error
    if done.returncode:
        raise Unavailable(f"{', '.join(requirements)} cannot be installed: {reason(done.stderr)}")


def reason(said: str) -> str:
    """Of what pip said, the last error that has a reason in it."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    telling = [line for line in errors if not line.startswith("ResolutionImpossible")]  # that one is a link to help
    return ([*lines, *errors, *telling] or ["pip said nothing"])[-1]


# ---- the command

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Environments for peers.")
Name = Annotated[str, typer.Argument(help="a name that `list` shows")]


@app.command("list")
def list_() -> None:
    """Name them, with what they are made of, and say which are there."""
    for name, entry in environments().items():
        there = "made" if (FOLDER / name / STAMP).is_file() else "not made"
        typer.echo(f"{name} ({there}): {', '.join(entry['requirements'])}; shares {', '.join(entry['shares'])}")
        typer.echo(f"    {entry['why']}")


@app.command()
def make(name: Name) -> None:
    """Install one, and print its interpreter."""
    try:
        typer.echo(interpreter(name))
    except Unavailable as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


@app.command()
def remove(name: Annotated[str | None, typer.Argument(help="default: all of them")] = None) -> None:
    """Delete one, or all."""
    if name is not None and name not in environments():
        raise typer.BadParameter(f"there is no environment {name!r}, only {', '.join(environments())}")
    shutil.rmtree(FOLDER if name is None else FOLDER / name, ignore_errors=True)


if __name__ == "__main__":
    app()
