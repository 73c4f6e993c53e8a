"""Adapters as AdapterHub's library saves them: ``adapter_config.json`` and ``adapter.safetensors``, read as steps.

Where adapters are and how wide is read from the tensors, as for peft's checkpoints (:mod:`.checkpoints`); what the
configuration says is held against that, and a key that could change what the numbers mean is honoured or refused. Keys
are named by the module that holds the adapter, which is not always the one that it acts on:
``bert.encoder.layer.3.output.adapters.<name>.adapter_down.0.weight``. Torch is not needed.

Of a sublayer, h is what its last Linear makes, r its residual input, and LN the LayerNorm behind both: the base
computes LN(h + r). A bottleneck acts on h, on h + r in front of LN, or on what LN makes, whichever the configuration
amounts to.

Source: github.com/adapter-hub/adapters, src/adapters/methods and src/adapters/models; read, not copied. Compared with
what version 1.3.0 saves and computes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .checkpoints import globs, read_config, read_shapes
from .errors import PlanError

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"
_CONVERT = (
    "load it with the adapters library, and save_adapter(folder, name, use_safetensors=True); it fails with ln_before, "
    "whose norm has two names: there, safetensors.torch.save_file clones of torch.load(file, weights_only=True)"
)
MODULE = "fxfreeze.nn:HubBottleneck"


# ---- where things are


@dataclass(frozen=True)
class Sublayer:
    """A sublayer of a block, by paths below it.

    Attributes:
        owner: what holds its adapters in the library.
        dense: the Linear that makes h.
        norm: LN.
        residual: what returns r; below the block before this one if it starts with "-", and for the first block
            `Layout.first`.
    """

    owner: str
    dense: str
    norm: str
    residual: str


@dataclass(frozen=True)
class Layout:
    """Where a model's blocks are, and what is in them.

    Attributes:
        stem: path of the list of blocks.
        sublayers: by the configuration's key that puts an adapter there.
        linears: paths below a block, by the key that puts a LoRA there; of an attention by q, k and v.
        first: what returns the first block's input; None: it depends on the model.
    """

    stem: str
    sublayers: Mapping[str, Sublayer]
    linears: Mapping[str, Mapping[str, str]]
    first: str | None


_BERT = Layout(
    "encoder.layer",
    {
        "mh_adapter": Sublayer("attention.output", "attention.output.dense", "attention.output.LayerNorm",
                               "-output.LayerNorm"),
        "output_adapter": Sublayer("output", "output.dense", "output.LayerNorm", "attention.output.LayerNorm"),
    },
    {
        "selfattn_lora": {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value"},
        "intermediate_lora": {"": "intermediate.dense"},
        "output_lora": {"": "output.dense"},
    },
    "embeddings",
)  # fmt: skip
_DISTILBERT = Layout(
    "transformer.layer",
    {
        "mh_adapter": Sublayer("attention_adapters", "attention.out_lin", "sa_layer_norm", "-output_layer_norm"),
        "output_adapter": Sublayer("output_adapters", "ffn.lin2", "output_layer_norm", "sa_layer_norm"),
    },
    {
        "selfattn_lora": {"q": "attention.q_lin", "k": "attention.k_lin", "v": "attention.v_lin"},
        "intermediate_lora": {"": "ffn.lin1"},
        "output_lora": {"": "ffn.lin2"},
    },
    "embeddings",
)
_ELECTRA = Layout(_BERT.stem, _BERT.sublayers, _BERT.linears, None)  # embeddings may be projected to another width
LAYOUTS = {
    "bert": _BERT, "roberta": _BERT, "xlm-roberta": _BERT, "electra": _ELECTRA, "distilbert": _DISTILBERT,
}  # fmt: skip
"""model_type → its layout."""

_STEMS = "|".join(sorted({re.escape(layout.stem) for layout in LAYOUTS.values()}))
_KEY = re.compile(
    rf"(?:(?P<base>.+?)\.)?(?P<stem>{_STEMS})\.(?P<layer>\d+)\.(?P<owner>.+?)\."
    r"(?P<method>adapters|loras|refts)\.(?P<name>[^.]+)\.(?P<leaf>.+)"
)
_SITES = {
    item.owner: (item.dense, item.norm) for layout in LAYOUTS.values() for item in layout.sublayers.values()
}  # fmt: skip
"""What holds an adapter → the modules it may act on."""

_REFT: dict[str, str] = {
    "units.0.learned_source.weight": "source.weight",
    "units.0.learned_source.bias": "source.bias",
    "units.0.basis": "basis",
    "units.0.target.weight": "target.weight",
}
"""A parameter of ReFT, the projection converted → ours. Unit 1 is for last positions, which are refused."""


def core(path: str) -> str:
    """A path from the list of blocks on, whatever the model around it."""
    return re.sub(rf"^.*?(?=(?:{_STEMS})\.\d)", "", path)


def is_key(key: str) -> bool:
    """Whether a key of a file is in the library's words."""
    return _KEY.fullmatch(key) is not None


