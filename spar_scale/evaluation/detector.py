"""Detect the objects in a picture of the miniature world, without a trained model.

A matched filter: pixels with chroma are foreground, the direction of their chroma is their colour, connected pixels of
a colour are a blob, and a blob's strength along its colour is correlated with shapes rendered at its centre of mass in
four sizes. A blob that no shape fits becomes an object without a shape, so that the strict judge can reject it. A blob
of fewer than 8 pixels (in a 32-pixel image) is an artefact of edges and ignored. In a thousand true scenes with three
shapes, all but a few scenes are detected exactly.

Legend: B pictures, K blobs, S their side in pixels, T templates (shapes x sizes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spar_scale.data.shapes_render import RGB, signed_distance
from spar_scale.data.shapes_world import COLORS, SHAPES, UNIT_SIZE

# All lengths are those of a 32-pixel image; areas grow with the square of the size.
SATURATION = 0.28  # a pixel is foreground if its largest minus its smallest channel exceeds this
AREA = 8.0  # pixels of the smallest blob that counts; smaller ones are edges between objects
MARGIN = 2.0  # pixels around a blob that a shape must leave free
RADII = (4.8, 5.5, 6.2, 6.9)
BLUR = 0.7  # pixels: models draw softer edges than the renderer
CORRELATION = 0.94  # below it no shape fits; true scenes reach 0.96, as reconstructions of 30 dB do

_CHROMA = RGB - RGB.mean(-1, keepdims=True)
_DIRECTIONS = torch.from_numpy(_CHROMA / np.linalg.norm(_CHROMA, axis=-1, keepdims=True))  # (colors, 3)


@dataclass(frozen=True)
class DetectedObject:
    """An object in a picture: centre in pixels, x to the right, y downwards; `shape` is None if no shape fits."""

    shape: str | None
    color: str
    x: float
    y: float

    @property
    def look(self) -> str:
        """Colour and shape, "red circle"."""
        return f"{self.color} {self.shape}"

    def as_json(self) -> dict[str, Any]:
        """Return the object as JSON values."""
        return {"shape": self.shape, "color": self.color, "x": round(self.x, 1), "y": round(self.y, 1)}


def detect(images: Tensor, shapes: Sequence[str] = SHAPES[:3], batch: int = 64) -> list[list[DetectedObject]]:
    """Return the objects of each picture (B, 3, S, S) in [0, 1]; `shapes` are the candidate shapes."""
    return [objects for part in images.split(batch) for objects in _detect(part.float().clamp(0, 1), shapes)]


def _detect(images: Tensor, shapes: Sequence[str]) -> list[list[DetectedObject]]:
    side = images.shape[-1]
    unit = side / UNIT_SIZE
    chroma = (images - images.mean(1, keepdim=True)).permute(0, 2, 3, 1)  # (B, S, S, 3)
    colors = (chroma @ _DIRECTIONS.T).argmax(-1)
    ground = images.amax(1) - images.amin(1) <= SATURATION
    labels = components(torch.where(ground, -1, colors))
    detected: list[list[DetectedObject]] = [[] for _ in images]
    blobs, areas = torch.unique(labels[labels >= 0], return_counts=True)
    blobs = blobs[areas >= AREA * unit**2]
    if not len(blobs):
        return detected
    pictures = blobs // side**2
    inside = labels[pictures] == blobs[:, None, None]  # (K, S, S)
    color = colors.flatten()[blobs]
    window = _boxes(inside, MARGIN * unit)
    strength = torch.einsum("kijc,kc->kij", chroma[pictures], _DIRECTIONS[color]).clamp(min=0)
    strength = strength * window * (inside | (labels[pictures] < 0))  # masks the pixels of other blobs
    axis = torch.arange(side) + 0.5
    total = strength.sum((1, 2))
    x, y = (strength.sum(1) * axis).sum(1) / total, (strength.sum(2) * axis).sum(1) / total
    best, offset = _fit(strength, window, x, y, shapes, unit)
    for index, picture in enumerate(pictures.tolist()):
        shape = None if best[index] < 0 else shapes[int(best[index])]
        center_y = float(y[index] - offset[index])
        detected[picture].append(DetectedObject(shape, COLORS[int(color[index])], float(x[index]), center_y))
    return detected


def components(colors: Tensor) -> Tensor:
    """Label connected pixels of the same colour: (B, S, S) colours, -1 for the background, to labels of that shape.

    A component's label is the largest flat index among its pixels; the background is -1. A pixel has four neighbours.
    Labels spread by one pixel per round, so the time grows with the longest path inside a component.
    """
    labels = torch.where(colors >= 0, torch.arange(colors.numel()).view(colors.shape), -1)
    while True:
        spread = labels.clone()
        for dim in (1, 2):
            size = colors.shape[dim] - 1
            same = colors.narrow(dim, 0, size) == colors.narrow(dim, 1, size)
            for to, source in ((0, 1), (1, 0)):
                # Cloned, because the two views overlap.
                target, neighbour = spread.narrow(dim, to, size), spread.narrow(dim, source, size).clone()
                target.copy_(torch.where(same, torch.maximum(target, neighbour), target))
        if torch.equal(spread, labels):
            return labels
        labels = spread


def _boxes(inside: Tensor, margin: float) -> Tensor:
    """Return masks (K, S, S) of 0 and 1: the bounding boxes of blobs (K, S, S), extended by a margin."""
    axis = torch.arange(inside.shape[-1], dtype=torch.float32)
    spans = []
    for occupied in (inside.any(2), inside.any(1)):  # rows, columns
        first = torch.where(occupied, axis, torch.inf).amin(1, keepdim=True) - margin
        last = torch.where(occupied, axis, -torch.inf).amax(1, keepdim=True) + margin
        spans.append((axis >= first) & (axis <= last))
    return (spans[0][:, :, None] & spans[1][:, None, :]).float()


def _fit(
    strength: Tensor, window: Tensor, x: Tensor, y: Tensor, shapes: Sequence[str], unit: float
) -> tuple[Tensor, Tensor]:
    """Return each blob's best shape, (K,) index or -1, and how far its centre of mass is below its centre, (K,)."""
    axis = np.arange(strength.shape[-1], dtype=np.float32) + 0.5
    dx, dy = axis - x.numpy()[:, None, None, None], axis[:, None] - y.numpy()[:, None, None, None]
    radii = np.tile(np.array(RADII, dtype=np.float32) * unit, len(shapes))
    kinds = np.repeat([SHAPES.index(shape) for shape in shapes], len(RADII))
    below = np.array([_mass_offset(kind) for kind in kinds], dtype=np.float32) * radii
    column = (1, -1, 1, 1)
    distance = signed_distance(
        kinds.reshape(column), dx, dy + below.reshape(column), radii.reshape(column)
    )  # (K, T, S, S)
    templates = _blurred(torch.from_numpy(np.clip(0.5 - distance, 0, 1)).float(), BLUR * unit)
    correlations = _correlation(templates, strength[:, None], window[:, None])
    score, best = correlations.max(1)
    shape = torch.where(score > CORRELATION, best // len(RADII), -1)
    return shape, torch.from_numpy(below)[best]


def _mass_offset(kind: int) -> float:
    """Return how far the centre of mass of a shape of radius 1 is below its centre."""
    axis = np.linspace(-1.5, 1.5, 301, dtype=np.float32)
    inside = signed_distance(np.array(kind), axis[None, :], axis[:, None], np.array(1.0)) < 0
    return float((inside * axis[:, None]).sum() / inside.sum())


def _blurred(images: Tensor, sigma: float) -> Tensor:
    """Return images (K, T, S, S) with a Gaussian blur."""
    reach = int(3 * sigma + 1)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    flat = images.flatten(0, 1)[:, None]
    flat = F.conv2d(flat, kernel.view(1, 1, 1, -1), padding=(0, reach))
    return F.conv2d(flat, kernel.view(1, 1, -1, 1), padding=(reach, 0)).view(images.shape)


def _correlation(a: Tensor, b: Tensor, window: Tensor) -> Tensor:
    """Return Pearson's correlation of pictures (..., S, S) over the pixels of a window."""
    area = window.sum((-2, -1), keepdim=True)
    a, b = (t - (t * window).sum((-2, -1), keepdim=True) / area for t in (a, b))
    product, a_square, b_square = ((t * window).sum((-2, -1)) for t in (a * b, a.square(), b.square()))
    return product / ((a_square * b_square).sqrt() + 1e-6)
