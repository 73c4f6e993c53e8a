"""``fxfreeze.compile``: the whole way from a frozen model and a plan to an artifact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .adapt import AdaptedModule, adapt
from .artifact import Artifact
from .capture import capture, flat_examples, frozen
from .parity import Flat
from .pipeline import PassRow, proof_draws, run_passes, stage_passes
from .plan import Plan
from .program import Program
from .proof import ProofRow, Verify
from .rewrite import STAGES, Context, Ledger

Progress = Callable[[str], None]

_REPRODUCED = ("adapt", "lower")
"""Stages whose passes are not exact and yet leave the function the reference computes: one makes it, one rounds it."""


@dataclass
class Compilation:
    """Everything known between the passes and the emitters.

    Attributes:
        program: after the last pass, its constants rounded.
        reference: the frozen model (with its adapters, if any) in eager torch, flat tensors to flat tensors.
        source: the program before the passes, with the adapters in it.
        examples: flat tensors the model accepts, when the caller gave some.
    """

    program: Program
    plan: Plan
    ledger: Ledger
    passes: list[PassRow]
    proofs: list[ProofRow]
    reference: Flat
    source: Program
    examples: list[Tensor] | None

    @property
    def lossless(self) -> bool:
        """Whether program and reference are the same function up to rounding."""
        return all(row.exact or row.stage in _REPRODUCED for row in self.passes if row.rewrites)


def compile(
    model: nn.Module,
    plan: Plan,
    *,
    example_inputs: Any = None,
    evaluate: Callable[[Callable[..., Any]], float] | None = None,
    verify: Verify = "full",
    progress: Progress | None = None,
) -> Artifact:
    """Capture `model`, rewrite it as `plan` says, prove every exact rewrite, emit the targets, and check each.

    The model is captured in eval mode, and neither it nor any tensor of the caller is changed.

    Args:
        model: any nn.Module, or what :func:`fxfreeze.adapt` returned, with its adapters as trained by now.
        plan: inputs, steps and targets.
        example_inputs: inputs the model accepts, where ones drawn from the plan would not do: a tensor, a tuple of
            positional inputs, or a dict by name. They are cropped or repeated along symbolic dims.
        evaluate: scores a callable that is called like the model; run on the frozen model and on every target, and
            recorded in ``manifest["scores"]``.
        verify: "full" proves every exact pass in float64 on two draws of different sizes, "sampled" on one draw,
            "off" on none.
        progress: told in a few words what is being done.

    Returns:
        A callable :class:`fxfreeze.Artifact`, not saved yet.

    Raises:
        PlanError: a pattern matches nothing, or adapter weights or examples do not fit.
        CaptureError: the model cannot be captured, or is not frozen; names module and source line.
        PassError, ProofError: a rewrite was refused, or turned out wrong.
        EmitError: a target cannot be made, or disagrees with the frozen model. Nothing is left behind.
    """
    say = progress or (lambda text: None)
    done = rewrite(model, plan, example_inputs=example_inputs, verify=verify, progress=say)
    return Artifact.create(
        done.program, plan, done.reference, source=done.source, passes=done.passes, proofs=done.proofs,
        ledger=done.ledger, examples=done.examples, exact=done.lossless, evaluate=evaluate, progress=say,
    )  # fmt: skip


def rewrite(
    model: nn.Module,
    plan: Plan,
    *,
    example_inputs: Any = None,
    verify: Verify = "full",
    progress: Progress | None = None,
) -> Compilation:
    """Capture `model` and run every pass over it: :func:`compile` without its targets."""
    say = progress or (lambda text: None)
    if not isinstance(model, AdaptedModule) and not plan.steps:
        say("capturing the model")
        return _rewrite_plain(model, plan, flat_examples(plan, example_inputs), verify, say)
    if isinstance(model, AdaptedModule):
        net, examples = model, flat_examples(plan, example_inputs)
    else:
        say("capturing the model and inserting adapters")
        net, examples = adapt(model, plan, example_inputs=example_inputs, verify=verify), None
    return _rewrite_adapted(net, plan, examples, verify, say)


def _rewrite_plain(
    model: nn.Module, plan: Plan, examples: list[Tensor] | None, verify: Verify, say: Progress
) -> Compilation:
    from .passes import PIPELINE

    program, flat = capture(model, plan, examples)

    def reference(*inputs: Tensor) -> tuple[Tensor, ...]:
        with frozen(model):
            return flat(*inputs)

    say("rewriting and proving")
    ctx, source = Context(plan), program.clone()
    rows, prover = run_passes(
        program, stage_passes(PIPELINE, STAGES), ctx, verify=verify, draws=proof_draws(program, verify, examples)
    )
    return Compilation(program, plan, ctx.ledger, rows, prover.rows, reference, source, examples)


def _rewrite_adapted(
    net: AdaptedModule, plan: Plan, examples: list[Tensor] | None, verify: Verify, say: Progress
) -> Compilation:
    """Run the stages after "adapt" over an adapted module's program, with the adapters' current values."""
    from .passes import PIPELINE

    net.check_plan(plan)
    program, reference = net.program(), net.reference
    examples = net.origins.examples if examples is None else examples
    say("rewriting and proving")
    ctx, source = Context(plan, Ledger(list(net.ledger))), program.clone()
    rows, prover = run_passes(
        program, stage_passes(PIPELINE, STAGES[STAGES.index("freeze") :]), ctx,
        verify=verify, draws=proof_draws(program, verify, examples),
    )  # fmt: skip
    passes, proofs = [*net.origins.passes, *rows], [*net.origins.proofs, *prover.rows]
    return Compilation(program, plan, ctx.ledger, passes, proofs, reference, source, examples)
