"""An artifact: a folder of targets that compute one frozen model, and the record of how that is known.

::

    manifest.json           what is here and why it can be trusted; lists every other file with its SHA-256
    program/program.json    the Program as data (see serialize.py): run by the torch target, compared with by check()
    program/weights.safetensors
    adapters/0.safetensors  adapters that rows select from, if any; see banks.py
    aoti/model.pt2          when the plan asks for it
    onnx/model.onnx         when the plan asks for it

Nothing in the folder is unpickled. Every file is checked against the manifest before it is used, and the manifest
against its own digest, so that a truncated, altered, missing or added file is refused by name. This is integrity, not
authenticity: whoever can rewrite a file can rewrite the digests. ``model.pt2`` is native code and can do what a program
can do; load artifacts with that target only from where you would run a program from.

Saving is atomic: the folder is written beside its destination under another name, flushed to the disk, and renamed.
"""

from __future__ import annotations

import contextlib
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
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from . import banks, cpu, parity, weights
from ._version import __version__
from .binding import build, check_inputs, flatten_inputs, format_shape, top_level
from .emit import EMITTERS, PROGRAM, Runner, on_huge_pages
from .errors import ArtifactError, EmitError, FxfreezeError, PlanError
from .firing import fired, gate_rows
from .integers import wide_products
from .locks import alone
from .lower import Lowering
from .packed import READERS
from .plan import Gate, LoRA, Plan, Quantize
from .program import Program, TensorSpec, integer_layers, on_cpu
from .sensitivity import SiteSensitivity, ranked
from .serialize import WEIGHTS_FILE, Interface, dense_bytes, load_program, save_program

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
            gates, adapters, targets, default, wide_products, passes, proofs, ledger, sensitivity, parity, scores,
            sizes, dense, files, digest).
        interface: names, dtypes, shapes and dims of inputs and outputs.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder, self.manifest = folder, dict(manifest)
        self.interface = Interface.from_json(manifest["interface"])
        self._names = [spec.name for spec in self.interface.inputs]
        self._runners: dict[str, Runner] = {}
        self._program: Program | None = None
        self._shelf = _shelf(folder, self.manifest)

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
        sensitivity: Iterable[Any] = (),
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
            passes, proofs, ledger, sensitivity: rows for the manifest; dicts, or objects with ``to_json`` or dataclass
                fields.
            examples: flat tensors the model accepts, when random ones will not do.
            exact: the program is the same function as `reference`, which is then checked too.
            evaluate: scores a callable that is called like the model; for ``manifest["scores"]``.
            progress: told what is being done.

        Raises:
            EmitError: a target cannot be made, or disagrees, or this CPU cannot add up its integers; nothing is left
                behind.
        """
        say = progress or (lambda text: None)
        folder = Path(tempfile.mkdtemp(prefix="fxfreeze-"))
        try:
            rows, scores, wide = [], {}, wide_products(program)
            # A lossy step moved the truth: eager torch is then the program before its exact passes.
            eager = reference if exact or source is None else source.run
            draws = parity.Draws(program, eager, source=source, examples=examples)
            if plan.targets:
                if wide:
                    _refuse_16_bits(EmitError)
                say("running the model")
                rows = parity.check_model(program, draws.of()) if exact and reference is not None else []
                for name in plan.targets:  # a model that does not run says so before anything is built
                    draws.of(EMITTERS[name].computes)
            if evaluate is not None:
                say("evaluating the model")
                scores[parity.MODEL] = float(evaluate(nested(Interface.of(program), reference or program.run)))
            found = banks.banks(program, plan)
            facts = _emit(program, found, plan, folder, examples, say)
            executed = _executed(program, plan, facts)
            shelf = banks.Shelf(list(found), folder / banks.FOLDER / "0.safetensors", _by_name(found))
            if found:
                shelf.write()
            # The first call compiles it, and is made here. With adapters it would go on reading this shelf.
            stays = "torch" if plan.targets[:1] == ("torch",) and not found else None
            ready: dict[str, Runner] = {}
            for name in plan.targets:
                say(f"checking {name}")
                loading = partial(_load, name, folder, Interface.of(program), lambda: shelf)
                runner = _ready(loading, program.inputs) if name == stays else loading()
                rows += parity.check_target(name, runner, program, draws.of(EMITTERS[name].computes))
                if evaluate is not None:
                    say(f"evaluating {name}")
                    scores[name] = float(evaluate(nested(Interface.of(program), runner)))
                if name == stays:
                    ready[name] = runner
                del runner  # of all others one in memory at a time
            manifest = _manifest(program, plan, list(found), facts, folder)
            manifest |= {
                "wide_products": wide,
                "passes": _rows(passes),
                "proofs": _rows(proofs),
                "ledger": [*_rows(ledger), *executed],
                "sensitivity": _rows(sensitivity),
                "parity": _rows(rows),
                "scores": scores,
            }
            manifest = _plain({**manifest, **_files(folder)})
            _write_manifest(folder, manifest)
            artifact = cls(folder, _read_manifest(folder))
            artifact._runners |= ready
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
        return nested(self.interface, self.runner(name))(*args, **kwargs)

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
            self._runners[name] = _ready(partial(self._load, name), self.interface.inputs)
        return self._runners[name]

    def _load(self, name: str) -> Runner:
        self._entry(name)
        if name == "aoti":
            _refuse_other_machine(self.manifest["machine"])
        if self.manifest.get("wide_products"):
            _refuse_16_bits(ArtifactError)
        return _load(name, self.folder, self.interface, lambda: self._shelf)

    def _entry(self, name: str | None) -> None:
        if name is None:
            raise ArtifactError("the plan names no targets, so there is nothing to run")
        if name not in self.manifest["targets"] or name not in EMITTERS:
            raise ArtifactError(f"there is no target {name!r} here, only {', '.join(self.targets)}")

    @property
    def program(self) -> Program:
        """The stored program, read anew, with the adapters that there are now."""
        return self._read(shapes=False)

    def _read(self, shapes: bool) -> Program:
        return banks.closed(load_program(self.folder / PROGRAM, shapes=shapes), self.interface, self._shelf.values)

    def check(self, examples: Sequence[Tensor] | None = None) -> list[parity.ParityRow]:
        """Hash the files and compare every target, loaded anew, with what it computes of the program, in float64.

        Args:
            examples: flat tensors to use instead of random ones; needed where compiling needed them.

        Raises:
            ArtifactError: an altered file, or a target that disagrees.
        """
        _verify_files(self.folder, self.manifest)
        program = self._read(shapes=True)
        draws = parity.Draws(program, examples=examples)
        rows: list[parity.ParityRow] = []
        for name in self.targets:
            rows += parity.check_target(name, self._load(name), program, draws.of(EMITTERS[name].computes))
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
            self._program = self.program
        return fired(self._program, self.manifest["gates"], flat)

    def sensitivity(self) -> list[SiteSensitivity]:
        """What quantizing each layer alone did to the model, the most sensitive first, as measured for a budget.

        Raises:
            ArtifactError: no step had a budget. The artifact holds integers, so that the frozen model is needed.
        """
        if not (recorded := self.manifest.get("sensitivity")):
            raise ArtifactError(
                "no sensitivities are recorded",
                hint="call fxfreeze.sensitivity(model, plan), or compile with Quantize(budget=...)",
            )
        return ranked(SiteSensitivity(**row) for row in recorded)

    # ------------------------------------------------------------------ adapters

    @property
    def adapters(self) -> dict[str, int]:
        """Names of the adapters that rows select from → the id that selects each. Id 0 is the base without one.

        Those that it was compiled with are called ``<select>_1``, ``<select>_2``, …
        """
        named = (self.manifest.get("adapters") or {}).get("names", {})
        return {name: id for names in named.values() for id, name in enumerate(names, 1)}

    def add_adapter(
        self, name: str, state: str | os.PathLike[str] | Mapping[str, Tensor], *, select: str | None = None
    ) -> int:
        """Add one adapter, for every target, without compiling anything.

        The artifact's folder is written to at once, in one step: a killed call leaves what was there. The ONNX file
        itself stays as it is: run without fxfreeze it knows the adapters it was compiled with, and takes the tensors of
        ``adapters/*.safetensors`` as inputs of the same names for more. :meth:`check` compares all targets anew.

        Args:
            name: what :attr:`adapters` calls it.
            state: a LoRA of the same sites: a file that ``save_adapters`` of a module with one LoRA wrote, a folder
                that peft wrote, any safetensors file, or tensors by name. Keys are ``<module path>.lora_A`` [rank, in]
                and ``lora_B`` [out, rank], with or without ``adapters.<step>.`` in front, in a floating dtype; they are
                rounded to the dtype of the layer. Of a convolution A is [rank, in / groups, *kernel]. The rank is the
                plan's or smaller. A file of ours and a folder of peft's say their scale, else it is the plan's.
            select: which input is to select it, where the plan has several.

        Returns:
            The id.

        Raises:
            ArtifactError: the name is taken, keys or shapes differ, the rank is larger, values are not finite, gates
                share the input, the folder was changed by someone else, or is being added to.
        """
        select = self._select_of(name, select)
        if _read_manifest(self.folder)["digest"] != self.manifest["digest"]:
            raise ArtifactError(
                "the folder was changed since it was loaded", where=str(self.folder), hint="load it anew"
            )
        names = self.manifest["adapters"]["names"]
        try:
            rows = self._rows_of(weights.Lone(state, where=name), select)
        except PlanError as error:
            raise ArtifactError(error.what, where=error.where, hint=error.hint) from error
        # No two processes write to one file: the manifest of one would not fit the bytes of the other.
        file = f"{sum(map(len, names.values())) + 1}.{secrets.token_hex(4)}.safetensors"
        shelf = self._shelf.extended(rows, self.folder / banks.FOLDER / file)
        named = {**names, select: [*names[select], name]}
        with alone(self.folder, "another process is adding an adapter to the folder", "load it anew after that"):
            self._publish(shelf, named, select)
        return len(named[select])

    def _select_of(self, name: str, select: str | None) -> str:
        """The input to select `name` by, if there may be such an adapter."""
        recorded = self.manifest.get("adapters")
        if not recorded:
            raise ArtifactError("it was compiled without adapters to select", hint="compile it with LoRA(adapters=...)")
        if not isinstance(name, str) or not name or name in self.adapters:
            raise ArtifactError(f"an adapter is called {name!r} already" if name in self.adapters else
                                f"an adapter needs a name, got {name!r}")  # fmt: skip
        known = list(recorded["names"])
        if select is None and len(known) > 1:
            raise ArtifactError(f"adapters are selected by {' and '.join(known)}", hint="say which with select=")
        select = known[0] if select is None else select
        if select not in known:
            raise ArtifactError(f"no adapters are selected by {select!r}, only by {', '.join(known)}")
        others = [step.name for step in self._plan.steps
                  if isinstance(step, Gate) and step.modes is not None and step.select == select]  # fmt: skip
        if others:
            raise ArtifactError(
                f"{', '.join(others)} has a mode for each of the ids of {select!r}, and none for another",
                hint="compile with different inputs for modes and adapters",
            )
        return select

    @property
    def _plan(self) -> Plan:
        return Plan.model_validate(self.manifest["plan"])

    def _rows_of(self, adapter: weights.Lone, select: str) -> dict[str, Tensor]:
        """Bank → what to append to it, in float64."""
        steps = {step.name: step for step in self._plan.steps if isinstance(step, LoRA)}
        places: dict[tuple[str, str], dict[str, banks.Bank]] = {}
        for bank in self._shelf.banks:
            if bank.select == select:
                places.setdefault((bank.step, bank.site), {})[bank.leaf] = bank
        rows: dict[str, Tensor] = {}
        for (step, site), pair in places.items():
            if adapter.from_peft and (note := pair["lora_A"].note):
                raise PlanError(f"{site} {note}", where=adapter.where)
            a_shape, (rank, outer) = (tuple(map(int, pair[leaf].spec.shape[1:])) for leaf in ("lora_A", "lora_B"))
            a, b = adapter.pair(steps[step], site, a_shape, (outer, rank))
            rows |= {pair["lora_A"].name: a, pair["lora_B"].name: b.T}
        adapter.finish()
        return rows

    def _publish(self, shelf: banks.Shelf, names: Mapping[str, Sequence[str]], select: str) -> None:
        """Write `shelf` and a manifest that knows it; only the latter, at the end, makes it count."""
        if _read_manifest(self.folder)["digest"] != self.manifest["digest"]:
            raise ArtifactError(
                "the folder was changed since it was loaded", where=str(self.folder), hint="load it anew"
            )
        counted = tuple(replace(spec, high=len(names[select])) if spec.name == select else spec
                        for spec in self.interface.inputs)  # fmt: skip
        interface = replace(self.interface, inputs=counted)
        old, new = self._shelf.file, shelf.file
        key = f"{banks.FOLDER}/{new.name}"
        try:
            shelf.write()
            record = {"bytes": new.stat().st_size, "sha256": _hash(new)}
            kept = {file: item for file, item in self.manifest["files"].items() if file != f"{banks.FOLDER}/{old.name}"}
            files = dict(sorted({**kept, key: record}.items()))
            manifest = {
                **self.manifest, "interface": interface.to_json(), "files": files,
                "sizes": {file: item["bytes"] for file, item in files.items()},
                "adapters": {**self.manifest["adapters"], "file": new.name, "names": {**names}},
            }  # fmt: skip
            _replace_manifest(self.folder, _plain(manifest))
        except OSError as error:
            new.unlink(missing_ok=True)
            raise ArtifactError(f"cannot be written: {error.strerror}", where=str(self.folder)) from error
        for leftover in self.folder.glob(f"{banks.FOLDER}/*.safetensors"):
            if leftover != new:
                with contextlib.suppress(OSError):  # never read
                    leftover.unlink()
        self.manifest, self.interface = _read_manifest(self.folder), interface
        self._shelf, self._program = shelf, None

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


def nested(interface: Interface, runner: Callable[..., Sequence[Tensor]]) -> Callable[..., Any]:
    """`runner`, called as the model is: inputs bound by name and checked, outputs nested."""
    names = [spec.name for spec in interface.inputs]

    def call(*args: Any, **kwargs: Any) -> Any:
        flat = flatten_inputs(names, args, kwargs)
        check_inputs(interface.inputs, interface.dims, flat)
        return build(interface.structure, runner(*flat))

    return call


# ------------------------------------------------------------------------------------------ manifest


def _by_name(found: Mapping[banks.Bank, Tensor]) -> dict[str, Tensor]:
    return {bank.name: value for bank, value in found.items()}


def _shelf(folder: Path, manifest: Mapping[str, Any]) -> banks.Shelf:
    recorded = manifest.get("adapters") or {"banks": [], "file": "0.safetensors"}
    return banks.Shelf([banks.Bank.from_json(item) for item in recorded["banks"]],
                       folder / banks.FOLDER / recorded["file"])  # fmt: skip


def _load(name: str, folder: Path, interface: Interface, shelf: Callable[[], banks.Shelf]) -> Runner:
    """A target, called as `interface` says: its adapters are given to it."""
    place, found = folder / EMITTERS[name].folder, shelf().banks
    if not found:
        return EMITTERS[name].load(place, interface)
    return banks.Fed(EMITTERS[name].load(place, banks.with_inputs(interface, found)), shelf)


def _ready(load: Callable[[], Runner], inputs: Sequence[TensorSpec]) -> Runner:
    """What `load` gives, as it is to stay."""
    return on_huge_pages(load) if on_cpu(inputs) else load()


def _emit(
    program: Program,
    found: Mapping[banks.Bank, Tensor],
    plan: Plan,
    folder: Path,
    examples: Sequence[Tensor] | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Write every target into its folder, and the program in any case; facts by target."""
    program = banks.opened(program, list(found))
    if examples is not None:
        examples = [*examples, *found.values()]
    lowering = Lowering(program, examples, _by_name(found), plan.portable)
    facts: dict[str, Any] = {}
    for name in plan.targets:
        say(f"emitting {name}")
        place = folder / EMITTERS[name].folder
        place.mkdir()
        facts[name] = {"folder": EMITTERS[name].folder, **EMITTERS[name].emit(lowering, place)}
    if not (folder / PROGRAM).exists():
        save_program(program, folder / PROGRAM)
    return facts


def _executed(program: Program, plan: Plan, facts: dict[str, Any]) -> list[dict[str, str]]:
    """Rows for the ledger: by what each target runs each quantized layer. Targets say so in their fact ``integer``.

    Raises:
        EmitError: a target runs one in floats, and its step does not allow that.
    """
    steps = {step.name: step for step in plan.steps if isinstance(step, Quantize)}
    rows, refused = [], []
    for target, told in facts.items():
        silent = [row for site in integer_layers(program).values() for row in site.ran(None)]
        for path, name, kernel in told.pop("integer", silent):
            numbers = "float8" if steps[name].scheme == "fp8" else "integer"
            executes = f"{numbers}-executed by {kernel} in {target}" if kernel else f"simulated in {target}"
            detail = "its weight is read as integers, sums are in floats" if kernel in READERS else ""
            rows.append({
                "site": path, "step": name, "requested": steps[name].scheme, "outcome": "measured", "pass_name": "",
                "executes": executes, "detail": detail,
            })  # fmt: skip
            if not kernel and not steps[name].allow_simulated:
                refused.append(f"  {path}: {steps[name].scheme} by {name!r} in {target!r}")
    if refused:
        raise EmitError(
            "\n".join([f"{len(refused)} quantized layers would be computed in floats", *refused]),
            hint="exclude these layers, choose another target, or allow it with Quantize(allow_simulated=True)",
        )
    return rows


def _manifest(
    program: Program, plan: Plan, found: Sequence[banks.Bank], facts: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    selects = {bank.select for bank in found}
    names = {spec.name: [f"{spec.name}_{id}" for id in range(1, int(spec.high or 0) + 1)]
             for spec in program.inputs if spec.select and spec.name in selects}  # fmt: skip
    adapters = {"file": "0.safetensors", "names": names, "banks": _rows(found)} if found else {}
    return {
        "format": FORMAT,
        "fxfreeze": __version__,
        "versions": _versions(),
        "machine": _machine(),
        "plan": plan.to_dict(),
        "interface": Interface.of(program).to_json(),
        "structural_hash": program.structural_hash(),
        "gates": _rows(gate_rows(program)),
        "adapters": adapters,
        "targets": dict(facts),
        "default": plan.targets[0] if plan.targets else None,
        # What a file that leaves out zeros would take with them.
        "dense": {} if (dense := dense_bytes(folder / PROGRAM)) is None else {f"{PROGRAM}/{WEIGHTS_FILE}": dense},
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


def _refuse_16_bits(error: type[FxfreezeError]) -> None:
    """Raises `error` where this CPU adds products of 8 bits up in 16, and results would be wrong without a word."""
    if cpu.adds_in_16_bits():
        raise error(
            "this CPU, x86 without VNNI, adds products of integers up in pairs of 16 bits; weights of 8 bits overflow",
            hint="compile with Quantize(reduce_range=True), whose weights have 7, or use a CPU with VNNI",
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


def _replace_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """As :func:`_write_manifest`, over one that is there, in one step."""
    partial_ = f"{MANIFEST}.{secrets.token_hex(4)}{_PARTIAL}"
    try:
        _write_manifest(folder, manifest, partial_)
        os.replace(folder / partial_, folder / MANIFEST)
    except BaseException:
        (folder / partial_).unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # it counts by now: what it names must stay
        _sync(folder)


def _write_manifest(folder: Path, manifest: Mapping[str, Any], name: str = MANIFEST) -> None:
    text = json.dumps({**manifest, "digest": _digest(manifest)}, indent=1, allow_nan=False, ensure_ascii=False)
    with open(folder / name, "w", encoding="utf-8") as file:
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
    """Every listed file is there and is what was saved, and nothing else is there, but for what an interrupted
    ``add_adapter`` left behind."""
    known = set(manifest["files"]) | {MANIFEST}
    if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in known):
        raise ArtifactError(f"{MANIFEST} lists a file outside the folder", where=str(folder))
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise ArtifactError("a symbolic link does not belong to an artifact", where=name)
        if not path.is_dir() and name not in known and not _is_leftover(name):
            raise ArtifactError("the file does not belong to the artifact", where=name, hint="remove it")
    for name, record in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError("the file is missing", where=name)
        if path.stat().st_size != record["bytes"]:
            raise ArtifactError(f"the file has {path.stat().st_size} bytes, {record['bytes']} were saved", where=name)
        if _hash(path) != record["sha256"]:
            raise ArtifactError("the file was altered: its SHA-256 does not match the manifest", where=name)


def _is_leftover(name: str) -> bool:
    return bool(banks.LEFTOVER.fullmatch(name)) or (name.startswith(f"{MANIFEST}.") and name.endswith(_PARTIAL))


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
