"""Tversky layers that train: similarity by shared and distinctive features in place of a dot product.

Source: Doumbouya, Jurafsky and Manning, "Tversky Neural Networks", arXiv 2506.11035, and the package `tversky` on PyPI.
Every forward pass is one call of ``fxfreeze::tversky``: training differentiates its plain-torch form, and torch.export
sees one operator.
"""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..kernels._tversky import combination
from ..kernels.tversky import KERNEL

INITS = ("orthogonal", "normal", "uniform")

_tversky = KERNEL.op


class _Tversky(nn.Module):
    """The bank, θ, α and β: what both layers have. See :class:`TverskyProjection` for the arguments."""

    features: nn.Parameter

    def __init__(
        self,
        in_features: int,
        features: int | Tensor | nn.Embedding | _Tversky,
        *,
        model: str = "contrast",
        intersection: str = "product",
        difference: str = "ignorematch",
        semantics: str = "aggregate",
        threshold: float = 0.0,
        normalize: bool = False,
        init: str = "orthogonal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if init not in INITS:
            raise ValueError(f"{type(self).__name__}: init {init!r} is not one of {', '.join(INITS)}")
        how = combination(model, intersection, difference, semantics, threshold)
        self.in_features = _count(type(self).__name__, "in_features", in_features)
        self.model, self.intersection, self.difference = how.model, how.intersection, how.difference
        self.semantics, self.threshold, self.normalize = how.semantics, float(threshold), bool(normalize)
        self.init = init
        self._given: set[str] = set()
        self._add_weight("features", features, device, dtype)
        # Ratio has no use for θ; a parameter that waits for a gradient in vain stops DistributedDataParallel.
        self.theta = nn.Parameter(self.features.new_empty(()), requires_grad=model != "ratio")
        self.alpha = nn.Parameter(self.features.new_empty(()))
        self.beta = nn.Parameter(self.features.new_empty(()))

    def _add_weight(self, name: str, value: Any, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Make `value` the parameter `name` [rows, in_features]: tied, copied, or empty; only the last is reset."""
        layer, width = type(self).__name__, self.in_features
        if isinstance(value, (nn.Embedding, _Tversky)):
            value = value.weight if isinstance(value, nn.Embedding) else getattr(value, name, value)
        if not isinstance(value, Tensor):
            rows = _count(layer, name, value)
            setattr(self, name, nn.Parameter(torch.empty(rows, width, device=device, dtype=dtype)))
            return
        if value.dim() != 2 or value.shape[1] != width or value.shape[0] < 1 or not value.is_floating_point():
            shape = f"{value.dtype} of shape {list(value.shape)}"
            raise ValueError(f"{layer}: {name} is {shape}, not floating of [1 or more, in_features = {width}]")
        if not isinstance(value, nn.Parameter):
            value = nn.Parameter(value.detach().to(device=device, dtype=dtype, copy=True))
        elif dtype not in (None, value.dtype) or not _same_device(device, value.device):
            asked = " ".join(str(option) for option in (dtype, device) if option is not None)
            raise ValueError(
                f"{layer}: {name} is a parameter of another module, {value.dtype} on {value.device}, and cannot be "
                f"tied as {asked}; leave out dtype and device, or move the model once it is built"
            )
        self._given.add(name)
        setattr(self, name, value)

    @property
    def num_features(self) -> int:
        return self.features.shape[0]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights anew, as `init` says. What was given to the constructor as a tensor, or is tied, stays."""
        if "features" not in self._given:
            # Measures of about 1: for x of unit root mean square, or for one of unit length where `normalize` makes it.
            _draw(self.features, self.init, math.sqrt(self.in_features) if self.normalize else 1.0)
        scale = 1.0
        if self.model == "contrast" and self.init != "uniform":
            # Spread of the sums over K features: like √K while they are independent, like K/√d once K exceeds d.
            scale = (self.num_features * (1 + self.num_features / self.in_features)) ** -0.5
        for parameter, value in ((self.theta, scale), (self.alpha, scale / 2), (self.beta, scale / 2)):
            parameter.fill_(value)

    def _similarity(self, x: Tensor, prototypes: Tensor) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"{type(self).__name__}: x has shape {list(x.shape)}, not [..., {self.in_features}]")
        kind = x.device.type
        if not (_has_autocast(kind) and torch.is_autocast_enabled(kind)):
            return self._call(x, prototypes)
        # Presence is a comparison: in half precision, features near the threshold would come and go.
        with torch.autocast(kind, enabled=False):
            dtype = self.features.dtype
            return self._call(x.to(dtype), prototypes.to(dtype))

    def _call(self, x: Tensor, prototypes: Tensor) -> Tensor:
        return _tversky(
            x,
            self.features,
            prototypes,
            self.theta,
            self.alpha,
            self.beta,
            model=self.model,
            intersection=self.intersection,
            difference=self.difference,
            semantics=self.semantics,
            threshold=self.threshold,
            normalize=self.normalize,
        )

    def extra_repr(self) -> str:
        how = f"{self.model}, {self.intersection}, {self.difference}, {self.semantics}"
        threshold = f", threshold={self.threshold}" if self.threshold else ""
        return f"features={self.num_features}, {how}{threshold}{', normalize=True' if self.normalize else ''}"

    @classmethod
    def from_package(cls, module: nn.Module, *, share: bool = False) -> Self:
        """The layer of the package `tversky` (0.2.1) as a layer of ours: same weights, same outputs.

        Args:
            module: an instance of the package's class of the same name.
            share: use the package layer's own parameters, so that what is tied to them stays tied; else copies.

        Raises:
            TypeError: `module` is something else, or of a subclass, which may compute something else.
            ValueError: a similarity model or reduction that is unknown here, or shapes that do not fit.
        """
        kind = type(module)
        if kind.__name__ != cls.__name__ or kind.__module__ != "tversky.nn":
            found = f"{kind.__module__}.{kind.__qualname__}"
            raise TypeError(f"{cls.__name__}.from_package takes a tversky.nn.{cls.__name__}, not a {found}")
        source: Any = module
        weights = {name: _of_package(getattr(source, name), share) for name in ("theta", "alpha", "beta")}
        banks: dict[str, Any] = {"features": _of_package(source.feature_bank.weight, share)}
        if hasattr(source, "prototypes"):
            banks["prototypes"] = _of_package(source.prototypes.weight, share)
        layer = cls(
            in_features=banks["features"].shape[1],
            **banks,
            model=source.similarity_model,
            intersection=source.intersection_reduction,
            difference=source.difference_reduction,
            semantics="aggregate",
            threshold=float(source.threshold),
            normalize=bool(source.normalize),
            init="uniform",
        )
        for name, weight in weights.items():
            setattr(layer, name, weight)
        if not share:
            layer._given.clear()
        return layer.train(module.training)


class TverskySimilarity(_Tversky):
    """How similar the objects `x` are to the objects `y`, by the features of a learnt bank that they share.

    Source: arXiv 2506.11035; with the defaults of `semantics`, the package's ``tversky.nn.TverskySimilarity``. The
    measure is not symmetric where α ≠ β.

    Args, all but `prototypes` and `bias`, and errors as for :class:`TverskyProjection`.
    """

    def __init__(self, in_features: int, features: int | Tensor | nn.Embedding | _Tversky, **options: Any) -> None:
        super().__init__(in_features, features, **options)
        self.reset_parameters()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Similarity of every row of `x` [..., d] to every row of `y` [M, d]: [..., M], dtype of `x`.

        Raises:
            ValueError: other shapes, or dtypes that differ from the bank's.
        """
        if y.dim() != 2 or y.shape[1] != self.in_features:
            raise ValueError(f"TverskySimilarity: y has shape {list(y.shape)}, not [M, {self.in_features}]")
        return self._similarity(x, y)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {super().extra_repr()}"


class TverskyProjection(_Tversky):
    """Similarity of the input to each of P learnt prototypes: takes the place of an ``nn.Linear(d, P)``.

    A feature ω of the bank is present in a vector v where v·ω exceeds the threshold. Contrast: θ·f(A∩B) − α·f(A−B) −
    β·f(B−A), with A the features of x and B those of a prototype. Ratio: f(A∩B) / (f(A∩B) + α·f(A−B) + β·f(B−A) + 1).
    Source: arXiv 2506.11035, equations 2 to 6, and the package's ``tversky.nn.TverskyProjection``.

    Learnt are `features` Ω [K, d], `prototypes` Π [P, d], and 0-d `theta`, `alpha` and `beta`. Nothing holds α and β
    above 0; in the ratio model negative ones may reach a zero of the denominator. Ratio scores lie below 1, so as
    logits they need a factor: on digits a head learns as well as a contrast one with 10, and badly with 1.

    Initialisations (`init`). At the start a bank should tell inputs apart: a feature that everything has is useless.
      "orthogonal" (default): orthogonal features and normal prototypes. Both are symmetric about 0, so any one vector
          has half of the features and a pair shares a quarter; no two features repeat each other, nor does the bank
          favour a direction. Measures are near 1 for inputs of unit root mean square (or any, with `normalize`).
          Contrast starts at θ = 1/√(K + K²/d) and α = β = θ/2, at which an input's scores (product, ignorematch)
          spread by about ½ over the prototypes whatever K and d are, as those of a fresh nn.Linear do.
      "normal": the same with independent normal features, for banks too large for a QR decomposition. On digits the
          two reach the same accuracy.
      "uniform": the package's: everything uniform in (0, 1), θ = 1, α = β = ½. Every prototype has every feature, and
          for inputs ≥ 0 so has every input: differences start empty, and scores grow with K·d².
    Inputs that are not centred share their mean's features: put a norm in front, or give `features` or `prototypes`.

    Ties: what is given as an ``nn.Parameter``, an ``nn.Embedding`` or another layer is the same Parameter afterwards,
    as where torch code says ``head.weight = embedding.weight``: it appears once in ``parameters()``, under both names
    in ``state_dict()``, and stays tied in ``copy.deepcopy`` and ``.to()`` of a model that holds both.

    Args:
        in_features: d.
        prototypes: P; or start values [P, d], copied; or what to tie them to: a Parameter [P, d], an Embedding
            (one prototype per token), a TverskyProjection. ``class_means`` makes start values from data.
        features: K; or, in the same ways, start values or what to tie the bank to; any layer of this file has a bank.
        model: "contrast" or "ratio". Ratio does not use θ, which then asks for no gradient.
        intersection: "product", "min", "max", "mean", "gmean" or "softmin".
        difference: "ignorematch" or "subtractmatch" (also the package's spelling "substractmatch").
        semantics: "aggregate", as the package; "per_feature", as the paper; "inclusive"; see ``kernels/tversky.py``.
        threshold: a feature is present strictly above it.
        normalize: scale x and the prototypes to length 1 first.
        bias: add a learnt [P], from 0; neither the paper nor the package has one. For :meth:`from_linear`.
        init: see above.
        device, dtype: of new parameters; default: torch's, and for prototypes and the rest those of the bank.

    Raises:
        ValueError: an unknown name, counts below 1, given weights of another shape, or tied ones of another dtype or
            device than asked for.
        TypeError: `prototypes` or `features` is none of the above.
    """

    prototypes: nn.Parameter

    def __init__(
        self,
        in_features: int,
        prototypes: int | Tensor | nn.Embedding | TverskyProjection,
        features: int | Tensor | nn.Embedding | _Tversky,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        if isinstance(features, int) and device is None and dtype is None:
            # Whoever ties the prototypes wants the new bank to go with them.
            device, dtype = _place(prototypes)
        super().__init__(in_features, features, device=device, dtype=dtype, **options)
        new = not isinstance(prototypes, (nn.Parameter, nn.Embedding, _Tversky))
        bank = self.features
        self._add_weight("prototypes", prototypes, bank.device if new else device, bank.dtype if new else dtype)
        if self.prototypes.dtype != bank.dtype:
            raise ValueError(
                f"{type(self).__name__}: prototypes are {self.prototypes.dtype} and features {bank.dtype}; "
                "give both in one dtype"
            )
        self.bias = (
            nn.Parameter(torch.zeros(self.num_prototypes, device=bank.device, dtype=bank.dtype)) if bias else None
        )
        self.reset_parameters()

    @property
    def num_prototypes(self) -> int:
        return self.prototypes.shape[0]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "prototypes" not in self._given:
            _draw(self.prototypes, "uniform" if self.init == "uniform" else "normal", math.sqrt(self.in_features))
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Scores [..., P] of `x` [..., d], dtype of `x`, which is the weights' (any under autocast).

        Raises:
            ValueError: another last dimension or dtype.
        """
        scores = self._similarity(x, self.prototypes)
        return scores if self.bias is None else scores + self.bias

    def extra_repr(self) -> str:
        bias = "" if self.bias is None else ", bias=True"
        return f"{self.in_features}, prototypes={self.num_prototypes}, {super().extra_repr()}{bias}"

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        features: int | None = None,
        *,
        inputs: Tensor | None = None,
        nonnegative: bool = False,
    ) -> Self:
        """A contrast layer (product, ignorematch) that starts out ranking its prototypes as `linear` ranks its outputs.

        Exact, up to rounding, for inputs ≥ 0 (`nonnegative`), such as those after a ReLU. Adding one vector to all
        weights w_j adds the same to all scores, so they can be made positive. Then with the bank I, Π = W + s > 0 and
        α = β = 0 the score is x·(w_j + s): ranks, differences of scores and softmax are the linear layer's.

        Approximate for others. With a bank of pairs ±v, v·x and v·w either agree in sign, and |v·x||v·w| is in f(A∩B),
        or they do not, and |v·x| is in f(A−B) and |v·w| in f(B−A). Over directions v with Σ vvᵀ = I,
        x·w = Σ_agree |v·x||v·w| − Σ_disagree |v·x||v·w|: the first sum is θ·f(A∩B) with θ = 1, and of the second,
        α·f(A−B) + β·f(B−A) is the best affine estimate. θ, α and β are the least-squares fit, none below 0, of the
        score's differences between prototypes. Prototypes are the w_j less their mean (ranks do not see it), and the
        v's lie in the space that these span, of r < P dimensions: up to r pairs are its singular vectors, and more
        are a random tight frame. More features help, but the error does not fall to 0: a product is not affine.

        The linear layer's bias becomes this layer's, exactly. The result is independent of `linear` and of torch's
        global random state, and has the dtype and device of `linear.weight`.

        Args:
            linear: a trained nn.Linear(d, P), P ≥ 2.
            features: K, an even number; default 2·d. With `nonnegative` it is d and need not be given.
            inputs: [..., d], a sample of what the layer will see, for the fit; default: standard normal rows.
            nonnegative: inputs will be ≥ 0.

        Raises:
            TypeError: `linear` is not an nn.Linear.
            ValueError: rows of the weight that are all equal (P = 1 among them), another `features` or `inputs` than
                the above, or negative `inputs` with `nonnegative`.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{cls.__name__}.from_linear takes an nn.Linear, not a {type(linear).__name__}")
        weight = linear.weight.detach().to("cpu", torch.float64)
        if inputs is not None:
            inputs = _sample(inputs, weight.shape[1], nonnegative)
        if not (weight != weight[0]).any():
            raise ValueError("from_linear: all rows of the weight are equal, so there are no ranks to keep")
        weights = (1.0, 0.0, 0.0)
        if nonnegative:
            if features not in (None, weight.shape[1]):
                raise ValueError(
                    f"from_linear: nonnegative makes {weight.shape[1]} features, not {features}; leave it out"
                )
            # A margin, so that the first training steps do not take features away from prototypes.
            bank, prototypes = torch.eye(weight.shape[1]), weight - weight.amin(0) + 0.1 * weight.std()
        else:
            prototypes = weight - weight.mean(0)
            bank = _paired_bank(prototypes, 2 * weight.shape[1] if features is None else features)
            weights = _fit(inputs, bank, prototypes)
        layer = cls(weight.shape[1], prototypes.to(linear.weight), bank.to(linear.weight), bias=linear.bias is not None)
        with torch.no_grad():
            for parameter, value in zip((layer.theta, layer.alpha, layer.beta), weights, strict=True):
                parameter.fill_(value)
            if layer.bias is not None:
                layer.bias.copy_(linear.bias)
        layer._given.clear()
        return layer


def class_means(x: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean of the rows of each class: start values for prototypes, one per class.

    Args:
        x: [N, d], floating.
        labels: [N], integers below `classes`.
        classes: C.

    Returns:
        [C, d], dtype of `x`.

    Raises:
        ValueError: other shapes, a label out of range, or a class without rows.
    """
    if x.dim() != 2 or labels.shape != x.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"class_means: x {list(x.shape)} and labels {labels.dtype} {list(labels.shape)}, not [N, d], [N]"
        )
    if not ((labels >= 0) & (labels < classes)).all():
        raise ValueError(f"class_means: labels from {labels.min()} to {labels.max()}, not from 0 to {classes - 1}")
    counts = torch.bincount(labels, minlength=classes)
    if (counts == 0).any():
        raise ValueError(f"class_means: no row of class {(counts == 0).nonzero().flatten().tolist()}")
    sums = torch.zeros(classes, x.shape[1], dtype=x.dtype, device=x.device).index_add(0, labels, x)
    return sums / counts.unsqueeze(1)


