"""AdapterHub checkpoints read as steps: what the library's equations give, written out here, or a refusal with why.

The library is not installed. Folders that it wrote are in ``data/adapterhub``, with what it computed. The others are
written here with its file names and keys, and its forward is written from its documentation and source
(github.com/adapter-hub/adapters, src/adapters/methods) around the blocks of transformers.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import fxfreeze as fz
from fxfreeze.api import Compilation, rewrite

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

WIDTH, LAYERS = 16, 2
IDS = [fz.Input("input_ids", (3, 6), "int64", 3, 19), fz.Input("attention_mask", (3, 6), "int64", 0, 1)]
NAME = "task"


class Net(nn.Module):
    """A base model under a name of its own, with the last hidden states."""

    def __init__(self, kind: str, path: str, base: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.path = path
        setattr(self, path, base_model(kind) if base is None else base)
        for parameter in self.parameters() if base is None else ():
            nn.init.normal_(parameter, std=0.3)

    @property
    def base(self) -> nn.Module:
        return getattr(self, self.path)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.base(input_ids, attention_mask=attention_mask).last_hidden_state


def base_model(kind: str) -> nn.Module:
    t: Any = transformers
    sizes = {
        "vocab_size": 20, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
        "intermediate_size": 24, "max_position_embeddings": 12, "attn_implementation": "sdpa",
    }  # fmt: skip
    if kind == "bert":
        return t.BertModel(t.BertConfig(**sizes), add_pooling_layer=False)
    if kind == "roberta":
        return t.RobertaModel(t.RobertaConfig(**sizes, pad_token_id=1), add_pooling_layer=False)
    if kind == "electra":
        return t.ElectraModel(t.ElectraConfig(**sizes, embedding_size=8))
    return t.DistilBertModel(
        t.DistilBertConfig(vocab_size=20, dim=WIDTH, n_layers=LAYERS, n_heads=2, hidden_dim=24,
                           max_position_embeddings=12, attn_implementation="sdpa")
    )  # fmt: skip


@pytest.fixture(scope="module")
def nets() -> Callable[[str], Net]:
    made: dict[str, Net] = {}
    return lambda kind: made.setdefault(kind, Net(kind, kind).eval())


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 20, (3, 6), generator=torch.Generator().manual_seed(5))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0]])
    return ids, mask


# ---- folders that the library wrote

DATA = Path(__file__).parent / "data" / "adapterhub"
TOKENS = torch.tensor([[3, 7, 5, 11, 4], [9, 15, 6, 1, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
WRITTEN = {
    "bert_seq_bn": "splice", "bert_double_seq_bn_norms": "splice", "bert_scaled_par_bn": "splice",
    "bert_adapterplus": "splice", "bert_ia3": "ia3", "bert_direft": "direft", "roberta_post_add": "splice",
    "xlm-roberta_lora": "lora", "electra_par_bn": "splice", "distilbert_norms": "splice", "distilbert_lora": "lora",
    "distilbert_loreft": "loreft",
}  # fmt: skip
"""Folder → the kind of its steps."""


def wave(name: str, shape: torch.Size) -> Tensor:
    """Numbers that are the same everywhere, without a generator."""
    angles = torch.arange(shape.numel(), dtype=torch.float64) * 1.7 + sum(name.encode())
    return (0.4 * torch.sin(angles)).view(shape).float()


def written_base(kind: str) -> nn.Module:
    t: Any = transformers
    sizes = {"vocab_size": 16, "max_position_embeddings": 9, "attn_implementation": "sdpa"}
    if kind == "distilbert":
        config = t.DistilBertConfig(dim=8, n_layers=2, n_heads=2, hidden_dim=12, **sizes)
    else:
        sizes |= {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
        sizes |= {"electra": {"embedding_size": 4}, "bert": {}}.get(kind, {"pad_token_id": 1})
        config = t.AutoConfig.for_model(kind, **sizes)
    base = t.AutoModel.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            parameter.copy_(wave(name, parameter.shape))
    return base


@pytest.mark.parametrize("name", WRITTEN)
def test_folders_that_the_library_wrote(name: str) -> None:
    kind = name.partition("_")[0]
    expected = safetensors.torch.load_file(DATA / "outputs.safetensors")[name]
    net = Net(kind, kind.removeprefix("xlm-"), written_base(kind)).eval()
    steps = fz.from_adapterhub(DATA / name)
    assert {step.kind for step in steps} == {WRITTEN[name]}
    inputs = [fz.Input("input_ids", (2, 5), "int64", 3, 15), fz.Input("attention_mask", (2, 5), "int64", 0, 1)]
    done = rewrite(net, fz.Plan(inputs, steps, targets=()), verify="off")
    (actual,) = done.program.run(TOKENS, MASK)
    with torch.no_grad():
        assert (expected - net(TOKENS, MASK)).abs().max() > 0.05
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)


def test_every_folder_that_the_library_wrote_is_tested() -> None:
    assert {folder.name for folder in DATA.iterdir() if folder.is_dir()} == WRITTEN.keys()


# ---- the library's files


def save(folder: Path, kind: str, config: dict[str, Any], tensors: dict[str, Tensor], **top: Any) -> Path:
    folder.mkdir(exist_ok=True)
    whole = {
        "config": config, "hidden_size": WIDTH, "model_class": "BertAdapterModel", "model_name": "tiny",
        "model_type": kind, "name": NAME, "version": "adapters.1.1.0", **top,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in whole.items() if v is not None}))
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "adapter.safetensors")
    return folder


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    whole = json.loads(file.read_text())
    for key, value in changes.items():
        top, _, inner = key.partition("__")
        if inner:
            whole[top][inner] = value
        else:
            whole[top] = value
    file.write_text(json.dumps(whole))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = safetensors.torch.load_file(folder / "adapter.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "adapter.safetensors")


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.4


BN: dict[str, Any] = {
    "mh_adapter": False, "output_adapter": True, "reduction_factor": 4, "non_linearity": "relu",
    "original_ln_before": True, "original_ln_after": True, "ln_before": False, "ln_after": False,
    "init_weights": "bert", "is_parallel": False, "scaling": 1.0, "use_gating": False, "residual_before_ln": True,
    "adapter_residual_before_ln": False, "inv_adapter": None, "inv_adapter_reduction_factor": None,
    "cross_adapter": False, "leave_out": [], "dropout": 0.0, "phm_layer": False, "phm_dim": 4, "phm_rank": 1,
    "factorized_phm_W": True, "shared_W_phm": False, "shared_phm_rule": True, "factorized_phm_rule": False,
    "phm_c_init": "normal", "phm_init_range": 0.0001, "learn_phm": True, "phm_bias": True,
    "hypercomplex_nonlinearity": "glorot-uniform", "stochastic_depth": 0.0,
}  # fmt: skip
DOUBLE = {**BN, "mh_adapter": True, "original_ln_before": False, "non_linearity": "swish"}
PARALLEL = {**BN, "original_ln_before": False, "is_parallel": True, "scaling": 4.0, "reduction_factor": 2}
OWNERS = {
    "bert": {"mh_adapter": "attention.output", "output_adapter": "output"},
    "distilbert": {"mh_adapter": "attention_adapters", "output_adapter": "output_adapters"},
}
STEM = {"bert": "encoder.layer", "distilbert": "transformer.layer"}
ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu, "swish": lambda x: x * torch.sigmoid(x), "tanh": torch.tanh, "gelu": nn.GELU(),
    "gelu_new": nn.GELU(approximate="tanh"), "leakyrelu": nn.LeakyReLU(), "sigmoid": torch.sigmoid,
    "silu": nn.SiLU(), "leaky_relu": nn.LeakyReLU(), "gelu_pytorch_tanh": nn.GELU("tanh"), "linear": nn.Identity(),
}  # fmt: skip


def like(kind: str) -> str:
    return "distilbert" if kind == "distilbert" else "bert"


def bottleneck_tensors(kind: str, config: dict[str, Any]) -> dict[str, Tensor]:
    tensors = {}
    for layer in (layer for layer in range(LAYERS) if layer not in config["leave_out"]):
        factor = config["reduction_factor"]
        factor = factor.get(str(layer), factor.get("default")) if isinstance(factor, dict) else factor
        width = max(1, int(WIDTH // factor))
        for key, owner in OWNERS[like(kind)].items():
            if not config[key]:
                continue
            seed = 100 * layer + (50 if key == "mh_adapter" else 0)
            place = f"{kind}.{STEM[like(kind)]}.{layer}.{owner}.adapters.{NAME}."
            down = 1 if config["ln_before"] else 0
            found = {
                f"adapter_down.{down}.weight": drawn(seed, width, WIDTH),
                f"adapter_down.{down}.bias": drawn(seed + 1, width),
                "adapter_up.weight": drawn(seed + 2, WIDTH, width), "adapter_up.bias": drawn(seed + 3, WIDTH),
            }  # fmt: skip
            if config["ln_before"]:
                for name in ("adapter_norm_before", "adapter_down.0"):
                    found |= {f"{name}.weight": drawn(seed + 4, WIDTH), f"{name}.bias": drawn(seed + 5, WIDTH)}
            if config["ln_after"]:
                found["adapter_norm_after.weight"] = drawn(seed + 6, WIDTH)
                found["adapter_norm_after.bias"] = drawn(seed + 7, WIDTH)
            if isinstance(config["scaling"], str):
                found["scaling"] = drawn(seed + 8, 1 if config["scaling"] == "learned" else WIDTH)
            tensors |= {place + name: value for name, value in found.items()}
    return tensors


# ---- the library's forward


class Sequential(nn.Module):
    """A bottleneck and the residuals around it, as the library documents them."""

    def __init__(self, config: dict[str, Any], part: dict[str, Tensor]) -> None:
        super().__init__()
        self.config, self.part = config, part

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), self.part[f"{name}.weight"], self.part[f"{name}.bias"], 1e-5)

    def network(self, x: Tensor) -> Tensor:
        part, config = self.part, self.config
        if config["ln_before"]:
            x = self.norm(x, "adapter_norm_before")
        down = f"adapter_down.{1 if config['ln_before'] else 0}"
        x = ACTS[config["non_linearity"]](x @ part[f"{down}.weight"].T + part[f"{down}.bias"])
        x = x @ part["adapter_up.weight"].T + part["adapter_up.bias"]
        return x * part.get("scaling", config["scaling"])

    def forward(self, h: Tensor, r: Tensor, norm: nn.Module) -> Tensor:
        config = self.config
        if config["is_parallel"]:
            y = self.network(r)
            y = self.norm(y, "adapter_norm_after") if config["ln_after"] else y
            return norm(y + h + r)
        x, residual = h, h
        if config["original_ln_before"]:
            x = norm(h + r)
            residual = {"post_add": h + r, True: h, False: x}[config["residual_before_ln"]]
        y = self.network(x)
        if config["adapter_residual_before_ln"]:
            y = y + residual
        if config["ln_after"]:
            y = self.norm(y, "adapter_norm_after")
        if not config["adapter_residual_before_ln"]:
            y = y + residual
        return norm(y + r) if config["original_ln_after"] else y


def with_bottlenecks(net: Net, kind: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    """What the library's model returns: the blocks of transformers with its sublayers in their place."""
    theirs = copy.deepcopy(net)

    def adapter(layer: int, key: str) -> Callable[..., Tensor]:
        place = f"{kind}.{STEM[like(kind)]}.{layer}.{OWNERS[like(kind)][key]}.adapters.{NAME}."
        part = {name.removeprefix(place): value for name, value in tensors.items() if name.startswith(place)}
        return Sequential(config, part) if part else lambda h, r, norm: norm(h + r)

    blocks = theirs.get_submodule(f"{theirs.path}.{STEM[like(kind)]}")
    for index, block in enumerate(blocks):  # type: ignore[arg-type]
        mh, out = adapter(index, "mh_adapter"), adapter(index, "output_adapter")
        if kind == "distilbert":

            def forward(h: Tensor, attention_mask: Any = None, block: Any = block, mh: Any = mh, out: Any = out,
                        **kwargs: Any) -> Tensor:  # fmt: skip
                a = mh(block.attention(h, attention_mask=attention_mask, **kwargs)[0], h, block.sa_layer_norm)
                return out(block.ffn(a), a, block.output_layer_norm)

            block.forward = forward
            continue
        for sub, act in ((block.attention.output, mh), (block.output, out)):
            sub.forward = lambda h, r, sub=sub, act=act: act(sub.dense(h), r, sub.LayerNorm)
    with torch.no_grad():
        return theirs(*batch())


