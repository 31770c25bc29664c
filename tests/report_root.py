"""A small ROOT for tests of the report, with tiles of known colours, and a reader of the page made from it."""

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from spar_scale.evaluation.report import write_report

TILE = 4
HOSTILE = '<script src="https://evil.example/x.js">alert(1)</script>&"\''
SCORES = {
    "t2i.average": 0.6871, "t2i.control": 0.0123, "t2i.color": 0.9042, "t2i.control.color": 0.0312,
    "t2i.unseen.color": 0.5551, "t2i.judge_ceiling": 0.9777, "vqa.before": 0.8511, "vqa.after": 0.8472,
    "vqa.blind": 0.4213, "vqa.after.count": 0.7654, "tokenizer.psnr": 30.744, "tokenizer.psnr_frozen_encoder": 29.513,
    "edit.exact": 0.3414, "edit.objects": 0.5755, "edit.exact.add": 0.2626, "edit.control": 0.0251,
    "core_seconds.total": 1234.4, "core_seconds.data": 4.4,
}  # fmt: skip


def color_of(row: int, column: int) -> tuple[int, int, int]:
    return (20 * row + 5, 60 * column + 7, 11)


def write_sheet(path: Path, rows: int, columns: int) -> None:
    image = Image.new("RGB", (columns * TILE, rows * TILE))
    for row in range(rows):
        for column in range(columns):
            image.paste(color_of(row, column), (column * TILE, row * TILE, (column + 1) * TILE, (row + 1) * TILE))
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


def make_root(tmp_path: Path) -> Path:
    """Fill a ROOT with two runs, scores, details and their sheets, training and ablation; return it."""
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
            write_sheet(tmp_path / "evaluation" / f"{name}.png", len(part["rows"]), len(part["columns"]))
    phases = {"tokenizer_init": {"steps": 5, "core_seconds": 33.3, "wall_seconds": 75.0}}
    phases |= {"data": {"core_seconds": 4.4}, "evaluation": {"core_seconds": 61.2}}
    training = {
        "command": "spar-scale demo",
        "size": "demo",
        "seed": 3,
        "machine": "two cores",
        "phases": phases,
        "jobs": 2,
        "wall_seconds": 130.4,
    }
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
