"""fz.adapt: a module that trains its adapters and nothing else, and goes on to be compiled."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import fxfreeze as fz
from fxfreeze.api import rewrite

FLOAT64 = {"dtype": "float64"}


def digest(model: nn.Module) -> str:
    sha = hashlib.sha256()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        sha.update(name.encode() + value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def train(net: nn.Module, amount: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * amount)


class Small(nn.Module):
    """A CNN with batch-norm and dropout, two inputs, and a nested result."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(4, 3)
        self.bn.running_mean.normal_()  # type: ignore[union-attr, operator]
        self.bn.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]

    def forward(self, batch: dict[str, Tensor], shift: Tensor) -> dict[str, Any]:
        h = F.gelu(self.bn(self.conv(batch["image"]))).mean((2, 3)) + shift
        return {"logits": self.fc(self.drop(h)), "parts": (h, [h.sum(-1)])}


def plan(*steps: Any, targets: Any = ("torch",)) -> fz.Plan:
    steps = steps or (fz.LoRA(at=["conv", "fc"], rank=2, alpha=4), fz.IA3(at="fc"))
    inputs = [fz.Input("batch.image", ("batch", 2, 5, 5)), fz.Input("shift", ("batch", 4))]
    return fz.Plan(inputs, steps, targets)


def batch(n: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(n)
    return {
        "batch": {"image": torch.randn(n, 2, 5, 5, generator=generator)},
        "shift": torch.randn(n, 4, generator=generator),
    }


@pytest.fixture(scope="module")
def shared() -> tuple[Small, fz.AdaptedModule]:
    model = Small().eval()
    return model, fz.adapt(model, plan())


@pytest.fixture
def small(shared: tuple[Small, fz.AdaptedModule]) -> tuple[Small, fz.AdaptedModule]:
    """A model and a net of its own that share their weights."""
    model, net = shared
    return model, fz.AdaptedModule(net.origins)


# ---- calling


def test_it_computes_what_the_model_computes(small: Any) -> None:
    model, net = small
    for n in (1, 4):
        expected, actual = model(**batch(n)), net(**batch(n))
        torch.testing.assert_close(actual["logits"], expected["logits"])
        torch.testing.assert_close(actual["parts"], expected["parts"])
        assert isinstance(actual["parts"], tuple) and isinstance(actual["parts"][1], list)
    inputs = batch()
    torch.testing.assert_close(net(inputs["batch"], inputs["shift"])["logits"], model(**inputs)["logits"])


def test_a_dataclass_comes_back_as_a_dict() -> None:
    @dataclass
    class Output:
        logits: Tensor

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Output:
            return Output(self.fc(x))

    torch.export.register_dataclass(Output)
    net = fz.adapt(Net(), fz.Plan([fz.Input("x", ("batch", 4))], [fz.LoRA(at="fc", rank=1)]))
    assert set(net(torch.randn(2, 4))) == {"logits"}


def test_inputs_that_do_not_fit_are_refused(small: Any) -> None:
    _, net = small
    good = batch()
    with pytest.raises(fz.PlanError, match=r"shape \(3, 2, 6, 5\), expected \(batch, 2, 5, 5\): axis 2 is 6"):
        net({"image": torch.randn(3, 2, 6, 5)}, good["shift"])
    with pytest.raises(fz.PlanError, match="shift"):
        net(good["batch"], torch.randn(2, 4))
    with pytest.raises(fz.PlanError, match="missing"):
        net(good["batch"])


def test_training_mode_makes_no_difference(small: Any) -> None:
    _, net = small
    first = net.train()(**batch())["logits"]
    assert torch.equal(first, net(**batch())["logits"])  # no dropout
    assert torch.equal(first, net.eval()(**batch())["logits"])


# ---- what trains


def test_only_adapters_train_and_the_model_stays_as_it_was(small: Any) -> None:
    model, net = small
    before, modes = digest(model), [module.training for module in model.modules()]
    assert {name.split(".")[0] for name, _ in net.named_parameters()} == {"adapters"}
    assert all(value.requires_grad for value in net.adapter_parameters())
    assert not any(value.requires_grad for value in net.buffers())
    pointers = {value.data_ptr() for value in model.parameters()}
    assert pointers <= {value.data_ptr() for value in net.buffers()}  # shared, not copied
    first = net(**batch())["logits"].detach()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net.train()(**batch())["logits"].square().sum().backward()
        optimizer.step()
    assert (net(**batch())["logits"] - first).abs().max() > 0.01
    assert all(value.grad is None for value in model.parameters())
    assert digest(model) == before and [module.training for module in model.modules()] == modes


def test_moving_or_loading_does_not_reach_the_model(small: Any) -> None:
    model, net = small
    before = digest(model)
    state = {name: torch.randn_like(value) for name, value in net.state_dict().items()}
    net.load_state_dict(state)
    net.double().float()
    assert digest(model) == before
    with torch.no_grad():
        for value in net.double().buffers():
            value.zero_()
    assert digest(model) == before


CHECKED: dict[str, tuple[Any, list[fz.Input], list[Any]]] = {
    "linear": (nn.Linear(3, 4), [fz.Input("x", ("batch", 3), **FLOAT64)], []),
    "conv2d": (nn.Conv2d(2, 3, 2, padding=1, dilation=2), [fz.Input("x", ("batch", 2, 4, 3), **FLOAT64)], []),
    "conv2d-groups": (nn.Conv2d(4, 2, 2, groups=2), [fz.Input("x", ("batch", 4, 3, 3), **FLOAT64)], []),
    "transposed": (nn.ConvTranspose1d(4, 2, 2, groups=2), [fz.Input("x", ("batch", 4, 3), **FLOAT64)], []),
    "embedding": (nn.Embedding(5, 3), [fz.Input("x", ("batch", 4), "int64", 0, 4)], []),
    "Conv1D": (None, [fz.Input("x", ("batch", 3), **FLOAT64)], []),
}


@pytest.mark.parametrize("case", CHECKED)
def test_gradients_agree_with_finite_differences(case: str) -> None:
    from transformers.pytorch_utils import Conv1D

    layer, inputs, _ = CHECKED[case]
    model = nn.Sequential(layer if layer is not None else Conv1D(4, 3), nn.Tanh()).double()
    steps = [fz.LoRA(at="0", rank=2, alpha=3), fz.IA3(at="0"), fz.IA3(at="0", side="in")]
    net = fz.adapt(model, fz.Plan(inputs, steps), verify="off")
    train(net)
    torch.manual_seed(0)
    shape = [2 if isinstance(size, str) else size for size in inputs[0].shape]
    x = torch.randint(0, 5, shape) if case == "embedding" else torch.randn(shape, dtype=torch.float64)
    state = dict(net.named_parameters())
    assert len(state) == 4

    def run(*values: Tensor) -> Any:
        return functional_call(net, dict(zip(state, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, tuple(value.detach().requires_grad_() for value in state.values()))


@pytest.mark.parametrize("layer", [nn.Linear(3, 4), nn.Conv1d(4, 4, 2, groups=2)], ids=["linear", "conv"])
def test_gradients_of_dora_treat_the_norm_as_a_constant(layer: nn.Module) -> None:
    """Section 4.3 of the paper: the norm follows the weight but gets no gradient. Finite differences of the layer with
    the norm held where it is must agree with what backward gives."""
    model = nn.Sequential(layer, nn.Tanh()).double()
    shape = (3,) if isinstance(layer, nn.Linear) else (4, 3)
    spec = fz.Input("x", ("batch", *shape), **FLOAT64)
    net = fz.adapt(model, fz.Plan([spec], [fz.DoRA(at="0", rank=2)]), verify="off")
    train(net)
    x, base = torch.randn(2, *shape, dtype=torch.float64), model[0].weight.detach()
    a, b, m = (value.detach().requires_grad_() for value in net.parameters())

    def direction(a: Tensor, b: Tensor) -> Tensor:
        return base + (b.flatten(1) @ a.flatten(1)).reshape(base.shape)

    norm = direction(a, b).detach().flatten(1).norm(dim=1)

    def held(a: Tensor, b: Tensor, m: Tensor) -> Tensor:
        weight = direction(a, b) * (m / norm).reshape(-1, *[1] * (base.ndim - 1))
        return torch.tanh(functional_call(model[0], {"weight": weight, "bias": model[0].bias.detach()}, (x,)))

    torch.testing.assert_close(held(a, b, m), net(x))
    assert torch.autograd.gradcheck(held, (a, b, m))
    held(a, b, m).square().sum().backward()
    net(x).square().sum().backward()
    for mine, theirs in zip(net.parameters(), (a, b, m), strict=True):
        assert theirs.grad is not None and theirs.grad.abs().max() > 1e-3
        torch.testing.assert_close(mine.grad, theirs.grad)


# ---- state


def test_state_dict_holds_the_adapters_alone(small: Any) -> None:
    _, net = small
    assert list(net.state_dict()) == list(net.adapter_state()) == [name for name, _ in net.named_parameters()]
    train(net)
    twin = fz.AdaptedModule(net.origins)
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(**batch())["logits"], net(**batch())["logits"])


def test_adapters_save_and_load(small: Any, tmp_path: Path) -> None:
    _, net = small
    train(net)
    file = tmp_path / "a.safetensors"
    net.save_adapters(file)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]
    with safetensors.safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    assert metadata["format"] == "fxfreeze.adapters" and metadata["version"] == "1" and len(metadata["plan"]) == 64
    lora, ia3 = {"kind": "lora", "rank": 2, "scale": 2.0}, {"kind": "ia3", "side": "out"}
    assert json.loads(metadata["steps"]) == {"lora": lora, "ia3": ia3}
    twin = fz.AdaptedModule(net.origins)
    twin.load_adapters(file)
    assert torch.equal(twin(**batch())["logits"], net(**batch())["logits"])


def test_bad_adapter_files_are_refused_and_change_nothing(small: Any, tmp_path: Path) -> None:
    _, net = small
    before, file = net.adapter_state(), tmp_path / "a.safetensors"
    name = "adapters.lora.fc.lora_A"
    for change, text in [
        ({name: torch.zeros(4, 2)}, r"lora_A has shape \(4, 2\), but \(2, 4\)"),
        ({"adapters.lora.fd.lora_A": torch.zeros(1)}, r"unexpected: adapters\.lora\.fd\.lora_A"),
        ({name: torch.full((2, 4), float("nan"))}, "NaN or Inf"),
    ]:
        safetensors.torch.save_file({**before, **change}, file)
        with pytest.raises(fz.PlanError, match=text):
            net.load_adapters(file)
    safetensors.torch.save_file({key: value for key, value in before.items() if key != name}, file)
    with pytest.raises(fz.PlanError, match="missing: " + name):
        net.load_adapters(file)
    safetensors.torch.save_file(before, file, {"format": "fxfreeze.adapters", "version": "2", "steps": "{}"})
    with pytest.raises(fz.PlanError, match="version 2"):
        net.load_adapters(file)
    assert all(torch.equal(before[key], value) for key, value in net.adapter_state().items())


class Normed(nn.Module):
    """Holds a buffer and a frozen parameter beside what it trains."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bn, self.mix = nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.bn.running_mean.fill_(3.0)  # type: ignore[union-attr, operator]
        self.mix.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.mix(x))  # type: ignore[no-any-return]


def spliced(layer: nn.Module, name: str) -> fz.AdaptedModule:
    splice = fz.Splice(layer.eval(), at="fc", name=name)
    return fz.adapt(Small().eval(), plan(splice, fz.VeRA(at="fc", rank=2), fz.Gate(at="conv", on="output")))


def other_constants() -> Normed:
    layer = Normed()
    with torch.no_grad():
        layer.mix.weight.mul_(2)
        layer.bn.running_mean.zero_()  # type: ignore[union-attr, operator]
    return layer


def test_files_hold_what_a_spliced_module_does_not_train(tmp_path: Path) -> None:
    layer, file = Normed(), tmp_path / "a.safetensors"
    net = spliced(layer, "constant_9")  # as the module calls a weight of the model's
    held = {f"frozen.constant_9.fc.{leaf}" for leaf in ("bn.running_mean", "bn.running_var", "mix.weight")}
    assert {name for name in net.state_dict() if name.startswith("frozen.")} == held
    assert not held & net.adapter_state().keys() and [value.ndim for value in net.temperatures] == [0]
    train(net)
    wanted = net(**batch())["logits"].detach()
    net.save_adapters(file)
    with torch.no_grad():
        layer.bn.running_mean.zero_()  # type: ignore[union-attr, operator]
    assert torch.equal(net(**batch())["logits"], wanted)  # the net has a copy
    theirs = other_constants()
    twin, before = spliced(theirs, "constant_9"), digest(theirs)
    assert twin(**batch())["logits"].shape == wanted.shape
    twin.load_adapters(file)
    assert torch.equal(twin(**batch())["logits"], wanted) and digest(theirs) == before
    assert torch.equal(twin.reference(*batch()["batch"].values(), batch()["shift"])[0], wanted)
    again = fz.AdaptedModule(spliced(other_constants(), "constant_9").origins)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(**batch())["logits"], wanted)


def test_constants_in_a_file_are_checked_and_may_be_left_out(tmp_path: Path) -> None:
    net, file = spliced(Normed(), "n"), tmp_path / "a.safetensors"
    net.save_adapters(file)
    stored = safetensors.torch.load_file(file)
    constants = {key: value for key, value in stored.items() if key.startswith("frozen.")}
    twin = spliced(other_constants(), "n")
    wanted = twin(**batch())["logits"]
    safetensors.torch.save_file({key: value for key, value in stored.items() if key not in constants}, file)
    twin.load_adapters(file)  # of another origin: the module keeps what it came with
    assert torch.equal(twin(**batch())["logits"], wanted)
    mean = "frozen.n.fc.bn.running_mean"
    for change, text in (
        ({mean: torch.zeros(4)}, r"running_mean has shape \(4,\), but \(3,\)"),
        ({mean: torch.zeros(3, dtype=torch.int64)}, "running_mean is torch.int64"),
        ({mean: None}, "missing: frozen.n.fc.bn.running_mean"),
    ):
        bad = {key: value for key, value in (stored | change).items() if value is not None}
        safetensors.torch.save_file(bad, file)
        with pytest.raises(fz.PlanError, match=text):
            twin.load_adapters(file)
        assert torch.equal(twin(**batch())["logits"], wanted)


def test_a_killed_save_leaves_the_old_file(small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, net = small
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"old")

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(fz.PlanError, match="No space left"):
        net.save_adapters(file)
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


def test_copies_are_independent(small: Any) -> None:
    _, net = small
    train(net)
    twin = copy.deepcopy(net)
    assert torch.equal(twin(**batch())["logits"], net(**batch())["logits"])
    before = net(**batch())["logits"].detach()
    train(twin)
    assert torch.equal(net(**batch())["logits"], before)
    assert list(twin.state_dict()) == list(net.state_dict())
    twin.program().verify()
    assert torch.equal(twin.reference(*batch()["batch"].values(), batch()["shift"])[0], twin(**batch())["logits"])
    optimizer = torch.optim.Adam(net.parameters())
    optimizer.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(net)


def test_a_program_is_a_snapshot(small: Any) -> None:
    _, net = small
    train(net)
    program, inputs = net.program(), batch()
    flat = (inputs["batch"]["image"], inputs["shift"])
    before = net(**inputs)["logits"].detach()
    reference = net.reference
    train(net)
    assert torch.equal(program.run(*flat)[0], before) and torch.equal(reference(*flat)[0], before)
    assert not reference(*flat)[0].requires_grad


def test_a_diverged_adapter_is_not_compiled(small: Any) -> None:
    _, net = small
    net.adapters.lora.fc.lora_A.data[0, 0] = float("nan")  # type: ignore[union-attr, operator]
    with pytest.raises(fz.PlanError, match=r"adapters\.lora\.fc\.lora_A holds NaN or Inf"):
        rewrite(net, net.plan)


# ---- adapting


def test_untrained_adapters_move_nothing_and_the_ledger_names_every_site(shared: Any) -> None:
    _, net = shared
    row = next(row for row in net.origins.proofs if row.pass_name == "insert-delta")
    assert not row.exact and row.error < 1e-12
    assert [(row.site, row.step, row.requested) for row in net.ledger] == [
        ("conv", "lora", "LoRA rank 2, scale 2"),
        ("fc", "lora", "LoRA rank 2, scale 2"),
        ("fc", "ia3", "IA3 on the output"),
    ]


def test_a_plan_without_steps_adapts_nothing() -> None:
    net = fz.adapt(Small(), plan().model_copy(update={"steps": ()}))
    assert not list(net.parameters())
    net(**batch())


def test_example_inputs_are_used(shared: Any) -> None:
    class Positive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Any:
            return self.fc(x.sqrt())  # NaN on the usual draws

    one = fz.Plan([fz.Input("x", ("batch", 2))], [fz.LoRA(at="fc", rank=1)])
    net = fz.adapt(Positive(), one, example_inputs=torch.rand(3, 2))
    assert rewrite(net, one).examples is not None


# ---- compiling


def test_an_adapted_module_compiles_to_the_bare_graph(small: Any) -> None:
    model, net = small
    train(net)
    before, inputs = digest(model), batch()
    done = rewrite(net, plan(targets=["torch", "onnx"]))
    kinds = [str(node.target) for node in done.program.graph.nodes if node.op == "call_function"]
    assert kinds.count("aten.linear.default") == 1 and kinds.count("aten.conv2d.default") == 1
    assert not any("batch_norm" in kind or "mul" in kind for kind in kinds)
    actual = done.program.run(inputs["batch"]["image"], inputs["shift"])[0]
    torch.testing.assert_close(actual, net(**inputs)["logits"].detach())
    folds = [row for row in done.passes if row.name == "fold-delta"]
    assert len(folds) == 1 and folds[0].error is not None and folds[0].error <= 1e-10
    stages = [row.pass_name for row in done.ledger]
    assert stages.index("insert-delta") < stages.index("fold-delta")
    assert digest(model) == before


def test_trained_weights_named_in_the_plan_compile_in_one_go(small: Any, tmp_path: Path) -> None:
    model, net = small
    train(net)
    file = tmp_path / "a.safetensors"
    net.save_adapters(file)
    steps = [fz.LoRA(at=["conv", "fc"], rank=2, alpha=4, weights=file), fz.IA3(at="fc", weights=file)]
    done, inputs = rewrite(model, plan(*steps)), batch()
    actual = done.program.run(inputs["batch"]["image"], inputs["shift"])[0]
    torch.testing.assert_close(actual, net(**inputs)["logits"].detach())


def test_another_plan_is_refused(small: Any) -> None:
    _, net = small
    with pytest.raises(fz.PlanError, match=r"steps: .*number 0 is LoRA.*rank=3"):
        rewrite(net, plan(fz.LoRA(at=["conv", "fc"], rank=3, alpha=4), fz.IA3(at="fc")))
    with pytest.raises(fz.PlanError, match=r"steps: .*1 of them instead of 2"):
        rewrite(net, plan(fz.LoRA(at=["conv", "fc"], rank=2, alpha=4)))
    with pytest.raises(fz.PlanError, match="outputs:"):
        rewrite(net, plan().model_copy(update={"outputs": ("logits",)}))
