"""What a table of the report is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

ABSENT, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Cell:
    """A cell's text; `share` in [0, 1] draws a bar behind it."""

    text: str
    share: float | None = None


@dataclass(frozen=True)
class Table:
    """A table: the first cell of a row is its header, the last row the whole if `whole`; notes stand below it.

    `text` names the columns that hold words; the others hold numbers.
    """

    title: str
    head: list[str]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)
    whole: bool = False
    text: tuple[int, ...] = (0,)


def number(value: float | None, unit: str = "") -> str:
    """Return a share with three digits behind the point, decibels with two."""
    if value is None:
        return ABSENT
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.2f}" if unit == "dB" else f"{value:.3f}"
