"""``fxfreeze.compile``: the whole way from a frozen model and a plan to an artifact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .capture import FlatModel, capture, flat_examples
from .pipeline import PassRow, run_passes, stage_passes
from .plan import Plan
from .program import Program
from .proof import ProofRow, Verify
from .rewrite import STAGES, Context, Ledger


@dataclass
class Compilation:
    """Everything known between the passes and the emitters."""

    program: Program
    plan: Plan
    ledger: Ledger
    passes: list[PassRow]
    proofs: list[ProofRow]
    reference: nn.Module
    examples: list[torch.Tensor] | None


def rewrite(model: nn.Module, plan: Plan, *, example_inputs: Any = None, verify: Verify = "full") -> Compilation:
    """Capture `model` and run every pass of the pipeline over it."""
    from .passes import PIPELINE

    examples = flat_examples(plan, example_inputs)
    program, reference = capture(model, plan, examples)
    ctx = Context(plan)
    from .pipeline import proof_draws

    rows, prover = run_passes(
        program, stage_passes(PIPELINE, STAGES), ctx, verify=verify, draws=proof_draws(program, verify, examples)
    )
    return Compilation(program, plan, ctx.ledger, rows, prover.rows, reference, examples)


def compile(model: nn.Module, plan: Plan, *, example_inputs: Any = None, verify: Verify = "full") -> Any:
    return rewrite(model, plan, example_inputs=example_inputs, verify=verify)
