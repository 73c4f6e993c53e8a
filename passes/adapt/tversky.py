"""Put the plan's Tversky heads in the place of linear layers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxfreeze.errors import PlanError
from fxfreeze.kernels.tversky import KERNEL
from fxfreeze.nn.tversky import TverskyProjection
from fxfreeze.plan import Prune, Quantize, Tversky
from fxfreeze.program import Origin, Program
from fxfreeze.rewrite import Context, Pass, match_sites

from .._adapters import HEAD, addresses, describe, parameter_name
from .._operators import WeightOperator, apply, aten, weight_operator
from ._parameters import Parameter, Source, parameter_dtype
from ._sites import Sites, find_sites, resolve

_LINEAR = ("linear", "matmul")


class InsertTversky(Pass):
    """Replace each addressed linear layer by ``fxfreeze::tversky`` with parameters that train.

    Bank, prototypes, θ, α and β are the step's; a bias of the layer becomes one of the step's too. With
    ``start="linear"`` the new scores rank the outputs nearly as the layer did, otherwise they start anew: a generator
    seeded by the name of the step and the site draws them.

    A module that runs several times has one set of parameters.
    """

    name, stage, exact = "insert-tversky", "adapt", False

    def run(self, program: Program, ctx: Context) -> int:
        steps = [(index, step) for index, step in enumerate(ctx.plan.steps) if isinstance(step, Tversky)]
        if not steps:
            return 0
        sites = find_sites(program)
        _keep_linear(sites)
        count = 0
        for index, step in steps:
            taken, refused = resolve(sites, step, index)
            for path, reason in refused.items():
                ctx.ledger.add(
                    site=path, step=step.name, requested=describe(step), outcome="refused", detail=f"{path} {reason}"
                )
            source = Source(step, ctx.plan.steps)
            for path in taken:
                _refuse_others(program, ctx, step, path)
                count += _replace(program, ctx, path, sites.operators[path], step, source)
            source.finish()
        return count


def _keep_linear(sites: Sites) -> None:
    for path, operators in list(sites.operators.items()):
        if operators[0].kind not in _LINEAR:
            sites.refused[path] = (
                f"runs {operators[0].node.target}, and a Tversky head takes the place of linear layers"
            )
            del sites.operators[path]


def _refuse_others(program: Program, ctx: Context, step: Tversky, path: str) -> None:
    """Raises PlanError: another step adapts the layer that `step` removes. Quantizing is later, and meets the head."""
    for index, other in enumerate(ctx.plan.steps):
        if other is step or isinstance(other, Quantize) or path not in match_sites(program, other, index):
            continue
        if not isinstance(other, Prune) or addresses(other, path):  # one that excludes the layer does not
            raise PlanError(
                f"steps {step.name!r} and {other.name!r} both address {path}, but {step.name!r} takes the layer away",
                where=path, hint=f"leave {path} out of the patterns of {other.name!r}",
            )  # fmt: skip


def _replace(
    program: Program, ctx: Context, path: str, operators: list[WeightOperator], step: Tversky, source: Source
) -> int:
    first = operators[0]
    values = _start(program, first, step, path)
    dtype = parameter_dtype(first.weight.meta["val"].dtype)
    nodes: dict[str, Node] = {}
    for leaf, value in values.items():
        name = parameter_name(step, path, leaf)
        if name in program.state:
            raise PlanError(f"the model already has a parameter named {name}", where=path, hint="rename the step")
        parameter = Parameter(leaf, tuple(value.shape), _given(value))
        held = source.value(path, parameter).to(value.device, dtype)
        nodes[leaf] = program.add_constant(name, held, before=first.node, like=first.node)
        nodes[leaf].meta["fxfreeze"] = Origin(step.name, HEAD, path)
    for call, operator in enumerate(operators):
        current = weight_operator(operator.node)  # read again: its input may have been replaced
        assert isinstance(current, WeightOperator)
        program.replace(operator.node, _call(program, current, step, nodes, Origin(step.name, HEAD, path, call)))
    start = "out of the linear layer" if step.start == "linear" else "drawn"
    ctx.ledger.add(
        site=path, step=step.name, requested=describe(step), outcome="rewritten", executes=str(KERNEL.op),
        detail=f"weights from {step.weights}" if step.weights else f"untrained: {start}",
    )  # fmt: skip
    return len(operators)


def _start(program: Program, operator: WeightOperator, step: Tversky, path: str) -> dict[str, Tensor]:
    """Values before training, by leaf, in float32 or wider; where a file has trained ones, only shapes count."""
    stored = apply(operator.to_canonical(), program.state[str(operator.weight.target)])
    linear = nn.Linear(operator.in_features, operator.out_features, operator.bias is not None, device="meta")
    dtype = parameter_dtype(stored.dtype)
    linear.weight = nn.Parameter(stored.detach().to(dtype))
    if operator.bias is not None:
        bias = program.state[str(operator.bias.target)].detach().to(dtype)
        linear.bias = nn.Parameter(bias.expand(operator.out_features))
    if step.start == "linear" and step.weights is None:  # which takes seconds for a vocabulary
        try:
            layer = TverskyProjection.from_linear(linear, step.features)
        except ValueError as error:
            raise PlanError(str(error), where=path, hint="use start='random'") from error
    else:
        layer = _drawn(linear, step, path)
    return {name: value.detach() for name, value in layer.named_parameters()}


def _given(value: Tensor) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: value


def _drawn(linear: nn.Linear, step: Tversky, path: str) -> TverskyProjection:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(hashlib.sha256(parameter_name(step, path, "").encode()).digest()[:7]))
        layer = TverskyProjection(
            linear.in_features, linear.out_features, step.features or 2 * linear.in_features, model=step.model,
            intersection=step.intersection, difference=step.difference, semantics=step.semantics,
            threshold=step.threshold, normalize=step.normalize, bias=linear.bias is not None, dtype=linear.weight.dtype,
        )  # fmt: skip
    return layer.to(linear.weight.device)


def _call(program: Program, operator: WeightOperator, step: Tversky, nodes: dict[str, Node], origin: Origin) -> Node:
    """The head on what `operator` reads, in the dtype of its result."""
    before, like, source = operator.node, operator.node, operator.input

    def emit(target: object, *args: object, **kwargs: object) -> Node:
        node = program.call(target, *args, before=before, like=like, **kwargs)  # type: ignore[arg-type]
        node.meta["fxfreeze"] = origin
        return node

    narrow, wide = source.meta["val"].dtype, nodes["features"].meta["val"].dtype
    if narrow != wide:
        source = emit(aten.to.dtype, source, wide)
    weights = (nodes[name] for name in ("features", "prototypes", "theta", "alpha", "beta"))
    scores = emit(
        KERNEL.op, source, *weights, model=step.model, intersection=step.intersection, difference=step.difference,
        semantics=step.semantics, threshold=float(step.threshold), normalize=step.normalize,
    )  # fmt: skip
    if "bias" in nodes:
        scores = emit(aten.add.Tensor, scores, nodes["bias"])
    return scores if narrow == wide else emit(aten.to.dtype, scores, narrow)
