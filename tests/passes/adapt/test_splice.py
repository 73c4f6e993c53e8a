"""fz.Splice and fz.Head: modules of the caller's in the graph, where they go, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze.api import rewrite
from fxfreeze.errors import CaptureError, PlanError

INPUT = [fz.Input("x", shape=("batch", 8))]


class Bottleneck(nn.Module):
    def __init__(self, width: int, rank: int = 3) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)

    def forward(self, x: Tensor, tap: Tensor | None = None, task: Tensor | None = None) -> Tensor:
        y = self.up(torch.relu(self.down(x)))
        y = y if tap is None else y * tap.mean(-1, keepdim=True)
        return y if task is None else y * (1 + task.to(y.dtype)).unsqueeze(-1)


class Shared(nn.Module):
    """Runs one layer twice, and returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.relu(self.layer(torch.relu(self.layer(self.first(x)))))
        return {"logits": self.last(h), "h": h}


class Spread(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mu, self.log_sigma = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, y: Tensor) -> dict[str, Tensor]:
        return {"mu": self.mu(y), "sigma": self.log_sigma(y).exp()}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 4)).eval()


def adapted(*steps: Any, model: nn.Module | None = None, **plan: Any) -> fz.AdaptedModule:
    return fz.adapt(model or network(), fz.Plan(plan.pop("inputs", INPUT), steps, **plan))


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


# ---- on an edge


@pytest.mark.parametrize("how", ["replace", "add"])
def test_behind_a_module(how: str) -> None:
    model, module, x = network(), Bottleneck(16), torch.randn(5, 8)
    net = adapted(fz.Splice(module, at="1", how=how, scale=0.5 if how == "add" else 1.0), model=model)
    h = model[:2](x)
    same(net(x), model[2:](module(h) if how == "replace" else h + 0.5 * module(h)))
    assert sorted(net.adapter_state()) == [
        f"adapters.splice.1.{layer}.{leaf}" for layer in ("down", "up") for leaf in ("bias", "weight")
    ]
    (row,) = net.ledger
    assert (row.site, row.outcome, row.executes) == ("1", "rewritten", "3 operators of Bottleneck")
    assert row.detail.startswith("115 trainable parameters")


def test_in_front_of_a_module_and_in_its_place() -> None:
    model, module, x = network(), Bottleneck(16), torch.randn(5, 8)
    same(adapted(fz.Splice(module, at="2", on="input"), model=model)(x), model[2:](module(model[:2](x))))
    other = nn.Linear(16, 12)
    net = adapted(fz.Splice(other, at="2", on="module"), model=model)
    same(net(x), model[3:](other(model[:2](x))))
    assert "2.weight" not in net.origins.program.state


def test_a_branch_beside_a_module() -> None:
    model, module, x = network(), nn.Linear(16, 12), torch.randn(5, 8)
    net = adapted(fz.Splice(module, at="2", read="input", how="add"), model=model)
    h = model[:2](x)
    same(net(x), model[3:](model[2](h) + module(h)))


