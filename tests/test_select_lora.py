"""Adapters chosen row by row, end to end: every target, and more adapters for what is compiled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fxfreeze as fz
from fxfreeze import artifact as artifact_file
from fxfreeze import banks, locks
from fxfreeze.errors import ArtifactError
from fxfreeze.serialize import load_program

SITES = {"0": (6, 10), "2": (10, 4)}
STEP = {"at": ["0", "2"], "rank": 3, "alpha": 6}
INPUTS = [fz.Input("x", shape=("batch", 2, 6))]
TARGETS = ("aoti", "onnx", "torch")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).eval()


def lone(seed: int, rank: int = 3) -> dict[str, Tensor]:
    """One adapter, as a file of its own holds it."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for site, (inner, outer) in SITES.items():
        state[f"{site}.lora_A"] = torch.randn(rank, inner, generator=generator) / 2
        state[f"{site}.lora_B"] = torch.randn(outer, rank, generator=generator) / 2
    return state


def alone(state: dict[str, Tensor] | None, x: Tensor, scale: float = 2.0) -> Tensor:
    """The model with that one adapter in its weights, in float64."""
    model = network().double()
    for site in SITES if state else ():
        layer = model[int(site)]
        delta = state[f"{site}.lora_B"].double() @ state[f"{site}.lora_A"].double()  # type: ignore[index]
        layer.weight.data += scale * delta
    result: Tensor = model(x.double())
    return result.detach()


def draw(rows: int = 6) -> Tensor:
    return torch.randn(rows, 2, 6, generator=torch.Generator().manual_seed(9))


def mixed(x: Tensor, ids: Tensor, known: dict[int, Any]) -> Tensor:
    return torch.cat([alone(known[id], row[None]) for row, id in zip(x, ids.tolist(), strict=True)])


