"""Give every attention operator the four dims its kernels are made for: batch, heads, length, width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.functional import scaled_dot_product_attention

from fxfreeze.inline import inline
from fxfreeze.program import Program
from fxfreeze.rewrite import Context, NodeRewrite, NoMatch, fail

from .._operators import arguments

aten = torch.ops.aten


class FourDimAttention(NodeRewrite):
    """Attention over windows of windows has five dims or more, a single head three. Fused kernels take neither, and the
    ONNX converter refuses both; with the leading dims in one, both work.
    """

    name, stage = "four-dim-attention", "clean"
    targets = (aten.scaled_dot_product_attention.default,)

    def rewrite(self, program: Program, node: Node, ctx: Context) -> bool | NoMatch:
        given = arguments(node)
        operands = [given[name] for name in ("query", "key", "value")]
        shapes = [item.meta["val"].shape for item in operands]
        if len(shapes[0]) == 4 or min(map(len, shapes)) < 3:
            return False
        leading = [[str(size) for size in shape[:-2]] for shape in shapes]
        if leading[0] != leading[1] or leading[0] != leading[2]:
            return fail("its operands are broadcast against each other", node)
        mask = given["attn_mask"]
        options = {name: given[name] for name in ("dropout_p", "is_causal", "scale", "enable_gqa")}
        operands += [] if mask is None else [mask]

        def function(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
            return _attention(query, key, value, mask, options)

        program.replace(node, inline(program, function, *operands, before=node, like=node))
        return True


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
    leading = query.shape[:-2]
    if mask is not None:
        mask = mask.expand(*leading, *mask.shape[-2:])
    flat = [None if item is None else _four(item) for item in (query, key, value, mask)]
    result = scaled_dot_product_attention(*flat, **options)  # type: ignore[arg-type]
    return result.squeeze(0) if query.dim() == 3 else result.reshape(*leading, *result.shape[-2:])


def _four(value: Tensor) -> Tensor:
    return value.unsqueeze(0) if value.dim() == 3 else value.flatten(0, -4)
