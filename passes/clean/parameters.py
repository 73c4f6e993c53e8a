"""Put a plan's trained parameters in the place of the model's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor
from torch.fx import Node

from fxfreeze import weights
from fxfreeze.checkpoints import parameter_key
from fxfreeze.errors import PlanError
from fxfreeze.plan import Replace
from fxfreeze.program import Program
from fxfreeze.rewrite import Context, Pass, match_sites

_COUNTERS = frozenset({"num_batches_tracked"})
"""What training keeps beside parameters, and no frozen model reads."""


class ReplaceParameters(Pass):
    """Carry out the plan's Replace steps: a module's parameters and buffers become those in the step's file.

    It runs before anything is computed from constants. A tensor that modules outside of the matched one read too (a
    tied embedding) is replaced for the matched one only.

    Raises:
        PlanError: the file lacks what a matched module needs, a tensor of it does not fit, or the model reads no
            parameter of that name.
    """

    name, stage, exact = "replace-parameters", "clean", False

    def run(self, program: Program, ctx: Context) -> int:
        count = 0
        for index, step in enumerate(ctx.plan.steps):
            if isinstance(step, Replace):
                for path, tensors in _tensors(program, step, index).items():
                    count += _replace(program, ctx, step, path, tensors)
        return count


def _tensors(program: Program, step: Replace, index: int) -> dict[str, dict[str, tuple[str, Tensor]]]:
    """Module path → name of the parameter → its key in the file and its value."""
    stored, _ = weights.read(step.weights)
    matched = match_sites(program, step, index)
    found: dict[str, dict[str, tuple[str, Tensor]]] = {path: {} for path in matched}
    for key, value in stored.items():
        place = parameter_key(key)
        if place is not None and place[0] in found and place[1] not in _COUNTERS:
            found[place[0]][place[1]] = key, value
    if empty := [path for path, tensors in found.items() if not tensors]:
        raise PlanError(
            f"the file holds no parameters of {', '.join(empty[:6])}, which steps[{index}].at matches",
            where=step.weights, hint=f"keys are named like {empty[0]}.weight",
        )  # fmt: skip
    return found


def _replace(
    program: Program, ctx: Context, step: Replace, path: str, tensors: Mapping[str, tuple[str, Tensor]]
) -> int:
    kept: dict[str, None] = {}
    for leaf, (key, value) in tensors.items():
        old = _constant(program, path, leaf)
        if old is None:
            raise PlanError(f"{key}: the model reads no such parameter", where=step.weights,
                            hint=f"{path} reads {', '.join(_read(program, path)) or 'none'}")  # fmt: skip
        held = old.meta["val"]
        value = weights.check(key, value, held.shape, step.weights).to(program.state.tensor(str(old.target)).device)
        kept.update(dict.fromkeys(_rebind(program, path, leaf, old, value.to(held.dtype))))
    detail = f"from {step.weights}" + (f"; {', '.join(kept)} keeps the old ones" if kept else "")
    ctx.ledger.add(
        site=path, step=step.name, requested=f"trained {', '.join(tensors)}", outcome="rewritten",
        executes="constants", detail=detail,
    )  # fmt: skip
    return len(tensors)


def _constant(program: Program, path: str, leaf: str) -> Node | None:
    """The node of the parameter, which a tied one has under the name of the module that owns it first."""
    named = program.graph.find_nodes(op="get_attr", target=f"{path}.{leaf}")
    if named:
        return named[0]
    tied = [node for node in program.graph.find_nodes(op="get_attr") if str(node.target).rpartition(".")[2] == leaf
            and any(_is_use(program, user, path, tied=True) for user in node.users)]  # fmt: skip
    return tied[0] if len({str(node.target) for node in tied}) == 1 else None


def _rebind(program: Program, path: str, leaf: str, old: Node, value: Tensor) -> Iterable[str]:
    """Let the module at `path` read `value` for `old`; the modules that go on reading the old one."""
    readers, tied = program.readers(old), str(old.target) != f"{path}.{leaf}"
    mine = {user for user in readers if _is_use(program, user, path, tied=tied)}
    if mine == readers:
        program.state[str(old.target)] = value
        return []
    first = next(iter(program.graph.nodes))
    own = program.add_constant(f"{path}.{leaf}", value, before=first, like=old)
    for node in program.graph.find_nodes(op="get_attr", target=old.target):
        for user in set(node.users) & mine:
            user.replace_input_with(node, own)
    return [program.module_path(user) or "the model" for user in program.graph.nodes if user in readers - mine]


def _is_use(program: Program, user: Node, path: str, *, tied: bool) -> bool:
    """Whether `user` runs in the module at `path`, or in one around it, which may run the parameters of its parts."""
    ran = program.module_path(user)
    return ran == path or ran.startswith(f"{path}.") or (not tied and (not ran or path.startswith(f"{ran}.")))


def _read(program: Program, path: str) -> list[str]:
    names = (str(node.target) for node in program.graph.find_nodes(op="get_attr"))
    return list(dict.fromkeys(name for name in names if name.startswith(f"{path}.")))