def compiled(net: nn.Module, steps: Any) -> Compilation:
    return rewrite(net, fz.Plan(IDS, steps, targets=()), verify="off")


def check(net: nn.Module, expected: Tensor, steps: Any) -> Compilation:
    done = compiled(net, steps)
    with torch.no_grad():
        assert (expected - net(*batch())).abs().max() > 0.01, "the adapter must do something, or nothing is tested"
    (actual,) = done.program.run(*batch())
    assert (actual - expected).norm() <= 1e-6 * expected.norm()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=3e-6)
    assert {row.outcome for row in done.ledger if row.pass_name.startswith("insert")} == {"rewritten"}
    return done


# ---- bottlenecks


CONFIGS: dict[str, dict[str, Any]] = {
    "seq_bn": BN,
    "double_seq_bn": DOUBLE,
    "par_bn": PARALLEL,
    "scaled_par_bn": {**PARALLEL, "scaling": "learned", "mh_adapter": True},
    "channel": {**BN, "scaling": "channel", "non_linearity": "gelu"},
    "norms": {**DOUBLE, "ln_before": True, "ln_after": True, "non_linearity": "tanh"},
    "norm_around_residual": {**DOUBLE, "ln_after": True, "adapter_residual_before_ln": True},
    "norms_of_pfeiffer": {**BN, "ln_before": True, "ln_after": True, "mh_adapter": True, "scaling": 0.5},
    "norms_in_parallel": {**PARALLEL, "ln_before": True, "ln_after": True, "scaling": 0.5},
    "residual_behind_norm": {**BN, "residual_before_ln": False, "mh_adapter": True},
    "residual_in_own_norm": {**BN, "residual_before_ln": False, "ln_after": True, "adapter_residual_before_ln": True},
    "residual_behind_own_norm": {**BN, "residual_before_ln": False, "ln_after": True},
    "post_add": {**BN, "residual_before_ln": "post_add"},
    "behind_norm": {**BN, "residual_before_ln": False, "original_ln_after": False, "mh_adapter": True},
    "behind_norm_normed": {
        **BN, "residual_before_ln": False, "original_ln_after": False, "ln_after": True,
        "adapter_residual_before_ln": True,
    },
    "factors": {**BN, "reduction_factor": {"1": 8, "default": 2}, "mh_adapter": True},
    "left_out": {**BN, "leave_out": [0]},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_bottleneck_computes_what_the_library_documents(name: str, nets: Any, tmp_path: Path) -> None:
    config, net = CONFIGS[name], nets("bert")
    tensors = bottleneck_tensors("bert", config)
    expected = with_bottlenecks(net, "bert", config, tensors)
    done = check(net, expected, fz.from_adapterhub(save(tmp_path, "bert", config, tensors)))
    sites = [row for row in done.ledger if row.outcome == "rewritten"]
    assert len(sites) >= (config["mh_adapter"] + config["output_adapter"]) * (LAYERS - len(config["leave_out"]))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("roberta", "norms_of_pfeiffer"), ("electra", "par_bn"), ("distilbert", "norms_of_pfeiffer"),
        ("distilbert", "scaled_par_bn"),
    ],
)  # fmt: skip
def test_bottlenecks_of_other_models(name: str, kind: str, nets: Any, tmp_path: Path) -> None:
    config, net = CONFIGS[name], nets(kind)
    tensors = bottleneck_tensors(kind, config)
    expected = with_bottlenecks(net, kind, config, tensors)
    check(net, expected, fz.from_adapterhub(save(tmp_path, kind, config, tensors)))


