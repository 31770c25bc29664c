"""Which captions an import takes: from texts beside the pictures and from tables; what it leaves out, and why."""

from __future__ import annotations

import csv
import io
import json
import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from parallel.errors import UserError
from spar_scale.data.importing import import_folder
from spar_scale.data.storage import read_member
from spar_scale.data.tar_index import read_index

NFC, NFD = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder."""
    (tmp_path / "mine").mkdir()
    return tmp_path / "mine"


def fill(folder: Path, names: list[str], content: bytes = b"a red circle") -> None:
    """Write pictures, and texts of `content`; other files are empty."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(
            png() if name.endswith(".png") else content if name.lower().endswith("txt") else b""
        )


def imported(folder: Path) -> tuple[dict[str, str], str]:
    """{key: caption} of the shard, and what the import printed."""
    out = folder.parent / "out"
    report = import_folder(folder, out)
    shard = str(out / "images-00000.tar")
    index = read_index(shard)
    places = (index.members(number)["txt"] for number in range(len(index)))
    return {key: read_member(shard, *place).decode() for key, place in zip(index.keys, places, strict=True)}, report


def left_out(report: str) -> list[str]:
    """The lines of what was left out."""
    return [line.strip().removeprefix("left out, ") for line in report.splitlines() if "left out, " in line]


FIELDS = "more or fewer fields than the header; put texts with commas in double quotes: 1"
ROWS_OF_CSV = {
    "comma without quotes": ("0.png,a circle, on the left", f"{FIELDS} (row 1 at line 2 (3 instead of 2))"),
    "no caption": ("0.png", f"{FIELDS} (row 1 at line 2 (1 instead of 2))"),
    "one comma more": ("0.png,a circle,", f"{FIELDS} (row 1 at line 2 (3 instead of 2))"),
    "text behind a quote": ('0.png,"a" circle', "not valid CSV: 1 (row 1 at line 2 (',' expected after '\"'))"),
    "more than a field can hold": (
        f"0.png,{'x' * (csv.field_size_limit() + 1)}",
        f"not valid CSV: 1 (row 1 at line 2 (field larger than field limit ({csv.field_size_limit()})))",
    ),
    "empty cells": (",", "image is empty: 1 (row 1 at line 2)"),
    "NUL in the caption": ("0.png,a\0b", "its text holds NUL characters: 1 (0.png)"),
    "NUL in the name": ("0\0.png,x", "name refused by the file system (embedded null byte): 1 (0\\x00.png)"),
    "address": ("https://example.org/a.png,x", "an address instead of a file name: 1 (https://example.org/a.png)"),
    "picture in an address": (
        f"data:image/png;base64;{'A' * 300},x",
        f"an address instead of a file name: 1 (data:image/png;base64;{'A' * 35}...{'A' * 20})",
    ),
    "long name": (
        f"{'y' * 300},x",
        f"name refused by the file system (File name too long): 1 ({'y' * 57}...{'y' * 20})",
    ),
    "folder": ("folder.png,x", "not a regular file: 1 (folder.png)"),
    "FIFO": ("fifo.png,x", "not a regular file: 1 (fifo.png)"),
    "loop of links": ("loop.png,x", "no such file: 1 (loop.png)"),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS_OF_CSV)
def test_a_bad_row_of_a_csv_is_left_out_and_the_next_is_kept(folder: Path, case: str):
    row, reason = ROWS_OF_CSV[case]
    fill(folder, ["0.png", "1.png"])
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "fifo.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "captions.csv").write_text(f"image,caption\n{row}\n1.png,a blue square\n")
    captions, report = imported(folder)
    assert captions == {"1": "a blue square"}
    assert left_out(report) == [reason]


