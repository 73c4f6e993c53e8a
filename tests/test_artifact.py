"""fxfreeze.artifact: calling, saving, loading, and everything that must be refused on the way.

The targets here are stand-ins that run the stored Program in eager torch; the real ones are tested in tests/emit.
"""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fxfreeze import Dim, Input, Plan, artifact
from fxfreeze.artifact import MANIFEST, Artifact, _digest, load
from fxfreeze.capture import capture
from fxfreeze.emit import PROGRAM, Target
from fxfreeze.errors import ArtifactError, EmitError
from fxfreeze.report import as_text, summary
from fxfreeze.serialize import load_program, save_program


def _emit(lowering, folder):
    save_program(lowering.program, folder)
    return {"freezing": False}


def _emit_nothing(lowering, folder):
    (folder / "model.onnx").write_bytes(b"stands for a model")
    return {"opset": 24}


EAGER = {
    "torch": Target(PROGRAM, _emit, lambda folder, interface: load_program(folder, shapes=False).run),
    "onnx": Target("onnx", _emit_nothing, lambda folder, interface: load_program(folder.parent / PROGRAM).run),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(4, 3), nn.Embedding(10, 3)

    def forward(self, image, batch, target):
        text = self.text(batch["ids"]) * batch["mask"][..., None]
        joint = self.image(image) + text.mean(1)
        return {"logits": joint * target[0], "parts": (text, [joint]), "nothing": None}


PLAN = Plan(
    inputs=[
        Input("image", shape=("batch", 4)),
        Input("batch.ids", shape=("batch", "seq"), dtype="int64", low=0, high=9),
        Input("batch.mask", shape=("batch", "seq"), dtype="bool"),
        Input("target.0", shape=()),
    ],
    dims={"seq": Dim(min=2, max=6)},
    targets=["onnx", "torch"],
)


def arguments(batch=2, seq=3):
    mask = torch.ones(batch, seq, dtype=torch.bool)
    ids = torch.arange(batch * seq).view(batch, seq) % 10
    return torch.ones(batch, 4), {"ids": ids, "mask": mask}, [torch.tensor(2.0)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def captured(model):
    return capture(model, PLAN)


@pytest.fixture(scope="module", autouse=True)
def eager_targets():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifact, "EMITTERS", EAGER)
        yield


@pytest.fixture(scope="module")
def made(captured):
    program, flat = captured
    return Artifact.create(program, PLAN, flat, ledger=[{"site": "image", "error": math.inf}])


@pytest.fixture
def saved(made, tmp_path):
    return made.save(tmp_path / "out")


# --------------------------------------------------------------------------------------------- zeros


def test_the_report_says_what_zeros_would_take(made, tmp_path):
    model = nn.Linear(100, 120, bias=False)
    model.weight.data *= torch.rand(120, 100) < 0.1
    plan = Plan(inputs=[Input("x", shape=("batch", 100))], targets=["torch"])
    artifact = Artifact.create(*capture(model.eval(), plan)[:1], plan)
    file = f"{PROGRAM}/weights.safetensors"
    assert artifact.manifest["dense"] == {file: 4 * 120 * 100} and artifact.sizes[file] < 9000
    rows = [[part.strip() for part in line.split("  ") if part.strip()] for line in artifact.report.splitlines()]
    assert ["file", "size", "with its zeros"] in rows
    (row,) = (row for row in rows if row and row[0] == file)
    assert row[2] == "46.9 KiB" and row[1] != row[2]
    artifact.save(tmp_path / "out")
    x = torch.randn(3, 100)
    assert torch.equal(Artifact.load(tmp_path / "out")(x), artifact(x))
    assert made.manifest["dense"] == {}
    for plain in ({**artifact.manifest, "dense": {}}, {**artifact.manifest, "dense": None}):  # or made before
        assert "with its zeros" not in as_text(summary(plain))


# ------------------------------------------------------------------------------------------- calling


def test_it_is_called_like_the_model(made, model):
    image, batch, target = arguments()
    want = model(image, batch, target)
    for result in (
        made(image, batch, target),
        made(image, batch=batch, target=target),
        made(target=target, image=image, **{"batch.ids": batch["ids"], "batch.mask": batch["mask"]}),
        made.target("torch")(image, batch, target),
        made.target("onnx")(image, target=target, batch=batch),
    ):
        assert list(result) == ["logits", "parts", "nothing"] and result["nothing"] is None
        assert isinstance(result["parts"], tuple) and isinstance(result["parts"][1], list)
        torch.testing.assert_close(result["logits"], want["logits"])
        torch.testing.assert_close(result["parts"][1][0], want["parts"][1][0])


def test_a_target_is_chosen_by_keyword(captured):
    program, flat = capture(
        nn.Linear(4, 2).eval(), Plan(inputs=[Input("x", shape=("n", 4))], targets=["torch", "onnx"])
    )
    made = Artifact.create(program, Plan(inputs=[Input("x", shape=("n", 4))], targets=["torch", "onnx"]), flat)
    assert made.targets == ("torch", "onnx")
    assert torch.equal(made(torch.ones(1, 4)), made(torch.ones(1, 4), target="onnx"))
    with pytest.raises(ArtifactError, match="no target 'aoti' here, only torch, onnx"):
        made(torch.ones(1, 4), target="aoti")
    with pytest.raises(ArtifactError, match="no target"):
        made.target("aoti")


@pytest.mark.parametrize(("targets", "loads"), [(["torch", "onnx"], ["torch", "onnx"]),
                                                (["onnx", "torch"], ["onnx", "torch", "torch"])])  # fmt: skip
def test_a_first_target_that_its_check_compiled_is_not_compiled_again(targets, loads, monkeypatch, tmp_path):
    loaded = []

    def counted(name):
        found = EAGER[name]
        return replace(found, load=lambda *given: (loaded.append(name), found.load(*given))[1])

    monkeypatch.setattr(artifact, "EMITTERS", {name: counted(name) for name in EAGER})
    plan = Plan(inputs=[Input("x", shape=("n", 4))], targets=targets)
    program, flat = capture(nn.Linear(4, 2).eval(), plan)
    made = Artifact.create(program, plan, flat)
    for _ in range(2):
        made(torch.ones(1, 4), target="torch")
    assert loaded == loads
    load(made.save(tmp_path / "out"))(torch.ones(1, 4), target="torch")
    assert loaded == [*loads, "torch"]


def test_the_callers_tensors_are_left_alone(made):
    image, batch, target = arguments()
    image.requires_grad_()
    before = image.detach().clone()
    result = made(image, batch, target)
    assert torch.equal(image, before) and image.requires_grad and not result["logits"].requires_grad


def _with(position, value):
    args = list(arguments())
    args[position] = value
    return args


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (_with(0, torch.ones(2, 4).double()), "'image' is torch.float64, expected torch.float32"),
        (_with(0, torch.ones(2, 5)), r"'image' has shape \(2, 5\), expected \(batch, 4\): axis 1 is 5"),
        (_with(0, torch.ones(4)), r"'image' has shape \(4,\), expected \(batch, 4\)"),
        (_with(0, torch.ones(3, 4)), "'batch.ids' has shape .*: axis 0 is 2, but 'batch' is 3 in 'image'"),
        (_with(0, torch.ones(2, 4, device="meta")), "'image' is on meta"),
        (_with(0, torch.ones(2, 4).to_sparse()), "'image' is on torch.sparse_coo"),
        (_with(2, [torch.ones(1)]), r"'target.0' has shape \(1,\), expected \(\)"),
        (arguments(seq=1), "axis 1 is 1, but 'seq' is between 2 and 6"),
        (arguments(seq=7), "axis 1 is 7, but 'seq' is between 2 and 6"),
        (arguments(batch=0), "axis 0 is 0, but 'batch' is at least 1"),
        (_with(0, "image"), "'image' must be a tensor, not str"),
        (arguments()[:2], "'target.0' is missing"),
    ],
)
def test_a_wrong_input_is_refused_by_name(args, message, made):
    with pytest.raises(ArtifactError, match=message):
        made(*args)


