"""``fxfreeze.compile``: the whole way from a frozen model and a plan to an artifact; and what quantizing would cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from .adapt import AdaptedModule, adapt
from .artifact import Artifact, nested
from .calibration import Calibration
from .capture import capture, check_capture, flat_examples, frozen
from .errors import PlanError
from .parity import Flat
from .pipeline import PassRow, proof_draws, run_passes, stage_passes
from .plan import Plan, Quantize
from .program import Program
from .proof import ProofRow, Verify
from .rewrite import REPRODUCED, STAGES, Context, Ledger
from .sensitivity import SiteSensitivity, ranked
from .serialize import Interface

Progress = Callable[[str], None]


@dataclass
class Compilation:
    """Everything known between the passes and the emitters.

    Attributes:
        program: after the last pass, its constants rounded.
        reference: the frozen model (with its adapters, if any) in eager torch, flat tensors to flat tensors.
        source: the program before the exact passes: with the adapters in it, after the last lossy pass.
        examples: flat tensors the model accepts, when the caller gave some.
        sensitivity: what quantizing each layer alone did, where that was measured.
    """

    program: Program
    plan: Plan
    ledger: Ledger
    passes: list[PassRow]
    proofs: list[ProofRow]
    reference: Flat
    source: Program
    examples: list[Tensor] | None
    sensitivity: list[SiteSensitivity]

    @property
    def lossless(self) -> bool:
        """Whether program and reference are the same function up to rounding."""
        return all(row.exact or row.stage in REPRODUCED for row in self.passes if row.rewrites)


def compile(
    model: nn.Module,
    plan: Plan,
    *,
    example_inputs: Any = None,
    calibration: Iterable[Any] | None = None,
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
        calibration: batches of inputs, each as `example_inputs`, on which lossy steps (the hardening of gates, masks)
            are measured, and channels are chosen. A DataLoader may be read more than once; a generator is read once and
            kept.
        evaluate: scores a callable that is called like the model, higher is better; run on the frozen model and on
            every target, and recorded in ``manifest["scores"]``. A budget of the score runs it once per layer, too.
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
    done = rewrite(
        model, plan, example_inputs=example_inputs, calibration=calibration, evaluate=evaluate, verify=verify,
        progress=say,
    )  # fmt: skip
    return Artifact.create(
        done.program, plan, done.reference, source=done.source, passes=done.passes, proofs=done.proofs,
        ledger=done.ledger, sensitivity=done.sensitivity, examples=done.examples, exact=done.lossless,
        evaluate=evaluate, progress=say,
    )  # fmt: skip


def sensitivity(
    model: nn.Module,
    plan: Plan,
    *,
    example_inputs: Any = None,
    calibration: Iterable[Any] | None = None,
    evaluate: Callable[[Callable[..., Any]], float] | None = None,
    progress: Progress | None = None,
) -> list[SiteSensitivity]:
    """Quantize every layer that `plan` quantizes alone, on one batch, and measure; the most sensitive comes first.

    It runs the model once per layer and scheme on the first batch of `calibration`; and `evaluate`, which may run it on
    a whole test set, as often.

    Args:
        model, plan, example_inputs, calibration: as for :func:`fxfreeze.compile`; targets do not matter.
        evaluate: scores a callable that is called like the model; higher is better.
        progress: told in a few words what is being done.

    Raises:
        PlanError: the plan quantizes nothing.
    """
    if not any(isinstance(step, Quantize) for step in plan.steps):
        raise PlanError("the plan quantizes nothing", where="steps", hint="add fz.Quantize()")
    done = rewrite(
        model, plan, example_inputs=example_inputs, calibration=calibration, evaluate=evaluate, verify="off",
        sensitivity=True, progress=progress,
    )  # fmt: skip
    return ranked(done.sensitivity)


def rewrite(
    model: nn.Module,
    plan: Plan,
    *,
    example_inputs: Any = None,
    calibration: Iterable[Any] | None = None,
    evaluate: Callable[[Callable[..., Any]], float] | None = None,
    verify: Verify = "full",
    sensitivity: bool = False,
    progress: Progress | None = None,
) -> Compilation:
    """Capture `model` and run every pass over it: :func:`compile` without its targets.

    Args:
        sensitivity: measure what quantizing each layer alone does, even where no budget needs to know.
    """
    say = progress or (lambda text: None)
    if isinstance(calibration, Iterator):
        calibration = list(calibration)  # it is read while adapters are inserted, and again behind
    if not isinstance(model, AdaptedModule) and not plan.steps:
        say("capturing the model")
        return _rewrite_plain(model, plan, _Inputs.of(plan, example_inputs, calibration), verify, say)
    if isinstance(model, AdaptedModule):
        net, inputs = model, _Inputs.of(plan, example_inputs, calibration, evaluate, sensitivity)
    else:
        say("capturing the model and inserting adapters")
        net = adapt(model, plan, example_inputs=example_inputs, calibration=calibration, verify=verify)
        inputs = _Inputs(None, calibration, evaluate, sensitivity)
    return _rewrite_adapted(net, plan, inputs, verify, say)


@dataclass(frozen=True)
class _Inputs:
    """What the caller gave to run the model on, and to measure by."""

    examples: list[Tensor] | None
    batches: Iterable[Any] | None
    evaluate: Callable[[Callable[..., Any]], float] | None = None
    sensitivity: bool = False

    @classmethod
    def of(cls, plan: Plan, examples: Any, *rest: Any) -> _Inputs:
        return cls(flat_examples(plan, examples), *rest)

    def context(self, program: Program, plan: Plan, ledger: Ledger) -> Context:
        ctx = Context(plan, ledger, given=Calibration(plan, self.batches, self.examples), sensitivity=self.sensitivity)
        if (evaluate := self.evaluate) is not None:
            interface = Interface.of(program)
            ctx.evaluate = lambda run: float(evaluate(nested(interface, run)))
        return ctx


def _rewrite_plain(model: nn.Module, plan: Plan, inputs: _Inputs, verify: Verify, say: Progress) -> Compilation:
    from .passes import PIPELINE

    program, flat = capture(model, plan, inputs.examples)

    def reference(*values: Tensor) -> tuple[Tensor, ...]:
        with frozen(model):
            return flat(*values)

    say("rewriting and proving")
    ctx, source = inputs.context(program, plan, Ledger()), program.clone()
    rows, prover = run_passes(
        program, stage_passes(PIPELINE, STAGES), ctx, verify=verify, draws=proof_draws(program, verify, inputs.examples)
    )
    if ctx.source is not None:  # what is emitted is another function, so this is the last that compares with the model
        check_capture(source, flat, prover.draws)
    source = ctx.source or source
    return Compilation(program, plan, ctx.ledger, rows, prover.rows, reference, source, inputs.examples, ctx.measured)


def _rewrite_adapted(net: AdaptedModule, plan: Plan, inputs: _Inputs, verify: Verify, say: Progress) -> Compilation:
    """Run the stages after "adapt" over an adapted module's program, with the adapters' current values."""
    from .passes import PIPELINE

    net.check_plan(plan)
    program, reference = net.program(), net.reference
    inputs = inputs if inputs.examples is not None else replace(inputs, examples=net.origins.examples)
    say("rewriting and proving")
    ctx, source = inputs.context(program, plan, Ledger(list(net.ledger))), program.clone()
    rows, prover = run_passes(
        program, stage_passes(PIPELINE, STAGES[STAGES.index("freeze") :]), ctx,
        verify=verify, draws=proof_draws(program, verify, inputs.examples),
    )  # fmt: skip
    passes, proofs = [*net.origins.passes, *rows], [*net.origins.proofs, *prover.rows]
    source = ctx.source or source
    return Compilation(program, plan, ctx.ledger, passes, proofs, reference, source, inputs.examples, ctx.measured)
