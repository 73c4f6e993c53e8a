"""How an operator of ours is declared: one :class:`Kernel` per file of this folder, registered as ``fxfreeze::<name>``.

A kernel file ends with ``KERNEL = register(Kernel(...))``. Nothing else names it: :data:`OPS` finds the files itself.

What runs when the operator is called:

=================================  ===============================================================================
fake tensors, export               `fake`
ONNX                               `reference`, in the operator's place in the graph
AOTInductor                        `native.apply` where it supports the arguments, else `reference`
CUDA and HIP                       `launch` where `supports` says so, else as on other devices
CPU                                `native.apply` where it supports the arguments, else as on other devices
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

from . import _native

NAMESPACE = "fxfreeze"

OPS: dict[str, Kernel]
"""Name → kernel, of every file of this folder without a leading underscore; they are imported at the first look."""

_registered: dict[str, Kernel] = {}
# A fragment, because the namespace belongs to every kernel file, and to whoever adds an operator from outside.
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


@dataclass(frozen=True)
class Native:
    """A form of an operator in C++, for CPUs: an operator ``fxfreeze::<name>_native`` of its own.

    That one has simple arguments, and `apply` makes them from those of the operator with plain torch, which a compiler
    of graphs can fuse and fold. Here it runs through ctypes (``_native.py``); AOTInductor compiles the C++ in. The file
    holds, within ``#ifdef FXFREEZE_AOTI``, the function that it calls by convention::

        extern "C" AOTITorchError aoti_torch_cpu_<name>_native(AtenTensorHandle x, ..., AtenTensorHandle* result)

    with one argument per argument of `schema`: AtenTensorHandle, int64_t, double or const char*.

    Attributes:
        source: the C++ file, in this folder.
        schema: of ``fxfreeze::<name>_native``: contiguous tensors, ints, floats and strings to one new tensor.
        fake: shape and dtype of its result.
        run: function of the loaded library (ctypes) and these arguments to the result.
        supports: may `apply` take these arguments of the operator? Asked of fake tensors, too, whose sizes may be
            symbols; see :func:`at_most`.
        apply: plain torch around one call of ``fxfreeze::<name>_native``; takes the operator's arguments, and raises
            ValueError where `reference` does.
    """

    source: str
    schema: str
    fake: Callable[..., torch.Tensor]
    run: Callable[..., torch.Tensor]
    supports: Callable[..., bool]
    apply: Callable[..., torch.Tensor]


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
        native: the CPU path; None: there is none.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    supports: Callable[..., bool] | None = None
    launch: Callable[..., Any] | None = None
    eager: Callable[..., Any] | None = None
    native: Native | None = None

    def __post_init__(self) -> None:
        if (self.launch is None) != (self.supports is None):
            raise ValueError(f"kernel {self.name!r}: supports and launch come together")

    @property
    def plain(self) -> Callable[..., Any]:
        """What runs where no launcher does."""
        return self.eager or self.reference

    @property
    def op(self) -> torch._ops.OpOverload:
        return _operator(self.name)

    @property
    def native_op(self) -> torch._ops.OpOverload:
        """``fxfreeze::<name>_native``, of a kernel with a native form."""
        return _operator(f"{self.name}_native")

    def lowered(self, *args: Any, **kwargs: Any) -> Any:
        """The operator in a graph for AOTInductor: around its native form where that supports the arguments."""
        if self.native is not None and self.native.supports(*args, **kwargs):
            return self.native.apply(*args, **kwargs)
        return self.reference(*args, **kwargs)

    def shim(self) -> str:
        """The native form's C++ as an entry of Inductor's ``aot_inductor.custom_ops_to_c_shims``.

        Inductor writes ``extern <entry>;`` into a block ``extern "C" { }``, for one declaration. What includes headers
        has to stand outside of such a block: this ends the block, and begins another.
        """
        assert self.native is not None
        return f'"C" {{}}\n}}\n#define FXFREEZE_AOTI\n{_native.source(self.native.source)}\nextern "C" {{'


def _operator(name: str) -> torch._ops.OpOverload:
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def at_most(size: int | torch.SymInt, limit: int) -> bool:
    """Is a size certain to be `limit` or less? A symbolic one is by its declared range; nothing is specialised."""
    if isinstance(size, int):
        return size <= limit
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(size <= limit)


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
    if kernel.native is not None:
        _library.impl(name, _cpu(kernel), "CPU")
        _register_native(f"{name}_native", kernel.native)
    _registered[name] = kernel
    return kernel


def _register_native(name: str, native: Native) -> None:
    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        library = _native.library(native.source)
        if library is None:
            raise RuntimeError(f"{NAMESPACE}::{name}: {native.source} is not built")
        return native.run(library, *args, **kwargs)

    _library.define(name + native.schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_contiguous_strides))
    _library.impl(name, run, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{name}", native.fake, lib=_library)


def _autograd(kernel: Kernel) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args):
            return kernel.plain(*args, **kwargs)
        with torch._C._AutoDispatchBelowAutograd():
            return kernel.op(*args, **kwargs)

    return run


def _cpu(kernel: Kernel) -> Callable[..., Any]:
    native = kernel.native
    assert native is not None

    def run(*args: Any, **kwargs: Any) -> Any:
        # In this order: what is not supported is no reason to build.
        if native.supports(*args, **kwargs) and _native.library(native.source) is not None:
            return native.apply(*args, **kwargs)
        return kernel.plain(*args, **kwargs)

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
