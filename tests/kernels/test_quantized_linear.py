"""fxfreeze::quantized_linear against a dense product in float64, in torch, in C++ and in Triton."""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import fxfreeze as fz
from fxfreeze.capture import capture
from fxfreeze.emit import aoti
from fxfreeze.kernels._op import OPS
from fxfreeze.kernels.quantized_linear import SCORES, pack, unpack
from fxfreeze.lower import Lowering
from fxfreeze.serialize import Interface

KERNEL = OPS["quantized_linear"]
FORMS = {"reference": KERNEL.reference, "op": KERNEL.op}


def draw(*shape: int, inputs: int, out: int, groups: int, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, integers up to the very ends of their range, scales and bias."""
    generator = torch.Generator().manual_seed(0)
    limit = 2 ** (bits - 1)
    integers = torch.randint(-limit, limit, (out, inputs), generator=generator).to(torch.int8)
    scale = torch.rand(out, groups, generator=generator) + 0.1
    return torch.randn(*shape, inputs, generator=generator), integers, scale, torch.randn(out, generator=generator)


def agrees(
    found: Tensor, x: Tensor, integers: Tensor, scale: Tensor, bias: Tensor | None, *, roundings: float = 4
) -> None:
    """Every sum within some roundings of its terms' absolute values."""
    weight = integers.double() * scale.double().repeat_interleave(integers.shape[1] // scale.shape[1], 1)
    offset = None if bias is None else bias.double()
    want = linear(x.double(), weight, offset)
    size = linear(x.double().abs(), weight.abs(), None if offset is None else offset.abs())
    assert found.dtype == x.dtype and found.shape == want.shape
    assert ((found.double() - want).abs() <= roundings * torch.finfo(x.dtype).eps * size).all()


def test_packing_keeps_every_integer() -> None:
    integers = torch.arange(-8, 8, dtype=torch.int8).repeat(2, 8)[:, torch.randperm(128)]
    packed = pack(integers)
    assert packed.shape == (2, 64) and packed.dtype == torch.int8
    assert torch.equal(unpack(packed), integers)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("inputs", "groups"), [(32, 1), (128, 4), (192, 3), (96, 1)])
@pytest.mark.parametrize("shape", [(), (1,), (4,), (7,), (2, 5), (0,)], ids=str)
def test_products(form: str, bits: int, inputs: int, groups: int, shape: tuple[int, ...]) -> None:
    x, integers, scale, bias = draw(*shape, inputs=inputs, out=11, groups=groups, bits=bits)
    weight = integers if bits == 8 else pack(integers)
    agrees(FORMS[form](x, weight, scale, bias), x, integers, scale, bias)
    agrees(FORMS[form](x, weight, scale), x, integers, scale, None)


def test_inputs_that_are_no_whole_chunks_and_float64_run_as_well() -> None:
    x, integers, scale, bias = draw(3, inputs=20, out=5, groups=2, bits=8)
    agrees(KERNEL.op(x, integers, scale, bias), x, integers, scale, bias)
    x, integers, scale, bias = draw(3, inputs=64, out=5, groups=2, bits=8)
    found = KERNEL.op(x.double(), integers, scale.double(), bias.double())
    agrees(found, x.double(), integers, scale, bias)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("inputs", "groups"), [(32, 1), (320, 10), (544, 1), (768, 3)])
@pytest.mark.parametrize("out", [3, 32, 75])
@pytest.mark.parametrize("rows", [9, 12, 15, 29])
def test_many_rows(bits: int, inputs: int, groups: int, out: int, rows: int) -> None:
    """More inputs than a tile is deep, outputs that are no whole tile, and rows that are left over."""
    x, integers, scale, bias = draw(rows, inputs=inputs, out=out, groups=groups, bits=bits)
    weight = integers if bits == 8 else pack(integers)
    agrees(KERNEL.op(x, weight, scale, bias), x, integers, scale, bias)
    agrees(KERNEL.op(x, weight, scale), x, integers, scale, None)


