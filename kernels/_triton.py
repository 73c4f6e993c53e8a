"""What launchers share. This module imports triton: import it inside a launcher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import triton

Grid = Callable[[Mapping[str, Any]], tuple[int, ...]]
Config = Mapping[str, Any]


def tuned(kernel: Any, configs: Sequence[Config], key: Sequence[str]) -> Callable[..., None]:
    """A launcher of `kernel` that times `configs` once per value of the arguments in `key` and keeps the fastest.

    A size that differs from call to call, such as a batch, is no key: the launcher takes it as `size`, and times once
    per power of two. In Triton's interpreter there is nothing to time, and the first config runs.

    Args:
        kernel: a function under ``triton.jit``.
        configs: constants of the kernel, and `num_warps`, `num_stages`.
        key: names of arguments.

    Returns:
        Function of a grid, which is a function of the chosen config, of `size`, and of the kernel's other arguments by
        name.
    """

    @cache
    def tuner(size: int) -> Any:
        options = ("num_warps", "num_stages")
        choices = [
            triton.Config(
                {name: value for name, value in config.items() if name not in options},
                **{name: value for name, value in config.items() if name in options},
            )
            for config in configs
        ]
        return triton.autotune(choices, key=list(key))(kernel)

    def launch(grid: Grid, *, size: int = 1, **arguments: Any) -> None:
        if interpreted(kernel):
            kernel[grid(configs[0])](**arguments, **configs[0])
        else:
            tuner(triton.next_power_of_2(size))[grid](**arguments)

    return launch


def interpreted(kernel: Any) -> bool:
    """Was `kernel` made under TRITON_INTERPRET=1?"""
    return not isinstance(kernel, triton.runtime.JITFunction)
