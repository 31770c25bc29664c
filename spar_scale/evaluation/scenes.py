"""Read held-out scenes and edits of the miniature world."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from parallel.errors import UserError
from spar_scale.data.images import decode
from spar_scale.data.shapes_world import Object, World
from spar_scale.data.shards import SETTINGS
from spar_scale.data.storage import expand_shards, read_member
from spar_scale.data.tar_index import read_index
from spar_scale.inference.pictures import to_tensor


@dataclass(frozen=True)
class HeldOutScene:
    """A picture (3, S, S) in [0, 1] and its objects."""

    image: Tensor
    objects: tuple[Object, ...]


@dataclass(frozen=True)
class HeldOutEdit:
    """Two pictures (3, S, S) in [0, 1], the instruction that leads from one to the other, and the target's objects."""

    kind: str
    instruction: str
    source: Tensor
    target: Tensor
    objects: tuple[Object, ...]


def world_of(folder: Path) -> World:
    """Return the settings of the world whose shards are in a directory. Raises UserError if there are none."""
    path = folder / SETTINGS
    try:
        return World.model_validate(json.loads(path.read_text(encoding="utf-8"))["world"])
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected shards that `spar-scale data make` wrote") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the settings of a world ({' '.join(str(error).split())})") from None


def scenes_of(folder: Path, count: int) -> list[HeldOutScene]:
    """Return the first `count` held-out scenes of a world."""
    return [
        HeldOutScene(_picture(sample["png"]), _objects(sample, "scene"))
        for sample in first_samples(str(folder / "heldout-*.tar"), count)
    ]


def edits_of(folder: Path, count: int) -> list[HeldOutEdit]:
    """Return the first `count` held-out edits of a world."""
    return [
        HeldOutEdit(
            json.loads(sample["json"])["type"],
            sample["txt"].decode(),
            _picture(sample["input.png"]),
            _picture(sample["output.png"]),
            _objects(sample, "output_scene"),
        )
        for sample in first_samples(str(folder / "test-edits-*.tar"), count)
    ]


def first_samples(shards: str, count: int) -> list[dict[str, bytes]]:
    """Return the first samples of shards, each as name of a member -> its bytes."""
    samples: list[dict[str, bytes]] = []
    for shard in expand_shards(shards):
        index = read_index(shard)
        for number in range(min(len(index), count - len(samples))):
            members = index.members(number)
            samples.append({name: read_member(shard, *place) for name, place in members.items()})
    return samples


def _picture(png: bytes) -> Tensor:
    return to_tensor(decode(png))


def _objects(sample: dict[str, bytes], name: str) -> tuple[Object, ...]:
    annotations: dict[str, Any] = json.loads(sample["json"])
    return tuple(Object(**o) for o in annotations[name]["objects"])
