"""The ablation tables of the report: the effect of each switch relative to the full system of its phase.

The input has the format that `spar_scale.runs.ablation` writes: row -> metric -> one value per seed. A full system
precedes its variants. A difference is marked as significant if it has the same sign for all seeds and its mean
exceeds the spread (maximum minus minimum over seeds) of the full system.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spar_scale.evaluation.report.sources import ReportData
from spar_scale.evaluation.report.tables import ABSENT, MINUS, Cell, Table

FULL = ("tokenizer", "unified")  # rows without switches
TITLES = {"tokenizer": "Tokenizer", "unified": "Alignment"}
METRICS = {
    "psnr": "PSNR, dB",
    "vqa": "questions right",
    "drift": "encoder drift",
    "teacher": "from pixel encoder",
    "sharpness": "sharpness",
    "flow": "held-out flow matching",
    "gap": "caption gap",
}


@dataclass(frozen=True)
class Ablation:
    """One table per full system, or in `absent` the reason why there is none."""

    tables: list[Table]
    absent: str = ""
    seeds: int = 0


def table(data: ReportData) -> Ablation:
    """Return the tables of ROOT/ablation.json."""
    rows: Mapping[str, Mapping[str, Sequence[float]]] = data.ablation.get("rows", {})
    groups: list[tuple[str, list[str]]] = []  # (full system, its variants)
    for name in rows:
        if name in FULL:
            groups.append((name, []))
        elif groups:
            groups[-1][1].append(name)
    if not groups:
        return Ablation([], absent="Not available: there is no ablation.json. Run: spar-scale ablate.")
    tables = [_table(rows, full, variants) for full, variants in groups if rows[full]]
    return Ablation(tables, seeds=max(len(values) for full, _ in groups for values in rows[full].values()))


def _table(rows: Mapping[str, Mapping[str, Sequence[float]]], full: str, variants: list[str]) -> Table:
    metrics = list(rows[full])
    values = [rows[full][metric] for metric in metrics]
    body = [[Cell("full system"), *(Cell(_short(sum(seeds) / len(seeds))) for seeds in values)]]
    if max(map(len, values)) > 1:
        body.append([Cell("spread over seeds"), *(Cell(_short(max(seeds) - min(seeds))) for seeds in values)])
    for name in variants:
        cells = [Cell(name)]
        for metric in metrics:
            cells.append(Cell(_difference(rows[full][metric], rows[name].get(metric))))
        body.append(cells)
    return Table(TITLES[full], ["row", *(METRICS.get(metric, metric) for metric in metrics)], body)


def _difference(full: Sequence[float], other: Sequence[float] | None) -> str:
    """Format the mean difference with a mark: ▲ or ▼ if it is significant, ≈ if not, no mark with one seed."""
    if not other or len(other) != len(full):
        return ABSENT
    differences = [b - a for a, b in zip(full, other, strict=True)]
    mean = sum(differences) / len(differences)
    text = f"{'+' if mean >= 0 else MINUS}{_short(abs(mean))}"
    if len(full) < 2:
        return text
    one_sign = all(d > 0 for d in differences) or all(d < 0 for d in differences)
    significant = one_sign and abs(mean) > max(full) - min(full)
    return f"{text} {('▲' if mean > 0 else '▼') if significant else '≈'}"


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2g}"