ROWS_OF_JSON = {
    "null": ('{"image": "0.png", "caption": null}', "caption is null: 1 (row 1 at line 1)"),
    "number": ('{"image": 7, "caption": "x"}', "image is a number: 1 (row 1 at line 1)"),
    "true": ('{"image": "0.png", "caption": true}', "caption is true or false: 1 (row 1 at line 1)"),
    "list": ('{"image": "0.png", "caption": ["x"]}', "caption is a list: 1 (row 1 at line 1)"),
    "object": ('{"image": "0.png", "caption": {"en": "x"}}', "caption is an object: 1 (row 1 at line 1)"),
    "other columns": ('{"file": "0.png", "text": "x"}', "image is missing: 1 (row 1 at line 1 (has file, text))"),
    "key twice": ('{"image": "0.png", "caption": "x", "caption": "y"}', "two values of caption: 1 (row 1 at line 1)"),
    "half an emoji": (
        '{"image": "0.png", "caption": "x \\ud83d"}',
        "caption holds half of a surrogate pair and is not UTF-8: 1 (row 1 at line 1)",
    ),
    "half an emoji in the name": (
        '{"image": "\\ud83d.png", "caption": "x"}',
        "image holds half of a surrogate pair and is not UTF-8: 1 (row 1 at line 1)",
    ),
    "no object": ('["0.png", "x"]', "not a JSON object: 1 (row 1 at line 1)"),
    "no JSON": (
        '{"image": "0.png"',
        "not valid JSON: 1 (row 1 at line 1 (Expecting ',' delimiter at character 18))",
    ),
    "too deep": ("[" * 100_000, "not valid JSON: 1 (row 1 at line 1 (maximum recursion depth exceeded"),
}


@pytest.mark.parametrize("case", ROWS_OF_JSON)
def test_a_bad_row_of_a_jsonl_is_left_out_and_the_next_is_kept(folder: Path, case: str):
    row, reason = ROWS_OF_JSON[case]
    fill(folder, ["0.png", "1.png"])
    good = {"image": "1.png", "caption": "a \U0001f431", "image ids": [1, {"caption": 2}]}
    (folder / "captions.jsonl").write_text(f"{row}\n\n{json.dumps(good)}\n")
    captions, report = imported(folder)
    assert captions == {"1": "a \U0001f431"}
    assert len(left_out(report)) == 1 and left_out(report)[0].startswith(reason)


def test_rows_are_counted_without_header_and_blank_lines_and_lines_with_them(folder: Path):
    fill(folder, ["0.png", "1.png"])
    (folder / "captions.csv").write_text('\nimage,caption\n\n0.png,"two\nlines"\n\nx,y,z\n1.png,x\n')
    captions, report = imported(folder)
    assert captions == {"0": "two\nlines", "1": "x"}
    assert left_out(report) == [f"{FIELDS} (row 2 at line 7 (3 instead of 2))"]


VALID_CSV = {
    "byte order mark and CRLF": "\ufeffimage,caption\r\n0.png,a circle\r\n",
    "CR alone": "image,caption\r0.png,a circle\r",
    "spaces behind commas": 'image, caption\n0.png, "a circle"\n',
    "more columns": "id,caption,image\n7,a circle,0.png\n",
    "no line end": "image,caption\n0.png,a circle",
}


@pytest.mark.parametrize("case", VALID_CSV)
def test_the_usual_forms_of_csv_give_the_same_caption(folder: Path, case: str):
    fill(folder, ["0.png"])
    (folder / "captions.csv").write_bytes(VALID_CSV[case].encode())
    captions, report = imported(folder)
    assert captions == {"0": "a circle"} and left_out(report) == []


