"""The parameters of an adapter: their shapes, and where their values come from.

Shapes are peft's, except that a magnitude or a gain is always a flat vector:

====================  ===================================  ================================
operator              ``lora_A``                           ``lora_B``
====================  ===================================  ================================
linear, matmul        ``[r, in]``                          ``[out, r]``
embedding             ``[r, rows]``                        ``[dimension, r]``
conv, also transposed ``[r, in / groups, *kernel]``        ``[out, r, 1, …]``
====================  ===================================  ================================

VeRA has ``lambda_b`` with one number per output feature and ``lambda_d`` with one per rank, beside matrices that are
shared and not trained (:func:`projection`). OFT has ``oft_R``, one row per block: the upper triangle of its Q.

``lora_magnitude`` has one number per output feature (of an embedding: per dimension, the norm taken over its rows),
``ia3`` one per output or input feature (of an embedding's input: per row).

An adapter starts as the identity: B is zero and A uniform in ±1/√(fan in), as in the LoRA paper's code and in peft. For
an embedding, whose A is looked up by row, it is the other way round (A zero, B normal), again as there. Values are
drawn from a generator seeded by the name of the parameter: the same plan gives the same adapter, whatever else the
plan or the process holds. A parameter of a half-precision layer is float32, so that small updates are not lost.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from fxfreeze import weights
from fxfreeze.checkpoints import PREFIX, SHARED, adapter_key, parameter_key
from fxfreeze.errors import PlanError
from fxfreeze.plan import IA3, OFT, DoRA, LoRA, Replace, Step, VeRA
from fxfreeze.program import ADAPTERS, FROZEN, SETTINGS, Program

from .._adapters import DeltaStep, parameter_name
from .._operators import WeightOperator, arguments, aten
from ._hub import Hub
from ._sites import Sites

Initial = Callable[[torch.Generator], Tensor]

_PREFIXES = (ADAPTERS, SETTINGS, FROZEN)


@dataclass(frozen=True)
class Parameter:
    """One parameter of an adapter at one site: its shape, and its value before training in float32 or wider."""

    leaf: str
    shape: tuple[int, ...]
    initial: Initial


def parameter_dtype(weight: torch.dtype) -> torch.dtype:
    """float64 beside a float64 weight, else float32."""
    return torch.promote_types(weight, torch.float32)


def parameters(step: DeltaStep, operator: WeightOperator, weight: Tensor) -> list[Parameter]:
    """What `step` trains at `operator`, whose canonical weight is `weight`."""
    if isinstance(step, IA3):
        size = operator.out_features if step.side == "out" else operator.in_features
        return [Parameter("ia3", (size,), lambda generator: torch.ones(size))]
    if isinstance(step, VeRA):
        out, rank, start = operator.out_features, step.rank, float(step.d_initial)
        return [
            Parameter("lambda_b", (out,), lambda generator: torch.zeros(out)),
            Parameter("lambda_d", (rank,), lambda generator: torch.full((rank,), start)),
        ]
    embedding = operator.kind == "embedding"
    if isinstance(step, OFT):
        features = operator.out_features if embedding else operator.in_features
        rows = 1 if step.share else features // step.block_size
        shape = (rows, step.block_size * (step.block_size - 1) // 2)
        return [Parameter("oft_R", shape, lambda generator: torch.zeros(shape))]
    inner = (operator.in_features,) if embedding else operator.shape[1:]
    a, b = (step.rank, *inner), (operator.out_features, step.rank, *[1] * len(operator.kernel))
    found = [
        Parameter("lora_A", a, lambda generator: torch.zeros(a) if embedding else _uniform(a, generator)),
        Parameter("lora_B", b, lambda generator: torch.randn(b, generator=generator) if embedding else torch.zeros(b)),
    ]
    if isinstance(step, LoRA) and step.bias:
        found.append(Parameter("lora_bias", (operator.out_features,), lambda generator: torch.zeros(b[0])))
    if isinstance(step, DoRA):
        found.append(Parameter("lora_magnitude", (operator.out_features,), lambda generator: _norms(weight)))
    return found


class Source:
    """Where the values of one step come from: its weights file, or the initial ones.

    A key of the file is the name of a parameter, with or without ``adapters.<step>.``, or peft's name of it. Full names
    of the plan's other steps may be there too, and peft's names of their sites if they name the same file, so that one
    file can hold the adapters of a plan. Names of AdapterHub's library are known too.

    Raises:
        PlanError: the file cannot be read, or says that its step was another one.
    """

    def __init__(self, step: Step, steps: Iterable[Step]) -> None:
        given = getattr(step, "weights", None)
        self.step, self.file = step, given if isinstance(given, str) else None
        self.stored: dict[str, Tensor] = {}
        if self.file is not None:
            self.stored, metadata = weights.read(self.file)
            weights.check_metadata(metadata, [step], self.file)
        self._others = [other for other in steps if other.name != step.name]
        self._foreign = tuple(f"{prefix}{other.name}." for other in self._others for prefix in _PREFIXES)
        self._peft = {found: key for key in self.stored if (found := adapter_key(key))}
        self._hub = Hub(self.stored, str(self.file))
        self._short = f"{ADAPTERS}{step.name}."
        self._asked: list[str] = []
        self._leaf = ""

    def value(self, site: str, parameter: Parameter) -> Tensor:
        """The value of `parameter` at `site`.

        Raises:
            PlanError: the file's has another shape, is not floating, or holds NaN or Inf.
        """
        name = parameter_name(self.step, site, parameter.leaf)
        self._leaf = self._leaf or parameter.leaf
        if self.file is None:
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])
            return parameter.initial(torch.Generator().manual_seed(seed))
        key = name if name in self.stored else name.removeprefix(self._short)
        if key not in self.stored:
            key = self._peft.get((site, parameter.leaf)) or self._hub.key(site, parameter.leaf) or key
        self._asked.append(key)
        if key not in self.stored:
            return torch.zeros(parameter.shape)  # finish() reports it, together with all others
        value = self.stored[key]
        theirs = key.startswith(PREFIX) or key in self._hub
        if theirs and len(parameter.shape) == 1 and value.numel() == max(value.shape):
            value = value.flatten()  # they keep gains and magnitudes in the shape they broadcast from
        return weights.check(key, value, parameter.shape, self.file)

    def setting(self, leaf: str, given: float) -> float:
        """The positive number ``settings.<step>.<leaf>`` that the file may hold, else the plan's.

        Raises:
            PlanError: it is no number, or not positive.
        """
        key = f"{SETTINGS}{self.step.name}.{leaf}"
        if self.file is None or key not in self.stored:
            return float(given)
        self._asked.append(key)
        return float(weights.check_setting(key, self.stored[key], self.file))

    def shared(self, leaf: str, least: tuple[int, int]) -> Tensor | None:
        """The matrix ``settings.<step>.<leaf>`` that the file may hold, of this shape or larger.

        Raises:
            PlanError: it is smaller, is not floating, or holds NaN or Inf.
        """
        names = [name for name in (f"{SETTINGS}{self.step.name}.{leaf}", SHARED[leaf]) if name in self.stored]
        if not names:
            return None
        self._asked.append(names[0])
        value = self.stored[names[0]]
        if value.ndim != 2 or any(have < need for have, need in zip(value.shape, least, strict=True)):
            raise PlanError(
                f"{names[0]} has shape {tuple(value.shape)}, but at least {least} is needed", where=str(self.file)
            )
        return weights.check(names[0], value, value.shape, str(self.file))

    def held(self, name: str, value: Tensor) -> Tensor:
        """The constant ``frozen.<step>.<module path>.<leaf>`` that the file may hold, in the dtype and on the device of
        `value`, else `value`.

        Args:
            name: in full.
            value: what the module came with.

        Raises:
            PlanError: the file's has another shape, or is of another kind (floating, complex, integer or bool).
        """
        if self.file is None or name not in self.stored:
            return value
        self._asked.append(name)
        return weights.check_constant(name, self.stored[name], value, self.file).to(value.device)

    def finish(self) -> None:
        """Check that the file held what was asked for, and nothing else.

        Raises:
            PlanError: lists the missing and the unexpected keys.
        """
        if self.file is not None:
            found = [key for key in self.stored if not key.startswith(self._foreign) and not self._is_others(key)]
            try:
                weights.check_keys(self._asked, found, self.file)
            except PlanError as error:
                error.hint = f"keys are named like {parameter_name(self.step, '<module path>', self._leaf)}"
                if any(key.startswith(PREFIX) for key in found):
                    error.hint = "fxfreeze.from_peft(folder) gives all steps that a peft checkpoint takes"
                raise

    def _is_others(self, key: str) -> bool:
        """Whether a key in peft's or AdapterHub's words is another step's that names the same file, or nobody's."""
        if self._hub.is_spare(key):
            return True
        own, adapter = parameter_key(key), adapter_key(key)
        for other in self._others:
            if getattr(other, "weights", None) != self.file:
                continue
            if self._hub.is_at(key, other.patterns):
                return True
            site = own if isinstance(other, Replace) else adapter
            if site is not None and any(fnmatchcase(site[0], glob) for glob in other.patterns):
                return True
            if isinstance(other, VeRA) and key in SHARED.values():
                return True
        return False

    def adapters(self) -> dict[str, tuple[str, str]]:
        """Key → module path and parameter, of what the file holds in peft's words."""
        return {key: found for found, key in self._peft.items()}

    def keys_at(self, site: str) -> list[str]:
        """The file's keys of `site` in peft's words."""
        return [key for (path, _), key in self._peft.items() if path == site]

    def misfit(self, program: Program, sites: Sites, path: str) -> str | None:
        """Why what peft trained at `path` is no LoRA of that layer, in a sentence without a subject."""
        return peft_misfit(program, sites.operators[path][0], path) if (path, "lora_A") in self._peft else None


