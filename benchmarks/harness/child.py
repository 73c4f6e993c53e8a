"""`python child.py module:function ARGUMENTS ANSWER`: a process whose peak memory counts.

The function does the work to measure and returns a check: a callable that gives the error of the result.
The peak is read in between, so the check's own memory does not count.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
from pathlib import Path


def peak_rss() -> int:
    """The largest resident size of this process so far, in bytes.

    Linux keeps `ru_maxrss` across exec, so the child of a large process starts from the size of its parent;
    VmHWM belongs to the new address space alone.
    """
    try:
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(function: str, arguments: str, answer: str) -> None:
    module, name = function.split(":")
    check = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    peak = peak_rss()
    Path(answer).write_text(json.dumps({"peak": peak, "error": check()}))


if __name__ == "__main__":
    sys.path[0] = os.getcwd()  # the root of the repository, instead of this folder
    main(*sys.argv[1:])
