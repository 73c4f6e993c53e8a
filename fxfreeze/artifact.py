"""An artifact: a folder of targets that compute one frozen model, and the record of how that is known.

::

    manifest.json           what is here and why it can be trusted; lists every other file with its SHA-256
    program/program.json    the Program as data (see serialize.py): run by the torch target, compared with by check()
    program/weights.safetensors
    aoti/model.pt2          when the plan asks for it
    onnx/model.onnx         when the plan asks for it

Nothing in the folder is unpickled. Every file is checked against the manifest before it is used, and the manifest
against its own digest, so that a truncated, altered, missing or added file is refused by name. This is integrity, not
authenticity: whoever can rewrite a file can rewrite the digests. ``model.pt2`` is native code and can do what a program
can do; load artifacts with that target only from where you would run a program from.

Saving is atomic: the folder is written beside its destination under another name, flushed to the disk, and renamed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from . import parity
from ._version import __version__
from .binding import build, check_inputs, flatten_inputs, format_shape, top_level
from .emit import EMITTERS, PROGRAM, Runner
from .errors import ArtifactError, FxfreezeError
from .firing import fired, gate_rows
from .lower import Lowering
from .plan import Plan
from .program import Program
from .serialize import Interface, load_program, save_program

FORMAT = 1
"""Version of the layout of an artifact's folder and manifest; a newer one is refused."""

MANIFEST = "manifest.json"
_PARTIAL = ".fxfreeze-partial"  # ends the name of a folder that is still being saved
_PACKAGES = ("onnx", "onnxscript", "onnxruntime", "safetensors")


