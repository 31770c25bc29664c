"""A folder of one's own as shards: what is taken, what is left out and why, what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from parallel.errors import UserError
from spar_scale.cli import main
from spar_scale.data.importing import import_folder
from spar_scale.data.loader import Loader, Source
from spar_scale.data.spec import SampleSpec
from spar_scale.data.storage import read_member
from spar_scale.data.tar_index import read_index


@pytest.fixture
def folder(tmp_path: Path, picture) -> Path:
    """Three good pairs, of which one in a folder of its own."""
    home = tmp_path / "mine"
    (home / "b").mkdir(parents=True)
    for name, kind in (("z 1", "png"), ("b/a", "jpg"), ("a", "webp")):
        (home / f"{name}.{kind}").write_bytes(picture(40, 20, kind="jpeg" if kind == "jpg" else kind))
        (home / f"{name}.txt").write_text("a red circle\n")
    return home


def members(out: Path) -> dict[str, dict[str, bytes]]:
    """{key: {extension: bytes}} of all shards, in their order."""
    found = {}
    for shard in sorted(out.glob("images-*.tar")):
        index = read_index(str(shard))
        for number, key in enumerate(index.keys):
            table = index.members(number)
            found[key] = {name: read_member(str(shard), *place) for name, place in table.items()}
    return found


def test_pairs_become_samples_in_the_order_of_their_names_with_the_bytes_as_they_are(folder: Path, tmp_path: Path):
    said = import_folder(folder, tmp_path / "out")
    found = members(tmp_path / "out")
    assert list(found) == ["a", "b-a", "z-1"]
    assert found["b-a"] == {"jpg": (folder / "b" / "a.jpg").read_bytes(), "txt": b"a red circle"}
    assert said.splitlines()[0] == f"{tmp_path / 'out'}: 3 samples in 1 shard"
    assert f'{{name: generation, shards: "{tmp_path}/out/images-*.tar", weight: 1.0}}' in said
    import_folder(folder, tmp_path / "again")
    assert (tmp_path / "again" / "images-00000.tar").read_bytes() == (
        tmp_path / "out" / "images-00000.tar"
    ).read_bytes()


def test_what_was_imported_can_be_trained_on(folder: Path, tmp_path: Path):
    import_folder(folder, tmp_path / "out")
    spec = SampleSpec("conditioned", 16, crop="center", flip=False, num_tokens=16)
    source = Source("generation", str(tmp_path / "out" / "images-*.tar"))
    loader = Loader(
        [source], spec, seed=0, global_batch=3, task_block=3, micro_batch=3,
        dp_rank=0, dp_size=1, workers=0, first_step=0, steps=1,
    )  # fmt: skip
    (batch,) = list(loader)
    assert batch["errors"] == [] and batch["weight"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_table_names_pictures_and_captions(folder: Path, tmp_path: Path, kind: str):
    rows = [("b/a.jpg", 'a "blue", square'), ("z 1.png", "größe"), ("a.webp", "  ")]
    if kind == "csv":
        lines = ["caption,image", '"a ""blue"", square",b/a.jpg', "größe,z 1.png", "  ,a.webp"]
    else:
        lines = [json.dumps({"image": image, "caption": caption, "other": 1}) for image, caption in rows] + [""]
    (folder / f"captions.{kind}").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    said = import_folder(folder, tmp_path / "out")
    found = members(tmp_path / "out")
    assert {key: sample["txt"].decode() for key, sample in found.items()} == {
        "b-a": 'a "blue", square',
        "z-1": "größe",
    }
    assert "left out, no text: 1 (a.webp)" in said


def test_what_cannot_be_used_is_left_out_and_named(folder: Path, tmp_path: Path, picture):
    outside = tmp_path / "secret.png"
    outside.write_bytes(picture())
    (tmp_path / "secret.txt").write_text("a secret")
    (folder / "link.png").symlink_to(outside)
    (folder / "link.txt").write_text("a red circle")
    (folder / "text.png").write_bytes(picture())
    (folder / "text.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "deep").symlink_to(tmp_path)
    (folder / "cut.png").write_bytes(picture(64, 64)[:90])
    (folder / "cut.txt").write_text("a red circle")
    (folder / "alone.png").write_bytes(picture())
    (folder / "b-a.png").write_bytes(picture())
    (folder / "b-a.txt").write_text("a red circle")
    (folder / "latin.png").write_bytes(picture())
    (folder / "latin.txt").write_bytes(b"gr\xfcn")
    said = import_folder(folder, tmp_path / "out")
    assert list(members(tmp_path / "out")) == ["a", "b-a", "z-1"]
    for line in (
        "left out, outside of the folder: 2 (link.png, text.txt)",
        "left out, no text: 1 (alone.png)",
        "left out, its text is no UTF-8: 1 (latin.png)",
        "left out, unreadable image: 1 (cut.png (not a readable image",
        "left out, duplicate key: 1 (b/a.jpg (as b-a.png))",
    ):
        assert line in said
    assert "secret" not in said


def test_a_table_reaches_no_file_outside(folder: Path, tmp_path: Path, picture):
    (tmp_path / "secret.png").write_bytes(picture())
    rows = ["image,caption", "../secret.png,x", f"{tmp_path}/secret.png,x", "none.png,x", "a.webp,x"]
    (folder / "captions.csv").write_text("\n".join(rows))
    said = import_folder(folder, tmp_path / "out")
    assert f"left out, outside of the folder: 2 (../secret.png, {tmp_path}/secret.png)" in said
    assert "left out, no such file: 1 (none.png)" in said and list(members(tmp_path / "out")) == ["a"]


def test_larger_pictures_are_shrunk_where_asked_for(folder: Path, tmp_path: Path, picture):
    (folder / "small.png").write_bytes(picture(12, 9))
    (folder / "small.txt").write_text("a red circle")
    import_folder(folder, tmp_path / "out", size=10)
    found = members(tmp_path / "out")
    assert Image.open(io.BytesIO(found["b-a"]["png"])).size == (20, 10)
    assert found["small"]["png"] == (folder / "small.png").read_bytes()


def test_unknown_words_are_counted_with_the_nearest_known(folder: Path, tmp_path: Path):
    (folder / "a.txt").write_text("a red circel")
    said = import_folder(folder, tmp_path / "out", check_words=True)
    assert "words that the miniature does not know: 1" in said
    assert "'circel' in 1; did you mean 'circle'?" in said


def test_shards_are_cut_by_number_and_by_bytes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("spar_scale.data.importing.SHARD_SAMPLES", 2)
    assert "3 samples in 2 shards" in import_folder(folder, tmp_path / "by_number")
    monkeypatch.setattr("spar_scale.data.importing.SHARD_BYTES", 1)
    assert "3 samples in 3 shards" in import_folder(folder, tmp_path / "by_bytes")


REFUSED = {
    "nothing": ({}, "mine: holds no sample\na sample is a picture with a text"),
    "no captions": ({"a.png": b"x"}, r"holds no sample\n  left out, no text: 1 \(a.png\)"),
    "columns": (
        {"captions.csv": b"file,text\na.png,x\n"},
        "captions.csv: row 1 has file, text; it must have the texts",
    ),
    "not a row": ({"captions.jsonl": b"[1]\n"}, "captions.jsonl: row 1 has list; it must have"),
    "not json": ({"captions.jsonl": b"{\n"}, "captions.jsonl: cannot be read"),
    "not text": ({"captions.csv": b"image,caption\n\xff,x\n"}, "captions.csv: cannot be read"),
    "two tables": ({"captions.csv": b"", "captions.jsonl": b""}, "holds captions.csv and captions.jsonl; one of them"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_of_nothing_to_train_on_is_refused_and_nothing_is_left(tmp_path: Path, case: str):
    files, message = REFUSED[case]
    (tmp_path / "mine").mkdir()
    for name, content in files.items():
        (tmp_path / "mine" / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        import_folder(tmp_path / "mine", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_out_that_holds_something_is_refused(folder: Path, tmp_path: Path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    assert main(["data", "import", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "out: is there and not empty" in capsys.readouterr().err
    (tmp_path / "out" / "x").unlink()
    assert main(["data", "import", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert main(["data", "import", str(tmp_path / "none"), "--out", str(tmp_path / "new")]) == 2
    assert "none: no such folder" in capsys.readouterr().err
