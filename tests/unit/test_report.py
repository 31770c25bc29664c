"""The report: one file that needs nothing else, true to its sources, and honest about what is absent."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from report_root import HOSTILE, SCORES, TILE, Page, color_of, make_root, write_sheet

from spar_scale.cli import main
from spar_scale.evaluation.report.sources import read
from spar_scale.evaluation.report.tables import ABSENT, MINUS


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_root(tmp_path)


def test_nothing_is_loaded_from_elsewhere(root: Path):
    page = Page(root)
    for tag, attrs in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "use"), tag
        for name in ("src", "href", "srcset", "action", "data", "poster", "background"):
            assert attrs.get(name, "#").startswith(("data:", "#")), (tag, attrs[name])
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
    style = re.search(r"<style>(.*?)</style>", page.source, re.DOTALL)
    assert style and "url(" not in style[1] and "@import" not in style[1]
    anchors = {attrs["href"][1:] for tag, attrs in page.tags if tag == "a"}
    assert anchors and anchors <= {attrs.get("id") for _, attrs in page.tags}


def test_hostile_text_is_shown_as_text(root: Path):
    page = Page(root)
    assert page.text.count("<script src=") == 3  # the prompt and two recipes, as text
    assert [attrs["alt"] for tag, attrs in page.tags if tag == "img" and "script" in attrs["alt"]] == [
        f"drawn for “{HOSTILE}”"
    ]


def test_numbers_are_those_of_scores_json(root: Path):
    page = Page(root)
    assert page.row("single colour")[1:4] == ["0.904", "0.555", "0.031"]
    assert page.row("average") == ["average", "0.687", ABSENT, "0.012"]
    assert "The judge's ceiling, measured on reconstructions: 0.978." in page.text
    assert page.row("add") == ["add", "0.263", ABSENT]
    assert "Control, judged by another edit's target: 0.025." in page.text
    assert page.row("count") == ["count", ABSENT, "0.765", ABSENT]
    assert page.row("ours") == ["ours", "30.74"]
    assert page.row("frozen encoder") == ["frozen encoder", "29.51"]
    listed = {row[0]: row[1] for row in page.rows if row[0] in SCORES}
    assert listed == {name: str(value) for name, value in SCORES.items()}


def test_each_headline_has_its_control_beside_it(root: Path):
    source = Page(root).source
    blocks = re.findall(r"<dt>(.*?)</dt>(.*?)</div>", source, re.DOTALL)
    found = {title: re.findall(r"\d+\.\d+", body) for title, body in blocks}
    assert found == {
        "Text to image": ["0.687", "0.012", "0.978"],
        "Questions": ["0.847", "0.851", "0.421"],
        "Reconstruction": ["30.74", "29.51"],
        "Edits, right objects": ["0.576", "0.341", "0.025"],
    }


@pytest.mark.parametrize(
    ("alt", "row", "column"),
    [
        ("drawn for “a red circle”", 0, 0),
        ("drawn for “two blue squares”", 2, 0),
        ("drawn for “a cyan square”", 3, 0),
        ("scene 2, source", 1, 0),
        ("scene 2, ours", 1, 1),
        ("target of “add a red circle”", 0, 1),
        ("ours of “make it blue”", 1, 2),
    ],
)
def test_a_picture_is_its_own_tile(root: Path, alt: str, row: int, column: int):
    picture = Page(root).picture(alt).convert("RGB")
    assert picture.size == (TILE, TILE)
    assert picture.getcolors() == [(TILE * TILE, color_of(row, column))]


def test_prompts_keep_their_order_and_the_verdict_is_said_in_words(root: Path):
    text = " ".join(Page(root).text.split())
    grid = text[text.index("Prompts and generated pictures") : text.index("Edits Not curated")]
    assert (
        grid.index("a red circle")
        < grid.index("a cyan square")
        < grid.index("<script")
        < grid.index("two blue squares")
    )
    assert re.search(r"a red circle ✓ right", grid)
    assert re.search(r"alert\(1\).* ✗ wrong judge found red square", grid)
    assert grid.index("contents held out of training") < grid.index("two blue squares")
    edits = text[text.index("Edits Not curated") : text.index("Questions The first")]
    assert "make it blue ✓ exact scene" in edits
    assert "add a red circle ✓ right objects ✗ not exact 9.88 dB" in edits
    assert "how many ? two ✓ before: two ✗ after: one ✓ blind: two" in text


def test_what_was_trained(root: Path):
    page = Page(root)
    assert page.row("tokenizer init") == ["tokenizer init", "1", "5", "33", "1 min 15 s", "0.457", "streams and fusion"]
    assert page.row("instruct")[1:6] == ["3", "4", ABSENT, ABSENT, f"flow 0.500, align {MINUS}0.900"]
    assert page.row("all")[2:4] == ["9", "1,234"]
    assert "2 phases, 9 steps, 1,234 core-seconds; 2 min 10 s in total" in page.text
    assert "Data: 4 core-seconds, in the sum." in page.text
    assert "Evaluation: 61 core-seconds, not in the sum." in page.text
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert [label.partition(" over")[0] for label in labels] == [
        "loss of tokenizer_init", "flow matching of instruct", "alignment, minus cosine of instruct",
    ]  # fmt: skip
    assert "instruct: 1 of 4 steps skipped" in page.text
    assert page.row("torch") == ["torch", "2.13.0"]


def test_a_run_beside_the_chain_is_counted_apart(root: Path):
    variant = root / "tokenizer_init,streams=pixel"
    variant.mkdir()
    (variant / "recipe.yaml").write_text("stage: tokenizer\nphase: init\n")
    (variant / "metrics.jsonl").write_text('{"step": 70, "loss": 1.0, "terms": {}}\n{"step": 71, "lo')  # still written
    page = Page(root)
    assert page.row("all")[2] == "9"
    assert page.row("tokenizer_init, streams=pixel")[2] == "70"
    assert "2 phases, 9 steps" in page.text


def test_the_ablation_marks_only_what_exceeds_the_spread(root: Path):
    page = Page(root)
    assert page.row("full system") == ["full system", "30.100"]
    assert page.row("spread over seeds") == ["spread over seeds", "0.200"]
    assert page.row("without pixel stream") == ["without pixel stream", f"{MINUS}1.050 ▼"]
    assert page.row("same") == ["same", f"{MINUS}0.050 ≈"]


GONE = {
    "scores.json": ["No headline numbers", "none of these"],
    "evaluation/details.json": ["no section “generation”", "no section “routes”"],
    "evaluation/editing.png": ["evaluation/editing.png cannot be read"],
    "training.json": ["wall time, machine and versions are unknown", "no training.json"],
    "ablation.json": ["no ablation.json"],
    "instruct/metrics.jsonl": ["Without metrics.jsonl: instruct"],
}


@pytest.mark.parametrize("name", GONE)
def test_what_is_absent_is_said(root: Path, name: str):
    whole = Page(root).text
    (root / name).unlink()
    without = Page(root).text
    for said in GONE[name]:
        assert said not in whole
        assert said in without


def test_runs_alone_are_enough(root: Path):
    for name in ("scores.json", "training.json", "ablation.json"):
        (root / name).unlink()
    for path in (root / "evaluation").iterdir():
        path.unlink()
    for path in root.glob("*/metrics.jsonl"):
        path.unlink()
    page = Page(root)
    assert "no run has a metrics.jsonl" in page.text
    assert not [tag for tag, _ in page.tags if tag in ("img", "svg")]


def test_a_sheet_smaller_than_its_rows_is_not_shown(root: Path):
    write_sheet(root / "evaluation" / "generation.png", 3, 1)
    page = Page(root)
    assert "generation.png is smaller than its rows" in page.text
    assert not [attrs for tag, attrs in page.tags if tag == "img" and attrs["alt"].startswith("drawn")]


def test_a_score_that_is_not_above_its_control_is_remarked(root: Path):
    assert "is not above its control" not in Page(root).text
    (root / "scores.json").write_text(json.dumps(SCORES | {"vqa.blind": 0.9}))
    assert "Questions is not above its control: 0.847 and 0.900." in Page(root).text


@pytest.mark.parametrize(("mirrored", "remarked"), [(0.302, True), (0.36, False)])
def test_edits_that_do_not_heed_places_are_remarked(root: Path, mirrored: float, remarked: bool):
    scores = SCORES | {"flow.edit.right": 0.3, "flow.edit.mirrored": mirrored}
    (root / "scores.json").write_text(json.dumps(scores))
    text = Page(root).text
    assert f"0.300 with the source picture, {mirrored:.3f} with its mirror image." in text
    assert ("edits ignore the positions of objects" in text) is remarked


def test_the_command_takes_the_root_or_a_run_and_loads_no_torch(root: Path):
    assert main(["report", str(root / "instruct")]) == 0
    first = (root / "report.html").read_bytes()
    code = (
        f"import sys; from spar_scale.cli import main; main(['report', {str(root)!r}]); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(root / "report.html"), "False"]
    assert (root / "report.html").read_bytes() == first


def test_runs_come_in_the_order_of_the_chain(root: Path):
    assert [run.name for run in read(root).runs] == ["tokenizer_init", "instruct"]
