"""Damaged files under ROOT: the report names the file, the place and what mends it, and never ends in a traceback."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from report_root import SCORES, Page, make_root

from parallel.errors import UserError
from spar_scale.evaluation.report import render, sources, write_report
from spar_scale.evaluation.report.curves import draw, smoothed

COMMANDS = {
    "scores.json": "evaluate",
    "evaluation/details.json": "evaluate",
    "training.json": "demo --out",
    "ablation.json": "ablate --out",
}
REMOVED = object()
FILES = (*COMMANDS, "instruct/metrics.jsonl")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tmp_path_factory.mktemp("root"))


@pytest.fixture
def put(root: Path, request: pytest.FixtureRequest):
    """A function that replaces a file under the root until the test ends."""

    def replace(name: str, content: bytes) -> Path:
        before = (root / name).read_bytes()
        request.addfinalizer(lambda: (root / name).write_bytes(before))
        (root / name).write_bytes(content)
        return root / name

    return replace


def places(value: Any, above: tuple = ()) -> list[tuple]:
    """The places of a JSON value below its top, of equal entries of a list the first alone."""
    below = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    found = [((*above, key), entry) for key, entry in below]
    return [place for key, entry in found for place in (key, *places(entry, key))]


def changed(value: Any, place: tuple, new: Any) -> Any:
    copy = json.loads(json.dumps(value))
    at = copy
    for key in place[:-1]:
        at = at[key]
    if new is REMOVED:
        del at[place[-1]]
    else:
        at[place[-1]] = new
    return copy


def parsed(root: Path, name: str) -> Any:
    """The content of a file, of one in lines as a list."""
    text = (root / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)


def text_of(name: str, value: Any) -> bytes:
    return ("".join(json.dumps(line) + "\n" for line in value) if name.endswith("l") else json.dumps(value)).encode()


def value_at(value: Any, place: tuple) -> Any:
    for key in place:
        value = value[key]
    return value


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "not JSON"), (b'{"a": ', "not JSON"), (b"\x89PNG", "not UTF-8"), (b"\xff\xfe{\0}\0", "not UTF-8"),
        (b"[" * 100_000, "not JSON"), (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"), (b"[1]", "found list"),
        (b"null", "found NoneType"), (b'"text"', "found str"), (b"5", "found int"),
    ],
)  # fmt: skip
def test_what_is_no_json_object_is_refused_with_the_command_that_writes_it(
    root: Path, put, name: str, content: bytes, found: str
) -> None:
    path = put(name, content)
    with pytest.raises(UserError) as refusal:
        sources.read(root)
    message = str(refusal.value)
    assert message.startswith(f"{path}: {found}") and "\n" not in message
    assert message.endswith(f"; remove it and run `spar-scale {COMMANDS[name]} {root}` to write a new one")


@pytest.mark.parametrize("name", FILES)
def test_a_value_of_another_kind_is_refused_by_its_place(root: Path, put, name: str) -> None:
    value = parsed(root, name)
    refusals = set()
    for place in places(value):
        for new in (None, "text", [], {}, True, 10**400):
            path = put(name, text_of(name, changed(value, place, new)))
            try:
                sources.read(root)
            except UserError as error:
                where = f"line {place[0] + 1}: " if name.endswith("l") else f"{place[0]}"
                assert str(error).startswith(f"{path}: {where}") and "\n" not in str(error), (place, new)
                refusals.add(place)
    assert len(refusals) > 3


@pytest.mark.parametrize("name", FILES)
def test_a_file_without_one_of_its_fields_is_shown_or_refused(root: Path, put, name: str) -> None:
    value = parsed(root, name)
    for place in places(value):
        path = put(name, text_of(name, changed(value, place, REMOVED)))
        try:
            found = sources.read(root)
        except UserError as error:
            assert str(error).startswith(f"{path}: ") and ", must " in str(error) and "\n" not in str(error)
        else:
            assert render(found)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("number", [-1, 0, 2**60, 1e308, -1e308, 5e-324, math.nan, math.inf])
def test_extreme_numbers_are_shown_or_refused(root: Path, put, name: str, number: float) -> None:
    value = parsed(root, name)
    for place in places(value):
        if not isinstance(value_at(value, place), int | float):
            continue
        before = value
        value = changed(value, place, number)
        put(name, text_of(name, value))
        try:
            sources.read(root)
        except UserError:
            value = before
    put(name, text_of(name, value))
    assert render(sources.read(root))


def test_a_refusal_names_key_and_value(root: Path, put) -> None:
    path = put("scores.json", json.dumps(SCORES | {"vqa.after": "0.8"}).encode())
    with pytest.raises(
        UserError, match=re.escape(f'{path}: vqa.after: found "0.8", must be a valid number; remove it')
    ):
        sources.read(root)
    path = put("instruct/metrics.jsonl", b'{"step": 1, "loss": 1.0, "terms": {}}\n{"step": 2, "terms": {}}\n')
    with pytest.raises(UserError, match=re.escape(f"{path}: line 2: loss: found nothing, must be given; remove this")):
        sources.read(root)


@pytest.mark.parametrize(
    ("text", "steps"),
    [("", 0), ('{"step": 1, "lo', 0), ('{"step": 1, "loss": null, "terms": {}}\n', 1),
     ('{"step": 1, "loss": 1, "terms": {}}\n{"st', 1), ('{"step": 1, "loss": 1, "terms": {}}', 1)],
)  # fmt: skip
def test_only_a_last_line_without_its_end_is_left_out(root: Path, put, text: str, steps: int) -> None:
    put("instruct/metrics.jsonl", text.encode())
    assert [len(run.metrics) for run in sources.read(root).runs if run.name == "instruct"] == [steps]
    write_report(root)
    put("instruct/metrics.jsonl", b'{"step": 1, "loss": 1, "terms": {}}\n{"st\n')
    with pytest.raises(UserError, match="line 2 is not JSON; remove this line"):
        sources.read(root)


@pytest.mark.parametrize("name", [*COMMANDS, "instruct/metrics.jsonl", "instruct/recipe.yaml"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(name: str, tmp_path: Path) -> None:
    root = make_root(tmp_path)
    (root / name).unlink()
    os.mkfifo(root / name)
    with pytest.raises(UserError, match=f"^{root / name}: is not a regular file; move it away"):
        write_report(root)


@pytest.mark.parametrize("kind", ["directory", "FIFO"])
def test_a_report_that_cannot_be_written_is_refused_before_anything_is_read(kind: str, tmp_path: Path) -> None:
    root = make_root(tmp_path)
    (root / "scores.json").write_text("no JSON")
    (root / "report.html").mkdir() if kind == "directory" else os.mkfifo(root / "report.html")
    with pytest.raises(UserError, match=f"^{root}/report.html: is a {kind} and is not replaced"):
        write_report(root)


def test_steps_that_go_backwards_and_edits_without_a_loss_are_shown(tmp_path: Path) -> None:
    root = make_root(tmp_path)
    (root / "scores.json").write_text(json.dumps(SCORES | {"flow.edit.right": 0, "flow.edit.mirrored": 0}))
    lines = [{"step": step, "loss": 1.0, "terms": {}} for step in (9, 3, 3, 1)]
    (root / "tokenizer_init" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "0.000 with the source picture" in Page(root).text


@pytest.mark.parametrize(
    "values", [[2.0**60, 0.5, 0.5], [1e308, -1e308], [1e308, 0.1], [5e-324, 1.0], [5e-324, 2e-323]]
)
def test_a_curve_of_extreme_values_stays_inside_its_drawing(values: list[float]) -> None:
    svg = str(draw(list(range(len(values))), values, "loss"))
    points = [
        tuple(map(float, pair.split(","))) for path in re.findall(r'points="(.*?)"', svg) for pair in path.split()
    ]
    assert all(0 <= x <= 320 and 0 <= y <= 170 for x, y in points)


def test_a_spike_does_not_change_the_mean_of_later_steps() -> None:
    assert smoothed([1e30, *[0.5] * 200])[100:] == [0.5] * 101


def test_files_are_read_as_utf_8_in_any_locale(tmp_path: Path) -> None:
    root = make_root(tmp_path)
    (root / "instruct" / "recipe.yaml").write_bytes("stage: instruct\nphase: joint\nrun_dir: größe\n".encode())
    code = "import sys; from pathlib import Path; from spar_scale.evaluation.report import sources as s"
    code += "; print(ascii(s.read(Path(sys.argv[1])).runs[-1].recipe_text))"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [sys.executable, "-c", code, str(root)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert r"gr\xf6\xdfe" in done.stdout
