"""The report of a trained chain: one HTML file that needs nothing but itself.

It is written from the files under ROOT alone (scores, details and their sheets, metrics, recipes, the ablation
if there is one): no model is loaded, no clock is read, so it takes a second and the same files give the
same bytes. What is not there is said in a line. All text passes Jinja's escaping; pictures are PNG in base64,
curves inline SVG, and nothing is fetched by who opens it.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from parallel.files import write_file
from spar_scale.evaluation.report import ablation, limits, phases, pictures, routing, scores
from spar_scale.evaluation.report.sources import Found, read, root_of
from spar_scale.files.outputs import check_files

REPORT = "report.html"


def write_report(root: Path) -> Path:
    """Write ROOT/report.html and return its path; `root` may also be a phase's run directory in it.

    Raises UserError where there are no runs, and for files that cannot be read.
    """
    root = root_of(root)
    target = root / REPORT
    check_files(target)
    write_file(target, render(read(root)))
    return target


def render(found: Found) -> str:
    """Return the page of what was found."""
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
        size=found.training.get("size"),
        seed=found.training.get("seed"),
        headlines=scores.headlines(found),
        lead=phases.lead(found),
        phases=phases.tables(found),
        score_tables=scores.tables(found),
        all_scores=sorted(found.scores.items()),
        curves=phases.curves(found),
        reconstructions=pictures.reconstructions(found),
        generation=pictures.generation(found),
        edits=pictures.edits(found),
        questions=pictures.questions(found),
        routes=routing.routes(found),
        ablation=ablation.table(found),
        limits=[*limits.FIXED, *limits.remarks(found)],
        recipes=[(run.name, run.recipe_text) for run in found.runs],
        origin=phases.origin(found),
        versions=sorted(found.training.get("versions", {}).items()),
    )