# ------------------------------------------------------------------------------------------- the record


def test_the_manifest_says_what_was_done(made, captured):
    manifest = made.manifest
    assert json.loads(json.dumps(manifest, allow_nan=False)) == manifest
    assert manifest["structural_hash"] == captured[0].structural_hash()
    assert Plan.model_validate(manifest["plan"]) == PLAN
    assert manifest["versions"]["torch"] == torch.__version__ and manifest["default"] == "onnx"
    assert manifest["targets"] == {
        "onnx": {"folder": "onnx", "opset": 24},
        "torch": {"folder": PROGRAM, "freezing": False},
    }
    assert manifest["ledger"] == [{"site": "image", "error": None}]
    assert {row["target"] for row in manifest["parity"]} == {"model", "torch", "onnx"}
    assert set(manifest["files"]) == {f"{PROGRAM}/program.json", f"{PROGRAM}/weights.safetensors", "onnx/model.onnx"}
    assert made.sizes["onnx/model.onnx"] == len(b"stands for a model")
    assert str(tempfile.gettempdir()) not in json.dumps(manifest)
    assert "batch.ids: (batch, seq)" in repr(made)


def test_the_temporary_folder_goes_with_the_artifact(captured):
    program, flat = captured
    made = Artifact.create(program, PLAN, flat)
    folder, held = made.folder, made.target("torch")
    del made
    gc.collect()
    assert folder.exists(), "a target keeps its artifact alive"
    del held
    gc.collect()
    assert not folder.exists()


