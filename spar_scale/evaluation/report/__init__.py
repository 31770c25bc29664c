"""The report of a trained chain: one self-contained HTML file.

It is written only from the files under ROOT (scores, details and their sheets, metrics, recipes, the ablation if there
is one). It loads no model and reads no clock, so it takes a second and the same files give the same bytes. A missing
file becomes a line in the report. Jinja escapes all text. Pictures are base64 PNG and curves are inline SVG, so the
browser fetches nothing.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from parallel.files import write_file
from spar_scale.evaluation.report import ablation, limits, phases, pictures, routing, scores
from spar_scale.evaluation.report.sources import ReportData, read, root_of
from spar_scale.files.outputs import check_files

REPORT = "report.html"


def write_report(root: Path) -> Path:
    """Write ROOT/report.html and return its path; `root` may also be the run directory of a phase in ROOT.

    Raises UserError if there are no runs or a file cannot be read.
    """
    root = root_of(root)
    target = root / REPORT
    check_files(target)
    write_file(target, render(read(root)))
    return target


def render(data: ReportData) -> str:
    """Return the HTML page of the report."""
    environment = Environment(
        loader=PackageLoader(__name__, ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = Markup(environment.loader.get_source(environment, "page.css")[0])  # type: ignore[union-attr]  # ours
    return environment.get_template("page.html").render(
        style=style,
        size=data.training.get("size"),
        seed=data.training.get("seed"),
        headlines=scores.headlines(data),
        lead=phases.lead(data),
        phases=phases.tables(data),
        score_tables=scores.tables(data),
        all_scores=sorted(data.scores.items()),
        curves=phases.curves(data),
        reconstructions=pictures.reconstructions(data),
        generation=pictures.generation(data),
        edits=pictures.edits(data),
        questions=pictures.questions(data),
        routes=routing.routes(data),
        ablation=ablation.table(data),
        limits=[*limits.FIXED, *limits.remarks(data)],
        recipes=[(run.name, run.recipe_text) for run in data.runs],
        origin=phases.origin(data),
        versions=sorted(data.training.get("versions", {}).items()),
    )
