"""The ablation table: what each switch changes against the full system of its phase, sign and spread.

Its shape is that of `spar_scale.runs.ablation`: rows of metrics with one value a seed, a full system before its
variants. A difference counts where it has one sign over all seeds and its mean exceeds the spread (highest
minus lowest) of the full system.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spar_scale.evaluation.report.sources import Found
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
    """A table for each full system, or the reason why there is none."""

    tables: list[Table]
    absent: str = ""
    seeds: int = 0


def table(found: Found) -> Ablation:
    """Return the tables of ROOT/ablation.json."""
    rows: Mapping[str, Mapping[str, Sequence[float]]] = found.ablation.get("rows", {})
    groups: list[tuple[str, list[str]]] = []
    for name in rows:
        if name in FULL:
            groups.append((name, []))
        elif groups:
            groups[-1][1].append(name)
    if not groups:
        return Ablation([], absent="Not here: there is no ablation.json; `spar-scale ablate` writes one.")
    made = [_table(rows, full, names) for full, names in groups if rows[full]]
    return Ablation(made, seeds=max(len(values) for full, _ in groups for values in rows[full].values()))


def _table(rows: Mapping[str, Mapping[str, Sequence[float]]], full: str, names: list[str]) -> Table:
    metrics = list(rows[full])
    values = [rows[full][metric] for metric in metrics]
    body = [[Cell("full system"), *(Cell(_short(sum(seeds) / len(seeds))) for seeds in values)]]
    if max(map(len, values)) > 1:
        body.append([Cell("spread over seeds"), *(Cell(_short(max(seeds) - min(seeds))) for seeds in values)])
    for name in names:
        cells = [Cell(name)]
        for metric in metrics:
            cells.append(Cell(_difference(rows[full][metric], rows[name].get(metric))))
        body.append(cells)
    return Table(TITLES[full], ["row", *(METRICS.get(metric, metric) for metric in metrics)], body)


def _difference(full: Sequence[float], other: Sequence[float] | None) -> str:
    """The mean difference with a mark: ▲ or ▼ where it counts, ≈ where it does not, none for one seed."""
    if not other or len(other) != len(full):
        return ABSENT
    differences = [b - a for a, b in zip(full, other, strict=True)]
    mean = sum(differences) / len(differences)
    text = f"{'+' if mean >= 0 else MINUS}{_short(abs(mean))}"
    if len(full) < 2:
        return text
    one_sign = all(d > 0 for d in differences) or all(d < 0 for d in differences)
    counts = one_sign and abs(mean) > max(full) - min(full)
    return f"{text} {('▲' if mean > 0 else '▼') if counts else '≈'}"


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2g}"
