"""Pictures of the report: tiles cut from the sheets beside details.json, each with what is said about it.

The first of each kind are shown, in the order of evaluation: nothing is chosen. A section that is not there,
or whose sheet is missing or too small, becomes a line that says so.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from markupsafe import Markup
from PIL import Image, UnidentifiedImageError

from spar_scale.evaluation.report.scores import KINDS, OPERATIONS
from spar_scale.evaluation.report.sources import Found
from spar_scale.evaluation.report.tables import number

SHOWN, MORE = 12, 12  # prompts of a kind: at once, and folded away
RECONSTRUCTED, EDITED, ASKED = 12, 6, 4
TITLES = {"source": "source", "frozen_encoder": "frozen encoder", "ours": "ours", "target": "target", "scene": "scene"}


class Picture(NamedTuple):
    """A tile as a data URI, what it shows, and a title above it."""

    uri: str
    alt: str
    title: str = ""
    note: str = ""


class Verdict(NamedTuple):
    """Whether something is right, in a word that stands beside the mark."""

    right: bool
    text: str


@dataclass(frozen=True)
class Card:
    """Pictures side by side, what is said about them, the verdicts, a remark in small."""

    pictures: list[Picture]
    text: str = ""
    verdicts: list[Verdict] = field(default_factory=list)
    remark: str = ""


@dataclass(frozen=True)
class Group:
    """Cards under a heading; `folded` are shown on request."""

    title: str
    cards: list[Card]
    folded: list[Card] = field(default_factory=list)


@dataclass(frozen=True)
class Gallery:
    """Groups of cards, or the reason why there are none; `edge` is the side of a tile in pixels."""

    groups: list[Group]
    absent: str = ""
    edge: int = 0


class Sheet:
    """A section of details.json with its sheet. Raises LookupError, with the reason, where it can't be shown."""

    def __init__(self, found: Found, name: str):
        section = found.details.get(name)
        if not section or not section.get("rows"):
            raise LookupError(f"Not here: evaluation/details.json has no section “{name}”.")
        self.rows: list[dict[str, Any]] = section["rows"]
        self.columns: list[str] = section.get("columns", [])
        self.tile: int = section.get("tile", 0)
        path = found.root / "evaluation" / str(section.get("sheet"))
        try:
            with Image.open(path) as image:
                self.image = image.convert("RGB")
        except (OSError, UnidentifiedImageError):
            raise LookupError(f"Not here: evaluation/{section.get('sheet')} cannot be read as a picture.") from None
        if self.image.width < self.tile * len(self.columns) or self.image.height < self.tile * len(self.rows):
            raise LookupError(f"Not here: evaluation/{section.get('sheet')} is smaller than its rows and columns.")

    def cut(self, row: int, column: str) -> str:
        """Return the tile of a row and a column as a data URI of a PNG."""
        left, top = self.columns.index(column) * self.tile, row * self.tile
        buffer = io.BytesIO()
        self.image.crop((left, top, left + self.tile, top + self.tile)).save(buffer, format="PNG", optimize=True)
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def reconstructions(found: Found) -> Gallery:
    """Source | frozen encoder, where that was run | ours, with the PSNR of each."""

    def card(sheet: Sheet, index: int) -> Card:
        decibels = sheet.rows[index].get("psnr", [])
        notes = ["", *(f"{number(value, 'dB')} dB" for value in decibels), *[""] * len(sheet.columns)]
        pictures = [
            Picture(
                sheet.cut(index, column),
                f"scene {index + 1}, {TITLES.get(column, column)}",
                TITLES.get(column, column),
                note,
            )
            for column, note in zip(sheet.columns, notes, strict=False)
        ]
        return Card(pictures)

    return _gallery(found, "reconstruction", lambda sheet: [("", range(len(sheet.rows)))], card, RECONSTRUCTED)


