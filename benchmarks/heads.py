"""What runs that train a network with a Tversky head and compile it share: scores compared row by row, and files."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .harness import record

Call = Callable[[Tensor], Any]


@torch.no_grad()
def scores(call: Call, inputs: Tensor, size: int) -> Tensor:
    """Scores [rows, P] of all `inputs`, `size` of them in a call; a row is one prediction."""
    return torch.cat([call(chunk).flatten(0, -2) for chunk in inputs.split(size)])


def near_threshold(model: Call, head: nn.Module, inputs: Tensor, size: int) -> Tensor:
    """Rows of the scores in which rounding may decide whether the object has a feature, bool [rows].

    Presence is a comparison of a = x·Ωᵀ with the threshold t, so a last bit of `a` can move a score by far more than
    itself. In float32 `a` lies within γ·|x|·|Ω|ᵀ of what this x gives, γ = d·u / (1 − d·u), u = eps / 2, in whatever
    order it is summed (Higham, *Accuracy and Stability of Numerical Algorithms*, §3.1); a row is near where |a − t| is
    no more than that for any feature. What rounding has done to x itself is not in it.

    Args:
        head: the layer of ``fxfreeze.nn`` that `model` calls, in float32 and without `normalize`.
    """
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    try:
        scores(model, inputs, size)
    finally:
        handle.remove()
    return torch.cat([_near(head, x) for x in seen])


@torch.no_grad()
def _near(head: Any, x: Tensor) -> Tensor:
    if head.normalize or x.dtype != torch.float32:
        raise ValueError("near_threshold knows the rounding of float32 without `normalize` only")
    features, rounding = head.features.double(), x.shape[-1] * torch.finfo(x.dtype).eps / 2
    bound = rounding / (1 - rounding) * (x.double().abs() @ features.abs().T)
    return ((x.double() @ features.T - head.threshold).abs() <= bound).any(-1)


def compared(actual: Tensor, wanted: Tensor, near: Tensor) -> dict[str, Any]:
    """How far scores [rows, P] are from others: predictions that differ, in all rows and in rows not `near`."""
    differ = actual.argmax(-1) != wanted.argmax(-1)
    return {
        "differing": int(differ.sum()),
        "differing_away_from_threshold": int((differ & ~near).sum()),
        "score_error": float((actual - wanted).abs().max() / wanted.abs().max()),
    }


def parameter_bytes(model: nn.Module, path: str) -> int:
    """Bytes of the parameters of the module at `path`, without those that are tied to another module's."""
    return sum(parameter.nbytes for parameter in _own(model, path).values())


def frozen_bytes(artifact: Any, model: nn.Module, path: str) -> int:
    """Bytes of the constants that the program of an artifact holds for the module at `path`, tied ones left out."""
    from safetensors.torch import load_file

    weights, own = load_file(artifact.folder / "program" / "weights.safetensors"), _own(model, path)
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - own.keys()
    return sum(value.nbytes for name, value in weights.items() if name.startswith(f"{path}.") and name not in tied)


def _own(model: nn.Module, path: str) -> dict[str, nn.Parameter]:
    named = dict(model.named_parameters(remove_duplicate=False))
    elsewhere = {id(parameter) for name, parameter in named.items() if not name.startswith(f"{path}.")}
    return {name: parameter for name, parameter in named.items() if id(parameter) not in elsewhere}


def executes(artifact: Any, path: str) -> list[str]:
    """What the ledger says runs in place of the module at `path`."""
    return [row["executes"] for row in artifact.manifest["ledger"] if row["site"] == path]


def largest_proof_error(artifact: Any) -> float:
    """The largest error in float64 of a rewrite that is declared exact."""
    return max(row["error"] for row in artifact.manifest["passes"] if row["exact"] and row["rewrites"])


def parser(description: str | None, targets: Sequence[str]) -> argparse.ArgumentParser:
    """With the options that every run has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--targets", default=",".join(targets), help="comma-separated")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--out", type=Path, help="write JSON lines here")
    return made


def publish(rows: Iterable[dict[str, Any]], shared: dict[str, Any], out: Path | None) -> bool:
    """Print each row as it comes, and put it into the file `out` if there is one. Are all of them ok?"""
    every = True
    for row in rows:
        every &= row["ok"]
        print(f"{'ok  ' if row['ok'] else 'FAIL'} {row['name']}: {row['near_threshold']} rows near the threshold")
        for name, result in row["results"].items():
            print(f"  {name}: {result}", flush=True)
        if out:
            record.replace_row(out, {**row, **shared})
    return every
