"""The plan: what a model's inputs look like, what to do to the model, and which targets to emit. It is data.

A plan is written in Python, TOML or JSON, and the three are interchangeable. Everything is checked when a
plan is built; whatever is wrong raises `PlanError` with the path of each offending key, as in
`steps[1].rank: must be ≥ 1, got 0`. This file imports no torch, so editors and scripts read plans cheaply.

A new step is one class here and one entry in `STEPS`.
"""

from __future__ import annotations

import itertools
import json
import keyword
import math
import operator
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, Union

import tomli_w
from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    Strict,
    WithJsonSchema,
    model_validator,
)

from .adapterhub import read_hub_steps
from .checkpoints import read_steps
from .errors import PlanError
from .record import Problem, Record, brief, refusal, suggest

VERSION = 1
"""The newest plan format this fxfreeze reads; written into every plan file."""

# ---- Values: what a single key accepts. Nothing is coerced: "4" and true are no numbers.


def _is_symbol(value: Any) -> bool:
    """Whether this is a name that can be a Python variable."""
    return isinstance(value, str) and value.isidentifier() and not keyword.iskeyword(value)


def _symbol(value: Any) -> str:
    if not _is_symbol(value):
        raise refusal(f"must be a name of letters, digits and _ (not starting with a digit), got {brief(value)}")
    return str(value)


def _input_name(value: Any) -> str:
    first, *rest = value.split(".") if isinstance(value, str) else [None]
    if not _is_symbol(first):
        raise refusal(f"must start with an argument's name, as 'ids', 'batch.ids' or 'feats.0'; got {brief(value)}")
    if any(not part or re.search(r"\s", part) for part in rest):
        raise refusal(f"has an empty or blank part between its dots, got {brief(value)}")
    return str(value)


def _size(value: Any) -> int | str:
    if isinstance(value, str):
        return _symbol(value)
    try:
        size = operator.index(value)  # takes numpy's integers too
    except TypeError:
        size = None
    if size is None or isinstance(value, bool) or size < 1:
        raise refusal(f"must be a size ≥ 1, or a name such as 'batch' for a dynamic dimension, got {brief(value)}")
    return size


def _shape(value: Any) -> Any:
    if isinstance(value, int | str) or not isinstance(value, Iterable):
        raise refusal(f"must be a list of sizes and names, such as ['batch', 3, 32, 32], got {brief(value)}")
    return tuple(value)


def _dtype(value: Any) -> Any:
    # torch.float32 prints as "torch.float32"; read that way to leave torch unimported.
    return str(value).removeprefix("torch.")


def _number(value: Any) -> int | float:
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        return value
    raise refusal(f"must be a finite number, got {brief(value)}")


def _patterns(value: Any) -> str | tuple[str, ...]:
    globs = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else None
    if not globs:
        raise refusal(f"must be a glob over module paths, or a list of them, got {brief(value)}")
    for i, glob in enumerate(globs):
        if not isinstance(glob, str) or not glob or glob != glob.strip():
            spot = "" if isinstance(value, str) else f"item {i} "
            raise refusal(f"{spot}must be a glob over module paths such as 'layer*.conv1', got {brief(glob)}")
        if glob in globs[:i]:
            raise refusal(f"item {i} repeats {glob!r}")
    return value if isinstance(value, str) else globs


_MODULE = r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*|<.+:.+>"
"""What makes a module, or, in <>, of what class one was that a plan in memory held."""


def _module(value: Any) -> Any:
    if isinstance(value, str):
        if re.fullmatch(_MODULE, value):
            return value
    elif callable(getattr(value, "forward", None)) and not isinstance(value, type):
        return value
    raise refusal(f"must be a module, or 'package.module:Name' of what makes one, got {brief(value)}")


def _module_name(value: Any) -> str:
    """A module that was made already has no name that would make it again: records of a plan say what it was."""
    return value if isinstance(value, str) else f"<{type(value).__module__}:{type(value).__qualname__}>"


def _data(value: Any) -> Any:
    """A copy of a table that a plan file can hold; tuples become lists."""
    if not isinstance(value, Mapping):
        return value  # pydantic says that it must be one
    if problems := list(_no_data(value)):
        raise refusal(*problems)
    return _listed(value)


def _no_data(value: Any, path: str = "") -> Iterator[Problem]:
    """What a plan file cannot hold."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(key, str):
                yield from _no_data(item, f"{path}.{key}" if path else key)
            else:
                yield path, f"keys must be texts, got {brief(key)}"
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _no_data(item, f"{path}[{i}]")
    elif not isinstance(value, str | int) and not (isinstance(value, float) and math.isfinite(value)):
        yield path, f"must be a bool, a finite number, a text, or a list or table of them, got {brief(value)}"


def _listed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _listed(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_listed(item) for item in value]
    return float(value) if isinstance(value, float) else value  # numpy's are floats too


_DECIMAL = r"\d+(\.\d+)?"


def _granularity(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"tensor|channel|group:[1-9]\d*", value):
        return value
    raise refusal(f"must be 'tensor', 'channel' or 'group:32' (or another number), got {brief(value)}")


def _budget(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and re.fullmatch(rf"(snr|drop):{_DECIMAL}", value)):
        return value
    raise refusal(f"must be 'snr:20' (dB) or 'drop:0.003' (of the score), or another number, got {brief(value)}")


def _path(value: Any) -> str:
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str) or not path.strip() or "\0" in path:
        raise refusal(f"must be the path of a file, got {brief(value)}")
    return path


def _paths(value: Any) -> str | tuple[str, ...]:
    return tuple(map(_path, value)) if isinstance(value, list | tuple) else _path(value)


Symbol = Annotated[str, BeforeValidator(_symbol)]
Number = Annotated[int | float, BeforeValidator(_number)]
Count = Annotated[int, Strict(), Field(ge=1)]
Flag = Annotated[bool, Strict()]
Text = Annotated[str, Strict(), Field(min_length=1)]
Weights = Annotated[str, BeforeValidator(_path)]
WeightFiles = Annotated[str | tuple[str, ...], BeforeValidator(_paths)]
Size = Annotated[int | str, BeforeValidator(_size)]

if TYPE_CHECKING:
    Patterns = str | Sequence[str]  # a list is taken too, and kept as a tuple
else:
    Patterns = Annotated[str | tuple[str, ...], BeforeValidator(_patterns)]

Module = Annotated[
    Any,
    BeforeValidator(_module),
    PlainSerializer(_module_name, return_type=str),
    WithJsonSchema({"type": "string", "pattern": f"^({_MODULE})$"}),
]

Target = Literal["torch", "aoti", "onnx"]
DType = Literal[
    "float32",
    "float16",
    "bfloat16",
    "float64",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
    "complex64",
]

_RANGES: dict[str, tuple[float, float]] = {
    **{f"int{bits}": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in (8, 16, 32, 64)},
    "uint8": (0, 255),
    "float16": (-65504.0, 65504.0),
    "bfloat16": (-(2.0 - 2.0**-7) * 2.0**127, (2.0 - 2.0**-7) * 2.0**127),
    "float32": (-(2.0 - 2.0**-23) * 2.0**127, (2.0 - 2.0**-23) * 2.0**127),
    "float64": (-math.inf, math.inf),
}
"""Smallest and largest finite value of each dtype that has an order."""


# ---- Inputs


class Input(Record):
    """One tensor the model is called with."""

    name: Annotated[str, BeforeValidator(_input_name)] = Field(
        description="Name of the forward argument. Dots reach into nested arguments: 'batch.ids' is the "
        "entry 'ids' of a dict passed as 'batch', 'feats.0' the first item of a list."
    )
    shape: Annotated[tuple[Size, ...], BeforeValidator(_shape)] = Field(
        description="Size of each dimension. A number is a fixed size ≥ 1, a name is a symbolic size that "
        "may differ from call to call; equal names mean equal sizes. An empty list is a scalar."
    )
    dtype: Annotated[DType, BeforeValidator(_dtype)] = Field(
        default="float32", description="Element type of the tensor."
    )
    low: Number | None = Field(
        default=None,
        description="Smallest value callers pass, inclusive, in the input's own unit. Test inputs are drawn "
        "from [low, high]. Not for bool and complex64.",
    )
    high: Number | None = Field(
        default=None,
        description="Largest value callers pass, inclusive, in the input's own unit; for token ids: the "
        "size of the vocabulary - 1. Not for bool and complex64.",
    )

    if TYPE_CHECKING:  # the runtime accepts any sequence; see record.py

        def __init__(
            self,
            name: str,
            shape: Iterable[int | str],
            dtype: Any = "float32",
            low: float | None = None,
            high: float | None = None,
        ) -> None: ...

    def _problems(self) -> Iterator[Problem]:
        bounds = {key: value for key, value in (("low", self.low), ("high", self.high)) if value is not None}
        if self.dtype not in _RANGES:
            yield from ((key, f"has no meaning for dtype {self.dtype}; leave it out") for key in bounds)
            return
        least, most = _RANGES[self.dtype]
        for key, value in bounds.items():
            if not least <= value <= most:
                yield key, f"must lie in {self.dtype}'s range [{least}, {most}], got {brief(value)}"
            if "int" in self.dtype and not isinstance(value, int):
                yield key, f"must be a whole number for dtype {self.dtype}, got {brief(value)}"
        if self.low is not None and self.high is not None and self.low > self.high:
            yield "low", f"must be ≤ high ({self.high!r}), got {self.low!r}"


class Dim(Record):
    """Bounds of a symbolic dimension."""

    min: Count = Field(default=1, description="Smallest size, inclusive.")
    max: Count | None = Field(default=None, description="Largest size, inclusive; unbounded if left out.")

    def _problems(self) -> Iterator[Problem]:
        if self.max is not None and self.min > self.max:
            yield "min", f"must be ≤ max ({self.max}), got {self.min}"


# ---- Steps


class Step(Record):
    """Something to do to the modules that `at` matches."""

    meaning: ClassVar[tuple[str, ...]] = ()
    """Attributes that change what trained numbers stand for; a file of adapters keeps them."""

    kind: str = Field(description="Which step this is.", kw_only=True)
    at: Patterns = Field(
        description="Glob or globs over module paths, such as 'layer*.conv1'. Each must match a module."
    )
    name: Symbol = Field(
        default="",
        validate_default=False,
        kw_only=True,
        description="Name of the step in reports and in adapter files; unique in a plan. Default: its kind, "
        "with a number appended from the second of that kind on.",
    )

    @property
    def patterns(self) -> tuple[str, ...]:
        """`at` as a tuple."""
        return (self.at,) if isinstance(self.at, str) else tuple(self.at)

    @property
    def selection(self) -> tuple[str, int] | None:
        """The input by which every row of a batch chooses one of the step's alternatives, and how many there are."""
        return None

    @model_validator(mode="after")
    def _default_name(self) -> Self:
        if "name" not in self.model_fields_set:
            self._derive(name=self.kind)
        return self