KNOWN: dict[int, Any] = {0: None, 1: lone(1), 2: lone(2)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("select")
    for k in (1, 2):
        safetensors.torch.save_file(KNOWN[k], folder / f"{k}.safetensors")
    paths = [str(folder / f"{k}.safetensors") for k in (1, 2)]
    step, dims = fz.LoRA(**STEP, adapters=2, weights=paths), {"batch": fz.Dim(min=2)}  # one compilation, not two
    plan = fz.Plan(INPUTS, [step], targets=TARGETS, dims=dims)
    return fz.compile(network(), plan).save(folder / "out")


@pytest.fixture
def loaded(saved: Path, tmp_path: Path) -> fz.Artifact:
    """A folder of its own, which a test may add to."""
    shutil.copytree(saved, tmp_path / "out")
    return fz.load(tmp_path / "out")


@pytest.fixture(scope="module")
def runs(saved: Path) -> Iterator[fz.Artifact]:
    yield fz.load(saved)


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_gives_every_row_its_own(runs: fz.Artifact, target: str) -> None:
    x, ids = draw(), torch.tensor([0, 2, 1, 1, 0, 2])
    want = mixed(x, ids, KNOWN)
    torch.testing.assert_close(runs.target(target)(x, ids).double(), want, rtol=1e-5, atol=1e-5)
    assert (want - mixed(x, ids.flip(0), KNOWN)).abs().max() > 0.1


def test_an_id_out_of_range_is_refused(runs: fz.Artifact) -> None:
    with pytest.raises(ArtifactError, match="'adapter' holds 1 to 3, expected 0 to 2"):
        runs(draw(2), torch.tensor([1, 3]))


def test_what_is_stored_where(saved: Path) -> None:
    artifact = fz.load(saved)
    assert artifact.adapters == {"adapter_1": 1, "adapter_2": 2}
    stored = safetensors.torch.load_file(saved / "adapters" / "0.safetensors")
    assert set(stored) == {f"adapters.lora.{site}.lora_{leaf}" for site in SITES for leaf in "AB"}
    weights = safetensors.torch.load_file(saved / "program" / "weights.safetensors")
    assert not set(stored) & set(weights)  # once
    program = load_program(saved / "program")
    assert [spec.shape for spec in program.inputs][2:4] == [("adapter_choices", 3, 6), ("adapter_choices", 3, 10)]
    assert program.dims["adapter_choices"] == (2, None)


def test_the_onnx_file_runs_by_itself_and_takes_more(loaded: fz.Artifact) -> None:
    import onnxruntime

    loaded.add_adapter("third", lone(3))
    session = onnxruntime.InferenceSession(loaded.folder / "onnx" / "model.onnx")
    x, ids = draw(3), torch.tensor([0, 2, 1])
    feeds: dict[str, numpy.ndarray[Any, Any]] = {"x": x.numpy(), "adapter": ids.numpy()}
    (y,) = session.run(None, feeds)
    torch.testing.assert_close(torch.from_numpy(y).double(), mixed(x, ids, KNOWN), rtol=1e-5, atol=1e-5)
    (file,) = (loaded.folder / "adapters").iterdir()
    stored = safetensors.torch.load_file(file)
    feeds |= {name: value.numpy() for name, value in stored.items()} | {"adapter": numpy.array([3, 0, 3])}
    (y,) = session.run(None, feeds)
    want = mixed(x, torch.tensor([3, 0, 3]), KNOWN | {3: lone(3)})
    torch.testing.assert_close(torch.from_numpy(y).double(), want, rtol=1e-5, atol=1e-5)


def test_an_adapter_more_without_a_compilation(loaded: fz.Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    x, ids = draw(), torch.tensor([3, 0, 3, 1, 2, 3])
    for target in TARGETS:
        loaded.target(target)(x, torch.tensor([0, 2, 1, 1, 0, 2]))
    counters.clear()
    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", None)
    monkeypatch.setattr("torch.onnx.export", None)
    model = {name: (loaded.folder / name).read_bytes() for name in ("aoti/model.pt2", "onnx/model.onnx")}
    assert loaded.add_adapter("third", lone(3)) == 3
    assert loaded.adapters == {"adapter_1": 1, "adapter_2": 2, "third": 3}
    want = mixed(x, ids, KNOWN | {3: lone(3)})
    for target in TARGETS:
        torch.testing.assert_close(loaded.target(target)(x, ids).double(), want, rtol=1e-5, atol=1e-5)
    assert not counters["stats"]["unique_graphs"]
    assert all((loaded.folder / name).read_bytes() == data for name, data in model.items())


def test_it_is_there_in_a_fresh_object_and_in_a_copy(loaded: fz.Artifact, tmp_path: Path) -> None:
    loaded.add_adapter("third", lone(3))
    loaded.add_adapter("small", lone(4, rank=1))
    copy = loaded.save(tmp_path / "copy")
    x, ids = draw(), torch.tensor([4, 3, 0, 4, 1, 2])
    want = mixed(x, ids, KNOWN | {3: lone(3), 4: lone(4, rank=1)})
    for folder in (loaded.folder, copy):
        fresh = fz.load(folder)
        (file,) = (folder / "adapters").iterdir()
        assert fresh.adapters["small"] == 4 and file.name.startswith("4.")
        for target in ("aoti", "onnx"):
            torch.testing.assert_close(fresh.target(target)(x, ids).double(), want, rtol=1e-5, atol=1e-5)
        with pytest.raises(ArtifactError, match="expected 0 to 4"):
            fresh(x, ids + 1)
    rows = fz.load(copy).check()
    assert {row.target for row in rows} == set(TARGETS) and all(row.ok for row in rows)


def test_a_file_of_a_module_with_one_adapter_has_its_own_scale(loaded: fz.Artifact, tmp_path: Path) -> None:
    step = fz.LoRA(at=["0", "2"], rank=2, alpha=5, name="mine")
    net = fz.adapt(network(), fz.Plan(INPUTS, [step]), verify="off")
    with torch.no_grad():
        for value in net.parameters():
            value.normal_()
    net.save_adapters(tmp_path / "one.safetensors")
    loaded.add_adapter("one", tmp_path / "one.safetensors")
    x = draw()
    torch.testing.assert_close(loaded.target("onnx")(x, torch.full((6,), 3)), net(x), rtol=1e-4, atol=1e-4)


def test_an_adapter_that_peft_trained(loaded: fz.Artifact, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def trained(folder: str, **given: Any) -> Any:
        config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["0", "2"], **given)
        net = peft.get_peft_model(network(), config)
        with torch.no_grad():
            for value in net.parameters():
                if value.requires_grad:
                    value.normal_()
        net.save_pretrained(tmp_path / folder)
        return net.eval()

    net, x = trained("one", alpha_pattern={"2": 3}), draw()
    loaded.add_adapter("one", tmp_path / "one")
    torch.testing.assert_close(loaded.target("onnx")(x, torch.full((6,), 3)), net(x), rtol=1e-4, atol=1e-4)
    trained("dora", use_dora=True)
    with pytest.raises(ArtifactError, match="holds more than a LoRA: dora"):
        loaded.add_adapter("dora", tmp_path / "dora")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("adapter_1", {}, "an adapter is called 'adapter_1' already"),
        ("", {}, "needs a name"),
        ("new", {"0.lora_B": None}, r"missing 0\.lora_B"),
        ("new", {"1.lora_B": torch.zeros(4, 3)}, r"unexpected: 1\.lora_B"),
        ("new", {"0.lora_A": torch.zeros(4, 6)}, "has rank 4, but the adapters have rank 3 at most"),
        ("new", {"0.lora_A": torch.zeros(3, 7)}, r"shape \(3, 7\), but \(3, 6\) is needed"),
        ("new", {"2.lora_B": torch.zeros(5, 3)}, r"shape \(5, 3\), but \(4, 3\) is needed"),
        ("new", {"0.lora_A": torch.zeros(3, 6, dtype=torch.int32)}, "int32, but a floating dtype"),
        ("new", {"0.lora_A": torch.full((3, 6), torch.inf)}, "NaN or Inf"),
        ("new", {"0.lora_B": torch.full((10, 3), 3e38)}, "overflows torch.float32"),
    ],
)  # fmt: skip
def test_refusals(loaded: fz.Artifact, name: str, change: dict[str, Any], message: str) -> None:
    state = {key: value for key, value in (lone(3) | change).items() if value is not None}
    before = sorted(path.name for path in loaded.folder.rglob("*")), loaded.manifest["digest"]
    with pytest.raises(ArtifactError, match=message):
        loaded.add_adapter(name, state)
    assert (sorted(path.name for path in loaded.folder.rglob("*")), fz.load(loaded.folder).manifest["digest"]) == before


