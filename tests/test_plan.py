"""The plan: what it accepts, what it refuses and in which words, and that files keep it."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxfreeze.errors import FxfreezeError, PlanError
from fxfreeze.plan import IA3, STEPS, VERSION, Dim, DoRA, Gate, Input, LoRA, Plan, Prune, Splice, Step

KINDS = ", ".join(str(step.model_fields["kind"].default) for step in STEPS)
IMAGE = {"name": "x", "shape": ["batch", 3]}
KINDS = ", ".join(step.model_fields["kind"].default for step in STEPS)


def refused(**keys: Any) -> list[str]:
    """The lines of the error that a plan with these keys raises."""
    with pytest.raises(PlanError) as caught:
        Plan(**{"inputs": [IMAGE], **keys})
    return str(caught.value.what).splitlines()


# ---- what is accepted


def test_defaults() -> None:
    plan = Plan(inputs=[Input("image", shape=("batch", 3, 32, 32))])
    spec = plan.inputs[0]
    assert (spec.name, spec.shape, spec.dtype, spec.low, spec.high) == (
        "image",
        ("batch", 3, 32, 32),
        "float32",
        None,
        None,
    )
    assert (plan.steps, plan.targets, plan.outputs, plan.dims, plan.version) == (
        (),
        ("torch",),
        None,
        {},
        VERSION,
    )


def test_dicts_and_instances_are_the_same() -> None:
    spoken = Plan(
        inputs=[Input("ids", ("batch", "seq"), "int64", low=0, high=99)],
        steps=[LoRA("layer*.conv1", 4, alpha=8), IA3(at=("fc", "head.*"), side="in"), DoRA("fc", rank=2)],
        targets=["aoti", "onnx"],
        outputs=["logits"],
        dims={"seq": Dim(2, 64)},
    )
    written = Plan.model_validate(
        {
            "inputs": [{"name": "ids", "shape": ["batch", "seq"], "dtype": "int64", "low": 0, "high": 99}],
            "steps": [
                {"kind": "lora", "at": "layer*.conv1", "rank": 4, "alpha": 8},
                {"kind": "ia3", "at": ["fc", "head.*"], "side": "in"},
                {"kind": "dora", "at": "fc", "rank": 2},
            ],
            "targets": ["aoti", "onnx"],
            "outputs": ["logits"],
            "dims": {"seq": {"min": 2, "max": 64}},
        }
    )
    assert spoken == written
    assert [type(step) for step in written.steps] == [LoRA, IA3, DoRA]
    assert written.steps[1].patterns == ("fc", "head.*")
    assert written.steps[0].patterns == ("layer*.conv1",)


def test_plan_is_immutable() -> None:
    plan = Plan(inputs=[IMAGE])
    with pytest.raises(Exception, match="frozen"):
        plan.version = 2  # type: ignore[misc]
    with pytest.raises(Exception, match="frozen"):
        plan.inputs[0].name = "y"  # type: ignore[misc]


def test_model_copy_checks_the_change() -> None:
    step = LoRA("fc", 4)
    assert step.model_copy(update={"rank": 5}) == LoRA("fc", 5)
    with pytest.raises(PlanError, match="rank: must be ≥ 1, got 0"):
        step.model_copy(update={"rank": 0})


def test_plans_copy_and_pickle() -> None:
    plan = Plan(inputs=[IMAGE], steps=[LoRA("fc", 4)])
    assert pickle.loads(pickle.dumps(plan)) == plan == copy.deepcopy(plan)


@pytest.mark.parametrize(
    ("step", "scale"),
    [
        (LoRA("fc", rank=4), 1.0),
        (LoRA("fc", rank=4, alpha=8), 2.0),
        (LoRA("fc", rank=16, alpha=8, rslora=True), 2.0),
        (LoRA("fc", rank=16, rslora=True), 4.0),
        (DoRA("fc", rank=8, alpha=2), 0.25),
        (LoRA("fc", rank=4, alpha=-2.0), -0.5),
    ],
)
def test_scale(step: LoRA | DoRA, scale: float) -> None:
    assert step.scale == pytest.approx(scale, rel=1e-15)


def test_default_names_are_unique_and_given_names_stay() -> None:
    steps = [LoRA("a", 1), IA3("a"), LoRA("b", 1), LoRA("c", 1, name="lora_2"), LoRA("d", 1, name="mine")]
    plan = Plan(inputs=[IMAGE], steps=steps)
    assert [step.name for step in plan.steps] == ["lora", "ia3", "lora_3", "lora_2", "mine"]
    assert steps[2].name == "lora", "the caller's own step is left alone"
    step = LoRA("a", 1)
    assert [s.name for s in Plan(inputs=[IMAGE], steps=[step, step]).steps] == ["lora", "lora_2"]


def test_torch_and_numpy_values() -> None:
    np, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    spec = Input("x", shape=torch.zeros(2, 3).shape, dtype=torch.bfloat16)
    assert (spec.shape, spec.dtype) == ((2, 3), "bfloat16")
    assert type(Input("x", shape=[np.int64(5)]).shape[0]) is int


def test_weights_take_path_objects() -> None:
    assert LoRA("fc", 4, weights=Path("a") / "b.safetensors").weights == os.path.join("a", "b.safetensors")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["x", "batch.ids", "feats.0", "a.pixel-values", "größe"])
def test_input_names(name: str) -> None:
    assert Input(name, [1]).name == name


def test_nested_inputs() -> None:
    names = ["feats.1", "feats.0", "batch.ids", "batch.mask", "batch.more.0"]
    assert len(Plan(inputs=[Input(name, [1]) for name in names]).inputs) == 5


def test_edges_that_are_fine() -> None:
    assert Input("x", []).shape == ()
    assert Input("x", [1], "uint8", 0, 255).high == 255
    assert Input("x", [1], "int64", -(2**63), 2**63 - 1).low == -(2**63)
    assert Input("x", [1], low=3, high=3).low == 3
    assert Input("x", [1], "float16", -65504, 65504).high == 65504
    assert Dim(3, 3).max == 3
    assert Plan(inputs=[IMAGE], targets=[]).targets == ()


# ---- what is refused, and in which words


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"steps": [{"kind": "lora", "at": "a", "rank": 1}, {"kind": "lora", "at": "a", "rank": 0}]},
         "steps[1].rank: must be ≥ 1, got 0"),
        ({"steps": [{"kind": "lora", "at": "a"}]}, "steps[0].rank: missing, but required"),
        ({"steps": [{"kind": "lora", "at": "a", "rank": "4"}]},
         "steps[0].rank: must be a valid integer, got '4'"),
        ({"steps": [{"kind": "lora", "at": "a", "rank": True}]},
         "steps[0].rank: must be a valid integer, got True"),
        ({"steps": [{"kind": "lora", "at": "a", "rank": 1.5}]},
         "steps[0].rank: must be a valid integer, got 1.5"),
        ({"steps": [{"kind": "lora", "at": "a", "rank": 1, "rnak": 2}]},
         "steps[0].rnak: unknown key (did you mean rank?); known keys: "
         "kind, at, name, rank, alpha, rslora, weights, adapters, select, bias"),
        ({"steps": [{"kind": "lora", "at": "a", "rank": 1, "rslora": 1}]},
         "steps[0].rslora: must be a valid boolean, got 1"),
        ({"steps": [{"kind": "lroa", "at": "a"}]},
         f"steps[0].kind: unknown kind 'lroa' (did you mean lora?); known kinds: {KINDS}"),
        ({"steps": [{"at": "a"}]}, f"steps[0].kind: missing; known kinds: {KINDS}"),
        ({"steps": [4]}, "steps[0]: must be a table of keys and values, got 4"),
        ({"steps": [{"kind": "dora", "at": "a", "rank": 1, "alpha": math.nan}]},
         "steps[0].alpha: must be a finite number, got nan"),
        ({"steps": [{"kind": "lora", "at": "a", "rank": 1, "alpha": "8"}]},
         "steps[0].alpha: must be a finite number, got '8'"),
        ({"steps": [{"kind": "lora", "at": "a", "rank": 1, "alpha": 0}]},
         "steps[0].alpha: must not be 0, which would switch the adapter off"),
        ({"steps": [{"kind": "lora", "at": "a", "rank": 1, "weights": 3}]},
         "steps[0].weights: must be the path of a file, got 3"),
        ({"steps": [{"kind": "lora", "at": "a", "rank": 1, "weights": ""}]},
         "steps[0].weights: must be the path of a file, got ''"),
        ({"steps": [{"kind": "oft", "at": "a", "block_size": 1}]}, "steps[0].block_size: must be ≥ 2, got 1"),
        ({"steps": [{"kind": "oft", "at": "a", "block_size": 2, "eps": 0}]}, "steps[0].eps: must be > 0, got 0"),
        ({"steps": [{"kind": "factorize", "at": "a", "agreement": 0}]}, "steps[0].agreement: must be in (0, 1], got 0"),
        ({"steps": [{"kind": "quantize", "scheme": "fp8", "granularity": "tensor"}]},
         "steps[0].granularity: 'fp8' has one scale per output feature, 'channel', not 'tensor'"),
        ({"steps": [{"kind": "quantize", "scheme": "fp8", "calibrate": "mse"}]},
         "steps[0].calibrate: 'mse' is for 256 even steps; use 'minmax' or 'percentile' with 'fp8'"),
        ({"steps": [{"kind": "quantize", "scheme": "fp8", "products": True}]},
         "steps[0].products: has a meaning for scheme='int8' and mode='static' only"),
        ({"steps": [{"kind": "quantize", "scheme": "int8-weight", "mode": "dynamic"}]},
         "steps[0].mode: has a meaning for schemes 'int8' and 'fp8' only: 'int8-weight' leaves inputs as they are"),
        ({"steps": [{"kind": "quantize", "granularity": "group:32"}]},
         "steps[0].granularity: groups are for weights alone: an integer product has one scale per output feature"),
        ({"steps": [{"kind": "quantize", "granularity": "group:0"}]},
         "steps[0].granularity: must be 'tensor', 'channel' or 'group:32' (or another number), got 'group:0'"),
        ({"steps": [{"kind": "quantize", "scheme": "int8-weight", "reduce_range": True}]},
         "steps[0].reduce_range: is for products of integers, scheme='int8', not 'int8-weight'"),
        ({"steps": [{"kind": "quantize", "scheme": "int4-weight"}]},
         "steps[0].granularity: 'channel' is too coarse for 4 bits; use 'group:32'"),
        ({"steps": [{"kind": "quantize", "mode": "dynamic", "calibrate": "mse"}]},
         "steps[0].calibrate: has a meaning with scheme='int8' or 'fp8' and mode='static' only"),
        ({"steps": [{"kind": "quantize", "percentile": 99}]},
         "steps[0].percentile: has a meaning with calibrate='percentile' only"),
        ({"steps": [{"kind": "quantize", "calibrate": "percentile", "percentile": 50}]},
         "steps[0].percentile: must be > 50 and ≤ 100, got 50"),
        (
            {"steps": [{"kind": "bayescap", "at": "a", "mask": "m"}]},
            "steps[0].mask: has no meaning for new outputs, which have no value to keep",
        ),
        (
            {"steps": [{"kind": "splice", "module": "a:B", "at": "a", "on": "weight", "mask": "m"}]},
            "steps[0].mask: has no meaning for a parameter, which is the same at all positions",
        ),
        ({"steps": [{"kind": "vera", "at": "a", "rank": 2, "seed": -1}]}, "steps[0].seed: must be ≥ 0, got -1"),
        ({"steps": [{"kind": "replace", "at": "a"}]}, "steps[0].weights: missing, but required"),
        ({"steps": [{"kind": "prune"}]},
         "steps[0].mask: must name a file of masks, unless method is 'magnitude', 'nm', 'block' or 'channel'"),
        ({"steps": [{"kind": "prune", "mask": ""}]}, "steps[0].mask: must be the path of a file, got ''"),
        ({"steps": [{"kind": "prune", "mask": "m", "method": "nm"}]},
         "steps[0].mask: has a meaning with method='mask' only"),
        ({"steps": [{"kind": "prune", "method": "magnitude"}]},
         "steps[0].density: missing, but required for method='magnitude'"),
        ({"steps": [{"kind": "prune", "method": "block", "density": 0}]},
         "steps[0].density: must be > 0 and ≤ 1, got 0"),
        ({"steps": [{"kind": "prune", "method": "block", "density": 1.5}]},
         "steps[0].density: must be > 0 and ≤ 1, got 1.5"),
        ({"steps": [{"kind": "prune", "method": "block", "density": 0.5, "flops": 0.5}]},
         "steps[0].flops: has a meaning with method='channel' only"),
        ({"steps": [{"kind": "prune", "method": "magnitude", "density": 0.5, "multiple": 8}]},
         "steps[0].multiple: has a meaning with method='channel' only"),
        ({"steps": [{"kind": "prune", "method": "nm", "density": 0.5}]},
         "steps[0].density: has a meaning with method='magnitude' or 'block' or 'channel' only"),
        ({"steps": [{"kind": "prune", "method": "nm", "n": 4}]}, "steps[0].n: must be < m (4), got 4"),
        ({"steps": [{"kind": "prune", "method": "nm", "m": 0}]}, "steps[0].m: must be ≥ 1, got 0"),
        ({"steps": [{"kind": "prune", "method": "block", "density": 0.5, "block": [4, 0]}]},
         "steps[0].block[1]: must be ≥ 1, got 0"),
        ({"steps": [{"kind": "prune", "method": "block", "density": 0.5, "block": 4}]},
         "steps[0].block: must be a list, got 4"),
        ({"steps": [{"kind": "prune", "method": "channel"}]},
         "steps[0].density: and flops are shares that stay: give one of them for method='channel'"),
        ({"steps": [{"kind": "prune", "method": "channel", "density": 0.5, "flops": 0.5}]},
         "steps[0].density: and flops are shares that stay: give one of them for method='channel'"),
        ({"steps": [{"kind": "prune", "method": "channel", "flops": -0.5}]},
         "steps[0].flops: must be > 0 and ≤ 1, got -0.5"),
        ({"steps": [{"kind": "prune", "method": "chanel", "flops": 0.5}]},
         "steps[0].method: must be one of mask, magnitude, nm, block, channel; got 'chanel' (did you mean channel?)"),
        ({"steps": [{"kind": "prune", "method": "nm", "exclude": []}]},
         "steps[0].exclude: must be a glob over module paths, or a list of them, got []"),
        ({"steps": [{"kind": "prune", "method": "nm", "train": 1}]},
         "steps[0].train: must be a valid boolean, got 1"),
        ({"steps": [{"kind": "lora", "at": "a", "rank": 1, "adapters": 2, "weights": ["a", ""]}]},
         "steps[0].weights: must be the path of a file, got ''"),
        ({"steps": [{"kind": "lora", "at": "a", "rank": 1, "adapters": 0}]},
         "steps[0].adapters: must be ≥ 1, got 0"),
        ({"steps": [{"kind": "lora", "at": "a", "rank": 1, "adapters": 2, "weights": ["a", "b", "c"]}]},
         "steps[0].weights: lists 3 files, but there are 2 adapters; a list has one per adapter"),
        ({"steps": [{"kind": "lora", "at": "a", "rank": 1, "weights": ["a"]}]},
         "steps[0].weights: lists 1 files, but no adapters are asked for; a list has one per adapter"),
        ({"steps": [{"kind": "dora", "at": "a", "rank": 1, "adapters": 2}]},
         "steps[0].adapters: rows cannot select among several: it divides by norms of the whole weight with "
         "that adapter in it, and adds nothing beside it; LoRA(adapters=...) has them"),
        ({"steps": [{"kind": "ia3", "at": "a", "adapters": 2}]},
         "steps[0].adapters: rows cannot select among several: it scales what the frozen layer makes, and "
         "adds nothing beside it; LoRA(adapters=...) has them"),
        ({"steps": [{"kind": "vera", "at": "a", "rank": 1, "adapters": 2}]},
         "steps[0].adapters: rows cannot select among several: each would hold a copy of A and B, as a LoRA "
         "does: diag(λ_d)·A and diag(λ_b)·B are one; LoRA(adapters=...) has them"),
        ({"steps": [{"kind": "oft", "at": "a", "block_size": 2, "adapters": 2}]},
         "steps[0].adapters: rows cannot select among several: it turns what the frozen layer reads, and adds "
         "nothing beside it; LoRA(adapters=...) has them"),
        ({"steps": [LoRA("a", 1, adapters=2, select="x")]},
         "steps[0].select: 'x' is an input of the model; choose another name"),
        ({"steps": [LoRA("a", 1, adapters=2, select="k"), Gate("b", modes=2, select="k")]},
         "steps[1].modes: 'gate' has 2 modes by 'k', but 'lora' (steps[0]) has 2 adapters and none by it; "
         "give one of them another select"),
        ({"steps": [LoRA("a", 1, adapters=2), LoRA("b", 1, adapters=3, name="more")]},
         "steps[1].adapters: 'more' has 3 adapters and none by 'adapter', but 'lora' (steps[0]) has 2 adapters and "
         "none by it; give one of them another select"),
        ({"inputs": [Input("x", [])], "steps": [LoRA("a", 1, adapters=2)]},
         "steps[0].adapters: the first input, 'x', has no dim, so there are no rows to select for"),
        ({"steps": [{"kind": "ia3", "at": ""}]},
         "steps[0].at: must be a glob over module paths such as 'layer*.conv1', got ''"),
        ({"steps": [{"kind": "ia3", "at": ["a", 3]}]},
         "steps[0].at: item 1 must be a glob over module paths such as 'layer*.conv1', got 3"),
        ({"steps": [{"kind": "ia3", "at": ["a", "b", "a"]}]}, "steps[0].at: item 2 repeats 'a'"),
        ({"steps": [{"kind": "ia3", "at": []}]},
         "steps[0].at: must be a glob over module paths, or a list of them, got []"),
        ({"steps": [{"kind": "ia3", "at": "a", "side": "x"}]},
         "steps[0].side: must be one of out, in; got 'x'"),
        ({"steps": [{"kind": "ia3", "at": "a", "name": "my step"}]},
         "steps[0].name: must be a name of letters, digits and _ (not starting with a digit), got 'my step'"),
        ({"steps": [LoRA("a", 1, name="q"), LoRA("b", 1), IA3("b", name="q")]}, "steps[2].name: repeats 'q'"),
        ({"stpes": []},
         "stpes: unknown key (did you mean steps?); "
         "known keys: inputs, steps, targets, outputs, dims, portable, version"),
        ({"inputs": []}, "inputs: must name at least one input"),
        ({"inputs": 3}, "inputs: must be a list, got 3"),
        ({"inputs": [3]}, "inputs[0]: must be a table of keys and values, got 3"),
        ({"inputs": [{"shape": [1]}]}, "inputs[0].name: missing, but required"),
        ({"inputs": [{"name": "x"}]}, "inputs[0].shape: missing, but required"),
        ({"inputs": [IMAGE, IMAGE]}, "inputs[1].name: repeats 'x'"),
        ({"inputs": [Input("a.0", [1]), Input("a.2", [1])]},
         "inputs[0].name: items of the list 'a' must be 0 to 1, got 0, 2"),
        ({"inputs": [Input("a.0", [1]), Input("a.b", [1])]},
         "inputs[0].name: items of the list 'a' must be 0 to 1, got 0, b"),
        ({"inputs": [Input("a.b", [1]), Input("a", [1])]},
         "inputs[1].name: 'a' is both a tensor and a container of b"),
        ({"targets": ["torch", "onx"]},
         "targets[1]: must be one of torch, aoti, onnx; got 'onx' (did you mean onnx?)"),
        ({"targets": ["torch", "torch"]}, "targets[1]: repeats 'torch'"),
        ({"targets": "torch"}, "targets: must be a list, got 'torch'"),
        ({"outputs": []}, "outputs: must name at least one output; leave it out to keep all"),
        ({"outputs": ["a", "b", "a"]}, "outputs[2]: repeats 'a'"),
        ({"outputs": ["a", ""]}, "outputs[1]: must not be empty"),
        ({"outputs": [1]}, "outputs[0]: must be a valid string, got 1"),
        ({"dims": {"seq": {}}}, "dims.seq: no input has this dimension; the inputs' shapes name batch"),
        ({"dims": {"bacth": {}}},
         "dims.bacth: no input has this dimension (did you mean batch?); the inputs' shapes name batch"),
        ({"dims": {"batch": {"min": 4, "max": 2}}}, "dims.batch.min: must be ≤ max (2), got 4"),
        ({"dims": {"batch": {"min": 0}}}, "dims.batch.min: must be ≥ 1, got 0"),
        ({"dims": {"batch": {"mim": 4}}},
         "dims.batch.mim: unknown key (did you mean min?); known keys: min, max"),
        ({"dims": {"a-b": {}}},
         "dims.a-b: must be a name of letters, digits and _ (not starting with a digit), got 'a-b'"),
        ({"dims": [1]}, "dims: must be a table of keys and values, got [1]"),
        ({"version": 0}, "version: must be ≥ 1, got 0"),
        ({"version": "1"}, "version: must be a valid integer, got '1'"),
        ({"version": VERSION + 1, "novelty": 3},
         f"version: is {VERSION + 1}, but this fxfreeze reads plans up to version {VERSION}; "
         "upgrade fxfreeze"),
    ],
)  # fmt: skip
def test_refusals(keys: dict[str, Any], line: str) -> None:
    assert refused(**keys) == [line]


@pytest.mark.parametrize("size", [0, -1, None, True, 2.0, [3]])
def test_bad_sizes(size: Any) -> None:
    text = "must be a size ≥ 1, or a name such as 'batch' for a dynamic dimension"
    assert refused(inputs=[{"name": "x", "shape": ["batch", size]}]) == [f"inputs[0].shape[1]: {text}, got {size!r}"]


@pytest.mark.parametrize("symbol", ["a-b", "2x", "", "for", "a b", "2*seq", "a.b"])
def test_bad_symbols(symbol: str) -> None:
    (line,) = refused(inputs=[{"name": "x", "shape": [symbol]}])
    assert line.startswith("inputs[0].shape[0]: must be a name") and line.endswith(f"got {symbol!r}")


@pytest.mark.parametrize("name", ["", "0", "a..b", "a.", ".a", "a b", "a.b c", "class.x", 3, None])
def test_bad_input_names(name: Any) -> None:
    (line,) = refused(inputs=[{"name": name, "shape": [1]}])
    assert line.startswith("inputs[0].name: ") and line.endswith(f"got {name!r}")


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"dtype": "int64", "low": 2, "high": 1}, "low: must be ≤ high (1), got 2"),
        ({"low": 0.5, "high": 0.25}, "low: must be ≤ high (0.25), got 0.5"),
        ({"dtype": "bool", "low": 0}, "low: has no meaning for dtype bool; leave it out"),
        ({"dtype": "bool", "high": 1}, "high: has no meaning for dtype bool; leave it out"),
        ({"dtype": "complex64", "high": 1}, "high: has no meaning for dtype complex64; leave it out"),
        ({"dtype": "int8", "low": -129}, "low: must lie in int8's range [-128, 127], got -129"),
        ({"dtype": "uint8", "high": 256}, "high: must lie in uint8's range [0, 255], got 256"),
        ({"dtype": "float16", "high": 65505},
         "high: must lie in float16's range [-65504.0, 65504.0], got 65505"),
        ({"dtype": "int32", "high": 1.5}, "high: must be a whole number for dtype int32, got 1.5"),
        ({"low": True}, "low: must be a finite number, got True"),
        ({"low": math.inf}, "low: must be a finite number, got inf"),
        ({"high": 10**400}, "high: must be a finite number, got " + repr(10**400)[:97] + "..."),
        ({"shape": 3}, "shape: must be a list of sizes and names, such as ['batch', 3, 32, 32], got 3"),
        ({"shape": "batch"},
         "shape: must be a list of sizes and names, such as ['batch', 3, 32, 32], got 'batch'"),
        ({"dtype": "flaot32"},
         "dtype: must be one of float32, float16, bfloat16, float64, int64, int32, int16, int8, uint8, bool, "
         "complex64; got 'flaot32' (did you mean float32 or float64?)"),
        ({"unit": "m"}, "unit: unknown key; known keys: name, shape, dtype, low, high"),
    ],
)  # fmt: skip
def test_input_refusals(keys: dict[str, Any], line: str) -> None:
    """Records built on their own refuse in the same words, without the path above them."""
    with pytest.raises(PlanError) as caught:
        Input(**{"name": "x", "shape": [1], **keys})
    assert str(caught.value) == f"{line}\n  at Input"
    assert refused(inputs=[{"name": "x", "shape": [1], **keys}]) == [f"inputs[0].{line}"]


def test_all_problems_are_reported_at_once() -> None:
    lines = refused(steps=[{"kind": "lora", "at": "a", "rank": 0, "rnak": 1}], targets=["onx"], extra=1)
    assert [line.split(":")[0] for line in lines] == ["steps[0].rank", "steps[0].rnak", "targets[0]", "extra"]


def test_a_step_refuses_on_its_own() -> None:
    with pytest.raises(PlanError, match=r"^rank: must be ≥ 1, got 0\n  at LoRA$"):
        LoRA("fc", 0)


def test_positional_arguments() -> None:
    assert IA3("fc", "in").side == "in"
    with pytest.raises(TypeError, match="IA3 takes 3 positional arguments"):
        IA3("fc", "in", "w", "x")  # type: ignore[call-arg, misc, arg-type]
    with pytest.raises(TypeError, match="both by position and by name"):
        IA3("fc", at="fc")  # type: ignore[misc]


def test_braces_in_values_are_kept() -> None:
    assert refused(inputs=[{"name": "{text} {0}", "shape": [1]}])[0].endswith("got '{text} {0}'")


# ---- files

FULL = Plan(
    inputs=[Input("image", ("batch", 3, 32, 32)), Input("batch.ids", ("batch", "seq"), "int64", 0, 99)],
    steps=[
        LoRA("layer*", 4, alpha=8.5, weights="/somewhere/else/lora.safetensors"),
        DoRA(["a", "b[0-9]"], 2, rslora=True, name="second"),
        IA3("fc", side="in"),
        Prune(["a", "b"], method="block", density=0.5, block=[32, 8], exclude="fc", train=True),
        Prune(mask="/somewhere/else/ticket.pth"),
    ],
    targets=["torch", "aoti", "onnx"],
    outputs=["logits", 'quoted "name" \\ with\ttab and ü'],
    dims={"seq": Dim(2, 64), "batch": Dim()},
)


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_round_trip(tmp_path: Path, suffix: str) -> None:
    FULL.save(tmp_path / f"plan{suffix}")
    loaded = Plan.load(tmp_path / f"plan{suffix}")
    assert loaded == FULL
    assert [type(step) for step in loaded.steps] == [LoRA, DoRA, IA3, Prune, Prune]
    assert os.listdir(tmp_path) == [f"plan{suffix}"]
    loaded.save(tmp_path / f"again{suffix}")
    assert (tmp_path / f"again{suffix}").read_bytes() == (tmp_path / f"plan{suffix}").read_bytes()


symbols = st.sampled_from(["batch", "seq", "größe", "_x1"])
names = st.text("abcXYZ_", min_size=1, max_size=4).filter(lambda s: s not in {"as", "a" * 5})
floats = st.floats(allow_nan=False, allow_infinity=False, width=32)


@st.composite
def inputs(draw: st.DrawFn, name: str) -> Input:
    dtype = draw(st.sampled_from(["float32", "float64", "int64", "int8", "uint8", "bool", "complex64"]))
    value = {"float32": floats, "float64": floats, "int64": st.integers(-(2**63), 2**63 - 1)}.get(
        dtype, st.integers(0, 127)
    )
    low, high = sorted(draw(st.tuples(value, value)))
    shape = draw(st.lists(st.one_of(symbols, st.integers(1, 2**40)), max_size=4))
    if dtype in ("bool", "complex64"):
        return Input(name, shape, dtype)
    return Input(name, shape, dtype, draw(st.sampled_from([None, low])), draw(st.sampled_from([None, high])))


@st.composite
def steps(draw: st.DrawFn, *, rows: bool) -> Step:
    glob = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(lambda s: s == s.strip())
    at: Any = draw(st.one_of(glob, st.lists(glob, min_size=1, max_size=3, unique=True)))
    weights = draw(st.sampled_from([None, "/a/b c.safetensors", "/ü/w.safetensors"]))
    if draw(st.booleans()):
        return IA3(at, draw(st.sampled_from(["in", "out"])), weights)
    if draw(st.booleans()):
        modes = draw(st.one_of(st.none(), st.integers(1, 10**4))) if rows else None
        heat = draw(st.floats(1e-6, 1e6, allow_nan=False))
        return Gate(at, s=draw(st.sampled_from(["h", "abs"])), temperature=heat, harden=draw(st.booleans()),
                    modes=modes, select=f"fxfreeze_mode_{modes}", weights=weights)  # fmt: skip
    kind = draw(st.sampled_from([LoRA, DoRA]))
    alpha = draw(st.one_of(st.none(), floats.filter(bool), st.integers(1, 10**6)))
    many: dict[str, Any] = {}
    if kind is LoRA and rows and (count := draw(st.integers(0, 3))):
        weights = draw(st.sampled_from([weights, tuple(f"/a/{i}.safetensors" for i in range(count))]))
        many = {"adapters": count, "select": f"fxfreeze_adapter_{count}"}
    return kind(at, draw(st.integers(1, 10**6)), alpha, draw(st.booleans()), weights, **many)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    specs = [draw(inputs(name)) for name in draw(st.lists(names, min_size=1, max_size=3, unique=True))]
    used = sorted({size for spec in specs for size in spec.shape if isinstance(size, str)})
    bounds = [tuple(sorted(draw(st.tuples(st.integers(1, 99), st.integers(1, 99))))) for _ in used]
    return Plan(
        specs,
        draw(st.lists(steps(rows=bool(specs[0].shape)), max_size=4)),
        draw(st.lists(st.sampled_from(["torch", "aoti", "onnx"]), unique=True)),
        draw(
            st.one_of(
                st.none(),
                st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, unique=True),
            )
        ),
        {name: Dim(low, draw(st.sampled_from([None, high]))) for name, (low, high) in zip(used, bounds, strict=True)},
        draw(st.booleans()),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=plans(), suffix=st.sampled_from([".toml", ".json"]))
def test_any_plan_survives_a_file(tmp_path: Path, plan: Plan, suffix: str) -> None:
    plan.save(tmp_path / f"plan{suffix}")
    assert Plan.load(tmp_path / f"plan{suffix}") == plan
    assert Plan.model_validate(plan.to_dict()) == plan


def test_selects_of_adapters_and_modes() -> None:
    steps = [LoRA("a", 1, adapters=2), LoRA("b", 4, adapters=2), Gate("c", modes=3, select="adapter"),
             LoRA("d", 1, adapters=5, select="style"), LoRA("e", 1)]  # fmt: skip
    plan = Plan([Input("x", shape=("batch", 3))], steps)
    assert [(item.name, item.shape, item.low, item.high) for item in plan.selects] == [
        ("adapter", ("batch",), 0, 2), ("style", ("batch",), 0, 5),
    ]  # fmt: skip


def test_weights_move_with_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    (here / "sub").mkdir(parents=True)
    monkeypatch.chdir(here)
    plan = Plan(inputs=[IMAGE], steps=[LoRA("a", 1, weights="sub/w.safetensors")])
    plan.save("plan.toml")
    assert 'weights = "sub/w.safetensors"' in Path("plan.toml").read_text()
    assert Plan.load("plan.toml").steps[0] == LoRA("a", 1, weights=str(here / "sub" / "w.safetensors"), name="lora")
    # Saved elsewhere, it still means the file it meant.
    plan.save("sub/plan.toml")
    Plan.load("plan.toml").save("sub/same.toml")
    assert 'weights = "w.safetensors"' in Path("sub/plan.toml").read_text()
    assert Path("sub/same.toml").read_bytes() == Path("sub/plan.toml").read_bytes()
    plan.save(tmp_path / "up.toml")
    assert 'weights = "here/sub/w.safetensors"' in (tmp_path / "up.toml").read_text()
    # A moved folder takes its weights along.
    here.rename(tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    moved = Plan.load(tmp_path / "there" / "plan.toml").steps[0]
    assert isinstance(moved, LoRA) and moved.weights == str(tmp_path / "there" / "sub" / "w.safetensors")


def test_a_mask_is_a_file_in_prune_and_no_file_in_splice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    steps = [Prune(mask="sub/m.safetensors"), Splice("torch.nn:Identity", at="a", mask="is_image")]
    Plan(inputs=[IMAGE], steps=steps).save("plan.toml")
    prune, splice = Plan.load("plan.toml").steps
    assert (prune.mask, splice.mask) == (str(tmp_path / "sub" / "m.safetensors"), "is_image")  # type: ignore[attr-defined]


def test_absolute_weights_outside_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "plans").mkdir()
    outside = str(tmp_path / "w.safetensors")
    plan = Plan(inputs=[IMAGE], steps=[IA3("a", weights=outside)])
    plan.save(tmp_path / "plans" / "plan.json")
    assert json.loads((tmp_path / "plans" / "plan.json").read_text())["steps"][0]["weights"] == outside
    assert Plan.load(tmp_path / "plans" / "plan.json") == plan


@pytest.mark.parametrize(
    ("name", "content", "what", "line"),
    [
        ("p.toml", "version = 1\ninputs = [\n  {name = = 1}]\n",
         "not valid TOML: Invalid value", "line 3, column 11"),
        ("p.toml", "version = 1\nversion = 2\n",
         "not valid TOML: Cannot overwrite a value", "line 2, column 12"),
        ("p.toml", "version = 1\ninputs = [", "not valid TOML: Invalid value", "line 2, at the end"),
        ("p.json", '{\n  "version": 1,\n  "inputs": [}\n}',
         "not valid JSON: Expecting value", "line 3, column 14"),
        ("p.json", "", "not valid JSON: Expecting value", "line 1, column 1"),
        ("p.json", '{"version": 1, "version": 2}', "not valid JSON: key 'version' is there twice", None),
        ("p.json", "[1]", "a plan is a table of keys and values, not a list", None),
        ("p.json", "[" * 100_000, "the plan file is nested too deeply", None),
        ("p.yaml", "version: 1", "a plan file ends in .toml or .json, got 'p.yaml'", None),
        ("p.toml", "version = 9",
         "version: is 9, but this fxfreeze reads plans up to version 1; upgrade fxfreeze", None),
        ("p.toml", "inputs = [{name = 'x', shape = [1]}]\nsteps = [{kind = 'ia3'}]",
         "steps[0].at: missing, but required", None),
        ("p.toml", "steps = 3", "inputs: missing, but required\nsteps: must be a list, got 3", None),
        ("p.json", '{"inputs": [{"name": "x", "shape": [1], "high": NaN}]}',
         "inputs[0].high: must be a finite number, got nan", None),
    ],
)  # fmt: skip
def test_broken_files(tmp_path: Path, name: str, content: str, what: str, line: str | None) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(PlanError) as caught:
        Plan.load(tmp_path / name)
    assert caught.value.where == str(tmp_path / name)
    assert caught.value.line == line
    assert caught.value.what.startswith(what) if what.startswith("not valid") else caught.value.what == what
    assert name in str(caught.value) and (line or "") in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no such plan file"):
        Plan.load(tmp_path / "none.toml")
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(PlanError, match="cannot read the plan file"):
        Plan.load(tmp_path / "folder.toml")
    (tmp_path / "latin.toml").write_bytes(b"# \xe4\nversion = 1\n")
    with pytest.raises(PlanError, match="UTF-8 text, but byte 2 is not"):
        Plan.load(tmp_path / "latin.toml")


def test_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"inputs": [IMAGE]}).encode())
    assert Plan.load(tmp_path / "p.json") == Plan(inputs=[IMAGE])


def test_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "plan.toml"
    Plan(inputs=[IMAGE]).save(file)
    before = file.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PlanError, match="cannot write the plan file: No space left on device"):
        FULL.save(file)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["plan.toml"]


def test_save_is_one_replace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is moved into place is complete, so a kill at any moment leaves the old file or the new one."""
    moves: list[tuple[bytes, str]] = []
    replace = os.replace

    def watch(source: Any, target: Any) -> None:
        moves.append((Path(source).read_bytes(), str(target)))
        assert Path(source).parent == tmp_path, "a move across file systems is no longer atomic"
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    FULL.save(tmp_path / "plan.toml")
    assert moves == [((tmp_path / "plan.toml").read_bytes(), str(tmp_path / "plan.toml"))]


