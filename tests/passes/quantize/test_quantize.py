"""fz.Quantize: which layers become integers, with which scales, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfreeze as fz
from fxfreeze import cpu
from fxfreeze.api import Compilation, rewrite
from fxfreeze.errors import PassError, PlanError
from fxfreeze.kernels.dequantize import KERNEL as DEQUANTIZE
from fxfreeze.kernels.quantize import KERNEL as QUANTIZE

SIZE = 8


class Residual(nn.Module):
    """A convolution, a block with a sum, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), *(nn.Conv2d(8, 8, 3, padding=1) for _ in "ab")
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (self.norm(self.two(self.one(x).relu())) + x).relu()
        return self.head(x.mean((2, 3)))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Residual().eval()


def batches(count: int = 3) -> list[Tensor]:
    return [torch.randn(16, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def compiled(model: nn.Module, *steps: Any, data: Any = None) -> Compilation:
    plan = fz.Plan([fz.Input("x", ("batch", 3, SIZE, SIZE))], steps, targets=())
    return rewrite(model, plan, calibration=batches() if data is None else data)


def rows(done: Compilation, outcome: str) -> dict[str, Any]:
    return {row.site: row for row in done.ledger if row.step.startswith("quantize") and row.outcome == outcome}


def snr(done: Compilation, model: nn.Module, x: Tensor) -> float:
    """Of the outputs, in dB."""
    want, (found,) = model(x), done.program.run(x)
    return float(20 * (want.norm() / (found - want).norm()).log10().detach())


def stored(done: Compilation, name: str) -> Tensor:
    (node,) = [node for node in done.program.graph.nodes if node.op == "get_attr" and node.target == name]
    return done.program.state[str(node.target)]


def scales(done: Compilation) -> dict[Any, tuple[float, int]]:
    """What is quantized → its scale and zero point."""
    state = done.program.state
    return {
        "input" if node.args[0].op == "placeholder" else node.args[0].target: tuple(
            state[str(item.target)].item() for item in node.args[1:3]
        )
        for node in done.program.graph.nodes
        if node.target is QUANTIZE.op
    }


LAYERS = {"stem", "one", "two", "head"}


def test_every_layer_becomes_integers_and_the_outputs_hardly_move(net: nn.Module) -> None:
    done = compiled(net, fz.Quantize())
    assert rows(done, "rewritten").keys() == LAYERS
    assert snr(done, net, batches(4)[-1]) > 30
    told = rows(done, "rewritten")["one"]
    assert told.executes == "int8 weights, one scale per channel; uint8 input"
    assert "dB) of its result; ranges of 48 rows of calibration data" in told.detail
    for name in LAYERS:
        assert stored(done, f"{name}.weight.int").dtype == torch.int8
    # A ReLU's zero point is the smallest integer: ONNX Runtime takes it into the convolution then only.
    assert scales(done)[torch.ops.aten.relu.default][1] == 0 < scales(done)[torch.ops.aten.conv2d.default][1]


@pytest.mark.parametrize("step, what", [
    (fz.Quantize(), "static int8"),
    (fz.Quantize(mode="dynamic", at="head"), "dynamic int8"),
    (fz.Quantize(scheme="int8-weight", at="head"), "integer weights"),
], ids=lambda item: item if isinstance(item, str) else "")  # fmt: skip
def test_what_integers_change_in_the_outputs_is_measured(net: nn.Module, step: fz.Quantize, what: str) -> None:
    done, data = compiled(net, step), torch.cat(batches())
    (found,) = [row.detail for row in done.ledger if row.requested == f"{what}, seen in 'output'"]
    now, then = torch.cat([done.program.run(x)[0] for x in batches()]), net(data).detach()
    ratio = float((now.double() - then.double()).norm() / then.double().norm())
    same = float((now.argmax(1) == then.argmax(1)).float().mean())
    assert found.startswith(f"relative gap {ratio:.2g} (") and f"; {same:.2%} of predictions stay" in found
    assert found.endswith(f"on {len(data)} rows of calibration data")


def test_weights_are_symmetric_per_output_feature(net: nn.Module) -> None:
    done = compiled(net, fz.Quantize(reduce_range=False))
    whole, scale = stored(done, "stem.weight.int"), stored(done, "stem.weight.scale")
    want = net.stem.weight.detach().abs().amax((1, 2, 3)) / 127  # type: ignore[union-attr, operator]
    torch.testing.assert_close(scale, want)
    assert whole.min() >= -127 and bool((whole.abs().amax((1, 2, 3)) == 127).all())
    assert stored(compiled(net, fz.Quantize(granularity="tensor")), "stem.weight.scale").shape == ()


@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize(
    ("asked", "narrow", "largest"), [(None, False, 127), (None, True, 64), (True, False, 64), (False, True, 127)]
)
def test_weights_have_7_bits_where_sums_have_16(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch, mode: str, asked: bool | None, narrow: bool, largest: int
) -> None:
    monkeypatch.setattr(cpu, "adds_in_16_bits", lambda: narrow)
    done = compiled(net, fz.Quantize(mode=mode, reduce_range=asked, exclude=["stem", "one", "two"]))
    assert int(stored(done, "head.weight.int").abs().max()) == largest
    told = rows(done, "rewritten")["head"]
    assert told.executes.startswith("int8 weights, one scale per channel; uint8 input")
    assert ("within ±64" in told.detail) == (largest == 64)


def test_weights_alone_keep_8_bits(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "adds_in_16_bits", lambda: True)
    done = compiled(net, fz.Quantize(at="head", scheme="int8-weight"))
    assert int(stored(done, "head.weight.int").abs().max()) == 127


def test_the_bias_lies_on_the_grid_of_the_integer_product(net: nn.Module) -> None:
    done = compiled(net, fz.Quantize())
    (node,) = [node for node in done.program.graph.nodes if node.op == "get_attr" and node.target == "one.bias"]
    (layer,) = node.users
    step = done.program.state[str(layer.args[0].args[1].target)].double()
    steps = done.program.state["one.bias"].double() / (step * stored(done, "one.weight.scale").double())
    assert float((steps - steps.round()).abs().max()) < 1e-2 and bool((steps.round() != 0).any())


def test_what_a_sum_reads_and_gives_is_integers_too(net: nn.Module) -> None:
    """Else the sum's input would be there twice, in floats and in integers."""
    done = compiled(net, fz.Quantize())
    (total,) = [node for node in done.program.graph.nodes if node.target is torch.ops.aten.add.Tensor]
    assert [node.target for node in total.all_input_nodes] == [DEQUANTIZE.op] * 2


def test_what_no_layer_gives_is_read_in_floats_by_others() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(SIZE, SIZE)

        def forward(self, x: Tensor) -> Tensor:
            x = x.sigmoid()
            return self.linear(x) + x

    done = compiled(Two().eval(), fz.Quantize())
    (total,) = [node for node in done.program.graph.nodes if node.target is torch.ops.aten.add.Tensor]
    assert total.args[1].target is torch.ops.aten.sigmoid.default


def test_excluded_layers_stay(net: nn.Module) -> None:
    done = compiled(net, fz.Quantize(exclude=["stem", "head"]))
    assert rows(done, "rewritten").keys() == {"one", "two"}
    with pytest.raises(PlanError, match=r"steps\[0\].exclude: no module matches 'stme'"):
        compiled(net, fz.Quantize(exclude="stme"))


def test_a_percentile_leaves_out_what_is_rare(net: nn.Module) -> None:
    data = batches()
    data[1][0, 0, 0, 0] = 1000.0
    wide = scales(compiled(net, fz.Quantize(), data=data))["input"][0]
    narrow = scales(compiled(net, fz.Quantize(calibrate="percentile", percentile=99.9), data=data))["input"][0]
    assert wide == pytest.approx((1000 - float(torch.stack(data).min())) / 255) and narrow < 0.05


def test_warnings_name_what_saturates_and_which_channels_stand_out(net: nn.Module) -> None:
    loud = [batch * torch.tensor([1.0, 1.0, 100.0]).view(3, 1, 1) for batch in batches()]
    done = compiled(net, fz.Quantize(calibrate="percentile", percentile=95), data=loud)
    told = rows(done, "rewritten")["stem"].detail
    assert "of its input saturates" in told and "the largest channel of its input is" in told
    quiet = rows(compiled(net, fz.Quantize()), "rewritten")["stem"].detail
    assert "warning" not in quiet


def test_calibration_ends_when_ranges_have_converged(net: nn.Module) -> None:
    read = []

    class Data:
        def __iter__(self) -> Any:
            for number in range(60):
                read.append(number)
                yield batches(1)[0]

    done = compiled(net, fz.Quantize(), data=Data())
    assert "ranges of 272 rows of calibration data, then converged" in rows(done, "rewritten")["one"].detail
    assert read[:18] == [*range(17), 0]


def test_what_has_no_range_is_an_error_that_names_it(net: nn.Module) -> None:
    data = batches()
    data[1][0, 0, 0, 0] = torch.nan
    with pytest.raises(PassError, match="is NaN or Inf on the calibration data"):
        compiled(net, fz.Quantize(), data=data)


def test_dynamic_scales_are_of_the_call(net: nn.Module) -> None:
    done = compiled(net, fz.Quantize(mode="dynamic"))
    assert rows(done, "rewritten").keys() == {"head"} and rows(done, "refused").keys() == {"stem", "one", "two"}
    assert "8 to 14 times slower" in rows(done, "refused")["stem"].detail
    for size in (1e-3, 1.0, 1e3):
        assert snr(done, net, size * batches(1)[0]) > 30


@pytest.mark.parametrize(
    ("scheme", "granularity", "least"),
    [("int8-weight", "channel", 35), ("int8-weight", "group:4", 35), ("int4-weight", "group:4", 10)],
)
def test_weights_alone(net: nn.Module, scheme: str, granularity: str, least: float) -> None:
    done = compiled(net, fz.Quantize(scheme=scheme, granularity=granularity, allow_simulated=True))
    assert rows(done, "rewritten").keys() == ({"head"} if "group" in granularity else LAYERS)
    assert snr(done, net, batches(4)[-1]) > least
    assert not any(node.target is QUANTIZE.op for node in done.program.graph.nodes)
    assert stored(done, "head.weight.scale").shape == ((5, 2) if "group" in granularity else (5,))
    if scheme == "int4-weight":
        assert stored(done, "head.weight.int").abs().max() == 7


def test_weights_of_convolutions_alone_stay_floats_with_a_reason(net: nn.Module) -> None:
    done = compiled(net, fz.Quantize(scheme="int8-weight"))
    assert rows(done, "rewritten").keys() == {"head"}
    told = rows(done, "refused")
    assert told.keys() == LAYERS - {"head"}
    assert all("use scheme='int8', or allow_simulated=True" in row.detail for row in told.values())


@pytest.mark.parametrize("step", [{}, {"mode": "dynamic"}, {"scheme": "int8-weight"}], ids=str)
def test_transposed_convolutions_stay_floats_with_a_reason(step: dict[str, Any]) -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2, stride=2), nn.Flatten(2), nn.Linear(4 * SIZE * SIZE, 2)).eval()
    done = compiled(model, fz.Quantize(**step))
    assert rows(done, "rewritten").keys() == {"2"}
    assert "transposed convolutions" in rows(done, "refused")["0"].detail


def test_what_is_stored_input_by_output_has_its_scales_there() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(SIZE, 4)), nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x.flatten(0, 2), self.weight)

    model = nn.Sequential(Product()).eval()
    for step in (fz.Quantize(), fz.Quantize(scheme="int8-weight")):
        assert stored(compiled(model, step), "0.weight.scale").shape == (4,)
    step = fz.Quantize(scheme="int8-weight", granularity="group:4")
    assert stored(compiled(model, step), "0.weight.scale").shape == (2, 4)


def test_scales_of_an_embedding_are_of_rows_or_of_parts_of_them() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(6, SIZE)

        def forward(self, x: Tensor) -> Tensor:
            return self.table((x > 0).long())

    model = Table().eval()
    assert stored(compiled(model, fz.Quantize(scheme="int8-weight")), "table.weight.scale").shape == (6,)
    halves = compiled(model, fz.Quantize(scheme="int4-weight", granularity="group:4"))
    assert stored(halves, "table.weight.scale").shape == (6, 2)
    refused = rows(compiled(model, fz.Quantize(scheme="int4-weight", granularity="group:6")), "refused")
    assert refused["table"].detail == f"its {SIZE} columns are no multiple of 6"