def _count(layer: str, name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        extra = "" if name == "in_features" else ", a tensor, a Parameter, an Embedding, or a layer that has them"
        raise TypeError(f"{layer}: {name} is a {type(value).__name__}, not a count{extra}")
    if value < 1:
        raise ValueError(f"{layer}: {name} is {value}, not 1 or more")
    return value


def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


# For strict export with torch 2.11, which cannot trace what this asks: torch.compiler.assume_constant_result sets this,
# too, but imports dynamo, and triton with it.
_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _same_device(asked: torch.device | str | None, found: torch.device) -> bool:
    if asked is None:
        return True
    asked = torch.device(asked)
    return asked.type == found.type and asked.index in (None, found.index)


def _place(value: Any) -> tuple[torch.device | None, torch.dtype | None]:
    if isinstance(value, TverskyProjection):
        value = value.prototypes
    elif isinstance(value, nn.Embedding):
        value = value.weight
    return (value.device, value.dtype) if isinstance(value, Tensor) and value.is_floating_point() else (None, None)


def _draw(weight: Tensor, init: str, length: float) -> None:
    """Fill `weight` [rows, d] in place: uniform in (0, 1), or rows of about the given length."""
    if init == "uniform":
        nn.init.uniform_(weight)
    elif init == "normal":
        nn.init.normal_(weight, std=length / math.sqrt(weight.shape[1]))
    else:
        # QR does not know half precision, and for more rows than columns it makes the columns orthonormal.
        drawn = torch.empty_like(weight, dtype=torch.float32)
        nn.init.orthogonal_(drawn, gain=length * math.sqrt(max(1.0, weight.shape[0] / weight.shape[1])))
        weight.copy_(drawn)


def _of_package(value: Tensor, share: bool) -> nn.Parameter:
    if share and isinstance(value, nn.Parameter):
        return value
    return nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)


