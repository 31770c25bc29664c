"""Read YAML files and `a.b=c` overrides into a validated pydantic model, and report all errors at once.

A user should see all errors of a recipe in one message, so schema errors, contradictions between keys and invalid
overrides are collected and raised together, each with its dotted key, the value found, the rule and the nearest valid
name. Files are YAML (`core_yaml.py`). The text of an override is used literally if the schema has a text
(`run_dir=runs/exp #3`), and parsed as YAML otherwise. Validation is strict: `"3"` is not an integer and `1` is not a
flag, in files and overrides.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from parallel.errors import UserError, nearest
from spar_scale.config import core_yaml

Settings = TypeVar("Settings", bound=BaseModel)
Lookup = Callable[[str], Any]
Contradiction = tuple[str, str]  # (dotted key, found value and rule)
CONTRADICTIONS_FOLLOW = {"contradictions_follow": True}
"""Validation context with which the model skips contradictions, because `validate` collects them itself."""


def load(path: str | Path, model: type[Settings], overrides: list[str] | None = None) -> Settings:
    """Read `path` with its parents (`extends:`), apply the overrides, validate as `model`.

    A model may have a class method `contradictions(value)`, which takes a lookup by dotted key and yields
    contradictions. Raises UserError with all errors.
    """
    path = Path(path)
    values = read(path)
    errors = []
    for override in overrides or []:
        try:
            apply_override(values, override, model)
        except UserError as error:
            errors.append(str(error))
    validated, schema_errors = validate(values, model)
    errors += schema_errors
    if validated is None or errors:
        count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
        raise UserError("\n".join([f"{path}: {count}", *(f"  {error}" for error in errors)]))
    return validated


def read(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the mapping in `path`, merged over the file that its `extends:` names (relative to `path`)."""
    if path.resolve() in children:
        chain = " -> ".join(str(p.name) for p in (*children, path))
        raise UserError(f"{path}: extends: a cycle ({chain}); the first parent must not extend another file")
    values = _parse_file(path)
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise UserError(f"{path}: extends: found {show(parent)}, must be the path of one file")
    return merge(read(path.parent / parent, (*children, path.resolve())), values)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return `below` updated with `above`: mappings merge key by key, other values replace."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def apply_override(values: dict[str, Any], override: str, model: type[BaseModel]) -> None:
    """Apply one override `a.b=c` to `values`, in place; a number in the key is the index of a list entry.

    If `model` has a text at the key, `c` is used literally: only one pair of YAML quotes around all of it is removed,
    and `null` or nothing is null if the key may be null. Otherwise `c` is parsed as YAML.
    """
    dotted, equals, text = override.partition("=")
    parts = dotted.split(".")
    if not equals or not all(parts):
        raise UserError(f"override: found {override!r}, must be dotted.key=value")
    value = _override_value(text, _type_at(model, parts), f"override {dotted}")
    place: Any = values
    for depth, part in enumerate(parts[:-1]):
        if isinstance(place, dict) and place.get(part) is None:
            place[part] = {}
        place = _step(place, part, parts[:depth])
    if isinstance(place, dict):
        place[parts[-1]] = value
    else:
        _step(place, parts[-1], parts[:-1])
        place[int(parts[-1])] = value


def validate(values: dict[str, Any], model: type[Settings]) -> tuple[Settings | None, list[str]]:
    """Return the model, or None, and the errors as text, in the order of their keys."""
    errors: list[str] = []
    validated = None
    broken: list[str] = []
    try:
        validated = model.model_validate_json(json.dumps(values), strict=True, context=CONTRADICTIONS_FOLLOW)
    except ValidationError as failure:
        for error in failure.errors(include_url=False):
            broken.append(dotted(error["loc"]))
            errors.append(_describe(error, model))
    rules: Callable[[Lookup], Iterator[Contradiction]] | None = getattr(model, "contradictions", None)
    if rules is not None:
        errors += [f"{key}: {rule}" for key, rule in rules(_Raw(values, model, broken)) if key not in broken]
    return (None if errors else validated), errors


def dotted(location: tuple[str | int, ...]) -> str:
    """Return a pydantic location as `a.b.0.c`."""
    return ".".join(str(part) for part in location)


def show(value: Any) -> str:
    """Return a value as short text for a message."""
    if isinstance(value, dict):
        return f"a mapping with {', '.join(map(str, value)) or 'no keys'}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _parse_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{path}: {reason or error}; expected a readable YAML file") from error
    values = core_yaml.parse(text, str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path}: found {show(values)}, must be a mapping of keys to values")
    return values


def _override_value(text: str, annotation: Any, origin: str) -> Any:
    if any("\ud800" <= character <= "\udfff" for character in text):  # bytes of the command line that are not UTF-8
        raise UserError(f"{origin}: found {text!r}, must be UTF-8 text")
    alternatives = _alternatives(annotation)
    if not all(_is_text(kind) for kind in alternatives if kind is not types.NoneType):
        return core_yaml.parse(text, origin)
    if types.NoneType in alternatives and core_yaml.is_null(text):
        return None
    return core_yaml.parse(text, origin) if core_yaml.is_quoted(text) else text


