"""The parameters of an adapter: their shapes, and where their values come from.

Shapes are peft's, except that a magnitude or a gain is always a flat vector:

====================  ===================================  ================================
operator              ``lora_A``                           ``lora_B``
====================  ===================================  ================================
linear, matmul        ``[r, in]``                          ``[out, r]``
embedding             ``[r, rows]``                        ``[dimension, r]``
conv, also transposed ``[r, in / groups, *kernel]``        ``[out, r, 1, …]``
====================  ===================================  ================================

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

import torch
from torch import Tensor

from fxfreeze import weights
from fxfreeze.errors import PlanError
from fxfreeze.plan import IA3, DoRA, Step
from fxfreeze.program import ADAPTERS, SETTINGS

from .._adapters import DeltaStep, parameter_name
from .._operators import WeightOperator

Initial = Callable[[torch.Generator], Tensor]


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
    embedding = operator.kind == "embedding"
    inner = (operator.in_features,) if embedding else operator.shape[1:]
    a, b = (step.rank, *inner), (operator.out_features, step.rank, *[1] * len(operator.kernel))
    found = [
        Parameter("lora_A", a, lambda generator: torch.zeros(a) if embedding else _uniform(a, generator)),
        Parameter("lora_B", b, lambda generator: torch.randn(b, generator=generator) if embedding else torch.zeros(b)),
    ]
    if isinstance(step, DoRA):
        found.append(Parameter("lora_magnitude", (operator.out_features,), lambda generator: _norms(weight)))
    return found


class Source:
    """Where the values of one step come from: its weights file, or the initial ones.

    A key of the file is the name of a parameter, with or without ``adapters.<step>.``; full names of the plan's other
    steps may be there too, so that one file can hold the adapters of a plan.

    Raises:
        PlanError: the file cannot be read, or says that its step was another one.
    """

    def __init__(self, step: Step, others: Iterable[str]) -> None:
        self.step, self.file = step, getattr(step, "weights", None)
        self.stored: dict[str, Tensor] = {}
        if self.file is not None:
            self.stored, metadata = weights.read(self.file)
            weights.check_metadata(metadata, [step], self.file)
        self._foreign = tuple(f"{prefix}{name}." for name in others for prefix in (ADAPTERS, SETTINGS))
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
        self._asked.append(key)
        if key not in self.stored:
            return torch.zeros(parameter.shape)  # finish() reports it, together with all others
        return weights.check(key, self.stored[key], parameter.shape, self.file)

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

    def finish(self) -> None:
        """Check that the file held what was asked for, and nothing else.

        Raises:
            PlanError: lists the missing and the unexpected keys.
        """
        if self.file is not None:
            found = [key for key in self.stored if not key.startswith(self._foreign)]
            try:
                weights.check_keys(self._asked, found, self.file)
            except PlanError as error:
                error.hint = f"keys are named like {parameter_name(self.step, '<module path>', self._leaf)}"
                if any(key.startswith("base_model.model.") for key in found):
                    error.hint += "; peft names its own base_model.model.<path>.lora_A.weight: rename them"
                raise


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    # torch.nn.init on an empty tensor warns, and rank and features are never 0.
    return torch.nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)


def _norms(weight: Tensor) -> Tensor:
    return weight.double().flatten(1).norm(dim=1)
