"""The cases of the suite: cheap to list, and the same function in every form that a library is given."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# Only for this import: on sys.path for good, the root would offer its folder `kernels` to every package.
sys.path.insert(0, str(ROOT))
try:
    from benchmarks import networks as suite
    from benchmarks.__main__ import results
    from benchmarks.harness import Case, Options, Unavailable, shelf
    from benchmarks.harness.case import relative_error
    from benchmarks.suite import networks, peers, plans, work
finally:
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def small() -> networks.Network:
    return networks.encoder(0)


@pytest.fixture(scope="module")
def inputs(small) -> tuple[torch.Tensor, ...]:
    return small.draw(torch.Generator().manual_seed(5))


@pytest.mark.parametrize("quick", [False, True])
def test_cases_are_listed_without_building_a_network(quick, monkeypatch):
    def build(network):
        raise AssertionError(f"{network.name} is built")

    monkeypatch.setattr(networks.Network, "model", property(build))
    found = list(suite.cases(Options(quick=quick)))
    names = [case.name for case in found]
    assert len(set(names)) == len(names) and len(names) == (8 if quick else 70)
    assert names == [case.name for case in suite.cases(Options(quick=quick))]


def test_every_variant_has_the_peers_that_do_its_job():
    for case in suite.cases(Options()):
        names = {peer.name for peer in case.peers}
        assert ("LoRA" in case.name) == any(name.startswith("peft") for name in names), case.name
        assert "fxfreeze, onnx" in names, case.name
        assert case.baseline not in ("eager", "fxfreeze, onnx"), case.name


def test_all_compete_on_one_network_and_slow_ones_nowhere_else():
    rare = {name for names in suite.PANEL.values() for name in names}
    found = {case.name.rpartition(", ")[0] for case in suite.cases(Options())
             if rare & {peer.name for peer in case.peers}}  # fmt: skip
    assert found == {"ResNet-20, batch 64"}
    for network in networks.networks(Options()):
        for variant, everyone in suite.RIVALS.items():
            competing = suite.rivals(network, variant)
            assert competing[0] == everyone[0] and set(competing) <= set(everyone)
            assert competing == everyone or not network.panel


def test_of_large_networks_only_those_are_left_out_that_do_not_know_their_layers_or_compute_all():
    names = {case.name: {peer.name for peer in case.peers} for case in suite.cases(Options())}
    for title in ("GPT-2, prefill", "GPT-2, decode"):
        assert "torchao" not in names[f"{title}, int8"] and "quantize_static" in names[f"{title}, int8"]
        assert {"ONNX Runtime", "Torch-Pruning, ONNX Runtime"} <= names[f"{title}, ticket"]
    for title in ("ResNet-50", "ViT-base", "BERT-base"):
        assert "torchao" in names[f"{title}, int8"] and "ONNX Runtime" not in names[f"{title}, ticket"]
    assert "ONNX Runtime" in names["ViT-tiny, ticket"]


def test_every_target_of_ours_is_measured_where_it_may_be_the_fastest():
    names = {case.name: {peer.name for peer in case.peers} for case in suite.cases(Options())}
    assert "fxfreeze, torch" in names["BERT-base, gates"] and "fxfreeze, aoti" in names["ResNet-50, int8"]
    assert "fxfreeze, aoti" in names["GPT-2, decode, Tversky head"] and "fxfreeze, aoti" in names["MobileNetV3, all"]


@pytest.mark.parametrize("variant", plans.VARIANTS, ids=lambda variant: variant.name)
def test_plain_modules_are_the_reference_and_not_another_variant(variant, small, inputs):
    """The tolerance of a case is one that leaving the step out exceeds."""
    wanted = plans.reference(small, variant, *inputs)
    for merged in (False, True):
        assert relative_error(plans.plain(small, variant, merged=merged)(*inputs), wanted) < 1e-5
    if variant not in (plans.BARE, plans.QUANTIZED):
        bare = plans.reference(small, plans.BARE, *inputs)
        assert relative_error(bare, wanted) > 2 * variant.tolerance(small)


@pytest.mark.parametrize("variant", plans.VARIANTS, ids=lambda variant: variant.name)
def test_one_plan_does_what_the_plain_modules_do(variant, small, inputs):
    found = peers.peer("fxfreeze, onnx", small, variant).prepare()(*inputs)
    error = relative_error(found, plans.reference(small, variant, *inputs))
    assert error < (0.1 if variant.int8 else 1e-5)


@pytest.mark.parametrize(
    ("name", "variant"),
    [("peft, eager", plans.LORA), ("peft merged, ONNX Runtime", plans.LORA), ("ONNX Runtime", plans.GATES),
     ("Torch-Pruning, ONNX Runtime", plans.TICKET), ("quantize_static", plans.QUANTIZED),
     ("merged by hand, quantize_static", plans.ALL)],
)  # fmt: skip
def test_the_others_do_the_same(name, variant, small, inputs):
    found = peers.peer(name, small, variant).prepare()(*inputs)
    assert relative_error(found, plans.reference(small, variant, *inputs)) < (0.1 if variant.int8 else 1e-5)


def test_a_ticket_is_smaller_for_torch_pruning_and_its_masks_are_whole_units(small):
    pruned = peers.torch_pruning(small, plans.TICKET)
    assert pruned.get_submodule("encoder.blocks.0.mlp.0").weight.shape == (64, 64)
    mask = plans.masks(small)["encoder.blocks.0.mlp.0.weight"]
    assert (mask.all(1) | ~mask.any(1)).all() and int(mask.any(1).sum()) == 64


@pytest.mark.parametrize("spoilt", ["thresholds", "updates", "similarity", "masks"])
def test_a_plan_with_one_wrong_number_table_is_found_out(spoilt, small, inputs, monkeypatch):
    """Of one site only, the first: what a peer got wrong there has to show in the outputs."""
    variant = {"thresholds": plans.GATES, "updates": plans.LORA, "similarity": plans.TVERSKY, "masks": plans.TICKET}
    chosen = variant[spoilt]
    wanted = plans.reference(small, chosen, *inputs)
    found = getattr(plans, spoilt)(small)
    if spoilt == "similarity":
        wrong = (found[0], found[1].roll(1, 0))
    else:
        first = next(iter(found))
        numbers = found[first]
        wrong = {**found, first: ~numbers if spoilt == "masks" else (numbers[0] * 1.5, *numbers[1:])}
    monkeypatch.setattr(plans, spoilt, lambda network: wrong)
    assert relative_error(plans.plain(small, chosen)(*inputs), wanted) > chosen.tolerance(small)


def test_work_is_what_one_counts_by_hand(small):
    """Two blocks of 16 tokens, 64 wide, and a head of 10."""
    layers = 16 * 64 * (3 * 64 + 64 + 2 * 128)
    attention = 2 * 16 * 16 * 64
    bare, ticket = work.of(small, plans.BARE), work.of(small, plans.TICKET)
    assert bare.operations == 2 * (2 * (layers + attention) + 640) == work.of(small, plans.GATES).operations
    assert ticket.operations == bare.operations - 2 * 2 * 16 * 64 * 128  # half of the hidden units in both blocks
    assert bare.bytes == 4 * (sum(p.numel() for p in small.model.parameters()) + 16 * 64 + 10)
    assert work.of(small, plans.QUANTIZED).dtype == "int8"
    assert work.of(small, plans.QUANTIZED).bytes < bare.bytes / 3


def test_a_peer_whose_library_is_missing_says_so(small, monkeypatch):
    for package in ("peft", "torch_pruning", "torchao", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    for name in ("peft, eager", "Torch-Pruning, ONNX Runtime", "torchao", "ONNX Runtime", "quantize_static"):
        with pytest.raises(Unavailable, match="not installed"):
            peers.peer(name, small, plans.TICKET).prepare()


# ---- what processes leave each other


@pytest.fixture
def left(tmp_path) -> networks.Network:
    """A process's view of a small network; another one's is `again(left)`."""
    return replace(networks.encoder(0), folder=tmp_path / "encoder")


def again(network: networks.Network) -> networks.Network:
    return replace(network)


def test_a_model_is_built_once_and_is_the_same(left, inputs):
    expected = left.model(*inputs)
    other = replace(again(left), build=lambda: pytest.fail("it is built again"))
    assert torch.equal(other.model(*inputs), expected)
    assert other.model is not left.model


def test_one_export_serves_all_that_start_from_the_bare_network(left, inputs, monkeypatch):
    first = peers.peer("ONNX Runtime", left, plans.BARE).prepare()(*inputs)
    monkeypatch.setattr(torch.onnx, "export", lambda *given, **options: pytest.fail("it is exported again"))
    assert torch.equal(first[0], peers.peer("ONNX Runtime", again(left), plans.BARE).prepare()(*inputs)[0])
    integers = peers.peer("quantize_static", again(left), plans.QUANTIZED).prepare()(*inputs)
    assert 0 < relative_error(integers, first) < 0.1
    with pytest.raises(pytest.fail.Exception, match="exported again"):
        peers.peer("ONNX Runtime", again(left), plans.GATES).prepare()


def test_one_compilation_has_both_targets(left, inputs, monkeypatch):
    """Another target stands in for "aoti", which takes longer to build."""
    monkeypatch.setitem(peers.EVERY, "fxfreeze, aoti", functools.partial(peers.fxfreeze, "torch"))
    names = ["ONNX Runtime", "fxfreeze, onnx", "fxfreeze, aoti"]
    first, second = (peers.peer(name, network, plans.LORA, names)
                     for name, network in (("fxfreeze, aoti", left), ("fxfreeze, onnx", again(left))))  # fmt: skip
    assert (first.behind, second.behind) == ("", "fxfreeze, aoti")
    wanted = plans.reference(left, plans.LORA, *inputs)
    assert relative_error(first.prepare()(*inputs), wanted) < 1e-5
    monkeypatch.setattr(plans, "frozen", lambda *given: pytest.fail("it is compiled again"))
    assert relative_error(second.prepare()(*inputs), wanted) < 1e-5
    alone = peers.peer("fxfreeze, torch", left, plans.LORA, ["ONNX Runtime", "fxfreeze, torch"])
    assert alone.behind == "" and not alone.prepare.args[3:]
    rival = peers.peer("ONNX Runtime", left, plans.LORA, names)
    assert rival.behind == "" and relative_error(rival.prepare()(*inputs), wanted) < 1e-5


def test_a_target_that_nobody_left_is_compiled(left, inputs):
    call = peers.peer("fxfreeze, onnx", left, plans.BARE, ["ONNX Runtime", "fxfreeze, onnx", "fxfreeze, aoti"])
    assert relative_error(call.prepare()(*inputs), plans.reference(left, plans.BARE, *inputs)) < 1e-5
    assert not (left.folder / plans.BARE.name).exists()


def test_networks_that_differ_in_their_batch_share_all_and_others_nothing(tmp_path):
    found = {network.title: network.folder for network in networks.networks(Options(folder=tmp_path))}
    assert found["ResNet-20, batch 1"] == found["ResNet-20, batch 64"] == tmp_path / "ResNet-20"
    assert len(set(found.values())) == len(found) - 1


def test_cases_of_a_network_are_prepared_together_and_of_large_ones_fewer():
    found = list(suite.cases(Options()))
    groups = [[case.name for case in group] for _, group in itertools.groupby(found, key=lambda case: case.together)]
    assert sum(map(len, groups)) == len(found) == 70
    for names in groups:
        assert len({name.rpartition(", ")[0] for name in names}) == 1
        assert len(names) <= (3 if names[0].startswith(("ResNet-50", "ViT-base", "BERT", "GPT-2")) else 4)
    assert max(map(len, groups)) == 4


def test_what_was_left_goes_when_its_network_is_done(tmp_path):
    """Whatever is selected: the folder is there until the last of its cases was measured."""

    class Running:
        def run_together(self, group: list[Case]) -> Iterator[list[str]]:
            (folder,) = {case.folder for case in group}
            folder.mkdir(exist_ok=True, parents=True)
            seen.extend(case.name for case in group)
            assert list(folder.parent.iterdir()) == [folder]
            yield [case.name for case in group]

    for number, (glob, count) in enumerate({"*": 70, "*, int8": 10}.items()):
        seen: list[str] = []
        options = Options(folder=tmp_path / str(number))
        told = list(results(Running(), (case for case in suite.cases(options) if fnmatch(case.name, glob))))
        assert list(itertools.chain(*told)) == seen and len(seen) == count


def test_of_two_that_make_the_same_one_stays(tmp_path):
    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "file").write_text("first")
        if not (tmp_path / "thing").exists():
            shelf.shared(tmp_path, "thing", lambda other: (other.mkdir(), (other / "file").write_text("second")))

    assert (shelf.shared(tmp_path, "thing", make) / "file").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]


def test_what_could_not_be_made_leaves_nothing(tmp_path):
    def make(folder: Path) -> None:
        folder.mkdir()
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        shelf.shared(tmp_path, "thing", make)
    assert list(tmp_path.iterdir()) == []
