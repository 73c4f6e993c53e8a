"""Targets: what a Program can be turned into. Each is one file with two functions, and one line in :data:`EMITTERS`.

``emit(lowering, folder)`` writes the target's files into a folder that exists and returns facts for the manifest.
``load(folder, interface)`` makes a :class:`~fxfreeze.emit.runner.Runner` from such a folder. The files are all that the
two share, so a target always runs as it will after a reload.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import integers
from ..lower import Lowering
from ..program import Program
from ..serialize import Interface
from . import aoti, onnx, torch_compile
from .runner import Runner, on_huge_pages

__all__ = ["EMITTERS", "PROGRAM", "Runner", "Target", "on_huge_pages"]

PROGRAM = "program"
"""Folder of the Program itself: the torch target runs it, and checks compare with what each target computes of it."""


@dataclass(frozen=True)
class Target:
    """One way to run a Program: the folder its files are in, how they are written and how they are run.

    Attributes:
        computes: the Program → what this target runs, which is another function where it rounds elsewhere.
    """

    folder: str
    emit: Callable[[Lowering, Path], dict[str, Any]]
    load: Callable[[Path, Interface], Runner]
    computes: Callable[[Program], Program] = lambda program: program


EMITTERS: Mapping[str, Target] = {
    "torch": Target(PROGRAM, torch_compile.emit, torch_compile.load, integers.computed),
    "aoti": Target("aoti", aoti.emit, aoti.load, integers.computed),
    "onnx": Target("onnx", onnx.emit, onnx.load),
}
