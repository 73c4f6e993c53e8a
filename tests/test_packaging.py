"""The rooms of the repository install as one package, whichever way, and importing it does nothing."""

from __future__ import annotations

import email
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAPPING: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]
LISTED: list[str] = PROJECT["tool"]["setuptools"]["packages"]


def python(
    code: str,
    *,
    cwd: Path,
    path: Path | None = None,
    executable: str | os.PathLike[str] = sys.executable,
) -> str:
    """Run `code` in a fresh process in `cwd`, with `path` before everything else; its output."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    if path:
        environment["PYTHONPATH"] = str(path)
    command = [str(executable), "-c", textwrap.dedent(code)]
    return _run(command, cwd=cwd, environment=environment)


def _run(command: list[str], *, cwd: Path, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{command[:4]} failed\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def packages_in(root: Path) -> dict[str, Path]:
    """Every folder of `root` that holds Python files and installs, by the name it installs as."""
    found: dict[str, Path] = {}
    for name, folder in MAPPING.items():
        for file in sorted((root / folder).rglob("*.py")):
            below = file.parent.relative_to(root / folder).parts
            found[".".join((name, *below))] = file.parent
    return found


IMPORT_ALL = f"""
    import importlib, os, sys
    for name in {sorted(LISTED)!r}:
        importlib.import_module(name)
    import fxfreeze, fxfreeze.passes, fxfreeze.kernels
    for module in (fxfreeze, fxfreeze.passes, fxfreeze.kernels):
        print(os.path.dirname(os.path.realpath(module.__file__)))
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what goes into an archive, so that building leaves nothing in the repository."""
    copy = tmp_path_factory.mktemp("tree")
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy / file)
    for folder in sorted({Path(folder).parts[0] for folder in MAPPING.values()}):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "tests").mkdir()
    (copy / "tests" / "test_nothing.py").touch()
    return copy


@pytest.fixture(scope="module")
def archives(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel built from it."""
    out = tmp_path_factory.mktemp("dist")
    _run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)], cwd=out)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


# ---- the list


def test_every_folder_is_listed() -> None:
    assert sorted(LISTED) == sorted(packages_in(ROOT)), "[tool.setuptools] packages in pyproject.toml is out of date"


def test_every_package_has_an_init() -> None:
    missing = [str(folder) for folder in packages_in(ROOT).values() if not (folder / "__init__.py").exists()]
    assert not missing


def test_a_forgotten_folder_is_noticed(tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree, tmp_path / "tree")
    (tmp_path / "tree" / "passes" / "forgotten").mkdir()
    (tmp_path / "tree" / "passes" / "forgotten" / "one.py").touch()
    assert set(packages_in(tmp_path / "tree")) - set(LISTED) == {"fxfreeze.passes.forgotten"}


def test_triton_is_unpinned_and_linux_only() -> None:
    """torch's CUDA wheels pin their triton; a version of ours could only disagree with that."""
    (triton,) = [line for line in PROJECT["project"]["dependencies"] if line.startswith("triton")]
    assert triton.replace('"', "'") == "triton; platform_system == 'Linux'"


# ---- archives


