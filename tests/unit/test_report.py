"""The report: one file that needs nothing else, true to its sources, and honest about what is absent."""

import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from parallel.errors import UserError
from spar_scale.cli import main
from spar_scale.evaluation.report import write_report
from spar_scale.evaluation.report.curves import draw, smoothed
from spar_scale.evaluation.report.routing import Map, sentence
from spar_scale.evaluation.report.sources import read
from spar_scale.evaluation.report.tables import ABSENT, MINUS

TILE = 4
HOSTILE = '<script src="https://evil.example/x.js">alert(1)</script>&"\''
SCORES = {
    "t2i.average": 0.6871, "t2i.control": 0.0123, "t2i.color": 0.9042, "t2i.control.color": 0.0312,
    "t2i.unseen.color": 0.5551, "t2i.judge_ceiling": 0.9777, "vqa.before": 0.8511, "vqa.after": 0.8472,
    "vqa.blind": 0.4213, "vqa.after.count": 0.7654, "tokenizer.psnr": 30.744, "tokenizer.psnr_frozen_encoder": 29.513,
    "edit.exact": 0.3414, "edit.objects": 0.5755, "edit.exact.add": 0.2626, "core_seconds.total": 1234.4,
}  # fmt: skip


def color(row: int, column: int) -> tuple[int, int, int]:
    return (20 * row + 5, 60 * column + 7, 11)


def sheet(path: Path, rows: int, columns: int) -> None:
    image = Image.new("RGB", (columns * TILE, rows * TILE))
    for row in range(rows):
        for column in range(columns):
            image.paste(color(row, column), (column * TILE, row * TILE, (column + 1) * TILE, (row + 1) * TILE))
    image.save(path)


def section(name: str, columns: list[str], rows: list[dict]) -> dict:
    return {"sheet": f"{name}.png", "tile": TILE, "columns": columns, "rows": rows}


def details() -> dict:
    found = [{"shape": "square", "color": "red", "x": 1.0, "y": 2.0}]
    drawn = [
        {"prompt": "a red circle", "kind": "color", "unseen": False, "passed": True, "found": []},
        {"prompt": HOSTILE, "kind": "two", "unseen": False, "passed": False, "found": found},
        {"prompt": "two blue squares", "kind": "count", "unseen": True, "passed": False, "found": []},
        {"prompt": "a cyan square", "kind": "color", "unseen": False, "passed": True, "found": []},
    ]  # fmt: skip
    edits = [
        {"instruction": "add a red circle", "kind": "add", "exact": False, "objects": True, "psnr": 9.876},
        {"instruction": "make it blue", "kind": "color", "exact": True, "objects": True, "psnr": 12.3},
    ]
    asked = {
        "type": "count",
        "question": "how many ?",
        "answer": "two",
        "before": "two",
        "after": "one",
        "blind": "two",
    }
    routes = {"prompt": "a red circle", "tokens": ["a", "red"], "layers": [2, 4], "weights": [[0.25, 0.75], [0.5, 0.5]]}
    return {
        "generation": section("generation", ["drawn"], drawn),
        "reconstruction": section("reconstruction", ["source", "ours"], [{"psnr": [30.5]}, {"psnr": [31.5]}]),
        "editing": section("editing", ["source", "target", "ours"], edits),
        "questions": section("questions", ["scene"], [asked]),
        "routes": {"rows": [routes]},
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, stage, phase, steps in (("tokenizer_init", "tokenizer", "init", 5), ("instruct", "instruct", "joint", 4)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "recipe.yaml").write_text(f"stage: {stage}\nphase: {phase}\nseed: 3  # {HOSTILE}\n")
        terms = {"flow_matching": 0.5, "alignment": -0.9} if stage == "instruct" else {"mean_squared_error": 0.1}
        lines = [{"step": s + 1, "loss": 1.0 / (s + 1), "terms": terms, "skipped": s == 2} for s in range(steps)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "scores.json").write_text(json.dumps(SCORES))
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "details.json").write_text(json.dumps(details()))
    for name, part in details().items():
        if "sheet" in part:
            sheet(tmp_path / "evaluation" / f"{name}.png", len(part["rows"]), len(part["columns"]))
    phases = {"tokenizer_init": {"steps": 5, "core_seconds": 33.3, "wall_seconds": 75.0}}
    training = {"command": "spar-scale demo", "size": "demo", "seed": 3, "machine": "two cores", "phases": phases}
    (tmp_path / "training.json").write_text(json.dumps(training | {"versions": {"torch": "2.13.0"}}))
    rows = {
        "tokenizer": {"psnr": [30.0, 30.2]},
        "without pixel stream": {"psnr": [29.0, 29.1]},
        "same": {"psnr": [30.1, 30.0]},
    }
    (tmp_path / "ablation.json").write_text(json.dumps({"rows": rows, "seeds": [0, 1]}))
    return tmp_path