class _Excluding(Step):
    """A step that may be told to leave modules alone."""

    if TYPE_CHECKING:
        exclude: Patterns | None

    @property
    def excluded(self) -> tuple[str, ...]:
        """`exclude` as a tuple."""
        given = self.exclude if self.exclude is not None else ()
        return (given,) if isinstance(given, str) else tuple(given)


class _FromPeft(Step):
    """A step that a peft checkpoint can hold.

    Attributes:
        one: why rows of a batch cannot select among several, where they cannot.
    """

    one: ClassVar[str | None] = None

    @model_validator(mode="before")
    @classmethod
    def _check_selection(cls, data: Any) -> Any:
        if cls.one is not None and isinstance(data, Mapping) and data.get("adapters") is not None:
            raise refusal(("adapters", f"rows cannot select among several: {cls.one}; LoRA(adapters=...) has them"))
        return data

    @classmethod
    def from_peft(cls, folder: str | os.PathLike[str]) -> Self:
        """The one step of this kind that a peft checkpoint is.

        Args:
            folder: what peft's ``save_pretrained`` wrote. Its weights are read when the plan is compiled.

        Raises:
            PlanError: the checkpoint is of another kind, is more than one step (:func:`from_peft` returns them all), or
                cannot be read.
        """
        steps = from_peft(folder)
        kinds = sorted({step.kind for step in steps})
        if type(steps[0]) is not cls:
            raise PlanError(
                f"the checkpoint is of kind {steps[0].kind!r}, not {cls.model_fields['kind'].default!r}",
                where=os.fspath(folder), hint=f"fxfreeze.{type(steps[0]).__name__}.from_peft reads it",
            )  # fmt: skip
        if len(steps) > 1:
            raise PlanError(
                f"the checkpoint takes {len(steps)} steps ({', '.join(kinds)}), not one",
                where=os.fspath(folder), hint="Plan(steps=fxfreeze.from_peft(folder)) has them all",
            )  # fmt: skip
        return steps[0]