def test_the_bases_layer_norm_is_read_at_any_size_and_stays_as_it_was(nets: Any, tmp_path: Path) -> None:
    """Proven by the pipeline, with a batch of any size, from a plan that was saved and loaded."""
    net, tensors = nets("bert"), bottleneck_tensors("bert", BN)
    before = copy.deepcopy(net.state_dict())
    (tmp_path / "a").mkdir()
    inputs = [fz.Input(spec.name, ("batch", 6), "int64", spec.low, spec.high) for spec in IDS]
    plan = fz.Plan(inputs, fz.from_adapterhub(save(tmp_path / "a", "bert", BN, tensors)), targets=())
    plan.save(tmp_path / "plan.toml")
    assert 'weights = "a/adapter.safetensors"' in (tmp_path / "plan.toml").read_text()
    loaded = fz.Plan.load(tmp_path / "plan.toml")
    assert loaded == plan
    (actual,) = rewrite(net, loaded).program.run(*batch())
    expected = with_bottlenecks(net, "bert", BN, tensors)
    assert (actual - expected).norm() <= 1e-6 * expected.norm()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_base_lies_where_the_caller_says(nets: Any, tmp_path: Path) -> None:
    net, tensors = Net("bert", "encoder_of_mine").eval(), bottleneck_tensors("bert", PARALLEL)
    expected = with_bottlenecks(net, "bert", PARALLEL, tensors)
    save(tmp_path, "bert", PARALLEL, tensors)
    check(net, expected, fz.from_adapterhub(tmp_path, base="encoder_of_mine"))
    plain = {key.removeprefix("bert."): value for key, value in tensors.items()}  # as a BertModel saves them
    save(tmp_path, "bert", PARALLEL, plain)
    check(net, expected, fz.from_adapterhub(tmp_path, base="encoder_of_mine"))
    assert fz.from_adapterhub(tmp_path)[0].patterns == ("encoder.layer.0.output.dense",)


