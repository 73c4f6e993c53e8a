"""``fxfreeze.fold_checkpoint``: a peft adapter folded into a base on disk."""

from __future__ import annotations

import os

from .rewrite import Ledger


def fold_checkpoint(
    base: str | os.PathLike[str], adapter: str | os.PathLike[str], out: str | os.PathLike[str]
) -> Ledger:
    """Fold a peft checkpoint into the safetensors files of a base model, and write the result as another folder.

    Weights are changed in float64 and rounded once, to the base's dtype. All else in the base's folder is copied,
    folders too.

    Args:
        base: a folder with ``*.safetensors`` (one file, or shards with their index) whose keys are those of the model.
        adapter: what peft's ``save_pretrained`` wrote.
        out: the folder to write, outside of the base's, which must not exist: it appears as a whole at the end, or not
            at all.

    Returns:
        A row for every site, with the share of its change that rounding took; also ``fxfreeze_ledger.json`` in `out`.

    Raises:
        PlanError: a checkpoint cannot be read, they do not fit, or the base alone does not say what the fold would be:
            how a convolution pads, or which of two tied layers is meant.
        PassError: rounding would take more than half of an adapter.
    """
    from .passes.adapt.merging import merge

    return merge(base, adapter, out)
