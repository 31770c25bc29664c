"""What the report is made of: files that are refused, curves, the sentence on routing."""

import re
from pathlib import Path

import pytest
from report_root import make_root

from parallel.errors import UserError
from spar_scale.evaluation.report import write_report
from spar_scale.evaluation.report.curves import draw, smoothed
from spar_scale.evaluation.report.routing import Map, summary


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
def test_what_cannot_be_read_is_refused(tmp_path: Path, name: str | None, content: str, message: str):
    root = make_root(tmp_path)
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
        ([[0.97, 0.03], [0.95, 0.05]], "Nearly every token uses layer 2 alone"),
        ([[0.6, 0.4], [0.62, 0.38]], "No token is more than 1%"),
        ([[0.9, 0.1], [0.2, 0.8]], "Tokens differ"),
        ([[0.9, 0.1], [0.55, 0.45]], "Layer 2 is the strongest for all tokens"),
    ],
)
def test_the_sentence_on_routing_follows_the_weights(weights: list[list[float]], expected: str):
    assert expected in summary([Map("p", [2, 4], [("a", weights[0]), ("b", weights[1])])])