@pytest.mark.parametrize("rows", [(8, 1), (33, 11)], ids=["few", "many"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_does_not_depend_on_its_neighbours(rows: tuple[int, int], bits: int) -> None:
    x, integers, scale, bias = draw(rows[0], inputs=320, out=70, groups=2, bits=bits)
    weight = integers if bits == 8 else pack(integers)
    together = KERNEL.op(x, weight, scale, bias)
    assert torch.equal(together, torch.cat([KERNEL.op(part, weight, scale, bias) for part in x.split(rows[1])]))


@pytest.mark.parametrize("rows", [8, 40])
def test_threads_change_nothing(rows: int) -> None:
    x, integers, scale, bias = draw(rows, inputs=512, out=300, groups=4, bits=4)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(KERNEL.op(x, pack(integers), scale, bias))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 64, dtype=torch.int8)}, "x is torch.int8"),
        ({"weight": torch.ones(3, 64)}, "weight is torch.float32"),
        ({"weight": torch.ones(3, 16, dtype=torch.int8)}, r"weight is torch.int8 of shape \[3, 16\]"),
        ({"scale": torch.ones(3, 5)}, r"scale is torch.float32 of shape \[3, 5\]"),
        ({"scale": torch.ones(3, 2, dtype=torch.float64)}, "scale is torch.float64"),
        ({"bias": torch.ones(4)}, r"bias is torch.float32 of shape \[4\]"),
        ({"threshold": torch.ones(1)}, r"threshold is torch.float32 of shape \[1\]"),
        ({"gain": torch.ones(3).half()}, "gain is torch.float16"),
        ({"score": "H"}, "score 'H' is none of 'h', 'abs'"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    given = {"x": torch.ones(2, 64), "weight": torch.ones(3, 64, dtype=torch.int8), "scale": torch.ones(3, 2)} | change
    for form in (KERNEL.reference, KERNEL.op, KERNEL.fake, KERNEL.launch):
        with pytest.raises(ValueError, match=message):
            form(**given)


@pytest.mark.slow
def test_aoti_packages_hold_the_cpp_and_the_integers(tmp_path: Path) -> None:
    eight, four = (draw(3, inputs=64 * 4, out=64 * 4, groups=4, bits=bits)[1:] for bits in (8, 4))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in zip(("w8", "s8", "b8", "w4", "s4"), (*eight, pack(four[0]), four[1]), strict=True):
                self.register_buffer(name, value)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return KERNEL.op(x, self.w8, self.s8, self.b8), KERNEL.op(x, self.w4, self.s4)

    lowering = Lowering(capture(Net(), fz.Plan([fz.Input("x", ("batch", 256))], targets=[]))[0])
    aoti.emit(lowering, tmp_path)
    run = aoti.load(tmp_path, Interface.of(lowering.program))
    for batch in (1, 6, 30):
        x = torch.randn(batch, 256, generator=torch.Generator().manual_seed(batch))
        first, second = run(x)
        agrees(first, x, *eight)
        agrees(second, x, four[0], four[1], None)
    with zipfile.ZipFile(tmp_path / aoti.FILE) as archive:
        sources = "".join(archive.read(name).decode() for name in archive.namelist() if name.endswith(".cpp"))
    assert sources.count("AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_quantized_linear_native(") == 2


# ---- the gate


def short(*shape: int, inputs: int, out: int, groups: int, bits: int) -> dict[str, Tensor]:
    """Arguments whose sums are exact in float32 and often equal their thresholds."""
    x, integers, _, bias = draw(*shape, inputs=inputs, out=out, groups=groups, bits=bits)
    generator = torch.Generator().manual_seed(1)
    powers = torch.tensor([0.25, 0.5, 1.0])
    given = {
        "x": x.sign() * (x.abs() > 1.5), "weight": integers if bits == 8 else pack(integers),
        "scale": powers[torch.randint(3, (out, groups), generator=generator)], "bias": bias.round(),
        "gain": torch.randint(-3, 4, (out,), generator=generator) / 2,
    }  # fmt: skip
    h = KERNEL.reference(*list(given.values())[:4]).flatten(0, -2)
    # What row 0 has, of either sign, or about half of what rows have.
    return given | {"threshold": torch.where(torch.arange(out) % 3 > 0, h[0], h.median(0).values - 0.125)}


def by_hand(given: dict[str, Tensor], score: str) -> Tensor:
    weight = given["weight"]
    integers = weight if weight.shape[1] == given["x"].shape[-1] else unpack(weight)
    scale = given["scale"].double().repeat_interleave(integers.shape[1] // given["scale"].shape[1], 1)
    h = linear(given["x"].double(), integers.double() * scale)
    if "bias" in given:
        h = h + given["bias"].double()
    y = h * given["gain"].double() if "gain" in given else h
    if "threshold" in given:
        y = y * ((h.abs() if score == "abs" else h) > given["threshold"].double())
    return y


PARTS = [("bias", "threshold", "gain"), ("threshold",), ("gain",), ("bias", "gain"), ("threshold", "gain")]


def only(given: dict[str, Tensor], parts: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: value for name, value in given.items() if name in ("x", "weight", "scale", *parts)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("parts", PARTS, ids="-".join)
@pytest.mark.parametrize("bits", [8, 4])
def test_gates(form: str, bits: int, parts: tuple[str, ...], score: str) -> None:
    given = only(short(2, 3, inputs=64, out=21, groups=2, bits=bits), parts)
    found = FORMS[form](**given, score=score)
    assert torch.equal(found.double(), by_hand(given, score))
    if "threshold" in parts:
        assert found.any() and not found.all()


def test_half_precision_is_rounded_once() -> None:
    given = {name: value.double() for name, value in short(5, inputs=64, out=9, groups=2, bits=8).items()}
    given |= {name: given[name].bfloat16() for name in ("x", "scale", "bias")}
    given |= {name: given[name].float() for name in ("threshold", "gain")} | {"weight": given["weight"].to(torch.int8)}
    assert torch.equal(KERNEL.op(**given), by_hand(given, "h").bfloat16())


# ---- GPU

triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def launched(device: str, given: dict[str, Tensor], score: str = "h") -> Tensor:
    on = {name: value.to(device) for name, value in given.items()}
    assert KERNEL.supports(**on, score=score)
    return KERNEL.launch(**on, score=score).cpu()


SIZES = [(32, 1), (160, 5), (2080, 1), (96, 1), (384, 3), (256, 4)]
"""Inputs and groups: less than a tile and more than one, groups of 32, 64 and 128, and one that no tile divides."""


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("inputs", "groups"), SIZES)
@pytest.mark.parametrize("shape", [(), (1,), (2,), (3,), (4,), (5,), (2, 9), (0,)], ids=str)
def test_launch(device: str, bits: int, inputs: int, groups: int, shape: tuple[int, ...]) -> None:
    x, integers, scale, bias = draw(*shape, inputs=inputs, out=19, groups=groups, bits=bits)
    given = {"x": x, "weight": integers if bits == 8 else pack(integers), "scale": scale}
    agrees(launched(device, given), x, integers, scale, None)
    agrees(launched(device, given | {"bias": bias}), x, integers, scale, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("inputs", [1, 15, 17, 33, 100])
@pytest.mark.parametrize("rows", [1, 3, 6])
@pytest.mark.parametrize("out", [1, 70])
def test_launch_of_inputs_that_are_no_whole_chunks(device: str, inputs: int, rows: int, out: int) -> None:
    x, integers, scale, bias = draw(rows, inputs=inputs, out=out, groups=1, bits=8)
    given = {"x": x, "weight": integers, "scale": scale, "bias": bias}
    agrees(launched(device, given), x, integers, scale, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [20, 350])
def test_launch_of_many_tiles(device: str, rows: int, bits: int) -> None:
    """And of more than a group of rows of tiles has."""
    x, integers, scale, bias = draw(rows, inputs=128, out=200, groups=2, bits=bits)
    given = {"x": x, "weight": integers if bits == 8 else pack(integers), "scale": scale, "bias": bias}
    agrees(launched(device, given), x, integers, scale, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 4, 7])
@pytest.mark.parametrize(("inputs", "groups"), [(256, 2), (256, 4), (96, 3), (160, 1)])
def test_launch_of_half_precision(
    device: str, inputs: int, groups: int, rows: int, bits: int, dtype: torch.dtype
) -> None:
    """Every weight counts as it is: a scaled one, rounded, would be off by half a unit itself."""
    x, integers, scale, bias = draw(rows, inputs=inputs, out=19, groups=groups, bits=bits)
    x, scale, bias = (value.to(dtype) for value in (x, scale, bias))
    given = {"x": x, "weight": integers if bits == 8 else pack(integers), "scale": scale, "bias": bias}
    found = launched(device, given)
    assert found.dtype == dtype
    want = by_hand(given, "h")
    size = by_hand({**given, "x": x.abs(), "weight": integers.abs() if bits == 8 else pack(integers.abs().clamp(max=7))
                    } | {"bias": bias.abs()}, "h")  # fmt: skip
    # The interpreter rounds to bfloat16 by cutting off, which is up to 1 unit.
    limit = 1.01 * torch.finfo(dtype).eps * want.abs() + 1e-6 * size
    assert ((found.double() - want).abs() <= limit).all()


@pytest.mark.gpu
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("parts", PARTS, ids="-".join)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 5])
def test_launch_of_gates(device: str, rows: int, bits: int, parts: tuple[str, ...], score: str) -> None:
    """In every bit: what equals its threshold is shut."""
    given = only(short(rows, inputs=64, out=21, groups=2, bits=bits), parts)
    assert torch.equal(launched(device, given, score).double(), by_hand(given, score))


