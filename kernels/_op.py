"""How an operator of ours is declared: one :class:`Kernel` per file of this folder, registered as ``fxfreeze::<name>``.

A kernel file ends with ``KERNEL = register(Kernel(...))``. Nothing else names it: :data:`OPS` finds the files itself.

What runs when the operator is called:

=================================  ===============================================================================
fake tensors, export               `fake`
ONNX and AOTInductor               `reference`, in the operator's place in the graph
CUDA and HIP                       `launch` where `supports` says so, else as on other devices
other devices                      `eager` where the file has one, else `reference`
any device, a gradient is wanted   `eager` or `reference`, so that autograd and torch.compile see plain operators
=================================  ===============================================================================
"""

from __future__ import annotations

import functools
import importlib.util
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

NAMESPACE = "fxfreeze"

OPS: dict[str, Kernel]
"""Name → kernel, of every file of this folder without a leading underscore; they are imported at the first look."""

_registered: dict[str, Kernel] = {}
# A fragment, because the namespace belongs to every kernel file, and to whoever adds an operator from outside.
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


@dataclass(frozen=True)
class Kernel:
    """One operator. All functions take the operator's own arguments.

    Attributes:
        name: the operator is ``fxfreeze::<name>``.
        schema: arguments and results, ``(Tensor x, ...) -> Tensor``. A result is new: no view of an argument.
        reference: plain torch, in float64 too, traceable with symbolic sizes: CPU path, oracle and ONNX form.
        fake: shapes and dtypes of the results; raises ValueError for arguments that `reference` refuses.
        supports: may `launch` take these arguments?
        launch: the GPU path; None: there is none.
        eager: plain torch, the same function, faster or smaller than `reference` when run operator by operator, and
            free to use operators that ONNX lacks. It must be differentiable.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    supports: Callable[..., bool] | None = None
    launch: Callable[..., Any] | None = None
    eager: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if (self.launch is None) != (self.supports is None):
            raise ValueError(f"kernel {self.name!r}: supports and launch come together")

    @property
    def plain(self) -> Callable[..., Any]:
        """What runs where no launcher does."""
        return self.eager or self.reference

    @property
    def op(self) -> torch._ops.OpOverload:
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default


def register(kernel: Kernel) -> Kernel:
    """Define ``fxfreeze::<kernel.name>`` and return `kernel`.

    Raises:
        ValueError: the name is taken.
    """
    name = kernel.name
    if name in _registered:
        raise ValueError(f"kernel {name!r} is registered twice")
    _library.define(name + kernel.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel.plain, "CompositeExplicitAutograd")
    _library.impl(name, _autograd(kernel), "Autograd")
    if kernel.launch is not None:
        _library.impl(name, _gpu(kernel), "CUDA")  # the key of HIP, too
    torch.library.register_fake(f"{NAMESPACE}::{name}", kernel.fake, lib=_library)
    _registered[name] = kernel
    return kernel


def _autograd(kernel: Kernel) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args):
            return kernel.plain(*args, **kwargs)
        with torch._C._AutoDispatchBelowAutograd():
            return kernel.op(*args, **kwargs)

    return run


def _gpu(kernel: Kernel) -> Callable[..., Any]:
    supports, launch = kernel.supports, kernel.launch
    assert supports is not None and launch is not None

    def run(*args: Any, **kwargs: Any) -> Any:
        if not has_triton() or not supports(*args, **kwargs):
            return kernel.plain(*args, **kwargs)
        with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, torch.Tensor))):
            return launch(*args, **kwargs)

    return run


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def __getattr__(name: str) -> Any:
    # Only OPS is lazy: a kernel file imports this module, so this module can import them only after it is complete.
    if name != "OPS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    package = __name__.rpartition(".")[0]
    for found in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if not found.name.startswith("_"):
            importlib.import_module(f"{package}.{found.name}")
    globals()["OPS"] = _registered
    return _registered
