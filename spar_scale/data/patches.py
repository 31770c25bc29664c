"""Labels of the image tokens of a miniature-world picture: the shape and colour that each token shows.

Only training stage 0 reads them: it trains a vision tower from random weights, where the paper starts from a pretrained
one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from spar_scale.data.shapes_world import COLORS, SHAPES

UNKNOWN = 255
"""The label of a token whose content is unknown: the sample has no scene, or no picture."""
NUM_LABELS = (len(SHAPES) + 1, len(COLORS) + 1)
"""Numbers of shape labels and colour labels; 0 is the background."""
_MARGIN = 1 / 32  # share of the image's side by which an object's square exceeds its radius


def shown_patches(scene: Mapping[str, Any] | None, image_size: int, image_tokens: int) -> np.ndarray:
    """Return the labels (N, 2) uint8, shape and colour, of the N = g * g tokens of a scene's picture in raster order.

    A token is labelled with the last drawn object whose square contains the token's centre, or whose centre is in the
    token. Without a scene all labels are `UNKNOWN`. Raises KeyError or ValueError for a malformed scene.
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
