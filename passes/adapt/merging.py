"""A peft adapter folded into a base on disk, tensor by tensor: for bases too large to hold, or to capture, at once.

The shards written have the names, the header and the layout of the base's, so whatever reads the base reads them. Of a
shard one tensor is in memory at a time: what is not adapted is copied byte by byte, and an adapted weight takes a few
times its size in float64.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fxfreeze.checkpoints import CONFIG, parameter_key
from fxfreeze.constants import lift
from fxfreeze.errors import PassError, PlanError
from fxfreeze.plan import IA3, Replace, Step, VeRA, from_peft
from fxfreeze.rewrite import Ledger

from .._adapters import DeltaStep, changed, changed_bias, describe, misfit
from .._operators import WeightOperator, apply
from ._parameters import Source, parameters, projections

MAX_LOSS = 0.5
"""Rounding to the base's dtype may take half of what an adapter adds, not more."""

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK = 1 << 24

Shape = tuple[int, ...]
_TIED = ("embed_tokens", "wte", "word_embeddings", "lm_head", "embed_out")


def merge(base: str | os.PathLike[str], adapter: str | os.PathLike[str], out: str | os.PathLike[str]) -> Ledger:
    """:func:`fxfreeze.fold_checkpoint`."""
    source, target = Path(base), Path(out)
    shards = sorted(source.glob("*.safetensors"))
    if not shards:
        raise PlanError("the folder holds no safetensors files", where=str(source))
    if target.exists():
        raise PlanError("there is something at this path already", where=str(target), hint="name another folder")
    if source.resolve() in target.resolve().parents:
        raise PlanError("the output would lie in the base's folder, all of which is copied", where=str(target),
                        hint="name a folder outside of it")  # fmt: skip
    merge = _Merge(from_peft(adapter), Path(adapter), {shard: _header(shard) for shard in shards})
    merge.prepare(_is_tied(source))
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        partial.mkdir(parents=True)
        for item in sorted(source.iterdir()):
            if item in merge.headers:
                merge.write(item, partial / item.name)
            elif item.is_dir():
                shutil.copytree(item, partial / item.name)
            elif item.is_file():
                shutil.copyfile(item, partial / item.name)
        rows = json.dumps(merge.ledger.to_json(), indent=2, ensure_ascii=False)
        (partial / "fxfreeze_ledger.json").write_text(rows + "\n")
        os.replace(partial, target)
    except OSError as error:
        raise PlanError(f"cannot write the folded checkpoint: {error.strerror or error}", where=str(target)) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return merge.ledger


@dataclass(frozen=True)
class _Header:
    """Of a safetensors file: its bytes up to the data, and where each tensor lies behind them."""

    raw: bytes
    entries: dict[str, dict[str, Any]]


def _header(file: Path) -> _Header:
    try:
        with open(file, "rb") as stream:
            raw = stream.read(8)
            raw += stream.read(int.from_bytes(raw, "little"))
        entries = {key: item for key, item in json.loads(raw[8:]).items() if key != "__metadata__"}
    except OSError as error:
        raise PlanError(f"cannot read the weights file: {error.strerror or error}", where=str(file)) from None
    except (ValueError, AttributeError, MemoryError, OverflowError) as error:
        raise PlanError(f"not a safetensors file: {error}", where=str(file)) from None
    return _Header(raw, dict(sorted(entries.items(), key=lambda item: item[1]["data_offsets"])))


def _is_tied(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "config.json").read_bytes()).get("tie_word_embeddings", False))
    except (OSError, ValueError, AttributeError):
        return False


