"""Products whose results are cut into parts, such as queries, keys and values: a product for each part.

ONNX Runtime 1.32 copies a result to cut it, and, as torch.nn.MultiheadAttention does it, to move the parts to the front
first. With one thread and 1024 rows of 3 × 256 that took as long as the product of integers: 0.62 ms, and 0.60. Three
products of 256 columns take what one of 768 does. In floats 1024 rows of 3 × 128 took 0.89 ms whole and 0.65 in parts,
and one row as long either way. So layers that were stacked because torch is faster then come apart again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from .onnx_graph import bias_behind, constant, describe, number, sweep
from .onnx_static import PRODUCT

_LEAST = 32
"""Columns of a part, at least; a kernel is called for each."""


@dataclass(frozen=True)
class Part:
    """`value` holds the product's columns from `start` to `stop`, as `sizes`; its axes are those of the product, and of
    `sizes` behind them, in the order `axes`."""

    value: Any
    start: int
    stop: int
    sizes: tuple[int, ...]
    axes: tuple[int, ...]


def cut(graph: Any) -> None:
    """Let every product that is only cut into parts, along its columns, be one per part; the first keeps its name."""
    for node in list(graph.all_nodes()):
        if (product := _product(node)) is None or len(list(node.inputs[1].uses())) > 1:
            continue
        parts = _parts(product)
        if parts and all(part.stop - part.start >= _LEAST for part in parts):
            _replace(graph, product, parts)
    sweep(graph)


@dataclass(frozen=True)
class Product:
    """A product with a constant weight. `nodes`: it, and the Add of a bias where that is a node of its own."""

    nodes: tuple[Any, ...]
    columns: int

    @property
    def result(self) -> Any:
        return self.nodes[-1].outputs[0]


def _product(node: Any) -> Product | None:
    import onnx_ir

    if node.op_type == PRODUCT:
        return Product((node,), node.inputs[1].const_value.shape[1])
    weight = node.inputs[1].const_value if node.op_type in ("MatMul", "Gemm") else None
    if weight is None or weight.dtype != onnx_ir.DataType.FLOAT or len(weight.shape) != 2:
        return None
    if node.inputs[0].const_value is not None:
        return None
    columns = weight.shape[0 if number(node, "transB") else 1]
    if node.op_type == "Gemm":
        bias = (*node.inputs[2:], None)[0]
        fits = bias is None or (bias.const_value is not None and tuple(bias.shape) == (columns,))
        return Product((node,), columns) if fits else None
    added = bias_behind(node, columns)
    return Product((node,) if added is None else (node, added[1]), columns)


def _parts(product: Product) -> list[Part]:
    """What the product is cut into, or nothing where something else reads it, too."""
    value, columns = product.result, product.columns
    if value.shape is None:
        return []
    rows = len(value.shape) - 1
    axes: Axes = list(range(rows + 1))
    sizes: tuple[int, ...] = (columns,)
    while not value.is_graph_output() and len(readers := list(value.uses())) == 1:
        reader = readers[0].node
        if (moved := _moved(reader, value, axes, sizes, rows)) is None:
            break
        (axes, sizes), value = moved, reader.outputs[0]
    if rows not in axes or value.is_graph_output():
        return []
    found = [_ends(reader, axes.index(rows), len(axes)) for reader, _ in value.uses()]
    if not all(found) or any(axis < 0 for axis in axes):
        return []
    inner, parts = prod(sizes[1:]), []
    for end, start, stop, kept in (end for ends in found for end in ends):
        left = (stop - start, *sizes[1:]) if kept else sizes[1:]
        order = [axis - (axis > rows and not kept) for axis in axes if kept or axis != rows]
        parts.append(Part(end, start * inner, stop * inner, left, tuple(order)))
    return parts if all(part.sizes for part in parts) else []


Axes = list[int]
"""Of a value: which axis of [rows of the product, sizes] each is, and -1 for one of size 1 that is none of these."""


def _moved(
    reader: Any, value: Any, axes: Axes, sizes: tuple[int, ...], rows: int
) -> tuple[Axes, tuple[int, ...]] | None:
    """The axes and sizes behind `reader`, or None where it is no change of shape that is known."""
    kind = reader.op_type
    if kind == "Identity":
        return axes, sizes
    if kind == "Transpose":
        return [axes[axis] for axis in reader.attributes["perm"].as_ints()], sizes
    if kind in ("Squeeze", "Unsqueeze"):
        if (which := _numbers(reader, 1)) is None:
            return None
        if kind == "Unsqueeze":
            count = len(axes) + len(which)
            free, rest = {axis % count for axis in which}, iter(axes)
            return [-1 if axis in free else next(rest) for axis in range(count)], sizes
        gone = {axis % len(axes) for axis in which}
        return ([axis for i, axis in enumerate(axes) if i not in gone], sizes) if _are_new(axes, gone) else None
    if kind != "Reshape" or axes != list(range(rows + 1)) or reader.outputs[0].shape is None:
        return None
    before, after = tuple(value.shape), tuple(reader.outputs[0].shape)
    found = after[rows:]
    if after[:rows] != before[:rows] or not all(isinstance(size, int) for size in found) or prod(found) != sizes[0]:
        return None
    return list(range(len(after))), found


def _are_new(axes: Axes, which: set[int]) -> bool:
    return all(axes[axis] < 0 for axis in which)


def _ends(reader: Any, axis: int, count: int) -> list[tuple[Any, int, int, bool]]:
    """What `reader` takes along the axis: values, from where, to where, and whether the axis stays."""
    kind, along = reader.op_type, number(reader, "axis") % count
    if kind == "Gather" and along == axis and (which := _numbers(reader, 1)) is not None and len(which) == 1:
        return (
            [(reader.outputs[0], which[0], which[0] + 1, False)] if not reader.inputs[1].shape and which[0] >= 0 else []
        )
    if kind == "Split" and along == axis:
        return list(_split(reader, axis))
    if kind == "Slice" and len(reader.inputs) < 5:
        bounds = [_numbers(reader, index) for index in (1, 2, 3)]
        users = [user for user, _ in reader.outputs[0].uses()]
        if None in bounds or bounds[2] != [axis] or [user.op_type for user in users] != ["Squeeze"]:
            return []
        (start,), (stop,), _ = bounds  # type: ignore[misc]
        if _numbers(users[0], 1) == [axis] and 0 <= start == stop - 1:
            return [(users[0].outputs[0], start, stop, False)]
    return []


def _split(reader: Any, axis: int) -> Iterator[tuple[Any, int, int, bool]]:
    start = 0
    for value in reader.outputs:
        size = None if value.shape is None else value.shape[axis]
        if not isinstance(size, int):
            return
        yield value, start, start + size, True
        start += size


def _numbers(node: Any, index: int) -> list[int] | None:
    """An input of integers that are constant."""
    stored = node.inputs[index].const_value if len(node.inputs) > index and node.inputs[index] is not None else None
    return None if stored is None else [int(item) for item in stored.numpy().reshape(-1)]


def _replace(graph: Any, product: Product, parts: Sequence[Part]) -> None:
    made: dict[tuple[int, int], Any] = {}
    for part in parts:
        columns = part.start, part.stop
        if columns not in made:
            made[columns] = _narrowed(graph, product, *columns, suffix=f".{len(made)}" if made else "")
        result = _shaped(graph, product.nodes[-1], made[columns], part)
        part.value.replace_all_uses_with(result, replace_graph_outputs=True)


def _narrowed(graph: Any, product: Product, start: int, stop: int, suffix: str) -> Any:
    """The product's columns from `start` to `stop` alone."""
    import numpy
    import onnx_ir

    def columns(value: Any, axis: int) -> Any:
        if value is None or value.const_value is None or not value.shape:
            return value
        kept = [slice(None)] * len(value.shape)
        kept[axis] = slice(start, stop)
        return constant(graph, f"{value.name}.{start}", numpy.ascontiguousarray(value.const_value.numpy()[tuple(kept)]))

    result = None
    for node in product.nodes:
        axis = 0 if number(node, "transB") else -1
        inputs = [columns(value, axis if index == 1 else -1) for index, value in enumerate(node.inputs)]
        if result is not None:
            inputs = [result if value is product.nodes[0].outputs[0] else new
                      for value, new in zip(node.inputs, inputs, strict=True)]  # fmt: skip
        narrow = onnx_ir.node(
            node.op_type, domain=node.domain, inputs=inputs, attributes=dict(node.attributes), name=node.name + suffix
        )
        narrow.metadata_props.update(node.metadata_props)
        old, (result,) = node.outputs[0], narrow.outputs
        describe(narrow, f"{old.name}.{start}", old)
        result.shape = onnx_ir.Shape([*tuple(old.shape)[:-1], stop - start])
        graph.insert_before(product.nodes[-1], narrow)
    return result


def _shaped(graph: Any, node: Any, value: Any, part: Part) -> Any:
    import numpy
    import onnx_ir

    rows = len(value.shape) - 1
    steps: list[tuple[str, list[Any], dict[str, Any]]] = []
    if len(part.sizes) > 1:
        shape = constant(graph, f"{part.value.name}.sizes", numpy.array([0] * rows + list(part.sizes), "int64"))
        steps.append(("Reshape", [shape], {}))
    if part.axes != tuple(range(len(part.axes))):
        steps.append(("Transpose", [], {"perm": part.axes}))
    for kind, inputs, attributes in steps:
        step = onnx_ir.node(kind, inputs=[value, *inputs], attributes=attributes, name=f"{part.value.name}.{kind}")
        step.outputs[0].name, step.outputs[0].type = f"{part.value.name}.{kind}", value.type
        graph.insert_before(node, step)
        (value,) = step.outputs
    value.shape = part.value.shape
    return value
