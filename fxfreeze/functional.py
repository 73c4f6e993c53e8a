"""Make a freshly captured graph functional.

torch.export keeps in-place operators (``relu_``, ``add_``) as the model wrote them. Most write to a value nobody else
looks at; those become their out-of-place twins here, which is immediate. The others (a write through a slice, say) need
torch's own functionalisation, which traces the whole model again at about twice the price of the export.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from .errors import CaptureError

aten = torch.ops.aten

_TWINS: dict[Any, Any] = {
    aten.copy_.default: aten.copy.default,
    aten.zero_.default: aten.zeros_like.default,
    aten.detach_.default: aten.detach.default,
    aten.fill_.Scalar: aten.full_like.default,
}

# These return their input itself in eval mode although their schema does not say so.
_HIDDEN_ALIASES = frozenset(
    {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default, aten.feature_alpha_dropout.default}
)


def functionalise(graph: Graph) -> str | None:
    """Replace in-place operators by functional ones, in place.

    Returns:
        None when the graph is functional, else the reason why it takes more than a swap; the graph is then unfinished.
    """
    order = {node: position for position, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if not _writes(node):
            continue
        twin, target = _twin(node.target), node.args[0]
        if twin is None or not isinstance(target, Node):
            return f"{node.target} has no functional twin"
        if alias := _live_alias(target, node, order):
            return f"{node.target} writes to a value that {alias} reads through another view"
        node.target = twin
        if twin is aten.zeros_like.default:
            node.args = node.args[:1]
        later = {user for user in target.users if order[user] > order[node]}
        target.replace_all_uses_with(node, delete_user_cb=later.__contains__)
    return None


def unhide(graph: Graph) -> None:
    """Write every dropout that returns its input as the alias that it is, in place.

    For torch's own functionalisation: that of torch 2.11 makes ``aten.dropout`` a copy, which stays as it was when its
    input is written to.
    """
    for node in graph.nodes:
        if node.target in _HIDDEN_ALIASES and not _drops(*node.args[1:3]):
            node.target, node.args = aten.alias.default, node.args[:1]


def _drops(share: Any, training: Any) -> bool:
    return bool(training) and share != 0


def normalise(graph: Graph) -> None:
    """Write the same thing the same way, so that a pass has one form to look for, in place.

    A view becomes a reshape, which is what it means where nothing aliases (and survives the removal of a `contiguous`);
    an inference batch-norm, which functionalisation spells as a tuple of three, becomes ``aten.batch_norm`` again.
    """
    for node in list(graph.nodes):
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
        elif node.target is aten._native_batch_norm_legit_no_training.default:
            _single_batch_norm(graph, node)


def _single_batch_norm(graph: Graph, node: Node) -> None:
    results = {user.args[1] for user in node.users}
    if results - {0}:  # the saved mean and inverse deviation are read: not an inference batch-norm after all
        return
    value, weight, bias, mean, variance, momentum, eps = node.args
    with graph.inserting_before(node):
        single = graph.call_function(
            aten.batch_norm.default, (value, weight, bias, mean, variance, False, momentum, eps, False)
        )
    single.meta = {**node.meta, "val": node.meta["val"][0]}
    for user in list(node.users):
        user.replace_all_uses_with(single)
        graph.erase_node(user)
    graph.erase_node(node)


def _writes(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _twin(target: Any) -> Any | None:
    """The out-of-place overload with the same arguments, or None."""
    if target in _TWINS:
        return _TWINS[target]
    packet = getattr(torch.ops, target.namespace), target._schema.name.split("::")[1].removesuffix("_")
    overload = getattr(getattr(*packet, None), target._overloadname, None)
    written = [
        argument for argument in target._schema.arguments if argument.alias_info and argument.alias_info.is_write
    ]
    if overload is None or overload._schema.is_mutable or len(written) != 1:
        return None
    # Types, not names: dropout_(self, …) is dropout(input, …).
    same = [str(a.type) for a in overload._schema.arguments] == [str(a.type) for a in target._schema.arguments]
    return overload if same and written[0] is target._schema.arguments[0] else None


def _family(target: Node, write: Node) -> set[Node]:
    """Nodes that may share memory with `target`, itself included, but for `write` and what is made of its result: that
    shares the memory of its functional twin, and what is written there later is looked at then."""
    family, frontier = {target}, [target]
    while frontier:
        node = frontier.pop()
        relatives = {*_aliased(node), *(user for user in node.users if node in _aliased(user))} - family - {write}
        family |= relatives
        frontier.extend(relatives)
    return family


def _live_alias(target: Node, write: Node, order: dict[Node, int]) -> Node | None:
    """A node other than `target` that may share its memory and is read after `write`.

    Raises:
        CaptureError: one of them is a constant of the model.
    """
    family = _family(target, write)
    for node in family:
        if node.op == "get_attr":
            raise CaptureError(
                "forward writes to a buffer, so the model is not frozen",
                where=str(node.target),
                hint="reset the state inside forward, or pass it in and out as tensors",
            )
    late = (user for node in family - {target} for user in node.users if user is not write)
    return next((user for user in late if order[user] > order[write]), None)


def _aliased(node: Node) -> list[Node]:
    """Operands whose memory the result of `node` may share."""
    if node.op != "call_function":
        return []
    if node.target in _HIDDEN_ALIASES or getattr(node.target, "__name__", "") == "getitem":
        return node.all_input_nodes[:1]
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    arguments = node.target._schema.arguments
    return [
        operand
        for argument, operand in zip(arguments, node.args, strict=False)
        if argument.alias_info is not None and isinstance(operand, Node)
    ]
