"""Render scenes of the miniature world as images, a few hundred at a time, in plain numpy.

Edges are anti-aliased by the signed distance to the shape: a pixel's coverage is 0.5 minus the distance of its centre
to the edge, clipped to [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spar_scale.data.shapes_world import COLORS, SHAPES, Object, Scene

RGB = np.array(
    [[220, 40, 40], [40, 180, 60], [50, 80, 225], [235, 215, 50], [190, 60, 200], [60, 205, 215]], dtype=np.float32
)  # of COLORS, in order


def render(scenes: Sequence[Scene], size: int) -> np.ndarray:
    """Return the images of scenes, (len(scenes), size, size, 3) uint8."""
    axis = np.arange(size, dtype=np.float32) + 0.5
    x, y = axis[None, None, :], axis[None, :, None]
    images = np.repeat(_grounds(scenes, x, y, size)[..., None], 3, axis=-1)
    for depth in range(max(len(scene.objects) for scene in scenes)):
        rows = [row for row, scene in enumerate(scenes) if len(scene.objects) > depth]
        objects = [scenes[row].objects[depth] for row in rows]
        coverage = np.clip(0.5 - _distance(objects, x, y), 0.0, 1.0)[..., None]
        color = RGB[[COLORS.index(o.color) for o in objects]][:, None, None] / 255
        images[rows] = images[rows] * (1 - coverage) + color * coverage
    return np.round(np.clip(images, 0.0, 1.0) * 255).astype(np.uint8)


def _grounds(scenes: Sequence[Scene], x: np.ndarray, y: np.ndarray, size: int) -> np.ndarray:
    """Return the grey backgrounds (N, size, size), approximately in [0, 1]."""

    def column(name: str) -> np.ndarray:
        return np.array([getattr(scene.ground, name) for scene in scenes], dtype=np.float32)[:, None, None]

    u, v = x / size - 0.5, y / size - 0.5
    angle = column("slope_angle")
    ground = column("level") + 2 * column("slope") * (u * np.cos(angle) + v * np.sin(angle))
    if any(scene.ground.stripes for scene in scenes):
        angle = column("stripes_angle")
        turn = 2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / column("wavelength") + column("phase")
        ground = ground + column("stripes") * np.sin(turn)
    return ground.astype(np.float32)


def _distance(objects: Sequence[Object], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the distance (N, size, size) in pixels of each pixel to each object's edge, negative inside."""

    def column(values: list[float]) -> np.ndarray:
        return np.array(values, dtype=np.float32)[:, None, None]

    shapes = column([SHAPES.index(o.shape) for o in objects])
    dx, dy = x - column([o.x for o in objects]), y - column([o.y for o in objects])
    return signed_distance(shapes, dx, dy, column([o.radius for o in objects]))


def signed_distance(shapes: np.ndarray, dx: np.ndarray, dy: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Return the distance in pixels from points at offset (dx, dy) from the centre to a shape's edge, negative inside.

    `shapes` are indices into SHAPES; all four arrays broadcast. Near a corner it is the distance to the nearest side.
    """
    x, y, height = np.abs(dx), np.abs(dy), 0.95 * radius
    sides = {
        "circle": lambda: np.sqrt(dx * dx + dy * dy) - radius,
        "square": lambda: np.maximum(x, y) - 0.88 * radius,
        "triangle": lambda: np.maximum(dy - 0.85 * height, (1.75 * x - dy - 0.95 * height) / 2.0),
        "cross": lambda: np.minimum(
            np.maximum(x - radius, y - 0.38 * radius), np.maximum(x - 0.38 * radius, y - radius)
        ),
        "diamond": lambda: (x + y - 1.1 * radius) / np.sqrt(2.0),
    }
    occurring = list(np.unique(shapes).astype(int))
    distances = [sides[SHAPES[shape]]() for shape in occurring]
    return np.select([shapes == shape for shape in occurring], distances)