class Artifact:
    """A compiled model. Call it like the model: by position, by keyword, with the nesting the plan's names describe.

    Made by ``fxfreeze.compile`` or ``fxfreeze.load``. Attributes:
        folder: where its files are; a private temporary folder, removed with the artifact, unless it was loaded.
        manifest: the record, JSON-able (keys: format, fxfreeze, versions, machine, plan, interface, structural_hash,
            gates, targets, default, passes, proofs, ledger, parity, scores, sizes, files, digest).
        interface: names, dtypes, shapes and dims of inputs and outputs.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder, self.manifest = folder, dict(manifest)
        self.interface = Interface.from_json(manifest["interface"])
        self._names = [spec.name for spec in self.interface.inputs]
        self._runners: dict[str, Runner] = {}
        self._program: Program | None = None

    # ------------------------------------------------------------------ making

    @classmethod
    def create(
        cls,
        program: Program,
        plan: Plan,
        reference: parity.Flat | None = None,
        *,
        source: Program | None = None,
        passes: Iterable[Any] = (),
        proofs: Iterable[Any] = (),
        ledger: Iterable[Any] = (),
        examples: Sequence[Tensor] | None = None,
        exact: bool = True,
        evaluate: Callable[[Callable[..., Any]], float] | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> Artifact:
        """Emit every target of `plan`, load each from its files, and compare it with the frozen model.

        Args:
            program: after the last pass, constants rounded.
            reference: the user's model, flat tensors to flat tensors; see :func:`fxfreeze.parity.draw`.
            source: the program before its exact passes; see there.
            passes, proofs, ledger: rows for the manifest; dicts, or objects with ``to_json`` or dataclass fields.
            examples: flat tensors the model accepts, when random ones will not do.
            exact: the program is the same function as `reference`, which is then checked too.
            evaluate: scores a callable that is called like the model; for ``manifest["scores"]``.
            progress: told what is being done.

        Raises:
            EmitError: a target cannot be made, or disagrees; nothing is left behind.
        """
        say = progress or (lambda text: None)
        folder = Path(tempfile.mkdtemp(prefix="fxfreeze-"))
        try:
            draws, rows, scores = [], [], {}
            if plan.targets:
                say("running the model")
                # A lossy step moved the truth: eager torch is then the program before its exact passes.
                eager = reference if exact or source is None else source.run
                draws = parity.draw(program, eager, source=source, examples=examples)
                rows = parity.check_model(program, draws) if exact and reference is not None else []
            if evaluate is not None:
                say("evaluating the model")
                scores[parity.MODEL] = float(evaluate(_nested(Interface.of(program), reference or program.run)))
            facts = _emit(program, plan.targets, folder, examples, say)
            for name in plan.targets:
                say(f"checking {name}")
                runner = EMITTERS[name].load(folder / EMITTERS[name].folder, Interface.of(program))
                rows += parity.check_target(name, runner, program, draws)
                if evaluate is not None:
                    say(f"evaluating {name}")
                    scores[name] = float(evaluate(_nested(Interface.of(program), runner)))
                del runner  # one target in memory at a time
            manifest = _manifest(program, plan, facts, folder)
            manifest |= {
                "passes": _rows(passes),
                "proofs": _rows(proofs),
                "ledger": _rows(ledger),
                "parity": _rows(rows),
                "scores": scores,
            }
            manifest = _plain({**manifest, **_files(folder)})
            _write_manifest(folder, manifest)
            artifact = cls(folder, _read_manifest(folder))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        weakref.finalize(artifact, shutil.rmtree, str(folder), ignore_errors=True)
        return artifact

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Artifact:
        """Open a saved artifact. Every file is hashed; a target is loaded when it is first used.

        Raises:
            ArtifactError: no artifact, a newer one, or a file is missing, added or not what was saved.
        """
        folder = Path(path).absolute()
        if folder.name.endswith(_PARTIAL):
            raise ArtifactError("this is what an interrupted save left behind, not an artifact", where=str(path))
        manifest = _read_manifest(folder)
        _verify_files(folder, manifest)
        return cls(folder, manifest)

    # ------------------------------------------------------------------ using

    def __call__(self, /, *args: Any, target: Any = None, **kwargs: Any) -> Any:
        """Run `target` (default: the plan's first) and return outputs nested as the model nests them.

        Raises:
            ArtifactError: names the input that is missing, unknown, or has the wrong dtype, shape, size or device.
        """
        if target is not None and "target" in top_level(self._names):  # an input of that name takes precedence
            kwargs["target"], target = target, None
        return self._call(target, *args, **kwargs)

    def _call(self, name: str | None, /, *args: Any, **kwargs: Any) -> Any:
        return _nested(self.interface, self.runner(name))(*args, **kwargs)

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the targets, the default one first."""
        default = self.manifest["default"]
        if default is None:
            return ()
        return (default, *(name for name in self.manifest["targets"] if name != default))

    def target(self, name: str) -> Callable[..., Any]:
        """One target, called like the artifact."""
        self._entry(name)
        return partial(self._call, name)

    def runner(self, name: str | None = None) -> Runner:
        """One target without any check: flat tensors to flat tensors, loaded at the first use."""
        name = name or self.manifest["default"]
        if name not in self._runners:
            self._runners[name] = self._load(name)
        return self._runners[name]

    def _load(self, name: str) -> Runner:
        folder = self._entry(name)
        if name == "aoti":
            _refuse_other_machine(self.manifest["machine"])
        return EMITTERS[name].load(folder, self.interface)

    def _entry(self, name: str | None) -> Path:
        if name is None:
            raise ArtifactError("the plan names no targets, so there is nothing to run")
        if name not in self.manifest["targets"] or name not in EMITTERS:
            raise ArtifactError(f"there is no target {name!r} here, only {', '.join(self.targets)}")
        return self.folder / EMITTERS[name].folder

    def check(self, examples: Sequence[Tensor] | None = None) -> list[parity.ParityRow]:
        """Hash the files and compare every target, loaded anew, with the stored program in float64.

        Args:
            examples: flat tensors to use instead of random ones; needed where compiling needed them.

        Raises:
            ArtifactError: an altered file, or a target that disagrees.
        """
        _verify_files(self.folder, self.manifest)
        program = load_program(self.folder / PROGRAM, shapes=False)
        draws = parity.draw(program, examples=examples)
        rows: list[parity.ParityRow] = []
        for name in self.targets:
            rows += parity.check_target(name, self._load(name), program, draws)
        return rows

    def firing(self, /, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Which neurons fire at every hard gate, sample by sample; called like the artifact.

        The stored program runs in eager torch. Gates that compiling removed because they are always open are not there;
        ``manifest["gates"]`` lists those that are.

        Returns:
            Site → bool of the shape of the gated value, with every neuron the model had; False for those that were
            removed, because they never fire or because nothing reads them.

        Raises:
            ArtifactError: as a call.
        """
        flat = flatten_inputs(self._names, args, kwargs)
        check_inputs(self.interface.inputs, self.interface.dims, flat)
        if "gates" not in self.manifest:
            raise ArtifactError("it was compiled before gates were recorded", hint="compile it anew")
        if self._program is None:
            self._program = load_program(self.folder / PROGRAM, shapes=False)
        return fired(self._program, self.manifest["gates"], flat)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file."""
        return dict(self.manifest["sizes"])

    @property
    def report(self) -> str:
        """The manifest as text tables."""
        from .report import as_text, summary

        return as_text(summary(self.manifest))

    def __repr__(self) -> str:
        inputs = ", ".join(f"{spec.name}: {format_shape(spec)}" for spec in self.interface.inputs)
        return f"Artifact({inputs} → {', '.join(self.interface.outputs)}; targets {', '.join(self.targets)})"

    # ------------------------------------------------------------------ saving

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the artifact to `path`, whole or not at all, and return it.

        A save that is killed leaves a folder beside `path` whose name ends in ".fxfreeze-partial" and which load
        refuses; one that fails leaves nothing.

        Raises:
            ArtifactError: `path` exists, or cannot be written, or a file changed since the artifact was made.
        """
        final = Path(path).absolute()
        if os.path.lexists(final):
            raise ArtifactError("the output path exists already", where=str(path), hint="name one that does not")
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            partial_ = final.parent / f".{final.name}.{secrets.token_hex(4)}{_PARTIAL}"
            partial_.mkdir()
        except OSError as error:
            raise ArtifactError(f"cannot be written: {error.strerror}", where=str(path)) from error
        try:
            self._write_to(partial_)
            if os.path.lexists(final):  # rename would replace an empty folder
                raise ArtifactError("the output path exists already", where=str(path), hint="name one that does not")
            os.rename(partial_, final)
            _sync(final.parent)
        except OSError as error:
            raise ArtifactError(f"cannot be written: {error.strerror}", where=str(path)) from error
        finally:
            shutil.rmtree(partial_, ignore_errors=True)
        return final

    def _write_to(self, folder: Path) -> None:
        for name, record in self.manifest["files"].items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if _copy(self.folder / name, target) != record["sha256"]:
                raise ArtifactError("the file changed since the artifact was made", where=name)
        _write_manifest(folder, self.manifest)
        for sub in {(folder / name).parent for name in self.manifest["files"]} | {folder}:
            _sync(sub)


def load(path: str | os.PathLike[str]) -> Artifact:
    """Open a saved artifact; see :meth:`Artifact.load`."""
    return Artifact.load(path)


def _nested(interface: Interface, runner: Callable[..., Sequence[Tensor]]) -> Callable[..., Any]:
    """`runner`, called as the model is: inputs bound by name and checked, outputs nested."""
    names = [spec.name for spec in interface.inputs]

    def call(*args: Any, **kwargs: Any) -> Any:
        flat = flatten_inputs(names, args, kwargs)
        check_inputs(interface.inputs, interface.dims, flat)
        return build(interface.structure, runner(*flat))

    return call


# ------------------------------------------------------------------------------------------ manifest


def _emit(
    program: Program,
    targets: Sequence[str],
    folder: Path,
    examples: Sequence[Tensor] | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Write every target into its folder, and the program in any case; facts by target."""
    lowering, facts = Lowering(program, examples), {}
    for name in targets:
        say(f"emitting {name}")
        place = folder / EMITTERS[name].folder
        place.mkdir()
        facts[name] = {"folder": EMITTERS[name].folder, **EMITTERS[name].emit(lowering, place)}
    if not (folder / PROGRAM).exists():
        save_program(program, folder / PROGRAM)
    return facts


def _manifest(program: Program, plan: Plan, facts: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "fxfreeze": __version__,
        "versions": _versions(),
        "machine": _machine(),
        "plan": plan.to_dict(),
        "interface": Interface.of(program).to_json(),
        "structural_hash": program.structural_hash(),
        "gates": _rows(gate_rows(program)),
        "targets": dict(facts),
        "default": plan.targets[0] if plan.targets else None,
    }


def _files(folder: Path) -> dict[str, Any]:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    records = {name: {"bytes": (folder / name).stat().st_size, "sha256": _hash(folder / name)} for name in names}
    return {"sizes": {name: record["bytes"] for name, record in records.items()}, "files": records}


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _machine() -> dict[str, str]:
    """What native code depends on."""
    machine = {"system": platform.system(), "architecture": platform.machine()}
    machine["cpu"] = torch.backends.cpu.get_cpu_capability()
    return machine


_CPUS = ("DEFAULT", "AVX2", "AVX512")  # each runs what was built for those before it


def _refuse_other_machine(made: Mapping[str, str]) -> None:
    """Native code dies of an instruction its machine lacks, where an error could have been raised.

    Raises:
        ArtifactError: this machine is another, or lacks the vector instructions the code was built with.
    """
    here = _machine()
    cpus = (made["cpu"], here["cpu"])
    newer = all(cpu in _CPUS for cpu in cpus) and _CPUS.index(cpus[0]) <= _CPUS.index(cpus[1])
    if {**made, "cpu": ""} != {**here, "cpu": ""} or not (cpus[0] == cpus[1] or newer):
        raise ArtifactError(
            f"the aoti target was built for {' '.join(made.values())}, and this is {' '.join(here.values())}",
            hint="compile the artifact on this kind of machine, or use another target",
        )


def _rows(rows: Iterable[Any]) -> list[Any]:
    return [
        row.to_json() if hasattr(row, "to_json") else vars(row) if hasattr(row, "__dict__") else row for row in rows
    ]


def _plain(value: Any) -> Any:
    """`value` as strict JSON has it: tuples as lists, and None for the numbers it lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _digest(manifest: Mapping[str, Any]) -> str:
    body = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    text = json.dumps({**manifest, "digest": _digest(manifest)}, indent=1, allow_nan=False, ensure_ascii=False)
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"there is no artifact here: {MANIFEST} is missing", where=str(folder))
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format"]
        if isinstance(version, int) and version > FORMAT:
            raise ArtifactError(
                f"the artifact has format {version}, newer than this fxfreeze reads ({FORMAT})",
                where=str(folder), hint="upgrade fxfreeze",
            )  # fmt: skip
        intact = manifest["digest"] == _digest(manifest) and version == FORMAT
    except FxfreezeError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{MANIFEST} is damaged: {error}", where=str(folder)) from error
    if not intact:
        raise ArtifactError(f"{MANIFEST} was altered: its digest does not match", where=str(folder))
    return dict(manifest)


def _verify_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Every listed file is there and is what was saved, and nothing else is there."""
    known = set(manifest["files"]) | {MANIFEST}
    if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in known):
        raise ArtifactError(f"{MANIFEST} lists a file outside the folder", where=str(folder))
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise ArtifactError("a symbolic link does not belong to an artifact", where=name)
        if not path.is_dir() and name not in known:
            raise ArtifactError("the file does not belong to the artifact", where=name, hint="remove it")
    for name, record in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError("the file is missing", where=name)
        if path.stat().st_size != record["bytes"]:
            raise ArtifactError(f"the file has {path.stat().st_size} bytes, {record['bytes']} were saved", where=name)
        if _hash(path) != record["sha256"]:
            raise ArtifactError("the file was altered: its SHA-256 does not match the manifest", where=name)


# --------------------------------------------------------------------------------------------- files


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _copy(source: Path, target: Path) -> str:
    """Copy a file through to the disk; the SHA-256 of what was copied."""
    digest = hashlib.sha256()
    with open(source, "rb") as reader, open(target, "xb") as writer:
        while block := reader.read(1 << 20):
            digest.update(block)
            writer.write(block)
        writer.flush()
        os.fsync(writer.fileno())
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    """Flush a folder's entries to the disk, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