def places(key: str, keys: Iterable[str] = ()) -> list[tuple[str, str]]:
    """The sites (as :func:`core` has them) and our names of the parameter that a key of a file may stand for.

    Args:
        keys: of the whole file, to tell a LayerNorm in front of a Linear from the Linear.
    """
    match = _KEY.fullmatch(key)
    if match is None:
        return []
    block, leaf = f"{match['stem']}.{match['layer']}", match["leaf"]
    if match["method"] == "loras":
        ours = {"lora_A": ("lora_A",), "lora_B": ("lora_B", "ia3")}.get(leaf, ())
        return [(f"{block}.{match['owner']}", name) for name in ours]
    if match["method"] == "refts":
        return [] if leaf.startswith("units.1.") else [(block, _REFT.get(leaf, leaf))]
    name = _bottleneck_leaf(leaf, f"{key.removesuffix(leaf)}adapter_down.1.weight" in keys)
    return [(f"{block}.{site}", name) for site in _SITES.get(match["owner"], ())]


def _bottleneck_leaf(leaf: str, normed: bool) -> str:
    names = {"adapter_up": "up", "adapter_norm_before": "norm_before", "adapter_norm_after": "norm_after"}
    names |= {"adapter_down.0": "norm_before" if normed else "down", "adapter_down.1": "down"}
    module, _, parameter = leaf.rpartition(".")
    return f"{names.get(module, module)}.{parameter}" if module else leaf


# ---- what a configuration may say


@dataclass(frozen=True)
class Found:
    """A folder, read.

    Attributes:
        file: the weights.
        method: the configuration of the adapter itself.
        parts: (block, owner) → leaf → shape.
        base: what precedes the list of blocks in paths of the model to compile; with its dot.
    """

    folder: str
    file: str
    top: Mapping[str, Any]
    method: Mapping[str, Any]
    layout: Layout
    parts: Mapping[tuple[int, str], Mapping[str, tuple[int, ...]]]
    base: str

    def problem(self, what: str, hint: str | None = None) -> PlanError:
        return PlanError(what, where=os.path.join(self.folder, CONFIG), hint=hint)

    def refusal(self, key: str, why: str, hint: str | None = None) -> PlanError:
        return self.problem(f"config.{key} = {self.method.get(key)!r}: {why}", hint)

    def site(self, layer: int, path: str) -> str:
        return f"{self.base}{self.layout.stem}.{layer}" + (f".{path}" if path else "")


@dataclass(frozen=True)
class _Method:
    """What the configuration of one architecture may hold.

    Attributes:
        known: keys that are read, or that only matter for training.
        refused: key → what it does that no step can; fine while it is falsy.
    """

    known: tuple[str, ...]
    refused: Mapping[str, str]


_ONLY_PHM = ("phm_dim", "factorized_phm_W", "shared_W_phm", "shared_phm_rule", "factorized_phm_rule", "phm_c_init",
             "phm_init_range", "learn_phm", "hypercomplex_nonlinearity", "phm_rank", "phm_bias")  # fmt: skip
