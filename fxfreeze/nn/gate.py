"""Gains and thresholds per neuron, to put into a model or to train in an adapted one.

>>> net = fxfreeze.adapt(model, Plan(inputs, [Gate(at="mlp.act")]))
>>> schedule = TemperatureSchedule(net, start=0.3, end=0.02, steps=1000)
>>> for x, y in batches:
...     with firing() as shares:
...         loss = cross_entropy(net(x), y)
...     (loss + 0.01 * shares.mean()).backward()
...     optimizer.step(); schedule.step()
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..kernels.gate import KERNEL, SCORES, compared, fires


class Gate(nn.Module):
    r"""y = g ⊙ h ⊙ σ((s(h) − τ) / T), which compiling hardens to g ⊙ h ⊙ 1[s(h) > τ]; see :class:`fxfreeze.Gate`.

    Args:
        neurons: C, the size of `h` along `dim`.
        s: "h", or "abs" for \|h\|.
        temperature: T > 0, in the unit of `h`; a buffer, see :class:`TemperatureSchedule`.
        threshold: where τ starts; default: −4 · temperature, all but open for h ≥ 0.
        modes: with it, :meth:`forward` takes for every row which of so many gains and thresholds it uses.
        dim: where the neurons are.

    Parameters, float32 unless `dtype` says otherwise: ``gain`` and ``threshold`` [C], or [modes, C].

    Raises:
        ValueError: `neurons`, `modes` or `temperature` is not positive, or `s` is unknown.
    """

    temperature: Tensor

    def __init__(
        self, neurons: int, *, s: str = "h", temperature: float = 0.1, threshold: float | None = None,
        modes: int | None = None, dim: int = -1, device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if s not in SCORES:
            raise ValueError(f"s must be one of {', '.join(map(repr, SCORES))}, got {s!r}")
        for name, value in (("neurons", neurons), ("temperature", temperature), ("modes", modes)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value!r}")
        shape = (neurons,) if modes is None else (modes, neurons)
        self.s, self.dim, self.modes = s, dim, modes
        start = -4 * temperature if threshold is None else threshold
        self.gain = nn.Parameter(torch.ones(shape, device=device, dtype=dtype))
        self.threshold = nn.Parameter(torch.full(shape, float(start), device=device, dtype=dtype))
        self.register_buffer("temperature", torch.tensor(float(temperature), device=device, dtype=dtype))

    def forward(self, h: Tensor, mode: Tensor | None = None) -> Tensor:
        """`h` has C neurons along `dim`; `mode` holds an integer per row ``h[i]``. The result is as `h`."""
        return KERNEL.op(h, self.threshold, self.gain, self.temperature, mode, score=self.s, dim=self.dim)

    @property
    def _gate_temperatures(self) -> list[Tensor]:
        """Its temperature, in a list; as an adapted module has it."""
        return [self.temperature]

    def extra_repr(self) -> str:
        modes = "" if self.modes is None else f", modes={self.modes}"
        return f"{self.gain.shape[-1]}, s={self.s!r}{modes}, dim={self.dim}"


Kind = Literal["exponential", "linear", "cosine"]

_CURVES: dict[str, Callable[[float, float, float], float]] = {
    "exponential": lambda start, end, part: start * (end / start) ** part,
    "linear": lambda start, end, part: start + (end - start) * part,
    "cosine": lambda start, end, part: end + (start - end) * (1 + math.cos(math.pi * part)) / 2,
}


class TemperatureSchedule:
    """Moves the temperature of every gate in `module` from `start` to `end` in `steps` calls of :meth:`step`.

    Args:
        module: what :func:`fxfreeze.adapt` returned, or a model with :class:`Gate` layers in it.
        start: the temperature from now on, > 0.
        end: the temperature after `steps` steps, and later, > 0.
        steps: how many.
        kind: "exponential", "linear" or "cosine".

    Raises:
        ValueError: there is no gate in `module`, or a number is not positive.
    """

    def __init__(self, module: nn.Module, start: float, end: float, steps: int, kind: Kind = "exponential") -> None:
        for name, value in (("start", start), ("end", end), ("steps", steps)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value!r}")
        if kind not in _CURVES:
            raise ValueError(f"kind must be one of {', '.join(map(repr, _CURVES))}, got {kind!r}")
        self._gates: list[Any] = [part for part in module.modules() if hasattr(type(part), "_gate_temperatures")]
        if not any(part._gate_temperatures for part in self._gates):
            raise ValueError("the module has no gates")
        self.start, self.end, self.steps, self.kind, self.count = start, end, steps, kind, 0
        self._set()

    @property
    def temperature(self) -> float:
        """The temperature now."""
        return _CURVES[self.kind](self.start, self.end, min(self.count / self.steps, 1.0))

    def step(self) -> float:
        """Go on by one step; returns the temperature from now on."""
        self.count += 1
        self._set()
        return self.temperature

    def _set(self) -> None:
        # Buffers are looked up each time: moving a module to another device or dtype replaces them.
        for part in self._gates:
            for value in part._gate_temperatures:
                value.fill_(self.temperature)

    def state_dict(self) -> dict[str, int]:
        """Where the schedule is."""
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from where another schedule was."""
        self.count = state["count"]
        self._set()


@dataclass
class Firing:
    """What gates did while :func:`firing` watched: `shares` [mean of the indicator of each gate], in call order."""

    shares: list[Tensor] = field(default_factory=list)

    def mean(self) -> Tensor:
        """The mean over gates: a penalty that closes gates, differentiable in h and τ.

        Raises:
            ValueError: no gate ran.
        """
        if not self.shares:
            raise ValueError("no gate ran; torch.compile hides them: run the eager module within firing()")
        return torch.stack([share.float() for share in self.shares]).mean()


@contextmanager
def firing() -> Iterator[Firing]:
    """Within it, every gate that runs in eager torch adds its share of firing neurons.

    Of a soft gate that is the mean of σ((s(h) − τ) / T), of a hard one that of 1[s(h) > τ].
    """
    found = Firing()
    with _Watch(found):
        yield found


class _Watch(TorchFunctionMode):
    def __init__(self, found: Firing) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is KERNEL.op or func is torch.ops.fxfreeze.gate:
            self.found.shares.append(_share(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _share(
    h: Tensor, threshold: Tensor, gain: Tensor | None = None, temperature: Tensor | None = None,
    mode: Tensor | None = None, *, score: str = "h", dim: int = -1,
) -> Tensor:  # fmt: skip
    if temperature is None:
        return fires(h, threshold, mode, score=score, dim=dim).float().mean()
    scored, level = compared(h, threshold, mode, score, dim)
    return torch.sigmoid((scored - level) / temperature).mean()
