"""Write the miniature world as webdataset tar shards with their indexes.

A folder holds one world. Its settings are written first (`world.json`, complete: false), then each shard and index
under a temporary name that is renamed, and `complete: true` last. So an interrupted run can be started again: it keeps
the complete shards, because the same settings give the same bytes.

Members of a sample: scenes and heldout {png, txt (one caption), json (all captions, questions, the
scene)}; edits and test-edits {input.png, output.png, txt (instruction), json (both sides' captions and scenes)}.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from parallel.errors import UserError
from parallel.files import write_file
from spar_scale.data.order import draw_generator
from spar_scale.data.shapes_language import captions, choose_caption, instruction, questions
from spar_scale.data.shapes_render import render
from spar_scale.data.shapes_world import World, sample_edit, sample_scene
from spar_scale.data.tar_index import index_path, index_shard, read_header, write_index

GENERATION = 1  # increase whenever the same settings give other bytes
SETTINGS = "world.json"
CHUNK = 200  # scenes drawn at a time
PURPOSES = {"scenes": "scenes", "heldout": "heldout", "edits": "edits", "test-edits": "heldout_edits"}
"""Purpose (used in the names of shards, keys and draws) -> the setting with its number of samples."""
_log = logging.getLogger(__name__)


def make_world(world: World, out_dir: Path) -> list[Path]:
    """Write the shards of a world under `out_dir`; return their paths. Does nothing if the same world exists there.

    Raises UserError if the folder holds shards of other settings (the message lists the differences) or cannot be
    written.
    """
    out_dir = Path(out_dir)
    shards = [path for purpose in PURPOSES for path in _shard_paths(world, out_dir, purpose)]
    if not shards:
        raise UserError("scenes, heldout, edits and heldout_edits are all 0; a world needs at least one sample")
    complete = _check_settings(world, out_dir)
    if complete and all(_is_complete(path) for path in shards):
        _log.info("%s: this world already exists (%d shards)", out_dir, len(shards))
        return shards
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out_dir}: cannot be created ({error.strerror})") from None
    _write_settings(world, out_dir, complete=False)
    for purpose in PURPOSES:
        for number, path in enumerate(_shard_paths(world, out_dir, purpose)):
            if not _is_complete(path):
                first = number * world.per_shard
                last = min(first + world.per_shard, getattr(world, PURPOSES[purpose]))
                chunks = (range(n, min(n + CHUNK, last)) for n in range(first, last, CHUNK))
                write_shard(path, (sample for chunk in chunks for sample in _samples(world, purpose, chunk)))
                _log.info("%s: %d samples", path, last - first)
    _write_settings(world, out_dir, complete=True)
    return shards


def _samples(world: World, purpose: str, numbers: range) -> Iterator[dict[str, Any]]:
    if purpose.endswith("edits"):
        yield from _edit_samples(world, purpose, numbers)
        return
    scenes = [sample_scene(world, purpose, number) for number in numbers]
    for number, scene, image in zip(numbers, scenes, render(scenes, world.size), strict=True):
        draws = draw_generator(world.seed, f"{purpose}/words", number)
        caption = choose_caption(scene, draws)
        record = {"captions": captions(scene), "questions": questions(scene, world, draws), "scene": scene.as_json()}
        members = {"png": _png(image), "txt": caption.encode(), "json": _json(record)}
        yield {"__key__": f"{purpose}-{number:08d}", **members}


def _edit_samples(world: World, purpose: str, numbers: range) -> Iterator[dict[str, Any]]:
    edits = [sample_edit(world, purpose, number) for number in numbers]
    sources = render([edit.source for edit in edits], world.size)
    targets = render([edit.target for edit in edits], world.size)
    for number, edit, source, target in zip(numbers, edits, sources, targets, strict=True):
        text = instruction(edit, draw_generator(world.seed, f"{purpose}/words", number))
        record = {
            "type": edit.kind,
            "instruction": text,
            "input_captions": captions(edit.source),
            "output_captions": captions(edit.target),
            "input_scene": edit.source.as_json(),
            "output_scene": edit.target.as_json(),
        }
        members = {"input.png": _png(source), "output.png": _png(target), "txt": text.encode(), "json": _json(record)}
        yield {"__key__": f"{purpose}-{number:08d}", **members}


def write_shard(path: Path, samples: Iterator[dict[str, Any]]) -> None:
    """Write samples ({"__key__": key, extension: bytes}) as a tar, atomically, and its index beside it."""
    from webdataset.writer import TarWriter  # imported here, because it imports torch's data pipes

    buffer = io.BytesIO()
    with TarWriter(buffer, encoder=False, mtime=0, user="spar", group="spar") as writer:
        for sample in samples:
            writer.write(sample)
    write_file(path, buffer.getvalue())
    write_index(str(path), index_shard(str(path)))


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode()


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def _shard_paths(world: World, out_dir: Path, purpose: str) -> list[Path]:
    number = -(-getattr(world, PURPOSES[purpose]) // world.per_shard)
    return [out_dir / f"{purpose}-{shard:05d}.tar" for shard in range(number)]


def _is_complete(path: Path) -> bool:
    """Return whether a shard and its index exist and match."""
    if not path.exists() or not Path(index_path(str(path))).exists():
        return False
    try:
        read_header(str(path))
    except UserError:
        return False
    return True


def _write_settings(world: World, out_dir: Path, complete: bool) -> None:
    content = {"generation": GENERATION, "complete": complete, "world": world.model_dump(mode="json")}
    write_file(out_dir / SETTINGS, (json.dumps(content, indent=1) + "\n"))


def _check_settings(world: World, out_dir: Path) -> bool:
    """Return whether this world is complete in `out_dir`. Raises UserError if the folder holds another world."""
    path = out_dir / SETTINGS
    remedy = "choose another folder, or delete that one"
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"{out_dir}: is a file, expected a folder for the shards")
    if not path.exists():
        other_shards = sorted(shard.name for purpose in PURPOSES for shard in out_dir.glob(f"{purpose}-*.tar"))
        if other_shards:
            raise UserError(f"{out_dir}: holds {other_shards[0]} but no {SETTINGS} with its settings; {remedy}")
        return False
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found, generation, complete = dict(content["world"]), content["generation"], bool(content["complete"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the settings of a world ({error}); {remedy}") from None
    expected = {**world.model_dump(mode="json"), "generation": GENERATION}
    found["generation"] = generation
    differing = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    if differing:
        details = ", ".join(f"{name}: found {found.get(name)}, expected {expected.get(name)}" for name in differing)
        raise UserError(f"{out_dir}: holds a world made with other settings ({details}); {remedy}")
    return complete
