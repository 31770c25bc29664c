"""What each image token of a picture of the miniature world shows: labels for the vision tower's first lessons.

Stage 0 alone reads them, where a vision tower learns from nothing what the paper's brings along.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from spar_scale.data.shapes_world import COLORS, SHAPES

UNKNOWN = 255
"""The label where nothing is known: no scene is told, or there is no picture."""
NUM_LABELS = (len(SHAPES) + 1, len(COLORS) + 1)
"""How many there are of shapes and of colours, 0 being the ground."""
_MARGIN = 1 / 32  # of the image's side: how far around an object's radius a token still belongs to it


def shown_patches(scene: Mapping[str, Any] | None, image_size: int, image_tokens: int) -> np.ndarray:
    """Return the labels (N, 2) uint8, shape and colour, of the N = g * g tokens of a scene's picture in raster order.

    A token shows the last drawn object whose square its centre stands in, and the one whose centre it holds.
    Without a scene all are `UNKNOWN`. Raises KeyError or ValueError for a scene that tells something else.
    """
    if scene is None:
        return np.full((image_tokens, 2), UNKNOWN, np.uint8)
    side = round(image_tokens**0.5)
    step = image_size / side
    centres = (np.arange(side) + 0.5) * step
    labels = np.zeros((side, side, 2), np.uint8)
    for o in scene["objects"]:
        reach = o["radius"] + _MARGIN * image_size
        inside = (abs(centres - o["y"])[:, None] < reach) & (abs(centres - o["x"])[None] < reach)
        inside[min(int(o["y"] / step), side - 1), min(int(o["x"] / step), side - 1)] = True
        labels[inside] = SHAPES.index(o["shape"]) + 1, COLORS.index(o["color"]) + 1
    return labels.reshape(image_tokens, 2)