class _LowRank(_FromPeft):
    """Fields and scale that LoRA and DoRA share."""

    meaning = ("rank", "scale")

    rank: Count = Field(description="Rank r of the update B·A; A is (r, in features), B is (out features, r).")
    alpha: Number | None = Field(
        default=None, description="Numerator of the scale. Default: rank, so that the scale is 1."
    )
    rslora: Flag = Field(default=False, description="Scale by alpha / sqrt(rank) instead of alpha / rank.")
    weights: Weights | None = Field(
        default=None,
        description="Path of a safetensors file with the trained adapter, relative to the plan's folder. "
        "Without it the adapter starts as an update of zero.",
    )

    @property
    def scale(self) -> float:
        """The factor in front of B·A."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / math.sqrt(self.rank) if self.rslora else alpha / self.rank

    def _problems(self) -> Iterator[Problem]:
        if self.alpha == 0:
            yield "alpha", "must not be 0, which would switch the adapter off"


class LoRA(_LowRank):
    """W + scale · B·A (Hu et al. 2021); with `rslora` the scale of Kalajdzievski 2023.

    With `adapters`, every site has as many A and B, and the model gets an input more, `select`: integers, one per row
    of the batch (the first dim of the plan's first input). 0 is the model without an adapter, k the k-th of them. They
    stay beside the weight, so that rows of one batch may differ; :meth:`fxfreeze.Artifact.add_adapter` adds more to
    what was compiled. Transposed convolutions are refused.
    """

    kind: Literal["lora"] = Field(default="lora", description="Low-rank update.", kw_only=True)
    adapters: Count | None = Field(
        default=None, description="Number of adapters, of which every row of a batch names one, or none of them by 0."
    )
    select: Symbol = Field(
        default="adapter",
        description="Name of the input that names every row's adapter; steps with as many adapters may share it.",
    )
    weights: WeightFiles | None = Field(  # type: ignore[assignment]
        default=None,
        description="Path of a safetensors file with the trained adapter, relative to the plan's folder; with "
        "`adapters` a list of them, or of folders that peft wrote, one per adapter, each of this rank or a "
        "smaller one; or one file with all of them. Without it the adapter starts as an update of zero.",
    )

    bias: Flag = Field(
        default=False, description="B has a bias too, scaled as B·A is; for layers that have a bias (peft's lora_bias)."
    )

    @property
    def selection(self) -> tuple[str, int] | None:
        return None if self.adapters is None else (self.select, self.adapters + 1)

    def _problems(self) -> Iterator[Problem]:
        yield from super()._problems()
        files = None if isinstance(self.weights, str | None) else len(self.weights)
        if files is not None and files != self.adapters:
            have = "no adapters are asked for" if self.adapters is None else f"there are {self.adapters} adapters"
            yield "weights", f"lists {files} files, but {have}; a list has one per adapter"
        if self.bias and self.adapters is not None:
            yield "bias", "has no form for several adapters; leave it out"


class DoRA(_LowRank):
    """m · (W + scale · B·A) / ‖W + scale · B·A‖, the norm per output (Liu et al. 2024)."""

    one = "it divides by norms of the whole weight with that adapter in it, and adds nothing beside it"

    kind: Literal["dora"] = Field(
        default="dora", description="Low-rank update with a magnitude per output.", kw_only=True
    )


class IA3(_FromPeft):
    """A learned gain per feature (Liu et al. 2022)."""

    one = "it scales what the frozen layer makes, and adds nothing beside it"

    meaning = ("side",)

    kind: Literal["ia3"] = Field(default="ia3", description="One learned gain per feature.", kw_only=True)
    side: Literal["out", "in"] = Field(
        default="out", description="Scale the module's output features or its input features."
    )
    weights: Weights | None = Field(
        default=None,
        description="Path of a safetensors file with the trained gains, relative to the plan's folder. "
        "Without it all gains are 1.",
    )


class VeRA(_FromPeft):
    """W + diag(λ_b) · B · diag(λ_d) · A, with one random and frozen pair A, B for all layers (Kopiczko et al. 2023).

    A is (rank, most inputs of any layer) and B (most outputs, rank), uniform in ±√(6 / fan in), drawn A first; a layer
    takes the first columns of A and the first rows of B that it needs, as in peft.
    """

    one = "each would hold a copy of A and B, as a LoRA does: diag(λ_d)·A and diag(λ_b)·B are one"

    meaning = ("rank", "seed")

    kind: Literal["vera"] = Field(default="vera", description="Gains of a random low-rank update.", kw_only=True)
    rank: Count = Field(description="Rank r: rows of A, columns of B, length of λ_d.")
    seed: Annotated[int, Strict(), Field(ge=0)] = Field(
        default=0,
        description="Seed of A and B (peft's projection_prng_key); a file of weights that holds them overrules it.",
    )
    d_initial: Number = Field(default=0.1, description="Where λ_d starts; λ_b starts at 0.")
    weights: Weights | None = Field(
        default=None,
        description="Path of a safetensors file with the trained gains, relative to the plan's folder. "
        "Without it the adapter starts as an update of zero.",
    )


class OFT(_FromPeft):
    """W · Rᵀ with R block-diagonal and orthogonal: the inputs rotated, or an embedding's outputs (Qiu et al. 2023).

    A block is the Cayley transform (I − Q)(I + Q)⁻¹ of a skew-symmetric Q, or, with `terms`, a truncated Neumann series
    of its inverse as peft computes it: I + 2Q + 2Q² + … + Qⁿ⁻¹.
    """

    one = "it turns what the frozen layer reads, and adds nothing beside it"

    meaning = ("block_size", "share", "coft", "eps", "terms")

    kind: Literal["oft"] = Field(default="oft", description="Rotation of the inputs.", kw_only=True)
    block_size: Annotated[int, Strict(), Field(ge=2)] = Field(
        description="Features that one block of R mixes; divides the layer's inputs (an embedding's outputs)."
    )
    share: Flag = Field(default=False, description="One block for all groups of features.")
    coft: Flag = Field(default=False, description="Keep every Q shorter than eps / √blocks (constrained OFT).")
    eps: Number = Field(default=6e-5, description="How far coft lets the adapter go; > 0.")
    terms: Annotated[int, Strict(), Field(ge=1)] | None = Field(
        default=None, description="Terms of the Neumann series, as peft counts them. Default: the transform itself."
    )
    weights: Weights | None = Field(
        default=None,
        description="Path of a safetensors file with the trained rotations, relative to the plan's folder. "
        "Without it the adapter starts as no rotation.",
    )

    def _problems(self) -> Iterator[Problem]:
        if not self.eps > 0:
            yield "eps", f"must be > 0, got {self.eps!r}"


class Tversky(Step):
    """Similarity to P learnt prototypes in place of a linear layer with P outputs (Doumbouya et al., arXiv 2506.11035).

    It starts either out of the linear layer's weights, ranking its outputs nearly as that does
    (:meth:`fxfreeze.nn.TverskyProjection.from_linear`), or anew.
    """

    meaning = ("model", "intersection", "difference", "semantics", "threshold", "normalize")

    kind: Literal["tversky"] = Field(default="tversky", description="Tversky similarity head.", kw_only=True)
    features: Count | None = Field(
        default=None, description="Number of features K of the bank. Default: twice the layer's inputs."
    )
    model: Literal["contrast", "ratio"] = Field(default="contrast", description="Tversky's model of similarity.")
    intersection: Literal["product", "min", "max", "mean", "gmean", "softmin"] = Field(
        default="product", description="How what both have is measured."
    )
    difference: Literal["ignorematch", "subtractmatch"] = Field(
        default="ignorematch", description="How what only one has is measured."
    )
    semantics: Literal["aggregate", "per_feature", "inclusive"] = Field(
        default="aggregate",
        description="Whether reductions act on sums over the features, as in the package tversky, or on each feature.",
    )
    threshold: Number = Field(default=0.0, description="A feature is present strictly above it.")
    normalize: Flag = Field(default=False, description="Scale inputs and prototypes to length 1 first.")
    start: Literal["linear", "random"] = Field(
        default="linear", description="Where the weights start: out of the linear layer's, or drawn."
    )
    weights: Weights | None = Field(
        default=None,
        description="Path of a safetensors file with the trained weights, relative to the plan's folder.",
    )

    def _problems(self) -> Iterator[Problem]:
        plain = (self.model, self.intersection, self.difference) == ("contrast", "product", "ignorematch")
        if self.start == "linear" and (not plain or self.threshold != 0 or self.normalize):
            yield (
                "start",
                (
                    "must be 'random': only contrast, product, ignorematch without threshold and normalize can start "
                    "out of a linear layer"
                ),
            )
        elif self.start == "linear" and self.features is not None and self.features % 2:
            yield "features", f"must be even to start out of a linear layer, got {self.features}"
        if self.intersection == "gmean" and self.threshold < 0:
            yield "threshold", f"must be ≥ 0 with gmean, got {self.threshold!r}"


class Gate(Step):
    """Neurons with a gain each that are silent up to a threshold: y = g ⊙ h ⊙ 1[s(h) > τ] (arXiv 2602.11726).

    While it trains the indicator is a sigmoid of (s(h) − τ) / temperature; compiling makes it hard, which changes what
    the model computes, and says by how much. It starts all but open: g = 1, and τ so far below the least value of the
    activation that the sigmoid is 0.98 there. Values without a least (what a linear layer returns) start open above 0
    only, unless `s` is "abs" or `threshold` says otherwise.

    With `modes`, every neuron has as many gains and thresholds, and the model gets an input more, `select`: integers,
    one per row of the batch (the first dim of the plan's first input), from 0 to modes − 1.
    """

    meaning = ("s", "on", "modes", "dim")

    kind: Literal["gate"] = Field(default="gate", description="Gain and threshold per neuron.", kw_only=True)
    on: Literal["activation", "output"] = Field(
        default="activation",
        description="Gate the activation functions that a matched module runs itself (relu, gelu, silu, …), or what a "
        "matched module returns.",
    )
    s: Literal["h", "abs"] = Field(default="h", description="What is compared with the threshold: h or its size.")
    soft: Literal["sigmoid"] = Field(default="sigmoid", description="The indicator while it trains.")
    temperature: Number = Field(
        default=0.1, description="Temperature T of the soft indicator when training starts, in the unit of h; > 0."
    )
    threshold: Number | None = Field(
        default=None,
        description="Where all thresholds start, in the unit of h. Default: 4 · temperature below the least value of "
        "the activation; below 0 where it has none, and for s = 'abs'.",
    )
    harden: Flag = Field(default=True, description="Compile to hard gates; false compiles the soft ones.")
    dim: Annotated[int, Strict()] | None = Field(
        default=None,
        description="Dim of the neurons. Default: the channels of the layers and norms that the value comes from, "
        "else the last dim.",
    )
    modes: Count | None = Field(
        default=None, description="Number of sets of gains and thresholds, of which every row of a batch names one."
    )
    select: Symbol = Field(
        default="mode",
        description="Name of the input that names every row's mode; steps with as many modes may share it.",
    )
    weights: Weights | None = Field(
        default=None,
        description="Path of a safetensors file with trained gains and thresholds, relative to the plan's folder.",
    )

    @property
    def selection(self) -> tuple[str, int] | None:
        return None if self.modes is None else (self.select, self.modes)

    def _problems(self) -> Iterator[Problem]:
        if not self.temperature > 0:
            yield "temperature", f"must be > 0, got {self.temperature!r}"


class Grafted(Step):
    """A module in the graph, on an edge (``v ← f(v, taps…)`` or ``v ← v + scale · f(v, taps…)``) or behind it."""

    meaning: ClassVar[tuple[str, ...]] = ("taps", "tasks", "mask")

    if TYPE_CHECKING:  # fields of some steps, fixed in others

        @property
        def read(self) -> str: ...
        @property
        def on(self) -> str: ...
        @property
        def how(self) -> str: ...
        @property
        def scale(self) -> float: ...

    at: Patterns = Field(
        kw_only=True, description="Glob or globs over module paths, such as 'layer*.conv1'. Each must match a module."
    )
    taps: dict[Symbol, Text] = Field(
        default_factory=dict,
        kw_only=True,
        description="More of what the module's forward takes, by keyword: the path of a module, for what that returns, "
        "or the name of an input of the model.",
    )
    select: Symbol | None = Field(
        default=None,
        kw_only=True,
        description="Name of an input that the model gets for it, and of the keyword it is passed by: one of `tasks` "
        "integers per row of the batch.",
    )
    tasks: Count | None = Field(
        default=None, kw_only=True, description="How many integers `select` may be: from 0 to tasks - 1."
    )
    mask: Text | None = Field(
        default=None,
        kw_only=True,
        description="Where it acts: the path of a module, or the name of an input of the model, whose bools, or "
        "numbers other than 0, say so, with a shape that the value's begins with, such as [batch, sequence]. Elsewhere "
        "the value stays as it is.",
    )
    weights: Weights | None = Field(
        default=None,
        kw_only=True,
        description="Path of a safetensors file with the trained parameters, relative to the plan's folder.",
    )

    @property
    def selection(self) -> tuple[str, int] | None:
        return None if self.select is None or self.tasks is None else (self.select, self.tasks)

    def _problems(self) -> Iterator[Problem]:
        if (self.select is None) != (self.tasks is None):
            yield "tasks", "and select are given together, or not at all"
        if self.select in self.taps:
            yield "taps", f"{self.select!r} is the input that select adds; it need not be tapped"
        if self.mask is not None and self.how == "new":
            yield "mask", "has no meaning for new outputs, which have no value to keep"
        if self.mask is not None and self.on in ("weight", "bias"):
            yield "mask", "has no meaning for a parameter, which is the same at all positions"


class _AnyModule(Grafted):
    """A module of the caller's."""

    meaning: ClassVar[tuple[str, ...]] = ("arguments", *Grafted.meaning)

    module: Module = Field(
        description="The module: an nn.Module, or 'package.module:Name' of a class or function that makes one of "
        "`arguments`. Every site of an adapted module gets a copy of all that it holds; parameters that require no "
        "gradient stay frozen. A plan file takes the name only."
    )
    arguments: Annotated[dict[str, Any], BeforeValidator(_data)] = Field(
        default_factory=dict,
        kw_only=True,
        description="Keyword arguments of what makes the module: bools, finite numbers, texts, and lists and tables of "
        "them. Leave out what is None.",
    )

    def _problems(self) -> Iterator[Problem]:
        yield from super()._problems()
        if self.arguments and not isinstance(self.module, str):
            yield "arguments", "are for a module named as 'package.module:Name'; this one is made already"


class Splice(_AnyModule):
    """v ← f(v, taps…): any nn.Module on an edge of the graph.

    The module is called with the value itself, or with what the site's module is given (a branch beside it), then with
    its taps by keyword, and returns one tensor. On a parameter it makes the weight out of the weight: a
    reparametrisation, or a network that writes it; what depends on no input is computed at compile time. Where several
    steps splice at one site, they do so in plan order, each behind the one before it.
    """

    meaning = (*_AnyModule.meaning, "on", "read", "how", "scale")

    kind: Literal["splice"] = Field(default="splice", description="A module on an edge of the graph.", kw_only=True)
    on: Literal["output", "input", "module", "weight", "bias"] = Field(
        default="output",
        description="Change what a matched module returns, the first floating tensor it is given, or a parameter of "
        "it (PARAM); or put f in the module's place, on what it is given.",
    )
    read: Literal["value", "input", "result"] = Field(
        default="value",
        description="Call f with the value that is changed; or with what the module is given, for on='output' (a "
        "branch beside the module); or with what the module makes of the value, for on='input' (a branch that begins "
        "behind a copy of the module, such as the LayerNorm of a residual stream).",
    )
    how: Literal["replace", "add"] = Field(default="replace", description="v ← f(v), or v ← v + scale · f(v).")
    scale: Number = Field(default=1.0, description="Factor of f(v) where it is added.")

    def _problems(self) -> Iterator[Problem]:
        yield from super()._problems()
        if self.how == "replace" and self.scale != 1:
            yield "scale", "has a meaning with how='add' only"
        needed = {"input": "output", "result": "input"}.get(self.read, self.on)
        if self.on != needed:
            yield "read", f"{self.read!r} goes with on={needed!r} only, not with on={self.on!r}"
        if self.how == "add" and self.on == "module":
            yield "how", "must be 'replace' where f takes the module's place"


class Head(_AnyModule):
    """Outputs of the model from what one of its modules returns: new ones, or in the place of (or added to) an old one.

    The module is called with what the module at `at` returns, then with its taps by keyword. A dict of tensors, a tuple
    or one tensor becomes as many new outputs.
    """

    meaning = (*_AnyModule.meaning, "how")
    on: ClassVar[Literal["output"]] = "output"
    read: ClassVar[Literal["value"]] = "value"

    kind: Literal["head"] = Field(default="head", description="A module that makes outputs.", kw_only=True)
    how: Literal["new", "replace", "add"] = Field(
        default="new", description="Outputs of its own, or an output of the model replaced, or added to."
    )
    output: Text | None = Field(
        default=None, description="The output that is replaced or added to. Default: the model's first."
    )
    outputs: tuple[Text, ...] | None = Field(
        default=None, description="Names of the new outputs. Default: the step's name, with a key or number behind it."
    )

    def _problems(self) -> Iterator[Problem]:
        yield from super()._problems()
        if self.how == "new" and self.output is not None:
            yield "output", "has a meaning with how='replace' and 'add' only"
        if self.how != "new" and self.outputs is not None:
            yield "outputs", "has a meaning with how='new' only"
        yield from _repeats("outputs[{}]", self.outputs or ())


class Bottleneck(Grafted):
    """v + scale · U·σ(D·v), or of LayerNorm(v); U is 0 at first, so that it starts as the identity.

    Behind an attention and behind a feed-forward layer it is Houlsby's adapter (Houlsby et al. 2019), behind the latter
    alone Pfeiffer's (2020); with ``form="parallel"`` it reads what the module is given (He et al. 2022). Values with
    channels first (convolutions) get convolutions of 1×1, as in adapters of SAM.
    """

    meaning = (*Grafted.meaning, "width", "form", "scale", "activation", "norm")
    on: ClassVar[str] = "output"
    how: ClassVar[str] = "add"

    kind: Literal["bottleneck"] = Field(default="bottleneck", description="Down, activation, up.", kw_only=True)
    width: Count = Field(description="Width of the bottleneck.")
    form: Literal["sequential", "parallel"] = Field(
        default="sequential", description="Read what the module returns, or what it is given."
    )
    activation: Literal["gelu", "relu", "silu", "tanh"] = Field(default="gelu", description="σ.")
    norm: Flag = Field(default=False, description="A LayerNorm of its own before D.")
    scale: Number = Field(default=1.0, description="Factor of what is added.")
    dims: Annotated[int, Strict(), Field(ge=0, le=3)] | None = Field(
        default=None,
        description="How many dims come after the channels. Default: 2 for values of four dims, 3 for five, else 0.",
    )

    @property
    def read(self) -> str:
        return "input" if self.form == "parallel" else "value"


class _Edit(Grafted):
    """Fields that LoReFT and DiReFT share."""

    meaning = (*Grafted.meaning, "rank", "positions")
    read: ClassVar[str] = "value"
    on: ClassVar[str] = "output"
    how: ClassVar[str] = "replace"
    scale: ClassVar[float] = 1.0

    rank: Count = Field(description="Rank of the subspace that is edited.")
    positions: Text = Field(
        default="all", description="Which positions: 'all', 'f3' (the first three), 'l2' (the last two), 'f3+l2'."
    )

    def _problems(self) -> Iterator[Problem]:
        yield from super()._problems()
        if not re.fullmatch(r"all|[fl][1-9][0-9]*|f[1-9][0-9]*\+l[1-9][0-9]*", self.positions):
            yield "positions", f"must be 'all', 'f3', 'l2' or 'f3+l2', got {brief(self.positions)}"


class LoReFT(_Edit):
    """h + Rᵀ(W·h + b − R·h) with orthonormal rows of R, at some positions (Wu et al. 2024, arXiv 2404.03592)."""

    kind: Literal["loreft"] = Field(default="loreft", description="Edit of a subspace.", kw_only=True)


class DiReFT(_Edit):
    """h + W₂ᵀ(W₁·h + b), at some positions (Wu et al. 2024, arXiv 2404.03592)."""

    kind: Literal["direft"] = Field(default="direft", description="Low-rank edit.", kw_only=True)


class Codebook(Grafted):
    """The mean of the k codes most similar to a value, in its place (Tamkin et al. 2023, arXiv 2310.17230).

    It does not start as the identity: train it, or give it codes by `weights`. Those of a layer of its own that k-means
    started (:meth:`fxfreeze.nn.Codebook.start`) do, saved as ``<module path>.codes``, ``weight`` and ``bias``.
    """

    meaning = (*Grafted.meaning, "codes", "k", "groups", "similarity", "norm")
    read: ClassVar[str] = "value"
    on: ClassVar[str] = "output"
    how: ClassVar[str] = "replace"
    scale: ClassVar[float] = 1.0

    kind: Literal["codebook"] = Field(default="codebook", description="Codebook bottleneck.", kw_only=True)
    codes: Count = Field(description="Number of codes of each group.")
    k: Count = Field(default=1, description="How many codes are chosen.")
    groups: Count = Field(default=1, description="Chunks of a value, each with a codebook of its own.")
    similarity: Literal["cosine", "euclidean"] = Field(default="cosine", description="What is largest for the chosen.")
    norm: Flag = Field(default=True, description="Compare LayerNorm(x) with the codes.")

    def _problems(self) -> Iterator[Problem]:
        yield from super()._problems()
        if self.k > self.codes:
            yield "k", f"must be ≤ codes ({self.codes}), got {self.k}"


class BayesCap(Grafted):
    """Three more outputs: mean, scale α and shape β of the error of what a module returns (Upadhyay et al. 2022).

    The variance is :func:`fxfreeze.nn.variance` of α and β, the loss :func:`fxfreeze.nn.cap_loss`.
    """

    meaning = (*Grafted.meaning, "positive")
    read: ClassVar[str] = "value"
    on: ClassVar[str] = "output"
    how: ClassVar[str] = "new"
    scale: ClassVar[float] = 1.0
    output: ClassVar[None] = None
    leaves: ClassVar[tuple[str, ...]] = ("mean", "alpha", "beta")

    kind: Literal["bayescap"] = Field(default="bayescap", description="Uncertainty of an output.", kw_only=True)
    hidden: Count = Field(default=64, description="Width of the layers in between.")
    blocks: Annotated[int, Strict(), Field(ge=0)] = Field(default=2, description="Number of residual blocks.")
    positive: Literal["softplus", "relu"] = Field(default="softplus", description="What makes 1/α and β positive.")
    dims: Annotated[int, Strict(), Field(ge=0, le=3)] | None = Field(
        default=None,
        description="How many dims come after the channels. Default: 2 for values of four dims, 3 for five, else 0.",
    )

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the new outputs."""
        return tuple(f"{self.name}.{leaf}" for leaf in self.leaves)


class Tap(Step):
    """What modules return, for a loss: an adapted module has it in ``net.tapped`` after a call, artifacts know nothing
    of it.

    An output that stays is ``fz.Head("torch.nn:Identity", at=...)``.
    """

    kind: Literal["tap"] = Field(default="tap", description="A value to train on.", kw_only=True)


class Prompt(Step):
    """Trained vectors in front of every sequence (prompt tuning, Lester et al. 2021, arXiv 2104.08691).

    The model then runs on sequences that are longer by `tokens`, as if it were called with ``inputs_embeds`` of prompt
    and tokens and with an attention mask of ones in front: positions count from the prompt's first vector. The longest
    sequence it takes is shorter by as much, where positions are looked up in a table.

    It does not start as the identity: no vectors would.
    """

    kind: Literal["prompt"] = Field(default="prompt", description="Trained vectors before the tokens.", kw_only=True)
    tokens: Count = Field(description="Number P of vectors; their width is the embedding's.")
    keep: Literal["all", "tokens"] = Field(
        default="all",
        description="Outputs with a dim of the sequence: with the prompt's P rows in front, or without them.",
    )
    start: Literal["vocabulary", "random"] = Field(
        default="vocabulary",
        description="Where the vectors start: rows of the embedding, or normal with its deviation.",
    )
    fill: dict[str, Number] = Field(
        default_factory=dict,
        description="What stands at the prompt's positions of an input with the sequence's dim, by the input's name. "
        "Masks of integers and bools are filled with 1, token types with 0; other inputs must be told.",
    )
    weights: Weights | None = Field(
        default=None,
        description="Path of a safetensors file with the trained vectors, relative to the plan's folder; a file that "
        "peft's prompt tuning saved will do.",
    )


class Prefix(Step):
    """Trained keys and values in front of those of an attention (prefix tuning, Li & Liang 2021, arXiv 2101.00190).

    Every query attends to all of them, whatever the mask. With `hidden`, they are computed by a small network while
    they train, one per site, tanh(E·W₁ + b₁)·W₂ + b₂, and are constants again once compiled.

    It does not start as the identity, unless its file says so.
    """

    meaning = ("shift",)

    kind: Literal["prefix"] = Field(default="prefix", description="Trained keys and values.", kw_only=True)
    tokens: Count = Field(description="Number P of keys and of values for each head.")
    hidden: Count | None = Field(
        default=None, description="Width of the network that makes keys and values while they train; none if left out."
    )
    shift: Flag = Field(
        default=False,
        description="Let the tokens' positions begin at P: as if the prefix were earlier tokens, which is what peft's "
        "prefix tuning trains. Once for the model, whatever the number of sites.",
    )
    weights: Weights | None = Field(
        default=None,
        description="Path of a safetensors file with the trained keys and values, relative to the plan's folder; a "
        "file that peft's prefix tuning saved will do, with shift = true and the sites in the order of the layers.",
    )


class Factorize(Step):
    """W ≈ U·V with U [out, rank] and V [rank, in]: two linear layers for one, if the predictions stay.

    The best approximation of that rank (Eckart and Young 1936). It is lossy, and done only where it takes less memory
    and arithmetic, and as many predictions as `agreement` says stay on the calibration data; elsewhere the ledger says
    why not. The head of a classifier trained to neural collapse has rank classes − 1 (Papyan et al. 2020).
    """

    kind: Literal["factorize"] = Field(default="factorize", description="Two linear layers for one.", kw_only=True)
    rank: Count | None = Field(default=None, description="Rank; default: the smallest that keeps the predictions.")
    agreement: Number = Field(
        default=0.999, description="Share of predictions on the calibration data that have to stay; in (0, 1]."
    )

    def _problems(self) -> Iterator[Problem]:
        if not 0 < self.agreement <= 1:
            yield "agreement", f"must be in (0, 1], got {self.agreement!r}"


class Replace(Step):
    """Parameters of the matched modules, replaced by trained ones.

    Of a tensor that several modules share, only the use by the matched module changes.
    """

    kind: Literal["replace"] = Field(default="replace", description="Trained parameters of the model.", kw_only=True)
    weights: Weights = Field(
        description="Path of a safetensors file, relative to the plan's folder, that names every parameter as the "
        "model does ('head.weight'), or as peft does."
    )


class Prune(_Excluding):
    """Weights that are zero: W ← mask ⊙ W, after everything else that changes W.

    Which ones is said by a file of masks (``method="mask"``), or chosen when the plan is adapted:

    * magnitude: the largest |w| stay
    * nm: the n largest |w| of every m consecutive inputs of a row stay
    * block: the tiles of the weight, as a matrix [out, in · kernel], with the largest root mean square stay
    * channel: whole channels go, with all that is coupled to them by residual additions, gates and norms: the rows of
      the layers that make them, their biases, and scale and shift of the norms behind

    The masks are fixed from then on: adapters train under them, and files of adapters keep them. Several steps may
    prune different layers, or one layer further than the step before.
    """

    kind: Literal["prune"] = Field(default="prune", description="Weights that are zero.", kw_only=True)
    at: Patterns = Field(
        default="*",
        description="Glob or globs over module paths, such as 'layer*.conv1'. Each must match a module. Default: "
        "whatever can be pruned.",
    )
    mask: Weights | None = Field(
        default=None,
        description="Path of a file of masks, relative to the plan's folder: safetensors, or the .pt or .pth of "
        "open_lth. It names parameters as the model does, one tensor of 0 and 1 each; those it lacks stay dense.",
    )
    method: Literal["mask", "magnitude", "nm", "block", "channel"] = Field(
        default="mask", description="A file says what stays, or how it is chosen."
    )
    density: Number | None = Field(
        default=None, description="Share that stays, > 0 and ≤ 1: of weights, or of channels for method='channel'."
    )
    flops: Number | None = Field(
        default=None,
        description="Share of the multiply-accumulates of all layers with weights that stays at most, > 0 and ≤ 1: for "
        "method='channel', instead of density.",
    )
    scope: Literal["global", "layer"] = Field(
        default="global",
        description="Compare everything the step matches, so that some layers keep more than others; or keep the same "
        "share of every layer (of every group of coupled channels).",
    )
    criterion: Literal["l1", "taylor", "batchnorm"] = Field(
        default="l1",
        description="What a channel is worth: its sum of |w|, of |w · ∂L/∂w| on the calibration data with L half the "
        "squared outputs, or of |γ| of the batch norms behind it. Sums go over all layers that make it; those of l1 "
        "and batchnorm are divided by the mean of their group.",
    )
    multiple: Count = Field(
        default=1,
        description="Channels of a layer that stay are rounded to a multiple of this. Fast kernels take blocks, 8 with "
        "AVX2, 16 with AVX-512, of which a part costs as much as the whole.",
    )
    n: Count = Field(default=2, description="How many of m inputs stay.")
    m: Count = Field(default=4, description="How many consecutive inputs compete.")
    block: tuple[Count, Count] = Field(
        default=(64, 64), description="Rows and columns of a tile; tiles at the right and lower edge may be smaller."
    )
    exclude: Patterns | None = Field(
        default=None, description="Glob or globs over module paths to leave alone. Each must match a module."
    )
    train: Flag = Field(
        default=False,
        description="Train the weights that stay, from the model's on; pruned ones stay zero whatever the optimizer "
        "does.",
    )
    weights: Weights | None = Field(
        default=None,
        description="Path of a safetensors file with the masks, and the trained weights, that an adapted module of "
        "this plan saved, relative to the plan's folder.",
    )

    if TYPE_CHECKING:  # the runtime takes lists too; see record.py

        def __init__(
            self,
            at: Patterns = "*",
            mask: str | os.PathLike[str] | None = None,
            method: str = "mask",
            density: float | None = None,
            flops: float | None = None,
            scope: str = "global",
            criterion: str = "l1",
            multiple: int = 1,
            n: int = 2,
            m: int = 4,
            block: Sequence[int] = (64, 64),
            exclude: Patterns | None = None,
            train: bool = False,
            weights: str | os.PathLike[str] | None = None,
            *,
            name: str = "",
        ) -> None: ...

    def _problems(self) -> Iterator[Problem]:
        for key, methods in _PRUNES_BY.items():
            if self.method not in methods and getattr(self, key) != type(self).model_fields[key].default:
                yield key, f"has a meaning with method={' or '.join(map(repr, methods))} only"
        for key in ("density", "flops"):
            share = getattr(self, key)
            if share is not None and not 0 < share <= 1:
                yield key, f"must be > 0 and ≤ 1, got {share!r}"
        if self.method == "mask" and self.mask is None:
            yield "mask", "must name a file of masks, unless method is 'magnitude', 'nm', 'block' or 'channel'"
        if self.method in ("magnitude", "block") and self.density is None:
            yield "density", f"missing, but required for method={self.method!r}"
        if self.method == "channel" and (self.density is None) == (self.flops is None):
            yield "density", "and flops are shares that stay: give one of them for method='channel'"
        if self.method == "nm" and self.n >= self.m:
            yield "n", f"must be < m ({self.m}), got {self.n}"


_PRUNES_BY: dict[str, tuple[str, ...]] = {
    "mask": ("mask",),
    "density": ("magnitude", "block", "channel"),
    "flops": ("channel",),
    "scope": ("magnitude", "block", "channel"),
    "criterion": ("channel",),
    "multiple": ("channel",),
    "n": ("nm",),
    "m": ("nm",),
    "block": ("block",),
}
"""Fields of :class:`Prune` → the methods with which they mean something."""


class Quantize(_Excluding):
    """Weights, and with some schemes what they multiply, as small integers or as 8-bit floats.

    It is done after everything else that changes weights, and is lossy: what it costs is measured on `calibration`. A
    layer counts as quantized only where its target runs it so; elsewhere the compiler refuses, unless
    `allow_simulated`. With scheme='int8' and mode='static', a Tversky head that `at` names is summed up in integers.
    """

    kind: Literal["quantize"] = Field(default="quantize", description="Integers for floats.", kw_only=True)
    at: Patterns = Field(
        default="*",
        description="Glob or globs over module paths, such as 'layer*.conv1'. Each must match a module. Default: "
        "whatever can be quantized.",
    )
    scheme: Literal["int8", "int8-weight", "int4-weight", "fp8"] = Field(
        default="int8",
        description="'int8': weights and inputs of layers as 8-bit integers. 'int8-weight', 'int4-weight': weights "
        "only. 'fp8': weights and inputs of linear layers as 8-bit floats (e4m3), on NVIDIA's GPUs from Ada on.",
    )
    mode: Literal["static", "dynamic"] = Field(
        default="static",
        description="Scales of inputs are measured on the calibration data, or computed from every input, for 'fp8' "
        "from every row of it; for 'int8' and 'fp8'.",
    )
    granularity: Annotated[str, BeforeValidator(_granularity)] = Field(
        default="channel",
        description="Weights that share a scale: 'tensor': all of a layer; 'channel': those of one output feature; "
        "'group:32': 32 consecutive inputs (or another number) of one output feature, for linear layers with weights "
        "only.",
        json_schema_extra={"pattern": r"^(tensor|channel|group:[1-9]\d*)$"},
    )
    calibrate: Literal["minmax", "percentile", "mse", "entropy"] = Field(
        default="minmax",
        description="The range of inputs that integers span, with mode='static': all that was seen; what `percentile` "
        "of the values lie within; the range with the least squared error; or with the least divergence (Kullback and "
        "Leibler's) of what is left of the distribution.",
    )
    percentile: Number = Field(
        default=99.99, description="Of the values, those within the range of calibrate='percentile'; > 50 and ≤ 100."
    )
    exclude: Patterns | None = Field(
        default=None, description="Glob or globs over module paths to leave in floats. Each must match a module."
    )
    allow_simulated: Flag = Field(
        default=False,
        description="Emit targets that compute some quantized layers in floats, with the values of integers.",
    )
    correct_bias: Flag = Field(
        default=True,
        description="Move biases so that the mean of what a layer gives stays what it was on the calibration data, for "
        "'int8' with mode='static'.",
    )
    equalize: Flag = Field(
        default=False,
        description="First scale the channels of what layers read up or down, so that their ranges are alike, and the "
        "weights on both sides against it, which keeps the function; for 'int8'.",
    )
    products: Flag = Field(
        default=False,
        description="Also quantize products of two computed values, such as those of attention, which is written out "
        "for that; for 'int8' with mode='static'. The onnx target alone runs them in integers.",
    )
    budget: Annotated[str | None, BeforeValidator(_budget)] = Field(
        default=None,
        description="What quantizing may cost: 'snr:20': the outputs keep a signal-to-noise ratio of 20 dB on the "
        "first batch of the calibration data; 'drop:0.003': the score of `evaluate` falls by 0.003 at most. Layers "
        "that cost most for what they save then stay in floats, or in 8 bits instead of 4.",
        json_schema_extra={"pattern": rf"^(snr|drop):{_DECIMAL}$"},
    )
    reduce_range: Flag | None = Field(
        default=None,
        description="Weights of 7 bits, within ±64, for 'int8': CPUs of x86 without VNNI add products of 8 bits up in "
        "pairs of 16 bits, which overflow. None: where the CPU that compiles is such a one; say so if another will run "
        "it.",
    )
    compensate: Flag = Field(
        default=False,
        description="Choose the integers of a linear layer's weights so that its results stay on the calibration data "
        "(GPTQ), not those nearest to the weights; for schemes with weights only.",
    )

    if TYPE_CHECKING:  # the runtime takes lists too; see record.py

        def __init__(
            self,
            at: Patterns = "*",
            scheme: str = "int8",
            mode: str = "static",
            granularity: str = "channel",
            calibrate: str = "minmax",
            percentile: float = 99.99,
            exclude: Patterns | None = None,
            allow_simulated: bool = False,
            correct_bias: bool = True,
            equalize: bool = False,
            products: bool = False,
            budget: str | None = None,
            reduce_range: bool | None = None,
            compensate: bool = False,
            *,
            name: str = "",
        ) -> None: ...

    @property
    def limit(self) -> tuple[str, float]:
        """What the budget is of, "snr" or "drop", and its number; ("", 0.0): there is none."""
        kind, _, number = (self.budget or "").partition(":")
        return kind, float(number or 0)

    @property
    def block(self) -> int:
        """How many inputs of an output feature share a scale; 0: there are no groups."""
        return int(self.granularity.partition(":")[2] or 0)

    def _problems(self) -> Iterator[Problem]:
        if self.scheme.endswith("-weight") and self.mode == "dynamic":
            yield "mode", f"has a meaning for schemes 'int8' and 'fp8' only: {self.scheme!r} leaves inputs as they are"
        if self.scheme == "fp8" and self.granularity != "channel":
            yield "granularity", f"'fp8' has one scale per output feature, 'channel', not {self.granularity!r}"
        if self.scheme == "int8" and self.block:
            yield "granularity", "groups are for weights alone: an integer product has one scale per output feature"
        if self.scheme == "int4-weight" and not self.block:
            yield "granularity", f"{self.granularity!r} is too coarse for 4 bits; use 'group:32'"
        if self.calibrate != "minmax" and (self.scheme.endswith("-weight") or self.mode == "dynamic"):
            yield "calibrate", "has a meaning with scheme='int8' or 'fp8' and mode='static' only"
        if self.scheme == "fp8" and self.calibrate in ("mse", "entropy"):
            yield "calibrate", f"{self.calibrate!r} is for 256 even steps; use 'minmax' or 'percentile' with 'fp8'"
        for key in ("correct_bias", "equalize", "products"):
            changed = getattr(self, key) != type(self).model_fields[key].default
            if changed and (self.scheme != "int8" or (self.mode == "dynamic" and key != "equalize")):
                yield key, "has a meaning for scheme='int8'" + " and mode='static'" * (key != "equalize") + " only"
        if self.calibrate != "percentile" and self.percentile != type(self).model_fields["percentile"].default:
            yield "percentile", "has a meaning with calibrate='percentile' only"
        if self.reduce_range is not None and self.scheme != "int8":
            yield "reduce_range", f"is for products of integers, scheme='int8', not {self.scheme!r}"
        if self.compensate and not self.scheme.endswith("-weight"):
            yield "compensate", f"is for weights only: use scheme='int8-weight' or 'int4-weight', not {self.scheme!r}"
        if not 50 < self.percentile <= 100:
            yield "percentile", f"must be > 50 and ≤ 100, got {self.percentile!r}"


STEPS: tuple[type[Step], ...] = (
    LoRA,
    DoRA,
    IA3,
    Tversky,
    Gate,
    Splice,
    Head,
    Bottleneck,
    LoReFT,
    DiReFT,
    Codebook,
    BayesCap,
    Tap,
    Prompt,
    Prefix,
    VeRA,
    OFT,
    Replace,
    Prune,
    Factorize,
    Quantize,
)
"""Every step a plan can hold. A new step class is added here and nowhere else."""

if TYPE_CHECKING:
    AnyStep = Step
else:
    AnyStep = Annotated[Union[STEPS], Field(discriminator="kind")]  # noqa: UP007 - a union made from a tuple


def from_peft(folder: str | os.PathLike[str]) -> tuple[Step, ...]:
    """The steps that do what a peft checkpoint does: LoRA, DoRA, IA3, VeRA or OFT, and what it replaces.

    Module paths are those of the model that peft wrapped. Sites that differ in rank, alpha, side or block size are
    steps of their own; ``modules_to_save``, trained biases and saved embeddings are a :class:`Replace`.

    Args:
        folder: what peft's ``save_pretrained`` wrote: ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        PlanError: it is none, or holds something that no step can do; says what.
    """
    kinds = {step.model_fields["kind"].default: step for step in STEPS}
    return tuple(kinds[data["kind"]].model_validate(data) for data in read_steps(folder))


def from_adapterhub(folder: str | os.PathLike[str], *, base: str | None = None) -> tuple[Step, ...]:
    """The steps that do what a checkpoint of AdapterHub's ``adapters`` library does (or of adapter-transformers).

    Read are bottleneck adapters (``seq_bn``, ``double_seq_bn``, ``par_bn``, …), as :class:`Splice`; ``lora`` and
    ``ia3``; and ``loreft`` and ``direft`` at the first positions of a sequence, where the library counts from the first
    token that is no padding: pad on the right. Models are BERT, RoBERTa, XLM-RoBERTa, ELECTRA and DistilBERT. A
    prediction head beside the adapter (``model_head.safetensors``) is not read.

    Args:
        folder: what ``model.save_adapter(folder, name, use_safetensors=True)`` wrote: ``adapter_config.json`` and
            ``adapter.safetensors``. Its weights are read when the plan is compiled.
        base: path of the base model in the model to compile, such as "bert" in a BertForSequenceClassification, and ""
            for a BertModel. Default: as in the file, that is as in the model that the adapter was saved from.

    Raises:
        PlanError: it is none, or holds something that no step can do; says what, and by which key.

    Source: Poth et al. (2023), Adapters: A unified library for parameter-efficient and modular transfer learning, arXiv
    2311.11077.
    """
    kinds = {step.model_fields["kind"].default: step for step in STEPS}
    return tuple(kinds[data["kind"]].model_validate(data) for data in read_hub_steps(folder, base))


# ---- The plan


class Plan(Record):
    """A model's inputs, the steps to take, and the targets to emit."""

    model_config = ConfigDict(title="fxfreeze plan")

    inputs: tuple[Input, ...] = Field(
        json_schema_extra={"minItems": 1},
        description="The model's tensor inputs, in the order of its arguments.",
    )
    steps: tuple[AnyStep, ...] = Field(
        default=(),
        description="What to do to the model. The order of kinds is the compiler's: Replace, Prompt, Prefix, Tversky, "
        "LoRA with adapters, then LoRA, DoRA, IA3, VeRA and OFT, then Splice and the other steps that graft a module, "
        "heads last, then Gate, Prune, Tap. Within such a group steps at one module apply in this order, but what is "
        "grafted at inner modules comes before what is grafted at outer ones.",
    )
    targets: tuple[Target, ...] = Field(
        default=("torch",),
        description="What to emit: 'torch' (a torch.compile callable), 'aoti' (an AOTInductor package), "
        "'onnx' (an ONNX file). An empty list stops before emission.",
    )
    outputs: tuple[Text, ...] | None = Field(
        default=None,
        description="Names of the outputs to keep, for a model that returns a dict or a dataclass. "
        "Default: all of them.",
    )
    dims: dict[Symbol, Dim] = Field(
        default_factory=dict,
        description="Bounds of the symbolic dimensions that the inputs' shapes name. Default: ≥ 1.",
    )
    portable: Flag = Field(
        default=False,
        description="Write ONNX files of standard operators alone, those of opset 21, for runtimes other than "
        "ONNX Runtime. There linear layers of integers that give floats then take a little longer, and embeddings of "
        "4 bits take 8.",
    )
    version: Count = Field(default=VERSION, description="Version of the plan format.")

    suffixes: ClassVar[tuple[str, ...]] = (".toml", ".json")

    if TYPE_CHECKING:  # the runtime accepts any sequence, and dicts for records; see record.py

        def __init__(
            self,
            inputs: Iterable[Input | Mapping[str, Any]],
            steps: Iterable[Step | Mapping[str, Any]] = (),
            targets: Iterable[str] = ("torch",),
            outputs: Iterable[str] | None = None,
            dims: Mapping[str, Dim | Mapping[str, Any]] | None = None,
            portable: bool = False,
            version: int = VERSION,
        ) -> None: ...

    @model_validator(mode="before")
    @classmethod
    def _readable(cls, data: Any) -> Any:
        """Look at the version first: a newer plan may hold keys that would only be reported as unknown."""
        if isinstance(data, Mapping):
            version = data.get("version", VERSION)
            if isinstance(version, int) and version > VERSION:
                reads = f"this fxfreeze reads plans up to version {VERSION}; upgrade fxfreeze"
                raise refusal(("version", f"is {version}, but {reads}"))
        return data

    @model_validator(mode="after")
    def _name_steps(self) -> Self:
        """Give steps of one kind that were left unnamed different names; names that were given stay."""
        taken = {step.name for step in self.steps if "name" in step.model_fields_set}
        steps: list[Step] = []
        for step in self.steps:
            if "name" not in step.model_fields_set:
                names = (f"{step.kind}_{n}" if n > 1 else step.kind for n in itertools.count(1))
                step = step.model_copy(update={"name": next(name for name in names if name not in taken)})
                taken.add(step.name)
            steps.append(step)
        return self._derive(steps=tuple(steps))

    def _problems(self) -> Iterator[Problem]:
        if not self.inputs:
            yield "inputs", "must name at least one input"
        if self.outputs == ():
            yield "outputs", "must name at least one output; leave it out to keep all"
        names = [spec.name for spec in self.inputs]
        yield from _repeats("inputs[{}].name", names)
        yield from _misnested(names)
        given = [step.name if "name" in step.model_fields_set else None for step in self.steps]
        yield from _repeats("steps[{}].name", given)
        yield from _repeats("targets[{}]", self.targets)
        yield from _repeats("outputs[{}]", self.outputs or ())
        yield from self._select_problems(names)
        used = sorted({size for spec in self.inputs for size in spec.shape if isinstance(size, str)})
        for dim in self.dims:
            if dim not in used:
                names_of = f"the inputs' shapes name {', '.join(used) or 'none'}"
                yield f"dims.{dim}", f"no input has this dimension{suggest(dim, used)}; {names_of}"

    def _select_problems(self, names: Sequence[str]) -> Iterator[Problem]:
        tops = [name.split(".", 1)[0] for name in names]
        first: dict[str, int] = {}
        for i, step in enumerate(self.steps):
            if step.selection is None:
                continue
            (select, _), key = step.selection, _key(step)
            if select in tops:
                yield f"steps[{i}].select", f"{select!r} is an input of the model; choose another name"
            other = self.steps[first.setdefault(select, i)]
            if other.selection != step.selection:
                yield (
                    f"steps[{i}].{key}",
                    f"{step.name!r} has {_choices(step)} by {select!r}, but {other.name!r} "
                    f"(steps[{first[select]}]) has {_choices(other)} by it; give one of them another select",
                )
            if self.inputs and not self.inputs[0].shape:
                yield (
                    f"steps[{i}].{key}",
                    f"the first input, {names[0]!r}, has no dim, so there are no rows to select for",
                )

    @property
    def selects(self) -> tuple[Input, ...]:
        """The inputs that steps add to the model's, one integer per row: which of their alternatives it uses."""
        counts = dict(step.selection for step in self.steps if step.selection is not None)
        rows = self.inputs[0].shape[:1]
        return tuple(Input(name, rows, "int64", low=0, high=count - 1) for name, count in counts.items())

    # files

    @property
    def patterns(self) -> list[str]:
        """What the steps address: every `at` of every step."""
        return [glob for step in self.steps for glob in step.patterns]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a `.toml` or `.json` file.

        Relative `weights` (and a `mask`) in a file are relative to that file's folder; in the loaded plan they are
        absolute, so that the plan keeps its meaning wherever the process goes. `save` undoes this.
        Raises PlanError with the file's name, and for broken syntax the line.
        """
        file = Path(path)
        data = _read(file)
        for step in data.get("steps", ()) if isinstance(data.get("steps"), list) else ():
            for key in _files(step) if isinstance(step, dict) else ():
                step[key] = _each(lambda path: _absolute(path, file.parent), step[key])
        try:
            return cls.model_validate(data)
        except PlanError as error:
            raise PlanError(error.what, where=str(path), hint=error.hint) from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `.toml` or `.json` file in one step: a killed save leaves the old file, or none.

        A plan in memory names its `weights` relative to the working directory, as any Python call does. In
        the file they become relative to the file's folder if they were relative or lie inside that folder, so
        that the folder can be moved as a whole; other absolute paths stay. `Plan.load` of the result is equal
        to this plan up to relative `weights`, which come back absolute.

        Raises:
            PlanError: a step holds a module that was made already, which no file can name, or the file cannot be
                written.
        """
        file = Path(path)
        for i, step in enumerate(self.steps):
            module = getattr(step, "module", "")
            if not isinstance(module, str):
                raise PlanError(
                    f"steps[{i}].module: a plan file cannot hold the {type(module).__name__} that was made already",
                    where=step.name, hint="name it as 'package.module:Name' with arguments",
                )  # fmt: skip
        data = self.to_dict()
        for step in data["steps"]:
            for key in _files(step):
                step[key] = _each(lambda path: _portable(path, file.parent), step[key])
        _write(file, data)

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """The JSON schema (draft 2020-12) of plan files, for editors and validators."""
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **cls.model_json_schema()}


def _files(step: Mapping[str, Any]) -> list[str]:
    """Keys of a step that name files; the mask of a Splice is a module or an input."""
    keys = ("weights", "mask") if step.get("kind") == "prune" else ("weights",)
    return [key for key in keys if key in step]


def _key(step: Step) -> str:
    """The key that says how many alternatives there are to choose from."""
    return "adapters" if isinstance(step, LoRA) else "modes" if isinstance(step, Gate) else "tasks"


def _choices(step: Step) -> str:
    if isinstance(step, LoRA):
        return f"{step.adapters} adapters and none"
    return f"{(step.selection or ('', 0))[1]} {_key(step)}"


def _repeats(path: str, values: Sequence[str | None]) -> Iterator[Problem]:
    """Values that were there before; None is no value."""
    for i, value in enumerate(values):
        if value is not None and value in values[:i]:
            yield path.format(i), f"repeats {value!r}"


def _misnested(names: Sequence[str]) -> Iterator[Problem]:
    """Names that no arguments can have: a tensor that is also a container, a list with holes."""
    children: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for depth in range(1, len(parts)):
            children.setdefault(".".join(parts[:depth]), set()).add(parts[depth])
    for parent, keys in children.items():
        if parent in names:
            text = f"{parent!r} is both a tensor and a container of {', '.join(sorted(keys))}"
            yield f"inputs[{names.index(parent)}].name", text
        if any(key.isdigit() for key in keys) and keys != {str(n) for n in range(len(keys))}:
            first = next(i for i, name in enumerate(names) if name.startswith(parent + "."))
            text = f"items of the list {parent!r} must be 0 to {len(keys) - 1}, got {', '.join(sorted(keys))}"
            yield f"inputs[{first}].name", text


def _each(change: Callable[[Any], Any], weights: Any) -> Any:
    """`change` of a path, or of every path in a list."""
    return [change(path) for path in weights] if isinstance(weights, list) else change(weights)


def _absolute(weights: Any, folder: Path) -> Any:
    """What is no path stays, for the check that says so."""
    return os.path.abspath(folder / weights) if isinstance(weights, str) and weights.strip() else weights


def _portable(weights: str, folder: Path) -> str:
    """Spell a path for a plan file in `folder`."""
    absolute = os.path.abspath(weights)
    try:
        relative = Path(os.path.relpath(absolute, os.path.abspath(folder)))
    except ValueError:  # another drive of a Windows machine
        return absolute
    return weights if os.path.isabs(weights) and ".." in relative.parts else relative.as_posix()


def _read(file: Path) -> dict[str, Any]:
    """Parse a plan file into plain data; PlanError with file and line if that fails."""
    _check_suffix(file)
    line = None
    try:
        text = file.read_bytes().decode("utf-8-sig")  # editors on Windows like to put a byte order mark
        data = tomllib.loads(text) if file.suffix == ".toml" else json.loads(text, **_JSON)
    except FileNotFoundError:
        raise PlanError("no such plan file", where=str(file)) from None
    except OSError as error:
        raise PlanError(f"cannot read the plan file: {error.strerror}", where=str(file)) from None
    except UnicodeDecodeError as error:
        raise PlanError(f"a plan file is UTF-8 text, but byte {error.start} is not", where=str(file)) from None
    except RecursionError:
        raise PlanError("the plan file is nested too deeply", where=str(file)) from None
    except json.JSONDecodeError as error:
        what, line = error.msg, f"line {error.lineno}, column {error.colno}"
        raise PlanError(f"not valid JSON: {what}", where=str(file), line=line) from None
    except ValueError as error:  # tomllib ends its message with "(at line 3, column 5)"
        what, line = str(error), None
        if spot := re.search(r" \(at (line \d+, column \d+|end of document)\)$", what):
            what, line = what[: spot.start()], spot[1]
            if line == "end of document":
                line = f"line {len(text.splitlines())}, at the end"
        raise PlanError(f"not valid {file.suffix[1:].upper()}: {what}", where=str(file), line=line) from None
    if not isinstance(data, dict):
        raise PlanError(f"a plan is a table of keys and values, not a {type(data).__name__}", where=str(file))
    return data


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON lets a later key overrule an earlier one silently; a plan does not."""
    keys = [key for key, _ in pairs]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"key {twice[0]!r} is there twice")
    return dict(pairs)


_JSON: dict[str, Any] = {"object_pairs_hook": _no_duplicates}


def _write(file: Path, data: dict[str, Any]) -> None:
    """Write plain data next to `file`, then move it into place."""
    _check_suffix(file)
    text = tomli_w.dumps(data) if file.suffix == ".toml" else json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    write_file(file, text.encode(), "plan file")


def write_file(file: Path, data: bytes, what: str) -> None:
    """Write `data` next to `file`, then move it into place: a killed write leaves the old file, or none.

    Raises:
        PlanError: the folder is missing or cannot be written to; calls the file `what`.
    """
    partial = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    except OSError as error:
        raise PlanError(f"cannot write the {what}: {error.strerror}", where=str(file)) from None
    finally:
        partial.unlink(missing_ok=True)


def _check_suffix(file: Path) -> None:
    if file.suffix not in Plan.suffixes:
        raise PlanError(f"a plan file ends in {' or '.join(Plan.suffixes)}, got {file.name!r}", where=str(file))
