"""C++ beside a kernel file: built when it is first needed, once per machine, and called through ctypes.

A build lies in Inductor's cache folder under a name made from all it depends on, so a second process only loads it. It
takes a C++ compiler: the one in CXX, else g++, as for Inductor, else clang++ or c++. Without one, or where it fails,
there is a warning, and :func:`library` returns None.
"""

from __future__ import annotations

import ctypes
import functools
import getpass
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
COMPILERS = ("g++", "clang++", "c++")

# No contraction of a·b + c is asked for or forbidden; NaN and infinities keep their meaning.
_FLAGS = ("-O2", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
_NATIVE = {"x86_64": ("-march=native",), "AMD64": ("-march=native",), "aarch64": ("-mcpu=native",)}
_CPU = ("vendor_id", "cpu family", "model\t", "flags", "Features", "CPU ")


def source(name: str) -> str:
    """The text of a C++ file of this folder."""
    return (FOLDER / name).read_text(encoding="utf-8")


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The functions of a C++ file of this folder; None, after a warning, where it cannot be built or loaded."""
    try:
        flags = [*_FLAGS, *_NATIVE.get(platform.machine(), ())]
        try:
            return ctypes.CDLL(str(build(name, compiler(), [*flags, "-fopenmp"])))
        except subprocess.CalledProcessError:
            # A compiler without OpenMP is one without threads.
            return ctypes.CDLL(str(build(name, compiler(), flags)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        warnings.warn(
            f"{name} was not built, and plain torch runs in its place: {detail[0] if detail else error!r}. "
            "It takes a C++ compiler, which the environment variable CXX may name.",
            stacklevel=2,
        )
        return None


def compiler() -> list[str]:
    """The command that runs the C++ compiler. Raises FileNotFoundError when there is none."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    raise FileNotFoundError(f"no C++ compiler: {' '.join(named) or ', '.join(COMPILERS)} not found")


def build(name: str, compiler: list[str], flags: list[str]) -> Path:
    """The shared library of a C++ file, from the cache or built by `compiler`, a command as in CXX.

    Raises:
        subprocess.CalledProcessError: the compiler refuses; `stderr` says why.
        OSError: the compiler does not start, or the cache folder cannot be written.
    """
    command = [*compiler, *flags]
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256("\0".join([source(name), version, *command, _cpu()]).encode()).hexdigest()[:32]
    path = _cache() / f"{Path(name).stem}-{key}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / path.name
            subprocess.run([*command, str(FOLDER / name), "-o", str(built)], capture_output=True, text=True, check=True)
            # Two processes may build at once; whichever comes last replaces a file by its equal.
            os.replace(built, path)
    return path


def _cache() -> Path:
    """In Inductor's folder, whose own function for it takes seconds to import."""
    try:
        user = re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
    except (KeyError, OSError):
        user = "unknown_user"
    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or f"{tempfile.gettempdir()}/torchinductor_{user}"
    return Path(inductor) / "fxfreeze"


def _cpu() -> str:
    """What a build for this very CPU depends on: a cache folder may be shared between machines."""
    found = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
    if os.path.exists("/proc/cpuinfo"):
        first, *_ = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")
        found += [line for line in first.splitlines() if line.startswith(_CPU)]
    return "\n".join(found)


def call(function: Callable[..., int], *args: torch.Tensor | str | int | float) -> int:
    """Call a C function: tensors are passed as pointers, strings as char*, ints as int64_t, floats as double.

    Returns what it returns, an int; of a function that returns nothing, anything.
    """
    return function(*map(_converted, args))


def _converted(value: torch.Tensor | str | int | float) -> object:
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, str):
        return value.encode()
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(value)
