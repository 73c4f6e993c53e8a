"""Does fxfreeze take the architectures people have? Capture, prove and emit a hundred of them with random weights.

    python -m benchmarks.architectures [--only PATTERN] [--targets onnx,aoti] [--out FILE]

Every model runs in a process of its own, with a time limit, and gives one JSON line: what happened and how long it
took, with which versions. Lines of a file are replaced by name, so that a survey can be taken in parts. Batch (and
sequence length, for token models) are symbolic. Nothing in fxfreeze knows these names.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import shlex
import sys
import time
import tomllib
import traceback
from collections.abc import Callable
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import fxfreeze as fz

with (Path(__file__).parent / "architectures.toml").open("rb") as _file:
    CASES: dict[str, Any] = tomllib.load(_file)
SEQ2SEQ = ("BartModel", "T5Model")
AUDIO = ("HubertModel", "Wav2Vec2Model")


def names() -> list[str]:
    return [
        *(f"torchvision/{name}" for name in CASES["torchvision"]),
        *(f"timm/{name}" for name in CASES["timm"]),
        *(f"transformers/{name}" for name in CASES["transformers"]),
    ]


def build(name: str) -> tuple[Any, fz.Plan]:
    """The model with random weights from seed 0, and a plan with symbolic batch (and sequence)."""
    import torch

    torch.manual_seed(0)
    library, _, rest = name.partition("/")
    model, plan = {"torchvision": _torchvision, "timm": _timm, "transformers": _transformers}[library](rest)
    with torch.no_grad():  # statistics of 0 and 1 would make batch-norm folds trivial
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval(), plan


def _image_plan(*shape: int, name: str = "image", outputs: Any = None) -> fz.Plan:
    return fz.Plan(inputs=[fz.Input(name, shape=("batch", *shape))], outputs=outputs)


def _torchvision(name: str) -> tuple[Any, fz.Plan]:
    import torchvision

    kind, _, short = name.rpartition(".")
    options: dict[str, Any] = {"weights": None}
    if kind == "segmentation":
        options["weights_backbone"] = None
    elif short in ("googlenet", "inception_v3"):
        options.update(init_weights=False, aux_logits=False)
    model = torchvision.models.get_model(short, **options)
    if kind == "video":
        return model, _image_plan(3, 16 if "mvit" in short else 4, *((224, 224) if "mvit" in short else (32, 32)))
    size = {"inception_v3": 96, "googlenet": 64, "maxvit_t": 224, "vit_b_32": 224, "alexnet": 96}.get(short, 64)
    return model, _image_plan(3, size, size)


def _timm(name: str) -> tuple[Any, fz.Plan]:
    import timm

    model = timm.create_model(name, pretrained=False)
    return model, _image_plan(*model.default_cfg["input_size"])


def _transformers(name: str) -> tuple[Any, fz.Plan]:
    import transformers

    case = CASES["transformers"][name]
    outputs = case["outputs"]
    config = getattr(transformers, case["config"])(**case["options"])
    owner = getattr(transformers, name, None)
    if owner is None:
        from transformers.models.whisper.modeling_whisper import WhisperEncoder as owner
    model = owner(config)
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 64)
        return model, _image_plan(getattr(config, "num_channels", 3), size, size, name="pixel_values", outputs=outputs)
    if name in AUDIO:
        return model, _image_plan(800, name="input_values", outputs=outputs)
    if name == "WhisperEncoder":
        return model, _image_plan(8, 32, name="input_features", outputs=outputs)
    length = case.get("sequence", "sequence")
    ids = [fz.Input(item, dtype="int64", shape=("batch", length), low=2, high=98)
           for item in (("input_ids", "decoder_input_ids") if name in SEQ2SEQ else ("input_ids",))]  # fmt: skip
    dims = {"sequence": fz.Dim(min=2, max=64)} if length == "sequence" else {}
    return model, fz.Plan(inputs=ids, outputs=outputs, dims=dims)


def attempt(name: str, targets: tuple[str, ...], verify: str) -> dict[str, Any]:
    """Compile one architecture; a row that says what happened."""

    model, plan = build(name)
    started = time.perf_counter()
    artifact = fz.compile(model, plan.model_copy(update={"targets": targets}), verify=verify)
    seconds = time.perf_counter() - started
    passes = {row["name"]: row["rewrites"] for row in artifact.manifest["passes"]}
    return {"name": name, "ok": True, "seconds": round(seconds, 2), "targets": list(targets), "rewrites": passes}


def _child(name: str, targets: tuple[str, ...], verify: str, send: Callable[[Any], None]) -> None:
    try:
        send(attempt(name, targets, verify))
    except BaseException as error:
        where = traceback.format_exc(limit=-3)
        send({"name": name, "ok": False, "error": f"{type(error).__name__}: {error}"[:1500], "trace": where[-1500:]})


def run_one(name: str, targets: tuple[str, ...], verify: str, limit: float) -> dict[str, Any]:
    """:func:`attempt` in a process of its own that may take `limit` seconds."""
    context = mp.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(name, targets, verify, send.send), daemon=True)
    child.start()
    send.close()
    try:
        row = receive.recv() if receive.poll(limit) else {"error": f"took over {limit} s"}
    except EOFError:
        row = {"error": "the process died"}
    row = {"name": name, "ok": False, "targets": list(targets), **row}
    child.kill()
    child.join()
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="globs over names, comma-separated, such as timm/vit*")
    parser.add_argument("--targets", default="", help="comma-separated: torch,aoti,onnx; none by default")
    parser.add_argument("--verify", default="full", choices=["full", "sampled", "off"])
    parser.add_argument("--limit", type=float, default=600, help="seconds per model")
    parser.add_argument("--out", type=Path, help="write JSON lines here")
    options = parser.parse_args()
    from .harness import record

    shared = asdict(record.environment("architectures", quick=False, seed=0, command=shlex.join(sys.argv[1:])))
    targets = tuple(filter(None, options.targets.split(",")))
    chosen = [name for name in names() if any(fnmatchcase(name, glob) for glob in options.only.split(","))]
    good = 0
    for name in chosen:
        row = run_one(name, targets, options.verify, options.limit)
        good += row["ok"]
        said = f"{'ok  ' if row['ok'] else 'FAIL'} {name} {row.get('seconds', '')} {row.get('error', '')}"
        print(said[:600], flush=True)
        if options.out:
            record.replace_row(options.out, {**row, "verify": options.verify, **shared})
    print(f"{good} of {len(chosen)} architectures compiled with targets {list(targets)} and verify={options.verify!r}")
    return 0 if good == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