@pytest.mark.parametrize("stage", ["emit", "load", "parity", "manifest"])
def test_a_failed_compile_leaves_nothing(stage, captured, tmp_path, monkeypatch):
    program, flat = captured

    def fail(*args, **kwargs):
        raise EmitError("no")

    emit = fail if stage == "emit" else _emit
    run = {"load": fail, "parity": lambda folder, interface: lambda *flat: [2 * x for x in program.run(*flat)]}
    broken = Target(PROGRAM, emit, run.get(stage, EAGER["torch"].load))
    monkeypatch.setattr(artifact, "EMITTERS", {**EAGER, "torch": broken})
    if stage == "manifest":
        monkeypatch.setattr(artifact, "_write_manifest", fail)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(EmitError):
        Artifact.create(program, PLAN, flat)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------- saving and loading


def test_saved_and_loaded_it_is_the_same(made, saved):
    loaded = load(saved)
    assert loaded.manifest == made.manifest and loaded.targets == made.targets
    torch.testing.assert_close(loaded(*arguments())["logits"], made(*arguments())["logits"])
    assert {row.target for row in loaded.check()} == {"torch", "onnx"}
    assert [path.name for path in saved.parent.iterdir()] == ["out"]
    assert saved.stat().st_mode & 0o777 == 0o777 & ~_umask()
    again = loaded.save(saved.parent / "nested" / "again")
    assert load(again).manifest == made.manifest
    del loaded
    gc.collect()
    assert saved.exists(), "a folder the user named is the user's"


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("what", ["file", "folder", "dangling link"])
def test_an_existing_path_is_not_written_over(what, made, tmp_path):
    path = tmp_path / "out"
    if what == "file":
        path.write_text("mine")
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="exists"):
        made.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_failed_save_leaves_nothing(made, tmp_path, monkeypatch):
    calls = []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ArtifactError, match="No space left"):
        made.save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_save_notices_that_its_own_files_changed(captured, tmp_path):
    program, flat = captured
    made = Artifact.create(program, PLAN, flat)
    (made.folder / "onnx" / "model.onnx").write_bytes(b"something else")
    with pytest.raises(ArtifactError, match="changed"):
        made.save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moment", [1, 3, 4, 7])