def peft_misfit(program: Program, operator: WeightOperator, path: str) -> str | None:
    """Why what peft trains at `path` is no LoRA of that layer, in a sentence without a subject."""
    if operator.kind == "conv" and math.prod(operator.kernel) > 1:
        if any(step != 1 for step in arguments(operator.node).get("dilation", ())):
            return "is dilated, and peft's update of it is not, so that no convolution is their sum"
        before = operator.input
        pads = before.target is aten.pad.default and program.module_path(before) == path
        if pads and (mode := arguments(before)["mode"]) != "constant":
            return f"pads by {mode!r} where peft's update pads with zeros, so that no convolution is their sum"
    if operator.groups == 1:
        return None
    return f"has {operator.groups} groups, and peft's update of it mixes them, so that it is no grouped convolution"


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    # torch.nn.init on an empty tensor warns, and rank and features are never 0.
    return torch.nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)


def projections(rank: int, most_in: int, most_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """VeRA's A ``[rank, most_in]`` and B ``[most_out, rank]`` as peft draws them: float32, on the CPU, A first."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(rows: int, columns: int) -> Tensor:
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns))
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

    return uniform(rank, most_in), uniform(most_out, rank)


def _norms(weight: Tensor) -> Tensor:
    return weight.double().flatten(1).norm(dim=1)
