"""Store equal constants once: a layer that ran twice and was folded twice, or a mask that every block brought along."""

from __future__ import annotations

import torch
from torch.fx import Node

from fxfreeze.program import BANK, Origin, Program
from fxfreeze.rewrite import Context, Pass

_PROBES = 8
_WORTH = 4096  # bytes; fewer are not worth the confusion of one name for two things


class MergeConstants(Pass):
    """Let constants of the same dtype, shape and bits share one tensor; those whose rounding is measured stay apart.

    So do the adapters that rows select from: equal now (untrained, say), they are filled up one by one.
    """

    name, stage = "merge-constants", "lower"

    def run(self, program: Program, ctx: Context) -> int:
        groups: dict[object, list[Node]] = {}
        count = 0
        for node in program.graph.nodes:
            if node.op != "get_attr" or str(node.target) in program.folds or _is_bank(node):
                continue
            value = program.state[str(node.target)]
            if value.nbytes < _WORTH:
                continue
            alike = groups.setdefault(_key(value, node), [])
            twin = next((other for other in alike if _same(value, program.state[str(other.target)])), None)
            if twin is None:
                alike.append(node)
            elif twin.target != node.target:
                node.target = twin.target
                count += 1
        return count


def _is_bank(node: Node) -> bool:
    origin = node.meta.get("fxfreeze")
    return isinstance(origin, Origin) and origin.primitive == BANK


def _key(value: torch.Tensor, node: Node) -> object:
    """Cheap to compute, and equal for equal constants: dtype, shape and a few of the values."""
    step = max(value.numel() // _PROBES, 1)
    probes = value.flatten()[::step][:_PROBES] if value.is_contiguous() else value.flatten()[:1]
    return value.dtype, node.meta["val"].dtype, tuple(value.shape), value.device, str(probes.tolist())


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    if first is second:
        return True
    # Bits, not values: −0 is not 0 here, and a NaN equals itself.
    return torch.equal(*(item.contiguous().flatten().view(torch.uint8) for item in (first, second)))
