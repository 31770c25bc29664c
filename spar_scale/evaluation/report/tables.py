"""Tables of the report, and the format of their numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

ABSENT, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Cell:
    """The text of a cell; `share` in [0, 1] draws a bar behind it."""

    text: str
    share: float | None = None


@dataclass(frozen=True)
class Table:
    """A table with notes below it. The first cell of a row is its header; if `whole`, the last row is a total or mean.

    `text` holds the indices of the columns with words; the others hold numbers.
    """

    title: str
    head: list[str]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)
    whole: bool = False
    text: tuple[int, ...] = (0,)


def number(value: float | None, unit: str = "") -> str:
    """Format a share with three decimals, decibels with two."""
    if value is None:
        return ABSENT
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.2f}" if unit == "dB" else f"{value:.3f}"
