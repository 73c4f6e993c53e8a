"""Between a user's nested values and the flat tensor lists that a graph takes and returns.

A graph knows only flat lists: one name per tensor. A user's model takes dicts, lists and keywords, and returns dicts,
tuples, dataclasses. The names bridge the two: a dotted name is a path, and a numeric component is a list index, so
``"batch.ids"`` is ``batch["ids"]`` and ``"feats.0"`` is ``feats[0]``.

How outputs nest is kept as plain JSON (the manifest of an artifact holds it)::

    {"kind": "tensor", "index": 0}
    {"kind": "tuple" | "list", "items": [...]}
    {"kind": "dict", "items": {"logits": ...}}
    {"kind": "none"}

Dataclasses (and the outputs of transformers, which are mappings) come back as dicts by field name, named tuples as
tuples whose leaves are named by field. Only pure Python and torch here: torch.export traces these functions as part of
the capture wrapper, so what is not needed to move a tensor (suggestions, listings) happens only on error.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import ArtifactError, CaptureError, FxfreezeError
from .program import TensorSpec

_LISTED = 24  # leaves named in an error message; a 48-layer model returns hundreds
_DEPTH = 6  # how deep an opaque object (a cache, say) is searched for tensors, for an error message only


# ---------------------------------------------------------------------------------------------- inputs


def flatten_inputs(
    names: Sequence[str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    error: type[FxfreezeError] = ArtifactError,
) -> list[Tensor]:
    """Bind call arguments to the flat input ``names``; return the tensors in the order of ``names``.

    Positional arguments take the top-level names in the order in which the plan first mentions them; keyword arguments
    are top-level names, or full dotted names. A name with dots is looked up inside the value of its top-level name (a
    mapping, or a list or tuple for numeric components). Everything that was passed must be used, and used once: a
    missing, a doubled and an unknown value all raise ``error``.
    """
    tops = top_level(names)
    if len(args) > len(tops):
        raise error(f"{len(args)} positional inputs were passed, {len(tops)} are known: {_listing(tops)}")
    values: dict[str, Any] = dict(zip(tops, args, strict=False))
    direct: dict[str, Any] = {}
    for key, value in kwargs.items():
        if key in values:
            raise error(f"input {key!r} was passed twice, by position and by keyword")
        if key in tops:
            values[key] = value
        elif key in names:
            direct[key] = value
        else:
            raise error(f"unknown input {key!r}; the inputs are {_listing(names)}", hint=_nearest(key, names))
    tensors = [_lookup(name, values, direct, error) for name in names]
    for top, value in values.items():
        _refuse_unused(top, value, names, error)
    return tensors


def top_level(names: Sequence[str]) -> list[str]:
    """The first components of ``names``, each once, in order of first appearance."""
    return list(dict.fromkeys(name.split(".", 1)[0] for name in names))


def check_inputs(
    specs: Sequence[TensorSpec],
    dims: Mapping[str, tuple[int, int | None]],
    flat: Sequence[Tensor],
    *,
    error: type[FxfreezeError] = ArtifactError,
) -> None:
    """Hold the tensors of a call to what the plan declares of them; a compiled graph may not notice by itself.

    Raises:
        error: names the input, what was expected and what came.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for spec, value in zip(specs, flat, strict=True):
        shape = tuple(value.shape)
        if value.dtype != spec.dtype:
            raise error(f"input {spec.name!r} is {value.dtype}, expected {spec.dtype}")
        if value.device.type != spec.device.type or value.layout != torch.strided:
            found = value.device if value.layout == torch.strided else value.layout
            raise error(f"input {spec.name!r} is on {found}, expected a dense tensor on {spec.device}")
        if spec.select and value.device.type == "cpu" and value.numel():  # on a GPU it would make the host wait
            least, most = (int(item) for item in value.aminmax())
            if least < (spec.low or 0) or most > (spec.high or 0):
                raise error(f"input {spec.name!r} holds {least} to {most}, expected {spec.low} to {spec.high}")
        if len(shape) != len(spec.shape):
            raise error(f"input {spec.name!r} has shape {shape}, expected {format_shape(spec)}")
        for axis, (size, declared) in enumerate(zip(shape, spec.shape, strict=True)):
            where = f"input {spec.name!r} has shape {shape}, expected {format_shape(spec)}: axis {axis}"
            if isinstance(declared, int):
                if size != declared:
                    raise error(f"{where} is {size}")
                continue
            known, first = sizes.setdefault(declared, (size, spec.name))
            if size != known:
                raise error(f"{where} is {size}, but {declared!r} is {known} in {first!r}")
            low, high = dims.get(declared, (1, None))
            if size < low or (high is not None and size > high):
                raise error(f"{where} is {size}, but {declared!r} is {_bounds(low, high)}")


def format_shape(spec: TensorSpec) -> str:
    return "(" + ", ".join(map(str, spec.shape)) + ("," if len(spec.shape) == 1 else "") + ")"


def _bounds(low: int, high: int | None) -> str:
    return f"at least {low}" if high is None else f"between {low} and {high}"


