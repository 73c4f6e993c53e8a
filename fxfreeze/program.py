"""The IR: one functional ATen graph, its constants, and what the user calls its parts.

A :class:`Program` is the graph that ``torch.export`` writes before decomposition (``aten.linear``, ``aten.conv2d``,
``aten.batch_norm``, ``aten.layer_norm`` and attention stay whole), made functional and flat: placeholders are the
plan's tensor inputs in plan order, ``get_attr`` nodes are constants, and the one output node returns a flat tuple.

The graph is a bare :class:`torch.fx.Graph`; code is generated only when something executable is asked for
(:meth:`Program.graph_module`). Constants live in :attr:`Program.state`. They are shared with the user's model and are
therefore never written to; a folded constant is a float64 computation (:mod:`fxfreeze.constants`) until the ``round``
pass, so that several folds into one weight are rounded once. The dtype a constant will be stored in is that of its
node's ``meta["val"]``.
"""

from __future__ import annotations

import hashlib
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from .constants import Constants, Edit, Recipe, lift, lift_dtype
from .errors import PassError

SYMBOLIC_FUNCTIONS: frozenset[Any] = frozenset(
    {
        operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod,
        operator.pow, operator.neg, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge,
        operator.and_, operator.or_, operator.not_,
        torch.sym_max, torch.sym_min, torch.sym_not, torch.sym_int, torch.sym_float, torch.sym_ite, torch.sym_sqrt,
    }
)  # fmt: skip
"""Python functions on sizes that may stand in a graph beside operators."""


_CPU = torch.device("cpu")


@dataclass(frozen=True)
class TensorSpec:
    """A flat tensor input: its name (dotted when nested), dtype, shape (a string is a symbolic dim), the closed range
    its values are drawn from, the device it must lie on, and whether a step added it to select by, in that range."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]
    low: float | None = None
    high: float | None = None
    device: torch.device = _CPU
    select: bool = False


ADAPTERS = "adapters."
"""What the name of every constant that a plan step added to be trained begins with."""

SETTINGS = "settings."
"""What the name of every constant that a plan step added to be set while it trains begins with."""


FROZEN = "frozen."
"""What the name of every constant that a plan step added beside those begins with."""


FIRES = "FIRES"
"""`Origin.primitive` of the comparison that says which neurons of a gate fire."""

BANK = "BANK"
"""`Origin.primitive` of a constant that holds one matrix of all adapters that rows select from; see banks.py."""
BANK_NOTE = "note"
"""What passes note in the ``meta`` of such a constant: why peft's adapter of the layer would be none of this one."""

INTEGERS = "integers"
"""What passes note in the ``meta`` of a layer that they quantize: an :class:`IntegerSite`."""

GATE_FACTS = ("kept", "neurons", "share")
"""What passes note in the ``meta`` of a gate's node: see :class:`fxfreeze.firing.GateRow`."""


@dataclass(frozen=True)
class Origin:
    """Why a node is there: the plan step that asked for it, the adapter primitive, the site it acts on, and which call
    of the site's module it belongs to where that runs more than once."""

    step: str
    primitive: str
    site: str
    call: int = 0


@dataclass(frozen=True)
class IntegerSite:
    """A quantized layer: its module path, and the plan step that asked for it; or a product of two computed values.

    `twins` are layers with the same weight and input, which it computes, too.
    """

    path: str
    step: str
    product: bool = False
    twins: tuple[IntegerSite, ...] = ()

    def ran(self, kernel: str | None) -> list[list[str | None]]:
        """For it and its twins the module path, the step, and the kernel that runs them."""
        return [[site.path, site.step, kernel] for site in (self, *self.twins)]


@dataclass(frozen=True)
class Fold:
    """What was folded into a constant, kept until rounding shows how much of it survives.

    Attributes:
        base: the constant without what was folded in; a scale folded into the constant later is folded into this too.
        max_loss: the largest ‖rounded − exact‖ / ‖exact − base‖ to put up with.
    """

    step: str
    site: str
    base: Recipe
    max_loss: float


