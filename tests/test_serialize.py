"""fxfreeze.serialize: a Program survives as JSON and safetensors, and nothing else is accepted in their place."""

from __future__ import annotations

import json
import math

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxfreeze import Dim, Input, Plan
from fxfreeze.capture import capture
from fxfreeze.errors import ArtifactError
from fxfreeze.program import Origin, Program
from fxfreeze.sampling import sample_inputs
from fxfreeze.serialize import (
    FORMAT,
    GRAPH_FILE,
    WEIGHTS_FILE,
    Interface,
    decode,
    dense_bytes,
    encode,
    load_program,
    operator_name,
    pack,
    resolve_operator,
    save_program,
    unpack,
)


def program_of(model: nn.Module, *inputs: Input, **plan) -> Program:
    torch.manual_seed(0)
    return capture(model.eval(), Plan(inputs=list(inputs), **plan))[0]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, image):
        hidden = self.stem(image)
        return {"logits": self.head(hidden.mean((2, 3))), "hidden": [hidden]}


class Attention(nn.Module):
    """Sizes in views, an infinite constant, a string argument, dtypes, bools, integer outputs."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.table.weight

    def forward(self, ids, mask):
        x = self.table(ids)
        batch, seq, width = x.shape
        x = x.view(batch, seq, 2, width // 2)
        scores = torch.einsum("bihd,bjhd->bhij", x, x)
        scores = scores.masked_fill(~mask[:, None, None, :], -math.inf).softmax(-1)
        mixed = torch.einsum("bhij,bjhd->bihd", scores, x).reshape(batch, seq, width)
        logits = self.out(mixed)
        return logits, logits.argmax(-1), mask.sum(dtype=torch.int32), logits.to(torch.float64).amax()


class Spectrum(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("filter", torch.randn(9, dtype=torch.complex64))

    def forward(self, signal):
        return torch.fft.irfft(torch.fft.rfft(signal) * self.filter), torch.fft.rfft(signal)


CASES = {
    "conv": lambda: program_of(Net(), Input("image", shape=("batch", 3, 6, 6))),
    "attention": lambda: program_of(
        Attention(),
        Input("ids", shape=("batch", "seq"), dtype="int64", low=0, high=10),
        Input("mask", shape=("batch", "seq"), dtype="bool"),
        dims={"seq": Dim(max=64)},
    ),
    "lstm": lambda: program_of(nn.LSTM(4, 3, bidirectional=True, batch_first=True), Input("x", shape=("batch", 5, 4))),
    "fft": lambda: program_of(Spectrum(), Input("signal", shape=("batch", 16))),
    "half": lambda: program_of(nn.Linear(4, 4).bfloat16(), Input("x", shape=("n", 4), dtype="bfloat16")),
}


@pytest.mark.parametrize("case", CASES)
def test_a_program_survives(case, tmp_path):
    program = CASES[case]()
    assert save_program(program, tmp_path) == [GRAPH_FILE, WEIGHTS_FILE]
    loaded = load_program(tmp_path)
    loaded.verify()
    assert loaded.structural_hash() == program.structural_hash()
    assert str(loaded).count("\n") == str(program).count("\n")
    assert Interface.of(loaded) == Interface.of(program)
    assert list(loaded.state) == list(dict.fromkeys(str(n.target) for n in program.graph.nodes if n.op == "get_attr"))
    for sizes in ({"batch": 1, "seq": 1, "n": 1}, {"batch": 3, "seq": 4, "n": 2}):
        inputs = sample_inputs(program, sizes, seed=0)
        for runner in (loaded.run, loaded.graph_module(), load_program(tmp_path, shapes=False).graph_module()):
            for mine, theirs in zip(runner(*inputs), program.run(*inputs), strict=True):
                # Not bit for bit: weights in a file are aligned otherwise, and a GEMM may then add in another order.
                torch.testing.assert_close(mine, theirs, equal_nan=True)


def test_the_files_are_data(tmp_path):
    save_program(CASES["conv"](), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [GRAPH_FILE, WEIGHTS_FILE]
    document = json.loads((tmp_path / GRAPH_FILE).read_text(), parse_constant=lambda name: pytest.fail(name))
    assert document["format"] == 1 and "dense_bytes" not in document  # nothing has zeros to speak of
    assert str(tmp_path.root) + "home" not in json.dumps(document)
    assert {"aten.conv2d.default", "aten.linear.default"} <= {node.get("target") for node in document["nodes"]}
    assert set(safetensors.torch.load_file(tmp_path / WEIGHTS_FILE)) >= {"stem.0.weight", "head.bias"}


def test_shapes_are_computed_again_with_symbolic_dims(tmp_path):
    program = CASES["attention"]()
    save_program(program, tmp_path)
    loaded = load_program(tmp_path)
    ids, mask = loaded.placeholders
    assert [isinstance(size, torch.SymInt) for size in ids.meta["val"].shape] == [True, True]
    assert str(ids.meta["val"].shape) == str(mask.meta["val"].shape)
    logits = loaded.output_nodes[0].meta["val"]
    assert str(logits.shape[:2]) == str(ids.meta["val"].shape) and logits.shape[2] == 11
    for old, new in zip(program.graph.nodes, loaded.graph.nodes, strict=True):
        if isinstance(old.meta.get("val"), torch.Tensor):
            assert (old.meta["val"].dtype, old.meta["val"].ndim) == (new.meta["val"].dtype, new.meta["val"].ndim)


def test_where_a_node_came_from_survives(tmp_path):
    program = CASES["conv"]()
    conv = next(node for node in program.graph.nodes if "conv2d" in str(node.target))
    conv.meta["fxfreeze"] = Origin("lora", "DELTA", "stem.0")
    save_program(program, tmp_path)
    loaded = load_program(tmp_path)
    twin = next(node for node in loaded.graph.nodes if "conv2d" in str(node.target))
    assert loaded.module_path(twin) == program.module_path(conv) == "stem.0"
    assert loaded.module_classes(twin) == program.module_classes(conv)
    assert loaded.source_line(twin) == program.source_line(conv)
    assert twin.meta["fxfreeze"] == Origin("lora", "DELTA", "stem.0")
    assert set(loaded.sites()) == set(program.sites())


def test_constants_are_stored_in_their_storage_dtype(tmp_path):
    program = CASES["conv"]()
    program.state["head.weight"] = program.state["head.weight"].double()  # as a fold leaves it before rounding
    save_program(program, tmp_path)
    assert load_program(tmp_path).state["head.weight"].dtype == torch.float32


# ------------------------------------------------------------------------------------------- constants

BASE = torch.arange(24.0)
TENSORS = {
    "contiguous": torch.randn(3, 4),
    "parameter": nn.Parameter(torch.randn(2)),
    "transposed": torch.randn(3, 4).T,
    "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "expanded": torch.randn(1, 4).expand(3, 4),
    "gapped": torch.randn(8, 8)[::2, 1:3],
    "scalar": torch.tensor(3.5),
    "bool": torch.tensor([True, False]),
    "zero-size": torch.empty(0, 3),
    "int8": torch.randint(-128, 127, (5,), dtype=torch.int8),
    "uint16": torch.arange(5).to(torch.uint16),
    "bfloat16": torch.randn(5).bfloat16(),
    "float8": torch.randn(5).to(torch.float8_e4m3fn),
    "complex64": torch.randn(2, 3, dtype=torch.complex64),
    "complex128, conjugated": torch.randn(2, 3, dtype=torch.complex128).conj().T,
    "nan": torch.tensor([math.nan, -math.inf, -0.0]),
}


def through_a_file(state, tmp_path):
    records, stored = pack(state)
    safetensors.torch.save_file(stored, tmp_path / WEIGHTS_FILE)
    return unpack(json.loads(json.dumps(records)), safetensors.torch.load_file(tmp_path / WEIGHTS_FILE))


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    bits = [value.detach().resolve_conj().contiguous() for value in (one, other)]
    return torch.equal(*(value.as_strided((value.numel(),), (1,)).view(torch.uint8) for value in bits))


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_survives(name, tmp_path):
    tensor = TENSORS[name].resolve_conj()
    loaded = through_a_file({"a": tensor}, tmp_path)["a"]
    assert same_bits(loaded, tensor)
    if name in ("transposed", "channels_last", "expanded"):
        assert loaded.stride() == tensor.stride()


def test_all_together(tmp_path):
    state = {name: tensor.resolve_conj() for name, tensor in TENSORS.items()}
    loaded = through_a_file(state, tmp_path)
    assert list(loaded) == list(state)
    assert all(same_bits(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize(
    "views",
    [
        {"a": BASE, "b": BASE},
        {"a": BASE, "b": BASE.view(4, 6).T},
        {"a": BASE[:16], "b": BASE[8:], "c": BASE[4:8]},
        {"a": BASE.view(4, 6)[:, :4], "b": BASE.view(4, 6)[:, 2:]},
        {"b": BASE[4:8], "a": BASE[:12].view(3, 4)},
    ],
    ids=["tied", "transposed", "overlapping", "columns", "nested"],
)
def test_shared_memory_is_stored_once_and_shared_again(views, tmp_path):
    loaded = through_a_file(views, tmp_path)
    assert all(same_bits(loaded[name], views[name]) for name in views)
    assert len({value.untyped_storage().data_ptr() for value in loaded.values()}) == 1
    stored = safetensors.torch.load_file(tmp_path / WEIGHTS_FILE)
    assert sum(value.numel() for value in stored.values()) <= BASE.numel()


def test_tied_parameters_are_stored_once(tmp_path):
    program = CASES["attention"]()
    weights = {name: value for name, value in program.state.items() if value.dtype == torch.float32 and value.ndim == 2}
    save_program(program, tmp_path)
    assert (tmp_path / WEIGHTS_FILE).stat().st_size < 11 * 8 * 4 + 1000
    loaded = load_program(tmp_path)
    assert len({loaded.state[name].untyped_storage().data_ptr() for name in weights}) == 1


def test_a_small_view_does_not_drag_its_storage_along(tmp_path):
    big = torch.randn(1000, 1000)
    state = {"row": big[3], "column": big[:, 5], "pieces of one buffer": big[10], "apart": big[900]}
    loaded = through_a_file(state, tmp_path)
    assert all(same_bits(loaded[name], state[name]) for name in state)
    assert (tmp_path / WEIGHTS_FILE).stat().st_size < 4 * 4 * 1000 + 1000


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 6),
            st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=3),
            st.sampled_from([torch.float32, torch.int64, torch.bool, torch.complex64]),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_any_views_of_any_buffers_survive(views):
    buffers = {
        torch.float32: torch.randn(64), torch.int64: torch.arange(64), torch.bool: torch.arange(64) % 3 == 0,
        torch.complex64: torch.randn(64, dtype=torch.complex64),
    }  # fmt: skip
    state = {
        str(position): torch.as_strided(buffers[dtype], [s for s, _ in axes], [t for _, t in axes], offset)
        for position, (offset, axes, dtype) in enumerate(views)
    }
    records, stored = pack(state)
    restored = unpack(records, safetensors.torch.load(safetensors.torch.save(stored)))
    assert all(same_bits(restored[name], state[name]) for name in state)


@pytest.mark.parametrize(
    "change",
    [
        {"data": "b"},
        {"shape": [3, 5]},
        {"stride": [4, 2]},
        {"offset": 1},
        {"offset": -1},
        {"stride": [1]},
        {"dtype": "float64"},
        {"dtype": "int32"},
    ],
)
def test_records_that_do_not_fit_their_data_are_refused(change):
    records, stored = pack({"a": torch.randn(3, 4)})
    with pytest.raises(ArtifactError, match=WEIGHTS_FILE):
        unpack({"a": {**records["a"], **change}}, stored)


# ---------------------------------------------------------------------------------------------- zeros


def some_zeros(dtype: torch.dtype, *shape: int, keep: float = 0.1) -> torch.Tensor:
    """Random bits in a share of the elements: NaN, infinities and denormals among them."""
    generator = torch.Generator().manual_seed(0)
    count = math.prod(shape)
    if dtype == torch.bool:
        return (torch.rand(shape, generator=generator) < keep).to(dtype)
    bytes_ = torch.randint(1, 256, (count, dtype.itemsize), dtype=torch.uint8, generator=generator)
    bytes_[torch.rand(count, generator=generator) >= keep] = 0
    return bytes_.reshape(-1).view(dtype).reshape(shape)


MASKED_DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.complex128,
    torch.bool, torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64,
]  # fmt: skip


@pytest.mark.parametrize("dtype", MASKED_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8192,), (65, 127), (4097, 2, 1)], ids=str)
def test_zeros_are_not_stored(dtype, shape, tmp_path):
    tensor = some_zeros(dtype, *shape)
    loaded = through_a_file({"a": tensor}, tmp_path)["a"]
    assert same_bits(loaded, tensor)
    count, bits = int(tensor.view(torch.uint8).reshape(-1, dtype.itemsize).any(1).sum()), -(-tensor.numel() // 8)
    assert (tmp_path / WEIGHTS_FILE).stat().st_size < count * dtype.itemsize + bits + 400
    assert 0 < count < 0.2 * tensor.numel()


def test_every_bit_of_a_small_number_counts(tmp_path):
    """−0, the smallest denormal and NaN come back as they are."""
    tensor = torch.zeros(5000)
    tensor[7], tensor[19], tensor[4001], tensor[4999] = -0.0, 1e-45, math.nan, math.inf
    records, stored = pack({"a": tensor})
    assert stored["a"].numel() == 4 and stored[records["a"]["mask"]].numel() == 625
    loaded = through_a_file({"a": tensor}, tmp_path)["a"]
    assert same_bits(loaded, tensor) and math.copysign(1, loaded[7]) == -1 and loaded[19] > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64,
                                   torch.complex128], ids=str)  # fmt: skip
def test_what_a_mask_leaves_are_zeros_of_either_sign(dtype, tmp_path):
    tensor = some_zeros(dtype, 90, 100)
    flipped = -tensor if dtype.is_complex else (tensor.float().neg() if dtype.itemsize == 1 else -tensor).to(dtype)
    tensor = torch.where(torch.rand(90, 100) < 0.5, tensor, flipped)
    assert same_bits(through_a_file({"a": tensor}, tmp_path)["a"], tensor)
    if dtype.is_floating_point:  # one byte of bits for the elements that are there, one for the zeros
        assert 0.3 < torch.signbit(tensor.float())[tensor.float() == 0].float().mean() < 0.7
        assert (tmp_path / WEIGHTS_FILE).stat().st_size < 9000 * (0.12 * dtype.itemsize + 2 / 8) + 400


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_half_an_element_is_enough(dtype, tmp_path):
    tensor = torch.zeros(5000, dtype=dtype)
    tensor[5], tensor[6], tensor[7] = 1j, 1.0, complex(-0.0, 0.0)
    assert pack({"a": tensor})[1]["a"].nbytes == 3 * dtype.itemsize
    assert same_bits(through_a_file({"a": tensor}, tmp_path)["a"], tensor)


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_no_zeros_and_nothing_but_zeros(keep, tmp_path):
    tensor = torch.full((70, 70), keep)
    records, stored = pack({"a": tensor})
    assert ("mask" in records["a"]) == (keep == 0)
    assert same_bits(through_a_file({"a": tensor}, tmp_path)["a"], tensor)
    assert sum(value.numel() for value in stored.values()) == (4900 if keep else 613)


@pytest.mark.parametrize(("numel", "keep", "masked"), [(1024, 0.5, True), (1023, 0.5, False),
                                                       (4096, 0.86, True), (4096, 0.88, False)])  # fmt: skip
def test_what_saves_little_is_stored_as_it_is(numel, keep, masked):
    tensor = torch.zeros(numel)
    tensor[: int(keep * numel)] = 1.0
    records, stored = pack({"a": tensor})
    assert ("mask" in records["a"]) == masked == (len(stored) == 2)
    if masked:
        assert sum(value.nbytes for value in stored.values()) <= 0.9 * tensor.nbytes


ZEROS = some_zeros(torch.float32, 120, 100)


@pytest.mark.parametrize(
    "views",
    [
        {"a": ZEROS.T},
        {"a": ZEROS, "b": ZEROS},
        {"a": ZEROS, "b": ZEROS.T, "c": ZEROS[3:70]},
        {"a": ZEROS, "b": ZEROS.view(torch.int32)},
        {"a": ZEROS.expand(2, 120, 100), "a#nonzero": torch.ones(3), "a#nonzero+": torch.ones(2)},
    ],
    ids=["transposed", "tied", "views", "two dtypes", "names of masks"],
)
def test_views_of_what_has_zeros(views, tmp_path):
    loaded = through_a_file(views, tmp_path)
    assert list(loaded) == list(views) and all(same_bits(loaded[name], views[name]) for name in views)
    assert all(loaded[name].stride() == views[name].stride() for name in views)
    one_dtype = len({value.dtype for value in views.values()}) == 1
    assert (tmp_path / WEIGHTS_FILE).stat().st_size < (0.2 if one_dtype else 0.4) * ZEROS.nbytes
    if one_dtype and set(views) <= {"a", "b", "c"}:
        assert len({value.untyped_storage().data_ptr() for value in loaded.values()}) == 1


def test_the_version_says_that_there_are_masks(tmp_path):
    """An older reader takes what it can read, and refuses what it cannot."""
    model = nn.Linear(100, 120)
    model.weight.data = ZEROS.clone().nan_to_num(1.0, 1.0, 1.0)
    save_program(program_of(model, Input("x", shape=("n", 100))), tmp_path)
    document = json.loads((tmp_path / GRAPH_FILE).read_text())
    assert document["format"] == FORMAT == 2
    assert dense_bytes(tmp_path) == document["dense_bytes"] == 4 * (100 * 120 + 120)
    assert (tmp_path / WEIGHTS_FILE).stat().st_size < 0.2 * 4 * 100 * 120
    assert same_bits(load_program(tmp_path).state["weight"], model.weight)
    (tmp_path / "dense").mkdir()
    save_program(CASES["half"](), tmp_path / "dense")
    assert json.loads((tmp_path / "dense" / GRAPH_FILE).read_text())["format"] == 1
    assert dense_bytes(tmp_path / "dense") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda records, stored: stored.update({"a#nonzero": stored["a#nonzero"][:-1]}),
        lambda records, stored: stored.update({"a#nonzero": stored["a#nonzero"].int()}),
        lambda records, stored: stored.update({"a#nonzero": stored["a#nonzero"] | 1}),
        lambda records, stored: stored.update({"a": stored["a"][:-1]}),
        lambda records, stored: stored.pop("a#nonzero"),
        lambda records, stored: records["a"].update(length=4992),
        lambda records, stored: records["a"].update(length=10**15),
        lambda records, stored: records["a"].update(length=-5000),
        lambda records, stored: records["a"].update(mask="a"),
        lambda records, stored: records["a"].pop("mask"),
        lambda records, stored: records["a"].update(shape=[5001]),
    ],
)
def test_masks_that_do_not_fit_are_refused(damage):
    tensor = torch.zeros(5000)
    tensor[1::7] = 1.0
    records, stored = pack({"a": tensor})
    damage(records, stored)
    with pytest.raises(ArtifactError, match=WEIGHTS_FILE):
        unpack(records, stored)


def test_a_bit_beyond_the_last_element_is_refused():
    tensor = torch.zeros(5001)
    tensor[5000] = 1.0
    records, stored = pack({"a": tensor})
    stored["a#nonzero"][-1] = 2
    with pytest.raises(ArtifactError, match="constant 'a' has a wrong mask: there are bits beyond 5001 elements"):
        unpack(records, stored)


# ------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "value",
    [
        None, True, False, 3, -0.0, 1.0, 1e-320, math.inf, -math.inf, complex(1, math.inf), "mean", "",
        [1, [2.5, None]], (), (1, (2,)), {"a": (1,)}, slice(None, 3, 2), torch.float16, torch.device("cuda:1"),
        torch.strided,
        torch.channels_last, torch.preserve_format, [True, 1, 1.0],
    ],
    ids=repr,
)  # fmt: skip
def test_an_argument_survives(value):
    result = decode(json.loads(json.dumps(encode(value), allow_nan=False)), {})
    assert result == value and type(result) is type(value) and repr(result) == repr(value)


def test_nan_survives():
    assert math.isnan(decode(encode(math.nan), {}))


@pytest.mark.parametrize("value", [torch.zeros(1), object(), torch.Generator(), {1: 2}, nn.Linear(1, 1)])
def test_an_argument_that_is_no_data_is_refused(value):
    with pytest.raises(ArtifactError, match="cannot be stored"):
        encode(value)


@pytest.mark.parametrize("value", [{"node": "missing"}, {"dtype": "load"}, {"eval": "1"}, {}, {"device": "nowhere"}])
def test_a_malformed_argument_is_refused(value):
    with pytest.raises(ArtifactError, match="malformed"):
        decode(value, {})


@pytest.mark.parametrize(
    "target", [torch.ops.aten.add.Tensor, torch.ops.aten.conv2d.default, torch.sym_max, math.floor]
)
def test_an_operator_survives(target):
    assert resolve_operator(operator_name(target)) is target


@pytest.mark.parametrize(
    "name", ["aten.nothing.default", "load_library.x", "os.system", "operator.attrgetter", "builtins.eval", "aten", ""]
)
def test_what_is_no_operator_is_not_found(name):
    with pytest.raises(ArtifactError, match="not known"):
        resolve_operator(name)


def test_an_operator_of_a_library_that_is_not_imported(tmp_path):
    with torch.library._scoped_library("fxfreeze_elsewhere", "DEF") as library:
        library.define("double(Tensor x) -> Tensor")
        library.impl("double", lambda x: x * 2, "CompositeExplicitAutograd")
        library.impl("double", lambda x: torch.empty_like(x), "Meta")

        class Model(nn.Module):
            def forward(self, x):
                return torch.ops.fxfreeze_elsewhere.double(x)

        save_program(program_of(Model(), Input("x", shape=("n", 2))), tmp_path)
        assert load_program(tmp_path).run(torch.ones(1, 2))[0].sum() == 4
    text = (tmp_path / GRAPH_FILE).read_text()
    (tmp_path / GRAPH_FILE).write_text(text.replace("fxfreeze_elsewhere", "fxfreeze_unheard_of"))
    with pytest.raises(ArtifactError, match=r"fxfreeze_unheard_of\.double\.default") as caught:
        load_program(tmp_path)
    assert "import" in str(caught.value)


def test_a_higher_order_operator_is_refused_by_module_path(tmp_path):
    program = CASES["conv"]()
    linear = next(node for node in program.graph.nodes if "linear" in str(node.target))
    linear.target = torch.ops.higher_order.cond
    with pytest.raises(ArtifactError, match="head"):
        save_program(program, tmp_path)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=FORMAT + 1), "newer"),
        (lambda d: d.pop("nodes"), "malformed"),
        (lambda d: d["constants"].pop("head.weight"), "head.weight"),
        (lambda d: d["nodes"][-2].update(target="aten.relu_.default"), "writes to an operand"),
        (lambda d: d["nodes"].insert(0, d["nodes"].pop(-2)), "malformed"),
        (lambda d: d["nodes"].append(dict(d["nodes"][0])), "two nodes"),
        (lambda d: d["nodes"][0].update(op="call_module"), "call_module"),
        (lambda d: d["inputs"][0].update(dtype="float99"), "malformed"),
        (lambda d: d["inputs"][0].update(shape=["batch", 4, 6, 6]), "does not run"),
    ],
)
def test_a_damaged_graph_is_refused(change, message, tmp_path):
    save_program(CASES["conv"](), tmp_path)
    document = json.loads((tmp_path / GRAPH_FILE).read_text())
    change(document)
    (tmp_path / GRAPH_FILE).write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=message):
        load_program(tmp_path)


@pytest.mark.parametrize("name", [GRAPH_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("damage", ["missing", "truncated", "other"])
def test_a_damaged_file_is_refused_by_name(name, damage, tmp_path):
    save_program(CASES["conv"](), tmp_path)
    path = tmp_path / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"[1, 2]")
    with pytest.raises(ArtifactError, match=name):
        load_program(tmp_path)