def test_older_names_of_activations_and_of_the_norm(nets: Any, tmp_path: Path) -> None:
    """Files without a version say gelu for what is gelu_new since; a norm may be there under one of its two names."""
    config = {**DOUBLE, "ln_before": True, "non_linearity": "gelu_new"}
    net, tensors = nets("bert"), bottleneck_tensors("bert", config)
    expected = with_bottlenecks(net, "bert", config, tensors)
    folder = save(tmp_path, "bert", {**config, "non_linearity": "gelu"}, tensors, version=None)
    for name in ("adapter_norm_before", "adapter_down.0"):
        save(folder, "bert", {**config, "non_linearity": "gelu"},
             {key: value for key, value in tensors.items() if name not in key}, version=None)  # fmt: skip
        check(net, expected, fz.from_adapterhub(folder))


@pytest.mark.parametrize("name", list(ACTS))
def test_activations_are_those_of_transformers(name: str) -> None:
    from transformers.activations import get_activation

    from fxfreeze import nn as layers

    theirs = F.leaky_relu if name == "leakyrelu" else get_activation(name)
    layer, x = layers.HubBottleneck(4, 4, activation=name), torch.linspace(-4, 4, 20).view(5, 4)
    with torch.no_grad():
        for linear in (layer.down, layer.up):
            linear.weight.copy_(torch.eye(4))
            linear.bias.zero_()
    torch.testing.assert_close(layer(x), theirs(x), rtol=1e-6, atol=1e-6)


