"""fxfreeze.binding: nested values to flat tensors and back."""

from __future__ import annotations

import collections
import dataclasses
import json

import pytest
import torch

from fxfreeze.binding import build, describe, flatten_inputs, nest, select, top_level
from fxfreeze.errors import ArtifactError, CaptureError, PlanError


def tensors(count: int) -> list[torch.Tensor]:
    return [torch.full((1,), float(i)) for i in range(count)]


NESTED = ["image", "batch.ids", "batch.mask", "feats.1", "feats.0"]


class TestInputs:
    def test_positional_and_keyword_bind_by_top_level_name(self):
        a, ids, mask, f1, f0 = tensors(5)
        for args, kwargs in (
            ((a, {"ids": ids, "mask": mask}, [f0, f1]), {}),
            ((a,), {"feats": (f0, f1), "batch": {"mask": mask, "ids": ids}}),
            ((a,), {"feats": [f0, f1], "batch.ids": ids, "batch.mask": mask}),
        ):
            flat = flatten_inputs(NESTED, args, kwargs)
            assert all(x is y for x, y in zip(flat, [a, ids, mask, f1, f0], strict=True))

    def test_top_level_order_is_first_appearance(self):
        assert top_level(["b.x", "a", "b.y"]) == ["b", "a"]

    @pytest.mark.parametrize(
        ("args", "kwargs", "message"),
        [
            ((), {}, "'image' is missing"),
            (tuple(tensors(4)), {}, "4 positional inputs were passed, 3 are known"),
            ((tensors(1)[0],), {"image": tensors(1)[0]}, "'image' was passed twice"),
            ((), {"imge": tensors(1)[0]}, "did you mean 'image'"),
            ((1.5,), {}, "'image' must be a tensor, not float"),
            ((tensors(1)[0], {"ids": tensors(1)[0]}), {}, "'batch.mask' is missing: 'batch' has only 'ids'"),
            ((tensors(1)[0], tensors(1)[0]), {}, "'batch' must be a dict that holds 'batch.ids', not torch.Tensor"),
            (
                (tensors(1)[0], dict(zip(("ids", "mask", "type"), tensors(3))), tensors(2)),
                {},
                "unknown input 'batch.type'",
            ),
            (
                (tensors(1)[0], dict(zip(("ids", "mask"), tensors(2))), tensors(3)),
                {},
                "unknown input 'feats.2'",
            ),
            (
                (tensors(1)[0], dict(zip(("ids", "mask"), tensors(2))), tensors(1)),
                {},
                "'feats' has only 1 items",
            ),
            (
                (tensors(1)[0], dict(zip(("ids", "mask"), tensors(2))), tensors(2)),
                {"batch.ids": tensors(1)[0]},
                "both on its own and inside",
            ),
        ],
    )
    def test_wrong_arguments_are_refused_by_name(self, args, kwargs, message):
        with pytest.raises(ArtifactError, match=message.replace("(", r"\(")):
            flatten_inputs(NESTED, args, kwargs)

    def test_error_type_is_the_callers(self):
        with pytest.raises(PlanError):
            flatten_inputs(["x"], (), {}, error=PlanError)

    def test_nest_is_the_inverse(self):
        flat = tensors(5)
        nested = nest(NESTED, flat)
        assert list(nested) == ["image", "batch", "feats"]
        assert nested["feats"][0] is flat[4] and nested["feats"][1] is flat[3]
        assert all(x is y for x, y in zip(flatten_inputs(NESTED, (), nested), flat, strict=True))

    @pytest.mark.parametrize("names", [["a.0", "a.2"], ["a.0", "a.b"], ["a", "a.b"], ["a.b", "a"]])
    def test_names_that_nest_no_way_are_refused(self, names):
        with pytest.raises(CaptureError):
            nest(names, tensors(len(names)))


Point = collections.namedtuple("Point", "x y")


@dataclasses.dataclass
class Result:
    logits: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None = None
    cache: object = None


class Cache:
    def __init__(self, *layers: torch.Tensor):
        self.layers = list(layers)


class TestOutputs:
    @pytest.mark.parametrize(
        ("make", "names"),
        [
            (lambda t: t[0], ["output"]),
            (lambda t: (t[0], t[1]), ["output_0", "output_1"]),
            (lambda t: [t[0], {"a": t[1]}], ["output_0", "output_1.a"]),
            (lambda t: {"logits": t[0], "none": None, "h": (t[1], [t[2]])}, ["logits", "h.0", "h.1.0"]),
            (lambda t: (None, t[0]), ["output_1"]),
            (lambda t: {"p": Point(t[0], t[1])}, ["p.x", "p.y"]),
            (lambda t: Point(t[0], t[1]), ["x", "y"]),
        ],
    )
    def test_describe_then_build_gives_the_same_nesting(self, make, names):
        output = make(tensors(3))
        structure, found, flat = describe(output)
        assert found == names
        rebuilt = build(json.loads(json.dumps(structure)), flat)
        assert rebuilt == output
        assert {name: id(t) for name, t in select(output, names).items()} == dict(zip(found, map(id, flat)))

    def test_dataclass_comes_back_as_a_dict(self):
        a, b = tensors(2)
        structure, names, flat = describe(Result(a, (b,)))
        assert names == ["logits", "hidden_states.0"]
        assert build(structure, flat) == {"logits": a, "hidden_states": (b,), "cache": None}

    def test_a_tensor_returned_twice_stays_twice(self):
        (a,) = tensors(1)
        _structure, names, flat = describe((a, a))
        assert names == ["output_0", "output_1"] and flat[0] is flat[1] is a

    @pytest.mark.parametrize("leaf", [3, 1.5, "text", {1: torch.zeros(1)}, object()])
    def test_a_leaf_that_is_no_tensor_is_refused_with_path_type_and_choices(self, leaf):
        with pytest.raises(CaptureError, match="'cache' is") as caught:
            describe(Result(tensors(1)[0], None, leaf))
        assert "'logits'" in str(caught.value)

    def test_tensors_inside_an_opaque_object_are_listed_and_can_be_selected(self):
        a, b, c = tensors(3)
        output = Result(a, None, Cache(b, c))
        with pytest.raises(CaptureError, match=r"cache\.layers\.1"):
            describe(output)
        assert select(output, ["cache.layers.1"])["cache.layers.1"] is c

    def test_colliding_names_and_no_tensor_at_all_are_refused(self):
        a, b = tensors(2)
        with pytest.raises(CaptureError, match="two outputs"):
            describe({"a.b": a, "a": {"b": b}})
        with pytest.raises(CaptureError, match="no tensor"):
            describe({"a": None})

    def test_select_a_container_takes_all_its_tensors(self):
        a, b, c = tensors(3)
        picked = select({"h": (a, [b]), "logits": c}, ["logits", "h"])
        assert list(picked) == ["logits", "h.0", "h.1.0"]
        assert describe(picked)[1] == ["logits", "h.0", "h.1.0"]

    def test_select_a_key_with_dots(self):
        (a,) = tensors(1)
        assert select({"a.b": {"c": a}}, ["a.b.c"])["a.b.c"] is a

    @pytest.mark.parametrize("name", ["logit", "hidden_states.0", "cache", "logits.shape", "output_7"])
    def test_a_wrong_name_is_refused_with_the_nearest(self, name):
        with pytest.raises(CaptureError, match=r"logits"):
            select(Result(tensors(1)[0], None, 5), [name])
