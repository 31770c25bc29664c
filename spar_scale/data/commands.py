"""Bodies of `spar-scale data make | index | show`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from parallel.errors import UserError
from spar_scale.data.images import EXTENSIONS, BadSample, decode
from spar_scale.data.left_out import NAME_CHARACTERS, printable
from spar_scale.data.shapes_world import World
from spar_scale.data.storage import expand_shards, read_member, shard_bytes
from spar_scale.data.tar_index import (
    ShardIndex,
    check_fresh,
    index_shard,
    read_header,
    read_index,
    separate_index_path,
    write_index,
)
from spar_scale.data.tasks import READ_EXTENSIONS
from spar_scale.files.outputs import check_picture, write_picture

MAX_LISTED = 10  # extensions that a line names
COLUMNS, CELL, CAPTION = 8, 128, 28  # a contact sheet: images per row, pixels per side, pixels for the text


def make(config: World, out: Path) -> None:
    """Write the miniature world's shards under `out`, and print how many samples they hold."""
    from spar_scale.data.shards import make_world

    shards = make_world(config, out)
    samples = Counter[str]()
    for shard in shards:
        samples[shard.name.rsplit("-", 1)[0]] += read_header(str(shard)).samples
    _print(f"{out}: {', '.join(f'{name} {number}' for name, number in samples.items())} in {len(shards)} shards")


def index(paths: list[str]) -> None:
    """Write the index of every shard that the paths or patterns match, and print which members are not used."""
    for shard in expand_shards(paths):
        shard_index = index_shard(shard)
        path = write_index(shard, shard_index, separate_index_path(shard))
        _print(f"{path}: {len(shard_index)} samples with {_extensions(shard_index)}")
        for line in _unread(shard_index):
            _print(f"  {line}")
        if shard_index.left_out.names:
            _print(shard_index.left_out.report().removeprefix("\n"))


def show(paths: list[str], count: int, out: Path | None) -> None:
    """Print a summary of each shard and its first `count` texts; with `out`, write their images as a contact sheet."""
    if count < 0:
        raise UserError(f"count is {count}; it must be at least 0")
    if out is not None:
        check_picture(out)
    cells = []
    for shard in expand_shards(paths):
        index = read_index(shard)
        check_fresh(shard, index.tar_bytes, shard_bytes(shard))
        _print(f"{shard}: {len(index)} samples with {_extensions(index)}, {index.tar_bytes / 1e6:.1f} MB")
        for sample in range(min(count, len(index))):
            table = index.members(sample)
            text = _text(shard, table)
            _print(f"  {printable(index.keys[sample], NAME_CHARACTERS)}: {printable(text, len(text))}")
            pictures = [name for name in table if name.rsplit(".", 1)[-1] in EXTENSIONS]
            cells += [(read_member(shard, *table[name]), text, _shown(name)) for name in pictures]
    if out is not None:
        _contact_sheet(cells, out)
        _print(f"{out}: {len(cells)} images")


def _print(line: str) -> None:
    """Print a line; escape characters that the output's encoding does not have."""
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding))


def _shown(extension: str) -> str:
    return printable(extension, NAME_CHARACTERS) or "(no extension)"


def _extensions(index: ShardIndex) -> str:
    return _list([_shown(name) for name in index.extensions])


def _unread(index: ShardIndex) -> list[str]:
    """Return a line on the indexed members that no task reads, such as pictures of other types."""
    counts = np.bincount(index.extension, minlength=len(index.extensions)).tolist()
    unread = [
        f"{_shown(name)} ({count})"
        for name, count in zip(index.extensions, counts, strict=True)
        if name not in READ_EXTENSIONS
    ]
    if not unread:
        return []
    read = f"pictures are read as {', '.join(EXTENSIONS)}, texts as txt, json or what data.sources[].text names"
    return [f"no task reads: {_list(unread)}; {read}"]


def _list(names: list[str]) -> str:
    return ", ".join(names[:MAX_LISTED]) + (f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else "")


def _text(shard: str, table: dict[str, tuple[int, int, int]]) -> str:
    if "txt" in table:
        return read_member(shard, *table["txt"]).decode("utf-8-sig", errors="replace").strip()
    if "json" in table:
        try:
            return json.dumps(json.loads(read_member(shard, *table["json"])))[:200]
        except (ValueError, RecursionError):
            return "(json that cannot be read)"
    return "(no text)"


def _contact_sheet(cells: list[tuple[bytes, str, str]], out: Path) -> None:
    from PIL import Image, ImageDraw

    if not cells:
        raise UserError(f"{out}: nothing to draw; the samples hold no image")
    rows = -(-len(cells) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (CELL + 4), rows * (CELL + CAPTION)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (data, text, name) in enumerate(cells):
        x, y = number % COLUMNS * (CELL + 4), number // COLUMNS * (CELL + CAPTION)
        try:
            image = decode(data)
            image.thumbnail((CELL, CELL))
            scale = CELL // max(image.size)
            sheet.paste(image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST), (x, y))
        except BadSample as error:
            text = f"bad: {error}"
        text = f"{name.removesuffix('.png')}: {text}" if "." in name else text
        words = text.split()
        while words:  # wraps the text by its width in pixels, until the caption area is full
            taken = next((n for n in range(len(words), 0, -1) if pen.textlength(" ".join(words[:n])) <= CELL), 1)
            if y + CELL + 10 > number // COLUMNS * (CELL + CAPTION) + CELL + CAPTION:
                break
            pen.text((x, y + CELL), " ".join(words[:taken]), fill="black")
            words, y = words[taken:], y + 11
    write_picture(sheet, out)