def test_a_killed_save_leaves_nothing_that_loads(moment, saved, tmp_path):
    """kill -9 at the n-th flush to the disk: within a file, after the manifest, before the rename."""
    script = f"""
        import os, signal, sys
        from fxfreeze.artifact import load
        artifact, calls = load(sys.argv[1]), []

        def fsync(descriptor):
            calls.append(descriptor)
            if len(calls) == {moment}:
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = fsync
        artifact.save(sys.argv[2])
    """
    target = tmp_path / "killed" / "out"
    command = [sys.executable, "-c", textwrap.dedent(script), str(saved), str(target)]
    assert subprocess.run(command, check=False, timeout=120).returncode == -signal.SIGKILL
    assert not target.exists()
    (left,) = target.parent.iterdir()
    with pytest.raises(ArtifactError):
        load(left)
    assert load(load(saved).save(target)).targets, "the leftover is in nobody's way"


@pytest.mark.parametrize("name", [f"{PROGRAM}/program.json", f"{PROGRAM}/weights.safetensors", "onnx/model.onnx"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "altered", "linked"])
def test_a_damaged_file_is_refused_by_name(name, damage, saved, made):
    path = saved / name
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[:-1])
    elif damage == "altered":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "linked":
        path.symlink_to(made.folder / name)
    with pytest.raises(ArtifactError, match=name):
        load(saved)


def test_damage_after_loading_is_found_by_check(saved):
    loaded = load(saved)
    (saved / "onnx" / "model.onnx").write_bytes(b"stands for a_model")
    with pytest.raises(ArtifactError, match="model"):
        loaded.check()


@pytest.mark.parametrize("name", ["extra.bin", "aoti/model.pt2", "onnx/.hidden"])
def test_an_added_file_is_refused_by_name(name, saved):
    (saved / name).parent.mkdir(exist_ok=True)
    (saved / name).write_bytes(b"")
    with pytest.raises(ArtifactError, match=name):
        load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["parity"][0].update(ok=False), "altered"),
        (lambda m: m["interface"]["dims"].update(seq=[1, 60]), "altered"),
        (lambda m: m.pop("digest"), "damaged"),
        (lambda m: m.update(format=2), "newer"),
        (lambda m: m.update(format="x"), "altered"),
    ],
)
def test_an_altered_manifest_is_refused(change, message, saved):
    manifest = json.loads((saved / MANIFEST).read_text())
    change(manifest)
    (saved / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=message):
        load(saved)


def test_a_manifest_cannot_name_files_outside(saved):
    manifest = json.loads((saved / MANIFEST).read_text())
    manifest["files"]["../secret"] = {"bytes": 0, "sha256": ""}
    manifest["digest"] = _digest(manifest)
    (saved / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="outside"):
        load(saved)


@pytest.mark.parametrize("content", [None, "", "[]", '{"format": 1'])
def test_what_is_no_artifact_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(ArtifactError, match=r"no artifact here|damaged"):
        load(tmp_path)
    with pytest.raises(ArtifactError, match="no artifact here"):
        load(tmp_path / "nowhere")


def test_native_code_of_another_machine_is_not_loaded(made, monkeypatch):
    here = artifact._machine()
    artifact._refuse_other_machine(here)
    artifact._refuse_other_machine({**here, "cpu": "DEFAULT"})
    for made_on in ({**here, "architecture": "pdp11"}, {**here, "cpu": "AVX1024"}):
        with pytest.raises(ArtifactError, match="built for"):
            artifact._refuse_other_machine(made_on)


def test_nothing_is_unpickled(saved):
    loads = "import pickle, sys; pickle.Unpickler = pickle.load = pickle.loads = None\n"
    script = loads + "from fxfreeze.artifact import load; import torch; torch.load = None; load(sys.argv[1])"
    subprocess.run([sys.executable, "-c", script, str(saved)], check=True, timeout=120)
    for path in Path(saved).rglob("*"):
        assert path.is_dir() or path.suffix in (".json", ".safetensors", ".onnx")