class Page(HTMLParser):
    """Tags with attributes, table rows as lists of text, and all text; refuses tags that do not nest."""

    VOID = frozenset({"meta", "img", "line", "polyline", "br"})

    def __init__(self, root: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._open: list[str] = []
        self.source = write_report(root).read_text()
        self.feed(self.source)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        self.text += " "

    def handle_data(self, data):
        self.text += data
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        return next(row for row in self.rows if row[0] == name)

    def picture(self, alt: str) -> Image.Image:
        uri = next(attrs["src"] for tag, attrs in self.tags if tag == "img" and attrs["alt"] == alt)
        kind, _, content = uri.partition(",")
        assert kind == "data:image/png;base64"
        return Image.open(io.BytesIO(base64.b64decode(content)))


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
    assert page.row("average") == ["average", "0.687", ABSENT, "0.012", "0.978"]
    assert page.row("add") == ["add", "0.263", ABSENT]
    assert page.row("count") == ["count", ABSENT, "0.765", ABSENT]
    assert page.row("ours") == ["ours", "30.74"]
    assert page.row("frozen encoder") == ["frozen encoder", "29.51"]
    listed = {row[0]: row[1] for row in page.rows if row[0] in SCORES}
    assert listed == {name: str(value) for name, value in SCORES.items()}


def test_each_headline_has_its_control_beside_it(root: Path):
    source = write_report(root).read_text()
    blocks = re.findall(r"<dt>(.*?)</dt>(.*?)</div>", source, re.DOTALL)
    found = {title: re.findall(r"\d+\.\d+", body) for title, body in blocks}
    assert found == {
        "Text to image": ["0.687", "0.012", "0.978"],
        "Questions": ["0.847", "0.851", "0.421"],
        "Reconstruction": ["30.74", "29.51"],
        "Edits, right objects": ["0.576", "0.341"],
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
    assert picture.getcolors() == [(TILE * TILE, color(row, column))]


def test_prompts_keep_their_order_and_the_verdict_is_said_in_words(root: Path):
    text = " ".join(Page(root).text.split())
    grid = text[text.index("Prompts and what was drawn") : text.index("Edits Not curated")]
    assert (
        grid.index("a red circle")
        < grid.index("a cyan square")
        < grid.index("<script")
        < grid.index("two blue squares")
    )
    assert re.search(r"a red circle ✓ right", grid)
    assert re.search(r"alert\(1\).* ✗ wrong judge saw red square", grid)
    assert grid.index("never showed") < grid.index("two blue squares")
    edits = text[text.index("Edits Not curated") : text.index("Questions The first")]
    assert "make it blue ✓ exact scene" in edits
    assert "add a red circle ✓ right objects ✗ not exact 9.88 dB" in edits
    assert "how many ? two ✓ before: two ✗ after: one ✓ blind: two" in text


def test_what_was_trained(root: Path):
    page = Page(root)
    assert page.row("tokenizer init") == ["tokenizer init", "1", "5", "33", "1 min 15 s", "0.457", "streams and fusion"]
    assert page.row("instruct")[1:6] == ["3", "4", ABSENT, ABSENT, f"flow 0.500, align {MINUS}0.900"]
    assert page.row("all")[3] == "1,234"
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
    assert page.row("full system") == ["full system", "30.100 (spread 0.200)"]
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
    sheet(root / "evaluation" / "generation.png", 3, 1)
    page = Page(root)
    assert "generation.png is smaller than its rows" in page.text
    assert not [attrs for tag, attrs in page.tags if tag == "img" and attrs["alt"].startswith("drawn")]


def test_a_score_that_is_not_above_its_control_is_remarked(root: Path):
    assert "is not above its control" not in Page(root).text
    (root / "scores.json").write_text(json.dumps(SCORES | {"vqa.blind": 0.9}))
    assert "Questions is not above its control: 0.847 and 0.900." in Page(root).text


def test_the_command_takes_the_root_or_a_run_and_loads_no_torch(root: Path):
    assert main(["report", str(root / "instruct")]) == 0
    first = (root / "report.html").read_bytes()
    code = (
        f"import sys; from spar_scale.cli import main; main(['report', {str(root)!r}]); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(root / "report.html"), "False"]
    assert (root / "report.html").read_bytes() == first


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, "", "holds no run directory"),
        ("scores.json", "{", "scores.json: not JSON"),
        ("scores.json", "[1]", "scores.json: found list, must be a JSON object"),
        ("instruct/recipe.yaml", "a: [", "recipe.yaml: not YAML"),
        ("instruct/metrics.jsonl", "{\n{}\n", "metrics.jsonl: line 1 is not JSON"),
    ],
)
def test_what_cannot_be_read_is_refused(root: Path, name: str | None, content: str, message: str):
    if name is None:
        root = root / "evaluation"
    else:
        (root / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(message)):
        write_report(root)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="no such directory"):
        write_report(tmp_path / "nowhere")


def test_the_moving_mean_is_cut_at_the_ends():
    values = [float(i % 2) for i in range(80)]
    assert smoothed(values)[0] == pytest.approx(0.5)  # of two
    assert smoothed(values)[1] == pytest.approx(1 / 3)  # of three
    assert smoothed([4.0]) == [4.0]


@pytest.mark.parametrize(
    "values", [[1.0], [2.0, 2.0], [0.0, 0.0], [-1.0, 3.0], [1e-6, 1e3], [float(i) for i in range(5000)]]
)
def test_every_curve_stays_inside_its_drawing(values: list[float]):
    svg = str(draw(list(range(len(values))), values, "loss"))
    points = [
        tuple(map(float, pair.split(","))) for path in re.findall(r'points="(.*?)"', svg) for pair in path.split()
    ]
    assert all(0 <= x <= 320 and 0 <= y <= 170 for x, y in points)
    assert len(points) < 2000


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([[0.97, 0.03], [0.95, 0.05]], "dull: nearly every token takes layer 2"),
        ([[0.6, 0.4], [0.62, 0.38]], "dull: no token is more than 1%"),
        ([[0.9, 0.1], [0.2, 0.8]], "Tokens differ"),
        ([[0.9, 0.1], [0.55, 0.45]], "All tokens take layer 2 most"),
    ],
)
def test_the_sentence_on_routing_follows_the_weights(weights: list[list[float]], expected: str):
    assert expected in sentence([Map("p", [2, 4], [("a", weights[0]), ("b", weights[1])])])


def test_runs_come_in_the_order_of_the_chain(root: Path):
    assert [run.name for run in read(root).runs] == ["tokenizer_init", "instruct"]