_VERA = "its matrices are trained square ones times two that all layers share (VeRA)"
_GATE = "a gate that averages over the sequence scales the adapter"
_METHODS = {
    "bottleneck": _Method(
        ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity", "original_ln_before",
         "original_ln_after", "ln_before", "ln_after", "is_parallel", "scaling", "residual_before_ln",
         "adapter_residual_before_ln", "leave_out", "init_weights", "init_weights_seed", "dropout", "stochastic_depth",
         "inv_adapter", "invertible_adapter", "inv_adapter_reduction_factor", *_ONLY_PHM),
        {"use_gating": _GATE,
         "phm_layer": "its weights are sums of Kronecker products (Compacter)",
         "cross_adapter": "adapters behind a cross attention"},
    ),
    "lora": _Method(
        ("selfattn_lora", "intermediate_lora", "output_lora", "leave_out", "r", "alpha", "dropout", "attn_matrices",
         "composition_mode", "init_weights", "init_weights_seed", "dtype"),
        {"use_gating": _GATE,
         "use_dora": "its magnitudes scale the bias too, and are divided by norms of W + BA without its scale",
         "vera_d": _VERA, "vera_b": _VERA},
    ),
    "reft": _Method(
        ("layers", "prefix_positions", "suffix_positions", "r", "orthogonality", "tied_weights",
         "subtract_projection", "dropout", "output_reft", "init_weights_seed", "dtype"),
        {"non_linearity": "an activation inside of the edit"},
    ),
}  # fmt: skip
"""architecture → what we make of it."""

_UNKNOWN = {
    "prompt_tuning": "its vectors stand behind the embeddings, without positions and a LayerNorm, where those of "
    "fz.Prompt get both as tokens do",
    "prefix_tuning": "its keys and values are made by one network for all layers",
    "union": "it is several methods in one, of which each has to be saved as an adapter of its own",
}
"""Architectures that are refused → why."""

_DEFAULTS: dict[str, Any] = {
    "original_ln_before": False, "original_ln_after": True, "ln_before": False, "ln_after": False,
    "is_parallel": False, "scaling": 1.0, "residual_before_ln": True, "adapter_residual_before_ln": False,
    "mh_adapter": False, "output_adapter": False,
}  # fmt: skip
"""What a key of a bottleneck means that older files lack, as the library has it."""

_RENAMED = {"gelu": "gelu_new", "gelu_orig": "gelu"}
"""Activations in files without a version → their names since."""

_ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh", "sigmoid", "leakyrelu",
                "leaky_relu", "linear")  # fmt: skip


def read_hub_steps(folder: str | os.PathLike[str], base: str | None = None) -> list[dict[str, Any]]:
    """The steps that do what a checkpoint of the library does, as plain data.

    Args:
        base: path of the base model in the model to compile; None: as in the file.

    Raises:
        PlanError: the folder holds no such checkpoint, or one with something in it that no step can do; says what.
    """
    found = _open(os.fspath(folder))
    architecture = _architecture(found.method)
    _check_config(found, _METHODS[architecture])  # first, for it names a key where a weights file has odd tensors only
    found = _with_parts(found, base)
    steps = {"bottleneck": _bottlenecks, "lora": _loras, "reft": _refts}[architecture](found)
    return [{**step, "weights": found.file} for step in steps]


def _architecture(method: Mapping[str, Any]) -> str:
    return str(method.get("architecture") or "bottleneck")


def _open(folder: str) -> Found:
    """What the configuration says."""
    path = os.path.join(folder, CONFIG)
    top = read_config(path, "AdapterHub checkpoint", "save_adapter")
    if "peft_type" in top:
        raise PlanError("this is a peft checkpoint", where=path, hint="fxfreeze.from_peft reads it")
    method = top.get("config")
    if not isinstance(method, dict):
        raise PlanError(f"config must be a table of keys, got {method!r}", where=path,
                        hint="save the adapter again with a newer version of the library")  # fmt: skip
    architecture = _architecture(method)
    if architecture not in _METHODS:
        raise PlanError(
            f"config.architecture = {architecture!r}: {_UNKNOWN.get(architecture, 'it is unknown here')}", where=path,
            hint=f"what is read is {', '.join(_METHODS)}",
        )  # fmt: skip
    layout = LAYOUTS.get(str(top.get("model_type")))
    if layout is None:
        raise PlanError(
            f"model_type = {top.get('model_type')!r}: it is not known where this model's layers are", where=path,
            hint=f"known are {', '.join(LAYOUTS)}",
        )  # fmt: skip
    return Found(folder, os.path.join(folder, WEIGHTS), top, method, layout, {}, "")


