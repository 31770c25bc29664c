"""Read JSON files that this program wrote, and validate them with the schema (`form`) that the reader needs.

A file that is damaged or does not match is refused with its name, the key, the value found and the command that writes
the file again. Files are always UTF-8, independently of the locale.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from parallel.errors import UserError
from spar_scale.config.settings import dotted, show

Form = TypeVar("Form")


def read_json(path: Path, form: TypeAdapter[Form], remedy: str) -> Form:
    """Return the content of `path` as `form`. Raises UserError, which ends with `remedy`."""
    try:
        value = json.loads(read_text(path, remedy))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: found {type(value).__name__}, must be a JSON object; {remedy}")
    return validated(value, form, str(path), remedy)


def read_text(path: Path, remedy: str = "restore it from a copy") -> str:
    """Return the text of a UTF-8 file. Raises UserError if it is not a regular file, not UTF-8 or not readable."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is not a regular file; move it away")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); {remedy}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def validated(value: Any, form: TypeAdapter[Form], where: str, remedy: str) -> Form:
    """Return a value as `form`, validated in strict mode. Raises UserError for the first key that does not match."""
    try:
        return form.validate_python(value, strict=True)
    except ValidationError as failure:
        error = failure.errors(include_url=False)[0]
        key = f"{dotted(error['loc'])}: " if error["loc"] else ""
        found = "nothing" if error["type"] == "missing" else show(error["input"])
        raise UserError(f"{where}: {key}found {found}, {_rule(error)}; {remedy}") from None


def _rule(error: ErrorDetails) -> str:
    """Return the rule that a value broke, based on pydantic's message."""
    if error["type"] == "missing":
        return "must be given"
    if error["type"] == "too_short":
        return f"must have at least {error['ctx']['min_length']}"  # type: ignore[typeddict-item]  # always there
    rule = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return rule.replace("a valid dictionary", "a JSON object")
