"""Rows that nothing reads are not computed; what is, is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fxfreeze as fz
from fxfreeze.api import rewrite
from fxfreeze.capture import capture
from fxfreeze.firing import fired, gate_rows
from fxfreeze.passes import PIPELINE
from fxfreeze.passes.prune.unread_rows import UnreadRows
from fxfreeze.pipeline import proof_draws, run_passes, stage_passes
from fxfreeze.program import Program
from fxfreeze.rewrite import Context

ROWS, WIDTH = 7, 12


class Body(nn.Module):
    """A few layers, and a forward to read rows in."""

    def __init__(self, forward: Callable[[Body, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)
        self.both, self.norm = nn.Linear(WIDTH, 3 * WIDTH), nn.LayerNorm(WIDTH)
        self.conv = nn.Conv1d(ROWS, ROWS, 1)
        self.register_buffer("place", torch.randn(ROWS, WIDTH))
        self.run = forward

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def pruned(
    model: nn.Module, shape: tuple[Any, ...] = ("batch", ROWS, WIDTH), **plan: Any
) -> tuple[Program, Context, int]:
    """`model` after the pass, proven, and how often it was rewritten."""
    given = fz.Plan([fz.Input("x", shape)], targets=[], **plan)
    program, flat = capture(model.eval(), given)
    ctx = Context(given)
    rows, _ = run_passes(
        program, [*stage_passes(PIPELINE, ["clean"]), UnreadRows()], ctx, draws=proof_draws(program, "full")
    )
    x = torch.randn([3 if size == "batch" else 9 if isinstance(size, str) else size for size in shape])
    for found, wanted in zip(program.run(x), flat(x), strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)
    return program, ctx, rows[-1].rewrites


def shapes(program: Program, target: Any) -> list[list[Any]]:
    """Of the results of an operator without the batch, in graph order."""
    return [list(node.meta["val"].shape)[1:] for node in program.graph.nodes if node.target is target]


aten = torch.ops.aten
LINEAR, ATTENTION = aten.linear.default, aten.scaled_dot_product_attention.default


def test_rows_move_up_through_layers_norms_and_residuals() -> None:
    def forward(self: Body, x: Tensor) -> Tensor:
        x = x + self.place
        x = x + functional.gelu(self.first(self.norm(x)))
        return self.second(x)[:, 2]

    program, ctx, _ = pruned(Body(forward))
    assert shapes(program, LINEAR) == [[1, WIDTH], [1, 5]]
    assert shapes(program, aten.layer_norm.default) == [[1, WIDTH]]
    assert all(len(node.meta["val"].shape) < 3 or node.meta["val"].shape[1] == 1
               for node in program.graph.nodes if node.op == "call_function")  # fmt: skip
    assert [(row.site, row.outcome, row.detail) for row in ctx.ledger] == [
        ("second", "rewritten", "computes 1 of 7 rows"), ("first", "rewritten", "computes 1 of 7 rows"),
    ]  # fmt: skip


@pytest.mark.parametrize("read, count", [
    (lambda x: (x[:, 0], x[:, 2:4]), 3),
    (lambda x: (x[:, -1], x[:, [5, 0]], x[:, 5:]), 3),
    (lambda x: (x[:, ::3], x[:, 6]), 3),
    (lambda x: (x.index_select(1, torch.tensor([4, 4, 1])),), 2),
])  # fmt: skip
def test_readers_share_the_union_of_their_rows(read: Callable[[Tensor], Any], count: int) -> None:
    program, _, _ = pruned(Body(lambda self, x: read(self.first(x))))
    assert shapes(program, LINEAR) == [[count, WIDTH]]


@pytest.mark.parametrize("forward", [
    lambda self, x: (self.first(x)[:, 0], self.first(x).sum(1)),
    lambda self, x: self.first(x)[:, torch.arange(ROWS)],
    lambda self, x: (self.first(x)[:, 0], self.first(x)[..., 0]),
    lambda self, x: self.first(x)[:, :, 0],
    lambda self, x: self.first(x),
], ids=["read whole too", "all rows", "two dims", "features", "an output"])  # fmt: skip
def test_values_that_are_needed_whole_stay(forward: Callable[..., Any]) -> None:
    program, _, _ = pruned(Body(forward))
    assert shapes(program, LINEAR) == [[ROWS, WIDTH]]


@pytest.mark.parametrize("mix", [
    lambda self, x: self.conv(x), lambda self, x: x.softmax(1), lambda self, x: x.cumsum(1), lambda self, x: x.flip(1),
    lambda self, x: functional.layer_norm(x, (ROWS, WIDTH)), lambda self, x: x.flatten(1)[:, :, None],
    lambda self, x: (x.transpose(1, 2) @ x), lambda self, x: x.roll(1, 1),
])  # fmt: skip
def test_it_stops_where_rows_mix(mix: Callable[..., Any]) -> None:
    program, _, _ = pruned(Body(lambda self, x: mix(self, self.first(x))[:, 1]))
    assert shapes(program, LINEAR) == [[ROWS, WIDTH]]


def moves(self: Body, x: Tensor) -> Tensor:
    x = self.first(x).reshape(-1, ROWS, 3, 4).transpose(1, 2).unsqueeze(1)  # batch, 1, 3, rows, 4
    x = x.permute(0, 3, 1, 4, 2).squeeze(2).flatten(2)
    return torch.cat([x, x * 2], -1)[:, 4]


def test_rows_are_followed_through_moves() -> None:
    assert shapes(pruned(Body(moves))[0], LINEAR) == [[1, WIDTH]]


def test_parts_that_are_not_read_are_dropped() -> None:
    def forward(self: Body, x: Tensor) -> Tensor:
        token = self.place[:1].expand(x.shape[0], -1, -1)
        return torch.cat([token, self.first(x), self.both(x)[..., :WIDTH]], 1)[:, [0, 3]]

    program, _, _ = pruned(Body(forward))
    assert shapes(program, LINEAR) == [[1, WIDTH]]
    assert shapes(program, aten.cat.default) == [[2, WIDTH]]


class Attend(Body):
    """Attention with queries, keys and values out of one layer."""

    def split(self, x: Tensor, form: str) -> list[Tensor]:
        made = self.both(x)
        if form == "unbind":
            return list(made.reshape(-1, ROWS, 3, 2, 6).permute(2, 0, 3, 1, 4).unbind(0))
        if form == "heads":  # as GPT-NeoX: every head's query, key and value side by side
            return list(made.reshape(-1, ROWS, 2, 18).transpose(1, 2).chunk(3, -1))
        return [part.reshape(-1, ROWS, 2, 6).transpose(1, 2) for part in made.split(WIDTH, -1)]


@pytest.mark.parametrize("form", ["unbind", "heads", "split"])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_computes_the_queries_that_are_read(form: str, causal: bool) -> None:
    def forward(self: Attend, x: Tensor) -> Tensor:  # type: ignore[misc]
        q, k, v = self.split(self.norm(x), form)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.first(out.transpose(1, 2).reshape(-1, ROWS, WIDTH))[:, [2, 5]]

    program, ctx, _ = pruned(Attend(forward))  # type: ignore[arg-type]
    assert shapes(program, ATTENTION) == [[2, 2, 6]]
    assert sorted(shapes(program, LINEAR)) == [[2, WIDTH], [2, WIDTH], [ROWS, 2 * WIDTH]]
    assert "both" in {row.site for row in ctx.ledger}


def test_masks_and_attention_that_is_written_out() -> None:
    def forward(self: Attend, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[misc]
        q, k, v = self.split(x, "split")
        bias = self.place[:, :ROWS]
        out = functional.scaled_dot_product_attention(q, k, v, bias)[:, :, 3]
        return out, ((q @ k.transpose(-2, -1) + bias).softmax(-1) @ v)[:, :, 3]

    program, _, _ = pruned(Attend(forward))  # type: ignore[arg-type]
    assert shapes(program, ATTENTION) == [[2, 1, 6]]
    assert shapes(program, aten.softmax.int) == [[2, 1, ROWS]]
    assert sorted(shapes(program, LINEAR)) == [[1, WIDTH], [ROWS, 2 * WIDTH]]


def test_a_dynamic_number_of_rows_is_read_from_either_end() -> None:
    shape = ("batch", "seq", WIDTH)
    program, _, _ = pruned(Body(lambda self, x: (self.first(x)[:, -1], self.first(x)[:, 0])), shape)
    assert shapes(program, LINEAR) == [[2, WIDTH]]
    program, _, _ = pruned(Body(lambda self, x: self.first(x)[:, 1:]), shape)
    assert not isinstance(shapes(program, LINEAR)[0][0], int)


@pytest.mark.parametrize("at", [-1, 0])
def test_of_a_dynamic_number_of_causal_queries_only_the_last_is_known_to_see_all(at: int) -> None:
    def forward(self: Body, x: Tensor) -> Tensor:
        x = self.first(x).unflatten(-1, (2, 6)).transpose(1, 2)
        return functional.scaled_dot_product_attention(x, x, x, is_causal=True)[:, :, at]

    program, _, _ = pruned(Body(forward), ("batch", "seq", WIDTH))
    ((_, rows, _),) = shapes(program, ATTENTION)
    assert isinstance(rows, int) == (at == -1)


def test_gates_report_every_row() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act, self.down = nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.act(self.up(x)))[:, 0]

    plan = fz.Plan([fz.Input("x", ("batch", ROWS, WIDTH))], [fz.Gate(at="act", threshold=0.1)])
    done = rewrite(Gated(), plan)
    (says,) = fired(
        done.program, [row.to_json() for row in gate_rows(done.program)], [torch.randn(2, ROWS, WIDTH)]
    ).values()
    assert says.shape == (2, ROWS, WIDTH)
    rows = {row.site: row for row in done.ledger if row.requested == "unread rows"}
    assert rows["down"].detail == "computes 1 of 7 rows"
    assert rows["act"].outcome == "skipped"
    assert "reports which neurons fire" in rows["act"].detail


# ---- whole models


def counted(program: Program, *inputs: Tensor) -> int:
    # torch 2.14 has no formula for the fused attention of CPUs; as two products, every version counts it.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        program.run(*inputs)
    return counter.get_total_flops()


def model_pruned(model: nn.Module, plan: fz.Plan) -> tuple[Program, Program]:
    """Before the pass and after it, proven."""
    program, _ = capture(model.eval(), plan)
    run_passes(program, stage_passes(PIPELINE, ["clean", "fold"]), Context(plan), verify="off")
    before = program.clone()
    run_passes(program, [UnreadRows()], Context(plan), draws=proof_draws(program, "full"))
    return before, program


def test_the_last_block_of_a_vision_transformer_computes_one_row() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", depth=2)
    before, after = model_pruned(model, fz.Plan([fz.Input("x", ("batch", 3, 224, 224))], targets=[]))
    block = [(node.meta["val"].shape[1], node.meta["val"].shape[-1]) for node in after.graph.nodes
             if node.target is LINEAR and after.module_path(node).startswith("blocks.1.")]  # fmt: skip
    assert sorted(block) == [(1, 192), (1, 192), (1, 192), (1, 768), (197, 384)]  # q, out, MLP; keys and values
    assert [shape[1] for shape in shapes(after, ATTENTION)] == [197, 1]
    n, d = 197, 192
    saved = 2 * (n - 1) * (d * d + d * d + 8 * d * d) + 2 * 2 * (n - 1) * n * d
    x = torch.randn(1, 3, 224, 224)
    assert counted(before, x) - counted(after, x) == saved


def test_the_pooler_of_bert_reads_one_row() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=50, max_position_embeddings=32))
    plan = fz.Plan([fz.Input("input_ids", ("batch", "seq"), "int64", low=0, high=49)], outputs=["pooler_output"],
                   dims={"seq": {"max": 20}}, targets=[])  # fmt: skip
    _, after = model_pruned(model, plan)
    last = [str(node.meta["val"].shape[1]) for node in after.graph.nodes
            if node.target is LINEAR and "encoder.layer.0" in after.module_path(node)]  # fmt: skip
    assert last.count("1") == 4
    assert len(last) == 6


def test_the_last_token_of_gpt2_is_one_row() -> None:
    transformers = pytest.importorskip("transformers")

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50, n_positions=32,
                                             bos_token_id=0, eos_token_id=0)  # fmt: skip
            self.model = transformers.GPT2LMHeadModel(config)

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids).logits[:, -1]

    plan = fz.Plan([fz.Input("ids", ("batch", "seq"), "int64", low=0, high=49)], dims={"seq": {"max": 20}}, targets=[])
    before, after = model_pruned(Last(), plan)
    assert [str(shape[1]) for shape in shapes(after, ATTENTION)] == ["1"]
    b, n, d = 3, 8, 16
    saved = 2 * b * (n - 1) * (d * d + d * d + 8 * d * d + 50 * d) + 2 * 2 * b * (n - 1) * n * d
    ids = torch.randint(0, 50, (b, n))
    assert counted(before, ids) - counted(after, ids) == saved