def _with_parts(config: Found, base: str | None) -> Found:
    """And where the weights file has adapters."""
    file, top = config.file, config.top
    shapes = read_shapes(file, PICKLE, _CONVERT)
    parts: dict[tuple[int, str], dict[str, tuple[int, ...]]] = {}
    bases = set()
    for key, shape in shapes.items():
        if "invertible_adapters." in key:
            raise config.refusal("inv_adapter", _INVERTIBLE)
        match = _KEY.fullmatch(key)
        if match is None or match["stem"] != config.layout.stem or match["name"] != top.get("name"):
            raise PlanError(
                f"{key} is no part of an adapter {top.get('name')!r} of a {top['model_type']} that is known here",
                where=file,
            )  # fmt: skip
        parts.setdefault((int(match["layer"]), match["owner"]), {})[f"{match['method']}.{match['leaf']}"] = shape
        bases.add(match["base"] or "")
    if not bases:
        raise PlanError("the checkpoint holds no weights at all", where=file)
    if len(bases) > 1:
        raise PlanError(f"the file holds adapters of several models: {', '.join(sorted(bases))}", where=file)
    found = bases.pop() if base is None else base
    return replace(config, parts=dict(sorted(parts.items())), base=f"{found}." if found else "")


_INVERTIBLE = "an invertible adapter changes the embeddings, and undoes that behind the model, which no step can do"


def _check_config(found: Found, known: _Method) -> None:
    """Refuse what no step can do, and what is not known to be harmless."""
    for key, value in found.method.items():
        if key in known.refused and value:
            raise found.refusal(key, f"{known.refused[key]}, which no step can do")
        if key not in known.known and key not in known.refused and key != "architecture" and value:
            raise found.refusal(key, "an unknown key, which may change what the adapter computes",
                                "remove the key if it does not")  # fmt: skip
    inverse = next((key for key in ("inv_adapter", "invertible_adapter") if found.method.get(key)), None)
    if inverse and found.top.get("type") != "text_task":  # which the library takes to have none, whatever is said
        raise found.refusal(inverse, _INVERTIBLE)


def _check_parts(found: Found, owners: Mapping[str, str], layers: Iterable[int] | None = None) -> None:
    """Refuse a file that has not one adapter at every place that the configuration names, and nowhere else.

    Args:
        owners: what holds an adapter → the key that says so.
        layers: of the blocks with one; None: all up to the last in the file, but leave_out.
    """
    if not owners:
        raise found.problem("the configuration puts an adapter nowhere")
    if layers is None:
        left_out = found.method.get("leave_out") or []
        layers = [layer for layer in range(max(layer for layer, _ in found.parts) + 1) if layer not in left_out]
    wanted = {(layer, owner) for layer in layers for owner in owners}
    for layer, owner in sorted(wanted ^ found.parts.keys()):
        place = found.site(layer, owner)
        if (layer, owner) in wanted:
            raise found.refusal(owners[owner], f"the weights file holds no adapter of {place}")
        raise found.problem(f"the weights file holds an adapter of {place}, which the configuration does not name",
                            hint="the two files are not from one checkpoint")  # fmt: skip


def _check_leaves(found: Found, layer: int, owner: str, needed: Iterable[str], spare: Iterable[str] = ()) -> None:
    have, needed = found.parts[layer, owner].keys() - set(spare), set(needed)
    if have != needed:
        words = [", ".join(sorted(items)) or "none" for items in (have, needed)]
        raise found.problem(f"{found.site(layer, owner)} has {words[0]} in the weights file, but the configuration is "
                            f"of an adapter with {words[1]}")  # fmt: skip


# ---- bottlenecks


def _bottlenecks(found: Found) -> list[dict[str, Any]]:
    config = {**_DEFAULTS, **found.method}
    sublayers = {item.owner: item for key, item in found.layout.sublayers.items() if config[key]}
    _check_parts(found, {item.owner: key for key, item in found.layout.sublayers.items() if config[key]})
    form, site, residual = _form(found, config)
    options = _options(found, config)
    groups: dict[tuple[int, int, str | None], list[str]] = {}
    for layer, owner in found.parts:
        features, width = _sizes(found, config, layer, owner)
        item = sublayers[owner]
        tap = _residual(found, layer, item) if residual else None
        groups.setdefault((features, width, tap), []).append(found.site(layer, getattr(item, site)))
    keep = form.pop("keep", None)
    return [
        {"kind": "splice", "module": MODULE, "at": globs(sites), **form, **({"taps": {residual: tap}} if tap else {}),
         "arguments": {"features": features, "width": width, **options, **({"keep": keep} if keep else {})}}
        for (features, width, tap), sites in groups.items()
    ]  # fmt: skip


