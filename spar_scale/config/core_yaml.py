"""Read and write the YAML of recipes: the scalars of the YAML 1.2 core schema.

PyYAML reads YAML 1.1, in which `010` is 8, `1:30` is 90, `no` is false, `1e-4` is text, `2026-11-30` is a date and `<<`
merges mappings. Here `010`, `1:30`, `no` and `2026-11-30` are texts. A schema that needs a number or a flag refuses
them, and `hint` suggests the correct spelling. Anchors (one alias can expand to gigabytes), tags and repeated keys are
errors. Text is written so that readers of YAML 1.1 and of YAML 1.2 get the same text back.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any, ClassVar

import yaml

from parallel.errors import UserError

_TAG = "tag:yaml.org,2002:"
_DECIMAL = "(?:0|[1-9][0-9]*)"
_SCALARS = (  # (type, pattern, first characters); the first that matches decides
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", rf"[-+]?{_DECIMAL}|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        rf"[-+]?(?:{_DECIMAL}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)
_QUOTED = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^']|'')*'", re.DOTALL)
_FLAGS = {"yes": "true", "y": "true", "on": "true", "no": "false", "n": "false", "off": "false"}


def parse(text: str, origin: str) -> Any:
    """Return the value of a YAML document. Raises UserError, with `origin`, line and column, if it is not valid."""
    try:
        return yaml.load(text, Loader=_Loader)  # a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{origin}{place}: {error.problem}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise UserError(f"{origin}: not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError(f"{origin}: nested too deeply") from error


def dump(values: Any) -> str:
    """Return values as YAML text in their order; readers of YAML 1.1 and of YAML 1.2 get the same values from it."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def is_null(text: str) -> bool:
    """Return whether a plain scalar is null (`null`, `~` or empty)."""
    return re.fullmatch(_SCALARS[0][1], text) is not None


def is_quoted(text: str) -> bool:
    """Return whether a whole text is one quoted scalar."""
    return _QUOTED.fullmatch(text) is not None


def hint(found: Any, flag: bool) -> str:
    """Return `"; <reason>; write <value>"` if a value was probably meant as a number, or as a flag; else ""."""
    if isinstance(found, float) and found.is_integer() and not flag:
        return f"; write {int(found)}"
    if not isinstance(found, str):
        return ""
    text = found.strip()
    if flag:
        meant = _FLAGS.get(text.lower(), text.lower())
        return f"; write {meant}" if meant in ("true", "false") else ""
    if re.fullmatch(r"[-+]?[0-9]+(:[0-9]+)+", text):
        return "; a number has no colon; write it in decimal digits"
    if re.fullmatch(r"[-+]?0[bB][01]+", text):
        return f"; a number is not written in binary; write {int(text, 0)}"
    meant = text.replace("_", "")
    if re.fullmatch(r"[-+]?[0-9]{1,3}(,[0-9]{3})+", meant):
        meant = meant.replace(",", "")
    zeros = re.fullmatch(r"([-+]?)0+([0-9].*)", meant)
    meant = "".join(zeros.groups()) if zeros else meant
    if not _is_number(meant):
        return ""
    if meant == text:
        return f"; write {meant} without quotes"
    return f"; a number has no {'leading zero' if zeros else 'separators'}; write {meant}"


def _is_number(text: str) -> bool:
    return any(re.fullmatch(pattern, text) for kind, pattern, _ in _SCALARS if kind in ("int", "float"))


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}  # does not inherit the resolvers of YAML 1.1

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(None, None, "anchors (&) and aliases (*) are not allowed", event.start_mark)
        if tag := getattr(event, "tag", None):
            raise yaml.MarkedYAMLError(None, None, f"found the tag {tag}; tags (!) are not allowed", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != f"{_TAG}str":
                raise yaml.MarkedYAMLError(None, None, "a key must be plain text", key_node.start_mark)
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"the key '{key_node.value}' appears twice", key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        return int(node.value, 0)

    def construct_text(self, node: yaml.ScalarNode) -> str:
        if any("\ud800" <= character <= "\udfff" for character in node.value):
            raise yaml.MarkedYAMLError(None, None, "half a surrogate pair (\\ud800 to \\udfff)", node.start_mark)
        return node.value


class _Dumper(yaml.SafeDumper):
    """Quotes a text that YAML 1.1 (inherited resolvers) or YAML 1.2 would read as another type."""


for _kind, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(rf"(?:{_pattern})\Z"), _first)
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_int)
_Loader.add_constructor(f"{_TAG}str", _Loader.construct_text)
