"""Benchmarks of fxfreeze: each file beside this one is a benchmark, `harness/` measures. See README.md."""