def generation(found: Found) -> Gallery:
    """The prompt grid: the first of each kind, then the first of those whose content was never trained on."""

    def groups(sheet: Sheet) -> list[tuple[str, Iterable[int]]]:
        seen = [index for index, row in enumerate(sheet.rows) if not row.get("unseen")]
        unseen = [index for index, row in enumerate(sheet.rows) if row.get("unseen")]
        return [*_by_kind(sheet, seen, KINDS), ("contents that training never showed", unseen)]

    def card(sheet: Sheet, index: int) -> Card:
        row = sheet.rows[index]
        prompt, right = str(row.get("prompt", "")), bool(row.get("passed"))
        picture = Picture(sheet.cut(index, sheet.columns[0]), f"drawn for “{prompt}”")
        judged = [Verdict(right, "right" if right else "wrong")] if "passed" in row else []
        return Card([picture], prompt, judged, "" if right or "found" not in row else f"judge saw {_saw(row['found'])}")

    return _gallery(found, "generation", groups, card, SHOWN, MORE)


def edits(found: Found) -> Gallery:
    """The edit grid: source | target | ours under the instruction, the first of each operation."""

    def card(sheet: Sheet, index: int) -> Card:
        row = sheet.rows[index]
        said = str(row.get("instruction", ""))
        pictures = [
            Picture(sheet.cut(index, column), f"{TITLES.get(column, column)} of “{said}”", TITLES.get(column, column))
            for column in sheet.columns
        ]
        distance = f"{number(row['psnr'], 'dB')} dB to target" if "psnr" in row else ""
        return Card(pictures, said, list(_degrees(row)), distance)

    return _gallery(found, "editing", lambda sheet: _by_kind(sheet, range(len(sheet.rows)), OPERATIONS), card, EDITED)


def questions(found: Found) -> Gallery:
    """Questions with the answers before and after the tokenizer, and blind; the first of each type."""

    def card(sheet: Sheet, index: int) -> Card:
        row = sheet.rows[index]
        answer = str(row.get("answer", ""))
        picture = Picture(sheet.cut(index, sheet.columns[0]), f"scene that is asked “{row.get('question', '')}”")
        judged = [
            Verdict(str(row[name]) == answer, f"{name}: {row[name]}")
            for name in ("before", "after", "blind")
            if name in row
        ]
        asked = Markup("{} <b>{}</b>").format(str(row.get("question", "")), answer)
        return Card([picture], asked, judged)

    return _gallery(found, "questions", lambda sheet: _by_kind(sheet, range(len(sheet.rows)), {}, "type"), card, ASKED)


def _gallery(found: Found, name: str, groups, card, shown: int, more: int = 0) -> Gallery:
    try:
        sheet = Sheet(found, name)
    except LookupError as reason:
        return Gallery([], absent=str(reason.args[0]))
    made = []
    for title, indices in groups(sheet):
        cards = [card(sheet, index) for index in list(indices)[: shown + more]]
        if cards:
            made.append(Group(title, cards[:shown], cards[shown:]))
    return Gallery(made, edge=sheet.tile)


def _by_kind(
    sheet: Sheet, indices: Iterable[int], names: dict[str, str], key: str = "kind"
) -> list[tuple[str, list[int]]]:
    """Indices by kind: those of `names` first, in their order, then others as they come."""
    kinds: dict[str, list[int]] = {name: [] for name in names}
    for index in indices:
        kinds.setdefault(str(sheet.rows[index].get(key, "")), []).append(index)
    return [(names.get(kind, kind), members) for kind, members in kinds.items()]


def _degrees(row: dict[str, Any]) -> Iterable[Verdict]:
    """How far an edit is right: the exact scene, the right objects elsewhere, or wrong ones."""
    if row.get("exact"):
        yield Verdict(True, "exact scene")
    elif "objects" in row:
        yield Verdict(bool(row["objects"]), "right objects" if row["objects"] else "wrong objects")
        if row["objects"]:
            yield Verdict(False, "not exact")


def _saw(objects: list[dict[str, Any]]) -> str:
    """What the judge found, in words: "red circle, blue square"."""
    return ", ".join(f"{o.get('color', '?')} {o.get('shape', '?')}" for o in objects) or "nothing"