@dataclass
class _Merge:
    """The steps of one adapter, and the tensors of the base that they change."""

    steps: tuple[Step, ...]
    adapter: Path
    headers: dict[Path, _Header]
    ledger: Ledger = field(default_factory=Ledger)
    edits: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    rows: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    seen: set[bool] = field(default_factory=set)

    def prepare(self, tied: bool) -> None:
        """Find out for every step which tensors it changes, and how, and that nothing of the adapter is left over."""
        shapes = {key: tuple(item["shape"]) for header in self.headers.values() for key, item in header.entries.items()}
        # Names are a plan's to give: a source tells the steps of one file apart by them.
        steps = [step.model_copy(update={"name": f"{step.kind}_{i}"}) for i, step in enumerate(self.steps)]
        steps.sort(key=lambda step: not isinstance(step, Replace))  # as in a plan: adapters change what is there then
        for step in steps:
            source = Source(step, steps)  # type: ignore[arg-type]
            if isinstance(step, Replace):
                self._replace(step, source, shapes)
                continue
            assert isinstance(step, DeltaStep)
            paths = _sites(step, source)
            # Square layers come last: by then the others have told how this base stores its weights.
            paths.sort(key=lambda path: len(set(shapes.get(f"{path}.weight", ()))) == 1)
            sites = {path: self._operator(step, path, shapes, source) for path in paths}
            shared = _shared(step, source, list(sites.values()))
            for path, operator in sites.items():
                if tied and path.rpartition(".")[2] in _TIED:
                    raise PlanError("the base ties this layer to another one, and stores one weight for both",
                                    where=path, hint="compile the model, or untie them first")  # fmt: skip
                if reason := misfit(step, operator):
                    raise PlanError(f"{type(step).__name__} cannot act here: it {reason}", where=path)
                self._adapt(step, source, path, operator, shared, shapes)
            source.finish()

    def _operator(self, step: DeltaStep, path: str, shapes: Mapping[str, Shape], source: Source) -> WeightOperator:
        """The layer at `path`, as far as its tensors tell what it is."""
        shape = shapes.get(f"{path}.weight")
        if shape is None:
            raise PlanError(
                f"the base holds no {path}.weight", where=str(self.adapter),
                hint="it is not the base that the adapter was trained on",
            )  # fmt: skip
        if len(shape) > 2 and max(shape[2:]) > 1:
            raise PlanError(
                "a checkpoint does not say how a convolution pads and dilates", where=path,
                hint="compile the model with fxfreeze.from_peft instead",
            )  # fmt: skip
        kind, canonical = "conv" if len(shape) > 2 else "linear", shape
        if any("embedding" in key for key in source.keys_at(path)):
            kind, canonical = "embedding", shape[::-1]
        elif len(shape) == 2 and self._is_flipped(step, path, shape, source):
            kind, canonical = "matmul", shape[::-1]
        bias: Any = object() if f"{path}.bias" in shapes else None
        return WeightOperator(None, kind, None, None, bias, 1, canonical)  # type: ignore[arg-type]

    def _is_flipped(self, step: DeltaStep, path: str, shape: Shape, source: Source) -> bool:
        """Whether the layer stores ``[in, out]``: told by its adapter's sizes, or, where it is square, by its like."""
        as_is, flipped = _fits(step, path, shape, source), _fits(step, path, shape[::-1], source)
        if as_is != flipped:
            self.seen.add(flipped)
            return flipped
        if len(self.seen) > 1:
            raise PlanError(
                "some layers of this base are stored transposed, and whether this one is its sizes do not tell",
                where=path, hint="compile the model with fxfreeze.from_peft instead",
            )  # fmt: skip
        config = json.loads((self.adapter / CONFIG).read_bytes())
        return next(iter(self.seen), bool(config.get("fan_in_fan_out")))

    def _adapt(
        self, step: DeltaStep, source: Source, path: str, operator: WeightOperator, shared: Mapping[str, Tensor],
        shapes: Mapping[str, Shape],
    ) -> None:  # fmt: skip
        empty = torch.empty(0)
        held = {item.leaf: source.value(path, item) for item in parameters(step, operator, empty)} | dict(shared)

        def weight(base: Tensor) -> Tensor:
            values = {leaf: lift(value) for leaf, value in held.items()}
            new, _ = changed(step, operator, apply(operator.to_canonical(), base), None, values)
            return apply(operator.from_canonical(), new)

        self._take(f"{path}.weight", weight, path, step)
        if f"{path}.bias" in shapes and (
            (isinstance(step, IA3) and step.side == "out") or getattr(step, "bias", False)
        ):
            self._take(f"{path}.bias", lambda base: changed_bias(step, base, held), path, step)

    def _replace(self, step: Replace, source: Source, shapes: Mapping[str, Shape]) -> None:
        for key, value in source.stored.items():
            place = parameter_key(key)
            if place is None or not any(fnmatchcase(place[0], glob) for glob in step.patterns):
                continue
            name, path = ".".join(place), place[0]
            if shapes.get(name) != tuple(value.shape):
                there = shapes.get(name)
                raise PlanError(f"{key} has shape {tuple(value.shape)}, but the base has {there or 'no such tensor'}",
                                where=str(self.adapter))  # fmt: skip
            self._take(name, lambda base, value=value: lift(value), path, step)  # type: ignore[misc]

    def _take(self, name: str, edit: Callable[[Tensor], Tensor], path: str, step: Step) -> None:
        before = self.edits.get(name)
        self.edits[name] = edit if before is None else lambda base: edit(before(base))
        words = "trained parameters" if isinstance(step, Replace) else describe(step)
        self.rows[name] = path, step.kind, words

    # ------------------------------------------------------------------ writing

    def write(self, file: Path, target: Path) -> None:
        """One shard, in the layout of the base's."""
        header = self.headers[file]
        with open(file, "rb") as source, open(target, "wb") as sink:
            sink.write(header.raw)
            for name, item in header.entries.items():
                start, end = item["data_offsets"]
                source.seek(len(header.raw) + start)
                if name in self.edits:
                    sink.write(self._changed(name, item, source.read(end - start)))
                else:
                    _copy(source, sink, end - start)
            sink.flush()
            os.fsync(sink.fileno())

    def _changed(self, name: str, item: Mapping[str, Any], data: bytes) -> memoryview:
        path, kind, words = self.rows[name]
        dtype = _DTYPES.get(item["dtype"])
        if dtype is None:
            raise PlanError(f"{name} is {item['dtype']}, and only floating weights can be folded into", where=path,
                            hint="fold before quantizing")  # fmt: skip
        base = torch.frombuffer(bytearray(data), dtype=dtype).reshape(item["shape"]).double()
        exact = self.edits[name](base).contiguous()
        rounded = exact.to(dtype)
        if not bool(torch.isfinite(rounded).all()):
            raise PassError(f"{name} overflows {item['dtype']}", where=path, hint="keep the base in a wider dtype")
        change = float(torch.linalg.vector_norm(exact - base))
        loss = float(torch.linalg.vector_norm(rounded.double() - exact)) / change if change else 0.0
        if loss > MAX_LOSS and kind != "replace" and change > 4 * torch.finfo(torch.float32).eps * float(base.norm()):
            raise PassError(
                f"{kind} cannot be folded into {item['dtype']}: {loss:.1%} of its change is lost "
                f"(limit {MAX_LOSS:.0%})",
                where=path, hint="convert the base to a wider dtype first",
            )  # fmt: skip
        self.ledger.add(site=path, step=kind, requested=words, outcome="rewritten", executes=f"{item['dtype']} {name}",
                        detail=f"{loss:.2%} of the change is lost")  # fmt: skip
        return memoryview(rounded.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]


