"""Generated pictures that resemble photographs, with free captions and edits, in the public shard formats.

Landscapes of fractal noise have what flat test pictures lack: fine texture, gradients, many sizes and shapes. Two kinds
of shard are written: pairs (`jpg`, `txt`) and edits (`input.jpg`, `output.jpg`, `txt`).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from spar_scale.data.order import draw_generator
from spar_scale.data.shards import write_shard

COUNT, PHOTOGRAPH = 16, "photograph.jpg"
SIZES = ((640, 427), (427, 640), (512, 512), (800, 450))  # width and height in pixels
LIGHTS = {  # sky above, sky at the horizon, and how bright the ground is
    "at noon": ((70, 120, 200), (190, 215, 240), 1.0),
    "at dawn": ((90, 90, 140), (250, 190, 140), 0.7),
    "at dusk": ((40, 35, 80), (230, 110, 70), 0.45),
    "on a cloudless night": ((5, 8, 25), (30, 40, 80), 0.2),
}
GROUNDS = {  # colours of the layers from the horizon to the viewer
    "mountains behind a meadow": ((110, 120, 140), (70, 90, 70), (90, 140, 60)),
    "dunes of a desert": ((210, 180, 130), (200, 160, 100), (170, 120, 70)),
    "a lake in front of wooded hills": ((60, 90, 70), (40, 70, 50), (60, 90, 120)),
    "snow-covered peaks": ((200, 210, 225), (225, 230, 240), (245, 245, 250)),
}
EDITS = {
    "Turn the photograph into black and white, but keep its composition.": ImageOps.grayscale,
    "Mirror the picture!": ImageOps.mirror,
    "Make the whole scene much brighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.6),
    "Fais-en un negatif, s'il te plait.": ImageOps.invert,
}


def write_photographs(folder: Path) -> None:
    """Write COUNT pictures to `folder`: shards `pairs-*.tar` and `edits-*.tar`, and the first one as a file."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [photograph(number) for number in range(COUNT)]
    write_shard(folder / "pairs-00000.tar", _pairs(pictures))
    write_shard(folder / "edits-00000.tar", _edits(pictures))
    pictures[0].save(folder / PHOTOGRAPH)


def caption(number: int) -> str:
    """Return the caption of a picture: a long sentence with the punctuation of captions from the web."""
    light, ground = list(LIGHTS)[number % 4], list(GROUNDS)[number // 4 % 4]
    return (
        f"A wide-angle photograph of {ground} {light}; the sky's colour fades towards the horizon, and fine texture"
        f" covers the ground. (no. {number + 1} of {COUNT}, 35 mm, f/8)"
    )


def photograph(number: int) -> Image.Image:
    """Return a picture of a landscape, the same for the same number."""
    draws = draw_generator(0, "photograph", number)
    width, height = SIZES[number % len(SIZES)]
    above, below, brightness = list(LIGHTS.values())[number % 4]
    rows = np.linspace(0, 1, height)[:, None, None]
    picture = np.asarray(above) * (1 - rows) + np.asarray(below) * rows + 25 * _noise(draws, height, width)[..., None]
    for layer, colour in enumerate(list(GROUNDS.values())[number // 4 % 4]):
        crest = height * (0.4 + 0.2 * layer + 0.1 * _noise(draws, 1, width)[0])
        texture = 1 + (0.15 + 0.1 * layer) * _noise(draws, height, width, finest=1)
        ground = np.asarray(colour) * brightness * texture[..., None]
        picture = np.where(np.arange(height)[:, None, None] > crest[None, :, None], ground, picture)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def _noise(draws: np.random.Generator, height: int, width: int, finest: int = 8) -> np.ndarray:
    """Return fractal noise (height, width) of about unit range: grids of ever finer cells, each of .7 the weight."""
    total, weight, cell = np.zeros((height, width), dtype=np.float32), 1.0, 256
    while cell >= finest:
        grid = draws.uniform(-1, 1, (height // cell + 2, width // cell + 2)).astype(np.float32)
        fine = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)
        total += weight * np.asarray(fine)
        weight, cell = 0.7 * weight, cell // 2
    return total


def _pairs(pictures: list[Image.Image]) -> Iterator[dict[str, Any]]:
    for number, picture in enumerate(pictures):
        yield {"__key__": f"{number:08d}", "jpg": _jpeg(picture), "txt": caption(number).encode()}


def _edits(pictures: list[Image.Image]) -> Iterator[dict[str, Any]]:
    for number, picture in enumerate(pictures):
        instruction, change = list(EDITS.items())[number % len(EDITS)]
        sides = {"input.jpg": _jpeg(picture), "output.jpg": _jpeg(change(picture).convert("RGB"))}
        yield {"__key__": f"{number:08d}", **sides, "txt": instruction.encode()}


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "jpeg", quality=92)
    return buffer.getvalue()
