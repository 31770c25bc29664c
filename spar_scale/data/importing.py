"""A person's own pictures and captions as shards: `spar-scale data import`.

Two forms are read: pictures with a text file of the same name beside them (`img_001.jpg`, `img_001.txt`), at any depth
of the folder, or one table (`captions.csv` with a header, or `captions.jsonl`) with the columns `image` and `caption`,
whose images are paths in the folder. The bytes of a picture stay as they are unless it is to be shrunk. Samples stand
in the order of their names; nothing outside the folder is read, and what cannot be trained on is left out and named.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parallel.errors import UserError, nearest
from spar_scale.data.images import EXTENSIONS, BadSample, decode
from spar_scale.data.prompts import TOKENS, WORDS
from spar_scale.data.shards import write_shard

COLUMNS = ("image", "caption")
TABLES = ("captions.csv", "captions.jsonl")
SHARD_SAMPLES, SHARD_BYTES = 1000, 1 << 28
NAMED = 5  # of what is left out for one reason


@dataclass
class Imported:
    """What became of a folder: the number of its shards and samples, and reason -> names of what was left out."""

    shards: int = 0
    samples: int = 0
    left_out: dict[str, list[str]] = field(default_factory=dict)
    unknown: Counter[str] = field(default_factory=Counter)
    with_unknown: int = 0

    def leave_out(self, reason: str, name: str) -> None:
        """Note what was left out."""
        self.left_out.setdefault(reason, []).append(name)


def import_folder(folder: Path, out: Path, size: int | None = None, check_words: bool = False) -> str:
    """Write the pictures and captions of `folder` as shards under `out`; return what to say of it.

    `size` shrinks pictures whose shorter side is longer (pixels). Raises UserError for a folder without a sample,
    an `out` that holds anything, and a table that cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; it must hold pictures and their captions")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there and not empty; --out names a folder that is new or empty")
    found = Imported()
    samples = _samples(list(_pairs(folder.resolve(), found)), found, size, check_words)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        _write(samples, temporary, found)
        if not found.samples:
            raise UserError(
                f"{folder}: holds no sample{_reasons(found)}\na sample is a picture with a text of its name"
            )
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _said(out, found, check_words)


def _write(samples: Iterator[dict[str, Any]], folder: Path, found: Imported) -> None:
    """Write shards of at most SHARD_SAMPLES and about SHARD_BYTES, which are held in memory."""
    pending: list[dict[str, Any]] = []

    def flush() -> None:
        write_shard(folder / f"images-{found.shards:05d}.tar", iter(pending))
        found.shards, found.samples = found.shards + 1, found.samples + len(pending)
        pending.clear()

    for sample in samples:
        pending.append(sample)
        held = sum(len(value) for each in pending for value in each.values())
        if len(pending) == SHARD_SAMPLES or held > SHARD_BYTES:
            flush()
    if pending:
        flush()


def _pairs(folder: Path, found: Imported) -> Iterator[tuple[str, Path, str]]:
    """(name in the folder, file, caption) of each picture that has one."""
    tables = [table for name in TABLES if (table := folder / name).is_file()]
    if len(tables) > 1:
        raise UserError(f"{folder}: holds {' and '.join(TABLES)}; one of them says which pictures are meant")
    if tables and not tables[0].resolve().is_relative_to(folder):
        raise UserError(f"{tables[0]}: is a link to outside of the folder")
    rows = _rows(tables[0]) if tables else _beside(folder, found)
    for name, caption in rows:
        file = (folder / name).resolve()
        if not file.is_relative_to(folder):
            found.leave_out("outside of the folder", name)
        elif not file.is_file():
            found.leave_out("no such file", name)
        elif not caption.strip():
            found.leave_out("no text", name)
        else:
            yield name, file, caption.strip()


