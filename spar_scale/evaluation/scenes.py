"""Held-out scenes of the miniature world, and one photograph: what the reports show."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from parallel.errors import UserError
from spar_scale.data.images import decode
from spar_scale.data.storage import expand_shards, read_member
from spar_scale.data.tar_index import read_index
from spar_scale.evaluation.reconstruction import to_tensor

PHOTO_WIDTH = 320  # pixels


def held_out_scenes(folder: Path, count: int) -> tuple[Tensor, list[str]]:
    """The first held-out scenes of a world: images (n, 3, S, S) in [0, 1] and one caption each."""
    images, captions = [], []
    for shard in expand_shards(str(folder / "heldout-*.tar")):
        index = read_index(shard)
        for member in range(min(len(index), count - len(images))):
            table = index.members(member)
            images.append(to_tensor(decode(read_member(shard, *table["png"]))))
            captions.append(read_member(shard, *table["txt"]).decode())
    return torch.stack(images), captions


def photograph(name: str = "china.jpg") -> Image.Image:
    """A real photograph that comes with scikit-learn, scaled to PHOTO_WIDTH."""
    try:
        from sklearn.datasets import load_sample_image
    except ImportError:
        raise UserError("the demo shows a photograph that comes with scikit-learn; install the extra `demo`") from None
    picture = Image.fromarray(load_sample_image(name))
    height = round(picture.height * PHOTO_WIDTH / picture.width)
    return picture.resize((PHOTO_WIDTH, height), Image.Resampling.BICUBIC)
