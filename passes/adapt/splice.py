"""Put modules into the graph: on an edge, in a module's place, or behind a value as outputs of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.fx import Node, map_arg

from fxfreeze.dataflow import sort
from fxfreeze.errors import PlanError
from fxfreeze.graft import Graft, Scion, first_argument, graft, infer_again, same_form, scion
from fxfreeze.plan import BayesCap, Grafted, Head, Prompt, Replace
from fxfreeze.program import ADAPTERS, FROZEN, Origin, Program
from fxfreeze.rewrite import Context, Pass, match_sites

from .._adapters import SPLICE, DeltaStep, describe, parameter_name
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
    all calls share them. Modules act in the order in which the model runs, inner sites before outer ones, and at one
    site in plan order. In half precision a module computes in its own dtype.

    Heads come last, behind all that the other steps put there.
    """

    name, stage, exact = "insert-splice", "adapt", False

    def run(self, program: Program, ctx: Context) -> int:
        steps = [(index, step) for index, step in enumerate(ctx.plan.steps) if isinstance(step, Grafted)]
        if not steps:
            return 0
        garden = _Garden(program, ctx)
        requests = [request for index, step in steps for request in garden.requests(step, index)]
        placements = [(request, call) for request in requests for call in range(len(request.places))]
        for request, call in sorted(placements, key=lambda item: garden.order(*item)):
            garden.plant(request, call)
        for source in {id(request.source): request.source for request in requests}.values():
            source.finish()
        for request in requests:
            garden.tell(request)
        return len(placements)


@dataclass
class _Request:
    """A step at a site.

    Attributes:
        index: of the step in the plan.
        places: what the module reads and what its result takes the place of, call by call.
        module, constants, operators: what was grafted by now; parameters and buffers by their names in the module.
    """

    index: int
    step: Grafted
    path: str
    source: Source
    places: list[Place]
    module: nn.Module | None = None
    constants: dict[str, Node] = field(default_factory=dict)
    operators: int = 0


