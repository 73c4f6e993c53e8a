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

    In Triton's interpreter there is nothing to time, and the first config runs.

    Args:
        kernel: a function under ``triton.jit``.
        configs: constants of the kernel, and `num_warps`, `num_stages`.
        key: names of arguments.

    Returns:
        Function of a grid, which is a function of the chosen config, and the kernel's other arguments by name.
    """

    @cache
    def tuner() -> Any:
        options = ("num_warps", "num_stages")
        choices = [
            triton.Config(
                {name: value for name, value in config.items() if name not in options},
                **{name: value for name, value in config.items() if name in options},
            )
            for config in configs
        ]
        return triton.autotune(choices, key=list(key))(kernel)

    def launch(grid: Grid, **arguments: Any) -> None:
        if interpreted(kernel):
            kernel[grid(configs[0])](**arguments, **configs[0])
        else:
            tuner()[grid](**arguments)

    return launch


def interpreted(kernel: Any) -> bool:
    """Was `kernel` made under TRITON_INTERPRET=1?"""
    return not isinstance(kernel, triton.runtime.JITFunction)