def _form(found: Found, config: Mapping[str, Any]) -> tuple[dict[str, Any], str, str | None]:
    """Fields of the step (and `keep` of its module), the attribute of a sublayer it acts at, the argument r goes to."""
    inside = bool(config["ln_after"] and config["adapter_residual_before_ln"])
    behind, rho = bool(config["original_ln_after"]), config["residual_before_ln"]
    kept = {"how": "replace", "keep": "inside"}
    dropped = "what leaves the sublayer would lack the base's residual and LayerNorm, which no step can drop"
    if rho not in (True, False, None, "post_add"):
        raise found.refusal("residual_before_ln", "must be true, false or 'post_add'")
    if config["is_parallel"]:
        if not behind:
            raise found.refusal("original_ln_after", dropped)
        return {"how": "add"}, "dense", "source"
    if not config["original_ln_before"]:
        if rho == "post_add":
            raise found.refusal("residual_before_ln", "it has a meaning with original_ln_before only")
        if not behind:
            raise found.refusal("original_ln_after", dropped)
        return kept if inside else {"how": "add"}, "dense", None
    if rho and not behind:
        raise found.refusal("original_ln_after", dropped)
    if rho and inside:
        raise found.refusal("adapter_residual_before_ln", "a LayerNorm of the adapter's takes the place of a residual")
    if not rho and not behind:
        return kept if inside else {"how": "add"}, "norm", None
    branch = {"on": "input", "read": "result"}
    if not rho:
        return {**branch, "how": "replace", "keep": "inside" if inside else "outside"}, "norm", "residual"
    return {**branch, "how": "add"}, "norm", "residual" if rho == "post_add" else None