def test_a_select_that_is_not_there(loaded: fz.Artifact) -> None:
    with pytest.raises(ArtifactError, match="no adapters are selected by 'style', only by adapter"):
        loaded.add_adapter("new", lone(3), select="style")


def test_several_inputs_that_select_and_modes(tmp_path: Path) -> None:
    steps = [
        fz.LoRA(at="0", rank=3, adapters=2, name="a"), fz.LoRA(at="0", rank=1, adapters=1, select="style", name="b"),
        fz.LoRA(at="2", rank=2, adapters=2, name="c"), fz.LoRA(at="2", rank=1, adapters=2, select="mode", name="d"),
        fz.Gate(at="1", modes=3),
    ]  # fmt: skip
    artifact = fz.compile(network(), fz.Plan(INPUTS, steps, targets=["onnx"]), verify="off")
    assert artifact.adapters == {"adapter_1": 1, "adapter_2": 2, "style_1": 1, "mode_1": 1, "mode_2": 2}
    one = {"0.lora_A": torch.randn(1, 6), "0.lora_B": torch.randn(10, 1)}
    with pytest.raises(ArtifactError, match="selected by adapter and style and mode"):
        artifact.add_adapter("new", one)
    with pytest.raises(ArtifactError, match="gate has a mode for each of the ids of 'mode', and none for another"):
        artifact.add_adapter("new", one, select="mode")
    with pytest.raises(ArtifactError, match=r"missing 2\.lora_A"):  # both steps of an input, or neither
        artifact.add_adapter("new", one, select="adapter")
    assert artifact.add_adapter("new", one, select="style") == 2
    both = {f"adapters.a.{key}": value for key, value in one.items()}
    both |= {"adapters.c.2.lora_A": torch.randn(2, 10), "adapters.c.2.lora_B": torch.randn(4, 2)}
    assert artifact.add_adapter("pair", both, select="adapter") == 3
    x, none = draw(2), torch.zeros(2, dtype=torch.int64)
    base = artifact(x, none, none, none)
    assert torch.equal(artifact(x, none, none + 1, none), base)  # its B is zero
    added = artifact(x, none, none + 2, none), artifact(x, none + 3, none, none)
    assert all((value - base).abs().max() > 1e-3 for value in added)
    assert all(row.ok for row in artifact.check())


