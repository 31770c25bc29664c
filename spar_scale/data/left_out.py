"""Collects the files, rows and members that a reader leaves out, with reasons, for a printable report."""

from __future__ import annotations

from dataclasses import dataclass, field

NAMED = 5  # names listed per reason
NAME_CHARACTERS, DETAIL_CHARACTERS = 80, 200  # maximum length of a name, and of its fault, in the report


@dataclass
class LeftOut:
    """Names that were left out: reason -> printable names."""

    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str, detail: str = "") -> None:
        """Note a name (a file, a row of a table, a member) and optionally a detail that the reason does not contain."""
        suffix = f" ({printable(detail, DETAIL_CHARACTERS)})" if detail else ""
        self.names.setdefault(reason, []).append(printable(name, NAME_CHARACTERS) + suffix)

    def report(self) -> str:
        """Return one line per reason, each after a newline: the count and the first few names."""
        lines = ""
        for reason, names in self.names.items():
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            lines += f"\n  left out, {reason}: {len(names)} ({', '.join(names[:NAMED])}{more})"
        return lines


def printable(text: str, limit: int | None = None) -> str:
    """Return the text with control characters and lone surrogates escaped; beyond `limit` its middle is replaced."""
    if limit is not None and len(text) > limit:
        text = f"{text[: limit - 23]}...{text[-20:]}"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def is_utf8(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8: lone surrogates (undecodable file names, half emojis) cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
