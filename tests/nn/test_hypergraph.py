"""Tokens in the context of their hyperedges: the definition, and what compiling leaves of it for the global token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.api import rewrite
from fxfreeze.nn import HypergraphContext
from fxfreeze.program import Program

TOKENS, FEATURES, HIDDEN, K = 11, 6, 4, 3


def by_definition(layer: HypergraphContext, tokens: Tensor, attention: Tensor) -> Tensor:
    """One sample at a time, one hyperedge at a time."""
    results = []
    for x, looks in zip(tokens, attention):
        count = len(x)
        weights = torch.zeros(count, count, dtype=x.dtype)
        for centre in range(count):
            if centre == 0:
                similarity = {other: looks[other - 1] for other in range(1, count)}
            else:
                similarity = {
                    other: torch.cosine_similarity(x[centre], x[other], dim=0)
                    for other in range(1, count) if other != centre
                }  # fmt: skip
            near = sorted(similarity, key=lambda other: -similarity[other])[: layer.k]
            shares = torch.stack([similarity[other] for other in near]).softmax(0)
            for other, share in zip(near, shares):
                weights[centre, other] = share
            weights[centre, centre] = 1
        weights[1:, 0] = weights[0, 1:]
        results.append(layer.node(weights.T @ layer.edge(weights @ x)))
    return torch.stack(results)


def sample(batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    tokens = torch.randn(batch, TOKENS, FEATURES, generator=generator, dtype=torch.float64)
    return tokens, torch.rand(batch, TOKENS - 1, generator=generator, dtype=torch.float64)


def test_every_row_is_what_the_definition_says() -> None:
    torch.manual_seed(0)
    layer = HypergraphContext(FEATURES, hidden=HIDDEN, k=K).double()
    given = sample(4)
    torch.testing.assert_close(layer(*given), by_definition(layer, *given), rtol=1e-12, atol=1e-12)


def test_all_parameters_train_by_the_global_token_alone() -> None:
    layer = HypergraphContext(FEATURES, hidden=HIDDEN, k=K).double()
    tokens, attention = sample()
    layer(tokens.requires_grad_(), attention.requires_grad_())[:, 0].square().sum().backward()
    grads = [value.grad for value in (*layer.parameters(), tokens, attention)]
    assert all(grad is not None and grad.any() for grad in grads)


class Encoder(nn.Module):
    """Tokens, how the first attends to the others, and scores from the refined first one."""

    def __init__(self, rows: slice | int) -> None:
        super().__init__()
        self.rows, self.body, self.looks = rows, nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, 1)
        self.context = HypergraphContext(FEATURES, hidden=HIDDEN, k=K)
        self.head = nn.Linear(FEATURES, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        looks = self.looks(h[:, 1:]).squeeze(-1).softmax(-1)
        return self.head(self.context(h, looks)[:, self.rows])


def rows_made(program: Program) -> list[int]:
    """How many rows each linear layer of the bottlenecks makes, in the order in which they run."""
    linear = torch.ops.aten.linear.default
    made = [node for node in program.graph.nodes if node.target is linear]
    return [node.meta["val"].shape[1] for node in made if program.module_path(node).startswith("context.")]


@pytest.mark.parametrize("rows", [0, slice(0, 1)])
def test_the_global_token_alone_takes_its_own_hyperedges_only(rows: slice | int) -> None:
    torch.manual_seed(0)
    model = Encoder(rows).eval()
    plan = fz.Plan([fz.Input("x", ("batch", TOKENS, FEATURES))], targets=["onnx"])
    program = rewrite(model, plan).program
    assert rows_made(program) == [K + 1, K + 1, 1, 1], "rows of the bottlenecks of hyperedges, then of the token"
    products = [tuple(node.meta["val"].shape[1:]) for node in program.graph.nodes
                if node.target is torch.ops.aten.matmul.default]  # fmt: skip
    assert (K, TOKENS - 1) in products and (TOKENS - 1, TOKENS - 1) not in products
    x = torch.randn(5, TOKENS, FEATURES)
    torch.testing.assert_close(fz.compile(model, plan)(x), model(x), rtol=1e-5, atol=1e-6)


def test_all_tokens_are_made_where_all_are_read() -> None:
    torch.manual_seed(0)
    model = Encoder(slice(None)).eval()
    plan = fz.Plan([fz.Input("x", ("batch", TOKENS, FEATURES))], targets=[])
    program = rewrite(model, plan).program
    assert sorted(rows_made(program)) == sorted([K + 1, K + 1, 1, 1, TOKENS, TOKENS, TOKENS - 1, TOKENS - 1])


def test_what_cannot_be_is_refused() -> None:
    for wrong in ({"k": 0}, {"hidden": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            HypergraphContext(FEATURES, **wrong)