def test_an_artifact_without_adapters(tmp_path: Path) -> None:
    artifact = fz.compile(network(), fz.Plan(INPUTS, targets=[]))
    assert artifact.adapters == {}
    with pytest.raises(ArtifactError, match="compiled without adapters"):
        artifact.add_adapter("new", lone(3))


# ---- embeddings and convolutions


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.near = nn.Embedding(11, 6), nn.Conv1d(6, 8, 3, padding=1)
        self.image, self.far = nn.Conv2d(2, 6, 3, stride=2, groups=2), nn.Conv1d(8, 8, 3, dilation=2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.near(self.words(ids).transpose(1, 2))
        x = torch.tanh(self.far(x)).unflatten(1, (2, 4))
        return self.image(x).flatten(1)


READER = {"words": (11, 6), "near": (6, 8), "image": (1, 6), "far": (8, 8)}
"""Site → inputs that A sees, and outputs."""


def reader() -> Reader:
    torch.manual_seed(1)
    return Reader().eval()


def reading(seed: int, rank: int = 2) -> dict[str, Tensor]:
    """One adapter; B of a convolution has its window in one file, and lacks it in another."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for site, (inner, outer) in READER.items():
        window = {"words": (), "image": (3, 3)}.get(site, (3,))
        state[f"{site}.lora_A"] = torch.randn(rank, inner, *window, generator=generator) / 2
        ones = (1,) * len(window) if seed % 2 else ()
        state[f"{site}.lora_B"] = torch.randn(outer, rank, *ones, generator=generator) / 2
    return state


@torch.no_grad()
def read(x: Tensor, ids: Tensor, known: dict[int, Any]) -> Tensor:
    """Every row by the model with its adapter in its weights, in float64."""
    results = []
    for row, id in zip(x, ids.tolist(), strict=True):
        model = reader().double()
        for site in READER if known[id] else ():
            layer = model.get_submodule(site)
            a, b = (known[id][f"{site}.lora_{leaf}"].double().flatten(1) for leaf in "AB")
            layer.weight.data += 1.5 * ((b @ a).T if site == "words" else (b @ a).reshape(layer.weight.shape))
        results.append(model(row[None]))
    return torch.cat(results)


TEXTS: dict[int, Any] = {0: None, 1: reading(1), 2: reading(2)}


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("books")
    for k in (1, 2):
        safetensors.torch.save_file(TEXTS[k], folder / f"{k}.safetensors")
    paths = [str(folder / f"{k}.safetensors") for k in (1, 2)]
    step = fz.LoRA(at="*", rank=2, alpha=3, adapters=2, weights=paths)
    inputs = [fz.Input("ids", ("batch", 10), "int64", low=0, high=10)]
    plan = fz.Plan(inputs, [step], targets=TARGETS, dims={"batch": fz.Dim(min=2)})
    return fz.compile(reader(), plan).save(folder / "out")


@pytest.fixture
def book(books: Path, tmp_path: Path) -> fz.Artifact:
    shutil.copytree(books, tmp_path / "out")
    return fz.load(tmp_path / "out")


def texts(rows: int = 6) -> Tensor:
    return torch.randint(11, (rows, 10), generator=torch.Generator().manual_seed(4))


def test_every_target_reads_and_takes_more_adapters(book: fz.Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    x, ids = texts(), torch.tensor([0, 2, 1, 1, 0, 2])
    want = read(x, ids, TEXTS)
    assert (want - read(x, ids.flip(0), TEXTS)).abs().max() > 0.1
    for target in TARGETS:
        torch.testing.assert_close(book.target(target)(x, ids).double(), want, rtol=1e-5, atol=1e-5)
    counters.clear()
    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", None)
    monkeypatch.setattr("torch.onnx.export", None)
    assert book.add_adapter("third", reading(3)) == 3 and book.add_adapter("small", reading(4, rank=1)) == 4
    x, ids = texts(7), torch.tensor([4, 3, 0, 1, 4, 2, 3])
    want = read(x, ids, TEXTS | {3: reading(3), 4: reading(4, rank=1)})
    for target in TARGETS:
        torch.testing.assert_close(book.target(target)(x, ids).double(), want, rtol=1e-5, atol=1e-5)
    assert not counters["stats"]["unique_graphs"]
    stored = {bank.name: tuple(bank.spec.shape) for bank in book._shelf.banks}
    assert stored["adapters.lora.image.lora_A"] == ("adapter_choices", 2, 1, 3, 3)
    assert stored["adapters.lora.words.lora_A"] == ("adapter_choices", 2, 11)


def test_a_file_of_a_module_with_convolutions(book: fz.Artifact, tmp_path: Path) -> None:
    inputs = [fz.Input("ids", ("batch", 10), "int64", low=0, high=10)]
    net = fz.adapt(reader(), fz.Plan(inputs, [fz.LoRA(at="*", rank=1, alpha=5, name="own")]), verify="off")
    with torch.no_grad():
        for name, value in net.named_parameters():
            value.copy_(torch.linspace(-1, 1, value.numel()).view(value.shape).cos() * len(name) / 40)
    net.save_adapters(tmp_path / "one.safetensors")
    book.add_adapter("one", tmp_path / "one.safetensors")
    torch.testing.assert_close(book.target("onnx")(texts(), torch.full((6,), 3)), net(texts()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"near.lora_A": torch.zeros(2, 6, 2)}, r"shape \(2, 6, 2\), but \(2, 6, 3\) is needed"),
        ({"near.lora_A": torch.zeros(2, 18)}, r"shape \(2, 18\), but \(2, 6, 3\) is needed"),
        ({"near.lora_B": torch.zeros(8, 2, 2)}, r"shape \(8, 2, 2\), but \(8, 2\) is needed"),
        ({"words.lora_A": torch.zeros(2, 10)}, r"shape \(2, 10\), but \(2, 11\) is needed"),
        ({"image.lora_A": torch.zeros(3, 1, 3, 3)}, "has rank 3, but the adapters have rank 2 at most"),
    ],
)
def test_adapters_that_do_not_fit_the_layers(book: fz.Artifact, change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        book.add_adapter("new", reading(3) | change)


def test_peft_has_no_adapter_of_a_dilated_convolution_and_the_folder_knows(book: fz.Artifact, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    notes = {bank.site: bank.note for bank in book._shelf.banks if bank.note}
    assert notes.keys() == {"far", "image"}
    config = peft.LoraConfig(r=2, target_modules=["words", "near", "far"])
    peft.get_peft_model(reader(), config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ArtifactError, match="and peft's update of it"):
        book.add_adapter("theirs", tmp_path / "theirs")


def test_peft_trains_embeddings_and_convolutions(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    inputs = [fz.Input("ids", ("batch", 10), "int64", low=0, high=10)]
    step = fz.LoRA(at=["words", "near"], rank=2, adapters=1)
    artifact = fz.compile(reader(), fz.Plan(inputs, [step], targets=["onnx"]), verify="off")
    theirs = peft.get_peft_model(reader(), peft.LoraConfig(r=2, lora_alpha=5, target_modules=["words", "near"]))
    with torch.no_grad():
        for value in theirs.parameters():
            if value.requires_grad:
                value.copy_(torch.linspace(-1, 1, value.numel()).view(value.shape))
    theirs.save_pretrained(tmp_path / "theirs")
    artifact.add_adapter("theirs", tmp_path / "theirs")
    found = artifact(texts(), torch.full((6,), 2))
    torch.testing.assert_close(found, theirs.eval()(texts()), rtol=1e-4, atol=1e-4)
    assert (found - artifact(texts(), torch.zeros(6, dtype=torch.int64))).abs().max() > 0.1


# ---- on the disk


def test_a_killed_call_leaves_what_was_there(loaded: fz.Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(artifact_file.os, "replace", kill)
        with pytest.raises(Killed):
            loaded.add_adapter("third", lone(3))
    assert len(list((loaded.folder / "adapters").glob("3.*.safetensors"))) == 1
    fresh = fz.load(loaded.folder)
    assert fresh.adapters == {"adapter_1": 1, "adapter_2": 2} == loaded.adapters
    assert fresh.add_adapter("third", lone(3)) == 3
    (file,) = (loaded.folder / "adapters").iterdir()
    assert f"adapters/{file.name}" in fresh.sizes


def test_digests_are_kept_true(loaded: fz.Artifact) -> None:
    loaded.add_adapter("third", lone(3))
    (file,) = (loaded.folder / "adapters").iterdir()
    sizes = {key: size for key, size in loaded.sizes.items() if key.startswith("adapters/")}
    assert sizes == {f"adapters/{file.name}": file.stat().st_size}
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match="SHA-256"):
        fz.load(loaded.folder)
    (loaded.folder / "adapters" / "other.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match="does not belong"):
        fz.load(loaded.folder)


def test_two_writers_do_not_overwrite_each_other(loaded: fz.Artifact) -> None:
    other = fz.load(loaded.folder)
    other.add_adapter("theirs", lone(3))
    with pytest.raises(ArtifactError, match="changed since it was loaded"):
        loaded.add_adapter("mine", lone(4))
    assert list(fz.load(loaded.folder).adapters) == ["adapter_1", "adapter_2", "theirs"]
    with pytest.raises(ArtifactError, match="load the artifact anew"):
        loaded.target("onnx")(draw(), torch.zeros(6, dtype=torch.int64))


@pytest.fixture
def small(tmp_path: Path) -> fz.Artifact:
    """Without targets, and with a module in its plan that no plan file could name."""

    class Local(nn.Tanh):
        pass

    steps = [fz.Splice(Local(), at="1"), fz.LoRA(**STEP, adapters=1)]
    return fz.load(fz.compile(network(), fz.Plan(INPUTS, steps, targets=[]), verify="off").save(tmp_path / "small"))


def test_a_folder_that_cannot_be_flushed_keeps_what_its_manifest_names(
    small: fz.Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> None:
        raise OSError(22, "Invalid argument")

    with monkeypatch.context() as patch:
        patch.setattr(artifact_file, "_sync", fail)
        assert small.add_adapter("mine", lone(3)) == 2
    assert fz.load(small.folder).adapters == small.adapters == {"adapter_1": 1, "mine": 2}


def test_a_manifest_that_cannot_be_replaced_leaves_nothing_new(
    small: fz.Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    before = {item: item.read_bytes() for item in small.folder.rglob("*") if item.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(artifact_file.os, "replace", fail)
        with pytest.raises(ArtifactError, match="No space left"):
            small.add_adapter("mine", lone(3))
    assert {item: item.read_bytes() for item in small.folder.rglob("*") if item.is_file()} == before
    assert small.add_adapter("mine", lone(3)) == 2


def at_once(artifact: fz.Artifact, other: fz.Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """`other` adds an adapter when `artifact` has written its own, and no manifest yet."""
    write, wrote = banks.Shelf.write, []

    def meanwhile(shelf: banks.Shelf) -> None:
        write(shelf)
        wrote.append(shelf.file)
        if len(wrote) == 1:
            other.add_adapter("theirs", lone(4))

    monkeypatch.setattr(banks.Shelf, "write", meanwhile)
    artifact.add_adapter("mine", lone(3))


def test_one_writer_at_a_time(small: fz.Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtifactError, match="another process is adding"):
        at_once(small, fz.load(small.folder), monkeypatch)
    monkeypatch.undo()
    assert small.add_adapter("mine", lone(3)) == 2  # the lock is gone
    assert list(fz.load(small.folder).adapters) == ["adapter_1", "mine"]


def test_without_locks_writers_keep_their_bytes_apart(small: fz.Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "fcntl", None)
    with pytest.raises(ArtifactError):
        at_once(small, fz.load(small.folder), monkeypatch)
    fresh = fz.load(small.folder)
    assert list(fresh.adapters) == ["adapter_1", "theirs"]
    (bank,) = (value for name, value in fresh._shelf.values.items() if name.endswith("2.lora_A"))
    assert torch.equal(bank[-1], lone(4)["2.lora_A"])


def test_opening_and_closing_are_inverse(saved: Path) -> None:
    """The ids that are drawn for an open program fit two rows; a closed one has the whole range."""
    artifact = fz.load(saved)
    opened = load_program(saved / "program")
    assert [spec.high for spec in opened.inputs if spec.select] == [1]
    program = banks.closed(opened, artifact.interface, artifact._shelf.values)
    program.verify()
    assert [spec.high for spec in program.inputs if spec.select] == [2]
    x, ids = draw(), torch.tensor([0, 2, 1, 1, 0, 2])
    torch.testing.assert_close(program.run(x, ids)[0].double(), mixed(x, ids, KNOWN), rtol=1e-5, atol=1e-5)
    assert json.loads((saved / "manifest.json").read_text())["structural_hash"] == program.structural_hash()
