"""Read a table of samples: `captions.csv` with a header, or `captions.jsonl` with one object per line.

The name of a table and its columns follow from the task of its samples (`FORMS`).
A table is read strictly. A row that is ambiguous or damaged is left out and reported with its number (from 1, without
header and blank lines) and its line; no field is truncated, joined or guessed. Only spaces after a comma are ignored.
The whole table is refused if the damage hides where rows begin (an encoding other than UTF-8, an unclosed quote).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.errors import UserError
from spar_scale.data.left_out import DETAIL_CHARACTERS, LeftOut, is_utf8, printable


@dataclass(frozen=True)
class Form:
    """How the samples of a task stand in a table, or in files: `table` is the name of the table without extension.

    `pictures` maps a column with a picture's file to the prefix of its member in a shard; `texts` are the columns with
    text.
    """

    task: str
    table: str
    pictures: dict[str, str]
    texts: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that a table must have."""
        return (*self.pictures, *self.texts)

    @property
    def tables(self) -> tuple[str, str]:
        """The names that a table may have."""
        return f"{self.table}.csv", f"{self.table}.jsonl"


FORMS = {
    form.task: form
    for form in (
        Form("generation", "captions", {"image": ""}, ("caption",)),
        Form("editing", "edits", {"input": "input.", "output": "output."}, ("instruction",)),
        Form("questions", "questions", {"image": ""}, ("question", "answer")),
    )
}
_TYPES = {type(None): "null", bool: "true or false", int: "a number", float: "a number", list: "a list"}


def read_table(table: Path, form: Form, left_out: LeftOut) -> Iterator[dict[str, str]]:
    """Yield column -> text of each row that has a text in all columns, in the table's order; note the other rows.

    Raises UserError for a table that is not UTF-8, has another header, or whose rows cannot be separated.
    """
    try:
        text = table.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{table}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{table}: cannot be read, line {line} is not UTF-8; save the table as UTF-8") from None
    read = _csv_records(table, text, form, left_out) if table.suffix == ".csv" else _json_records(text, form, left_out)
    for row, record in read:
        fault = next(filter(None, (_fault(column, record, form) for column in form.columns)), None)
        if fault is None:
            yield {column: record[column] for column in form.columns}
        else:
            left_out.add(fault, row, f"has {', '.join(record)}" if fault.endswith("missing") else "")


def _fault(column: str, record: dict[str, Any], form: Form) -> str | None:
    """Return what is wrong with a column of a row, or None."""
    if column not in record:
        return f"{column} is missing"
    value = record[column]
    if not isinstance(value, str):
        return f"{column} is {_TYPES.get(type(value), 'an object')}"
    if not is_utf8(value):
        return f"{column} holds half of a surrogate pair and is not UTF-8"
    return f"{column} is empty" if column in form.pictures and not value.strip() else None


def _csv_records(table: Path, text: str, form: Form, left_out: LeftOut) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("row R at line L", fields by column) of each row with as many fields as the header."""
    header: list[str] = []
    number = 0
    for line, cells in _csv_rows(table, text):
        if isinstance(cells, list) and len(cells) < 2 and not "".join(cells).strip():
            continue  # a blank line
        if not header:
            header = _header(table, form, cells)
            continue
        number += 1
        row = f"row {number} at line {line}"
        if isinstance(cells, csv.Error):
            left_out.add("not valid CSV", row, str(cells))
        elif len(cells) != len(header):
            reason = "more or fewer fields than the header; put texts with commas in double quotes"
            left_out.add(reason, row, f"{len(cells)} instead of {len(header)}")
        else:
            yield row, dict(zip(header, cells, strict=True))
    if not header:
        raise UserError(f"{table}: is empty; its first line must be the header {','.join(form.columns)}")


def _csv_rows(table: Path, text: str) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """Yield (first line, fields) of each row, or (line, error) if the damage is within one line."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    while True:
        line = reader.line_num + 1
        try:
            row: list[str] | csv.Error = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if reader.line_num > line:  # the reader consumed further lines: rows cannot be separated any more
                raise UserError(
                    f"{table}: a quote is opened in the row at line {line} and not closed properly up to line"
                    f" {reader.line_num} ({error}); close it, and double each quote inside a quoted text"
                ) from None
            row = error
        yield line, row


def _header(table: Path, form: Form, cells: list[str] | csv.Error) -> list[str]:
    """Return the header. Raises UserError unless it has each column of the form exactly once."""
    if isinstance(cells, csv.Error) or any(cells.count(column) != 1 for column in form.columns):
        found = str(cells) if isinstance(cells, csv.Error) else ", ".join(map(repr, cells))
        *most, last = map(repr, form.columns)
        raise UserError(
            f"{table}: the header has {printable(found, DETAIL_CHARACTERS)}; it must have the columns"
            f" {', '.join(most)} and {last} once each, separated by commas"
        )
    return cells


def _json_records(text: str, form: Form, left_out: LeftOut) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("row R at line L", object) of each line with a JSON object."""
    number = 0
    for line, content in enumerate(io.StringIO(text, newline=""), 1):
        if not content.strip():
            continue
        number += 1
        row = f"row {number} at line {line}"
        try:
            # Tuples distinguish an object from an array (list), and keep repeated names.
            pairs = json.loads(content.rstrip(), object_pairs_hook=tuple)
        except (ValueError, RecursionError) as error:
            where = f"{error.msg} at character {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            left_out.add("not valid JSON", row, where)
            continue
        if not isinstance(pairs, tuple):
            left_out.add("not a JSON object", row)
            continue
        names = [name for name, _ in pairs]
        if repeated := [column for column in form.columns if names.count(column) > 1]:
            left_out.add(f"two values of {repeated[0]}", row)
        else:
            yield row, dict(pairs)