@dataclass
class Program:
    """A frozen model as a functional ATen graph; see the module docstring.

    Attributes:
        graph: placeholders, ``get_attr`` constants, operator calls, one output node with a flat tuple.
        state: constants by name; a parameter keeps its name in the user's model. Never written to in place.
        inputs: one :class:`TensorSpec` per placeholder, in order.
        outputs: a name for every flat output.
        structure: JSON description of how flat outputs nest (see :mod:`fxfreeze.binding`).
        dims: smallest and largest size (None: unbounded) of every symbolic dim.
        folds: adapters folded into a constant whose rounding has not been measured yet.
        taps: names of what is returned behind the outputs while it trains; no part of `structure`.
        left: module path → why a known layer of another library was captured as it is.
    """

    graph: Graph
    state: Constants
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    structure: dict[str, Any]
    dims: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    folds: dict[str, Fold] = field(default_factory=dict)
    taps: tuple[str, ...] = ()
    left: dict[str, str] = field(default_factory=dict)
    _kept: dict[tuple[Recipe | torch.Tensor, torch.dtype], torch.Tensor] | None = field(
        default=None, init=False, repr=False, compare=False
    )
    _told: tuple[object, str] | None = field(default=None, init=False, repr=False, compare=False)

    # ------------------------------------------------------------------ reading

    def __str__(self) -> str:
        return "\n".join(_format_node(self, node) for node in self.graph.nodes)

    @property
    def placeholders(self) -> list[Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def output_nodes(self) -> tuple[Node, ...]:
        return tuple(self.graph.output_node().args[0])  # type: ignore[arg-type]

    @property
    def fake_mode(self) -> FakeTensorMode:
        """The mode every ``meta["val"]`` belongs to; it knows the symbolic sizes."""
        for node in self.graph.nodes:
            if isinstance(value := node.meta.get("val"), torch._subclasses.FakeTensor):
                return value.fake_mode
        return FakeTensorMode(allow_non_fake_inputs=True)

    def constant(self, node: Any) -> torch.Tensor | None:
        """The tensor behind a ``get_attr`` node, or None when `node` is anything else."""
        return self.state[str(node.target)] if self.is_constant(node) else None

    def constant64(self, node: Any) -> torch.Tensor | None:
        """Like :meth:`constant`, in float64 (complex128) when it holds floating (complex) numbers."""
        value = self.constant(node)
        return None if value is None else lift(value)

    def is_constant(self, node: Any) -> bool:
        """Whether :meth:`constant` gives a tensor, which it may have to compute."""
        return isinstance(node, Node) and node.op == "get_attr" and str(node.target) in self.state

    def stored(self, node: Node) -> torch.Tensor:
        """The tensor behind a ``get_attr`` node in the dtype that it is stored in: the `load` of :meth:`execute`."""
        name, dtype = str(node.target), node.meta["val"].dtype
        held = self.state.held(name)
        if self._kept is None or (self.state.dtype(name) == dtype and not isinstance(held, Recipe)):
            return self.state[name].to(dtype)
        # By the recipe, which is another one as soon as something is folded into the constant.
        if (held, dtype) not in self._kept:
            self._kept[held, dtype] = self.state[name].to(dtype)
        return self._kept[held, dtype]

    @contextmanager
    def computed_once(self, *others: Program) -> Iterator[None]:
        """While it lasts, :meth:`stored` keeps what it computes: as much as the folded constants will take in the end.

        For many runs: a fold is computed in float64, and a table that stays in it rounded, which takes longer than many
        a layer.

        Args:
            others: programs that have constants in common with this one, and keep them with it.
        """
        programs = (self, *others)
        before = [program._kept for program in programs]
        kept = next((known for known in before if known is not None), {})
        for program in programs:
            program._kept = kept
        try:
            yield
        finally:
            for program, old in zip(programs, before, strict=True):
                program._kept = old

    def module_path(self, node: Node) -> str:
        """Path of the module whose forward made `node`, as the user knows it; "" for the model itself."""
        stack = node.meta.get("nn_module_stack") or {}
        return next(reversed(stack.values()))[0] if stack else ""

    def module_classes(self, node: Node) -> dict[str, str]:
        """Every module around `node`, outermost first: path → qualified class name."""
        return dict((node.meta.get("nn_module_stack") or {}).values())

    def source_line(self, node: Node) -> str | None:
        """``file:line`` of the innermost user frame that made `node`, when export recorded one."""
        frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
        return f"{frames[-1][0].rsplit('/', 1)[-1]}:{frames[-1][1]}" if frames else None

    def where(self, node: Node) -> str:
        """`node` for an error message: module path, operator and source line."""
        line = self.source_line(node)
        return f"{self.module_path(node) or '<model>'} ({node.target}{', ' + line if line else ''})"

    def sites(self) -> dict[str, tuple[Node, ...]]:
        """Module path → operator nodes, in graph order.

        A node belongs to the module whose forward ran it, and also to the module that owns a parameter it reads:
        ``nn.MultiheadAttention`` never calls the forward of its ``out_proj``, yet that is what its user calls it.
        """
        found: dict[str, dict[Node, None]] = {}
        for node in self.graph.nodes:
            if node.op != "call_function":
                continue
            owners = [str(arg.target).rpartition(".")[0] for arg in node.all_input_nodes if arg.op == "get_attr"]
            for path in [self.module_path(node), *owners]:
                found.setdefault(path, {})[node] = None
        return {path: tuple(nodes) for path, nodes in found.items()}

    def module_paths(self) -> dict[str, str]:
        """Every module path a node names, with its class: what an `at=` pattern can match."""
        found: dict[str, str] = {}
        for node in self.graph.nodes:
            found.update(self.module_classes(node))
        for path in self.sites():
            found.setdefault(path, "")
        found.pop("", None)
        return found

    def trainable(self) -> list[str]:
        """Names of the constants that plan steps added to be trained, in graph order.

        The name alone does not tell: a user's model may have a module called ``adapters`` too.
        """
        return self._added(ADAPTERS)

    def settings(self) -> list[str]:
        """Names of the constants that plan steps added to be set while they train, in graph order."""
        return self._added(SETTINGS)

    def held(self) -> list[str]:
        """Names of the constants that modules of plan steps came with and that are not trained, in graph order."""
        return self._added(FROZEN)

    def _added(self, prefix: str) -> list[str]:
        found = {
            str(node.target): None
            for node in self.graph.nodes
            if node.op == "get_attr" and str(node.target).startswith(prefix) and "fxfreeze" in node.meta
        }
        return list(found)

    # ------------------------------------------------------------------ rewriting

    def add_constant(
        self, name: str, value: torch.Tensor | Recipe, *, dtype: torch.dtype | None = None, before: Node, like: Node
    ) -> Node:
        """A new ``get_attr`` node before `before` holding `value`, stored as `dtype` (default: its own) in the end.

        The name is made unique; provenance is copied from `like`.
        """
        name = self._unique_name(name)
        self.state[name] = value
        with self.graph.inserting_before(before):
            node = self.graph.create_node("get_attr", name)
        with self.fake_mode as mode:
            fake = mode.from_tensor(self.state.tensor(name).detach(), static_shapes=True)
            node.meta["val"] = fake.to(self.state.dtype(name) if dtype is None else dtype)
        _copy_provenance(like, node)
        return node

    def readers(self, constant: Node) -> set[Node]:
        """Every node that reads the constant which the ``get_attr`` node `constant` names."""
        same = self.graph.find_nodes(op="get_attr", target=constant.target)
        return {reader for node in same for reader in node.users}

    def rebind(self, constant: Node, value: torch.Tensor | Recipe, *, user: Node) -> Node:
        """Let `user` read `value` where it reads the ``get_attr`` node `constant`; the storage dtype stays.

        Where something else reads the constant too, that keeps the old one: `user` gets a constant of its own.

        Returns:
            The node `user` reads now.
        """
        if self.readers(constant) <= {user}:
            self.state[str(constant.target)] = value
            return constant
        dtype = constant.meta["val"].dtype
        own = self.add_constant(str(constant.target), value, dtype=dtype, before=user, like=constant)
        user.replace_input_with(constant, own)
        return own

    def call(self, target: Callable[..., Any], *args: Any, before: Node, like: Node, **kwargs: Any) -> Node:
        """A new operator call before `before`; its shape and dtype are computed, so a misfit raises here.

        Raises:
            PassError: the operator refuses these shapes or dtypes.
        """
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        _copy_provenance(like, node)
        try:
            self.infer(node)
        except Exception as error:
            self.graph.erase_node(node)
            raise PassError(
                f"{target} refuses these operands: {first_line(error)}", where=self.module_path(like)
            ) from error
        return node

    def infer(self, node: Node) -> None:
        """Compute ``meta["val"]`` of `node` from its operands' under the fake tensor mode."""
        args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
        # The dispatcher: kernels such as aten.lstm's take numbers only, their Python twins symbolic sizes too.
        with self.fake_mode, torch.no_grad(), enable_python_dispatcher():
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]

    def refine(self, constant: Node, edit: Edit, *, user: Node) -> Node:
        """:meth:`rebind` to `edit` of what the constant is; computed when it is read."""
        return self.rebind(constant, self.state.recipe(str(constant.target)).then(edit), user=user)

    def replace(self, old: Node, new: Node) -> None:
        """Let every user of `old` read `new` instead; `old` stays until :meth:`sweep`."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    def add_outputs(self, found: Mapping[str, Node]) -> None:
        """Return more: a dict gets more keys, a tuple or list more items; one tensor becomes a tuple."""
        if self.taps:
            raise PassError("outputs are added before taps")
        count, structure = len(self.outputs), dict(self.structure)
        leaves = {name: {"kind": "tensor", "index": count + number} for number, name in enumerate(found)}
        if structure["kind"] == "dict":
            structure["items"] = {**structure["items"], **leaves}
        elif structure["kind"] in ("tuple", "list"):
            structure["items"] = [*structure["items"], *leaves.values()]
        else:
            structure = {"kind": "tuple", "items": [structure, *leaves.values()]}
        self._return((*self.output_nodes, *found.values()))
        self.outputs, self.structure = (*self.outputs, *found), structure

    def tap(self, found: Mapping[str, Node]) -> None:
        """Return more behind the outputs, until :meth:`untap`."""
        self._return((*self.output_nodes, *found.values()))
        self.taps = (*self.taps, *found)

    def untap(self) -> None:
        """Return the outputs alone, and drop what nothing else reads."""
        self._return(self.output_nodes[: len(self.outputs)])
        self.taps = ()
        self.sweep()

    def _return(self, results: tuple[Node, ...]) -> None:
        end = self.graph.output_node()
        end.args, end.meta["val"] = (results,), tuple(node.meta["val"] for node in results)

    def sweep(self) -> int:
        """Remove operators nothing reads and constants nothing names; the number of operators removed."""
        removed = 0
        for node in reversed(list(self.graph.nodes)):
            if node.op in ("call_function", "get_attr") and not node.users and not is_effectful(node):
                self.graph.erase_node(node)
                removed += node.op == "call_function"
        used = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        for name in [name for name in self.state if name not in used]:
            del self.state[name]
            self.folds.pop(name, None)
        return removed

    def clone(self) -> Program:
        """A copy whose graph is its own and whose tensors are shared."""
        graph: Graph = Graph()
        mapping: dict[Node, Node] = {}
        result = graph.graph_copy(self.graph, mapping)
        output = graph.output(result)
        for old, new in mapping.items():
            new.meta = dict(old.meta)
        output.meta = dict(self.graph.output_node().meta)
        return Program(
            graph, self.state.copy(), self.inputs, self.outputs, self.structure, dict(self.dims), dict(self.folds),
            self.taps, self.left,
        )  # fmt: skip

    def _unique_name(self, name: str) -> str:
        candidate, count = name, 1
        while candidate in self.state:
            candidate, count = f"{name}_{count}", count + 1
        return candidate

    # ------------------------------------------------------------------ checking

    def fingerprint(self) -> str:
        """Changes when the graph, the identity of a constant or its values change; only meaningful in this process."""

        def identify(name: str, node: Node) -> object:
            return name, name in self.state and self.state.identity(name)

        # To compare is quick where nothing was touched, as by most passes: the objects are the same.
        nodes = [(node, node.op, node.target, node.args, node.kwargs) for node in self.graph.nodes]
        constants = [identify(str(node.target), node) for node in self.graph.nodes if node.op == "get_attr"]
        now = self.inputs, nodes, constants
        if self._told is None or self._told[0] != now:
            self._told = now, self._digest(identify)
        return self._told[1]

    def structural_hash(self) -> str:
        """SHA-256 over operators, edges, attributes, and shapes and dtypes of constants; names do not count."""

        def describe(name: str, node: Node) -> object:
            value = node.meta["val"] if "val" in node.meta else self.state[name]
            return tuple(int(size) for size in value.shape), str(value.dtype)

        return self._digest(describe)

    def _digest(self, describe: Callable[[str, Node], object]) -> str:
        """A constant counts where it is first read: where its node stands among the others says nothing."""
        digest = hashlib.sha256()
        index: dict[Node, int] = {}

        def refer(value: Any) -> str:
            if isinstance(value, Node):
                if value not in index and value.op == "get_attr":
                    add(value, describe(str(value.target), value))
                return f"%{index.get(value, '?')}"
            if isinstance(value, Mapping):
                return "{" + ",".join(f"{key}:{refer(item)}" for key, item in value.items()) + "}"
            if isinstance(value, list | tuple):
                return "[" + ",".join(map(refer, value)) + "]"
            return f"{type(value).__name__}:{value}"

        def add(node: Node, what: object) -> None:
            line = f"{node.op}|{what}|{refer(node.args)}|{refer(node.kwargs)}\n"
            index[node] = len(index)
            digest.update(line.encode())

        for spec in self.inputs:
            digest.update(repr((spec.name, str(spec.dtype), spec.shape)).encode())
        for node in self.graph.nodes:
            if node.op != "get_attr":
                add(node, _target_name(node))
        for node in self.graph.nodes:
            refer(node)  # what nothing reads counts too
        return digest.hexdigest()

    def verify(self) -> None:
        """Check every invariant of the IR.

        Raises:
            PassError: names the first node that breaks one.
        """
        try:
            self.graph.lint()
        except Exception as error:
            raise PassError(f"the graph is malformed: {first_line(error)}") from error
        placeholders = self.placeholders
        if len(placeholders) != len(self.inputs):
            raise PassError(f"{len(placeholders)} placeholders for {len(self.inputs)} declared inputs")
        for node in self.graph.nodes:
            if problem := self._problem(node):
                raise PassError(f"{node.format_node() or node.name}: {problem}", where=self.where(node))

    def _problem(self, node: Node) -> str | None:
        if node.op == "output":
            results = node.args[0]
            if not isinstance(results, list | tuple) or not all(isinstance(item, Node) for item in results):
                return "the output is not a flat tuple of nodes"
            if len(results) != len(self.outputs) + len(self.taps):
                return f"{len(results)} results for {len(self.outputs) + len(self.taps)} declared outputs"
            return None
        if node.op not in ("placeholder", "get_attr", "call_function"):
            return f"{node.op} has no place in a Program"
        if "val" not in node.meta:
            return "it carries no shape and dtype"
        if node.op == "get_attr":
            return self._constant_problem(node)
        if node.op == "call_function" and not is_operator(node.target):
            return f"{node.target} is neither an operator nor a function on sizes"
        if node.op == "call_function" and is_mutating(node.target):
            return "it writes to an operand; a Program is functional"
        return None

    def _constant_problem(self, node: Node) -> str | None:
        name, declared = str(node.target), node.meta["val"]
        if name not in self.state:
            return "its constant is missing"
        shape, dtype = tuple(self.state.tensor(name).shape), self.state.dtype(name)
        if shape != tuple(declared.shape):
            return f"its constant has shape {shape}, the node says {tuple(declared.shape)}"
        if dtype not in (declared.dtype, lift_dtype(declared.dtype)):
            return f"its constant is {dtype}, the node says {declared.dtype}"
        return None

    # ------------------------------------------------------------------ running

    def execute(
        self,
        inputs: Sequence[torch.Tensor],
        load: Callable[[Node], torch.Tensor],
        call: Callable[[Node, tuple[Any, ...], dict[str, Any]], Any],
    ) -> tuple[torch.Tensor, ...]:
        """Run the graph node by node: `load` fetches a constant, `call` performs an operator.

        A constant is fetched where it is used and every value is dropped after its last use, so that a run in a wider
        dtype needs room for one wide weight, not for all of them.
        """
        values: dict[Node, Any] = {}
        last = _last_uses(self.graph)
        feed = iter(inputs)

        def read(node: Node) -> Any:
            return load(node) if node.op == "get_attr" else values[node]

        for node in self.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(feed)
            elif node.op == "call_function":
                args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), read)
                values[node] = call(node, args, kwargs)
                del args, kwargs
            elif node.op == "output":
                return tuple(read(item) for item in node.args[0])  # type: ignore[union-attr, arg-type]
            for dead in last.get(node, ()):
                values.pop(dead, None)
        raise PassError("the graph has no output")

    @torch.no_grad()
    def run(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run in the storage dtypes: flat tensors in, flat tuple out."""
        return self.execute(
            inputs,
            self.stored,
            lambda node, args, kwargs: node.target(*args, **kwargs),  # type: ignore[operator]
        )

    def graph_module(self, trainable: Iterable[str] = ()) -> GraphModule:
        """An executable module: flat tensors in, flat tuple out, constants as buffers in their storage dtypes.

        Constants named in `trainable` become parameters that require grad. The module's graph is a copy.
        """
        wanted, root, copy = set(trainable), torch.nn.Module(), self.clone()
        targets: dict[str, str] = {}
        for node in copy.graph.nodes:
            if node.op != "get_attr":
                continue
            name = str(node.target)
            if name not in targets:
                value = self.state[name].to(node.meta["val"].dtype)
                targets[name] = _attach(root, name, value, trainable=name in wanted)
            node.target = targets[name]
        module = GraphModule(root, copy.graph, class_name="FrozenProgram")
        module.eval()
        return module


