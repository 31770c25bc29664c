"""Find the samples in a folder, pictures with their texts, and note every file that gives none.

A caption is in a text file with the picture's name, or in one table for the whole folder. The text file has exactly the
picture's name, or is the only one whose name differs in the case of the extension or in the Unicode normal form. An
edit is NAME.input.jpg, NAME.output.jpg and its instruction in NAME.txt, or a row of a table. Questions with answers,
several to a picture, are rows of a table.
"""

from __future__ import annotations

import functools
import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from parallel.errors import UserError
from spar_scale.data.images import EXTENSIONS
from spar_scale.data.left_out import LeftOut, is_utf8
from spar_scale.data.tables import Form, read_table

READ = {*EXTENSIONS, "apng", "jfif", "jpe", "mpo"}  # files of these extensions are PNG, JPEG or WebP
NOT_READ = {
    "avif", "bmp", "cr2", "cr3", "dib", "dng", "exr", "gif", "hdr", "heic", "heif", "ico", "j2k", "jp2", "jxl", "nef",
    "orf", "pbm", "pgm", "pnm", "ppm", "psd", "raf", "rw2", "svg", "tga", "tif", "tiff",
}  # fmt: skip
_ADDRESS = re.compile(r"data:|[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class Found:
    """A sample: `name` is the path of its last picture relative to the folder, with '/', without the column's name.

    `files` maps the prefix of a picture's member to its file; `texts` has a text for each of the form's text columns.
    """

    name: str
    files: dict[str, Path]
    texts: tuple[str, ...]


def find_samples(folder: Path, form: Form, left_out: LeftOut) -> Iterator[Found]:
    """Yield the samples of a folder (a path without links) in the table's order, or by name if there is no table.

    Raises UserError for two tables, a table outside the folder or that cannot be read, and none where one must be.
    """
    tables = [table for name in form.tables if (table := folder / name).is_file()]
    if len(tables) > 1:
        raise UserError(f"{folder}: holds {' and '.join(form.tables)}, expected one table; remove the other")
    if tables and not _is_inside(folder, tables[0]):
        raise UserError(f"{tables[0]}: is a link to a file outside the folder")
    if not tables and len(form.texts) > 1:
        raise UserError(
            f"{folder}: holds no {' or '.join(form.tables)}; expected a table with the columns"
            f" {', '.join(form.columns)}"
        )
    spellings = _Spellings(folder)
    for row in read_table(tables[0], form, left_out) if tables else _read_files(folder, form, left_out):
        files = {column: _locate(folder, row[column], spellings) for column in form.pictures}
        lost = next((column for column, file in files.items() if isinstance(file, str)), None)
        last, texts = row[list(form.pictures)[-1]], [row[column] for column in form.texts]
        if lost is not None:
            left_out.add(str(files[lost]), row[lost])
        elif not all(text.strip() for text in texts):
            left_out.add("no text", last)
        elif any("\0" in text for text in texts):
            left_out.add("its text holds NUL characters", last)
        else:
            found = {form.pictures[column]: file for column, file in files.items() if isinstance(file, Path)}
            yield Found(_name(folder, form, list(found.values())[-1]), found, tuple(text.strip() for text in texts))


def _name(folder: Path, form: Form, last: Path) -> str:
    """Return the name of a sample: of `a.output.jpg` it is `a.jpg`, for each column has its name."""
    stem, extension = os.path.splitext(_relative(folder, last))
    sample, column = _parted(stem, form)
    return (sample if column else stem) + extension


def _parted(stem: str, form: Form) -> tuple[str, str | None]:
    """Return the sample's part of a picture's name without extension, and its column; (stem, None) if it names none."""
    if len(form.pictures) == 1:
        return stem, next(iter(form.pictures))
    sample, _, column = stem.rpartition(".")
    return (sample, column.lower()) if sample and column.lower() in form.pictures else (stem, None)


def _locate(folder: Path, name: str, spellings: _Spellings) -> Path | str:
    """Return the path of a picture below the folder, or the reason why there is none."""
    try:
        for spelling in filter(None, (name, spellings.other(name))):
            file = folder / spelling
            if not _is_inside(folder, file):
                return "outside the folder"
            if file.is_file():
                return file
            if file.exists():
                return "not a regular file"
    except (OSError, ValueError) as error:  # too long, or with a NUL
        if not _ADDRESS.match(name):
            return f"name refused by the file system ({getattr(error, 'strerror', None) or error})"
    return "an address instead of a file name" if _ADDRESS.match(name) else "no such file"


def _relative(folder: Path, file: Path) -> str:
    """Return a file's path relative to the folder, without './' and '..'; links inside the folder are not resolved."""
    plain = Path(os.path.normpath(file))
    inside = plain if plain.is_relative_to(folder) else Path(os.path.realpath(file))
    return inside.relative_to(folder).as_posix()


def _is_inside(folder: Path, path: Path) -> bool:
    """Return whether a path is in the folder after resolving links."""
    # os.path.realpath, because Path.resolve raises for a loop of links (Python 3.11).
    return Path(os.path.realpath(path)).is_relative_to(folder)


class _Spellings:
    """A file whose name has another Unicode normal form: macOS stores accents separately (NFD), others NFC."""

    def __init__(self, folder: Path):
        self._folder = folder

    def other(self, name: str) -> str | None:
        """Return the only file of the folder that differs from `name` just in the encoding of accents, else None."""
        if name.isascii() or (self._folder / name).exists():
            return None
        matches = self._by_nfc.get(_nfc(os.path.normpath(name)), [])
        return matches[0] if len(matches) == 1 else None

    @functools.cached_property
    def _by_nfc(self) -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for name in _walk(self._folder, LeftOut()):
            names.setdefault(_nfc(name), []).append(name)
        return names


def _walk(folder: Path, left_out: LeftOut) -> Iterator[str]:
    """Yield the paths of all files except hidden ones; note folders that are links or cannot be read."""

    def unreadable(error: OSError) -> None:
        left_out.add("folder that cannot be read", os.path.relpath(error.filename, folder), error.strerror or "")

    for where, folders, files in os.walk(folder, onerror=unreadable):
        # In place, so that os.walk skips them. A folder such as .ipynb_checkpoints holds copies of the pictures.
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in sorted(folders):
            if os.path.islink(os.path.join(where, name)):
                left_out.add("folder that is a link", Path(where, name).relative_to(folder).as_posix())
        for name in files:
            if not name.startswith("."):
                yield Path(where, name).relative_to(folder).as_posix()


def _read_files(folder: Path, form: Form, left_out: LeftOut) -> Iterator[dict[str, str]]:
    """Yield samples as rows of a table, by name, each text from its text file; note every file that gives no sample."""
    names = _utf8_names(folder, left_out)
    texts: dict[str, list[str]] = {}
    for name in names:
        if _extension(name) == "txt":
            texts.setdefault(_nfc(_stem(name)), []).append(name)
    pictures = [name for name in names if _extension(name) in READ]
    used: set[str | None] = set()
    described = set(texts)
    for sample, row in _group(pictures, form, left_out):
        text = _text_of(sample, texts.get(_nfc(sample), []))
        used.add(text)
        described.discard(_nfc(sample))
        if missing := [column for column in form.pictures if column not in row]:
            left_out.add(f"no {missing[0]} picture", *row.values())
            continue
        content = _content(folder, list(row.values())[-1], text, left_out)
        if content is not None:
            yield {**row, form.texts[0]: content}
    for name in names:
        extension, sample = _extension(name), _nfc(_parted(_stem(name), form)[0])
        if extension in NOT_READ or (sample in described and extension not in {"txt", *READ}):
            left_out.add("picture type not read" if extension in NOT_READ else "file type not read", name)
            used.update(texts.get(sample, []))
    for name in names:
        if _extension(name) == "txt" and name not in used:
            left_out.add("text without a picture", name)


def _group(pictures: list[str], form: Form, left_out: LeftOut) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each sample's name without extension, and its pictures by column; note pictures of no column."""
    rows: dict[str, tuple[str, dict[str, str]]] = {}
    for name in pictures:
        sample, column = _parted(_stem(name), form)
        if column is None:
            left_out.add(f"its name does not end in {' or '.join(f'.{one}' for one in form.pictures)}", name)
            continue
        if len(form.pictures) == 1:
            yield sample, {column: name}
            continue
        _, row = rows.setdefault(_nfc(sample), (sample, {}))
        if row.setdefault(column, name) != name:
            left_out.add("duplicate key", name, f"as {row[column]}")
    yield from rows.values()


def _utf8_names(folder: Path, left_out: LeftOut) -> list[str]:
    """Return the sorted paths of the visible files; note pictures and texts whose names are not UTF-8."""
    names = []
    for name in sorted(_walk(folder, left_out)):
        if is_utf8(name):
            names.append(name)
        elif _extension(name) in READ | NOT_READ | {"txt"}:
            left_out.add("file name is not UTF-8", name)
    return names


def _text_of(sample: str, texts: list[str]) -> str | None:
    """Choose a sample's text file among those with its name: the exact name, else the only candidate, such as .TXT."""
    exact = f"{sample}.txt"
    return exact if exact in texts else texts[0] if len(texts) == 1 else None


def _content(folder: Path, picture: str, text: str | None, left_out: LeftOut) -> str | None:
    """Return the text of a picture: '' if it has no text file; None, with a note, if the file cannot be used."""
    if text is None:
        return ""
    try:
        if not _is_inside(folder, folder / text):
            left_out.add("outside the folder", text)
            return None
        return (folder / text).read_bytes().decode("utf-8-sig") if (folder / text).is_file() else ""
    except UnicodeDecodeError:
        left_out.add("its text is not UTF-8", picture)
    except OSError as error:
        left_out.add("its text cannot be read", picture, error.strerror or str(error))
    return None


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _extension(name: str) -> str:
    return os.path.splitext(name)[1][1:].lower()