class Scaled(nn.Module):
    """A weight out of the weight and a vector of conditions, as a hypernetwork writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.condition = nn.Buffer(torch.tensor([0.3, 0.7]))
        self.write = nn.Linear(2, 16)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.write(self.condition)


def test_a_parameter_written_by_a_network_is_constant_in_the_end() -> None:
    model, module, x = network(), Scaled(), torch.randn(5, 8)
    net = adapted(fz.Splice(module, at="2", on="weight"), model=model)
    expected = model[3:](model[:2](x) @ (model[2].weight * module.write(module.condition)).T + model[2].bias)
    same(net(x), expected)
    net(x).sum().backward()
    assert all(value.grad is not None for value in net.parameters())
    artifact = fz.compile(net, net.plan)
    same(artifact(x), expected)
    graph = rewrite(net, net.plan).program.graph
    operators = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert operators == ["aten.linear.default", "aten.relu.default", "aten.linear.default", "aten.gelu.default",
                         "aten.linear.default"]  # fmt: skip


def test_of_a_tied_parameter_only_the_use_at_the_path_changes() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    model, ids = Tied().eval(), torch.randint(0, 9, (2, 3))
    inputs = [fz.Input("ids", ("batch", 3), "int64")]
    for path in ("embed", "head"):
        net = adapted(fz.Splice(nn.Softsign(), at=path, on="weight"), model=model, inputs=inputs)
        weights = dict.fromkeys(("embed", "head"), model.embed.weight)
        weights[path] = nn.functional.softsign(model.embed.weight)
        same(net(ids), nn.functional.embedding(ids, weights["embed"]) @ weights["head"].T)


def test_the_callers_module_stays_as_it_was_and_the_net_trains_a_copy() -> None:
    module = Bottleneck(16)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.train()
    net = adapted(fz.Splice(module, at="1", how="add"))
    x, optimizer = torch.randn(6, 8), torch.optim.SGD(net.parameters(), lr=0.1)
    net(x).square().sum().backward()
    assert all(float(value.grad.abs().max()) > 0 for value in net.parameters() if value.grad is not None)
    optimizer.step()
    assert module.training and all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    moved = net.adapter_state()["adapters.splice.1.up.weight"]
    assert not torch.equal(moved, before["up.weight"])
    artifact = fz.compile(net, net.plan)
    same(artifact(x), net(x).detach())


def test_what_requires_no_gradient_stays_frozen() -> None:
    module = Bottleneck(16)
    module.down.requires_grad_(False)
    net = adapted(fz.Splice(module, at="1"))
    assert sorted(net.adapter_state()) == ["adapters.splice.1.up.bias", "adapters.splice.1.up.weight"]
    assert "frozen.splice.1.down.weight" in net.origins.program.state


def test_all_calls_of_a_module_share_the_parameters() -> None:
    model, module, x = Shared().eval(), Bottleneck(8), torch.randn(5, 8)
    net = adapted(fz.Splice(module, at="layer", how="add"), model=model)
    h = model.first(x)
    for _ in range(2):
        h = model.layer(h)
        h = torch.relu(h + module(h))
    same(net(x)["logits"], model.last(h))
    assert len(net.adapter_state()) == 4


def test_steps_at_one_site_act_in_plan_order() -> None:
    model, one, two, x = network(), Bottleneck(16), Bottleneck(16), torch.randn(5, 8)
    steps = [fz.Splice(one, at="1", how="add"), fz.Splice(two, at="1")]
    h = model[:2](x)
    same(adapted(*steps, model=model)(x), model[2:](two(h + one(h))))
    same(adapted(*steps[::-1], model=model)(x), model[2:]((lambda v: v + one(v))(two(h))))


def test_beside_a_lora_and_a_gate() -> None:
    model, module, x = network(), Bottleneck(16), torch.randn(5, 8)
    net = adapted(fz.LoRA(at="0", rank=2), fz.Splice(module, at="1", how="add"), fz.Gate(at="1"), model=model)
    with torch.no_grad():
        for name, value in net.named_parameters():
            if "lora_B" in name:
                value.normal_()
            if "threshold" in name:
                value.fill_(0.5)
    artifact = fz.compile(net, net.plan)
    state = net.adapter_state()
    delta = state["adapters.lora.0.lora_B"] @ state["adapters.lora.0.lora_A"]
    h = torch.relu(model[0](x) + x @ delta.T)
    h = h * (h > 0.5)  # the gate acts on what the module runs, the splice on what it returns
    same(artifact(x), model[2:](h + module(h)))


def test_what_means_nothing_is_gone_after_training() -> None:
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(16, 16), nn.Identity())
    net = adapted(fz.Splice(module, at="1"))
    assert "dropout" in str(net.program())
    assert "dropout" not in str(rewrite(net, net.plan).program)


# ---- taps and selects


def test_taps_are_modules_or_inputs() -> None:
    model, module, x = network(), Bottleneck(12), torch.randn(5, 8)
    h = model[:3](x)
    for what, value in (("x", x), ("0", model[0](x))):
        net = adapted(fz.Splice(module, at="2", taps={"tap": what}), model=model)
        same(net(x), model[3:](module(h, tap=value)))


def test_a_tap_that_comes_later_in_the_graph() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.act = nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.a(x)) + self.b(x)

    model, module, x = Two().eval(), Bottleneck(8), torch.randn(5, 8)
    net = adapted(fz.Splice(module, at="a", taps={"tap": "b"}), model=model)
    same(net(x), torch.relu(module(model.a(x), tap=model.b(x))) + model.b(x))


def test_a_tap_of_what_the_step_changes_is_refused() -> None:
    with pytest.raises(PlanError, match="what 'splice' reads is made of what it changes"):
        adapted(fz.Splice(Bottleneck(16), at="1", taps={"tap": "4"}))


def test_every_row_chooses_its_task() -> None:
    model, module, x = network(), Bottleneck(16), torch.randn(4, 8)
    net = adapted(fz.Splice(module, at="1", how="add", select="task", tasks=3), model=model)
    task = torch.tensor([2, 0, 1, 2])
    h = model[:2](x)
    same(net(x, task), model[2:](h + module(h, task=task)))


# ---- shapes and dtypes


def test_a_new_size_goes_through_the_rest_of_the_graph() -> None:
    net = adapted(fz.Splice(nn.Linear(12, 7), at="4", on="module"))
    x = torch.randn(3, 8)
    assert net(x).shape == (3, 7)
    assert fz.compile(net, net.plan)(x).shape == (3, 7)
    with pytest.raises(PlanError, match=r"splice changes a shape, which 2 \(aten.linear.default.*cannot take"):
        adapted(fz.Splice(nn.Linear(16, 15), at="1"))


def test_half_precision_layers_take_a_float32_module() -> None:
    model, module = network().bfloat16(), Bottleneck(16)
    x = torch.randn(5, 8, dtype=torch.bfloat16)
    net = adapted(fz.Splice(module, at="1", how="add"), model=model, inputs=[fz.Input("x", ("batch", 8), "bfloat16")])
    assert net(x).dtype == torch.bfloat16
    assert {value.dtype for value in net.parameters()} == {torch.float32}
    h = model[:2](x)
    torch.testing.assert_close(net(x), model[2:]((h + module(h.float())).bfloat16()))


# ---- heads


def test_new_outputs() -> None:
    model, head, x = network(), Spread(), torch.randn(5, 8)
    net = adapted(fz.Head(head, at="4"), model=model)
    y = model(x)
    result = net(x)
    assert isinstance(result, tuple) and net.origins.program.outputs == ("output", "head.mu", "head.sigma")
    for actual, expected in zip(result, (y, *head(y).values()), strict=True):
        same(actual, expected)
    named = adapted(fz.Head(nn.Linear(8, 2), at="first", outputs=["score"]), model=Shared().eval())
    assert list(named(x)) == ["logits", "h", "score"] and named(x)["score"].shape == (5, 2)
    artifact = fz.compile(net, fz.Plan(INPUT, net.plan.steps, targets=["onnx"]))
    for actual, expected in zip(artifact(x), result, strict=True):
        same(actual, expected.detach())


def test_an_output_replaced_or_added_to() -> None:
    model, x = Shared().eval(), torch.randn(5, 8)
    wide, narrow = nn.Linear(8, 9), nn.Linear(8, 4)
    h = model(x)["h"]
    assert adapted(fz.Head(wide, at="first", how="replace"), model=model)(x)["logits"].shape == (5, 9)
    net = adapted(fz.Head(narrow, at="first", how="add", output="logits"), model=model)
    same(net(x)["logits"], model.last(h) + narrow(model.first(x)))
    same(net(x)["h"], h)


def test_a_head_reads_what_splices_left() -> None:
    model, module, head, x = network(), Bottleneck(12), nn.Linear(12, 2), torch.randn(5, 8)
    net = adapted(fz.Head(head, at="3"), fz.Splice(module, at="3"), model=model)
    h = module(model[:4](x))
    same(net(x)[0], model[4](h))
    same(net(x)[1], head(h))


# ---- files


def test_a_plan_file_names_what_makes_the_module(tmp_path: Path) -> None:
    step = fz.Splice("torch.nn:Linear", at="1", how="add", arguments={"in_features": 16, "out_features": 16})
    plan = fz.Plan(INPUT, [step])
    plan.save(tmp_path / "plan.toml")
    again = fz.Plan.load(tmp_path / "plan.toml")
    assert again == plan
    one, two = (fz.adapt(network(), item).adapter_state() for item in (plan, again))
    assert all(torch.equal(one[name], two[name]) for name in one)
    live = fz.Plan(INPUT, [fz.Splice(nn.Linear(16, 16), at="1")])
    assert live.to_dict()["steps"][0]["module"] == "<torch.nn.modules.linear:Linear>"
    with pytest.raises(PlanError, match=r"cannot make .<torch\.nn\.modules\.linear:Linear>"):
        fz.adapt(network(), fz.Plan.model_validate(live.to_dict()))


def test_weights_come_from_a_file(tmp_path: Path) -> None:
    net, x = adapted(fz.Splice(Bottleneck(16), at="1", how="add")), torch.randn(3, 8)
    net.save_adapters(tmp_path / "adapters.safetensors")
    step = fz.Splice(Bottleneck(16), at="1", how="add", weights=tmp_path / "adapters.safetensors")
    same(adapted(step)(x), net(x))
    with pytest.raises(PlanError, match=r"adapters.splice.1.down.weight has shape \(3, 16\), but \(2, 16\)"):
        adapted(step.model_copy(update={"module": Bottleneck(16, 2)}))
    with pytest.raises(PlanError, match=r"was trained as .*scale 1"):
        adapted(step.model_copy(update={"scale": 2.0}))


# ---- refusals


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"module": "torch.nn.Linear"}, "must be a module, or 'package.module:Name'"),
        ({"module": nn.Linear}, "must be a module, or 'package.module:Name'"),
        ({"module": nn.ReLU(), "arguments": {"a": 1}}, "this one is made already"),
        ({"module": nn.ReLU(), "scale": 2.0}, "has a meaning with how='add' only"),
        ({"module": nn.ReLU(), "how": "add", "on": "module"}, "must be 'replace' where f takes the module's place"),
        (
            {"module": nn.ReLU(), "on": "input", "read": "input"},
            "'input' goes with on='output' only, not with on='input'",
        ),
        ({"module": nn.ReLU(), "select": "task"}, "are given together, or not at all"),
        ({"module": nn.ReLU(), "select": "task", "tasks": 2, "taps": {"task": "0"}}, "it need not be tapped"),
    ],
)
def test_a_plan_refuses(keys: dict[str, Any], text: str) -> None:
    with pytest.raises(PlanError, match=text):
        fz.Splice(at="1", **keys)


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (fz.Splice(Bottleneck(16), at="nowhere"), "no module matches 'nowhere'"),
        (fz.Splice(Bottleneck(16), at="1", taps={"tap": "nowhere"}), "'nowhere' is no input and no module"),
        (fz.Splice("no.such:Thing", at="1"), "cannot make 'no.such:Thing'"),
        (fz.Splice("torch:float32", at="1"), "cannot make 'torch:float32'"),
        (fz.Splice("builtins:dict", at="1"), "makes a dict, not an nn.Module"),
        (fz.Splice(Spread(), at="4"), "returns 2 tensors where one is read"),
        (fz.Head(nn.Linear(16, 2), at=["1", "2"]), "names 1, 2, but a head reads one value"),
        (fz.Head(nn.Linear(4, 2), at="4", how="add"), r"'head' makes .*2\], which cannot be added to .*4\]"),
        (fz.Head(nn.Linear(4, 2), at="4", how="replace", output="y"), "the model has no output 'y'"),
        (fz.Head(nn.Linear(4, 2), at="4", outputs=["output"]), "the model has an output 'output'"),
        (fz.Head(nn.Linear(4, 2), at="4", outputs=["a", "b"]), "2 names for 1 results"),
    ],
)
def test_refusals(step: Any, text: str) -> None:
    with pytest.raises((PlanError, fz.PassError), match=text):
        adapted(step)


def test_a_module_that_does_not_fit_is_named_with_its_shapes() -> None:
    with pytest.raises(CaptureError, match=r"cannot put Bottleneck at 1, where it is given x: float32\[.*, 16\]"):
        adapted(fz.Splice(Bottleneck(15), at="1"))


def test_a_module_taken_away_cannot_be_adapted_too() -> None:
    with pytest.raises(PlanError, match="'splice' and 'lora' both address 2, but 'splice' takes it away"):
        adapted(fz.Splice(nn.Linear(16, 12), at="2", on="module"), fz.LoRA(at="2", rank=2))


# ---- how steps at neighbouring and nested sites compose


class Pair(nn.Module):
    """a feeds b, and b's result and a's are both read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h) + h


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.block(x)