@dataclass
class _Garden:
    """The graph while modules are put into it.

    Attributes:
        chains: what is behind a value by now.
        entries: what is between that and those who read it, by the last link of the former.
        position: of the nodes of the user's graph.
    """

    program: Program
    ctx: Context
    chains: dict[Node, Chain] = field(default_factory=dict)
    entries: dict[Node, Chain] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # All globs are resolved on the user's graph.
        self.results: Results = find_results(self.program)
        self.operands: Operands = find_operands(self.program)
        self.position = {node: index for index, node in enumerate(self.program.graph.nodes)}

    # ------------------------------------------------------------------ where

    def requests(self, step: Grafted, index: int) -> list[_Request]:
        """The sites of `step`.

        Raises:
            PlanError: there is none; a head has several; or a step changes what another removes.
        """
        offers: Offers = self.operands
        if step.on == "output":
            offers = self.results
        elif step.on in ("weight", "bias"):
            offers = find_parameters(self.program, step.on)
        if step.on not in ("output", "input"):
            _refuse_others(self.program, self.ctx, step, index)
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
        source = Source(step, self.ctx.plan.steps)
        return [_Request(index, step, path, source, self._at(step, path, offers)) for path in taken]

    def order(self, request: _Request, call: int) -> tuple[Any, ...]:
        """As the model runs: what a value is before what reads it, inner modules first; heads last, then the plan."""
        step, node = request.step, request.places[call][1].node
        inwards = step.on == "input"
        depth = request.path.count(".")
        return _is_head(step), self.position[node], inwards, depth if inwards else -depth, request.index

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
        given = self.operands.operators.get(path, [])
        if len(given) != len(results):
            raise PlanError(f"{path} is not given one floating tensor per call", where=step.name)
        return list(zip(given, results, strict=True))

    def _made(self, value: Value, site: str | None = None) -> Node:
        """What `value` is behind all that was put there, or that was put there for `site` and modules in it."""
        return self._chain(value).end(value.users, site)

    def _given(self, value: Value) -> Node:
        """What those who read `value` are given."""
        return self._entry(value).end(value.users)

    def _chain(self, value: Value) -> Chain:
        return self.chains.setdefault(value.node, Chain(value.node))

    def _entry(self, value: Value) -> Chain:
        made = self._made(value)
        return self.entries.setdefault(made, Chain(made))

    def _read(self, request: _Request, call: int) -> Node:
        step, (read, replaced) = request.step, request.places[call]
        if step.on == "input" or read is not replaced:
            return self._given(read)
        return self._made(read, request.path if _is_head(step) else None)

    # ------------------------------------------------------------------ what

    def plant(self, request: _Request, call: int) -> None:
        """Graft the module of a request for one of its calls; all calls have the same parameters."""
        step, path, program = request.step, request.path, self.program
        origin, value = Origin(step.name, SPLICE, path, call), self._read(request, call)
        module = request.module = request.module or make(step, value.meta["val"], path)
        first, taps = first_argument(module), self._taps(step)
        if first in taps:
            raise PlanError(
                f"taps: {first!r} is the argument of {type(module).__name__} that the value itself is given as",
                where=step.name, hint="name another argument of its forward",
            )  # fmt: skip
        operands = {first: value, **taps}
        mask = None if step.mask is None else self._named(step, "mask", step.mask)
        before = _behind(program, [*operands.values(), *([] if mask is None else [mask])])
        if step.read == "result":
            operands[first] = self._again(request.places[call][0], path, before, origin)
        operands = _cast(program, operands, _dtype(module), before, origin)
        found = scion(program, module, operands, path)
        request.constants |= self._constants(request, found, origin)
        end, replaced = program.graph.output_node(), request.places[call][1].node
        made = graft(program, found, list(operands.values()), request.constants, before=before, like=end, origin=origin)
        request.operators += len(made.nodes)
        if _is_head(step):
            _put_out(program, step, made, mask, origin)
            return
        nodes = self._put_in(request, call, made, mask, before, origin)
        if step.on in ("output", "module"):  # a part of the site's module, and of what that is in
            for node in nodes:
                node.meta["nn_module_stack"] = _stack(replaced, path)

    def _again(self, given: Value, path: str, before: Node, origin: Origin) -> Node:
        """What the module at `path` makes of what it is given by now, by a copy of its operators.

        Raises:
            PlanError: it returns several tensors, or none.
        """
        copies: dict[Node, Node] = {}  # of operators only: what they read from outside is behind all steps by now
        left = [node for node in given.body if not given.body.issuperset(node.users)]
        if len(left) != 1:
            raise PlanError(
                f"{path} returns {len(left)} tensors, where one is read", where=origin.step,
                hint="read='result' is for a module that returns one tensor",
            )  # fmt: skip
        for node in [node for node in self.program.graph.nodes if node in given.body]:
            args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda old: copies.get(old, old))
            copies[node] = self.program.call(node.target, *args, before=before, like=given.node, **kwargs)
            copies[node].meta["fxfreeze"] = origin
        return copies[left[0]]

    def _taps(self, step: Grafted) -> dict[str, Node]:
        found = {keyword: self._named(step, "taps", what) for keyword, what in step.taps.items()}
        if step.selection is not None:
            names = [spec.name for spec in self.program.inputs]
            found[step.selection[0]] = self.program.placeholders[names.index(step.selection[0])]
        return found

    def _named(self, step: Grafted, key: str, what: str) -> Node:
        """The input of that name, or what the module at that path returns, behind the steps there."""
        names = [spec.name for spec in self.program.inputs]
        if what in names:
            self._refuse_short(step, key, what)
            return self.program.placeholders[names.index(what)]
        values = self.results.operators.get(what, [])
        if len(values) != 1:
            reason = "returns several tensors, or runs several times" if values else "is no input and no module"
            raise PlanError(f"{key}: {what!r} {reason}", where=step.name, hint=f"the inputs are {', '.join(names)}")
        return self._made(values[0], what)

    def _refuse_short(self, step: Grafted, key: str, name: str) -> None:
        """Raises PlanError: the input `name` lacks the positions that a prompt has added to all values."""
        prompts = [other.name for other in self.ctx.plan.steps if isinstance(other, Prompt)]
        shape = next(spec.shape for spec in self.program.inputs if spec.name == name)
        if prompts and any(isinstance(size, str) for size in shape[1:]):
            raise PlanError(
                f"{key}: {name!r} is as long as the sequences without the prompt of {prompts[0]!r}",
                where=step.name, hint="tap a module that reads it",
            )  # fmt: skip

    def _constants(self, request: _Request, held: Scion, origin: Origin) -> dict[str, Node]:
        """Nodes of the module's parameters and buffers that are not there yet, in front of everything."""
        program, step, source = self.program, request.step, request.source
        first, like = next(iter(program.graph.nodes)), program.graph.output_node()
        found: dict[str, Node] = {}
        for name in [name for name in held.program.state if name not in request.constants]:
            value = held.program.state[name]
            trains = name in held.trainable
            full = parameter_name(step, origin.site, name) if trains else f"{FROZEN}{step.name}.{origin.site}.{name}"
            if full in program.state:
                raise PlanError(f"the model has a constant named {full}", where=origin.site, hint="rename the step")
            if trains:
                parameter = Parameter(name, tuple(value.shape), _as_is(value))
                value = source.value(origin.site, parameter).to(value.device, value.dtype)
            else:
                value = source.held(full, value)
            found[name] = program.add_constant(full, value, before=first, like=like)
            found[name].meta = {"val": found[name].meta["val"], "fxfreeze": origin}
        return found

    def _put_in(
        self, request: _Request, call: int, made: Graft, mask: Node | None, before: Node, origin: Origin
    ) -> frozenset[Node]:
        """Let those who read a value read the one result of `made`, or the sum of both; all nodes that makes."""
        program, step, replaced = self.program, request.step, request.places[call][1]
        chain = self._entry(replaced) if step.on == "input" else self._chain(replaced)
        old = chain.end(replaced.users)
        if len(made.results) != 1:
            raise PlanError(
                f"{step.name!r} returns {len(made.results)} tensors where one is read", where=origin.site,
                hint="a module on an edge returns one tensor; a head returns any number",
            )  # fmt: skip
        (new,), nodes = made.results, set(made.nodes)
        _check_kind(step, new, old, origin)

        def emit(target: Any, *args: Any) -> Node:
            node = program.call(target, *args, before=before, like=program.graph.output_node())
            node.meta["fxfreeze"] = origin
            nodes.add(node)
            return node

        if step.how == "add":
            _check_form(step, new, old, origin, "be added to")
            new = emit(aten.add.Tensor, old, new if step.scale == 1 else emit(aten.mul.Tensor, new, step.scale))
        if new.meta["val"].dtype != old.meta["val"].dtype:
            new = emit(aten.to.dtype, new, old.meta["val"].dtype)
        if mask is not None:
            new = _where(step, mask, new, old, emit, origin)
        chain.add(new, replaced.users, frozenset(nodes), request.path)
        # A tap may come after those who read the value.
        if not sort(program.graph):
            raise PlanError(
                f"what {step.name!r} reads is made of what it changes", where=origin.site,
                hint="tap a value that does not depend on the site",
            )  # fmt: skip
        if not same_form(new, old):
            infer_again(program, {new}, step.name)
        return frozenset(nodes)

    def tell(self, request: _Request) -> None:
        """The row of a request in the ledger."""
        step, state = request.step, self.program.state
        trained = [name for node in request.constants.values() if (name := str(node.target)).startswith(ADAPTERS)]
        held = f"weights from {step.weights}" if step.weights else "with the weights it came with"
        self.ctx.ledger.add(
            site=request.path, step=step.name, requested=describe(step), outcome="rewritten",
            executes=f"{request.operators} operators of {type(request.module).__name__}",
            detail=f"{sum(state[name].numel() for name in trained):,} trainable parameters, {held}",
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


def _stack(node: Node, path: str) -> dict[str, Any]:
    """The modules around `node`, to the one at `path`."""
    stack: dict[str, tuple[str, str]] = node.meta.get("nn_module_stack") or {}
    depth = next((at for at, (inner, _) in enumerate(stack.values(), 1) if inner == path), len(stack))
    return dict(list(stack.items())[:depth])


def _refuse_others(program: Program, ctx: Context, step: Grafted, index: int) -> None:
    """Raises PlanError: another step changes the module, or the weight, that `step` takes the place of."""
    for path in match_sites(program, step, index):
        for number, other in enumerate(ctx.plan.steps):
            if number == index or (step.on != "module" and not isinstance(other, DeltaStep | Replace)):
                continue
            for found in match_sites(program, other, number):
                if found == path or (step.on == "module" and found.startswith(f"{path}.")):
                    does = "takes it away" if step.on == "module" else f"makes its {step.on} anew"
                    raise PlanError(
                        f"steps {step.name!r} and {other.name!r} both address {found}, but {step.name!r} {does}",
                        where=found, hint=f"leave {found} out of the patterns of one of them",
                    )  # fmt: skip


def _check_kind(step: Grafted, new: Node, old: Node, origin: Origin) -> None:
    """Raises PlanError: `step` makes integers or bools of numbers."""
    if old.meta["val"].is_floating_point() and not new.meta["val"].is_floating_point():
        raise PlanError(
            f"{step.name!r} makes {new.meta['val'].dtype} of {old.meta['val'].dtype}", where=origin.site,
            hint="return numbers, such as (x > 0) * x",
        )  # fmt: skip


def _check_form(step: Grafted, new: Node, old: Node, origin: Origin, use: str) -> None:
    """Raises PlanError: what `step` makes has another shape than the value that it is to `use`."""
    made, there = (list(node.meta["val"].shape) for node in (new, old))
    if list(map(str, made)) != list(map(str, there)):
        raise PlanError(
            f"{step.name!r} makes {made}, which cannot {use} {there}", where=origin.site,
            hint="return the shape of the value",
        )  # fmt: skip


def _where(step: Grafted, mask: Node, new: Node, old: Node, emit: Callable[..., Node], origin: Origin) -> Node:
    """`new` where `mask` says so, else `old`.

    Raises:
        PlanError: the mask has another shape than the value begins with, or the value another one than before.
    """
    _check_form(step, new, old, origin, "take the place of some positions of")
    given, value = mask.meta["val"], old.meta["val"]
    leading = zip(given.shape, value.shape, strict=False)
    if given.ndim > value.ndim or not all(str(own) in ("1", str(size)) for own, size in leading):
        raise PlanError(
            f"mask: {step.mask!r} is {list(given.shape)}, with which the value {list(value.shape)} does not begin",
            where=origin.site, hint="name a mask with a number for every position, such as [batch, sequence]",
        )  # fmt: skip
    holds = mask if given.dtype == torch.bool else emit(aten.ne.Scalar, mask, 0)
    for _ in range(value.ndim - given.ndim):
        holds = emit(aten.unsqueeze.default, holds, -1)
    return emit(aten.where.self, holds, new, old)


def _put_out(program: Program, step: Head | BayesCap, made: Graft, mask: Node | None, origin: Origin) -> None:
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
    _check_kind(step, new, old, origin)

    def emit(target: Any, *args: Any) -> Node:
        node = program.call(target, *args, before=end, like=end)
        node.meta["fxfreeze"] = origin
        return node

    if step.how == "add":
        _check_form(step, new, old, origin, "be added to")
        new = emit(aten.add.Tensor, old, new)
    if new.meta["val"].dtype != old.meta["val"].dtype:
        new = emit(aten.to.dtype, new, old.meta["val"].dtype)
    if mask is not None:
        new = _where(step, mask, new, old, emit, origin)
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
