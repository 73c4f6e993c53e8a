"""Put modules into the graph: on an edge, in a module's place, or behind a value as outputs of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxfreeze.dataflow import sort
from fxfreeze.errors import PlanError
from fxfreeze.graft import Graft, Scion, first_argument, graft, infer_again, same_form, scion
from fxfreeze.plan import BayesCap, Grafted, Head
from fxfreeze.program import ADAPTERS, FROZEN, Origin, Program
from fxfreeze.rewrite import Context, Pass, match_sites

from .._adapters import SPLICE, describe, parameter_name
from .._operators import aten
from ._methods import make
from ._parameters import Parameter, Source
from ._sites import Chain, Offers, Operands, Results, Value, find_operands, find_parameters, find_results, resolve

Place = tuple[Value, Value]
"""What a module reads, and what its result takes the place of."""


class InsertSplice(Pass):
    """Graft the modules of the plan's steps: ``v ← f(v, taps…)``, ``v ← v + s·f(v, taps…)``, and new outputs.

    A module is captured at the shapes of what it is given, and its operators become part of the graph: its parameters
    are adapters, those that require no gradient and its buffers constants. Where the site's module runs several times,
    all calls share them. Steps at one site act in plan order. In half precision a module computes in its own dtype.

    Heads come last, behind all that the other steps put there.
    """

    name, stage, exact = "insert-splice", "adapt", False

    def run(self, program: Program, ctx: Context) -> int:
        steps = [(index, step) for index, step in enumerate(ctx.plan.steps) if isinstance(step, Grafted)]
        if not steps:
            return 0
        garden = _Garden(program, ctx)
        requests = [(step, garden.places(step, index)) for index, step in steps]
        for step, places in sorted(requests, key=lambda item: _is_head(item[0])):
            source = Source(step, ctx.plan.steps)
            for path, calls in places.items():
                garden.plant(step, path, calls, source)
            source.finish()
        if garden.reshaped:
            infer_again(program, garden.reshaped, ", ".join(step.name for _, step in steps))
        return sum(len(places) for _, places in requests)


@dataclass
class _Garden:
    """The graph while modules are put into it.

    Attributes:
        chains: what is behind a value by now.
        reshaped: results that have another shape than what stood in their place.
    """

    program: Program
    ctx: Context
    chains: dict[Node, Chain] = field(default_factory=dict)
    reshaped: set[Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        # All globs are resolved on the user's graph.
        self.results: Results = find_results(self.program)
        self.operands: Operands = find_operands(self.program)

    # ------------------------------------------------------------------ where

    def places(self, step: Grafted, index: int) -> dict[str, list[Place]]:
        """Path → what `step` changes there, call by call.

        Raises:
            PlanError: there is none; a head has several; or a step changes what another removes.
        """
        offers: Offers = self.operands
        if step.on == "output":
            offers = self.results
        elif step.on in ("weight", "bias"):
            offers = find_parameters(self.program, step.on)
        taken, refused = resolve(offers, step, index)
        for path, reason in refused.items():
            self.ctx.ledger.add(
                site=path, step=step.name, requested=describe(step), outcome="refused", detail=f"{path} {reason}"
            )
        if _is_head(step) and len(taken) > 1:
            raise PlanError(
                f"steps[{index}].at: {step.at!r} names {', '.join(taken)}, but a head reads one value",
                where=step.name, hint="name the others in taps",
            )  # fmt: skip
        return {path: self._at(step, path, offers) for path in taken}

    def _at(self, step: Grafted, path: str, offers: Offers) -> list[Place]:
        if step.on in ("input", "weight", "bias"):
            return [(value, value) for value in offers.operators[path]]
        results = self.results.operators.get(path, [])
        if len({value.body for value in results}) < len(results):
            raise PlanError(f"{path} returns several tensors", where=step.name, hint="name a module that returns one")
        if _is_head(step) and len(results) > 1:
            raise PlanError(f"{path} runs {len(results)} times, but a head reads one value", where=step.name)
        if step.on == "output" and step.read == "value":
            return [(value, value) for value in results]
        if step.on == "module":
            _refuse_others(self.program, self.ctx, step, path)
        given = self.operands.operators.get(path, [])
        if len(given) != len(results):
            raise PlanError(f"{path} is not given one floating tensor per call", where=step.name)
        return list(zip(given, results, strict=True))

    def end(self, value: Value) -> Node:
        """What those who read `value` read by now."""
        return self._chain(value).end(value.users)

    def _chain(self, value: Value) -> Chain:
        return self.chains.setdefault(value.node, Chain(value.node))

    # ------------------------------------------------------------------ what

    def plant(self, step: Grafted, path: str, places: list[Place], source: Source) -> None:
        """Graft the module of `step` at `path`, once per call, all with the same parameters."""
        module = make(step, self.end(places[0][0]).meta["val"], path)
        constants: dict[str, Node] = {}
        operators = 0
        for call, (read, replaced) in enumerate(places):
            origin = Origin(step.name, SPLICE, path, call)
            operands = {first_argument(module): self.end(read), **self._taps(step)}
            before = _behind(self.program, operands.values())
            operands = _cast(self.program, operands, _dtype(module), before, origin)
            found = scion(self.program, module, operands, path)
            constants = constants or self._constants(step, found, origin, source)
            # What a head computes is the model's, and nothing that its site returns.
            like = self.program.graph.output_node() if _is_head(step) else replaced.node
            made = graft(
                self.program, found, list(operands.values()), constants, before=before, like=like, origin=origin
            )
            operators += len(made.nodes)
            if _is_head(step):
                _put_out(self.program, step, made, origin)
            else:
                self._put_in(step, made, replaced, before, origin)
        self._tell(step, path, module, f"{operators} operators", constants)

    def _taps(self, step: Grafted) -> dict[str, Node]:
        names = [spec.name for spec in self.program.inputs]
        found: dict[str, Node] = {}
        for keyword, what in step.taps.items():
            values = self.results.operators.get(what, [])
            if what in names:
                found[keyword] = self.program.placeholders[names.index(what)]
            elif len(values) == 1:
                found[keyword] = self.end(values[0])
            else:
                reason = "returns several tensors, or runs several times" if values else "is no input and no module"
                raise PlanError(f"taps: {what!r} {reason}", where=step.name, hint=f"the inputs are {', '.join(names)}")
        if step.selection is not None:
            found[step.selection[0]] = self.program.placeholders[names.index(step.selection[0])]
        return found

    def _constants(self, step: Grafted, held: Scion, origin: Origin, source: Source) -> dict[str, Node]:
        """Nodes of the module's parameters and buffers, in front of everything."""
        first, like = next(iter(self.program.graph.nodes)), self.program.output_nodes[0]
        found: dict[str, Node] = {}
        for name in held.program.state:
            value = held.program.state[name]
            trains = name in held.trainable
            full = parameter_name(step, origin.site, name) if trains else f"{FROZEN}{step.name}.{origin.site}.{name}"
            if full in self.program.state:
                raise PlanError(f"the model has a constant named {full}", where=origin.site, hint="rename the step")
            if trains:
                parameter = Parameter(name, tuple(value.shape), _as_is(value))
                value = source.value(origin.site, parameter).to(value.device, value.dtype)
            found[name] = self.program.add_constant(full, value, before=first, like=like)
            found[name].meta = {"val": found[name].meta["val"], "fxfreeze": origin}
        return found

    def _put_in(self, step: Grafted, made: Graft, replaced: Value, before: Node, origin: Origin) -> None:
        """Let those who read `replaced` read the one result of `made`, or the sum of both."""
        program, old = self.program, self.end(replaced)
        if len(made.results) != 1:
            raise PlanError(
                f"{step.name!r} returns {len(made.results)} tensors where one is read", where=origin.site,
                hint="a module on an edge returns one tensor; a head returns any number",
            )  # fmt: skip
        (new,), nodes = made.results, set(made.nodes)

        def emit(target: Any, *args: Any) -> Node:
            node = program.call(target, *args, before=before, like=replaced.node)
            node.meta["fxfreeze"] = origin
            nodes.add(node)
            return node

        if step.how == "add":
            _check_sum(step, new, old, origin)
            new = emit(aten.add.Tensor, old, new if step.scale == 1 else emit(aten.mul.Tensor, new, step.scale))
        if new.meta["val"].dtype != old.meta["val"].dtype:
            new = emit(aten.to.dtype, new, old.meta["val"].dtype)
        self._chain(replaced).add(new, replaced.users, frozenset(nodes))
        if not same_form(new, old):
            self.reshaped.add(new)
        # A tap may come after those who read the value.
        if not sort(program.graph):
            raise PlanError(
                f"what {step.name!r} reads is made of what it changes", where=origin.site,
                hint="tap a value that does not depend on the site",
            )  # fmt: skip

    def _tell(self, step: Grafted, path: str, module: nn.Module, made: str, constants: dict[str, Node]) -> None:
        trained = [str(node.target) for node in constants.values() if str(node.target).startswith(ADAPTERS)]
        count = sum(self.program.state[name].numel() for name in trained)
        held = f"weights from {step.weights}" if step.weights else "with the weights it came with"
        self.ctx.ledger.add(
            site=path, step=step.name, requested=describe(step), outcome="rewritten",
            executes=f"{made} of {type(module).__name__}", detail=f"{count:,} trainable parameters, {held}",
        )  # fmt: skip


