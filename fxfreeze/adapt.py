"""``fxfreeze.adapt``: a frozen model with adapters in it, ready to be trained by any loop.

>>> net = adapt(model, plan)
>>> optimizer = torch.optim.AdamW(net.parameters())    # the adapters, and nothing else
>>> loss(net(image)).backward()
>>> artifact = fxfreeze.compile(net, plan)
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from . import weights
from .binding import build, check_inputs, flatten_inputs
from .calibration import Calibration
from .capture import capture, check_capture, flat_examples
from .errors import PlanError
from .pipeline import PassRow, proof_draws, run_passes, stage_passes
from .plan import Plan
from .program import Program
from .proof import ProofRow, Verify
from .rewrite import Context, Ledger

_STAGES = ("clean", "adapt")


@dataclass
class Origins:
    """Where an adapted module comes from: shared, not copied, by its deep copies."""

    program: Program
    plan: Plan
    ledger: Ledger
    passes: list[PassRow] = field(default_factory=list)
    proofs: list[ProofRow] = field(default_factory=list)
    examples: list[Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Origins:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("an adapted module cannot be pickled; keep its state_dict() or save_adapters()")


def adapt(
    model: nn.Module,
    plan: Plan,
    *,
    example_inputs: Any = None,
    calibration: Iterable[Any] | None = None,
    verify: Verify = "full",
) -> AdaptedModule:
    """Put the plan's adapters into `model`.

    Args:
        model: any nn.Module. It is captured in eval mode, shares its weights with the result, and is left as it was.
        plan: inputs, and the steps to insert; its targets do not matter yet.
        example_inputs: inputs the model accepts, when random ones would not do.
        calibration: batches of inputs, each as `example_inputs`, for what is measured on data (what masks change before
            weights train), and chosen by it: channels, by ``Prune(criterion="taylor")``. The loss that this
            differentiates knows no labels: it is half the sum of the squares of all floating outputs.
        verify: how much to prove; see :func:`fxfreeze.compile`.

    Returns:
        A module that computes what `model` computes (until its adapters are trained, or unless the plan names trained
        weights), whose only parameters are the adapters'. A Tversky head starts near the layer it replaces, and a soft
        gate as open as the ledger says; what a Prune step masks is gone at once.

    Raises:
        PlanError: a step matches nothing it can adapt, or its weights do not fit.
        CaptureError, PassError, ProofError: as :func:`fxfreeze.compile`.
    """
    from .passes import PIPELINE

    examples = flat_examples(plan, example_inputs)
    program, eager = capture(model, plan, examples)
    draws = proof_draws(program, verify, examples)
    check_capture(program, eager, draws)
    ctx = Context(plan, given=Calibration(plan, calibration, examples))
    rows, prover = run_passes(program, stage_passes(PIPELINE, _STAGES), ctx, verify=verify, draws=draws)
    return AdaptedModule(Origins(program, plan, ctx.ledger, rows, prover.rows, examples))


class AdaptedModule(nn.Module):
    """A frozen graph with trainable adapters.

    Call it like the model: by position in the plan's order, or by keyword, nested as the plan's names say. Outputs are
    nested as the model's; a dataclass (and the outputs of transformers) comes back as a dict.

    Its parameters are the adapters', named as in adapter files. Temperatures of gates are buffers
    (``settings.<step>.temperature``), which :class:`fxfreeze.nn.TemperatureSchedule` finds, and so are the frozen
    matrices of VeRA (``settings.<step>.vera_A``, ``vera_B``), the masks of Prune
    (``frozen.<step>.<module path>.<parameter>_mask``), and copies of what a spliced module holds besides trained
    parameters (``frozen.<step>.<module path>.<leaf>``). The model's weights are buffers that share memory with the
    model and are not part of :meth:`state_dict`: loading a state, moving the module, or training it never changes them.
    ``train()`` and ``eval()`` make no difference: the model was captured for inference, with dropout gone and
    batch-norm fixed, and trains that way.

    After a call, :attr:`tapped` holds what the plan's :class:`~fxfreeze.Tap` steps saw in it: ``<step>.<module path>``
    → tensor, with its gradient. A copy of the module has seen nothing.

    It runs on the device it was captured on; a graph that makes tensors of its own would not follow a ``.to(device)``.
    """

    def __init__(self, origins: Origins) -> None:
        super().__init__()
        self.origins = origins
        program = origins.program
        self.body, names = _lifted(program)
        trainable, settings, held = set(program.trainable()), set(program.settings()), set(program.held())
        self.adapters, self.frozen = nn.Module(), nn.Module()
        self._constants: list[tuple[nn.Module, str]] = []
        self._homes: dict[str, tuple[nn.Module, str]] = {}
        self._settings: dict[str, tuple[nn.Module, str]] = {}
        self._held: dict[str, tuple[nn.Module, str]] = {}
        self.tapped: dict[str, Tensor] = {}
        for position, (name, dtype) in enumerate(names.items()):
            value = program.state[name].detach().to(dtype)
            if name in trainable:
                home = _home(self, name)
                home[0].register_parameter(home[1], nn.Parameter(value.clone()))
                self._homes[name] = home
            elif name in settings:
                home = self._settings[name] = _home(self, name)
                home[0].register_buffer(home[1], value.clone())
            elif name in held:
                home = self._held[name] = _home(self, name)
                home[0].register_buffer(home[1], value.clone())
            else:
                home = _home(self.frozen, f"constant_{position}")  # a step may be called like that
                self.frozen.register_buffer(home[1], value, persistent=False)
            self._constants.append(home)

    # ------------------------------------------------------------------ running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        program = self.origins.program
        flat = flatten_inputs([spec.name for spec in program.inputs], args, kwargs, error=PlanError)
        check_inputs(program.inputs, program.dims, flat, error=PlanError)
        constants = [getattr(owner, leaf) for owner, leaf in self._constants]
        results = self.body(*constants, *flat)
        self.tapped = dict(zip(program.taps, results[len(program.outputs) :], strict=True))
        return build(program.structure, results)

    @property
    def reference(self) -> GraphModule:
        """The module as it is now, flat tensors to flat tensors, without gradients: what its artifacts must compute."""
        return self.program().graph_module()

    def program(self) -> Program:
        """The captured program with copies of the current adapter values, temperatures and constants of spliced
        modules, in the dtypes and on the device it had.

        Raises:
            PlanError: an adapter holds NaN or Inf.
        """
        program = self.origins.program.clone()
        program.untap()
        for name, value in (self.adapter_state() | self._setting_state()).items():
            old = program.state[name]
            weights.check(name, value, old.shape, "the adapted module")
            program.state[name] = value.to(old.device, old.dtype)
        for name, value in self._held_state().items():
            old = program.state[name]
            program.state[name] = value.to(old.device, old.dtype)
        return program

    def __getstate__(self) -> dict[str, Any]:
        # What a call saw hangs on its autograd graph, which nothing can copy.
        return {**self.__dict__, "tapped": {}}

    # ------------------------------------------------------------------ reading

    @property
    def plan(self) -> Plan:
        """The plan it was adapted with."""
        return self.origins.plan

    @property
    def ledger(self) -> Ledger:
        """What became of every step at every site."""
        return self.origins.ledger

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the adapters: all there are."""
        return self.parameters()

    def adapter_state(self) -> dict[str, Tensor]:
        """A copy of every adapter parameter, by name (``adapters.<step>.<module path>.<leaf>``)."""
        return {name: getattr(owner, leaf).detach().clone() for name, (owner, leaf) in self._homes.items()}

    def _setting_state(self) -> dict[str, Tensor]:
        return {name: getattr(owner, leaf).detach().clone() for name, (owner, leaf) in self._settings.items()}

    def _held_state(self) -> dict[str, Tensor]:
        return {name: getattr(owner, leaf).detach().clone() for name, (owner, leaf) in self._held.items()}

    @property
    def temperatures(self) -> list[Tensor]:
        """The temperatures of the gates, 0-d, one per step: set them in place."""
        held = [getattr(owner, leaf) for owner, leaf in self._settings.values()]
        return [value for value in held if not value.ndim]  # VeRA's matrices are settings too

    _gate_temperatures = temperatures  # how fxfreeze.nn.TemperatureSchedule tells gates from modules of others

    def extra_repr(self) -> str:
        steps = ", ".join(f"{step.name} at {step.at}" for step in self.plan.steps) or "no steps"
        return f"{steps}; {sum(value.numel() for value in self.parameters()):,} trainable parameters"

    # ------------------------------------------------------------------ files

    def save_adapters(self, path: str | os.PathLike[str]) -> None:
        """Write the adapters, the temperatures of gates, the matrices of VeRA, masks, and what spliced modules hold
        besides trained parameters (buffers, frozen parameters) to a safetensors file, in one step; a plan's step can
        name it as its `weights`.

        Raises:
            PlanError: the file cannot be written.
        """
        weights.write(
            path, self.adapter_state() | self._setting_state() | self._held_state(), weights.metadata(self.plan)
        )

    def load_adapters(self, path: str | os.PathLike[str]) -> None:
        """Read what :meth:`save_adapters` wrote, or any safetensors file with exactly these names; all or nothing.

        A file without temperatures leaves them as they are, and so does one without any mask or constant of spliced
        modules.

        Raises:
            PlanError: a key is missing, unexpected, of another shape or kind of dtype, or holds NaN or Inf; the file
                was trained with another scale; or it is of a newer version.
        """
        stored, metadata = weights.read(path)
        where = os.fspath(path)
        weights.check_metadata(metadata, self.plan.steps, where)
        settings = {name: getattr(owner, leaf) for name, (owner, leaf) in self._settings.items() if name in stored}
        held = {name: getattr(owner, leaf) for name, (owner, leaf) in self._held.items()}
        held = held if held.keys() & stored.keys() else {}  # all of them, or a file of another origin
        weights.check_keys([*self._homes, *settings, *held], list(stored), where)
        for name in settings:
            weights.check_setting(name, stored[name], where, settings[name].shape)
        homes = {name: getattr(owner, leaf) for name, (owner, leaf) in self._homes.items()}
        for name, parameter in homes.items():
            weights.check(name, stored[name], parameter.shape, where)
        for name, constant in held.items():
            weights.check_constant(name, stored[name], constant, where)
        with torch.no_grad():
            for name, value in (homes | settings | held).items():
                value.copy_(stored[name])

    # ------------------------------------------------------------------ compiling

    def check_plan(self, plan: Plan) -> None:
        """Refuse a plan that asks for another module than this one.

        Raises:
            PlanError: inputs, outputs, dims or steps differ; targets may.
        """
        for key in ("inputs", "outputs", "dims", "steps"):
            mine, theirs = getattr(self.plan, key), getattr(plan, key)
            if mine != theirs:
                raise PlanError(
                    f"{key}: not what the module was adapted with: {_difference(mine, theirs)}",
                    hint="compile with the plan given to adapt (net.plan); only its targets may change",
                )


