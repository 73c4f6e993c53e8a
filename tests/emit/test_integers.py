"""Quantized layers in torch.compile and AOTInductor: computed in integers, as the generated code says."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxfreeze as fz
from fxfreeze.capture import capture
from fxfreeze.emit import EMITTERS
from fxfreeze.integers import count_calls, executed, has_integers, with_integers
from fxfreeze.kernels._op import OPS
from fxfreeze.lower import Lowering
from fxfreeze.postops import with_post_ops
from fxfreeze.program import INTEGERS, IntegerSite, Program
from fxfreeze.serialize import load_program


class Layer(nn.Module):
    """Weights of a convolution or a linear layer, symmetric per output channel, and the grid of the input."""

    def __init__(self, shape: tuple[int, ...], scale: float, zero: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(sum(shape))
        self.register_buffer("weight", torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator))
        self.register_buffer("scales", torch.rand(shape[0], generator=generator) * 0.01 + 0.001)
        self.register_buffer("zeros", torch.zeros(shape[0], dtype=torch.int8))
        self.register_buffer("bias", torch.randn(shape[0], generator=generator))
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("zero", torch.tensor(zero, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        quantize, dequantize = OPS["quantize"].op, OPS["dequantize"].op
        q = quantize(x, self.scale, self.zero, 0, 0, 0, 255)
        x = dequantize(q, self.scale, self.zero, 0, 0, torch.float32)
        weight = dequantize(self.weight, self.scales, self.zeros, 0, 0, torch.float32)
        return F.conv2d(x, weight, self.bias, padding=1) if weight.ndim == 4 else F.linear(x, weight, self.bias)


class Net(nn.Module):
    """Convolutions with a residual sum between them, a linear layer on channels last, and one on their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Layer((16, 3, 3, 3), 0.03, 128), Layer((16, 16, 3, 3), 0.1, 0)
        self.c, self.each, self.fc = Layer((16, 16, 3, 3), 0.2, 0), Layer((16, 16), 0.3, 0), Layer((10, 16), 0.4, 128)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = F.relu(x + self.c(F.relu(self.b(x))))
        return self.fc(self.each(x.flatten(2).transpose(1, 2)).mean(1))


@pytest.fixture(scope="module")
def program() -> Program:
    return capture(Net().eval(), fz.Plan([fz.Input("x", ("batch", 3, 8, 8))], targets=[]))[0]


@pytest.fixture(scope="module")
def lowering(program: Program) -> Lowering:
    pytest.importorskip("torchao", reason="needs fxfreeze[int8]")
    return Lowering(program)


def test_scales_that_are_constants_become_numbers(lowering: Lowering, program: Program) -> None:
    assert has_integers(program)
    changed = with_integers(program)
    targets = [str(node.target) for node in changed.graph.nodes if node.op == "call_function"]
    assert not [name for name in targets if name.startswith("fxfreeze")]
    assert targets.count("quantized_decomposed.quantize_per_tensor.default") == 5
    # What a linear layer reads on three dims is made dense: torch makes a bmm of other strides, which no pattern knows.
    assert targets.count("aten.clone.default") == 1
    assert targets.count("quantized_decomposed.dequantize_per_channel.default") == 5
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(changed.run(x)[0], program.run(x)[0], rtol=1e-5, atol=1e-5)