def test_wheel_holds_one_top_level_name(tree: Path, archives: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(archives[1]) as wheel:
        names = wheel.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fxfreeze"}
    assert {"fxfreeze/py.typed", "fxfreeze/kernels/tversky_frozen.cpp"} <= set(names)
    for package, folder in packages_in(tree).items():
        for file in folder.glob("*.py"):
            assert f"{package.replace('.', '/')}/{file.name}" in names


def test_wheel_metadata(archives: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(archives[1]) as wheel:
        (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
        metadata = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
        licence = wheel.read(f"{info}/licenses/LICENSE").decode()
        points = wheel.read(f"{info}/entry_points.txt").decode()
    version: dict[str, str] = {}
    exec((ROOT / "fxfreeze" / "_version.py").read_text(encoding="utf-8"), version)
    assert metadata["Version"] == version["__version__"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence
    assert set(metadata.get_all("Provides-Extra", [])) == {
        "onnx",
        "demo",
        "int8",
        "search",
        "test",
        "dev",
        "bench",
        "all",
    }
    assert "fxfreeze = fxfreeze.cli:main" in points


def test_sdist_holds_the_sources(tree: Path, archives: tuple[Path, Path]) -> None:
    with tarfile.open(archives[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    sources = [file.relative_to(tree).as_posix() for f in packages_in(tree).values() for file in f.glob("*.py")]
    sources += [file.relative_to(tree).as_posix() for file in (tree / "kernels").glob("*.cpp")]
    assert {"pyproject.toml", "README.md", "LICENSE", "fxfreeze/py.typed", *sources} <= names


def test_installed_wheel_imports_from_anywhere(archives: tuple[Path, Path], tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
    ]
    _run([*pip, str(archives[1])], cwd=elsewhere)
    folders = python(IMPORT_ALL, cwd=elsewhere, path=target).split()
    inside = target.resolve() / "fxfreeze"
    assert folders == [str(inside), str(inside / "passes"), str(inside / "kernels")]


@pytest.mark.slow
def test_editable_install_follows_the_tree(tree: Path, tmp_path: Path) -> None:
    """In a new environment that borrows this one's packages through a .pth file."""
    home, tree = tmp_path / "venv", shutil.copytree(tree, tmp_path / "tree")
    venv.create(home, with_pip=False, symlinks=True)
    scripts = home / ("Scripts" if os.name == "nt" else "bin")
    inner = Path(sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)}))
    outer = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (inner / "borrowed.pth").write_text("\n".join(outer) + "\n")
    # --ignore-installed: the borrowed packages may hold an fxfreeze, which is not this environment's to remove.
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(scripts / "python"),
        "install",
        "--quiet",
        "--no-deps",
    ]
    _run(
        [*pip, "--no-index", "--no-build-isolation", "--ignore-installed", "--editable", str(tree)],
        cwd=tmp_path,
    )

    folders = python(IMPORT_ALL, cwd=tmp_path, executable=scripts / "python").split()
    real = tree.resolve()
    assert folders == [str(real / "fxfreeze"), str(real / "passes"), str(real / "kernels")]
    (tree / "passes" / "new_pass.py").write_text("found = True\n")
    code = "import fxfreeze.passes.new_pass as p; print(p.found)"
    assert python(code, cwd=tmp_path, executable=scripts / "python").strip() == "True"


def test_command_is_there() -> None:
    (point,) = importlib.metadata.entry_points(group="console_scripts", name="fxfreeze")
    assert point.value == PROJECT["project"]["scripts"]["fxfreeze"]
    assert callable(point.load())


# ---- imports


@pytest.mark.slow
def test_transformers_imports_from_the_repository_root() -> None:
    """transformers probes for the PyPI package `kernels`, and in the repository's root it finds our folder.

    It goes on without, as long as our `kernels/__init__.py` imports nothing and claims no `__version__`: what is
    imported as `kernels.…` would register our ops a first time, and `fxfreeze.kernels.…` a second.
    """
    pytest.importorskip("transformers")
    code = """
        import sys
        assert sys.path[0] == ""
        from transformers import BertConfig, BertModel
        small = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        model = BertModel(BertConfig(vocab_size=9, **small)).eval()
        import torch
        print(tuple(model(torch.zeros(1, 3, dtype=torch.long)).last_hidden_state.shape))
        from transformers.utils import is_kernels_available
        assert not is_kernels_available()
        assert not [name for name in sys.modules if name.startswith("kernels.")]
        import importlib, pkgutil, fxfreeze.kernels
        for module in pkgutil.iter_modules(fxfreeze.kernels.__path__):
            importlib.import_module("fxfreeze.kernels." + module.name)
    """
    assert python(code, cwd=ROOT).strip() == "(1, 3, 8)"


HEAVY = [
    "triton",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "sklearn",
    "transformers",
    "timm",
    "torchvision",
    "peft",
    "ray",
]

IMPORT_DOES_NOTHING = f"""
    HEAVY = {HEAVY!r}
    import os, sys, warnings
    import torch
    import torch.nn.functional

    def state():
        spaces = [torch, torch.nn, torch.nn.functional, torch.nn.Module, torch.Tensor, torch.fx, torch.fx.Graph,
                  torch.fx.Node, sys, os]
        names = {{(i, name): id(value) for i, space in enumerate(spaces) for name, value in vars(space).items()}}
        flags = (dict(os.environ), torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(),
                 torch.random.get_rng_state().tolist(), list(warnings.filters), sys.getrecursionlimit(),
                 list(sys.path), sys.excepthook)
        return names, flags

    before, flags = state()
    loaded = set(sys.modules)
    import importlib
    for name in {sorted(LISTED)!r}:
        importlib.import_module(name)
    after, flags_after = state()
    patched = sorted(name for (i, name), value in before.items() if after.get((i, name)) != value)
    # A module's attributes for its own submodules may appear, but nothing that was there may change.
    assert not patched, patched
    assert flags == flags_after
    print([name for name in HEAVY if name in sys.modules and name not in loaded])
"""


def test_import_does_nothing(tmp_path: Path) -> None:
    assert python(IMPORT_DOES_NOTHING, cwd=tmp_path).strip() == "[]"


def test_import_without_the_extras(tmp_path: Path) -> None:
    """Every package of ours imports where none of the optional packages, nor triton, can be imported."""
    code = f"""
        import importlib, sys
        absent = {HEAVY!r}
        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in absent:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        sys.meta_path.insert(0, Absent())
        for name in {sorted(LISTED)!r}:
            importlib.import_module(name)
        print("fine")
    """
    assert python(code, cwd=tmp_path).strip() == "fine"
