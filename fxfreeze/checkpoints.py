"""Adapters as peft saves them: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``, read as steps.

Which modules are adapted, and with which rank, is read from the tensors in the file: peft gives every other module an
adapter that does nothing. What the configuration says (``target_modules``, ``rank_pattern``, …) is held against that,
and a key that could change what the numbers mean is honoured or refused, never passed over. Torch is not needed: of the
tensors only names and shapes are read here, and their values when a plan is compiled.

Keys are ``base_model.model.<module path>.<what>``; a bare ``<module path>.<parameter>`` behind the prefix is a trained
parameter of the model itself (``modules_to_save``, ``bias``, resized embeddings).
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import PlanError

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

LEAVES = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_B.bias": "lora_bias",
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    "lora_magnitude_vector": "lora_magnitude",
    "lora_magnitude_vector.weight": "lora_magnitude",
    "ia3_l": "ia3",
    "vera_lambda_b": "lambda_b",
    "vera_lambda_d": "lambda_d",
    "oft_R.weight": "oft_R",
    "oft_embedding_R.weight": "oft_R",
}
"""How a key ends → our name of the parameter."""

SHARED = {"vera_A": "base_model.vera_A", "vera_B": "base_model.vera_B"}
"""Our name of what all sites share → peft's key."""

_OURS = re.compile(r"(^|\.)(lora_|ia3_|vera_|oft_|token_adapter|trainable_tokens|modules_to_save|original_module)")


def adapter_key(key: str) -> tuple[str, str] | None:
    """The module path and our name of the parameter that a peft key stands for; None if it is no adapter's."""
    if not key.startswith(PREFIX):
        return None
    for tail, leaf in LEAVES.items():
        if key.endswith(f".{tail}"):
            return _plain(key[len(PREFIX) : -len(tail) - 1]), leaf
    return None


def parameter_key(key: str) -> tuple[str, str] | None:
    """The module path and name of the model's own parameter that a key stands for, with or without peft's prefix."""
    path, _, leaf = key.removeprefix(PREFIX).rpartition(".")
    return None if adapter_key(key) or _OURS.search(key) or not path else (_plain(path), leaf)


def _plain(path: str) -> str:
    """A path without what peft's wrappers put into it."""
    return re.sub(r"\.base_layer(?=\.|$)", "", path)


# ---- what a configuration may say


_ALWAYS = ("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
           "inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
           "modules_to_save", "bias", "fan_in_fan_out")  # fmt: skip
"""Honoured for every type; fan_in_fan_out says how the layer stores its weight, which the layer itself says too."""


@dataclass(frozen=True)
class _Type:
    """What the configuration of one peft type may hold.

    Attributes:
        kind: of our step.
        leaves: parameters a site must have.
        known: keys that are read, or that only matter for training.
        refused: key → what it does that no step here can; fine while it has its default, that is something falsy.
    """

    kind: str
    leaves: frozenset[str]
    known: tuple[str, ...]
    refused: Mapping[str, str] = field(default_factory=dict)


_TYPES = {
    "LORA": _Type(
        "lora", frozenset({"lora_A", "lora_B"}),
        ("r", "lora_alpha", "lora_dropout", "lora_bias", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
         "init_lora_weights", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
         "qalora_group_size", "runtime_config"),
        {"megatron_config": "the layers are split over devices",
         "trainable_token_indices": "single rows of an embedding are trained",
         "target_parameters": "parameters rather than layers are adapted",
         "alora_invocation_tokens": "the adapter is on only behind certain tokens of the input",
         "layer_replication": "layers of the base are repeated, which changes the base model itself",
         "use_qalora": "the adapter reads pooled inputs (QALoRA)",
         "use_bdlora": "A or B is block-diagonal",
         "arrow_config": "adapters are chosen per token (Arrow)",
         "kasa_config": "the base is truncated first (KaSA)",
         "monteclora_config": "the adapter is sampled (MonteCLoRA)",
         "velora_config": "the adapter was trained on compressed activations (VeLoRA)",
         "ensure_weight_tying": "adapters of tied layers are tied"},
    ),
    "IA3": _Type("ia3", frozenset({"ia3"}), ("feedforward_modules", "init_ia3_weights")),
    "VERA": _Type(
        "vera", frozenset({"lambda_b", "lambda_d"}),
        ("r", "projection_prng_key", "save_projection", "d_initial", "vera_dropout", "init_weights"),
    ),
    "OFT": _Type(
        "oft", frozenset({"oft_R"}),
        ("r", "oft_block_size", "module_dropout", "coft", "eps", "block_share", "use_cayley_neumann",
         "num_cayley_neumann_terms", "init_weights"),
    ),
}  # fmt: skip
"""peft_type → what we make of it."""