# ---- from_linear

_ROWS = 1024
"""So many inputs, and at most so many prototypes, are enough to fit three numbers."""


def _sample(inputs: Tensor, width: int, nonnegative: bool) -> Tensor:
    if inputs.dim() == 0 or inputs.shape[-1] != width or inputs.numel() == 0:
        raise ValueError(f"from_linear: inputs have shape {list(inputs.shape)}, not [..., {width}] with a row or more")
    if nonnegative and (inputs < 0).any():
        raise ValueError("from_linear: nonnegative, but inputs has values below 0; leave out one of the two")
    return inputs.detach().to("cpu", torch.float64).reshape(-1, width)


def _paired_bank(prototypes: Tensor, features: int) -> Tensor:
    """[V; −V] [features, d]: singular vectors of `prototypes`, or more directions than their rank in that space."""
    if isinstance(features, bool) or not isinstance(features, int) or features < 2 or features % 2:
        raise ValueError(f"from_linear: features is {features}, not an even number of 2 or more")
    _, strengths, basis = torch.linalg.svd(prototypes, full_matrices=False)
    rank, pairs = int((strengths > 1e-6 * strengths[0]).sum()), features // 2
    directions = basis[: min(rank, pairs)]
    if pairs > rank:
        frame = torch.empty(pairs, rank, dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        nn.init.orthogonal_(frame, gain=math.sqrt(pairs / rank), generator=generator)
        directions = frame @ directions
    return torch.cat([directions, -directions])


def _fit(inputs: Tensor | None, bank: Tensor, prototypes: Tensor) -> tuple[float, float, float]:
    """θ, α, β ≥ 0 with which contrast scores come nearest to x·π, both less their mean over the prototypes."""
    if inputs is None:
        shape = (_ROWS, prototypes.shape[1])
        inputs = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs, prototypes = (v[:: -(-len(v) // _ROWS)] for v in (inputs, prototypes))

    def centred(scores: Tensor) -> Tensor:
        return (scores - scores.mean(1, keepdim=True)).flatten()

    kind = {"model": "contrast", "intersection": "product", "difference": "ignorematch", "semantics": "aggregate"}
    columns = [centred(KERNEL.reference(inputs, bank, prototypes, *unit, **kind)) for unit in torch.eye(3).double()]
    # The triangle has the same least squares as the long columns. The best fit with no weight below 0 is the best plain
    # fit of those weights that it leaves above 0.
    triangle = torch.linalg.qr(torch.stack([*columns, centred(inputs @ prototypes.T)], 1), mode="r").R
    system, wanted = triangle[:, :3], triangle[:, 3]
    least, best = wanted.norm(), torch.zeros(3, dtype=torch.float64)
    for kept in ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]):
        fitted = torch.zeros(3, dtype=torch.float64)
        fitted[kept] = torch.linalg.lstsq(system[:, kept], wanted.unsqueeze(1), driver="gelsd").solution[:, 0]
        error = (system @ fitted - wanted).norm()
        if (fitted >= 0).all() and error < least:
            least, best = error, fitted
    theta, alpha, beta = best.tolist()
    return theta, alpha, beta
