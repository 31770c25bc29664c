"""The numbers: headlines with their controls, and a table for each ability."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from spar_scale.evaluation.report.sources import Found
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
OURS = "tokenizer_encoder"  # the phase that the last tokenizer comes from
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
        (("exact scene", "edit.exact"), ("its control", "edit.control"), ("leaving the source", "edit.copy")),
    ),
)


class Headline(NamedTuple):
    """A score in large, and what it is to be held against: (what, number), also where that was not measured."""

    title: str
    value: str
    unit: str
    beside: list[tuple[str, str]]


class Column(NamedTuple):
    """A column of scores: `key` with {row}, `whole` for the last row, the unit; `bar` draws shares.

    Where only the whole is there, `note` with {} says it below the table instead.
    """

    title: str
    key: str
    whole: str
    unit: str = ""
    bar: bool = False
    note: str = ""


def headlines(found: Found) -> list[Headline]:
    """Return those headlines whose score is there."""
    return [
        Headline(
            title,
            number(found.scores[key], unit),
            unit,
            [(name, number(found.scores.get(other), unit)) for name, other in beside],
        )
        for title, key, unit, beside in HEADLINES
        if key in found.scores
    ]


def tables(found: Found) -> list[Table]:
    """Return the score tables; one without any score has only the line that says so."""
    return [_generation(found), _editing(found), _questions(found), _reconstruction(found)]


def _generation(found: Found) -> Table:
    columns = [
        Column("score", "t2i.{row}", "t2i.average", bar=True),
        Column("unseen", "t2i.unseen.{row}", "t2i.unseen.average"),
        Column("control", "t2i.control.{row}", "t2i.control"),
        Column(
            "ceiling",
            "t2i.judge_ceiling.{row}",
            "t2i.judge_ceiling",
            note="The judge's ceiling, on reconstructions: {}.",
        ),
    ]
    table = _table(found, "Text to image, by kind of prompt", "kind", KINDS, columns, "average")
    if "t2i.unseen.average" in found.scores and (
        rest := [KINDS[k] for k in KINDS if f"t2i.unseen.{k}" not in found.scores]
    ):
        table.notes.append(f"The average of unseen contents is without {', '.join(rest)}: training shows all of those.")
    if {"flow.right", "flow.shuffled"} <= set(found.scores):
        right, shuffled = (number(found.scores[f"flow.{name}"]) for name in ("right", "shuffled"))
        table.notes.append(
            f"Held-out flow-matching loss: {right} with their own prompts, {shuffled} with shuffled ones."
        )
    return table


def _editing(found: Found) -> Table:
    columns = [
        Column("exact scene", "edit.exact.{row}", "edit.exact", bar=True),
        Column("right objects", "edit.objects.{row}", "edit.objects", bar=True),
        Column("PSNR, dB", "edit.psnr.{row}", "edit.psnr", "dB"),
        Column("control", "edit.control.{row}", "edit.control", note="Control, judged by another edit's target: {}."),
        Column("copy", "edit.copy.{row}", "edit.copy", note="Leaving the source as it is would reach {}."),
    ]
    table = _table(found, "Edits, by operation", "operation", OPERATIONS, columns, "all")
    if {"flow.edit.right", "flow.edit.mirrored"} <= set(found.scores):
        right, mirrored = (number(found.scores[f"flow.edit.{name}"]) for name in ("right", "mirrored"))
        table.notes.append(
            f"Held-out flow-matching loss: {right} from the picture to edit, {mirrored} from its mirror image."
        )
    return table


def _questions(found: Found) -> Table:
    columns = [
        Column("before", "vqa.before.{row}", "vqa.before"),
        Column("after", "vqa.after.{row}", "vqa.after", bar=True),
        Column("blind", "vqa.blind.{row}", "vqa.blind"),
    ]
    types = sorted({name.split(".")[2] for name in found.scores if name.startswith("vqa.") and name.count(".") == 2})
    names = {name: name for name in types if name != "all"}
    table = _table(found, "Questions, by type", "type", names, columns, "all")
    table.notes.append(
        "Before and after the tokenizer trained the vision tower; blind: the same model without the picture."
    )
    return table


def _reconstruction(found: Found) -> Table:
    """PSNR and SSIM of each tokenizer: ours, then `tokenizer.psnr_<name>`."""
    prefix = "tokenizer.psnr_"
    chain = phase_names()
    others = [name.removeprefix(prefix) for name in found.scores if name.startswith(prefix)]
    others = sorted(
        {*others} - {OURS}, key=lambda name: (name not in chain, chain.index(name) if name in chain else 0, name)
    )
    names = {f"_{name}": name.replace("_", " ") for name in others}
    columns = [
        Column("PSNR, dB", "tokenizer.psnr{row}", "tokenizer.psnr", "dB"),
        Column("SSIM", "tokenizer.ssim{row}", "tokenizer.ssim"),
    ]
    return _table(found, "Reconstruction of held-out scenes", "tokenizer", names, columns, "ours")


def _table(found: Found, title: str, what: str, names: dict[str, str], columns: Iterable[Column], whole: str) -> Table:
    """A row for each name and one for the whole; rows and columns without a score are left out and said."""
    shown, gone, notes = [], [], []
    for column in columns:
        if any(column.key.format(row=name) in found.scores for name in names):
            shown.append(column)
        elif column.whole not in found.scores:
            gone.append(column.title)
        elif column.note:
            notes.append(column.note.format(number(found.scores[column.whole], column.unit)))
        else:
            shown.append(column)
    rows = []
    for name, label in [*names.items(), (None, whole)]:
        cells = [Cell(label)]
        for column in shown:
            value = found.scores.get(column.whole if name is None else column.key.format(row=name))
            cells.append(Cell(number(value, column.unit), value if column.bar else None))
        if any(cell.text != number(None) for cell in cells[1:]):
            rows.append(cells)
    if gone:
        notes.append(f"Not in scores.json: {', '.join(gone)}.")
    if not shown:
        notes = ["Not measured: scores.json has none of these."]
    ends = bool(rows) and rows[-1][0].text == whole
    return Table(title, [what, *(column.title for column in shown)], rows, notes, whole=ends)