_MUTATE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of init_lora_weights that take something out of the base before training."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder, read.

    Attributes:
        file: the weights.
        shapes: of every tensor in them, by key.
        sites: module path → our name of the parameter → its key.
        parameters: keys of parameters of the model itself, by module path.
    """

    folder: str
    file: str
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    sites: dict[str, dict[str, str]]
    parameters: dict[str, list[str]]

    @property
    def peft_type(self) -> str:
        return str(self.config.get("peft_type") or "").rpartition(".")[2].upper()

    def problem(self, what: str, hint: str | None = None) -> PlanError:
        return PlanError(what, where=os.path.join(self.folder, CONFIG), hint=hint)


def read_steps(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The steps that do what a peft checkpoint does, as plain data: adapters first, then parameters it replaces.

    Sites with the same rank and alpha (the same side, the same block size) share a step.

    Raises:
        PlanError: the folder holds no such checkpoint, or one with something in it that no step can do; says what.
    """
    found = _open(os.fspath(folder))
    known = _TYPES.get(found.peft_type)
    if known is None:
        raise found.problem(f"peft_type {found.peft_type or None!r} is none of {', '.join(_TYPES)}",
                            hint="only adapters that change weights are read from a checkpoint")  # fmt: skip
    _check_config(found, known)
    groups: dict[tuple[tuple[str, Any], ...], list[str]] = {}
    for path, keys in found.sites.items():
        _check_site(found, known, path, keys)
        groups.setdefault(tuple(_options(found, path, keys).items()), []).append(path)
    kind = "dora" if found.config.get("use_dora") and known.kind == "lora" else known.kind
    steps = [{"kind": kind, "at": globs(paths), **dict(options), "weights": found.file}
             for options, paths in groups.items()]  # fmt: skip
    if found.parameters:
        steps.append({"kind": "replace", "at": globs(found.parameters), "weights": found.file})
    if not steps:
        raise found.problem("the checkpoint holds no weights at all")
    return steps


def globs(paths: Iterable[str]) -> str | tuple[str, ...]:
    """Patterns that match `paths` and nothing else."""
    found = tuple(map(glob.escape, paths))
    return found[0] if len(found) == 1 else found


def _open(folder: str) -> Checkpoint:
    config = read_config(os.path.join(folder, CONFIG), "peft checkpoint", "save_pretrained")
    file = os.path.join(folder, WEIGHTS)
    shapes = read_shapes(
        file, "adapter_model.bin", "load it with peft, and save_pretrained(folder, safe_serialization=True)"
    )
    sites: dict[str, dict[str, str]] = {}
    parameters: dict[str, list[str]] = {}
    for key in shapes:
        if adapter := adapter_key(key):
            sites.setdefault(adapter[0], {})[adapter[1]] = key
        elif own := parameter_key(key):
            parameters.setdefault(own[0], []).append(key)
        elif key not in SHARED.values():
            raise PlanError(f"{key} is nothing that can be read from a peft checkpoint", where=file)
    return Checkpoint(folder, file, config, shapes, sites, parameters)


