"""A person's own pictures and captions as shards: `spar-scale data import`.

Two forms are read: pictures with a text file of the same name beside them (`img_001.jpg`, `img_001.txt`), at any depth
of the folder, or one table (`captions.csv` with a header, or `captions.jsonl`) with the columns `image` and `caption`,
whose images are paths in the folder. The bytes of a picture stay as they are unless it is to be shrunk. Samples stand
in the order of their names; nothing outside the folder is read, and what cannot be trained on is left out and named.
Pictures of one name and different extensions would be one sample, so the first of them is taken.
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
from spar_scale.data.prompts import TOKENS, WORDS
from spar_scale.data.shards import write_shard

SHARD_SAMPLES, SHARD_BYTES = 1000, 1 << 28


@dataclass
class Imported:
    """What became of a folder: shards, samples, what was left out, and samples with transparent pixels.

    `unknown` counts the captions with each word that the miniature does not know, `with_unknown` those with any.
    """

    shards: int = 0
    samples: int = 0
    transparent: int = 0
    left_out: LeftOut = field(default_factory=LeftOut)
    unknown: Counter[str] = field(default_factory=Counter)
    with_unknown: int = 0


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
    samples = _samples(list(find_pairs(folder.resolve(), found.left_out)), found, size, check_words)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        _write(samples, temporary, found)
        if not found.samples:
            raise UserError(
                f"{folder}: holds no sample{found.left_out.report()}\na sample is a picture with a text of its name"
            )
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _report(out, found, check_words)


def _write(samples: Iterator[dict[str, Any]], folder: Path, found: Imported) -> None:
    """Write shards of at most SHARD_SAMPLES and about SHARD_BYTES, which are held in memory."""
    pending: list[dict[str, Any]] = []
    held_bytes = 0

    def flush() -> None:
        nonlocal held_bytes
        write_shard(folder / f"images-{found.shards:05d}.tar", iter(pending))
        found.shards, found.samples = found.shards + 1, found.samples + len(pending)
        pending.clear()
        held_bytes = 0

    for sample in samples:
        pending.append(sample)
        held_bytes += sum(len(value) for value in sample.values())
        if len(pending) == SHARD_SAMPLES or held_bytes > SHARD_BYTES:
            flush()
    if pending:
        flush()


def _samples(pairs: list[Pair], found: Imported, size: int | None, check_words: bool) -> Iterator[dict[str, Any]]:
    """Samples as they are written, each key once."""
    seen: dict[str, str] = {}
    for pair in pairs:
        key = sample_key(pair.name)
        if key in seen:
            found.left_out.add("duplicate key", pair.name, f"as {seen[key]}")
            continue
        try:
            data = pair.file.read_bytes()
            picture = read_picture(data)
            extension, data = _stored(picture, data, size)
        except (BadSample, OSError) as error:
            found.left_out.add("unreadable image", pair.name, getattr(error, "strerror", None) or str(error))
            continue
        seen[key] = pair.name
        found.transparent += picture.transparent
        if check_words:
            unknown = {word for word in pair.caption.split() if word not in TOKENS}
            found.unknown.update(unknown)
            found.with_unknown += bool(unknown)
        yield {"__key__": key, extension: data, "txt": pair.caption.encode()}


def sample_key(name: str) -> str:
    """Return the key of a file name without its extension: different names give different keys.

    Letters, marks and digits of every script, '_' and '-' stay; each byte of the rest ('/', '.', spaces, '%') is
    percent-encoded as in URLs. So a key has no dot, at which webdataset ends it, and no folder.
    """
    return "".join(
        sign
        if sign in "_-" or unicodedata.category(sign)[0] in "LMN"
        else "".join(f"%{byte:02X}" for byte in sign.encode())
        for sign in os.path.splitext(name)[0]
    )


def _stored(picture: Picture, data: bytes, size: int | None) -> tuple[str, bytes]:
    """The extension and bytes of a picture in a shard: as they are, or of a smaller picture as PNG."""
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


def _report(out: Path, found: Imported, check_words: bool) -> str:
    shards = "1 shard" if found.shards == 1 else f"{found.shards} shards"
    lines = [f"{printable(str(out))}: {found.samples} samples in {shards}{found.left_out.report()}"]
    if found.transparent:
        lines.append(f"  pictures with transparency, laid over white: {found.transparent}")
    if check_words:
        lines.append(f"  captions with words that the miniature does not know: {found.with_unknown}")
        lines += [
            f"    '{printable(word, NAME_CHARACTERS)}' in {number}{nearest(word, WORDS)}"
            for word, number in found.unknown.most_common(NAMED)
        ]
    lines += [
        "to train on them, in a recipe of stage align:",
        "data:",
        "  sources:",
        f"    - {{name: generation, shards: {json.dumps(str(out / 'images-*.tar'))}, weight: 1.0}}",
    ]
    return "\n".join(lines)
