"""Import a user's pictures with captions, instructions or questions as shards: `spar-scale data import`.

Two forms of input: files whose names belong together (`img_001.jpg`, `img_001.txt`), at any depth of the folder; or one
table (`captions.csv` with a header, or `captions.jsonl`) whose pictures are paths in the folder. `tables.FORMS` has the
names and columns of each task. The bytes of a picture are copied unchanged unless it must be shrunk. Samples are
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from parallel.errors import UserError, nearest
from spar_scale.data.captions import Found, find_samples
from spar_scale.data.images import BadSample, Picture, read_picture
from spar_scale.data.left_out import NAME_CHARACTERS, NAMED, LeftOut, printable
from spar_scale.data.prompts import TOKENS, miniature_text
from spar_scale.data.shards import write_shard
from spar_scale.data.tables import FORMS, Form

SHARD_SAMPLES, SHARD_BYTES = 1000, 1 << 28
_EXPECTED = {
    "generation": "a sample is a picture with a text file of the same name; --task takes edits or questions instead",
    "editing": "a sample is NAME.input.jpg and NAME.output.jpg with the instruction in NAME.txt",
    "questions": "a sample is a picture with at least one row of the table",
}
"""Task -> what is missing in a folder without samples."""


@dataclass
class ImportResult:
    """The numbers of shards, samples and samples with transparent pixels of an import, and what was left out.

    `unknown` maps each word outside the miniature's vocabulary to the number of samples with it; `with_unknown` counts
    the samples with any such word.
    """

    shards: int = 0
    samples: int = 0
    transparent: int = 0
    left_out: LeftOut = field(default_factory=LeftOut)
    unknown: Counter[str] = field(default_factory=Counter)
    with_unknown: int = 0


def import_folder(
    folder: Path, out: Path, size: int | None = None, check_words: bool = False, task: str = "generation"
) -> str:
    """Write the samples of `folder` for a task of `FORMS` as shards under `out`; return a report.

    Pictures whose shorter side exceeds `size` pixels are shrunk to it. Raises UserError for a folder without samples,
    an `out` that is not empty, and a table that cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a folder with pictures and their texts")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists and is not empty; give --out a new or empty folder")
    result, form = ImportResult(), FORMS[task]
    found = list(find_samples(folder.resolve(), form, result.left_out))
    samples = _samples(_questions_together(found) if len(form.texts) > 1 else found, result, size, check_words)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        _write(samples, temporary, result)
        if not result.samples:
            raise UserError(f"{folder}: holds no sample{result.left_out.report()}\n{_EXPECTED[task]}")
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _report(out, form, result, check_words)


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


def _questions_together(found: list[Found]) -> list[Found]:
    """Return one sample for each picture, with the texts of all its rows in their order."""
    together: dict[str, Found] = {}
    for one in found:
        before = together.get(one.name)
        together[one.name] = one if before is None else replace(one, texts=before.texts + one.texts)
    return list(together.values())


def _samples(found: list[Found], result: ImportResult, size: int | None, check_words: bool) -> Iterator[dict[str, Any]]:
    """Yield samples in the form that `write_shard` takes, each key once."""
    seen: dict[str, str] = {}
    for one in found:
        key = sample_key(one.name)
        if key in seen:
            result.left_out.add("duplicate key", one.name, f"as {seen[key]}")
            continue
        pictures = _pictures(one, result, size)
        if pictures is None:
            continue
        seen[key] = one.name
        if check_words:
            unknown = {word for text in one.texts for word in text.split() if word not in TOKENS}
            result.unknown.update(unknown)
            result.with_unknown += bool(unknown)
        yield {"__key__": key, **pictures, **_text_member(one.texts)}


def _pictures(one: Found, result: ImportResult, size: int | None) -> dict[str, bytes] | None:
    """Return the members of a sample's pictures, or None, with a note, if one of them cannot be read."""
    members, transparent = {}, False
    for prefix, file in one.files.items():
        try:
            data = file.read_bytes()
            picture = read_picture(data)
            extension, stored = _stored(picture, data, size)
        except (BadSample, OSError) as error:
            name = one.name if len(one.files) == 1 else f"{prefix[:-1]} of {one.name}"
            result.left_out.add("unreadable image", name, getattr(error, "strerror", None) or str(error))
            return None
        members[f"{prefix}{extension}"] = stored
        transparent = transparent or picture.transparent
    result.transparent += transparent
    return members


def _text_member(texts: tuple[str, ...]) -> dict[str, bytes]:
    """Return the member with a sample's text; of questions with answers, in turns, a json that lists them."""
    if len(texts) == 1:
        return {"txt": texts[0].encode()}
    pairs = zip(texts[::2], texts[1::2], strict=True)
    listed = [{"type": "question", "question": question, "answer": answer} for question, answer in pairs]
    return {"json": json.dumps({"questions": listed}, ensure_ascii=False).encode()}


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


def _report(out: Path, form: Form, result: ImportResult, check_words: bool) -> str:
    shards = "1 shard" if result.shards == 1 else f"{result.shards} shards"
    lines = [f"{printable(str(out))}: {result.samples} samples in {shards}{result.left_out.report()}"]
    if result.transparent:
        lines.append(f"  pictures with transparency, composited over white: {result.transparent}")
    if check_words:
        lines.append(f"  samples with words outside the miniature's vocabulary: {result.with_unknown}")
        lines += [
            f"    '{printable(word, NAME_CHARACTERS)}' in {number}{nearest(word, miniature_text().words)}"
            for word, number in result.unknown.most_common(NAMED)
        ]
    where = "phase bootstrap/mllm" if form.task == "questions" else "training stage align"
    lines += [
        f"to train on them, add to a recipe of {where}:",
        "data:",
        "  sources:",
        f"    - {{name: {form.task}, shards: {json.dumps(str(out / 'images-*.tar'))}, weight: 1.0}}",
    ]
    return "\n".join(lines)
