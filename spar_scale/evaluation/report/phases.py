"""What was trained and how long: the table of phases, their loss curves, where the run came from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from markupsafe import Markup

from spar_scale.evaluation.report import curves as drawing
from spar_scale.evaluation.report.sources import Found, Run
from spar_scale.evaluation.report.tables import ABSENT, MINUS, Cell, Table
from spar_scale.phases import find

LAST = 20  # steps that the last loss is a mean of
APART = ("flow_matching", "alignment")  # where a phase has both, its loss is their weighted sum and says little
WORDS = {"flow_matching": "flow matching", "alignment": "alignment, minus cosine", "loss": "loss"}
SHORT = {"flow_matching": "flow", "alignment": "align"}


class Curve(NamedTuple):
    """A loss curve: which phase, which term, the drawing."""

    phase: str
    term: str
    svg: Markup


def series(run: Run) -> dict[str, tuple[list[int], list[float]]]:
    """Return what there is to draw of a run, term -> (steps, finite values)."""
    last = run.metrics[-1] if run.metrics else {}
    names = APART if all(name in last.get("terms", {}) for name in APART) else ("loss",)
    found = {}
    for name in names:
        pairs = [
            (line.get("step"), line.get("loss") if name == "loss" else line["terms"].get(name)) for line in run.metrics
        ]
        good = [(step, value) for step, value in pairs if isinstance(step, int) and _finite(value)]
        if good:
            found[name] = ([step for step, _ in good], [value for _, value in good])
    return found


def curves(found: Found) -> list[Curve]:
    """Return the curves of all runs, in the order of the chain."""
    drawn = []
    for run in found.runs:
        for term, (steps, values) in series(run).items():
            mean = drawing.smoothed(values)
            label = f"{WORDS[term]} of {run.name} over {len(steps)} steps, from {mean[0]:.3g} to {mean[-1]:.3g}"
            drawn.append(Curve(run.name, WORDS[term], drawing.draw(steps, values, label)))
    return drawn


def tables(found: Found) -> list[Table]:
    """Return the table of the chain's phases with a row of the whole, and one of what was trained beside it."""
    chain = [run for run in found.runs if not run.variant]
    beside = [run for run in found.runs if run.variant]
    tables = [_table(found, "Phases", chain, _notes(found))] if chain else []
    return [*tables, _table(found, "Trained beside the chain, counted apart", beside, [])] if beside else tables


def _notes(found: Found) -> list[str]:
    """What the table has no row for: steps that train nothing, phases side by side, files that are absent."""
    notes, runs = [], {run.name for run in found.runs}
    for name, spent in found.training.get("phases", {}).items():
        if name not in runs and (core := spent.get("core_seconds")):
            counted = "" if f"core_seconds.{name}" in found.scores else "not "
            notes.append(f"{name.capitalize()}: {core:,.0f} core-seconds, {counted}in the sum.")
    if (jobs := found.training.get("jobs") or 1) > 1:
        notes.append(f"Up to {jobs} phases ran side by side, so their wall times overlap.")
    if not found.training:
        notes.append("training.json is not there: wall time, machine and versions are unknown.")
    if missing := [run.name for run in found.runs if not run.metrics]:
        notes.append(f"Without metrics.jsonl: {', '.join(missing)}.")
    return notes


def _table(found: Found, title: str, runs: list[Run], notes: list[str]) -> Table:
    seconds = "core\N{NON-BREAKING HYPHEN}seconds"
    head = ["phase", "stage", "steps", seconds, "wall", f"loss, last {LAST} steps", "trains"]
    rows, sums = [], {"steps": 0, "core_seconds": 0.0}
    for run in runs:
        spent, declared = _spent(found, run), find(run.stage, run.phase)
        for key in sums:
            sums[key] += spent.get(key) or 0
        name = run.name.replace(",", ", ") if run.variant else run.name.replace("_", " ")
        number, trains = (ABSENT, ABSENT) if declared is None else (str(declared.stage_number), declared.trains)
        trains = "as its name says" if run.variant else trains
        cells = [name, number, *_times(spent), _last(run), trains]
        rows.append([Cell(text) for text in cells])
    if len(rows) > 1:
        if not runs[0].variant and "core_seconds.total" in found.scores:
            sums["core_seconds"] = found.scores["core_seconds.total"]
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


def lead(found: Found) -> str:
    """Say in a sentence what was trained and how long."""
    chain = [run for run in found.runs if not run.variant]
    spent = [_spent(found, run) for run in chain]
    steps = sum(item.get("steps") or 0 for item in spent)
    said = f"{len(chain)} {'phase' if len(chain) == 1 else 'phases'}, {steps:,} steps"
    core = found.scores.get("core_seconds.total") or sum(item.get("core_seconds") or 0 for item in spent)
    if core:
        said += f", {core:,.0f} core-seconds"
    if wall := found.training.get("wall_seconds"):
        said += f"; {minutes(wall)} for all of it"
    return f"{said}."


def origin(found: Found) -> list[tuple[str, str]]:
    """Return how the run was made: (what, value)."""
    training = found.training
    said = [(name, training.get(name)) for name in ("command", "size", "seed", "machine", "jobs", "threads")]
    return [(name, str(value)) for name, value in said if value is not None]


def minutes(value: float | None) -> str:
    """Return seconds as minutes and seconds."""
    if value is None:
        return ABSENT
    whole = round(value)
    return f"{whole // 60} min {whole % 60:02} s" if whole >= 60 else f"{whole} s"


def _spent(found: Found, run: Run) -> dict[str, Any]:
    """Steps, core-seconds and wall seconds of a run, where they are known."""
    spent = dict(found.training.get("phases", {}).get(run.name, {}))
    spent.setdefault("steps", run.metrics[-1].get("step") if run.metrics else None)
    spent.setdefault("core_seconds", found.scores.get(f"core_seconds.{run.name}"))
    return spent


def _last(run: Run) -> str:
    found = {term: sum(values[-LAST:]) / len(values[-LAST:]) for term, (_, values) in series(run).items()}
    if len(found) == 1:
        return f"{next(iter(found.values())):.3g}"
    said = (f"{SHORT[term]} {value:.3f}" for term, value in found.items())
    return ", ".join(said).replace("-", MINUS) or ABSENT


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
