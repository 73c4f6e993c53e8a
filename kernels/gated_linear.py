"""``fxfreeze::gated_linear``: a linear layer, its activation and a hard gate per neuron, in one.

It may have a normalization before it, and an up projection beside it.

With x̂ = x, or x normalized, of one row:

    h = act(x̂·Wᵀ + b);  y = g ⊙ h ⊙ 1[s(h) > τ];  with U: y ← y ⊙ (x̂·Uᵀ + c)

Source: the gate is that of ``gate.py``; act(x̂·Wᵀ) ⊙ (x̂·Uᵀ) is a GLU variant (arXiv 2002.05202), as in Llama's MLP; the
normalizations are LayerNorm (arXiv 1607.06450) and RMSNorm (arXiv 1910.07467), whose affine parts belong into W and b.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, relu, silu

from . import _op
from ._op import Kernel, register

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda h: h,
    "relu": relu,
    "gelu": gelu,
    "gelu_tanh": lambda h: gelu(h, approximate="tanh"),
    "silu": silu,
}
NORMS = ("none", "layer", "rms")
SCORES = ("h", "abs")

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias=None, Tensor? threshold=None, Tensor? gain=None, "
    "Tensor? up_weight=None, Tensor? up_bias=None, *, str activation='none', str score='h', str norm='none', "
    "float eps=1e-05) -> Tensor"
)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    threshold: Tensor | None = None,
    gain: Tensor | None = None,
    up_weight: Tensor | None = None,
    up_bias: Tensor | None = None,
    *,
    activation: str = "none",
    score: str = "h",
    norm: str = "none",
    eps: float = 1e-5,
) -> Tensor:
    """Normalize, multiply by a weight, activate, gate, and multiply by what another weight gives.

    Args:
        x: [..., in], floating.
        weight: W [out, in], dtype of `x`, as are `bias`, `up_weight` and `up_bias`.
        bias: b [out]; None: 0.
        threshold: τ [out], float32, or float64 beside a float64 `x`. A neuron fires strictly above it; None: always.
        gain: g [out], dtype as for `threshold`; None: 1.
        up_weight: U [out, in]; None: there is no up projection.
        up_bias: c [out], only with `up_weight`; None: 0.
        activation: "none", "relu", "gelu", "gelu_tanh" (its approximation with tanh) or "silu".
        score: s(h): "h", or "abs" for \\|h\\|.
        norm: x̂: "none" for x, "layer" for (x − μ)/√(σ² + eps), "rms" for x/√(mean x² + eps); over the last dim.
        eps: of the normalization, ≥ 0.

    Returns:
        [..., out], dtype of `x`. Half precision is computed in float32, and rounded once. Where the gate is shut the
        result is 0, whatever h is there (times the up projection, so NaN where that is not finite).

    Raises:
        ValueError: an unknown name, or shapes or dtypes other than the above.
    """
    _check(x, weight, bias, threshold, gain, up_weight, up_bias, activation=activation, score=score, norm=norm, eps=eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    source = _normalized(x.to(wide), norm, eps)
    h = ACTIVATIONS[activation](_project(source, weight, bias))
    if threshold is not None:
        # By its name: kernel files do not import each other.
        h = _op.OPS["gate"].reference(h, threshold, gain, score=score)
    elif gain is not None:
        h = h * gain
    if up_weight is not None:
        h = h * _project(source, up_weight, up_bias)
    return h.to(x.dtype)


def _normalized(x: Tensor, norm: str, eps: float) -> Tensor:
    if norm == "layer":
        return layer_norm(x, (x.shape[-1],), eps=eps)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) if norm == "rms" else x


def _project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    threshold: Tensor | None = None,
    gain: Tensor | None = None,
    up_weight: Tensor | None = None,
    up_bias: Tensor | None = None,
    *,
    activation: str = "none",
    score: str = "h",
    norm: str = "none",
    eps: float = 1e-5,
) -> Tensor:
    _check(x, weight, bias, threshold, gain, up_weight, up_bias, activation=activation, score=score, norm=norm, eps=eps)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor | None,
    gain: Tensor | None,
    up_weight: Tensor | None,
    up_bias: Tensor | None,
    *,
    activation: str,
    score: str,
    norm: str,
    eps: float,
) -> None:
    for what, name, names in (("activation", activation, ACTIVATIONS), ("score", score, SCORES), ("norm", norm, NORMS)):
        if name not in names:
            raise ValueError(f"gated_linear: {what} {name!r} is none of {', '.join(map(repr, names))}")
    if not x.is_floating_point() or x.dim() == 0:
        raise ValueError(f"gated_linear: x is {x.dtype} of shape {list(x.shape)}, not floating [..., in]")
    if weight.dim() != 2:
        raise ValueError(f"gated_linear: weight is of shape {list(weight.shape)}, not [out, in = {x.shape[-1]}]")
    if up_bias is not None and up_weight is None:
        raise ValueError("gated_linear: up_bias without up_weight")
    if not eps >= 0:
        raise ValueError(f"gated_linear: eps {eps} is not 0 or more")
    out, wide = weight.shape[0], torch.promote_types(x.dtype, torch.float32)
    vector, matrix = (out,), (out, x.shape[-1])
    for what, value, shape, dtype in (
        ("weight", weight, matrix, x.dtype), ("bias", bias, vector, x.dtype),
        ("threshold", threshold, vector, wide), ("gain", gain, vector, wide),
        ("up_weight", up_weight, matrix, x.dtype), ("up_bias", up_bias, vector, x.dtype),
    ):  # fmt: skip
        if value is not None and (tuple(value.shape) != shape or value.dtype != dtype):
            raise ValueError(
                f"gated_linear: {what} is {value.dtype} of shape {list(value.shape)}, not {dtype} of {list(shape)}"
            )


# ---- GPU


def supports(x: Tensor, weight: Tensor, *others: Tensor | None, **how: object) -> bool:
    """One device, at least one feature, and no float64."""
    tensors = [value for value in (x, weight, *others, *how.values()) if isinstance(value, Tensor)]
    one_device = len({value.device for value in tensors}) == 1
    return one_device and x.dtype in (torch.float32, torch.float16, torch.bfloat16) and 0 not in weight.shape


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    threshold: Tensor | None = None,
    gain: Tensor | None = None,
    up_weight: Tensor | None = None,
    up_bias: Tensor | None = None,
    *,
    activation: str = "none",
    score: str = "h",
    norm: str = "none",
    eps: float = 1e-5,
) -> Tensor:
    """As :func:`reference`; float32 is multiplied in TF32 where torch may do so and there is no gate, which it could
    turn."""
    from ._gated_linear_triton import gated_linear

    _check(x, weight, bias, threshold, gain, up_weight, up_bias, activation=activation, score=score, norm=norm, eps=eps)
    vectors = (None if value is None else value.contiguous() for value in (bias, threshold, gain, up_bias))
    tf32 = threshold is None and torch.backends.cuda.matmul.fp32_precision == "tf32"
    y = gated_linear(
        x.reshape(-1, x.shape[-1]), weight, up_weight, *vectors, activation=activation, score=score, norm=norm, eps=eps,
        precision="tf32" if tf32 else "ieee",
    )  # fmt: skip
    return y.reshape(*x.shape[:-1], weight.shape[0])


KERNEL = register(Kernel("gated_linear", SCHEMA, reference, fake, supports, launch))
