"""Files are replaced as a whole, and only files are replaced."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from parallel.errors import UserError
from parallel.files import replaced, write_file


def bound_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


SPECIAL: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "a directory": os.mkdir,
    "a socket": bound_socket,
    "a device": lambda path: path.symlink_to("/dev/null"),  # refused before anything is opened
}


def test_the_content_is_there_as_a_whole_and_nothing_beside_it(tmp_path: Path) -> None:
    write_file(tmp_path / "a", "grün")
    write_file(tmp_path / "a", b"\0\xff")
    assert (tmp_path / "a").read_bytes() == b"\0\xff"
    assert os.listdir(tmp_path) == ["a"]


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path) -> None:
    write_file(tmp_path / "a", "old")
    with pytest.raises(KeyError), replaced(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise KeyError
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_regular_file_stays_what_it_is(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "target"
    SPECIAL[kind](path)
    before = stat.S_IFMT(path.stat().st_mode)
    with pytest.raises(UserError) as refused:
        write_file(path, "x")
    assert str(refused.value) == f"{path}: is {kind} and is not replaced; give another file"
    assert stat.S_IFMT(path.stat().st_mode) == before
    assert os.listdir(tmp_path) == ["target"]


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere/file")
    write_file(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "file").read_text() == "x"


def test_the_longest_name_that_the_file_system_takes_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    write_file(path, "x")
    assert path.read_text() == "x"


@pytest.mark.parametrize(
    ("name", "reason"),
    [("n" * 256, "File name too long"), ("absent/a", "No such file or directory"), ("file/a", "Not a directory")],
)
def test_a_refusal_names_the_path_and_the_reason(name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as refused:
        write_file(tmp_path / name, "x")
    assert str(refused.value) == f"{tmp_path / name}: cannot be written ({reason})"