def nest(names: Sequence[str], flat: Sequence[Any]) -> dict[str, Any]:
    """Turn dotted ``names`` and their values into nested dicts and lists: the inverse of :func:`flatten_inputs`.

    A level whose components are all numeric becomes a list and must be 0..n-1 without gaps. Raises CaptureError for a
    gap and for a name that is both a value and a container (``"a"`` beside ``"a.b"``).
    """
    root: dict[str, Any] = {}
    for name, value in zip(names, flat, strict=True):
        *path, last = name.split(".")
        level = root
        for part in path:
            level = level.setdefault(part, {})
            if not isinstance(level, dict):
                raise CaptureError(f"input {name!r}: {part!r} is already the name of a tensor")
        if last in level:
            raise CaptureError(f"input {name!r} is named twice, or is also the prefix of another input")
        level[last] = value
    return {key: _lists(value, key) for key, value in root.items()}


def _lists(value: Any, where: str) -> Any:
    """Replace every dict with numeric keys by a list. Leaves of ``nest`` are never dicts, so dicts are its levels."""
    if not isinstance(value, dict):
        return value
    items = {key: _lists(child, f"{where}.{key}") for key, child in value.items()}
    numeric = [key for key in items if key.isdigit()]
    if not numeric:
        return items
    if len(numeric) != len(items) or sorted(int(key) for key in numeric) != list(range(len(items))):
        raise CaptureError(
            f"input {where!r} has the components {_listing(list(items))}: neither a dict nor a list without gaps",
            hint="number the items of a list from 0, and give the items of a dict names that are not numbers",
        )
    return [items[key] for key in sorted(items, key=int)]


def _lookup(name: str, values: Mapping[str, Any], direct: Mapping[str, Any], error: type[FxfreezeError]) -> Tensor:
    """Find the tensor of one dotted name; ``direct`` holds values passed under their full dotted name."""
    top, *path = name.split(".")
    if name in direct:
        if top in values:
            raise error(f"input {name!r} was passed both on its own and inside {top!r}")
        value, here = direct[name], name
    elif top not in values:
        raise error(f"input {name!r} is missing")
    else:
        value, here = values[top], top
        for part in path:
            value, here = _item(value, part, here, name, error), f"{here}.{part}"
    if not isinstance(value, Tensor):
        raise error(f"input {name!r} must be a tensor, not {_type(value)}")
    return value


def _item(value: Any, part: str, here: str, name: str, error: type[FxfreezeError]) -> Any:
    if isinstance(value, Mapping):
        if part not in value:
            raise error(f"input {name!r} is missing: {here!r} has only {_listing([str(key) for key in value])}")
        return value[part]
    if isinstance(value, (list, tuple)) and part.isdigit():
        if int(part) >= len(value):
            raise error(f"input {name!r} is missing: {here!r} has only {len(value)} items")
        return value[int(part)]
    kind = "list" if part.isdigit() else "dict"
    raise error(f"input {here!r} must be a {kind} that holds {name!r}, not {_type(value)}")


def _refuse_unused(here: str, value: Any, names: Sequence[str], error: type[FxfreezeError]) -> None:
    """Raise for a value inside a dict or list that no input name asks for: dropping it would be silent."""
    if here in names:
        return
    if isinstance(value, Mapping):
        children = [(str(key), child) for key, child in value.items()]
    elif isinstance(value, (list, tuple)):
        children = [(str(index), child) for index, child in enumerate(value)]
    else:
        return
    for key, child in children:
        path = f"{here}.{key}"
        if path not in names and not any(name.startswith(path + ".") for name in names):
            known = [name for name in names if name.startswith(here + ".")]
            raise error(f"unknown input {path!r}; the inputs are {_listing(known)}", hint=_nearest(path, names))
        _refuse_unused(path, child, names, error)


# --------------------------------------------------------------------------------------------- outputs


def build(structure: Mapping[str, Any], flat: Sequence[Any]) -> Any:
    """Rebuild nested outputs from the flat list: ``structure`` is the JSON that :func:`describe` returns."""
    kind = structure["kind"]
    if kind == "tensor":
        return flat[structure["index"]]
    if kind == "none":
        return None
    if kind == "dict":
        return {key: build(item, flat) for key, item in structure["items"].items()}
    if kind in ("tuple", "list"):
        items = [build(item, flat) for item in structure["items"]]
        return tuple(items) if kind == "tuple" else items
    raise ArtifactError(f"unknown output structure {kind!r}")


def describe(output: Any) -> tuple[dict[str, Any], list[str], list[Tensor]]:
    """Describe a nested output as ``(structure, names, tensors)``, the last two flat and in the same order.

    A lone tensor is named "output", the items of a top-level tuple or list "output_0", "output_1"; everything below is
    dotted ("logits", "hidden_states.0"). A tensor that occurs twice is listed twice. A leaf that is neither a tensor
    nor None raises CaptureError with its path, its type and the names that ``Plan(outputs=[...])`` could keep.
    """
    names: list[str] = []
    tensors: list[Tensor] = []
    structure = _describe(output, "", names, tensors, output)
    if not tensors:
        raise CaptureError(f"the model returns no tensor, only {_type(output)}")
    for name in names:
        if names.count(name) > 1:
            raise CaptureError(f"two outputs would both be named {name!r}; rename a key of the returned dict")
    return structure, names, tensors


