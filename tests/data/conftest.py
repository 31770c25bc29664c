"""Small worlds and hand-made shards for the data tests."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from webdataset.writer import TarWriter

from spar_scale.data.shapes_world import World
from spar_scale.data.shards import make_world
from spar_scale.data.tar_index import index_shard, write_index

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory) -> Path:
    """A folder with 90 scenes in 4 shards (the last shorter), 10 held out and 40 edits in 2 shards."""
    folder = tmp_path_factory.mktemp("world")
    make_world(World(scenes=90, heldout=10, edits=40, per_shard=25, seed=3), folder)
    return folder


@pytest.fixture
def make_shard(tmp_path):
    """Return a function that writes {key: {extension: bytes}} as an indexed shard and returns its path."""

    def write(samples: dict[str, dict[str, bytes]], name: str = "x-00000.tar", indexed: bool = True) -> str:
        path = tmp_path / name
        with open(path, "wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
            for key, members in samples.items():
                writer.write({"__key__": key, **members})
        if indexed:
            write_index(str(path), index_shard(str(path)))
        return str(path)

    return write


@pytest.fixture
def picture():
    """Return a function that makes the bytes of an image: a horizontal ramp, so that a flip shows."""

    def make(width: int = 8, height: int = 8, mode: str = "RGB", kind: str = "png") -> bytes:
        image = Image.linear_gradient("L").rotate(90).resize((width, height)).convert(mode)
        buffer = io.BytesIO()
        image.save(buffer, kind)
        return buffer.getvalue()

    return make
