"""What comes into a frozen model from elsewhere: another branch's tokens, another model's block, a task's layer."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CrossAttentionFusion(nn.Module):
    r"""v + tanh(g) ⊙ W_o·attention(W_q·LN(v), W_k·LN(c), W_v·LN(c)): values attend to the tokens of another branch.

    The gate g, a number per feature, starts as 0: a new layer is the identity, and gradients reach the gate first.

    Args:
        features: C of v, [batch, N, C], or a feature map [batch, C, \*sizes] of rank 4 or 5.
        context: C' of c, likewise [batch, M, C'] or a map; N and M need not agree.
        heads: of the attention; they divide `features`.

    Raises:
        ValueError: `heads` does not divide `features`.

    Source: the gate is that of Alayrac et al., Flamingo (2022), arXiv 2204.14198, section 2.2; cross-attention between
    a convolutional branch and a frozen encoder that of Gowda and Clifton, CC-SAM (ECCV 2024).
    """

    def __init__(self, features: int, context: int, *, heads: int = 8) -> None:
        super().__init__()
        if heads < 1 or features % heads:
            raise ValueError(f"heads {heads} must divide features {features}")
        self.heads = heads
        self.norm, self.context_norm = nn.LayerNorm(features), nn.LayerNorm(context)
        self.query, self.out = nn.Linear(features, features), nn.Linear(features, features)
        self.key, self.value = nn.Linear(context, features), nn.Linear(context, features)
        self.gate = nn.Parameter(torch.zeros(features))

    def forward(self, v: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Shape and dtype of `v`.

        Args:
            context: c.
            mask: bool [batch, M], False for tokens of c that do not count; at least one of a row must.
        """
        tokens, other = _tokens(v), _tokens(context)
        h = self.context_norm(other)
        q, k, w = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(self.norm(tokens)), self.key(h), self.value(h))
        )
        allowed = None if mask is None else mask[:, None, None, :]
        found = F.scaled_dot_product_attention(q, k, w, attn_mask=allowed).transpose(1, 2).flatten(2)
        result = tokens + torch.tanh(self.gate) * self.out(found)
        return result if v.dim() == 3 else result.transpose(1, 2).reshape(v.shape)

    def extra_repr(self) -> str:
        return f"heads={self.heads}"


def _tokens(value: Tensor) -> Tensor:
    """[batch, N, C] of tokens, or of a feature map [batch, C, *sizes]."""
    return value if value.dim() == 3 else value.flatten(2).transpose(1, 2)


class FrozenBlock(nn.Module):
    """linear → a frozen block of another model → linear; only the linear layers train.

    The block is copied with its parameters shared, requires no gradient and stays in eval mode, whatever is done to
    this module; the block that was given is left as it is. Gradients flow through it to the first linear layer.

    Args:
        block: called with [..., inner], and further arguments as they come; of a tuple it returns the first is taken.
        features: of the last dim of v.
        inner: of what the block takes.
        outer: of what the block returns; default: `inner`.
        residual: add v; the last linear layer then starts as 0, and a new layer is the identity.

    Source: Pang, Xie, Man and Wang, Frozen transformers in language models are effective visual encoder layers (ICLR
    2024), arXiv 2310.12973, section 3.
    """

    def __init__(
        self, block: nn.Module, features: int, inner: int, *, outer: int | None = None, residual: bool = False
    ) -> None:
        super().__init__()
        shared: dict[int, Any] = {id(item): nn.Parameter(item.detach(), False) for item in block.parameters()}
        shared |= {id(item): item.detach() for item in block.buffers()}
        self.block = copy.deepcopy(block, shared).eval()
        self.into, self.back, self.residual = nn.Linear(features, inner), nn.Linear(outer or inner, features), residual
        if residual:
            nn.init.zeros_(self.back.weight)
            nn.init.zeros_(self.back.bias)

    def forward(self, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`v` [..., features] to the same shape; what follows is given to the block."""
        h = self.block(self.into(v), *args, **kwargs)
        found = self.back(h[0] if isinstance(h, tuple | list) else h)
        return v + found if self.residual else found

    def train(self, mode: bool = True) -> FrozenBlock:
        """As of any module, but for the block, which never drops out nor counts batches."""
        super().train(mode)
        self.block.eval()
        return self


class InnerAdaptor(nn.Module):
    """A layer for each task: h ← layer_t(h), with t chosen per row, or for good.

    Args:
        layers: one per task, each of [batch, ...] to the same shape; ``nn.Identity()`` leaves the model as it was.
        task: the task that rows belong to where none is given; None: each call says so.

    Raises:
        ValueError: there are no layers, or `task` is no index of one.

    Source: layers of their own beside those of a frozen language model are from Wang et al., IAA (2024), arXiv
    2408.12902; here a row may choose.
    """

    def __init__(self, layers: Iterable[nn.Module], *, task: int | None = None) -> None:
        super().__init__()
        self.layers, self.task = nn.ModuleList(layers), task
        if not len(self.layers):
            raise ValueError("layers: there is none")
        if task is not None and not 0 <= task < len(self.layers):
            raise ValueError(f"task must be 0 … {len(self.layers) - 1}, got {task}")

    def forward(self, h: Tensor, task: Tensor | None = None) -> Tensor:
        """`h` [batch, ...] to the same shape. With `task`, integers [batch], all layers run and one is taken per row.

        Raises:
            ValueError: there is neither `task` nor a task of the layer's own.
            IndexError: a task is no index of a layer.
        """
        if task is None:
            if self.task is None:
                raise ValueError("InnerAdaptor: no task is given, and there is none of its own: InnerAdaptor(task=...)")
            return self.layers[self.task](h)
        every = torch.stack([layer(h) for layer in self.layers])
        return every[task, torch.arange(h.shape[0], device=h.device)]

    def extra_repr(self) -> str:
        return f"task={self.task}"