def _is_head(step: Grafted) -> TypeGuard[Head | BayesCap]:
    return isinstance(step, Head | BayesCap)


def _as_is(value: Tensor) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: value


def _dtype(module: nn.Module) -> torch.dtype | None:
    return next((item.dtype for item in module.parameters() if item.is_floating_point()), None)


def _cast(
    program: Program, operands: dict[str, Node], dtype: torch.dtype | None, before: Node, origin: Origin
) -> dict[str, Node]:
    """The operands in the module's dtype."""
    found = {}
    for keyword, node in operands.items():
        value = node.meta["val"]
        if dtype is not None and value.is_floating_point() and value.dtype != dtype:
            node = program.call(aten.to.dtype, node, dtype, before=before, like=node)
            node.meta["fxfreeze"] = origin
        found[keyword] = node
    return found


def _behind(program: Program, operands: Iterable[Node]) -> Node:
    """The first node that may read all of `operands`."""
    position = {node: index for index, node in enumerate(program.graph.nodes)}
    node = max(operands, key=position.__getitem__).next
    while node.op == "placeholder":
        node = node.next
    return node


def _refuse_others(program: Program, ctx: Context, step: Grafted, path: str) -> None:
    """Raises PlanError: another step changes the module that `step` takes the place of, or what is in it."""
    for index, other in enumerate(ctx.plan.steps):
        for found in [] if other is step else match_sites(program, other, index):
            if found == path or found.startswith(f"{path}."):
                raise PlanError(
                    f"steps {step.name!r} and {other.name!r} both address {found}, but {step.name!r} takes it away",
                    where=found, hint=f"leave {found} out of the patterns of {other.name!r}",
                )  # fmt: skip