def test_save_refuses_what_it_cannot_read_back(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"ends in \.toml or \.json"):
        FULL.save(tmp_path / "plan.yaml")
    with pytest.raises(PlanError, match="cannot write the plan file"):
        FULL.save(tmp_path / "no" / "plan.toml")


class Made:
    """What a plan takes for a module."""

    def forward(self, x: Any) -> Any:
        return x


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_a_module_that_was_made_goes_into_records_and_into_no_plan_file(tmp_path: Path, suffix: str) -> None:
    class Local(Made):
        pass

    for module, name in ((Made(), "Made"), (Local(), "Local")):
        plan = Plan([IMAGE], [LoRA("a", 2), Splice(module, at="b", name="mine")])
        with pytest.raises(PlanError, match=rf"steps\[1\]\.module: .* {name} that .* made") as caught:
            plan.save(tmp_path / f"plan{suffix}")
        assert caught.value.where == "mine" and "'package.module:Name' with arguments" in str(caught.value)
        assert not list(tmp_path.iterdir())
        record = plan.to_dict()
        assert record["steps"][1]["module"] == f"<{type(module).__module__}:{type(module).__qualname__}>"
        again = Plan.model_validate(json.loads(json.dumps(record)))
        assert again.to_dict() == record and again != plan


def test_arguments_are_data(tmp_path: Path) -> None:
    table: dict[str, Any] = {
        "shape": (8, [1, (2,)]),
        "eps": numpy.float64(0.5),
        "on": True,
        "names": {"a": "b", "c": []},
    }
    step = Splice("torch.nn:LayerNorm", at="1", arguments=table)
    assert step.arguments == {"shape": [8, [1, [2]]], "eps": 0.5, "on": True, "names": {"a": "b", "c": []}}
    assert type(step.arguments["eps"]) is float
    table["names"]["c"].append(1)
    assert step.arguments["names"] == {"a": "b", "c": []}
    plan = Plan([IMAGE], [step])
    for suffix in Plan.suffixes:
        plan.save(tmp_path / f"plan{suffix}")
        assert Plan.load(tmp_path / f"plan{suffix}") == plan
    bad = {"a": None, "b": [1, {"c": math.inf}], "d": {1: 2}, "e": {"f": Path()}, "g": 1j}
    for kind, more in (("splice", {}), ("head", {"how": "replace"})):
        lines = refused(steps=[{"kind": kind, "at": "1", "module": "a:b", "arguments": bad, **more}])
        assert [line.partition(": ")[0].removeprefix("steps[0].arguments.") for line in lines] == [
            "a", "b[1].c", "d", "e.f", "g"
        ]  # fmt: skip
        assert lines[0].endswith("must be a bool, a finite number, a text, or a list or table of them, got None")
        assert lines[2].endswith("keys must be texts, got 1")
    assert "must be a table" in refused(steps=[{"kind": "head", "at": "1", "module": "a:b", "arguments": [1]}])[0]


