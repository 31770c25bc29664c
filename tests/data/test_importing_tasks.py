"""A folder of edits, or of questions with answers, as shards: what is taken, what is left out and why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from parallel.errors import UserError
from spar_scale.cli import main
from spar_scale.data.importing import import_folder
from spar_scale.data.loader import Loader, Source
from spar_scale.data.prompts import miniature_text
from spar_scale.data.spec import SampleSpec
from spar_scale.data.storage import read_member
from spar_scale.data.tar_index import read_index

TEXT = miniature_text()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine" / "b").mkdir(parents=True)
    return tmp_path / "mine"


def imported(folder: Path, task: str) -> tuple[dict[str, dict[str, bytes]], str]:
    """{key: members} of the only shard, and the report."""
    report = import_folder(folder, folder.parent / "out", task=task)
    shard = str(folder.parent / "out" / "images-00000.tar")
    index = read_index(shard)
    tables = {key: index.members(number) for number, key in enumerate(index.keys)}
    return {
        key: {name: read_member(shard, *place) for name, place in table.items()} for key, table in tables.items()
    }, (report)


def left_out(report: str) -> list[str]:
    return [line.strip().removeprefix("left out, ") for line in report.splitlines() if "left out, " in line]


def batch_of(folder: Path, spec: SampleSpec, task: str) -> dict:
    source = Source("mine", str(folder.parent / "out" / "images-*.tar"), task=task)
    (batch,) = Loader([source], spec, 0, 1, 1, 1, 0, 1, 0, 0, 1)
    return batch


def test_edits_are_taken_from_the_names_of_files_and_train(folder: Path, picture):
    source, result = picture(40, 20), picture(20, 40, kind="jpeg")
    for name in ("z", "b/a b"):
        (folder / f"{name}.input.png").write_bytes(source)
        (folder / f"{name}.Output.JPG").write_bytes(result)
        (folder / f"{name}.txt").write_text("make the circle blue\n")
    found, report = imported(folder, "editing")
    members = {"input.png": source, "output.jpg": result, "txt": b"make the circle blue"}
    assert found == {"b%2Fa%20b": members, "z": members} and left_out(report) == []
    assert "{name: editing, shards: " in report
    batch = batch_of(folder, SampleSpec("conditioned", 16, num_tokens=16, image_tokens=1, text=TEXT), "editing")
    assert batch["errors"] == [] and batch["weight"].tolist() == [1]


INCOMPLETE = {
    "no result": (["b.input.png", "b.txt"], ["no output picture: 1 (b.input.png)"]),
    "no source": (["b.output.png", "b.txt"], ["no input picture: 1 (b.output.png)"]),
    "no instruction": (["b.input.png", "b.output.png"], ["no text: 1 (b.output.png)"]),
    "instruction alone": (["b.txt"], ["text without a picture: 1 (b.txt)"]),
    "other pictures": (
        ["b.png", "b.txt", "input.png"],
        [
            "its name does not end in .input or .output: 2 (b.png, input.png)",
            "text without a picture: 1 (b.txt)",
        ],
    ),
    "two sources": (["a.input.webp"], ["duplicate key: 1 (a.input.webp (as a.input.png))"]),
    "a type that is not read": (
        ["b.input.png", "b.output.heic", "b.txt"],
        ["no output picture: 1 (b.input.png)", "picture type not read: 1 (b.output.heic)"],
    ),
}


def triplet(folder: Path, picture, *more: str) -> None:
    for name in ("a.input.png", "a.output.png", "a.txt", *more):
        (folder / name).write_bytes(b"make the circle blue" if name.endswith("txt") else picture())


@pytest.mark.parametrize("case", INCOMPLETE)
def test_every_file_that_gives_no_edit_is_named(folder: Path, picture, case: str):
    names, reasons = INCOMPLETE[case]
    triplet(folder, picture, *names)
    found, report = imported(folder, "editing")
    assert list(found) == ["a"] and left_out(report) == reasons


def test_a_picture_of_an_edit_that_cannot_be_read_is_named_with_its_side(folder: Path, picture):
    triplet(folder, picture, "b.input.png", "b.output.png", "b.txt")
    (folder / "b.input.png").write_bytes(b"")
    found, report = imported(folder, "editing")
    assert list(found) == ["a"] and "unreadable image: 1 (input of b.png (not a readable image (0 bytes" in report


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_edits_are_rows_of_a_table_which_may_share_a_source(folder: Path, picture, kind: str):
    for name in ("s", "b/1", "b/2"):
        (folder / f"{name}.png").write_bytes(picture())
    rows = [("s.png", "b/1.png", "make it blue, please"), ("s.png", "b/2.png", "x"), ("s.png", "none.png", "x")]
    columns = ("input", "output", "instruction")
    lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in rows]
    if kind == "csv":
        lines = [",".join(columns), *(f'{source},{result},"{text}"' for source, result, text in rows)]
    (folder / f"edits.{kind}").write_text("\n".join(lines))
    found, report = imported(folder, "editing")
    assert {key: sample["txt"] for key, sample in found.items()} == {"b%2F1": b"make it blue, please", "b%2F2": b"x"}
    assert left_out(report) == ["no such file: 1 (none.png)"]


def test_questions_of_one_picture_are_one_sample_and_train(folder: Path, picture):
    for name in ("a", "c"):
        (folder / f"{name}.png").write_bytes(picture())
    rows = ["a.png,is there a red circle ?,yes", "c.png,how many ?,", "a.png,how many circles are there ?,one"]
    (folder / "questions.csv").write_text("\n".join(["image,question,answer", *rows]))
    found, report = imported(folder, "questions")
    asked = [("is there a red circle ?", "yes"), ("how many circles are there ?", "one")]
    listed = [{"type": "question", "question": question, "answer": answer} for question, answer in asked]
    assert list(found) == ["a"] and json.loads(found["a"]["json"]) == {"questions": listed}
    assert left_out(report) == ["no text: 1 (c.png)"] and "{name: questions, shards: " in report
    batch = batch_of(
        folder, SampleSpec("language", 16, task_tokens={"questions": 40}, image_tokens=1, text=TEXT), "questions"
    )
    assert batch["errors"] == [] and batch["weight"].tolist() == [1]
    assert (
        sum(
            f"question : {question} answer : {answer} ." in TEXT.decode(batch["tokens"].tolist())
            for question, answer in asked
        )
        == 2
    )


REFUSED = {
    "edits": ("editing", {}, r"holds no sample\na sample is NAME\.input\.jpg and NAME\.output\.jpg"),
    "questions": ("questions", {}, r"holds no questions\.csv or questions\.jsonl; expected a table with the columns"),
    "header": (
        "editing",
        {"edits.csv": b"image,caption\n"},
        "the header has 'image', 'caption'; it must have the columns 'input', 'output' and 'instruction' once each",
    ),
    "two tables": ("questions", {"questions.csv": b"", "questions.jsonl": b""}, "expected one table"),
    "row": ("questions", {"questions.jsonl": b'{"image": "a.png", "question": "x"}'}, "left out, answer is missing: 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_without_samples_of_the_task_is_refused(folder: Path, case: str):
    task, files, message = REFUSED[case]
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        imported(folder, task)
    assert not (folder.parent / "out").exists()


def test_the_command_takes_the_task(folder: Path, picture, capsys):
    triplet(folder, picture)
    command = ["data", "import", str(folder), "--out", str(folder.parent / "out"), "--task"]
    assert main([*command, "editing"]) == 0 and "1 samples in 1 shard" in capsys.readouterr().out