def _describe(value: Any, path: str, names: list[str], tensors: list[Tensor], root: Any) -> dict[str, Any]:
    if isinstance(value, Tensor):
        names.append(path or "output")
        tensors.append(value)
        return {"kind": "tensor", "index": len(tensors) - 1}
    if value is None:
        return {"kind": "none"}
    children = _children(value, path)
    if children is None:
        leaves = [name for name, _ in _leaves(root)]
        raise CaptureError(
            f"output {path or 'output'!r} is {_type(value)}, not a tensor",
            hint=f"keep only tensors with Plan(outputs=[...]); these could be asked for: {_listing(leaves)}",
        )
    described = [(key, _describe(child, child_path, names, tensors, root)) for key, child_path, child in children]
    if isinstance(value, (tuple, list)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {"kind": kind, "items": [item for _, item in described]}
    return {"kind": "dict", "items": dict(described)}


def _children(value: Any, path: str) -> list[tuple[str, str, Any]] | None:
    """(key, dotted path, child) of a container, in its own order; None for a leaf."""
    if isinstance(value, (tuple, list)):
        keys = list(getattr(value, "_fields", ())) or [str(index) for index in range(len(value))]
        named = [f"{path}.{key}" if path else (f"output_{key}" if key.isdigit() else key) for key in keys]
        return list(zip(keys, named, value, strict=True))
    if isinstance(value, Mapping):  # before dataclasses: the outputs of transformers are both, and hide absent fields
        if not all(isinstance(key, str) for key in value):
            return None
        pairs = [(key, value[key]) for key in value]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    else:
        return None
    return [(key, f"{path}.{key}" if path else key, child) for key, child in pairs]


def select(output: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """Pick tensors of a nested output by dotted name: dict keys, list and tuple indexes, then attributes.

    Accepts every name that :func:`describe` gives, and also reaches into objects it refuses
    ("past_key_values.layers.0.keys"). A name of a container stands for all tensors in it ("hidden_states" gives
    "hidden_states.0", …). Raises CaptureError for a name that leads nowhere or to something that is no tensor.
    """
    selected: dict[str, Tensor] = {}
    for name in names:
        value = _descend(output, name.split("."), top=True)
        if isinstance(value, Tensor):
            selected[name] = value
            continue
        leaves = _container_leaves(value, name)
        if not leaves:
            known = [leaf for leaf, _ in _leaves(output)]
            what = "is not there" if value is _MISSING else f"is {_type(value)}, not a tensor"
            raise CaptureError(
                f"output {name!r} {what}",
                where="Plan.outputs",
                hint=_nearest(name, known) or f"the tensors of the output are {_listing(known)}",
            )
        selected.update(leaves)
    return selected


_MISSING = object()


def _descend(value: Any, path: list[str], *, top: bool = False) -> Any:
    """Follow ``path`` from ``value``; _MISSING where it ends early. Keys with dots in them are tried first."""
    if not path:
        return value
    if top and isinstance(value, Tensor):
        return value if path == ["output"] else _MISSING
    if isinstance(value, Mapping):
        for length in range(len(path), 0, -1):
            key = ".".join(path[:length])
            if key in value:
                return _descend(value[key], path[length:])
    part, rest = path[0], path[1:]
    if isinstance(value, (list, tuple)):
        index = part.removeprefix("output_") if top else part
        if index.isdigit():
            return _descend(value[int(index)], rest) if int(index) < len(value) else _MISSING
    if hasattr(value, part):
        return _descend(getattr(value, part), rest)
    return _MISSING


def _container_leaves(value: Any, name: str) -> dict[str, Tensor]:
    """The tensors of a container by full name; empty if it holds anything else, or is no container."""
    leaves: dict[str, Tensor] = {}
    pending = [(name, value)]
    while pending:
        path, item = pending.pop(0)
        if isinstance(item, Tensor):
            leaves[path] = item
        elif item is not None:
            children = _children(item, path)
            if children is None:
                return {}
            pending = [(child_path, child) for _, child_path, child in children] + pending
    return leaves


def _leaves(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that :func:`select` can reach, opaque objects searched by their attributes. For messages only."""
    if isinstance(value, Tensor):
        yield path or "output", value
        return
    children = _children(value, path)
    if children is None and depth < _DEPTH and hasattr(value, "__dict__") and not isinstance(value, torch.nn.Module):
        prefix = f"{path}." if path else ""
        children = [(key, prefix + key, child) for key, child in vars(value).items() if not key.startswith("_")]
    for _, child_path, child in children or ():
        yield from _leaves(child, child_path, depth + 1)


# -------------------------------------------------------------------------------------------- messages


def _type(value: Any) -> str:
    cls = type(value)
    return cls.__name__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__name__}"


def _listing(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_LISTED])
    return (shown or "none") + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def _nearest(name: str, known: Sequence[str]) -> str | None:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(repr(match) for match in close)}?" if close else None