@pytest.mark.gpu
@pytest.mark.parametrize(("inputs", "groups"), [(128, 1), (128, 4), (192, 3)])
@pytest.mark.parametrize("bits", [8, 4])
def test_launch_in_tf32(device: str, bits: int, inputs: int, groups: int) -> None:
    """In every bit: TF32 holds these factors."""
    pytest.importorskip("triton")
    from fxfreeze.kernels._quantized_linear_triton import quantized_linear

    given = only(short(5, inputs=inputs, out=21, groups=groups, bits=bits), ("bias",))
    on = [value.to(device) for value in given.values()]
    found = quantized_linear(*on, None, None, score="h", precision="tf32").cpu()
    assert torch.equal(found.double(), by_hand(given, "h"))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4, 7])
def test_launch_does_not_hide_bad_values(device: str, rows: int) -> None:
    given = short(rows, inputs=64, out=21, groups=1, bits=4)
    given["x"][0, 40] = float("nan")
    found = launched(device, only(given, ("bias",)))
    assert found[0].isnan().all() and found[1:].isfinite().all()
    assert not launched(device, only(given, ("threshold",)))[0].any()


@pytest.mark.gpu
def test_launch_takes_nothing_from_the_next_row(device: str) -> None:
    """Of 33 inputs a tile has more than a row has."""
    x, integers, scale, bias = draw(6, inputs=33, out=5, groups=1, bits=8)
    x[1, 0] = float("nan")
    found = launched(device, {"x": x, "weight": integers, "scale": scale, "bias": bias})
    assert found[1].isnan().all() and found[[0, 2, 3, 4, 5]].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 6])
