"""Import a user's pictures and captions as shards: `spar-scale data import`.

Two forms of input: pictures with a text file of the same name beside them (`img_001.jpg`, `img_001.txt`), at any depth
of the folder; or one table (`captions.csv` with a header, or `captions.jsonl`) with the columns `image` and `caption`,
whose images are paths in the folder. The bytes of a picture are copied unchanged unless it must be shrunk. Samples are
sorted by name. Nothing outside the folder is read. Files that cannot be trained on are left out and reported. Pictures
that differ only in the extension would be one sample, so only the first is used.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parallel.errors import UserError, nearest
from spar_scale.data.captions import Pair, find_pairs
from spar_scale.data.images import BadSample, Picture, read_picture
from spar_scale.data.left_out import NAME_CHARACTERS, NAMED, LeftOut, printable
from spar_scale.data.prompts import TOKENS, miniature_text
from spar_scale.data.shards import write_shard

SHARD_SAMPLES, SHARD_BYTES = 1000, 1 << 28


@dataclass
class ImportResult:
    """The numbers of shards, samples and samples with transparent pixels of an import, and what was left out.

    `unknown` maps each word outside the miniature's vocabulary to the number of captions with it; `with_unknown` counts
    the captions with any such word.
    """

    shards: int = 0
    samples: int = 0
    transparent: int = 0
    left_out: LeftOut = field(default_factory=LeftOut)
    unknown: Counter[str] = field(default_factory=Counter)
    with_unknown: int = 0


def import_folder(folder: Path, out: Path, size: int | None = None, check_words: bool = False) -> str:
    """Write the pictures and captions of `folder` as shards under `out`; return a report.

    Pictures whose shorter side exceeds `size` pixels are shrunk to it. Raises UserError for a folder without samples,
    an `out` that is not empty, and a table that cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a folder with pictures and their captions")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists and is not empty; give --out a new or empty folder")
    result = ImportResult()
    samples = _samples(list(find_pairs(folder.resolve(), result.left_out)), result, size, check_words)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        _write(samples, temporary, result)
        if not result.samples:
            raise UserError(
                f"{folder}: holds no sample{result.left_out.report()}\n"
                "a sample is a picture with a text file of the same name"
            )
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _report(out, result, check_words)


def _write(samples: Iterator[dict[str, Any]], folder: Path, result: ImportResult) -> None:
    """Write shards of at most SHARD_SAMPLES samples and about SHARD_BYTES; one shard at a time is held in memory."""
    pending: list[dict[str, Any]] = []
    held_bytes = 0

    def flush() -> None:
        nonlocal held_bytes
        write_shard(folder / f"images-{result.shards:05d}.tar", iter(pending))
        result.shards, result.samples = result.shards + 1, result.samples + len(pending)
        pending.clear()
        held_bytes = 0

    for sample in samples:
        pending.append(sample)
        held_bytes += sum(len(value) for value in sample.values())
        if len(pending) == SHARD_SAMPLES or held_bytes > SHARD_BYTES:
            flush()
    if pending:
        flush()


def _samples(pairs: list[Pair], result: ImportResult, size: int | None, check_words: bool) -> Iterator[dict[str, Any]]:
    """Yield samples in the form that `write_shard` takes, each key once."""
    seen: dict[str, str] = {}
    for pair in pairs:
        key = sample_key(pair.name)
        if key in seen:
            result.left_out.add("duplicate key", pair.name, f"as {seen[key]}")
            continue
        try:
            data = pair.file.read_bytes()
            picture = read_picture(data)
            extension, data = _stored(picture, data, size)
        except (BadSample, OSError) as error:
            result.left_out.add("unreadable image", pair.name, getattr(error, "strerror", None) or str(error))
            continue
        seen[key] = pair.name
        result.transparent += picture.transparent
        if check_words:
            unknown = {word for word in pair.caption.split() if word not in TOKENS}
            result.unknown.update(unknown)
            result.with_unknown += bool(unknown)
        yield {"__key__": key, extension: data, "txt": pair.caption.encode()}


def sample_key(name: str) -> str:
    """Return the sample key of a file name without its extension; different names give different keys.

    Letters, marks and digits of every script, '_' and '-' are kept. Every other byte ('/', '.', space, '%') is
    percent-encoded as in URLs. So a key has no dot, where webdataset would end it, and no folder.
    """
    return "".join(
        sign
        if sign in "_-" or unicodedata.category(sign)[0] in "LMN"
        else "".join(f"%{byte:02X}" for byte in sign.encode())
        for sign in os.path.splitext(name)[0]
    )


def _stored(picture: Picture, data: bytes, size: int | None) -> tuple[str, bytes]:
    """Return the extension and bytes to store for a picture: unchanged, or shrunk and encoded as PNG."""
    image = picture.image
    if min(image.size) < 2:
        raise BadSample(f"{image.width}x{image.height} pixels; both edges need at least 2")
    if size is None or min(image.size) <= size:
        return picture.extension, data
    scale = size / min(image.size)
    smaller = image.resize((max(size, round(image.width * scale)), max(size, round(image.height * scale))))
    buffer = io.BytesIO()
    smaller.save(buffer, "png")
    return "png", buffer.getvalue()


def _report(out: Path, result: ImportResult, check_words: bool) -> str:
    shards = "1 shard" if result.shards == 1 else f"{result.shards} shards"
    lines = [f"{printable(str(out))}: {result.samples} samples in {shards}{result.left_out.report()}"]
    if result.transparent:
        lines.append(f"  pictures with transparency, composited over white: {result.transparent}")
    if check_words:
        lines.append(f"  captions with words outside the miniature's vocabulary: {result.with_unknown}")
        lines += [
            f"    '{printable(word, NAME_CHARACTERS)}' in {number}{nearest(word, miniature_text().words)}"
            for word, number in result.unknown.most_common(NAMED)
        ]
    lines += [
        "to train on them, add to a recipe of training stage align:",
        "data:",
        "  sources:",
        f"    - {{name: generation, shards: {json.dumps(str(out / 'images-*.tar'))}, weight: 1.0}}",
    ]
    return "\n".join(lines)