def _beside(folder: Path, found: Imported) -> Iterator[tuple[str, str]]:
    """Pictures by name, each with the text beside it. Folders that are links are not walked into."""
    names = [
        Path(where, name).relative_to(folder).as_posix()
        for where, _, files in os.walk(folder)
        for name in files
        if name.rsplit(".", 1)[-1].lower() in EXTENSIONS and not name.startswith(".")
    ]
    for name in sorted(names):
        text = (folder / name).with_suffix(".txt")
        if not text.resolve().is_relative_to(folder):
            found.leave_out("outside of the folder", text.relative_to(folder).as_posix())
            continue
        try:
            yield name, text.read_text(encoding="utf-8-sig") if text.is_file() else ""
        except (OSError, UnicodeDecodeError):
            found.leave_out("its text is no UTF-8", name)


def _rows(table: Path) -> Iterator[tuple[str, str]]:
    """The rows of a table, in its order."""
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            rows = (
                csv.DictReader(file)
                if table.suffix.lower() == ".csv"
                else (json.loads(line) for line in file if line.strip())
            )
            for number, row in enumerate(rows, 1):
                if not isinstance(row, dict) or not all(isinstance(row.get(column), str) for column in COLUMNS):
                    columns = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
                    raise UserError(f"{table}: row {number} has {columns}; it must have the texts image and caption")
                yield row["image"], row["caption"]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{table}: cannot be read ({error})") from None


def _samples(
    pairs: list[tuple[str, Path, str]], found: Imported, size: int | None, check_words: bool
) -> Iterator[dict[str, Any]]:
    """Samples as they are written, under keys that are safe in a tar and stand once."""
    seen: dict[str, str] = {}
    for name, file, caption in pairs:
        key = re.sub(r"[^A-Za-z0-9_-]+", "-", name.rpartition(".")[0]).strip("-") or "image"
        if key in seen:
            found.leave_out("duplicate key", f"{name} (as {seen[key]})")
            continue
        try:
            data = file.read_bytes()
            extension, data = _picture(data, size)
        except (BadSample, OSError) as error:
            found.leave_out("unreadable image", f"{name} ({error})")
            continue
        seen[key] = name
        if check_words:
            unknown = {word for word in caption.split() if word not in TOKENS}
            found.unknown.update(unknown)
            found.with_unknown += bool(unknown)
        yield {"__key__": key, extension: data, "txt": caption.encode()}


def _picture(data: bytes, size: int | None) -> tuple[str, bytes]:
    """The extension that the bytes call for, and the bytes: as they are, or of a smaller picture as PNG."""
    from PIL import Image

    picture = decode(data)
    if min(picture.size) < 2:
        raise BadSample(f"{picture.width}x{picture.height} pixels; both edges need at least 2")
    if size is None or min(picture.size) <= size:
        with Image.open(io.BytesIO(data)) as opened:
            return {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}[str(opened.format)], data
    scale = size / min(picture.size)
    smaller = picture.resize((max(size, round(picture.width * scale)), max(size, round(picture.height * scale))))
    buffer = io.BytesIO()
    smaller.save(buffer, "png")
    return "png", buffer.getvalue()


def _reasons(found: Imported) -> str:
    """What was left out, by reason, with the first few names."""
    said = ""
    for reason, names in found.left_out.items():
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        said += f"\n  left out, {reason}: {len(names)} ({', '.join(names[:NAMED])}{more})"
    return said


def _said(out: Path, found: Imported, check_words: bool) -> str:
    shards = "1 shard" if found.shards == 1 else f"{found.shards} shards"
    lines = [f"{out}: {found.samples} samples in {shards}{_reasons(found)}"]
    if check_words:
        lines.append(f"  captions with words that the miniature does not know: {found.with_unknown}")
        lines += [
            f"    '{word}' in {number}{nearest(word, WORDS)}" for word, number in found.unknown.most_common(NAMED)
        ]
    lines += [
        "to train on them, in a recipe of stage align:",
        "data:",
        "  sources:",
        f"    - {{name: generation, shards: {json.dumps(str(out / 'images-*.tar'))}, weight: 1.0}}",
    ]
    return "\n".join(lines)
