"""Picture galleries of the report: tiles cropped from the sheets beside details.json, with captions and verdicts.

The first pictures of each kind are shown in the order of evaluation, so the selection cannot flatter the model. If a
section is absent, or its sheet is missing or too small, the gallery holds a line with the reason instead.
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
from spar_scale.evaluation.report.sources import ReportData
from spar_scale.evaluation.report.tables import number

SHOWN, MORE = 12, 12  # prompts of a kind: visible, and folded
RECONSTRUCTED, EDITED, ASKED = 12, 6, 4
TITLES = {"source": "source", "frozen_encoder": "frozen encoder", "ours": "ours", "target": "target", "scene": "scene"}


class Picture(NamedTuple):
    """A tile as a data URI, its text alternative, a title above it and a note below it."""

    uri: str
    alt: str
    title: str = ""
    note: str = ""


class Verdict(NamedTuple):
    """Whether a result is right, and the text beside the check mark."""

    right: bool
    text: str


@dataclass(frozen=True)
class Card:
    """Pictures side by side with a caption, verdicts, and a remark in small print."""

    pictures: list[Picture]
    text: str = ""
    verdicts: list[Verdict] = field(default_factory=list)
    remark: str = ""


@dataclass(frozen=True)
class Group:
    """Cards under a heading; the `folded` ones are hidden until the reader opens them."""

    title: str
    cards: list[Card]
    folded: list[Card] = field(default_factory=list)


@dataclass(frozen=True)
class Gallery:
    """Groups of cards, or in `absent` the reason why there are none; `edge` is the side of a tile in pixels."""

    groups: list[Group]
    absent: str = ""
    edge: int = 0


class Sheet:
    """A section of details.json with its picture sheet. Raises LookupError with the reason if it cannot be shown."""

    def __init__(self, data: ReportData, name: str):
        section = data.details.get(name)
        if not section or not section.get("rows"):
            raise LookupError(f"Not available: evaluation/details.json has no section “{name}”.")
        self.rows: list[dict[str, Any]] = section["rows"]
        self.columns: list[str] = section.get("columns", [])
        self.tile: int = section.get("tile", 0)
        path = data.root / "evaluation" / str(section.get("sheet"))
        try:
            with Image.open(path) as image:
                self.image = image.convert("RGB")
        except (OSError, UnidentifiedImageError):
            sheet = f"evaluation/{section.get('sheet')}"
            raise LookupError(f"Not available: {sheet} cannot be read as a picture.") from None
        if self.image.width < self.tile * len(self.columns) or self.image.height < self.tile * len(self.rows):
            raise LookupError(f"Not available: evaluation/{section.get('sheet')} is smaller than its rows and columns.")

    def tile_uri(self, row: int, column: str) -> str:
        """Return the tile of a row and a column as a data URI of a PNG."""
        left, top = self.columns.index(column) * self.tile, row * self.tile
        buffer = io.BytesIO()
        self.image.crop((left, top, left + self.tile, top + self.tile)).save(buffer, format="PNG", optimize=True)
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def reconstructions(data: ReportData) -> Gallery:
    """Return the reconstructions: source | frozen encoder, if that variant was trained | ours, with their PSNR."""

    def card(sheet: Sheet, index: int) -> Card:
        decibels = sheet.rows[index].get("psnr", [])
        notes = ["", *(f"{number(value, 'dB')} dB" for value in decibels), *[""] * len(sheet.columns)]
        pictures = [
            Picture(
                sheet.tile_uri(index, column),
                f"scene {index + 1}, {TITLES.get(column, column)}",
                TITLES.get(column, column),
                note,
            )
            for column, note in zip(sheet.columns, notes, strict=False)
        ]
        return Card(pictures)

    return _gallery(data, "reconstruction", lambda sheet: [("", range(len(sheet.rows)))], card, RECONSTRUCTED)


def generation(data: ReportData) -> Gallery:
    """Return the prompt grid: the first of each kind, then the first whose contents were held out of training."""

    def groups(sheet: Sheet) -> list[tuple[str, Iterable[int]]]:
        seen = [index for index, row in enumerate(sheet.rows) if not row.get("unseen")]
        unseen = [index for index, row in enumerate(sheet.rows) if row.get("unseen")]
        return [*_by_kind(sheet, seen, KINDS), ("contents held out of training", unseen)]

    def card(sheet: Sheet, index: int) -> Card:
        row = sheet.rows[index]
        prompt, right = str(row.get("prompt", "")), bool(row.get("passed"))
        picture = Picture(sheet.tile_uri(index, sheet.columns[0]), f"drawn for “{prompt}”")
        verdicts = [Verdict(right, "right" if right else "wrong")] if "passed" in row else []
        remark = "" if right or "found" not in row else f"judge found {_describe(row['found'])}"
        return Card([picture], prompt, verdicts, remark)

    return _gallery(data, "generation", groups, card, SHOWN, MORE)


def edits(data: ReportData) -> Gallery:
    """Return the edit grid: source | target | ours with the instruction, the first of each operation."""

    def card(sheet: Sheet, index: int) -> Card:
        row = sheet.rows[index]
        instruction = str(row.get("instruction", ""))
        titles = {column: TITLES.get(column, column) for column in sheet.columns}
        pictures = [
            Picture(sheet.tile_uri(index, column), f"{title} of “{instruction}”", title)
            for column, title in titles.items()
        ]
        distance = f"{number(row['psnr'], 'dB')} dB to target" if "psnr" in row else ""
        return Card(pictures, instruction, list(_edit_verdicts(row)), distance)

    return _gallery(data, "editing", lambda sheet: _by_kind(sheet, range(len(sheet.rows)), OPERATIONS), card, EDITED)


def questions(data: ReportData) -> Gallery:
    """Return the first questions of each type, with answers before and after the tokenizer, and without picture."""

    def card(sheet: Sheet, index: int) -> Card:
        row = sheet.rows[index]
        answer = str(row.get("answer", ""))
        picture = Picture(sheet.tile_uri(index, sheet.columns[0]), f"scene of “{row.get('question', '')}”")
        verdicts = [
            Verdict(str(row[name]) == answer, f"{name}: {row[name]}")
            for name in ("before", "after", "blind")
            if name in row
        ]
        text = Markup("{} <b>{}</b>").format(str(row.get("question", "")), answer)
        return Card([picture], text, verdicts)

    return _gallery(data, "questions", lambda sheet: _by_kind(sheet, range(len(sheet.rows)), {}, "type"), card, ASKED)


def _gallery(data: ReportData, name: str, groups, card, shown: int, more: int = 0) -> Gallery:
    try:
        sheet = Sheet(data, name)
    except LookupError as reason:
        return Gallery([], absent=str(reason.args[0]))
    nonempty = []
    for title, indices in groups(sheet):
        cards = [card(sheet, index) for index in list(indices)[: shown + more]]
        if cards:
            nonempty.append(Group(title, cards[:shown], cards[shown:]))
    return Gallery(nonempty, edge=sheet.tile)


def _by_kind(
    sheet: Sheet, indices: Iterable[int], names: dict[str, str], key: str = "kind"
) -> list[tuple[str, list[int]]]:
    """Group indices by kind: the kinds of `names` first, in their order, then other kinds in order of appearance."""
    kinds: dict[str, list[int]] = {name: [] for name in names}
    for index in indices:
        kinds.setdefault(str(sheet.rows[index].get(key, "")), []).append(index)
    return [(names.get(kind, kind), members) for kind, members in kinds.items()]


def _edit_verdicts(row: dict[str, Any]) -> Iterable[Verdict]:
    """Yield how far an edit is right: the exact scene, the right objects in wrong places, or wrong objects."""
    if row.get("exact"):
        yield Verdict(True, "exact scene")
    elif "objects" in row:
        yield Verdict(bool(row["objects"]), "right objects" if row["objects"] else "wrong objects")
        if row["objects"]:
            yield Verdict(False, "not exact")


def _describe(objects: list[dict[str, Any]]) -> str:
    """Return the detected objects as text: "red circle, blue square"."""
    return ", ".join(f"{o.get('color', '?')} {o.get('shape', '?')}" for o in objects) or "nothing"
