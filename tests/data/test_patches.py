"""What each image token shows: labels made of a scene."""

from __future__ import annotations

import numpy as np
import pytest

from spar_scale.data.patches import NUM_LABELS, UNKNOWN, shown_patches
from spar_scale.data.shapes_world import COLORS, SHAPES, World, sample_scene


def test_labels_by_hand():
    square = {"shape": "square", "color": "blue", "radius": 5.0, "x": 4.0, "y": 12.0}
    small = {"shape": "circle", "color": "red", "radius": 0.5, "x": 31.9, "y": 17.0}
    found = shown_patches({"objects": [square, small]}, 32, 16).reshape(4, 4, 2)
    expected = np.zeros((4, 4, 2), np.uint8)
    expected[1, 0] = SHAPES.index("square") + 1, COLORS.index("blue") + 1  # centres (4, 12): 4 and 20 are too far
    expected[2, 3] = SHAPES.index("circle") + 1, COLORS.index("red") + 1  # holds its centre
    assert np.array_equal(found, expected)


def test_without_a_scene_nothing_is_known_and_another_scene_is_refused():
    assert (shown_patches(None, 32, 16) == UNKNOWN).all()
    with pytest.raises(KeyError):
        shown_patches({"things": []}, 32, 16)
    with pytest.raises(ValueError):
        shown_patches({"objects": [{"shape": "blob", "color": "red", "radius": 3, "x": 1, "y": 1}]}, 32, 16)


def test_every_object_of_the_world_shows():
    world = World(seed=3)
    for number in range(40):
        scene = sample_scene(world, "scenes", number)
        labels = shown_patches(scene.as_json(), world.size, 16)
        assert (labels < NUM_LABELS).all()
        for o in scene.objects:
            assert (labels == [SHAPES.index(o.shape) + 1, COLORS.index(o.color) + 1]).all(1).any()
