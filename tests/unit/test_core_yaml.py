"""Recipes are YAML 1.2: a scalar is what it looks like, and text survives being written and read."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml

from parallel.errors import UserError
from spar_scale.config.core_yaml import dump, hint, parse

TEXTS = (
    "010", "008", "-010", "00", "1:30", "1:30:00", "1_000", "1_0.5", "0b11", "0o18", "0x", "yes", "No", "on", "OFF",
    "y", "2026-11-30", "2026-11-30T12:00:00Z", "=", "<<", "1e", ".", "e5", "+", "tRUE", "nULL", ".iNF", "00.5",
    "08.5e1", "1.2.3", "+.inf0", "0x1g", "١٢",
)  # fmt: skip
VALUES = {
    "0": 0, "-0": 0, "+12": 12, "-7": -7, "0o17": 15, "0x1F": 31, "1e-4": 1e-4, "1E3": 1000.0, "-1.5e+2": -150.0,
    ".5": 0.5, "5.": 5.0, "0.0": 0.0, ".inf": math.inf, "-.INF": -math.inf, "true": True, "FALSE": False, "null": None,
    "~": None, "": None, "NULL": None,
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_no_number_flag_or_null_of_yaml_1_2_is_a_text(text: str):
    assert parse(f"a: {text}", "here") == {"a": text}


@pytest.mark.parametrize("text", VALUES)
def test_numbers_flags_and_null_are_those_of_the_core_schema(text: str):
    found = parse(f"a: {text}", "here")["a"]
    assert (type(found), found) == (type(VALUES[text]), VALUES[text])


def test_nan_is_a_number():
    assert math.isnan(parse(".NaN", "here"))


@pytest.mark.parametrize("text", [*TEXTS, *VALUES, "a: b", "x #y", " x ", "*.tar", "\x07", "é\n", "1.5e3", "0o7"])
def test_a_text_that_is_written_is_read_back_as_that_text(text: str):
    written = dump({"a": text})
    assert parse(written, "here") == yaml.safe_load(written) == {"a": text}


@pytest.mark.parametrize("value", [1e-7, 1e22, 10, -3, True, None, [1, [2.5]], {"b": {}}], ids=str)
def test_a_value_that_is_written_is_read_back(value: Any):
    assert parse(dump({"a": value}), "here") == {"a": value}


REFUSED = {
    "tag": (
        "a: !!timestamp 2026-11-30",
        r"here, line 1, column 4: found the tag .*timestamp; tags \(!\) are not allowed",
    ),
    "own tag": ("!x {}", "found the tag !x"),
    "anchor": ("a: &x 1", "anchors .* are not allowed"),
    "merge of an alias": ("<<: *x", "anchors"),
    "doubled key": ("a: 1\n'a': 2", "line 2, column 1: the key 'a' appears twice"),
    "number as key": ("010: 1\n8: 1", "a key must be plain text"),
    "flag as key": ("true: 1", "a key must be plain text"),
    "tab": ("a:\n\tb: 1", r"line 2, column 1: found character '\\t'"),
    "NUL": ("a: \0", "not YAML"),
    "half a surrogate pair": ('a: "\\ud83d"', "half a surrogate pair"),
    "too many digits": ("9" * 5000, "not YAML: Exceeds the limit"),
    "deep": ("[" * 5000, "nested too deeply"),
    "two documents": ("a: 1\n---\na: 2", "line 2, column 1: but found another document"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_yaml_that_surprises_is_refused_with_its_place(case: str):
    text, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        parse(text, "here")


@pytest.mark.parametrize("text", ["\ufeffa: 1", "a: 1\r\n", "---\na: 1\n...\n", "# a note\na: 1"])
def test_marks_of_editors_change_nothing(text: str):
    assert parse(text, "here") == {"a": 1}


HINTS = [
    ("010", False, "; a number has no leading zero; write 10"),
    ("-007.5", False, "; a number has no leading zero; write -7.5"),
    ("1_000", False, "; a number has no separators; write 1000"),
    ("1,000,000", False, "; a number has no separators; write 1000000"),
    ("1,5", False, ""),
    ("1:30", False, "; a number has no colon; write it in decimal digits"),
    ("0b11", False, "; a number is not written in binary; write 3"),
    ("12", False, "; write 12 without quotes"),
    (1000.0, False, "; write 1000"),
    (math.inf, False, ""),
    ("ten", False, ""),
    ("Yes", True, "; write true"),
    ("off", True, "; write false"),
    ("True", True, "; write true"),
    ("maybe", True, ""),
    (None, True, ""),
]


@pytest.mark.parametrize(("found", "flag", "expected"), HINTS, ids=str)
def test_the_hint_names_the_spelling_that_is_read(found: Any, flag: bool, expected: str):
    assert hint(found, flag) == expected