def test_commas_quotes_and_line_ends_within_quotes_belong_to_the_caption(folder: Path):
    fill(folder, ["0.png"])
    caption = 'a "red", round\nthing'
    with open(folder / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerows([["image", "caption"], ["0.png", caption]])
    assert imported(folder)[0] == {"0": caption}


REFUSED_CSV = {
    "Latin-1": ("image,caption\n0.png,x\n1.png,gr\u00fcn\n".encode("latin-1"), "line 3 is not UTF-8; save the table"),
    "UTF-16": ("image,caption\n0.png,x\n".encode("utf-16"), "line 1 is not UTF-8; save the table as UTF-8"),
    "semicolons": (b"image;caption\n0.png;x\n", "the header has 'image;caption'; it must have the columns 'image' and"),
    "other case": (b"Image,Caption\n0.png,x\n", "the header has 'Image', 'Caption'; it must have the columns 'image'"),
    "column twice": (b"image,caption,caption\n0.png,x,y\n", "'caption' once each"),
    "no header": (b"0.png,x\n1.png,y\n", "the header has '0.png', 'x'; it must have the columns"),
    "empty": (b"\n \n", "is empty; its first line must be the header image,caption"),
    "quote up to the end": (b'image,caption\n0.png,x\n1.png,"y\n0.png,z\n', r"row at line 3 .* up to line 4 "),
    "quote closed in a later row": (b'image,caption\n0.png,"x\n1.png,y\n"0.png",z\n', "row at line 2 .* up to line 4 "),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_CSV)
def test_a_csv_whose_rows_cannot_be_told_apart_is_refused_with_the_line(folder: Path, case: str):
    content, message = REFUSED_CSV[case]
    fill(folder, ["0.png", "1.png"])
    (folder / "captions.csv").write_bytes(content)
    with pytest.raises(UserError, match=rf"captions\.csv: .*{message}"):
        imported(folder)


@pytest.mark.parametrize(("stored", "written"), [(NFD, NFC), (NFC, NFD), (f"{NFD}/{NFC}", f"{NFC}/{NFC}")])
@pytest.mark.parametrize("table", [True, False])
def test_a_name_is_found_in_another_unicode_normal_form(folder: Path, stored: str, written: str, table: bool):
    fill(folder, [f"{stored}.png"])
    if table:
        (folder / "captions.csv").write_text(f"image,caption\n{written}.png,a red circle\n", encoding="utf-8")
    else:
        fill(folder, [f"{written}.txt"])
    captions, report = imported(folder)
    assert list(captions.values()) == ["a red circle"] and left_out(report) == []


def test_the_exact_name_goes_before_another_unicode_normal_form(folder: Path):
    fill(folder, [f"{NFC}.png", f"{NFD}.png"])
    fill(folder, [f"{NFC}.txt"], b"composed")
    fill(folder, [f"{NFD}.txt"], b"decomposed")
    assert set(imported(folder)[0].values()) == {"composed", "decomposed"}


def test_no_file_is_chosen_where_two_differ_from_the_name_in_their_unicode_normal_form(folder: Path):
    name = "e\u0301\u00e9"  # neither composed nor decomposed
    fill(folder, ["0.png", f"{unicodedata.normalize('NFC', name)}.png", f"{unicodedata.normalize('NFD', name)}.png"])
    (folder / "captions.csv").write_text(f"image,caption\n{name}.png,x\n0.png,y\n", encoding="utf-8")
    captions, report = imported(folder)
    assert captions == {"0": "y"} and left_out(report) == [f"no such file: 1 ({name}.png)"]


BESIDE = {
    "types that are not read": (
        ["b.gif", "b.txt", "c.HEIC", "d.avif", "d.png", "d.txt", "e.mp4", "e.txt"],
        {"a", "d"},
        ["picture type not read: 3 (b.gif, c.HEIC, d.avif)", "file type not read: 1 (e.mp4)"],
    ),
    "files that are no pictures": (["a.json", "notes.md", "b.json"], {"a"}, []),
    "texts alone": (["b.txt", "folder/c.txt"], {"a"}, ["text without a picture: 2 (b.txt, folder/c.txt)"]),
    "hidden files": (["._a.png", "._a.txt", ".DS_Store", ".hidden.png"], {"a"}, []),
    "hidden folders": ([".ipynb_checkpoints/a-copy.png", ".ipynb_checkpoints/a-copy.txt"], {"a"}, []),
    "extensions in capitals": (["b.png", "b.TXT"], {"a", "b"}, []),
    "two texts": (["b.png", "b.TXT", "b.Txt"], {"a"}, [
        "no text: 1 (b.png)", "text without a picture: 2 (b.TXT, b.Txt)",
    ]),
    "no extension": (["png", "png.txt"], {"a"}, ["file type not read: 1 (png)"]),
    "picture alone": (["b.png"], {"a"}, ["no text: 1 (b.png)"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BESIDE)
def test_every_file_that_gives_no_pair_is_named(folder: Path, case: str):
    names, kept, reasons = BESIDE[case]
    fill(folder, ["a.png", "a.txt", *names])
    captions, report = imported(folder)
    assert captions.keys() == kept and left_out(report) == reasons


@pytest.mark.parametrize("name", ["gr\udcfcn", "folder\udcff/b"])
def test_a_file_name_that_is_no_utf8_is_left_out(folder: Path, name: str):
    fill(folder, ["a.png", "a.txt", f"{name}.png", f"{name}.txt"])
    captions, report = imported(folder)
    shown = name.encode("ascii", "backslashreplace").decode()
    assert captions.keys() == {"a"}
    assert left_out(report) == [f"file name is not UTF-8: 2 ({shown}.png, {shown}.txt)"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"gr\xfcn", "its text is not UTF-8: 1 (b.png)"),
        ("a circle".encode("utf-16"), "its text is not UTF-8: 1 (b.png)"),
        ("a circle".encode("utf-16-le"), "its text holds NUL characters: 1 (b.png)"),
        (b"\xef\xbb\xbf \n", "no text: 1 (b.png)"),
    ],
)
def test_a_text_that_holds_no_caption_is_left_out(folder: Path, content: bytes, reason: str):
    fill(folder, ["a.png", "a.txt", "b.png"])
    fill(folder, ["b.txt"], content)
    captions, report = imported(folder)
    assert captions.keys() == {"a"} and left_out(report) == [reason]


def refuse(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the operating system refuse to open files and folders of a name, which root could read in any mode."""
    opened, listed = Path.open, os.scandir

    def open_file(path: Path, *arguments, **options):
        if path.name == what:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    def list_folder(path):
        if os.path.basename(path) == what:
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(Path, "open", open_file)
    monkeypatch.setattr(os, "scandir", list_folder)


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        ("b.txt", "its text cannot be read: 1 (b.png (Permission denied))"),
        ("b.png", "unreadable image: 1 (b.png (Permission denied))"),
        ("folder", "folder that cannot be read: 1 (folder (Permission denied))"),
    ],
)
def test_what_may_not_be_opened_is_left_out_with_the_reason_of_the_system(
    folder: Path, monkeypatch: pytest.MonkeyPatch, refused: str, reason: str
):
    fill(folder, ["a.png", "a.txt", "b.png" if refused[0] == "b" else "a.md", "folder/c.png", "folder/c.txt"])
    if refused[0] == "b":
        fill(folder, ["b.txt"])
    refuse(refused, monkeypatch)
    captions, report = imported(folder)
    assert captions.keys() == {"a"} | ({"folder%2Fc"} if refused != "folder" else set())
    assert left_out(report) == [reason]


def test_special_files_named_like_pictures_are_not_opened(folder: Path):
    fill(folder, ["a.png", "a.txt", "b.txt", "c.txt"])
    os.mkfifo(folder / "b.png")
    (folder / "c.png").mkdir()
    captions, report = imported(folder)
    assert captions.keys() == {"a"}
    assert left_out(report) == ["not a regular file: 1 (b.png)", "text without a picture: 1 (c.txt)"]


def test_a_folder_that_is_a_link_is_not_entered_and_named(folder: Path):
    fill(folder, ["a.png", "a.txt"])
    fill(folder.parent, ["elsewhere/b.png", "elsewhere/b.txt"])
    (folder / "linked").symlink_to(folder.parent / "elsewhere")
    captions, report = imported(folder)
    assert captions.keys() == {"a"} and left_out(report) == ["folder that is a link: 1 (linked)"]