def test_launch_of_any_strides(device: str, rows: int) -> None:
    given = short(rows, inputs=64, out=21, groups=2, bits=4)
    want = launched(device, given)
    strided = {name: torch.stack([value, value], -1)[..., 0] for name, value in given.items()}
    assert not any(value.is_contiguous() for value in strided.values())
    assert torch.equal(launched(device, strided), want)


def test_what_the_launcher_leaves_to_the_reference() -> None:
    given = short(2, inputs=64, out=3, groups=2, bits=4)
    assert KERNEL.supports(**given) and KERNEL.supports(**given, score="abs")
    assert not KERNEL.supports(**{**given, "gain": given["gain"].to("meta")})
    assert not KERNEL.supports(**{**only(given, ()), "scale": torch.ones(3, 4)})
    x, integers, scale, _ = draw(2, inputs=20, out=3, groups=1, bits=8)
    assert KERNEL.supports(x, integers, scale) and KERNEL.supports(x.half(), integers, scale.half())
    assert not KERNEL.supports(x.double(), integers, scale.double())
    assert not KERNEL.supports(x, integers[:0], scale[:0])


@pytest.mark.slow
@triton
def test_in_the_interpreter(interpreter: Any) -> None:
    assert interpreter(__file__) > 150


@triton
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_only_where_torch_may_and_nothing_can_flip(
    gate: bool, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fxfreeze.kernels import _quantized_linear_triton as file

    used = []

    def spy(x: Tensor, weight: Tensor, *others: Any, score: str, precision: str) -> Tensor:
        used.append(precision)
        return x.new_empty(x.shape[0], weight.shape[0])

    monkeypatch.setattr(file, "quantized_linear", spy)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = allowed
        KERNEL.launch(**only(short(6, inputs=64, out=3, groups=1, bits=8), ("threshold",) if gate else ("gain",)))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert used == ["tf32" if allowed and not gate else "ieee"]


# ---- compiling


def build(bits: int, dtype: str, config: dict[str, int], *, grouped: bool = True, even: bool = True, gate: bool = True,
          precision: str = "ieee") -> tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]:  # fmt: skip
    """Kernel, types, constants, options; of a config without BK the kernel for one row."""
    from fxfreeze.kernels import _quantized_linear_triton as file

    pointer = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}[dtype]
    types = {**dict.fromkeys(("x_ptr", "scale_ptr", "bias_ptr", "y_ptr"), pointer), "w_ptr": "*i8",
             **dict.fromkeys(("N", "K", "block"), "i32")}  # fmt: skip
    gates = ("threshold_ptr", "gain_ptr")
    types |= dict.fromkeys(gates, "*fp32") if gate else {}
    constants: dict[str, Any] = {} if gate else dict.fromkeys(gates)
    constants |= {"BITS": bits, "SCORE": "h", "GROUPED": grouped, "EVEN": even}
    constants |= {key: value for key, value in config.items() if not key.startswith("num_")}
    options = {key: value for key, value in config.items() if key.startswith("num_")}
    if "BK" not in config:
        return file.row_kernel, types, constants, options
    types["M"] = "i32"
    constants |= {"FACTOR": file.factor(getattr(torch, dtype)), "PRECISION": precision}
    return file.tiled_kernel, types, constants, options


