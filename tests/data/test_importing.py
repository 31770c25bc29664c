"""A folder of one's own as shards: what is taken, what is left out and why, what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image
from webdataset.compat import WebDataset

from parallel.errors import UserError
from spar_scale.cli import main
from spar_scale.data.importing import import_folder, sample_key
from spar_scale.data.left_out import NAME_CHARACTERS, printable
from spar_scale.data.loader import Loader, Source
from spar_scale.data.prompts import miniature_text
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
    assert list(found) == ["a", "b%2Fa", "z%201"]
    assert found["b%2Fa"] == {"jpg": (folder / "b" / "a.jpg").read_bytes(), "txt": b"a red circle"}
    assert said.splitlines()[0] == f"{tmp_path / 'out'}: 3 samples in 1 shard"
    assert f'{{name: generation, shards: "{tmp_path}/out/images-*.tar", weight: 1.0}}' in said
    import_folder(folder, tmp_path / "again")
    assert (tmp_path / "again" / "images-00000.tar").read_bytes() == (
        tmp_path / "out" / "images-00000.tar"
    ).read_bytes()


def test_what_was_imported_can_be_trained_on(folder: Path, tmp_path: Path):
    import_folder(folder, tmp_path / "out")
    spec = SampleSpec("conditioned", 16, crop="center", flip=False, num_tokens=16, text=miniature_text())
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
        "b%2Fa": 'a "blue", square',
        "z%201": "größe",
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
    (folder / "a.png").write_bytes(picture())
    (folder / "latin.png").write_bytes(picture())
    (folder / "latin.txt").write_bytes(b"gr\xfcn")
    said = import_folder(folder, tmp_path / "out")
    assert list(members(tmp_path / "out")) == ["a", "b%2Fa", "z%201"]
    for line in (
        "left out, outside the folder: 2 (link.png, text.txt)",
        "left out, no text: 1 (alone.png)",
        "left out, its text is not UTF-8: 1 (latin.png)",
        "left out, unreadable image: 1 (cut.png (not a readable image",
        "left out, duplicate key: 1 (a.webp (as a.png))",
    ):
        assert line in said
    assert "secret" not in said


def test_a_table_reaches_no_file_outside(folder: Path, tmp_path: Path, picture):
    (tmp_path / "secret.png").write_bytes(picture())
    rows = ["image,caption", "../secret.png,x", f"{tmp_path}/secret.png,x", "none.png,x", "a.webp,x"]
    (folder / "captions.csv").write_text("\n".join(rows))
    said = import_folder(folder, tmp_path / "out")
    assert (
        f"left out, outside the folder: 2 (../secret.png, {printable(f'{tmp_path}/secret.png', NAME_CHARACTERS)})"
        in said
    )
    assert "left out, no such file: 1 (none.png)" in said and list(members(tmp_path / "out")) == ["a"]


DIFFERENT_NAMES = {
    "scripts": ["\u732b", "\u72ac", "\u043a\u043e\u0442", "\u0641\u064a\u0644", "\u0915\u0940", "\u0915\u0947"],
    "folder or sign": ["a/b", "a-b", "a b", "a  b", "a_b", "a.b", "a%2Fb", "a%b", "-a-b", "a-b-", "a\nb"],
    "case": ["a", "A", "a1", "a\u00b9"],
    "Unicode normal forms": ["caf\u00e9", "cafe\u0301", "cafe"],
    "signs alone": ["!", "?", "%", "...x", "\U0001f431", "\U0001f436", "__a__", "--"],
    "long": ["x" * 250, "x" * 249 + "y", "/".join(["\u732b" * 60] * 5)],
}


@pytest.mark.parametrize("case", DIFFERENT_NAMES)
def test_different_names_give_different_keys_as_webdataset_reads_them(tmp_path: Path, picture, case: str):
    names = DIFFERENT_NAMES[case]
    for name in names:
        (tmp_path / "mine" / f"{name}.png").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / f"{name}.png").write_bytes(picture())
    rows = [json.dumps({"image": f"{name}.png", "caption": f"number {n}"}) for n, name in enumerate(names)]
    (tmp_path / "mine" / "captions.jsonl").write_text("\n".join(rows))
    import_folder(tmp_path / "mine", tmp_path / "out")
    found = members(tmp_path / "out")
    assert [sample["txt"] for sample in found.values()] == [f"number {n}".encode() for n in range(len(names))]
    assert [unquote(key) for key in found] == names
    shard = str(tmp_path / "out" / "images-00000.tar")
    read = {sample["__key__"]: sample["txt"] for sample in WebDataset(shard, shardshuffle=False)}
    assert read == {key: sample["txt"] for key, sample in found.items()}


PLAIN = [
    "img_001",
    "IMG-20260101-WA0001",
    "A",
    "0",
    "\u732b",
    "Gr\u00f6\u00dfe",
    "\u0939\u093f\u0928\u094d\u0926\u0940",
]


@pytest.mark.parametrize("name", PLAIN)
def test_a_name_of_letters_and_digits_is_its_own_key(name: str):
    assert sample_key(f"{name}.png") == name


@pytest.mark.parametrize("name", ["./b/a.jpg", "b/../b/a.jpg", "b//a.jpg", "{folder}/b/a.jpg"])
def test_every_way_to_write_a_path_in_a_table_gives_the_key_of_its_file(folder: Path, tmp_path: Path, name: str):
    (folder / "captions.csv").write_text(f"image,caption\n{name.format(folder=folder)},x\nb/a.jpg,y\n")
    said = import_folder(folder, tmp_path / "out")
    assert list(members(tmp_path / "out")) == ["b%2Fa"]
    assert "left out, duplicate key: 1 (b/a.jpg (as b/a.jpg))" in said


def stored(kind: str) -> bytes:
    """A picture as Pillow saves it in a format."""
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime")]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, **({"save_all": True, "append_images": frames[1:]} if kind == "mpo" else {}))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "kind", "extension"),
    [
        ("p.jpg", "mpo", "jpg"),
        ("p.mpo", "mpo", "jpg"),
        ("p.jfif", "jpeg", "jpg"),
        ("p.JPE", "jpeg", "jpg"),
        ("p.apng", "png", "png"),
        ("p.png", "webp", "webp"),
    ],
)
def test_the_extension_in_the_shard_follows_from_the_bytes(tmp_path: Path, name: str, kind: str, extension: str):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_bytes(stored(kind))
    (tmp_path / "mine" / "p.txt").write_text("a red circle")
    import_folder(tmp_path / "mine", tmp_path / "out")
    assert members(tmp_path / "out") == {"p": {extension: stored(kind), "txt": b"a red circle"}}


def test_pictures_with_transparent_pixels_are_counted_and_shrunk_over_white(folder: Path, tmp_path: Path):
    for name, opacity in (("clear", 0), ("opaque", 255)):
        Image.new("RGBA", (40, 40), (9, 9, 9, opacity)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("a red circle")
    assert "pictures with transparency, composited over white: 1\n" in import_folder(folder, tmp_path / "out", size=10)
    found = members(tmp_path / "out")
    for name, expected in (("clear", 255), ("opaque", 9)):
        assert Image.open(io.BytesIO(found[name]["png"])).getextrema() == ((expected, expected),) * 3


def test_the_report_is_printable_and_short_whatever_the_names_are(folder: Path, tmp_path: Path, picture):
    rows = [
        {"image": "a.webp", "caption": "\x1b[31mred " + "x" * 500},
        {"image": "no\nsuch\x1b[31m\udcfc.png", "caption": "x"},
        {"image": "no\tfile" + "y" * 500, "caption": "x"},
    ]
    (folder / "captions.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    lines = import_folder(folder, tmp_path / "out", check_words=True).encode().decode().split("\n")
    assert all(line.isprintable() and len(line) < 250 for line in lines)
    assert any("(no\\tfileyyy" in line and "...yyyy" in line for line in lines)


def test_larger_pictures_are_shrunk_where_asked_for(folder: Path, tmp_path: Path, picture):
    (folder / "small.png").write_bytes(picture(12, 9))
    (folder / "small.txt").write_text("a red circle")
    import_folder(folder, tmp_path / "out", size=10)
    found = members(tmp_path / "out")
    assert Image.open(io.BytesIO(found["b%2Fa"]["png"])).size == (20, 10)
    assert found["small"]["png"] == (folder / "small.png").read_bytes()


def test_unknown_words_are_counted_with_the_nearest_known(folder: Path, tmp_path: Path):
    (folder / "a.txt").write_text("a red circel")
    said = import_folder(folder, tmp_path / "out", check_words=True)
    assert "words outside the miniature's vocabulary: 1" in said
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
        "captions.csv: the header has 'file', 'text'; it must have the columns 'image' and 'caption' once each",
    ),
    "not a row": (
        {"captions.jsonl": b"[1]\n"},
        r"holds no sample\n  left out, not a JSON object: 1 \(row 1 at l",
    ),
    "not json": ({"captions.jsonl": b"{\n"}, r"holds no sample\n  left out, not valid JSON: 1 \(row 1 at line 1"),
    "not text": ({"captions.csv": b"image,caption\n\xff,x\n"}, "captions.csv: cannot be read"),
    "two tables": (
        {"captions.csv": b"", "captions.jsonl": b""},
        "holds captions.csv and captions.jsonl, expected one table",
    ),
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
    assert "out: already exists and is not empty" in capsys.readouterr().err
    (tmp_path / "out" / "x").unlink()
    assert main(["data", "import", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert main(["data", "import", str(tmp_path / "none"), "--out", str(tmp_path / "new")]) == 2
    assert "none: no such folder" in capsys.readouterr().err


def test_a_picture_one_pixel_thin_is_left_out(folder: Path, tmp_path: Path, picture):
    (folder / "a.webp").write_bytes(picture(8, 1))
    said = import_folder(folder, tmp_path / "out")
    assert "left out, unreadable image: 1 (a.webp (8x1 pixels; both edges need at least 2))" in said
    assert "a" not in members(tmp_path / "out")
