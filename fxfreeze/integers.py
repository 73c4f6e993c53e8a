"""int8 on CPUs, in torch.compile and in AOTInductor: arithmetic in integers, by oneDNN's kernels.

Inductor knows those kernels (``onednn::qconv_pointwise``, ``onednn::qlinear_pointwise``). What finds them in a graph
are patterns that start from the operators ``quantized_decomposed::*``; newer versions of torch leave them to torchao.
Our operators become those here, with scales that are numbers. Where no pattern fits, the graph still computes the
same, in floats: hence the code that was generated is counted, and not the graph (:func:`count_calls`).

Tversky heads have an operator of their own, ``fxfreeze::tversky_integer``, which has no form in floats.
"""

from __future__ import annotations

import functools
import importlib
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .cpu import SAFE_WEIGHT
from .errors import MissingDependencyError
from .exporting import quiet
from .inductor import prepare
from .kernels.dequantize import KERNEL as DEQUANTIZE
from .kernels.quantize import KERNEL as QUANTIZE
from .kernels.tversky_integer import KERNEL as HEAD
from .postops import take_post_ops, with_post_ops
from .program import Program, integer_layers, on_cpu

_HOMES = ("torch._inductor.fx_passes.quantization", "torchao.quantization.pt2e.inductor_passes.x86")
_REGISTER = "_register_quantization_weight_pack_pass"
OPERATORS = (QUANTIZE.op, DEQUANTIZE.op)
_CLONE = torch.ops.aten.clone.default
CALL = re.compile(r"aoti_torch_cpu__(qconv|qlinear)\w*\(")
HEAD_CALL = re.compile(rf"AOTI_TORCH_ERROR_CODE_CHECK\(aoti_torch_cpu_{HEAD.name}_native\(")


def has_integers(program: Program) -> bool:
    """Whether `program` quantizes activations, on a CPU."""
    return on_cpu(program.inputs) and any(node.target is QUANTIZE.op for node in program.graph.nodes)


def computed(program: Program) -> Program:
    """What these targets compute of `program`: on a CPU they round less often than it says; see :mod:`.postops`."""
    return with_post_ops(program) if has_integers(program) else program


def with_integers(program: Program) -> Program:
    """A copy of what is :func:`computed`; what is quantized per tensor, or by constants per channel, is so by torch's
    operators.

    Raises:
        MissingDependencyError: torchao is not installed, and there are layers for its patterns.
    """
    importlib.import_module("torch.ao.quantization.fx._decomposed")  # defines the operators
    if any(node.target is DEQUANTIZE.op for node in program.graph.nodes):
        _register_patterns()
    program = program.clone()
    take_post_ops(program)  # as in what is computed, without a copy more
    prepare(program)
    for node in list(program.graph.nodes):
        if node.target is QUANTIZE.op and node.args[0].meta["val"].dim() > 2 and _multiplied(node):
            # Of other strides torch makes a bmm, and the pattern for that one fails for symbolic sizes.
            dense = program.call(_CLONE, node.args[0], memory_format=torch.contiguous_format, before=node, like=node)
            node.replace_input_with(node.args[0], dense)
        target, args = _replacement(program, node)
        if target is not None:
            program.replace(node, program.call(target, *args, before=node, like=node))
    program.sweep()
    return program


def executed(
    program: Program, calls: int, weights: Mapping[Node, str] = MappingProxyType({}), heads: int | None = None
) -> dict[str, Any]:
    """The fact ``integer``: for every quantized layer its site, its step, and what runs it, or None for floats.

    Args:
        calls: of integer kernels, in the code that was generated for `program`. It does not say for which layers: are
            there fewer than layers that read integers, none of these counts as executed.
        weights: layers of which the weight alone is read as integers, and what does that; see :mod:`fxfreeze.packed`.
        heads: the same of Tversky heads' kernel; None: the operator is called as it stands in the graph.
    """
    layers = integer_layers(program)
    # Of a product of two computed values Inductor makes no integer kernel.
    reading = {node for node in layers if calls and not layers[node].product and _reads_grid(program, node)}
    similarities = set(filter(is_head, layers))
    ran = {**weights, **(dict.fromkeys(reading, "oneDNN") if calls == len(reading) else {})}
    if heads is None or heads == len(similarities):
        ran |= dict.fromkeys(similarities, HEAD.name)
    return {"integer": [row for node, site in layers.items() for row in site.ran(ran.get(node))]} if layers else {}


