"""`python benchmarks/run.py [--suite cpu|gpu|compile|accuracy] [--case GLOB] [--peer GLOB] [--quick]`."""

import sys
from pathlib import Path

# The folder's package, instead of the files in it.
sys.path[0] = str(Path(__file__).resolve().parents[1])

if __name__ == "__main__":
    import typer

    from benchmarks.__main__ import suite

    typer.run(suite)