@pytest.mark.parametrize("backwards", [False, True])
def test_what_is_given_to_one_module_is_not_what_another_returns(backwards: bool) -> None:
    model, out, into, x = Pair().eval(), Bottleneck(8), Bottleneck(8), torch.randn(4, 8)
    steps = [fz.Splice(out, at="a"), fz.Splice(into, at="b", on="input", name="into"), fz.Tap(at="a")]
    steps += [fz.Head(nn.Identity(), at="a", name="seen")]
    net = adapted(*(steps[::-1] if backwards else steps), model=model)
    h = out(model.a(x))
    y, seen = net(x)
    same(y, model.b(into(h)) + h)
    same(seen, h)
    same(net.tapped["tap.a"], h)


def test_a_gate_behind_a_module_stands_before_what_the_next_one_is_given() -> None:
    model, into, x = Pair().eval(), Bottleneck(8), torch.randn(4, 8)
    steps = [fz.Gate(at="a", on="output", threshold=0.1), fz.Splice(into, at="b", on="input")]
    artifact = fz.compile(model, fz.Plan(INPUT, steps))
    h = model.a(x)
    h = h * (h > 0.1)
    same(artifact(x), (model.b(into(h)) + h).detach())
    assert list(artifact.firing(x)) == ["a"]


@pytest.mark.parametrize("backwards", [False, True])
def test_inner_modules_come_before_outer_ones(backwards: bool) -> None:
    model, inner, outer, x = Outer().eval(), Bottleneck(8), Bottleneck(8), torch.randn(4, 8)
    steps = [fz.Splice(outer, at="block"), fz.Splice(inner, at="block.2", name="inner"), fz.Tap(at="block.2"),
             fz.Head(nn.Identity(), at="block.2", name="seen")]  # fmt: skip
    net = adapted(*(steps[::-1] if backwards else steps), model=model)
    h = inner(model.block(x))
    y, seen = net(x)
    same(y, 2 * outer(h))
    same(seen, h)
    same(net.tapped["tap.block.2"], h)


