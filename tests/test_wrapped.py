"""Live peft models, given as they are: their adapters fold, and what is no one weight stays, with the reason."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.api import Compilation, rewrite
from fxfreeze.capture import capture

peft = pytest.importorskip("peft", reason="peft is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        self.embed, self.c1d, self.fc = nn.Embedding(11, 8), Conv1D(8, 8), nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1) if layer is None else layer
        self.point, self.head = nn.Conv2d(8, 4, 1), nn.Linear(4, 11, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.fc(torch.tanh(self.c1d(self.embed(ids)))))
        h = torch.tanh(self.conv(h.transpose(1, 2)))
        return self.head(torch.tanh(self.point(h.unsqueeze(-1))).mean((2, 3)))


IDS = [fz.Input("ids", ("batch", 5), "int64", 0, 10)]
X = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(2))


def wrap(config: Any, model: nn.Module | None = None) -> Any:
    theirs = peft.get_peft_model(Net() if model is None else model, config).eval()
    draw(theirs)
    return theirs


def draw(theirs: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in theirs.parameters():
            if value.requires_grad:
                value.add_(torch.randn(value.shape, generator=generator) * 0.3)


def compiled(model: nn.Module, steps: Any = (), verify: Any = "sampled") -> Compilation:
    return rewrite(model, fz.Plan(IDS, steps, targets=()), verify=verify)


def check(model: Any, bare: nn.Module, steps: Any = (), tolerance: float = 1e-6) -> Compilation:
    """Compile a peft model: what it computes, in the graph of the bare model, and left as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(X)
    done = compiled(model, steps)
    torch.testing.assert_close(done.program.run(X)[0], expected, rtol=tolerance, atol=tolerance)
    assert done.program.structural_hash() == compiled(bare, verify="off").program.structural_hash()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all("forward" not in vars(module) for module in model.modules())
    return done