def read_config(path: str, what: str, writer: str) -> dict[str, Any]:
    """The table in a JSON file.

    Raises:
        PlanError: it is none; says that there is no `what`, and that `writer` makes one.
    """
    try:
        config = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise PlanError(f"no {what}: there is no such file", where=path,
                        hint=f"name the folder that {writer} wrote") from None  # fmt: skip
    except (OSError, ValueError) as error:
        raise PlanError(f"cannot read the configuration: {error}", where=path) from None
    if not isinstance(config, dict):
        raise PlanError(f"a configuration is a table of keys, not a {type(config).__name__}", where=path)
    return config


def read_shapes(file: str, pickle: str, convert: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a safetensors file, from its header.

    Args:
        pickle: name of the file that may be there in its place.
        convert: what to do then.

    Raises:
        PlanError: the file cannot be read.
    """
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= os.path.getsize(file) - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        return {name: tuple(item["shape"]) for name, item in header.items() if name != "__metadata__"}
    except FileNotFoundError:
        hint = f"nothing is unpickled: {convert}" if Path(file).with_name(pickle).exists() else None
        raise PlanError("no such weights file", where=file, hint=hint) from None
    except OSError as error:
        raise PlanError(f"cannot read the weights file: {error.strerror or error}", where=file) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"not a safetensors file: {error}", where=file) from None


def _check_config(found: Checkpoint, known: _Type) -> None:
    """Refuse what no step can do, and what is not known to be harmless."""
    for key, value in found.config.items():
        if key in known.refused and value:
            raise found.problem(f"{key} = {value!r}: {known.refused[key]}, which no step can do",
                                hint="merge it with peft first, or compile the peft model itself")  # fmt: skip
        if key not in _ALWAYS and key not in known.known and key not in known.refused and value:
            raise found.problem(f"unknown key {key!r} = {value!r}, which may change what the adapter computes",
                                hint="remove the key if it does not")  # fmt: skip
    init = found.config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_MUTATE):
        raise found.problem(
            f"init_lora_weights = {init!r} changed the base before training, so that the adapter is wrong on the base "
            "as published",
            hint="save it as a plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    if known.kind == "oft" and found.config.get("use_cayley_neumann", True):
        version = re.match(r"(\d+)\.(\d+)", str(found.config.get("peft_version") or ""))
        if version is None or tuple(map(int, version.groups())) < (0, 18):
            raise found.problem("the Neumann series of OFT meant something else before peft 0.18",
                                hint="train it again with a newer peft, or with use_cayley_neumann=False")  # fmt: skip
    if found.config.get("use_dora") and found.config.get("lora_bias"):
        raise found.problem("lora_bias beside use_dora: B has a bias that the magnitude does not scale",
                            hint="train it again with one of them")  # fmt: skip
    saved = found.config.get("modules_to_save") or []
    below = [f".{path}." for path in found.parameters]
    if saved and not any(f".{name}." in path for name in saved for path in below):
        raise found.problem(f"modules_to_save = {saved!r}, but the file holds no weights of such a module")
    if found.config.get("bias", "none") != "none" and not any(
        key.endswith(".bias") for keys in found.parameters.values() for key in keys
    ):
        raise found.problem(f"bias = {found.config['bias']!r}, but the file holds no biases")


def _check_site(found: Checkpoint, known: _Type, path: str, keys: Mapping[str, str]) -> None:
    """Refuse a site whose parameters are not those of the type, or that the configuration does not name."""
    more = {"use_dora": "lora_magnitude", "lora_bias": "lora_bias"} if known.kind == "lora" else {}
    needed = known.leaves | {leaf for key, leaf in more.items() if found.config.get(key)}
    if needed != keys.keys():
        here, there = ", ".join(sorted(keys)), ", ".join(sorted(needed))
        raise found.problem(f"{path} has {here} in the weights file, but the configuration is of a type with {there}")
    if ".base_layer." not in next(iter(keys.values())) and not _is_target(found.config, path):
        raise found.problem(
            f"the weights file holds an adapter of {path}, which the configuration does not take (target_modules, "
            "exclude_modules, layers_to_transform)",
            hint="the two files are not from one checkpoint",
        )


def _is_target(config: Mapping[str, Any], path: str) -> bool:
    """Whether peft would put an adapter at `path`."""

    def named(patterns: Any) -> bool:
        if isinstance(patterns, str):
            return re.fullmatch(patterns, path) is not None
        return any(path == name or path.endswith(f".{name}") for name in patterns)

    targets = config.get("target_modules")
    if config.get("exclude_modules") and named(config["exclude_modules"]):
        return False
    if targets is None or targets == "all-linear":  # which layers that are only the model can tell
        return True
    if isinstance(targets, str) or not named(targets):
        return named(targets)
    indices = config.get("layers_to_transform")
    if indices is None or indices == []:
        return True
    patterns = config.get("layers_pattern") or r"[^.]*"
    index = next((match["index"] for pattern in ([patterns] if isinstance(patterns, str) else patterns)
                  if (match := re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", path))), None)  # fmt: skip
    return index is not None and int(index) in ([indices] if isinstance(indices, int) else indices)


def _options(found: Checkpoint, path: str, keys: Mapping[str, str]) -> dict[str, Any]:
    """What the step at `path` says, apart from its `at` and `weights`."""
    return _OPTIONS[_TYPES[found.peft_type].kind](found, path, keys)


def _lora(found: Checkpoint, path: str, keys: Mapping[str, str]) -> dict[str, Any]:
    config = found.config
    rank = _from_pattern(config.get("rank_pattern"), path, config.get("r", 8))
    if found.shapes[keys["lora_A"]][0] != rank:
        actual = found.shapes[keys["lora_A"]][0]
        raise found.problem(f"r and rank_pattern give {path} rank {rank}, but {keys['lora_A']} has {actual}")
    alpha = _from_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha", 8))
    extra = {"bias": True} if config.get("lora_bias") else {}
    return {"rank": rank, "alpha": alpha, "rslora": bool(config.get("use_rslora")), **extra}


def _from_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", path)), default)


def _ia3(found: Checkpoint, path: str, keys: Mapping[str, str]) -> dict[str, Any]:
    inner = found.config.get("feedforward_modules") or []
    fed = re.fullmatch(inner, path) if isinstance(inner, str) else any(path.endswith(name) for name in inner)
    return {"side": "in" if fed else "out"}


def _vera(found: Checkpoint, path: str, keys: Mapping[str, str]) -> dict[str, Any]:
    saved = set(SHARED.values()) & found.shapes.keys()
    if found.config.get("save_projection", True) and len(saved) < len(SHARED):
        raise found.problem("save_projection is true, but the weights file does not hold vera_A and vera_B",
                            hint="set save_projection to false to draw them from projection_prng_key")  # fmt: skip
    return {"rank": found.shapes[keys["lambda_d"]][0], "seed": found.config.get("projection_prng_key") or 0}


def _oft(found: Checkpoint, path: str, keys: Mapping[str, str]) -> dict[str, Any]:
    config, entries = found.config, found.shapes[keys["oft_R"]][1]
    size = round((1 + (1 + 8 * entries) ** 0.5) / 2)  # peft changes sizes that do not divide the layer's inputs
    if size < 2:
        raise found.problem(f"{path} has blocks of size 1, which rotate nothing", hint="leave it out of target_modules")
    neumann = config.get("use_cayley_neumann", True)
    return {
        "block_size": size, "share": bool(config.get("block_share")), "coft": bool(config.get("coft")),
        "eps": config.get("eps", 6e-5), "terms": config.get("num_cayley_neumann_terms", 5) if neumann else None,
    }  # fmt: skip


_OPTIONS: dict[str, Callable[[Checkpoint, str, Mapping[str, str]], dict[str, Any]]] = {
    "lora": _lora, "ia3": _ia3, "vera": _vera, "oft": _oft,
}  # fmt: skip