def on_cpu(specs: Sequence[TensorSpec]) -> bool:
    """Whether all inputs lie on the CPU."""
    return all(spec.device.type == "cpu" for spec in specs)


def integer_layers(program: Program) -> dict[Node, IntegerSite]:
    """Every quantized layer, in graph order."""
    return {node: node.meta[INTEGERS] for node in program.graph.nodes if INTEGERS in node.meta}


def lifted_call(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Perform `node` with every floating tensor and dtype argument in float64 (complex ones in complex128)."""
    return _lift_any(node.target(*_lift_any(args), **_lift_any(kwargs)))  # type: ignore[operator]


def _lift_any(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return lift(value)
    if isinstance(value, torch.dtype):
        return lift_dtype(value)
    if isinstance(value, list | tuple):
        return type(value)(map(_lift_any, value))
    if isinstance(value, dict):
        return {key: _lift_any(item) for key, item in value.items()}
    return value


def is_operator(target: Any) -> bool:
    """Whether a call target may stand in a Program."""
    if isinstance(target, torch._ops.OpOverload | torch._ops.HigherOrderOperator):
        return True
    module = getattr(target, "__module__", "")
    return target in SYMBOLIC_FUNCTIONS or module in ("math", "torch.fx.experimental.sym_node")


def is_mutating(target: Any) -> bool:
    """Whether an operator's schema says that it writes to an operand."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def is_random(node: Node) -> bool:
    """Whether two calls of this node may give different numbers."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def is_effectful(node: Node) -> bool:
    """Whether a node must stay although nothing reads it: a run-time assertion."""
    return isinstance(node.target, torch._ops.OpOverload) and "_assert" in node.target._schema.name


def _copy_provenance(source: Node, node: Node) -> None:
    for key in ("nn_module_stack", "stack_trace", "fxfreeze"):
        if key in source.meta:
            node.meta[key] = source.meta[key]


def _attach(root: torch.nn.Module, name: str, value: torch.Tensor, *, trainable: bool) -> str:
    """Register `value` under its dotted name, or under a flat one where a part of it already means something."""
    *path, last = name.split(".")
    owner: torch.nn.Module | None = root
    for part in path:
        owner = _child(owner, part)
    if owner is None or _taken(owner, last):
        owner, last = root, "constant_" + re.sub(r"\W", "_", name)
        while hasattr(root, last):
            last += "_"
        path = []
    if trainable:
        owner.register_parameter(last, torch.nn.Parameter(value.detach().clone()))
    else:
        owner.register_buffer(last, value.detach())
    return ".".join([*path, last])


def _child(owner: torch.nn.Module | None, name: str) -> torch.nn.Module | None:
    """The submodule `name` of `owner`, made if need be; None where the name is not free for one."""
    if owner is None or (name not in owner._modules and _taken(owner, name)):
        return None
    if name not in owner._modules:
        owner.add_module(name, torch.nn.Module())
    return owner._modules[name]


def _taken(owner: torch.nn.Module, name: str) -> bool:
    # GraphModule's own attributes count too: the constants are copied onto one.
    return not name or hasattr(owner, name) or hasattr(GraphModule, name) or name in ("graph", "training")


def _last_uses(graph: Graph) -> dict[Node, list[Node]]:
    seen: set[Node] = set()
    last: dict[Node, list[Node]] = {}
    for node in reversed(graph.nodes):
        for operand in [node, *node.all_input_nodes]:
            if operand not in seen:
                seen.add(operand)
                last.setdefault(node, []).append(operand)
    return last


def _target_name(node: Node) -> str:
    if node.op != "call_function":
        return node.op
    if isinstance(node.target, torch._ops.OpOverload | torch._ops.HigherOrderOperator):
        return str(node.target)
    # A Python function's str holds its address.
    return f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__name__', node.target)}"


def first_line(error: BaseException) -> str:
    """The first line in which `error` says something, else the name of its class."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _format_node(program: Program, node: Node) -> str:
    if node.op == "output":
        return f"return ({', '.join(map(str, node.args[0]))})"  # type: ignore[arg-type]
    value = node.meta.get("val")
    kind = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}" if isinstance(value, torch.Tensor) else ""
    if node.op == "placeholder":
        return f"{node.name}: {kind} = input"
    if node.op == "get_attr":
        return f"{node.name}: {kind} = constant {node.target}"
    operands = [*map(str, node.args), *(f"{key}={item}" for key, item in node.kwargs.items())]
    path = program.module_path(node)
    line = f"{node.name}: {kind} = {node.target}({', '.join(operands)})"
    return f"{line}  # {path}" if path else line