ALL = ["embed", "c1d", "fc", "conv", "point"]
CONFIGS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=ALL),
    "lora_bias": lambda: peft.LoraConfig(r=3, lora_bias=True, use_rslora=True, target_modules=["c1d", "fc", "conv"]),
    "dora": lambda: peft.LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=ALL),
    "ia3": lambda: peft.IA3Config(target_modules=["c1d", "fc", "point"], feedforward_modules=["point", "c1d"]),
    "vera": lambda: peft.VeraConfig(r=5, target_modules=["c1d", "fc"]),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=["embed", "fc", "point"]),
    "coft": lambda: peft.OFTConfig(
        oft_block_size=2, coft=True, eps=0.5, use_cayley_neumann=False, target_modules=["fc"]
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_active_adapters_fold(name: str) -> None:
    theirs = wrap(CONFIGS[name]())
    with torch.no_grad():
        theirs(X)  # coft projects its parameters when it runs
    done = check(theirs, Net())
    sites = {row.site for row in done.ledger if row.requested.startswith("adapter of peft")}
    assert sites == {path for path, module in theirs.base_model.model.named_modules() if hasattr(module, "base_layer")}
    assert {"fc.weight", "fc.bias"} < set(done.program.state)
    assert {row.outcome for row in done.ledger} == {"rewritten", "measured"}


def test_the_model_inside_is_recognised_too() -> None:
    theirs = wrap(CONFIGS["lora"]())
    for model in (theirs.base_model, theirs.base_model.model):
        check(model, Net())


def test_several_adapters_are_those_that_are_active() -> None:
    theirs = wrap(peft.LoraConfig(r=2, target_modules=["fc", "conv"]))
    theirs.add_adapter("other", peft.LoraConfig(r=3, lora_alpha=7, target_modules=["fc", "c1d"]))
    theirs.set_adapter("other")
    draw(theirs)
    check(theirs, Net())
    theirs.base_model.set_adapter(["default", "other"])
    check(theirs, Net())


def test_rotations_compose_in_the_order_of_the_adapters() -> None:
    theirs = wrap(peft.OFTConfig(oft_block_size=4, target_modules=["embed", "fc"]))
    theirs.add_adapter("other", peft.OFTConfig(oft_block_size=8, target_modules=["embed", "fc", "point"]))
    theirs.set_adapter("other")
    draw(theirs)
    theirs.base_model.set_adapter(["default", "other"])
    check(theirs, Net())


def test_merged_and_disabled_adapters_do_what_peft_does() -> None:
    theirs = wrap(peft.LoraConfig(r=2, target_modules=["fc", "conv"]))
    with torch.no_grad():
        on = theirs(X)
        with theirs.disable_adapter():
            off = check(theirs, Net()).program.run(X)[0]
    assert (on - off).abs().max() > 0.01
    theirs.merge_adapter()
    torch.testing.assert_close(check(theirs, Net()).program.run(X)[0], on, rtol=1e-5, atol=1e-5)
    for module in theirs.modules():
        if hasattr(module, "base_layer"):
            module._disable_adapters = True
    with pytest.raises(fz.CaptureError, match="merged and disabled"):
        compiled(theirs)


def test_modules_to_save_are_those_in_use() -> None:
    theirs = wrap(peft.LoraConfig(r=2, target_modules=["fc"], modules_to_save=["head"]))
    done = check(theirs, Net())
    assert "head.weight" in done.program.state
    with theirs.disable_adapter():
        check(theirs, Net())


def test_a_plan_names_layers_as_the_user_does(tmp_path: Path) -> None:
    theirs = wrap(peft.LoraConfig(r=2, target_modules=["fc"]))
    net = fz.adapt(theirs, fz.Plan(IDS, [fz.LoRA(at=["fc", "c1d"], rank=2)]), verify="off")
    torch.testing.assert_close(net(X), theirs(X), rtol=1e-6, atol=1e-6)
    draw(net)
    done = rewrite(net, net.plan, verify="sampled")
    torch.testing.assert_close(done.program.run(X)[0], net(X).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ["head", "embed"])
def test_a_tied_weight_changes_where_it_is_adapted_only(target: str) -> None:
    model = Net()
    model.head = nn.Linear(8, 11, bias=False)
    model.point = nn.Conv2d(8, 8, 1)
    model.head.weight = model.embed.weight
    theirs = wrap(peft.LoraConfig(r=2, target_modules=[target]), copy.deepcopy(model))
    with torch.no_grad():
        expected, base = theirs(X), model(X)
    done = compiled(theirs)
    assert (expected - base).abs().max() > 0.01
    torch.testing.assert_close(done.program.run(X)[0], expected, rtol=1e-6, atol=1e-6)
    assert [name for name in done.program.state if torch.equal(done.program.state[name], model.embed.weight)]
    assert [row.site for row in done.ledger if row.outcome == "measured"] == [target]


LEFT: dict[str, tuple[Any, Any, str]] = {
    "reflect": (lambda: nn.Conv1d(8, 8, 3, padding=1, padding_mode="reflect"), {}, "pads by 'reflect'"),
    "dilation": (lambda: nn.Conv1d(8, 8, 3, padding="same", dilation=2), {}, "is dilated"),
    "groups": (lambda: nn.Conv1d(8, 8, 3, padding=1, groups=2), {}, "mixes the groups"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_no_one_weight_stays_as_peft_runs_it(name: str) -> None:
    layer, options, reason = LEFT[name]
    theirs = wrap(peft.LoraConfig(r=2, target_modules=["conv", "fc"], **options), Net(layer()))
    with torch.no_grad():
        expected = theirs(X)
    done = compiled(theirs)
    torch.testing.assert_close(done.program.run(X)[0], expected, rtol=1e-6, atol=1e-6)
    (row,) = [row for row in done.ledger if row.outcome == "refused"]
    assert row.site == "conv" and reason in row.detail
    assert {"fc.weight", "conv.weight"} < set(done.program.state)


def test_what_bfloat16_would_lose_is_refused() -> None:
    theirs = wrap(peft.LoraConfig(r=2, target_modules=["fc"]), Net().bfloat16())
    compiled(theirs)
    with torch.no_grad():
        theirs.base_model.model.fc.lora_B["default"].weight.mul_(1e-3)
    with pytest.raises(fz.PassError, match="of its change is lost"):
        compiled(theirs)


def test_importing_fxfreeze_does_not_need_peft_to_recognise_it() -> None:
    theirs = wrap(CONFIGS["oft"]())
    program, _ = capture(theirs, fz.Plan(IDS))
    assert {"embed", "fc", "point", "head"} <= set(program.module_paths())
    assert not [path for path in [*program.module_paths(), *program.state] if "base_" in path]
