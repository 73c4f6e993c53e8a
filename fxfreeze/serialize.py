"""Program ⇄ ``program.json`` + ``weights.safetensors``: plain data both ways, nothing is pickled or evaluated.

The JSON holds the graph node by node. An operator is its name (``aten.conv2d.default``); a Python function on sizes is
looked up in a fixed table. Whatever JSON cannot say itself is an object with one key: ``{"node": "x"}``,
``{"dtype": "float32"}``, ``{"float": "inf"}``, ``{"tuple": [...]}``, ``{"memory_format": "channels_last"}`` and so on.
Of a node's metadata only what errors and reports need is kept: module stack, plan step, and ``file:line``. Shapes and
dtypes are not written; they are computed again on load, under fake tensors with the dims of the inputs symbolic.

safetensors stores neither strides nor tensors that share memory. A constant is therefore a (dtype, shape, stride,
offset) view of a stored tensor, and constants that overlap in memory are stored once, as the range of memory they
touch, and share memory again after loading. dtypes safetensors has no name for are stored as bytes. Where that is less,
a tensor is stored as the elements that are not 0, and bits that say where they were (see zeros.py).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.fx import Graph, Node

from .constants import Constants
from .errors import ArtifactError
from .program import SYMBOLIC_FUNCTIONS, Origin, Program, TensorSpec, first_line, is_mutating
from .sampling import concrete_shape, tracing_sizes
from .zeros import with_zeros, without_zeros

FORMAT = 2
"""Version of the layout of ``program.json``; a newer one is refused. 2 has tensors without their zeros, and is written
only where there is one."""

GRAPH_FILE, WEIGHTS_FILE = "program.json", "weights.safetensors"


# ------------------------------------------------------------------------------------------- functions


def _function_table() -> dict[str, Callable[..., Any]]:
    table: dict[str, Callable[..., Any]] = {}
    for function in SYMBOLIC_FUNCTIONS:
        home = "operator" if function.__module__ in ("operator", "_operator") else "torch"
        table[f"{home}.{function.__name__}"] = function
    for name in ("ceil", "floor", "sqrt", "trunc", "log2", "exp", "pow", "log"):
        table[f"math.{name}"] = getattr(math, name)
    # truediv and mod of sizes: torch.fx writes its own versions when a size meets a float.
    from torch.fx.experimental import sym_node

    for name in ("sym_sqrt", "sym_float", "sym_ite", "floor_impl", "ceil_impl", "round_impl"):
        if function := getattr(sym_node, name, None):
            table[f"torch.fx.experimental.sym_node.{name}"] = function
    return table


FUNCTIONS: Mapping[str, Callable[..., Any]] = _function_table()
"""Python functions on sizes that a stored graph may call. Nothing else is ever looked up by name."""

_FUNCTION_NAMES = {function: name for name, function in FUNCTIONS.items()}

_DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_LAYOUTS = {"strided": torch.strided, "sparse_coo": torch.sparse_coo}
_MEMORY_FORMATS = {
    str(value).removeprefix("torch."): value
    for value in (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
}


def operator_name(target: Any) -> str:
    """``aten.conv2d.default`` for an operator, ``operator.getitem`` for a function on sizes.

    Raises:
        ArtifactError: `target` is neither; a higher-order operator (``torch.cond``) holds graphs and cannot be stored.
    """
    if isinstance(target, torch._ops.OpOverload):
        return f"{target._schema.name.replace('::', '.')}.{target._overloadname}"
    if name := _FUNCTION_NAMES.get(target):
        return name
    if isinstance(target, torch._ops.HigherOrderOperator):
        raise ArtifactError(
            f"{target} holds graphs of its own and cannot be stored",
            hint="compile its branches one by one, or replace it by torch.where",
        )
    raise ArtifactError(f"{target} is no operator and cannot be stored")


def resolve_operator(name: str) -> Callable[..., Any]:
    """The operator or function on sizes of that name.

    Raises:
        ArtifactError: nothing of that name is registered; says which library to import.
    """
    if function := FUNCTIONS.get(name):
        return function
    namespace, _, rest = name.partition(".")
    base, _, overload = rest.rpartition(".")
    if namespace == "fxfreeze":
        from .kernels import _op

        _ = _op.OPS  # registers ours
    packet = getattr(getattr(torch.ops, namespace), base, None) if namespace.isidentifier() and base else None
    target = getattr(packet, overload, None)
    # torch.ops also has plain methods, such as load_library: only registered operators count.
    if isinstance(target, torch._ops.OpOverload):
        return target
    library = "torch" if namespace in ("aten", "prims", "prim") else namespace
    hint = f"the graph was stored by another version of torch ({torch.__version__} is installed)"
    if library != "torch":
        hint = f"import the package that registers the {namespace!r} operators first (`import {library}`?)"
    raise ArtifactError(f"operator {name!r} is not known here", hint=hint)


# ------------------------------------------------------------------------------------------- arguments


def encode(value: Any) -> Any:
    """An argument of a node as JSON; see the module docstring.

    Raises:
        ArtifactError: for a value no frozen graph may hold (a tensor, a generator, a symbolic size …).
    """
    if value is None or isinstance(value, bool | str) or type(value) is int:
        return value
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, complex):
        return {"complex": [encode(value.real), encode(value.imag)]}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, slice):
        return {"slice": [encode(value.start), encode(value.stop), encode(value.step)]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: encode(item) for key, item in value.items()}}
    for kind, types in (("dtype", torch.dtype), ("layout", torch.layout), ("memory_format", torch.memory_format)):
        if isinstance(value, types):
            return {kind: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    raise ArtifactError(f"a {type(value).__module__}.{type(value).__qualname__} in the graph cannot be stored")


def decode(value: Any, nodes: Mapping[str, Node]) -> Any:
    """The inverse of :func:`encode`.

    Raises:
        ArtifactError: malformed, or names a node that does not come before.
    """
    if isinstance(value, list):
        return [decode(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise ArtifactError(f"malformed argument {value!r}")
    ((kind, item),) = value.items()
    try:
        return _DECODERS[kind](item, nodes)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"malformed argument {value!r}") from error


_DECODERS: dict[str, Callable[[Any, Mapping[str, Node]], Any]] = {
    "node": lambda item, nodes: nodes[item],
    "float": lambda item, nodes: {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[item],
    "complex": lambda item, nodes: complex(decode(item[0], nodes), decode(item[1], nodes)),
    "tuple": lambda item, nodes: tuple(decode(part, nodes) for part in item),
    "slice": lambda item, nodes: slice(*(decode(part, nodes) for part in item)),
    "dict": lambda item, nodes: {key: decode(part, nodes) for key, part in item.items()},
    "dtype": lambda item, nodes: _DTYPES[item],
    "layout": lambda item, nodes: _LAYOUTS[item],
    "memory_format": lambda item, nodes: _MEMORY_FORMATS[item],
    "device": lambda item, nodes: torch.device(item),
}


# ------------------------------------------------------------------------------------------- interface


@dataclass(frozen=True)
class Interface:
    """How a program is called, apart from what it computes: its inputs, outputs, nesting and symbolic dims."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    structure: Mapping[str, Any]
    dims: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)

    @classmethod
    def of(cls, program: Program) -> Interface:
        return cls(tuple(program.inputs), tuple(program.outputs), program.structure, dict(program.dims))

    def to_json(self) -> dict[str, Any]:
        return {
            "inputs": [_encode_spec(spec) for spec in self.inputs],
            "outputs": list(self.outputs),
            "structure": self.structure,
            "dims": {name: list(bounds) for name, bounds in self.dims.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Interface:
        """Raises ArtifactError when `data` is not what :meth:`to_json` writes."""
        try:
            return cls(
                tuple(_decode_spec(spec) for spec in data["inputs"]),
                tuple(data["outputs"]),
                data["structure"],
                {name: (int(low), None if high is None else int(high)) for name, (low, high) in data["dims"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ArtifactError(f"the description of inputs and outputs is malformed: {error!r}") from error


def _encode_spec(spec: TensorSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "dtype": str(spec.dtype).removeprefix("torch."),
        "shape": list(spec.shape),
        "low": spec.low,
        "high": spec.high,
        "device": str(spec.device),
        **({"select": True} if spec.select else {}),
    }


def _decode_spec(data: Mapping[str, Any]) -> TensorSpec:
    dtype, device = _DTYPES[data["dtype"]], torch.device(data["device"])
    select = bool(data.get("select", False))
    return TensorSpec(data["name"], dtype, tuple(data["shape"]), data["low"], data["high"], device, select)


# ----------------------------------------------------------------------------------------------- graph


def save_program(program: Program, folder: Path) -> list[str]:
    """Write ``program.json`` and ``weights.safetensors`` into `folder`; return the two names.

    Constants are written in their storage dtypes. Raises ArtifactError for what cannot be stored, naming the node's
    module path; nothing is written then.
    """
    document: dict[str, Any] = {"format": 1, **Interface.of(program).to_json()}
    stacks: dict[tuple[tuple[str, str], ...], int] = {}
    document["nodes"] = [_encode_node(program, node, stacks) for node in program.graph.nodes]
    document["stacks"] = [[list(level) for level in stack] for stack in stacks]
    document["constants"], stored = pack(_storage_state(program))
    if masked := {record["data"]: record for record in document["constants"].values() if "mask" in record}:
        document["format"] = FORMAT
        document["dense_bytes"] = _dense_bytes(masked, stored)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(stored, str(folder / WEIGHTS_FILE))
    (folder / GRAPH_FILE).write_text(json.dumps(document, allow_nan=False, separators=(",", ":")) + "\n")
    return [GRAPH_FILE, WEIGHTS_FILE]


def _encode_node(program: Program, node: Node, stacks: dict[tuple[tuple[str, str], ...], int]) -> dict[str, Any]:
    record: dict[str, Any] = {"op": node.op, "name": node.name}
    if node.op == "get_attr":
        record["target"] = str(node.target)
    elif node.op in ("call_function", "output"):
        try:
            if node.op == "call_function":
                record["target"] = operator_name(node.target)
            record["args"] = [encode(arg) for arg in node.args]
            record["kwargs"] = {key: encode(value) for key, value in node.kwargs.items()}
        except ArtifactError as error:
            where, line = program.module_path(node) or node.name, program.source_line(node)
            raise ArtifactError(error.what, where=where, line=line, hint=error.hint) from error
    if stack := tuple((path, kind) for path, kind in (node.meta.get("nn_module_stack") or {}).values()):
        record["stack"] = stacks.setdefault(stack, len(stacks))
    if line := program.source_line(node):
        record["line"] = line
    if isinstance(origin := node.meta.get("fxfreeze"), Origin):
        record["origin"] = [origin.step, origin.primitive, origin.site]
    return {key: value for key, value in record.items() if value != {} and value != []}


def load_program(folder: Path, *, shapes: bool = True) -> Program:
    """Read what :func:`save_program` wrote.

    Args:
        folder: holds the two files.
        shapes: compute every node's ``meta["val"]``, about as long as one run on fake tensors. Without it only
            constants have one, which is enough to run the program and to make its graph module.

    Raises:
        ArtifactError: a file is missing, malformed or newer, or an operator is unknown here.
    """
    document = _read_json(folder / GRAPH_FILE)
    try:
        interface = Interface.from_json(document)
        state = unpack(document["constants"], _read_weights(folder / WEIGHTS_FILE))
        graph = _decode_graph(document)
    except ArtifactError as error:
        raise ArtifactError(error.what, where=error.where or GRAPH_FILE, hint=error.hint) from error
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ArtifactError(f"the stored program is malformed: {error!r}", where=GRAPH_FILE) from error
    structure = dict(interface.structure)
    program = Program(graph, Constants(state), interface.inputs, interface.outputs, structure, dict(interface.dims))
    _infer(program, calls=shapes)
    return program


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot be read: {error}", where=path.name) from error
    if not isinstance(document, dict) or not isinstance(document.get("format"), int):
        raise ArtifactError("this is not a stored program", where=path.name)
    if document["format"] > FORMAT:
        raise ArtifactError(
            f"format {document['format']} is newer than this fxfreeze reads ({FORMAT})",
            where=path.name, hint="upgrade fxfreeze",
        )  # fmt: skip
    return document


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(str(path))
    except (OSError, safetensors.SafetensorError) as error:
        raise ArtifactError(f"cannot be read: {error}", where=path.name) from error


def _decode_graph(document: Mapping[str, Any]) -> Graph:
    graph = Graph()
    nodes: dict[str, Node] = {}
    stacks = [{str(level): (path, kind) for level, (path, kind) in enumerate(stack)} for stack in document["stacks"]]
    for record in document["nodes"]:
        op, name = record["op"], record["name"]
        args = tuple(decode(arg, nodes) for arg in record.get("args", ()))
        kwargs = {key: decode(value, nodes) for key, value in record.get("kwargs", {}).items()}
        target: Any = name
        if op == "call_function":
            target = resolve_operator(record["target"])
            if is_mutating(target):
                raise ArtifactError(f"operator {record['target']!r} writes to an operand; a Program is functional")
        elif op == "get_attr":
            target = record["target"]
            if target not in document["constants"]:
                raise ArtifactError(f"constant {target!r} is missing", where=WEIGHTS_FILE)
        elif op not in ("placeholder", "output"):
            raise ArtifactError(f"a node of kind {op!r} has no place in a Program")
        if name in nodes:
            raise ArtifactError(f"two nodes are named {name!r}")
        node = nodes[name] = graph.create_node(op, target, args, kwargs, name=name)
        node.meta["nn_module_stack"] = dict(stacks[record["stack"]]) if "stack" in record else {}
        if "line" in record:
            file, _, number = record["line"].rpartition(":")
            node.meta["stack_trace"] = f'File "{file}", line {number}, in forward'
        if "origin" in record:
            node.meta["fxfreeze"] = Origin(*record["origin"])
    graph.lint()
    return graph


def _infer(program: Program, *, calls: bool) -> None:
    """Compute ``meta["val"]``: the named dims of the inputs are symbols, and equal names are equal symbols."""
    from torch._dynamo.source import ConstantSource
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    sizes = tracing_sizes(program.inputs, program.dims, None)  # a size of its own per dim: DUCK tells dims by size
    for spec, node in zip(program.inputs, program.placeholders, strict=True):
        kinds = [DimDynamic.DUCK if isinstance(size, str) else DimDynamic.STATIC for size in spec.shape]
        example = torch.empty(concrete_shape(spec, sizes), dtype=spec.dtype, device=spec.device)
        context: Any = StatelessSymbolicContext(dynamic_sizes=kinds)
        node.meta["val"] = mode.from_tensor(example, source=ConstantSource(node.name), symbolic_context=context)
    for node in program.graph.nodes:
        if node.op == "get_attr":
            node.meta["val"] = mode.from_tensor(program.state[str(node.target)], static_shapes=True)
        elif node.op == "call_function" and calls:
            try:
                program.infer(node)
            except Exception as error:
                raise ArtifactError(
                    f"the stored graph does not run: {operator_name(node.target)}: {first_line(error)}",
                    where=program.module_path(node) or node.name, line=program.source_line(node),
                ) from error  # fmt: skip


# ------------------------------------------------------------------------------------------- constants

_NATIVE = frozenset(
    {
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
    }
)  # fmt: skip
"""dtypes every safetensors version can name; anything else (complex, float8, uint16 …) is stored as bytes."""


def _storage_state(program: Program) -> dict[str, Tensor]:
    """Constants by name in their storage dtypes. A tensor under two names is converted once, so that it stays one."""
    state: dict[str, Tensor] = {}
    converted: dict[tuple[int, torch.dtype], Tensor] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr" and (name := str(node.target)) not in state:
            value, dtype = program.state[name], node.meta["val"].dtype
            if value.layout != torch.strided or value.is_quantized:
                raise ArtifactError(f"a {value.layout} constant cannot be stored", where=name)
            key = (id(program.state.held(name)), dtype)
            if key not in converted:
                converted[key] = value.detach().to(dtype).resolve_conj().resolve_neg()
            state[name] = converted[key]
    return state


def pack(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Describe tensors as views of stored ones: ``(records by name, tensors to store)``.

    A contiguous tensor that shares no memory is stored as it is, under its own name. Tensors that share memory are
    stored as the flat range of memory they touch, when that is no larger than storing each on its own. What is stored
    goes without its zeros where that is less.
    """
    records: dict[str, Any] = {}
    stored: dict[str, Tensor] = {}
    taken = set(state)

    def keep(key: str, tensor: Tensor) -> dict[str, Any]:
        """Store a contiguous tensor; what its records need beside the key."""
        if (packed := without_zeros(tensor.detach().cpu())) is None:
            stored[key] = _plain(tensor)
            return {}
        mask = next(name for count in itertools.count() if (name := f"{key}#nonzero{'+' * count}") not in taken)
        taken.add(mask)
        stored[key], stored[mask] = _plain(packed[0]), packed[1]
        return {"mask": mask, "length": tensor.numel()}

    for names in _overlapping(state):
        first, tensors = names[0], [state[name] for name in names]
        low = min(_span(tensor)[0] for tensor in tensors)
        high = max(_span(tensor)[1] for tensor in tensors)
        same_dtype = len({tensor.dtype for tensor in tensors}) == 1
        if len(names) == 1 and tensors[0].is_contiguous():
            more = keep(first, tensors[0])
            records[first] = _record(tensors[0], first) | more
        elif same_dtype and high - low <= sum(tensor.numel() for tensor in tensors) * tensors[0].itemsize:
            size = tensors[0].itemsize
            span = torch.as_strided(tensors[0], ((high - low) // size,), (1,), low // size)
            more = keep(first, span.clone())
            for name, tensor in zip(names, tensors, strict=True):
                records[name] = _record(tensor, first, int(tensor.storage_offset()) - low // size) | more
        else:
            for name, tensor in zip(names, tensors, strict=True):
                more = keep(name, tensor.contiguous().clone())
                records[name] = _record(tensor.contiguous(), name) | more
    return records, stored


def unpack(records: Mapping[str, Any], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`pack`.

    Raises:
        ArtifactError: a record points outside its stored tensor, or at none, or a mask is not that of its elements.
    """
    state: dict[str, Tensor] = {}
    moved: dict[tuple[Any, ...], Tensor] = {}
    for name, record in records.items():
        mask = record.get("mask")
        if not {record["data"], mask or record["data"]} <= stored.keys():
            raise ArtifactError(f"constant {name!r} is missing", where=WEIGHTS_FILE)
        key = (record["data"], record["dtype"], record.get("device", "cpu"), mask, record.get("length"))
        if key not in moved:
            values = _typed(stored[key[0]], _DTYPES[key[1]]).reshape(-1)
            if mask is not None:
                try:
                    values = with_zeros(values, stored[mask], int(record["length"]))
                except ValueError as error:
                    raise ArtifactError(f"constant {name!r} has a wrong mask: {error}", where=WEIGHTS_FILE) from error
            moved[key] = _on(key[2], values)
        base, shape = moved[key], [int(size) for size in record["shape"]]
        stride, offset = record.get("stride") or _contiguous(shape), int(record.get("offset", 0))
        if len(stride) != len(shape) or min([offset, *shape, *stride]) < 0 or _reach(shape, stride, offset) > len(base):
            raise ArtifactError(f"constant {name!r} does not fit its data", where=WEIGHTS_FILE)
        whole = "stride" not in record and math.prod(shape) == len(base)
        state[name] = (
            base.view(shape) if whole else torch.as_strided(base, shape, stride, offset + int(base.storage_offset()))
        )
    return state


def dense_bytes(folder: Path) -> int | None:
    """What the tensors of a folder that :func:`save_program` wrote would take with all their zeros; None: as they do.

    Raises:
        ArtifactError: the file is missing or malformed.
    """
    found = _read_json(folder / GRAPH_FILE).get("dense_bytes")
    return None if found is None else int(found)


def _dense_bytes(masked: Mapping[str, Any], stored: Mapping[str, Tensor]) -> int:
    """`masked`: key of elements → a record that has a mask for them."""
    spared = {record["mask"] for record in masked.values()} | masked.keys()
    whole = sum(int(record["length"]) * _DTYPES[record["dtype"]].itemsize for record in masked.values())
    return whole + sum(value.nbytes for key, value in stored.items() if key not in spared)


def _overlapping(state: Mapping[str, Tensor]) -> list[list[str]]:
    """Names grouped by the memory they touch, groups and names in order of first appearance."""
    by_storage: dict[tuple[str, int], list[str]] = {}
    for name, tensor in state.items():
        pointer = tensor.untyped_storage().data_ptr() if tensor.numel() else 0
        key = (str(tensor.device), pointer) if pointer else (name, 0)
        by_storage.setdefault(key, []).append(name)
    groups: list[list[str]] = []
    for names in by_storage.values():
        end = None
        for name in sorted(names, key=lambda item: _span(state[item])):
            low, high = _span(state[name])
            if end is None or low >= end:
                groups.append([])
            groups[-1].append(name)
            end = high if end is None else max(end, high)
    order = {name: position for position, name in enumerate(state)}
    return sorted((sorted(group, key=order.__getitem__) for group in groups), key=lambda group: order[group[0]])


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte, and the byte after the last, that `tensor` touches in its storage."""
    offset = int(tensor.storage_offset())
    return offset * tensor.itemsize, _reach(tensor.shape, tensor.stride(), offset) * tensor.itemsize


def _reach(shape: Sequence[int], stride: Sequence[int], offset: int) -> int:
    """The element after the last one that a tensor so laid out touches."""
    if not math.prod(shape):
        return offset
    return offset + 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _record(tensor: Tensor, key: str, offset: int = 0) -> dict[str, Any]:
    record: dict[str, Any] = {
        "data": key, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape),
    }  # fmt: skip
    if not tensor.is_contiguous():
        record["stride"] = list(tensor.stride())
    if offset:
        record["offset"] = offset
    if tensor.device.type != "cpu":
        record["device"] = str(tensor.device)
    return record


def _contiguous(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _plain(tensor: Tensor) -> Tensor:
    """`tensor` as safetensors takes it: on the CPU, contiguous, a dtype it knows."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype in _NATIVE:
        return tensor
    # Up to one element may have any stride; a view of other element size wants 1.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _on(device: str, tensor: Tensor) -> Tensor:
    try:
        return tensor.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise ArtifactError(f"the weights belong on {device!r}, which is not available here") from error


def _typed(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`_plain`, flat when the data was bytes."""
    if stored.dtype == dtype:
        return stored
    if stored.dtype != torch.uint8 or dtype in _NATIVE:
        raise ArtifactError(f"{stored.dtype} data where {dtype} was stored", where=WEIGHTS_FILE)
    # A stored tensor may start at any byte of the file; a wider dtype needs its own alignment.
    return stored.clone().view(dtype)