# ---- LoRA and IA3


LORA: dict[str, Any] = {
    "architecture": "lora", "selfattn_lora": True, "intermediate_lora": True, "output_lora": True, "leave_out": [],
    "r": 3, "alpha": 6, "dropout": 0.0, "attn_matrices": ["q", "v"], "composition_mode": "add",
    "init_weights": "lora", "use_gating": False, "dtype": None,
}  # fmt: skip
IA3 = {**LORA, "r": 1, "alpha": 1, "attn_matrices": ["k", "v"], "output_lora": False, "composition_mode": "scale",
       "init_weights": "ia3"}  # fmt: skip
LINEARS = {
    "bert": {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
             "intermediate_lora": "intermediate.dense", "output_lora": "output.dense"},
    "distilbert": {"q": "attention.q_lin", "k": "attention.k_lin", "v": "attention.v_lin",
                   "intermediate_lora": "ffn.lin1", "output_lora": "ffn.lin2"},
}  # fmt: skip


def lora_tensors(net: Net, kind: str, config: dict[str, Any]) -> dict[str, Tensor]:
    tensors = {}
    for layer in (layer for layer in range(LAYERS) if layer not in config["leave_out"]):
        for number, (key, path) in enumerate(LINEARS[like(kind)].items()):
            if key not in config["attn_matrices"] and not config.get(key):
                continue
            path = f"{STEM[like(kind)]}.{layer}.{path}"
            linear, place = net.base.get_submodule(path), f"{kind}.{path}.loras.{NAME}."
            if config["composition_mode"] == "add":
                tensors[f"{place}lora_A"] = drawn(100 * layer + number, config["r"], linear.in_features)  # type: ignore[arg-type]
            tensors[f"{place}lora_B"] = drawn(500 * layer + number, linear.out_features, config["r"])  # type: ignore[arg-type]
    return tensors


def with_loras(net: Net, kind: str, config: dict[str, Any], tensors: dict[str, Tensor], alpha: float) -> Tensor:
    theirs = copy.deepcopy(net)
    for key, b in tensors.items():
        if not key.endswith("lora_B"):
            continue
        linear = theirs.base.get_submodule(key.removeprefix(f"{kind}.").partition(".loras.")[0])
        a = tensors.get(key.replace("lora_B", "lora_A"))

        def hook(module: nn.Module, args: Any, y: Tensor, a: Any = a, b: Tensor = b) -> Tensor:
            return y * b.flatten() if a is None else y + args[0] @ a.T @ b.T * (alpha / config["r"])

        linear.register_forward_hook(hook)
    with torch.no_grad():
        return theirs(*batch())


@pytest.mark.parametrize(
    ("kind", "config", "version", "alpha"),
    [
        ("bert", LORA, "adapters.1.1.0", 6), ("bert", LORA, "adapters.1.0.1", 3),
        ("distilbert", {**LORA, "leave_out": [1], "intermediate_lora": False, "attn_matrices": ["k"]}, "1", 6),
        ("bert", IA3, "adapters.1.2.0", 1), ("roberta", {**IA3, "output_lora": True}, "adapters.0.1.2", 1),
    ],
)  # fmt: skip
def test_loras_and_gains(kind: str, config: Any, version: str, alpha: float, nets: Any, tmp_path: Path) -> None:
    net, tensors = nets(kind), lora_tensors(nets(kind), kind, config)
    (step,) = fz.from_adapterhub(save(tmp_path, kind, config, tensors, version=version))
    done = check(net, with_loras(net, kind, config, tensors, alpha), [step])
    assert len(step.patterns) == sum("lora_B" in key for key in tensors)
    assert not [name for name in done.program.state if name.startswith("adapters.")], "they fold"