class Residual(nn.Module):
    """Two sums of which a convolution makes one operand, and an activation beside ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.c, self.d = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.a(x))
        x = F.relu(self.b(x) + self.c(x))
        x = F.relu(x + self.d(F.relu(self.c(x))))
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def artifact() -> fz.Artifact:
    """Quantized by the compiler itself; building it fails where a layer would be computed in floats."""
    pytest.importorskip("torchao", reason="needs fxfreeze[int8]")
    torch.manual_seed(0)
    plan = fz.Plan([fz.Input("x", ("batch", 3, 8, 8))], [fz.Quantize()], ["torch", "aoti", "onnx"])
    return fz.compile(Residual().eval(), plan, calibration=[torch.randn(32, 3, 8, 8)])


@pytest.mark.slow
@pytest.mark.parametrize("target", ["torch", "aoti"])
def test_every_layer_calls_an_integer_kernel(artifact: fz.Artifact, target: str) -> None:
    rows = [row for row in artifact.manifest["ledger"] if row["executes"].endswith(f"in {target}")]
    assert [(row["site"], row["executes"]) for row in rows] == [
        (site, f"integer-executed by oneDNN in {target}") for site in ("a", "b", "c", "c", "d", "fc")
    ]


@pytest.mark.slow
def test_kernels_of_convolutions_add_and_activate_before_they_round(artifact: fz.Artifact) -> None:
    calls = r"aoti_torch_cpu__qconv2d_pointwise_binary\w*\(", r"aoti_torch_cpu__qconv_pointwise\w*\(", '"hardswish"'
    sums, others, activations = count_calls(artifact.folder / "aoti" / "model.pt2", *map(re.compile, calls))
    assert (sums, others) == (2, 3) and activations


@pytest.mark.slow
@pytest.mark.parametrize("target", ["torch", "aoti", "onnx"])
def test_checks_compare_with_what_the_target_computes(artifact: fz.Artifact, target: str) -> None:
    program, x = load_program(artifact.folder / "program"), torch.randn(64, 3, 8, 8)
    once = with_post_ops(program)
    assert once is not program
    said, other = (once, program) if EMITTERS[target].computes(program) is not program else (program, once)
    (result,) = artifact.runner(target)(x)
    near, far = ((result - item.run(x)[0]).abs().mean() for item in (said, other))
    assert near < far / 3
    assert (target == "onnx") == (said is program)


def test_fewer_calls_than_layers_are_no_proof(lowering: Lowering) -> None:
    program = lowering.program.clone()
    layers = [node for node in program.graph.nodes if "conv2d" in str(node.target) or "linear" in str(node.target)]
    for number, node in enumerate(layers):
        node.meta[INTEGERS] = IntegerSite(f"layer{number}", "quantize")
    assert len(layers) == 5
    kernels = {calls: {row[2] for row in executed(program, calls)["integer"]} for calls in (0, 4, 5)}
    assert kernels == {0: {None}, 4: {None}, 5: {"oneDNN"}}


def test_what_torch_has_no_operator_for_stays() -> None:
    pytest.importorskip("torchao", reason="needs fxfreeze[int8]")
    quantize, dequantize = OPS["quantize"].op, OPS["dequantize"].op

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("blocks", torch.randint(-8, 8, (6, 8), dtype=torch.int8))
            self.register_buffer("scales", torch.rand(6, 2) + 0.1)
            self.register_buffer("zeros", torch.zeros(6, 2, dtype=torch.int8))

        def forward(self, x: Tensor) -> Tensor:
            scale, zero = x.abs().amax() / 127, torch.zeros((), dtype=torch.int8)  # of the row that comes
            x = dequantize(quantize(x, scale, zero, 0, 0, -128, 127), scale, zero, 0, 0, torch.float32)
            return F.linear(x, dequantize(self.blocks, self.scales, self.zeros, 1, 4, torch.float32))

    program = capture(Mixed().eval(), fz.Plan([fz.Input("x", ("batch", 8))], targets=[]))[0]
    changed = with_integers(program)
    assert [str(node.target) for node in changed.graph.nodes if "quant" in str(node.target)] == [
        "quantized_decomposed.quantize_per_tensor.tensor", "quantized_decomposed.dequantize_per_tensor.tensor",
        "fxfreeze.dequantize.default",
    ]  # fmt: skip


def test_a_narrower_grid_stays_as_narrow() -> None:
    pytest.importorskip("torchao", reason="needs fxfreeze[int8]")

    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.tensor(0.1))
            self.register_buffer("zero", torch.tensor(2, dtype=torch.int8))

        def forward(self, x: Tensor) -> Tensor:
            return OPS["quantize"].op(x, self.scale, self.zero, 0, 0, -8, 7)

    program = capture(Narrow().eval(), fz.Plan([fz.Input("x", ("batch", 8))], targets=[]))[0]
    x = torch.randn(4, 8)
    (found,) = with_integers(program).run(x)
    assert torch.equal(found, program.run(x)[0]) and (int(found.min()), int(found.max())) == (-8, 7)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["torch", "aoti"])
def test_scales_of_the_call_go_with_integer_kernels(target: str) -> None:
    pytest.importorskip("torchao", reason="needs fxfreeze[int8]")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), Product(96, 64)).eval()
    plan = fz.Plan([fz.Input("x", ("batch", 5, 64))], [fz.Quantize(mode="dynamic")], [target])
    artifact = fz.compile(model, plan)
    ran = [row["executes"] for row in artifact.manifest["ledger"] if row["executes"].endswith(f"in {target}")]
    assert ran == [f"integer-executed by oneDNN in {target}"] * 2
    for size in (1e-3, 1.0, 1e3):
        x = size * torch.randn(7, 5, 64, generator=torch.Generator().manual_seed(1))
        want = model(x).detach()
        assert float((artifact(x) - want).norm() / want.norm()) < 0.03


class Mixed(nn.Module):
    """Convolutions in one and two dims, one weight that two layers share, and a product with its weight [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.plane, self.line = nn.Conv2d(3, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding="same")
        self.each, self.last = nn.Linear(8, 8), Product(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.line(self.plane(x).relu().mean(2)).relu().transpose(1, 2)
        return self.last(self.each(self.each(x).relu()))


def mixed(*targets: str) -> fz.Artifact:
    pytest.importorskip("torchao", reason="needs fxfreeze[int8]")
    data = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    plan = fz.Plan([fz.Input("x", ("batch", 3, 8, 8))], [fz.Quantize(granularity="tensor")], targets)
    return fz.compile(Mixed().eval(), plan, calibration=[data])


def test_one_scale_for_a_whole_weight_is_written_out_per_output() -> None:
    artifact = mixed()
    program = load_program(artifact.folder / "program")
    changed = with_integers(program)
    weights = [node for node in changed.graph.nodes if "dequantize_per_channel" in str(node.target)]
    assert [node.args[0].meta["val"].shape[0] for node in weights] == [8, 8, 8, 8, 6]
    given = [node for node in program.graph.nodes if str(node.target) == "fxfreeze.dequantize.default"]
    given = [node for node in given if node.args[0].op == "get_attr"]
    for node, before in zip(weights, given, strict=True):
        scale, zero = (changed.state.tensor(str(item.target)) for item in node.args[1:3])
        assert torch.equal(scale.unique(), program.state.tensor(str(before.args[1].target)).unique())
        assert scale.shape == zero.shape == node.args[0].meta["val"].shape[:1] and node.args[3] == 0
        assert scale.unique().numel() == 1 and not zero.any()
    # The second call of that layer is read as rows, by a product; the first, by the second, is not.
    layers = [node for node in changed.graph.nodes if str(node.target) == "aten.linear.default"]
    assert [node.meta["val"].ndim for node in layers] == [3, 2, 2]
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    wanted = program.run(x)[0]
    assert float(wanted.std()) > 1  # a millionth of it is a few roundings, and no step of the last layer
    torch.testing.assert_close(changed.run(x)[0], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["torch", "aoti"])
def test_one_scale_for_a_whole_weight_goes_with_integer_kernels(target: str) -> None:
    ran = [row["executes"] for row in mixed(target).manifest["ledger"] if row["executes"].endswith(f"in {target}")]
    assert ran == [f"integer-executed by oneDNN in {target}"] * 5


class Product(nn.Module):
    """A linear layer with its weight [in, out], as GPT-2 has them."""

    def __init__(self, *size: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(size)), nn.Parameter(torch.randn(size[1]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


class Plain(Product):
    """The same without a bias, for any number of dims."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_weights_the_other_way_round_are_turned() -> None:
    pytest.importorskip("torchao", reason="needs fxfreeze[int8]")
    torch.manual_seed(0)
    data = torch.randn(32, 3, 8)
    model = nn.Sequential(Product(8, 12), Plain(12, 6), Plain(6, 6)).eval()
    steps = [fz.Quantize(at="[01]"), fz.Quantize(at="2", scheme="int8-weight", name="weight")]
    plan = fz.Plan([fz.Input("x", ("batch", 3, 8))], steps, [])
    artifact = fz.compile(model, plan, calibration=[data])
    program = load_program(artifact.folder / "program")
    changed = with_integers(program)
    layers = [node for node in changed.graph.nodes if str(node.target) == "aten.linear.default"]
    assert [[tuple(item.meta["val"].shape)[1:] for item in node.args] for node in layers] == [
        [(8,), (8,), ()], [(3, 12), (12,)],
    ]  # fmt: skip
    # Floats on integers are none of oneDNN's: that product stays as it is.
    assert sum(str(node.target) == "aten.matmul.default" for node in changed.graph.nodes) == 1
    x = torch.randn(5, 3, 8)
    wanted = program.run(x)[0]
    assert float(wanted.abs().max()) > 10.0  # far from what is allowed below: a weight out of its place moves tens
    torch.testing.assert_close(changed.run(x)[0], wanted, rtol=1e-6, atol=1e-5)


class Sums(nn.Module):
    """Convolutions in one dim, padded, strided, dilated, with a residual sum; and sums of activations of layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding="same", dilation=2)
        self.c = nn.Conv1d(4, 8, 5, stride=2, groups=2, padding=2)
        self.d, self.e, self.f = nn.Linear(8, 8), nn.Linear(8, 8), Product(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = self.c((self.b(x) + x).relu()).transpose(1, 2)
        x = self.d(x).relu() + self.e(x).tanh()
        return F.gelu(self.f(x)) + x


def test_forms_that_inductor_mistakes_become_others_of_the_same_value() -> None:
    pytest.importorskip("torchao", reason="needs fxfreeze[int8]")
    data = torch.randn(32, 4, 10, generator=torch.Generator().manual_seed(1))
    plan = fz.Plan([fz.Input("x", ("batch", 4, 10))], [fz.Quantize()], [])
    artifact = fz.compile(Sums().eval(), plan, calibration=[data])
    program = load_program(artifact.folder / "program")
    changed = with_integers(program)
    targets = [str(node.target) for node in changed.graph.nodes]
    assert targets.count("aten.conv2d.default") == 2 and targets.count("aten.conv2d.padding") == 1
    assert not any("conv1d" in target for target in targets)
    assert targets.count("aten.sub.Tensor") == 2 and targets.count("aten.add.Tensor") == 1
    x = torch.randn(3, 4, 10, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(changed.run(x)[0], program.run(x)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_convolutions_in_one_dim_and_sums_of_activations_run_on_integers() -> None:
    pytest.importorskip("torchao", reason="needs fxfreeze[int8]")
    data = torch.randn(32, 4, 10, generator=torch.Generator().manual_seed(1))
    plan = fz.Plan([fz.Input("x", ("batch", 4, 10))], [fz.Quantize()], ["torch"])
    artifact = fz.compile(Sums().eval(), plan, calibration=[data])
    ran = {row["site"]: row["executes"] for row in artifact.manifest["ledger"] if row["executes"].endswith("in torch")}
    assert ran == dict.fromkeys("abcdef", "integer-executed by oneDNN in torch")
