"""What an import leaves out and why, as printable lines."""

from __future__ import annotations

from dataclasses import dataclass, field

NAMED = 5  # names listed for one reason
NAME_CHARACTERS, DETAIL_CHARACTERS = 80, 200  # of a name, and of what is wrong with it, in the report


@dataclass
class LeftOut:
    """What was left out: reason -> names, printable."""

    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str, detail: str = "") -> None:
        """Note a name (a file, or the row of a table) and, where it says more than the reason, what is wrong."""
        about = f" ({printable(detail, DETAIL_CHARACTERS)})" if detail else ""
        self.names.setdefault(reason, []).append(printable(name, NAME_CHARACTERS) + about)

    def report(self) -> str:
        """Return a line for each reason: how many, and the first few names."""
        lines = ""
        for reason, names in self.names.items():
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            lines += f"\n  left out, {reason}: {len(names)} ({', '.join(names[:NAMED])}{more})"
        return lines


def printable(text: str, limit: int | None = None) -> str:
    """Return the text with control characters and lone surrogates escaped and its middle cut out beyond `limit`."""
    if limit is not None and len(text) > limit:
        text = f"{text[: limit - 23]}...{text[-20:]}"
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def is_utf8(text: str) -> bool:
    """Return whether a text can be encoded: a file name that is no UTF-8, or half of an emoji, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