def test_a_branch_reads_what_its_module_is_given() -> None:
    model, into, beside, x = Pair().eval(), Bottleneck(8), nn.Linear(8, 8), torch.randn(4, 8)
    steps = [fz.Splice(beside, at="b", read="input", how="add"), fz.Splice(into, at="b", on="input", name="into")]
    h = model.a(x)
    same(adapted(*steps, model=model)(x), model.b(into(h)) + beside(into(h)) + h)


# ---- what trains


class Detached(nn.Module):
    """A straight-through estimator, and a part that does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.still = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return h + (h.sign() - h).detach() + self.still(x).detach()


class NoGradient(Detached):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            still = self.still(x)
        return self.layer(x) + still


def test_gradients_are_the_modules() -> None:
    model, module, x = network(), Detached(), torch.randn(5, 8)
    net = adapted(fz.LoRA(at="0", rank=2), fz.Splice(module, at="1"), model=model)
    with torch.no_grad():
        for name, value in net.named_parameters():
            if "lora_B" in name:
                value.normal_()
    net(x).sum().backward()
    lora = {name: value.clone().requires_grad_() for name, value in net.adapter_state().items() if "lora" in name}
    a, b = lora["adapters.lora.0.lora_A"], lora["adapters.lora.0.lora_B"]
    model[2:](module(torch.relu(model[0](x) + x @ a.T @ b.T))).sum().backward()
    found = {name: value.grad for name, value in net.named_parameters()}
    for name, value in lora.items():
        assert float(value.grad.abs().max()) > 0
        same(found[name], value.grad)
    same(found["adapters.splice.1.layer.weight"], module.layer.weight.grad)
    assert found["adapters.splice.1.still.weight"] is None and module.still.weight.grad is None


def test_gradients_that_a_graph_cannot_have_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"the gradient of .* is another one in the captured graph"):
        adapted(fz.Splice(NoGradient(), at="1"))


def test_a_codebook_lets_gradients_through_and_costs_nothing_for_it() -> None:
    net = adapted(fz.LoRA(at="0", rank=2), fz.Codebook(at="1", codes=4))
    net(torch.randn(5, 8)).sum().backward()
    gradients = {name: value.grad for name, value in net.named_parameters()}
    assert float(gradients["adapters.lora.0.lora_B"].abs().max()) > 0
    program = rewrite(net, net.plan).program
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "aten.detach.default" not in targets and "aten.sub.Tensor" not in targets


# ---- more refusals


def test_a_head_keeps_the_outputs_dtype() -> None:
    model = network().bfloat16()
    x, inputs = torch.randn(5, 8, dtype=torch.bfloat16), [fz.Input("x", ("batch", 8), "bfloat16")]
    for how in ("add", "replace"):
        net = adapted(fz.Head(nn.Linear(12, 4), at="3", how=how), model=model, inputs=inputs)
        assert net(x).dtype == torch.bfloat16


class Duck:
    def forward(self, x: Tensor) -> Tensor:
        return x


class Positive(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x > 0


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        ([fz.Splice(Bottleneck(16), at="1", taps={"x": "0"})], "'x' is the argument of Bottleneck that the value"),
        ([fz.Splice(Duck(), at="1")], "a Duck is no nn.Module"),
        ([fz.Splice(Positive(), at="1")], r"'splice' makes torch\.bool of torch\.float32"),
        ([fz.Splice(nn.Softsign(), at="2", on="weight"), fz.LoRA(at="2", rank=2)], "'splice' makes its weight anew"),
        ([fz.DoRA(at="2", rank=2), fz.Splice(nn.Softsign(), at="2", on="bias")], "'splice' makes its bias anew"),
    ],
)
def test_more_refusals(steps: list[Any], text: str) -> None:
    with pytest.raises(PlanError, match=text):
        adapted(*steps)


# ---- what a module makes of its input


def test_a_branch_behind_a_copy_of_a_module() -> None:
    """v ← v + s·f(M(v)) at the input of M, beside another step there; M's own parameters are read, and not copied."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.LayerNorm(6), nn.Tanh()), nn.Linear(6, 6)).eval()
    f, g, x = nn.Linear(6, 6), nn.Linear(6, 6), torch.randn(4, 6)
    steps = [fz.Splice(g, at="1", on="input"), fz.Splice(f, at="1", on="input", read="result", how="add", scale=0.5)]
    done = rewrite(model, fz.Plan([fz.Input("x", ("batch", 6))], steps, targets=()), verify="off")
    v = g(model[0](x))
    expected = model[2](model[1](v + 0.5 * f(model[1](v))))
    torch.testing.assert_close(done.program.run(x)[0], expected.detach(), rtol=1e-5, atol=1e-6)
    names = [str(node.target) for node in done.program.graph.find_nodes(op="get_attr")]
    assert sum("1.0.weight" in name for name in names) == 1