# ---- schema


def test_schema_describes_every_key() -> None:
    schema = Plan.json_schema()
    json.dumps(schema)
    assert schema["title"] == "fxfreeze plan" and schema["additionalProperties"] is False
    assert schema["required"] == ["inputs"]
    records = [schema, *schema["$defs"].values()]
    assert {"Input", "Dim", *(step.__name__ for step in STEPS)} == set(schema["$defs"])
    for record in records:
        assert record["additionalProperties"] is False
        for name, key in record["properties"].items():
            assert key.get("description"), f"{record['title']}.{name} has no description"
    discriminator = schema["properties"]["steps"]["items"]["discriminator"]
    assert set(discriminator["mapping"]) == {step.model_fields["kind"].default for step in STEPS}
    assert schema["$defs"]["LoRA"]["properties"]["rank"]["minimum"] == 1


def test_steps_have_different_kinds_and_positional_order() -> None:
    kinds = [step.model_fields["kind"].default for step in STEPS]
    assert len(set(kinds)) == len(kinds) and kinds == [step.__name__.lower() for step in STEPS]
    assert all(next(iter(step.model_fields)) == "kind" for step in STEPS), "a file shows the kind first"


# ---- errors


def test_error_text() -> None:
    assert str(FxfreezeError("what")) == "what"
    assert str(FxfreezeError("what", where="layer1", line="m.py:3")) == "what\n  at layer1 (m.py:3)"
    assert str(FxfreezeError("what", line="m.py:3", hint="do")) == "what\n  at m.py:3\n  hint: do"
    error = pickle.loads(pickle.dumps(PlanError("what", where="here", hint="do")))
    assert (type(error), error.what, error.where, error.line, error.hint) == (
        PlanError,
        "what",
        "here",
        None,
        "do",
    )


def test_plan_imports_no_torch() -> None:
    """The room itself, without the package's front door."""
    code = (
        "import sys, types, pathlib, importlib.util\n"
        "folder = pathlib.Path(importlib.util.find_spec('fxfreeze').origin).parent\n"
        "package = types.ModuleType('fxfreeze'); package.__path__ = [str(folder)]\n"
        "sys.modules['fxfreeze'] = package\n"
        "import fxfreeze.plan\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