@pytest.mark.parametrize(
    ("version", "alpha"),
    [
        ("adapters.0.1.0", 3),
        ("adapters.1.0.1", 3),
        ("adapters.1.1.0", 6),
        ("adapters.2.0.0", 6),
        ("3.2.1", 6),
        (None, 6),
    ],
)
def test_versions_that_ignored_alpha(version: str | None, alpha: int, nets: Any, tmp_path: Path) -> None:
    """Versions 0.1 to 1.0 of the library, and no others, trained with a scale of 1 whatever alpha was."""
    tensors = lora_tensors(nets("bert"), "bert", LORA)
    (step,) = fz.from_adapterhub(save(tmp_path, "bert", LORA, tensors, version=version))
    assert isinstance(step, fz.LoRA) and step.alpha == alpha


# ---- ReFT


LOREFT: dict[str, Any] = {
    "architecture": "reft", "layers": "all", "prefix_positions": 3, "suffix_positions": 0, "r": 2,
    "orthogonality": True, "tied_weights": False, "dropout": 0.05, "non_linearity": None, "output_reft": True,
    "dtype": None,
}  # fmt: skip
DIREFT = {**LOREFT, "orthogonality": False, "subtract_projection": False}


class Unit(nn.Module):
    def __init__(self, config: dict[str, Any], seed: int) -> None:
        super().__init__()
        self.orthogonal, rank = config["orthogonality"], config["r"]
        self.learned_source, projection = nn.Linear(WIDTH, rank), nn.Linear(WIDTH, rank, bias=False)
        self.projection = parametrizations.orthogonal(projection) if self.orthogonal else projection
        for number, (name, value) in enumerate(self.named_parameters()):
            moved = drawn(seed + number, *value.shape)
            # Torch takes only signs off the diagonal, and training leaves it alone.
            value.data = value.data + moved.tril(-1) + moved.triu(1) if "original" in name else moved

    def forward(self, h: Tensor) -> Tensor:
        source = self.learned_source(h)
        if self.orthogonal:
            source = source - self.projection(h)
        return h + source @ self.projection.weight


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("bert", LOREFT), ("distilbert", {**LOREFT, "tied_weights": True, "layers": [1], "prefix_positions": 1}),
        ("bert", DIREFT),
    ],
)  # fmt: skip
def test_edits_of_the_first_positions(kind: str, config: Any, nets: Any, tmp_path: Path) -> None:
    net = nets(kind)
    theirs, tensors = copy.deepcopy(net), {}
    for layer in range(LAYERS) if config["layers"] == "all" else config["layers"]:
        path = f"{STEM[like(kind)]}.{layer}"
        units = [Unit(config, 100 * layer + 10 * number) for number in range(1 if config["tied_weights"] else 2)]
        for number, unit in enumerate(units):
            place = f"{kind}.{path}.reft_layer.refts.{NAME}.units.{number}."
            tensors |= {place + name: value for name, value in unit.state_dict().items()}

        def hook(module: nn.Module, args: Any, out: Tensor, unit: Unit = units[0]) -> Tensor:
            first = config["prefix_positions"]
            return torch.cat([unit(out[:, :first]), out[:, first:]], dim=1)

        theirs.base.get_submodule(path).register_forward_hook(hook)
    with torch.no_grad():
        expected = theirs(*batch())
    (step,) = fz.from_adapterhub(save(tmp_path, kind, config, tensors))
    check(net, expected, [step])
    assert step.kind == ("loreft" if config["orthogonality"] else "direft")


def test_a_projection_that_is_not_orthogonal_any_more_is_refused(nets: Any, tmp_path: Path) -> None:
    """Torch makes rows of 0 of it once weight decay has moved the diagonal of its parameter."""
    config = {**LOREFT, "layers": [0], "tied_weights": True}
    place, unit = f"bert.encoder.layer.0.reft_layer.refts.{NAME}.units.0.", Unit(config, 0)
    save(tmp_path, "bert", config, {place + name: value for name, value in unit.state_dict().items()})
    original = f"{place}projection.parametrizations.weight.original"
    edit_weights(tmp_path, lambda tensors: tensors[original].diagonal().mul_(0.99))
    with pytest.raises(fz.PlanError, match="is not orthogonal, so that it is no LoReFT"):
        compiled(nets("bert"), fz.from_adapterhub(tmp_path))
    base = f"{place}projection.parametrizations.weight.0.base"
    edit_weights(tmp_path, lambda tensors: tensors.update({base: torch.eye(3)}))
    with pytest.raises(fz.PlanError, match=r"has shape \(2, 16\), and its base \(3, 3\)"):
        compiled(nets("bert"), fz.from_adapterhub(tmp_path))