def _copy(source: BinaryIO, sink: BinaryIO, left: int) -> None:
    while left and (chunk := source.read(min(left, _CHUNK))):
        sink.write(chunk)
        left -= len(chunk)


def _sites(step: Step, source: Source) -> list[str]:
    paths = dict.fromkeys(path for path, _ in source.adapters().values())
    return [path for path in paths if any(fnmatchcase(path, glob) for glob in step.patterns)]


def _fits(step: DeltaStep, path: str, canonical: Shape, source: Source) -> bool:
    """Whether the adapter at `path` has the sizes of a layer whose canonical weight has this shape."""
    layer = WeightOperator(None, "linear", None, None, None, 1, canonical)  # type: ignore[arg-type]
    held = {leaf: source.stored[key] for key, (site, leaf) in source.adapters().items() if site == path}
    return all(
        item.leaf in held and math.prod(item.shape) == held[item.leaf].numel() and len(held[item.leaf].shape) <= 2
        and (len(item.shape) == 1 or tuple(held[item.leaf].shape) == item.shape)
        for item in parameters(step, layer, torch.empty(0))
    )  # fmt: skip


def _shared(step: DeltaStep, source: Source, operators: list[WeightOperator]) -> dict[str, Tensor]:
    """VeRA's matrices for the layers `operators`."""
    if not isinstance(step, VeRA):
        return {}
    inner, out = max(item.in_features for item in operators), max(item.out_features for item in operators)
    stored = source.shared("vera_A", (step.rank, inner)), source.shared("vera_B", (out, step.rank))
    drawn = projections(step.rank, inner, out, step.seed)
    pairs = zip(("vera_A", "vera_B"), stored, drawn, strict=True)
    return {leaf: fresh if held is None else held for leaf, held, fresh in pairs}
