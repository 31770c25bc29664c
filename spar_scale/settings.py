"""From YAML files and `a.b=c` overrides to a validated pydantic model, refusing everything at once.

Whoever mends a recipe should run into one refusal, not five in a row: the schema's errors, the
contradictions between keys and the overrides that make no sense are collected and raised together,
each with its dotted key, what was found, the rule and the nearest valid name. YAML is read with the
safe loader, without anchors (one alias can expand to gigabytes), and a key given twice is an error.
The trade-off of validating in strict mode: `"3"` is no integer and `1` no flag, for file and
override alike.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from parallel.errors import UserError, nearest

Settings = TypeVar("Settings", bound=BaseModel)
Lookup = Callable[[str], Any]
Contradiction = tuple[str, str]  # (dotted key, what was found and the rule)


def load(path: str | Path, model: type[Settings], overrides: list[str] | None = None) -> Settings:
    """Read `path` with its parents (`extends:`), apply the overrides, validate as `model`.

    A model may offer `contradictions(value)`, a class method that takes a lookup by dotted key and
    yields what does not go together. Raises UserError with every error found.
    """
    path = Path(path)
    values = read(path)
    errors = []
    for override in overrides or []:
        try:
            apply_override(values, override)
        except UserError as error:
            errors.append(str(error))
    validated, schema_errors = validate(values, model)
    errors += schema_errors
    if validated is None or errors:
        count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
        raise UserError("\n".join([f"{path}: {count}", *(f"  {error}" for error in errors)]))
    return validated


def read(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the mapping in `path`, merged over the file that its `extends:` names (relative to it)."""
    if path.resolve() in children:
        chain = " -> ".join(str(p.name) for p in (*children, path))
        raise UserError(f"{path}: extends: a circle ({chain}); the first parent must extend nothing")
    values = _parse_file(path)
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise UserError(f"{path}: extends: found {show(parent)}, must be the path of one file")
    return merge(read(path.parent / parent, (*children, path.resolve())), values)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return `below` with `above` laid over it: mappings merge key by key, anything else replaces."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `a.b=c` in `values`, in place; `c` is YAML, a number in the key picks a list's entry."""
    dotted, equals, text = override.partition("=")
    parts = dotted.split(".")
    if not equals or not all(parts):
        raise UserError(f"override: found {override!r}, must be dotted.key=value")
    value = _parse(text, f"override {dotted}")
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
    """Return the model, or None, and the errors as text, in the order of the keys they name."""
    errors: list[str] = []
    found = None
    broken: list[str] = []
    try:
        found = model.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as failure:
        for error in failure.errors(include_url=False):
            broken.append(dotted(error["loc"]))
            errors.append(_describe(error, model))
    rules: Callable[[Lookup], Iterator[Contradiction]] | None = getattr(model, "contradictions", None)
    if rules is not None:
        errors += [f"{key}: {rule}" for key, rule in rules(_Raw(values, model, broken)) if key not in broken]
    return (None if errors else found), errors


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


class _Loader(yaml.SafeLoader):
    """Safe YAML without anchors and doubled keys, and with `1e-4` a number (YAML 1.1 reads it as text)."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(None, None, "anchors (&) and aliases (*) are not read here", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(None, None, "a key must be plain text", key_node.start_mark)
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"the key '{key_node.value}' stands twice", key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{path}: {reason or error}; a readable YAML file is needed") from error
    values = _parse(text, str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path}: found {show(values)}, must be a mapping of keys to values")
    return values


def _parse(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{origin}{place}: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{origin}: not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError(f"{origin}: nested too deeply") from error


def _step(place: Any, part: str, parents: list[str]) -> Any:
    where = ".".join([*parents, part])
    if isinstance(place, dict):
        return place[part]
    if isinstance(place, list) and part.isdecimal() and int(part) < len(place):
        return place[int(part)]
    above = ".".join(parents)
    raise UserError(f"override {where}: {above} is {show(place)}, which has no entry '{part}'")


class _Raw:
    """Looks a dotted key up in unvalidated values; defaults where absent, KeyError where broken."""

    def __init__(self, values: dict[str, Any], model: type[BaseModel], broken: list[str]):
        self._values, self._model, self._broken = values, model, broken

    def __call__(self, key: str) -> Any:
        if any(b == key or b.startswith(f"{key}.") or key.startswith(f"{b}.") for b in self._broken):
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
        return f"{key}: not given, but required"
    if kind == "extra_forbidden":
        allowed = _keys_at(model, location[:-1])
        name = str(location[-1])
        hint = nearest(name, allowed) or nearest_elsewhere(name, model)
        return f"{key}: found an unknown key; allowed here: {', '.join(sorted(allowed))}{hint}"
    found = show(error["input"])
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        hint = nearest(error["input"], allowed) if isinstance(error["input"], str) else ""
        return f"{key}: found {found}, must be {error['ctx']['expected']}{hint}"
    rule = (
        error["msg"]
        .removeprefix("Value error, ")
        .replace("Input should be", "must be")
        .replace("an object", "a mapping")
        .replace("a valid array", "a list")
    )
    return f"{key}: found {found}, {rule[:1].lower()}{rule[1:]}"


def nearest_elsewhere(name: str, model: type[BaseModel]) -> str:
    """Return a hint when exactly this key exists in another section of the schema."""
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