# ---- refusals


def refusal(folder: Path) -> str:
    with pytest.raises(fz.PlanError) as caught:
        fz.from_adapterhub(folder)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t5"}, "model_type = 't5': it is not known where this model's layers are"),
        ({"config": "pfeiffer"}, "config must be a table of keys, got 'pfeiffer'"),
        ({"peft_type": "LORA"}, "fxfreeze.from_peft reads it"),
        ({"name": "other"}, "is no part of an adapter 'other'"),
        ({"config__architecture": "prompt_tuning"}, "without positions and a LayerNorm"),
        ({"config__architecture": "prefix_tuning"}, "one network for all layers"),
        ({"config__architecture": "union"}, "several methods in one"),
        ({"config__architecture": "mtl_lora"}, "config.architecture = 'mtl_lora': it is unknown here"),
        ({"config__phm_layer": True}, "config.phm_layer = True: its weights are sums of Kronecker products"),
        ({"config__use_gating": True}, "config.use_gating = True: a gate that averages"),
        ({"config__cross_adapter": True}, "config.cross_adapter = True"),
        ({"config__inv_adapter": "nice"}, "config.inv_adapter = 'nice': an invertible adapter changes the embeddings"),
        ({"config__frobnicate": 2}, "config.frobnicate = 2: an unknown key"),
        ({"config__non_linearity": "prelu"}, "config.non_linearity = 'prelu': must be one of"),
        ({"config__scaling": "some"}, "config.scaling = 'some': must be a number"),
        ({"config__scaling": "learned"}, "is of an adapter with"),
        ({"config__ln_after": True}, "adapters.adapter_norm_after.weight"),
        ({"config__ln_before": True}, "adapters.adapter_down.1.weight"),
        ({"config__reduction_factor": 2}, "the width 8, but the weights file has 4"),
        ({"config__reduction_factor": {"0": 4}}, "gives layer 1 no number > 0"),
        ({"config__mh_adapter": True}, "holds no adapter of bert.encoder.layer.0.attention.output"),
        ({"config__output_adapter": False}, "puts an adapter nowhere"),
        ({"config__leave_out": [1]}, "holds an adapter of bert.encoder.layer.1.output, which the configuration"),
        ({"config__original_ln_after": False}, "config.original_ln_after = False: what leaves the sublayer would lack"),
        ({"config__original_ln_after": False, "config__original_ln_before": False}, "config.original_ln_after = False"),
        ({"config__original_ln_after": False, "config__is_parallel": True}, "config.original_ln_after = False"),
        ({"config__residual_before_ln": "post_add", "config__original_ln_before": False}, "with original_ln_before"),
        ({"config__residual_before_ln": "odd"}, "must be true, false or 'post_add'"),
        ({"config__ln_after": True, "config__adapter_residual_before_ln": True}, "takes the place of a residual"),
    ],
)
def test_what_no_step_can_do_is_refused(changes: Any, message: str, tmp_path: Path) -> None:
    save(tmp_path, "bert", BN, bottleneck_tensors("bert", BN))
    edit(tmp_path, config__dropout=0.3, config__stochastic_depth=0.1, config__some=None)
    fz.from_adapterhub(tmp_path)
    edit(tmp_path, **changes)
    assert message in refusal(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_gating": True}, "config.use_gating = True"),
        ({"r": 5}, "config.r = 5: bert.encoder.layer.0"),
        ({"composition_mode": "odd"}, "must be 'add' or 'scale'"),
        ({"composition_mode": "scale"}, "is of an adapter with loras.lora_B"),
        ({"attn_matrices": ["q"]}, "holds an adapter of bert.encoder.layer.0.attention.self.value"),
        ({"output_lora": False}, "holds an adapter of bert.encoder.layer.0.output.dense"),
        ({"vera_d": 0.1}, "config.vera_d = 0.1: its matrices are trained square ones times two that all layers share"),
        ({"use_dora": True}, "config.use_dora = True: its magnitudes scale the bias too"),
        ({"frobnicate": 0.1}, "config.frobnicate = 0.1: an unknown key"),
    ],
)
def test_loras_that_no_step_is_are_refused(changes: Any, message: str, nets: Any, tmp_path: Path) -> None:
    save(tmp_path, "bert", {**LORA, **changes}, lora_tensors(nets("bert"), "bert", LORA))
    assert message in refusal(tmp_path)
    save(tmp_path, "bert", {**IA3, "alpha": 2}, lora_tensors(nets("bert"), "bert", IA3))
    assert "config.alpha = 2: with composition_mode 'scale'" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suffix_positions": 1}, "config.suffix_positions = 1: they count from the last token that is no padding"),
        ({"prefix_positions": 0}, "no position is edited"),
        ({"non_linearity": "relu"}, "an activation inside of the edit"),
        ({"orthogonality": False}, "direft and noreft save the same configuration"),
        ({"orthogonality": False, "subtract_projection": True}, "noreft"),
        ({"orthogonality": False, "subtract_projection": False}, "is of an adapter with"),
        ({"subtract_projection": False}, "no step leaves out the difference"),
        ({"tied_weights": True}, "refts.units.1."),
        ({"layers": [0]}, "holds an adapter of bert.encoder.layer.1.reft_layer"),
        ({"r": 3}, "config.r = 3: bert.encoder.layer.0 has rank 2"),
    ],
)
def test_edits_that_no_step_is_are_refused(changes: Any, message: str, tmp_path: Path) -> None:
    tensors = {
        f"bert.encoder.layer.{layer}.reft_layer.refts.{NAME}.units.{unit}.{name}": value.clone()
        for layer in range(2) for unit in range(2) for name, value in Unit(LOREFT, unit).state_dict().items()
    }  # fmt: skip
    save(tmp_path, "bert", {**LOREFT, **changes}, tensors)
    assert message in refusal(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**BN, "phm_layer": True}, "config.phm_layer = True: its weights are sums of Kronecker products"),
        ({**LORA, "vera_d": 0.1}, "config.vera_d = 0.1: its matrices are trained square ones"),
    ],
)
def test_a_refusal_names_the_key_also_where_the_file_has_tensors_that_all_layers_share(
    config: Any, message: str, tmp_path: Path
) -> None:
    save(tmp_path, "bert", config, {f"bert.shared_parameters.{NAME}.lora_A": drawn(0, 3, WIDTH)})
    assert message in refusal(tmp_path)


