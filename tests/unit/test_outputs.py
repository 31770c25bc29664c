"""Targets of commands: what cannot be written is refused with its name, and left as it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from parallel.errors import UserError
from spar_scale.data.commands import show
from spar_scale.data.shapes_world import World
from spar_scale.data.shards import make_world
from spar_scale.files.outputs import make_directory, write_picture


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("world")
    return str(make_world(World(seed=1, scenes=2, heldout=0, edits=0, heldout_edits=0), folder)[0])


@pytest.mark.parametrize(("name", "format"), [("sheet.png", "PNG"), ("new/sheet.JPG", "JPEG"), ("sheet.webp", "WEBP")])
def test_a_contact_sheet_has_the_format_of_its_name(shard: str, name: str, format: str, tmp_path: Path) -> None:
    show([shard], 2, tmp_path / name)
    with Image.open(tmp_path / name) as picture:
        assert picture.format == format


@pytest.mark.parametrize(("name", "message"), [("fifo.png", "is a FIFO"), ("sheet.tiff", "must be one of .png, .jpg")])
def test_a_contact_sheet_that_cannot_be_written_is_refused_before_shards_are_read(
    name: str, message: str, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    with pytest.raises(UserError, match=message):
        show([str(tmp_path / "absent.tar")], 1, tmp_path / name)
    assert os.listdir(tmp_path) == ["fifo.png"] and (tmp_path / "fifo.png").is_fifo()


@pytest.mark.parametrize(("name", "edge"), [("wide.jpg", 65501), ("wide.webp", 16384)])
def test_a_picture_larger_than_its_format_holds_is_refused(name: str, edge: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{name}: found {edge}x1 pixels, .* give a .png file"):
        write_picture(Image.new("RGB", (edge, 1)), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_picture_goes_where_a_link_points(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to("there.png")
    write_picture(Image.new("RGB", (4, 4)), tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink() and Image.open(tmp_path / "there.png").size == (4, 4)


@pytest.mark.parametrize(
    "name", ["file", "file/below", "fifo", "/dev/null", "/dev/null/below", "/proc/self", "a" * 256]
)
def test_a_directory_that_takes_no_files_is_refused_with_its_option(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match=f"^--out: {tmp_path / name}: .*; give another directory$"):
        make_directory(tmp_path / name, "--out")
    assert sorted(os.listdir(tmp_path)) == ["fifo", "file"] and (tmp_path / "file").read_text() == "kept"
