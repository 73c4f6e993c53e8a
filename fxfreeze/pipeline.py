"""Runs passes in order, holds each to its contract, proves it, and keeps the record."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .constants import version
from .errors import PassError, PlanError
from .program import Program, TensorSpec
from .proof import Prover, Verify
from .rewrite import REPRODUCED, STAGES, Context, Pass
from .sampling import sample_inputs, tracing_sizes

_DRAWS = {"full": 2, "sampled": 1, "off": 0}
_WIDER = 8


@dataclass(frozen=True)
class PassRow:
    """One pass of one compilation: how many rewrites, operators before and after, seconds, and the proven error."""

    name: str
    stage: str
    exact: bool
    rewrites: int
    operators_before: int
    operators_after: int
    seconds: float
    error: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def proof_draws(
    program: Program, verify: Verify, examples: Sequence[torch.Tensor] | None = None
) -> list[list[torch.Tensor]]:
    """Inputs to prove on: two draws of different sizes for "full", one for "sampled", none for "off".

    Raises:
        PlanError: `verify` is none of the three.
    """
    if verify not in _DRAWS:
        raise PlanError(f"verify={verify!r}", hint="use 'full', 'sampled' or 'off'")
    sizes = tracing_sizes(program.inputs, program.dims, examples)
    # The second draw has other sizes, so that a rewrite that is right for one size only is caught.
    draws = [sizes, _grown(sizes, program)][: _DRAWS[verify]]
    drawn = [sample_inputs(program, size, seed=seed, examples=examples) for seed, size in enumerate(draws)]
    return drawn if examples is not None else [*drawn[:1], *(_widened(program, draw) for draw in drawn[1:])]


def _widened(program: Program, draw: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Larger numbers where the plan allows any: what saturates (ReLU6, a clamp) then does, and a rewrite that is right
    only up to there is caught."""

    def is_open(spec: TensorSpec) -> bool:
        return spec.dtype.is_floating_point and spec.low is None and spec.high is None

    return [value * _WIDER if is_open(spec) else value for spec, value in zip(program.inputs, draw, strict=True)]


def _grown(sizes: dict[str, int], program: Program) -> dict[str, int]:
    grown = {}
    for name, size in sizes.items():
        high = program.dims.get(name, (1, None))[1]
        grown[name] = size + 1 if high is None or size < high else size
    return grown


def run_passes(
    program: Program,
    passes: Iterable[Pass],
    ctx: Context,
    *,
    verify: Verify = "full",
    draws: Sequence[Sequence[torch.Tensor]] | None = None,
) -> tuple[list[PassRow], Prover]:
    """Run `passes` over `program`, in place.

    Every pass must return the number of its rewrites, and 0 exactly when it changed nothing; its result is verified,
    its interface (inputs, and outputs' dtypes and ranks) must be the old one, and an exact pass is proven.

    Raises:
        PassError: a pass broke the contract, or refused a site.
        ProofError: an exact pass changed the function.
    """
    program.sweep()
    program.verify()
    prover = Prover(program, proof_draws(program, verify) if draws is None else draws)
    dump = _Dumper(os.environ.get("FXFREEZE_DEBUG"))
    dump("capture", program)
    rows, fingerprint = [], program.fingerprint()
    for item in passes:
        row, fingerprint = _run_one(item, program, ctx, prover, fingerprint)
        rows.append(row)
        if rows[-1].rewrites:
            dump(item.name, program, ctx)
        ctx.near_misses.clear()
    return rows, prover


def stage_passes(passes: Sequence[Pass], stages: Iterable[str]) -> list[Pass]:
    """The passes of the named stages, in pipeline order.

    Raises:
        PassError: the pipeline is not in the order of the stages.
    """
    wanted = set(stages)
    positions = [STAGES.index(item.stage) for item in passes]
    if positions != sorted(positions):
        raise PassError("passes/__init__.py is not in stage order: " + " → ".join(item.name for item in passes))
    return [item for item in passes if item.stage in wanted]


def _run_one(item: Pass, program: Program, ctx: Context, prover: Prover, before: str) -> tuple[PassRow, str]:
    """Its row, and the program's fingerprint now; `before`: the one until now."""
    interface, size = _interface(program), _operators(program)
    tensors = {name: program.state.tensor(name) for name in program.state}
    versions = {name: (weakref.ref(value), version(value)) for name, value in tensors.items()}
    del tensors  # what the pass replaces can go
    ctx.ledger.current_pass = item.name
    started = time.perf_counter()
    rewrites = item.run(program, ctx)
    program.sweep()
    seconds = time.perf_counter() - started
    for name, (reference, old) in versions.items():
        if (value := reference()) is not None and version(value) != old:
            raise PassError(
                f"pass {item.name!r} wrote to constant {name!r} in place, which may be the user's own tensor",
                where=item.name, hint="put a new tensor into program.state; this is a defect of the pass",
            )  # fmt: skip
    after = program.fingerprint()
    changed = after != before
    if changed != bool(rewrites):
        raise PassError(
            f"pass {item.name!r} reported {rewrites} rewrites, but the program {'changed' if changed else 'did not'}",
            where=item.name, hint="run() must return the number of its rewrites; this is a defect of the pass",
        )  # fmt: skip
    error = None
    if changed:
        _check_result(item, program, interface)
        proof = prover.accept(item.name, program, exact=item.exact)
        error = proof.error if proof else None
        if not item.exact and item.stage not in REPRODUCED:
            ctx.source = program.clone()
    row = PassRow(item.name, item.stage, item.exact, rewrites, size, _operators(program), seconds, error)
    return row, after


def _check_result(item: Pass, program: Program, interface: Any) -> None:
    try:
        program.verify()
    except PassError as error:
        raise PassError(f"pass {item.name!r} left an invalid program: {error.what}", where=error.where) from error
    now = _interface(program)
    if item.stage == "adapt":  # a head makes outputs of its own, or of another shape
        interface, now = interface[:1], now[:1]
    if now != interface:
        raise PassError(f"pass {item.name!r} changed the interface from {interface} to {now}", where=item.name)


def _interface(program: Program) -> Any:
    outputs = [node.meta["val"] for node in program.output_nodes]
    return program.inputs, program.outputs, tuple((str(value.dtype), value.ndim) for value in outputs)


def _operators(program: Program) -> int:
    return sum(node.op == "call_function" for node in program.graph.nodes)


class _Dumper:
    """Writes ``NNN_pass.py`` after each pass that changed something, when FXFREEZE_DEBUG names a folder."""

    def __init__(self, folder: str | None) -> None:
        self.folder, self.count = Path(folder) if folder else None, 0

    def __call__(self, name: str, program: Program, ctx: Context | None = None) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [str(program)]
        for miss in ctx.near_misses if ctx else ():
            lines.append(f"# no match at {miss.node.name}: {miss.reason}")
        (self.folder / f"{self.count:03d}_{name}.py").write_text("\n".join(lines) + "\n")
        self.count += 1
