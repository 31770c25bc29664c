"""Generate docs/recipes.md from the schema: every key of a recipe with type, default, meaning and readers.

`python -m spar_scale.config.reference > docs/recipes.md` writes it; a test compares the file with the schema.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from spar_scale.config.recipe import RESUME_MAY_CHANGE, Recipe, may_change_at_resume
from spar_scale.phases import readers

HEAD = f"""# Keys of a recipe

Generated from the schema (`python -m spar_scale.config.reference > docs/recipes.md`). A unit is in the name of a key
(`_s`: seconds) or in its meaning. If "read by" is empty, every phase reads the key. A recipe that sets a key which its
phase does not read is refused. A run may be resumed with other values of the keys that are marked with *:
{", ".join(f"`{key}`" for key in RESUME_MAY_CHANGE)}.
"""
COLUMNS = ("key", "type", "default", "meaning", "read by")
TYPES = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false", "Path": "path"}
COMPARISONS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def page() -> str:
    """Return the whole page (Markdown)."""
    return "\n".join([HEAD, *_sections("", Recipe), ""])


def _sections(prefix: str, model: type[BaseModel]) -> Iterator[str]:
    """Yield a table of the model's own keys, then the sections below it."""
    title = f"## `{prefix.rstrip('.')}`" if prefix else "## The recipe itself"
    yield f"{title}\n\n{(model.__doc__ or '').strip()}\n\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"
    below = []
    for name, field in model.model_fields.items():
        inner = _section(field.annotation)
        if inner is not None:
            below.append((f"{prefix}{name}.", inner))
        else:
            yield _row(f"{prefix}{name}", field)
    yield ""
    for path, inner in below:
        yield from _sections(path, inner)


def _row(key: str, field: FieldInfo) -> str:
    mark = "*" if may_change_at_resume(key) else ""
    meaning = " ".join((field.description or "").split())
    cells = f"`{key}`{mark}", _type(field), _default(field), meaning, ", ".join(readers().get(key, ()))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |".replace("|  |", "| |")


def _type(field: FieldInfo) -> str:
    limits = [_limit(entry) for entry in field.metadata]
    return ", ".join([_name(field.annotation), *(limit for limit in limits if limit)])


def _limit(entry: Any) -> str:
    return " and ".join(
        f"{words} {getattr(entry, sign)}" for sign, words in COMPARISONS.items() if hasattr(entry, sign)
    )


def _name(annotation: Any) -> str:
    """Return a type as words; annotated types have their limits."""
    if annotation is type(None):
        return "null"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is None:
        return TYPES.get(annotation.__name__, str(annotation.__name__))
    if hasattr(annotation, "__metadata__"):
        limits = [_limit(entry) for entry in getattr(arguments[1], "metadata", arguments[1:])]
        return ", ".join([_name(arguments[0]), *(limit for limit in limits if limit)])
    if all(isinstance(argument, str | int) for argument in arguments):
        return ", ".join(f"`{argument}`" for argument in arguments)
    if origin in (list, tuple):
        return f"list of {', '.join(dict.fromkeys(map(_name, arguments)))}"
    if origin is dict:
        return f"mapping of {_name(arguments[0])} to {_name(arguments[1])}"
    return " or ".join(map(_name, arguments))


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    return "required" if value is PydanticUndefined else f"`{json.dumps(value, default=str)}`"


def _section(annotation: Any) -> type[BaseModel] | None:
    """Return the section of a key (for a list of sections, that of its entries), or None for a value."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return annotation if issubclass(annotation, BaseModel) else None
    return next((found for argument in get_args(annotation) if (found := _section(argument))), None)


if __name__ == "__main__":
    print(page(), end="")
