"""The pipeline, top to bottom: the order of everything fxfreeze does between capture and emission.

A new pass is its file, its test, and its line here.
"""

from __future__ import annotations

from fxfreeze.rewrite import Pass

from .clean.noops import StripNoOps

PIPELINE: tuple[Pass, ...] = (
    # clean: what means nothing to a frozen graph
    StripNoOps(),
)