def test_a_seed_that_only_drew_the_first_values_is_no_reason(nets: Any, tmp_path: Path) -> None:
    save(tmp_path, "bert", {**BN, "init_weights_seed": 7}, bottleneck_tensors("bert", BN))
    assert len(fz.from_adapterhub(tmp_path)) == 1


def test_the_first_input_of_an_electra_is_not_known(tmp_path: Path) -> None:
    config = {**PARALLEL, "mh_adapter": True}
    save(tmp_path, "electra", config, bottleneck_tensors("electra", config))
    assert "config.mh_adapter = True: what the first layer of a electra is given" in refusal(tmp_path)


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    place = f"bert.encoder.layer.0.output.adapters.{NAME}.adapter_up"
    save(tmp_path, "bert", BN, bottleneck_tensors("bert", BN))
    edit_weights(tmp_path, lambda tensors: tensors.pop(f"{place}.bias"))
    assert "bert.encoder.layer.0.output has adapters.adapter_down.0.bias" in refusal(tmp_path)
    invertible = f"bert.invertible_adapters.{NAME}.F.0.weight"
    edit_weights(tmp_path, lambda tensors: tensors.update({invertible: torch.ones(2)}))
    assert "an invertible adapter changes the embeddings" in refusal(tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors.clear())
    assert "holds no weights at all" in refusal(tmp_path)
    save(tmp_path, "bert", BN, {**bottleneck_tensors("bert", BN), f"a.{place}.odd": torch.ones(1)})
    assert "adapters of several models: a.bert, bert" in refusal(tmp_path)
    weights, config = tmp_path / "adapter.safetensors", tmp_path / "adapter_config.json"
    weights.rename(tmp_path / "pytorch_adapter.bin")
    assert "nothing is unpickled" in refusal(tmp_path) and "use_safetensors=True" in refusal(tmp_path)
    config.unlink()
    assert "no AdapterHub checkpoint" in refusal(tmp_path)


def test_what_older_files_lack_has_the_librarys_defaults(tmp_path: Path) -> None:
    tensors = bottleneck_tensors("bert", DOUBLE)
    whole = fz.from_adapterhub(save(tmp_path, "bert", DOUBLE, tensors))
    few = {key: DOUBLE[key] for key in ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity")}
    assert fz.from_adapterhub(save(tmp_path, "bert", few, tensors)) == whole
    for key in ("mh_adapter", "output_adapter"):
        save(tmp_path, "bert", {name: value for name, value in few.items() if name != key}, tensors)
        assert "which the configuration does not name" in refusal(tmp_path)


def test_an_invertible_adapter_that_a_task_adapter_never_had_is_no_reason(tmp_path: Path) -> None:
    """The first versions said of task adapters that they had one, and the library takes it back when it loads them."""
    save(tmp_path, "bert", {**BN, "inv_adapter": "nice"}, bottleneck_tensors("bert", BN), type="text_task")
    assert len(fz.from_adapterhub(tmp_path)) == 1