def wide_products(program: Program) -> bool:
    """Whether a layer on a CPU multiplies bytes with weights that ask for sums in 32 bits; see :mod:`fxfreeze.cpu`."""
    return on_cpu(program.inputs) and any(_is_wide(program, layer) for layer in integer_layers(program))


def _is_wide(program: Program, layer: Node) -> bool:
    sources = [value.args[0] for value in layer.all_input_nodes if value.target is DEQUANTIZE.op]
    held = [program.state.tensor(str(node.target)) for node in sources if node.op == "get_attr"]  # type: ignore[union-attr]
    return len(held) < len(sources) and any(_largest(value) > SAFE_WEIGHT for value in held)


def _largest(value: Tensor) -> int:
    low, high = value.aminmax()
    return max(-int(low), int(high))


def is_head(node: Node) -> bool:
    """Whether `node` is a Tversky head on integers."""
    return node.target is HEAD.op


def _multiplied(quantize: Node) -> bool:
    """Whether what is quantized goes into a linear layer."""
    return any(reader.target is torch.ops.aten.linear.default for floats in quantize.users for reader in floats.users)


def _reads_grid(program: Program, layer: Node) -> bool:
    """Whether the layer reads integers of an activation, on a grid of constants or one that the call computes."""
    for value in layer.all_input_nodes:
        source = value.args[0] if value.target is DEQUANTIZE.op else None
        if isinstance(source, Node) and source.target is QUANTIZE.op:
            return _replacement(program, source)[0] is not None
    return False


def count_lowered() -> int:
    """How many integer kernels Inductor has put into code so far, in this process."""
    from torch._dynamo.utils import counters

    found = counters["inductor"]
    return sum(found[name] for name in list(found) if re.match(r"q(conv|linear).*_lower_count$", name))


def count_calls(package: Path, *calls: re.Pattern[str]) -> list[int]:
    """How many calls that each pattern finds the C++ in an AOTInductor package makes."""
    with zipfile.ZipFile(package) as archive:
        sources = [archive.read(name).decode(errors="replace") for name in archive.namelist() if name.endswith(".cpp")]
    # A declaration has a type in front; a call stands within the macro that checks its result.
    return [sum(len(pattern.findall(source)) for source in sources) for pattern in calls]


def _replacement(program: Program, node: Node) -> tuple[Any, tuple[Any, ...]]:
    """The operator to call instead, and its arguments; None: it stays as it is."""
    if node.target not in OPERATORS:
        return None, ()
    ops = torch.ops.quantized_decomposed
    value, scale, zero, axis, block = node.args[:5]
    values = [program.state.tensor(str(item.target)) if item.op == "get_attr" else None for item in (scale, zero)]  # type: ignore[union-attr]
    dtype = (node if node.target is QUANTIZE.op else value).meta["val"].dtype  # type: ignore[union-attr]
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    if block or (values[0] is None) != (values[1] is None):
        return None, ()
    if scale.meta["val"].ndim == 0:  # type: ignore[union-attr]
        numbers = [None if known is None else known.item() for known in values]
        form, grid = ("tensor", [scale, zero]) if values[0] is None else ("default", numbers)
        if node.target is QUANTIZE.op:
            return getattr(ops.quantize_per_tensor, form), (value, *grid, *node.args[5:7], dtype)
        return getattr(ops.dequantize_per_tensor, form), (value, *grid, low, high, dtype)
    if node.target is QUANTIZE.op or values[0] is None:
        return None, ()
    return ops.dequantize_per_channel.default, (value, scale, zero, axis, low, high, dtype)


@functools.cache
def _register_patterns() -> None:
    """Once in a process: they are Inductor's from then on."""
    try:
        with quiet():
            patterns = next(filter(None, map(_with_patterns, _HOMES)))
    except (ImportError, StopIteration) as error:
        raise MissingDependencyError(
            f"int8 on a CPU needs torchao for the targets torch and aoti ({error!r})",
            hint="pip install 'fxfreeze[int8]'",
        ) from error
    # Not by importing torchao's quantizer, which would do this, and set a pass for all that is ever compiled, too.
    getattr(patterns, _REGISTER)()


def _with_patterns(home: str) -> Any:
    found = importlib.import_module(home)
    return found if hasattr(found, _REGISTER) else None