def test_results_are_read_at_inputs_only() -> None:
    with pytest.raises(PlanError, match="'result' goes with on='input' only, not with on='output'"):
        fz.Splice("torch.nn:Identity", at="1", read="result")

    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x + 1, x * 2

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.two = Two()

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.two(torch.relu(x))
            return a * b

    step = fz.Splice(nn.Linear(6, 6), at="two", on="input", read="result", how="add")
    with pytest.raises(PlanError, match="two returns 2 tensors, where one is read"):
        rewrite(Whole(), fz.Plan([fz.Input("x", (4, 6))], [step], targets=()), verify="off")


def test_an_input_is_not_tapped_behind_a_prompt() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(9, 8), nn.Linear(8, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.embed(ids))

    class Masked(nn.Module):
        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            return x * (ids > 2).unsqueeze(-1)

    steps = [fz.Prompt(at="embed", tokens=2), fz.Splice(Masked(), at="out", taps={"ids": "ids"})]
    with pytest.raises(PlanError, match="'ids' is as long as the sequences without the prompt of 'prompt'"):
        adapted(*steps, model=Reader().eval(), inputs=[fz.Input("ids", ("batch", "length"), "int64")])


# ---- at some positions


class Tokens(nn.Module):
    """A value per token, and which tokens count."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer, self.last = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.score = nn.Sequential(nn.Linear(8, 1), nn.ReLU(), nn.Flatten(1))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h = torch.relu(self.layer(self.embed(ids)))
        return self.last(h) * (mask > 0).unsqueeze(-1) + 0 * self.score(h).unsqueeze(-1)


def tokens(*steps: Any, dtype: str = "int64") -> tuple[nn.Module, fz.AdaptedModule, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Tokens().eval()
    inputs = [fz.Input("ids", ("batch", "length"), "int64", low=0, high=8),
              fz.Input("mask", ("batch", "length"), dtype, low=0, high=2)]  # fmt: skip
    net = fz.adapt(model, fz.Plan(inputs, steps, targets=["onnx"]))
    return model, net, torch.randint(0, 9, (3, 5)), torch.randint(0, 3, (3, 5)).to(getattr(torch, dtype))


def test_only_where_a_mask_says_so() -> None:
    module = Bottleneck(8)
    for how in ("replace", "add"):
        model, net, ids, mask = tokens(fz.Splice(module, at="layer", how=how, mask="mask"))
        h = model.layer(model.embed(ids))
        new = module(h) + (h if how == "add" else 0)
        expected = model.last(torch.relu(torch.where((mask != 0)[..., None], new, h))) * (mask > 0)[..., None]
        same(net(ids, mask), expected)
        assert not torch.allclose(expected, model(ids, mask)), "a mask that is all 0 would show nothing"
        same(fz.compile(net, net.plan)(ids, mask), expected)


def test_a_mask_that_a_module_makes() -> None:
    module = nn.Linear(8, 8)
    model, net, ids, mask = tokens(fz.Splice(module, at="last", on="input", mask="score"))
    h = torch.relu(model.layer(model.embed(ids)))
    holds = model.score(h)[..., None] != 0
    assert holds.any() and not holds.all()
    same(net(ids, mask), model.last(torch.where(holds, module(h), h)) * (mask > 0)[..., None])
    with pytest.raises(PlanError, match="made of what it changes"):
        tokens(fz.Splice(module, at="layer", mask="score"))


def test_a_mask_over_rows_of_bools() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, rows: Tensor) -> Tensor:
            return self.last(self.body(x)) + rows.float().mean() * 0

    torch.manual_seed(0)
    model, module = Rows().eval(), nn.Linear(8, 8)
    inputs = [fz.Input("x", ("batch", 4, 8)), fz.Input("rows", ("batch",), "bool")]
    net = fz.adapt(model, fz.Plan(inputs, [fz.Splice(module, at="last", on="input", mask="rows")]))
    x, rows = torch.randn(3, 4, 8), torch.tensor([True, False, True])
    h = model.body(x)
    same(net(x, rows), model.last(torch.where(rows[:, None, None], module(h), h)))
    net(x, rows).sum().backward()
    assert all(value.grad is not None and value.grad.any() for value in net.parameters())


def test_a_head_replaces_an_output_at_some_positions() -> None:
    module = nn.Linear(8, 3)
    model, net, ids, mask = tokens(fz.Head(module, at="layer", how="replace", mask="mask"))
    other = module(model.layer(model.embed(ids)))
    same(net(ids, mask), torch.where((mask != 0)[..., None], other, model(ids, mask)))


@pytest.mark.parametrize(
    ("step", "match"),
    [
        (fz.Bottleneck(at="layer", width=2, mask="nowhere"), "mask: 'nowhere' is no input and no module"),
        (fz.Splice(nn.Linear(8, 4), at="last", on="module", mask="mask"), r"cannot take the place of some positions"),
        (fz.Splice(nn.Tanh(), at="score", mask="layer"), r"mask: 'layer' is \[.*8\], with which the value"),
    ],
)
def test_masks_that_fit_nothing_are_refused(step: Any, match: str) -> None:
    with pytest.raises(PlanError, match=match):
        tokens(step)
