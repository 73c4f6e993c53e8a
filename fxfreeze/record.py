"""Records: immutable, closed pydantic models whose every refusal is a PlanError that names the key.

The machinery under `plan.py`, apart from it so that the plan reads as a vocabulary.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Self, Union, cast, dataclass_transform, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from .errors import PlanError

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

Problem = tuple[str, str]
"""A key's path relative to the record it is in ("" for the record itself), and what is wrong with it."""


@dataclass_transform(kw_only_default=False, frozen_default=True, field_specifiers=(Field,))
class _RecordMeta(ModelMetaclass):
    """Lets a record be called with positional arguments, and turns pydantic's refusal into a PlanError.

    A metaclass, because pydantic builds nested records without calling them: an `__init__` that raised
    PlanError would hide the path of the key inside its parent.
    """

    def __call__(cls, *args: Any, **data: Any) -> Any:
        model = cast(type[BaseModel], cls)
        order = [name for name, field in model.model_fields.items() if not field.kw_only]
        if len(args) > len(order):
            takes = f"{len(order)} positional arguments ({', '.join(order)})"
            raise TypeError(f"{cls.__name__} takes {takes}, got {len(args)}")
        positional = dict(zip(order, args, strict=False))
        if twice := positional.keys() & data.keys():
            raise TypeError(f"{cls.__name__} got {', '.join(sorted(twice))} both by position and by name")
        with _refusals(model):
            return super().__call__(**positional, **data)


class Record(BaseModel, metaclass=_RecordMeta):
    """An immutable, closed pydantic model. `_problems` holds the checks that one field alone cannot make."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """As pydantic's, with PlanError."""
        with _refusals(cls):
            return super().model_validate(obj, **options)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's, but a changed copy is checked like a new record."""
        copy = super().model_copy(deep=deep)
        if not update:
            return copy
        return type(self)(**{name: getattr(copy, name) for name in copy.model_fields_set} | dict(update))

    def to_dict(self) -> dict[str, Any]:
        """JSON- and TOML-able data; keys that are None are left out."""
        return self.model_dump(mode="json", exclude_none=True)

    def _problems(self) -> Iterator[Problem]:
        """Yield what is wrong across fields."""
        yield from ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if problems := list(self._problems()):
            raise refusal(*problems)
        return self

    def _derive(self, **values: Any) -> Self:
        """Set fields that validation computes from others; a frozen model leaves no other way."""
        self.__dict__.update(values)
        return self


def refusal(*problems: Problem | str) -> PydanticCustomError:
    """What a validator raises: texts about its own value, or problems with the keys below it.

    They travel in the error's context, because pydantic would read a brace in a message as a template.
    """
    pairs = [("", problem) if isinstance(problem, str) else problem for problem in problems]
    return PydanticCustomError("record", "{problems}", {"problems": pairs})


def brief(value: Any) -> str:
    """`repr`, cut to a length that fits into a message."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def suggest(word: Any, known: Iterable[str]) -> str:
    """` (did you mean …?)` with the nearest known words, or nothing."""
    near = difflib.get_close_matches(str(word), list(known), n=2, cutoff=0.55)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


@contextlib.contextmanager
def _refusals(model: type[BaseModel]) -> Iterator[None]:
    """The one place where pydantic's ValidationError becomes PlanError."""
    try:
        yield
    except ValidationError as error:
        problems = [problem for detail in error.errors(include_url=False) for problem in _explain(model, detail)]
        lines = [f"{path}: {text}" if path else text for path, text in problems]
        raise PlanError("\n".join(dict.fromkeys(lines)), where=model.__name__) from None


def _explain(model: type[BaseModel], detail: Any) -> list[Problem]:
    """Say one of pydantic's error details in the words of a plan."""
    path, known = _locate(model, detail["loc"])
    context, got = detail.get("ctx", {}), detail.get("input")
    match detail["type"]:
        case "record":
            return [(_join(path, key), text) for key, text in context["problems"]]
        case "missing":
            text = "missing, but required"
        case "extra_forbidden":
            text = f"unknown key{suggest(detail['loc'][-1], known)}; known keys: {', '.join(known)}"
        case "greater_than_equal":
            text = f"must be ≥ {context['ge']}, got {brief(got)}"
        case "literal_error":
            choices = re.findall(r"'([^']*)'", context["expected"])
            text = f"must be one of {', '.join(choices)}; got {brief(got)}{suggest(got, choices)}"
        case "union_tag_invalid":
            path, tag = _join(path, "kind"), context["tag"]
            text = f"unknown kind {tag!r}{suggest(tag, known)}; known kinds: {', '.join(known)}"
        case "union_tag_not_found":
            path, text = _join(path, "kind"), f"missing; known kinds: {', '.join(known)}"
        case "tuple_type" | "dict_type" | "model_type" | "model_attributes_type" as wrong:
            what = "list" if wrong == "tuple_type" else "table of keys and values"
            text = f"must be a {what}, got {brief(got)}"
        case "string_too_short":
            text = "must not be empty"
        case _:
            text = re.sub(r"^Input should be", "must be", detail["msg"]) + f", got {brief(got)}"
    return [(path, text)]


def _locate(model: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[str, list[str]]:
    """A key's path as a user writes it (without pydantic's union tags), and the keys or kinds known there."""
    path, known, here = "", list(model.model_fields), cast(Any, model)
    for part in loc:
        if part == "[key]":  # pydantic's mark for "the key itself", which the path ends with already
            continue
        if isinstance(part, int):
            path, here = f"{path}[{part}]", _plain((get_args(here) or (None,))[0])
        elif _is_union(here):  # the tag names the class and is no key
            here = next((member for member in get_args(here) if _kind(member) == part), None)
        elif get_origin(here) is dict:
            path, here = _join(path, part), _plain(get_args(here)[1])
        elif isinstance(here, type) and issubclass(here, BaseModel):
            known = list(here.model_fields)
            path, here = (
                _join(path, part),
                _plain(here.model_fields[part].annotation) if part in known else None,
            )
        else:
            path = _join(path, part)
    return path, [_kind(member) for member in get_args(here)] if _is_union(here) else known


def _kind(member: Any) -> str:
    fields = getattr(member, "model_fields", {})
    return str(fields["kind"].default) if "kind" in fields else ""


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _plain(annotation: Any) -> Any:
    """Take `Annotated[...]` and `| None` off a type."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    members = [arg for arg in get_args(annotation) if arg is not type(None)]
    return _plain(members[0]) if _is_union(annotation) and len(members) == 1 else annotation


def _join(path: str, key: str) -> str:
    return path + key if not path or not key or key.startswith("[") else f"{path}.{key}"