@pytest.mark.slow
@triton
@pytest.mark.parametrize(("bits", "dtype", "grouped", "even"), [
    (4, "bfloat16", True, True), (8, "bfloat16", True, True), (4, "float32", True, True), (8, "float16", False, False),
], ids=str)  # fmt: skip
def test_row_within_budget(within_budget: Any, bits: int, dtype: str, grouped: bool, even: bool) -> None:
    from fxfreeze.kernels import _quantized_linear_triton as file

    for config in file.ROW_CONFIGS:
        kernel, types, constants, options = build(bits, dtype, config, grouped=grouped, even=even)
        name = f"quantized_linear row int{bits} {dtype} {config['BN']}x{config['BC']}"
        within_budget(name + ("" if grouped else " one group") + ("" if even else " odd"), kernel, types, constants,
                      **options)  # fmt: skip


TILES = [
    (4, "bfloat16", "HALF_CONFIGS", (128, 128, 128), True, True),
    (4, "bfloat16", "HALF_CONFIGS", (16, 64, 128), True, True),
    (4, "bfloat16", "HALF_CONFIGS", (64, 128, 32), True, True),
    (8, "bfloat16", "HALF_CONFIGS", (128, 128, 128), False, True),
    (8, "float16", "HALF_CONFIGS", (64, 128, 128), True, True),
    (8, "bfloat16", "HALF_CONFIGS", (16, 64, 32), False, False),
    (4, "float32", "SINGLE_CONFIGS", (32, 64, 32), True, True),
    (8, "float32", "TF32_CONFIGS", (64, 64, 64), True, True),
]


@pytest.mark.slow
@triton
@pytest.mark.parametrize(("bits", "dtype", "configs", "tile", "grouped", "even"), TILES, ids=str)
def test_tiles_within_budget(
    within_budget: Any, bits: int, dtype: str, configs: str, tile: tuple[int, ...], grouped: bool, even: bool
) -> None:
    from fxfreeze.kernels import _quantized_linear_triton as file

    config = next(c for c in getattr(file, configs)[tile[2]] if (c["BM"], c["BN"]) == tile[:2])
    precision = "tf32" if configs.startswith("TF32") else "ieee"
    kernel, types, constants, options = build(bits, dtype, config, grouped=grouped, even=even, precision=precision)
    name = f"quantized_linear int{bits} {dtype} {'x'.join(map(str, tile))}"
    name += ("" if grouped else " one group") + ("" if even else " odd")
    within_budget(name, kernel, types, constants, **options)


@triton
def test_sizes_of_one(cost: Any) -> None:
    """Triton makes constants of integers that are 1."""
    from fxfreeze.kernels import _quantized_linear_triton as file

    for config in (file.ROW_CONFIGS[0], file.HALF_CONFIGS[32][-1]):
        kernel, types, constants, options = build(8, "bfloat16", config, grouped=False, even=False, gate=False)
        ones = dict.fromkeys(name for name, kind in types.items() if kind == "i32")
        types = {name: kind for name, kind in types.items() if name not in ones}
        assert cost(kernel, types, constants | dict.fromkeys(ones, 1), **options).spills == 0


@triton
@pytest.mark.parametrize(("bits", "loads"), [(4, ".v2.b32"), (8, ".v4.b32")])
def test_a_row_loads_vectors_of_bytes(bits: int, loads: str) -> None:
    import triton as compiler
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fxfreeze.kernels import _quantized_linear_triton as file

    kernel, types, constants, options = build(bits, "bfloat16", file.ROW_CONFIGS[0])
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel, signature={name: types.get(name, "constexpr") for name in names}, constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in types},
    )  # fmt: skip
    text = compiler.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    # 4 rows of 64 chunks of 16 or 32 bytes, by 128 threads.
    assert text.count("ld.global" + loads) >= 4 and "ld.global.b8" not in text and "ld.global.u8" not in text