def _difference(mine: Any, theirs: Any) -> str:
    if isinstance(mine, tuple) and isinstance(theirs, tuple):
        if len(mine) != len(theirs):
            return f"{len(theirs)} of them instead of {len(mine)}"
        index = next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
        return f"number {index} is {theirs[index]!r} instead of {mine[index]!r}"
    return f"{theirs!r} instead of {mine!r}"


def _lifted(program: Program) -> tuple[GraphModule, dict[str, torch.dtype]]:
    """The graph as a module without state: constants come in first, in the order of the names returned."""
    graph, names = program.clone().graph, {}
    first = next(iter(graph.nodes))
    constants = [node for node in graph.nodes if node.op == "get_attr"]
    inputs: dict[str, Node] = {}
    for node in constants:
        name = str(node.target)
        if name not in inputs:
            with graph.inserting_before(first):
                inputs[name] = graph.placeholder(f"constant_{len(inputs)}")
            inputs[name].meta = dict(node.meta)
            names[name] = node.meta["val"].dtype
        node.replace_all_uses_with(inputs[name])
    for node in constants:
        graph.erase_node(node)
    return GraphModule(nn.Module(), graph, class_name="AdaptedGraph"), names


def _home(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The submodule of `root` that a dotted name leads to, made if need be, and the free attribute at its end."""
    *path, leaf = name.split(".")
    owner = root
    for part in path:
        while part not in owner._modules and hasattr(owner, part):
            part += "_"  # a module of the user's is called like a method of nn.Module
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner._modules[part]  # type: ignore[assignment]
    while hasattr(owner, leaf):
        leaf += "_"
    return owner, leaf