def _options(found: Found, config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the module that all sites share."""
    activation, scaling = str(config.get("non_linearity")).lower(), config["scaling"]
    if "version" not in found.top:
        activation = _RENAMED.get(activation, activation)
    if activation not in _ACTIVATIONS:
        raise found.refusal("non_linearity", f"must be one of {', '.join(_ACTIVATIONS)}")
    if scaling not in ("learned", "channel") and (isinstance(scaling, bool) or not isinstance(scaling, int | float)):
        raise found.refusal("scaling", "must be a number, 'learned' or 'channel'")
    flags = {"norm_before": bool(config["ln_before"]), "norm_after": bool(config["ln_after"])}
    return {"activation": activation, "scaling": scaling, **{name: True for name, given in flags.items() if given}}


def _sizes(found: Found, config: Mapping[str, Any], layer: int, owner: str) -> tuple[int, int]:
    """Features and width of one adapter, which the configuration must give too."""
    down, part = f"adapters.adapter_down.{1 if config['ln_before'] else 0}", found.parts[layer, owner]
    leaves = [f"{name}.{leaf}" for name in (down, "adapters.adapter_up") for leaf in ("weight", "bias")]
    spare = []
    for key in ("before", "after"):
        if config[f"ln_{key}"]:
            leaves += [f"adapters.adapter_norm_{key}.{leaf}" for leaf in ("weight", "bias")]
    if config["ln_before"]:  # the library's norm has two names, of which a file may hold either or both
        norm = [f"adapters.{name}.{leaf}" for name in ("adapter_norm_before", "adapter_down.0")
                for leaf in ("weight", "bias")]  # fmt: skip
        spare = norm[2:] if norm[0] in part else norm[:2]
        leaves = [leaf for leaf in (*leaves, *norm) if leaf not in spare]
    if isinstance(config["scaling"], str):
        leaves.append("adapters.scaling")
    _check_leaves(found, layer, owner, leaves, spare)
    width, features = part[f"{down}.weight"]
    factor = config.get("reduction_factor")
    if isinstance(factor, dict):
        factor = factor.get(str(layer), factor.get("default"))
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not factor > 0:
        raise found.refusal("reduction_factor", f"gives layer {layer} no number > 0")
    if width != max(1, int(features // factor)):
        raise found.refusal("reduction_factor", f"gives {found.site(layer, owner)} the width "
                            f"{max(1, int(features // factor))}, but the weights file has {width}")  # fmt: skip
    return features, width


def _residual(found: Found, layer: int, item: Sublayer) -> str:
    """The module that returns r."""
    if not item.residual.startswith("-"):
        return found.site(layer, item.residual)
    if layer:
        return found.site(layer - 1, item.residual[1:])
    if found.layout.first is None:
        raise found.refusal("mh_adapter", f"what the first layer of a {found.top['model_type']} is given depends on "
                            "the model, and the adapter reads it")  # fmt: skip
    return f"{found.base}{found.layout.first}"


# ---- the others


def _loras(found: Found) -> list[dict[str, Any]]:
    config, mode = found.method, found.method.get("composition_mode", "add")
    defaults = {"selfattn_lora": True}
    owners = {
        path: key
        for key, paths in found.layout.linears.items() if config.get(key, defaults.get(key))
        for which, path in paths.items() if not which or which in config.get("attn_matrices", ("q", "v"))
    }  # fmt: skip
    _check_parts(found, owners)
    if mode not in ("add", "scale"):
        raise found.refusal("composition_mode", "must be 'add' or 'scale'")
    rank, alpha = config.get("r", 8), config.get("alpha", 8)
    if _ignores_alpha(found.top):
        alpha = rank
    for layer, owner in found.parts:
        _check_leaves(found, layer, owner, ["loras.lora_A", "loras.lora_B"] if mode == "add" else ["loras.lora_B"])
        actual = found.parts[layer, owner]["loras.lora_B"][-1]
        if actual != rank:
            raise found.refusal("r", f"{found.site(layer, owner)} has rank {actual} in the weights file")
    at = globs(found.site(layer, owner) for layer, owner in found.parts)
    if mode == "add":
        return [{"kind": "lora", "at": at, "rank": rank, "alpha": alpha}]
    if alpha != 1:
        raise found.refusal("alpha", "with composition_mode 'scale' it scales the gains, which no step does",
                            "multiply the gains by it, and set it to 1")  # fmt: skip
    return [{"kind": "ia3", "at": at, "side": "out"}]


def _ignores_alpha(top: Mapping[str, Any]) -> bool:
    """Versions 0.1 to 1.0 of the library trained with a scale of 1, whatever they saved (its pull request 770)."""
    match = re.match(r"adapters\.(\d+)\.(\d+)", str(top.get("version") or ""))
    return match is not None and (int(match[1]), int(match[2])) < (1, 1)


def _refts(found: Found) -> list[dict[str, Any]]:
    config, layers = found.method, found.method.get("layers", "all")
    _check_parts(found, {"reft_layer": "layers"}, None if layers == "all" else layers)
    if config.get("suffix_positions"):
        raise found.refusal("suffix_positions", "they count from the last token that is no padding, and those of a "
                            "step from the end of the sequence")  # fmt: skip
    positions, rank = config.get("prefix_positions", 0), config.get("r")
    if not positions:
        raise found.refusal("prefix_positions", "no position is edited")
    subtract = config.get("subtract_projection")
    if config.get("orthogonality"):
        if subtract is False:
            raise found.refusal("subtract_projection", "with orthogonality, no step leaves out the difference")
        projection = ["parametrizations.weight.original", "parametrizations.weight.0.base"]
    elif subtract is None:
        raise found.refusal(
            "orthogonality", "direft and noreft save the same configuration, and compute different edits",
            'say that it is direft: "subtract_projection": false in config',
        )  # fmt: skip
    elif subtract:
        raise found.refusal("subtract_projection", "noreft: without orthogonality, no step has the difference")
    else:
        projection = ["weight"]
    leaves = [*(f"projection.{leaf}" for leaf in projection), "learned_source.weight", "learned_source.bias"]
    for layer, owner in found.parts:
        spare = [f"refts.units.1.{leaf}" for leaf in leaves] if not config.get("tied_weights") else []
        _check_leaves(found, layer, owner, [f"refts.units.0.{leaf}" for leaf in leaves], spare)
        actual = found.parts[layer, owner]["refts.units.0.learned_source.weight"][0]
        if actual != rank:
            raise found.refusal("r", f"{found.site(layer, '')} has rank {actual} in the weights file")
    kind = "loreft" if config.get("orthogonality") else "direft"
    at = globs(found.site(layer, "") for layer, _ in found.parts)
    return [{"kind": kind, "at": at, "rank": rank, "positions": f"f{positions}"}]
