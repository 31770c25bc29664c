"""The training part of the report: the table of phases with their durations, loss curves, and the run's origin."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from markupsafe import Markup

from spar_scale.evaluation.report import curves as drawing
from spar_scale.evaluation.report.sources import ReportData, Run
from spar_scale.evaluation.report.tables import ABSENT, MINUS, Cell, Table
from spar_scale.phases import find

LAST = 20  # the reported final loss is the mean over this many steps
SEPARATE_TERMS = ("flow_matching", "alignment")  # shown instead of their weighted sum, which is hard to interpret
WORDS = {"flow_matching": "flow matching", "alignment": "alignment, minus cosine", "loss": "loss"}
SHORT = {"flow_matching": "flow", "alignment": "align"}


class Curve(NamedTuple):
    """A loss curve: its phase, its term and the drawing."""

    phase: str
    term: str
    svg: Markup


def series(run: Run) -> dict[str, tuple[list[int], list[float]]]:
    """Return the curves of a run, term -> (steps, finite values)."""
    last = run.metrics[-1] if run.metrics else {}
    names = SEPARATE_TERMS if all(name in last.get("terms", {}) for name in SEPARATE_TERMS) else ("loss",)
    curves = {}
    for name in names:
        pairs = [
            (line.get("step"), line.get("loss") if name == "loss" else line["terms"].get(name)) for line in run.metrics
        ]
        good = [(step, value) for step, value in pairs if isinstance(step, int) and _finite(value)]
        if good:
            curves[name] = ([step for step, _ in good], [value for _, value in good])
    return curves


def curves(data: ReportData) -> list[Curve]:
    """Return the curves of all runs, in the order of the chain."""
    drawn = []
    for run in data.runs:
        for term, (steps, values) in series(run).items():
            mean = drawing.smoothed(values)
            label = f"{WORDS[term]} of {run.name} over {len(steps)} steps, from {mean[0]:.3g} to {mean[-1]:.3g}"
            drawn.append(Curve(run.name, WORDS[term], drawing.draw(steps, values, label)))
    return drawn


def tables(data: ReportData) -> list[Table]:
    """Return the table of the chain's phases with a row of sums, and a table of the variants outside the chain."""
    chain = [run for run in data.runs if not run.variant]
    variants = [run for run in data.runs if run.variant]
    tables = [_table(data, "Phases", chain, _notes(data))] if chain else []
    return (
        [*tables, _table(data, "Variants outside the chain, counted separately", variants, [])] if variants else tables
    )


def _notes(data: ReportData) -> list[str]:
    """Return notes on what the table cannot show: steps without training, concurrent phases, absent files."""
    notes, runs = [], {run.name for run in data.runs}
    for name, spent in data.training.get("phases", {}).items():
        if name not in runs and (core := spent.get("core_seconds")):
            counted = "" if f"core_seconds.{name}" in data.scores else "not "
            notes.append(f"{name.capitalize()}: {core:,.0f} core-seconds, {counted}in the sum.")
    if (jobs := data.training.get("jobs") or 1) > 1:
        notes.append(f"Up to {jobs} phases ran at the same time, so their wall times overlap.")
    if not data.training:
        notes.append("There is no training.json: wall time, machine and versions are unknown.")
    if missing := [run.name for run in data.runs if not run.metrics]:
        notes.append(f"Without metrics.jsonl: {', '.join(missing)}.")
    return notes


def _table(data: ReportData, title: str, runs: list[Run], notes: list[str]) -> Table:
    seconds = "core\N{NON-BREAKING HYPHEN}seconds"
    head = ["phase", "stage", "steps", seconds, "wall", f"loss, last {LAST} steps", "trains"]
    rows, sums = [], {"steps": 0, "core_seconds": 0.0}
    for run in runs:
        spent, declared = _spent(data, run), find(run.stage, run.phase)
        for key in sums:
            sums[key] += spent.get(key) or 0
        name = run.name.replace(",", ", ") if run.variant else run.name.replace("_", " ")
        number, trains = (ABSENT, ABSENT) if declared is None else (str(declared.stage_number), declared.trains)
        trains = "see the variant's name" if run.variant else trains
        cells = [name, number, *_times(spent), _last(run), trains]
        rows.append([Cell(text) for text in cells])
    if len(rows) > 1:
        if not runs[0].variant and "core_seconds.total" in data.scores:
            sums["core_seconds"] = data.scores["core_seconds.total"]
        steps, core, _ = _times({key: value or None for key, value in sums.items()})
        rows.append([Cell(text) for text in ("all", "", steps, core, "", "", "")])
    return Table(title, head, rows, notes, whole=len(rows) > 1, text=(0, 5, 6))


def _times(spent: Mapping[str, Any]) -> tuple[str, str, str]:
    steps, core = spent.get("steps"), spent.get("core_seconds")
    return (
        f"{steps:,}" if steps else ABSENT,
        ABSENT if core is None else f"{core:,.0f}",
        minutes(spent.get("wall_seconds")),
    )


def lead(data: ReportData) -> str:
    """Return a sentence with the numbers of phases and steps and the time spent."""
    chain = [run for run in data.runs if not run.variant]
    spent = [_spent(data, run) for run in chain]
    steps = sum(item.get("steps") or 0 for item in spent)
    text = f"{len(chain)} {'phase' if len(chain) == 1 else 'phases'}, {steps:,} steps"
    core = data.scores.get("core_seconds.total") or sum(item.get("core_seconds") or 0 for item in spent)
    if core:
        text += f", {core:,.0f} core-seconds"
    if wall := data.training.get("wall_seconds"):
        text += f"; {minutes(wall)} in total"
    return f"{text}."


def origin(data: ReportData) -> list[tuple[str, str]]:
    """Return how the run was made, as (name, value)."""
    names = ("command", "size", "seed", "machine", "jobs", "threads")
    return [(name, str(value)) for name in names if (value := data.training.get(name)) is not None]


def minutes(value: float | None) -> str:
    """Return seconds as minutes and seconds."""
    if value is None:
        return ABSENT
    whole = round(value)
    return f"{whole // 60} min {whole % 60:02} s" if whole >= 60 else f"{whole} s"


def _spent(data: ReportData, run: Run) -> dict[str, Any]:
    """Return steps, core-seconds and wall seconds of a run; unknown ones are None or absent."""
    spent = dict(data.training.get("phases", {}).get(run.name, {}))
    spent.setdefault("steps", run.metrics[-1].get("step") if run.metrics else None)
    spent.setdefault("core_seconds", data.scores.get(f"core_seconds.{run.name}"))
    return spent


def _last(run: Run) -> str:
    means = {term: sum(values[-LAST:]) / len(values[-LAST:]) for term, (_, values) in series(run).items()}
    if len(means) == 1:
        return f"{next(iter(means.values())):.3g}"
    parts = (f"{SHORT[term]} {value:.3f}" for term, value in means.items())
    return ", ".join(parts).replace("-", MINUS) or ABSENT


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
