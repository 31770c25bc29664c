"""The scores of the report: headlines with their controls, and a table for each ability."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from spar_scale.evaluation.report.sources import ReportData
from spar_scale.evaluation.report.tables import Cell, Table, number
from spar_scale.phases import phase_names

KINDS = {
    "color": "single colour",
    "position": "position",
    "count": "count",
    "two": "two objects",
    "relation": "relation",
}
OPERATIONS = {"color": "recolour", "shape": "reshape", "remove": "remove", "add": "add"}
OURS = "tokenizer_encoder"  # the phase that trains the last tokenizer
HEADLINES = (
    (
        "Text to image",
        "t2i.average",
        "",
        (
            ("prompts shuffled", "t2i.control"),
            ("judge's ceiling", "t2i.judge_ceiling"),
            ("unseen contents", "t2i.unseen.average"),
        ),
    ),
    ("Questions", "vqa.after", "", (("before the tokenizer", "vqa.before"), ("without picture", "vqa.blind"))),
    ("Reconstruction", "tokenizer.psnr", "dB", (("frozen encoder", "tokenizer.psnr_frozen_encoder"),)),
    (
        "Edits, right objects",
        "edit.objects",
        "",
        (("exact scene", "edit.exact"), ("its control", "edit.control"), ("unchanged source", "edit.copy")),
    ),
)


class Headline(NamedTuple):
    """A score in large print, and in `beside` the scores to compare it with: (name, number or the sign for absent)."""

    title: str
    value: str
    unit: str
    beside: list[tuple[str, str]]


class Column(NamedTuple):
    """A column of scores: `key` is the score's name with {row}, `whole` the name for the last row; `bar` draws bars.

    If only the `whole` score exists, `note` with {} shows it below the table instead.
    """

    title: str
    key: str
    whole: str
    unit: str = ""
    bar: bool = False
    note: str = ""


def headlines(data: ReportData) -> list[Headline]:
    """Return the headlines whose scores exist."""
    return [
        Headline(
            title,
            number(data.scores[key], unit),
            unit,
            [(name, number(data.scores.get(other), unit)) for name, other in beside],
        )
        for title, key, unit, beside in HEADLINES
        if key in data.scores
    ]


def tables(data: ReportData) -> list[Table]:
    """Return the score tables; a table without scores holds only a note about that."""
    return [_generation(data), _editing(data), _questions(data), _reconstruction(data)]


def _generation(data: ReportData) -> Table:
    columns = [
        Column("score", "t2i.{row}", "t2i.average", bar=True),
        Column("unseen", "t2i.unseen.{row}", "t2i.unseen.average"),
        Column("control", "t2i.control.{row}", "t2i.control"),
        Column(
            "ceiling",
            "t2i.judge_ceiling.{row}",
            "t2i.judge_ceiling",
            note="The judge's ceiling, measured on reconstructions: {}.",
        ),
    ]
    table = _table(data, "Text to image, by kind of prompt", "kind", KINDS, columns, "average")
    if "t2i.unseen.average" in data.scores and (
        rest := [KINDS[k] for k in KINDS if f"t2i.unseen.{k}" not in data.scores]
    ):
        table.notes.append(
            f"The average of unseen contents excludes {', '.join(rest)}: training contains all of their contents."
        )
    if {"flow.right", "flow.shuffled"} <= set(data.scores):
        right, shuffled = (number(data.scores[f"flow.{name}"]) for name in ("right", "shuffled"))
        table.notes.append(
            f"Held-out flow-matching loss: {right} with their own prompts, {shuffled} with shuffled ones."
        )
    return table


def _editing(data: ReportData) -> Table:
    columns = [
        Column("exact scene", "edit.exact.{row}", "edit.exact", bar=True),
        Column("right objects", "edit.objects.{row}", "edit.objects", bar=True),
        Column("PSNR, dB", "edit.psnr.{row}", "edit.psnr", "dB"),
        Column("control", "edit.control.{row}", "edit.control", note="Control, judged by another edit's target: {}."),
        Column("copy", "edit.copy.{row}", "edit.copy", note="The unchanged source would reach {}."),
    ]
    table = _table(data, "Edits, by operation", "operation", OPERATIONS, columns, "all")
    if {"flow.edit.right", "flow.edit.mirrored"} <= set(data.scores):
        right, mirrored = (number(data.scores[f"flow.edit.{name}"]) for name in ("right", "mirrored"))
        table.notes.append(
            f"Held-out flow-matching loss: {right} with the source picture, {mirrored} with its mirror image."
        )
    return table


def _questions(data: ReportData) -> Table:
    columns = [
        Column("before", "vqa.before.{row}", "vqa.before"),
        Column("after", "vqa.after.{row}", "vqa.after", bar=True),
        Column("blind", "vqa.blind.{row}", "vqa.blind"),
    ]
    types = sorted({name.split(".")[2] for name in data.scores if name.startswith("vqa.") and name.count(".") == 2})
    names = {name: name for name in types if name != "all"}
    table = _table(data, "Questions, by type", "type", names, columns, "all")
    table.notes.append(
        "Before and after the tokenizer phases trained the vision tower; blind: the same model without the picture."
    )
    return table


def _reconstruction(data: ReportData) -> Table:
    """Return PSNR and SSIM of each tokenizer: the scores `tokenizer.psnr_<name>`, then ours."""
    prefix = "tokenizer.psnr_"
    chain = phase_names()
    others = [name.removeprefix(prefix) for name in data.scores if name.startswith(prefix)]
    others = sorted(
        {*others} - {OURS}, key=lambda name: (name not in chain, chain.index(name) if name in chain else 0, name)
    )
    names = {f"_{name}": name.replace("_", " ") for name in others}
    columns = [
        Column("PSNR, dB", "tokenizer.psnr{row}", "tokenizer.psnr", "dB"),
        Column("SSIM", "tokenizer.ssim{row}", "tokenizer.ssim"),
    ]
    return _table(data, "Reconstruction of held-out scenes", "tokenizer", names, columns, "ours")


def _table(
    data: ReportData, title: str, row_title: str, names: dict[str, str], columns: Iterable[Column], whole: str
) -> Table:
    """Return a row per name and one for `whole`. Rows and columns without scores are left out; a note lists them."""
    shown, missing, notes = [], [], []
    for column in columns:
        if any(column.key.format(row=name) in data.scores for name in names):
            shown.append(column)
        elif column.whole not in data.scores:
            missing.append(column.title)
        elif column.note:
            notes.append(column.note.format(number(data.scores[column.whole], column.unit)))
        else:
            shown.append(column)
    rows = []
    for name, label in [*names.items(), (None, whole)]:
        cells = [Cell(label)]
        for column in shown:
            value = data.scores.get(column.whole if name is None else column.key.format(row=name))
            cells.append(Cell(number(value, column.unit), value if column.bar else None))
        if any(cell.text != number(None) for cell in cells[1:]):
            rows.append(cells)
    if missing:
        notes.append(f"Not in scores.json: {', '.join(missing)}.")
    if not shown:
        notes = ["Not measured: scores.json has none of these scores."]
    has_whole = bool(rows) and rows[-1][0].text == whole
    return Table(title, [row_title, *(column.title for column in shown)], rows, notes, whole=has_whole)