def _type_at(model: type[BaseModel], parts: list[str]) -> Any:
    """Return the annotation of a dotted key; `str` for an unknown key, which the schema refuses later."""
    place: Any = model
    for part in parts:
        below = [inner for kind in _alternatives(place) if (inner := _type_below(kind, part)) is not None]
        if not below:
            return str
        place = below[0]
    return place


def _type_below(annotation: Any, part: str) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation.model_fields[part].annotation if part in annotation.model_fields else None
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is dict:
        return arguments[1]
    return arguments[0] if origin in (list, tuple) and part.isdecimal() else None


def _alternatives(annotation: Any) -> list[Any]:
    """Return the members of a union, each without its `Annotated`."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for argument in get_args(annotation) for kind in _alternatives(argument)]
    return [annotation]


def _is_text(annotation: Any) -> bool:
    if get_origin(annotation) is Literal:
        return all(isinstance(value, str) for value in get_args(annotation))
    return isinstance(annotation, type) and get_origin(annotation) is None and issubclass(annotation, (str, Path))


def _step(place: Any, part: str, parents: list[str]) -> Any:
    where = ".".join([*parents, part])
    if isinstance(place, dict):
        return place[part]
    if isinstance(place, list) and part.isdecimal() and int(part) < len(place):
        return place[int(part)]
    above = ".".join(parents)
    raise UserError(f"override {where}: {above} is {show(place)}, which has no entry '{part}'")


class _Raw:
    """Looks up a dotted key in unvalidated values: the default if it is absent, KeyError if it is invalid."""

    def __init__(self, values: dict[str, Any], model: type[BaseModel], broken: list[str]):
        self._values, self._model, self._broken = values, model, broken

    def __call__(self, key: str) -> Any:
        if any(not b or b == key or b.startswith(f"{key}.") or key.startswith(f"{b}.") for b in self._broken):
            raise KeyError(key)
        value: Any = self._values
        model: Any = self._model
        for part in key.split("."):
            field = model.model_fields[part]
            model = _inner_model(field.annotation)
            if isinstance(value, dict) and part in value:
                value = value[part]
            else:
                value = field.get_default(call_default_factory=True)
                value = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
        return value


def _describe(error: Any, model: type[BaseModel]) -> str:
    location, kind = error["loc"], error["type"]
    key = dotted(location)
    if kind == "missing":
        return f"{key}: missing, but required"
    if kind == "extra_forbidden":
        allowed = _keys_at(model, location[:-1])
        name = str(location[-1])
        hint = nearest(name, allowed) or nearest_elsewhere(name, model)
        return f"{key}: found an unknown key; allowed here: {', '.join(sorted(allowed))}{hint}"
    if kind == "json_invalid":  # pydantic reads JSON of 200 levels
        return "nested too deeply"
    if not location:  # a rule of the whole model names its keys itself
        return error["msg"].removeprefix("Value error, ")
    found = show(error["input"])
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        near = nearest(error["input"], allowed) if isinstance(error["input"], str) else ""
        numbers = "" if allowed else core_yaml.hint(error["input"], flag=False)
        return f"{key}: found {found}, must be {error['ctx']['expected']}{near}{numbers}"
    rule = (
        error["msg"]
        .removeprefix("Value error, ")
        .replace("Input should be", "must be")
        .replace("an object", "a mapping")
        .replace("a valid array", "a list")
    )
    return f"{key}: found {found}, {rule[:1].lower()}{rule[1:]}{_spelling(kind, error['input'])}"


def _spelling(kind: str, found: Any) -> str:
    """Return how to write a value that has the wrong type only because of its spelling."""
    if kind in ("string_type", "path_type") and isinstance(found, bool | int | float):
        return "; put a text in quotes"
    if kind in ("int_type", "float_type", "int_from_float", "bool_type"):
        return core_yaml.hint(found, flag=kind == "bool_type")
    return ""


def nearest_elsewhere(name: str, model: type[BaseModel]) -> str:
    """Return a hint if this key exists in another section of the schema."""
    for section, field in model.model_fields.items():
        inner = _inner_model(field.annotation)
        if inner is not None and name in inner.model_fields:
            return f"; did you mean '{section}.{name}'?"
    return ""


def _keys_at(model: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    place: type[BaseModel] | None = model
    for part in location:
        if isinstance(part, int) or place is None:
            continue
        field = place.model_fields.get(part)
        place = _inner_model(field.annotation) if field else None
    return list(place.model_fields) if place else []


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and get_origin(annotation) is None and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        inner = _inner_model(argument)
        if inner is not None:
            return inner
    return None