def _check_sum(step: Grafted, new: Node, old: Node, origin: Origin) -> None:
    """Raises PlanError: what `step` makes has another shape than what it is to be added to."""
    made, there = (list(node.meta["val"].shape) for node in (new, old))
    if list(map(str, made)) != list(map(str, there)):
        raise PlanError(
            f"{step.name!r} makes {made}, which cannot be added to {there}", where=origin.site,
            hint="what is added has the shape of the value",
        )  # fmt: skip


def _put_out(program: Program, step: Head | BayesCap, made: Graft, origin: Origin) -> None:
    """Make the results of `made` outputs of the program, or change one that it has."""
    if step.how == "new":
        program.add_outputs(dict(zip(_names(program, step, made), made.results, strict=True)))
        return
    if len(made.results) != 1:
        raise PlanError(f"{step.name!r} returns {len(made.results)} tensors for one output", where=origin.site)
    name = step.output or program.outputs[0]
    if name not in program.outputs:
        raise PlanError(
            f"output: the model has no output {name!r}", where=step.name,
            hint=f"its outputs are {', '.join(program.outputs)}",
        )  # fmt: skip
    results, (new,) = list(program.output_nodes), made.results
    index, end = program.outputs.index(name), program.graph.output_node()
    old = results[index]
    if step.how == "add":
        _check_sum(step, new, old, origin)
        new = program.call(aten.add.Tensor, old, new, before=end, like=old)
        new.meta["fxfreeze"] = origin
    results[index] = new
    end.args = (tuple(results),)
    end.meta["val"] = tuple(node.meta["val"] for node in results)


def _names(program: Program, step: Head | BayesCap, made: Graft) -> list[str]:
    """What the new outputs are called."""
    if step.outputs is None:
        plain = made.names == ("output",)
        names = [step.name] if plain else [f"{step.name}.{name.removeprefix('output_')}" for name in made.names]
    else:
        names = list(step.outputs)
    if len(names) != len(made.results):
        raise PlanError(f"outputs: {len(names)} names for {len(made.results)} results", where=step.name)
    if taken := [name for name in names if name in program.outputs]:
        raise PlanError(f"outputs: the model has an output {taken[0]!r}", where=step.name, hint="choose another name")
    return names
